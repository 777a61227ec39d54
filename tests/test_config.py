"""params.yaml: what is read, what is refused in one line, and what runs a study asks for by name."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from kdlib import config
from kdlib.config.references import grid_points
from kdlib.config.schema import SECTIONS, SOURCES
from kdlib.errors import Refused
from kdlib.study.training import planned
from tests import tiny
from tests.refusals import change, refused

TWO_SPLITS = {"val_fraction": 0.1, "test_fraction": 0.2, "seed": 0, "hflip": 0.5}
OTHER_SOURCES: dict[str, dict[str, Any]] = {
    "digits": {"source": "digits", **TWO_SPLITS},
    "folder": {"source": "folder", "path": "pets", "size": 8, **TWO_SPLITS},
    "cifar100": {"source": "cifar100", "path": "c", "download": False, "val_fraction": 0.1, "seed": 0, "hflip": 0.5},
    "imagenet": {"source": "imagenet", "path": "i", "size": 8, "val_fraction": 0.1, "seed": 0, "hflip": 0.5},
    "originals": {
        **{"source": "originals", "path": "o", "stored": "folders", "class_map": None, "size": 8, "crop_pct": 0.9},
        **{"unreadable": 0.1, "val_fraction": 0.1, "seed": 0, "hflip": 0.5},
    },
}


def full() -> dict[str, Any]:
    """The tiny study with an entry of every source, whose name is not that of the source."""
    content = tiny.content()
    content["data"] |= {f"my_{name}": dict(entry) for name, entry in OTHER_SOURCES.items()}
    content["study"]["published"] = {
        "small_weak": {"rows": [{"table": "figure1", "where": {"dataset": "cifar100"}}], "settings": "assumed"}
    }
    return content


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) below a node, inner ones included."""
    for step, value in node.items() if isinstance(node, dict) else enumerate(node):
        here = (*path, str(step))
        yield ".".join(here), value
        if isinstance(value, dict | list):
            yield from places(value, here)


PLACES = dict(places(full()))
LEAVES = {key: value for key, value in PLACES.items() if not isinstance(value, dict | list)}
# keys that the form of params.yaml fixes, against names that people choose
PART_PLACES = [""] + [
    key
    for key, value in PLACES.items()
    if isinstance(value, dict) and set(value) & {"seeds", "processes", "precision", "settings", "where", "source", "model", "epochs"}
]
PART_PLACES += ["study.headline", "recipes.weak.randaugment", "comparisons.tuned", "comparisons.tuned.sweep"]


def part(content: dict[str, Any], key: str) -> dict[str, Any]:
    place: Any = content
    for step in key.split(".") if key else []:
        place = place[int(step) if isinstance(place, list) else step]
    assert isinstance(place, dict)
    return place


def join(*steps: str) -> str:
    return ".".join(step for step in steps if step)


# Reading


