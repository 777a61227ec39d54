"""What holds for every method: full precision, a teacher without gradient, the hard label's weight, checked parameters."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlib.types import Asks, Batch, Feature, Logits, Output, Setup, Terms

HardLoss = Callable[[Logits, Float[Tensor, "batch classes"]], Float[Tensor, ""]]


def positive(name: str, value: float) -> float:
    """``value`` if it is finite and > 0. Raises ValueError."""
    if math.isfinite(value) and value > 0:
        return value
    raise ValueError(f"{name}: found {value:g}; allowed: a number > 0")


def non_negative(name: str, value: float) -> float:
    """``value`` if it is finite and >= 0. Raises ValueError."""
    if math.isfinite(value) and value >= 0:
        return value
    raise ValueError(f"{name}: found {value:g}; allowed: a number >= 0")


def share(name: str, value: float) -> float:
    """``value`` if 0 <= it <= 1. Raises ValueError."""
    if 0 <= value <= 1:
        return value
    raise ValueError(f"{name}: found {value:g}; allowed: a number in [0, 1]")


def count(name: str, value: float) -> int:
    """``value`` as an integer if it is a whole number >= 1 (params.yaml gives every parameter as a number). Raises ValueError."""
    if math.isfinite(value) and value >= 1 and value == int(value):
        return int(value)
    raise ValueError(f"{name}: found {value:g}; allowed: a whole number >= 1")


def full(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """fp16 and bf16 become fp32; fp32 and fp64 stay what they are, so that gradients can be checked against finite differences."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Method(nn.Module):
    """A way to learn from a teacher: turns what student and teacher say about a batch into named, weighted loss terms.

    A subclass takes its hyper-parameters as keywords, named as in params.yaml, says what it asks of the two models, and implements
    ``distill``. One that trains parameters of its own makes them in ``adapt``.
    """

    asks_student: ClassVar[Asks] = frozenset({Feature.LOGITS})
    asks_teacher: ClassVar[Asks] = frozenset({Feature.LOGITS})  # empty: training by this method alone costs no teacher pass
    relational: ClassVar[bool] = False  # depends on which images share a batch: a per-device loss, for two images or more
    unmixed: ClassVar[bool] = False  # learns from unmixed images alone
    equation: ClassVar[str]  # LaTeX, in the notation of notebooks/methods.ipynb

    warmup: float = 0.0  # the share of all steps over which the method's own terms grow

    def __init__(self, *, hard_weight: float, weight: float) -> None:
        super().__init__()
        self.hard_weight = non_negative("hard_weight", hard_weight)
        self.weight = non_negative("weight", weight)

    def adapt(self, setup: Setup) -> None:
        """Make what is sized by the two models or by the training images, whose labels are given; once, before training.

        Raises ValueError, as "found ...; allowed: ...; what to do", for models that the method cannot learn from: here for one that has
        no pooled embedding and is asked for it.
        """
        for who, shape, asks in (("student", setup.student, self.asks_student), ("teacher", setup.teacher, self.asks_teacher)):
            if Feature.EMBEDDING in asks and not shape.embedding:
                raise ValueError(f"found a {who} without pooled embedding; allowed: a model that has one; choose another model or method")

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps throughout training: parameters and banks."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def forward(self, student: Output, teacher: Output, batch: Batch, hard: HardLoss | None, progress: Float[Tensor, ""]) -> Terms:
        """All terms of the loss, already weighted: ``hard``, the loss on the hard label if there is one, and the method's own.

        ``progress``: how much of the training is done, in (0, 1]; the method's own terms grow linearly over the share ``warmup`` of it.
        Whatever autocast surrounds the call, the method computes in fp32 (fp16 holds neither a product of probabilities nor the square of
        a distance), and nothing flows back to the teacher.
        Raises ValueError for a batch of one image if the method is relational, for targets or a teacher's logits of other classes, and
        RuntimeError for a label that is no class. On CUDA that one is a device-side assertion: it comes later, and ends the process.
        """
        if self.relational and len(batch.labels) < 2:
            raise ValueError(f"found a batch of 1 image; allowed: 2 or more ({type(self).__name__} depends on which images share a batch)")
        if batch.targets.shape != student.logits.shape:
            raise ValueError(f"found targets of shape {(*batch.targets.shape,)}; allowed: that of the logits, {(*student.logits.shape,)}")
        if Feature.LOGITS in self.asks_teacher and teacher.logits.shape[1] != student.logits.shape[1]:
            classes = teacher.logits.shape[1]
            raise ValueError(f"found a teacher of {classes} classes; allowed: the student's {student.logits.shape[1]}; choose another one")
        with torch.autocast(student.logits.device.type, enabled=False):
            terms = {"hard": self.hard_weight * hard(student.logits, batch.targets)} if hard and self.hard_weight else {}
            within = (batch.labels >= 0) & (batch.labels < student.logits.shape[1])
            torch._assert_async(within.all(), "a label lies outside of the classes")  # does not wait for the device
            own = self.distill(student.map(full), teacher.map(lambda values: full(values.detach())), batch)
            scale = self.weight * (progress / self.warmup).clamp(max=1) if self.warmup else self.weight
            return terms | {name: scale * value for name, value in own.items()}

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        """The method's own terms, by name, before ``weight``. ``teacher`` carries no gradient; both are in fp32 or fp64."""
        raise NotImplementedError
