"""What the stages' notebooks show of one data set, one teacher, one comparison. Figures of the whole study: kdlib.study.report.plots."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.data.dataset import DataSet
from kdlib.files import read_json


def summary(data: DataSet) -> pd.Series:
    """Sizes, and mean and standard deviation of the training split in [0, 1]."""
    return pd.Series(
        {
            "classes": data.classes,
            "image": f"{data.size} x {data.size} x {data.channels}",
            **{f"{name} images": len(split.labels) for name, split in _splits(data).items()},
            "mean": ", ".join(f"{value:.4f}" for value in data.mean),
            "standard deviation": ", ".join(f"{value:.4f}" for value in data.std),
            "fingerprint": data.fingerprint[:16],
        },
        name=data.name,
    )


def images_by_class(data: DataSet, rows: int = 8, columns: int = 10) -> Figure:
    """Training images: a class in each row, classes evenly spread over all."""
    chosen = np.linspace(0, data.classes - 1, min(rows, data.classes)).round().astype(int)
    places = [np.flatnonzero(data.train.labels == label)[:columns] for label in chosen]
    titles = [data.class_names[label] for label in chosen]
    return image_sheet([[data.train.images[place] for place in row] for row in places], titles, data.name)


def image_sheet(grid: list[list[np.ndarray]], titles: list[str], title: str) -> Figure:
    """A sheet of images (H x W x C, 0..255), each row with its title on the left."""
    columns = max(len(row) for row in grid)
    figure, axes = _sheet(len(grid), columns, (0.8 * columns + 1, 0.8 * len(grid) + 0.4))
    for panels, images, name in zip(axes, grid, titles, strict=True):
        for axis, image in zip(panels, images, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        panels[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def balance(data: DataSet) -> Figure:
    """Images of each class in each split."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
    for axis, (name, split) in zip(axes, _splits(data).items(), strict=True):
        counts = np.bincount(split.labels, minlength=data.classes)
        axis.bar(np.arange(data.classes), counts, width=1.0)
        axis.set(title=f"{name}: {len(split.labels):,} images, {counts.min()} to {counts.max()} per class", xlabel="class", ylabel="images")
    figure.tight_layout()
    return figure


