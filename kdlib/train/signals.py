"""SIGINT and SIGTERM while a step is made: it is finished and saved first. A cluster sends SIGTERM before it takes a machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_noted: list[int] = []  # signals that came since the outermost ``held_back`` began
_held = False


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved what it had. Like Ctrl+C, so that nobody mistakes it for an error."""


def asked_to_stop() -> bool:
    """Whether a signal came within ``held_back``."""
    return bool(_noted)


@contextmanager
def held_back(then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within, a signal does no more than call ``then``; the same one again acts as it would outside.

    Within another one, and outside of a process's main thread, which alone receives signals, this changes nothing.
    """
    global _held  # noqa: PLW0603 (a process has one set of handlers)
    if _held or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.getsignal(number)) for number in SIGNALS]

    def note(number: int, _: FrameType | None) -> None:
        _noted.append(number)
        signal.signal(number, dict(before)[signal.Signals(number)])
        then()

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
