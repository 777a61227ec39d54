"""The committed studies agree with each other, with the registry of methods and with what they say of it."""

import ast
import inspect
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from kdlib import config
from kdlib.losses import METHODS, looks_at
from kdlib.study.report import build
from kdlib.study.report.differences import hard_labels
from kdlib.study.report.readme import insert_between_markers
from kdlib.study.training.experiment import Experiment
from tests import tiny

STUDIES = [tiny.ROOT, *sorted(path.parent for path in (tiny.ROOT / "studies").glob("*/params.yaml"))]
each = pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)


@each
def test_every_method_is_there_with_all_its_parameters(folder: Path) -> None:
    methods = config.load(folder).methods
    assert {name: set(parameters) for name, parameters in methods.items()} == {
        name: set(inspect.signature(method).parameters) for name, method in METHODS.items()
    }


@pytest.mark.parametrize(("one", "other"), list(combinations(STUDIES, 2)))
def test_one_name_means_one_thing_in_all_studies(one: Path, other: Path) -> None:
    """So that they share their runs, and a reader need not compare them."""
    first, second = config.load(one), config.load(other)
    for section in ("data", "teachers", "recipes", "methods", "comparisons"):
        ours, theirs = getattr(first, section), getattr(second, section)
        for name in ours.keys() & theirs.keys():
            assert ours[name] == theirs[name], f"{section}.{name}"


@each
def test_a_study_is_accepted_and_has_its_tables_and_readme(folder: Path) -> None:
    params = Experiment(folder).params
    assert set(params.study.tables) <= set(build.TABLES)
    text = (folder / "README.md").read_text("utf-8")
    assert insert_between_markers(text, "block", "results") != text


def test_the_study_of_methods_is_like_for_like() -> None:
    """All methods at both scales under one recipe; three comparisons that differ in the hard label's loss alone."""
    params = config.load(tiny.ROOT / "studies" / "methods")
    items = params.comparisons
    assert set(items["small"].methods) == set(items["large"].methods) == set(METHODS)
    assert {params.study.baseline, *params.study.challengers} == set(METHODS)
    assert items["small"].model_copy(update={"fraction": 1.0}) == items["large"]
    groups = hard_labels(params)
    assert groups == [{"ce": "large", "bce": "large_bce", "none": "large_none"}]
    assert items["large_bce"].methods == items["large_none"].methods == ["kd", "bkl"]


def words(folder: str) -> Iterator[str]:
    """Every string in the code of a package."""
    for path in (tiny.ROOT / "kdlib" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize("folder", ["tables", "plots"])
def test_tables_and_figures_know_no_method(folder: str) -> None:
    assert not set(words(folder)) & set(METHODS)


def test_every_method_looks_at_something_of_its_own_or_of_the_teacher() -> None:
    assert {looks_at(method) for method in METHODS.values()} == {
        *("no teacher", "logits", "logits, student's maps", "hint: embedding", "hint: maps", "hint: embedding, preactivations")
    }
    assert looks_at(METHODS["no_kd"]) == "no teacher"
    assert looks_at(METHODS["kd"]) == "logits"
