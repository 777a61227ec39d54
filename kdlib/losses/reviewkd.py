"""Knowledge review: deeper levels of the student help its shallower ones (Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdlib.losses.base import Method, count, share
from kdlib.losses.stages import facing, pairs
from kdlib.types import Batch, Feature, Maps, Output, Setup, Terms

GRIDS = (4, 2, 1)  # cells per side at which HCL compares maps again


def hcl(student: Maps, teacher: Maps) -> Float[Tensor, ""]:
    """Hierarchical context loss: per pair of maps of one shape a weighted mean of mean squared errors, summed over the pairs.

    The maps as they are weigh 1, their averages over 4x4, 2x2 and 1x1 cells 1/2, 1/4, 1/8; a grid that is not smaller than the map is left
    out and the next one takes its weight. Unit: squared activations. Source: arXiv 2104.09044, section 3; weights: the authors' code.
    """
    return torch.stack([_hcl(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).sum()


def _hcl(student: Float[Tensor, "batch c h w"], teacher: Float[Tensor, "batch c h w"]) -> Float[Tensor, ""]:
    grids = [cells for cells in GRIDS if cells < min(student.shape[2:])]
    errors = [F.mse_loss(student, teacher)]
    errors += [F.mse_loss(F.adaptive_avg_pool2d(student, cells), F.adaptive_avg_pool2d(teacher, cells)) for cells in grids]
    shares = [0.5**k for k in range(len(errors))]
    return torch.stack([part * error for part, error in zip(shares, errors, strict=True)]).sum() / sum(shares)


def resized(values: Float[Tensor, "batch c _ _"], height: int, width: int) -> Float[Tensor, "batch c {height} {width}"]:
    """A map at this size: a side that shrinks is averaged (adaptive average pooling), one that grows is repeated (nearest)."""
    smaller = min(height, values.shape[2]), min(width, values.shape[3])
    if values.shape[2:] != smaller:
        values = F.adaptive_avg_pool2d(values, smaller)
    return values if smaller == (height, width) else F.interpolate(values, (height, width), mode="nearest")


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of one level of the student with what was fused of the deeper ones.

    x = BatchNorm(conv1x1(level)), and, if there is something deeper (y, brought to the level's size), x <- a_1 x + a_2 y with one
    attention map each, a = sigmoid(conv1x1([x, y])). x is handed on; BatchNorm(conv3x3(x)), at the teacher's size, is compared.
    BatchNorm has no running statistics: nothing is ever fused outside of training.
    """

    def __init__(self, channels: int, mid: int, out: int, *, deeper: bool) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, mid, 1, bias=False)
        self.enter_norm = nn.BatchNorm2d(mid, track_running_stats=False)
        self.attention = nn.Conv2d(2 * mid, 2, 1) if deeper else None
        self.leave = nn.Conv2d(mid, out, 3, padding=1, bias=False)
        self.leave_norm = nn.BatchNorm2d(out, track_running_stats=False)
        for conv in (self.enter, self.leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(
        self, level: Float[Tensor, "batch _ h w"], deeper: Float[Tensor, "batch mid _ _"] | None, size: tuple[int, int]
    ) -> tuple[Float[Tensor, "batch out _ _"], Float[Tensor, "batch mid h w"]]:
        """What is compared with the teacher's map of this ``size``, and what is handed on to the next, shallower level."""
        fused = self.enter_norm(self.enter(level))
        if self.attention is not None and deeper is not None:
            deeper = resized(deeper, *fused.shape[2:])
            ours, theirs = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid().split(1, dim=1)
            fused = ours * fused + theirs * deeper
        return self.leave_norm(self.leave(resized(fused, *size))), fused


class ReviewKD(Method):
    """``hard_weight * hard + weight * hcl``, fused from the pooled embedding (a 1x1 map) to the shallowest stage. A per-device loss.

    Maps are those before the activation that ends a stage. ``mid``: channels of the fusion, at most those of the student's embedding.
    ``warmup`` is a share of all steps: the authors' ``min(epoch / warmup, 1)`` is 0 for the whole first epoch. The teacher's map is never
    changed: where sizes differ the student's is brought to it before the 3x3 convolution (``resized``; the authors' code takes the
    nearest pixel when it shrinks too, which drops the others, and hands the next level the map that was resized). A stage that ends in
    something else than an activation module, in a concatenation say, is compared as it is. BatchNorm makes the loss depend on which images
    share a batch.
    """

    asks_student = asks_teacher = frozenset({Feature.PREACTIVATIONS, Feature.EMBEDDING})
    relational = True
    equation = (
        r"\sum_l \frac{1}{\sum_k 2^{-k}} \sum_{k \ge 0} 2^{-k}\, \mathrm{MSE}\left(\mathrm{pool}_k(F_l), \mathrm{pool}_k(f_t^l)\right),"
        r"\quad F_l = \mathrm{ABF}(f_s^l, F_{l+1})"
    )

    def __init__(self, *, hard_weight: float, weight: float, warmup: float, mid: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.warmup = share("warmup", warmup)
        self.mid = count("mid", mid)

    def adapt(self, setup: Setup) -> None:
        student, teacher = setup.student, setup.teacher
        super().adapt(setup)
        mid = min(self.mid, student.embedding)
        widths = [(student.embedding, teacher.embedding), *((ours[0], theirs[0]) for ours, theirs in reversed(facing(student, teacher)))]
        self.fusions = nn.ModuleList(Fusion(ours, mid, theirs, deeper=i > 0) for i, (ours, theirs) in enumerate(widths))

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        pooled_s, pooled_t = (model.need(Feature.EMBEDDING)[:, :, None, None] for model in (student, teacher))  # as 1x1 maps
        stages = pairs(student.need(Feature.PREACTIVATIONS), teacher.need(Feature.PREACTIVATIONS))
        levels = [(pooled_s, pooled_t), *reversed(stages)]
        fused: Tensor | None = None
        results: list[Tensor] = []
        for fusion, (ours, theirs) in zip(self.fusions, levels, strict=True):
            result, fused = fusion(ours, fused, theirs.shape[2:])
            results.append(result)
        return {"hcl": hcl(tuple(results), tuple(theirs for _, theirs in levels))}
