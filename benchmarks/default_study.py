"""What the study costs: time and memory from a clean clone, of a no-op, and of one notebook stage.

    python benchmarks/default_study.py [FOLDER]     FOLDER: a clean clone to run in (default: here)

Writes default_study.md beside this file. Run it on an idle machine: with other work on the cores every figure is another machine's.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    load = os.getloadavg()[0]
    seconds, gigabytes = watched([sys.executable, "-m", "kdlib.study", "run"], folder)
    idle = [timed([sys.executable, "-m", "dvc", "repro"], folder) for _ in range(3)]
    # a teacher that the store holds: kernel, imports, measuring nothing, writing the executed notebook
    title = next(path.stem.replace(".", "@") for path in sorted((folder / "runs/notebooks").glob("teacher.*.ipynb")))
    overhead = [timed([sys.executable, "-m", "kdlib.notebook", "run", title], folder) for _ in range(3)]
    rows = [
        ("default study from a clean clone, all stages", f"{seconds / 60:.1f} min", "15 min"),
        ("memory of all its processes together, peak", f"{gigabytes:.2f} GB", "4 GB"),
        ("`dvc repro` with nothing to do, median of 3", f"{sorted(idle)[1]:.1f} s", "5 s"),
        ("one notebook stage whose work is done already (kernel, imports), median of 3", f"{sorted(overhead)[1]:.1f} s", "6 s"),
    ]
    table = "\n".join(f"| {what} | {found} | {limit} |" for what, found, limit in rows)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, no GPU used, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, load {load:.2f} before the start, {time.strftime('%Y-%m-%d', time.gmtime())}"
    )
    (HERE / "default_study.md").write_text(
        f"# What the default study costs\n\nWritten by `python benchmarks/default_study.py` on: {machine}.\n\n"
        f"| what | measured | promised |\n|---|---|---|\n{table}\n\nInstallation is apart. No test asserts a time.\n"
    )


if __name__ == "__main__":
    main()
