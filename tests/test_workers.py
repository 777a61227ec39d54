"""Seeds side by side, in processes of their own: the numbers of one after the other, and no process left behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from kdlib.engine.backend import threads
from kdlib.errors import Refused
from kdlib.files import read_json
from kdlib.parallel.signals import watched
from kdlib.parallel.workers import side_by_side
from kdlib.study.training.experiment import Diverged, Experiment
from tests import training

METHODS = ("no_kd", "kd")


TWO_CORES = pytest.mark.usefixtures("two_cores")


@pytest.fixture
def two_cores() -> Iterator[None]:
    with threads(2):
        yield


def about_itself(item: int) -> tuple[int, int, int, bool]:
    time.sleep(0.2)  # else one process may do all
    return item, os.getpid(), torch.get_num_threads(), watched()


def test_each_has_its_share_of_the_cores() -> None:
    found = side_by_side(about_itself, range(2), 5)
    assert [item for item, *_ in found] == [0, 1]
    assert len({process for _, process, *_ in found} - {os.getpid()}) == 2
    assert {share for _, _, share, _ in found} == {2}
    assert not any(watched for *_, watched in found)


@pytest.mark.parametrize(("items", "cores"), [(1, 4), (3, 1), (0, 2)])
def test_one_item_or_one_core_needs_no_process(items: int, cores: int) -> None:
    found = side_by_side(about_itself, range(items), cores)
    assert [(item, process, share) for item, process, share, _ in found] == [
        (i, os.getpid(), torch.get_num_threads()) for i in range(items)
    ]


def test_threads_are_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


def refuse_or_work_on(item: int) -> None:
    if item == 0:
        time.sleep(0.5)
        raise Refused("params.yaml: found this; allowed: that")
    time.sleep(600)


def test_an_error_ends_all_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(Refused, match=r"^params.yaml: found this; allowed: that$"):
        side_by_side(refuse_or_work_on, range(2), 2)
    assert time.monotonic() - started < 60


def die_or_work_on(item: int) -> None:
    if item == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    time.sleep(600)


def test_a_process_that_the_system_ends_is_told_with_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"lack of memory.*OMP_NUM_THREADS"):
        side_by_side(die_or_work_on, range(2), 2)


def study(folder: Path, seeds: tuple[int, ...] = (0, 1), checkpoint_seconds: float = 20, **more: object) -> Path:
    content = training.content(methods=METHODS, epochs=4.0, seeds=seeds, checkpoint_seconds=checkpoint_seconds, **more)
    content["comparisons"][training.COMPARISON]["sweep"] = {"seed": 7, "grids": {"kd": {"temperature": [1, 2]}}}
    return training.fresh(folder, content)


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sweep and two seeds on one core."""
    root = study(tmp_path_factory.mktemp("in turn"))
    Experiment(root).distill(training.COMPARISON)
    return training.numbers(root)


@TWO_CORES
def test_side_by_side_gives_the_numbers_of_one_after_the_other(
    tmp_path: Path, in_turn: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = study(tmp_path)
    folders = Experiment(root).distill(training.COMPARISON)
    assert training.numbers(root) == in_turn
    assert {read_json(folder / "environment.json")["threads"] for folder in folders} == {1}
    monkeypatch.setattr("kdlib.parallel.workers.Parallel", None)  # what is finished needs no process
    assert Experiment(root).distill(training.COMPARISON) == folders


@TWO_CORES
def test_a_method_that_is_tried_has_the_threads_of_its_comparison(tmp_path: Path) -> None:
    found = Experiment(study(tmp_path / "two seeds")).try_method(training.COMPARISON, "kd", 0, weight=2.0)
    assert read_json(found / "environment.json")["threads"] == 1
    one_run = training.content(methods=["kd"], seeds=(0,))
    alone = Experiment(training.fresh(tmp_path / "one run", one_run)).try_method(training.COMPARISON, "kd", 0, weight=2.0)
    assert read_json(alone / "environment.json")["threads"] == 2


@TWO_CORES
def test_divergence_that_is_refused_comes_through(tmp_path: Path) -> None:
    content = training.content(methods=["kd"], seeds=(0, 1), on_divergence="fail")
    content["recipes"]["strong"]["learning_rate"] = 1e18
    with pytest.raises(Diverged, match=r"seed \d: kd diverged at step .*on_divergence: continue"):
        Experiment(training.fresh(tmp_path, content)).distill(training.COMPARISON)


def distill_on_two_cores(root: Path) -> None:
    torch.set_num_threads(2)
    Experiment(root).distill(training.COMPARISON)


def test_killed_it_leaves_no_process_behind_and_ends_alike(tmp_path: Path, in_turn: dict[str, bytes]) -> None:
    root = study(tmp_path, checkpoint_seconds=0)
    parent = training.children().Process(target=distill_on_two_cores, args=(root,))
    parent.start()
    while not list(training.store(root).rglob("checkpoint-*.pt")):
        assert parent.is_alive()
        time.sleep(0.005)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.join(30)
    assert parent.exitcode == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    Experiment(root).distill(training.COMPARISON)
    assert training.numbers(root) == in_turn
