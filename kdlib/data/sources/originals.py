"""ImageNet left in its files, and what is laid out like it: every image is looked at once, and listed.

``<path>/train/<class>/<image>`` and ``<path>/val/<class>/<image>``, or webdataset's shards ``<path>/train/*.tar`` and ``<path>/val/*.tar``,
or what Hugging Face's `datasets` saved to the disk.
"""

import os
from pathlib import Path, PurePath

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from tqdm.auto import tqdm

from kdlib.config.schema import Originals
from kdlib.data.dataset import SPLITS, Content
from kdlib.data.lazy_images import BYTE_RANGE, Listing
from kdlib.data.paths import check_layout, resolve_path
from kdlib.data.sources import class_map, huggingface
from kdlib.data.sources.folder import check_same_classes, list_train_val
from kdlib.data.splits import stratified_split
from kdlib.decoding import pixels, shards
from kdlib.decoding.pool import pool
from kdlib.decoding.shards import StoredImage
from kdlib.errors import refuse

CHUNK = 32  # images that a process looks at at a time
NAMED = 3  # unreadable images that a line names

Parts = dict[str, list[StoredImage]]  # train and val
Readable = list[tuple[StoredImage, tuple[int, ...]]]  # each with its ``BYTE_RANGE``


def contents(name: str, params: Originals) -> Content:
    """Split train/ stratified by ``params.seed``; test is val/. Unreadable images are named and left out.

    Raises ``Refused`` for a path that is not ImageNet-like, for more unreadable images than ``params.unreadable``, and for a class map that
    does not fit.
    """
    key = f"data.{name}"
    root = resolve_path(f"{key}.path", params.path)
    index = {"folders": _in_folders, "shards": _in_shards, "huggingface": huggingface.index_arrow}[params.stored]
    kinds, images = index(f"{key}.path", root)
    names, ranks = _classes(key, params, kinds)
    readable, left_out = _inspect(key, root, images, params.unreadable)
    for entries in readable.values():  # the same order however they are stored
        entries.sort(key=lambda entry: (ranks[entry[0].kind], entry[0].name))
    labels = {part: np.array([ranks[image.kind] for image, _ in entries], np.int64) for part, entries in readable.items()}
    train, val = stratified_split(labels["train"], (params.val_fraction,), params.seed, f"{key}.val_fraction", names)
    files, ranges, split_labels = {}, {}, {}
    for split, part, rows in zip(SPLITS, ("train", "train", "val"), (train, val, np.arange(len(labels["val"]))), strict=True):
        files[split] = np.array([os.fsencode(os.path.relpath(readable[part][row][0].file, root)) for row in rows])
        ranges[split] = np.array([readable[part][row][1] for row in rows], BYTE_RANGE)
        split_labels[split] = labels[part][rows]
    return Content(names, params.size, 3, split_labels, Listing(params.path, params.crop_pct, files, ranges, left_out))


def _in_folders(key: str, root: Path) -> tuple[list[str], Parts]:
    names, parts = list_train_val(key, root)
    return names, {
        part: [StoredImage(file, 0, None, PurePath(file).stem, names[label]) for file, label in zip(files, labels.tolist(), strict=True)]
        for part, (files, labels) in parts.items()
    }


def _in_shards(key: str, root: Path) -> tuple[list[str], Parts]:
    check_layout(key, root)
    parts = {part: _images_of_shards(key, root / part) for part in ("train", "val")}
    train, val = ({image.kind for image in images} for images in parts.values())
    check_same_classes(key, train, val)
    return sorted(train, key=lambda kind: (natural_key(kind), kind)), parts


def _images_of_shards(key: str, folder: Path) -> list[StoredImage]:
    files = sorted(str(file) for file in folder.glob("*.tar"))
    if not files:
        raise refuse(key, str(folder), "shards named *.tar in it", "correct the path, or set stored to what lies there")
    indices = [pool().ask(shards.index_shard, file, get_img_extensions(as_set=True)) for file in files]
    try:
        images = [image for index in indices for image in index()]
    except pixels.Changed as error:
        raise refuse(key, str(error), "whole tar files, not compressed", "make or copy it again") from error
    if not images:
        do = "make the shards again, or set stored to what lies there"
        raise refuse(key, f"no image in the shards of {folder}", "images named <key>.jpg, and so on, in them", do)
    for image in images:
        if not image.kind:
            fault = f"{image.file}: {image.name} with neither .cls nor a folder"
            raise refuse(key, fault, "a class for every image", "make the shards again")
    return images


def _classes(key: str, params: Originals, kinds: list[str]) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, and the number of each kind (its order where it is stored), which shards may give as a number."""
    if params.class_map is None:
        return kinds, {kind: number for number, kind in enumerate(kinds)}
    names = class_map.read_class_map(f"{key}.class_map", resolve_path(f"{key}.class_map", params.class_map))
    stored = [str(number) for number in range(len(names))] if all(kind.isdecimal() for kind in kinds) else names
    ranks = {kind: number for number, kind in enumerate(stored)}
    class_map.check_classes(f"{key}.class_map", ranks, kinds)
    return names, ranks


def _inspect(key: str, root: Path, images: Parts, most: float) -> tuple[dict[str, Readable], list[str]]:
    """Look at all images. Returns the readable ones, and the names and faults of the others.

    Raises ``Refused`` if these are more than a share ``most``.
    """
    total = sum(len(part) for part in images.values())
    readable: dict[str, Readable] = {part: [] for part in images}
    left_out: list[str] = []
    chunks = [(part, those[start : start + CHUNK]) for part, those in images.items() for start in range(0, len(those), CHUNK)]
    with tqdm(total=total, desc=f"{key}: looks at", unit=" images", disable=None) as bar:
        asked = [pool().ask(pixels.inspect_images, [image[:3] for image in chunk]) for _, chunk in chunks]
        for (part, chunk), inspected in zip(chunks, asked, strict=True):
            for image, (*facts, fault) in zip(chunk, inspected(), strict=True):
                if fault:
                    inside = "" if image.length is None else f" {image.name}"
                    left_out.append(f"{os.path.relpath(image.file, root)}{inside}: {fault}")
                else:
                    readable[part].append((image, (image.first, *facts)))
            bar.update(len(chunk))
    if left_out:
        named = "; ".join(left_out[:NAMED]) + ("; ..." if len(left_out) > NAMED else "")
        what = f"{len(left_out):,} of {total:,} images that cannot be read"
        if len(left_out) > most * total:
            raise refuse(f"{key}.unreadable", what, f"at most a share of {most:g}", f"replace them ({named}), or allow more")
        print(f"{key}: leaves out {what}, all named in data.json: {named}")
    return readable, left_out
