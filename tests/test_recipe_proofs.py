"""The paper's recipes A1 and A2 as our parts carry them out, against timm's own parts, put together as the official script does it."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.layers import DropPath
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.config.schema import Recipe
from kdlib.engine.setting import total_steps
from kdlib.losses import HARD
from kdlib.losses.base import Method
from kdlib.models.build import Classifier, build
from kdlib.seed import seed_torch
from kdlib.types import Batch, Setup
from kdlib.views import mixup
from kdlib.views.mixup import Mix
from kdlib.views.stream import ViewStream
from tests import published_recipes, training
from tests.published_recipes import IMAGES, STRONG

CLASSES = 1000
STUDENTS = ("resnet50", "vit_tiny_patch16_224", "convnextv2_tiny")


# Mixed images and soft targets


def stream(recipe: Recipe, count: int = 64) -> ViewStream:
    """Images of 16 px of as many classes as ImageNet has; whole, since crops are not what is compared."""
    rng = np.random.default_rng(0)
    plain = recipe.model_copy(update={"batch_size": 64, "group_size": 16, "crop_min_area": 1.0, "augment": "batched"})
    images, labels = rng.integers(0, 256, (count, 16, 16, 3), np.uint8), rng.integers(0, CLASSES, count)
    return ViewStream(images, labels, np.arange(count), classes=CLASSES, recipe=plain, hflip=0.5, seed=1)


def officially_mixed(recipe: Recipe, views: Batch, mix: Mix, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Images (0..255) and targets that the official loader's collation makes of these views, if it draws this mixing."""
    collate = timm_mixup.FastCollateMixup(
        **{"mixup_alpha": recipe.mixup_alpha, "cutmix_alpha": recipe.cutmix_alpha, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"},
        **{"label_smoothing": recipe.label_smoothing, "num_classes": CLASSES},
    )
    monkeypatch.setattr(collate, "_params_per_batch", lambda: (mix.share, mix.box is not None))
    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *_, **__: (mix.box, mix.share))
    levels = (views.images * 255).round().byte().numpy()
    images, targets = collate([(image, int(label)) for image, label in zip(levels, views.labels, strict=True)])
    return images, targets


