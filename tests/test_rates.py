"""The learning rate of every step: the paper's schedules at ImageNet's real length, the refusals, and what it was before it had keys."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from kdlib import config
from kdlib.config.schema import Recipe
from kdlib.engine.lr_schedule import scheduler, set_rate
from kdlib.engine.setting import total_steps
from kdlib.losses.fitnet import FitNet
from kdlib.models.build import build
from kdlib.study.training.experiment import Experiment
from kdlib.types import Setup
from tests import published_recipes, tiny, training
from tests.published_recipes import IMAGES, PREVIOUS, STRONG
from tests.refusals import change, refused


def sgd(rate: float) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)


def rates(recipe: Recipe, total: int) -> Callable[[int], float]:
    """The rate of each step."""
    optimizer = sgd(recipe.learning_rate)
    made = scheduler(optimizer, recipe, total)

    def rate(step: int) -> float:
        set_rate(made, step)
        return float(optimizer.param_groups[0]["lr"])

    return rate


def between(rate: Callable[[int], float], place: float, total: int) -> float:
    """The rate at a place between the middles of two steps, or half a step outside of the first or the last."""
    step = min(max(math.floor(place - 0.5), 0), total - 2)
    return rate(step) + (rate(step + 1) - rate(step)) * (place - 0.5 - step)


# The paper's schedules


@pytest.mark.parametrize("strategy", STRONG)
def test_at_every_epochs_end_a_strong_recipe_has_the_rate_of_the_official_script(strategy: str) -> None:
    """That one asks timm's cosine once per epoch and holds the rate until the next; ours moves on from the one to the other meanwhile."""
    recipe = published_recipes.strong(strategy)
    epochs, top, low, warmup = int(recipe.epochs), 5e-3, 1e-6, 5
    optimizer = sgd(top)
    official = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=low, warmup_t=warmup, warmup_lr_init=low)
    total = total_steps(recipe, IMAGES["imagenet"])
    assert total == {"A1": 375_342, "A2": 187_671}[strategy]
    rate = rates(recipe, total)
    held = []
    for epoch in range(epochs + 1):
        official.step(epoch)
        held.append(optimizer.param_groups[0]["lr"])
        cosine = low + (top - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        assert held[-1] == pytest.approx(low + (top - low) * epoch / warmup if epoch < warmup else cosine, rel=1e-12)
        # the warm-up ends with a whole step; of the two at its end one lies on the warm-up and one on the cosine, which begins lower
        close = 5e-4 if epoch == warmup else 1e-4
        assert between(rate, epoch * IMAGES["imagenet"] / recipe.batch_size, total) == pytest.approx(held[-1], rel=close), epoch
    middles = [rate(round((epoch + 0.5) * IMAGES["imagenet"] / recipe.batch_size)) for epoch in range(epochs)]
    assert all(min(pair) < middle < max(pair) for pair, middle in zip(itertools.pairwise(held), middles, strict=True))
    assert max(middles) <= max(held) <= top


@pytest.mark.parametrize("strategy", PREVIOUS)
def test_the_previous_recipes_fall_to_a_tenth_with_their_epochs(strategy: str) -> None:
    """Against torch's own schedule by epochs: in every step that lies wholly within an epoch the rate is that of this epoch."""
    recipe, images = published_recipes.previous(strategy), IMAGES[PREVIOUS[strategy]]
    epochs = int(recipe.epochs)
    assert (recipe.learning_rate, epochs, recipe.batch_size) == {"imagenet": (0.2, 100, 512), "cifar100": (0.05, 240, 64)}[
        PREVIOUS[strategy]
    ]
    milestones = {"imagenet": [30, 60, 90], "cifar100": [150, 180, 210]}[PREVIOUS[strategy]]
    optimizer = sgd(recipe.learning_rate)
    official = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    rate = rates(recipe, total_steps(recipe, images))
    for epoch in range(epochs):
        held = optimizer.param_groups[0]["lr"]
        first, last = math.ceil(epoch * images / recipe.batch_size), math.floor((epoch + 1) * images / recipe.batch_size) - 1
        assert [rate(first), rate(last)] == pytest.approx([held, held], rel=1e-12), epoch
        optimizer.step()
        official.step()
    assert held == pytest.approx(recipe.learning_rate / 1000)


# Every step


def plainly(recipe: Recipe, total: int) -> list[float]:
    """The rates written out, half a step in: a warm-up in whole steps, then the cosine or the milestones."""
    top, low, start, warmup = recipe.learning_rate, recipe.min_lr, recipe.warmup_lr, round(recipe.warmup * total)
    found = []
    for place in np.arange(total) + 0.5:
        if place < warmup:
            found.append(start + (top - start) * place / warmup)
        elif recipe.milestones:
            found.append(top / 10 ** sum(place > round(share * total) for share in recipe.milestones))
        else:
            found.append(low + (top - low) * (1 + math.cos(math.pi * place / total)) / 2)
    return found


@pytest.mark.parametrize("total", [1, 2, 7, 60, 333])
@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": 0.2, "warmup_lr": 0.01, "min_lr": 0.001},
        {"warmup": 0.0, "min_lr": 0.02},
        {"warmup": 0.1, "warmup_lr": 0.01, "milestones": [0.3, 0.6, 0.9]},
        {"warmup": 0.0, "milestones": [0.5]},
    ],
)
def test_every_rate_is_as_written_out(changes: dict[str, object], total: int) -> None:
    recipe = training.recipe(learning_rate=0.1, **changes)
    rate = rates(recipe, total)
    assert [rate(step) for step in range(total)] == pytest.approx(plainly(recipe, total), rel=1e-12)


