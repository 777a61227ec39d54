"""studies/imagenet made small: its own comparisons, architectures and recipes, on a few images of 32 px and for a few steps."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from kdlib import config
from tests import cifar_pickles, jpegs, tiny

STUDY = tiny.ROOT / "studies" / "imagenet"
STEPS = 2
BATCH = 8
GROUP = 4  # images of a mix group, where the recipe has any
SIZE = 32
TRAIN = 36  # images of jpegs.write that are left for training
VAL_FRACTION = 0.25


def content(images: Path, cifar: Path, comparisons: Iterable[str] | None = None, **study: Any) -> dict[str, Any]:
    """The study's params.yaml with the numbers that make it long or large replaced, and of its comparisons these."""
    made: dict[str, Any] = config.read_yaml(STUDY)
    made["study"] |= study
    made["data"]["imagenet"] |= {"path": str(images), "size": SIZE, "val_fraction": VAL_FRACTION, "unreadable": 0.1}
    made["data"]["cifar100"] |= {"path": str(cifar), "val_fraction": 0.5}
    for teacher in made["teachers"].values():
        teacher["min_top1"] = 0.0
    for recipe in made["recipes"].values():
        grouped = GROUP if recipe["group_size"] else None
        recipe |= {"epochs": STEPS * BATCH / TRAIN, "batch_size": BATCH, "group_size": grouped, "warmup": 0.5 if recipe["warmup"] else 0.0}
    made["methods"]["reviewkd"]["mid"] = 16
    if comparisons is not None:
        made["comparisons"] = {name: made["comparisons"][name] for name in comparisons}
        used = {item["teacher"] for item in made["comparisons"].values()}
        made["teachers"] = {name: item for name, item in made["teachers"].items() if name in used}
        its = {item["data"] for item in made["comparisons"].values()}
        made["data"] = {name: item for name, item in made["data"].items() if name in its}
        made["study"]["published"] = {name: row for name, row in made["study"]["published"].items() if name in made["comparisons"]}
    return made


def write_weights(root: Path, made: Mapping[str, Any]) -> None:
    """Files of the teachers' weights, untrained, where params.yaml expects them: a .pth as BEiT's authors wrap them."""
    for number, teacher in enumerate(item for item in made["teachers"].values() if item["checkpoint"]):
        torch.manual_seed(number)
        path = root / teacher["checkpoint"]
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"img_size": SIZE} if teacher["model"].startswith("beit") else {}
        state = timm.create_model(teacher["model"], num_classes=len(jpegs.CLASSES), **options).state_dict()
        if path.suffix == ".pth":
            torch.save({"model": state}, path)
        else:
            save_file(state, path)


def write_cifar(root: Path, patched: pytest.MonkeyPatch) -> Path:
    """CIFAR-100 of four classes; returns ``root``."""
    rng = np.random.default_rng(0)
    counts = {"train": 48, "test": 16}
    parts = {file: (rng.integers(0, 256, (count, 3 * 32 * 32), np.uint8), [i % 4 for i in range(count)]) for file, count in counts.items()}
    return cifar_pickles.write(root, ["apple", "bear", "cup", "dolphin"], parts, patched)
