"""Run directories -> tables of numbers. Everything written here is whole or not there at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.errors import Refused
from kdlib.files import read_json
from kdlib.study.training.planned import DISTILL, TEACHERS, Run, run_folder

MEASURES = ("top1", "top5", "nll", "ece", "agreement", "teacher_kl")
_RUN = ["comparison", "variant", "seed"]
# Of runs.csv, in its order. Counts may be blank.
_TYPES: dict[str, str] = {
    **dict.fromkeys(("comparison", "data"), "string"),
    **{"classes": "Int64", "fraction": "float64", "train_images": "Int64"},
    **dict.fromkeys(("teacher", "student", "recipe", "hard_loss", "method", "variant", "looks_at"), "string"),
    **{"relational": "bool", "parameters": "string", "seed": "Int64", "trial": "bool", "fingerprint": "string"},
    **{"status": "string", "diverged_step": "Int64", "diverged_cause": "string"},
    **dict.fromkeys(("images_seen", "steps", "student_parameters", "extra_parameters", "extra_bytes", "step_bytes"), "Int64"),
    **dict.fromkeys(("train_flops", "teacher_flops"), "Int64"),
    **dict.fromkeys((f"{split}_{measure}" for split in ("val", "test") for measure in MEASURES), "float64"),
}
COLUMNS = list(_TYPES)


def read_runs(path: Path) -> pd.DataFrame:
    """results/runs.csv as ``collect`` made it."""
    return pd.read_csv(path, dtype=_TYPES, keep_default_na=False, na_values=[""])[COLUMNS]


def has_teacher(root: Path, name: str) -> bool:
    """Whether this teacher was made."""
    return (root / TEACHERS / name / "metrics.json").is_file()


def collect(root: Path, expected: Iterable[Run]) -> pd.DataFrame:
    """One row per expected run, in that order; other folders are not looked at. Numbers are rounded as runs.csv shows them,
    so that every table can be computed again from that file alone. Raises ``Refused`` when runs are missing."""
    rows = []
    for run, folder in _run_folders(root, expected).items():
        row = read_json(folder / "run.json") | read_json(folder / "metrics.json")
        name = (row["comparison"], row["variant"], row["seed"])
        if name != run:
            raise Refused(f"{folder / 'run.json'}: found run {name}; allowed: {run}; the folder was moved: delete it and run `dvc repro`")
        rows.append(row | {"parameters": json.dumps(row["parameters"], separators=(",", ":"))})
    return pd.DataFrame(rows, columns=COLUMNS).astype(_TYPES).round(6)


def curves(root: Path, expected: Iterable[Run]) -> pd.DataFrame:
    """curve.csv of every expected run, one below the other, with the run's name in front. Raises ``Refused`` when runs are missing."""
    return _join(_RUN, {run: pd.read_csv(folder / "curve.csv") for run, folder in _run_folders(root, expected).items()})


def timing(root: Path, expected: Iterable[Run]) -> pd.DataFrame:
    """timing.json of every expected run (seconds; they differ from run to run and nothing may depend on them), and ``on``, where it ran."""
    folders = _run_folders(root, expected).items()
    return _join(_RUN, {run: pd.DataFrame([read_json(folder / "timing.json") | {"on": _machine(folder)}]) for run, folder in folders})


def _machine(folder: Path) -> str:
    """What seconds can be compared within."""
    where = read_json(folder / "environment.json")
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}"


def teachers(root: Path, names: Iterable[str]) -> pd.DataFrame:
    """metrics.json of every named teacher, one row each. Raises ``Refused`` when one is missing."""
    folders = _teacher_folders(root, names).items()
    return _join(["teacher"], {name: pd.DataFrame([read_json(folder / "metrics.json")]) for name, folder in folders})


def teacher_curves(root: Path, names: Iterable[str]) -> pd.DataFrame:
    """curve.csv of every named teacher that has one: a loaded teacher was not trained here."""
    files = {name: folder / "curve.csv" for name, folder in _teacher_folders(root, names).items()}
    return _join(["teacher"], {name: pd.read_csv(file) for name, file in files.items() if file.is_file()})


def missing(root: Path, expected: Iterable[Run]) -> list[Run]:
    """Those of these runs that were not brought to their end."""
    return [run for run in expected if not (run_folder(root, run) / "metrics.json").is_file()]


def _run_folders(root: Path, expected: Iterable[Run]) -> dict[Run, Path]:
    folders = {run: run_folder(root, run) for run in expected}
    _refuse_missing([f"{DISTILL / name / variant}/seed_{seed}" for name, variant, seed in missing(root, folders)], len(folders))
    return folders


def _teacher_folders(root: Path, names: Iterable[str]) -> dict[str, Path]:
    folders = {name: root / TEACHERS / name for name in names}
    _refuse_missing([str(TEACHERS / name) for name in folders if not has_teacher(root, name)], len(folders))
    return folders


def _join(keys: list[str], parts: Mapping[Any, pd.DataFrame]) -> pd.DataFrame:
    """One part below the other, each with its name in front."""
    return pd.concat(parts, names=keys).reset_index(keys).reset_index(drop=True) if parts else pd.DataFrame(columns=keys)


def _refuse_missing(missing: list[str], of: int) -> None:
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise Refused(f"runs: {len(missing)} of {of} are missing ({shown}); run `dvc repro`")
