"""How the engine's time and memory grow: with images, students, classes and processes.

    python benchmarks/growth.py [--quick] [--out FOLDER]

Writes results/growth_<hardware>.json and growth.md (of all such files) in FOLDER: by default beside this file, with --quick in
build/benchmarks. Run it on an idle machine.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pages import Row, about, heading, parser, ratio, write_with_page
from peers import Ours, Task

from kdlib.config.schema import Fractals, Launch
from kdlib.data.dataset import load_dataset
from kdlib.data.sources import prepare
from kdlib.parallel.launch import run_distributed
from kdlib.parallel.ranks import rank

ROUNDS = 5


@dataclass(frozen=True)
class OnDisk(Task):
    """Fractals in a folder, memory-mapped."""

    folder: Path = Path()

    @cached_property
    def pixels(self) -> np.ndarray:
        return load_dataset(self.folder).train.images

    @cached_property
    def labels(self) -> np.ndarray:
        return load_dataset(self.folder).train.labels


def fractals(images: int, folder: Path, task: Task) -> OnDisk:
    per_class = images // task.classes
    params = Fractals(
        source="fractals", classes=task.classes, train_per_class=per_class, val_per_class=1, test_per_class=1, size=task.size, jitter=0.5,
        points=100, seed=0, hflip=0.5,
    )  # fmt: skip
    prepare(str(images), params, folder / str(images))
    return OnDisk(**{**asdict(task), "images": per_class * task.classes, "folder": folder / str(images)})


def steps(ours: Ours, numbers: range) -> float:
    started = time.perf_counter()
    for batch in ours.batches(numbers):
        ours.step(batch)
    return (time.perf_counter() - started) / len(numbers)


def in_turn(cases: dict[str, Ours], count: int, far: Callable[[str], int]) -> dict[str, list[float]]:
    """Seconds a step of each, over the rounds; ``far``: from which step each starts, so that all parts of its images are visited."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS + 1):
        for name, ours in cases.items():
            first = number * far(name)
            found[name].append(steps(ours, range(first, first + count)))
    return {name: seconds[1:] for name, seconds in found.items()}


def rows(what: str, cases: dict[str, Ours], count: int, far: Callable[[str], int] = lambda _: 100) -> list[Row]:
    """Beside the first case, in the same round."""
    times, found = in_turn(cases, count, far), []
    base = times[next(iter(cases))]
    for name, seconds in times.items():
        beside = ratio(seconds, base)
        row = {"what": what, "case": name, "ms": 1e3 * statistics.median(seconds), "ratio_median": beside.pop("ratio"), **beside}
        print(f"{what} {name}: {row['ms']:.1f} ms a step, x {row['ratio_median']:.2f}", flush=True)
        found.append(row)
    return found


def anonymous() -> int:
    """Bytes of this process that are no file's: of mapped images the system drops what it needs the room of."""
    (line,) = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:")]
    return 1024 * int(line.split()[1])


def by_images(task: Task, counts: Sequence[int], count: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cases, memory = {}, {}
        for images in counts:
            made = fractals(images, Path(folder), task)
            before = anonymous()
            cases[f"{images:,}"] = Ours(made, range(1))
            steps(cases[f"{images:,}"], range(count))
            memory[f"{images:,}"] = (anonymous() - before) / 1e6
        far = {f"{images:,}": max(1, images // task.batch // (ROUNDS + 1)) for images in counts}
        return [row | {"megabytes": memory[row["case"]]} for row in rows("images", cases, count, lambda name: far[name])]


def by_processes(task: Task, count: int) -> list[Row]:
    """One process with two groups beside two with one each; the time of a step, processes started and warm."""
    halves = replace(task, group=task.batch // 2)
    alone = _trained(halves, count)
    both = run_distributed(Launch(processes=2, nodes=1, rendezvous=None), _Work(halves, count), RuntimeError)
    ratio = both / alone
    print(f"processes 2: {1e3 * both:.1f} ms a step, x {ratio:.2f}", flush=True)
    kept = {"what": "processes", "ratio_min": None, "ratio_max": None}
    return [kept | {"case": "1", "ms": 1e3 * alone, "ratio_median": 1.0}, kept | {"case": "2", "ms": 1e3 * both, "ratio_median": ratio}]


class _Work:
    """Picklable."""

    def __init__(self, task: Task, count: int) -> None:
        self.task, self.count = task, count

    def __call__(self) -> float:
        return _trained(self.task, self.count)


def _trained(task: Task, count: int) -> float:
    torch.set_num_threads(1)
    ours = Ours(task, range(1))
    steps(ours, range(count))
    seconds = sorted(steps(ours, range(first, first + count)) for first in range(100, 100 * (ROUNDS + 1), 100))
    assert rank() >= 0
    return seconds[len(seconds) // 2]


def markdown(found: Sequence[Row]) -> str:
    lines = ["# How time and memory grow", "", "Written by `python benchmarks/growth.py`. No test asserts a time.", ""]
    lines += ["Memory: of the process itself, without mapped images; what grows is the order in which they come, some 30 bytes each.", ""]
    for one in found:
        lines += heading(one)
        lines += ["| with | | ms a step | beside the first: median (least to most) | memory of its own, MB |", "|---|--:|--:|--:|--:|"]
        for row in one["rows"]:
            spread = f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})" if row["ratio_min"] else ""
            memory = f"{row['megabytes']:.1f}" if "megabytes" in row else ""
            lines.append(f"| {row['what']} | {row['case']} | {row['ms']:.1f} | {row['ratio_median']:.2f}{spread} | {memory} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser(str(__doc__)).parse_args(arguments)
    task = Task(student="kd_resnet8_w8_s1", teacher="kd_resnet8_w8_s1", batch=32, images=400) if given.quick else Task()
    images, classes, students = ([600, 6000], [10, 100], [1, 2]) if given.quick else (
        [1_000, 10_000, 100_000, 1_000_000], [10, 100, 1_000, 21_000], [1, 2, 4, 8],
    )  # fmt: skip
    count = 4 if given.quick else 30
    found = about(torch.device("cpu")) | {"rows": by_images(task, images, count)}
    found["rows"] += rows("students", {str(number): Ours(task, range(number)) for number in students}, count)
    found["rows"] += rows("classes", {f"{number:,}": Ours(replace(task, classes=number), range(1)) for number in classes}, count)
    found["rows"] += by_processes(task, count)
    write_with_page(found, given, "growth", markdown)


if __name__ == "__main__":
    main()
