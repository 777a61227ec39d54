"""Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdlib.losses.base import Method
from kdlib.losses.stages import facing, pairs, same_size
from kdlib.types import Batch, Feature, Maps, Output, Setup, Terms


def attention(maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch places"]:
    """Where a model looks: the channels' mean of the squared map, as one row of length 1 per image; no unit.

    A map of zeros looks nowhere: its row is zeros, and its gradient 0. Squares of squares: finite in fp32 for values up to 1e9.
    """
    return F.normalize(maps.square().mean(dim=1).flatten(1), dim=1)


def at(student: Maps, teacher: Maps) -> Float[Tensor, ""]:
    """Sum over the stages that face each other of mean (attention(f_s) - attention(f_t))^2, mean over images and places.

    Where sizes differ, the larger map is average-pooled to the smaller one, before it is squared. Source: arXiv 1612.03928, its
    activation-based attention with the sum of squares (p = 2). The paper has the norm of the difference; the authors' weight of 1000
    belongs to the mean square of their code, which this is.
    """
    gaps = [(attention(a) - attention(b)).square().mean() for a, b in (same_size(*pair) for pair in pairs(student, teacher))]
    return torch.stack(gaps).sum()


class AT(Method):
    """``hard_weight * hard + weight * at``. A stage of one place has the attention 1 whatever it sees, and teaches nothing."""

    asks_student = asks_teacher = frozenset({Feature.MAPS})
    equation = (
        r"\sum_{\mathrm{stages}} \mathrm{mean} \left( \frac{a_s}{\|a_s\|_2} - \frac{a_t}{\|a_t\|_2} \right)^2,"
        r"\quad a = \mathrm{mean}_{\mathrm{channels}}\, f^2"
    )

    def adapt(self, setup: Setup) -> None:
        if all(min(a[1], b[1]) * min(a[2], b[2]) == 1 for a, b in facing(setup.student, setup.teacher)):
            found = "found stages of one place each, where attention is always 1"
            raise ValueError(f"{found}; allowed: a stage of two places or more; take larger images or another method")

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        return {"attention": at(student.need(Feature.MAPS), teacher.need(Feature.MAPS))}
