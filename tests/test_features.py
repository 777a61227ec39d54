"""Embeddings, stage maps and preactivations of many families: against hooks on modules named by hand, and against the plain model."""

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.engine.teacher import Teacher
from kdlib.models.build import Classifier
from kdlib.models.features import Tap, stage_indices
from kdlib.types import Asks, Feature, Output
from tests import zoo
from tests.toys import tensors

ALL: Asks = frozenset(Feature)
FAMILIES = list(zoo.MEMBERS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
ENDING = [family for family, member in zoo.MEMBERS.items() if any(member.endings)]
PARTS = [frozenset({part}) for part in Feature]


def collect(net: nn.Module, names: list[str], run: Callable[[], object], given: bool = False) -> dict[str, Tensor]:
    """Copies of what these modules put out meanwhile, or are given, at their last call."""
    found: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].clone()))
        if given
        else net.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output.clone()))
        for name in names
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


def seeded(model: Callable[[], Any]) -> Any:
    """Drop path draws the same in each call."""
    torch.manual_seed(2)
    return model()


# What is asked changes nothing of what is said


@every_family
@every_mode
def test_logits_and_statistics_are_the_plain_models(family: str, training: bool) -> None:
    images, plain = zoo.images(family), zoo.make(family, training)
    expected = seeded(lambda: plain.net(zoo.normalised(images)))
    for asks in (ALL, frozenset({Feature.MAPS}), frozenset({Feature.EMBEDDING})):
        model = zoo.make(family, training)
        assert torch.equal(seeded(lambda model=model, asks=asks: model(images, asks)).logits, expected), asks
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), (asks, name)


@every_family
def test_the_answer_has_what_was_asked_and_nothing_else(family: str) -> None:
    model, images = zoo.make(family), zoo.images(family)
    whole = model(images, ALL)
    for asks in (*PARTS, frozenset()):
        output = model(images, asks)
        for part in ("embedding", "maps", "preactivations"):
            assert (getattr(output, part) is not None) == (part in asks)
            if part in asks:
                assert_close(getattr(output, part), getattr(whole, part), rtol=0, atol=0)


@every_family
def test_the_shape_is_the_answers(family: str) -> None:
    member, model = zoo.MEMBERS[family], zoo.make(family)
    assert (model.shape.classes, model.shape.embedding, model.shape.maps) == (zoo.CLASSES, member.embedding, member.maps)
    output = model(zoo.images(family), ALL)
    assert output.embedding.shape == (zoo.BATCH, member.embedding)
    for maps in (output.maps, output.preactivations):
        assert tuple(stage.shape for stage in maps) == tuple((zoo.BATCH, *shape) for shape in member.maps)
    sides = [height for _, height, _ in member.maps]
    assert sides == sorted(sides, reverse=True)


# What is said


@every_family
@every_mode
def test_the_embedding_is_what_the_classifier_reads(family: str, training: bool) -> None:
    model, images = zoo.make(family, training), zoo.images(family)
    output = model(images, frozenset({Feature.EMBEDDING}))
    classifier = model.net.get_classifier()
    if isinstance(classifier, tuple):
        heads = [name for name, module in model.net.named_modules() if module in classifier]
        other = zoo.make(family, training)
        read = collect(other.net, heads, lambda: seeded(lambda: other(images)), given=True)
        output = seeded(lambda: zoo.make(family, training)(images, frozenset({Feature.EMBEDDING})))
        assert len(read) == 2
        assert_close(output.embedding, sum(read.values()) / 2)
    else:
        logits = classifier(output.embedding if isinstance(classifier, nn.Linear) else output.embedding[:, :, None, None])
        assert_close(logits.flatten(1), output.logits, rtol=0, atol=1e-6)


@every_family
def test_the_embedding_is_timms(family: str) -> None:
    model, images = zoo.make(family), zoo.images(family)
    timms = model.net.forward_head(model.net.forward_features(zoo.normalised(images)), pre_logits=True)
    assert_close(model(images, frozenset({Feature.EMBEDDING})).embedding, timms.flatten(1), rtol=0, atol=0)


@every_family
@every_mode
def test_maps_are_the_stages_outputs(family: str, training: bool) -> None:
    member, images, plain = zoo.MEMBERS[family], zoo.images(family), zoo.make(family, training)
    made = collect(plain.net, list(member.stages), lambda: seeded(lambda: plain.net(zoo.normalised(images))))
    maps = seeded(lambda: zoo.make(family, training)(images, frozenset({Feature.MAPS}))).maps
    assert len(maps) == len(member.stages)
    for name, stage in zip(member.stages, maps, strict=True):
        assert torch.equal(member.unfold(made[name]), stage), name


