"""What every refusal of params.yaml must look like, and that nothing is left behind by one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kdlib.errors import Refused

FORM = re.compile(r"(params\.yaml: )?(?P<key>.+?): found (?P<found>.+?); allowed: (?P<allowed>.+); (?P<do>.+)")


@contextmanager
def refused(key: str, *parts: str) -> Iterator[list[str]]:
    """Expect ``Refused`` in one line about ``key``, with what was found, what is allowed, what to do, and all ``parts`` in it.

    Yields a list that holds the line afterwards.
    """
    lines: list[str] = []
    with pytest.raises(Refused) as caught:
        yield lines
    line = str(caught.value)
    lines.append(line)
    assert len(line.splitlines()) == 1
    form = FORM.fullmatch(line)
    assert form, line
    assert form["key"] == key, line
    for part in parts:
        assert part in line, line


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Expect that no file or folder below is added, changed or deleted; lock files may come, they stay for ever."""
    before = _tree(folder)
    yield
    assert _tree(folder) == before


def change(content: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``content`` with another value at a dotted key."""
    *path, last = key.split(".")
    place: Any = content
    for step in path:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    return content


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.suffix != ".lock"
    }
