"""One disagreement, and what measures several of them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[float, float]  # measured there, measured here
Measure = Callable[[], Pair]


@dataclass(frozen=True)
class Disagreement:
    """One way in which an implementation differs from ours."""

    method: str
    who: str  # repository and file, or paper
    measured: str  # which quantity, on which input; always a finite number: where a loss is not, the share that is
    instead: str  # what they compute instead
    pair: Measure


def differs(method: str, who: str, measured: str = "the loss on the toy") -> Callable[[Measure], Disagreement]:
    """Makes a disagreement of the function below it, whose docstring says what the other implementation computes instead."""
    return lambda pair: Disagreement(method, who, measured, inspect.getdoc(pair) or "", pair)


def drawn(images: int, numbers: int, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normal logits or embeddings of a student and of a teacher, and labels; always the same."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (std * torch.randn(images, numbers, generator=rng) for _ in range(2))
    return student, teacher, torch.randint(numbers, (images,), generator=rng)


def share(holds: Tensor) -> float:
    return float(holds.double().mean())


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a loss."""
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]
