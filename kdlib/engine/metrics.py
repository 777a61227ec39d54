"""What is measured of a trained model, and how it answers on a whole split."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from kdlib.data.dataset import Split
from kdlib.data.lazy_images import LazyImages, iterate_batches
from kdlib.parallel.ranks import gather_ranks, rank, world
from kdlib.types import Images, Logits

EVALUATION_BATCH = 512
BINS = 15
ROWS = 4096  # images at a time in float64, so that 50,000 x 1,000 logits need no copies of their size


@dataclass(frozen=True)
class Measures:
    """Means over a split's images: shares in [0, 1], or nats."""

    top1: float  # share whose label has the largest logit
    top5: float  # share whose label is among the 5 (or all, with fewer classes) largest logits
    nll: float  # - log softmax(logits)[label], nats
    ece: float  # expected calibration error in [0, 1]
    agreement: float  # share whose largest logit is the teacher's largest logit too
    teacher_kl: float  # KL(teacher || student) at temperature 1, nats


def measure(student_logits: Logits, teacher_logits: Logits, labels: Int[Tensor, " batch"]) -> Measures:
    """All measures of a student on a split, in float64; a teacher is measured against itself.

    Among equal logits the lower class comes first, in top1, top5 and agreement alike (so a model that says the same of all classes is right
    about class 0 only). Raises FloatingPointError if a logit is not finite, ValueError if there is no image.
    """
    if len(labels) == 0:
        raise ValueError("nothing to measure: found 0 images")
    if not (student_logits.isfinite().all() and teacher_logits.isfinite().all()):
        raise FloatingPointError("a logit is not finite: no measure is defined")
    parts = zip(student_logits.split(ROWS), teacher_logits.split(ROWS), labels.split(ROWS), strict=True)
    rank, nll, confidence, agrees, teacher_kl = torch.cat([_per_image(*part).cpu() for part in parts], dim=1)
    return Measures(
        top1=(rank < 1).double().mean().item(),
        top5=(rank < 5).double().mean().item(),
        nll=nll.mean().item(),
        ece=calibration_error(confidence, (rank < 1).double()),
        agreement=agrees.mean().item(),
        teacher_kl=teacher_kl.mean().item(),
    )


def _per_image(student: Tensor, teacher: Tensor, labels: Tensor) -> Float[Tensor, "5 batch"]:
    """Rank of the label (0: first), nll, confidence, agreement, KL from the teacher."""
    student_logp, teacher_logp = student.double().log_softmax(dim=1), teacher.double().log_softmax(dim=1)
    of_label = student.gather(1, labels[:, None])
    earlier = torch.arange(student.shape[1], device=student.device) < labels[:, None]
    rank = ((student > of_label) | ((student == of_label) & earlier)).sum(dim=1)
    return torch.stack(
        [
            rank.double(),
            -student_logp.gather(1, labels[:, None]).squeeze(1),
            student_logp.amax(dim=1).exp(),
            (student.argmax(dim=1) == teacher.argmax(dim=1)).double(),
            F.kl_div(student_logp, teacher_logp, reduction="none", log_target=True).sum(dim=1),
        ]
    )


def calibration_error(confidence: Float[Tensor, " batch"], correct: Float[Tensor, " batch"]) -> float:
    """sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)| over 15 bins ((m - 1) / 15, m / 15] of confidence, in [0, 1].

    Source: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017, arXiv 1706.04599, equation 3.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])
    gaps = torch.bincount(bins, weights=correct - confidence, minlength=BINS)
    return gaps.abs().sum().item() / len(confidence)


def to_images(pixels: UInt8[np.ndarray, "batch height width channels"], device: torch.device) -> Images:
    """Rows of a memory-mapped split as the models take them: [0, 1], NCHW in channels_last memory (no pixel is moved)."""
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float() / 255


def predict(
    model: nn.Module, images: UInt8[np.ndarray, "batch height width channels"] | LazyImages, batch_size: int, device: torch.device
) -> Float[Tensor, "batch classes"]:
    """The model's logits for every image once, in order, in fp32 on the CPU.

    The model must be on ``device``. It answers in eval mode; afterwards each of its modules is in the mode it was in. Processes that train
    together share the images out, and all get all logits; where these do not divide, the last image is looked at more than once, and
    counted once.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    share = -(-len(images) // world())
    places = np.minimum(np.arange(rank() * share, (rank() + 1) * share), len(images) - 1)
    try:
        with torch.inference_mode():
            rows = (places[start : start + batch_size] for start in range(0, share, batch_size))
            parts = [model(to_images(pixels, device)).logits.float() for pixels in iterate_batches(images, rows)]
    finally:
        for module, mode in modes:
            module.training = mode
    return gather_ranks(torch.cat(parts))[: len(images)].cpu()  # outside of inference mode: an ordinary tensor, which autograd may save


def top1(model: nn.Module, split: Split, device: torch.device) -> float:
    """The share of a split's images whose label has the model's largest logit."""
    classes = predict(model, split.images, EVALUATION_BATCH, device).argmax(dim=1)
    return float((classes == torch.from_numpy(np.asarray(split.labels))).double().mean())
