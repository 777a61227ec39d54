"""From the bytes of an image file to the pixels of a view: what a process that decodes is asked to do."""

import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# A JPEG is decoded at half, a quarter or an eighth of its sides where every box still has so many times the pixels of a view on each side;
# Pillow's own thumbnails are made so, and what follows (antialiased) hides the difference.
SURPLUS = 2
LONG = 4  # sides: of an image that is longer, only what is looked at is resized (all of it, of one 1 px wide, could take gigabytes)


class ByteRange(NamedTuple):
    """Where the bytes of an image lie, and their CRC-32."""

    file: str
    first: int
    length: int
    crc: int


class Cut(NamedTuple):
    """A box of an image, in pixels, and how it is resized (antialiased): bicubic or bilinear."""

    top: int
    left: int
    height: int
    width: int
    bicubic: bool


class Changed(RuntimeError):
    """A file is not what it was when its images were listed. The message names it."""


Unit = tuple[ByteRange, Sequence[Cut | None]]  # an image, and the views of it that are wanted; None: as evaluation sees it
Level = UInt8[np.ndarray, "size size 3"]


def views(units: Sequence[Unit], size: int, crop_pct: float) -> UInt8[np.ndarray, "views size size 3"]:
    """All views of all units, in order. Each image is decoded once. Raises ``Changed``."""
    return np.stack([view for place, cuts in units for view in _views(place, cuts, size, crop_pct)])


def _views(place: ByteRange, cuts: Sequence[Cut | None], size: int, crop_pct: float) -> list[Level]:
    data = read(place)
    try:
        image, scale = decode(data, _reduction(cuts, size))
        return [evaluated(image, size, crop_pct) if each is None else resized(image, each, size, scale) for each in cuts]
    except Exception as error:  # it could be decoded when it was listed: another Pillow, or too little memory
        raise RuntimeError(f"{place.file}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def read(place: ByteRange) -> bytes:
    """The bytes at a place. Raises ``Changed`` if they are others, or gone."""
    try:
        with Path(place.file).open("rb") as file:
            file.seek(place.first)
            data = file.read(place.length)
    except OSError as error:
        raise Changed(f"{place.file}: {error.strerror}") from error
    if zlib.crc32(data) != place.crc:
        raise Changed(f"{place.file}: other bytes")
    return data


def decode(data: bytes, reduction: int = 1) -> tuple[Image.Image, float]:
    """In RGB, as it is stored (EXIF's orientation is ignored, as timm does), and by how much its sides were reduced: at most so much."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        least = (max(1, width // reduction), max(1, height // reduction))
        reduced = image.draft("RGB", least) if reduction > 1 else None  # of a JPEG alone
        return rgb(image), width / reduced[1][2] if reduced else 1.0


def rgb(image: Image.Image) -> Image.Image:
    """As Pillow converts, and timm with it; but of 16 bits the upper 8, where Pillow would cut off at 255."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _reduction(cuts: Sequence[Cut | None], size: int) -> int:
    """The largest of 1, 2, 4, 8 that leaves every view ``SURPLUS``."""
    most = min(1.0 if each is None else min(each.height, each.width) / (SURPLUS * size) for each in cuts)
    return max(power for power in (1, 2, 4, 8) if power <= max(1.0, most))


def resized(image: Image.Image, box: Cut, size: int, scale: float = 1.0) -> Level:
    """The box cut out, then resized: nothing from outside of it has a share. The box knows sides ``scale`` times those of ``image``."""
    left, top, right, bottom = (
        side / scale for side in (box.left, box.top, box.left + box.width, box.top + box.height)
    )  # whole numbers if nothing was reduced
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, min(image.width, math.ceil(right)), min(image.height, math.ceil(bottom))))
    inside = (left - x, top - y, min(right - x, part.width), min(bottom - y, part.height))
    how = Image.Resampling.BICUBIC if box.bicubic else Image.Resampling.BILINEAR
    return np.asarray(part.resize((size, size), how, inside))


def evaluated(image: Image.Image, size: int, crop_pct: float) -> Level:
    """The short side resized to size / crop_pct (bicubic, antialiased, both sides rounded down), then the centre: timm's evaluation."""
    short = math.floor(size / crop_pct)
    least = min(image.size)
    width, height = (short if side == least else int(short * side / least) for side in image.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    if max(width, height) <= LONG * short:
        whole = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(whole.crop((left, top, left + size, top + size)))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


class Found(NamedTuple):
    """What was seen of an image when it was listed; ``fault``: why it cannot be used, or nothing."""

    length: int
    crc: int
    height: int
    width: int
    fault: str


def look(places: Sequence[tuple[str, int, int | None]]) -> list[Found]:
    """At each image (file, first byte, length; None: all of the file), which is decoded to its end, at an eighth of its sides if it is a
    JPEG.
    """
    return [_look(*place) for place in places]


def _look(file: str, first: int, length: int | None) -> Found:
    data = b""
    try:
        with Path(file).open("rb") as opened:
            opened.seek(first)
            data = opened.read(-1 if length is None else length)
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        decode(data, 8)
    except UnidentifiedImageError:
        return Found(len(data), 0, 0, 0, "not an image that Pillow knows")
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return Found(len(data), 0, 0, 0, " ".join(str(error).split()) or type(error).__name__)
    return Found(len(data), zlib.crc32(data), height, width, "")
