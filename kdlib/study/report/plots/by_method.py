"""Every method at every scale: what it gains over the baseline, and what that costs. Colour and marker say what a method looks at."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kdlib.config.schema import Params
from kdlib.study.report.differences import leads, train_images
from kdlib.study.report.plots.style import MARKERS, panels, same_limits, tell_n
from kdlib.study.report.render import MINUS, TIMES, records, scale
from kdlib.study.report.tables.by_method import by_scale, called, costs
from kdlib.study.report.tables.comparisons import accuracies

_LABEL = 0.047  # height of a method's name, as a share of its panel


def plot_methods(params: Params, runs: pd.DataFrame, timing: pd.DataFrame) -> dict[str, Figure]:
    """ "methods" and "methods_cost": a figure each for each list of ``by_scale``, as the tables."""
    plots = {"methods": plot_leads, "methods_cost": plot_costs}
    return {called(params, kind, names): plot(params, runs, timing, names) for kind, plot in plots.items() for names in by_scale(params)}


def plot_leads(params: Params, runs: pd.DataFrame, timing: pd.DataFrame, names: list[str]) -> Figure:
    """Each challenger's lead at each scale, one panel per scale."""
    ahead = leads(params, runs).query("question == 'lead' and comparison in @names")
    kinds = costs(params, runs, timing, names[-1])
    rows = _rows(kinds[kinds["method"].isin(ahead["method"])])
    figure, axes = panels(1, len(names), (4.6, 1.5 + 0.27 * len(rows)), sharey=True)
    for panel, name in zip(axes[0], names, strict=True):
        row_of = {row["method"]: row for row in records(ahead[ahead["comparison"] == name])}
        for place, (kind, method) in enumerate(rows):
            if method in row_of:
                _lead(panel, place, row_of[method], _looks(kinds)[kind])
        panel.axvline(0, color="0.35", linewidth=1)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
        panel.set(xlabel=f"lead over {params.study.baseline} (points of test top-1)", title=_scale(params, runs, name))
        panel.grid(axis="y", visible=False)
    same_limits(axes[0], "x")
    axes[0, 0].set_yticks(range(len(rows)), [method or kind for kind, method in rows])
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    for label, (_, method) in zip(axes[0, 0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if method else "bold")
    keys = [Line2D([], [], linestyle="", marker="o", color="0.3", markerfacecolor=fill) for fill in ("0.3", "white")]
    figure.legend(keys, ["better or worse", "inconclusive"], loc="outside lower center", ncols=2)
    figure.suptitle(
        f"Lead over {params.study.baseline}, methods by what they look at:\n"
        f"mean and {100 * params.study.confidence:g} % paired t interval over seeds, {tell_n(ahead['n'])}"
    )
    return figure


def _rows(kinds: pd.DataFrame) -> list[tuple[str, str]]:
    """From the top: (kind, "") heads its methods, (kind, method)."""
    parts = kinds.groupby("looks_at", sort=False)["method"]
    return [row for kind, names in parts for row in [(str(kind), ""), *((str(kind), str(name)) for name in names)]]


def _looks(kinds: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and marker of each kind."""
    names = list(dict.fromkeys(kinds["looks_at"]))
    palette = sns.color_palette("colorblind", len(names))
    return {name: {"color": palette[i], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}


def _lead(panel: Axes, place: int, row: dict[str, Any], look: dict[str, Any]) -> None:
    if row["n"] == 0:
        panel.text(0, place, " diverged", va="center", fontsize="small", color="0.35")
        return
    half = 0.0 if np.isnan(row["low"]) else 100 * (row["high"] - row["low"]) / 2
    fill = "white" if row["verdict"] == "inconclusive" else look["color"]
    panel.errorbar(100 * row["mean"], place, xerr=half, capsize=3, linewidth=1.6, markersize=6, markerfacecolor=fill, **look)


def plot_costs(params: Params, runs: pd.DataFrame, timing: pd.DataFrame, names: list[str]) -> Figure:
    """Each method's test top-1 against its step time, one panel per scale."""
    points_of = {name: _points(params, runs, timing, name) for name in names}
    looks = _looks(costs(params, runs, timing, names[-1]))
    figure, axes = panels(1, len(names), (5.4, 5.2))
    for panel, (name, points) in zip(axes[0], points_of.items(), strict=True):
        for row in records(points):
            look = looks[row["looks_at"]]
            fill = look["color"] if row["together"] else "white"
            panel.errorbar(row["time"], row["top1"], yerr=row["half"], capsize=3, linewidth=1.2, markerfacecolor=fill, **look)
        panel.set(xscale="log", xlabel=f"time per step, relative to {params.study.baseline}", title=_scale(params, runs, name))
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    same_limits(axes[0], "x")
    for panel, points in zip(axes[0], points_of.values(), strict=True):
        _label(panel, {row["method"]: (row["time"], row["top1"]) for row in records(points)})
    axes[0, 0].set_ylabel("test top-1 (%)")
    keys = [Line2D([], [], linestyle="", **look) for look in looks.values()]
    figure.legend(keys, list(looks), loc="outside lower center", ncols=3, title="looks at")
    figure.suptitle(
        f"Accuracy against cost: mean and {100 * params.study.confidence:g} % t interval over seeds, "
        f"{tell_n(pd.concat(list(points_of.values()))['n'])};\ntime: mean of the ratios paired by seed, on the machine of this study"
        + ("" if all(points["together"].all() for points in points_of.values()) else " (hollow: not trained in turns)")
    )
    return figure


def _points(params: Params, runs: pd.DataFrame, timing: pd.DataFrame, name: str) -> pd.DataFrame:
    """method, looks_at, n, and in percent top1 and half an interval's width, against time; of the methods that have all of it."""
    both = costs(params, runs, timing, name).merge(accuracies(params, runs), on=["comparison", "method"], suffixes=("_time", ""))
    half = 100 * (both["high"] - both["low"]).fillna(0) / 2
    return both.assign(time=both["mean_time"], top1=100 * both["mean"], half=half).dropna(subset=["time", "top1"])


def _label(panel: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names in a column on the right, none over another, each with a line to its point."""
    low, high = panel.get_ylim()
    names = sorted(points, key=lambda name: points[name][1])
    heights = np.array([(points[name][1] - low) / (high - low) for name in names])
    for _ in range(200):  # names that lie over each other part, both by as much
        over = np.clip(_LABEL - np.diff(heights), 0, None) / 2
        heights = np.clip(heights + np.append(0, over) - np.append(over, 0), 0, 1)
    for name, height in zip(names, heights, strict=True):
        panel.annotate(
            name, points[name], (1.03, height), textcoords="axes fraction", va="center", fontsize="small", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip


def _scale(params: Params, runs: pd.DataFrame, name: str) -> str:
    item = params.comparisons[name]
    return f"{item.data}, {scale(item.fraction, train_images(runs, name))}"
