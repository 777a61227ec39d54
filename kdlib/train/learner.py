"""A learner: one student with its loss, its optimiser and its schedule. Learners share nothing but the batch and the answers."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from kdlib.config import Recipe
from kdlib.data.mixing import mix_groups
from kdlib.losses.base import Method
from kdlib.losses.hard import HARD
from kdlib.models import Classifier
from kdlib.ranks import everyones, mean_over_ranks, world
from kdlib.seed import seed_torch
from kdlib.train.compiling import Kind, Replayed, compiled, quickest
from kdlib.train.compute import Compute
from kdlib.train.memory import peak_bytes
from kdlib.train.norms import RunningStatistics
from kdlib.train.rates import scheduler, set_rate
from kdlib.train.together import Together, synchronised
from kdlib.types import Asks, Batch, Output, Terms

Row = dict[str, float | int | None]


class Learner:
    """Trained among others it ends with the weights that it would have alone: its random draws are named by (seed, step).

    ``curve`` holds one row per epoch. ``diverged_step`` is the first step whose loss was not finite, or None.
    """

    def __init__(
        self, name: str, student: Classifier, method: Method, recipe: Recipe, *, total_steps: int, seed: int, compute: Compute | None = None
    ) -> None:
        self.name, self.student, self.method, self.total_steps, self.seed = name, student, method, total_steps, seed
        self.hard = HARD[recipe.hard_loss]
        self._together = Together(student, method, self.hard)
        self.device = next(student.parameters()).device
        self.compute = compute or Compute(self.device)
        self.optimizer = create_optimizer_v2(student.net, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        for adapters in param_groups_weight_decay(method, recipe.weight_decay):  # like the student's: biases and norms do not decay
            if adapters["params"]:
                self.optimizer.add_param_group(adapters)
        self.rates = scheduler(self.optimizer, recipe, total_steps)
        self.clip_norm, self.groups = recipe.clip_norm, mix_groups(recipe) // world()  # of this process
        # of weights and BatchNorm's statistics alike, as timm's are
        self.averages = {f"{decay:g}": ModelEmaV3(student.net, decay) for decay in recipe.ema}
        self.step = 0
        self.seconds = 0.0
        self.curve: list[Row] = []
        self.names: list[str] = []  # of the loss terms, in the order of the columns of _sums
        self._sums = torch.zeros(0, dtype=torch.float64, device=self.device)  # of the terms of each step since the last row of the curve
        self._steps_summed = 0
        self._taken = 0  # groups of the step that is being made
        self._running = RunningStatistics(student, method, groups=mix_groups(recipe))
        self._bad_step = torch.tensor(-1, device=self.device)
        self._bad_terms = torch.zeros(0, dtype=torch.bool, device=self.device)

    @cached_property  # made when it is needed first: whether compiling pays is known by then
    def _model(self) -> nn.Module:
        model = compiled(self._together) if self.compute.compiled else self._together
        if world() > 1:  # a head that no loss looks at gets no gradient
            model = synchronised(model, headless=self.hard is None or not self.method.hard_weight)
        return model

    @cached_property
    def _replayed(self) -> Replayed:
        return Replayed(self._pass_in_place, self._unchanged)

    def compile_if_quicker(self, batch: Batch, answers: Output | None) -> None:
        """Decide, on copies, in which of the kinds that are left to choose from a step takes the least time."""
        if len(self.compute.kinds) == 1:
            return

        def step(twin: Learner) -> None:
            twin._differentiate(batch, answers)
            torch.get_device_module(self.device).synchronize()

        with self._forked():
            steps: dict[Kind, Callable[[], object]] = {kind: partial(step, self._twin(kind)) for kind in self.compute.kinds}
            self.compute = replace(self.compute, kinds=(quickest(self.name, steps),))

    def take(self, group: int, batch: Batch, answers: Output | None) -> None:
        """Add one mix group's share to the gradient of its step; ``group`` counts the stream's groups over all steps, from 0.

        ``answers`` may be missing for a method that needs no teacher. Nothing here waits for the device.
        """
        started = time.perf_counter()
        if not self._taken:
            self.optimizer.zero_grad(
                set_to_none=self.compute.compiled != "graphs"
            )  # a graph adds to the gradients that it was recorded with
        seed_torch(self.seed, "step", group)  # dropout and drop path
        self._taken += 1
        model = self._model
        more_to_come = isinstance(model, DistributedDataParallel) and self._taken < self.groups
        with self._running, model.no_sync() if more_to_come else nullcontext():  # type: ignore[operator]
            self._record(self._differentiate(batch, answers))
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """The optimiser's step, when all groups of the batch were taken."""
        started = time.perf_counter()
        self._running.average()
        set_rate(self.rates, self.step)
        if self.clip_norm:
            clip_grad_norm_([*self.student.parameters(), *self.method.parameters()], self.clip_norm)
        self.optimizer.step()
        for average in self.averages.values():
            average.update(self.student.net)
        self.step, self._taken = self.step + 1, 0
        self._steps_summed += 1
        self.seconds += time.perf_counter() - started

    def step_bytes(self, batch: Batch, answers: Output | None) -> int:
        """Peak memory of one step on the device: forward pass, loss, backward pass, the first gradients. Of a copy: nothing changes here.

        The batch, the teacher's pass, the weights and the optimiser are not in it.
        """
        found = 0
        with self._forked():
            for _ in range(2 if self.device.type == "cuda" else 1):  # the first makes cuBLAS allocate what it keeps
                twin = self._twin(False)
                state = twin.state_dict()  # held: what a step replaces is not freed meanwhile
                found = peak_bytes(partial(twin._differentiate, batch, answers), self.device)
                del state
        return found

    def _twin(self, kind: Kind) -> "Learner":
        """A copy that computes in this way, and alone."""
        alone = copy.copy(self)
        alone.compute = replace(self.compute, kinds=(kind,))
        alone.__dict__.pop("_model", None)  # one that speaks to other processes cannot be copied
        twin = copy.deepcopy(alone)
        twin._model = compiled(twin._together) if kind else twin._together
        return twin

    def _forked(self) -> AbstractContextManager[None]:
        """Within, random draws leave no trace."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def average(self, decay: str) -> Classifier:
        """A copy of the student with the averaged weights."""
        student = copy.deepcopy(self.student)
        student.net.load_state_dict(self.averages[decay].module.state_dict())
        return student

    def close_epoch(self, epoch: int, images_seen: int, val_top1: float | None) -> None:
        """Add a row to the curve: mean loss terms since the last row. Every process calls it."""
        self._agree()
        means = (self._sums / max(1, self._steps_summed)).tolist()
        row: Row = {"epoch": epoch, "step": self.step, "images_seen": images_seen, "loss": sum(means)}
        self.curve.append(row | {f"loss_{name}": mean for name, mean in zip(self.names, means, strict=True)} | {"val_top1": val_top1})
        self._sums.zero_()
        self._steps_summed = 0

    @property
    def in_curve(self) -> int:
        """How many steps the curve has rows of."""
        return int(self.curve[-1]["step"] or 0) if self.curve else 0

    @property
    def diverged_step(self) -> int | None:
        """Waits for the device: ask between steps, not in each. Every process calls it."""
        self._agree()
        step = int(self._bad_step)
        return None if step < 0 else step

    @property
    def diverged_cause(self) -> str:
        """What was not finite, and what most often makes it so."""
        bad = [name for name, is_bad in zip(self.names, self._bad_terms.tolist(), strict=True) if is_bad]
        if not bad:
            return "the loss was finite but the trained student's logits are not: most often from a learning rate that is too high"
        if len(bad) == len(self.names):
            terms = ", ".join(bad)
            return f"no loss term ({terms}) was finite: the weights grew without bound, most often from a learning rate that is too high"
        return f"of the loss terms only {', '.join(bad)} was not finite: most often its weight is too high or its temperature too low"

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the curve so far; tensors and plain values only. Every process calls it."""
        self._agree()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": {decay: average.module.state_dict() for decay, average in self.averages.items()},
            "curve": self.curve,
            "names": self.names,
            "sums": self._sums,
            "steps_summed": self._steps_summed,
            "bad_step": self._bad_step,
            "bad_terms": self._bad_terms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.student.load_state_dict(state["student"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for decay, average in self.averages.items():
            average.module.load_state_dict(state["averages"][decay])
        self.step, self.seconds, self.curve, self.names = state["step"], state["seconds"], state["curve"], state["names"]
        self._steps_summed = state["steps_summed"]
        self._sums, self._bad_step, self._bad_terms = (state[key].to(self.device) for key in ("sums", "bad_step", "bad_terms"))

    def _differentiate(self, batch: Batch, answers: Output | None) -> Terms:
        """Forward and backward pass."""
        if answers is None and self.method.asks_teacher:
            raise ValueError(f"{self.name}: found no teacher's answers; allowed: none only for a method that needs no teacher")
        progress = torch.full((), (self.step + 1) / self.total_steps, device=self.device)
        if self.compute.compiled == "graphs":
            terms: Terms = self._replayed(vars(batch), None if answers is None else vars(answers), progress)
            return terms
        return self._pass(batch, answers, progress)

    def _pass(self, batch: Batch, answers: Output | None, progress: Float[Tensor, ""]) -> Terms:
        with self.compute.autocast():
            terms: Terms = self._model(batch, answers, progress)
        (torch.stack(list(terms.values())).sum() / self.groups).backward()
        return {name: term.detach() for name, term in terms.items()}

    def _pass_in_place(self, batch: dict[str, Any], answers: dict[str, Any] | None, progress: Float[Tensor, ""]) -> Terms:
        """The same for a graph, whose next replay knows only the tensors that were there: what a method replaces is written into them."""
        buffers = self._buffers()
        terms = self._pass(Batch(**batch), Output(**answers) if answers else None, progress)
        for module, name, buffer in buffers:
            if getattr(module, name) is not buffer:
                buffer.copy_(getattr(module, name))
                setattr(module, name, buffer)
        return terms

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Passes within leave buffers as they are, and add nothing to gradients; those that were not there are zero then."""
        kept = [(buffer, buffer.clone()) for *_, buffer in self._buffers()]
        gradients = [(one, None if one.grad is None else one.grad.clone()) for one in self._together.parameters()]
        with self._forked():
            yield
        for buffer, before in kept:
            buffer.copy_(before)
        for parameter, gradient in gradients:
            if parameter.grad is not None:
                parameter.grad.copy_(torch.zeros_like(parameter.grad) if gradient is None else gradient)

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [(module, name, values) for module in self._together.modules() for name, values in module.named_buffers(recurse=False)]

    def _agree(self) -> None:
        """What the processes noted of the steps so far becomes the same in all of them."""
        if world() > 1:
            mean_over_ranks([self._sums])
            steps = everyones(self._bad_step[None])
            first = torch.where(steps < 0, torch.iinfo(steps.dtype).max, steps).min()
            self._bad_step = torch.where((steps < 0).all(), -1, first)
            self._bad_terms = (everyones(self._bad_terms[None]) & (steps == first)[:, None]).any(dim=0)

    def _record(self, terms: Terms) -> None:
        values: Float[Tensor, " terms"] = torch.stack(list(terms.values()))
        if not self.names:
            self.names = list(terms)
            self._sums = torch.zeros(len(terms), dtype=torch.float64, device=self.device)
            self._bad_terms = torch.zeros(len(terms), dtype=torch.bool, device=self.device)
        bad = ~torch.isfinite(values)
        first = bad.any() & (self._bad_step < 0)
        self._bad_step = torch.where(first, self.step, self._bad_step)
        self._bad_terms = torch.where(first, bad, self._bad_terms)
        self._sums += values.double() / self.groups


def asked_of_teacher(learners: Iterable[Learner]) -> Asks:
    """All that any of them wants to know of the teacher."""
    return frozenset().union(*(learner.method.asks_teacher for learner in learners))


def total_steps(recipe: Recipe, train_images: int) -> int:
    """Optimiser steps of a run: ``recipe.epochs`` passes over the whole training split, whatever fraction of it is used."""
    return max(1, math.ceil(recipe.epochs * train_images / recipe.batch_size))
