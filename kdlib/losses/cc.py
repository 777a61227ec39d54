"""VanillaKD's correlation loss, called CC there (Hao et al., NeurIPS 2023, arXiv 2305.15781, official repository)."""

from jaxtyping import Float
from torch import Tensor, nn

from kdlib.losses.base import Method, count, non_negative
from kdlib.types import Batch, Feature, Output, Setup, Terms


def cc(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """sum_d |f_s - f_t|_{i, d} |f_s - f_t|_{i + 1, d}, mean over the B - 1 neighbours (i, i + 1) in the batch; in squared units of f.

    It is 0 already when of each two neighbours one is right, and depends on the order of the batch. Source: the official repository of
    arXiv 2305.15781. The paper that it is named after (Peng et al., "Correlation congruence for knowledge distillation", ICCV 2019) defines
    a different loss: the distance between the two batches' kernel matrices (Gaussian kernel, Taylor-expanded).
    """
    gap = (student - teacher).abs()
    return (gap[:-1] * gap[1:]).sum(dim=1).mean()


class CC(Method):
    """``hard_weight * hard + weight * scale * cc`` on linear embeddings, of ``dim`` numbers, of both pooled embeddings.

    Both linear maps are trained, the teacher's too, as in the official repository: the loss can fall without the student learning anything,
    by embedding everything at one point. A per-device loss: neighbours are those of the batch, in its order.
    """

    asks_student = asks_teacher = frozenset({Feature.EMBEDDING})
    relational = True
    equation = (
        r"\frac{s}{B - 1} \sum_{i < B} \sum_d \left| f_s - f_t \right|_{i, d} \left| f_s - f_t \right|_{i + 1, d}"
        r"\quad \text{of linear embeddings } f"
    )

    def __init__(self, *, hard_weight: float, weight: float, scale: float, dim: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.scale = non_negative("scale", scale)
        self.dim = count("dim", dim)

    def adapt(self, setup: Setup) -> None:
        super().adapt(setup)
        self.embed_student = nn.Linear(setup.student.embedding, self.dim)
        self.embed_teacher = nn.Linear(setup.teacher.embedding, self.dim)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        f_s, f_t = self.embed_student(student.need(Feature.EMBEDDING)), self.embed_teacher(teacher.need(Feature.EMBEDDING))
        return {"correlation": self.scale * cc(f_s, f_t)}
