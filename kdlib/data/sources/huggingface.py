"""A Hugging Face data set that ``save_to_disk`` wrote: where the bytes of each image lie within its Arrow files.

Arrow keeps them as they came, one image after another, so they are read by byte range, as an image of a tar file is, without `datasets`.
"""

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from kdlib.data.paths import check_folder
from kdlib.decoding.shards import StoredImage
from kdlib.errors import Refused, refuse

SPLITS = {"train": ("train",), "val": ("validation", "val")}  # what each part may be called
SAVED = 'a folder that `datasets` saved, with train and validation: load_dataset("PARQUET").save_to_disk("FOLDER")'


def index_arrow(key: str, root: Path) -> tuple[list[str], dict[str, list[StoredImage]]]:
    """List the names of the classes, by number, and the images of train and val. No image is read, and nothing is downloaded.

    Raises ``Refused`` about ``key`` for a folder without such a data set, without one column of images and one of classes, or with a row
    that has no class. An image of no bytes is one that cannot be read.
    """
    datasets = _package()
    check_folder(key, root, SAVED)
    try:
        saved = datasets.load_from_disk(str(root))
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {}
        parts = {part: next(splits[name] for name in names if name in splits) for part, names in SPLITS.items()}
    except StopIteration:
        raise refuse(key, f"{root} with {', '.join(splits) or 'no splits'}", SAVED, "give it both splits") from None
    except (OSError, ValueError, KeyError) as error:
        raise refuse(key, f"{root}: {' '.join(str(error).split())}", SAVED, "correct the path, or save it so once") from error
    columns = [_column(key, parts["train"].features, kind) for kind in (datasets.Image, datasets.ClassLabel)]
    names = parts["train"].features[columns[1]].names
    if parts["val"].features != parts["train"].features:
        raise refuse(key, f"splits of {root} with other columns or classes", "the same in both", "save them again")
    return names, {part: list(_images(key, split, columns, names)) for part, split in parts.items()}


def _package() -> Any:
    try:
        import datasets  # noqa: PLC0415 (takes a second, and is an extra)
    except ImportError as error:
        do = '`pip install -e ".[huggingface]"`'
        raise Refused(f"{error.name}: found no such package; allowed: Hugging Face's datasets and what it needs; {do}") from error
    return datasets


def _column(key: str, features: dict[str, Any], kind: type) -> str:
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        fault = f"{len(names)} columns of kind {kind.__name__} among {', '.join(features)}"
        raise refuse(key, fault, "one of Image and one of ClassLabel", "select_columns, then save_to_disk")
    return names[0]


def _images(key: str, split: Any, columns: list[str], names: list[str]) -> Iterator[StoredImage]:
    for file in (arrow["filename"] for arrow in split.cache_files):
        for row, (path, first, length, label) in enumerate(_rows(file, *columns)):
            if label < 0:
                raise refuse(key, f"{file}: row {row:,} without a class", "a class in every row", "filter it, and save it again")
            yield StoredImage(file, first, length, PurePath(path or f"{row:09}").stem, names[label])


def _rows(file: str, image: str, label: str) -> Iterator[tuple[str | None, int, int, int]]:
    """Yield of each row, in order: its image's name, first byte in the file, number of bytes, and the number of its class."""
    import pyarrow  # noqa: PLC0415 (comes with `datasets`)

    with pyarrow.memory_map(file) as opened:
        whole = opened.read_buffer()
        for batch in pyarrow.ipc.open_stream(whole):
            content = batch.column(image).field("bytes")
            _, ends, data = content.buffers()
            wide = np.int64 if pyarrow.types.is_large_binary(content.type) else np.int32
            ends = np.frombuffer(ends, wide, len(batch) + 1).astype(np.int64)
            firsts = (data.address - whole.address if data else 0) + ends[:-1]
            paths, labels = batch.column(image).field("path").to_pylist(), batch.column(label).fill_null(-1).to_pylist()
            yield from zip(paths, firsts.tolist(), np.diff(ends).tolist(), labels, strict=True)
