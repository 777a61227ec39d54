"""Notebooks are committed without outputs, define nothing, and can be run by the pipeline and by hand alike."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kdlib import config
from kdlib.study.cli import notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
LIBRARIES = {"kdlib", "IPython", "ipywidgets"}
LINES = 10

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def _python(cell: dict[str, Any]) -> ast.Module:
    """The cell without its magics."""
    return ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))


def _foreach() -> dict[str, str]:
    """Section of params.yaml by the notebook that dvc.yaml runs for each of its entries."""
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    found = {}
    for stage in stages.values():
        deps = stage.get("do", {}).get("deps", [])
        if deps and deps[0].startswith("build/nb/"):
            found[Path(deps[0]).stem] = stage["foreach"].removeprefix("${").removesuffix("}")
    return found


def test_the_notebooks_are_those_of_the_pipeline_and_two_for_people() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["1_data", "2_teacher", "3_distill", "4_tables", "explore", "methods"]
    assert _foreach() == {"1_data": "data", "2_teacher": "teachers", "3_distill": "comparisons"}
    assert not any(name in (ROOT / "dvc.yaml").read_text("utf-8") for name in ("explore", "methods.ipynb"))


@each
def test_stripped(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["metadata"] == METADATA
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@each
def test_parameters(path: Path) -> None:
    tagged = [cell for cell in _cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    section = _foreach().get(path.stem)
    assert len(tagged) == (section is not None)
    if section is not None:
        values = {}
        for line in _python(tagged[0]).body:
            assert isinstance(line, ast.Assign)
            assert isinstance(line.targets[0], ast.Name)
            values[line.targets[0].id] = ast.literal_eval(line.value)
        assert json.loads(json.dumps(values)) == values
        assert list(values) == ["name"]
        assert values["name"] in config.read_yaml(ROOT)[section]


@each
def test_defines_nothing_and_stays_short(path: Path) -> None:
    for cell in _cells(path):
        assert sum(bool(line.strip()) for line in cell["source"]) <= LINES
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Global)
        assert not [node for node in ast.walk(_python(cell)) if isinstance(node, kinds)], "".join(cell["source"])


@each
def test_imports_little(path: Path) -> None:
    for cell in _cells(path):
        for node in ast.walk(_python(cell)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= LIBRARIES


@each
def test_reads_like_a_text(path: Path) -> None:
    """A title first; never more than two cells of code without a word between them."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert cells[0]["source"][0].startswith("# ")
    kinds = "".join(cell["cell_type"][0] for cell in cells if "parameters" not in cell["metadata"].get("tags", []))
    assert "ccc" not in kinds


@pytest.mark.parametrize(
    ("load", "given", "policy"), [(5.0, {}, None), (80.0, {}, "passive"), (80.0, {"OMP_WAIT_POLICY": "active"}, "active")]
)
def test_threads_sleep_where_others_work(monkeypatch: pytest.MonkeyPatch, load: float, given: dict[str, str], policy: str | None) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda _: load)
    monkeypatch.setattr("os.environ", dict(given))
    notebook._share_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_explore_takes_every_name_from_the_study() -> None:
    content = config.read_yaml(ROOT)
    names = {name for section in ("data", "teachers", "recipes", "methods", "comparisons") for name in content[section]}
    names |= {parameter for parameters in content["methods"].values() for parameter in parameters}
    cells = [_python(cell) for cell in _cells(ROOT / "notebooks" / "explore.ipynb")]
    texts = {node.value for cell in cells for node in ast.walk(cell) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not texts & names


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "notebooks"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
