"""Killed at any moment, out of disk, a damaged checkpoint: the study goes on and ends with the bytes of an undisturbed one."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.engine import checkpoint, loop
from kdlib.engine.learner import Job
from kdlib.errors import Refused
from kdlib.seed import generator
from kdlib.study.training.experiment import Experiment
from tests import training
from tests.test_engine import ALL as EVERY
from tests.test_engine import Breaks
from tests.training import setting, trained

STATE = {"step": 3, "curve": [{"epoch": 1, "val_top1": None}], "weights": torch.arange(1000.0)}
EPOCHS = 4.0  # 24 steps
FOUR = ("no_kd", "kd", "reviewkd", "dist")  # one with adapters; test_hints_end_to_end.py resumes every method
ALL = {name: EVERY[name] for name in FOUR}


def steps(folder: Path) -> list[int]:
    """Which checkpoints are there."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("checkpoint-*.pt"))


def path(folder: Path, step: int) -> Path:
    (found,) = [one for one in folder.glob("checkpoint-*.pt") if int(one.stem.rpartition("-")[2]) == step]
    return found


def fill(folder: Path, *written: int) -> None:
    for step in written:
        checkpoint.save(folder, step, STATE | {"step": step})


# One checkpoint


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    fill(tmp_path, 3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert torch.equal(found["weights"], STATE["weights"])
    assert (found["step"], found["curve"]) == (3, STATE["curve"])


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, 2, 9, 10, 100)
    assert steps(tmp_path) == [10, 100]
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_the_digest(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


DAMAGE = pytest.mark.parametrize("damage", [truncate, empty, flip_a_byte, flip_the_digest])


@DAMAGE
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, 5, 6)
    damage(path(tmp_path, 6))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 5
    assert "checkpoint-0000000006.pt" in capsys.readouterr().err
    fill(tmp_path, 7)
    assert steps(tmp_path) == [5, 7]  # the damaged one does not count as one of two


