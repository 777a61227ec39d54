"""What each method's loss costs: its time beside the baseline's, its peak memory, its extra parameters; and which promised costs hold.

    python benchmarks/methods.py [--device cuda] [--map-batch 256] [--quick] [--out FOLDER]

Writes results/methods_<hardware>.json and methods.md (of all such files) in FOLDER: by default beside this file, with --quick
(small shapes, seconds) in build/benchmarks. Run it on an idle machine: with other work on the cores every figure is another machine's.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from losses_in_turn import Bench, Shapes
from pages import HERE, Row, about, heading, parser, ratio, write_with_page

from kdlib import config
from kdlib.engine.probe import peak_bytes
from kdlib.losses import METHODS
from kdlib.models.build import build
from kdlib.types import Asks, Feature, OutputShape

MAPS = {Feature.MAPS, Feature.PREACTIVATIONS}


STAGES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
FULL = Shapes(
    *(256, 16, 30, 5, (50_000, 1_281_167)),
    student=OutputShape(1000, 2048, STAGES),
    teachers={"ResNet-152": OutputShape(1000, 2048, STAGES), "BEiTv2-L": OutputShape(1000, 1024, ((1024, 14, 14),) * 4)},
    net=("resnet50", 224),
)
SMALL = ((8, 8, 8), (16, 4, 4), (32, 2, 2))
QUICK = Shapes(
    *(8, 4, 3, 2, (200, 800)),
    student=OutputShape(10, 32, SMALL),
    teachers={"ResNet-152": OutputShape(10, 32, SMALL), "BEiTv2-L": OutputShape(10, 16, ((16, 4, 4),) * 4)},
    net=("kd_resnet8_w8_s1", 8),
)


def _asks(name: str) -> Asks:
    return METHODS[name].asks_student | METHODS[name].asks_teacher


def table(bench: Bench) -> list[Row]:
    """All methods, each beside the baseline: those on logits alone once, others with every teacher, those on maps in smaller batches."""
    rows = []
    for i, teacher in enumerate(bench.shapes.teachers):
        flat = [name for name in METHODS if not _asks(name) & MAPS and (i == 0 or _asks(name) != {Feature.LOGITS})]
        rows += compare(bench, flat, teacher, bench.shapes.batch, bench.shapes.rounds)
        mapped = [name for name in METHODS if _asks(name) & MAPS]
        rows += compare(bench, mapped, teacher, bench.shapes.map_batch, bench.shapes.map_rounds)
    return rows


def compare(bench: Bench, names: Sequence[str], teacher: str, size: int, rounds: int) -> list[Row]:
    """Rows of these methods and the baseline. Ratios are taken within a round."""
    shape = bench.shapes.teachers[teacher]
    methods = {name: bench.method(name, shape, bench.shapes.images[0]) for name in dict.fromkeys((bench.baseline, *names))}
    steps = bench.steps(methods, shape, size)
    peaks = {name: peak_bytes(step, bench.device) for name, step in steps.items()}
    seconds = bench.seconds(steps, rounds)
    rows = []
    for name, found in seconds.items():
        ratios = ratio(found, seconds[bench.baseline])
        extra = sum(parameter.numel() for parameter in methods[name].parameters())
        kept = methods[name].nbytes / 1e6
        row: Row = {"method": name, "teacher": teacher, "batch": size, "ms": 1e3 * statistics.median(found)} | ratios
        rows.append(row | {"peak_mb": peaks[name] / 1e6, "extra_parameters": extra, "kept_mb": kept, "rounds": rounds})
        print(f"{name:10} {teacher:10} batch {size}: {row['ms']:.1f} ms, x {row['ratio']:.2f}, {peaks[name] / 1e6:.1f} MB", flush=True)
    return rows


def student_seconds(bench: Bench) -> float:
    """Forward and backward pass of a student on one batch; on a CPU on a few images, times as many as a batch has more."""
    (name, side), size = bench.shapes.net, bench.shapes.batch
    images = size if bench.device.type == "cuda" else min(size, 8)
    net = build(name, bench.shapes.student.classes, 3, side).to(bench.device)
    views = torch.rand(images, 3, side, side, device=bench.device)
    found = bench.seconds({name: lambda: net(views).logits.square().mean().backward()}, 3)
    return statistics.median(found[name]) * size / images


def claims(bench: Bench, rows: Sequence[Row], student: float) -> list[Row]:
    """What is promised of the costs, and what was found."""
    flat = [row for row in rows if row["batch"] == bench.shapes.batch]
    angles = max(row["peak_mb"] for row in flat if row["method"] == "rkd")
    found = [claim("RKD, all its angles included: at most 64 MB", f"{angles:.1f} MB", angles <= 64)]
    small, large = bench.shapes.images
    shape = next(iter(bench.shapes.teachers.values()))
    crd = {f"{images:,}": bench.method("crd", shape, images) for images in (small, large)}
    seconds = bench.seconds(bench.steps(crd, shape, bench.shapes.batch), bench.shapes.rounds)
    step = ratio(seconds[f"{large:,}"], seconds[f"{small:,}"])
    told = f"x {step['ratio']:.2f} ({step['ratio_min']:.2f} to {step['ratio_max']:.2f})"
    found.append(claim(f"CRD's step with {large:,} images against that with {small:,}: at most x 1.1", told, step["ratio"] <= 1.1))
    buffers = list(crd[f"{large:,}"].buffers())
    index, banks = (sum(one.nbytes for one in buffers if one.is_floating_point() == bank) / 1e6 for bank in (False, True))
    told = f"{index:.1f} MB (and the two banks {banks:,.0f} MB)"
    found.append(claim(f"CRD's index tables for {large:,} images: at most 100 MB", told, index <= 100))
    # the first row of each: the baseline comes again in later groups
    plain = {row["method"]: row["ms"] / 1e3 for row in reversed(flat) if row["method"] in {"kd", "dkd", "dist", "bkl"}}
    for what, base in (("the loss alone", 0.0), (f"with the step of a {bench.shapes.net[0]}", student)):
        spread = (base + max(plain.values())) / (base + min(plain.values()))
        found.append(claim(f"KD, DKD, DIST and BKL within 1.3x of each other, {what}", f"x {spread:.4g}", spread <= 1.3))
    return found


def claim(text: str, measured: str, holds: bool) -> Row:
    print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}: {measured}", flush=True)
    return {"claim": text, "measured": measured, "holds": holds}


def markdown(found: Sequence[Row]) -> str:
    lines = ["# What a method's loss costs", "", "Written by `python benchmarks/methods.py`. No test asserts a time.", ""]
    lines += [
        "Time: the method's own terms and their backward pass, the models' answers given; gradients reach the student's answers and the",
        "method's parameters. Beside the baseline's in the same round: median, least and most over the rounds. Memory: the most that was",
        "allocated at once beyond answers and parameters, gradients included. Kept: the method's parameters and banks, throughout training",
        f"on {FULL.images[0]:,} images. Share: of the student's own forward and backward pass.",
        "",
    ]
    for one in found:
        lines += [*heading(one), "| claim | measured | holds |", "|---|---|---|"]
        lines += [f"| {row['claim']} | {row['measured']} | {'yes' if row['holds'] else '**no**'} |" for row in one["claims"]]
        lines += [
            "",
            _maps(one),
            "",
            "| method | teacher | batch | ms | times baseline | share of a step | peak, MB | extra parameters | kept, MB |",
        ]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|", *(_row(row, one) for row in one["rows"]), ""]
    return "\n".join(lines)


def _row(row: Row, one: Row) -> str:
    share = row["ms"] / 1e3 / (one["student_seconds"] * row["batch"] / one["shapes"]["batch"])
    beside = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    cells = (row["method"], row["teacher"], row["batch"], f"{row['ms']:.1f}", beside, f"{share:.1%}", f"{row['peak_mb']:.1f}")
    return f"| {' | '.join(map(str, cells))} | {row['extra_parameters']:,} | {row['kept_mb']:.1f} |"


def _maps(one: Row) -> str:
    """Why the methods on maps have smaller batches."""
    shapes = one["shapes"]
    times = shapes["batch"] // shapes["map_batch"]
    sizes = [
        4e-9 * shapes["batch"] * sum(a * b * c for a, b, c in shape["maps"]) for shape in (shapes["student"], *shapes["teachers"].values())
    ]
    most = max((row for row in one["rows"] if row["batch"] == shapes["map_batch"]), key=lambda row: row["peak_mb"])
    said = (
        f"The step is that of a {shapes['net'][0]} at {shapes['net'][1]} px, {one['student_seconds']:.3g} s for {shapes['batch']} images."
    )
    if times == 1:
        return said
    why = f"at {shapes['batch']} the student's maps alone take {sizes[0]:.1f} GB, a teacher's up to {max(sizes[1:]):.1f} GB, and"
    need = f"{most['method']} would need {times} times its peak beside them, {most['peak_mb'] * times / 1e3:.0f} GB"
    return f"{said} Methods that read stage maps are measured at a batch of {shapes['map_batch']}: {why} {need}."


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(str(__doc__))
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options.add_argument("--map-batch", type=int, help="of the methods that read stage maps")
    given = options.parse_args(arguments)
    shapes = QUICK if given.quick else FULL
    shapes = replace(shapes, map_batch=given.map_batch or shapes.map_batch)
    found = about(given.device)
    bench = Bench(shapes, given.device, config.load(HERE.parent))
    rows, student = table(bench), student_seconds(bench)
    found |= {"shapes": asdict(shapes), "student_seconds": student, "claims": claims(bench, rows, student), "rows": rows}
    write_with_page(found, given, "methods", markdown)


if __name__ == "__main__":
    main()
