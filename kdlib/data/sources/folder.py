"""Any images, one folder for each class: ``<path>/<class>/<image>``, found by timm's reader, decoded once by Pillow to square RGB."""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from kdlib.config.schema import Folder
from kdlib.data.dataset import BLOCK, SPLITS, Content, Images
from kdlib.data.paths import check_folder, check_layout, resolve_path
from kdlib.data.splits import Labels, stratified_split
from kdlib.decoding.pool import spare
from kdlib.errors import refuse


def contents(name: str, params: Folder) -> Content:
    """Split stratified by ``params.seed``. Each image is decoded once and takes 3 size^2 bytes: 12 KB at 64 pixels."""
    key = f"data.{name}.path"
    names, files, labels = list_images(key, resolve_path(key, params.path))
    index = dict(zip(SPLITS, stratified_split(labels, (params.val_fraction, params.test_fraction), params.seed, key, names), strict=True))
    split_labels = {split: labels[index[split]] for split in SPLITS}
    return Content(names, params.size, 3, split_labels, lambda split: decode_squares(key, [files[i] for i in index[split]], params.size))


def list_images(key: str, root: Path) -> tuple[list[str], list[str], Labels]:
    """List the class names in natural order, the image files below ``root/<class>/`` sorted by class and name, and their classes.

    Files without an image's extension are ignored, as timm does. Raises ``Refused`` about ``key`` for a missing folder, an empty class,
    fewer than two classes, an image outside of the class folders or deeper within them (timm would name its class by the innermost folder).
    """
    check_folder(key, root, "a folder that exists")
    files = sorted(Path(file) for file, _ in find_images_and_targets(str(root), sort=False)[0])
    for file in files:
        if file.parent.parent != root:
            raise refuse(key, str(file), f"images directly in {root}/<class>/", "move it into the folder of its class")
    folders = {folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
    if empty := sorted(folders - {file.parent.name for file in files}):
        raise refuse(key, str(root / empty[0]), "at least one image of every class", "add images or remove the folder")
    # By name too: natural_key takes "A" for "a" and "01" for "1", and would leave their order to the file system.
    names = sorted({file.parent.name for file in files}, key=lambda name: (natural_key(name), name))
    if len(names) < 2:
        raise refuse(key, f"{root} with classes {names}", "at least 2 classes", "add a folder of images for each class")
    rank = {name: label for label, name in enumerate(names)}
    files.sort(key=lambda file: (rank[file.parent.name], file.name))
    return names, [str(file) for file in files], np.array([rank[file.parent.name] for file in files], np.int64)


def list_train_val(key: str, root: Path) -> tuple[list[str], dict[str, tuple[list[str], Labels]]]:
    """List the class names of ImageNet's layout, and of ``train`` and ``val`` the files with their classes.

    Raises ``Refused`` about ``key`` where ``list_images`` does, and if the two have not the same classes.
    """
    check_layout(key, root)
    names, files, labels = list_images(key, root / "train")
    val_names, val_files, val_labels = list_images(key, root / "val")
    check_same_classes(key, names, val_names)
    return names, {"train": (files, labels), "val": (val_files, val_labels)}


def check_same_classes(key: str, train: Collection[str], val: Collection[str]) -> None:
    """Raise ``Refused`` about ``key`` for a class that only one of the two has."""
    if odd := sorted(set(train) ^ set(val)):
        raise refuse(key, f"{odd[0]} in only one of train/ and val/", "the same classes in both", "add its images or remove the class")


def decode_square(key: str, file: str, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Decode to RGB, the short side resized to ``size`` (bicubic, antialiased), the centre cut out: in one step, exact at native size.

    Raises ``Refused`` about ``key``, naming the file.
    """
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        fault = f"{file}: {' '.join(str(error).split())}"
        raise refuse(key, fault, "images that Pillow can read", "replace or remove this file") from error
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))


def decode_squares(key: str, files: Sequence[str], size: int) -> Iterator[Images]:
    """Decode in blocks, in order, by as many threads as there are cores (Pillow lets go of the interpreter while it decodes)."""
    workers = 1 + spare(processes=1)
    step = max(4 * workers, BLOCK // (size * size * 3))
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), step):
            yield np.stack(list(pool.map(lambda file: decode_square(key, file, size), files[start : start + step])))