def metrics(named: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One column for each name; shares in [0, 1], nats."""
    return pd.DataFrame({name: pd.Series(dict(values), dtype=object) for name, values in named.items()}).dropna(how="all")


def runs(folders: Iterable[Path]) -> pd.DataFrame:
    """One row per run: name, seed, status and the measures of its last epoch, shares in [0, 1]."""
    rows = [read_json(folder / "run.json") | read_json(folder / "metrics.json") for folder in folders]
    measured = dict.fromkeys(name for row in rows for name in row if name.startswith("test_"))
    wanted = ["variant", "seed", "status", "diverged_cause", "val_top1", *measured]
    return pd.DataFrame(rows).reindex(columns=wanted).dropna(axis=1, how="all").round(4)


def by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """The folders by "variant, seed s"; trials of a sweep are left out."""
    return {f"{folder.parent.name}, {folder.name.replace('_', ' ')}": folder for folder in folders if folder.parents[1].name != "trial"}


def training_curves(named: Mapping[str, Path]) -> Figure:
    """Training loss and validation top-1 against the images seen. Runs of one method share a colour."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    colours: dict[str, str] = {}
    for name, folder in named.items():
        method = name.partition(",")[0]
        look = {"label": None if method in colours else method, "color": colours.setdefault(method, f"C{len(colours) % 10}")}
        curve = pd.read_csv(folder / "curve.csv")
        left.plot(curve["images_seen"], curve["loss"], **look)
        measured = curve.dropna(subset="val_top1")
        right.plot(measured["images_seen"], 100 * measured["val_top1"], ".-", **look)
    left.set(xlabel="images seen", ylabel="training loss, all terms")
    right.set(xlabel="images seen", ylabel="validation top-1, %")
    right.legend()
    figure.tight_layout()
    return figure


def describe_run(folder: Path) -> pd.DataFrame:
    """All that a run says of itself: what it was, then what came of it (shares in [0, 1], nats; validation split / test split)."""
    record = read_json(folder / "run.json") | read_json(folder / "metrics.json")
    names = [key.removeprefix("val_") for key in record if key.startswith("val_")]
    pairs = {name: " / ".join(f"{record[key]:.4f}" for key in (f"val_{name}", f"test_{name}") if key in record) for name in names}
    summary = {key: _short(value) for key, value in record.items() if value is not None and not key.startswith(("val_", "test_"))}
    return pd.DataFrame({"/".join(folder.parts[-3:]): summary | pairs}, dtype=object)


def measures_of_runs(named: Mapping[str, Path], split: str = "val") -> pd.DataFrame:
    """One row for each named run: how it ended, its training loss in the last epoch, and its measures on a split."""
    rows = {}
    for name, folder in named.items():
        metrics = read_json(folder / "metrics.json")
        loss = pd.read_csv(folder / "curve.csv")["loss"].iloc[-1:]
        of_split = {key.removeprefix(f"{split}_"): value for key, value in metrics.items() if key.startswith(f"{split}_")}
        rows[name] = {"status": metrics["status"], "training loss": next(iter(loss), None)} | of_split
    return pd.DataFrame.from_dict(rows, orient="index").round(4)


def disagreements(data: DataSet, predictions: pd.DataFrame, columns: int = 6) -> Figure:
    """Test images that teacher and student class differently (``explore.predictions``), a row for each way; first where both are surest."""
    differ = predictions[predictions["teacher"] != predictions["student"]]
    differ = differ.loc[(differ["teacher_p"] * differ["student_p"]).sort_values(ascending=False, kind="stable").index]
    teacher, student = differ["teacher"] == differ["label"], differ["student"] == differ["label"]
    ways = {"only the\nteacher\nis right": teacher, "only the\nstudent\nis right": student, "both are\nwrong": ~teacher & ~student}
    kinds = {name: differ[which] for name, which in ways.items() if which.any()}
    height = max(1, len(kinds))  # a title alone when they never differ
    figure, axes = _sheet(height, columns, (1.85 * columns + 0.8, 2.35 * height + 0.5))
    for panels, (name, rows) in zip(axes, kinds.items(), strict=False):
        panels[0].set_ylabel(f"{name}:\n{len(rows):,} image{'s' * (len(rows) != 1)}", rotation=0, ha="right", va="center", labelpad=8)
        for axis, place, row in zip(panels, rows.index.to_numpy(int), rows.to_dict("records"), strict=False):
            axis.imshow(data.test.images[place].squeeze(), cmap="gray", vmin=0, vmax=255)
            says = [f"{who} {_name(data, row[who])} ({100 * row[who + '_p']:.0f} %)" for who in ("teacher", "student")]
            axis.set_xlabel("\n".join([f"true {_name(data, row['label'])}", *says]), fontsize="x-small")
    figure.suptitle(f"{data.name}: teacher and student differ on {len(differ):,} of {len(predictions):,} test images")
    figure.tight_layout()
    return figure


def by_class(data: DataSet, predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per true class, the least agreed on first: images, top-1 of both and how often they agree, as shares in [0, 1]."""
    right = {f"{who}_top1": predictions[who] == predictions["label"] for who in ("teacher", "student")}
    groups = predictions.assign(**right, agreement=predictions["teacher"] == predictions["student"]).groupby("label")
    frame = groups[[*right, "agreement"]].mean().assign(images=groups.size())
    frame.index = pd.Index([data.class_names[label] for label in frame.index], name="class")
    return frame.sort_values("agreement", kind="stable").round(4)


def _sheet(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Panels for images: no ticks, no frame."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})


def _splits(data: DataSet) -> dict[str, Any]:
    return {"train": data.train, "val": data.val, "test": data.test}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:g}" for key, number in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _name(data: DataSet, label: int) -> str:
    name = data.class_names[label]
    return name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}"
