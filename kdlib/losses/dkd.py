"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022, arXiv 2203.08679)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdlib.losses.base import Method, non_negative, positive, share
from kdlib.losses.logits import kl, others_needed, others_of
from kdlib.types import Batch, Logits, Output, Setup, Terms


def decouple(logits: Logits, labels: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch 2"], Logits]:
    """Log-probabilities of the two questions that DKD asks: "the target or another?" and "if another, which?".

    (log p_y, log(1 - p_y)), and log of p without its target, renormalised; at the target a number so low that its probability is 0.
    log(1 - p_y) is never formed from p_y: it would be -inf in fp32 as soon as the model is sure. Source: arXiv 2203.08679, section 3.1.
    Raises ValueError for two classes or fewer.
    """
    others = others_of(logits, labels)
    total = others.logsumexp(dim=1, keepdim=True)
    pair = torch.cat([logits.gather(1, labels[:, None]), total], dim=1)
    return F.log_softmax(pair, dim=1), others - total


def dkd(student: Logits, teacher: Logits, labels: Int[Tensor, " batch"], temperature: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """TCKD and NCKD, each times T^2: sum over classes, mean over the batch, in nats.

    TCKD = KL((p_y, 1 - p_y) of the teacher || of the student), NCKD = KL(the other classes, renormalised); p = softmax(z / T).
    kd = TCKD + (1 - teacher's p_y) NCKD for each image. Source: arXiv 2203.08679, section 3.1 (both terms), 3.3 (their weights).
    """
    student_pair, student_others = decouple(student / temperature, labels)
    teacher_pair, teacher_others = decouple(teacher / temperature, labels)
    return temperature**2 * kl(student_pair, teacher_pair), temperature**2 * kl(student_others, teacher_others)


class DKD(Method):
    """``hard_weight * hard + weight * (alpha * TCKD + beta * NCKD)``; ``warmup`` (a share of all steps) is the authors'.

    "The" target of a mixed image is the class with the largest share of it, ``batch.labels``: the paper does not mix.
    """

    equation = (
        r"T^2 \left[ \alpha\, \mathrm{KL}\left((q_y, 1 - q_y) \,\|\, (p_y, 1 - p_y)\right)"
        r" + \beta\, \mathrm{KL}\left(\hat q_{\setminus y} \,\|\, \hat p_{\setminus y}\right) \right]"
    )

    def __init__(self, *, hard_weight: float, weight: float, warmup: float, alpha: float, beta: float, temperature: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.warmup = share("warmup", warmup)
        self.alpha = non_negative("alpha", alpha)
        self.beta = non_negative("beta", beta)
        self.temperature = positive("temperature", temperature)

    def adapt(self, setup: Setup) -> None:
        others_needed(setup.student.classes)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        target, others = dkd(student.logits, teacher.logits, batch.labels, self.temperature)
        return {"tckd": self.alpha * target, "nckd": self.beta * others}
