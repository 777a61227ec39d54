"""runs.csv -> the tables of the study."""

import statistics

import pandas as pd

from kdlib.config import Study
from kdlib.tables.comparisons import accuracies as accuracies
from kdlib.tables.comparisons import data_scale, measures, recipes
from kdlib.tables.effort import cost, grids, tuning
from kdlib.tables.effort import grid as grid
from kdlib.tables.effort import sweeps as sweeps
from kdlib.tables.leads import by_seed
from kdlib.tables.leads import leads as leads
from kdlib.tables.leads import verdicts as verdicts
from kdlib.tables.readme import insert_between_markers as insert_between_markers
from kdlib.tables.readme import readme_block as readme_block
from kdlib.tables.render import Table
from kdlib.tables.render import markdown as markdown
from kdlib.tables.render import pipe as pipe
from kdlib.tables.render import write as write


def build(study: Study, runs: pd.DataFrame, published: pd.DataFrame, teachers: pd.DataFrame) -> list[Table]:
    """Every table of the study, the headline first. ``runs``, ``teachers``: kdlib.results; ``published``: kdlib.published.read."""
    tables = [data_scale(study, runs, published), recipes(study, runs, published, teachers)]
    if sweeps(study):
        tables += [tuning(study, runs), *grids(study, runs)]
    return [*tables, cost(study, runs), measures(study, runs)]


def metrics_summary(runs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """comparison -> method -> mean test top-1 of the finished runs, for ``dvc metrics``; a method without one is left out."""
    found: dict[str, dict[str, float]] = {}
    students = runs[~runs["trial"]]
    for comparison, variant in dict.fromkeys(zip(students["comparison"], students["variant"], strict=True)):
        if values := by_seed(students, comparison, variant):
            found.setdefault(str(comparison), {})[str(variant)] = round(statistics.fmean(values.values()), 6)
    return found
