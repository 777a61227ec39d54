"""What all figures have in common: style, colours, panels, files."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kdlib.config.schema import Params
from kdlib.files import write_bytes

STYLE = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=0.9) | {"svg.hashsalt": "kdlib", "svg.fonttype": "path"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
MARKERS = "oDs^vPX*"


def colours(params: Params) -> dict[str, tuple[float, float, float]]:
    """Method that the study trains -> colour (seaborn's colour-blind-safe palette of ten); a tuned method has its method's."""
    trained = {name for item in params.comparisons.values() for name in (*item.methods, *(item.sweep.grids if item.sweep else ()))}
    names = [name for name in params.methods if name in trained]
    palette = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    return palette | {f"{name}_tuned": colour for name, colour in palette.items()}


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """``folder/<name>.svg`` and ``.png`` (150 dpi), each whole or not at all; the same figure gives the same bytes."""
    for form, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=form, **options)
        write_bytes(folder / f"{name}.{form}", buffer.getvalue())


def panels(
    rows: int, columns: int, size: tuple[float, float], widths: Iterable[float] | None = None, *, sharey: bool = False
) -> tuple[Figure, "np.ndarray"]:
    """A figure of panels in our style that pyplot does not know of: nothing to close, nothing left over between cells of a notebook."""
    ratios = list(widths) if widths is not None else [1.0] * columns
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * sum(ratios), size[1] * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios, sharey=sharey)
    for panel in axes.flat:
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}")))
    return figure, axes


def same_limits(axes: Iterable[Axes], direction: Literal["x", "y"]) -> None:
    """One scale for all, wide enough for each."""
    axes = list(axes)
    limits = [getattr(panel, f"get_{direction}lim")() for panel in axes]
    for panel in axes:
        panel.set(**{f"{direction}lim": (min(low for low, _ in limits), max(high for _, high in limits))})


def tell_n(n: "pd.Series") -> str:
    """``n=3``, or ``n=2 to 3`` where runs diverged."""
    if n.empty:
        return "n=0"
    return f"n={n.min()}" + ("" if n.min() == n.max() else f" to {n.max()}")
