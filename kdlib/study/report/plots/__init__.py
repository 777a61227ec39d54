"""Finished runs -> figures. A method has the same colour everywhere; every interval and n is named in the figure."""

from collections.abc import Callable

from matplotlib.figure import Figure

from kdlib.config.schema import Params
from kdlib.study.report.build import Numbers
from kdlib.study.report.differences import sweeps
from kdlib.study.report.plots.by_method import plot_methods
from kdlib.study.report.plots.curves import plot_grids, plot_learning_curves, plot_teachers
from kdlib.study.report.plots.scales import plot_accuracies, plot_data_scale

Figures = dict[str, Figure]


def build_figures(params: Params, numbers: Numbers) -> Figures:
    """By name: the teachers, and what belongs to the tables that study.tables names; a table's own figure has its name."""
    figures = {"teachers": plot_teachers(numbers.teacher_curves, numbers.teachers)}
    for name in params.study.tables:
        if name in FIGURES:
            figures |= FIGURES[name](params, numbers)
    return figures


def _recipes(params: Params, numbers: Numbers) -> Figures:
    data = dict.fromkeys(comparison.data for comparison in params.comparisons.values())
    figures = {f"accuracy_{name}": plot_accuracies(params, numbers.runs, name) for name in data}
    return figures | {f"learning_curves_{name}": plot_learning_curves(params, numbers.curves, name) for name in data}


FIGURES: dict[str, Callable[[Params, Numbers], Figures]] = {
    "data_scale": lambda params, of: {"data_scale": plot_data_scale(params, of.runs, of.published)},
    "recipes": _recipes,
    "tuning": lambda params, of: {f"grid_{name}": plot_grids(params, of.runs, name) for name in sweeps(params)},
    "methods": lambda params, of: plot_methods(params, of.runs, of.timing),
}
