"""Variational information distillation (Ahn, Hu, Damianou, Lawrence, Dai, CVPR 2019, arXiv 1904.05835)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdlib.losses.base import Method, positive
from kdlib.losses.stages import facing, pairs, same_size
from kdlib.types import Batch, Feature, Output, Setup, Terms

FLOOR = 1e-5  # of the variance


def vid(
    predicted: Float[Tensor, "batch channels h w"], teacher: Float[Tensor, "batch channels h w"], alpha: Float[Tensor, " channels"]
) -> Float[Tensor, ""]:
    """[(predicted - f_t)^2 / sigma^2 + log sigma^2] / 2 with sigma^2 = softplus(alpha) + 1e-5 of each channel: mean over images, channels
    and places, in nats.

    That is -log N(f_t; predicted, sigma^2) without its constant log(2 pi) / 2, hence not 0 where the student says all. Source: arXiv
    1904.05835, its Gaussian with one variance per channel; the mean instead of the sum is from the public implementations.
    """
    variance = (F.softplus(alpha) + FLOOR)[:, None, None]
    return 0.5 * ((predicted - teacher).square() / variance + variance.log()).mean()


class VID(Method):
    """``hard_weight * hard + weight * sum of vid over the stages that face each other``.

    Each stage has a regressor, three 1x1 convolutions as wide as the teacher with ReLU between them, and a variance per channel, which
    starts at ``variance`` and is trained with the student (without weight decay: it is a vector). Where sizes differ, the larger map is
    average-pooled to the smaller one.
    """

    asks_student = asks_teacher = frozenset({Feature.MAPS})
    equation = (
        r"\sum_{\mathrm{stages}} \mathrm{mean}\ \tfrac12 \left[ \frac{(r(f_s) - f_t)^2}{\sigma^2} + \log \sigma^2 \right],"
        r"\quad \sigma^2 = \log(1 + e^{\alpha}) + \epsilon"
    )

    def __init__(self, *, hard_weight: float, weight: float, variance: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        if positive("variance", variance) <= FLOOR:
            raise ValueError(f"variance: found {variance:g}; allowed: a number > {FLOOR:g}")
        self.variance = variance
        self.regressors = nn.ModuleList()
        self.alphas = nn.ParameterList()

    def adapt(self, setup: Setup) -> None:
        above = self.variance - FLOOR
        start = above + math.log(-math.expm1(-above))  # softplus(start) = above; e^above would overflow
        for (narrow, *_), (wide, *_) in facing(setup.student, setup.teacher):
            layers = [nn.Conv2d(width, wide, kernel_size=1, bias=False) for width in (narrow, wide, wide)]
            self.regressors.append(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))
            self.alphas.append(nn.Parameter(torch.full((wide,), start)))

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        stages = [same_size(*pair) for pair in pairs(student.need(Feature.MAPS), teacher.need(Feature.MAPS))]
        terms = [vid(r(a), b, alpha) for r, alpha, (a, b) in zip(self.regressors, self.alphas, stages, strict=True)]
        return {"information": torch.stack(terms).sum()}
