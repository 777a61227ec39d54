"""The tools that keep the house in order find nothing."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
KDLIB = {path.relative_to(ROOT / "kdlib").as_posix(): path.read_text() for path in sorted((ROOT / "kdlib").rglob("*.py"))}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"], ["mypy"]],
    ids=["lint", "format", "layers", "types"],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_small() -> None:
    projects = {str(path): path.read_text() for path in (ROOT / "projects").rglob("*.py")}
    assert not {path: count for path, text in (KDLIB | projects).items() if (count := len(text.splitlines())) > 300}


def test_kdlib_is_small() -> None:
    lines = {path: len(text.splitlines()) for path, text in KDLIB.items()}
    assert sum(lines.values()) <= 12_300, sorted(lines.items(), key=lambda item: -item[1])[:20]


def test_few_public_names_stand_in_two_modules() -> None:
    """A name that means one thing can be searched for."""
    modules = defaultdict(list)
    for path, text in KDLIB.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].append(path)
    several = {name: paths for name, paths in sorted(modules.items()) if len(paths) > 1}
    assert len(several) <= 25, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in several.items())
