"""runs.csv and curves -> figures. A method has the same colour everywhere; every interval and n is named in the figure."""

from collections.abc import Callable

from matplotlib.figure import Figure

from kdlib.config import Study
from kdlib.plots import by_method, scales
from kdlib.plots.curves import learning_curves, teacher_curve
from kdlib.plots.scales import data_scale
from kdlib.plots.style import colours as colours
from kdlib.plots.style import save as save
from kdlib.plots.tuning import grids
from kdlib.tables import Numbers, sweeps

Figures = dict[str, Figure]


def build(study: Study, numbers: Numbers) -> Figures:
    """By name: the teachers, and what belongs to the tables that study.tables names; a table's own figure has its name."""
    figures = {"teachers": teacher_curve(numbers.teacher_curves, numbers.teachers)}
    for name in study.study.tables:
        if name in FIGURES:
            figures |= FIGURES[name](study, numbers)
    return figures


def _recipes(study: Study, numbers: Numbers) -> Figures:
    data = dict.fromkeys(comparison.data for comparison in study.comparisons.values())
    figures = {f"accuracy_{name}": scales.accuracy(study, numbers.runs, name) for name in data}
    return figures | {f"learning_curves_{name}": learning_curves(study, numbers.curves, name) for name in data}


def _methods(study: Study, numbers: Numbers) -> Figures:
    return by_method.leads(study, numbers.runs, numbers.timing) | by_method.accuracy(study, numbers.runs, numbers.timing)


FIGURES: dict[str, Callable[[Study, Numbers], Figures]] = {
    "data_scale": lambda study, of: {"data_scale": data_scale(study, of.runs, of.published)},
    "recipes": _recipes,
    "tuning": lambda study, of: {f"grid_{name}": grids(study, of.runs, name) for name in sweeps(study)},
    "methods": _methods,
}
