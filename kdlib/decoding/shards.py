"""The index of a webdataset shard: a tar file in which the parts of a sample follow each other, named ``<key>.<kind>``."""

import tarfile
from collections.abc import Collection
from typing import NamedTuple

from kdlib.decoding.pixels import Changed


class Member(NamedTuple):
    """An image of a shard. ``label``: the text of the sample's .cls; without one, the folder that the image lies in within the tar."""

    key: str
    first: int
    length: int
    label: str


def index_shard(shard: str, extensions: Collection[str]) -> list[Member]:
    """List every image of a shard, in its order; none is read. Raises ``Changed`` unless it is a whole tar file with classes as text."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")  # `tar -cf SHARD .` writes ./
                stem, _, kind = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile() or not stem:
                    continue
                if f".{kind.lower()}" in extensions:
                    images[key] = (member.offset_data, member.size)
                elif kind == "cls" and (part := tar.extractfile(member)):
                    labels[key] = part.read().decode().strip()
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise Changed(f"{shard}: {' '.join(str(error).split())}") from error
    return [Member(key, first, length, labels.get(key) or key.rpartition("/")[0]) for key, (first, length) in images.items()]
