"""Images that stay in their files: the byte range of each, and its pixels when they are wanted. 28 bytes per image and its file's name."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from jaxtyping import Bool, Int, UInt8

from kdlib.data.paths import resolve_path
from kdlib.decoding import pixels
from kdlib.decoding.pixels import ByteRange, Changed
from kdlib.decoding.pool import pool
from kdlib.errors import refuse

# Within a file: the first byte, how many, their CRC-32; and the image's sides in pixels.
BYTE_RANGE = np.dtype([("first", "<i8"), ("length", "<i8"), ("crc", "<u4"), ("height", "<i4"), ("width", "<i4")])
CHUNK = 8  # images that a process is asked for at a time
KEPT_SHARE = 0.25  # of the memory that is free: what evaluation has decoded is kept if all of a split takes less

Result = TypeVar("Result")
Rows = Int[np.ndarray, " batch"]
Levels = UInt8[np.ndarray, "batch size size 3"]
Decode = Callable[[Sequence[tuple[ByteRange, Sequence[Any]]]], Levels]  # from images, and what views of each, to these in order
Files = np.ndarray  # names, relative to the data set's path, as bytes: a list of 1.3 million Python strings would take 150 MB


@dataclass(frozen=True)
class Listing:
    """The images that a source lists: by split, the file of each, and its ``BYTE_RANGE`` there."""

    path: str  # as params.yaml has it
    crop_pct: float
    files: dict[str, Files]
    ranges: dict[str, np.ndarray]
    left_out: list[str]  # images that cannot be read, with what is wrong

    @property
    def facts(self) -> dict[str, Any]:
        return {"path": self.path, "crop_pct": self.crop_pct, "left_out": self.left_out}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in (self.files, self.ranges) for part in parts.values())

    def save(self, folder: Path, split: str, update_digest: Callable[[bytes], object]) -> None:
        """Write a split, and digest what distinguishes this data set from another: names and bytes, not where the files lie."""
        files, ranges = self.files[split], self.ranges[split]
        np.save(folder / f"{split}_files.npy", files)
        np.save(folder / f"{split}_places.npy", ranges)
        for part in (files, ranges, np.array(self.crop_pct)):
            update_digest(part.tobytes())


@dataclass(frozen=True, eq=False)
class LazyImages:
    """A split's images by row. ``images[rows]`` are they as evaluation sees them; views are cut out of them by ``ask``.

    Copied or pickled, it is opened again from its folder.
    """

    folder: Path
    split: str
    root: Path  # of the files
    size: int  # of views, in pixels
    crop_pct: float
    files: Files
    ranges: np.ndarray

    def __len__(self) -> int:
        return len(self.ranges)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_split, (self.folder, self.split, {"path": str(self.root), "crop_pct": self.crop_pct}, self.size)

    def sides(self, rows: Rows) -> Int[np.ndarray, "2 batch"]:
        """Height and width of each, in pixels."""
        return np.stack([self.ranges[name][rows] for name in ("height", "width")]).astype(np.int64)

    def byte_range(self, row: int) -> ByteRange:
        """Where the bytes of an image lie."""
        first, length, crc, *_ = self.ranges[row].item()
        return ByteRange(os.path.join(self.root, os.fsdecode(self.files[row])), first, length, crc)  # noqa: PTH118 (a hundred times as fast)

    @property
    def decode(self) -> Decode:
        """Cuts of the images, resized; without one, the image as evaluation sees it."""
        return partial(pixels.decode_views, size=self.size, crop_pct=self.crop_pct)

    def ask(self, decode: Decode, wanted: Iterable[tuple[int, Any, np.ndarray]], result: Result) -> Callable[[], Result]:
        """Have views decoded; ``wanted``: the row of each, which view of it, and the array [size, size, 3] that it goes to.

        The returned function waits until all are there, then gives ``result``. It raises ``Refused``, naming the file, if one is not what
        it was.
        """
        of_row: dict[int, list[tuple[Any, np.ndarray]]] = {}
        for row, view, target in wanted:
            of_row.setdefault(row, []).append((view, target))
        waits, rows = [], list(of_row)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            units = [(self.byte_range(row), [view for view, _ in of_row[row]]) for row in chunk]
            targets = [target for row in chunk for _, target in of_row[row]]
            waits.append(pool().ask(decode, units, then=partial(_copy, targets)))
        return cache(partial(self._wait, waits, result))

    def _wait(self, waits: Sequence[Callable[[], None]], result: Result) -> Result:
        try:
            for wait in waits:
                wait()
        except Changed as error:
            allowed, do = "the images that the data stage has listed", "restore this file, or run the data stage again"
            raise refuse(f"data.{self.folder.name}.path", str(error), allowed, do) from error
        return result

    def read(self, rows: Rows) -> Callable[[], Levels]:
        """Begin to read ``self[rows]``, which the returned function waits for. What was decoded once is kept if there is room for all."""
        if self._kept is None:
            levels = np.empty((len(rows), self.size, self.size, 3), np.uint8)
            return self.ask(self.decode, ((row, None, target) for row, target in zip(rows.tolist(), levels, strict=True)), levels)
        kept, decoded = self._kept
        missing = np.unique(rows[~decoded[rows]])
        wait = self.ask(self.decode, ((row, None, kept[row]) for row in missing.tolist()), kept)

        def ready() -> Levels:
            wait()
            decoded[missing] = True
            return np.asarray(kept[rows])

        return ready

    @cached_property
    def _kept(self) -> tuple[Levels, Bool[np.ndarray, " images"]] | None:
        """Room for all pixels, and which are there; None if that takes too much, beside what other processes of this machine keep."""
        share = KEPT_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shape = (len(self), self.size, self.size, 3)
        return (np.empty(shape, np.uint8), np.zeros(len(self), np.bool_)) if math.prod(shape) <= share else None

    def __getitem__(self, rows: int | np.integer | slice | Rows) -> UInt8[np.ndarray, "*batch size size 3"]:
        if isinstance(rows, int | np.integer):
            return np.asarray(self.read(np.array([rows]))()[0])
        return self.read(np.arange(len(self))[rows])()


def _copy(targets: Sequence[np.ndarray], levels: Levels) -> None:
    for target, view in zip(targets, levels, strict=True):
        target[...] = view


def open_split(folder: Path, split: str, facts: dict[str, Any], size: int) -> LazyImages:
    """Open a split of a data set folder, memory-mapped. Raises ``Refused`` if an environment variable in its path is not set."""
    files, ranges = (np.load(folder / f"{split}_{name}.npy", mmap_mode="r") for name in ("files", "places"))
    if ranges.dtype != BYTE_RANGE or files.dtype.kind != "S" or len(files) != len(ranges):
        raise ValueError(f"{split}_places.npy does not fit {split}_files.npy")
    return LazyImages(folder, split, resolve_path(f"data.{folder.name}.path", facts["path"]), size, facts["crop_pct"], files, ranges)


def iterate_batches(
    images: UInt8[np.ndarray, "images height width channels"] | LazyImages, batches: Iterable[Int[np.ndarray, " _"]]
) -> Iterator[np.ndarray]:
    """Yield ``images[rows]`` of each batch of rows. What has to be decoded is asked for one batch earlier."""
    if not isinstance(images, LazyImages):
        yield from (images[rows] for rows in batches)
        return
    reads: list[Callable[[], np.ndarray]] = []
    for rows in batches:
        reads.append(images.read(rows))
        if len(reads) > 1:
            yield reads.pop(0)()
    yield from (read() for read in reads)