def test_the_default_study_and_the_tiny_one_are_accepted_and_frozen(tmp_path: Path) -> None:
    params = config.load(tiny.ROOT)
    assert params.study.baseline in params.methods
    params = config.load(tiny.write(tmp_path, full()))
    assert params.recipes["weak"].epochs == 4 and isinstance(params.recipes["weak"].epochs, float)
    assert {name: type(source).__name__ for name, source in params.data.items()} == {
        "fractals": "Fractals",
        "my_digits": "Digits",
        "my_folder": "Folder",
        "my_cifar100": "Cifar100",
        "my_imagenet": "Imagenet",
        "my_originals": "Originals",
    }
    with pytest.raises(ValidationError, match="frozen"):
        params.study.baseline = "dkd"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1e-3", 1e-3),
        ("5.0e-4", 5e-4),
        ("1E-3", 1e-3),
        ("+1e3", 1000.0),
        (".5", 0.5),
        ("1", 1.0),
        ("010", 10.0),
        ("0x10", 16.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2_and_of_dvc(tmp_path: Path, text: str, value: float) -> None:
    """PyYAML, by YAML 1.1, takes 1e-3 for a text and 010 for 8."""
    root = tiny.write(tmp_path, change(tiny.content(), "recipes.weak.learning_rate", 12345.0))
    file = root / "params.yaml"
    file.write_text(file.read_text().replace("12345.0", text))
    assert text in file.read_text()
    assert config.load(root).recipes["weak"].learning_rate == value
    dvc = pytest.importorskip("dvc.utils.serialize")
    assert dvc.parse_yaml(file.read_text(), str(file)) == config.read_yaml(root)


def test_a_number_in_quotes_is_text(tmp_path: Path) -> None:
    root = tiny.write(tmp_path, change(tiny.content(), "recipes.weak.learning_rate", "5e-4"))
    with refused("recipes.weak.learning_rate", "found '5e-4'", "allowed: a number", "without quotes", "5.0e-4"):
        config.load(root)


def test_the_root_is_the_nearest_folder_that_holds_params_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = tiny.write(tmp_path / "a b").resolve()
    inner = tiny.write(outer / "studies" / "methods")
    below = inner / "notebooks"
    below.mkdir()
    (below / "params.yaml").mkdir()  # a folder of this name is not the file
    assert config.find_root(below) == inner
    assert config.find_root(outer / "studies") == outer
    monkeypatch.chdir(below)
    assert config.find_root() == inner
    with pytest.raises(Refused, match=r"^params\.yaml: found none in .* or above it; allowed: .*; run from inside the project$"):
        config.find_root(tmp_path)


TEXTS = {
    "": "params.yaml: found an empty file; allowed: the sections study, data, teachers, recipes, methods, comparisons; restore them",
    "# only this\n": "params.yaml: found an empty file",
    "- study\n- data\n": "params.yaml: found a list; allowed: the sections study",
    "5\n": "params.yaml: found a int; allowed: the sections study",
    "study:\n  seeds: [0, 1\n": "params.yaml: line ",
    "a: 1\nb:\n  c: 1\n  c: 2\n": 'params.yaml: line 4: found \'duplicate key "c" with value "2" (original value: "1")\'; allowed: YAML',
    "a: 1\n\tb: 2\n": "params.yaml: line 2: found \"character '\\\\t' that cannot start any token\"; allowed: YAML 1.2",
    "a: !!python/object:os.system 1\n": "params.yaml: line 1: found",
    "a: 1\n---\nb: 2\n": "params.yaml: line 2: found 'another document'; allowed: YAML 1.2",
    "a: \x01\n": "params.yaml: not YAML: found",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_not_a_params_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(Refused) as caught:
        config.load(tmp_path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert line.startswith(TEXTS[text])
    assert "; allowed: " in line


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^params\.yaml: found none that can be read in .*; allowed: a file; restore it$"):
        config.load(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"study: \xff\n")
    with refused("byte 7", r"found b'\xff'", "UTF-8"):
        config.load(tmp_path)


@given(st.text(max_size=60) | st.binary(max_size=60))
def test_no_file_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    folder = tmp_path_factory.mktemp("params")
    (folder / "params.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(Refused) as caught:
        config.load(folder)
    assert len(str(caught.value).splitlines()) == 1


# The form: any single fault is named by its key


def wrong(value: object) -> st.SearchStrategy[Any]:
    """Values of another type than the one at a leaf."""
    containers = (
        st.just([]) | st.just({}) | st.lists(st.integers(), min_size=1, max_size=2) | st.dictionaries(st.text(), st.none(), max_size=2)
    )
    numbers = st.integers() | st.floats()
    if isinstance(value, bool):
        return containers | st.text() | numbers | st.none()
    if isinstance(value, int | float):
        return containers | st.text() | st.booleans() | st.none() | st.sampled_from([math.nan, math.inf, -math.inf])
    if isinstance(value, str):
        return containers | numbers | st.booleans() | st.none()
    # null, where a text, keys, a size in pixels or a seed may stand instead
    return st.integers(max_value=-1) | st.floats() | st.booleans() | st.lists(st.none(), max_size=2)


SWITCHES = [f"study.compute.{name}" for name in ("compile", "resident", "ahead")]  # on, off, or the text "auto"


@pytest.mark.parametrize("key", LEAVES)
@settings(max_examples=12)
@given(data=st.data())
def test_a_leaf_of_another_type_is_refused_by_its_key(key: str, data: st.DataObject) -> None:
    value = data.draw(wrong(LEAVES[key]).filter(lambda found: key not in SWITCHES or found not in (0, 1)))
    with refused(key):
        config.parse(change(full(), key, value))


NESTED = [key for key, value in PLACES.items() if isinstance(value, dict | list)]


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in NESTED for value in (None, 5, "text", True) if (key, value) != ("comparisons.tuned.sweep", None)],
)
def test_a_section_or_list_that_is_something_else_is_refused_by_its_key(key: str, value: object) -> None:
    with refused(key, "allowed: a list" if isinstance(PLACES[key], list) else "allowed: keys with their values"):
        config.parse(change(full(), key, value))


@pytest.mark.parametrize("place", PART_PLACES)
def test_an_unknown_key_is_refused_with_the_closest_one(place: str) -> None:
    for key in part(full(), place):
        content = full()
        part(content, place)[key + "x"] = 1
        with refused(join(place, key + "x"), f"found '{key}x'", key, f"did you mean {key!r}?"):
            config.parse(content)
    content = full()
    part(content, place)["zzzzzzzzz"] = 1
    with refused(join(place, "zzzzzzzzz"), "allowed: the keys ", *part(full(), place), "remove it"):
        config.parse(content)


def test_every_part_of_the_form_was_tried() -> None:
    chosen = {"data", "teachers", "recipes", "comparisons"}
    tried = {
        ".".join(step for i, step in enumerate(place.split(".")) if i != 1 or place.split(".")[0] not in chosen) for place in PART_PLACES
    }
    tried = {place.replace(".published.small_weak", ".published").replace(".rows.0", ".rows") for place in tried}
    assert tried - {"data"} == set(SECTIONS)
    assert {part(full(), place)["source"] for place in PART_PLACES if place.startswith("data.")} == set(SOURCES)


@pytest.mark.parametrize("place", PART_PLACES)
def test_a_missing_key_is_refused(place: str) -> None:
    for key in part(full(), place):
        content = full()
        del part(content, place)[key]
        with refused(join(place, key), "found nothing"):
            config.parse(content)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["kd", "weak", "fractals", "digits"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.sampled_from(["source", "kd"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(PLACES)), JUNK)
def test_nothing_but_a_refusal_comes_out(key: str, value: Any) -> None:
    try:
        config.parse(change(full(), key, value))
    except Refused as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 1000


def test_a_long_value_is_not_repeated_in_full() -> None:
    with refused("recipes.weak.epochs", "[0, 1, 2", "...; allowed: a number") as lines:
        config.parse(change(full(), "recipes.weak.epochs", list(range(10_000))))
    assert len(lines[0]) < 400


RANGES = {
    "study.seeds": ([], [0, 1, 0], 3),
    "study.seeds.0": (-1, 2**63, 1.0),
    "study.confidence": (0, 1, 1.5, -0.5),
    "study.tables": ([],),
    "study.headline.recipes": ([], ["weak", "strong", "weak"]),
    "study.checkpoint_seconds": (-1,),
    "study.on_divergence": ("Fail", "stop"),
    "data.fractals.classes": (1, 0, 2.5),
    "data.fractals.train_per_class": (0,),
    "data.fractals.size": (7, 1025),
    "data.fractals.jitter": (-0.1, 1.1),
    "data.fractals.points": (0,),
    "data.my_digits.val_fraction": (0, 1, 1.2),
    "data.my_digits.hflip": (-0.1, 1.2),
    "teachers.small.min_top1": (-0.1, 60),
    "recipes.weak.epochs": (0, -1),
    "recipes.weak.batch_size": (0, 1, 16.0),
    "recipes.weak.learning_rate": (0, -0.1),
    "recipes.weak.weight_decay": (-0.1,),
    "recipes.weak.warmup": (-0.1, 1),
    "recipes.weak.warmup_lr": (-1e-6,),
    "recipes.weak.min_lr": (-1e-6,),
    "recipes.weak.hard_loss": ("mse", "CE"),
    "recipes.weak.label_smoothing": (-0.1, 1),
    "recipes.weak.drop_path": (-0.1, 1),
    "recipes.weak.crop_padding": (-0.1, 1.1),
    "recipes.weak.crop_min_area": (0, 1.1),
    "recipes.weak.mixup_alpha": (-1,),
    "recipes.weak.cutmix_alpha": (-1,),
    "recipes.weak.randaugment.operations": (-1, 11),
    "recipes.weak.randaugment.magnitude": (-1, 10.5),
    "recipes.weak.randaugment.magnitude_std": (-0.5,),
    "comparisons.small_weak.fraction": (0, -0.5, 1.2),
    "comparisons.small_weak.subset_seed": (-1, 2**63, 1.0),
    "comparisons.tuned.sweep.seed": (-1,),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in RANGES.items() for value in values])
def test_a_value_out_of_range_is_refused(key: str, value: object) -> None:
    with refused(key, f"found {value!r}"):
        config.parse(change(full(), key, value))


EDGES = {
    "study.seeds.0": 2**63 - 1,
    "data.fractals.size": 8,
    "teachers.small.min_top1": 1,
    "recipes.weak.batch_size": 2,
    "recipes.weak.epochs": 0.01,
    "recipes.weak.weight_decay": 0,
    "comparisons.small_weak.fraction": 1,
    "comparisons.small_weak.subset_seed": 0,
    "recipes.weak.randaugment.operations": 0,
}


@pytest.mark.parametrize("key", EDGES)
def test_the_edge_of_a_range_is_allowed(key: str) -> None:
    config.parse(change(full(), key, EDGES[key]))


# Names and references


@pytest.mark.parametrize("name", ["a-b", "a.b", "A", "aB", "1x", "_a", "", "a b", "a\nb", "é", "a/b", "a@b"])
@pytest.mark.parametrize("section", ["data", "teachers", "recipes", "methods", "comparisons"])
def test_a_name_that_dvc_would_confuse_is_refused(section: str, name: str) -> None:
    content = full()
    content[section][name] = next(iter(content[section].values()))
    with refused(" ".join(f"{section}.{name}".split()), f"found {name!r}", "lower-case", "rename it"):
        config.parse(content)


@pytest.mark.parametrize("section", ["data", "teachers", "recipes", "methods", "comparisons"])
def test_a_name_that_is_no_text_is_refused(section: str) -> None:
    content = full()
    content[section][1] = next(iter(content[section].values()))
    with refused(f"{section}.1", "found 1", "a name"):
        config.parse(content)


REFERENCES = {
    "study.baseline": ("kdd", "kd"),
    "study.challengers.0": ("dk", "dkd"),
    "study.headline.data": ("fractal", "fractals"),
    "study.headline.recipes.0": ("week", "weak"),
    "study.tables.1": ("recipe", "recipes"),
    "data.fractals.source": ("fractal", "fractals"),
    "data.my_digits.source": ("digit", "digits"),
    "teachers.small.data": ("fractale", "fractals"),
    "teachers.small.recipe": ("wek", "weak"),
    "comparisons.small_weak.data": ("fraktals", "fractals"),
    "comparisons.small_weak.teacher": ("smal", "small"),
    "comparisons.small_weak.recipe": ("strng", "strong"),
    "comparisons.small_weak.methods.2": ("dkt", "dkd"),
    "recipes.weak.hard_loss": ("bcee", "bce"),
    "study.on_divergence": ("contine", "continue"),
}


@pytest.mark.parametrize("key", REFERENCES)
def test_an_unknown_name_is_refused_with_the_closest_one(key: str) -> None:
    found, meant = REFERENCES[key]
    shown = key.rpartition(".")[0] if key[-1].isdigit() and not key.endswith("cifar100") else key
    with refused(shown, f"found {found!r}", f"did you mean {meant!r}?"):
        config.parse(change(full(), key, found))
    with refused(shown, "found 'xyzzy'", "choose one of them"):
        config.parse(change(full(), key, "xyzzy"))


def test_names_in_a_sweep_are_checked() -> None:
    grids: dict[str, Any] = {"kd": {"temprature": [1, 2]}, "dkd": {"beta": [1, 2]}}
    with refused("comparisons.tuned.sweep.grids.kd", "found 'temprature'", "did you mean 'temperature'?"):
        config.parse(change(full(), "comparisons.tuned.sweep.grids", grids))
    with refused("comparisons.tuned.sweep.grids", "found 'dk'", "did you mean 'dkd'?"):
        config.parse(change(full(), "comparisons.tuned.sweep.grids", {"kd": {"temperature": [1]}, "dk": {"beta": [1]}}))


@pytest.mark.parametrize(
    ("grids", "counts"),
    [
        ({"kd": {"temperature": [1, 2, 4]}, "dkd": {"beta": [1, 2]}}, "{'kd': 3, 'dkd': 2}"),
        ({"kd": {"temperature": [1, 2], "weight": [1, 2]}, "dkd": {"beta": [1, 2, 4]}}, "{'kd': 4, 'dkd': 3}"),
        ({"kd": {"temperature": []}, "dkd": {"beta": []}}, "{'kd': 0, 'dkd': 0}"),
    ],
)
def test_a_sweep_tries_every_method_equally_often(grids: dict[str, Any], counts: str) -> None:
    with refused("comparisons.tuned.sweep.grids", f"found {counts}", "the same number of trials, at least one"):
        config.parse(change(full(), "comparisons.tuned.sweep.grids", grids))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("study.seeds", [1, 2, 1]),
        ("study.challengers", ["dkd", "dkd"]),
        ("study.tables", ["cost", "measures", "cost"]),
        ("study.headline.recipes", ["weak", "weak"]),
        ("study.challengers", ["dkd", "kd"]),  # the baseline would challenge itself
        ("comparisons.small_weak.methods", ["kd", "kd"]),
        ("comparisons.tuned.sweep.grids.kd.temperature", [1, 1.0]),
    ],
)
def test_a_duplicate_is_refused(key: str, value: list[Any]) -> None:
    with refused(key, "allowed: each value once", "remove the duplicate"):
        config.parse(change(full(), key, value))


