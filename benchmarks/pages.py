"""What the benchmarks share: on what they were measured, where results and pages lie, ratios of times of the same rounds."""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

HERE = Path(__file__).parent
Row = dict[str, Any]


def parser(text: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true")
    made.add_argument("--out", type=Path)
    return made


def about(device: torch.device) -> Row:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {os.cpu_count()} cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True, capture_output=True, check=False)
    return {
        "hardware": name,
        "threads": torch.get_num_threads(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
        "load before": round(os.getloadavg()[0], 2),
        "commit": commit.stdout.strip(),  # nothing in a copy without .git
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def heading(one: Row) -> list[str]:
    """Of what was measured on one hardware."""
    return [
        f"## {one['hardware']}",
        "",
        ", ".join(f"{key} {one[key]}" for key in ("threads", "versions", "load before", "commit", "date")),
        "",
    ]


def write(found: Row, given: argparse.Namespace, prefix: str) -> Path:
    """results/<prefix><hardware>.json in the folder that was asked for, which is returned."""
    out: Path = given.out or (HERE.parent / "build" / "benchmarks" if given.quick else HERE)
    (out / "results").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", found["hardware"]).strip("_").lower()
    (out / "results" / f"{prefix}{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    return out


def written(folder: Path, prefix: str) -> list[Row]:
    """What was measured, on every hardware."""
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob(f"{prefix}*.json"))]


def write_with_page(found: Row, given: argparse.Namespace, name: str, markdown: Callable[[list[Row]], str]) -> None:
    """results/<name>_<hardware>.json and <name>.md, the page of all such files."""
    out = write(found, given, f"{name}_")
    (out / f"{name}.md").write_text(markdown(written(out, f"{name}_")))


def ratio(found: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Of times taken in the same rounds: median, least and most."""
    each = [a / b for a, b in zip(found, others, strict=True)]
    return {"ratio": statistics.median(each), "ratio_min": min(each), "ratio_max": max(each)}
