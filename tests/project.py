"""A copy of the project with a tiny study, as a user would have it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import tiny

PARTS = [
    "kdlib",
    "notebooks",
    "dvc.yaml",
    "studies/methods/dvc.yaml",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
    "pyproject.toml",
    "results/published",
]
README = "# A copy\n\n<!-- results:begin -->\n<!-- results:end -->\n"


def copy(folder: Path, content: dict[str, Any] | None = None, git: bool = True) -> Path:
    """The project's parts in ``folder``, with tiny params.yaml of both studies; committed if ``git``. Returns ``folder``."""
    for part in PARTS:
        source, target = tiny.ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copyfile(source, target)
    tiny.write(folder, content)
    tiny.write(folder / "studies" / "methods", tiny.methods())
    for place in (folder, folder / "studies" / "methods"):
        (place / "README.md").write_text(README)
    if git:
        run(folder, "git", "init", "-q")
        commit(folder, "start")
    return folder


def commit(folder: Path, message: str) -> None:
    """Commit everything that git does not ignore."""
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--no-verify", "-m", message)


def environment() -> dict[str, str]:
    """One thread, no bytecode, and the tools of this interpreter first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(folder: Path, *command: str, code: int = 0) -> str:
    """Standard output and error of a command that must end with ``code``."""
    done = subprocess.run(command, cwd=folder, env=environment(), check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def study(folder: Path, code: int = 0) -> str:
    """What `make study` runs."""
    return run(folder, "python", "-m", "kdlib.study", "run", code=code)


def dvc(folder: Path, *words: str, code: int = 0) -> str:
    """One dvc command."""
    return run(folder, "python", "-m", "dvc", *words, code=code)


def trained(output: str) -> list[str]:
    """The log lines of epochs: what a stage really trained."""
    return [line for line in output.splitlines() if "  epoch " in line]


def stages(output: str) -> list[str]:
    """Titles of the stages that ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]
