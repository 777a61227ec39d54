"""What shaped a number: the code behind it, as a hash that ignores words: comments, docstrings, messages and the names of locals."""

import ast
import hashlib
import json
import sys
from collections.abc import Collection, Iterable
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

from kdlib.study.training.normal_form import normal_form

PACKAGE = next(folder for folder in Path(__file__).parents if folder.name == "kdlib")


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as canonical JSON. Raises TypeError for what JSON cannot say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def code_fingerprint(roots: Iterable[str], stop: Collection[str] = ()) -> str:
    """Hash of the names and normal forms of ``closure(roots, stop)``. Raises ValueError for a root outside of the package."""
    cell = _reloads()
    return fingerprint([(module, normal_form(_source(module, cell))) for module in sorted(closure(roots, stop))])


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
    """The modules of this package that importing ``module`` runs: those it names, and the packages they lie in.

    The package itself only hands on names of its modules: it counts where something takes one from it.
    """
    return _imports(module, _reloads())


def path(module: str) -> Path:
    """The source file of ``kdlib.<...>``; for a name that is no module, a path that does not exist."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    package = base / "__init__.py"  # a folder without one is left from another version, and a module of its name goes before it
    return package if package.is_file() else base.with_suffix(".py")


def _reloads() -> int:
    """0: the code in memory is that of the start. Where IPython's %autoreload loads edited modules before every cell: the cell's number.

    Without it, an edited method would be trained, and kept in the store, under the name of the old one.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython.extensions.autoreload" in sys.modules else None
    return int(shell.execution_count) if shell else 0


@cache
def _source(module: str, _cell: int) -> bytes:
    if module.partition(".")[0] != "kdlib":
        raise ValueError(f"found code in {module}; allowed: modules of kdlib, whose imports are followed; move it into the package")
    return path(module).read_bytes()


@cache
def _imports(module: str, cell: int) -> frozenset[str]:
    package = module if path(module).name == "__init__.py" else module.rpartition(".")[0]
    named = {name for name in _named(package, _source(module, cell)) if name.partition(".")[0] == "kdlib"}
    found = {name for name in named if path(name).is_file()}
    found |= {name.rpartition(".")[0] for name in named | {module}} - {"kdlib", ""}
    takes = any(name.count(".") == 1 for name in named - found)
    return frozenset(name for name in found | ({"kdlib"} if takes else set()) if path(name).is_file())


@cache
def _named(package: str, source: bytes) -> frozenset[str]:
    """Everything that may be a module: what is imported, and what a text names alone (``python -m`` takes it, as lazy imports do)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom():
                base = resolve_name("." * node.level + (node.module or ""), package)
                names |= {f"{base}.{alias.name}" for alias in node.names} | ({base} - {"kdlib"})
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.Constant(value=str(text)) if "." in text and all(part.isidentifier() for part in text.split(".")):
                names.add(text)
    return frozenset(names)
