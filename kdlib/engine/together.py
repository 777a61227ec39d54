"""A student and its method as one module: what is compiled, and what processes synchronise."""

from inspect import signature
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdlib.losses.base import HardLoss, Method
from kdlib.models.build import Classifier
from kdlib.types import Batch, Output, Terms

# BatchNorm's statistics are averaged once a step (norms); the older of the two names is deprecated in torch 2.15
_BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in signature(DistributedDataParallel).parameters)
_NO_SYNC: dict[str, Any] = {_BUFFERS: False}


class StudentWithLoss(nn.Module):
    """From a batch and the teacher's answers to the terms of the loss; the method's adapters are in it."""

    def __init__(self, student: Classifier, method: Method, hard: HardLoss | None) -> None:
        super().__init__()
        self.student, self.method, self.hard = student, method, hard

    def forward(self, batch: Batch, answers: Output | None, progress: Float[Tensor, ""]) -> Terms:
        output = self.student(batch.images, self.method.asks_student)
        terms: Terms = self.method(output, output if answers is None else answers, batch, self.hard, progress)
        return terms


def synchronised(model: nn.Module, *, headless: bool) -> DistributedDataParallel:
    """The same in every process; ``headless``: no loss looks at the student's logits."""
    return DistributedDataParallel(model, **_NO_SYNC, find_unused_parameters=headless)
