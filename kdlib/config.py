"""params.yaml -> frozen, typed objects. Nothing else reads YAML, and nothing runs with a value that was not checked here."""

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

FILE = "params.yaml"
NAME = re.compile(r"[a-z][a-z0-9_]*")  # no "-" and no ".": DVC joins names with the one and splits keys at the other


class Refused(ValueError):
    """The study must not start, or go on, like this. The message is one line for the person who wrote params.yaml."""


def refuse(key: str, found: object, allowed: str, do: str) -> Refused:
    """Error of one line: the key in params.yaml, what was found, what is allowed, what to do."""
    return Refused(f"{FILE}: {key}: found {found!r}; allowed: {allowed}; {do}")


def known(key: str, found: str, names: Iterable[str]) -> str:
    """``found``, if it is one of ``names``; otherwise raise ``Refused`` with the closest one."""
    names = sorted(names)
    if found in names:
        return found
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.4)
    raise refuse(key, found, ", ".join(names[:20]) or "nothing is defined", f"did you mean {close[0]!r}?" if close else "choose one of them")


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
HeldOut = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Pixels = Annotated[int, Field(ge=8, le=1024)]


class Digits(Part):
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 (UCI optdigits test set)."""

    source: Literal["digits"]
    val_fraction: HeldOut  # of all images
    test_fraction: HeldOut
    seed: Seed  # draws the stratified split
    hflip: Share  # probability that a training view is mirrored


class Fractals(Part):
    """Iterated function systems: a class is a system, an image is a jittered rendering of it."""

    source: Literal["fractals"]
    classes: Annotated[int, Field(ge=2)]
    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    size: Pixels
    jitter: Share  # how far an image's system may lie from its class's
    points: Count  # of the chaos game, per image
    seed: Seed
    hflip: Share


class Cifar100(Part):
    """CIFAR-100 in its python pickles, as torchvision reads them."""

    source: Literal["cifar100"]
    path: str
    download: bool
    val_fraction: HeldOut  # of the official training split; the official test split is the test split
    seed: Seed
    hflip: Share


class Folder(Part):
    """One folder per class, images below it, as timm's folder reader finds them."""

    source: Literal["folder"]
    path: str
    size: Pixels  # images are decoded once to size x size
    val_fraction: HeldOut
    test_fraction: HeldOut
    seed: Seed
    hflip: Share


class Imagenet(Part):
    """ImageNet-1k unpacked as torchvision's ImageNet expects it: train/<wnid>/ and val/<wnid>/."""

    source: Literal["imagenet"]
    path: str
    size: Pixels
    val_fraction: HeldOut  # of the official training split; the official validation split is the test split
    seed: Seed
    hflip: Share


DataSource = Annotated[Digits | Fractals | Cifar100 | Folder | Imagenet, Field(discriminator="source")]


class RandAugmentParams(Part):
    """Cubuk et al., CVPRW 2020, in timm's terms: ``rand-m<magnitude>-n<operations>-mstd<magnitude_std>``."""

    operations: Annotated[int, Field(ge=0, le=10)]  # 0 switches it off
    magnitude: Annotated[float, Field(ge=0, le=10)]
    magnitude_std: NonNegative


