"""The hash of code is about numbers: 200 mutants all change it, 50 edits of words do not, and short trainings agree."""

import ast
import dis
import functools
import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from kdlib.config import schema
from kdlib.engine import lr_schedule
from kdlib.engine.batchnorm import RunningStatistics
from kdlib.engine.curve import LossCurve
from kdlib.engine.gradients import Gradients
from kdlib.engine.learner import Learner
from kdlib.engine.train import train
from kdlib.losses import METHODS, hard
from kdlib.losses.base import Method
from kdlib.models.resnet_small import SmallResNet
from kdlib.seed import generator
from kdlib.study.training import code_hash
from kdlib.study.training.code_hash import PACKAGE, closure
from kdlib.study.training.identity import UNCOUNTED
from kdlib.study.training.normal_form import normal_form, normalised, rename_locals
from kdlib.views import crop, erasing, mixup, randaugment
from kdlib.views.stream import ViewStream
from tests import mutants, smoke
from tests.mutants import Edit

SMOKED = ("dkd", "crd")  # what tests/smoke.py trains
ROOTS = (train.__module__, *(METHODS[name].__module__ for name in SMOKED))


@functools.cache
def sources() -> dict[str, str]:
    """Of every module that the smoke run's numbers come from."""
    return {module: code_hash.path(module).read_text("utf-8") for module in sorted(closure(ROOTS, UNCOUNTED))}


