"""Edits of source code by a seed: mutants, which compute something else, and edits of words, which do not."""

import ast
import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.study.training import code_hash

OTHER: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv},
    **{ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
SPEAKS = {"refuse", "Refused", "say", "warn", "print", "tqdm", "set_postfix_str"}


@dataclass(frozen=True)
class Edit:
    """One edit of one module, and its source after it."""

    kind: str
    module: str
    source: str


def code_hash_of(package: Path) -> Any:
    """``code_hash`` as a fresh process of that copy of kdlib would have it."""
    spec = importlib.util.spec_from_file_location("code_hash_of_a_copy", package / Path(code_hash.__file__).relative_to(code_hash.PACKAGE))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Place = Callable[[], None]  # makes the edit, in the tree that it was found in
Kinds = dict[str, Callable[[ast.Module], Iterator[Place]]]


def edits(kinds: Kinds, sources: dict[str, str], number: int, seed: int) -> list[Edit]:
    """So many different edits, of each kind equally many as far as there are places, each of which is as likely as any other."""
    trees = {module: ast.parse(source) for module, source in sorted(sources.items())}
    places = {kind: [(module, i) for module, tree in trees.items() for i, _ in enumerate(find(tree))] for kind, find in kinds.items()}
    rng, made = random.Random(seed), []
    for k, kind in enumerate(sorted(kinds, key=lambda kind: (len(places[kind]), kind))):  # what the rare ones lack falls to the others
        for module, i in rng.sample(places[kind], min(len(places[kind]), (number - len(made)) // (len(kinds) - k))):
            tree = ast.parse(sources[module])
            next(itertools.islice(kinds[kind](tree), i, None))()
            made.append(Edit(kind, module, ast.unparse(ast.fix_missing_locations(tree))))
    return made


# Mutants


def is_spoken(node: ast.AST) -> bool:
    """Whether what stands in it may be the wording of a message."""
    name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
    return isinstance(node, ast.Raise) or name in SPEAKS


def unspoken(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of docstrings and messages."""
    for node in ast.iter_child_nodes(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_spoken(node) and not is_text:
            yield node
            yield from unspoken(node)


def changed(constant: Any) -> Any:
    """Another constant, of the same type where there is one."""
    match constant:
        case bool():
            return not constant
        case int() | float() | complex():
            return constant + 1
        case str():
            return constant + "x"
        case _:
            return 0 if constant is None else None


def put(node: ast.AST, field: str, value: object) -> Place:
    return lambda: setattr(node, field, value)


def numbers(tree: ast.Module) -> Iterator[Place]:
    for node in unspoken(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield put(node, "value", changed(node.value))


def strings(tree: ast.Module) -> Iterator[Place]:
    for node in unspoken(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield put(node, "value", changed(node.value))


def operators(tree: ast.Module) -> Iterator[Place]:
    for node in unspoken(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OTHER:
            yield put(node, "op", OTHER[type(node.op)]())


def comparisons(tree: ast.Module) -> Iterator[Place]:
    for node in unspoken(tree):
        if isinstance(node, ast.Compare):
            yield put(node, "ops", [OTHER[type(node.ops[0])](), *node.ops[1:]])


def defaults(tree: ast.Module) -> Iterator[Place]:
    for node in unspoken(tree):
        if isinstance(node, ast.arguments):
            for default in (*node.defaults, *node.kw_defaults):
                if isinstance(default, ast.Constant):
                    yield put(default, "value", changed(default.value))


def called_names(tree: ast.Module) -> Iterator[Place]:
    calls = [node.func for node in unspoken(tree) if isinstance(node, ast.Call)]
    for kind, field in ((ast.Name, "id"), (ast.Attribute, "attr")):
        names = {getattr(func, field) for func in calls if isinstance(func, kind)} - SPEAKS
        for func in calls:
            if isinstance(func, kind):
                yield from (put(func, field, other) for other in sorted(names - {getattr(func, field)}))


def arguments(tree: ast.Module) -> Iterator[Place]:
    for node in unspoken(tree):
        if isinstance(node, ast.Call) and len(node.args) > 1 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
            yield put(node, "args", [node.args[1], node.args[0], *node.args[2:]])


MUTANTS: Kinds = {
    "constant": numbers,
    "string": strings,
    "operator": operators,
    "comparison": comparisons,
    "default": defaults,
    "called name": called_names,
    "swapped arguments": arguments,
}

# Words


def locals_of(function: ast.FunctionDef) -> set[str]:
    """Names that the function itself binds by assignment, and that stand for nothing else within it."""
    bound = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    other: set[Any] = set()
    for node in ast.walk(function):
        other |= {getattr(node, field, None) for field in ("name", "arg", "asname", "rest")}
        other |= set(getattr(node, "names", [])) if isinstance(node, ast.Global | ast.Nonlocal) else set()
        if isinstance(node, ast.ClassDef):
            other |= bound
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda):
            other |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
    return bound - other


def renamed_local(tree: ast.Module) -> Iterator[Place]:
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for name in sorted(locals_of(function)):

            def rename(function: ast.FunctionDef = function, name: str = name) -> None:
                for node in ast.walk(function):
                    if isinstance(node, ast.Name) and node.id == name:
                        node.id = f"{name}_under_another_name"

            yield rename


def reworded_message(tree: ast.Module) -> Iterator[Place]:
    calls = [node.exc if isinstance(node, ast.Raise) else node for node in ast.walk(tree) if is_spoken(node)]
    for call in calls:
        for argument in call.args if isinstance(call, ast.Call) else ():
            parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
            for part in parts:
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                    yield put(part, "value", "Said in other words: " + part.value.replace(" ", " well, ", 1))


def changed_docstring(tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield put(node.body[0], "value", ast.Constant("Other words."))
            if len(node.body) > 1:
                yield put(node, "body", node.body[1:])
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield put(node, "body", [ast.Expr(ast.Constant("Words where none were.")), *node.body])


WORDS: Kinds = {"renamed local": renamed_local, "reworded message": reworded_message, "changed docstring": changed_docstring}


def commented(module: str, source: str, rng: random.Random) -> Edit:
    """The source with a comment and a blank line before one of its statements."""
    starts = sorted({node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)})
    lines = source.splitlines(keepends=True)
    lines.insert(rng.choice(starts) - 1, "# a reason\n\n")
    return Edit("comment", module, "".join(lines))
