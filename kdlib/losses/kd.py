"""Vanilla knowledge distillation (Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdlib.losses.base import Method, positive
from kdlib.losses.logits import kl
from kdlib.types import Batch, Logits, Output, Terms


def kd(student: Logits, teacher: Logits, temperature: float) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)): sum over classes, mean over the batch, in nats.

    The factor T^2 keeps the gradient's size about the same at every T. Up to the teacher's entropy, which has no gradient, this is the
    soft cross-entropy of arXiv 1503.02531, section 2 (equation 1 is the softmax with temperature).
    """
    return temperature**2 * kl(F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1))


class KD(Method):
    """``hard_weight * hard + weight * kd``. Hinton's weights sum to 1; the official VanillaKD default has both at 1."""

    equation = r"T^2\, \mathrm{KL}\left(\sigma(z_t / T) \,\|\, \sigma(z_s / T)\right)"

    def __init__(self, *, hard_weight: float, weight: float, temperature: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.temperature = positive("temperature", temperature)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        return {"kd": kd(student.logits, teacher.logits, self.temperature)}
