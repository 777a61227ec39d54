"""Two models' answers to a batch, small enough for float64 NumPy, and every method ready to learn from them."""

import copy
import inspect
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib.losses import HARD, METHODS, Method
from kdlib.types import Batch, Output, OutputShape, Setup, Terms
from tests import references
from tests.references.common import Given, Said, ce

CLASSES, BATCH, IMAGES = 7, 12, 40
# three stages against four, of which two pairs differ in size, one this way and one that way
STUDENT = OutputShape(CLASSES, 10, ((6, 9, 9), (8, 4, 4), (12, 2, 2)))
TEACHER = OutputShape(CLASSES, 14, ((5, 16, 16), (9, 8, 8), (10, 5, 5), (16, 2, 2)))
ALL_LABELS = torch.randint(CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(3))
HALFWAY = 0.4  # of a training: within the warm-up of whoever has one
Case = tuple[Output, Output, Batch]


def parameters(name: str) -> dict[str, float]:
    """A different number, none of them 1, for each parameter: one that is ignored or confused shows."""
    names = inspect.signature(METHODS[name]).parameters
    chosen = {"warmup": 0.8} | references.of(name).CHOSEN
    return {key: chosen.get(key, 0.5 + 0.75 * i) for i, key in enumerate(names)}


def make(name: str, student: OutputShape = STUDENT, teacher: OutputShape = TEACHER, **changes: float) -> Method:
    """A method with its adapters: the same ones in each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = METHODS[name](**parameters(name) | changes)
        method.adapt(Setup(student, teacher, ALL_LABELS))
    return method


def draw(std: float = 2.0, dtype: torch.dtype = torch.float32, *, batch: int = BATCH, same: bool = False) -> Case:
    """What a student and a teacher that it resembles say, with given standard deviation; labels are often the teacher's answer.

    ``same``: the student says what the teacher says.
    """
    rng = torch.Generator().manual_seed(0)
    common, noise = (torch.randn(batch, CLASSES, generator=rng, dtype=torch.float64) for _ in range(2))
    teacher = _say(TEACHER, std * common, std, rng)
    student = teacher if same else _say(STUDENT, std * (0.6 * common + 0.8 * noise), std, rng)
    index = torch.randperm(IMAGES, generator=rng)[:batch]
    labels = ALL_LABELS[index]
    targets = torch.full((batch, CLASSES), 0.3 / CLASSES).scatter_(1, labels[:, None], 0.7 + 0.3 / CLASSES)
    given = Batch(torch.zeros(batch, 1, 8, 8), targets, labels, index, torch.arange(batch) % 5 == 3)
    return convert(student, dtype), convert(teacher, dtype), given


def _say(shape: OutputShape, logits: Tensor, std: float, rng: torch.Generator) -> Output:
    """Maps and embedding of this shape that vary with the logits, as those of a model do; maps are those of a ReLU."""
    direction = torch.randn(shape.classes, shape.embedding, generator=rng, dtype=torch.float64) / shape.classes**0.5
    embedding = logits @ direction + 0.3 * std * torch.randn(len(logits), shape.embedding, generator=rng, dtype=torch.float64)
    before = [std * torch.randn(len(logits), *size, generator=rng, dtype=torch.float64) for size in shape.maps]
    return Output(logits, embedding, tuple(stage.relu() for stage in before), tuple(before))


def tensors(output: Output) -> list[Tensor]:
    """All tensors of an output, in one order."""
    parts = (output.logits, output.embedding, output.maps, output.preactivations)
    return [tensor for part in parts if part is not None for tensor in (part if isinstance(part, tuple) else (part,))]


def assemble(like: Output, given: list[Tensor]) -> Output:
    """The inverse of ``tensors``."""
    rest = iter(given)
    logits, embedding = next(rest), None if like.embedding is None else next(rest)
    maps, before = (None if part is None else tuple(next(rest) for _ in part) for part in (like.maps, like.preactivations))
    return Output(logits, embedding, maps, before)


def convert(output: Output, dtype: torch.dtype) -> Output:
    """In this precision; what is too large for it becomes its largest number, not infinite."""
    most = torch.finfo(dtype).max
    return assemble(output, [tensor.double().clamp(-most, most).to(dtype) for tensor in tensors(output)])


def asked(output: Output, asks: Any) -> Output:
    """Only what a method asks for: what it uses without asking is missing."""
    return Output(output.logits, **{part.value: getattr(output, part.value) for part in asks if part.value != "logits"})


def compute(method: Method, student: Output, teacher: Output, batch: Batch, progress: float = HALFWAY) -> Terms:
    """The terms of the loss. Neither model says more than it is asked for."""
    said = asked(student, method.asks_student), asked(teacher, method.asks_teacher)
    terms: Terms = method(*said, batch, HARD["ce"], torch.tensor(progress, dtype=torch.promote_types(student.logits.dtype, torch.float32)))
    return terms


def fresh(method: Method) -> Method:
    """A copy: some methods remember what they have seen."""
    return copy.deepcopy(method)


def distillation(terms: Terms) -> list[Tensor]:
    return [value for name, value in terms.items() if name != "hard"]


def total(terms: Terms) -> Tensor:
    return sum(terms.values(), start=torch.zeros(()))


def require_grad(output: Output) -> Output:
    """The same numbers as leaves that collect a gradient."""
    return assemble(output, [tensor.detach().clone().requires_grad_() for tensor in tensors(output)])


def gradients(output: Output, method: Method) -> list[Tensor | None]:
    """Of all that the student says and of the method's own parameters."""
    return [tensor.grad for tensor in [*tensors(output), *method.parameters()]]


def reorder(output: Output, order: Tensor) -> Output:
    return assemble(output, [tensor[order] for tensor in tensors(output)])


def reorder_batch(batch: Batch, order: Tensor) -> Batch:
    return replace(batch, **{field.name: getattr(batch, field.name)[order] for field in fields(batch)})


def expect(name: str, method: Method, student: Output, teacher: Output, batch: Batch, progress: float = HALFWAY) -> dict[str, float]:
    """The reference's terms, weighted, for the numbers that these tensors hold. ``method``: before it has seen the batch."""
    z, targets = student.logits.double().numpy(), batch.targets.double().numpy()
    own = {key: value.double().numpy() for key, value in method.state_dict().items()}
    given = Given(batch.labels.numpy(), batch.index.numpy(), batch.mixed.numpy(), ALL_LABELS.numpy())
    every = parameters(name)
    rest = {key: value for key, value in every.items() if key not in ("hard_weight", "weight", "warmup")}
    terms = references.of(name).terms(_said(student), _said(teacher), given, own, **rest)
    scale = every.get("weight", 1.0) * (min(1.0, progress / every["warmup"]) if "warmup" in every else 1.0)
    hard = {"hard": every["hard_weight"] * ce(z, targets)} if every.get("hard_weight") else {}
    return hard | {key: scale * value for key, value in terms.items()}


def _said(output: Output) -> Said:
    logits, embedding, *rest = (tensor.double().numpy().astype(np.float64) for tensor in tensors(output))
    n = len(rest) // 2
    return Said(logits, embedding, rest[:n], rest[n:])
