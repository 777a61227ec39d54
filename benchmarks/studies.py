"""What a study costs: time and memory from a clean clone, of a no-op, and of one notebook stage.

    python benchmarks/studies.py study [FOLDER]      FOLDER: a clean clone to run the default study in (default: here)
    python benchmarks/studies.py methods [FOLDER]    the same with the study of methods
    python benchmarks/studies.py stages [FOLDER]     FOLDER: one in which the default study is finished

Writes results/studies.json and studies.md beside this file.
Run it on an idle machine: with other work on the cores every figure is another machine's.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).parent
SAMPLE_SECONDS = 2.0  # reading proportional set sizes costs milliseconds of a core that the study wants


def watched(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and the largest sum in GB of the proportional set sizes of the command and its descendants."""
    started, peak = time.perf_counter(), 0
    child = psutil.Popen(command, cwd=folder)
    while child.poll() is None:
        peak = max(peak, sum(map(memory, [child, *descendants(child)])))
        time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - started, peak / 1e9


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Children of children included; none of a process that has just ended."""
    try:
        found: list[psutil.Process] = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def memory(process: psutil.Process) -> int:
    """Proportional set size in bytes: shared pages are counted once, divided among those who share them."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def timed(command: list[str], folder: Path) -> float:
    """Seconds."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def study(folder: Path) -> dict[str, str]:
    return whole("default study", [], 15, folder)


def methods(folder: Path) -> dict[str, str]:
    return whole("study of methods", ["methods"], 40, folder)


def whole(title: str, name: list[str], minutes: int, folder: Path) -> dict[str, str]:
    """From a clean clone to the tables. Refuses a clone that has finished runs: they would not be trained again."""
    if any((folder / ".dvc" / "kdlib-runs").glob("*")):
        sys.exit(f"found finished runs in {folder}/.dvc/kdlib-runs; allowed: a clean clone; clone the project anew")
    seconds, gigabytes = watched([sys.executable, "-m", "kdlib.study", "run", *name], folder)
    return {
        f"{title} from a clean clone, all stages (at most {minutes} min)": f"{seconds / 60:.1f} min",
        f"{title}: memory of all its processes together, peak (at most 4 GB)": f"{gigabytes:.2f} GB",
    }


def stages(folder: Path) -> dict[str, str]:
    """In a finished study: what DVC and a notebook cost by themselves."""
    idle = [timed([sys.executable, "-m", "dvc", "repro"], folder) for _ in range(5)]
    title = next(path.stem.replace(".", "@") for path in sorted((folder / "runs/notebooks").glob("teacher.*.ipynb")))
    overhead = [timed([sys.executable, "-m", "kdlib.study.cli.notebook", "run", title], folder) for _ in range(5)]
    return {
        "`dvc repro` with nothing to do, median of 5 (at most 5 s)": f"{sorted(idle)[2]:.1f} s",
        "a notebook stage whose work is done already: kernel, imports; median of 5 (at most 6 s)": f"{sorted(overhead)[2]:.1f} s",
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# What the studies cost",
        "",
        "Written by `python benchmarks/studies.py`. Installation is apart. No test asserts a time.",
        "",
    ]
    lines += ["| what | measured | on |", "|---|---|---|"]
    for measured in found.values():
        place = ", ".join(
            f"load {value} before" if key == "load before" else str(value) for key, value in measured.items() if key != "rows"
        )
        lines += [f"| {what} | {value} | {place} |" for what, value in measured["rows"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    part, folder = (
        {"study": study, "methods": methods, "stages": stages}[sys.argv[1]],
        Path(sys.argv[2] if len(sys.argv) > 2 else ".").resolve(),
    )
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "load before": round(os.getloadavg()[0], 2),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True).strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    path = HERE / "results" / "studies.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[sys.argv[1]] = {"rows": part(folder), **machine}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "studies.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
