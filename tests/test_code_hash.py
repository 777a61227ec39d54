"""A fingerprint changes with everything that shapes a run's numbers, and with nothing else."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdlib.config.schema import ComputeParams, Recipe
from kdlib.engine.setting import Setting
from kdlib.engine.train import train
from kdlib.losses import METHODS
from kdlib.study.training import code_hash, identity
from kdlib.study.training.code_hash import closure, fingerprint
from kdlib.study.training.experiment import Experiment, Planned
from kdlib.study.training.identity import UNCOUNTED
from kdlib.study.training.planned import Variant
from tests import tiny, training
from tests.mutants import code_hash_of

TRAINS = train.__module__
EVERY = set(METHODS)
# Whose runs a change to a module's code repeats, by the modules or whole rooms of it. A module that stands in none of the two fails a test:
# decide where it belongs.
REPEATS: dict[str, set[str]] = {
    **{method.__module__: {name} for name, method in METHODS.items()},
    "kdlib.losses.kd": {"kd", "funmatch", "lskd"},
    "kdlib.losses.logits": {"kd", "dkd", "funmatch", "lskd", "nkd"},
    "kdlib.losses.stages": {"at", "fitnet", "ofa", "reviewkd", "sp", "vid"},
    **dict.fromkeys(("kdlib.losses.base", "kdlib.losses.hard"), EVERY),
    **dict.fromkeys(("kdlib.engine", "kdlib.views", "kdlib.models", "kdlib.decoding"), EVERY),
    **dict.fromkeys(("kdlib.data", *(f"kdlib.data.{name}" for name in ("dataset", "lazy_images", "paths", "splits"))), EVERY),
    **dict.fromkeys(("kdlib.parallel", "kdlib.parallel.ranks", "kdlib.parallel.signals"), EVERY),
    **dict.fromkeys(("kdlib.errors", "kdlib.files", "kdlib.seed", "kdlib.types"), EVERY),
}
# What a fingerprint holds by value (params.yaml as checked, a digest of the data and of the teacher), and what reads finished runs.
REPEATS_NOTHING = {
    *("kdlib", "kdlib.config", "kdlib.study"),
    *("kdlib.parallel.workers", "kdlib.parallel.launch", "kdlib.parallel.placement"),  # where it is done
    "kdlib.losses",  # names of classes alone
    "kdlib.data.sources",  # what they offer is in the data's fingerprint
    "kdlib.decoding.shards",
    "kdlib.models.checkpoints",  # a checkpoint is known by its bytes, and measured anew each time
}


def place(module: str) -> str:
    """The longest entry of the two that the module is, or lies in."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 1, -1)] or [module]
    return next((name for name in names if name in REPEATS or name in REPEATS_NOTHING), "")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of kdlib that may be edited."""
    copy = tmp_path / "kdlib"
    shutil.copytree(code_hash.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def codes(package: Path) -> dict[str, str]:
    """Fingerprints of one run of every method, as the experiment computes them, for the code of the copy."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(identity, "code_fingerprint", code_hash_of(package).code_fingerprint)
        return {name: described(small(), method=name) for name in METHODS}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """Of the code as it is."""
    return codes(code_hash.PACKAGE)


def small(**changes: Any) -> Setting:
    """The setting of a run, described and never trained."""
    return dataclasses.replace(described_setting(), **changes)


@functools.cache
def described_setting() -> Setting:
    return dataclasses.replace(training.setting(index=np.arange(4)), teacher=None)


def modules() -> set[str]:
    parts = [path.relative_to(code_hash.PACKAGE).with_suffix("").parts for path in code_hash.PACKAGE.rglob("*.py")]
    return {".".join(("kdlib", *part)).removesuffix(".__init__") for part in parts}


# Code


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text("utf-8")), "utf-8")


@pytest.mark.parametrize(
    ("found", "put"),
    [
        (r'(?m)^( *)"""(?=[A-Z])', r'\1"""Other words. '),  # every docstring
        (r"(?m)^( *)return ", r"\1# why\n\n\1return  "),
        (r'\A"""[^"]*"""', ""),
    ],
)
def test_words_change_nothing(package: Path, before: dict[str, str], found: str, put: str) -> None:
    path = package / "losses" / "dkd.py"
    was = path.read_text()
    edit(path, lambda code: re.sub(found, put, code))
    assert path.read_text() != was
    assert codes(package) == before


@pytest.mark.parametrize(
    ("found", "changed"),
    [
        ("others_needed(setup.student", "others_needed(setup.teacher"),
        ("self.alpha * target", "self.beta * target"),
        ("temperature**2", "temperature**3"),
        ('{"tckd"', '{"target"'),
        ("class DKD(Method)", "class DKD(Method, object)"),
        ('positive("temperature"', 'positive("heat"'),
    ],
)
def test_any_code_changes_it(package: Path, before: dict[str, str], found: str, changed: str) -> None:
    path = package / "losses" / "dkd.py"
    assert found in path.read_text()
    edit(path, lambda code: code.replace(found, changed, 1))
    after = codes(package)
    assert {name for name in METHODS if after[name] != before[name]} == {"dkd"}


