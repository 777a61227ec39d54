"""What a sweep tried, and what it chose."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kdlib.config.schema import Params
from kdlib.study.report.plots.style import panels
from kdlib.study.report.render import records
from kdlib.study.report.tables.effort import grid, sweeps


def plot_grids(params: Params, runs: pd.DataFrame, comparison: str) -> Figure:
    """Validation top-1 of every trial of a sweep, one heat map per method on one colour scale; the chosen point is framed."""
    item = params.comparisons[comparison]
    sweep = sweeps(params)[comparison]
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
