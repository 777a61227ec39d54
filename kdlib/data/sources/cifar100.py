"""CIFAR-100 as torchvision reads it: ``<path>/cifar-100-python/{train,test,meta}``, checked by MD5. 184 MB as a data set folder."""

import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100

from kdlib.config.schema import Cifar100
from kdlib.data.dataset import BLOCK, Content, Images
from kdlib.data.paths import resolve_path
from kdlib.data.splits import stratified_split
from kdlib.errors import refuse


def contents(name: str, params: Cifar100) -> Content:
    """Train and val are a stratified split of the official training split by ``params.seed``; test is the official test split."""
    key = f"data.{name}.path"
    root = resolve_path(key, params.path)
    if not root.is_dir() and not params.download:
        raise refuse(key, str(root), "a folder that holds cifar-100-python/", "correct the path, or set download: true")
    train, test = (_read(key, root, official, params.download) for official in (True, False))
    labels = np.asarray(train.targets, np.int64)
    index = stratified_split(labels, (params.val_fraction,), params.seed, f"data.{name}.val_fraction", train.classes)
    images = {"train": (train.data, index[0]), "val": (train.data, index[1]), "test": (test.data, np.arange(len(test.data)))}

    def blocks(split: str) -> Iterator[Images]:
        source, chosen = images[split]
        return (source[rows] for rows in np.array_split(chosen, math.ceil(len(chosen) * 32 * 32 * 3 / BLOCK)))

    split_labels = {"train": labels[index[0]], "val": labels[index[1]], "test": np.asarray(test.targets, np.int64)}
    return Content(list(train.classes), 32, 3, split_labels, blocks)


def _read(key: str, root: Path, official_train: bool, download: bool) -> CIFAR100:
    try:
        return CIFAR100(str(root), train=official_train, download=download)
    except (RuntimeError, OSError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        fault = f"{root}: {' '.join(str(error).split())}"
        raise refuse(key, fault, "a whole cifar-100-python/", "unpack the archive anew, or set download: true") from error
