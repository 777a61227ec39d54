"""A data set folder: what a source offers is written to it once, and read back memory-mapped ever after."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from jaxtyping import UInt8
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm.auto import tqdm

from kdlib.config.schema import DataSource
from kdlib.data.lazy_images import LazyImages, Listing, open_split
from kdlib.data.splits import Labels
from kdlib.errors import Refused, refuse

SPLITS = ("train", "val", "test")
BLOCK = 2**22  # bytes of images that a source yields at a time, roughly

Images = UInt8[np.ndarray, "images height width channels"]


@dataclass(frozen=True)
class Content:
    """A source's offer, known before anything is decoded or written."""

    class_names: list[str]
    size: int  # pixels, height and width
    channels: int
    labels: dict[str, Labels]  # by split
    # a split's images in the order of its labels, about BLOCK bytes at a time; or where they stay
    blocks: Callable[[str], Iterator[Images]] | Listing

    @property
    def count(self) -> int:
        """Images of all splits."""
        return sum(len(labels) for labels in self.labels.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the folder takes, but for headers and names."""
        images = self.blocks.nbytes if isinstance(self.blocks, Listing) else self.count * self.size**2 * self.channels
        return images + 8 * self.count


@dataclass(frozen=True)
class Split:
    """Images (memory-mapped, NHWC, 0..255, or in their files) and their classes."""

    images: Images | LazyImages
    labels: Labels


@dataclass(frozen=True)
class DataSet:
    """A data set folder, opened."""

    name: str
    classes: int
    class_names: list[str]
    size: int
    channels: int
    hflip: float
    mean: tuple[float, ...]  # per channel of the training split, in [0, 1]; ImageNet's for images that stay in their files
    std: tuple[float, ...]
    fingerprint: str
    train: Split
    val: Split
    test: Split


def write_dataset(folder: Path, name: str, params: DataSource, content: Content, progress: bool = True) -> DataSet:
    """Write all of a data set folder, or nothing; an earlier one is replaced. One process at a time.

    Raises ``Refused`` when the content has a fault or the disk too little room.
    """
    key = f"data.{name}"
    _check(key, content)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
        try:
            for left in (partial, old):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            _check_room(key, folder.parent, content, progress)
            partial.mkdir()
            _fill(partial, name, params, content, progress)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(key, "a full disk", content) from error
            raise
        finally:
            for left in (partial, old):
                shutil.rmtree(left, ignore_errors=True)
    return load_dataset(folder)


def load_dataset(folder: Path) -> DataSet:
    """Open a data set folder without reading its images. Raises ``Refused`` when it is missing, incomplete or inconsistent."""
    try:
        facts = json.loads((folder / "data.json").read_text("utf-8"))
        kept = ("name", "classes", "class_names", "size", "channels", "hflip", "fingerprint")
        fields = {field: facts[field] for field in kept} | {field: tuple(facts[field]) for field in ("mean", "std")}
        return DataSet(**fields, **{split: _open(folder, split, facts) for split in SPLITS})  # type: ignore[arg-type]
    except Refused:  # of the path that its images lie in
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        fault = f"{folder}: {' '.join(str(error).split())}"
        raise refuse(f"data.{folder.name}", fault, "a complete data set folder", "run the data stage again") from error


def _check(key: str, content: Content) -> None:
    for split in SPLITS:
        missing = sorted(set(range(len(content.class_names))) - set(content.labels[split].tolist()))
        if missing:
            fault = f"no image of class {content.class_names[missing[0]]!r} in the {split} split ({len(missing)} such classes)"
            raise refuse(key, fault, "images of every class in every split", "add images or remove the class")


def _check_room(key: str, parent: Path, content: Content, progress: bool) -> None:
    free = shutil.disk_usage(parent).free
    if free < content.nbytes:
        raise _no_room(key, f"{free / 1e9:.3g} GB free in {parent}", content)
    if progress:
        shape = f"{content.size} x {content.size} x {content.channels}"
        take = "stay in their files, whose list takes" if isinstance(content.blocks, Listing) else "take"
        print(f"{key}: {content.count:,} images of {shape} {take} {content.nbytes / 1e9:.3g} GB in {parent}")


def _no_room(key: str, free: str, content: Content) -> Refused:
    return refuse(key, free, f"at least {content.nbytes / 1e9:.3g} GB", "free some, or choose a smaller size or fewer images")


def _fill(folder: Path, name: str, params: DataSource, content: Content, progress: bool) -> None:
    digest = hashlib.sha256()
    facts: dict[str, Any] = {
        "source": params.source,
        "classes": len(content.class_names),
        "class_names": content.class_names,
        "size": content.size,
        "channels": content.channels,
        "hflip": params.hflip,
        "counts": {split: len(content.labels[split]) for split in SPLITS},
    }
    with tqdm(total=content.count, desc=name, unit=" images", disable=not progress) as bar:
        for split in SPLITS:
            labels = content.labels[split]
            digest.update(np.ascontiguousarray(labels).data)
            np.save(folder / f"{split}_labels.npy", labels)
            if callable(content.blocks):
                shape = (len(labels), content.size, content.size, content.channels)
                histogram = _write_images(folder / f"{split}_images.npy", shape, content.blocks(split), (digest.update, bar.update))
                if split == "train":
                    facts["mean"], facts["std"] = _mean_std(histogram)
            else:
                content.blocks.save(folder, split, digest.update)
                facts["mean"], facts["std"] = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
                bar.update(len(labels))
    digest.update(json.dumps(facts, sort_keys=True).encode())
    facts = {"name": name, **facts, "fingerprint": digest.hexdigest()}
    if isinstance(content.blocks, Listing):
        facts["originals"] = content.blocks.facts
    (folder / "data.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _write_images(path: Path, shape: tuple[int, ...], blocks: Iterator[Images], progress: tuple[Callable[..., object], ...]) -> np.ndarray:
    """Write blocks behind an .npy header. Returns how often each channel takes each value: [channels, 256].

    Not through ``open_memmap``: written pages of a mapping count as the process's memory, and a full disk kills it (SIGBUS).
    """
    update_digest, update_bar = progress
    histogram = np.zeros((shape[-1], 256), np.int64)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        written = 0
        for block in blocks:
            raw = np.ascontiguousarray(block).data
            file.write(raw)
            update_digest(raw)
            histogram += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(shape[-1])]
            written += len(block)
            update_bar(len(block))
    if written != shape[0]:
        raise RuntimeError(f"{path.name}: a source yielded {written} images for {shape[0]} labels")
    return histogram


def _mean_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Per channel, of values / 255, in float64; independent of how the images were divided into blocks."""
    value = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # a constant channel must not divide by 0 later


def _open(folder: Path, split: str, facts: dict[str, Any]) -> Split:
    labels = np.load(folder / f"{split}_labels.npy")
    count, size = facts["counts"][split], facts["size"]
    if "originals" in facts:
        images = open_split(folder, split, facts["originals"], size)
        fits = images.ranges.shape == (count,)
    else:
        images = np.load(folder / f"{split}_images.npy", "r")
        fits = images.shape == (count, size, size, facts["channels"]) and images.dtype == np.uint8
    if not fits:
        raise ValueError(f"{split}'s images do not fit data.json, which says {count} of {size} x {size}")
    if labels.shape != (count,) or labels.dtype != np.int64:
        raise ValueError(f"{split}_labels.npy holds {labels.dtype} {labels.shape}, data.json says {count}")
    return Split(images, labels)
