"""Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdlib.losses.base import Method, non_negative
from kdlib.types import Batch, Embedding, Feature, Output, Terms

Pairs = Float[Tensor, "batch batch"]
ELEMENTS = 2**20  # angles in memory at a time. At a batch of 256 the loss and its gradient take 28 MB; all angles at once, 406 MB
NOISE = 32  # roundings: a squared distance below so many, of the squared lengths that it is the difference of, is noise and counts as 0


def squares(embedding: Embedding) -> Pairs:
    """||f_i - f_j||^2, in squared units of f; exactly 0, and without gradient, for images that cannot be told apart.

    From the Gram matrix of the centred embeddings: differences as such would take batch^2 x features numbers.
    """
    centred = embedding - embedding.mean(dim=0)
    gram = centred @ centred.T
    lengths = gram.diagonal()[:, None] + gram.diagonal()
    found = lengths - 2 * gram
    return found.masked_fill(found <= NOISE * torch.finfo(found.dtype).eps * lengths, 0.0)


def inverse(squared: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 / distance; 0, without gradient, where the distance is 0."""
    return squared.masked_fill(squared == 0, torch.inf).rsqrt()


def distances(squared: Pairs) -> Pairs:
    """||f_i - f_j|| / mean of those that are > 0, no unit; all 0 if none is."""
    found = squared * inverse(squared)
    mean = found.sum() / (found > 0).sum().clamp(min=1)
    return found / torch.where(mean > 0, mean, 1.0)


def cosines(squared: Pairs, vertices: slice) -> Float[Tensor, "vertices batch batch"]:
    """cos of the angle at f_j between f_i and f_k, for some j and all i, k, by the law of cosines; 0 where f_j is f_i or f_k."""
    legs = squared[vertices]
    inverses = inverse(legs)
    return (legs[:, :, None] + legs[:, None, :] - squared) * (0.5 * inverses[:, :, None] * inverses[:, None, :])


def _angle_gap(student: Pairs, teacher: Pairs, vertices: slice) -> Float[Tensor, ""]:
    # .sum(): a loss that is reduced by smooth_l1_loss itself keeps the memory of all its elements
    return F.smooth_l1_loss(cosines(student, vertices), cosines(teacher, vertices), reduction="none").sum()


def rkd(
    student: Float[Tensor, "batch own"], teacher: Float[Tensor, "batch given"], elements: int = ELEMENTS
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """smooth_l1(distances of the student, of the teacher), mean over all B^2 pairs, and the same of the cosines, mean over all B^3 triples.

    No unit. Both are 0 if one embedding is the other moved, rotated and scaled; their dimensions may differ. The means count an image with
    itself too, as in the authors' code (arXiv 1904.05068: Huber loss of the distance-wise and of the angle-wise potential).
    ``elements``: how many angles are computed at a time. They are computed again for the gradient instead of being kept.
    """
    size = len(student)
    own, given = squares(student), squares(teacher)
    step = max(1, elements // size**2)
    vertices = [slice(start, start + step) for start in range(0, size, step)]
    parts = [checkpoint(_angle_gap, own, given, some, use_reentrant=False, preserve_rng_state=False) for some in vertices]
    return F.smooth_l1_loss(distances(own), distances(given)), torch.stack(parts).sum() / size**3


class RKD(Method):
    """``hard_weight * hard + weight * (distance_weight * distance + angle_weight * angle)`` on the pooled embeddings.

    A per-device loss: distances and angles are those within the batch.
    """

    asks_student = asks_teacher = frozenset({Feature.EMBEDDING})
    relational = True
    equation = (
        r"\frac{\lambda_d}{B^2} \sum_{i, j} h\left(d^s_{ij} - d^t_{ij}\right)"
        r" + \frac{\lambda_a}{B^3} \sum_{i, j, k} h\left(\cos \angle^s_{ijk} - \cos \angle^t_{ijk}\right),"
        r"\quad d_{ij} = \frac{\|f_i - f_j\|_2}{\mathrm{mean}\, \|f_i - f_j\|_2},\ h = \text{smooth } L_1"
    )

    def __init__(self, *, hard_weight: float, weight: float, distance_weight: float, angle_weight: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.distance_weight = non_negative("distance_weight", distance_weight)
        self.angle_weight = non_negative("angle_weight", angle_weight)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        distance, angle = rkd(student.need(Feature.EMBEDDING), teacher.need(Feature.EMBEDDING))
        return {"distance": self.distance_weight * distance, "angle": self.angle_weight * angle}
