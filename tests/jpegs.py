"""A folder laid out as ImageNet is, of small images of every odd kind that is found there, and the same as shards."""

import io
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageFilter

CLASSES = ("n01440764", "n01443537", "n02007558", "n03000134")
TRAIN, VAL = 12, 6  # images of each class
BROKEN = {  # what is left out, below train/ or val/, with a word of the reason
    "train/n01440764/n01440764_900.JPEG": "truncated",
    "train/n01443537/n01443537_901.JPEG": "not an image",
    "val/n02007558/n02007558_902.JPEG": "not an image",
}


def picture(seed: int, height: int, width: int, channels: int = 3) -> Image.Image:
    """Blurred noise: detail on every scale that a JPEG keeps, no two alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), channels), np.uint8).repeat(4, 0).repeat(4, 1)
    return Image.fromarray(coarse[:height, :width].squeeze()).filter(ImageFilter.GaussianBlur(1))


def write(root: Path) -> Path:
    """``CLASSES`` x (``TRAIN``, ``VAL``) readable images and the ``BROKEN`` ones; returns ``root``."""
    for part, count in (("train", TRAIN), ("val", VAL)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed = 1000 * label + number + 500 * (part == "val")
                sides = np.random.default_rng(seed).integers(20, 90, 2).tolist()
                _save(folder / f"{name}_{number:03}.JPEG", seed, sides, number)
    whole = (root / "train/n01440764/n01440764_001.JPEG").read_bytes()
    for name, content in zip(BROKEN, (whole[: len(whole) // 2], b"no image", b""), strict=True):
        (root / name).write_bytes(content)
    return root


def _save(path: Path, seed: int, sides: list[int], number: int) -> None:
    """The first of each class are odd."""
    height, width = sides
    if number == 0:
        picture(seed, height, width, 1).save(path, quality=90)
    elif number == 1:
        picture(seed, height, width).convert("CMYK").save(path, quality=90)
    elif number == 2:
        picture(seed, 1600, 900).save(path, quality=80)
    elif number == 3:
        picture(seed, height, 1).save(path, quality=90)
    elif number == 4:  # named as one, but a PNG, as ImageNet has it
        picture(seed, height, width).convert("P").save(path, "PNG")
    elif number == 5:
        turned = Image.Exif()
        turned[0x0112] = 6
        picture(seed, height, width).save(path, quality=90, exif=turned)
    else:
        picture(seed, height, width).save(path, quality=90, progressive=number % 2 == 0)


def to_shards(root: Path, to: Path, numbered: bool = True, shards: int = 3) -> Path:
    """The images of an ImageNet folder dealt out to webdataset's tar files, with .cls or in folders of their classes; returns ``to``."""
    for part in ("train", "val"):
        (to / part).mkdir(parents=True)
        files = sorted((root / part).rglob("*.JPEG"))
        for shard in range(shards):
            with tarfile.open(to / part / f"imagenet-{part}-{shard:04}.tar", "w") as tar:
                for file in files[shard::shards]:
                    _add(tar, file, numbered)
    return to


def _add(tar: tarfile.TarFile, file: Path, numbered: bool) -> None:
    name = file.parent.name
    key = file.stem if numbered else f"{name}/{file.stem}"
    parts: Iterable[tuple[str, bytes]] = [("jpg", file.read_bytes()), ("json", b"{}")]
    if numbered:
        parts = [("cls", str(CLASSES.index(name)).encode()), *parts]
    for kind, content in parts:
        about = tarfile.TarInfo(f"{key}.{kind}")
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))


def to_arrow(root: Path, to: Path, val: str = "validation", columns: Mapping[str, str] | None = None) -> Path:
    """The same as Hugging Face's `datasets` saves it, two files for each split; ``columns``: other names of image and label."""
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    splits = {}
    for part, name in (("train", "train"), ("val", val)):
        files = sorted((root / part).rglob("*.JPEG"))
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [file.parent.name for file in files],
        }
        splits[name] = datasets.Dataset.from_dict(rows, kinds).rename_columns(dict(columns or {}))
    datasets.DatasetDict(splits).save_to_disk(str(to), num_shards=dict.fromkeys(splits, 2))
    return to


def entry(path: Path | str, **changes: object) -> dict[str, object]:
    """Of params.yaml's data: folders of originals, views of 16 px."""
    made = {"source": "originals", "path": str(path), "stored": "folders", "class_map": None, "size": 16, "crop_pct": 0.95}
    return made | {"unreadable": 0.1, "val_fraction": 0.25, "seed": 0, "hflip": 0.5} | changes


def class_map(file: Path, names: Iterable[str] = CLASSES) -> Path:
    file.write_text("".join(f"{name}\n" for name in names))
    return file


def copied(root: Path, to: Path) -> Path:
    """One to spoil."""
    shutil.copytree(root, to)
    return to