def test_a_comparison_holds_the_baseline() -> None:
    with refused("comparisons.small_weak.methods", "found ['no_kd', 'dkd']", "'kd' (study.baseline)"):
        config.parse(change(full(), "comparisons.small_weak.methods", ["no_kd", "dkd"]))
    with refused("comparisons.small_weak.methods", "found []", "'kd' (study.baseline)"):
        config.parse(change(full(), "comparisons.small_weak.methods", []))
    with refused("comparisons.tuned.sweep.grids", "found ['dkd']", "'kd' (study.baseline)"):
        config.parse(change(full(), "comparisons.tuned.sweep.grids", {"dkd": {"beta": [1]}}))
    with refused("comparisons.tuned.sweep.grids", "found []"):
        config.parse(change(full(), "comparisons.tuned.sweep.grids", {}))
    with refused("comparisons.tuned.methods", "found []"):
        config.parse(change(full(), "comparisons.tuned.sweep", None))
    with refused("comparisons", "found {}", "at least 1"):
        config.parse(change(full(), "comparisons", {}))


def test_a_teacher_of_another_data_set_is_refused() -> None:
    content = full()
    content["teachers"]["other"] = content["teachers"]["small"] | {"data": "my_digits"}
    content["comparisons"]["small_weak"]["teacher"] = "other"
    with refused("comparisons.small_weak.teacher", "found 'other'", "a teacher of data set 'fractals'", "'my_digits'"):
        config.parse(content)


