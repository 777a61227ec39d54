"""From the bytes of an image file to the pixels of a view: the work of a decoding process."""

import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# A JPEG is decoded at half, a quarter or an eighth of its sides where every box still has this many times the pixels of a view on each;
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


def decode_views(units: Sequence[Unit], size: int, crop_pct: float) -> UInt8[np.ndarray, "views size size 3"]:
    """Decode all views of all units, in order. Each image is decoded once. Raises ``Changed``."""
    return np.stack([view for source, cuts in units for view in _decode_cuts(source, cuts, size, crop_pct)])


def _decode_cuts(source: ByteRange, cuts: Sequence[Cut | None], size: int, crop_pct: float) -> list[Level]:
    data = read_bytes(source)
    # the largest that leaves every view SURPLUS
    most = min(1.0 if cut is None else min(cut.height, cut.width) / (SURPLUS * size) for cut in cuts)
    reduction = max(power for power in (1, 2, 4, 8) if power <= max(1.0, most))
    try:
        image, scale = decode(data, reduction)
        return [evaluation_view(image, size, crop_pct) if cut is None else resize_cut(image, cut, size, scale) for cut in cuts]
    except Exception as error:  # it could be decoded when it was listed: another Pillow, or too little memory
        raise RuntimeError(f"{source.file}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def read_bytes(source: ByteRange) -> bytes:
    """Read the bytes of an image. Raises ``Changed`` if they are others, or gone."""
    try:
        with Path(source.file).open("rb") as file:
            file.seek(source.first)
            data = file.read(source.length)
    except OSError as error:
        raise Changed(f"{source.file}: {error.strerror}") from error
    if zlib.crc32(data) != source.crc:
        raise Changed(f"{source.file}: other bytes")
    return data


def decode(data: bytes, reduction: int = 1) -> tuple[Image.Image, float]:
    """Decode to RGB, and return by how much the sides were reduced: at most ``reduction``. Ignores EXIF's orientation, as timm does."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        least = (max(1, width // reduction), max(1, height // reduction))
        reduced = image.draft("RGB", least) if reduction > 1 else None  # of a JPEG alone
        return rgb(image), width / reduced[1][2] if reduced else 1.0


def rgb(image: Image.Image) -> Image.Image:
    """Convert as Pillow does, and timm with it; but take the upper 8 of 16 bits, where Pillow would cut off at 255."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def resize_cut(image: Image.Image, cut: Cut, size: int, scale: float = 1.0) -> Level:
    """Cut the box out, then resize it: nothing from outside has a share. ``cut`` is in pixels of the image before its reduction."""
    edges = (cut.left, cut.top, cut.left + cut.width, cut.top + cut.height)
    left, top, right, bottom = (edge / scale for edge in edges)  # whole numbers if nothing was reduced
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, min(image.width, math.ceil(right)), min(image.height, math.ceil(bottom))))
    inside = (left - x, top - y, min(right - x, part.width), min(bottom - y, part.height))
    resampling = Image.Resampling.BICUBIC if cut.bicubic else Image.Resampling.BILINEAR
    return np.asarray(part.resize((size, size), resampling, inside))


def evaluation_view(image: Image.Image, size: int, crop_pct: float) -> Level:
    """Resize the short side to size / crop_pct (bicubic, antialiased, both sides rounded down), then cut out the centre, as timm does."""
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


class Inspected(NamedTuple):
    """What listing needs to know of an image; ``fault``: why it cannot be used, or nothing."""

    length: int
    crc: int
    height: int
    width: int
    fault: str


def inspect_images(sources: Sequence[tuple[str, int, int | None]]) -> list[Inspected]:
    """Look at each image (file, first byte, length; None: all of the file): decode it to its end, at an eighth of its sides if a JPEG."""
    return [_inspect(*source) for source in sources]


def _inspect(file: str, first: int, length: int | None) -> Inspected:
    data = b""
    try:
        with Path(file).open("rb") as opened:
            opened.seek(first)
            data = opened.read(-1 if length is None else length)
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        decode(data, 8)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        fault = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        return Inspected(len(data), 0, 0, 0, fault or type(error).__name__)
    return Inspected(len(data), zlib.crc32(data), height, width, "")
