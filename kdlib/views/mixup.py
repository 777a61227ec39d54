"""Mixup and cutmix of a whole batch with its mirror image, with timm's semantics: one weight (or box) per batch, targets mixed alike."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlib.config.schema import Recipe
from kdlib.types import Images

SWITCH = 0.5  # probability of cutmix where both are on (timm's default)


def mix_groups(recipe: Recipe) -> int:
    """The number of mix groups of a batch: the parts that are mixed, and normalised by BatchNorm, each by itself."""
    return recipe.batch_size // (recipe.group_size or recipe.batch_size)


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed: image i keeps ``share`` of itself and takes the rest from image B - 1 - i, as a blend or as a box."""

    share: float
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right


def draw_mix(rng: np.random.Generator, recipe: Recipe, height: int, width: int) -> Mix:
    """Draw the mixing of one batch; the weight is from Beta(alpha, alpha).

    Sources: mixup, arXiv 1710.09412, section 2; cutmix, arXiv 1905.04899, section 3.1; the switch between them: timm.
    """
    if not recipe.mixup_alpha and not recipe.cutmix_alpha:
        return Mix(1.0)
    cut = rng.random() < SWITCH if recipe.mixup_alpha and recipe.cutmix_alpha else bool(recipe.cutmix_alpha)
    alpha = recipe.cutmix_alpha if cut else recipe.mixup_alpha
    share = float(rng.beta(alpha, alpha))
    return cutmix(share, int(rng.integers(height)), int(rng.integers(width)), height, width) if cut else Mix(share)


def cutmix(share: float, row: int, column: int, height: int, width: int) -> Mix:
    """Box of area 1 - ``share`` around (row, column), cut off at the border; the share is then corrected to the pixels really kept.

    Source: arXiv 1905.04899, equation 2.
    """
    side = (1 - share) ** 0.5
    high, wide = int(height * side), int(width * side)
    top, bottom = max(row - high // 2, 0), min(row + (high + 1) // 2, height)
    left, right = max(column - wide // 2, 0), min(column + (wide + 1) // 2, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(batch: Images, mix: Mix) -> Images:
    """Mix each image with that at the mirrored position in the batch."""
    if mix.share == 1:
        return batch
    if mix.box is None:
        return batch.flip(0).lerp_(batch, mix.share)  # as a new tensor, grey images would get other strides: compiled again for these
    top, bottom, left, right = mix.box
    mixed = batch.clone(memory_format=torch.channels_last)
    mixed[:, :, top:bottom, left:right] = batch.flip(0)[:, :, top:bottom, left:right]
    return mixed


def mix_targets(labels: Int[Tensor, " batch"], classes: int, smoothing: float, mix: Mix) -> Float[Tensor, "batch classes"]:
    """Mix the targets, as probabilities: ``smoothing`` is spread over all classes, the rest goes to the two labels by their shares."""
    hard = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    hard.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    return hard if mix.share == 1 else torch.lerp(hard.flip(0), hard, mix.share)


def majority_labels(labels: Int[Tensor, " batch"], mix: Mix) -> Int[Tensor, " batch"]:
    """The label with the larger share; the image's own where they are equal."""
    return labels if mix.share >= 1 - mix.share else labels.flip(0)
