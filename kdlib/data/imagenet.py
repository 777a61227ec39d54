"""ImageNet-1k, unpacked: ``<path>/train/<wnid>/`` and ``<path>/val/<wnid>/``.

Decoded once to 3 size^2 bytes per image, 1,331,167 images in all: 16.4 GB at 64 pixels, 215 GB at 232.
"""

from collections.abc import Iterator

from kdlib import config
from kdlib.data.files import decode_all, find, place
from kdlib.data.splits import SPLITS, Content, Images, stratified_split


def contents(name: str, params: config.Imagenet) -> Content:
    """Train and val are a stratified split of train/ by ``params.seed``; test is the official validation split, val/."""
    key = f"data.{name}.path"
    root = place(params.path)
    if not root.is_dir():
        raise config.refuse(key, str(root), "a folder that holds train/ and val/", "correct the path")
    names, files, labels = find(key, root / "train")
    test_names, test_files, test_labels = find(key, root / "val")
    if names != test_names:
        odd = min(set(names) ^ set(test_names))
        raise config.refuse(key, f"{odd} in only one of train/ and val/", "the same classes in both", "add its images or remove the class")
    train, val = stratified_split(labels, (params.val_fraction,), params.seed, f"data.{name}.val_fraction", names)
    chosen = dict(zip(SPLITS, ([files[i] for i in train], [files[i] for i in val], test_files), strict=True))

    def blocks(split: str) -> Iterator[Images]:
        return decode_all(key, chosen[split], params.size)

    return Content(names, params.size, 3, dict(zip(SPLITS, (labels[train], labels[val], test_labels), strict=True)), blocks)