@pytest.mark.parametrize("study", [tiny.ROOT, tiny.ROOT / "studies" / "methods"], ids=["default", "methods"])
def test_without_the_new_keys_every_rate_is_bit_for_bit_the_old_one(study: Path) -> None:
    """A linear warm-up from 0, then a cosine to 0: what the committed results were trained with."""
    for recipe in config.load(study).recipes.values():
        assert (recipe.warmup_lr, recipe.min_lr, recipe.milestones) == (0, 0, [])
        for total in (100, 563, 1407):
            rate, top, warmup = rates(recipe, total), recipe.learning_rate, round(recipe.warmup * total)
            for step in range(total):
                place = step + 0.5
                old = place * (top / warmup) if place < warmup else 0.5 * top * (1 + math.cos(math.pi * place / total))
                assert rate(step) == old


def test_a_learner_gives_all_its_groups_the_rate() -> None:
    """The adapter's too, from the first step to the last."""
    recipe = training.recipe(optimizer="lamb", learning_rate=0.1, warmup=0.2, warmup_lr=0.01, milestones=[0.5, 0.9], drop_path=0.0)
    among = training.setting()
    student, method = build(training.NET, 6, 1, 8), FitNet(hard_weight=1.0, weight=1.0, stage=1.0)
    method.adapt(Setup(student.shape, among.teacher.shape, torch.arange(96) % 6))
    learner = training.learner("fitnet", student, method, recipe, total_steps=10, seed=0)
    assert len(learner.optimizer.param_groups) == 4  # decayed or not, of the student and of its adapter
    for expected in plainly(recipe, 10):
        for parameter in (*student.parameters(), *method.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        learner.advance()
        assert [group["lr"] for group in learner.optimizer.param_groups] == pytest.approx([expected] * 4, rel=1e-12)


# What is refused


@pytest.mark.parametrize(
    ("changes", "key", "parts"),
    [
        ({"warmup_lr": 0.2}, "warmup_lr", ("found 0.2", "at most the learning_rate, 0.1")),
        ({"min_lr": 0.2}, "min_lr", ("found 0.2", "at most the learning_rate, 0.1")),
        ({"milestones": [0.6, 0.3]}, "milestones", ("found [0.6, 0.3]", "rising", "sort them")),
        ({"milestones": [0.3, 0.3]}, "milestones", ("found [0.3, 0.3]", "rising")),
        ({"milestones": [0.05]}, "milestones", ("found [0.05]", "none within the warm-up (0.1)")),
        ({"milestones": [0.5], "min_lr": 0.01}, "min_lr", ("found 0.01", "0 with milestones")),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, object], key: str, parts: Sequence[str]) -> None:
    content = tiny.content()
    for name, value in changes.items():
        content = change(content, f"recipes.weak.{name}", value)
    with refused(f"recipes.weak.{key}", *parts):
        Experiment(tiny.write(tmp_path, content))