def test_a_string_that_is_no_docstring_counts(package: Path) -> None:
    path = package / "seed.py"
    edit(path, lambda code: code + '\n\nWORD = "one"\n')
    before = codes(package)
    edit(path, lambda code: code.replace('"one"', '"two"'))
    assert codes(package)["kd"] != before["kd"]


def test_every_module_has_its_place() -> None:
    assert {place(module) for module in modules()} == {*REPEATS, *REPEATS_NOTHING}
    assert not set(REPEATS) & REPEATS_NOTHING


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_change_repeats_exactly_the_runs_that_it_can_change(package: Path, before: dict[str, str], module: str) -> None:
    edit(code_hash_of(package).path(module), lambda code: code + "\n\nADDED = 1\n")
    after = codes(package)
    assert {name for name in METHODS if after[name] != before[name]} == REPEATS.get(place(module), set())


def test_a_module_that_training_comes_to_import_counts_at_once(package: Path) -> None:
    (package / "engine" / "new.py").write_text("FACTOR = 1\n")
    edit(package / "engine" / "loop.py", lambda code: code.replace("\nimport time\n", "\nimport time\n\nimport kdlib.engine.new\n", 1))
    before = codes(package)
    edit(package / "engine" / "new.py", lambda code: code.replace("1", "2"))
    assert codes(package)["kd"] != before["kd"]


def test_a_rename_and_a_move_count(package: Path) -> None:
    """The same code under another name is imported by other code; and the names are in the hash."""
    (package / "a.py").write_text("X = 1\n")
    (package / "b.py").write_text("Y = 2\n")
    both = code_hash_of(package).code_fingerprint(["kdlib.a", "kdlib.b"])
    (package / "a.py").write_text("Y = 2\n")
    (package / "b.py").write_text("X = 1\n")
    assert code_hash_of(package).code_fingerprint(["kdlib.a", "kdlib.b"]) != both


# What is really imported


def imported(roots: list[str], stop: list[str]) -> set[str]:
    """By a fresh interpreter; ``stop`` is replaced by hollow modules, so that nothing is reached through it."""
    code = """
import importlib, json, sys, types
from pathlib import Path
roots, stop = json.loads(sys.argv[1])
import kdlib
for name in stop:
    hollow = types.ModuleType(name)
    folder = Path(kdlib.__file__).parent.joinpath(*name.split(".")[1:])
    if folder.is_dir():
        hollow.__path__ = [str(folder)]
    def find(attribute, folder=folder):
        if attribute.startswith("__") or (folder / f"{attribute}.py").is_file():
            raise AttributeError(attribute)
        return type(attribute, (Exception,), {})
    hollow.__getattr__ = find
    sys.modules[name] = hollow
for root in roots:
    importlib.import_module(root)
print(json.dumps([name for name in sys.modules if name.startswith("kdlib.")]))
"""
    told = json.dumps([roots, stop])
    done = subprocess.run([sys.executable, "-c", code, told], cwd=training.ROOT, check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout)) - set(stop)


@pytest.mark.parametrize("stop", [[], sorted(UNCOUNTED)])
def test_the_closure_is_what_an_interpreter_imports(stop: list[str]) -> None:
    roots = [TRAINS, "kdlib.losses.dkd"]
    later = {"kdlib.decoding.worker"}  # by the processes that decode
    assert closure(roots, stop) == imported(roots, stop) | later


def test_the_closure_by_name() -> None:
    found = closure([TRAINS, "kdlib.losses.dkd"], UNCOUNTED)
    assert {
        "kdlib.losses.logits",
        "kdlib.losses.base",
        "kdlib.losses.hard",
        "kdlib.models.resnet_small",
        "kdlib.views.randaugment",
    } <= found
    assert not found & {"kdlib.losses.dist", "kdlib.losses.no_kd", *UNCOUNTED}
    assert closure([TRAINS], {TRAINS}) == set()


# Values


def test_a_fingerprint_is_of_values() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(*parts) for parts in ((), (1,), (1.5,), ("1",), ([1],), (1, 2), ([1, 2],), (None,), (True,), ({},))}) == 10
    assert len(fingerprint("x")) == 16
    with pytest.raises(TypeError):
        fingerprint(object())
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))


def described(setting: Setting, teacher: str | None = "teacher", method: str = "kd", trial: bool = False, **parameters: float) -> str:
    return identity.of_run(setting, teacher, Variant("any name", method, parameters, trial))


def other_recipes() -> Iterator[Recipe]:
    """The recipe with one field changed, for every field and field of a field."""
    recipe = training.recipe()
    for name, value in recipe.model_dump().items():
        if isinstance(value, dict):
            for inner, number in value.items():
                yield recipe.model_copy(update={name: getattr(recipe, name).model_copy(update={inner: number + 1})})
        else:
            other = value + "x" if isinstance(value, str) else [*value, 0.5] if isinstance(value, list) else (value or 0) + 1
            yield recipe.model_copy(update={name: other})


