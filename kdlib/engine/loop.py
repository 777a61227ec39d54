"""The loop: one batch, the teacher's answers to it, one step for every learner whose turn it is."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Never

import torch
from tqdm.auto import tqdm

from kdlib.engine.backend import threads
from kdlib.engine.learner import Learner, asked_of_teacher
from kdlib.engine.prefetch import prefetch
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.parallel.ranks import any_rank, local_groups, rank, say
from kdlib.parallel.signals import Stopped, asked_to_stop, held_back, watched
from kdlib.types import Asks, Batch, Output
from kdlib.views.mixup import mix_groups
from kdlib.views.stream import ViewStream

VALIDATIONS = 10  # points of a curve that carry a validation accuracy; more would cost a short run more than its training
CHECK_STEPS = 50  # a diverged run trains on for at most so many steps before anyone looks


class GroupSlot(NamedTuple):
    """One mix group of the stream, and what of the teacher's answers to it is wanted."""

    step: int
    number: int  # in its batch
    group: int  # over all steps
    asks: Asks


@dataclass
class TrainingLoop:
    """Brings every learner to its last step; learners that come with fewer steps done are caught up first.

    One output of the teacher serves all, of which each learner takes what its method asked for. With ``ahead`` > 0 so many of torch's
    threads make the next views and outputs meanwhile. ``validate`` gives a top-1 on the validation split, ``save`` writes a checkpoint.
    """

    learners: Sequence[Learner]
    stream: ViewStream
    teacher: TeacherCache | None
    validate: Callable[[Learner], float]
    save: Callable[[Learner], None]
    save_seconds: float
    title: str
    ahead: int = 0

    def __post_init__(self) -> None:
        self._total = self.learners[0].total_steps
        # one that diverged just before a checkpoint goes on to the check that stops it: it ends as it would have without the interruption
        self._running = [learner for learner in self.learners if learner.step < self._total]
        self._groups = local_groups(mix_groups(self.stream.recipe))
        self._saved = time.monotonic()

    def run(self) -> float:
        """Train to the end. Returns the seconds in which the teacher was asked.

        Asked to stop by SIGINT or SIGTERM, it ends the step, saves and raises ``Stopped``.
        """
        first = min((learner.step for learner in self._running), default=self._total)
        bar = tqdm(initial=first, total=self._total, desc=self.title, unit="step", disable=not watched() or rank() > 0)
        teacher_seconds = 0.0
        with held_back(), threads(max(1, torch.get_num_threads() - self.ahead)), bar:
            self._close_epochs_left_open()
            for slot, (batch, output, seconds) in prefetch(self._ask_teacher, self._slots(first), self.ahead):
                teacher_seconds += seconds
                active = [learner for learner in self._running if learner.step == slot.step]
                for learner in active:
                    learner.take(slot.group, batch, output)
                if slot.number == self._groups[-1]:
                    self._end_step(slot.step, active, bar)
        if self.teacher:
            self.teacher.finish()
        return teacher_seconds

    def _slots(self, first: int) -> Iterator[GroupSlot]:
        groups = mix_groups(self.stream.recipe)
        for step in range(first, self._total):
            for number in self._groups:
                if not self._running:
                    return
                # only learners that have reached this step; empty if none needs the teacher
                asks = asked_of_teacher(learner.method for learner in self._running if learner.step <= step)
                yield GroupSlot(step, number, step * groups + number, asks)

    def _ask_teacher(self, slot: GroupSlot) -> tuple[Batch, Output | None, float]:
        batch = self.stream.batch(slot.step, slot.number)
        started = time.perf_counter()
        output = self.teacher(slot.group, batch.images, slot.asks) if self.teacher and slot.asks else None
        return batch, output, time.perf_counter() - started

    def _end_step(self, step: int, active: Sequence[Learner], bar: "tqdm[Never]") -> None:
        for learner in active:
            learner.advance()
        stop, due = any_rank(asked_to_stop(), time.monotonic() - self._saved >= self.save_seconds)
        if stop:  # before a validation, which may take longer than the time that is left
            self._stop(step)
        ends_epoch = self._ends_epoch(step)
        if ends_epoch and active:
            bar.set_postfix_str(self._close_epoch(active, step))
        if ends_epoch or (step + 1) % CHECK_STEPS == 0:
            self._running = [learner for learner in self._running if learner.curve.diverged_step is None]
        bar.update()
        if due or step + 1 == self._total:  # what follows the last step, measuring, can be interrupted too
            self._save()

    def _save(self) -> None:
        for learner in self._running:
            self.save(learner)
        self._saved = time.monotonic()

    def _stop(self, step: int) -> Never:
        self._save()
        raise Stopped(f"{self.title}: stopped after step {step + 1} of {self._total}; the same command goes on from there")

    def _ends_epoch(self, step: int) -> bool:
        return step + 1 == self._total or self.stream.ends_epoch(step)

    def _close_epochs_left_open(self) -> None:
        """Of learners that were stopped between the last step of an epoch and its row."""
        for learner in self.learners:
            if learner.step > learner.curve.last_step and self._ends_epoch(learner.step - 1):
                self._close_epoch([learner], learner.step - 1)

    def _close_epoch(self, active: Sequence[Learner], step: int) -> str:
        """Measure what is due, extend the curves, and say in one line how the learners do."""
        stream, total, seen = self.stream, self._total, (step + 1) * self.stream.recipe.batch_size
        epoch, epochs = seen // len(stream.index), -(-total * stream.recipe.batch_size // len(stream.index))
        measured = step + 1 == total or (step + 1) * VALIDATIONS // total > active[0].curve.last_step * VALIDATIONS // total
        shown = []
        for learner in active:
            if measured and any_rank(asked_to_stop())[0]:
                self._stop(step)
            val_top1 = self.validate(learner) if measured else None
            learner.curve.close_epoch(epoch, learner.step, seen, val_top1)
            accuracy = "" if val_top1 is None else f" ({100 * val_top1:.1f} %)"
            shown.append(f"{learner.job.name} {learner.curve.rows[-1]['loss']:.3f}{accuracy}")
        losses = "  ".join(shown)
        if not watched():
            say(f"{self.title}  epoch {epoch}/{epochs}  step {step + 1}/{total}  loss (val top-1): {losses}")
        return losses