class Recipe(Part):
    """How any student is trained."""

    epochs: Positive  # passes over the *whole* training split; a fraction of it is passed over more often
    batch_size: Annotated[int, Field(ge=2)]
    optimizer: str  # timm's name
    learning_rate: Positive
    weight_decay: NonNegative
    warmup: Annotated[float, Field(ge=0, lt=1)]  # share of all steps, linear from 0; then a cosine to 0
    hard_loss: Literal["ce", "bce"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    crop_padding: Share  # shifts by up to this share of the image side
    crop_min_area: Fraction  # resized crops of at least this share of the image; 1 switches them off
    mixup_alpha: NonNegative  # 0 switches it off
    cutmix_alpha: NonNegative
    randaugment: RandAugmentParams


class Teacher(Part):
    """Trained here by a recipe, or loaded from a checkpoint of the named model."""

    data: str
    model: str
    recipe: str
    seed: Seed
    checkpoint: str | None  # a .safetensors or .pth file of this model; null trains it
    min_top1: Share  # on the test split; nobody learns from a teacher below it


class Sweep(Part):
    """A grid of each method's parameters, tried at one seed; the validation split chooses one point for each method."""

    seed: Seed
    grids: dict[str, dict[str, list[float]]]


class Comparison(Part):
    """Everything fixed but method and seed."""

    data: str
    fraction: Fraction
    teacher: str
    student: str
    recipe: str
    methods: list[str]
    sweep: Sweep | None


class Headline(Part):
    """Which comparisons make the main table: this data set, every fraction, the weak recipe against the strong one."""

    data: str
    weak: str
    strong: str


class StudyParams(Part):
    seeds: Annotated[list[Seed], Field(min_length=1)]
    baseline: str
    challengers: list[str]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    on_divergence: Literal["continue", "fail"]
    checkpoint_seconds: NonNegative
    headline: Headline


class Study(Part):
    """All of params.yaml."""

    study: StudyParams
    data: dict[str, DataSource]
    teachers: dict[str, Teacher]
    recipes: dict[str, Recipe]
    methods: dict[str, dict[str, float]]
    comparisons: dict[str, Comparison]


def find_root(start: Path | None = None) -> Path:
    """The folder of the study: the nearest one at or above ``start`` (the working directory) that holds params.yaml."""
    start = (start or Path(os.getcwd())).resolve()
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return folder
    raise Refused(f"{FILE}: found none in {start} or above it; run from inside the project")


def read(root: Path) -> dict[str, Any]:
    """params.yaml by YAML 1.2 rules, exactly as DVC reads it (PyYAML takes ``1e-3`` for a string)."""
    try:
        content = YAML(typ="safe", pure=True).load((root / FILE).read_text("utf-8"))
    except YAMLError as error:
        raise Refused(f"{FILE}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise Refused(f"{FILE}: found {type(content).__name__}; allowed: sections {sorted(Study.model_fields)}")
    return content


def load(root: Path) -> Study:
    """The checked study of ``root/params.yaml``. Raises ``Refused`` with one line for the first thing that is wrong."""
    return parse(read(root))


def parse(content: Mapping[str, Any]) -> Study:
    """Check types, ranges, names and references. Raises ``Refused``."""
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise _explain(error, content) from None
    _check_names(study)
    _check_references(study)
    return study


def trials(grid: Mapping[str, list[float]]) -> list[dict[str, float]]:
    """Every point of a grid, in the order in which params.yaml writes it."""
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


def _check_names(study: Study) -> None:
    for section in ("data", "teachers", "recipes", "methods", "comparisons"):
        for name in getattr(study, section):
            if not NAME.fullmatch(name):
                raise refuse(f"{section}.{name}", name, "lower-case letters, digits and _ (DVC's stage names would collide on others)", "rename it")


def _check_references(study: Study) -> None:
    known("study.baseline", study.study.baseline, study.methods)
    for name in study.study.challengers:
        known("study.challengers", name, study.methods)
    _check_unique("study.seeds", study.study.seeds)
    known("study.headline.data", study.study.headline.data, study.data)
    known("study.headline.weak", study.study.headline.weak, study.recipes)
    known("study.headline.strong", study.study.headline.strong, study.recipes)
    for name, teacher in study.teachers.items():
        known(f"teachers.{name}.data", teacher.data, study.data)
        known(f"teachers.{name}.recipe", teacher.recipe, study.recipes)
    for name, comparison in study.comparisons.items():
        _check_comparison(f"comparisons.{name}", comparison, study)


def _check_comparison(key: str, comparison: Comparison, study: Study) -> None:
    known(f"{key}.data", comparison.data, study.data)
    known(f"{key}.recipe", comparison.recipe, study.recipes)
    teacher = study.teachers[known(f"{key}.teacher", comparison.teacher, study.teachers)]
    if teacher.data != comparison.data:
        raise refuse(f"{key}.teacher", comparison.teacher, f"a teacher of data set {comparison.data!r} (this one knows {teacher.data!r})", "choose or add one")
    for name in comparison.methods:
        known(f"{key}.methods", name, study.methods)
    _check_unique(f"{key}.methods", comparison.methods)
    if comparison.sweep is None:
        if not comparison.methods:
            raise refuse(f"{key}.methods", [], "at least one method, or a sweep", "name one")
        return
    counts = {}
    for name, grid in comparison.sweep.grids.items():
        known(f"{key}.sweep.grids", name, study.methods)
        for parameter, values in grid.items():
            known(f"{key}.sweep.grids.{name}", parameter, study.methods[name])
            _check_unique(f"{key}.sweep.grids.{name}.{parameter}", values)
        counts[name] = len(trials(grid))
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise refuse(f"{key}.sweep.grids", counts, "the same number of trials, at least one, for every method", "a fair choice needs equal effort: even the grids out")


def _check_unique(key: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise refuse(key, values, "each value once", "remove the duplicate")


def _explain(error: ValidationError, content: object) -> Refused:
    """The first finding of pydantic as one line of ours."""
    first = error.errors()[0]
    tags = {"digits", "fractals", "cifar100", "folder", "imagenet"}
    path = list(first["loc"])
    if len(path) > 2 and path[0] == "data" and path[2] in tags:
        del path[2]  # pydantic puts the tag of the union there
    key = ".".join(str(step) for step in path)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        fields = _fields(path[:-1], content)
        close = difflib.get_close_matches(str(path[-1]), fields, n=1)
        return refuse(key, path[-1], f"the keys {', '.join(fields)}", f"unknown key: did you mean {close[0]!r}?" if close else "unknown key: remove it")
    if kind == "missing":
        return refuse(key, "nothing", "a value", "add this key")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = first["input"].get("source") if isinstance(first["input"], dict) else first["input"]
        close = difflib.get_close_matches(str(found), tags, n=1)
        return refuse(f"{key}.source", found, ", ".join(sorted(tags)), f"did you mean {close[0]!r}?" if close else "choose one of them")
    if isinstance(first["input"], str) and kind in ("float_type", "int_type"):
        return refuse(key, first["input"], "a number", "this is text to YAML: remove the quotes, and write 5.0e-4 rather than 5e-4")
    allowed = first["msg"].removeprefix("Input should be ")
    if kind == "literal_error":
        close = difflib.get_close_matches(str(first["input"]), re.findall(r"'(.*?)'", str(context["expected"])), n=1)
        return refuse(key, first["input"], str(context["expected"]), f"did you mean {close[0]!r}?" if close else "choose one of them")
    return refuse(key, first["input"], allowed, "change it")


def _fields(path: list[Any], content: Any) -> list[str]:
    """The known keys at a place in params.yaml."""
    sections: dict[str, type[Part]] = {"teachers": Teacher, "recipes": Recipe, "comparisons": Comparison}
    sources: dict[str, type[Part]] = {"digits": Digits, "fractals": Fractals, "cifar100": Cifar100, "folder": Folder, "imagenet": Imagenet}
    part: type[Part] = Study
    if path:
        part = {"study": StudyParams, **sections}.get(path[0], Study)
        if path[0] == "data":
            part = sources[content["data"][path[1]]["source"]]
        if path[-1] in ("randaugment", "headline", "sweep"):
            part = {"randaugment": RandAugmentParams, "headline": Headline, "sweep": Sweep}[path[-1]]
    return list(part.model_fields)
