"""Plain KD as three implementations run it: the official loop, timm's task, ours. Same weights, same views, same optimiser work.

The official loop is written anew from a description of what it does; no line of it is in here.
"""

import copy
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.loader import fast_collate
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdlib.config.schema import ComputeParams, RandAugmentParams, Recipe
from kdlib.engine.backend import choose_backend, fastest_teacher, threads
from kdlib.engine.gradients import StudentWithLoss
from kdlib.engine.learner import Job, Learner
from kdlib.engine.prefetch import prefetch
from kdlib.engine.probe import try_step
from kdlib.engine.teacher import Teacher
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.losses.hard import HARD
from kdlib.losses.kd import KD
from kdlib.models.build import Classifier, build
from kdlib.parallel.ranks import local_groups
from kdlib.seed import generator, seed_torch
from kdlib.types import Batch, Feature, Output
from kdlib.views import crop
from kdlib.views.mixup import mix_groups
from kdlib.views.stream import ViewStream

LOGITS = frozenset({Feature.LOGITS})
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
    channels: int = 1
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(
            epochs=1.0, batch_size=self.batch, group_size=self.group, repeats=1, optimizer="sgd", learning_rate=0.01, weight_decay=5e-4,
            clip_norm=0.0, warmup=0.0, warmup_lr=0.0, min_lr=0.0, milestones=[], ema=[], hard_loss="ce", label_smoothing=0.0,
            drop_path=0.0, crop_padding=0.125, crop_min_area=1.0, mixup_alpha=0.0, cutmix_alpha=0.0,
            randaugment=RandAugmentParams(operations=0, magnitude=0.0, magnitude_std=0.0), erasing=0.0, augment="batched",
        )  # fmt: skip

    @cached_property
    def pixels(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (self.images, self.size, self.size, self.channels), np.uint8)

    @cached_property
    def labels(self) -> np.ndarray:
        return np.random.default_rng(1).integers(0, self.classes, self.images)

    def stream(self, images: np.ndarray | Tensor, device: str = "cpu") -> ViewStream:
        return ViewStream(
            images, self.labels, np.arange(self.images), classes=self.classes, recipe=self.recipe, hflip=0.5, seed=0, device=device
        )

    def learns(self, number: int) -> Classifier:
        """A student, the same in every implementation."""
        seed_torch(number, "init")
        return self.classifier(self.student).to(self.device)

    def teaches(self) -> Classifier:
        return copy.deepcopy(self._taught).to(self.device)

    @cached_property
    def _taught(self) -> Classifier:
        seed_torch(0, "teacher")
        classifier = self.classifier(self.teacher)
        with torch.no_grad():
            for _ in range(3):  # statistics of BatchNorm that are not the initial ones
                classifier(torch.rand(64, self.channels, self.size, self.size))
        return classifier.eval()

    def classifier(self, name: str) -> Classifier:
        """Behind the normalisation that the official loop gives to teacher and student alike."""
        made = build(name, self.classes, self.channels, self.size)
        made.mean.fill_(HALF)
        made.std.fill_(HALF)
        return made


class PilViews(Dataset[tuple[np.ndarray, int]]):
    """One view at a time, as torchvision's transforms make it of a PIL image: pad, crop, mirror; with the draws of our stream."""

    def __init__(self, task: Task, steps: range) -> None:
        self.task, self.steps = task, steps
        self.pad = round(task.recipe.crop_padding * task.size)
        self.stream = task.stream(task.pixels)

    def __len__(self) -> int:
        return len(self.steps) * self.task.batch

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        step, row = divmod(place, self.task.batch)
        places, crops = self._draws(self.steps[step])
        index = places[row]
        pixels = self.task.pixels[index]
        image = Image.fromarray(pixels[..., 0] if self.task.channels == 1 else pixels)
        down, right = crops.shifts[:, row] + self.pad
        view = ImageOps.expand(image, self.pad).crop((right, down, right + self.task.size, down + self.task.size))
        if crops.flips[row]:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        planes = np.array(view).reshape(self.task.size, self.task.size, self.task.channels).transpose(2, 0, 1)
        return np.ascontiguousarray(planes), int(self.task.labels[index])

    def _draws(self, step: int) -> tuple[np.ndarray, crop.Crops]:
        """Of one batch; drawn once for it in each worker."""
        if getattr(self, "_at", None) != step:
            task = self.task
            crops = crop.draw_crops(generator(0, "views", step), task.recipe, 0.5, (task.batch, task.size, task.size))
            self._at, self._kept = step, (self.stream.positions(step), crops)
        return self._kept


