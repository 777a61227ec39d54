"""Files that are whole or not there at all, and how large and which they are."""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name beside ``path``, flush it to the disk, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8, with the line ends as they are in ``text``; atomic."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Keys in the order given; atomic. Raises ValueError for NaN and infinity, which JSON does not know."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that ``write_json`` wrote."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Atomic, and the same bytes for the same numbers."""
    write_text(path, to_csv(frame))


def to_csv(frame: pd.DataFrame) -> str:
    """Floats with six decimals, blanks where a value is absent, ``\\n`` at line ends."""
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.6f", na_rep="")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; a file that vanishes meanwhile counts nothing."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def sha256(path: Path) -> str:
    """SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
