"""Plain KD as three implementations run it: the official loop, timm's task, ours. Same weights, same views, same optimiser work.

The official loop is written anew from a description of what it does; no line of it is in here.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.loader import fast_collate
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdlib.config import ComputeParams, RandAugmentParams, Recipe
from kdlib.data import augment
from kdlib.data.stream import ViewStream
from kdlib.losses.kd import KD
from kdlib.models import build
from kdlib.seed import generator, seed_torch
from kdlib.train.ahead import in_time
from kdlib.train.answers import Answers
from kdlib.train.compute import Compute, choose
from kdlib.train.fit import own
from kdlib.train.learner import Learner
from kdlib.train.teacher import Teacher
from kdlib.train.threads import threads
from kdlib.types import Batch, Output, Part

LOGITS = frozenset({Part.LOGITS})
CPU = torch.device("cpu")
AUTO = ComputeParams(precision="auto", compile="auto", resident="auto", ahead="auto")
HALF = 0.5  # mean and standard deviation of our nets' normalisation


@dataclass(frozen=True)
class Task:
    """What all implementations do."""

    student: str = "kd_resnet8_w16_s2"
    teacher: str = "kd_resnet14_w32_s2"
    size: int = 16
    batch: int = 128
    group: int | None = None  # images of a mix group; None: all of the batch
    classes: int = 30
    images: int = 6000
    students: int = 8
    steps: int = 100_000  # of the schedule: so long that the learning rate stays as it is

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(
            epochs=1.0, batch_size=self.batch, group_size=self.group, repeats=1, optimizer="sgd", learning_rate=0.01, weight_decay=5e-4,
            clip_norm=0.0, warmup=0.0, ema=[], hard_loss="ce", label_smoothing=0.0, drop_path=0.0, crop_padding=0.125, crop_min_area=1.0,
            mixup_alpha=0.0, cutmix_alpha=0.0, randaugment=RandAugmentParams(operations=0, magnitude=0.0, magnitude_std=0.0), erasing=0.0,
            augment="batched",
        )  # fmt: skip

    @cached_property
    def stream(self) -> ViewStream:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.images, self.size, self.size, 1), np.uint8)
        labels = rng.integers(0, self.classes, self.images)
        return ViewStream(images, labels, np.arange(self.images), classes=self.classes, recipe=self.recipe, hflip=0.5, seed=0)

    def net(self, number: int) -> nn.Module:
        """A student's timm model, the same in every implementation."""
        seed_torch(number, "init")
        return build(self.student, self.classes, 1, self.size).net

    def taught_by(self) -> nn.Module:
        seed_torch(0, "teacher")
        classifier = build(self.teacher, self.classes, 1, self.size)
        with torch.no_grad():
            for _ in range(3):  # statistics of BatchNorm that are not the initial ones
                classifier(torch.rand(64, 1, self.size, self.size))
        return classifier.net.eval()


class PilViews(Dataset[tuple[np.ndarray, int]]):
    """One view at a time, as torchvision's transforms make it of a PIL image: pad, crop, mirror; with the draws of our stream."""

    def __init__(self, task: Task, steps: range) -> None:
        self.task, self.steps = task, steps
        self.pad = round(task.recipe.crop_padding * task.size)

    def __len__(self) -> int:
        return len(self.steps) * self.task.batch

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        step, row = divmod(place, self.task.batch)
        places, crops = self._draws(self.steps[step])
        index = places[row]
        image = Image.fromarray(self.task.stream.images[index][..., 0])
        down, right = crops.shifts[:, row] + self.pad
        view = ImageOps.expand(image, self.pad).crop((right, down, right + self.task.size, down + self.task.size))
        if crops.flips[row]:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(view)[None], int(self.task.stream.labels[index])

    def _draws(self, step: int) -> tuple[np.ndarray, augment.Crops]:
        """Of one batch; drawn once for it in each worker."""
        if getattr(self, "_at", None) != step:
            stream, task = self.task.stream, self.task
            crops = augment.draw(generator(0, "views", step), task.recipe, 0.5, (task.batch, task.size, task.size))
            self._at, self._kept = step, (stream.places(step), crops)
        return self._kept


