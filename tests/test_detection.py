"""Detectors on distilled backbones: what they see, how they learn and are measured, and that they repeat."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import masks_to_boxes

from kdlib import config
from kdlib.engine.train import weights
from kdlib.files import read_json
from kdlib.models.build import build as build_classifier
from kdlib.parallel.signals import Stopped
from kdlib.seed import seed_torch
from kdlib.study.report.render import MINUS
from projects.detection import backbone, coco, evaluate, settings, table
from projects.detection.cascade import CONVOLUTIONS, GIOU_WEIGHT
from projects.detection.coco import Groups, Instances, Views
from projects.detection.fit import Learning
from projects.detection.model import build
from projects.detection.optimizer import layer_of, learning_rate, optimizer
from projects.detection.settings import Recipe, Run
from projects.detection.train import RUNS, main, run
from tests import shapes, tiny
from tests.refusals import refused
from tests.test_distributed import meet
from tests.test_loading import convnext_of_its_authors
from tests.training import start

STUDY = tiny.ROOT / "studies/imagenet/detection"
FOLDER = RUNS / "small"
NUMBERS = ("metrics.json", "curve.csv", "weights.safetensors")  # what must repeat byte for byte


@pytest.fixture(autouse=True, scope="module")
def small_detectors() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        shapes.shrink(patched.setattr)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with a finished run."""
    made = shapes.write(tmp_path_factory.mktemp("shapes"))
    run(made, "small")
    return made


@pytest.fixture(scope="module")
def val(root: Path) -> Instances:
    return coco.read("coco.val", root / "val", root / "val.json")


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(shapes.RECIPE | changes)


def a_run(model: str = shapes.NET, weights: str | None = None) -> Run:
    return Run(model=model, weights=weights, recipe="tiny", beside="", seed=0)


def detector(root: Path, **changes: Any) -> nn.Module:
    seed_torch(0, "init")
    return build("runs.small", a_run(changes.pop("model", shapes.NET)), recipe(**changes), root, len(shapes.CATEGORIES))


# Training


def test_it_learns(root: Path) -> None:
    curve = pd.read_csv(root / FOLDER / "curve.csv")
    assert curve["step"].tolist() == [2, 4, 6]
    assert curve["loss"].iloc[-1] < 0.85 * curve["loss"].iloc[0]
    np.testing.assert_allclose(curve.filter(like="loss_").sum(axis=1), curve["loss"], atol=1e-5)
    metrics = read_json(root / FOLDER / "metrics.json")
    assert metrics["images"] == 3
    assert metrics["box_ap50"] >= metrics["box_ap"] > 0
    assert metrics["mask_ap"] > 0
    assert metrics["box_ap_large"] is None  # above 96 x 96 pixels there is nothing


