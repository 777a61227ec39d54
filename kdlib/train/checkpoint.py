"""Checkpoints that are whole or not there: written by rename, with their own digest, the two newest kept."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from kdlib.results import write_bytes

_PATTERN = "checkpoint-*.pt"
_DIGEST = hashlib.sha256().digest_size


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state after ``step`` steps, then delete all but the two newest. On a full disk the earlier ones stay whole."""
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(folder / f"checkpoint-{step:010d}.pt", hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    for old in sorted(folder.glob(_PATTERN))[:-2]:
        old.unlink()


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest state whose digest is right; a truncated or damaged file is named and deleted, as is what a killed process half wrote."""
    for stale in folder.glob(".*.tmp"):
        stale.unlink()
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        content = path.read_bytes()
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            # weights_only: a checkpoint is data, unpickling arbitrary objects would make it code
            state: dict[str, Any] = torch.load(io.BytesIO(content[_DIGEST:]), weights_only=True)
            return state
        print(f"{path.name} in {folder.name} is damaged: going on from the one before it", file=sys.stderr, flush=True)
        path.unlink()
    return None


def clear(folder: Path) -> None:
    """Delete every checkpoint of a finished run."""
    for path in folder.glob(_PATTERN):
        path.unlink()
