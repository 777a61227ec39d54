"""What a study will cost, from what a few of its steps cost: arithmetic alone, of images, operations, seconds and bytes."""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BACKWARD = 2  # forward passes that a backward pass costs
NEWEST = 2  # checkpoints that are kept of a run until it is finished (kdlib.engine.checkpoint)
COPIES = 3  # of a finished run's weights: in the run store, below runs/, in DVC's cache (where that cannot link)
Number = int | float  # NaN: unknown, or not measured
_ADDED = ("runs", "images", "flops", "hours", "wall_hours", "weights_bytes", "answers_bytes")


@dataclass(frozen=True)
class Cost:
    """Of runs that train together. Memory is None and seconds are NaN where nothing was measured."""

    learners: int
    student_flops: int  # of one forward pass of one image
    teacher_flops: int  # the same; 0 where nobody asks the teacher
    checkpoint_bytes: int  # of one checkpoint of each
    weights_bytes: int  # of all, their averages included
    answers_bytes: int  # of the teacher's answers to one batch
    seconds: float = math.nan  # for each image of the stream: views, teacher, all students
    peak_bytes: int | None = None  # of memory, in one process
    decoding: float = math.nan  # seconds for each image of the stream until its pixels are there, relative to those for the rest

    @property
    def operations(self) -> int:
        """For each image of the stream, with the backward passes of all students."""
        return (1 + BACKWARD) * self.learners * self.student_flops + self.teacher_flops


@dataclass(frozen=True)
class Row:
    """A teacher that is to be trained, a comparison, or all of them, and what its runs cost."""

    what: str
    name: str
    data: str
    student: str
    teacher: str | None
    recipe: str
    runs: int
    live_bytes: int = 0  # of the teacher's answers to the views of one seed, where they are too many to be kept
    shared: int = 0  # runs that an earlier comparison makes too, and which are counted there
    images: Number = math.nan  # seen by all runs
    flops: Number = math.nan
    images_a_second: Number = math.nan  # through the students of one process
    hours: Number = math.nan  # of a GPU, or of this machine's CPU
    wall_hours: Number = math.nan
    peak_bytes: Number = math.nan  # of memory, in one process
    checkpoint_bytes: Number = math.nan  # at any one time
    weights_bytes: Number = math.nan
    answers_bytes: Number = math.nan  # that are kept
    decoding: Number = math.nan  # how many times as long as the rest it takes at most; NaN: nothing is decoded, or nobody knows


def estimated_row(row: Row, stages: Sequence[Sequence[Cost]], images: int, cores: int, processes: int) -> Row:
    """The row with what its stages cost: one after the other, each of groups of runs that see so many images.

    ``cores``: how many groups train side by side; ``processes``: how many train one group together.
    """
    groups = [cost for stage in stages for cost in stage]
    seconds = [[images * cost.seconds for cost in stage] for stage in stages]
    worked, hours = sum(map(sum, seconds)), sum(makespan(stage, cores) for stage in seconds) / 3600
    return replace(
        row,
        images=row.runs * images,
        flops=sum(images * cost.operations for cost in groups),
        images_a_second=row.runs * images / worked if worked else math.nan,
        hours=hours,
        wall_hours=hours / processes,
        peak_bytes=_most(math.nan if cost.peak_bytes is None else cost.peak_bytes for cost in groups),
        checkpoint_bytes=NEWEST * max(sum(heapq.nlargest(cores, (cost.checkpoint_bytes for cost in stage))) for stage in stages),
        weights_bytes=COPIES * sum(cost.weights_bytes for cost in groups),
        decoding=float(np.fmax.reduce([cost.decoding for cost in groups], initial=math.nan)),  # the largest that is known
    )


def total(rows: Sequence[Row]) -> Row:
    """All of them, one after the other. What is not known of one is not known of all."""
    known: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in _ADDED}
    known |= {name: _most(getattr(row, name) for row in rows) for name in ("peak_bytes", "checkpoint_bytes")}
    return Row("", "total", "", "", None, "", **known)


def makespan(seconds: Sequence[Number], processes: int) -> float:
    """When the last is done, where each process that becomes free takes the next."""
    free = [0.0] * processes
    for duration in seconds:
        heapq.heapreplace(free, free[0] + duration)
    return _most(free)


def extrapolated(less: tuple[int, int], more: tuple[int, int], images: int) -> int:
    """The bytes that ``images`` take, from (images, bytes) of two smaller groups: what a net keeps for its backward pass grows in line."""
    (few, low), (many, high) = less, more
    return round(high + (high - low) / (many - few) * (images - many))


def largest_group(peak_bytes: Callable[[int], int | None], group: int, room: int) -> int | None:
    """The largest of ``group``, its half, its quarter, ... that fits into ``room`` bytes; None if two images do not.

    ``peak_bytes``: of a group of this size; None: it does not fit.
    """
    while group >= 2:
        peak = peak_bytes(group)
        if peak is not None and peak <= room:
            return group
        group = 0 if group % 2 else group // 2
    return None


def _most(values: Iterable[Number]) -> float:
    """The largest, 0 of none; unlike Python's, NaN where one is."""
    return float(np.max(list(values), initial=0.0))
