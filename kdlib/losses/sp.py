"""Similarity-preserving distillation (Tung, Mori, ICCV 2019, arXiv 1907.09682)."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdlib.losses.base import Method
from kdlib.losses.stages import facing
from kdlib.types import Batch, Feature, Output, Setup, Terms

EMPTY = 1e-12  # a row shorter than this belongs to an image whose map is zero


def similarity(maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch batch"]:
    """How much each image resembles each image of the batch: G = Q Q^T, Q the flattened maps; each row of G at length 1, no unit.

    An image whose map is zero resembles none: its row is zeros, without gradient (``F.normalize`` would multiply the gradient by 1e12).
    """
    rows = maps.flatten(1)
    gram = rows @ rows.T
    length = torch.linalg.vector_norm(gram, dim=1, keepdim=True)
    return torch.where(length > EMPTY, gram / length.clamp_min(EMPTY), 0.0)


def sp(student: Float[Tensor, "batch _ _ _"], teacher: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, ""]:
    """||G_t - G_s||_F^2 / B^2, G = ``similarity``: the mean square over pairs of images.

    Channels and sizes of the two maps need not agree. Source: arXiv 1907.09682, its similarity-preserving loss for one pair of layers.
    """
    return (similarity(teacher) - similarity(student)).square().mean()


class SP(Method):
    """``hard_weight * hard + weight * sp`` on the maps of the last stage. A per-device loss: images resemble those of their batch."""

    asks_student = asks_teacher = frozenset({Feature.MAPS})
    relational = True
    equation = (
        r"\tfrac{1}{B^2} \left\| \tilde G_t - \tilde G_s \right\|_F^2,"
        r"\quad G_{ij} = \langle f_i, f_j \rangle,\ \tilde G_{i \cdot} = G_{i \cdot} / \|G_{i \cdot}\|_2"
    )

    def adapt(self, setup: Setup) -> None:
        facing(setup.student, setup.teacher)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        return {"similarity": sp(student.need(Feature.MAPS)[-1], teacher.need(Feature.MAPS)[-1])}
