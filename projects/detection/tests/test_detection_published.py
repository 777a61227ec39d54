"""Recipes are the published ones, and published numbers stand beside measured ones."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from torch import nn

from kdlib import config
from kdlib.study.report.render import MINUS
from projects.detection import settings, table
from projects.detection.cascade import CONVOLUTIONS, GIOU_WEIGHT
from projects.detection.optimizer import layer_of, learning_rate, optimizer
from projects.detection.train import HERE, RUNS
from tests import tiny

IMAGENET = tiny.ROOT / "studies/imagenet"  # trains the backbones


@pytest.fixture(scope="module")
def published() -> settings.Params:
    content = config.read_yaml(HERE)
    content["study"]["launch"]["processes"] = 1
    return settings.parse(content)


def setting(recipe: str, name: str) -> str:
    rows = pd.read_csv(tiny.ROOT / "results/published/coco_recipes.csv")
    (value,) = rows.loc[(rows["config"] == recipe) & (rows["setting"] == name), "value"]
    return str(value)


def numbers(text: str, pattern: str) -> list[float]:
    match = re.search(pattern, text)
    assert match, text
    return [float(value) for value in match.groups()]


def test_backbones_are_students_of_the_study_of_imagenet(published: settings.Params) -> None:
    study = config.load(IMAGENET)
    for name, run in published.runs.items():
        path = Path(os.path.normpath(HERE / (run.weights or ""))).relative_to(IMAGENET / "runs/distill")
        comparison, method, seed, _ = path.parts
        assert study.comparisons[comparison].student == run.model, name
        assert method in study.comparisons[comparison].methods
        assert seed in {f"seed_{number}" for number in study.study.seeds}


def test_every_recipe_that_is_called_verified_is_published(published: settings.Params) -> None:
    rows = pd.read_csv(tiny.ROOT / "results/published/coco_recipes.csv")
    assert {name for name, recipe in published.recipes.items() if recipe.settings == "verified"} == set(rows["config"])


def test_the_resnet_is_trained_as_published(published: settings.Params) -> None:
    name = "mask_rcnn_r50_1x"
    recipe = published.recipes[name]
    optimiser = numbers(setting(name, "optimizer"), r"SGD lr (\S+) momentum (\S+) wd (\S+)")
    assert (recipe.optimizer, [recipe.learning_rate, recipe.momentum, recipe.weight_decay]) == ("sgd", optimiser)
    schedule = numbers(setting(name, "schedule"), r"(\d+) epochs, step (\d+)/(\d+), (\d+)-iter linear warmup ratio (\S+)")
    assert [recipe.epochs, *recipe.steps, recipe.warmup_steps, recipe.warmup_start] == schedule
    group, gpus, batch = numbers(setting(name, "batch"), r"(\d+) per GPU x (\d+) GPUs = (\d+)")
    assert (recipe.group_size, recipe.groups, recipe.batch_size) == (group, gpus, batch)
    frozen, long, short, flip = numbers(
        setting(name, "backbone"), r"SyncBN trainable, norm_eval False, frozen_stages (\d+), img (\d+)x(\d+), flip (\S+)"
    )
    assert (recipe.frozen_stages, recipe.long_side, recipe.short_sides, recipe.flip) == (frozen, long, [short], flip)
    assert recipe.sync_norm


def test_the_convnexts_are_trained_as_published(published: settings.Params) -> None:
    name, other = "mask_rcnn_convnextv2_3x", "cascade_mask_rcnn_convnextv2_3x"
    plain, cascade = published.recipes[name], published.recipes[other]
    rate, decay, layer_decay, layers = numbers(
        setting(name, "optimizer"), r"AdamW lr (\S+) betas \.9/\.999 wd (\S+), layer-wise decay (\S+), num_layers (\d+)"
    )
    assert (plain.learning_rate, plain.weight_decay, plain.layer_decay, plain.layers) == (rate, decay, layer_decay, layers)
    values = numbers(
        setting(name, "schedule"),
        r"(\d+) epochs, step (\d+)/(\d+), (\d+)-iter warmup, (\d+) img/GPU x 8 = (\d+), fp16 init scale (\d+), drop_path (\S+), "
        r"multi-scale (\d+)-(\d+) \+ crop (\d+)x(\d+)",
    )
    schedule = [plain.epochs, *plain.steps, plain.warmup_steps, plain.group_size, plain.batch_size, plain.loss_scale, plain.drop_path]
    assert [*schedule, plain.short_sides[0], plain.short_sides[-1], *(plain.crop or [])] == values
    rate, decay, layer_decay, layers, giou = numbers(
        setting(other, "optimizer"),
        r"AdamW lr (\S+) wd (\S+), layer-wise decay (\S+), num_layers (\d+); 4conv1fc SyncBN GIoU\((\d+)\) heads",
    )
    theirs = {"learning_rate": rate, "weight_decay": decay, "layer_decay": layer_decay, "layers": int(layers), "sync_norm": True}
    assert cascade == plain.model_copy(update=theirs | {"detector": "cascade_mask_rcnn"})
    assert giou == GIOU_WEIGHT
    assert CONVOLUTIONS == 4


def test_the_learning_rate_at_every_turn(published: settings.Params) -> None:
    recipe = published.recipes["mask_rcnn_r50_1x"]
    per_epoch = 117266 // 32  # of COCO's training images those with instances
    rates = {step: learning_rate(recipe, step, per_epoch) for step in (0, 250, 500, 8 * per_epoch - 1, 8 * per_epoch, 11 * per_epoch)}
    assert list(rates.values()) == pytest.approx([4e-5, (4e-2 + 4e-5) / 2, 4e-2, 4e-2, 4e-3, 4e-4])


def test_layers_of_a_convnext_learn_more_slowly_the_deeper_they_lie(published: settings.Params) -> None:
    recipe = published.recipes["cascade_mask_rcnn_convnextv2_3x"]
    with torch.device("meta"):
        net = timm.create_model("convnextv2_tiny", num_classes=0)
    whole = nn.ModuleDict({"backbone": nn.ModuleDict({"net": net}), "head": nn.Linear(2, 2)})
    layers = {name: layer_of(name, 6) for name, _ in whole.named_parameters()}
    expected = {"stem.0": 0, "stages.0.blocks.2": 1, "stages.1.downsample": 2, "stages.1.blocks.0": 2, "stages.2.downsample": 3}
    expected |= {"stages.2.blocks.2": 3, "stages.2.blocks.3": 4, "stages.2.blocks.8": 5, "stages.3.downsample": 6, "stages.3.blocks.0": 6}
    for part, layer in expected.items():
        assert {number for name, number in layers.items() if name.startswith(f"backbone.net.{part}.")} == {layer}, part
    assert layers["head.weight"] == 7
    groups = optimizer(whole, recipe).param_groups
    assert {round(group["scale"], 6) for group in groups} == {round(0.7**power, 6) for power in range(8)}
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in groups) == len(layers)


def test_published_numbers_stand_beside_measured_ones(published: settings.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlib.study.report.published.FILE", tiny.ROOT / "results/published/results.csv")
    for name in ("resnet50_1x", "resnet50_2x"):
        folder = tmp_path / RUNS / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"box_ap": 0.410, "mask_ap": None}))
    compared = table.compare(tmp_path, published, RUNS)
    assert len(compared.frame) == 12  # each published number once
    assert not compared.frame[["student", "run", "settings", "published"]].isna().any(axis=None)
    shown = compared.shown.set_index("run")
    columns = ["box AP, published", "box AP, measured", "box AP, difference"]
    assert list(shown.loc["resnet50_1x", columns]) == ["41.8", "41.0", f"{MINUS}0.8"]
    assert shown.loc["resnet50_1x", "mask AP, measured"] == ""
    assert list(shown.loc["resnet50_2x", columns]) == ["42.1", "41.0", ""]
    assert shown.loc["convnextv2_tiny_3x", "settings"] == "verified"
    assert "Assumed settings, so no difference is given: convnextv2_tiny_1x, convnextv2_tiny_cascade_1x, resnet50_2x." in compared.caption
