"""What a study will cost, from what a few of its steps cost: arithmetic alone, of images, operations, seconds and bytes."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kdlib.study.cost.measure import BACKWARD, Cost

NEWEST = 2  # checkpoints that are kept of a run until it is finished (kdlib.engine.checkpoint)
COPIES = 3  # of a finished run's weights: in the run store, below runs/, in DVC's cache (where that cannot link)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Machine:
    """Processes that train different runs side by side (on a CPU), or one run together."""

    side_by_side: int
    together: int


@dataclass(frozen=True)
class Forecast:
    """Of the runs of one comparison, or of all. None: unknown, or not measured."""

    runs: int
    images: int | None = None  # seen by all runs
    flops: int | None = None
    images_a_second: float | None = None  # through the students of one process
    hours: float | None = None  # of a GPU, or of this machine's CPU
    wall_hours: float | None = None
    peak_bytes: int | None = None  # of memory, in one process
    checkpoint_bytes: int | None = None  # at any one time
    weights_bytes: int | None = None
    answers_bytes: int | None = None  # that are kept
    decoding: float | None = None  # how many times as long as the rest it takes at most; None: nothing is decoded, or nobody knows


@dataclass(frozen=True)
class Row:
    """A teacher that is to be trained, or a comparison."""

    what: str
    name: str
    data: str
    student: str
    teacher: str | None
    recipe: str
    forecast: Forecast
    live_bytes: int = 0  # of the teacher's answers to the views of one seed, where they are too many to be kept
    shared: int = 0  # runs that an earlier comparison makes too, and which are counted there


def forecast(stages: Sequence[Sequence[Cost]], images: int, machine: Machine, answers_bytes: int) -> Forecast:
    """Of stages, one after the other, of groups of runs each of which sees so many images.

    ``answers_bytes``: that are kept of the teacher's answers.
    """
    groups = [cost for stage in stages for cost in stage]
    runs = sum(cost.learners for cost in groups)
    seconds = [[None if cost.seconds is None else images * cost.seconds for cost in stage] for stage in stages]
    worked = _sum(value for stage in seconds for value in stage)
    lasting = _sum(None if (known := _all(stage)) is None else makespan(known, machine.side_by_side) for stage in seconds)
    return Forecast(
        runs=runs,
        images=runs * images,
        flops=sum(images * ((1 + BACKWARD) * cost.learners * cost.student_flops + cost.teacher_flops) for cost in groups),
        images_a_second=runs * images / worked if worked else None,
        hours=None if lasting is None else lasting / 3600,
        wall_hours=None if lasting is None else lasting / machine.together / 3600,
        peak_bytes=_most(cost.peak_bytes for cost in groups),
        checkpoint_bytes=max(checkpoints(stage, machine.side_by_side) for stage in stages),
        weights_bytes=COPIES * sum(cost.weights_bytes for cost in groups),
        answers_bytes=answers_bytes,
        decoding=max((cost.decoding for cost in groups if cost.decoding is not None), default=None),
    )


def total(parts: Sequence[Forecast]) -> Forecast:
    """One after the other. What is not known of a part is not known of the whole."""
    return Forecast(
        runs=sum(part.runs for part in parts),
        images=_sum(part.images for part in parts),
        flops=_sum(part.flops for part in parts),
        hours=_sum(part.hours for part in parts),
        wall_hours=_sum(part.wall_hours for part in parts),
        peak_bytes=_most(part.peak_bytes for part in parts),
        checkpoint_bytes=_most(part.checkpoint_bytes for part in parts),
        weights_bytes=_sum(part.weights_bytes for part in parts),
        answers_bytes=_sum(part.answers_bytes for part in parts),
    )


def makespan(seconds: Sequence[float], processes: int) -> float:
    """When the last is done, where each process that becomes free takes the next."""
    free = [0.0] * processes
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def checkpoints(groups: Sequence[Cost], processes: int) -> int:
    """The most bytes that checkpoints of unfinished runs take, where so many groups train side by side."""
    return NEWEST * sum(heapq.nlargest(processes, (cost.checkpoint_bytes for cost in groups)))


def largest_group(peak_bytes: Callable[[int], int | None], group: int, room: int) -> int | None:
    """The largest of ``group``, its half, its quarter, ... that fits into ``room`` bytes; None if two images do not.

    ``peak_bytes``: of a group of this size; None: it does not fit.
    """
    while group >= 2:
        found = peak_bytes(group)
        if found is not None and found <= room:
            return group
        group = 0 if group % 2 else group // 2
    return None


def _all(values: Iterable[Number | None]) -> list[Number] | None:
    """None where one of them is."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else None


def _sum(values: Iterable[Number | None]) -> Number | None:
    known = _all(values)
    return None if known is None else sum(known)


def _most(values: Iterable[int | None]) -> int | None:
    known = _all(values)
    return None if known is None else max(known, default=0)
