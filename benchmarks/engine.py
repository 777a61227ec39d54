"""The engine beside the official loop and timm's own distillation task: `make bench`.

    python benchmarks/engine.py [--rounds 7] [--steps 40] [--only NETS ...] [--quick] [--out FOLDER]

Three implementations of plain KD in one process, on the same weights and the same views; the first 20 losses must agree before
anything is timed. In every round each takes as many steps, in turn; a ratio is that of two times of one round. Writes, after each part,
results/<hardware>.json and engine.md (of all such files) in FOLDER: by default beside this file, with --quick in build/benchmarks.
With --only, what the file has of other nets stays. Run it on an idle machine.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import HERE, Row, about, heading, parser, ratio, write, written
from peers import LOGITS, Official, Ours, OursSideBySide, Task, Timm, pil_batches

from kdlib.engine.backend import threads
from kdlib.engine.record import forward_flops
from kdlib.files import write_text
from kdlib.study.report.readme import insert_between_markers

STUDENT = "student with its loss, backward pass and optimiser"
ALONE = f"{STUDENT}, one thread"
CHECKED = 20  # losses that must agree
# of losses, relative: our teacher's answers are rounded to half precision; on a GPU the loops compute in fp16 or bf16
AGREE = {"cpu": 5e-3, "cuda": 5e-2}
CORES = os.cpu_count() or 1
WORKERS = (0, 1, 2) if CORES < 4 else (CORES // 2, CORES)  # of the PIL loaders; the fastest is taken
RESNET50_BYTES = 335e6  # that training moves for an image of 224 pixels, fused (an estimate from the sizes of its maps)
WORDS = {2: "two", 4: "four", 8: "eight"}
# what was asked for, median
TARGETS_CPU = {
    **{("one_student", "official"): 1.4, ("one_student", "timm"): 1.1, ("cached_rerun", "first_run"): 1.8},
    **{("eight_students", "official"): 1.5, ("eight_students", "timm"): 2.0},
}
TARGETS_GPU = {
    **{("one_student", "official"): 2.0, ("one_student", "timm"): 1.1, ("small_nets_one_student", "official"): 5.0},
    **{("four_students", "one_student"): 1.3, ("four_students", "official"): 1.5},
}
TARGETS = TARGETS_GPU if torch.cuda.is_available() else TARGETS_CPU
GPU = {
    "": Task(
        student="resnet50", teacher="beitv2_base_patch16_224", size=224, batch=256, classes=1000, students=4, channels=3, device="cuda"
    ),
    "small_nets_": Task(
        student="kd_resnet20_w16_s1",
        teacher="kd_resnet56_w16_s1",
        size=32,
        classes=100,
        images=50_000,
        students=1,
        channels=3,
        device="cuda",
    ),
}


def seconds(contender: Any, steps: range) -> float:
    """Of these steps, from views to weights; worker processes are started, and the first batch fetched, before."""
    batches: Iterator[Any] = iter(contender.batches(steps))
    first = next(batches)
    wait(contender.task)
    started = time.perf_counter()
    contender.step(first)
    for batch in batches:
        contender.step(batch)
    wait(contender.task)
    return time.perf_counter() - started


def losses(contender: Any, steps: range) -> np.ndarray:
    """(students, steps)"""
    found = [contender.step(batch) for batch in contender.batches(steps)]
    return np.array(
        found[0] if contender.__class__ is OursSideBySide else [[float(one) for one in step] for step in zip(*found, strict=True)]
    )


def agree(contenders: Sequence[Any], steps: range, tolerance: float) -> dict[str, float]:
    """Exits if they do not compute the same; the seconds of each, in which it compiles and what else a first step does."""
    found, seconds_of = [], {}
    for contender in contenders:
        started = time.perf_counter()
        found.append(losses(contender, steps))
        seconds_of[contender.name] = time.perf_counter() - started
    first, *others = found
    for contender, found in zip(contenders[1:], others, strict=True):
        gap = float(np.max(np.abs(found - first[: len(found)]) / np.abs(first[: len(found)])))
        print(f"the first {len(steps)} losses of {contender.name} and {contenders[0].name} agree within {gap:.1e}", flush=True)
        if gap > tolerance:
            raise SystemExit(f"found losses that differ by {gap:.2e}; allowed: {tolerance:g}; nothing was timed")
    return seconds_of


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


def row(case: str, baseline: str, ours: Sequence[float], theirs: Sequence[float], alone: float, images: int) -> Row:
    """``alone``: seconds that the students' own steps take, which nothing can leave out; the ceiling follows (Amdahl's law)."""
    beside = ratio(theirs, ours)
    found: Row = {"case": case, "baseline": baseline, "ratio_median": beside.pop("ratio"), **beside}
    found |= {"rounds": len(ours), "target": TARGETS.get((case, baseline)), "ceiling": statistics.median(theirs) / alone}
    found |= {"images_times_students_per_second": images / statistics.median(ours)}
    print(f"{case} beside {baseline}: x {_times(found)}; at most {found['ceiling']:.2f}", flush=True)
    return found


def workers(peers: Sequence[Any], steps: int) -> dict[str, int]:
    """With how many processes that make PIL views each peer is fastest, beside its training, which wants the cores too; so it is left."""
    found = {}
    for peer in peers:
        least = {}
        for peer.workers in WORKERS:
            least[peer.workers] = min(interleaved([peer], 3, steps, 0)[0])
        found[peer.name] = peer.workers = min(least, key=lambda count: least[count])
    return found


def split(ours: Ours, peer: Official, steps: int) -> Row:
    """Milliseconds of a step's parts, each by itself: what the ceiling follows from."""
    task, learner = ours.task, ours.learners[0]
    batch = ours.stream.batch(0)
    said = ours.cache.of_teacher(batch.images, LOGITS)
    images = batch.images.contiguous()

    def ms(do: Callable[[int], object]) -> float:
        for _ in range(2):
            wait(task)
            started = time.perf_counter()
            for number in range(steps):
                do(number)
            wait(task)
        return 1e3 * (time.perf_counter() - started) / steps

    def learn(number: int) -> None:
        learner.take(number, batch, said)
        learner.advance()

    def learning(count: int) -> float:
        with threads(count):
            return ms(learn)

    parts = {STUDENT: learning(torch.get_num_threads()), ALONE: learning(1)}
    with torch.no_grad(), torch.autocast(task.device, torch.float16, enabled=task.on_gpu):
        parts["teacher, official"] = ms(lambda _: peer.teacher(images))
    return parts | {
        "views, ours": ms(ours.stream.batch),
        "views, PIL in this process": ms(lambda number: list(pil_batches(task, range(number, number + 1), 0))),
        "teacher, ours": ms(lambda _: ours.cache.of_teacher(batch.images, LOGITS)),
    }


