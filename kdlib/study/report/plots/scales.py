"""Leads and accuracies by scale of the data, one panel for each recipe."""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kdlib.config.schema import Params
from kdlib.study.report import published
from kdlib.study.report.differences import leads, ordered
from kdlib.study.report.plots.style import MARKERS, colours, panels, same_limits, tell_n
from kdlib.study.report.render import number, records

PAPER = "published (Hao et al. 2023,\nread off the figure; own scale)"


def plot_data_scale(params: Params, runs: pd.DataFrame, numbers: pd.DataFrame) -> Figure:
    """The challengers' lead over the baseline by scale, for each recipe of the headline's data set, beside the paper's Figure 1."""
    data, baseline = params.study.headline.data, params.study.baseline
    ahead = leads(params, runs)
    ahead = ahead[(ahead["question"] == "lead") & (ahead["data"] == data) & (ahead["n"] > 0)]
    recipes = [name for name in params.recipes if name in set(ahead["recipe"])]
    figure, axes = panels(1, len(recipes) + 1, (3.6, 3.9), widths=[*[1.0] * len(recipes), 1.25])
    for i, recipe in enumerate(recipes):
        _leads(axes[0, i], ahead[ahead["recipe"] == recipe], params)
        axes[0, i].set_title(f"{data}, recipe {recipe}\n(measured here)")
    same_limits(axes[0, : len(recipes)], "y")
    paper = published.figure1(numbers)
    _bars(axes[0, -1], paper[paper["method"].isin(params.study.challengers)], params)
    axes[0, 0].set_ylabel(f"lead over {baseline} (points of test top-1)")
    interval = f"{100 * params.study.confidence:g} % paired t interval over seeds, {tell_n(ahead['n'])}"
    figure.suptitle(f"Lead over {baseline} by data scale: mean and {interval}")
    return figure


def _leads(axes: Axes, leads: pd.DataFrame, params: Params) -> None:
    """Points with intervals, the methods a little apart so that their bars do not hide each other."""
    methods = [name for name in params.study.challengers if name in set(leads["method"])]
    scales = leads[["train_images", "fraction"]].drop_duplicates().sort_values("train_images")
    for i, method in enumerate(methods):
        rows = leads[leads["method"] == method].sort_values("train_images")
        apart = rows["train_images"] * 1.06 ** (i - (len(methods) - 1) / 2)
        bars = 100 * (rows["high"] - rows["low"]).fillna(0) / 2
        look: dict[str, Any] = {"color": colours(params)[method], "marker": MARKERS[i], "capsize": 4, "linewidth": 1.6, "label": method}
        axes.errorbar(apart.to_numpy(float), 100 * rows["mean"].to_numpy(float), yerr=bars.to_numpy(float), **look)
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set(xscale="log", xlabel="training images")
    labels = [f"{row['train_images']:,.0f}\n({100 * row['fraction']:g} %)" for row in records(scales)]
    axes.set_xticks(scales["train_images"].to_numpy(float), labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.legend(loc="best")


def _bars(axes: Axes, paper: pd.DataFrame, params: Params) -> None:
    places = list(dict.fromkeys(zip(paper["data"], paper["fraction"], strict=True)))
    methods = [name for name in params.study.challengers if name in set(paper["method"])]
    width = 0.8 / max(1, len(methods))
    for i, method in enumerate(methods):
        rows = {(row["data"], row["fraction"]): 100 * row["lead"] for row in records(paper[paper["method"] == method])}
        at = [j + (i - (len(methods) - 1) / 2) * width for j, place in enumerate(places) if place in rows]
        bars = axes.bar(at, [rows[place] for place in places if place in rows], width, color=colours(params)[method], label=method)
        axes.bar_label(bars, [number(rows[place], 2, sign=True) for place in places if place in rows], fontsize="x-small", padding=2)
    axes.set_xticks(range(len(places)), [f"{data}\n{100 * fraction:g} %".replace("imagenet1k", "imagenet") for data, fraction in places])
    axes.tick_params(axis="x", labelsize="small")
    axes.axhline(0, color="0.35", linewidth=1)
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="data set and share of its training images", ylabel=f"lead over {params.study.baseline} (points of top-1)", title=PAPER)


def plot_accuracies(params: Params, runs: pd.DataFrame, data: str) -> Figure:
    """Test top-1 of every method by scale, one panel per recipe: a dot per seed, a bar for the mean."""
    names = [name for name in ordered(params) if params.comparisons[name].data == data and params.comparisons[name].methods]
    rows = runs[runs["comparison"].isin(names) & ~runs["trial"] & (runs["variant"] == runs["method"]) & (runs["status"] == "finished")]
    recipes = [name for name in params.recipes if name in set(rows["recipe"])]
    methods = [name for name in params.methods if name in set(rows["method"])]
    figure, axes = panels(1, max(1, len(recipes)), (1.6 + 0.55 * len(methods) * max(1, rows["fraction"].nunique()), 3.9))
    for panel, recipe in zip(axes[0], recipes, strict=False):
        part = rows[rows["recipe"] == recipe].sort_values("train_images")
        scales = part[["train_images", "fraction"]].drop_duplicates()
        labels = {row["fraction"]: f"{row['train_images']:,}\n({100 * row['fraction']:g} %)" for row in records(scales)}
        shown, order = {"scale": part["fraction"].map(labels), "method": part["method"].astype(object)}, list(labels.values())
        frame = pd.DataFrame(shown | {"top1": 100 * part["test_top1"]})
        look: dict[str, Any] = {"x": "scale", "y": "top1", "hue": "method", "order": order, "hue_order": methods}
        sns.stripplot(frame, **look, palette=colours(params), dodge=True, jitter=False, size=6, alpha=0.75, ax=panel)
        _means(panel, frame, order, methods)
        panel.get_legend().remove()
        for border in range(1, len(labels)):
            panel.axvline(border - 0.5, color="0.8", linewidth=1)
        panel.set(xlabel="training images", ylabel="test top-1 (%)" if panel is axes[0, 0] else "", title=f"{data}, recipe {recipe}")
    same_limits(axes[0], "y")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[: len(methods)], names[: len(methods)], loc="outside right upper")
    n = tell_n(rows.groupby(["comparison", "method"]).size())
    figure.suptitle(f"Accuracy by scale and method: a dot is one seed, a line the mean, {n}")
    return figure


def _means(axes: Axes, frame: pd.DataFrame, scales: list[str], methods: list[str]) -> None:
    width = 0.8 / len(methods)  # seaborn's dodge
    means = frame.groupby(["scale", "method"])["top1"].mean()
    for i, scale in enumerate(scales):
        for j, method in enumerate(methods):
            if (scale, method) in means.index:
                middle = i + (j - (len(methods) - 1) / 2) * width
                axes.hlines(means[scale, method], middle - 0.4 * width, middle + 0.4 * width, color="0.2", linewidth=1.8)
