"""A learner: one student with its loss, its optimiser and its schedule. Learners share nothing but the batch and the answers."""

import copy
import functools
import math
import time
from typing import Any

import torch
from jaxtyping import Float
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from kdlib.config import Recipe
from kdlib.losses.base import Method
from kdlib.losses.hard import HARD
from kdlib.models import Classifier
from kdlib.seed import seed_torch
from kdlib.train.memory import peak_bytes
from kdlib.types import Batch, Output, Terms

Row = dict[str, float | int | None]


class Learner:
    """Trained among others it ends with the weights that it would have alone: its random draws are named by (seed, step).

    ``curve`` holds one row per epoch. ``diverged_step`` is the first step whose loss was not finite, or None.
    """

    def __init__(self, name: str, student: Classifier, method: Method, recipe: Recipe, *, total_steps: int, seed: int) -> None:
        self.name, self.student, self.method, self.total_steps, self.seed = name, student, method, total_steps, seed
        self.hard = HARD[recipe.hard_loss]
        self.optimizer = create_optimizer_v2(student.net, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        for adapters in param_groups_weight_decay(method, recipe.weight_decay):  # like the student's: biases and norms do not decay
            if adapters["params"]:
                self.optimizer.add_param_group(adapters)
        self.schedule = CosineLRScheduler(
            self.optimizer, t_initial=total_steps, warmup_t=round(recipe.warmup * total_steps), t_in_epochs=False, warmup_lr_init=0.0
        )
        self.step = 0
        self.seconds = 0.0
        self.curve: list[Row] = []
        self.names: list[str] = []  # of the loss terms, in the order of the columns of _sums
        self.device = next(student.parameters()).device
        self._sums = torch.zeros(0, dtype=torch.float64, device=self.device)  # of the terms since the last row of the curve
        self._steps_summed = 0
        self._bad_step = torch.tensor(-1, device=self.device)
        self._bad_terms = torch.zeros(0, dtype=torch.bool, device=self.device)

    def update(self, batch: Batch, answers: Output | None) -> None:
        """One optimiser step on one batch; ``answers`` may be missing for a method that needs no teacher.

        Nothing here waits for the device.
        """
        started = time.perf_counter()
        seed_torch(self.seed, "step", self.step)  # dropout and drop path
        # half a step in: neither the first nor the last step has a learning rate of zero
        self.schedule.step_update(self.step + 0.5)  # type: ignore[arg-type]
        self.optimizer.zero_grad()
        terms = self._differentiate(batch, answers)
        self.optimizer.step()
        self._record(terms)
        self.step += 1
        self.seconds += time.perf_counter() - started

    def step_bytes(self, batch: Batch, answers: Output | None) -> int:
        """Peak memory of one step on the device: forward pass, loss, backward pass, the first gradients. Of a copy: nothing changes here.

        The batch, the teacher's pass, the weights and the optimiser are not in it.
        """
        found = 0
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in range(2 if self.device.type == "cuda" else 1):  # the first makes cuBLAS allocate what it keeps
                twin = copy.deepcopy(self)
                state = twin.state_dict()  # held: what a step replaces is not freed meanwhile
                found = peak_bytes(functools.partial(twin._differentiate, batch, answers), self.device)
                del state
        return found

    def close_epoch(self, epoch: int, images_seen: int, val_top1: float | None) -> None:
        """Add a row to the curve: mean loss terms since the last row."""
        means = (self._sums / max(1, self._steps_summed)).tolist()
        row: Row = {"epoch": epoch, "step": self.step, "images_seen": images_seen, "loss": sum(means)}
        self.curve.append(row | {f"loss_{name}": mean for name, mean in zip(self.names, means, strict=True)} | {"val_top1": val_top1})
        self._sums.zero_()
        self._steps_summed = 0

    @property
    def diverged_step(self) -> int | None:
        """Waits for the device: ask between steps, not in each."""
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
        """Everything that the next step depends on, and the curve so far; tensors and plain values only."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
        self.step, self.seconds, self.curve, self.names = state["step"], state["seconds"], state["curve"], state["names"]
        self._steps_summed = state["steps_summed"]
        self._sums, self._bad_step, self._bad_terms = (state[key].to(self.device) for key in ("sums", "bad_step", "bad_terms"))

    def _differentiate(self, batch: Batch, answers: Output | None) -> Terms:
        """Forward and backward pass."""
        output = self.student(batch.images, self.method.asks_student)
        if answers is None:
            if self.method.asks_teacher:
                raise ValueError(f"{self.name}: found no teacher's answers; allowed: none only for a method that needs no teacher")
            answers = output
        progress = torch.full((), (self.step + 1) / self.total_steps, device=self.device)
        terms: Terms = self.method(output, answers, batch, self.hard, progress)
        torch.stack(list(terms.values())).sum().backward()
        return terms

    def _record(self, terms: Terms) -> None:
        values: Float[Tensor, " terms"] = torch.stack([term.detach() for term in terms.values()])
        if not self.names:
            self.names = list(terms)
            self._sums = torch.zeros(len(terms), dtype=torch.float64, device=self.device)
            self._bad_terms = torch.zeros(len(terms), dtype=torch.bool, device=self.device)
        bad = ~torch.isfinite(values)
        first = bad.any() & (self._bad_step < 0)
        self._bad_step = torch.where(first, self.step, self._bad_step)
        self._bad_terms = torch.where(first, bad, self._bad_terms)
        self._sums += values.double()
        self._steps_summed += 1


def total_steps(recipe: Recipe, train_images: int) -> int:
    """Optimiser steps of a run: ``recipe.epochs`` passes over the whole training split, whatever fraction of it is used."""
    return max(1, math.ceil(recipe.epochs * train_images / recipe.batch_size))
