"""The run store: one process at a time trains a run, a finished one is never trained again, deleting everything loses nothing."""

import shutil
import time
import warnings
from pathlib import Path

import pytest

from kdlib.study.training import experiment
from kdlib.study.training.experiment import Experiment
from kdlib.study.training.store import FILES, METRICS, Store, beside_dvc_cache
from tests import training

RUN = "0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a store")


def finish(store: Store, fingerprint: str = RUN) -> None:
    for name in FILES:
        (store.run(fingerprint) / name).write_text(f"{fingerprint} {name}")


def test_a_run_is_finished_when_every_file_is_there(store: Store) -> None:
    assert not store.finished(RUN)
    for name in FILES:
        finish(store)
        assert store.finished(RUN)
        (store.run(RUN) / name).unlink()
        assert not store.finished(RUN)


def test_sizes_and_removal(store: Store) -> None:
    assert store.sizes() == {}
    finish(store)
    finish(store, "other")
    assert store.sizes() == {name: sum(len(f"{name} {file}") for file in FILES) for name in (RUN, "other")}
    assert store.remove(RUN)
    assert list(store.sizes()) == ["other"]
    assert not store.finished(RUN)


def test_export_writes_metrics_last_and_every_file_whole(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever copy fails, metrics.json is not there and nothing that is there is half a file."""
    finish(store)
    store.export(RUN, tmp_path / "whole")
    assert {path.name: path.read_text() for path in (tmp_path / "whole").iterdir()} == {name: f"{RUN} {name}" for name in FILES}
    copy = shutil.copyfile
    for failing in range(len(FILES)):
        copied: list[Path] = []

        def copy_some(source: Path, target: Path, failing: int = failing, copied: list[Path] = copied) -> None:
            copy(source, target)
            copied.append(source)
            if len(copied) > failing:
                target.write_text("hal")
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", copy_some)
        folder = tmp_path / str(failing)
        with pytest.raises(OSError, match="No space left"):
            store.export(RUN, folder)
        assert METRICS not in [path.name for path in folder.iterdir()]
        assert all(path.read_text() == f"{RUN} {path.name}" for path in folder.iterdir())
        assert len(list(folder.iterdir())) == failing


def test_a_held_run_is_neither_removed_nor_given_twice(store: Store, tmp_path: Path) -> None:
    finish(store)
    ready, release = training.children().Event(), training.children().Event()
    holder = training.start(training.hold, store.folder, [RUN, "other"], ready, release)
    assert ready.wait(30)
    assert not store.remove(RUN)
    assert store.finished(RUN)
    log = tmp_path / "waiter.txt"  # not its standard error: the server that forks it may have another test's
    waiter = training.start(training.claim_and_use, store.folder, RUN, log)
    given_up = time.monotonic() + 30
    while not (log.is_file() and "waiting" in log.read_text()) and time.monotonic() < given_up:
        waiter.join(0.1)
    assert f"run {RUN} is being trained by another process: waiting for it" in log.read_text()
    assert waiter.is_alive()
    assert not (store.run(RUN) / "used").exists()
    shutil.rmtree(store.run(RUN))  # as `make gc` may, between the holder's end and the waiter's start
    release.set()
    for process in (holder, waiter):
        process.join(30)
        assert process.exitcode == 0
    assert (store.run(RUN) / "used").exists()
    assert store.remove(RUN)


def test_a_killed_process_holds_nothing(store: Store) -> None:
    ready, release = training.children().Event(), training.children().Event()
    holder = training.start(training.hold, store.folder, [RUN], ready, release)
    assert ready.wait(30)
    holder.kill()
    holder.join(30)
    assert store.remove(RUN)
    with store.claim([RUN, RUN]):  # and one name twice is one run
        pass


def test_two_studies_at_once_train_each_run_once(tmp_path: Path) -> None:
    """In two folders that share a cache, as `dvc exp run --queue` does: one trains while the other waits; both end alike."""
    params = training.content(epochs=2.0)
    shared = tmp_path / "shared" / "cache"
    roots = [training.fresh(tmp_path / name, params) for name in ("one", "other")]
    for root in roots:
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {shared}\n")
    logs = [root / "log" for root in roots]
    processes = [training.start(training.distill, root, log) for root, log in zip(roots, logs, strict=True)]
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    assert sorted("step 12/12" in log.read_text() for log in logs) == [False, True]
    n = len(training.MIXABLE)
    assert sorted(f"{n} of {n} runs are finished already" in log.read_text() for log in logs) == [False, True]
    assert len(Store(tmp_path / "shared" / "kdlib-runs").sizes()) == n
    assert training.numbers(roots[0]) == training.numbers(roots[1])
    alone = training.fresh(tmp_path / "alone", params)
    Experiment(alone).distill(training.COMPARISON)
    assert training.numbers(alone) == training.numbers(roots[0])


def test_a_finished_run_is_reused_and_a_deleted_store_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = training.fresh(tmp_path / "project", training.content(methods=["no_kd", "kd"]))
    Experiment(root).distill(training.COMPARISON)
    first = training.numbers(root)
    assert len(first) == 2 * len(training.NUMBERS)
    shutil.rmtree(root / "runs" / "distill")
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "train", lambda *_, **__: pytest.fail("trained again"))
        Experiment(root).distill(training.COMPARISON)
    assert training.numbers(root) == first
    shutil.rmtree(root / "runs" / "distill")
    shutil.rmtree(training.store(root))
    Experiment(root).distill(training.COMPARISON)
    assert training.numbers(root) == first


# Where it lies


@pytest.mark.parametrize(
    ("shared", "local", "cache"),
    [
        (None, None, "project/.dvc/cache"),
        ("/somewhere/cache", None, "/somewhere/cache"),
        ("../../beside/cache", None, "beside/cache"),
        ("../../beside/cache", "/somewhere else/cache", "/somewhere else/cache"),
        (None, "sub/cache", "project/.dvc/sub/cache"),
        ("~/cache", None, "home/cache"),
    ],
)
def test_beside_the_cache_wherever_dvc_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str | None, local: str | None, cache: str
) -> None:
    """Told by DVC itself, from files that DVC wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dvc.config import Config  # noqa: PLC0415
        from dvc.repo import Repo  # noqa: PLC0415

        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        root = tmp_path / "project"
        root.mkdir()
        Repo.init(str(root), no_scm=True).close()
        for level, value in (("repo", shared), ("local", local)):
            if value is not None:
                monkeypatch.chdir(root / ".dvc")  # a relative path counts from here, when set and in the file that DVC writes
                with Config(str(root / ".dvc")).edit(level) as edited:
                    edited["cache"] = {"dir": value}
                    edited["core"] = {"analytics": False, "no_scm": True}
        says = Repo(str(root)).cache.local.path
    assert says == str(tmp_path / cache / "files" / "md5")
    assert beside_dvc_cache(root) == (tmp_path / cache).parent / "kdlib-runs"
    assert beside_dvc_cache(root / "notebooks") == beside_dvc_cache(root)


def test_without_dvc_below_the_project(tmp_path: Path) -> None:
    assert beside_dvc_cache(tmp_path) == tmp_path / ".dvc" / "kdlib-runs"
