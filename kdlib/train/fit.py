"""The loop: one batch, one teacher pass, one step for every learner whose turn it is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from kdlib.data.stream import ViewStream
from kdlib.train.learner import Learner
from kdlib.train.progress import watched
from kdlib.train.teacher import Teacher
from kdlib.types import Asks, Batch, Output

VALIDATIONS = 10  # points of a curve that carry a validation accuracy; more would cost a short run more than its training
CHECK_STEPS = 50  # a diverged run trains on for at most so many steps before anyone looks


def fit(
    learners: Sequence[Learner],
    stream: ViewStream,
    teacher: Teacher | None,
    *,
    validate: Callable[[Learner], float],
    save: Callable[[Learner], None],
    save_seconds: float,
    title: str,
) -> float:
    """Bring every learner to its last step; learners that come with fewer steps done are caught up first.

    ``validate`` gives a top-1 on the validation split, ``save`` writes a checkpoint. Returns the seconds spent in the teacher.
    """
    total = learners[0].total_steps
    # one that diverged just before a checkpoint goes on to the check that stops it: it then ends as it would have without the interruption
    running = [learner for learner in learners if learner.step < total]
    teacher_seconds, saved = 0.0, time.monotonic()
    first = min((learner.step for learner in running), default=total)
    bar = tqdm(range(first, total), initial=first, total=total, desc=title, unit="step", disable=not watched())
    for step in bar:
        active = [learner for learner in running if learner.step == step]
        if not active:
            continue
        batch = to_device(stream.batch(step), active)
        started = time.perf_counter()
        answers = ask(teacher, active, batch)
        teacher_seconds += time.perf_counter() - started
        for learner in active:
            learner.update(batch, answers)
        last = step + 1 == total
        ends_epoch = last or stream.ends_epoch(step)
        if ends_epoch:
            bar.set_postfix_str(_close_epoch(active, stream, step, validate, title))
        if ends_epoch or (step + 1) % CHECK_STEPS == 0:
            running = [learner for learner in running if learner.diverged_step is None]
        if not last and time.monotonic() - saved >= save_seconds:
            for learner in running:
                save(learner)
            saved = time.monotonic()
    return teacher_seconds


def ask(teacher: Teacher | None, active: Sequence[Learner], batch: Batch) -> Output | None:
    """One pass for all, of which each learner takes what its method asked for; none for those who would not listen."""
    asks: Asks = frozenset().union(*(learner.method.asks_teacher for learner in active))
    if teacher is None or not asks:
        return None
    answers: Output = teacher(batch.images, asks)
    return answers


def _close_epoch(active: list[Learner], stream: ViewStream, step: int, validate: Callable[[Learner], float], title: str) -> str:
    """Measure what is due, extend the curves, and say in one line how the learners do."""
    total, seen = active[0].total_steps, (step + 1) * stream.recipe.batch_size
    epoch, epochs = seen // len(stream.index), -(-total * stream.recipe.batch_size // len(stream.index))
    before = int(active[0].curve[-1]["step"] or 0) if active[0].curve else 0
    measured = step + 1 == total or (step + 1) * VALIDATIONS // total > before * VALIDATIONS // total
    shown = []
    for learner in active:
        val_top1 = validate(learner) if measured else None
        learner.close_epoch(epoch, seen, val_top1)
        shown.append(f"{learner.name} {learner.curve[-1]['loss']:.3f}" + (f" ({100 * val_top1:.1f} %)" if val_top1 is not None else ""))
    told = "  ".join(shown)
    if not watched():
        print(f"{title}  epoch {epoch}/{epochs}  step {step + 1}/{total}  loss (val top-1): {told}", flush=True)
    return told


def to_device(batch: Batch, learners: Sequence[Learner]) -> Batch:
    """The batch where the learners are."""
    device = learners[0].device
    if batch.images.device == device:
        return batch
    moved: dict[str, torch.Tensor] = {name: getattr(batch, name).to(device) for name in ("images", "targets", "labels", "index", "mixed")}
    return replace(batch, **moved)