def test_a_run_that_was_stopped_ends_as_one_that_was_not(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an epoch; bit for bit."""
    again = shapes.write(tmp_path)
    with monkeypatch.context() as patched:
        steps = iter([False, False, True])
        patched.setattr("projects.detection.fit.asked_to_stop", lambda: next(steps))
        with pytest.raises(Stopped, match="small: stopped after step 3 of 6"):
            run(again, "small")
    assert not (again / FOLDER / "metrics.json").exists()
    run(again, "small")
    for name in NUMBERS:
        assert (again / FOLDER / name).read_bytes() == (root / FOLDER / name).read_bytes(), name
    assert not list((again / FOLDER).glob("checkpoint*"))


def test_the_command_tells_the_table(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kdlib.study.report.published.FILE", tiny.ROOT / "results/published/results.csv")
    monkeypatch.setattr(sys, "argv", ["train", str(root), "small"])
    before = (root / FOLDER / "metrics.json").stat().st_mtime_ns
    main()
    said = capsys.readouterr().out
    assert (root / "results/tables/table11_coco.md").read_text() == said.rstrip("\n") + "\n"
    assert re.search(r"\| resnet50 +\| mask_rcnn_1x +\| +\| +\| 41\.8", said)
    assert (root / FOLDER / "metrics.json").stat().st_mtime_ns == before  # a finished run is not made again


def test_what_a_run_depends_on_cannot_change_under_it(root: Path, tmp_path: Path) -> None:
    again = shapes.write(tmp_path, learning_rate=1e-3)
    (again / FOLDER).mkdir(parents=True)
    (again / FOLDER / "run.json").write_bytes((root / FOLDER / "run.json").read_bytes())
    with refused("runs.small", "begun with another settings", f"delete {again / FOLDER}"):
        run(again, "small")


def views(root: Path, made: Recipe) -> list[coco.View]:
    of = Views(coco.read("coco.train", root / "train", root / "train.json"), made, seed=0)
    return [of[place] for place in next(iter(Groups(len(of), made, seed=0, first=0)))]


def step(of: nn.Module, made: Recipe, root: Path) -> Learning:
    learning = Learning(of, made, seed=0, per_epoch=2)
    group = views(root, made)
    for number in range(made.groups):
        learning.take(number, group)
    learning.advance()
    return learning


def test_frozen_stages_do_not_move(root: Path) -> None:
    made = detector(root, model="test_resnet", frozen_stages=1)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    step(made, recipe(frozen_stages=1), root)
    frozen = re.compile(r"backbone\.net\.(conv1|bn1|layer1)\.")
    after = made.state_dict()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before if frozen.match(name)} <= still
    moved = {name for name in before if name.startswith("backbone.net.layer2.") and "running" in name}
    assert moved and not moved & still
    assert "backbone.net.layer2.0.bn2.bias" not in still


def test_the_cascade_refines_its_boxes(root: Path) -> None:
    made = detector(root, detector="cascade_mask_rcnn")
    of = recipe(detector="cascade_mask_rcnn", learning_rate=1e-3)
    learning = step(made, of, root)
    names = {f"loss_{name}_{number}" for name in ("classifier", "box", "mask") for number in (1, 2, 3)}
    assert names < set(learning._sums)
    (answer,) = made.eval()([torch.rand(3, 64, 80)])
    assert answer["boxes"].shape == (len(answer["scores"]), 4)
    assert answer["masks"].shape == (len(answer["scores"]), 1, 64, 80)


def test_a_perfect_cascade_keeps_the_box_that_is_right(root: Path) -> None:
    """Offsets of zero leave a box where it is, at each stage; those of the coder's own weights move it onto the object."""
    heads: Any = detector(root, detector="cascade_mask_rcnn").roi_heads
    boxes, target = torch.tensor([[10.0, 10, 50, 40]]), torch.tensor([[14.0, 8, 58, 44]])
    for number, coder in enumerate(heads.coders):
        assert_close(heads._refine(number, torch.zeros(1, 4), [boxes])[0], boxes)
        assert_close(heads._refine(number, coder.encode([target], [boxes])[0], [boxes])[0], target)
    sampled = heads._sample(2, [boxes], [{"boxes": target, "labels": torch.tensor([2])}])
    iou = 36 * 30 / (40 * 30 + 44 * 36 - 36 * 30)  # .63: on the object for the first two heads, not for the third
    assert 0.6 < iou < 0.7
    assert sampled.labels[0].tolist() == [0, 2]
    assert sampled.proposed[0].tolist() == [True, False]  # the object's own box is learnt from, not handed on
    assert heads._sample(1, [boxes], [{"boxes": target, "labels": torch.tensor([2])}]).labels[0].tolist() == [2, 2]
    loss = heads._box_loss([torch.cat([boxes, target])], sampled._replace(labels=[torch.tensor([2, 2])]), [{"boxes": target}])
    hull = (58 - 10) * (44 - 8)
    assert_close(loss, torch.tensor(10 * (1 - iou + (hull - (40 * 30 + 44 * 36 - 36 * 30)) / hull) / 2))


def test_a_box_that_leaves_the_image_is_voted_on_by_all_heads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = detector(root, detector="cascade_mask_rcnn").eval()
    refine = made.roi_heads._refine

    def away(number: int, offsets: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        (moved,) = refine(number, offsets, boxes)
        return [torch.cat([moved[:1] + 1000, moved[1:]])]

    monkeypatch.setattr(made.roi_heads, "_refine", away)
    (answer,) = made([torch.rand(3, 64, 80)])
    assert answer["boxes"].isfinite().all()


def gradient_of_one(root: Path) -> dict[str, Tensor]:
    """After the first step, by this process with what groups it has."""
    made = recipe(optimizer="sgd", learning_rate=1e-3, momentum=0.0, layer_decay=1.0, drop_path=0.0, warmup_steps=0)
    of = detector(root, drop_path=0.0)
    learning = Learning(of, made, seed=0, per_epoch=2)
    data = Views(coco.read("coco.train", root / "train", root / "train.json"), made, seed=0)
    own = made.groups // (dist.get_world_size() if dist.is_initialized() else 1)
    first = own * (dist.get_rank() if dist.is_initialized() else 0)
    for number, places in zip(range(own), Groups(len(data), made, seed=0, first=0), strict=False):
        learning.take(first + number, [data[place] for place in places])
    learning.advance()
    learning.close_epoch()
    losses = {name: torch.tensor(value) for name, value in learning.curve[0].items()}
    found = evaluate.detect(of, coco.read("coco.val", root / "val", root / "val.json"), torch.device("cpu"), workers=0)
    answered = torch.tensor([one["image_id"] for one in found]).unique()
    return losses | dict(of.state_dict()) | {"answered": answered, "answers": torch.tensor(len(found))}


def train_as_one_of_two(number: int, folder: Path) -> None:
    shapes.shrink(setattr)
    meet(number, folder)
    torch.save(gradient_of_one(folder), folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_are_one_with_two_groups(tmp_path: Path) -> None:
    root = shapes.write(tmp_path)
    processes = [start(train_as_one_of_two, number, root) for number in range(2)]
    alone = gradient_of_one(root)
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(2):
        found = torch.load(root / f"{number}.pt", weights_only=True)
        for name, value in alone.items():
            assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# Views


def test_a_view_is_its_images_whatever_is_done_to_it(root: Path) -> None:
    train = coco.read("coco.train", root / "train", root / "train.json")
    made = recipe(crop=[40, 60], crop_sides=[60, 70])
    of = Views(train, made, seed=0)
    sizes = set()
    for epoch in range(3):
        for number in range(len(of)):
            image, target = of[epoch, number]
            assert image.dtype == torch.uint8
            assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
            sizes.add(image.shape)
            for mask, box, label in zip(target["masks"], target["boxes"], target["labels"], strict=True):
                if mask.any():  # of an ellipse nothing but the corner of its box may be left
                    tight = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
                    assert (tight[:2] >= box[:2] - 1.5).all() and (tight[2:] <= box[2:] + 1.5).all()
                    colour = image[:, mask.bool()].float().mean(dim=1)
                    assert (colour.argmax() == 0) == (label == 1)  # rectangles are red, ellipses blue
    assert len(sizes) > 10


def test_views_repeat_in_any_order_and_leave_global_draws_alone(root: Path) -> None:
    of = Views(coco.read("coco.train", root / "train", root / "train.json"), recipe(), seed=0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [of[1, number][0] for number in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    for number in (3, 0, 2, 1):
        assert torch.equal(of[1, number][0], first[number])
    flipped = sum(not torch.equal(of[0, number][0], of[epoch, number][0]) for epoch in (1, 2, 3) for number in range(8))
    assert 6 <= flipped <= 18  # of 24, each with probability 1/2


def test_crowds_and_lines_are_not_learnt(root: Path) -> None:
    train = coco.read("coco.train", root / "train", root / "train.json")
    assert len(train.api.imgToAnns[10]) == 3
    assert [one["category_id"] for one in train.instances(10)] == [3, 7]
    train.api.imgToAnns[10][0]["bbox"][2] = 0.5
    assert [one["category_id"] for one in train.instances(10)] == [7]


def test_each_image_once_in_an_epoch_and_on_from_any_step() -> None:
    made = recipe(batch_size=4, group_size=2, epochs=2)
    places = list(Groups(9, made, seed=0, first=0))
    assert len(places) == len(Groups(9, made, seed=0, first=0)) == 2 * 2 * 2  # epochs, steps, groups
    for epoch in range(2):
        images = [place for group in places for place in group if place[0] == epoch]
        assert len(images) == len(set(images)) == 8
    assert places[0] != [(0, image) for _, image in places[4]]
    assert list(Groups(9, made, seed=0, first=3)) == places[6:]


# Backbones


@pytest.mark.parametrize(("model", "widths"), [("resnet50", [256, 512, 1024, 2048]), ("convnextv2_tiny", [96, 192, 384, 768])])
def test_maps_are_those_of_timm(tmp_path: Path, model: str, widths: list[int]) -> None:
    """Of the study's own students, loaded from a file as a distilled run leaves it."""
    seed_torch(0, "init")
    student = build_classifier(model, 5, 3, 64).eval()
    save_file(weights(student), tmp_path / "weights.safetensors")
    made = backbone.build("runs.it", a_run(model, "weights.safetensors"), recipe(output_norms=False), tmp_path).eval()
    theirs = timm.create_model(model, features_only=True, out_indices=(0, 1, 2, 3) if "next" in model else (1, 2, 3, 4)).eval()
    known = theirs.state_dict()
    own = {name.replace("stages.", "stages_").replace("stem.", "stem_"): value for name, value in student.net.state_dict().items()}
    theirs.load_state_dict({name: own[name] for name in known})
    images = torch.rand(1, 3, 64, 96)
    given: list[Tensor] = []
    made.pyramid.register_forward_pre_hook(lambda _, maps: given.extend(maps[0].values()))
    with torch.inference_mode():
        pyramid = made(images)
        for ours, expected, stride, width in zip(given, theirs(images), backbone.STRIDES, widths, strict=True):
            assert ours.shape == (1, width, 64 // stride, 96 // stride)
            assert_close(ours, expected)
    assert {name: maps.shape[-2:] for name, maps in pyramid.items()} == {
        "0": (16, 24),
        "1": (8, 12),
        "2": (4, 6),
        "3": (2, 3),
        "pool": (1, 2),
    }


def test_released_weights_in_their_authors_layout_are_those_of_timm(tmp_path: Path) -> None:
    """With a classifier of any number of classes, or with none."""
    net = timm.create_model("convnextv2_tiny", num_classes=7).eval()
    theirs = convnext_of_its_authors(net.state_dict())
    for classifier in (True, False):
        state = {name: value for name, value in theirs.items() if classifier or not name.startswith("head.")}
        torch.save({"model": state}, tmp_path / "w.pth")
        made = backbone.build("runs.it", a_run("convnextv2_tiny", "w.pth"), recipe(output_norms=False), tmp_path).eval()
        loaded, wanted = made.net.state_dict(), net.state_dict()
        assert loaded.keys() <= wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.items() if not name.startswith("head."))


# Measures


def perfect(val: Instances, shift: float = 0.0) -> list[evaluate.Detected]:
    """The annotations as a detector's answers, moved to the right by so many pixels."""
    found = []
    for image in val.images:
        ones = val.instances(image)
        masks = torch.from_numpy(np.stack([np.roll(val.mask(one), round(shift), axis=1) for one in ones]))
        boxes = torch.tensor([[x + shift, y, x + w + shift, y + h] for x, y, w, h in (one["bbox"] for one in ones)])
        labels = torch.tensor([val.categories.index(one["category_id"]) + 1 for one in ones])
        answer = {"boxes": boxes, "scores": torch.linspace(0.9, 0.8, len(ones)), "labels": labels, "masks": masks[:, None].float()}
        found += evaluate.results(image, answer, val.categories)
    return found


def test_perfect_answers_have_a_precision_of_one(val: Instances) -> None:
    measured = evaluate.measure(val, perfect(val))
    expected = {f"{kind}_{name}": None if name == "ap_large" else 1.0 for kind in ("box", "mask") for name in evaluate.MEASURES}
    assert measured == pytest.approx(expected)


def test_answers_beside_their_objects_have_what_pycocotools_says(val: Instances, root: Path, tmp_path: Path) -> None:
    """Through files, as one would by hand."""
    found = perfect(val, shift=3)
    measured = evaluate.measure(val, found)
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        rows = [
            {"image_id": one["image_id"], "category_id": one["category_id"], "score": one["score"]}
            | (
                {"bbox": one["bbox"]}
                if kind == "box"
                else {"segmentation": one["segmentation"] | {"counts": one["segmentation"]["counts"].decode()}}
            )
            for one in found
        ]
        (tmp_path / "found.json").write_text(json.dumps(rows))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(root / "val.json"))
            evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), theirs)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert 0 < evaluation.stats[0] < 1
        assert [measured[f"{kind}_{name}"] for name in evaluate.MEASURES[:5]] == evaluation.stats[:5].tolist()


def test_precision_is_the_share_of_thresholds_that_the_overlap_reaches(val: Instances) -> None:
    """By hand: all boxes moved by an eighth of their width have an IoU of 7/9, which is .50 to .75, six of ten thresholds."""
    found = perfect(val)
    for one in found:
        one["bbox"][0] += one["bbox"][2] / 8
    measured = evaluate.measure(val, found)
    assert measured["box_ap"] == pytest.approx(0.6)
    assert (measured["box_ap50"], measured["box_ap75"]) == (1.0, 1.0)


def test_no_answer_has_a_precision_of_zero(val: Instances) -> None:
    measured = evaluate.measure(val, [])
    assert measured["box_ap"] == measured["mask_ap"] == 0.0


def test_all_images_are_answered_with_category_ids(val: Instances) -> None:
    class Sees(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            (image,) = images
            assert image.max() <= 1
            masks = torch.ones(1, 1, *image.shape[1:])
            return [{"boxes": torch.tensor([[1.0, 2, 11, 22]]), "scores": torch.ones(1), "labels": torch.tensor([2]), "masks": masks}]

    found = evaluate.detect(Sees(), val, torch.device("cpu"), workers=0)
    assert [one["image_id"] for one in found] == list(val.images)
    assert {(one["category_id"], *one["bbox"]) for one in found} == {(7, 1.0, 2.0, 10.0, 20.0)}


# The published recipes


@pytest.fixture(scope="module")
def published() -> settings.Detection:
    content = config.read_yaml(STUDY)
    content["study"]["launch"]["processes"] = 1
    return settings.parse(content)


def told(name: str, setting: str) -> str:
    rows = pd.read_csv(tiny.ROOT / "results/published/coco_recipes.csv")
    (value,) = rows.loc[(rows["config"] == name) & (rows["setting"] == setting), "value"]
    return str(value)


def numbers(text: str, pattern: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(value) for value in found.groups()]


def test_backbones_are_students_of_the_study_of_imagenet(published: settings.Detection) -> None:
    study = config.load(STUDY.parent)
    for name, made in published.runs.items():
        path = Path(os.path.normpath(STUDY / (made.weights or ""))).relative_to(STUDY.parent / "runs/distill")
        comparison, method, seed, _ = path.parts
        assert study.comparisons[comparison].student == made.model, name
        assert method in study.comparisons[comparison].methods
        assert seed in {f"seed_{one}" for one in study.study.seeds}


def test_every_recipe_that_is_called_verified_is_published(published: settings.Detection) -> None:
    rows = pd.read_csv(tiny.ROOT / "results/published/coco_recipes.csv")
    assert {name for name, made in published.recipes.items() if made.settings == "verified"} == set(rows["config"])


def test_the_resnet_is_trained_as_published(published: settings.Detection) -> None:
    name = "mask_rcnn_r50_1x"
    made = published.recipes[name]
    optimiser = numbers(told(name, "optimizer"), r"SGD lr (\S+) momentum (\S+) wd (\S+)")
    assert (made.optimizer, [made.learning_rate, made.momentum, made.weight_decay]) == ("sgd", optimiser)
    schedule = numbers(told(name, "schedule"), r"(\d+) epochs, step (\d+)/(\d+), (\d+)-iter linear warmup ratio (\S+)")
    assert [made.epochs, *made.steps, made.warmup_steps, made.warmup_start] == schedule
    group, gpus, batch = numbers(told(name, "batch"), r"(\d+) per GPU x (\d+) GPUs = (\d+)")
    assert (made.group_size, made.groups, made.batch_size) == (group, gpus, batch)
    frozen, long, short, flip = numbers(
        told(name, "backbone"), r"SyncBN trainable, norm_eval False, frozen_stages (\d+), img (\d+)x(\d+), flip (\S+)"
    )
    assert (made.frozen_stages, made.long_side, made.short_sides, made.flip) == (frozen, long, [short], flip)
    assert made.sync_norm


def test_the_convnexts_are_trained_as_published(published: settings.Detection) -> None:
    name, other = "mask_rcnn_convnextv2_3x", "cascade_mask_rcnn_convnextv2_3x"
    made, cascade = published.recipes[name], published.recipes[other]
    rate, decay, layer_decay, layers = numbers(
        told(name, "optimizer"), r"AdamW lr (\S+) betas \.9/\.999 wd (\S+), layer-wise decay (\S+), num_layers (\d+)"
    )
    assert (made.learning_rate, made.weight_decay, made.layer_decay, made.layers) == (rate, decay, layer_decay, layers)
    values = numbers(
        told(name, "schedule"),
        r"(\d+) epochs, step (\d+)/(\d+), (\d+)-iter warmup, (\d+) img/GPU x 8 = (\d+), fp16 init scale (\d+), drop_path (\S+), "
        r"multi-scale (\d+)-(\d+) \+ crop (\d+)x(\d+)",
    )
    first, last = made.short_sides[0], made.short_sides[-1]
    ours = [made.epochs, *made.steps, made.warmup_steps, made.group_size, made.batch_size, made.loss_scale, made.drop_path, first, last]
    assert [*ours, *(made.crop or [])] == values
    rate, decay, layer_decay, layers, giou = numbers(
        told(other, "optimizer"), r"AdamW lr (\S+) wd (\S+), layer-wise decay (\S+), num_layers (\d+); 4conv1fc SyncBN GIoU\((\d+)\) heads"
    )
    theirs = {"learning_rate": rate, "weight_decay": decay, "layer_decay": layer_decay, "layers": int(layers), "sync_norm": True}
    assert cascade == made.model_copy(update=theirs | {"detector": "cascade_mask_rcnn"})
    assert giou == GIOU_WEIGHT
    assert CONVOLUTIONS == 4


def test_the_learning_rate_at_every_turn(published: settings.Detection) -> None:
    made = published.recipes["mask_rcnn_r50_1x"]
    per_epoch = 117266 // 32  # of COCO's training images those with instances
    rates = {step: learning_rate(made, step, per_epoch) for step in (0, 250, 500, 8 * per_epoch - 1, 8 * per_epoch, 11 * per_epoch)}
    assert list(rates.values()) == pytest.approx([4e-5, (4e-2 + 4e-5) / 2, 4e-2, 4e-2, 4e-3, 4e-4])


def test_layers_of_a_convnext_learn_more_slowly_the_deeper_they_lie(published: settings.Detection) -> None:
    made = published.recipes["cascade_mask_rcnn_convnextv2_3x"]
    with torch.device("meta"):
        net = timm.create_model("convnextv2_tiny", num_classes=0)
    whole = nn.ModuleDict({"backbone": nn.ModuleDict({"net": net}), "head": nn.Linear(2, 2)})
    layers = {name: layer_of(name, 6) for name, _ in whole.named_parameters()}
    expected = {"stem.0": 0, "stages.0.blocks.2": 1, "stages.1.downsample": 2, "stages.1.blocks.0": 2, "stages.2.downsample": 3}
    expected |= {"stages.2.blocks.2": 3, "stages.2.blocks.3": 4, "stages.2.blocks.8": 5, "stages.3.downsample": 6, "stages.3.blocks.0": 6}
    for part, layer in expected.items():
        assert {found for name, found in layers.items() if name.startswith(f"backbone.net.{part}.")} == {layer}, part
    assert layers["head.weight"] == 7
    groups = optimizer(whole, made).param_groups
    assert {round(group["scale"], 6) for group in groups} == {round(0.7**power, 6) for power in range(8)}
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in groups) == len(layers)


def test_published_numbers_stand_beside_measured_ones(
    published: settings.Detection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdlib.study.report.published.FILE", tiny.ROOT / "results/published/results.csv")
    for name in ("resnet50_1x", "resnet50_2x"):
        folder = tmp_path / RUNS / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"box_ap": 0.410, "mask_ap": None}))
    made = table.compare(tmp_path, published, RUNS)
    assert len(made.frame) == 12  # each published number once
    assert not made.frame[["student", "run", "settings", "published"]].isna().any(axis=None)
    shown = made.shown.set_index("run")
    assert shown.loc["resnet50_1x", ["box AP, published", "box AP, measured", "box AP, difference"]].tolist() == [
        "41.8",
        "41.0",
        f"{MINUS}0.8",
    ]
    assert shown.loc["resnet50_1x", "mask AP, measured"] == ""
    assert shown.loc["resnet50_2x", ["box AP, published", "box AP, measured", "box AP, difference"]].tolist() == ["42.1", "41.0", ""]
    assert shown.loc["convnextv2_tiny_3x", "settings"] == "verified"
    assert "Assumed settings, so no difference is given: convnextv2_tiny_1x, convnextv2_tiny_cascade_1x, resnet50_2x." in made.caption


