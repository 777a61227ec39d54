"""The paper's training recipes, read from results/published/recipes.csv (the official commands, checked) in the terms of params.yaml."""

import csv
import re
from typing import Any

from kdlib.config.schema import RandAugmentParams, Recipe
from tests import tiny

IMAGES = {"imagenet": 1_281_167, "cifar100": 50_000}  # of the training split, all of which the paper trains on
STRONG = ("A1", "A2")
PREVIOUS = {  # of which data set
    "previous recipe (DKD original, ImageNet R34-R18)": "imagenet",
    "previous recipe (DKD original, CIFAR-100 res56-res20)": "cifar100",
}
_CONFIG = re.compile(r"SGD (\d+) ep, bs (\d+), lr ([\d.]+), /10 at ([\d/]+), wd (\S+), momentum 0.9;.*")


def words(strategy: str) -> dict[str, str]:
    """The first word of each value, by parameter: the rest says where it is from."""
    with (tiny.ROOT / "results" / "published" / "recipes.csv").open(encoding="utf-8", newline="") as file:
        return {row["parameter"]: row["value"].split()[0] for row in csv.DictReader(file) if row["strategy"] == strategy}


def strong(strategy: str, **changes: Any) -> Recipe:
    """A1 or A2, with some changes."""
    found = words(strategy)
    numbers = {name: float(word) for name, word in found.items() if re.fullmatch(r"[\d.]+(e-?\d+)?", word)}
    policy = re.fullmatch(r"rand-m(\d+)-mstd([\d.]+)", found["randaugment"])
    assert policy
    recipe = Recipe(
        epochs=numbers["epochs"],
        batch_size=int(numbers["total_batch_size"]),
        group_size=int(numbers["batch_size_per_gpu"]),
        repeats=int(numbers["aug_repeats"]),
        optimizer=found["optimizer"].lower(),
        learning_rate=numbers["lr"],
        weight_decay=numbers["weight_decay"],
        clip_norm=0.0,
        warmup=numbers["warmup_epochs"] / numbers["epochs"],
        warmup_lr=numbers["warmup_lr"],
        min_lr=numbers["min_lr"],
        milestones=[],
        ema=[],
        hard_loss=found["hard_label_loss_logit_KD"].lower(),
        label_smoothing=numbers["label_smoothing"],
        drop_path=numbers["drop_path_student"],
        crop_padding=0.0,
        crop_min_area=float(found["rrc_scale"].partition("-")[0]),
        mixup_alpha=numbers["mixup_alpha"],
        cutmix_alpha=numbers["cutmix_alpha"],
        randaugment=RandAugmentParams(operations=2, magnitude=float(policy[1]), magnitude_std=float(policy[2])),
        erasing=numbers["random_erasing"],
        augment="timm",
    )
    return Recipe.model_validate(recipe.model_dump() | changes)


def previous(strategy: str) -> Recipe:
    """Of the schedule and the optimiser's numbers; what views look like is not in the table."""
    with (tiny.ROOT / "results" / "published" / "recipes.csv").open(encoding="utf-8", newline="") as file:
        (text,) = (row["value"] for row in csv.DictReader(file) if row["strategy"] == strategy)
    config = _CONFIG.fullmatch(text)
    assert config
    epochs, batch, rate, milestones, decay = config.groups()
    schedule = {"epochs": float(epochs), "warmup": 0.0, "milestones": [int(epoch) / int(epochs) for epoch in milestones.split("/")]}
    sgd = {"optimizer": "sgd", "batch_size": int(batch), "learning_rate": float(rate), "weight_decay": float(decay)}
    return Recipe.model_validate(tiny.content()["recipes"]["weak"] | schedule | sgd)