# Trials and the names of runs


def test_trials_are_every_point_in_the_order_of_the_file() -> None:
    assert grid_points({"b": [2.0, 1.0], "a": [5.0, 4.0]}) == [
        {"b": 2.0, "a": 5.0},
        {"b": 2.0, "a": 4.0},
        {"b": 1.0, "a": 5.0},
        {"b": 1.0, "a": 4.0},
    ]
    assert grid_points({}) == [{}]
    assert grid_points({"a": [1.0], "b": []}) == []


def test_a_trial_takes_what_its_grid_does_not_name_from_methods() -> None:
    content = change(full(), "methods.dkd.alpha", 0.5)
    params = config.parse(change(content, "comparisons.tuned.sweep.grids.dkd", {"beta": [0.25, 1e-7]}))
    trials = planned.trials_of(params.comparisons["tuned"], params)
    assert [trial.name for trial in trials] == [
        "trial/kd.temperature_1",
        "trial/kd.temperature_2",
        "trial/dkd.beta_0.25",
        "trial/dkd.beta_1e-07",
    ]
    own = {"hard_weight": 1.0, "weight": 1.0, "warmup": 0.0, "alpha": 0.5, "beta": 0.25, "temperature": 1.0}
    assert trials[2] == planned.Variant("trial/dkd.beta_0.25", "dkd", own, trial=True)
    assert planned.trials_of(params.comparisons["small_weak"], params) == []