# Refused


def annotations(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "val.json").read_text())
    return content


def read_again(root: Path, folder: Path, content: dict[str, Any]) -> Instances:
    (folder / "new.json").write_text(json.dumps(content))
    return coco.read("coco.val", root / "val", folder / "new.json")


def test_annotations_that_cannot_be_read_are_refused(root: Path, tmp_path: Path) -> None:
    with refused("coco.val_annotations", "No such file or directory", "correct the path"):
        coco.read("coco.val", root / "val", tmp_path / "none.json")
    (tmp_path / "cut.json").write_text((root / "val.json").read_text()[:100])
    with refused("coco.val_annotations", "cut.json", "allowed: JSON"):
        coco.read("coco.val", root / "val", tmp_path / "cut.json")
    (tmp_path / "captions.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": []}))
    with refused("coco.val_annotations", "without annotations", "instances_*.json"):
        coco.read("coco.val", root / "val", tmp_path / "captions.json")
    content = annotations(root)
    del content["annotations"][1]["segmentation"]
    with refused("coco.val_annotations", "annotations without segmentation"):
        read_again(root, tmp_path, content)


def test_ids_that_do_not_fit_are_refused(root: Path, tmp_path: Path, val: Instances) -> None:
    for field, section in (("category_id", "categories"), ("image_id", "images")):
        content = annotations(root)
        content["annotations"][2][field] = 99
        with refused("coco.val_annotations", f"annotation 3 with {field} 99", f"an id of {section}"):
            read_again(root, tmp_path, content)
    content = annotations(root)
    content["categories"].append({"id": 9, "name": "star"})
    with refused("coco.val_annotations", "category ids [9] in only one of train and val"):
        coco.check_same_categories(val, read_again(root, tmp_path, content))


