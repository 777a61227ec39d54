"""The commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kdlib.errors import Refused


@contextmanager
def refusals_in_one_line(without: str = "") -> Iterator[None]:
    """End the process with what was refused as its last line, less the prefix ``without``; or, when interrupted, as shells expect it."""
    try:
        yield
    except Refused as error:
        sys.exit(str(error).removeprefix(without))
    except KeyboardInterrupt:
        sys.exit(130)
