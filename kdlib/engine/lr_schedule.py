"""The learning rate of every step: a linear warm-up, then a cosine or steps down, by timm's schedulers."""

from typing import Any

from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from kdlib.config.schema import Recipe

FALL = 0.1  # at each milestone, as in the recipes of the literature


def scheduler(optimizer: Optimizer, recipe: Recipe, total_steps: int) -> Scheduler:
    """What ``set_rate`` asks: timm's schedule in steps. The warm-up lies within ``total_steps``: the cosine goes on from where it cuts in.

    A milestone falls on the step nearest to its share of ``total_steps``.
    """
    warmup: dict[str, Any] = {"warmup_t": round(recipe.warmup * total_steps), "warmup_lr_init": recipe.warmup_lr, "t_in_epochs": False}
    if not recipe.milestones:
        return CosineLRScheduler(optimizer, t_initial=total_steps, lr_min=recipe.min_lr, **warmup)
    # + 1: timm's milestones come one early, and half a step in is not yet the next
    falls = [round(share * total_steps) + 1 for share in recipe.milestones]
    return MultiStepLRScheduler(optimizer, decay_t=falls, decay_rate=FALL, warmup_prefix=False, **warmup)


def set_rate(rates: Scheduler, step: int) -> None:
    """Give the optimiser the rate of this step (from 0): that of half a step in, so that neither the first nor the last one is zero."""
    rates.step_update(step + 0.5)  # type: ignore[arg-type]
