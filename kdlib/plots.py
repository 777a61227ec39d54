"""runs.csv and curves -> figures. A method has the same colour everywhere; every interval and n is named in the figure."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from kdlib import published, results, tables
from kdlib.config import Study
from kdlib.tables.leads import ordered
from kdlib.tables.render import number, records

STYLE = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=0.9) | {"svg.hashsalt": "kdlib", "svg.fonttype": "path"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
_MARKERS = "oDs^vPX*"
PAPER = "published (Hao et al. 2023,\nread off the figure; own scale)"


def colours(study: Study) -> dict[str, tuple[float, float, float]]:
    """Method -> colour (seaborn's colour-blind-safe palette); a tuned method has its method's."""
    found = dict(zip(study.methods, sns.color_palette("colorblind", len(study.methods)), strict=True))
    return found | {f"{name}_tuned": colour for name, colour in found.items()}


def save(figure: Figure, folder: Path, name: str) -> None:
    """``folder/<name>.svg`` and ``.png`` (150 dpi), each whole or not at all; the same figure gives the same bytes."""
    for form, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=form, **options)
        results.write_bytes(folder / f"{name}.{form}", buffer.getvalue())


def data_scale(study: Study, runs: pd.DataFrame, numbers: pd.DataFrame) -> Figure:
    """The challengers' lead over the baseline by scale, for each recipe of the headline's data set, beside the paper's Figure 1."""
    data, baseline = study.study.headline.data, study.study.baseline
    leads = tables.leads(study, runs)
    leads = leads[(leads["question"] == "lead") & (leads["data"] == data) & (leads["n"] > 0)]
    recipes = [name for name in study.recipes if name in set(leads["recipe"])]
    figure, axes = _grid(1, len(recipes) + 1, (3.6, 3.9), widths=[*[1.0] * len(recipes), 1.25])
    for i, recipe in enumerate(recipes):
        _leads(axes[0, i], leads[leads["recipe"] == recipe], study)
        axes[0, i].set_title(f"{data}, recipe {recipe}\n(measured here)")
    _same_height(axes[0, : len(recipes)])
    paper = published.figure1(numbers)
    _bars(axes[0, -1], paper[paper["method"].isin(study.study.challengers)], study)
    axes[0, 0].set_ylabel(f"lead over {baseline} (points of test top-1)")
    counts = _counts(leads["n"])
    figure.suptitle(
        f"Lead over {baseline} by data scale: mean and {100 * study.study.confidence:g} % paired t interval over seeds, {counts}"
    )
    return figure


def _leads(axes: Axes, leads: pd.DataFrame, study: Study) -> None:
    """Points with intervals, the methods a little apart so that their bars do not hide each other."""
    methods = [name for name in study.study.challengers if name in set(leads["method"])]
    scales = leads[["train_images", "fraction"]].drop_duplicates().sort_values("train_images")
    for i, method in enumerate(methods):
        rows = leads[leads["method"] == method].sort_values("train_images")
        apart = rows["train_images"] * 1.06 ** (i - (len(methods) - 1) / 2)
        bars = 100 * (rows["high"] - rows["low"]).fillna(0) / 2
        look: dict[str, Any] = {"color": colours(study)[method], "marker": _MARKERS[i], "capsize": 4, "linewidth": 1.6, "label": method}
        axes.errorbar(apart.to_numpy(float), 100 * rows["mean"].to_numpy(float), yerr=bars.to_numpy(float), **look)
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set_xscale("log")
    _scale_ticks(axes, scales)
    axes.legend(loc="best")


def _scale_ticks(axes: Axes, scales: pd.DataFrame) -> None:
    labels = [f"{row['train_images']:,.0f}\n({100 * row['fraction']:g} %)" for row in records(scales)]
    axes.set_xticks(scales["train_images"].to_numpy(float), labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.set_xlabel("training images")


def _bars(axes: Axes, paper: pd.DataFrame, study: Study) -> None:
    places = list(dict.fromkeys(zip(paper["data"], paper["fraction"], strict=True)))
    methods = [name for name in study.study.challengers if name in set(paper["method"])]
    width = 0.8 / max(1, len(methods))
    for i, method in enumerate(methods):
        rows = {(row["data"], row["fraction"]): 100 * row["lead"] for row in records(paper[paper["method"] == method])}
        at = [j + (i - (len(methods) - 1) / 2) * width for j, place in enumerate(places) if place in rows]
        bars = axes.bar(at, [rows[place] for place in places if place in rows], width, color=colours(study)[method], label=method)
        axes.bar_label(bars, [number(rows[place], 2, sign=True) for place in places if place in rows], fontsize="x-small", padding=2)
    axes.set_xticks(range(len(places)), [f"{data}\n{100 * fraction:g} %".replace("imagenet1k", "imagenet") for data, fraction in places])
    axes.tick_params(axis="x", labelsize="small")
    axes.axhline(0, color="0.35", linewidth=1)
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("data set and share of its training images")
    axes.set_ylabel(f"lead over {study.study.baseline} (points of top-1)")
    axes.set_title(PAPER)


def accuracy(study: Study, runs: pd.DataFrame, data: str) -> Figure:
    """Test top-1 of every method by scale, one panel per recipe: a dot per seed, a bar for the mean."""
    names = [name for name in ordered(study) if study.comparisons[name].data == data and study.comparisons[name].methods]
    rows = runs[runs["comparison"].isin(names) & ~runs["trial"] & (runs["variant"] == runs["method"]) & (runs["status"] == "finished")]
    recipes = [name for name in study.recipes if name in set(rows["recipe"])]
    methods = [name for name in study.methods if name in set(rows["method"])]
    figure, axes = _grid(1, max(1, len(recipes)), (1.6 + 0.55 * len(methods) * max(1, rows["fraction"].nunique()), 3.9))
    for panel, recipe in zip(axes[0], recipes, strict=False):
        part = rows[rows["recipe"] == recipe].sort_values("train_images")
        scales = part[["train_images", "fraction"]].drop_duplicates()
        labels = {row["fraction"]: f"{row['train_images']:,}\n({100 * row['fraction']:g} %)" for row in records(scales)}
        frame = pd.DataFrame(
            {"scale": part["fraction"].map(labels), "method": part["method"].astype(object), "top1": 100 * part["test_top1"]}
        )
        look: dict[str, Any] = {
            "x": "scale",
            "y": "top1",
            "hue": "method",
            "order": list(labels.values()),
            "hue_order": methods,
            "palette": colours(study),
        }
        sns.stripplot(frame, **look, dodge=True, jitter=False, size=6, alpha=0.75, ax=panel)
        _means(panel, frame, list(labels.values()), methods)
        panel.get_legend().remove()
        for border in range(1, len(labels)):
            panel.axvline(border - 0.5, color="0.8", linewidth=1)
        panel.set(xlabel="training images", ylabel="test top-1 (%)" if panel is axes[0, 0] else "", title=f"{data}, recipe {recipe}")
    _same_height(axes[0])
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[: len(methods)], names[: len(methods)], loc="outside right upper")
    counts = _counts(rows.groupby(["comparison", "method"]).size())
    figure.suptitle(f"Accuracy by scale and method: a dot is one seed, a line the mean, {counts}")
    return figure


def _means(axes: Axes, frame: pd.DataFrame, scales: list[str], methods: list[str]) -> None:
    width = 0.8 / len(methods)  # seaborn's dodge
    means = frame.groupby(["scale", "method"])["top1"].mean()
    for i, scale in enumerate(scales):
        for j, method in enumerate(methods):
            if (scale, method) in means.index:
                middle = i + (j - (len(methods) - 1) / 2) * width
                axes.hlines(means[scale, method], middle - 0.4 * width, middle + 0.4 * width, color="0.2", linewidth=1.8)


def grids(study: Study, runs: pd.DataFrame, comparison: str) -> Figure:
    """Validation top-1 of every trial of a sweep, one heat map per method on one colour scale; the chosen point is framed."""
    item = study.comparisons[comparison]
    sweep = tables.sweeps(study)[comparison]
    found = {method: tables.grid(study, runs, comparison, method) for method in sweep.grids}
    values = 100 * pd.concat([frame["val_top1"] for frame in found.values()])
    figure, axes = _grid(1, len(found), (4.6, 3.8))
    for panel, (method, frame) in zip(axes[0], found.items(), strict=True):
        *first, last = sweep.grids[method]
        rows = [", ".join(f"{row[axis]:g}" for axis in first) for row in records(frame)]
        wide = frame.assign(row=rows, top1=100 * frame["val_top1"]).pivot(index="row", columns=last, values="top1")
        wide = wide.loc[list(dict.fromkeys(rows))]
        look: dict[str, Any] = {"vmin": values.min(), "vmax": values.max(), "cmap": "viridis", "annot": True, "fmt": ".1f", "linewidths": 1}
        sns.heatmap(wide, **look, cbar=panel is axes[0, -1], cbar_kws={"label": "validation top-1 (%)"}, ax=panel)
        for (_, point), row in zip(frame.iterrows(), rows, strict=True):
            if point["chosen"]:
                place = (list(wide.columns).index(point[last]), list(wide.index).index(row))
                panel.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="#d55e00", linewidth=3.5, clip_on=False, zorder=5))
        panel.set(xlabel=last, ylabel=", ".join(first), title=f"{method}: {len(frame)} trials")
        panel.set_xticklabels([f"{value:g}" for value in wide.columns])
        panel.tick_params(axis="y", rotation=0)
    where = f"{item.data}, {100 * item.fraction:g} % of the training images, recipe {item.recipe}"
    figure.suptitle(f"Tuning on {where}\none run per cell, seed {sweep.seed} (n=1); orange frame: chosen; blank: diverged")
    return figure