@DAMAGE
def test_with_nothing_whole_it_starts_afresh(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    fill(tmp_path, 5, 6)
    damage(path(tmp_path, 5))
    damage(path(tmp_path, 6))
    assert checkpoint.newest(tmp_path) is None


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 5)
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", 2)
        fill(tmp_path, 6)
    with pytest.raises(
        Refused, match=r"0006.pt: found a checkpoint in format 2, of a newer kdlib; allowed: up to format 1; update kdlib, or"
    ):
        checkpoint.newest(tmp_path)
    assert steps(tmp_path) == [5, 6]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "ours", 5)
    fill(tmp_path / "theirs", 6)
    strayed = path(tmp_path / "theirs", 6).rename(tmp_path / "ours" / "checkpoint-0000000006.pt")
    with pytest.raises(Refused, match=r"0006.pt: found a checkpoint of run theirs; allowed: those of run ours; move it back"):
        checkpoint.newest(tmp_path / "ours")
    assert strayed.exists()
    strayed.unlink()
    assert (checkpoint.newest(tmp_path / "ours") or {})["step"] == 5


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    checkpoint.save(tmp_path, 1, {"step": 1, "evil": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.newest(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_what_a_killed_process_half_wrote_is_cleared_away(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    (tmp_path / ".checkpoint-0000000006.pt.4711.0a1b2c3d.tmp").write_bytes(b"half")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 5
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint-0000000005.pt"]


# A full disk


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk is found to be full when the last bytes are flushed."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        yield


@contextmanager
def little_room(_: pytest.MonkeyPatch) -> Iterator[None]:
    """No file may grow beyond 2 kB: a write stops half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("short_of_room", [no_room, little_room])
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_of_room: Any) -> None:
    fill(tmp_path, 5, 6)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    with short_of_room(monkeypatch), pytest.raises(OSError, match=r"No space left|File too large"):
        fill(tmp_path, 7)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before
    fill(tmp_path, 7)
    assert steps(tmp_path) == [6, 7]


def test_a_study_that_ran_out_of_disk_goes_on_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = trained(setting(), {"kd": ALL["kd"]}, tmp_path / "undisturbed")
    save, left = checkpoint.save, 5

    def run_out(folder: Path, step: int, state: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left:
            save(folder, step, state)
        else:
            with no_room(monkeypatch):
                save(folder, step, state)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", run_out)
        with pytest.raises(OSError, match="No space left"):
            trained(setting(), {"kd": ALL["kd"]}, tmp_path / "study", save_seconds=0.0)
    assert steps(tmp_path / "study" / "kd") == [3, 4]
    assert trained(setting(), {"kd": ALL["kd"]}, tmp_path / "study", save_seconds=0.0) == undisturbed


# Interrupted within a process: at every step, quickly


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int, run: Callable[[], object]) -> None:
    """Run until so many checkpoints were written."""
    save, left = checkpoint.save, saves

    def stopping(folder: Path, step: int, state: dict[str, Any]) -> None:
        nonlocal left
        save(folder, step, state)
        left -= 1
        if not left:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping)
        with pytest.raises(Stopped):
            run()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    return trained(setting(), ALL, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("saves", [1, 2, 3, 5, 8, 17, 30, 44])
def test_stopped_after_any_checkpoint_it_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, dict[str, bytes]], saves: int
) -> None:
    """4 students in turn: after 1 to 3 (mod 4) checkpoints they are at different steps, and the first ones wait for the others."""
    stop_after(monkeypatch, saves, lambda: trained(setting(), ALL, tmp_path, save_seconds=0.0))
    assert trained(setting(), ALL, tmp_path, save_seconds=0.0) == undisturbed
    assert [one for one in tmp_path.rglob("*") if one.suffix in (".pt", ".tmp")] == []


def test_stopped_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, dict[str, bytes]]) -> None:
    for saves in (6, 3, 1, 9):
        stop_after(monkeypatch, saves, lambda: trained(setting(), ALL, tmp_path, save_seconds=0.0))
    assert trained(setting(), ALL, tmp_path) == undisturbed


@DAMAGE
def test_a_damaged_checkpoint_costs_a_step_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, dict[str, bytes]], damage: Callable[[Path], None]
) -> None:
    stop_after(monkeypatch, 18, lambda: trained(setting(), ALL, tmp_path, save_seconds=0.0))
    damage(path(tmp_path / "kd", 5))
    for step in (3, 4):
        damage(path(tmp_path / "dist", step))
    assert trained(setting(), ALL, tmp_path, save_seconds=0.0) == undisturbed


def test_killed_while_the_results_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    """Some runs are finished then, one is half written, the rest only have checkpoints."""
    clear, left = checkpoint.clear, 3

    def stopping(folder: Path) -> None:
        nonlocal left
        left -= 1
        if not left:
            (folder / "metrics.json").unlink()  # as if it had not come so far
            raise Stopped
        clear(folder)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "clear", stopping)
        with pytest.raises(Stopped):
            trained(setting(), ALL, tmp_path, save_seconds=0.0)
    missing = [name for name in ALL if not (tmp_path / name / "metrics.json").exists()]
    assert len(missing) == 2
    again = trained(setting(), {name: ALL[name] for name in missing}, tmp_path)
    assert again == {name: undisturbed[name] for name in missing}


@pytest.mark.parametrize("saves", [1, 3, 4, 7, 8, 9])
def test_a_diverged_run_ends_alike_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Stopped before its divergence (at step 1), between that and the check that ends it (after step 6), and later."""
    monkeypatch.setattr(loop, "CHECK_STEPS", 4)
    methods = {"breaks": lambda: Breaks(at=1), "kd": ALL["kd"]}
    alike = trained(setting(), methods, tmp_path / "undisturbed")
    stop_after(monkeypatch, saves, lambda: trained(setting(), methods, tmp_path / "stopped", save_seconds=0.0))
    assert trained(setting(), methods, tmp_path / "stopped", save_seconds=0.0) == alike


def test_a_diverged_run_that_lags_behind_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught up alone, it ends before the others' first step of today."""
    monkeypatch.setattr(loop, "CHECK_STEPS", 1)
    kd = trained(setting(), {"kd": ALL["kd"]}, tmp_path / "alone")["kd"]
    stop_after(monkeypatch, 5, lambda: trained(setting(), {"kd": ALL["kd"]}, tmp_path / "study", save_seconds=0.0))
    both = trained(setting(), {"breaks": lambda: Breaks(at=1), "kd": ALL["kd"]}, tmp_path / "study", save_seconds=0.0)
    assert both["kd"] == kd


def test_checkpoints_wait_for_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One every ``save_seconds`` of training: a clock that gains 3 s a look, one look at the start and at every step, one after a save."""
    now, saved = 0.0, []

    def clock() -> float:
        nonlocal now
        now += 3.0
        return now

    monkeypatch.setattr(loop.time, "monotonic", clock)
    monkeypatch.setattr(checkpoint, "save", lambda _folder, step, _state: saved.append(step))
    training.train(setting(), [Job("kd", ALL["kd"], True, tmp_path)], save_seconds=9.0)
    assert saved
    assert len(saved) < 6


# Killed from outside


def progress(root: Path) -> int:
    """Steps that are safe, over all runs; as a killer sees it from outside."""
    return sum(max(steps(folder), default=0) for folder in training.store(root).glob("*") if folder.is_dir())


def killed(root: Path, kills: int, seed: int) -> int:
    """Distill, killed at random moments; the number of kills that met it alive."""
    rng, met, reached = generator(seed, "kills"), 0, 0
    for _ in range(kills):
        reached += int(rng.integers(1, 4 * 22 // kills))
        process = training.start(training.distill, root)
        while process.is_alive() and progress(root) < reached:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join(30)
        met += process.exitcode == -signal.SIGKILL
        reached = progress(root)
    return met


def to_the_end(root: Path) -> None:
    process = training.start(training.distill, root)
    process.join(100)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The numbers of a study that nobody disturbed, in a process of its own."""
    root = training.fresh(tmp_path_factory.mktemp("alone") / "project", training.content(methods=FOUR, epochs=EPOCHS))
    to_the_end(root)
    numbers = training.numbers(root)
    assert len(numbers) == 4 * len(training.NUMBERS)
    return numbers


def test_processes_agree(tmp_path: Path, alone: dict[str, bytes]) -> None:
    """A fresh interpreter with another hash salt, and this very process, in folders with other names."""
    params = training.content(methods=FOUR, epochs=EPOCHS)
    here = training.fresh(tmp_path / "in here", params)
    Experiment(here).distill(training.COMPARISON)
    assert training.numbers(here) == alone
    there = training.fresh(tmp_path / "out there", params)
    with command(there, PYTHONHASHSEED="7") as process:
        process.communicate(timeout=100)
    assert process.returncode == 0
    assert training.numbers(there) == alone


@pytest.mark.parametrize(("kills", "seed"), [(5, 0), pytest.param(20, 1, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_alike(tmp_path: Path, alone: dict[str, bytes], kills: int, seed: int) -> None:
    root = training.fresh(tmp_path / "project", training.content(methods=FOUR, epochs=EPOCHS, checkpoint_seconds=0))
    assert killed(root, kills, seed) >= min(kills, 3)
    to_the_end(root)
    assert training.numbers(root) == alone
    assert [one for one in root.rglob("*") if one.suffix in (".pt", ".tmp")] == []


@pytest.mark.parametrize("saves", [6])
def test_killed_between_the_checkpoints_of_two_students(tmp_path: Path, alone: dict[str, bytes], saves: int) -> None:
    root = training.fresh(tmp_path / "project", training.content(methods=FOUR, epochs=EPOCHS, checkpoint_seconds=0))
    process = training.start(training.distill_and_die, root, saves)
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    reached = sorted(max(steps(folder)) for folder in training.store(root).iterdir() if folder.is_dir())
    assert reached == [1, 1, 2, 2]
    to_the_end(root)
    assert training.numbers(root) == alone


def command(root: Path, **env: str) -> subprocess.Popen[str]:
    code = f"from pathlib import Path; from tests.training import distill; distill(Path({str(root)!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", code], cwd=training.ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_ends_promptly_and_goes_on_later(tmp_path: Path, alone: dict[str, bytes], sign: signal.Signals) -> None:
    root = training.fresh(tmp_path / "project", training.content(methods=FOUR, epochs=EPOCHS, checkpoint_seconds=0))
    with command(root) as process:
        while progress(root) < 9 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(sign)
        started = time.monotonic()
        _, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode != 0
    assert "Stopped: " in said
    to_the_end(root)
    assert training.numbers(root) == alone
