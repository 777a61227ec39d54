"""The target class and the others: what DKD and NKD tell apart."""

import torch
from jaxtyping import Int
from torch import Tensor

from kdlib.types import Logits


def others_of(logits: Logits, labels: Int[Tensor, " batch"]) -> Logits:
    """The logits, with that of each image's label so low that it has no part in their softmax, which is that of the other classes.

    The low logit is finite, so that the label's share of a divergence is 0 (0 times a number, the difference of two equal ones), but
    nothing that is divided by a small temperature: divide before. To leave the class out by ``gather`` costs DKD three times the time.
    Raises ValueError for fewer than three classes.
    """
    others_needed(logits.shape[1])
    return logits.scatter(1, labels[:, None], torch.finfo(logits.dtype).min / 2)


def others_needed(classes: int) -> None:
    """Raises ValueError for fewer than three classes: besides the target there is at most one, and nothing to tell apart."""
    if classes < 3:
        raise ValueError(f"found {classes} classes; allowed: 3 or more (without the target nothing is left to tell apart); use kd")