def test_everything_that_a_run_is_given_counts() -> None:
    plain, data = described(small()), small().data
    changed = [
        *(small(recipe=recipe) for recipe in other_recipes()),
        small(data=dataclasses.replace(data, fingerprint="other")),
        small(data=dataclasses.replace(data, hflip=0.25)),
        small(index=np.arange(5)),
        small(index=np.arange(4)[::-1].copy()),
        small(student="other"),
        small(size=9),
        small(seed=1),
        small(device=torch.device("meta")),
        small(compute=ComputeParams(precision="bf16", compile="auto", resident="auto", ahead="auto")),
    ]
    found = [described(setting) for setting in changed]
    found += [described(small(), **given) for given in ({"teacher": "other"}, {"teacher": None}, {"method": "dkd"}, {"trial": True})]
    found += [described(small(), weight=1.0), described(small(), weight=2.0), described(small(), temperature=1.0)]
    assert len({plain, *found}) == 1 + len(found)
    assert described(small(title="another title", cache_folder=Path("elsewhere"), answers_gb=2.0)) == plain
    assert described(small(), a=1.0, b=2.0) == described(small(), b=2.0, a=1.0)


def test_another_class_of_the_same_file_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = described(small(), method="kd")
    other = type("Other", (METHODS["kd"],), {"__module__": METHODS["kd"].__module__})
    monkeypatch.setitem(identity.METHODS, "kd", other)
    assert described(small(), method="kd") != before


def test_no_field_of_a_setting_is_forgotten() -> None:
    """A new field of Setting must be described, or be listed here as no matter to any number."""
    counted = {"data", "index", "student", "size", "teacher", "recipe", "seed", "device", "compute"}
    assert {field.name for field in dataclasses.fields(Setting)} == counted | {"title", "cache_folder", "answers_gb"}


# params.yaml


def plans(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str, int], str]:
    """(comparison, variant, seed) -> fingerprint of every run that the study of a folder would train; nothing is trained."""
    found: dict[tuple[str, str, int], str] = {}
    study = Experiment(root)

    def note(setting: Setting, planned: list[Planned]) -> None:
        comparison = setting.title.partition(" ")[0]
        found.update({(comparison, plan.variant.name, plan.seed): plan.fingerprint for plan in planned})

    monkeypatch.setattr(study, "_complete", note)
    for name, comparison in study.params.comparisons.items():
        if comparison.sweep is None:
            monkeypatch.setattr(study, "_export", lambda *_: root)
            study.distill(name)
    return found


def change(params: dict[str, Any], key: str, value: Any) -> None:
    *way, last = key.split(".")
    for step in way:
        params = params[step]
    params[last] = value


@pytest.mark.parametrize(
    ("key", "value", "whose"),
    [
        ("methods.dkd.beta", 4.0, lambda run: run[1] == "dkd"),
        ("methods.no_kd.hard_weight", 0.5, lambda run: run[1] == "no_kd"),
        ("recipes.strong.learning_rate", 0.05, lambda run: run[0] == "large_strong"),
        ("comparisons.small_weak.fraction", 0.75, lambda run: run[0] == "small_weak"),
        ("comparisons.small_weak.subset_seed", 1, lambda run: run[0] == "small_weak" and run[2] != 1),  # seed 1 draws this one anyway
        ("comparisons.large_strong.subset_seed", 1, lambda _: False),  # all images are all images
        ("comparisons.small_weak.methods", ["dist", "dkd", "kd"], lambda _: False),
        ("study.seeds", [1, 0], lambda _: False),
        ("study.confidence", 0.9, lambda _: False),
        ("study.checkpoint_seconds", 60, lambda _: False),
        ("study.on_divergence", "fail", lambda _: False),
        ("teachers.small.min_top1", 0.01, lambda _: False),
    ],
)
def test_an_edit_repeats_the_runs_that_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, whose: Callable[[tuple[str, str, int]], bool]
) -> None:
    root = training.fresh(tmp_path / "project", tiny.content())
    before = plans(root, monkeypatch)
    params = tiny.content()
    change(params, key, value)
    tiny.write(root, params)
    after = plans(root, monkeypatch)
    assert {run for run in after if after[run] != before[run]} == {run for run in after if whose(run)}


def test_the_same_weights_in_another_model_are_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kd_resnet14_w32_s1 and _s2 have the same tensors and answer differently."""
    params = tiny.content()
    params["teachers"]["small"]["model"] = "kd_resnet14_w32_s1"
    root = training.fresh(tmp_path / "project", params)
    Experiment(root).make_teacher("small")
    before = plans(root, monkeypatch)
    params["teachers"]["small"]["model"] = "kd_resnet14_w32_s2"
    tiny.write(root, params)
    after = plans(root, monkeypatch)
    assert before.keys() == after.keys()
    assert all(before[run] != after[run] for run in before)