def learning_curves(study: Study, curves: pd.DataFrame, data: str) -> Figure:
    """Validation top-1 against images seen, one panel per comparison: thin lines are seeds, the thick one is their mean."""
    names = [name for name in ordered(study) if study.comparisons[name].data == data and study.comparisons[name].methods]
    names = [name for name in names if name in set(curves["comparison"])]
    columns = min(4, max(1, len(names)))
    figure, axes = _grid(-(-max(1, len(names)) // columns), columns, (3.4, 3.2))
    for panel, name in zip(axes.flat, names, strict=False):
        rows = curves[(curves["comparison"] == name) & curves["variant"].isin(study.methods)].dropna(subset=["val_top1"])
        for method in [method for method in study.methods if method in set(rows["variant"])]:
            part = rows[rows["variant"] == method]
            for _, line in part.groupby("seed"):
                panel.plot(line["images_seen"] / 1000, 100 * line["val_top1"], color=colours(study)[method], linewidth=0.7, alpha=0.45)
            whole = part[part.groupby("seed")["images_seen"].transform("max") == part["images_seen"].max()]  # not those that diverged
            mean = whole.groupby("images_seen")["val_top1"].mean()
            panel.plot(
                mean.index / 1000, 100 * mean, color=colours(study)[method], linewidth=2, label=f"{method} (n={whole['seed'].nunique()})"
            )
        item = study.comparisons[name]
        panel.set(title=f"recipe {item.recipe}, {100 * item.fraction:g} % of the images", xlabel="thousand images seen")
        panel.legend(fontsize="x-small", loc="lower right")
    _same_height(axes.flat[: len(names)])
    for panel in axes[:, 0]:
        panel.set_ylabel("validation top-1 (%)")
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"Learning curves on {data}: thin lines are single seeds, thick lines their mean")
    return figure


def teacher_curve(curves: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """Loss and validation top-1 of every trained teacher by epoch, with the test accuracy that its students rely on."""
    figure, axes = _grid(1, 2, (4.2, 3.4))
    left, right = axes[0]
    tested = dict(zip(metrics["teacher"], metrics["test_top1"], strict=True))
    names = list(dict.fromkeys(curves["teacher"]))
    for name, colour in zip(names, sns.color_palette("colorblind", max(1, len(names))), strict=False):
        rows = curves[curves["teacher"] == name]
        left.plot(rows["epoch"], rows["loss"], color=colour, label=name)
        seen = rows.dropna(subset=["val_top1"])
        right.plot(seen["epoch"], 100 * seen["val_top1"], color=colour, label=f"{name}, validation")
        if name in tested:
            right.axhline(100 * tested[name], color=colour, linestyle=":", label=f"{name}, test at the end: {100 * tested[name]:.1f} %")
    left.set(xlabel="epoch", ylabel="training loss (nats)", title="loss")
    right.set(xlabel="epoch", ylabel="top-1 (%)", title="accuracy")
    left.legend()
    right.legend(fontsize="small")
    figure.suptitle("Teachers (one run each)")
    return figure


def _grid(rows: int, columns: int, size: tuple[float, float], widths: Iterable[float] | None = None) -> tuple[Figure, "np.ndarray"]:
    """A figure of panels in our style that pyplot does not know of: nothing to close, nothing left over between cells of a notebook."""
    ratios = list(widths) if widths is not None else [1.0] * columns
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * sum(ratios), size[1] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    for panel in axes.flat:
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))
    return figure, axes


def _same_height(panels: Iterable[Axes]) -> None:
    """One scale for all, wide enough for each."""
    panels = list(panels)
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _counts(n: "pd.Series") -> str:
    """``n=3``, or ``n=2 to 3`` where runs diverged."""
    if n.empty:
        return "n=0"
    return f"n={n.min()}" + ("" if n.min() == n.max() else f" to {n.max()}")
