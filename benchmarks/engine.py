"""The engine beside the official loop and timm's own distillation task: `make bench`.

    python benchmarks/engine.py [--rounds 7] [--steps 40] [--quick] [--out FOLDER]

Three implementations of plain KD in one process, on the same weights and the same views; the first 20 losses must agree before
anything is timed. In every round each takes as many steps, in turn; a ratio is that of two times of one round. Writes
results/<hardware>.json and engine.md (of all such files) in FOLDER: by default beside this file, with --quick in build/benchmarks.
Run it on an idle machine.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import LOGITS, Official, Ours, OursSideBySide, Task, Timm, pil_batches, version

from kdlib.results import write_text
from kdlib.tables import insert_between_markers
from kdlib.train.threads import threads

HERE = Path(__file__).parent
STUDENT = "student with its loss, backward pass and optimiser"
ALONE = f"{STUDENT}, one thread"
CHECKED = 20  # losses that must agree
AGREE = 5e-3  # relative: our teacher's answers are rounded to half precision
WORKERS = (0, 1, 2)  # of the PIL loaders; the fastest is taken
Row = dict[str, Any]


def seconds(contender: Any, steps: range) -> float:
    """Of these steps, from views to weights; worker processes are started, and the first batch fetched, before."""
    batches: Iterator[Any] = iter(contender.batches(steps))
    first = next(batches)
    started = time.perf_counter()
    contender.step(first)
    for batch in batches:
        contender.step(batch)
    return time.perf_counter() - started


def losses(contender: Any, steps: range) -> np.ndarray:
    """(students, steps)"""
    found = [contender.step(batch) for batch in contender.batches(steps)]
    return np.array(
        found[0] if contender.__class__ is OursSideBySide else [[float(one) for one in step] for step in zip(*found, strict=True)]
    )


def agree(contenders: Sequence[Any], steps: range) -> None:
    """Exits if they do not compute the same."""
    first, *others = [losses(contender, steps) for contender in contenders]
    for contender, found in zip(contenders[1:], others, strict=True):
        gap = float(np.max(np.abs(found - first[: len(found)]) / np.abs(first[: len(found)])))
        print(f"the first {len(steps)} losses of {contender.name} and {contenders[0].name} agree within {gap:.1e}", flush=True)
        if gap > AGREE:
            raise SystemExit(f"found losses that differ by {gap:.2e}; allowed: {AGREE:g}; nothing was timed")


def interleaved(contenders: Sequence[Any], rounds: int, steps: int, first: int) -> list[list[float]]:
    """Seconds of each contender in each round, after one that does not count."""
    found: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds + 1):
        at = range(first + number * steps, first + (number + 1) * steps)
        for times, contender in zip(found, contenders, strict=True):
            times.append(seconds(contender, at))
        if number:
            print("  ".join(f"{one.name} {times[-1]:.2f} s" for one, times in zip(contenders, found, strict=True)), flush=True)
    return [times[1:] for times in found]


def row(case: str, baseline: str, ours: Sequence[float], theirs: Sequence[float], *, alone: float, images: int, target: float) -> Row:
    """``alone``: seconds that the students' own steps take, which nothing can leave out; the ceiling follows (Amdahl's law)."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    found = {
        "case": case,
        "baseline": baseline,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    found |= {"rounds": len(ratios), "target": target, "ceiling": statistics.median(theirs) / alone}
    found |= {"images_times_students_per_second": images / statistics.median(ours)}
    said = f"x {found['ratio_median']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); at most {found['ceiling']:.2f}"
    print(f"{case} beside {baseline}: {said}", flush=True)
    return found


def workers(make: Callable[[int], Any], steps: int) -> int:
    """With how many processes that make PIL views a peer is fastest, beside its training, which wants the cores too."""
    peers = [make(count) for count in WORKERS]
    times = [min(found) for found in interleaved(peers, 3, steps, 0)]
    return WORKERS[times.index(min(times))]


def split(task: Task, steps: int) -> Row:
    """Milliseconds of a step's parts, each by itself: what the ceiling follows from."""
    ours, peer = Ours(task, range(1)), Official(task, 1, 0)
    views = [ours.task.stream.batch(step) for step in range(steps)]
    learner = ours.learners[0]
    said = ours.answers(0, views[0].images, LOGITS)

    def ms(do: Callable[[], object]) -> float:
        do()
        started = time.perf_counter()
        do()
        return 1e3 * (time.perf_counter() - started) / steps

    def learn() -> None:
        for number in range(steps):
            learner.take(number, views[0], said)
            learner.advance()

    images = views[0].images.contiguous()
    with torch.no_grad():
        return {
            "views, ours": ms(lambda: [ours.task.stream.batch(step) for step in range(steps)]),
            "views, PIL in this process": ms(lambda: list(pil_batches(task, range(steps), 0))),
            "teacher, channels_last": ms(lambda: [ours.answers.teacher(views[0].images) for _ in range(steps)]),
            "teacher, NCHW": ms(lambda: [peer.teacher(images) for _ in range(steps)]),
            STUDENT: _learning(lambda: ms(learn), torch.get_num_threads()),
            ALONE: _learning(lambda: ms(learn), 1),
        }