@every_family
@every_mode
def test_preactivations_are_what_the_endings_are_given(family: str, training: bool) -> None:
    member, images, plain = zoo.MEMBERS[family], zoo.images(family), zoo.make(family, training)
    given = collect(plain.net, [name for name in member.endings if name], lambda: seeded(lambda: plain.net(zoo.normalised(images))), True)
    output = seeded(lambda: zoo.make(family, training)(images, ALL))
    for name, before, after in zip(member.endings, output.preactivations, output.maps, strict=True):
        if name is None:
            assert torch.equal(before, after)
        else:
            assert torch.equal(before, given[name])
            assert torch.equal(plain.net.get_submodule(name)(before.clone()), after)
    differ = not all(map(torch.equal, output.preactivations, output.maps))
    assert differ == (family in ENDING and family != "senet")  # whose last ReLU is given sums of what ReLUs put out


def test_a_stage_that_ends_otherwise_has_its_map_for_a_preactivation() -> None:
    assert set(FAMILIES) - set(ENDING) == {"resnetv2", "efficientnet", "convnextv2", "swin", "vit", "deit", "beitv2"}


# Gradients


def random_loss(output: Output) -> Tensor:
    """All that was said has a share in it, each number with a weight of its own."""
    rng = torch.Generator().manual_seed(3)
    return sum(
        ((said * torch.randn(said.shape, generator=rng)).sum() / said[0].numel() ** 0.5 for said in tensors(output)), torch.zeros(())
    )


def gradients(model: Classifier, family: str, asks: Asks) -> dict[str, Tensor]:
    images = zoo.images(family).requires_grad_()
    random_loss(seeded(lambda: model(images, asks))).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert images.grad is not None
    return named | {"images": images.grad}


