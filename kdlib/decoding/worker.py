"""A process that does what it is asked, one thing after another, until whoever asks is gone: ``python -m kdlib.decoding.worker``."""

import os
import pickle
import select
import signal
import socket
import sys
import warnings
from typing import Any

LOOK_SECONDS = 1.0  # between two looks at whether the parent is alive: a copy of its end of the socket may outlive it


def main(number: int, parent: int) -> None:
    """Work asked for over the socket with this file number. SIGINT and SIGTERM are the parent's business: it ends its step first."""
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata; what cannot be decoded raises
    with socket.socket(fileno=number) as line, line.makefile("rwb") as file:
        while os.getppid() == parent:
            if not select.select([line], [], [], LOOK_SECONDS)[0]:
                continue
            try:
                work, given = pickle.load(file)
                pickle.dump(_done(work, given), file, protocol=5)
                file.flush()
            except (EOFError, pickle.UnpicklingError, OSError):  # it is gone
                os._exit(0)  # without another attempt to flush


def _done(work: Any, given: Any) -> tuple[bool, Any]:
    """Whether it could be done, and the result or the error."""
    try:
        return True, work(*given)
    except Exception as error:
        return False, error


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
