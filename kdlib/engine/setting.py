"""What the runs of a comparison share at one seed, and what is made of it at the beginning of a training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from kdlib.config.schema import ComputeParams, Recipe
from kdlib.data.dataset import DataSet
from kdlib.data.lazy_images import LazyImages
from kdlib.engine.backend import Backend
from kdlib.engine.gradients import StudentWithLoss
from kdlib.engine.learner import Job, Learner
from kdlib.engine.teacher import Teacher
from kdlib.losses.base import Method
from kdlib.losses.hard import HARD
from kdlib.models.build import build
from kdlib.seed import seed_torch
from kdlib.types import Setup
from kdlib.views.stream import ViewStream

Images = UInt8[np.ndarray, "samples height width channels"] | UInt8[Tensor, "samples height width channels"] | LazyImages


@dataclass(frozen=True)
class Setting:
    """What the runs of a comparison share at one seed: they see the same batches, and the teacher passes once for all."""

    data: DataSet
    index: Int[np.ndarray, " subset"]  # the training images that are used
    student: str
    size: int  # pixels that the student looks at
    teacher: Teacher | None
    recipe: Recipe
    seed: int
    device: torch.device
    title: str  # in logs
    compute: ComputeParams
    answers_gb: float = 0.0  # that the teacher's outputs may take on the disk
    cache_folder: Path | None = None  # for the teacher's outputs, named after all that they depend on; None keeps none

    @property
    def total_steps(self) -> int:
        """Optimiser steps of each run."""
        return total_steps(self.recipe, len(self.data.train.labels))


def total_steps(recipe: Recipe, train_images: int) -> int:
    """Optimiser steps of a run: ``recipe.epochs`` passes over the whole training split, whatever fraction of it is used."""
    return max(1, math.ceil(recipe.epochs * train_images / recipe.batch_size))


def view_stream(setting: Setting, images: Images) -> ViewStream:
    """The stream of the training views; ``images``: of the training split, wherever they lie."""
    data = setting.data
    return ViewStream(
        images,
        data.train.labels,
        setting.index,
        classes=data.classes,
        recipe=setting.recipe,
        hflip=data.hflip,
        seed=setting.seed,
        device=setting.device,
    )


def student_with_loss(setting: Setting, make: Callable[[], Method]) -> StudentWithLoss:
    """A student and a method as training begins. Their weights are drawn from torch's global generator, which is seeded for it."""
    data = setting.data
    seed_torch(setting.seed, "init")  # of student and adapters: the same start for every method
    student = build(setting.student, data.classes, data.channels, setting.size, setting.recipe.drop_path).to(setting.device)
    method = make()
    labels = torch.from_numpy(np.asarray(data.train.labels[setting.index], np.int64))
    method.adapt(Setup(student.shape, (setting.teacher or student).shape, labels))
    return StudentWithLoss(student, method.to(setting.device), HARD[setting.recipe.hard_loss])


def begin(setting: Setting, job: Job, backend: Backend) -> Learner:
    """A learner at the beginning of its training."""
    model = student_with_loss(setting, job.method)
    return Learner(job, model, setting.recipe, total_steps=setting.total_steps, seed=setting.seed, backend=backend)
