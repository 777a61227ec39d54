"""The target class and the others: what DKD and NKD tell apart."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlib.types import Logits


def others_of(logits: Logits, labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch others"]:
    """Each image's logits without that of its label, in the order of the classes. Raises ValueError for fewer than three classes."""
    classes = logits.shape[1]
    others_needed(classes)
    places = torch.arange(classes - 1, device=logits.device)
    return logits.gather(1, places + (places >= labels[:, None]))


def others_needed(classes: int) -> None:
    """Raises ValueError for fewer than three classes: besides the target there is at most one, and nothing to tell apart."""
    if classes < 3:
        raise ValueError(f"found {classes} classes; allowed: 3 or more (without the target nothing is left to tell apart); use kd")
