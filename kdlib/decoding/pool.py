"""The processes that decode for this one: as many as it has cores to spare, started on first use."""

import atexit
import functools
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")
END_SECONDS = 5.0  # for a process to end what it is doing


def spare(processes: int | None = None) -> int:
    """Cores of a process beside its own, if ``processes`` that train on this machine (None: LOCAL_WORLD_SIZE) share them out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // (processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) - 1


def pool() -> "Pool":
    """This process's decoding pool; created on first use, kept until exit."""
    return _pool(os.getpid())


@functools.cache
def _pool(_process: int) -> "Pool":  # one that was forked needs its own
    created = Pool(spare())
    atexit.register(created.close)
    return created


class Pool:
    """Gives work to whichever process is free; without any, the caller does it when it wants the result.

    Interpreters of their own rather than ``multiprocessing``: that would import the main script again, cannot fork beside torch's threads,
    and its clean-up waits for processes of launchers. They talk over sockets rather than shared memory: containers often have 64 MB of it,
    and what a killed process leaves there stays. They end with this process, however it ends.
    """

    def __init__(self, workers: int) -> None:
        self._asked: queue.SimpleQueue[tuple[Future[Any], Any, Callable[[Any], Any]]] = queue.SimpleQueue()
        self._workers = [_start() for _ in range(workers)]
        for process, line in self._workers:
            # one thread each, which does nothing but wait; a daemon: this process does not end later for its sake
            threading.Thread(target=self._serve, args=(process, line), daemon=True).start()

    def __len__(self) -> int:
        return len(self._workers)

    def ask(self, work: Callable[..., Result], *given: Any, then: Callable[[Result], Any] = lambda result: result) -> Callable[[], Any]:
        """Have work done; the returned function waits for ``then(work(*given))``, or raises its exception.

        ``work``, its arguments and its result are pickled; ``then`` is called here, by the thread that waits. Raises RuntimeError when a
        process was ended from outside.
        """
        if not self._workers:
            return functools.cache(lambda: then(work(*given)))
        future: Future[Any] = Future()
        self._asked.put((future, (work, given), then))
        return future.result

    def close(self) -> None:
        """End all processes; unfinished work is lost."""
        for _, line in self._workers:
            with suppress(OSError):  # closed already
                line.shutdown(socket.SHUT_RDWR)
        for process, line in self._workers:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            line.close()

    def _serve(self, process: "subprocess.Popen[bytes]", line: socket.socket) -> None:
        file = line.makefile("rwb")
        while True:
            future, asked, then = self._asked.get()
            try:
                pickle.dump(asked, file, protocol=5)
                file.flush()
                done, result = pickle.load(file)
                future.set_result(then(result)) if done else future.set_exception(result)
            except (EOFError, OSError):
                error = RuntimeError(f"process {process.pid}, which decodes images, was ended from outside: lack of memory?")
                future.set_exception(error)


def _start() -> tuple["subprocess.Popen[bytes]", socket.socket]:
    here, there = socket.socketpair()
    with there:
        command = [sys.executable, "-m", "kdlib.decoding.worker", str(there.fileno()), str(os.getpid())]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        return subprocess.Popen(command, pass_fds=[there.fileno()], env=os.environ | threads | {"PYTHONPATH": paths}), here