@pytest.mark.parametrize("strategy", STRONG)
def test_mixed_images_targets_and_hard_losses_are_the_official_loaders(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each mix group, the batch of one GPU there. Its images are rounded to whole levels; ours are not: half a level of 255."""
    recipe = published_recipes.strong(strategy)
    mixed, plain = stream(recipe), stream(recipe.model_copy(update={"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}))
    drawn: list[Mix] = []
    draw = mixup.draw_mix

    def spy(*among: Any) -> Mix:
        drawn.append(draw(*among))
        return drawn[-1]

    monkeypatch.setattr(mixup, "draw_mix", spy)
    logits = torch.randn(16, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    for step in range(6):
        for group in range(4):
            ours = mixed.batch(step, group)
            mix, views = drawn[-1], plain.batch(step, group)
            images, targets = officially_mixed(recipe, views, mix, monkeypatch)
            assert_close(ours.targets, targets, rtol=0, atol=1e-7)
            assert (ours.images * 255 - images).abs().max() <= 0.5 + 1e-3
            # as the script makes them under mixup: what they smooth by themselves is hard labels alone
            for name, official in (("bce", BinaryCrossEntropy(target_threshold=None)), ("ce", SoftTargetCrossEntropy())):
                loss = HARD[name]
                assert loss is not None
                assert_close(loss(logits, ours.targets), official(logits, targets), rtol=1e-6, atol=0)
    kinds = {(mix.box is not None) for mix in drawn if mix.share != 1}
    assert kinds == {True, False}
    assert recipe.hard_loss == "bce"


# The optimiser


def officially_decayed(net: nn.Module) -> set[str]:
    """By the rule of timm 0.6.5, with which the paper was made: nothing of one dimension, no bias, nothing that the model excepts."""
    excepted = getattr(net, "no_weight_decay", set)()
    return {name for name, weight in net.named_parameters() if weight.ndim > 1 and not name.endswith(".bias") and name not in excepted}


def adapted(name: str, student: Classifier, teacher: Classifier, classes: int) -> Method:
    """Of the method's official parameters, without the hard label's weight."""
    made = training.method(name)()
    seed_torch(2)
    made.adapt(Setup(student.shape, teacher.shape, torch.arange(classes)))
    return made


@pytest.mark.parametrize(("student", "method"), [*zip(STUDENTS, ("reviewkd", "cc", "cc"), strict=True)])
def test_weights_decay_as_in_the_official_script(student: str, method: str) -> None:
    """There the method's adapters are a part of the student, of one optimiser; ours are groups of the same optimiser.

    ConvNeXt V2's GRN has scale and shift of one dimension in timm, which do not decay; in the official repository's own model file they
    have four, and decay. Of all parameters of the four students these are the only ones that differ.
    """
    recipe = published_recipes.strong("A1")
    made = build(student, CLASSES, 3, 32, recipe.drop_path)
    adapters = adapted(method, made, made, CLASSES)
    learner = training.learner(method, made, adapters, recipe, total_steps=10, seed=0)
    together = copy.copy(made.net)  # the learner's own parameters
    together.kd_loss_fn = adapters
    names = {id(weight): name for name, weight in together.named_parameters()}
    found = {names[id(weight)]: group["weight_decay"] for group in learner.optimizer.param_groups for weight in group["params"]}
    decayed = officially_decayed(together)
    assert any(name.startswith("kd_loss_fn.") for name in decayed)
    assert found == {name: recipe.weight_decay if name in decayed else 0.0 for name in names.values()}
    assert type(learner.optimizer).__name__ == "Lamb"
    assert {weight.ndim for name, weight in made.net.named_parameters() if ".grn." in name} <= {1}
    assert not [name for name in ("cls_token", "pos_embed") if found.get(name)]


@pytest.mark.parametrize("name", ["kd", "fitnet"])
def test_steps_are_those_of_timms_lamb_on_student_and_adapters(name: str) -> None:
    """Five steps of a learner against a loop around timm's optimiser and its schedule, with the adapters in the model."""
    recipe = training.recipe(
        **published_recipes.strong("A1").model_dump(include={"optimizer", "learning_rate", "weight_decay", "warmup_lr", "min_lr"}),
        **{"drop_path": 0.0, "warmup": 0.2, "hard_loss": "bce", "label_smoothing": 0.1},
    )
    among = training.setting()
    split = among.data.train
    views = ViewStream(split.images, split.labels, among.index, classes=6, recipe=recipe, hflip=0.5, seed=3)
    torch.manual_seed(8)
    student = build(training.NET, 6, 1, 8)
    method = adapted(name, student, among.teacher.classifier, 6)
    twin, its = copy.deepcopy(student), copy.deepcopy(method)
    learner = training.learner(name, student, method, recipe, total_steps=10, seed=0)
    twin.net.kd_loss_fn = its
    optimizer = create_optimizer_v2(twin.net, opt="lamb", lr=recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-6, warmup_t=2, warmup_lr_init=1e-6, t_in_epochs=False)
    for step in range(5):
        batch = views.batch(step)
        answers = among.teacher(batch.images, method.asks_teacher)
        learner.take(learner.step, batch, answers)
        learner.advance()
        terms = its(twin(batch.images, its.asks_student), answers, batch, HARD["bce"], torch.tensor((step + 1) / 10))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        schedule.step_update(step + 0.5)
        optimizer.step()
    for ours, theirs in ((student.net, twin.net), (method, its)):
        state = ours.state_dict()
        for key, value in theirs.state_dict().items():
            if not key.startswith("kd_loss_fn."):
                assert_close(state[key], value, rtol=0, atol=1e-6, msg=key)


def test_timms_lamb_is_still_the_one_of_the_paper() -> None:
    """Written out in float64: the gradient of all weights scaled to a norm of at most 1; Adam's step; decay; and, of decayed weights alone,
    the step scaled to the norm of the weight. Source: arXiv 1904.00962, algorithm 2; the rest as in timm 0.6.5.
    """
    rng, rate, decay, (one, two), eps = np.random.default_rng(0), 0.05, 0.02, (0.9, 0.999), 1e-6
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    weights = {name: weight.detach().numpy().copy() for name, weight in net.named_parameters()}
    first, second = ({name: np.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    optimizer = create_optimizer_v2(net, opt="lamb", lr=rate, weight_decay=decay)
    for step, size in enumerate((5.0, 0.01, 2.0, 0.1), start=1):  # above and below a norm of 1
        slopes = {name: size * rng.standard_normal(weight.shape) for name, weight in weights.items()}
        for name, weight in net.named_parameters():
            weight.grad = torch.from_numpy(slopes[name].copy())
        optimizer.step()
        norm = max(1.0, np.sqrt(sum((slope**2).sum() for slope in slopes.values())))
        for name, weight in weights.items():
            slope = slopes[name] / norm
            first[name] = one * first[name] + (1 - one) * slope
            second[name] = two * second[name] + (1 - two) * slope**2
            move = first[name] / (1 - one**step) / (np.sqrt(second[name] / (1 - two**step)) + eps)
            if weight.ndim > 1:
                move = move + decay * weight
                move = move * np.linalg.norm(weight) / np.linalg.norm(move)
            weights[name] = weight - rate * move
    for name, weight in net.named_parameters():
        np.testing.assert_allclose(weight.detach().numpy(), weights[name], rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("student", STUDENTS)
def test_drop_path_grows_linearly_over_the_blocks(student: str) -> None:
    """From 0 in the first block to the recipe's rate in the last, whatever stages they form."""
    recipe = published_recipes.strong("A2")
    net = build(student, CLASSES, 3, 32, recipe.drop_path).net
    found = [module.drop_prob for name, module in net.named_modules() if isinstance(module, DropPath) and not name.endswith("drop_path2")]
    blocks = {"resnet50": 16, "vit_tiny_patch16_224": 12, "convnextv2_tiny": 18}[student]
    assert found == pytest.approx(np.linspace(0, 0.05, blocks)[1:].tolist())  # without a rate there is no such module


# Repeated augmentation


RANKS, GROUP = 8, 16
BATCH = RANKS * GROUP


class Counted:
    """As many images as a sampler wants to know of."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def dealt(images: int, epoch: int) -> np.ndarray:
    """[rank, view]: the images that timm's sampler deals out to eight processes in an epoch, as the official command runs."""
    found = []
    for rank in range(RANKS):
        sampler = RepeatAugSampler(Counted(images), num_replicas=RANKS, rank=rank, num_repeats=3)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return np.array(found)


def repeated(images: int) -> ViewStream:
    recipe = published_recipes.strong("A2", batch_size=BATCH, group_size=GROUP)
    pixels = np.zeros((images, 8, 8, 3), np.uint8)
    return ViewStream(pixels, np.zeros(images, np.int64), np.arange(images), classes=CLASSES, recipe=recipe, hflip=0.5, seed=5)


def passed(views: ViewStream, steps: range) -> np.ndarray:
    """[step, group, view]: which images eight mix groups hold."""
    return np.array([[views.positions(step, group) for group in range(RANKS)] for step in steps])


@pytest.mark.parametrize("images", [1000, 1536, 2001])
def test_groups_are_dealt_what_timms_sampler_deals_to_processes(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order of the images: the same image at the same place of the same step, in the group of the same number as the rank.

    So as far as timm's epoch goes, which is a third of the pass.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).numpy()  # that of its epoch 0
    monkeypatch.setattr(ViewStream, "_order", lambda *_: order)
    theirs = dealt(images, epoch=0)
    steps = theirs.shape[1] // GROUP  # the official loader drops the rest
    assert steps == images // 256 * 256 // BATCH
    ours = passed(repeated(images), range(steps))
    np.testing.assert_array_equal(ours.transpose(1, 0, 2).reshape(RANKS, -1), theirs[:, : steps * GROUP])


def test_repeats_of_an_image_lie_in_three_groups_of_one_step_or_of_two() -> None:
    """In ours as in timm's; a step of 128 views holds 42 images thrice, and what is left of one or two at its ends."""
    theirs = dealt(1536, epoch=0).reshape(RANKS, -1, GROUP).transpose(1, 0, 2)
    ours = passed(repeated(1536), range(theirs.shape[0]))
    for holds in (theirs, ours):
        where: dict[int, list[tuple[int, int]]] = {}
        for (step, group, _), image in np.ndenumerate(holds):
            where.setdefault(int(image), []).append((step, group))
        assert [len(places) for places in where.values()].count(3) == len(where) == 512
        for places in where.values():
            assert len({group for _, group in places}) == 3
            assert max(places)[0] - min(places)[0] <= 1
        assert {tuple(sorted(np.unique(step, return_counts=True)[1], reverse=True)[:42]) for step in holds} == {(3,) * 42}


def test_an_epoch_of_timms_draws_its_third_anew_and_ours_goes_on() -> None:
    """What differs: over three epochs each of our images was seen three times; there, of each epoch's third thrice, about 8 of 27 never."""
    images = 1536
    theirs = np.bincount(np.concatenate([dealt(images, epoch).ravel() for epoch in range(3)]), minlength=images)
    ours = np.bincount(passed(repeated(images), range(3 * images // BATCH)).ravel(), minlength=images)
    assert theirs.sum() == ours.sum() == 3 * images  # as many views
    assert set(ours) == {3}
    assert set(theirs) == {0, 3, 6, 9}
    assert (theirs == 0).mean() == pytest.approx((2 / 3) ** 3, abs=0.03)


def test_an_epoch_of_imagenet_is_625_steps_there_and_625_and_a_half_here() -> None:
    """Timm's sampler cuts to a multiple of 256 images, and the official loader drops a last batch that is not full: 1,167 views."""
    sampler = RepeatAugSampler(Counted(IMAGES["imagenet"]), num_replicas=8, rank=0, num_repeats=3)
    recipe = published_recipes.strong("A1")
    assert len(sampler) // recipe.group_size == 625  # type: ignore[operator]
    assert IMAGES["imagenet"] - 625 * recipe.batch_size == 1167
    assert total_steps(recipe, IMAGES["imagenet"]) == 375_342  # of 600 epochs; 375,000 there, less than one in a thousand fewer
