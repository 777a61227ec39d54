"""Two processes that train together are one with the same mix groups: losses, weights, statistics, evaluation, and where they stop."""

import dataclasses
import errno
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from kdlib import config
from kdlib.config.schema import Launch
from kdlib.engine.loop import TrainingLoop
from kdlib.engine.metrics import predict
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.errors import Refused
from kdlib.files import read_json
from kdlib.models.build import build
from kdlib.parallel.launch import RankFailed, run_distributed
from kdlib.parallel.ranks import any_rank, from_rank_zero, gather_ranks, mean_over_ranks, rank, wait_for_all
from kdlib.seed import seed_torch
from kdlib.study.training.checks import check_machines
from kdlib.study.training.experiment import Diverged, Experiment
from kdlib.types import Batch, Setup
from kdlib.views.stream import ViewStream
from tests import tiny, training
from tests.training import method, setting, start

STEPS = 50
NAMES = ("kd", "dist", "rkd", "reviewkd", "ofa")  # relational ones, and adapters with BatchNorm
GROUPS = {"batch_size": 24, "group_size": 12, "hard_loss": "ce"}


class InDouble(ViewStream):
    def batch(self, step: int, group: int = 0) -> Batch:
        batch = super().batch(step, group)
        return dataclasses.replace(batch, images=batch.images.double(), targets=batch.targets.double())


def train(names: tuple[str, ...], steps: int) -> dict[str, dict[str, Any]]:
    """Losses and all state after these steps, in float64, on augmented and mixed views, with drop path."""
    among = setting(**GROUPS)
    split = among.data.train
    stream = InDouble(split.images, split.labels, among.index, classes=6, recipe=among.recipe, hflip=0.5, seed=0)
    teacher = training.teacher().double()
    learners = []
    for name in names:
        seed_torch(0, "init")
        student, made = build(training.NET, 6, 1, 8, 0.3), method(name)()
        made.adapt(Setup(student.shape, teacher.shape, torch.from_numpy(split.labels[among.index].astype(np.int64))))
        learners.append(training.learner(name, student.double(), made.double(), among.recipe, total_steps=steps, seed=0))
    answers = TeacherCache(teacher, None, 12, 8)
    TrainingLoop(learners, stream, answers, validate=lambda _: 0.0, save=lambda _: None, save_seconds=1e9, title="test").run()
    return {
        one.job.name: {"losses": torch.tensor([row["loss"] for row in one.curve.rows]), "state": one.student.state_dict()}
        for one in learners
    }


def meet(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2, timeout=timedelta(seconds=100))


def train_as_one_of_two(number: int, folder: Path) -> None:
    training.prepared()  # by each for itself, before they meet
    meet(number, folder)
    found = {"trained": train(NAMES, STEPS), "helpers": helpers(), "predicted": predicted()}
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


def helpers() -> dict[str, Any]:
    values = [torch.tensor([1.0, 2.0]) * (rank() + 1), torch.tensor(10.0 * rank())]
    mean_over_ranks(values)
    return {
        "means": values,
        "any": any_rank(rank() == 1, False, True),
        "first": from_rank_zero([rank() == 0, rank() == 1]),
        "all": gather_ranks(torch.tensor([rank()])),
    }


