"""A detector learns, repeats to the byte, goes on where it was stopped, and refuses what cannot work."""

import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from kdlib import config
from kdlib.files import read_json
from kdlib.parallel.ranks import local_groups
from kdlib.parallel.signals import Stopped
from projects.detection import evaluate, settings
from projects.detection.coco import GroupSampler, Views
from projects.detection.fit import Learner
from projects.detection.tests import shapes
from projects.detection.train import RUNS, main, run
from tests import tiny
from tests.refusals import refused
from tests.test_distributed import meet
from tests.training import NUMBERS, start

FOLDER = RUNS / "small"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with a finished run."""
    root = shapes.write(tmp_path_factory.mktemp("trained"))
    run(root, "small")
    return root


def test_it_learns(trained: Path) -> None:
    curve = pd.read_csv(trained / FOLDER / "curve.csv")
    assert curve["step"].tolist() == [2, 4, 6]
    assert curve["loss"].iloc[-1] < 0.85 * curve["loss"].iloc[0]
    np.testing.assert_allclose(curve.filter(like="loss_").sum(axis=1), curve["loss"], atol=1e-5)
    metrics = read_json(trained / FOLDER / "metrics.json")
    assert metrics["images"] == 3
    assert metrics["box_ap50"] >= metrics["box_ap"] > 0
    assert metrics["mask_ap"] > 0
    assert metrics["box_ap_large"] is None  # above 96 x 96 pixels there is nothing


def test_a_run_that_was_stopped_ends_as_one_that_was_not(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert (again / FOLDER / name).read_bytes() == (trained / FOLDER / name).read_bytes(), name
    assert not list((again / FOLDER).glob("checkpoint*"))


def test_the_command_tells_the_table(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kdlib.study.report.published.FILE", tiny.ROOT / "results/published/results.csv")
    monkeypatch.setattr(sys, "argv", ["train", "small", "--folder", str(trained)])
    before = (trained / FOLDER / "metrics.json").stat().st_mtime_ns
    main()
    printed = capsys.readouterr().out
    assert (trained / "results/tables/table11_coco.md").read_text() == printed.rstrip("\n") + "\n"
    assert re.search(r"\| resnet50 +\| mask_rcnn_1x +\| +\| +\| 41\.8", printed)
    assert (trained / FOLDER / "metrics.json").stat().st_mtime_ns == before  # a finished run is not made again


def test_what_a_run_depends_on_cannot_change_under_it(trained: Path, tmp_path: Path) -> None:
    again = shapes.write(tmp_path, learning_rate=1e-3)
    (again / FOLDER).mkdir(parents=True)
    (again / FOLDER / "run.json").write_bytes((trained / FOLDER / "run.json").read_bytes())
    with refused("runs.small", "begun with another settings", f"delete {again / FOLDER}"):
        run(again, "small")


def gradient_of_one(root: Path) -> dict[str, Tensor]:
    """After the first step, by this process with what groups it has."""
    recipe = shapes.recipe(optimizer="sgd", learning_rate=1e-3, momentum=0.0, layer_decay=1.0, drop_path=0.0, warmup_steps=0)
    detector = shapes.detector(root, drop_path=0.0)
    learner = Learner(detector, recipe, seed=0, steps_per_epoch=2)
    views = Views(shapes.split(root, "train"), recipe, seed=0)
    for group, indices in zip(local_groups(recipe.groups), GroupSampler(len(views), recipe, seed=0, first=0), strict=False):
        learner.backward(group, [views[index] for index in indices])
    learner.update()
    learner.close_epoch()
    losses = {name: torch.tensor(value) for name, value in learner.curve[0].items()}
    detections = evaluate.detect(detector, shapes.split(root, "val"), torch.device("cpu"), workers=0)
    images = torch.tensor([detection["image_id"] for detection in detections]).unique()
    return losses | dict(detector.state_dict()) | {"images": images, "detections": torch.tensor(len(detections))}


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
        together = torch.load(root / f"{number}.pt", weights_only=True)
        for name, value in alone.items():
            assert_close(together[name], value, rtol=1e-4, atol=1e-6, msg=name)


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
    monkeypatch.setattr("sys.argv", ["train", "small", "--folder", str(root)])
    monkeypatch.setattr("projects.detection.train.run", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=r"--folder: found .*, which has no results/published/results.csv at or above it; allowed: "):
        main()


def test_a_full_gpu_is_told_with_the_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shapes.write(tmp_path / "shapes")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("projects.detection.train.fit", full)
    with refused("recipes.tiny.group_size", "more than the memory of the GPU", "Tried to allocate 2.00 GiB.)", "set it lower"):
        run(root, "small")


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