def pil_batches(task: Task, steps: range, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches from worker processes, as timm's PrefetchLoader makes them on a CPU."""
    loader = DataLoader(PilViews(task, steps), task.batch, num_workers=workers, collate_fn=fast_collate)
    for images, labels in loader:
        yield images.float().sub_(255 * HALF).div_(255 * HALF), labels


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


class Official:
    """The VanillaKD training loop: NCHW, eager, three numbers fetched for every student and step, one teacher pass for its students."""

    name = "official"

    def __init__(self, task: Task, students: int, workers: int) -> None:
        self.task, self.workers = task, workers
        self.students = [task.net(number).to(memory_format=torch.contiguous_format).train() for number in range(students)]
        self.teacher = task.taught_by().to(memory_format=torch.contiguous_format)
        self.optimizers = [create_optimizer_v2(net, opt="sgd", lr=0.01, weight_decay=5e-4) for net in self.students]
        self.hard = SoftTargetCrossEntropy()

    def batches(self, steps: range) -> Iterator[Any]:
        return pil_batches(self.task, steps, self.workers)

    def step(self, batch: tuple[Tensor, Tensor]) -> list[float]:
        images, labels = batch
        targets, losses = one_hot(labels, self.task.classes), []
        with torch.no_grad():
            taught = self.teacher(images)
        for net, optimizer in zip(self.students, self.optimizers, strict=True):
            logits = net(images)
            hard = self.hard(logits, targets)
            soft = F.kl_div(F.log_softmax(logits, dim=1), F.softmax(taught, dim=1), reduction="batchmean")
            loss = hard + soft
            fetched = [hard.item(), soft.item(), loss.item()]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(fetched[2])
        return losses


class Timm:
    """timm's LogitDistillationTask at its best on a CPU: channels_last, eager (compiling loses there), nothing fetched."""

    name = "timm"

    def __init__(self, task: Task, workers: int) -> None:
        self.task, self.workers = task, workers
        net = task.net(0).to(memory_format=torch.channels_last).train()
        teacher = task.taught_by().to(memory_format=torch.channels_last)
        self.learns = LogitDistillationTask(
            net, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=1.0, verbose=False
        )
        self.learns.train()
        self.optimizer = create_optimizer_v2(net, opt="sgd", lr=0.01, weight_decay=5e-4)

    def batches(self, steps: range) -> Iterator[Any]:
        return pil_batches(self.task, steps, self.workers)

    def step(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        images, labels = batch
        loss = self.learns(images.contiguous(memory_format=torch.channels_last), labels)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]


class Ours:
    """kdlib's learners on its view stream, in this process, as kdlib.train.fit runs them: a thread of its own makes the next answers."""

    name = "ours"

    def __init__(self, task: Task, students: range, folder: Path | None = None) -> None:
        self.task = task
        seed_torch(0, "teacher")
        classifier = build(task.teacher, task.classes, 1, task.size)
        classifier.net.load_state_dict(task.taught_by().state_dict())
        self.answers = Answers(Teacher(classifier), folder, task.batch // task.recipe.groups, task.images // task.batch, Compute(CPU))
        self.ahead = choose(AUTO, CPU, task.recipe, task.steps, 0).ahead
        self.learners = []
        for number in students:
            student = build(task.student, task.classes, 1, task.size)
            student.net.load_state_dict(task.net(number).state_dict())
            kd = KD(hard_weight=1.0, weight=1.0, temperature=1.0)
            self.learners.append(Learner(f"kd {number}", student, kd, task.recipe, total_steps=task.steps, seed=0))

    def batches(self, steps: range) -> Iterator[Any]:
        """Of every step its groups: number, views, answers."""
        groups = self.task.recipe.groups
        places = ((step, number) for step in steps for number in own(groups))
        made: list[Any] = []
        with threads(max(1, torch.get_num_threads() - self.ahead)):
            for (step, number), (batch, said) in in_time(self._make, places, self.ahead, CPU):
                made.append((step * groups + number, batch, said))
                if number == own(groups)[-1]:
                    yield made
                    made = []

    def _make(self, place: tuple[int, int]) -> tuple[Batch, Output]:
        step, number = place
        batch = self.task.stream.batch(step, number)
        return batch, self.answers(step * self.task.recipe.groups + number, batch.images, LOGITS)

    def step(self, made: Any) -> list[float]:
        before = [learner._sums.sum() if len(learner._sums) else torch.zeros(()) for learner in self.learners]
        for group, batch, said in made:
            for learner in self.learners:
                learner.take(group, batch, said)
        for learner in self.learners:
            learner.advance()
        return [float(learner._sums.sum() - was) for learner, was in zip(self.learners, before, strict=True)]


class OursSideBySide:
    """The same in a process for each core, as the study shares its students out (kdlib.train.schedule)."""

    name = "ours"

    def __init__(self, task: Task, students: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        share = -(-students // processes)
        self.pipes = []
        for first in range(0, students, share):
            ours, theirs = context.Pipe()
            numbers = range(first, min(first + share, students))
            context.Process(target=_serve, args=(theirs, task, numbers), daemon=True).start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def batches(self, steps: range) -> Iterator[range]:
        yield steps

    def step(self, steps: range) -> list[list[float]]:
        """All steps at once: a list for each student."""
        for pipe in self.pipes:
            pipe.send(steps)
        return [losses for pipe in self.pipes for losses in pipe.recv()]


def _serve(pipe: Any, task: Task, students: range) -> None:
    torch.set_num_threads(1)
    ours = Ours(task, students)
    pipe.send("ready")
    while True:
        try:
            steps = pipe.recv()
        except EOFError:  # nobody wants more
            return
        found = [ours.step(batch) for batch in ours.batches(steps)]
        pipe.send([list(losses) for losses in zip(*found, strict=True)])


def version() -> str:
    return f"torch {torch.__version__}, timm {timm.__version__}"
