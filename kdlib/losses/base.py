"""What holds for every method: full precision, a teacher without gradient, the hard label's weight, checked parameters."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlib.types import Batch, Output, Terms


def positive(name: str, value: float) -> float:
    """``value`` if it is finite and > 0. Raises ValueError."""
    if math.isfinite(value) and value > 0:
        return value
    raise ValueError(f"{name}: found {value:g}; allowed: a number > 0")


def non_negative(name: str, value: float) -> float:
    """``value`` if it is finite and >= 0. Raises ValueError."""
    if math.isfinite(value) and value >= 0:
        return value
    raise ValueError(f"{name}: found {value:g}; allowed: a number >= 0")


def full(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """fp16 and bf16 become fp32; fp32 and fp64 stay what they are, so that gradients can be checked against finite differences."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Method(nn.Module):
    """A way to learn from a teacher: turns what student and teacher say about a batch into named, weighted loss terms.

    A subclass takes its hyper-parameters as keywords, named as in params.yaml, and implements ``distill``.
    """

    needs_teacher: ClassVar[bool] = True  # whether training by this method alone would cost teacher passes
    min_classes: ClassVar[int] = 2  # of a data set that it can learn from

    def __init__(self, *, hard_weight: float) -> None:
        super().__init__()
        self.hard_weight = non_negative("hard_weight", hard_weight)

    def forward(self, student: Output, teacher: Output, batch: Batch, hard: Float[Tensor, ""]) -> Terms:
        """All terms of the loss, already weighted: ``hard`` (given: the loss on the hard label) and the method's own.

        Whatever autocast surrounds the call, the method computes in fp32 (DIST is NaN in fp16), and nothing flows back to the teacher.
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            student = replace(student, logits=full(student.logits))
            teacher = replace(teacher, logits=full(teacher.logits.detach()))
            return {"hard": self.hard_weight * hard, **self.distill(student, teacher, batch)}

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        """The method's own terms, by name, already weighted. ``teacher`` carries no gradient; both are in fp32 or fp64."""
        raise NotImplementedError
