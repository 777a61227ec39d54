"""Detectors: backbones have timm's maps and the weights that they are given; a cascade's heads refine boxes."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.engine.record import weights
from kdlib.models.build import build as build_classifier
from kdlib.seed import seed_torch
from projects.detection import backbone
from projects.detection.coco import GroupSampler, Views
from projects.detection.fit import Learner
from projects.detection.settings import Recipe
from projects.detection.tests import shapes
from tests.refusals import refused
from tests.test_loading import convnext_of_its_authors


def step(detector: nn.Module, recipe: Recipe, root: Path) -> Learner:
    """One step on the views of one group."""
    learner = Learner(detector, recipe, seed=0, steps_per_epoch=2)
    views = Views(shapes.split(root, "train"), recipe, seed=0)
    indices = next(iter(GroupSampler(len(views), recipe, seed=0, first=0)))
    for group in range(recipe.groups):
        learner.backward(group, [views[index] for index in indices])
    learner.update()
    return learner


# Backbones


@pytest.mark.parametrize(("model", "widths"), [("resnet50", [256, 512, 1024, 2048]), ("convnextv2_tiny", [96, 192, 384, 768])])
def test_maps_are_those_of_timm(tmp_path: Path, model: str, widths: list[int]) -> None:
    """Of the study's own students, loaded from a file as a distilled run leaves it."""
    seed_torch(0, "init")
    student = build_classifier(model, 5, 3, 64).eval()
    save_file(weights(student), tmp_path / "weights.safetensors")
    ours = backbone.build("runs.it", shapes.planned(model, "weights.safetensors"), shapes.recipe(output_norms=False), tmp_path).eval()
    theirs = timm.create_model(model, features_only=True, out_indices=(0, 1, 2, 3) if "next" in model else (1, 2, 3, 4)).eval()
    named = {name.replace("stages.", "stages_").replace("stem.", "stem_"): value for name, value in student.net.state_dict().items()}
    theirs.load_state_dict({name: named[name] for name in theirs.state_dict()})
    images = torch.rand(1, 3, 64, 96)
    maps: list[Tensor] = []
    ours.pyramid.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs[0].values()))
    with torch.inference_mode():
        pyramid = ours(images)
        for stage_map, expected, stride, width in zip(maps, theirs(images), backbone.STRIDES, widths, strict=True):
            assert stage_map.shape == (1, width, 64 // stride, 96 // stride)
            assert_close(stage_map, expected)
    assert {name: level.shape[-2:] for name, level in pyramid.items()} == {
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
        ours = backbone.build("runs.it", shapes.planned("convnextv2_tiny", "w.pth"), shapes.recipe(output_norms=False), tmp_path).eval()
        loaded, wanted = ours.net.state_dict(), net.state_dict()
        assert loaded.keys() <= wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.items() if not name.startswith("head."))


def test_frozen_stages_do_not_move(root: Path) -> None:
    detector = shapes.detector(root, model="test_resnet", frozen_stages=1)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    step(detector, shapes.recipe(frozen_stages=1), root)
    frozen = re.compile(r"backbone\.net\.(conv1|bn1|layer1)\.")
    after = detector.state_dict()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before if frozen.match(name)} <= still
    moved = {name for name in before if name.startswith("backbone.net.layer2.") and "running" in name}
    assert moved and not moved & still
    assert "backbone.net.layer2.0.bn2.bias" not in still


# Heads of a cascade


def test_the_cascade_refines_its_boxes(root: Path) -> None:
    detector = shapes.detector(root, detector="cascade_mask_rcnn")
    learner = step(detector, shapes.recipe(detector="cascade_mask_rcnn", learning_rate=1e-3), root)
    names = {f"loss_{name}_{number}" for name in ("classifier", "box", "mask") for number in (1, 2, 3)}
    assert names < set(learner._sums)
    (output,) = detector.eval()([torch.rand(3, 64, 80)])
    assert output["boxes"].shape == (len(output["scores"]), 4)
    assert output["masks"].shape == (len(output["scores"]), 1, 64, 80)


def test_a_perfect_cascade_keeps_the_box_that_is_right(root: Path) -> None:
    """Offsets of zero leave a box where it is, at each stage; those of the coder's own weights move it onto the object."""
    heads: Any = shapes.detector(root, detector="cascade_mask_rcnn").roi_heads
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
    detector: Any = shapes.detector(root, detector="cascade_mask_rcnn").eval()
    refine = detector.roi_heads._refine

    def away(number: int, offsets: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        (moved,) = refine(number, offsets, boxes)
        return [torch.cat([moved[:1] + 1000, moved[1:]])]

    monkeypatch.setattr(detector.roi_heads, "_refine", away)
    (output,) = detector([torch.rand(3, 64, 80)])
    assert output["boxes"].isfinite().all()


# Refused


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    recipe = shapes.recipe()
    with refused("runs.it.weights", "none.pth", "counts from the folder of params.yaml"):
        backbone.build("runs.it", shapes.planned(weights="none.pth"), recipe, tmp_path)
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with refused("runs.it.weights", "damaged.pth", "weights of test_convnext"):
        backbone.build("runs.it", shapes.planned(weights="damaged.pth"), recipe, tmp_path)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with refused("runs.it.weights", "missing (stem.0.weight", "unexpected (", "it looks like a ResNet"):
        backbone.build("runs.it", shapes.planned(weights="other.safetensors"), recipe, tmp_path)


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
        backbone.build("runs.it", shapes.planned(model), shapes.recipe(), tmp_path)
