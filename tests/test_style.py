"""The tools that keep the house in order find nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


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
    files = (path for folder in ("kdlib", "projects") for path in (ROOT / folder).rglob("*.py"))
    assert not {path.name: count for path in files if (count := len(path.read_text().splitlines())) > 300}