def pil_batches(task: Task, steps: range, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches from worker processes, as timm's PrefetchLoader makes them: sent as bytes, normalised on the device."""
    loader = DataLoader(PilViews(task, steps), task.batch, num_workers=workers, collate_fn=fast_collate, pin_memory=task.on_gpu)
    for images, labels in loader:
        there = images.to(task.device, non_blocking=True)
        yield there.float().sub_(255 * HALF).div_(255 * HALF), labels.to(task.device, non_blocking=True)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


class Official:
    """The VanillaKD training loop: NCHW, eager, three numbers fetched for every student and step, one teacher pass for its students.

    On a GPU under fp16 autocast with a gradient scaler; it waits for the device after every student, and empties the memory cache
    twice for each of several.
    """

    name = "official"

    def __init__(self, task: Task, students: int, workers: int) -> None:
        self.task, self.workers = task, workers
        self.students = [task.learns(number).net.to(memory_format=torch.contiguous_format).train() for number in range(students)]
        self.teacher = task.teaches().net.to(memory_format=torch.contiguous_format)
        self.optimizers = [create_optimizer_v2(net, opt="sgd", lr=0.01, weight_decay=5e-4) for net in self.students]
        self.scalers = [torch.amp.GradScaler(task.device, enabled=task.on_gpu) for _ in self.students]
        self.hard = SoftTargetCrossEntropy()

    def batches(self, steps: range) -> Iterator[Any]:
        return pil_batches(self.task, steps, self.workers)

    def step(self, batch: tuple[Tensor, Tensor]) -> list[float]:
        images, labels = batch
        targets, losses = one_hot(labels, self.task.classes), []
        half = torch.autocast(self.task.device, torch.float16 if self.task.on_gpu else torch.bfloat16, enabled=self.task.on_gpu)
        with torch.no_grad(), half:
            taught = self.teacher(images)
        for net, optimizer, scaler in zip(self.students, self.optimizers, self.scalers, strict=True):
            with half:
                logits = net(images)
                hard = self.hard(logits, targets)
                soft = F.kl_div(F.log_softmax(logits, dim=1), F.softmax(taught, dim=1), reduction="batchmean")
                loss = hard + soft
            fetched = [hard.item(), soft.item(), loss.item()]
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if self.task.on_gpu:
                torch.cuda.synchronize()
                for _ in range(2 if len(self.students) > 1 else 0):
                    torch.cuda.empty_cache()
            losses.append(fetched[2])
        return losses


class Timm:
    """timm's LogitDistillationTask at its best: channels_last, nothing fetched; on a GPU compiled, under bf16 autocast."""

    name = "timm"

    def __init__(self, task: Task, workers: int) -> None:
        self.task, self.workers = task, workers
        net = task.learns(0).net.to(memory_format=torch.channels_last).train()
        teacher = task.teaches().net.to(memory_format=torch.channels_last)
        self.learns = LogitDistillationTask(
            net,
            DistillationTeacher(teacher, device=torch.device(task.device)),
            nn.CrossEntropyLoss(),
            distill_loss_weight=1.0,
            task_loss_weight=1.0,
            device=torch.device(task.device),
            verbose=False,
        )
        self.learns.teacher.mean_kd.copy_(self.learns.student_mean)  # one normalisation, as in the official loop
        self.learns.teacher.std_kd.copy_(self.learns.student_std)
        self.learns.train()
        if task.on_gpu:
            self.learns.compile()
        self.optimizer = create_optimizer_v2(net, opt="sgd", lr=0.01, weight_decay=5e-4)

    def batches(self, steps: range) -> Iterator[Any]:
        return pil_batches(self.task, steps, self.workers)

    def step(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        images, labels = batch
        with torch.autocast(self.task.device, torch.bfloat16, enabled=self.task.on_gpu):
            loss = self.learns(images.contiguous(memory_format=torch.channels_last), labels)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]


class Ours:
    """kdlib's learners on its view stream, in this process, as kdlib.engine.loop runs them."""

    name = "ours"

    def __init__(self, task: Task, students: range) -> None:
        self.task = task
        backend = choose_backend(AUTO, torch.device(task.device), task.recipe, task.steps, task.pixels.nbytes, LOGITS)
        self.stream = task.stream(torch.from_numpy(task.pixels).to(task.device) if backend.resident else task.pixels, task.device)
        batch = self.stream.batch(0)
        self.cache = self._cache(fastest_teacher(Teacher(task.teaches()), backend, batch.images, LOGITS), None)
        self.ahead, self.learners = backend.ahead, []
        output = self.cache.of_teacher(batch.images, LOGITS)
        for number in students:
            job = Job(f"kd {number}", partial(KD, hard_weight=1.0, weight=1.0, temperature=1.0), False, Path())
            make = partial(self._student, job, number)
            cost = try_step(job.name, make, batch, output, backend, mix_groups(task.recipe))
            backend = replace(backend, kinds=(cost.kind,))  # decided once: the others are the same
            self.learners.append(Learner(job, make(), task.recipe, total_steps=task.steps, seed=0, backend=backend))

    def _student(self, job: Job, number: int) -> StudentWithLoss:
        return StudentWithLoss(self.task.learns(number), job.method(), HARD[self.task.recipe.hard_loss])

    def keeping(self, folder: Path) -> "Ours":
        """The same, which keeps its teacher's answers, or reads them if they are there."""
        other = copy.copy(self)
        other.cache = self._cache(self.cache.teacher, folder)
        return other

    def _cache(self, teacher: Teacher, folder: Path | None) -> TeacherCache:
        return TeacherCache(teacher, folder, self.task.batch // mix_groups(self.task.recipe), self.task.images // self.task.batch)

    def batches(self, steps: range) -> Iterator[Any]:
        """Of every step its groups: number, views, answers."""
        groups = mix_groups(self.task.recipe)
        places = ((step, number) for step in steps for number in local_groups(groups))
        made: list[Any] = []
        with threads(max(1, torch.get_num_threads() - self.ahead)):
            for (step, number), (batch, said) in prefetch(self._make, places, self.ahead):
                made.append((step * groups + number, batch, said))
                if number == local_groups(groups)[-1]:
                    yield made
                    made = []
        self.cache.finish()

    def _make(self, place: tuple[int, int]) -> tuple[Batch, Output]:
        step, number = place
        batch = self.stream.batch(step, number)
        return batch, self.cache(step * mix_groups(self.task.recipe) + number, batch.images, LOGITS)

    def step(self, made: Any) -> list[Tensor]:
        """Losses stay where they are: nothing waits for the device."""
        before = [_summed(learner) for learner in self.learners]
        for group, batch, said in made:
            for learner in self.learners:
                learner.take(group, batch, said)
        for learner in self.learners:
            learner.advance()
        return [_summed(learner) - was for learner, was in zip(self.learners, before, strict=True)]


class OursSideBySide:
    """The same in a process for each core, as the study shares its students out (kdlib.parallel.placement)."""

    name = "ours"

    def __init__(self, task: Task, students: int, processes: int) -> None:
        self.task = task
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
        pipe.send([[float(loss) for loss in losses] for losses in zip(*found, strict=True)])


def _summed(learner: Learner) -> Tensor | float:
    return learner.curve._sums.sum() if len(learner.curve._sums) else 0.0
