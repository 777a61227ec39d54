"""How students and teachers got where they are."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from kdlib.config.schema import Params
from kdlib.study.report.differences import ordered
from kdlib.study.report.plots.style import colours, panels, same_limits


def plot_learning_curves(params: Params, curves: pd.DataFrame, data: str) -> Figure:
    """Validation top-1 against images seen, one panel per comparison: thin lines are seeds, the thick one is their mean."""
    names = [name for name in ordered(params) if params.comparisons[name].data == data and params.comparisons[name].methods]
    names = [name for name in names if name in set(curves["comparison"])]
    columns = min(4, max(1, len(names)))
    figure, axes = panels(-(-max(1, len(names)) // columns), columns, (3.4, 3.2))
    for panel, name in zip(axes.flat, names, strict=False):
        rows = curves[(curves["comparison"] == name) & curves["variant"].isin(params.methods)].dropna(subset=["val_top1"])
        for method in [method for method in params.methods if method in set(rows["variant"])]:
            part = rows[rows["variant"] == method]
            for _, line in part.groupby("seed"):
                panel.plot(line["images_seen"] / 1000, 100 * line["val_top1"], color=colours(params)[method], linewidth=0.7, alpha=0.45)
            whole = part[part.groupby("seed")["images_seen"].transform("max") == part["images_seen"].max()]  # not those that diverged
            mean = whole.groupby("images_seen")["val_top1"].mean()
            panel.plot(
                mean.index / 1000, 100 * mean, color=colours(params)[method], linewidth=2, label=f"{method} (n={whole['seed'].nunique()})"
            )
        item = params.comparisons[name]
        panel.set(title=f"recipe {item.recipe}, {100 * item.fraction:g} % of the images", xlabel="thousand images seen")
        panel.legend(fontsize="x-small", loc="lower right")
    same_limits(axes.flat[: len(names)], "y")
    for panel in axes[:, 0]:
        panel.set_ylabel("validation top-1 (%)")
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"Learning curves on {data}: thin lines are single seeds, thick lines their mean")
    return figure


def plot_teachers(curves: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """Loss and validation top-1 of every trained teacher by epoch, with the test accuracy that its students rely on."""
    figure, axes = panels(1, 2, (4.2, 3.4))
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
