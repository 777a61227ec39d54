"""Finished runs -> the tables of a study."""

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kdlib.config.schema import Params
from kdlib.errors import refuse
from kdlib.study.report import collect, published
from kdlib.study.report.differences import sweeps
from kdlib.study.report.readme import changes, labelled, ranked, readme_block, tuned
from kdlib.study.report.render import Table
from kdlib.study.report.tables.by_label import label_tables
from kdlib.study.report.tables.by_method import method_tables
from kdlib.study.report.tables.comparisons import data_scale_table, measures_table, recipes_table
from kdlib.study.report.tables.effort import cost_table, grid_tables, tuning_table
from kdlib.study.report.tables.reproduction import reproduction_table
from kdlib.study.training.planned import expected, expected_runs


@dataclass(frozen=True)
class Numbers:
    """What tables and figures are made of."""

    planned: Params  # with comparisons that were not made yet
    runs: pd.DataFrame  # kdlib.study.report.collect.collect
    curves: pd.DataFrame
    timing: pd.DataFrame  # seconds: they differ from run to run
    teachers: pd.DataFrame
    teacher_curves: pd.DataFrame
    published: pd.DataFrame  # kdlib.study.report.published.read_published


# What study.tables may name: no table for a study that has nothing of the kind.
TABLES: dict[str, Callable[[Params, Numbers], list[Table]]] = {
    "published": lambda _, of: [reproduction_table(of.planned, of.runs, of.teachers, of.published)],
    "data_scale": lambda params, of: [data_scale_table(params, of.runs, of.published)],
    "recipes": lambda params, of: [recipes_table(params, of.runs, of.published, of.teachers)],
    "tuning": lambda params, of: [tuning_table(params, of.runs), *grid_tables(params, of.runs)] if sweeps(params) else [],
    "methods": lambda params, of: method_tables(params, of.runs, of.timing, of.published, of.teachers),
    "losses": lambda params, of: label_tables(params, of.runs),
    "cost": lambda params, of: [cost_table(params, of.runs)],
    "measures": lambda params, of: [measures_table(params, of.runs)],
}
# What they say on the headline's data set, a sentence each.
SENTENCES = {"data_scale": changes, "tuning": tuned, "methods": ranked, "losses": labelled}


def finished_part(root: Path, planned: Params) -> Params:
    """With ``study.missing: blank`` those teachers and comparisons that were brought to their end, otherwise all.

    Raises ``Refused`` when no comparison was.
    """
    if planned.study.missing == "fail":
        return planned
    teachers = {name: item for name, item in planned.teachers.items() if collect.has_teacher(root, name)}
    comparisons = {name: item for name, item in planned.comparisons.items() if not collect.missing(root, expected_runs(planned, name))}
    if not comparisons:
        raise refuse("comparisons", "none that was brought to its end", "at least one", "run `dvc repro distill@<name>` first")
    return planned.model_copy(update={"teachers": teachers, "comparisons": comparisons})


def read_numbers(root: Path, params: Params, planned: Params) -> Numbers:
    """The numbers of exactly the runs that ``params``, what of ``planned`` was made, asks for. Raises ``Refused`` when one is missing."""
    runs = expected(params)
    return Numbers(
        planned,
        collect.collect(root, runs),
        collect.curves(root, runs),
        collect.timing(root, runs),
        collect.teachers(root, params.teachers),
        collect.teacher_curves(root, params.teachers),
        published.read_published(root),
    )


def build_tables(params: Params, numbers: Numbers) -> list[Table]:
    """Every table that study.tables names, in its order."""
    return [table for name in params.study.tables for table in TABLES[name](params, numbers)]


def headline(params: Params, numbers: Numbers, figures: Collection[str]) -> str:
    """results/headline.md: what every table says on the headline's data set, then the first table, below its figure if it has one.

    ``figures``: what lies in results/figures. Raises ``Refused`` when the study has nothing for its first table.
    """
    first = params.study.tables[0]
    tables = TABLES[first](params, numbers)
    if not tables:
        raise refuse("study.tables", first, "first a table that the comparisons have something for", "put another one first")
    sentences = [sentence for name in params.study.tables if name in SENTENCES for sentence in SENTENCES[name](params, numbers.runs)]
    figure = f"results/figures/{tables[0].name}.png" if tables[0].name in figures else None
    return readme_block(params, sentences, tables[0], figure)


def metrics_summary(runs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """comparison -> method -> mean test top-1 of the finished runs, for ``dvc metrics``; a method without one is left out."""
    means: dict[str, dict[str, float]] = {}
    finished = runs[~runs["trial"] & (runs["status"] == "finished")].dropna(subset="test_top1")
    for (comparison, variant), part in finished.groupby(["comparison", "variant"], sort=False)["test_top1"]:
        means.setdefault(str(comparison), {})[str(variant)] = round(statistics.fmean(part), 6)
    return means
