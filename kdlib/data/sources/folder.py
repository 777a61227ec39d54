"""Any images, one folder for each class: ``<path>/<class>/<image>``."""

from collections.abc import Iterator

from kdlib.config.schema import Folder
from kdlib.data.dataset import SPLITS, Content, Images
from kdlib.data.paths import resolve_path
from kdlib.data.sources.class_folders import decode_squares, list_images
from kdlib.data.splits import stratified_split


def contents(name: str, params: Folder) -> Content:
    """Split stratified by ``params.seed``. Each image is decoded once and takes 3 size^2 bytes: 12 KB at 64 pixels."""
    key = f"data.{name}.path"
    names, files, labels = list_images(key, resolve_path(key, params.path))
    shares = (params.val_fraction, params.test_fraction)
    index = dict(zip(SPLITS, stratified_split(labels, shares, params.seed, key, names), strict=True))

    def blocks(split: str) -> Iterator[Images]:
        return decode_squares(key, [files[i] for i in index[split]], params.size)

    return Content(names, params.size, 3, {split: labels[index[split]] for split in SPLITS}, blocks)
