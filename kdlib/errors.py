"""Refusals: errors of one line for the person who wrote params.yaml."""

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

FILE = "params.yaml"


LONGEST = 200  # characters of what was found that a message repeats


class Refused(ValueError):
    """The study must not start, or go on, like this. The message is one line for the person who wrote params.yaml."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows (IPython asks for it): the message names the cause, 60 lines of our own code would bury it."""
        return [f"Refused: {self}"]


def refuse(key: str, found: object, allowed: str, do: str) -> Refused:
    """Error of one line: the key in params.yaml, what was found, what is allowed, what to do."""
    shown = "nothing" if found is None else repr(found)
    if len(shown) > LONGEST:
        shown = shown[:LONGEST] + "..."
    return Refused(" ".join(f"{FILE}: {key}: found {shown}; allowed: {allowed}; {do}".split()))


def known(key: str, found: str, names: Iterable[str]) -> str:
    """``found``, if it is one of ``names``; otherwise raise ``Refused`` with the closest one."""
    names = sorted(names)
    if found in names:
        return found
    raise refuse(key, found, ", ".join(names[:20]) or "nothing is defined", closest(found, names))


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of many names for a message of one line, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def closest(found: object, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, list(names), n=1, cutoff=0.4) if isinstance(found, str) else []
    return f"did you mean {close[0]!r}?" if close else "choose one of them"


@contextmanager
def refuse_full_disk() -> Iterator[None]:
    """Also a decorator: a full disk, wherever it shows, becomes one line. What was written before is whole (see ``write_bytes``)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        what = "free some (`make gc` shows how) and run the same command again: it goes on from the last checkpoint"
        raise Refused(f"disk: found no room left{where}; allowed: enough for runs/ and the run store; {what}") from error
