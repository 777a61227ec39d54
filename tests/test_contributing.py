"""CONTRIBUTING.md adds a method in one file: its steps, followed to the letter in a copy of the project."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from safetensors.torch import load_file

from kdlib.files import read_json
from kdlib.study.training import planned
from kdlib.types import Feature
from tests import project, tiny

TEXT = (tiny.ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## A new method")[2].partition("\n## ")[0]
NAME = "pooled"
TRAIN = f"""
from pathlib import Path
from kdlib.study.training.experiment import Experiment
from tests import tiny
content = tiny.content()
content["study"] |= {{"seeds": [0], "challengers": ["{NAME}"]}}
content["comparisons"] = {{"only": content["comparisons"]["small_weak"] | {{"methods": ["kd", "{NAME}"]}}}}
experiment = Experiment(tiny.write(Path("study"), content))
experiment.prepare_data("fractals")
experiment.make_teacher("small")
experiment.distill("only")
"""


class Block(NamedTuple):
    language: str
    file: str  # empty: commands
    lines: list[str]


def blocks() -> Iterator[Block]:
    """The text's code blocks; a line with nothing but `a file` stands above those that go into one."""
    for file, language, code in re.findall(r"(?:^`([\w./]+)`\n\n)?^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        yield Block(language, file, code.splitlines())


def apply(block: Block, root: Path) -> None:
    """Write a new file, or put the lines with a + where those with a - were, or below the line above them; that must be there once."""
    path = root / block.file
    if block.language == "python":
        assert not path.exists()
        path.write_text("\n".join(block.lines) + "\n", "utf-8")
        return
    lines = path.read_text("utf-8").splitlines()
    place = 0
    for line in block.lines:
        if line.startswith("+"):
            lines.insert(place, line[1:])
            place += 1
        elif not line.startswith("@@"):
            assert lines.count(line[1:]) == 1, f"{block.file}: {line[1:]!r}"
            place = lines.index(line[1:]) + 1
            if line.startswith("-"):
                place -= 1
                del lines[place]
    path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with its tests and its own params.yaml, in which the steps were followed."""
    made = project.copy(tmp_path_factory.mktemp("contributor"), git=False)
    shutil.copytree(tiny.ROOT / "tests", made / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("params.yaml", "README.md", "studies/methods/params.yaml", "studies/methods/README.md"):
        shutil.copyfile(tiny.ROOT / file, made / file)
    for block in blocks():
        if block.file:
            apply(block, made)
    return made


def test_the_steps_are_a_file_a_registry_line_a_reference_and_numbers() -> None:
    assert [(block.language, block.file) for block in blocks()] == [
        ("python", f"kdlib/losses/{NAME}.py"),
        ("diff", "kdlib/losses/__init__.py"),
        ("python", f"tests/references/{NAME}.py"),
        ("sh", ""),
        ("diff", "params.yaml"),
        ("diff", "studies/methods/params.yaml"),
        ("sh", ""),
    ]


def test_the_commands_of_the_text_end_well(root: Path) -> None:
    commands = [command for block in blocks() if block.language == "sh" for command in block.lines]
    test, compile_it, studies = (project.run(root, "bash", "-c", command) for command in commands)
    passed = re.search(r"(\d+) passed, \d+ deselected", test)
    assert passed, test
    assert int(passed[1]) > 20
    assert "failed" not in test
    assert compile_it == ""
    assert re.search(r"\d+ passed", studies) and "failed" not in studies, studies


def test_a_student_learns_by_it(root: Path) -> None:
    project.run(root, "python", "-c", TRAIN)
    run = planned.run_folder(root / "study", ("only", NAME, 0))
    assert read_json(run / "metrics.json")["status"] == "finished"
    curve = pd.read_csv(run / "curve.csv")
    assert {"loss_hard", "loss_direction", "loss_squares"} <= set(curve)
    assert curve["loss_direction"].iloc[-1] < curve["loss_direction"].iloc[0]
    weights = load_file(run / "weights.safetensors")
    beside = load_file(planned.run_folder(root / "study", ("only", "kd", 0)) / "weights.safetensors")
    assert weights.keys() == beside.keys()


def test_the_methods_notebook_shows_it(root: Path) -> None:
    code = "from kdlib import config; from kdlib.study.display import methods; "
    code += f"print(methods.__file__, methods.method_card('{NAME}', config.load(config.find_root()).methods['{NAME}']))"
    file, _, card = project.run(root, "python", "-c", code).partition(" ")
    assert file == str(root / "kdlib" / "study" / "display" / "methods.py")
    assert card.startswith(f"## {NAME}\n\nThe teacher's pooled embedding as a hint")
    assert "| of the student | embedding |" in card


def test_the_tools_find_nothing_in_it(root: Path) -> None:
    files = [block.file for block in blocks() if block.language == "python"]
    project.run(root, "python", "-m", "ruff", "check", *files, "kdlib/losses/__init__.py")
    project.run(root, "python", "-m", "ruff", "format", "--check", *files, "kdlib/losses/__init__.py")


def test_every_part_that_can_be_asked_for_is_explained() -> None:
    assert set(re.findall(r"Feature\.([A-Z]+)", TEXT)) == {part.name for part in Feature} - {"LOGITS"}