def test_the_runs_of_the_tiny_study_by_hand() -> None:
    params = config.parse(tiny.content())
    small = [("small_weak", method, seed) for method in ("no_kd", "kd", "dkd", "dist") for seed in (0, 1)]
    large = [("large_strong", method, seed) for method in ("kd", "dkd") for seed in (0, 1)]
    tuned = [("tuned", f"trial/{trial}", 7) for trial in ("kd.temperature_1", "kd.temperature_2", "dkd.beta_1", "dkd.beta_2")]
    tuned += [("tuned", f"{method}_tuned", seed) for method in ("kd", "dkd") for seed in (0, 1)]
    assert planned.expected(params) == small + large + tuned


VALUES = st.lists(st.floats(0, 1e12) | st.floats(1, 1.0001), min_size=2, max_size=2, unique=True)


@given(VALUES, VALUES, VALUES)
def test_no_two_runs_of_a_study_share_a_name(temperature: list[float], weight: list[float], beta: list[float]) -> None:
    content = tiny.content()
    content["comparisons"]["both"] = content["comparisons"]["tuned"] | {"methods": ["kd", "dkd", "no_kd"]}
    grids = {"kd": {"temperature": temperature, "weight": weight}, "dkd": {"beta": beta, "weight": weight}}
    content["comparisons"]["both"]["sweep"] = {"seed": 0, "grids": grids}
    names = planned.expected(config.parse(content))
    assert len({(comparison, variant.lower(), seed) for comparison, variant, seed in names}) == len(names)
    assert {(name, *run[1:]) for name in ("both",) for run in names if run[0] == name} == set(
        planned.expected_runs(config.parse(content), "both")
    )


