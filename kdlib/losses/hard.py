"""The loss on the hard label, which mixup, cutmix and smoothing make soft: timm's losses, in full precision."""

import torch
from jaxtyping import Float
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

from kdlib.losses.base import HardLoss, full
from kdlib.types import Logits

_CE = SoftTargetCrossEntropy()
_BCE = BinaryCrossEntropy(smoothing=0.0)  # the view stream smooths; timm's default of .1 is for integer labels


def ce(logits: Logits, targets: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """- sum_c target_c log softmax(logits)_c: sum over classes, mean over the batch, in nats."""
    return _exact(_CE, logits, targets)


def bce(logits: Logits, targets: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of sigmoid(logits)_c with target_c: mean over batch *and classes*, so about C times smaller than ``ce``.

    No threshold: a mixed image's targets stay soft. Source: timm's BinaryCrossEntropy as the official VanillaKD commands use it.
    """
    return _exact(_BCE, logits, targets)


def _exact(loss: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        value: Tensor = loss(full(logits), full(targets))
    return value


HARD: dict[str, HardLoss | None] = {"ce": ce, "bce": bce, "none": None}
