"""ImageNet-1k, unpacked: ``<path>/train/<wnid>/`` and ``<path>/val/<wnid>/``.

Decoded once to 3 size^2 bytes per image, 1,331,167 images in all: 16.4 GB at 64 pixels, 215 GB at 232.
"""

from kdlib.config.schema import Imagenet
from kdlib.data.dataset import SPLITS, Content
from kdlib.data.paths import resolve_path
from kdlib.data.sources.folder import decode_squares, list_train_val
from kdlib.data.splits import stratified_split


def contents(name: str, params: Imagenet) -> Content:
    """Split train/ stratified by ``params.seed``; test is the official validation split, val/."""
    key = f"data.{name}.path"
    names, listed = list_train_val(key, resolve_path(key, params.path))
    (files, labels), (test_files, test_labels) = listed["train"], listed["val"]
    train, val = stratified_split(labels, (params.val_fraction,), params.seed, f"data.{name}.val_fraction", names)
    chosen = dict(zip(SPLITS, ([files[i] for i in train], [files[i] for i in val], test_files), strict=True))
    split_labels = dict(zip(SPLITS, (labels[train], labels[val], test_labels), strict=True))
    return Content(names, params.size, 3, split_labels, lambda split: decode_squares(key, chosen[split], params.size))
