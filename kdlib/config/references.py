"""What one section of params.yaml says about another: every name is defined, and comparisons are fair."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kdlib.config.schema import TABLES, Comparison, Params
from kdlib.errors import known, refuse

NAME = re.compile(r"[a-z][a-z0-9_]*")  # no "-" and no ".": DVC joins names with the one and splits keys at the other


def check_names(params: Params) -> None:
    for section in ("data", "teachers", "recipes", "methods", "comparisons"):
        for name in getattr(params, section):
            if not NAME.fullmatch(name):
                allowed = "a lower-case letter, then lower-case letters, digits and _ (DVC's stage names would collide on others)"
                raise refuse(f"{section}.{name}", name, allowed, "rename it")


def check_references(params: Params) -> None:
    general = params.study
    known("study.baseline", general.baseline, params.methods)
    for name in general.challengers:
        known("study.challengers", name, params.methods)
    _check_unique("study.challengers", [*general.challengers, general.baseline])
    _check_unique("study.seeds", general.seeds)
    known("study.headline.data", general.headline.data, params.data)
    _check_all("study.headline.recipes", general.headline.recipes, params.recipes)
    _check_all("study.tables", general.tables, TABLES)
    _check_all("study.published", list(general.published), params.comparisons)
    for name, teacher in params.teachers.items():
        known(f"teachers.{name}.data", teacher.data, params.data)
        known(f"teachers.{name}.recipe", teacher.recipe, params.recipes)
    for name, comparison in params.comparisons.items():
        _check_comparison(f"comparisons.{name}", comparison, params)


def _check_comparison(key: str, comparison: Comparison, params: Params) -> None:
    known(f"{key}.data", comparison.data, params.data)
    known(f"{key}.recipe", comparison.recipe, params.recipes)
    teacher = params.teachers[known(f"{key}.teacher", comparison.teacher, params.teachers)]
    if teacher.data != comparison.data:
        allowed = f"a teacher of data set {comparison.data!r} (this one knows the classes of {teacher.data!r})"
        raise refuse(f"{key}.teacher", comparison.teacher, allowed, "choose or add one")
    _check_all(f"{key}.methods", comparison.methods, params.methods)
    if comparison.methods or comparison.sweep is None:
        _check_baseline(f"{key}.methods", comparison.methods, params)
    if comparison.sweep is not None:
        _check_grids(f"{key}.sweep.grids", comparison.sweep.grids, params)


def _check_grids(key: str, grids: Mapping[str, Mapping[str, list[float]]], params: Params) -> None:
    for name, grid in grids.items():
        known(key, name, params.methods)
        for parameter, values in grid.items():
            known(f"{key}.{name}", parameter, params.methods[name])
            _check_unique(f"{key}.{name}.{parameter}", values)
    _check_baseline(key, list(grids), params)
    counts = {name: len(grid_points(grid)) for name, grid in grids.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        allowed = "the same number of trials, at least one, for every method"
        raise refuse(key, counts, allowed, "a fair choice needs equal effort: even the grids out")


def _check_baseline(key: str, methods: list[str], params: Params) -> None:
    if params.study.baseline not in methods:
        allowed = f"methods that include {params.study.baseline!r} (study.baseline)"
        raise refuse(key, methods, allowed, "add it: the others are compared with it, paired by seed")


def _check_all(key: str, names: list[str], defined: Iterable[str]) -> None:
    """Each is defined, and named once."""
    for name in names:
        known(key, name, defined)
    _check_unique(key, names)


def _check_unique(key: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise refuse(key, values, "each value once", "remove the duplicate")


def grid_points(grid: Mapping[str, list[float]]) -> list[dict[str, float]]:
    """Every point of a grid, in the order in which params.yaml writes it."""
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
