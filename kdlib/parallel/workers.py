"""Independent pieces of work side by side: each in a process of its own, on cores of its own."""

import atexit
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeVar

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from kdlib.parallel.signals import SIGNALS, Stopped, asked_to_stop, held_back, stop_children, to_log

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], cores: int) -> list[Result]:
    """``work`` of each item, in order; in as many processes as cores allow, which share the cores out in equal numbers of threads.

    Two processes of one thread each do up to twice the work of one with two, where a step is short: its kernels are too small to split.
    Nor do they wait for each other on busy cores. With one core, or one item, the work is done in this process.

    The first exception ends all work and is raised here; the end of this process ends it too. SIGINT and SIGTERM are passed on: ``Stopped``
    is raised when all have saved. Raises RuntimeError when a process was ended from outside.
    """
    processes = min(cores, len(items))
    if processes < 2:
        return [work(item) for item in items]
    start = functools.partial(_start, os.getpid(), processes)
    with held_back(stop_children):
        try:
            # dispatched one by one, so that none is begun after a signal
            with parallel_config("loky", n_jobs=processes, inner_max_num_threads=cores // processes, initializer=start):
                begun = takewhile(lambda _: not asked_to_stop(), items)
                done = list(Parallel(pre_dispatch="n_jobs")(delayed(_do)(work, item) for item in begun))
        except TerminatedWorkerError as error:
            if asked_to_stop():  # one that has not begun to train ends at once
                raise Stopped("stopped; the same command goes on from the last step") from error
            raise RuntimeError(
                f"one of {processes} processes that trained side by side was ended from outside, most often for lack of memory. What they "
                "had saved is kept: run the same again, with OMP_NUM_THREADS set to a smaller number for fewer processes"
            ) from error
        if asked_to_stop():
            raise next((result for result in done if isinstance(result, Stopped)), Stopped("stopped between two runs"))
    return done


def _do(work: Callable[[Item], Result], item: Item) -> Result | Stopped:
    """In a process of its own: an exception would end the others at once, this lets them save what they have."""
    try:
        with held_back():
            return work(item)
    except Stopped as stopped:
        return stopped


def _start(parent: int, processes: int) -> None:
    """What a process does first: watch its parent, which may be killed without a chance to end it."""
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # as torchrun does: what decodes images for it takes its share of the cores
    to_log()  # bars of several processes would write over each other
    for number in SIGNALS:  # between two pieces of work there is nothing to save
        signal.signal(number, signal.SIG_IGN)
    atexit.register(os._exit, 0)  # all has been handed over; taking torch apart would cost 2 s
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)  # at once: files are whole at any moment, and locks end with their process
