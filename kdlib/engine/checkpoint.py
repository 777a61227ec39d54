"""Checkpoints that are whole or not there: written by rename, with their own digest, the two newest kept."""

import hashlib
import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kdlib.errors import Refused
from kdlib.files import write_bytes
from kdlib.parallel.ranks import rank

FORMAT = 1  # the next number when an earlier kdlib would go on wrongly from what this one writes
_PATTERN = "checkpoint-*.pt"
_DIGEST = hashlib.sha256().digest_size


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after ``step`` steps, then delete all but the two newest. On a full disk the earlier ones stay whole."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, "run": folder.name, "state": state}, content)
    write_bytes(folder / f"checkpoint-{step:010d}.pt", hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    for old in sorted(folder.glob(_PATTERN))[:-2]:
        old.unlink()


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest state whose digest is right, on the CPU; a truncated or damaged file is named, and deleted by the first of the processes
    that train together, as is what a killed process half wrote.

    Raises ``Refused`` for one that is whole but of a newer kdlib, or of another run than the folder is named after: nothing is deleted.
    """
    if rank() == 0:
        for stale in folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        with suppress(FileNotFoundError):  # damaged, and the first process was here before
            content = path.read_bytes()
            if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
                return _state(path, content[_DIGEST:])
            if rank() == 0:
                print(f"{path.name} in {folder.name} is damaged: going on from the one before it", file=sys.stderr, flush=True)
                path.unlink()
    return None


def _state(path: Path, content: bytes) -> dict[str, Any]:
    # weights_only: a checkpoint is data, unpickling arbitrary objects would make it code
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if saved["format"] > FORMAT:
        raise Refused(
            f"{path}: found a checkpoint in format {saved['format']}, of a newer kdlib; allowed: up to format {FORMAT}; "
            "update kdlib, or delete the file to train on from the one before it"
        )
    run = path.parent.name
    if saved["run"] != run:
        raise Refused(f"{path}: found a checkpoint of run {saved['run']}; allowed: those of run {run}; move it back")
    state: dict[str, Any] = saved["state"]
    return state


def clear(folder: Path) -> None:
    """Delete every checkpoint of a finished run."""
    for path in folder.glob(_PATTERN):
        path.unlink(missing_ok=True)