class Copy:
    """A copy of kdlib that may be edited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PACKAGE.name
        shutil.copytree(PACKAGE, self.folder)

    @functools.cached_property
    def code_hash(self) -> Any:
        """As a fresh process of this copy would have it."""
        return mutants.code_hash_of(self.folder)

    def _in_copy(self, path: Path) -> Path:
        return self.folder / path.relative_to(PACKAGE)

    def write(self, module: str, source: str) -> None:
        path = self._in_copy(code_hash.path(module))
        path.write_text(source, "utf-8")
        for old in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            old.unlink()

    def code(self, *roots: str) -> str:
        """The hash of its code as it is now."""
        for cached in (self.code_hash._source, self.code_hash._imports):  # and not the forms of sources, which stay what they are
            cached.cache_clear()
        return str(self.code_hash.code_fingerprint(roots or ROOTS, UNCOUNTED))

    def code_after(self, edit: Edit) -> str:
        """The hash with one edit, which is then taken back."""
        self.write(edit.module, edit.source)
        found = self.code()
        self.write(edit.module, code_hash.path(edit.module).read_text("utf-8"))
        return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@functools.cache
def the_mutants() -> list[Edit]:
    return mutants.edits(mutants.MUTANTS, sources(), 200, seed=0)


@functools.cache
def the_edits_of_words() -> list[Edit]:
    rng = random.Random(0)
    places = rng.sample(sorted(sources()), 12)
    return mutants.edits(mutants.WORDS, sources(), 38, seed=0) + [mutants.commented(module, sources()[module], rng) for module in places]


# All edits


def test_every_mutant_changes_it(copy: Copy) -> None:
    before = copy.code()
    missed = [edit for edit in the_mutants() if copy.code_after(edit) == before]
    assert len(the_mutants()) == 200
    assert not missed
    assert copy.code() == before


def test_no_edit_of_words_changes_it(copy: Copy) -> None:
    before = copy.code()
    changed = [edit for edit in the_edits_of_words() if copy.code_after(edit) != before]
    assert len(the_edits_of_words()) == 50
    assert all(edit.source != sources()[edit.module] for edit in the_edits_of_words())
    assert not changed


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_edit_of_a_methods_file_changes_that_method_and_those_that_stand_on_it(copy: Copy, name: str) -> None:
    module = METHODS[name].__module__
    roots = {other: (train.__module__, method.__module__) for other, method in METHODS.items()}
    before = {other: copy.code(*root) for other, root in roots.items()}
    source = code_hash.path(module).read_text("utf-8")
    copy.write(module, source + "\n\nADDED = 1\n")
    after = {other: copy.code(*root) for other, root in roots.items()}
    copy.write(module, source)
    changed = {other for other in METHODS if after[other] != before[other]}
    assert changed == {"kd", "funmatch", "lskd"} if name == "kd" else changed == {name}


# Short trainings


@functools.cache
def heart() -> frozenset[str]:
    """Modules whose arithmetic every step of the smoke run passes."""
    parts: tuple[Any, ...] = (
        *(ViewStream, Learner, Gradients, RunningStatistics, LossCurve, Method, METHODS["dkd"], METHODS["crd"], SmallResNet),
        *(mixup.draw_mix, crop.draw_crops, erasing.draw_erasures, randaugment.draw_operations, lr_schedule.set_rate, hard.ce, generator),
    )
    return frozenset(part.__module__ for part in parts)


def computes(edit: Edit) -> bool:
    """Whether it is likely to train to other numbers: another name that is called, say, most often ends the program."""
    return edit.module in heart() and edit.kind in ("constant", "operator", "comparison")


@pytest.mark.timeout(600)
def test_other_numbers_come_with_another_fingerprint(copy: Copy, tmp_path: Path) -> None:
    """The code is trained with: 20 mutants, some of which must change weights, and edits of words, none of which may."""
    inner = [edit for edit in the_mutants() if computes(edit)]
    outer = [edit for edit in the_mutants() if not computes(edit)]
    rng = random.Random(0)
    variants = [None, None, *rng.sample(inner, 17), *rng.sample(outer, 3), *rng.sample(the_edits_of_words(), 6)]
    copies = [Copy(tmp_path / str(number)) for number in range(len(variants))]
    for variant, copied in zip(variants, copies, strict=True):
        if variant:
            copied.write(variant.module, variant.source)
    command = [sys.executable, smoke.__file__, *(str(copied.folder.parent) for copied in copies)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    numbers = list(json.loads(done.stdout).values())
    codes = [copy.code_after(variant) if variant else copy.code() for variant in variants]
    assert numbers[0] == numbers[1]
    assert not numbers[0].startswith("crashed")
    changed = [number != numbers[0] for number in numbers]
    trained = [number for number in numbers if not number.startswith("crashed")]
    silent = [variant for variant, change, code in zip(variants, changed, codes, strict=True) if change and code == codes[0]]
    assert not silent, "other numbers with an equal fingerprint"
    assert len(set(trained)) > 5, "too few of the mutants train to other numbers: the comparison says nothing"
    assert not any(changed[-6:])
    assert set(codes[-6:]) == {codes[0]}


# The normal form


def instructions(code: types.CodeType, names: dict[str, str]) -> Iterator[tuple[object, ...]]:
    """Bytecode, with numbers called by the names that they stand for. Cells are in the order of their names: here too."""
    cells: list[tuple[object, ...]] = []
    for step in dis.get_instructions(code):
        value = step.argval
        if step.opname in ("MAKE_CELL", "LOAD_CLOSURE", "COPY_FREE_VARS"):
            cells.append((step.opname, names.get(value, value)))
            continue
        yield from sorted(cells, key=str)
        cells.clear()
        if step.opname in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):  # these, and LOAD_METHOD, depend on what imports are called
            continue
        if isinstance(value, types.CodeType):
            yield (step.opname, *instructions(value, names))
        elif step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            yield (step.opname,)
        elif step.opcode in dis.hasconst:
            yield step.opname, str(sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value))
        else:
            yield step.opname.replace("METHOD", "ATTR"), names.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda path: path.name)
def test_renaming_keeps_the_meaning(folder: Path) -> None:
    """The bytecode is the same but for the names: every variable still is the local, cell or global that it was."""
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_bytes())
        before = list(instructions(compile(tree, "", "exec"), {}))
        names = rename_locals(tree)
        assert list(instructions(compile(tree, "", "exec"), names)) == before, path
        assert not {name for name in names if not name.isdecimal()}


def form(source: str) -> str:
    return normal_form(source.encode())


def test_the_form_of_a_normal_form_is_itself() -> None:
    for source in sources().values():
        tree = normalised(source.encode())
        before = ast.dump(tree)
        rename_locals(tree)
        assert ast.dump(tree) == before


SAME = {
    "local": ("def f(x):\n a = x\n return a", "def f(x):\n b = x\n return b"),
    "two locals, exchanged": ("def f(x):\n a = x\n b = 2\n return a - b", "def f(x):\n b = x\n a = 2\n return b - a"),
    "comprehension": ("def f(x):\n return [i for i in x if i]", "def f(x):\n return [j for j in x if j]"),
    "closure": ("def f():\n a = 1\n def g():\n  return a\n return g()", "def f():\n b = 1\n def g():\n  return b\n return g()"),
    "nonlocal": (
        "def f():\n a = 1\n def g():\n  nonlocal a\n  a += 1\n g()\n return a",
        "def f():\n b = 1\n def g():\n  nonlocal b\n  b += 1\n g()\n return b",
    ),
    "walrus": ("def f(x):\n return [a for i in x if (a := i)] + [a]", "def f(x):\n return [b for i in x if (b := i)] + [b]"),
    "targets": (
        "def f(x):\n with x as a:\n  for b, *c in a:\n   del b\n   return c",
        "def f(x):\n with x as d:\n  for e, *a in d:\n   del e\n   return a",
    ),
    "except": ("def f():\n try:\n  g()\n except E as a:\n  return a", "def f():\n try:\n  g()\n except E as b:\n  return b"),
    "match": (
        "def f(x):\n match x:\n  case [a, *b]: return a\n  case {'k': c, **d}: return d\n  case P(q=e) as g: return e",
        "def f(x):\n match x:\n  case [b, *a]: return b\n  case {'k': d, **c}: return c\n  case P(q=g) as e: return g",
    ),
    "lambda": ("def f(x):\n a = x\n return lambda y=a: a + y", "def f(x):\n b = x\n return lambda y=b: b + y"),
    "class in a function": (
        "def f(x):\n a = x\n class C:\n  b = a\n  def g(self):\n   return a\n return C",
        "def f(x):\n c = x\n class C:\n  b = c\n  def g(self):\n   return c\n return C",
    ),
    "message": ("def f(x):\n raise E(f'found {x} here')", "def f(x):\n raise E(f'{x} was found')"),
    "message in parts": ("raise E('a b' + c + ('d e' if f else 'g'))", "raise E('h i' + c + ('j' if f else 'k l'))"),
    "refusal": (
        "from q import refuse\ndef f():\n return refuse('a', 1, 'b c')",
        "from q import refuse\ndef f():\n return refuse('a', 1, 'd e')",
    ),
    "report": ("from q import say\nsay('a b')", "from q import say\nsay('c d')"),
    "bar": ("from tqdm import tqdm\ntqdm(x, desc='a b')", "from tqdm import tqdm\ntqdm(x, desc='c d')"),
    "print": ("import sys\nprint('a b', file=sys.stderr)", "import sys\nprint('c d', file=sys.stderr)"),
    "comment": ("a = 1  # b", "# c\n\na = (1)"),
    "docstring": ("def f():\n 'a b'\n return 1", "def f():\n return 1"),
}
DIFFERENT = {
    # locals
    "exchanged roles": ("def f(a0, b0):\n a, b = a0, b0\n return a - b", "def f(a0, b0):\n a, b = a0, b0\n return b - a"),
    "one for another": ("def f(x):\n a = 1\n b = 2\n return a", "def f(x):\n a = 1\n b = 2\n return b"),
    "two in one": ("def f():\n a = 1\n b = 2\n return a + b", "def f():\n a = 1\n a = 2\n return a + a"),
    "global, not local": ("def f(x):\n a = x\n return a", "def f(x):\n a = x\n return y"),
    "shadows a global": ("y = 1\ndef f():\n y = 2\n return y", "y = 1\ndef f():\n z = 2\n return y"),
    "declared global": ("def f():\n global a\n a = 1", "def f():\n a = 1"),
    "other global": ("def f():\n global a, b\n a = 1", "def f():\n global a, b\n b = 1"),
    "local of a function around": (
        "def f():\n a = 1\n def g():\n  a = 2\n  def h():\n   return a\n  return h()\n return g()",
        "def f():\n a = 1\n def g():\n  b = 2\n  def h():\n   return a\n  return h()\n return g()",
    ),
    "nonlocal or its own": (
        "def f():\n a = 1\n def g():\n  nonlocal a\n  a = 2\n g()\n return a",
        "def f():\n a = 1\n def g():\n  a = 2\n g()\n return a",
    ),
    "parameter": ("def f(a, b):\n return a", "def f(b, a):\n return a"),
    "name of a parameter": ("def f(a):\n return a", "def f(b):\n return b"),
    "parameter of a lambda": ("f = lambda a: a", "f = lambda b: b"),
    "default looks outside": ("def f(x):\n a = x\n return lambda a=a: a", "def f(x):\n b = x\n return lambda a=a: a"),
    "default of a lambda": ("def f(a, b):\n return lambda x=a: x", "def f(a, b):\n return lambda x=b: x"),
    "parameter in a default": (
        "def f():\n y = 1\n def g(x=lambda y: y):\n  return y\n return g()",
        "def f():\n z = 1\n def g(x=lambda y: y):\n  return y\n return g()",
    ),
    "first iterable looks outside": ("def f(x):\n a = x\n return [a for a in a]", "def f(x):\n b = x\n return [a for a in a]"),
    "comprehension hides": ("def f(a):\n i = 9\n [i for i in a]\n return i", "def f(a):\n i = 9\n [j for i in a]\n return i"),
    "order of iterables": ("def f(x, y):\n return [i for i in x for j in y]", "def f(x, y):\n return [i for j in x for i in y]"),
    "walrus leaves it": ("def f(x):\n a = 0\n [a := i for i in x]\n return a", "def f(x):\n a = 0\n [b := i for i in x]\n return a"),
    "class hides nothing": (
        "def f():\n a = 1\n class C:\n  a = 2\n  def g(self):\n   return a\n return C",
        "def f():\n a = 1\n class C:\n  a = 2\n  def g(self):\n   return self.a\n return C",
    ),
    "class looks outside": ("def f():\n x = 1\n class C:\n  x = x\n return C", "def f():\n y = 1\n class C:\n  x = y\n return C"),
    "attribute of a class": ("def f():\n class C:\n  a = 1\n return C", "def f():\n class C:\n  b = 1\n return C"),
    "name of a class": ("def f():\n class A: pass\n return A", "def f():\n class B: pass\n return B"),
    "mangled": ("class C:\n def f(self):\n  __a = 1\n  return __a", "class C:\n def f(self):\n  __b = 1\n  return __b"),
    "registered by name": (
        "def f():\n @register\n def a(): return 1\n @register\n def b(): return 2",
        "def f():\n @register\n def b(): return 1\n @register\n def a(): return 2",
    ),
    "passed on by name": ("def f():\n def a(): return 1\n register(a)", "def f():\n def b(): return 1\n register(b)"),
    "around a class": (
        "def f():\n def a():\n  class C: pass\n  return C\n return a()",
        "def f():\n def b():\n  class C: pass\n  return C\n return b()",
    ),
    "imported": ("def f():\n from m import a\n return a()", "def f():\n from m import b\n return b()"),
    "imported as": ("def f():\n from m import a as c, b as d\n return c()", "def f():\n from m import b as c, a as d\n return c()"),
    "keyword": ("def f(x):\n a = x\n return g(a=a)", "def f(x):\n b = x\n return g(b=b)"),
    "attribute": ("def f(x):\n x.a = 1", "def f(x):\n x.b = 1"),
    "captured pattern": ("def f(x, a):\n match x:\n  case [a, b]: return a", "def f(x, a):\n match x:\n  case [b, a]: return a"),
    "pattern's key": ("def f(x):\n match x:\n  case {'a': b}: return b", "def f(x):\n match x:\n  case {'b': b}: return b"),
    "pattern's attribute": ("def f(x):\n match x:\n  case P(a=b): return b", "def f(x):\n match x:\n  case P(b=b): return b"),
    "except unbinds": (
        "def f():\n a = 1\n try: g()\n except E as a: pass\n return a",
        "def f():\n a = 1\n try: g()\n except E as b: pass\n return a",
    ),
    "name that is looked up": ("def f():\n a = 1\n b = 2\n return locals()['a']", "def f():\n b = 1\n a = 2\n return locals()['a']"),
    "name in a query": ("def f(t):\n a, b = 1, 2\n return t.query('x > @a')", "def f(t):\n b, a = 1, 2\n return t.query('x > @a')"),
    "documented by itself": ("def f():\n 'a b'\nX = len(f.__doc__)", "def f():\n 'a b c'\nX = len(f.__doc__)"),
    # literals
    "type of a number": ("a = 1", "a = 1.0"),
    "truth": ("a = 1", "a = True"),
    "sign of zero": ("a = 0.0", "a = -0.0"),
    "bytes": ("a = 'b'", "a = b'b'"),
    "f-string": ("a = 'b {c}'", "a = f'b {c}'"),
    "mode": ("def f(x):\n return g(x, mode='mean of all')", "def f(x):\n return g(x, mode='sum of all')"),
    "einsum": ("a = einsum('i j, j k', x)", "a = einsum('i j, k j', x)"),
    "shape": ("def f(x: Float[Tensor, 'a b']): pass", "def f(x: Float[Tensor, 'b a']): pass"),
    "text that is no docstring": ("def f():\n a = 'a b'\n return a", "def f():\n a = 'a c'\n return a"),
    # messages
    "key in a message": ("raise E(x['a b'])", "raise E(x['c d'])"),
    "comparison in a message": ("raise E('p q' if a == 'b c' else 'r s')", "raise E('p q' if a == 'c d' else 'r s')"),
    "call in a message": ("raise E(g('a b'))", "raise E(g('c d'))"),
    "value in a message": ("raise E(f'a b {c}')", "raise E(f'a b {d}')"),
    "word that is caught": ("raise E('bce')", "raise E('ce')"),
    "kind of error": ("raise E('a b')", "raise F('a b')"),
    "returned error": ("def f():\n return E('a b')", "def f():\n return E('c d')"),
    "printed to a file": ("print('a b', file=f)", "print('c d', file=f)"),
    "printed where it is caught": (
        "from contextlib import redirect_stdout\nwith redirect_stdout(f): print('a b')",
        "from contextlib import redirect_stdout\nwith redirect_stdout(f): print('c d')",
    ),
    "another print": ("from m import print\nprint('a b')", "from m import print\nprint('c d')"),
    "another say": ("def say(a): return t[a]\nsay('a b')", "def say(a): return t[a]\nsay('c d')"),
    "say under a false name": ("from m import mean as say\nsay('a b')", "from m import mean as say\nsay('c d')"),
    "say as a parameter": ("from m import say\ndef f(say):\n say('a b')", "from m import say\ndef f(say):\n say('c d')"),
    "used report": ("from m import say\nx = say('a b')", "from m import say\nx = say('c d')"),
    "bar over text": ("from tqdm import tqdm\nfor c in tqdm('a b'): f(c)", "from tqdm import tqdm\nfor c in tqdm('c d'): f(c)"),
    # the rest
    "order of statements": ("def f():\n g()\n h()", "def f():\n h()\n g()"),
    "decorator": ("@a\ndef f(): pass", "def f(): pass"),
    "annotation": ("class C:\n a: int = 1", "class C:\n a: float = 1"),
    "encoding": ("# coding: latin-1\na = 'é'", "# coding: utf-8\na = 'é'"),
}


@pytest.mark.parametrize("name", SAME)
def test_words_alone(name: str) -> None:
    one, other = SAME[name]
    assert form(one) == form(other)


@pytest.mark.parametrize("name", DIFFERENT)
def test_two_programs_never_have_one_form(name: str) -> None:
    one, other = DIFFERENT[name]
    assert form(one) != form(other)


# What is not followed


def test_the_schema_has_values_and_no_behaviour() -> None:
    """A fingerprint holds the values of these classes, not their code."""
    for kind in {value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, BaseModel)} - {BaseModel}:
        own = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, property | classmethod | staticmethod)}
        assert {name for name in own if not name.startswith(("__", "_abc"))} == set(), kind
        found = kind.__pydantic_decorators__
        assert not any(getattr(found, field) for field in found.__dataclass_fields__), kind
        assert not kind.model_computed_fields
        assert not kind.__private_attributes__
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    assert not [node for node in ast.walk(ast.parse(Path(schema.__file__).read_bytes())) if isinstance(node, kinds)]


def test_training_takes_values_and_refusals_from_what_is_not_followed() -> None:
    """No number may depend on a function whose code is not in the hash."""
    words = {"Refused", "refuse", "some", "find_root"}  # of messages, and where files lie
    everything = closure([train.__module__, *(method.__module__ for method in METHODS.values())], UNCOUNTED)
    for module in everything:
        tree = ast.parse(code_hash.path(module).read_bytes())
        taken = {(node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        for parent, name in taken:
            if f"{parent}.{name}" in UNCOUNTED:  # then by attribute
                uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
                taken = taken | {(f"{parent}.{name}", node.attr) for node in uses if getattr(node.value, "id", "") == name}
        for parent, name in taken:
            if parent in UNCOUNTED and f"{parent}.{name}" not in everything:
                found = getattr(importlib.import_module(parent), name)
                is_value = getattr(schema, name, None) is found
                assert is_value or name in words, f"{module} takes {name} of {parent}"


def test_training_imports_nothing_by_a_name_that_it_computes() -> None:
    for module in closure([train.__module__, *(method.__module__ for method in METHODS.values())], UNCOUNTED):
        text = code_hash.path(module).read_text("utf-8")
        assert not any(word in text for word in ("import_module", "__import__", "__doc__", "getdoc")), module


def test_code_from_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="move it into the package"):
        code_hash.code_fingerprint(["tests.smoke"])


def test_what_is_imported_in_any_way_counts(copy: Copy) -> None:
    """By a relative import, by name for another interpreter, and handed on by the package itself."""
    module = METHODS["kd"].__module__
    parent = module.rpartition(".")[0]
    copy.write(module, "from . import at\nfrom .crd import CRD\n")
    assert {f"{parent}.at", f"{parent}.crd"} <= copy.code_hash.imports(module) if copy.code() else False
    copy.write(module, f'WORKER = "{train.__module__}"\n')
    assert train.__module__ in copy.code_hash.imports(module) if copy.code() else False
    copy.write(module, "from kdlib import build\n")
    assert "kdlib" in copy.code_hash.imports(module) if copy.code() else False
    copy.write(module, "from kdlib import config\n")
    assert "kdlib" not in copy.code_hash.imports(module) if copy.code() else False
    copy.write(module, code_hash.path(module).read_text("utf-8"))
