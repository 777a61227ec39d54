"""A decoding process: does one piece of work after another until its parent is gone. ``python -m kdlib.decoding.worker``."""

import os
import pickle
import select
import signal
import socket
import sys
import warnings
from typing import Any

LOOK_SECONDS = 1.0  # between two looks at whether the parent is alive: a copy of its end of the socket may outlive it


def serve(number: int, parent: int) -> None:
    """Do the work that comes over the socket of this file number. SIGINT and SIGTERM are left to the parent: it ends its step first."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata; what cannot be decoded raises
    with socket.socket(fileno=number) as line, line.makefile("rwb") as file:
        while os.getppid() == parent:
            if not select.select([line], [], [], LOOK_SECONDS)[0]:
                continue
            try:
                work, given = pickle.load(file)
                pickle.dump(_attempt(work, given), file, protocol=5)
                file.flush()
            except (EOFError, pickle.UnpicklingError, OSError):  # it is gone
                os._exit(0)  # without another attempt to flush


def _attempt(work: Any, given: Any) -> tuple[bool, Any]:
    """Whether the work could be done, and its result or the error."""
    try:
        return True, work(*given)
    except Exception as error:
        return False, error


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
