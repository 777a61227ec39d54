"""ImageNet left in its files, and what is laid out like it: every image is looked at once, and listed.

``<path>/train/<class>/<image>`` and ``<path>/val/<class>/<image>``, or webdataset's shards ``<path>/train/*.tar`` and ``<path>/val/*.tar``,
or what Hugging Face's `datasets` saved to the disk.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from tqdm.auto import tqdm

from kdlib.config.schema import Originals
from kdlib.data.dataset import SPLITS, Content
from kdlib.data.lazy_images import BYTE_RANGE, Listing
from kdlib.data.paths import check_layout, place
from kdlib.data.sources import class_map, huggingface
from kdlib.data.sources.class_folders import official, same_classes
from kdlib.data.splits import stratified_split
from kdlib.decoding import pixels, shards
from kdlib.decoding.pool import pool
from kdlib.decoding.shards import Member
from kdlib.errors import refuse

CHUNK = 32  # images that a process looks at at a time
NAMED = 3  # unreadable images that a line names

Item = TypeVar("Item")


@dataclass(frozen=True)
class Image:
    """One that is said to be there."""

    file: str
    first: int
    length: int | None  # None: to the end of the file
    name: str  # without what says of which type it is
    kind: str  # its class's name or number


Parts = dict[str, list[Image]]  # train and val


@dataclass(frozen=True)
class Seen:
    """One that can be read."""

    image: Image
    place: tuple[int, ...]  # a ``PLACE``


def contents(name: str, params: Originals) -> Content:
    """Train and val are a stratified split of train/ by ``params.seed``; test is val/. Unreadable images are named and left out.

    Raises ``Refused`` for a path that is not ImageNet-like, for more unreadable images than ``params.unreadable``, and for a class map that
    does not fit.
    """
    key = f"data.{name}"
    root = place(f"{key}.path", params.path)
    kinds, images = {"folders": _in_folders, "shards": _in_shards, "huggingface": _in_arrow}[params.stored](f"{key}.path", root)
    names, ranks = _classes(key, params, kinds)
    seen, left_out = _seen(key, root, images, params.unreadable)
    for part in seen.values():  # the same order however they are stored
        part.sort(key=lambda each: (ranks[each.image.kind], each.image.name))
    labels = {split: np.array([ranks[each.image.kind] for each in part], np.int64) for split, part in seen.items()}
    train, val = stratified_split(labels["train"], (params.val_fraction,), params.seed, f"{key}.val_fraction", names)
    parts = {"train": ("train", train), "val": ("train", val), "test": ("val", np.arange(len(labels["val"])))}
    listed = Listing(
        params.path,
        params.crop_pct,
        {
            split: np.array([os.fsencode(os.path.relpath(seen[of][i].image.file, root)) for i in rows])
            for split, (of, rows) in parts.items()
        },
        {split: np.array([seen[of][i].place for i in rows], BYTE_RANGE) for split, (of, rows) in parts.items()},
        left_out,
    )
    return Content(names, params.size, 3, {split: labels[parts[split][0]][parts[split][1]] for split in SPLITS}, listed)


def _in_folders(key: str, root: Path) -> tuple[list[str], Parts]:
    names, parts = official(key, root)
    return names, {
        part: [Image(file, 0, None, PurePath(file).stem, names[label]) for file, label in zip(files, labels.tolist(), strict=True)]
        for part, (files, labels) in parts.items()
    }


def _in_shards(key: str, root: Path) -> tuple[list[str], Parts]:
    check_layout(key, root)
    found = {}
    for part in ("train", "val"):
        files = sorted(str(file) for file in (root / part).glob("*.tar"))
        if not files:
            raise refuse(key, str(root / part), "shards named *.tar in it", "correct the path, or set stored to what lies there")
        asked = [pool().ask(shards.index, file, get_img_extensions(as_set=True)) for file in files]
        try:
            indices = [each() for each in asked]
        except pixels.Changed as error:
            raise refuse(key, str(error), "whole tar files, not compressed", "make or copy it again") from error
        found[part] = [_image(file, member) for file, index in zip(files, indices, strict=True) for member in index]
        if not found[part]:
            do = "make the shards again, or set stored to what lies there"
            raise refuse(key, f"no image in the shards of {root / part}", "images named <key>.jpg, and so on, in them", do)
        for image in found[part]:
            if not image.kind:
                what = f"{image.file}: {image.name} with neither .cls nor a folder"
                raise refuse(key, what, "a class for every image", "make the shards again")
    same_classes(key, *({image.kind for image in part} for part in found.values()))
    kinds = {image.kind for part in found.values() for image in part}
    return sorted(kinds, key=lambda kind: (natural_key(kind), kind)), found


def _in_arrow(key: str, root: Path) -> tuple[list[str], Parts]:
    names, parts = huggingface.index(key, root)
    return names, {part: [_image(*each) for each in stored] for part, stored in parts.items()}


def _image(file: str, member: Member) -> Image:
    return Image(file, member.first, member.length, PurePath(member.key).name, member.label)


def _classes(key: str, params: Originals, kinds: list[str]) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, and the number of each kind (its order where it is stored), which shards may give as a number."""
    if params.class_map is None:
        return kinds, {kind: number for number, kind in enumerate(kinds)}
    names = class_map.read(f"{key}.class_map", place(f"{key}.class_map", params.class_map))
    ranks = {kind: number for number, kind in enumerate(names)}
    if all(kind.isdecimal() for kind in kinds):
        ranks = {str(number): number for number in range(len(names))}
    class_map.check(f"{key}.class_map", ranks, kinds)
    return names, ranks


def _seen(key: str, root: Path, images: Parts, most: float) -> tuple[dict[str, list[Seen]], list[str]]:
    """Those that can be read, and of the others the names and what is wrong. Raises ``Refused`` if these are more than a share ``most``."""
    total = sum(len(part) for part in images.values())
    seen: dict[str, list[Seen]] = {}
    left_out: list[str] = []
    with tqdm(total=total, desc=f"{key}: looks at", unit=" images", disable=None) as bar:
        for part, those in images.items():
            asked = [
                (chunk, pool().ask(pixels.look, [(image.file, image.first, image.length) for image in chunk])) for chunk in _chunks(those)
            ]
            seen[part] = []
            for chunk, found in asked:
                for image, (*where, fault) in zip(chunk, found(), strict=True):
                    if fault:
                        inside = "" if image.length is None else f" {image.name}"
                        left_out.append(f"{os.path.relpath(image.file, root)}{inside}: {fault}")
                    else:
                        seen[part].append(Seen(image, (image.first, *where)))
                bar.update(len(chunk))
    if left_out:
        named = "; ".join(left_out[:NAMED]) + ("; ..." if len(left_out) > NAMED else "")
        what = f"{len(left_out):,} of {total:,} images that cannot be read"
        if len(left_out) > most * total:
            raise refuse(f"{key}.unreadable", what, f"at most a share of {most:g}", f"replace them ({named}), or allow more")
        print(f"{key}: leaves out {what}, all named in data.json: {named}")
    return seen, left_out


def _chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