def predicted() -> Tensor:
    torch.manual_seed(3)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)  # an odd number: one process has one to spare
    return predict(build(training.NET, 6, 1, 8), images, 2, training.CPU)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    processes = [start(train_as_one_of_two, number, folder) for number in range(2)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return train(NAMES, STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_with_two_groups(two: list[dict[str, Any]], one: dict[str, dict[str, Any]], name: str) -> None:
    for found in two:
        assert_close(found["trained"][name]["losses"], one[name]["losses"], rtol=0, atol=1e-5)
        for key, value in one[name]["state"].items():
            assert_close(found["trained"][name]["state"][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_the_groups_matter(one: dict[str, dict[str, Any]]) -> None:
    """The test above could have failed: one process that takes half of each batch ends elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kdlib.engine.loop.local_groups", lambda _: range(1))
        half = train(("kd",), STEPS)
    assert not torch.allclose(half["kd"]["losses"], one["kd"]["losses"], atol=1e-3)


def test_what_processes_tell_each_other(two: list[dict[str, Any]]) -> None:
    for found in two:
        said = found["helpers"]
        assert_close(said["means"], [torch.tensor([1.5, 3.0]), torch.tensor(5.0)])
        assert (said["any"], said["first"], said["all"].tolist()) == ([True, False, True], [True, False], [0, 1])
    alone = helpers()
    assert (alone["any"], alone["first"], alone["all"].tolist()) == ([False, False, True], [True, False], [0])


def test_evaluation_counts_every_image_once(two: list[dict[str, Any]]) -> None:
    expected = predicted()
    assert len(expected) == 7
    for found in two:
        assert_close(found["predicted"], expected)


# Started from params.yaml


def content(processes: int = 2, methods: tuple[str, ...] = ("kd", "reviewkd"), **study: Any) -> dict[str, Any]:
    made = training.content(methods=methods, epochs=4.0, launch={"processes": processes, "nodes": 1, "rendezvous": None}, **study)
    for recipe in made["recipes"].values():
        recipe["group_size"] = 8
    return made


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study by one process."""
    root = training.fresh(tmp_path_factory.mktemp("alone"), content(processes=1))
    Experiment(root).distill(training.COMPARISON)
    return root


def close(root: Path, alone: Path) -> None:
    """Losses of all epochs as far as fp32 repeats them, accuracies within two of 24 images."""
    folders = sorted((alone / "runs" / "distill").rglob("metrics.json"))
    assert len(folders) == 2
    for path in folders:
        other = root / path.relative_to(alone)
        ours, theirs = (pd.read_csv(one.with_name("curve.csv")) for one in (path, other))
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-2)
        assert ours["step"].tolist() == theirs["step"].tolist()
        assert abs(read_json(path)["test_top1"] - read_json(other)["test_top1"]) <= 2 / 24 + 1e-9


def test_a_study_on_two_processes(tmp_path: Path, alone: Path) -> None:
    """Data parallel training, started, measured and written as by one; teachers included."""
    root = training.fresh(tmp_path, content())
    Experiment(root).distill(training.COMPARISON)
    close(root, alone)
    for path in (root / "runs" / "distill").rglob("metrics.json"):
        assert read_json(path)["status"] == "finished"


def test_begun_by_two_and_ended_by_one(tmp_path: Path, alone: Path) -> None:
    root = training.fresh(tmp_path / "project", content(checkpoint_seconds=0))
    with training.running(root, tmp_path / "log") as parent:
        wait_for_step(5, root, parent)
        asked = time.monotonic()
        parent.terminate()
        assert parent.wait(30) != 0
        assert time.monotonic() - asked < 10
    reached = max(int(path.stem.rpartition("-")[2]) for path in training.store(root).rglob("checkpoint-*.pt"))
    assert 5 <= reached < 24
    tiny.write(root, content(processes=1))
    Experiment(root).distill(training.COMPARISON)
    close(root, alone)


def test_a_process_that_dies_is_named_and_the_others_end(tmp_path: Path) -> None:
    root = training.fresh(tmp_path / "project", content(checkpoint_seconds=0))
    with training.running(root, tmp_path / "log") as parent:
        wait_for_step(3, root, parent)
        ranks = [child for child in psutil.Process(parent.pid).children(recursive=True) if child.cpu_times().user > 1]
        killed = time.monotonic()
        ranks[-1].kill()
        assert parent.wait(60) != 0
        assert time.monotonic() - killed < 60
    said = (tmp_path / "log").read_text()
    assert re.search(r"RankFailed: process [01] of 2 that trained together ended with signal 9", said)
    _, left = psutil.wait_procs(ranks, timeout=10)
    assert not left


def fill_the_disk() -> None:
    if rank() == 0:
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.pt")
    wait_for_all()


def fail_in_the_second() -> None:
    if rank() == 1:
        raise ValueError("no such thing")
    wait_for_all()


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (fill_the_disk, Refused, r"^disk: found no room left at checkpoint.pt; allowed: [^\n]*$"),
        (
            fail_in_the_second,
            RankFailed,
            r"^process 1 of 2 that trained together ended with exit code 1: ValueError: no such thing\. [^\n]*$",
        ),
    ],
)
def test_an_error_of_one_process_is_said_in_one_line(work: Callable[[], None], error: type[Exception], message: str) -> None:
    """Though the other one fails too, since it misses the first."""
    with pytest.raises(error, match=message):
        run_distributed(Launch(processes=2, nodes=1, rendezvous=None), work, Diverged)


def test_a_study_on_two_machines(tmp_path: Path, alone: Path) -> None:
    """Two launchers with one process each: the second does all that the first one begins, the study stopped and begun again included."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        rendezvous = f"localhost:{probe.getsockname()[1]}"
    made = content(checkpoint_seconds=0)
    made["study"]["launch"] = {"processes": 1, "nodes": 2, "rendezvous": rendezvous}
    root = training.fresh(tmp_path / "project", made)
    command = [sys.executable, "-m", "kdlib.study", "join"]
    with (tmp_path / "other").open("wb") as said:
        other = subprocess.Popen(command, cwd=root, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        with training.running(root, tmp_path / "log") as first:
            wait_for_step(3, root, first)
            first.terminate()
            assert first.wait(30) != 0
        assert "Stopped" in (tmp_path / "log").read_text().splitlines()[-1]
        with training.running(root, tmp_path / "log") as first:
            assert first.wait(90) == 0
        close(root, alone)
        assert other.poll() is None
        other.terminate()
        assert other.wait(10) == 0
    finally:
        other.kill()
    assert "stopped after step" in (tmp_path / "other").read_text()


def wait_for_step(step: int, root: Path, study: subprocess.Popen[bytes]) -> None:
    while not list(training.store(root).rglob(f"checkpoint-*{step:02}.pt")):
        assert study.poll() is None
        time.sleep(0.01)


def test_divergence_that_is_refused_comes_through(tmp_path: Path) -> None:
    made = content(methods=("kd",), on_divergence="fail")
    made["recipes"]["strong"]["learning_rate"] = 1e18
    with pytest.raises(Diverged, match="kd diverged at step"):
        Experiment(training.fresh(tmp_path, made)).distill(training.COMPARISON)


# Refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 3}, r"study.launch.processes: found 3; allowed: at most the 2 cores of this machine; start fewer"),
        ({"nodes": 2}, r"study.launch.rendezvous: found nothing; allowed: host:port where there are several nodes"),
        ({"nodes": 2, "rendezvous": "host"}, r"study.launch.rendezvous: found 'host'; allowed: host:port of the first machine"),
        ({"rendezvous": "host:29500"}, r"study.launch.rendezvous: found 'host:29500'; allowed: .* null where there is one"),
    ],
)
def test_what_cannot_be_started_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = content()
    made["study"]["launch"] |= change
    with pytest.raises(Refused, match=message):
        Experiment(tiny.write(tmp_path, made))


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Refused, match=r"study.launch.processes: found 2; allowed: at most the 1 GPUs of this machine; start fewer"):
        check_machines(config.load(tiny.write(tmp_path, content())).study.launch)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    made = content()
    made["recipes"]["strong"]["group_size"] = None
    with pytest.raises(
        Refused, match=r"recipes.strong.group_size: found '1 mix groups in a batch of 16'; allowed: .*2 processes.*set it to 8"
    ):
        Experiment(tiny.write(tmp_path, made))
