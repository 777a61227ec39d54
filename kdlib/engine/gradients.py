"""The gradient of a student's loss: forward and backward pass, eager, compiled, or replayed as a CUDA graph."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdlib.engine.backend import Backend
from kdlib.engine.compile import Replayed, compiled
from kdlib.losses.base import HardLoss, Method
from kdlib.models.build import Classifier
from kdlib.types import Batch, Output, Terms

# BatchNorm's statistics are averaged once a step (batchnorm); the older of the two names is deprecated in torch 2.15
_BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in signature(DistributedDataParallel).parameters)
_NO_SYNC: dict[str, Any] = {_BUFFERS: False}


class StudentWithLoss(nn.Module):
    """A student and its method as one module, from a batch and the teacher's output to the terms of the loss.

    The unit that is compiled and synchronised between processes; the method's adapters are in it. ``hard``: the loss on the hard label.
    """

    def __init__(self, student: Classifier, method: Method, hard: HardLoss | None) -> None:
        super().__init__()
        self.student, self.method, self.hard = student, method, hard

    def forward(self, batch: Batch, teacher: Output | None, progress: Float[Tensor, ""]) -> Terms:
        output = self.student(batch.images, self.method.asks_student)
        terms: Terms = self.method(output, output if teacher is None else teacher, batch, self.hard, progress)
        return terms


class Gradients:
    """Adds the gradient of one mix group's loss, divided by ``groups``, to the gradients of a student and its method.

    Computes as ``backend`` has decided. ``distributed``: the gradients are averaged over all processes.
    """

    def __init__(self, model: StudentWithLoss, backend: Backend, groups: int, *, distributed: bool) -> None:
        self._eager, self._backend, self._groups = model, backend, groups
        self._model: nn.Module = compiled(model) if backend.compiled else model
        if distributed:  # a head that no loss looks at gets no gradient
            headless = model.hard is None or not model.method.hard_weight
            self._model = DistributedDataParallel(self._model, **_NO_SYNC, find_unused_parameters=headless)
        self._replayed = Replayed(self._pass_in_place, self._unchanged)

    def __call__(self, batch: Batch, teacher: Output | None, progress: float) -> Terms:
        """The terms of the loss, without gradient. ``progress``: how much of the training is done after this step, in (0, 1].

        Raises ValueError if the method needs a teacher's output and gets none. Nothing here waits for the device.
        """
        if teacher is None and self._eager.method.asks_teacher:
            name = type(self._eager.method).__name__
            raise ValueError(f"{name}: found no teacher's output; allowed: none only for a method that needs no teacher")
        done = torch.full((), progress, device=self._backend.device)
        if self._backend.compiled == "graphs":
            terms: Terms = self._replayed(vars(batch), None if teacher is None else vars(teacher), done)
            return terms
        return self._pass(batch, teacher, done)

    def kept_here(self) -> AbstractContextManager[Any]:
        """Within, gradients are not sent to the other processes: those of a later group will be, with these added."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def _pass(self, batch: Batch, teacher: Output | None, progress: Float[Tensor, ""]) -> Terms:
        with self._backend.autocast():
            terms: Terms = self._model(batch, teacher, progress)
        (torch.stack(list(terms.values())).sum() / self._groups).backward()
        return {name: term.detach() for name, term in terms.items()}

    def _pass_in_place(self, batch: dict[str, Any], teacher: dict[str, Any] | None, progress: Float[Tensor, ""]) -> Terms:
        """The same for a graph, whose next replay knows only the tensors that were there: what a method replaces is written into them."""
        buffers = self._buffers()
        terms = self._pass(Batch(**batch), Output(**teacher) if teacher else None, progress)
        for module, name, buffer in buffers:
            if getattr(module, name) is not buffer:
                buffer.copy_(getattr(module, name))
                setattr(module, name, buffer)
        return terms

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Passes within leave buffers as they are, and add nothing to gradients; those that were not there are zero then."""
        kept = [(buffer, buffer.clone()) for *_, buffer in self._buffers()]
        gradients = [(weights, None if weights.grad is None else weights.grad.clone()) for weights in self._eager.parameters()]
        with self._backend.forked():
            yield
        for buffer, before in kept:
            buffer.copy_(before)
        for parameter, gradient in gradients:
            if parameter.grad is not None:
                parameter.grad.copy_(torch.zeros_like(parameter.grad) if gradient is None else gradient)

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [(module, name, values) for module in self._eager.modules() for name, values in module.named_buffers(recurse=False)]
