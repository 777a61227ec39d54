"""Data sets that are not there: how large one will be, and random images of its shape, to try training on before any image is read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdlib.config.schema import Cifar100, DataSource, Digits, Fractals, Imagenet, Originals
from kdlib.data.dataset import DataSet, Split
from kdlib.data.sources import Shape, declared_shape, digits
from kdlib.files import read_json
from kdlib.seed import generator

IMAGENET = 1_281_167  # official training images (Russakovsky et al., IJCV 2015, arXiv 1409.0575, table 2)


@dataclass(frozen=True)
class Facts:
    """What training costs depend on."""

    name: str
    shape: Shape
    hflip: float
    train_images: int
    assumed: bool = False  # nobody has counted: as many as ImageNet's


def _counted(source: DataSource) -> int | None:
    """Training images, of the sources of which params.yaml tells them."""
    match source:
        case Digits():
            return len(digits.contents("digits", source).labels["train"])
        case Fractals():
            return source.classes * source.train_per_class
        case Cifar100():
            return 100 * (500 - max(1, round(source.val_fraction * 500)))
        case Imagenet() | Originals():  # wrong by up to half an image of each class: the validation images are drawn class by class
            return IMAGENET - round(source.val_fraction * IMAGENET)
    return None


def facts(name: str, source: DataSource, folder: Path) -> Facts | None:
    """As the data stage has found them, if ``folder`` holds a data set of this source and size; else as params.yaml tells; else None."""
    written, declared = read_json(folder / "data.json") if (folder / "data.json").is_file() else {}, declared_shape(source)
    if written.get("source") == source.source and written["size"] == declared[2]:
        return Facts(name, (written["classes"], written["channels"], written["size"]), source.hflip, written["counts"]["train"])
    images = _counted(source)
    return None if images is None else Facts(name, declared, source.hflip, images, source.source == "originals")


def imagined(of: Facts) -> DataSet:
    """As many different random images, in equally large classes. They overlap: all of ImageNet's take as little memory as one image."""
    classes, channels, size = of.shape
    noise = generator(0, "imagined").integers(0, 256, size * size * channels + of.train_images, np.uint8)
    shape, strides = (of.train_images, size, size, channels), (1, size * channels, channels, 1)
    images = np.lib.stride_tricks.as_strided(noise, shape, strides, writeable=False)
    split = Split(images, np.arange(of.train_images, dtype=np.int64) % classes)
    names, half = [str(label) for label in range(classes)], (0.5,) * channels
    return DataSet(of.name, classes, names, size, channels, of.hflip, half, half, "", split, split, split)
