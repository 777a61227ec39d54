"""What a study is expected to cost: a row for each teacher and comparison, for the screen and for programs."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from kdlib.study.cost.estimate import Number, Row, total

WIDTH = 120  # characters of a line on the screen
SHORTEST = 8  # characters that a name is cut to, at least
_COUNTS = ("runs", "images", "peak_bytes", "checkpoint_bytes", "weights_bytes", "answers_bytes")
_PREFIXES = {1e18: " E", 1e15: " P", 1e12: " T", 1e9: " G", 1e6: " M", 1e3: " k"}


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """All numbers, in images, operations, hours and bytes; blank where unknown."""
    tidy = pd.DataFrame([asdict(row) for row in rows])
    return tidy.astype(dict.fromkeys(_COUNTS, "Int64") | {"flops": "float64"})  # ImageNet's are too many for 64 bits


def screen(rows: Sequence[Row], on_gpu: bool) -> str:
    """The rows and their total, in lines of at most ``WIDTH`` characters; names that are too long for that are cut."""
    heads = ["", "student", "teacher", "recipe", "runs", "images", "FLOPs", "img/s", "GPU time" if on_gpu else "time", "memory", "disk"]
    cells = [[row.name, row.student, row.teacher or "", row.recipe, *_numbers(row)] for row in (*rows, total(rows))]
    names = 4
    widths = [max(len(line[i]) for line in (heads, *cells)) for i in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths[:names]) > SHORTEST:
        widths[widths.index(max(widths[:names]))] -= 1
    lines = []
    for line in (heads, *cells):
        cut = [cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(line, widths, strict=True)]
        aligned = [cell.ljust(width) if i < names else cell.rjust(width) for i, (cell, width) in enumerate(zip(cut, widths, strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def notes(rows: Sequence[Row], where: str, steps: int, processes: int, assumed: Sequence[str]) -> list[str]:
    """Footnotes for the table: of a plan made on the device ``where`` by so many steps, for processes that train together.

    ``assumed``: data sets whose images were not counted, but taken to be ImageNet's.
    """
    uncounted = sorted({row.data for row in rows if math.isnan(row.images)})
    lines = [f"{data}: images are counted by the data stage, which has not run" for data in uncounted]
    if steps:
        lines += [
            f"img/s (through all students) and memory (torch's own) are those of one process on {where}, from {steps} steps on random",
            "images that lie in memory, without a search for what compiling gains; time is without validation and tests, and does not",
            "know what is finished already",
        ]
    if shared := sum(row.shared for row in rows):
        lines.append(f"{shared} runs that an earlier comparison makes too are counted there")
    lines += [f"{data}: counted as ImageNet's official images, and not decoded, since the data stage has not run" for data in assumed]
    slow = [row for row in rows if row.decoding > 1]
    lines += [f"{row.name}: reading and decoding take {row.decoding:.2g} times what training takes; more cores would help" for row in slow]
    wall = total(rows).wall_hours
    if processes > 1 and not math.isnan(wall):
        lines.append(f"time is that of one of {processes} processes times {processes}; on the clock, if they do not wait, {duration(wall)}")
    return lines + [
        f"{row.name}: answers to the views of a seed take {short(row.live_bytes, 'B')}, more than study.answers_gb: the teacher stays live"
        for row in rows
        if row.live_bytes
    ]


def _numbers(row: Row) -> list[str]:
    return [
        f"{row.runs:,}",
        short(row.images),
        short(row.flops),
        "" if math.isnan(row.images_a_second) else f"{row.images_a_second:,.0f}",
        duration(row.hours),
        short(row.peak_bytes, "B"),
        short(row.checkpoint_bytes + row.weights_bytes + row.answers_bytes, "B"),
    ]


def short(value: Number, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 T; blank for NaN."""
    if math.isnan(value):
        return ""
    for factor, prefix in _PREFIXES.items():
        if value >= factor:
            return f"{value / factor:.3g}{prefix}{unit}"
    return f"{value:.3g}{f' {unit}' if unit else ''}"


def duration(hours: Number) -> str:
    """In the unit in which people say it; blank for NaN."""
    if math.isnan(hours):
        return ""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.{1 if hours < 100 else 0}f} h"
