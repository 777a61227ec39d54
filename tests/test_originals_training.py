"""Training on images that stay in their files: the same numbers alone, with processes that decode, killed and resumed, on two processes."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from kdlib.data import lazy_images
from kdlib.decoding.pool import Pool
from kdlib.files import read_json
from kdlib.study.training.experiment import Experiment
from tests import jpegs, tiny, training
from tests.refusals import refused


def content(images: Path, **study: Any) -> dict[str, Any]:
    """Two methods, 24 steps of two mix groups in which each image comes twice, on views of 16 px."""
    made = training.content(methods=("kd", "dkd"), epochs=8.0, checkpoint_seconds=0, **study)
    made["data"] = {"net": jpegs.entry(images)}
    made["study"]["headline"]["data"] = made["teachers"]["small"]["data"] = made["comparisons"][training.COMPARISON]["data"] = "net"
    made["comparisons"][training.COMPARISON]["fraction"] = 1.0
    for recipe in made["recipes"].values():
        recipe |= {"batch_size": 12, "group_size": 6, "repeats": 2, "crop_min_area": 0.08, "crop_padding": 0.0}
    return made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jpegs.write(tmp_path_factory.mktemp("imagenet") / "in")


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by this process, which decodes for itself."""
    root = tiny.write(tmp_path_factory.mktemp("alone"), content(images))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kdlib.decoding.pool.spare", lambda: 0)
        experiment = Experiment(root)
        experiment.prepare_data("net")
        experiment.make_teacher("small")
        shutil.copytree(root / "runs", root / "ready")
        experiment.distill(training.COMPARISON)
    return root


def fresh(root: Path, alone: Path, made: dict[str, Any]) -> Path:
    """Data and teacher ready, nothing distilled."""
    tiny.write(root, made)
    shutil.copytree(alone / "ready", root / "runs")
    return root


def decoding(study: psutil.Process) -> list[psutil.Process]:
    return [child for child in study.children(recursive=True) if "kdlib.decoding.worker" in child.cmdline()]


def test_a_process_that_decodes_changes_no_number(images: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Pool(1)) as made:
        monkeypatch.setattr(lazy_images, "pool", lambda: made)
        root = fresh(tmp_path, alone, content(images))
        Experiment(root).distill(training.COMPARISON)
    assert training.numbers(root) == training.numbers(alone)


@pytest.mark.long
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_killed_and_resumed_it_ends_alike(images: Path, alone: Path, tmp_path: Path, end: str) -> None:
    root = fresh(tmp_path / "project", alone, content(images))
    with training.running(root, tmp_path / "log") as study:
        while not list(training.store(root).rglob("checkpoint-*5.pt")):
            assert study.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        workers = decoding(psutil.Process(study.pid))
        assert workers or len(os.sched_getaffinity(0)) == 1
        getattr(study, end)()
        assert study.wait(10) != 0
        _, left = psutil.wait_procs(workers, timeout=10)
        assert not left
    assert ("stopped after step" in (tmp_path / "log").read_text()) == (end == "terminate")
    assert not training.numbers(root)
    with training.running(root, tmp_path / "log") as study:
        assert study.wait(100) == 0
    assert training.numbers(root) == training.numbers(alone)


def test_what_changes_meanwhile_is_refused(images: Path, alone: Path, tmp_path: Path) -> None:
    moved = jpegs.copied(images, tmp_path / "in")
    root = tiny.write(tmp_path / "project", content(moved))
    Experiment(root).prepare_data("net")
    shutil.copytree(alone / "ready" / "teacher", root / "runs" / "teacher")
    for file in (moved / "train").rglob("*_007.JPEG"):
        file.unlink()
    with refused("data.net.path", "_007.JPEG", "restore this file"):
        Experiment(root).distill(training.COMPARISON)


def test_resident_images_are_refused(images: Path, alone: Path, tmp_path: Path) -> None:
    made = content(images)
    made["study"]["compute"]["resident"] = True
    with refused("study.compute.resident", "auto or false"):
        Experiment(fresh(tmp_path, alone, made)).distill(training.COMPARISON)


@pytest.mark.long
def test_two_processes_are_one(images: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decodes the images of its own mix group."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    made = content(images, launch={"processes": 2, "nodes": 1, "rendezvous": None})
    root = fresh(tmp_path, alone, made)
    Experiment(root).distill(training.COMPARISON)
    folders = sorted((alone / "runs" / "distill").rglob("metrics.json"))
    assert len(folders) == 2
    for path in folders:
        other = root / path.relative_to(alone)
        ours, theirs = (pd.read_csv(one.with_name("curve.csv")) for one in (path, other))
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-2)
        assert abs(read_json(path)["test_top1"] - read_json(other)["test_top1"]) <= 2 / 24 + 1e-9