def measure(task: Task, rounds: int, steps: int, prefix: str = "") -> Iterator[Row]:
    """One student beside both peers, a rerun from the kept answers, several students beside the peers and beside one. After each part, what
    is known by then.
    """
    contenders = official, peer, ours = Official(task, 1, WORKERS[0]), Timm(task, WORKERS[0]), Ours(task, range(1))
    warm_up = agree(contenders, range(CHECKED), AGREE[task.device])
    counts = workers([official, peer], max(2, steps // 2))
    parts = split(ours, official, steps)
    alone = steps * min(parts[STUDENT], parts[ALONE]) / 1e3
    times = interleaved(contenders, rounds, steps, CHECKED)
    case, images = f"{prefix}one_student", task.batch * steps
    rows = [row(case, one.name, times[2], theirs, alone, images) for one, theirs in zip(contenders[:2], times[:2], strict=True)]
    found = {"case": case, "pil_workers": counts, "seconds_of_the_first_steps": warm_up, "milliseconds_of_a_step": parts, "rows": rows}
    teacher = ours.cache.teacher
    found["chosen"] = ours.learners[0].backend.record() | {"teacher_bf16": teacher.bf16, "teacher_compiled": teacher.kind}
    if task.on_gpu:
        found |= used(task, images / statistics.median(times[2]))
    yield found
    with tempfile.TemporaryDirectory() as folder:
        live, cached = interleaved([ours.keeping(Path(folder)), ours.keeping(Path(folder))], rounds, steps, CHECKED)
    # the first run's teacher may work beside the student, which therefore has one thread in both
    rows.append(row(f"{prefix}cached_rerun", "first_run", cached, live, steps * parts[ALONE if ours.ahead else STUDENT] / 1e3, images))
    yield found
    if task.students > 1:
        rows += several(task, rounds, max(2, steps // 2), parts, peer, ours)
        yield found


def several(task: Task, rounds: int, steps: int, parts: Row, peer: Timm, one: Ours) -> list[Row]:
    """Several students of one teacher: ours on all cores of a CPU, or together on a GPU; timm trains them one after the other."""
    case, processes = f"{WORDS[task.students]}_students", 1 if task.on_gpu else max(1, min(torch.get_num_threads(), task.students))
    official = Official(task, task.students, WORKERS[0])
    together = Ours(task, range(task.students)) if task.on_gpu else OursSideBySide(task, task.students, processes)
    agree([official, together], range(CHECKED), AGREE[task.device])
    workers([official], max(2, steps // 2))
    theirs, ours, *in_turn = interleaved([official, together, peer, one], rounds, steps, CHECKED)
    alone = steps * task.students * parts[STUDENT if task.on_gpu else ALONE] / processes / 1e3
    of_timm, of_one = ([task.students * seconds for seconds in found] for found in in_turn)
    beside = {"official": theirs, "timm": of_timm, "one_student": of_one}
    return [row(case, name, ours, found, alone, task.batch * steps * task.students) for name, found in beside.items()]


def used(task: Task, images_per_second: float) -> Row:
    """How much of the device: of the operations that its own matrix product does, of its memory's bandwidth, of its memory."""
    here = torch.device(task.device)
    of_teacher = forward_flops(task.classifier(task.teacher), task.channels, task.size)
    flops = of_teacher + 3 * forward_flops(task.classifier(task.student), task.channels, task.size)
    large, dtype = (8192, torch.bfloat16) if task.on_gpu else (512, torch.float32)
    square, long = torch.rand(large, large, device=here, dtype=dtype), torch.rand(large * large, device=here)

    def per_second(do: Callable[[], object], amount: float) -> float:
        do()
        wait(task)
        started = time.perf_counter()
        for _ in range(10):
            do()
        wait(task)
        return 10 * amount / (time.perf_counter() - started)

    matmul = per_second(lambda: square @ square, 2 * large**3)
    copied = per_second(long.clone, 2 * 4 * large**2)
    found = {"matmul_tflops": matmul / 1e12, "copy_gb_per_second": copied / 1e9, "mfu": images_per_second * flops / matmul}
    if task.student == "resnet50":
        # the teacher is bound by its operations, a ResNet-50 that trains by the bytes that it moves
        found["share_of_roofline"] = images_per_second * (of_teacher / matmul + RESNET50_BYTES / copied)
    if task.on_gpu:
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {"used": found}


def wait(task: Task) -> None:
    if task.on_gpu:
        torch.cuda.synchronize()


def markdown(found: Sequence[Row]) -> str:
    lines = ["# The engine beside its peers", "", "Written by `make bench`. No test asserts a time.", ""]
    for one in found:
        lines += [*heading(one), *table(one["rows"]), ""]
        lines += ["At most: were all but the students' own steps free (Amdahl's law).", ""]
        for task in one["tasks"]:
            lines += [f"| part of a step of {task['case']} | ms |", "|---|--:|"]
            lines += [f"| {name} | {value:.1f} |" for name, value in task["milliseconds_of_a_step"].items()]
            counts = ", ".join(f"{name} {count}" for name, count in task["pil_workers"].items())
            lines += ["", f"Worker processes of the PIL loaders, the fastest number: {counts}."]
            times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in task["seconds_of_the_first_steps"].items())
            lines += [f"Seconds of the first {CHECKED} steps, with what is compiled in them: {times or 'not noted'}.", ""]
            lines += [task["note"], ""] if "note" in task else []
            chosen = ", ".join(f"{name} {value}" for name, value in task.get("chosen", {}).items())
            lines += [f"Chosen: {chosen}.", ""] if chosen else []
            if "used" in task:
                lines += ["Of the device: " + ", ".join(f"{name} {value:.3g}" for name, value in task["used"].items()) + ".", ""]
    return "\n".join(lines)


def committed(folder: Path) -> list[Row]:
    """What was measured, on every hardware; the other benchmarks' results lie beside these."""
    return [one for one in written(folder, "") if "tasks" in one]


def for_readme(found: Sequence[Row]) -> str:
    return "\n\n".join(f"On {one['hardware']} ({one['versions']}, {one['date']}):\n\n" + "\n".join(table(one["rows"])) for one in found)


def table(rows: Sequence[Row]) -> list[str]:
    """As README shows it too."""
    lines = ["| case | beside | times as fast: median (least to most) | at most | asked for | rounds |", "|---|---|--:|--:|--:|--:|"]
    cells = ((one["case"], one["baseline"], _times(one), f"{one['ceiling']:.2f}", one["target"] or "", one["rounds"]) for one in rows)
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in cells)]


def _times(one: Row) -> str:
    return f"{one['ratio_median']:.2f} ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(str(__doc__))
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--only", nargs="+", choices=GPU, help="of a GPU's nets these: '' for ImageNet's, small_nets_ for CIFAR's")
    given = options.parse_args(arguments)
    small = Task(student="kd_resnet8_w8_s1", teacher="kd_resnet8_w8_s1", batch=32, images=400, students=2)
    tasks = {"": small} if given.quick else GPU if torch.cuda.is_available() else {"": Task()}
    rounds, steps = (2, 6) if given.quick else (given.rounds, given.steps)
    found = about(torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {"rows": [], "tasks": []}
    if given.only is not None:
        tasks = {prefix: tasks[prefix] for prefix in given.only}
        found |= {key: [one for one in kept if nets(one) not in tasks] for key, kept in before(found["hardware"], given).items()}
    others = {key: list(found[key]) for key in ("rows", "tasks")}
    for prefix, task in tasks.items():
        for so_far in measure(task, rounds, steps, prefix):
            found["rows"] = [*others["rows"], *so_far["rows"]]
            found["tasks"] = [*others["tasks"], {key: value for key, value in so_far.items() if key != "rows"}]
            publish(found, given)
        others = {key: list(found[key]) for key in ("rows", "tasks")}


def nets(one: Row) -> str:
    """To which of the tasks a row, or what a task found, belongs."""
    return next((prefix for prefix in GPU if prefix and one["case"].startswith(prefix)), "")


def before(hardware: str, given: argparse.Namespace) -> dict[str, list[Row]]:
    """What is already known of this hardware."""
    found = [one for one in committed(given.out or HERE) if one["hardware"] == hardware]
    return {key: found[0][key] if found else [] for key in ("rows", "tasks")}


def publish(found: Row, given: argparse.Namespace) -> None:
    out = write(found, given, "")
    every = committed(out)
    (out / "engine.md").write_text(markdown(every))
    if out == HERE:
        readme = HERE.parent / "README.md"
        write_text(readme, insert_between_markers(readme.read_text("utf-8"), for_readme(every), "engine"))


if __name__ == "__main__":
    main()
