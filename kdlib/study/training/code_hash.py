"""What shaped a number: the code behind it, as a hash that ignores comments and docstrings."""

import ast
import hashlib
import json
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2]


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as canonical JSON. Raises TypeError for what JSON cannot say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def code_fingerprint(roots: Iterable[str], stop: Collection[str] = ()) -> str:
    """Hash of the syntax trees of ``closure(roots, stop)``: a comment or a docstring changes nothing."""
    cell = _reloads()
    return fingerprint([(module, _tree(module, cell)) for module in sorted(closure(roots, stop))])


def closure(roots: Iterable[str], stop: Collection[str] = ()) -> set[str]:
    """Every module of this package that the roots import, directly or not, themselves included; nothing at or behind ``stop``."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module not in found and module not in stop:
            found.add(module)
            waiting.extend(imports(module))
    return found


def imports(module: str) -> frozenset[str]:
    """The modules of this package that importing ``module`` runs: those it names, and the packages they lie in."""
    return _imports(module, _reloads())


def _reloads() -> int:
    """0: the code in memory is that of the start. Where IPython's %autoreload loads edited modules before every cell: the cell's number.

    Without it, an edited method would be trained, and kept in the store, under the name of the old one.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython.extensions.autoreload" in sys.modules else None
    return int(shell.execution_count) if shell else 0


@cache
def _imports(module: str, _cell: int) -> frozenset[str]:
    named: set[str] = set()
    for node in ast.walk(ast.parse(path(module).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    named |= {name.rpartition(".")[0] for name in named | {module}}
    return frozenset(name for name in named if name.startswith("kdlib.") and path(name).is_file())


def path(module: str) -> Path:
    """The source file of ``kdlib.<...>``; for a name that is no module, a path that does not exist."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def _tree(module: str, _cell: int) -> str:
    tree = ast.parse(path(module).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
