"""ImageNet-1k's validation images and the sets that others made for its classes: which files, and which answers are right.

Folders as their authors pack them: ``<wnid>/`` for imagenet, real, sketch (1,000 classes), a and r (200 of them); ``0/`` to ``999/``
for v2.
Sources: ImageNet-V2 arXiv 1902.10811, ReaL 2006.07159, -A 1907.07174, -R 2006.16241, -Sketch 1905.13549.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo

from kdlib.data.sources.folder import list_images
from kdlib.errors import known, refuse, some

Answers = tuple[int, ...]  # classes that are right for one image

SETS = ("imagenet", "real", "v2", "a", "r", "sketch")
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")  # of a validation image, from 1


@dataclass(frozen=True)
class EvaluationSet:
    """Image files, the right answers to each, and the classes whose logits count, all as numbers of ImageNet-1k's classes."""

    name: str
    files: list[str]
    answers: list[Answers]
    classes: list[int]


def open_set(name: str, folder: Path, real_labels: Path | None = None) -> EvaluationSet:
    """The set ``name`` of ``SETS`` in ``folder``; for imagenet and real, ``folder`` may also hold it as val/.

    ``real_labels``: ReaL's real.json; None: timm's copy of it. Raises ``Refused`` for a folder that is none of this set.
    """
    key = f"--data {known('--data', name, SETS)}"
    if name == "v2":
        return by_folder(name, folder, {str(label): label for label in range(1000)})
    number = {wnid: label for label, wnid in enumerate(ImageNetInfo().label_names())}
    if name in ("a", "r"):
        return by_folder(name, folder, {wnid: number[wnid] for wnid in _packed(f"imagenet_{name}_synsets.txt").split()})
    if name == "sketch":
        return by_folder(name, folder, number)
    images = by_folder(name, folder / "val" if (folder / "val").is_dir() else folder, number)
    return images if name == "imagenet" else reassessed(key, images, _real(real_labels))


def by_folder(name: str, folder: Path, number: Mapping[str, int]) -> EvaluationSet:
    """One right answer to each image: the class of its folder. ``number``: of every class that the set has, by its folder's name.

    Raises ``Refused`` where folders are missing, unexpected or without images.
    """
    key = f"--data {name}"
    folders, files, labels = list_images(key, folder)
    missing, odd = (sorted(names) for names in (number.keys() - set(folders), set(folders) - number.keys()))
    if missing or odd:
        parts = [f"{len(names)} {word} ({some(names)})" for word, names in (("missing", missing), ("unexpected", odd)) if names]
        allowed = f"one folder for each of {len(number):,} classes, {min(number)} to {max(number)}"
        raise refuse(key, str(folder), allowed, f"choose the folder of this set ({', '.join(parts)})")
    return EvaluationSet(name, files, [(number[folders[label]],) for label in labels.tolist()], sorted(number.values()))


def reassessed(key: str, images: EvaluationSet, real: Sequence[Answers]) -> EvaluationSet:
    """The same images with the answers of ``real``, which has a tuple per validation image, by number; those with none are left out.

    Raises ``Refused`` for a file that is no numbered validation image, or whose number has no entry.
    """
    answers: dict[str, Answers] = {}
    for file in images.files:
        named = _NUMBER.fullmatch(Path(file).name)
        if named is None or not 1 <= int(named[1]) <= len(real):
            allowed = f"validation images ILSVRC2012_val_00000001 to {len(real):08d}, as ReaL numbers them"
            raise refuse(key, file, allowed, "restore the names of the files, or give the labels that belong to them")
        answers[file] = real[int(named[1]) - 1]
    kept = [file for file in images.files if answers[file]]
    return replace(images, files=kept, answers=[answers[file] for file in kept])


def parse_real(key: str, content: Any) -> list[Answers]:
    """ReaL's labels out of its JSON: a list of classes per image; ``[]``, NaN or null where it has none. Raises ``Refused``."""
    if not isinstance(content, list):
        allowed = "a list with a list of classes for every validation image"
        raise refuse(key, f"a {type(content).__name__}", allowed, "give ReaL's real.json")
    answers = []
    for number, entry in enumerate(content, 1):
        labels = [] if entry is None or (isinstance(entry, float) and math.isnan(entry)) else entry
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 1000 for label in labels):
            raise refuse(key, f"{entry!r} of image {number}", "a list of classes, 0 to 999", "give ReaL's real.json")
        answers.append(tuple(labels))
    return answers


def _real(path: Path | None) -> list[Answers]:
    key = "--real-labels"
    try:
        return parse_real(key, json.loads(_packed("imagenet_real_labels.json") if path is None else path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refuse(key, f"{path}: {error}", "a JSON file that can be read", "give ReaL's real.json") from error


def _packed(name: str) -> str:
    """A list that timm brings along."""
    return (resources.files("timm.data") / "_info" / name).read_text("utf-8")
