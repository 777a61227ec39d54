"""How students and teachers got where they are: curves of training, and what a sweep tried and chose."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kdlib.config.schema import Params
from kdlib.study.report.differences import ordered, sweeps
from kdlib.study.report.plots.style import colours, panels, same_limits
from kdlib.study.report.render import records
from kdlib.study.report.tables.effort import grid


def plot_learning_curves(params: Params, curves: pd.DataFrame, data: str) -> Figure:
    """Validation top-1 against images seen, one panel per comparison: thin lines are seeds, the thick one is their mean."""
    here = {name for name in curves["comparison"] if params.comparisons[name].data == data and params.comparisons[name].methods}
    names, palette = [name for name in ordered(params) if name in here], colours(params)
    columns = min(4, max(1, len(names)))
    figure, axes = panels(-(-max(1, len(names)) // columns), columns, (3.4, 3.2))
    for panel, name in zip(axes.flat, names, strict=False):
        rows = curves[(curves["comparison"] == name) & curves["variant"].isin(params.methods)].dropna(subset=["val_top1"])
        for method in (method for method in params.methods if method in set(rows["variant"])):
            part = rows[rows["variant"] == method]
            for _, line in part.groupby("seed"):
                panel.plot(line["images_seen"] / 1000, 100 * line["val_top1"], color=palette[method], linewidth=0.7, alpha=0.45)
            whole = part[part.groupby("seed")["images_seen"].transform("max") == part["images_seen"].max()]  # not those that diverged
            mean = whole.groupby("images_seen")["val_top1"].mean()
            panel.plot(mean.index / 1000, 100 * mean, color=palette[method], linewidth=2, label=f"{method} (n={whole['seed'].nunique()})")
        item = params.comparisons[name]
        panel.set(title=f"recipe {item.recipe}, {100 * item.fraction:g} % of the images", xlabel="thousand images seen")
        panel.legend(fontsize="x-small", loc="lower right")
    same_limits(axes.flat[: len(names)], "y")
    for panel in axes[:, 0]:
        panel.set_ylabel("validation top-1 (%)")
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"Learning curves on {data}: thin lines are single seeds, thick lines their mean")
    return figure


def plot_teachers(curves: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """Loss and validation top-1 of every trained teacher by epoch, with the test accuracy that its students rely on."""
    figure, [[left, right]] = panels(1, 2, (4.2, 3.4))
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


def plot_grids(params: Params, runs: pd.DataFrame, comparison: str) -> Figure:
    """Validation top-1 of every trial of a sweep, one heat map per method on one colour scale; the chosen point is framed."""
    item, sweep = params.comparisons[comparison], sweeps(params)[comparison]
    trials = {method: grid(params, runs, comparison, method) for method in sweep.grids}
    values = 100 * pd.concat([frame["val_top1"] for frame in trials.values()])
    figure, axes = panels(1, len(trials), (4.6, 3.8))
    for panel, (method, frame) in zip(axes[0], trials.items(), strict=True):
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
