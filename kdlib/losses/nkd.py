"""Normalised knowledge distillation (Yang, Zeng, Li, Zhang, Yuan, Li, ICCV 2023, arXiv 2303.13005)."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdlib.losses.base import Method, non_negative, positive
from kdlib.losses.logits import others_needed, others_of
from kdlib.types import Batch, Logits, Output, Setup, Terms


def nkd(student: Logits, teacher: Logits, labels: Int[Tensor, " batch"], temperature: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Two cross-entropies, mean over the batch, in nats: -q_y log p_y, and T^2 times that of the other classes, renormalised.

    p_y and q_y are probabilities at temperature 1 whatever T is, as in the authors' code; T softens the other classes only. Both terms
    keep an entropy of the teacher. At student = teacher the second has no gradient, the first still has: it is a hard label that counts
    as much as the teacher believes it. Source: arXiv 2303.13005, its NKD loss. Raises ValueError for two classes or fewer.
    """
    student_logp = F.log_softmax(student, dim=1).gather(1, labels[:, None])
    teacher_p = teacher.softmax(dim=1).gather(1, labels[:, None])
    student_others = others_of(student / temperature, labels)
    teacher_others = others_of(teacher / temperature, labels)
    others = F.cross_entropy(student_others, teacher_others.softmax(dim=1))
    return -(teacher_p * student_logp).mean(), temperature**2 * others


class NKD(Method):
    """``hard_weight * hard + weight * (target + gamma * others)``.

    "The" target of a mixed image is the class with the largest share of it, ``batch.labels``, as in the authors' code. An earlier version
    of that code, which others copied, masks no class: its second term is a cross-entropy over all classes.
    """

    equation = r"-q_y \log p_y - \gamma\, T^2 \sum_{c \ne y} \hat q_c \log \hat p_c"

    def __init__(self, *, hard_weight: float, weight: float, gamma: float, temperature: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.gamma = non_negative("gamma", gamma)
        self.temperature = positive("temperature", temperature)

    def adapt(self, setup: Setup) -> None:
        others_needed(setup.student.classes)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        target, others = nkd(student.logits, teacher.logits, batch.labels, self.temperature)
        return {"target": target, "others": self.gamma * others}
