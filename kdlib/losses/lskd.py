"""KD of standardised logits (Sun, Ren, Li, Wang, Cao, "Logit standardization in knowledge distillation", CVPR 2024, arXiv 2403.01427)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kdlib.losses.kd import KD, kd
from kdlib.types import Batch, Logits, Output, Setup, Terms

STILL = 1e-3  # logits of an image with a smaller standard deviation count as constant; an untrained network's are about .1 to 1


def standardise(logits: Logits) -> Logits:
    """Z-score of each image's logits: minus their mean, over their standard deviation (of the population: the mean square).

    Constant logits have no z-score. They become 0, and the standard deviation is floored at ``STILL`` so that their gradient is finite and
    of use (some networks start with a head of zeros). The authors' code adds 1e-7 instead: such a gradient is 10,000 times as large.
    Source: arXiv 2403.01427, algorithm 1.
    """
    deviation = logits - logits.mean(dim=1, keepdim=True)
    std: Tensor = torch.linalg.vector_norm(deviation, dim=1, keepdim=True) / math.sqrt(logits.shape[1])
    return deviation / std.clamp_min(STILL)


def lskd(student: Logits, teacher: Logits, temperature: float) -> Float[Tensor, ""]:
    """T^2 KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)), Z = ``standardise``: mean over the batch, in nats.

    Neither scale nor shift of a model's logits changes it. The authors' code takes the standard deviation of a sample (C - 1, not C): its
    value at T is this one at T' = T (C / (C - 1))^(1/2), times (T / T')^2; 1 % smaller at 100 classes. Source: arXiv 2403.01427,
    algorithm 2. Raises ValueError for two classes or fewer.
    """
    _classes_needed(student.shape[1])
    return kd(standardise(student), standardise(teacher), temperature)


def _classes_needed(classes: int) -> None:
    if classes < 3:
        raise ValueError(f"found {classes} classes; allowed: 3 or more (two standardised logits are 1 and -1, always); use kd")


class LSKD(KD):
    """``hard_weight * hard + weight * lskd``. The hard loss reads the logits as they are."""

    equation = (
        r"T^2\, \mathrm{KL}\left(\sigma(\bar z_t / T) \,\|\, \sigma(\bar z_s / T)\right),\quad"
        r" \bar z = \frac{z - \mathrm{mean}_c(z)}{\mathrm{std}_c(z)}"
    )

    def adapt(self, setup: Setup) -> None:
        _classes_needed(setup.student.classes)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        return {"lskd": lskd(student.logits, teacher.logits, self.temperature)}
