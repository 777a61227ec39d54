"""A study of seconds: every kind of stage, comparison and sweep, on images of 8 px."""

import copy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from kdlib import config

ROOT = Path(__file__).parents[1]

_PLAIN: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 16,
    "group_size": None,
    "repeats": 1,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.0005,
    "clip_norm": 0.0,
    "warmup": 0.1,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
    "milestones": [],
    "ema": [],
    "hard_loss": "ce",
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "crop_padding": 0.125,
    "crop_min_area": 1.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "randaugment": {"operations": 0, "magnitude": 0, "magnitude_std": 0},
    "erasing": 0.0,
    "augment": "batched",
}
_STRONG = _PLAIN | {
    "hard_loss": "bce",
    "drop_path": 0.1,
    "crop_min_area": 0.5,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "randaugment": {"operations": 2, "magnitude": 7, "magnitude_std": 0.5},
}
_STUDENT = {"data": "fractals", "subset_seed": None, "teacher": "small", "student": "kd_resnet8_w8_s1"}

_CONTENT: dict[str, Any] = {
    "study": {
        "seeds": [0, 1],
        "baseline": "kd",
        "challengers": ["dkd", "dist"],
        "confidence": 0.95,
        "on_divergence": "continue",
        "missing": "fail",
        "checkpoint_seconds": 0,
        "answers_gb": 1.0,
        "compute": {"precision": "auto", "compile": "auto", "resident": "auto", "ahead": "auto"},
        "launch": {"processes": 1, "nodes": 1, "rendezvous": None},
        "tables": ["data_scale", "recipes", "tuning", "cost", "measures"],
        "headline": {"data": "fractals", "recipes": ["weak", "strong"]},
        "published": {},
    },
    "data": {
        "fractals": {
            "source": "fractals",
            "classes": 6,
            "train_per_class": 16,
            "val_per_class": 4,
            "test_per_class": 4,
            "size": 8,
            "jitter": 0.2,
            "points": 100,
            "seed": 0,
            "hflip": 0.5,
        }
    },
    "teachers": {
        "small": {
            "data": "fractals",
            "model": "kd_resnet8_w8_s1",
            "size": None,
            "recipe": "weak",
            "seed": 0,
            "checkpoint": None,
            "min_top1": 0.0,
        }
    },
    "recipes": {"weak": _PLAIN, "strong": _STRONG},
    "methods": config.read_yaml(ROOT)["methods"],  # all of them, as the default study has them
    "comparisons": {
        "small_weak": _STUDENT | {"fraction": 0.5, "recipe": "weak", "methods": ["no_kd", "kd", "dkd", "dist"], "sweep": None},
        "large_strong": _STUDENT | {"fraction": 1.0, "recipe": "strong", "methods": ["kd", "dkd"], "sweep": None},
        "tuned": _STUDENT
        | {
            "fraction": 0.5,
            "recipe": "weak",
            "methods": [],
            "sweep": {"seed": 7, "grids": {"kd": {"temperature": [1, 2]}, "dkd": {"beta": [1, 2]}}},
        },
    },
}


def content() -> dict[str, Any]:
    """A params.yaml that can be changed at will."""
    return copy.deepcopy(_CONTENT)


def methods() -> dict[str, Any]:
    """The same for studies/methods: every method at two scales, and three hard labels. Its ``small`` is the other's ``small_weak``."""
    made = content()
    kept = config.read_yaml(ROOT / "studies" / "methods")
    made["study"] |= {key: kept["study"][key] for key in ("challengers", "tables", "headline")}
    made["methods"] = kept["methods"]
    made["recipes"] = {"weak": _PLAIN, "short": _PLAIN} | {f"short_{loss}": _PLAIN | {"hard_loss": loss} for loss in ("bce", "none")}
    made["comparisons"] = {name: item | _STUDENT for name, item in kept["comparisons"].items()}
    made["comparisons"]["small"] |= {"fraction": 0.5}
    return made


def write(folder: Path, changed: dict[str, Any] | None = None) -> Path:
    """Write it to ``folder``/params.yaml; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False  # DVC's parser takes a colon between braces for a key's
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(changed or content(), file)
    return folder
