"""A study of seconds that is ready to distill, its parts for tests that train, and what a child process does in a test that kills it."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib import config
from kdlib.config.schema import ComputeParams, Recipe
from kdlib.data.dataset import load_dataset
from kdlib.engine import checkpoint
from kdlib.engine.backend import Backend
from kdlib.engine.gradients import StudentWithLoss
from kdlib.engine.learner import Job, Learner
from kdlib.engine.setting import Setting
from kdlib.engine.teacher import Teacher
from kdlib.engine.train import train
from kdlib.losses import METHODS
from kdlib.losses.base import Method
from kdlib.losses.hard import HARD
from kdlib.models.build import Classifier, build
from kdlib.seed import seed_torch
from kdlib.study.training.experiment import Experiment
from kdlib.study.training.store import Store
from tests import tiny

ROOT = tiny.ROOT
NET = "kd_resnet8_w8_s1"
CPU = torch.device("cpu")
AUTO = ComputeParams(precision="auto", compile="auto", resident="auto", ahead="auto")
COMPARISON = "only"
NUMBERS = ("metrics.json", "curve.csv", "weights.safetensors")  # what must repeat byte for byte


@functools.cache
def prepared() -> Path:
    """A folder with the tiny study's data and teacher: once for all tests of a session."""
    root = Path(tempfile.mkdtemp(prefix="kdlib-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tiny.write(root)
    experiment = Experiment(root)
    experiment.prepare_data("fractals")
    experiment.make_teacher("small")
    return root


MIXABLE = tuple(name for name, method in METHODS.items() if not method.unmixed)  # those that the strong recipe can train


def content(*, epochs: float = 1.0, methods: Sequence[str] = MIXABLE, seeds: Sequence[int] = (0,), **study: Any) -> dict[str, Any]:
    """params.yaml with one comparison: strong recipe, drop path, a checkpoint after every step."""
    made = tiny.content()
    made["study"] |= {"seeds": list(seeds), **study}
    made["recipes"]["strong"] |= {"epochs": epochs}
    chosen = {"fraction": 0.5, "recipe": "strong", "methods": list(methods), "sweep": None}
    made["comparisons"] = {COMPARISON: made["comparisons"]["small_weak"] | chosen}
    return made


def fresh(folder: Path, params: dict[str, Any]) -> Path:
    """A project with this params.yaml, the data and the teacher ready, and a run store of its own."""
    tiny.write(folder, params)
    shutil.copytree(prepared() / "runs", folder / "runs")
    return folder


def numbers(root: Path) -> dict[str, bytes]:
    """What must repeat of every run below runs/distill/, by path."""
    folder = root / "runs" / "distill"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.name in NUMBERS}


def store(root: Path) -> Path:
    return root / ".dvc" / "kdlib-runs"


Numbers = dict[str, dict[str, bytes]]  # by name and file

# Parts, without params.yaml


def recipe(**changes: Any) -> Recipe:
    """The tiny study's strong recipe, made shorter: 12 steps over its 96 images."""
    return Recipe.model_validate(tiny.content()["recipes"]["strong"] | {"epochs": 2.0, "drop_path": 0.3} | changes)


def teacher(seed: int = 5) -> Teacher:
    """An untrained one, whose answers are as good as any for comparing numbers; its running statistics are not the initial ones."""
    seed_torch(seed)
    classifier = build(NET, 6, 1, 8)
    with torch.no_grad():
        for _ in range(3):
            classifier(torch.rand(32, 1, 8, 8))
    return Teacher(classifier)


def setting(seed: int = 0, index: np.ndarray | None = None, taught_by: Teacher | None = None, **changes: Any) -> Setting:
    data = load_dataset(prepared() / "runs" / "data" / "fractals")
    index = np.arange(0, 96, 2) if index is None else index
    return Setting(data, index, NET, data.size, taught_by or teacher(), recipe(**changes), seed, CPU, "test", AUTO)


def method(name: str) -> Callable[[], Method]:
    """With the parameters of the study's params.yaml."""
    return lambda: METHODS[name](**config.load(ROOT).methods[name])


def learner(
    name: str, student: Classifier, method: Method, recipe: Recipe, *, total_steps: int, seed: int = 0, backend: Backend | None = None
) -> Learner:
    """At the beginning, with no folder to write to."""
    job = Job(name, lambda: method, False, Path())
    device = next(student.parameters()).device
    model = StudentWithLoss(student, method, HARD[recipe.hard_loss])
    return Learner(job, model, recipe, total_steps=total_steps, seed=seed, backend=backend or Backend(device))


def trained(
    among: Setting, methods: dict[str, Callable[[], Method]], folder: Path, save_seconds: float = 1e9
) -> dict[str, dict[str, bytes]]:
    """Train these together, in this order; what must repeat."""
    jobs = [Job(name, make, True, folder / name) for name, make in methods.items()]
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
    train(among, jobs, save_seconds=save_seconds)
    return {name: {file: (folder / name / file).read_bytes() for file in NUMBERS} for name in methods}


# For child processes


def children() -> Any:
    """Starts processes that have kdlib imported already and nothing else behind them: a start costs milliseconds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training"])
    return context


def start(do: Callable[..., None], *given: Any) -> Any:
    process = children().Process(target=do, args=given, daemon=True)  # a test that fails leaves nobody behind
    process.start()
    return process


def distill(root: Path, log: Path | None = None) -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(log.open("w") if log else sys.stdout):
        Experiment(root).distill(COMPARISON)


@contextlib.contextmanager
def running(root: Path, log: Path, threads: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A script that distills: unlike a child of multiprocessing it does not wait at its end for processes that it has started."""
    command = [sys.executable, "-m", "tests.training", str(root)]
    with log.open("wb") as said:
        script = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        yield script
    finally:
        script.kill()
        script.wait()


def distill_and_die(root: Path, saves: int) -> None:
    """Distill, and be killed right after so many checkpoints were written."""
    save, left = checkpoint.save, saves

    def save_and_die(folder: Path, step: int, state: dict[str, Any]) -> None:
        nonlocal left
        save(folder, step, state)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save_and_die
    distill(root)


def hold(folder: Path, fingerprints: list[str], ready: Any, release: Any) -> None:
    """Claim these runs until told to let go."""
    with Store(folder).claim(fingerprints):
        ready.set()
        release.wait()


def claim_and_use(folder: Path, fingerprint: str, log: Path) -> None:
    with log.open("w") as said, contextlib.redirect_stderr(said), Store(folder).claim([fingerprint]):
        (Store(folder).run(fingerprint) / "used").touch()


if __name__ == "__main__":
    Experiment(Path(sys.argv[1])).distill(COMPARISON)
