"""The index of a webdataset shard: a tar file in which the parts of a sample follow each other, named ``<key>.<kind>``."""

import tarfile
from collections.abc import Collection
from typing import NamedTuple

from kdlib.decoding.pixels import Changed


class StoredImage(NamedTuple):
    """An image as its storage lists it, before anyone has looked at it."""

    file: str
    first: int
    length: int | None  # None: to the end of the file
    name: str  # without its extension
    kind: str  # its class's name or number


def index_shard(shard: str, extensions: Collection[str]) -> list[StoredImage]:
    """List every image of a shard, in its order; none is read. Raises ``Changed`` unless it is a whole tar file with classes as text.

    Its class: the text of the sample's .cls; without one, the folder that the image lies in within the tar.
    """
    images: dict[tuple[str, str], tuple[int, int]] = {}  # by folder and name
    labels: dict[tuple[str, str], str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")  # `tar -cf SHARD .` writes ./
                stem, _, kind = name.partition(".")
                key = folder, stem
                if not member.isfile() or not stem:
                    continue
                if f".{kind.lower()}" in extensions:
                    images[key] = (member.offset_data, member.size)
                elif kind == "cls" and (part := tar.extractfile(member)):
                    labels[key] = part.read().decode().strip()
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise Changed(f"{shard}: {' '.join(str(error).split())}") from error
    return [StoredImage(shard, *where, name, labels.get((folder, name)) or folder) for (folder, name), where in images.items()]
