"""DIST: correlation instead of agreement (Huang, You, Wang, Qian, Xu, NeurIPS 2022, arXiv 2205.10536)."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdlib.losses.base import Method, non_negative, positive
from kdlib.types import Batch, Logits, Output, Terms

CONSTANT = 1e-4  # a row with a norm of relative deviations below this counts as constant; fp32 noise is about 1e-6
EMPTY = 1e-20  # a row with a mean below this counts as zero; far from where fp32's squares and reciprocals leave its range


def pearson(a: Float[Tensor, "rows columns"], b: Float[Tensor, "rows columns"], dim: int = 1) -> Float[Tensor, " rows_or_columns"]:
    """Pearson correlation of each row of ``a`` with that row of ``b``, or at ``dim`` 0 of each column; both hold probabilities, >= 0.

    Deviations are taken relative to the mean: a class that nobody predicts (1e-15 everywhere) counts like any other. Neither the mean nor
    this scale changes a correlation, so they need no gradient. What does not vary has no correlation: its norm is floored at ``CONSTANT``,
    so that the value goes to 0 and the gradient stays finite. (The authors' code adds 1e-8 to the product of the norms instead, which
    mutes rare classes; on logits of standard deviation 1 to 10 the losses differ by less than 0.2 %.)
    """
    student, teacher = _deviations(a, dim), _deviations(b, dim)
    squares = [values.square().sum(dim).clamp_min(CONSTANT**2) for values in (student, teacher)]
    return (student * teacher).sum(dim) * (squares[0] * squares[1]).rsqrt()


def _deviations(values: Float[Tensor, "rows columns"], dim: int) -> Float[Tensor, "rows columns"]:
    """values / mean - 1. In one pass: time and memory of this loss are its passes over (batch, classes)."""
    mean = values.detach().mean(dim, keepdim=True)
    scale = 1 / mean.clamp_min(EMPTY)
    return torch.addcmul(-mean * scale, values, scale)


def dist(student: Logits, teacher: Logits, tau: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """tau^2 (1 - mean Pearson correlation) of p = softmax(z / tau), over an image's classes (inter) and over a class's images (intra).

    Both lie in [0, 2 tau^2]. ``intra`` depends on which images share a batch. Source: arXiv 2205.10536, its inter-class and intra-class
    relations; the factor tau^2 is from the authors' code.
    """
    student_p = (student / tau).softmax(dim=1)
    teacher_p = (teacher / tau).softmax(dim=1)
    inter = 1 - pearson(student_p, teacher_p).mean()
    intra = 1 - pearson(student_p, teacher_p, dim=0).mean()
    return tau**2 * inter, tau**2 * intra


class DIST(Method):
    """``hard_weight * hard + weight * (beta * inter + gamma * intra)``. The intra term is a per-device loss."""

    relational = True
    equation = (
        r"\tau^2 \left[ \beta \left(1 - \tfrac{1}{B} \sum_b \rho(p_{b \cdot}, q_{b \cdot})\right)"
        r" + \gamma \left(1 - \tfrac{1}{C} \sum_c \rho(p_{\cdot c}, q_{\cdot c})\right) \right]"
    )

    def __init__(self, *, hard_weight: float, weight: float, beta: float, gamma: float, tau: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.beta = non_negative("beta", beta)
        self.gamma = non_negative("gamma", gamma)
        self.tau = positive("tau", tau)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        inter, intra = dist(student.logits, teacher.logits, self.tau)
        return {"inter": self.beta * inter, "intra": self.gamma * intra}