def _learning(do: Callable[[], float], count: int) -> float:
    with torch.enable_grad(), threads(count):
        return do()


def measure(task: Task, rounds: int, steps: int) -> Row:
    counts = {
        "official": workers(lambda count: Official(task, 1, count), steps),
        "timm": workers(lambda count: Timm(task, count), steps),
        "official, several students": workers(lambda count: Official(task, task.students, count), max(2, steps // 4)),
    }
    print(f"PIL loaders are fastest with so many worker processes: {counts}", flush=True)
    parts = split(task, steps)
    one = [Official(task, 1, counts["official"]), Timm(task, counts["timm"]), Ours(task, range(1))]
    agree(one, range(CHECKED))
    official, peer, ours = interleaved(one, rounds, steps, CHECKED)
    work = {"alone": steps * min(parts[STUDENT], parts[ALONE]) / 1e3, "images": task.batch * steps}
    rows = [row("one_student", "official", ours, official, **work, target=1.4), row("one_student", "timm", ours, peer, **work, target=1.1)]
    processes = max(1, min(torch.get_num_threads(), task.students))
    many = [
        Official(task, task.students, counts["official, several students"]),
        OursSideBySide(task, task.students, processes),
        Timm(task, counts["timm"]),
    ]
    agree(many[:2], range(CHECKED))
    short = max(2, steps // 2)
    official, ours, peer = interleaved(many, rounds, short, CHECKED)
    in_turn = [task.students * found for found in peer]  # timm trains them one after the other
    work = {"alone": short * task.students * parts[ALONE] / processes / 1e3, "images": task.batch * short * task.students}
    rows.append(row("eight_students", "official", ours, official, **work, target=1.5))
    rows.append(row("eight_students", "timm", ours, in_turn, **work, target=2.0))
    with tempfile.TemporaryDirectory() as folder:
        twice = [Ours(task, range(1), Path(folder)), Ours(task, range(1), Path(folder))]
        live, cached = interleaved(twice, rounds, steps, 0)
        # the first run's teacher works beside the student, which therefore has one thread in both
        work = {"alone": steps * parts[ALONE if twice[0].ahead else STUDENT] / 1e3, "images": task.batch * steps}
        rows.append(row("cached_rerun", "first_run", cached, live, **work, target=1.8))
    return {"pil_workers": counts, "milliseconds_of_a_step": parts, "rows": rows}


def about() -> Row:
    return {
        "hardware": f"{platform.machine()} {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": f"Python {platform.python_version()}, {version()}",
        "load before": round(os.getloadavg()[0], 2),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True).strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def markdown(found: Sequence[Row]) -> str:
    lines = ["# The engine beside its peers", "", "Written by `make bench`. No test asserts a time.", ""]
    for one in found:
        lines += [
            f"## {one['hardware']}",
            "",
            ", ".join(f"{key} {one[key]}" for key in ("threads", "versions", "load before", "commit", "date")),
            "",
        ]
        lines += [*table(one["rows"]), "", "| part of a step of one student | ms |", "|---|--:|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in one["milliseconds_of_a_step"].items()]
        counts = ", ".join(f"{name} {count}" for name, count in one["pil_workers"].items())
        lines += ["", "At most: were all but the students' own steps free (Amdahl's law).", ""]
        lines += [f"Worker processes of the PIL loaders, of {WORKERS} the fastest number: {counts}.", ""]
    return "\n".join(lines)


def committed(folder: Path) -> list[Row]:
    """What was measured, on every hardware."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [one for one in found if "milliseconds_of_a_step" in one]


def for_readme(found: Sequence[Row]) -> str:
    return "\n\n".join(f"On {one['hardware']} ({one['versions']}, {one['date']}):\n\n" + "\n".join(table(one["rows"])) for one in found)


def table(rows: Sequence[Row]) -> list[str]:
    """As README shows it too."""
    lines = ["| case | beside | times as fast: median (least to most) | at most | asked for | rounds |", "|---|---|--:|--:|--:|--:|"]
    for one in rows:
        found = f"{one['ratio_median']:.2f} ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})"
        lines.append(f"| {one['case']} | {one['baseline']} | {found} | {one['ceiling']:.2f} | {one['target']} | {one['rounds']} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    task = Task(student="kd_resnet8_w8_s1", teacher="kd_resnet8_w8_s1", batch=32, images=400, students=2) if given.quick else Task()
    rounds, steps = (2, 6) if given.quick else (given.rounds, given.steps)
    found = about() | measure(task, rounds, steps)
    out = given.out or (HERE.parent / "build" / "benchmarks" if given.quick else HERE)
    (out / "results").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", found["hardware"]).strip("_").lower()
    (out / "results" / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    every = committed(out / "results")
    (out / "engine.md").write_text(markdown(every))
    if out == HERE:
        readme = HERE.parent / "README.md"
        write_text(readme, insert_between_markers(readme.read_text("utf-8"), for_readme(every), "engine"))


if __name__ == "__main__":
    main()
