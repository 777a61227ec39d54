"""Images that stay in their files: where each one lies, and its pixels when they are wanted. 28 bytes per image and its file's name."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import Bool, Int, UInt8

from kdlib.data.paths import place
from kdlib.decoding import pixels
from kdlib.decoding.pixels import ByteRange, Changed
from kdlib.decoding.pool import pool
from kdlib.errors import refuse

# Within a file: the first byte, how many, their CRC-32; and the image's sides in pixels.
BYTE_RANGE = np.dtype([("first", "<i8"), ("length", "<i8"), ("crc", "<u4"), ("height", "<i4"), ("width", "<i4")])
CHUNK = 8  # images that a process is asked for at a time
KEPT_SHARE = 0.25  # of the memory that is free: what evaluation has decoded is kept if all of a split takes less

Rows = Int[np.ndarray, " batch"]
Levels = UInt8[np.ndarray, "batch size size 3"]
Wanted = tuple[Any, np.ndarray]  # a view of an image, as what makes it takes it; and the array [size, size, 3] that it goes to
Files = np.ndarray  # names, relative to the data set's path, as bytes: a list of 1.3 million Python strings would take 150 MB


@dataclass(frozen=True)
class Listing:
    """What a source found: by split, the file of each image, and its ``BYTE_RANGE`` there."""

    path: str  # as params.yaml has it
    crop_pct: float
    files: dict[str, Files]
    places: dict[str, np.ndarray]
    left_out: list[str]  # images that cannot be read, with what is wrong

    @property
    def facts(self) -> dict[str, Any]:
        return {"path": self.path, "crop_pct": self.crop_pct, "left_out": self.left_out}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in (self.files, self.places) for part in parts.values())

    def save(self, folder: Path, split: str, tell: Callable[[bytes], object]) -> None:
        """Write a split, and tell what of it tells this data set from another: names and bytes, not where the files lie."""
        files, places = self.files[split], self.places[split]
        np.save(folder / f"{split}_files.npy", files)
        np.save(folder / f"{split}_places.npy", places)
        for part in (files, places, np.array(self.crop_pct)):
            tell(part.tobytes())


@dataclass(frozen=True, eq=False)
class LazyImages:
    """A split's images by row. ``originals[rows]`` are they as evaluation sees them; views are cut out of them by ``ask``.

    Copied or pickled, it is opened again from its folder.
    """

    folder: Path
    split: str
    root: Path  # of the files
    size: int  # of views, in pixels
    crop_pct: float
    files: Files
    places: np.ndarray

    @property
    def key(self) -> str:
        return f"data.{self.folder.name}.path"

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_split, (self.folder, self.split, {"path": str(self.root), "crop_pct": self.crop_pct}, self.size)

    def sides(self, rows: Rows) -> Int[np.ndarray, "2 batch"]:
        """Height and width of each."""
        return np.stack([self.places[name][rows] for name in ("height", "width")]).astype(np.int64)

    def place(self, row: int) -> ByteRange:
        first, length, crc, *_ = self.places[row].item()
        return ByteRange(os.path.join(self.root, os.fsdecode(self.files[row])), first, length, crc)  # noqa: PTH118 (a hundred times as fast)

    def ask(self, work: Callable[..., Levels], wanted: dict[int, list[Wanted]], *more: Any) -> Callable[[], None]:
        """Have ``work`` make of each row what is wanted of it; the returned function waits until all lie in their homes.

        Raises ``Refused`` then, naming the file, if one is not what it was.
        """
        asked, rows = [], list(wanted)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            units = [(self.place(row), [view for view, _ in wanted[row]]) for row in chunk]
            homes = [home for row in chunk for _, home in wanted[row]]
            asked.append(pool().ask(work, units, *more, then=partial(_deal, homes)))
        return cache(partial(self._wait, asked))

    def _wait(self, asked: Sequence[Callable[[], None]]) -> None:
        try:
            for each in asked:
                each()
        except Changed as error:
            allowed = "the images that the data stage has listed"
            raise refuse(self.key, str(error), allowed, "restore this file, or run the data stage again") from error

    def read(self, rows: Rows) -> Callable[[], Levels]:
        """What returns ``self[rows]`` when it is there. What was decoded once is kept if there is room for all."""
        if self._kept is None:
            made = np.empty((len(rows), self.size, self.size, 3), np.uint8)
            return partial(_after, self._evaluated(rows.tolist(), made), lambda: made)
        kept, there = self._kept
        missing = np.unique(rows[~there[rows]])
        waiting = self._evaluated(missing.tolist(), (kept[row] for row in missing))

        def found() -> Levels:
            there[missing] = True
            return np.asarray(kept[rows])

        return partial(_after, waiting, found)

    def _evaluated(self, rows: list[int], homes: Iterable[np.ndarray]) -> Callable[[], None]:
        wanted: dict[int, list[Wanted]] = {}
        for row, home in zip(rows, homes, strict=True):
            wanted.setdefault(row, []).append((None, home))
        return self.ask(pixels.views, wanted, self.size, self.crop_pct)

    @cached_property
    def _kept(self) -> tuple[Levels, Bool[np.ndarray, " images"]] | None:
        """Room for the pixels of all, and which are there: if it is little, beside what other processes of this machine keep."""
        share = KEPT_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shape = (len(self), self.size, self.size, 3)
        return (np.empty(shape, np.uint8), np.zeros(len(self), np.bool_)) if math.prod(shape) <= share else None

    def __getitem__(self, rows: int | np.integer | slice | Rows) -> UInt8[np.ndarray, "*batch size size 3"]:
        if isinstance(rows, int | np.integer):
            return np.asarray(self.read(np.array([rows]))()[0])
        return self.read(np.arange(len(self))[rows])()


def _deal(homes: Sequence[np.ndarray], made: Levels) -> None:
    for home, view in zip(homes, made, strict=True):
        home[...] = view


def _after(waiting: Callable[[], None], found: Callable[[], Levels]) -> Levels:
    waiting()
    return found()


def open_split(folder: Path, split: str, facts: dict[str, Any], size: int) -> LazyImages:
    """Of a data set folder, memory-mapped. Raises ``Refused`` if an environment variable in its path is not set."""
    files, places = (np.load(folder / f"{split}_{name}.npy", mmap_mode="r") for name in ("files", "places"))
    if places.dtype != BYTE_RANGE or files.dtype.kind != "S" or len(files) != len(places):
        raise ValueError(f"{split}_places.npy does not fit {split}_files.npy")
    return LazyImages(folder, split, place(f"data.{folder.name}.path", facts["path"]), size, facts["crop_pct"], files, places)


def in_turn(
    images: UInt8[np.ndarray, "images height width channels"] | LazyImages, parts: Iterable[Int[np.ndarray, " _"]]
) -> Iterator[np.ndarray]:
    """``images[rows]`` of each part. What has to be decoded is asked for one part earlier."""
    if not isinstance(images, LazyImages):
        yield from (images[rows] for rows in parts)
        return
    asked: list[Callable[[], np.ndarray]] = []
    for rows in parts:
        asked.append(images.read(rows))
        if len(asked) > 1:
            yield asked.pop(0)()
    yield from (each() for each in asked)
