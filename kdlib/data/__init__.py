"""Data sets: each source in its file, all of them written to the same kind of folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdlib import config
from kdlib.data import cifar100, digits, folder, fractals, imagenet, listing
from kdlib.data.splits import Content, DataSet, write

# A source takes its name in params.yaml and its parameters, checks them against what lies on disk, and offers content.
SOURCES: dict[str, Callable[[str, Any], Content]] = {
    "digits": digits.contents,
    "fractals": fractals.contents,
    "cifar100": cifar100.contents,
    "folder": folder.contents,
    "imagenet": imagenet.contents,
    "originals": listing.contents,
}


def prepare(name: str, params: config.DataSource, folder: Path, progress: bool = True) -> DataSet:
    """Make the data set folder ``folder`` of ``data.<name>``, all of it or nothing. Raises ``Refused``."""
    return write(folder, name, params, SOURCES[params.source](name, params), progress)
