"""SIGINT and SIGTERM: a step is finished and saved; side by side, in notebooks and in processes that train together too."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdlib.engine import checkpoint
from kdlib.engine.learner import Learner
from kdlib.parallel import signals
from kdlib.parallel.signals import SIGNALS, Stopped, asked_to_stop, held_back
from tests import tiny, training
from tests.test_workers import TWO_CORES, study, two_cores  # noqa: F401 (a fixture)
from tests.training import method, setting, trained

each = pytest.mark.parametrize("number", SIGNALS)


@each
def test_a_signal_is_noted_once_and_acts_the_second_time(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.0)
    handlers, told = {one: signal.getsignal(one) for one in SIGNALS}, []
    with pytest.raises(ZeroDivisionError):
        signal.signal(number, lambda *_: 1 // 0)
        try:
            with held_back(lambda: told.append(number)):
                assert not asked_to_stop()
                os.kill(os.getpid(), number)
                assert asked_to_stop()
                with held_back(lambda: told.append("inner")):
                    assert asked_to_stop()
                os.kill(os.getpid(), number)
        finally:
            assert told == [number]
            assert not asked_to_stop()
            signal.signal(number, handlers[number])
    assert {one: signal.getsignal(one) for one in SIGNALS} == handlers


def test_sigterm_from_several_sides_is_one_request() -> None:
    """Slurm sends it to every process of a job, and those that hold it back pass it on besides."""
    before, told = signal.signal(signal.SIGTERM, lambda *_: told.append("ends")), []
    try:
        with held_back(lambda: told.append("saves")):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.001)  # for it to be delivered
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == ["saves", "ends"]


def test_every_step_is_a_place_to_stop_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs end between a signal and their row of the curve; the validation is made when training goes on."""
    methods = {name: method(name) for name in ("kd", "fitnet")}
    undisturbed = trained(setting(), methods, tmp_path / "undisturbed")
    advanced: list[str] = []
    advance = Learner.advance
    monkeypatch.setattr(Learner, "advance", lambda self: (advanced.append(self.job.name), advance(self)))
    monkeypatch.setattr("kdlib.engine.loop.asked_to_stop", lambda: bool(advanced))
    for step in range(1, 13):
        advanced.clear()
        with pytest.raises(Stopped, match=f"stopped after step {step} of 12"):
            trained(setting(), methods, tmp_path / "stopped")
    monkeypatch.undo()
    assert trained(setting(), methods, tmp_path / "stopped") == undisturbed


def test_another_thread_holds_nothing_back() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with held_back():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


@each
def test_training_saves_at_the_end_of_the_step_and_goes_on_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """However far away the next checkpoint would have been."""
    methods = {name: method(name) for name in ("kd", "reviewkd")}
    undisturbed = trained(setting(), methods, tmp_path / "undisturbed")
    saved: list[int] = []
    save = checkpoint.save

    def note(folder: Path, step: int, state: dict[str, Any]) -> None:
        saved.append(step)
        save(folder, step, state)

    advance = Learner.advance

    def signal_at_seven(self: Learner) -> None:
        if self.step == 6 and self.job.name == "kd":
            os.kill(os.getpid(), number)
        advance(self)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", note)
        patched.setattr(Learner, "advance", signal_at_seven)
        with pytest.raises(Stopped, match="test: stopped after step 7 of 12; the same command goes on from there"):
            trained(setting(), methods, tmp_path / "stopped")
    assert saved == [7, 7]
    assert trained(setting(), methods, tmp_path / "stopped") == undisturbed


@TWO_CORES
def test_processes_side_by_side_save_too(tmp_path: Path) -> None:
    """Their own checkpoints are an hour away."""
    root = study(tmp_path, checkpoint_seconds=3600, seeds=(0, 1, 2, 3))
    content = training.content(methods=("no_kd", "kd"), epochs=400.0, seeds=(0, 1, 2, 3), checkpoint_seconds=3600)
    training.tiny.write(root, content)
    log = tmp_path / "log"
    with training.running(root, log, threads=2) as parent:
        while not all(f"seed {seed}  epoch 3" in log.read_text() for seed in (0, 1)):
            assert parent.poll() is None
            time.sleep(0.02)
        started = time.monotonic()
        parent.terminate()
        assert parent.wait(30) != 0
        assert time.monotonic() - started < 10
    assert "Stopped: " in log.read_text()
    folders = {path.parent for path in training.store(root).rglob("checkpoint-*.pt")}
    assert len(folders) == 4  # both methods of the two seeds that were being trained; the others were not begun


STAGE = "stages: {one: {cmd: none, deps: [one.ipynb], outs: [done/one.ipynb]}}"


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (
            "[os.kill(one, signal.SIGTERM) for one in (os.getppid(), os.getppid(), os.getpid())]",
            130,
            "one: stopped; what was saved last is kept",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "one: its process was ended (Kernel died), perhaps for want of memory"),
    ],
    ids=["all asked to stop", "ended from outside"],
)
def test_a_notebook_whose_kernel_dies_says_so_in_one_line(tmp_path: Path, asked: str, code: int, said: str) -> None:
    """Before it trains, or measures: nothing holds a signal back there."""
    tiny.write(tmp_path)
    (tmp_path / "dvc.yaml").write_text(STAGE)
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    source = f"import os, signal, time\n{asked}\ntime.sleep(60)"
    notebook = {"cells": [cell | {"source": source}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "one.ipynb").write_text(json.dumps(notebook))
    done = subprocess.run(
        [sys.executable, "-m", "kdlib.study.cli.notebook", "run", "one"], cwd=tmp_path, check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "done").exists()
