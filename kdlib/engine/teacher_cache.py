"""A teacher's outputs for the views of a stream, kept on disk: whoever trains on the same views again needs no teacher's pass."""

import functools
import os
import secrets
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib.engine.teacher import Teacher
from kdlib.types import Asks, Feature, Images, Output
from kdlib.views.crop import to_device

KEPT = (Feature.LOGITS, Feature.EMBEDDING)  # maps are a hundred times larger than the images themselves
LARGEST = torch.finfo(torch.float16).max


class DifferentAnswers(RuntimeError):
    """The outputs on disk are not those of this teacher."""


def rounded(output: Output) -> Output:
    """The output rounded to half precision; beyond its range, to the end of it. Maps, which are never kept, stay as they are."""
    return Output(_round(output.logits), None if output.embedding is None else _round(output.embedding), output.maps, output.preactivations)


def _round(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST, LARGEST).half().to(torch.promote_types(values.dtype, torch.float32))


@dataclass
class TeacherCache:
    """Asks a teacher, or the files below ``folder`` if they hold its answer; both say the same, to the bit, since both are rounded.

    One file for each part and ``per_file`` mix groups: a checksum and values in half precision for each group. What is there and right is
    read, what is missing, cut off or damaged is asked again and written. Of every file, each time that it is read, two groups are asked
    for all the same and compared. On a full or read-only disk it goes on without writing. Written and compared is one group later, so that
    no step waits for a GPU: ``finish`` sees to the last one.

    Raises ``DifferentAnswers`` when one differs by more than ``tolerance`` (0 on a CPU; the order of additions on a GPU varies).
    """

    teacher: Teacher
    folder: Path | None  # named after all that the answers depend on; None keeps nothing
    group_size: int
    per_file: int  # groups
    tolerance: float = 0.0
    passes: int = 0  # of the teacher, over one group each, so far
    _waiting: tuple[Any, Callable[[], None]] | None = field(default=None, init=False, repr=False)
    _files: dict[tuple[Feature, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _sampled: dict[int, set[int]] = field(default_factory=dict, init=False, repr=False)  # of each file

    def __call__(self, group: int, images: Images, asks: Asks) -> Output:
        """The output for the views of the stream's ``group``, counted from 0 over all steps."""
        kept = self._read(group, {Feature.LOGITS, *asks} & set(KEPT)) if self.folder else None
        is_sample = bool(kept) and self._is_sample(group)
        if kept and asks <= set(KEPT) and not is_sample:
            return _to_output({part: to_device(values, images.device) for part, values in kept.items()})
        output = self.of_teacher(images, asks)
        if kept and is_sample:
            self._when_there(output, functools.partial(self._compare, group, kept))
        elif self.folder and not kept:
            self._when_there(output, functools.partial(self._write, group))
        return output

    def finish(self) -> None:
        """Write, or compare, the last output."""
        if self._waiting:
            (event, work), self._waiting = self._waiting, None
            event.synchronize()
            work()

    def of_teacher(self, images: Images, asks: Asks) -> Output:
        """The teacher's output, rounded as it is kept; no file is looked at."""
        self.passes += 1
        return rounded(self.teacher(images, asks))

    def bytes(self, groups: int, asks: Asks) -> int:
        """Bytes on the disk of the outputs for so many groups."""
        return groups * sum(_block(self.group_size, self._width(part)).itemsize for part in KEPT if part in {Feature.LOGITS, *asks})

    def _width(self, part: Feature) -> int:
        return self.teacher.shape.classes if part is Feature.LOGITS else self.teacher.shape.embedding

    def _is_sample(self, group: int) -> bool:
        """The first group of each file that is asked for, and one drawn anew by each process: an edit that escapes one meets another."""
        number, position = divmod(group, self.per_file)
        return position in self._sampled.setdefault(number, {position, position + secrets.randbelow(self.per_file - position)})

    def _path(self, part: Feature, number: int) -> Path:
        return Path(self.folder or "") / f"{part}-{number:05d}.bin"

    def _when_there(self, output: Output, then: Callable[[dict[Feature, Tensor]], None]) -> None:
        """Call ``then`` with what is kept of an output, on the host, when the next is asked for: by then it has long been copied."""
        self.finish()
        parts = {part: getattr(output, part.value) for part in KEPT}
        on_host = {part: values.half().to("cpu", non_blocking=True) for part, values in parts.items() if values is not None}
        event = torch.get_device_module(output.logits.device).Event()
        event.record()
        self._waiting = event, functools.partial(then, on_host)

    def _read(self, group: int, parts: set[Feature]) -> dict[Feature, np.ndarray] | None:
        number, position = divmod(group, self.per_file)
        kept = {}
        for part in sorted(parts):
            blocks = self._map(part, number)
            if position >= len(blocks) or not blocks[position]["sum"]:  # not written yet
                return None
            values = np.array(blocks[position]["values"])
            if blocks[position]["sum"] != _sum(values):
                print(f"{self._path(part, number)}: group {group} is damaged: asking the teacher again", file=sys.stderr, flush=True)
                return None
            kept[part] = values
        return kept

    def _map(self, part: Feature, number: int) -> np.ndarray:
        """The whole blocks of a file; none of a file that is not there."""
        kept = self._files.get((part, number))
        block, path = _block(self.group_size, self._width(part)), self._path(part, number)
        size = path.stat().st_size // block.itemsize if path.is_file() else 0
        if kept is None or len(kept) != size:
            self._files = {key: file for key, file in self._files.items() if key[1] == number}  # of one epoch at a time
            kept = self._files[part, number] = np.memmap(path, block, "r", shape=(size,)) if size else np.empty(0, block)
        return kept

    def _compare(self, group: int, kept: dict[Feature, np.ndarray], live: dict[Feature, Tensor]) -> None:
        for part, values in kept.items():
            gap = float((live[part].float() - torch.from_numpy(values).float()).abs().nan_to_num(torch.inf).max())
            if gap > self.tolerance:
                raise DifferentAnswers(
                    f"{self._path(part, group // self.per_file)}: found answers to group {group} that differ from the teacher's by "
                    f"{gap:g}; allowed: {self.tolerance:g}; delete {self.folder} and run the same again"
                )

    def _write(self, group: int, live: dict[Feature, Tensor]) -> None:
        if not self.folder:  # the write before this one failed
            return
        number, position = divmod(group, self.per_file)
        for part, values in live.items():
            block = np.zeros(1, _block(self.group_size, self._width(part)))
            block["values"], block["sum"] = values.numpy(), _sum(values.numpy())
            path = self._path(part, number)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                    file.seek(position * block.itemsize)
                    file.write(block.tobytes())
            except OSError as error:
                print(f"{path}: {error.strerror}: going on without keeping the teacher's answers", file=sys.stderr, flush=True)
                self.folder = None
                return


def _block(group_size: int, width: int) -> np.dtype:
    return np.dtype([("sum", np.uint64), ("values", np.float16, (group_size, width))])


def _sum(values: np.ndarray) -> int:
    """A checksum that is never 0, which stands for what was not written."""
    return zlib.crc32(values.tobytes()) + 1


def _to_output(parts: dict[Feature, Tensor]) -> Output:
    embedding = parts.get(Feature.EMBEDDING)
    return Output(parts[Feature.LOGITS].float(), None if embedding is None else embedding.float())
