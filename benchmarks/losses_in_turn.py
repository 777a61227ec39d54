"""The losses of all methods on the same answers, timed in turn."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.config.schema import Params
from kdlib.losses import METHODS, Method
from kdlib.types import Asks, Batch, Feature, Output, OutputShape, Setup

WARM_UP = 2  # rounds that do not count
AT_SCALE = {"negatives": 16384.0}  # official, for ImageNet; params.yaml has fewer for its small data sets
Step = Callable[[], object]


@dataclass(frozen=True)
class Shapes:
    """What is measured: sizes of the answers, and how often."""

    batch: int
    map_batch: int  # of the methods that read stage maps
    rounds: int
    map_rounds: int
    images: tuple[int, int]  # of a small and a large training set
    student: OutputShape
    teachers: dict[str, OutputShape]
    net: tuple[str, int]  # a student whose step the losses are compared with, and the side of its images


@dataclass(frozen=True)
class Bench:
    """One machine, its settings, params.yaml."""

    shapes: Shapes
    device: torch.device
    params: Params

    @property
    def baseline(self) -> str:
        return self.params.study.baseline

    def method(self, name: str, teacher: OutputShape, images: int) -> Method:
        torch.manual_seed(0)
        parameters = dict(self.params.methods[name])
        method = METHODS[name](**parameters | {key: value for key, value in AT_SCALE.items() if key in parameters})
        method.adapt(Setup(self.shapes.student, teacher, torch.randint(self.shapes.student.classes, (images,))))
        return method.to(self.device)

    def said(self, shape: OutputShape, size: int, asks: Asks, grad: bool) -> Output:
        """Random answers to a batch: only what is asked for, as leaves."""

        def draw(*sizes: int) -> Tensor:
            return torch.randn(size, *sizes, device=self.device).requires_grad_(grad)

        embedding = draw(shape.embedding) if Feature.EMBEDDING in asks else None
        maps, before = (
            tuple(draw(*one) for one in shape.maps) if part in asks else None for part in (Feature.MAPS, Feature.PREACTIVATIONS)
        )
        return Output(draw(shape.classes), embedding, maps, before)

    def batch(self, size: int) -> Batch:
        labels = torch.arange(size, device=self.device) % self.shapes.student.classes
        index, mixed = torch.arange(size, device=self.device), torch.zeros(size, dtype=torch.bool, device=self.device)
        return Batch(
            torch.zeros(size, 1, 1, 1, device=self.device), F.one_hot(labels, self.shapes.student.classes).float(), labels, index, mixed
        )

    def steps(self, methods: dict[str, Method], teacher: OutputShape, size: int) -> dict[str, Step]:
        """Loss and backward pass of each method on the same answers: gradients reach the student's answers and the method's own parameters.

        The hard label's loss is left out; so is a method that has no term of its own.
        """
        batch, progress = self.batch(size), torch.ones((), device=self.device)
        student = self.said(self.shapes.student, size, _union(method.asks_student for method in methods.values()), grad=True)
        answers = self.said(teacher, size, _union(method.asks_teacher for method in methods.values()), grad=False)

        def step(method: Method) -> bool:
            said = _only(student, method.asks_student)
            terms = method(said, _only(answers, method.asks_teacher), batch, None, progress)
            if terms:
                torch.stack(list(terms.values())).sum().backward()
            for leaf in (*_tensors(said), *method.parameters()):
                leaf.grad = None
            return bool(terms)

        return {name: partial(step, method) for name, method in methods.items() if step(method)}

    def seconds(self, steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
        """Of each step in each round. They take turns, each round starts with another one."""
        names, found = list(steps), dict[str, list[float]]((name, []) for name in steps)
        for i in range(WARM_UP + rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                self.wait()
                started = time.perf_counter()
                steps[name]()
                self.wait()
                if i >= WARM_UP:
                    found[name].append(time.perf_counter() - started)
        return found

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _union(asks: Iterable[Asks]) -> Asks:
    return frozenset().union(*asks)


def _only(output: Output, asks: Asks) -> Output:
    return Output(output.logits, **{part.value: getattr(output, part.value) for part in asks - {Feature.LOGITS}})


def _tensors(output: Output) -> list[Tensor]:
    parts = (output.logits, output.embedding, *(output.maps or ()), *(output.preactivations or ()))
    return [tensor for tensor in parts if tensor is not None]
