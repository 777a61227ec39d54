"""Where a training loop says how far it is: on a bar for somebody who watches, in lines of a log for everybody else."""

import os
import sys

_LOG = "KDLIB_LOG"  # in the environment, so that child processes know too


def to_log() -> None:
    """From now on, in this process and its children, progress goes to a log."""
    os.environ[_LOG] = "1"


def watched() -> bool:
    """Whether a person looks at a live bar: in JupyterLab or a terminal."""
    return _LOG not in os.environ and ("ipykernel" in sys.modules or sys.stderr.isatty())
