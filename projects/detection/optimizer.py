"""The optimiser of a detector: which parameter learns how fast, and when."""

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from projects.detection.settings import Recipe

_STAGE = re.compile(r"backbone\.net\.stages\.(\d+)\.(?:blocks\.(\d+)|downsample)")  # timm's ConvNeXt
BLOCKS = 3  # of the third stage that make a layer


def layer_of(name: str, layers: int) -> int:
    """The layer of a ConvNeXt's parameter: 0 the stem, 1 and 2 the first stages, each three blocks of the third stage one, ``layers`` the
    last stage, and one more for all that was not pre-trained.

    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022, appendix A.3, and its official code for detection.
    """
    if name.startswith("backbone.net.stem"):
        return 0
    match = _STAGE.match(name)
    if not match:
        return layers + 1
    stage, block = int(match[1]), int(match[2] or 0)
    return stage + 1 if stage < 2 else 3 + block // BLOCKS if stage == 2 else layers


def parameter_groups(detector: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimisers; ``scale`` is what the learning rate of a group is multiplied with."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            layers = recipe.layers or 0
            scale = recipe.layer_decay ** (layers + 1 - layer_of(name, layers)) if recipe.layer_decay < 1 else 1.0
            decays = recipe.decay_all or parameter.ndim > 1
            groups[scale, recipe.weight_decay if decays else 0.0].append(parameter)
    return [{"params": parameters, "scale": scale, "weight_decay": decay} for (scale, decay), parameters in groups.items()]


def optimizer(detector: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = parameter_groups(detector, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999))


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, from 0: a tenth after each of ``recipe.steps`` epochs, times a warm-up that is linear in steps."""
    rate = recipe.learning_rate * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in recipe.steps)
    if step >= recipe.warmup_steps:
        return rate
    return rate * (recipe.warmup_start + (1 - recipe.warmup_start) * step / recipe.warmup_steps)
