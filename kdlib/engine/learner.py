"""A learner: one student with its loss, its optimiser and its schedule. Learners share nothing but the batch and the teacher's output."""

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch.nn.utils import clip_grad_norm_

from kdlib.config.schema import Recipe
from kdlib.engine.backend import Backend
from kdlib.engine.batchnorm import RunningStatistics
from kdlib.engine.curve import LossCurve
from kdlib.engine.gradients import Gradients, StudentWithLoss
from kdlib.engine.lr_schedule import scheduler, set_rate
from kdlib.losses.base import Method
from kdlib.models.build import Classifier
from kdlib.parallel.ranks import world
from kdlib.seed import seed_torch
from kdlib.types import Asks, Batch, Output
from kdlib.views.mixup import mix_groups


@dataclass(frozen=True)
class Job:
    """One run to be trained: what it is called, what makes its method, and the folder that it is written to."""

    name: str
    method: Callable[[], Method]
    on_test: bool  # a trial of a sweep is measured on the validation split alone
    folder: Path


class Learner:
    """Learns by one job. Trained among others it ends with the weights it would have alone: its random draws are named by (seed, step).

    ``model``: the student with its loss, at the beginning of its training. ``backend``: how it computes.
    """

    def __init__(self, job: Job, model: StudentWithLoss, recipe: Recipe, *, total_steps: int, seed: int, backend: Backend) -> None:
        self.job, self.student, self.method, self.backend = job, model.student, model.method, backend
        self.total_steps, self._seed = total_steps, seed
        self.optimizer = create_optimizer_v2(
            self.student.net, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        for adapters in param_groups_weight_decay(self.method, recipe.weight_decay):  # like the student's: biases and norms do not decay
            if adapters["params"]:
                self.optimizer.add_param_group(adapters)
        self._rates, self._clip_norm = scheduler(self.optimizer, recipe, total_steps), recipe.clip_norm
        # of weights and BatchNorm's statistics alike, as timm's are
        self.averages = {f"{decay:g}": ModelEmaV3(self.student.net, decay) for decay in recipe.ema}
        self._statistics = RunningStatistics(self.student, self.method, groups=mix_groups(recipe))
        self._groups = mix_groups(recipe) // world()  # of this process
        self._gradients = Gradients(model, backend, self._groups, distributed=world() > 1)
        self.curve = LossCurve(backend.device)
        self.step = 0
        self.seconds = 0.0
        self._taken = 0  # groups of the step that is being made

    def take(self, group: int, batch: Batch, teacher: Output | None) -> None:
        """Add one mix group's share to the gradient of its step; ``group`` counts the stream's groups over all steps, from 0.

        ``teacher`` may be missing for a method that needs none. Nothing here waits for the device.
        """
        started = time.perf_counter()
        if not self._taken:  # a graph adds to the gradients that it was recorded with
            self.optimizer.zero_grad(set_to_none=self.backend.compiled != "graphs")
        seed_torch(self._seed, "step", group)  # dropout and drop path
        self._taken += 1
        with self._statistics, self._gradients.kept_here() if self._taken < self._groups else nullcontext():
            terms = self._gradients(batch, teacher, (self.step + 1) / self.total_steps)
            self.curve.add(terms, self.step, self._groups)
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """The optimiser's step, when all groups of the batch were taken."""
        started = time.perf_counter()
        self._statistics.average()
        set_rate(self._rates, self.step)
        if self._clip_norm:
            clip_grad_norm_([*self.student.parameters(), *self.method.parameters()], self._clip_norm)
        self.optimizer.step()
        for average in self.averages.values():
            average.update(self.student.net)
        self.step, self._taken = self.step + 1, 0
        self.curve.end_step()
        self.seconds += time.perf_counter() - started

    def average(self, decay: str) -> Classifier:
        """A copy of the student with the averaged weights."""
        student = copy.deepcopy(self.student)
        student.net.load_state_dict(self.averages[decay].module.state_dict())
        return student

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the curve so far; tensors and plain values only. Every process calls it."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": {decay: average.module.state_dict() for decay, average in self.averages.items()},
            **self.curve.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.student.load_state_dict(state["student"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for decay, average in self.averages.items():
            average.module.load_state_dict(state["averages"][decay])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve.load_state_dict(state)


def asked_of_teacher(methods: Iterable[Method]) -> Asks:
    """All that any of these methods wants to know of the teacher."""
    return frozenset().union(*(method.asks_teacher for method in methods))