@every_family
@every_mode
def test_gradients_are_those_without_activations_in_place(family: str, training: bool) -> None:
    model, outside = zoo.make(family, training), zoo.make(family, training)
    in_place = [module for module in outside.modules() if getattr(module, "inplace", False)]
    for module in in_place:
        module.inplace = False
    assert in_place or family in ("vit", "deit", "beitv2", "swin", "convnextv2")
    for asks in (ALL, frozenset({Feature.PREACTIVATIONS}), frozenset({Feature.MAPS})):
        model.zero_grad()
        outside.zero_grad()
        found, expected = gradients(model, family, asks), gradients(outside, family, asks)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = value.abs().max().item()
            assert_close(found[name], value, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")


@every_family
def test_every_part_reaches_the_images(family: str) -> None:
    model, images = zoo.make(family, training=True), zoo.images(family).requires_grad_()
    for said in tensors(model(images, ALL)):
        (gradient,) = torch.autograd.grad((said * torch.randn_like(said)).sum(), images, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


# Less asked, less done; nothing left behind


@pytest.mark.parametrize(
    "asks", [frozenset(), frozenset({Feature.LOGITS}), frozenset({Feature.EMBEDDING}), frozenset({Feature.EMBEDDING, Feature.LOGITS})]
)
def test_maps_that_nobody_asked_for_are_not_collected(asks: Asks, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("vit")
    monkeypatch.setattr(model.net, "forward_intermediates", lambda *_, **__: pytest.fail("collects maps"))
    model(zoo.images("vit"), asks)


@pytest.mark.parametrize("family", ["mobilenetv4", "resnet, basic", "deit"])
def test_one_pass_answers_everything(family: str) -> None:
    model, calls = zoo.make(family), []
    for module in model.net.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda one, *_: calls.append(one))
    model(zoo.images(family))
    plain, calls[:] = list(calls), []
    model(zoo.images(family), ALL)
    assert calls == plain


def test_copies_are_made_for_what_is_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    call = Tap.__call__

    def note(self: Tap, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        call(self, module, given)
        kept.append(self.given) if self.given is not None else None

    monkeypatch.setattr(Tap, "__call__", note)
    model, images = zoo.make("resnet, basic"), zoo.images("resnet, basic")
    for asks, copies in (
        (frozenset({Feature.MAPS}), 0),
        (frozenset({Feature.EMBEDDING}), 1),
        (frozenset({Feature.PREACTIVATIONS}), 4),
        (ALL, 5),
    ):
        kept.clear()
        model(images, asks)
        assert len(kept) == copies


@every_mode
def test_nothing_is_kept_alive(training: bool) -> None:
    model = zoo.make("mobilenetv3", training)
    output = model(zoo.images("mobilenetv3"), ALL)
    said = [weakref.ref(tensor) for tensor in tensors(output)]
    assert len(said) == 10
    del output
    gc.collect()
    assert all(one() is None for one in said)


def test_an_exception_leaves_nothing_behind() -> None:
    model, images = zoo.make("resnet, basic"), zoo.images("resnet, basic")
    expected = model(images, ALL)
    hooks = count_hooks(model)

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    for name in ("layer3.0.conv1", "fc"):  # while the maps are collected; in the head
        broken = model.net.get_submodule(name).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            model(images, ALL)
        broken.remove()
        taps = [hook for module in model.modules() for hook in module._forward_pre_hooks.values() if isinstance(hook, Tap)]
        assert len(taps) == 5
        assert not any(tap.on or tap.given is not None for tap in taps)
    assert_close(tensors(model(images, ALL)), tensors(expected), rtol=0, atol=0)
    assert count_hooks(model) == hooks


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_a_copy_answers_for_itself() -> None:
    model, images = zoo.make("resnet, basic"), zoo.images("resnet, basic")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    before = tensors(model(images, ALL))
    assert all(not torch.equal(a, b) for a, b in zip(tensors(other(images, ALL)), before, strict=True))
    assert_close(tensors(model(images, ALL)), before, rtol=0, atol=0)
    bare = copy.deepcopy(model.net)  # what is asked of the model is no matter to a copy of its net
    model(images, ALL)
    assert torch.equal(bare(zoo.normalised(images)), before[0])


# Under what surrounds it


@every_family
def test_a_frozen_teacher_answers_without_gradient(family: str) -> None:
    plain, images = zoo.make(family), zoo.images(family)
    expected = tensors(plain(images, ALL))
    output = Teacher(zoo.make(family, training=True))(images.requires_grad_(), ALL)
    assert not any(said.requires_grad for said in tensors(output))
    assert_close(tensors(output), [said.detach() for said in expected])


@every_family
@every_mode
def test_shapes_stay_under_autocast(family: str, training: bool) -> None:
    model = zoo.make(family, training)
    plain = seeded(lambda: zoo.make(family, training)(zoo.images(family), ALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = seeded(lambda: model(zoo.images(family), ALL))
    for half, full in zip(tensors(output), tensors(plain), strict=True):
        assert half.shape == full.shape
        assert half.isfinite().all()
        # BatchNorm over a few numbers makes much of a small difference
        assert training or (half.float() - full).square().mean() < 0.05 * full.square().mean()


def compile_answers(backend: str, families: list[str]) -> None:
    """Values and gradients of every kind of answer, compiled into one graph, against those of the plain model."""
    cases = [("small", asks, True) for asks in PARTS] + [("small", ALL, False)]
    for family, asks, training in cases + [(family, ALL, True) for family in families]:
        torch._dynamo.reset()
        results = []
        for wrap in (lambda model: model, lambda model: torch.compile(model, backend=backend, fullgraph=True)):
            model = zoo.make(family, training)
            for module in model.modules():
                for rate in {"drop_prob", "drop_rate"} & set(vars(module)):
                    setattr(module, rate, 0.0)  # a compiled model may draw other numbers
            images = zoo.images(family).requires_grad_()
            output = wrap(model)(images, asks)
            random_loss(output).backward()
            results.append((tensors(output), images.grad, dict(model.named_buffers())))
            assert not any(tap.on or tap.given is not None for tap in model._places.classifiers)
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-4, msg=lambda text, case=(family, asks, training): f"{case}: {text}")


def run_compiled(backend: str, families: list[str]) -> None:
    """In a process of its own: torch.compile cannot look through the shape checks that are switched on here."""
    command = f"from tests.test_features import compile_answers; compile_answers({backend!r}, {families!r})"
    subprocess.run([sys.executable, "-W", "error", "-c", command], cwd=Path(__file__).parents[1], check=True)


def test_compiles() -> None:
    run_compiled("aot_eager", ["mobilenetv4", "deit"])


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("backend", "families"), [("aot_eager", FAMILIES), ("inductor", ["resnet, basic", "mobilenetv3", "vit", "swin"])])
def test_many_families_compile(backend: str, families: list[str]) -> None:
    run_compiled(backend, families)


# Stages


class Net(nn.Module):
    """What timm tells of a model's stages."""

    def __init__(self, *reductions: int, listed: bool = True) -> None:
        super().__init__()
        info = [{"reduction": reduction, "num_chs": 8, "module": str(i)} for i, reduction in enumerate(reductions)]
        self.feature_info = info if listed else type("FeatureInfo", (), {"info": info})()

    def forward_intermediates(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("reductions", "indices"),
    [
        ((2, 4, 8, 16, 32), (1, 2, 3, 4)),  # a stem before four stages
        ((4, 8, 16, 32), (0, 1, 2, 3)),
        ((1, 2, 4), (0, 1, 2)),
        ((2, 4, 4, 8, 8, 8, 16), (0, 2, 5, 6)),  # a stage ends before the resolution falls
        ((16,) * 12, (2, 5, 8, 11)),
        ((16,) * 24, (5, 11, 17, 23)),
        ((16,) * 6, (0, 2, 3, 5)),
        ((16,) * 3, (0, 1, 2)),
        ((16,), (0,)),
        ((8, 16), (0, 1)),
    ],
)
def test_where_stages_end(reductions: tuple[int, ...], indices: tuple[int, ...]) -> None:
    assert stage_indices(Net(*reductions)) == stage_indices(Net(*reductions, listed=False)) == indices
