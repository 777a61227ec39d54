"""From a resolved description to finished runs: what a run's numbers depend on is here and below."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kdlib.data.lazy_images import LazyImages
from kdlib.engine import checkpoint
from kdlib.engine.backend import Backend, choose_backend, fastest_teacher
from kdlib.engine.learner import Job, Learner, asked_of_teacher
from kdlib.engine.loop import TrainingLoop
from kdlib.engine.metrics import top1
from kdlib.engine.probe import StepCost, try_step
from kdlib.engine.record import write_runs
from kdlib.engine.setting import Setting, begin, student_with_loss, view_stream
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.errors import Refused
from kdlib.parallel.ranks import gather_ranks, rank, say, wait_for_all, world
from kdlib.types import Asks
from kdlib.views.mixup import mix_groups
from kdlib.views.stream import ViewStream

GPU_TOLERANCE = 0.05  # of a logit: sums there are not repeated in the same order


def train(setting: Setting, jobs: Sequence[Job], *, save_seconds: float) -> None:
    """Train the jobs together from where their checkpoints left off, measure each, write each folder; metrics.json comes last.

    One step of each is tried on a student that is thrown away: what it costs, and how it is computed. A loss that is not finite ends its
    run as ``diverged``; the others go on.
    """
    backend, stream = _open_stream(setting, asks := asked_of_teacher(job.method() for job in jobs))
    teacher = _open_teacher(setting, asks, backend, stream)
    costs = _try_steps(setting, jobs, asks, backend, stream, teacher)  # first: a run that cannot be measured fails before hours
    learners = _resume(setting, jobs, backend, costs)
    seconds = TrainingLoop(learners, stream, teacher, partial(_val_top1, setting), _save, save_seconds, setting.title, backend.ahead).run()
    write_runs(setting, learners, costs, teacher, seconds)


def _open_stream(setting: Setting, asks: Asks) -> tuple[Backend, ViewStream]:
    images = setting.data.train.images
    size = None if isinstance(images, LazyImages) else images.nbytes
    backend = choose_backend(setting.compute, setting.device, setting.recipe, setting.total_steps, size, asks)
    return backend, view_stream(setting, torch.from_numpy(np.array(images)).to(setting.device) if backend.resident else images)


def _open_teacher(setting: Setting, asks: Asks, backend: Backend, stream: ViewStream) -> TeacherCache | None:
    """The teacher, and where its outputs are kept; says how much room they take before they take it."""
    if not setting.teacher:
        return None
    recipe = setting.recipe
    teacher = fastest_teacher(setting.teacher, backend, stream.batch(0).images, asks)
    per_epoch = mix_groups(recipe) * max(1, len(setting.data.train.labels) // recipe.batch_size)
    tolerance = 0.0 if setting.device.type == "cpu" else GPU_TOLERANCE
    cache = TeacherCache(teacher, setting.cache_folder, recipe.batch_size // mix_groups(recipe), per_epoch, tolerance)
    if asks and setting.cache_folder:
        gigabytes = cache.bytes(setting.total_steps * mix_groups(recipe), asks) / 1e9
        within = gigabytes <= setting.answers_gb
        what = f"are kept in {setting.cache_folder}" if within else f"are not kept: more than study.answers_gb, {setting.answers_gb:g} GB"
        say(f"{setting.title}  the teacher's answers, {gigabytes:.3g} GB, {what}")
        cache.folder = setting.cache_folder if within else None
    return cache


def _try_steps(
    setting: Setting, jobs: Sequence[Job], asks: Asks, backend: Backend, stream: ViewStream, teacher: TeacherCache | None
) -> list[StepCost]:
    batch = stream.batch(0)
    # not from the files: how many threads compute is not what it will be
    output = teacher.of_teacher(batch.images, asks) if teacher and asks else None
    groups = mix_groups(setting.recipe) // world()
    return [try_step(job.name, partial(student_with_loss, setting, job.method), batch, output, backend, groups) for job in jobs]


def _resume(setting: Setting, jobs: Sequence[Job], backend: Backend, costs: Sequence[StepCost]) -> list[Learner]:
    """Learners from where their checkpoints left off."""
    learners = [begin(setting, job, replace(backend, kinds=(cost.kind,))) for job, cost in zip(jobs, costs, strict=True)]
    for learner in learners:
        state = checkpoint.newest(learner.job.folder)
        if state is not None:
            learner.load_state_dict(state)
        steps = gather_ranks(torch.tensor([learner.step])).tolist()
        if len(set(steps)) > 1:  # a folder that machines share shows all of them the same files, but may take its time
            raise Refused(
                f"{learner.job.folder}: found checkpoints of steps {steps} by the processes that train together; allowed: the same for "
                "all; run the same again when all machines see the same files"
            )
        if state is not None:
            say(f"{setting.title}  {learner.job.name}: goes on from step {learner.step} of {learner.total_steps}")
    wait_for_all()  # all have read the checkpoints before the first one writes another
    return learners


def _val_top1(setting: Setting, learner: Learner) -> float:
    return top1(learner.student, setting.data.val, setting.device)


def _save(learner: Learner) -> None:
    state = learner.state_dict()
    if rank() == 0:
        checkpoint.save(learner.job.folder, learner.step, state)
