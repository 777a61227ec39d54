"""What losses on logits share: a KL of log-probabilities, and the target class and the others, which DKD and NKD tell apart."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kdlib.types import Logits


def kl(student_logp: Logits, teacher_logp: Logits) -> Float[Tensor, ""]:
    """KL(teacher || student) of log-probabilities: sum over classes, mean over the batch, in nats."""
    return F.kl_div(student_logp, teacher_logp, reduction="batchmean", log_target=True)


def others_of(logits: Logits, labels: Int[Tensor, " batch"]) -> Logits:
    """The logits, with that of each image's label so low that it has no part in their softmax, which is that of the other classes.

    The low logit is finite, so that the label's share of a divergence is 0 (0 times a number, the difference of two equal ones), but
    nothing that is divided by a small temperature: divide before. To leave the class out by ``gather`` costs DKD three times the time.
    Raises ValueError for fewer than three classes.
    """
    others_needed(logits.shape[1])
    return logits.scatter(1, labels[:, None], torch.finfo(logits.dtype).min / 2)


def others_needed(classes: int) -> None:
    """Raises ValueError for fewer than three classes: besides the target there is at most one, and nothing to tell apart."""
    if classes < 3:
        raise ValueError(f"found {classes} classes; allowed: 3 or more (without the target nothing is left to tell apart); use kd")
