"""Data sets: each source in its file, all of them written to the same kind of folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdlib.config.schema import DataSource
from kdlib.data.dataset import Content, DataSet, write_dataset
from kdlib.data.sources import cifar100, digits, folder, fractals, imagenet, originals

# A source takes its name in params.yaml and its parameters, checks them against what lies on disk, and offers content.
SOURCES: dict[str, Callable[[str, Any], Content]] = {
    "digits": digits.contents,
    "fractals": fractals.contents,
    "cifar100": cifar100.contents,
    "folder": folder.contents,
    "imagenet": imagenet.contents,
    "originals": originals.contents,
}


def prepare(name: str, params: DataSource, folder: Path, progress: bool = True) -> DataSet:
    """Write the data set folder of ``data.<name>``, all of it or nothing. Raises ``Refused``."""
    return write_dataset(folder, name, params, SOURCES[params.source](name, params), progress)


Shape = tuple[int, int, int]  # classes, channels, size in pixels


def declared_shape(source: DataSource) -> Shape:
    """The shape that params.yaml alone tells. Where it does not tell the classes, many: only their lack is ever refused."""
    if source.source == "digits":
        return 10, 1, 8
    if source.source == "fractals":
        return source.classes, 1, source.size
    return (100, 3, 32) if source.source == "cifar100" else (1000, 3, source.size)
