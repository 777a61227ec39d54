"""One-for-all: the student's stages answer in the logit space, where architectures agree (Hao et al., NeurIPS 2023, arXiv 2310.19444)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kdlib.losses.base import Method, positive
from kdlib.losses.stages import facing
from kdlib.types import Batch, Feature, Logits, Output, Setup, Terms


def ofa(student: Logits, teacher: Logits, labels: Int[Tensor, " batch"], eps: float, temperature: float) -> Float[Tensor, ""]:
    """-sum_c [(q_c + 1_{c=y})^eps - 1_{c=y}] log p_c: batch mean, in nats; p, q = softmax(z / temperature) of student and teacher.

    eps = 1 is the cross-entropy with the teacher; a larger one strengthens the target, (1 + q_y)^eps - 1, and weakens the others, q_c^eps.
    No factor temperature^2. Source: the authors' code for arXiv 2310.19444, section 3 (adaptive target enhancement). There log(softmax)
    is Inf for a sure student; log p and log q are formed directly here.
    """
    student_logp = F.log_softmax(student / temperature, dim=1)
    teacher_logp = F.log_softmax(teacher / temperature, dim=1)
    target = torch.arange(student.shape[1], device=labels.device) == labels[:, None]
    # expm1 and log1p: (1 + q)^eps - 1 as it stands loses all digits of a small q
    shares = torch.where(target, torch.expm1(eps * teacher_logp.exp().log1p()), (eps * teacher_logp).exp())
    return -(shares * student_logp).sum(dim=1).mean()


def halving(channels: int, out: int) -> nn.Sequential:
    """Two depthwise-separable 3x3 convolutions with BatchNorm and ReLU, the first of stride 2: sides are halved, rounded up.

    BatchNorm has no running statistics: a branch never answers outside of training.
    """
    layers: list[nn.Module] = []
    for stride, width in ((2, channels), (1, out)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def branch(channels: int, halvings: int, width: int, classes: int) -> nn.Sequential:
    """From a stage's map to logits: as many halvings as there are stages behind it, average pooling, a linear layer.

    Channels double with each halving; the last one ends in ``width``. The last stage has a 1x1 convolution instead.
    """
    widths = [*(channels * 2**i for i in range(halvings)), width]
    down = [halving(a, b) for a, b in pairwise(widths)] if halvings else [nn.Conv2d(channels, width, 1)]
    made = nn.Sequential(*down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return made


class OFA(Method):
    """``hard_weight * hard + weight * (ofa + branches)``. A per-device loss.

    ``ofa`` is of the final logits, ``branches`` the sum over exit branches, one for each stage of the student.
    "The" target of a mixed image is the class with the largest share of it, ``batch.labels``, as in the authors' code. The branches are
    the authors' for a CNN student, whatever the student's family (theirs for a token student are transformer blocks); a branch's
    ``width`` is the larger of the two embeddings. Their BatchNorm makes the loss depend on which images share a batch.
    """

    asks_student = frozenset({Feature.LOGITS, Feature.MAPS})
    relational = True
    equation = r"-\sum_{z \in \{z_s, g_1(f_s^1), \dots\}} \sum_c \left[ (q_c + 1_{c=y})^{\epsilon} - 1_{c=y} \right] \log \sigma(z / T)_c"

    def __init__(self, *, hard_weight: float, weight: float, eps: float, temperature: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.eps = positive("eps", eps)
        self.temperature = positive("temperature", temperature)

    def adapt(self, setup: Setup) -> None:
        student = setup.student
        facing(student, student)  # has stages; the teacher needs none
        channels = [stage[0] for stage in student.maps]
        width = max(student.embedding, setup.teacher.embedding) or channels[-1]
        self.branches = nn.ModuleList(branch(n, len(channels) - 1 - i, width, student.classes) for i, n in enumerate(channels))

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        exits = [one(stage) for one, stage in zip(self.branches, student.need(Feature.MAPS), strict=True)]
        final, *inner = (ofa(logits, teacher.logits, batch.labels, self.eps, self.temperature) for logits in (student.logits, *exits))
        return {"ofa": final, "branches": torch.stack(inner).sum()}