def test_images_that_are_not_there_or_damaged_are_refused(root: Path, tmp_path: Path) -> None:
    with refused("coco.val_images", str(tmp_path), "000.png"):
        coco.read("coco.val", tmp_path, root / "val.json")
    for number in range(3):
        (tmp_path / f"00{number}.png").write_bytes(b"nothing")
    found = coco.read("coco.val", tmp_path, root / "val.json")
    with refused("coco.val_images", "000.png: cannot identify image file"):
        found.decode(10)


def test_a_damaged_image_is_named_though_another_process_decodes(tmp_path: Path) -> None:
    root = shapes.write(tmp_path)
    content = config.read_yaml(root)
    content["study"]["workers"] = 1
    shapes.save(root, content)
    for number in range(8):
        (root / "train" / f"00{number}.png").write_bytes(b"nothing")
    with refused("coco.train_images", ".png: cannot identify image file", "replace this file"):
        run(root, "small")
    assert not multiprocessing.active_children()  # at its end Python would wait for them


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    of = recipe()
    with refused("runs.it.weights", "none.pth", "counts from the folder of params.yaml"):
        backbone.build("runs.it", a_run(weights="none.pth"), of, tmp_path)
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with refused("runs.it.weights", "damaged.pth", "weights of test_convnext"):
        backbone.build("runs.it", a_run(weights="damaged.pth"), of, tmp_path)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with refused("runs.it.weights", "missing (stem.0.weight", "unexpected (", "it looks like a ResNet"):
        backbone.build("runs.it", a_run(weights="other.safetensors"), of, tmp_path)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("resnet5000", ["a model that timm knows"]),
        ("kd_resnet8_w8_s1", ["at strides [", "allowed: a model with maps at strides [4, 8, 16, 32]"]),
        ("vit_tiny_patch16_224", ["at strides [16, 16, 16, 16]"]),
    ],
)
def test_models_without_such_maps_are_refused(tmp_path: Path, model: str, parts: list[str]) -> None:
    with refused("runs.it.model", *parts):
        backbone.build("runs.it", a_run(model), recipe(), tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "parts"),
    [
        ("recipes.tiny.group_size", {"group_size": 3}, ["whose groups make up batches of 4"]),
        ("recipes.tiny.layers", {"layers": None}, ["4 or more where layer_decay is below 1"]),
        ("recipes.tiny.crop", {"crop": [60, 40], "crop_sides": [60]}, ["the lower limit, then the upper one"]),
        ("recipes.tiny.epoch", {"epoch": 3}, ["did you mean 'epochs'?"]),
        ("recipes.tiny.detector", {"detector": "mask_rcn"}, ["did you mean 'mask_rcnn'?"]),
        ("coco.train_annotations", {"batch_size": 16}, ["found '8 images with instances'", "at least a batch of 16"]),
        ("recipes", {"learning_rate": 1e30, "warmup_steps": 0}, ["is not finite by step", "a lower learning_rate"]),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, key: str, change: dict[str, Any], parts: list[str]) -> None:
    with refused(key, *parts):
        run(shapes.write(tmp_path, **change), "small")


def test_without_published_numbers_nothing_is_trained(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", str(root), "small"])
    monkeypatch.setattr("projects.detection.train.run", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=r"STUDY: found .*, which has no results/published/results.csv at or above it; allowed: "):
        main()


def test_a_full_gpu_is_told_with_the_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shapes.write(tmp_path / "shapes")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("projects.detection.train.fit", full)
    with refused("recipes.tiny.group_size", "more than the memory of the GPU", "Tried to allocate 2.00 GiB.)", "set it lower"):
        run(made, "small")


def test_several_machines_are_refused(tmp_path: Path) -> None:
    root = shapes.write(tmp_path)
    content = config.read_yaml(root)
    content["study"]["launch"] = {"processes": 2, "nodes": 2, "rendezvous": "first:29500"}
    with refused("study.launch.nodes", "found 2", "allowed: 1", "of one machine"):
        settings.load(shapes.save(root, content))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    root = shapes.write(tmp_path)
    with refused("runs", "'smal'", "did you mean 'small'?"):
        run(root, "smal")
    content = config.read_yaml(root)
    content["runs"]["small"]["recipe"] = "tin"
    with refused("runs.small.recipe", "'tin'", "did you mean 'tiny'?"):
        settings.load(shapes.save(root, content))