@given(st.floats(0, 1e30), st.floats(0, 1e30))
def test_a_name_tells_values_apart_that_differ_in_the_last_bit(a: float, b: float) -> None:
    assume(a != b)
    params = config.parse(change(tiny.content(), "comparisons.tuned.sweep.grids", {"kd": {"weight": [a, b]}}))
    first, second = planned.trials_of(params.comparisons["tuned"], params)
    assert [float(trial.name.rpartition("weight_")[2]) for trial in (first, second)] == [a, b]


def test_yaml_as_written_is_yaml_as_read(tmp_path: Path) -> None:
    """What tiny.write leaves is what these tests changed: no fault of theirs can hide in the writing."""
    tiny.write(tmp_path, full())
    assert YAML(typ="safe", pure=True).load((tmp_path / "params.yaml").read_text()) == full() == config.read_yaml(tmp_path)


def test_entries_that_only_wait_to_be_uncommented_are_accepted() -> None:
    before, data, after = re.split(r"(?m)^(?=data:|teachers:)", (tiny.ROOT / "params.yaml").read_text("utf-8"))
    woken = re.sub(r"(?m)^  # ((?:  )?\w+:.*)$", r"  \1", data)
    sources = {entry.source for entry in config.parse(YAML(typ="safe", pure=True).load(before + woken + after)).data.values()}
    assert sources == set(SOURCES)
