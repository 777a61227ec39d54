"""What others published about these methods, each number with its source. What nobody published is not here: no row, or a blank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

FILE = Path("results/published/results.csv")
_TEXTS = ("table", "dataset", "teacher", "student", "recipe", "method", "metric", "kind", "source")
_FRACTIONS = {"imagenet1k_30pct": ("imagenet1k", 0.3), "imagenet1k_60pct": ("imagenet1k", 0.6)}


def read_published(root: Path) -> pd.DataFrame:
    """All published numbers: table, dataset, teacher, student, recipe, epochs, method, metric, value (as printed), kind, source.

    From the nearest folder at or above the study's that has them: the studies of a project share one copy.
    """
    file = next((folder / FILE for folder in (root, *root.resolve().parents) if (folder / FILE).is_file()), root / FILE)
    types = dict.fromkeys(_TEXTS, "string") | {"epochs": "Int64", "value": "float64"}
    return pd.read_csv(file, dtype=types, keep_default_na=False, na_values=[""])


def figure1(published: pd.DataFrame) -> pd.DataFrame:
    """Leads over vanilla KD by data scale: data, fraction, method, baseline, lead (in [-1, 1]), kind, source.

    Source: Hao et al., "Revisit the power of vanilla knowledge distillation", NeurIPS 2023, Figure 1, read off the figure.
    """
    rows = published[published["table"] == "figure1"]
    about = [[*_FRACTIONS.get(data, (data, 1.0)), *pair.split("_minus_")] for data, pair in rows[["dataset", "method"]].to_numpy()]
    frame = pd.DataFrame(about, columns=["data", "fraction", "method", "baseline"])
    return frame.assign(lead=(rows["value"] / 100).to_numpy(), **{name: rows[name].to_numpy() for name in ("kind", "source")})


def table1(published: pd.DataFrame) -> pd.DataFrame:
    """Top-1 under the previous, short recipes, CIFAR-100 and ImageNet (after the paper's Table 1); columns as in ``_accuracies``."""
    return _accuracies(published, ["table1_cifar100", "table1_imagenet"])


def strategies(published: pd.DataFrame) -> pd.DataFrame:
    """Top-1 on ImageNet under the strong recipes A2 and A1 (after the paper's Table 3); columns as in ``_accuracies``."""
    return _accuracies(published, ["table3_methods"])


def _accuracies(published: pd.DataFrame, tables: list[str]) -> pd.DataFrame:
    """data, teacher, student, recipe, epochs, method (or ``student`` alone, or ``teacher``), mean (of top-1, in [0, 1]), "kind: source"."""
    rows = published[published["table"].isin(tables) & (published["metric"] == "top1")].reset_index(drop=True)
    rows = rows.rename(columns={"dataset": "data"}).assign(mean=rows["value"] / 100, source=rows["kind"] + ": " + rows["source"])
    return rows[["data", "teacher", "student", "recipe", "epochs", "method", "mean", "source"]]


def how(row: Mapping[str, Any]) -> str:
    """``A2, 300 epochs``, as far as a published row tells."""
    return ", ".join([str(row["recipe"])] * pd.notna(row["recipe"]) + [f"{row['epochs']} epochs"] * pd.notna(row["epochs"]))


def announced(published: pd.DataFrame, model: str) -> dict[str, float]:
    """What the authors' readmes say of the file that they released of ``model``, by metric, as shares: of a student, or of a teacher."""
    student = (published["student"] == model) & published["source"].str.contains("model zoo", regex=False)
    teacher = (published["teacher"] == model) & (published["table"] == "teachers")
    rows = published[(student | teacher).fillna(False) & (published["dataset"] == "imagenet1k")]
    return {str(metric): value / 100 for metric, value in zip(rows["metric"], rows["value"], strict=True)}
