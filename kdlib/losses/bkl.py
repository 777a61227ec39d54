"""BKL: every class a question of its own (Hao, Guo, Han, Hu, Xu, Wang, "Revisit the power of vanilla KD", arXiv 2305.15781)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdlib.losses.base import Method
from kdlib.types import Batch, Logits, Output, Terms


def bkl(student: Logits, teacher: Logits) -> Float[Tensor, ""]:
    """-(q log s + (1 - q) log(1 - s)) with q = softmax(teacher), s = sigmoid(student): mean over batch *and classes*, in nats.

    The gradient is (s - q) / (batch * classes): where s is near softmax(student) it is that of ``kd`` divided by the number of classes.
    Unlike a KL, it keeps the teacher's entropy, which has no gradient; and it is least at sigmoid(student) = q, so a student that says what
    the teacher says is still moved. Source: soft label BKL of arXiv 2305.15781, its table of hard and soft label losses; the mean over
    classes is from the authors' code.
    """
    return F.binary_cross_entropy_with_logits(student, teacher.softmax(dim=1))


class BKL(Method):
    """``hard_weight * hard + weight * bkl``."""

    equation = (
        r"-\tfrac{1}{C} \sum_c \left[ q_c \log \mathrm{sigmoid}(z_{s,c})"
        r" + (1 - q_c) \log \left(1 - \mathrm{sigmoid}(z_{s,c})\right) \right]"
    )

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        return {"bkl": bkl(student.logits, teacher.logits)}
