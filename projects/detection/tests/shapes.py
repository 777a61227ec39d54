"""A small data set in COCO's format, a study of seconds on it, and the parts of that study."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from ruamel.yaml import YAML
from torch import nn

from kdlib.seed import seed_torch
from projects.detection import backbone, coco, model
from projects.detection.settings import Recipe, Run

CATEGORIES = {3: "rectangle", 7: "ellipse"}  # with gaps, as COCO's 80 have
NET = "test_convnext"
RECIPE: dict[str, Any] = {
    **{"detector": "mask_rcnn", "settings": "assumed", "epochs": 3, "batch_size": 4, "group_size": 2, "optimizer": "adamw"},
    **{"learning_rate": 5e-4, "momentum": 0.9, "weight_decay": 1e-4, "decay_all": False, "layer_decay": 0.9, "layers": 6},
    **{"steps": [2], "warmup_steps": 2, "warmup_start": 0.1, "frozen_stages": 0, "sync_norm": False, "output_norms": True},
    **{"drop_path": 0.1, "loss_scale": 0.0, "short_sides": [64, 96], "long_side": 128, "flip": 0.5, "crop": None, "crop_sides": []},
}


def shrink(set_value: Callable[[object, str, object], object]) -> None:
    """Make detectors that take a hundredth of the work; ``set_value`` is setattr, or a monkeypatch's."""
    set_value(backbone, "CHANNELS", 16)
    set_value(model, "PROPOSALS", dict.fromkeys(model.PROPOSALS, 50))
    set_value(model, "SAMPLES", 16)
    set_value(model, "DETECTIONS", 8)


def write(root: Path, **changes: Any) -> Path:
    """Write images, annotations and params.yaml with one run, ``small``; ``changes`` replace keys of its recipe. Returns ``root``."""
    for split, (count, seed) in {"train": (8, 0), "val": (3, 1)}.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(instances(root / split, count, seed)))
    paths = {f"{split}_{what}": f"{split}{end}" for split in ("train", "val") for what, end in (("images", ""), ("annotations", ".json"))}
    content = {
        "study": {"checkpoint_seconds": 1e6, "workers": 0, "launch": {"processes": 1, "nodes": 1, "rendezvous": None}},
        "coco": paths,
        "recipes": {"tiny": copy.deepcopy(RECIPE) | changes},
        "runs": {"small": {"model": NET, "weights": None, "recipe": "tiny", "beside": "mask_rcnn_1x", "seed": 0}},
    }
    return save(root, content)


def save(root: Path, content: dict[str, Any]) -> Path:
    """Write params.yaml; returns ``root``."""
    with (root / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(content, file)
    return root


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | changes)


def planned(model: str = NET, weights: str | None = None) -> Run:
    """A run as params.yaml describes it."""
    return Run(model=model, weights=weights, recipe="tiny", beside="", seed=0)


def detector(root: Path, **changes: Any) -> nn.Module:
    """An untrained detector; ``changes`` replace its backbone (``model``) and keys of its recipe."""
    seed_torch(0, "init")
    return model.build("runs.small", planned(changes.pop("model", NET)), recipe(**changes), root, len(CATEGORIES))


def split(root: Path, name: str) -> coco.Instances:
    """``train`` or ``val``."""
    return coco.read(f"coco.{name}", root / name, root / f"{name}.json")


def instances(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Images of bright shapes on a dark ground, written to ``folder``, and their annotations: rectangles as polygons, ellipses as run
    lengths; in the first image a crowd, which nobody learns.
    """
    draws = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        width, height = (int(side) for side in draws.integers(64, 97, 2))
        name, picture = f"{number:03}.png", Image.fromarray(draws.integers(0, 60, (height, width, 3), np.uint8))
        images.append({"id": 10 + number, "file_name": name, "width": width, "height": height})
        for category in CATEGORIES if number else [*CATEGORIES, 7]:
            w, h = int(draws.integers(20, width // 2)), int(draws.integers(20, 45))
            left = 0 if category == 3 else width // 2  # apart from each other
            x, y = left + int(draws.integers(0, width // 2 - w + 1)), int(draws.integers(0, height - h))
            mask = Image.new("1", (width, height))
            draw = ImageDraw.Draw(mask)
            (draw.rectangle if category == 3 else draw.ellipse)((x, y, x + w - 1, y + h - 1), fill=1)
            lengths = rle.encode(np.asfortranarray(np.array(mask, np.uint8)))
            crowd = int(number == 0 and len(annotations) == 2)
            if not crowd:
                picture.paste((230, 80, 40) if category == 3 else (40, 120, 240), mask=mask)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + number,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": int(rle.area(lengths)),
                    "iscrowd": crowd,
                    "segmentation": polygon if category == 3 else {"size": lengths["size"], "counts": lengths["counts"].decode()},
                }
            )
        picture.save(folder / name)
    return {"images": images, "annotations": annotations, "categories": [{"id": key, "name": name} for key, name in CATEGORIES.items()]}
