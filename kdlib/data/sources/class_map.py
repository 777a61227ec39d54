"""A file that says which classes there are, and in which order: as timm's class maps, one name in a line, or a name and its number."""

from collections.abc import Collection
from pathlib import Path

from kdlib.errors import refuse

SHOWN = 5  # names that a refusal lists


def read_class_map(key: str, file: Path) -> list[str]:
    """Read the names, by number. Raises ``Refused`` about ``key`` for a file that is not of this form."""
    try:
        lines = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(key, f"{file}: {error}", "a text file with one class in each line", "correct the path") from error
    numbered = bool(lines) and all(len(line) == 2 and line[1].isdecimal() for line in lines)
    names = {line[0]: int(line[1]) if numbered else number for number, line in enumerate(lines)}
    numbers = sorted(names.values())
    if numbers != list(range(len(lines))) or not (numbered or all(len(line) == 1 for line in lines)):
        fault = f"{file}, {len(lines)} lines with {len(names)} different names"
        raise refuse(key, fault, "each class once: its name, or its name and its number, from 0", "correct the file")
    return sorted(names, key=names.__getitem__)


def check_classes(key: str, names: Collection[str], present: Collection[str]) -> None:
    """Raise ``Refused`` about ``key`` if the images are not of just these classes."""
    kinds = {"missing": sorted(set(names) - set(present)), "unexpected": sorted(set(present) - set(names))}
    if odd := [f"{len(which)} {kind}: {', '.join(which[:SHOWN])}" for kind, which in kinds.items() if which]:
        do = "correct the file, or set class_map to null for the natural order of the folders"
        raise refuse(key, f"{len(names)} classes for images of {len(set(present))}", f"the classes of the images ({'; '.join(odd)})", do)
