"""Independent pieces of work side by side: each in a process of its own, on cores of its own."""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from kdlib.train import progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], cores: int) -> list[Result]:
    """``work`` of each item, in order; in as many processes as cores allow, which share the cores out in equal numbers of threads.

    Two processes of one thread each do up to twice the work of one with two, where a step is short: its kernels are too small to split.
    Nor do they wait for each other on busy cores. With one core, or one item, the work is done in this process.

    The first exception ends all work and is raised here; the end of this process ends it too. Raises RuntimeError when a process was ended
    from outside.
    """
    processes = min(cores, len(items))
    if processes < 2:
        return [work(item) for item in items]
    watch = functools.partial(_start, os.getpid())
    try:
        with parallel_config("loky", n_jobs=processes, inner_max_num_threads=threads_each(len(items), cores), initializer=watch):
            return list(Parallel()(delayed(work)(item) for item in items))
    except TerminatedWorkerError as error:
        raise RuntimeError(
            f"one of {processes} processes that trained side by side was ended from outside, most often for lack of memory. What they had "
            "saved is kept: run the same again, with OMP_NUM_THREADS set to a smaller number for fewer processes"
        ) from error


def threads_each(items: int, cores: int) -> int:
    """Of torch's, for each of the processes in which ``side_by_side`` works on so many items."""
    return cores // max(1, min(cores, items))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many of torch's threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(parent: int) -> None:
    """What a process does first: watch its parent, which may be killed without a chance to end it."""
    progress.to_log()  # bars of several processes would write over each other
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)  # at once: files are whole at any moment, and locks end with their process
