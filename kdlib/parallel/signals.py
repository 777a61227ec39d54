"""What passes between a process and whoever started it: SIGINT and SIGTERM, and whether somebody watches its progress.

While a step is made a signal waits: the step is finished and saved first. A cluster sends SIGTERM before it takes a machine away.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_SECONDS = 5.0  # within which SIGTERM is the same request: Slurm sends it to every process, and parents pass it on besides
_noted: dict[int, float] = {}  # signals that came since the outermost ``held_back`` began, and when each came first
_held = False
_LOG = "KDLIB_LOG"  # in the environment, so that child processes know too


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved what it had. Like Ctrl+C, so that nobody mistakes it for an error."""


def asked_to_stop() -> bool:
    """Whether a signal came within ``held_back``."""
    return bool(_noted)


@contextmanager
def held_back(then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within, a signal does no more than call ``then``; the same one again acts as it would outside, SIGTERM not at once.

    Within another one, and outside of a process's main thread, which alone receives signals, this changes nothing.
    """
    global _held  # noqa: PLW0603 (a process has one set of handlers)
    if _held or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.getsignal(number)) for number in SIGNALS]

    def note(number: int, _: FrameType | None) -> None:
        if number not in _noted:
            _noted[number] = time.monotonic()
            then()
        elif number != signal.SIGTERM or time.monotonic() - _noted[number] > AGAIN_SECONDS:
            signal.signal(number, dict(before)[signal.Signals(number)])
            os.kill(os.getpid(), number)

    _held = True
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        _noted.clear()
        _held = False


def stop_children() -> None:
    """Ask those that train to stop; the processes that only keep count of resources take no notice."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.terminate()


def to_log() -> None:
    """From now on, in this process and its children, progress goes to a log."""
    os.environ[_LOG] = "1"


def watched() -> bool:
    """Whether a person looks at a live bar: in JupyterLab or a terminal."""
    return _LOG not in os.environ and ("ipykernel" in sys.modules or sys.stderr.isatty())
