"""params.yaml -> frozen, typed objects. Nothing else reads YAML, and nothing runs with a value that was not checked here."""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kdlib.schema import (
    PARTS,
    SOURCES,
    TABLES,
    Cifar100,
    Comparison,
    ComputeParams,
    DataSource,
    Digits,
    Folder,
    Fractals,
    Headline,
    Imagenet,
    Launch,
    Originals,
    Part,
    Published,
    RandAugmentParams,
    Recipe,
    Rows,
    Study,
    StudyParams,
    Sweep,
    Teacher,
)

__all__ = [
    "FILE",
    "Cifar100",
    "Comparison",
    "ComputeParams",
    "DataSource",
    "Digits",
    "Folder",
    "Fractals",
    "Headline",
    "Imagenet",
    "Launch",
    "Originals",
    "Published",
    "RandAugmentParams",
    "Recipe",
    "Refused",
    "Rows",
    "Study",
    "StudyParams",
    "Sweep",
    "Teacher",
    "check",
    "find_root",
    "known",
    "load",
    "parse",
    "read",
    "refuse",
    "some",
    "trials",
]

FILE = "params.yaml"
NAME = re.compile(r"[a-z][a-z0-9_]*")  # no "-" and no ".": DVC joins names with the one and splits keys at the other
LONGEST = 200  # characters of what was found that a message repeats
Form = TypeVar("Form", bound=Part)

# pydantic's words where they are Python's rather than YAML's; filled in with the limits of the field
_ALLOWED = {
    "dict_type": "keys with their values",
    "model_type": "keys with their values",
    "model_attributes_type": "keys with their values",
    "list_type": "a list",
    "string_type": "a name or text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:g}",
}


class Refused(ValueError):
    """The study must not start, or go on, like this. The message is one line for the person who wrote params.yaml."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows (IPython asks for it): the message names the cause, 60 lines of our own code would bury it."""
        return [f"Refused: {self}"]


def refuse(key: str, found: object, allowed: str, do: str) -> Refused:
    """Error of one line: the key in params.yaml, what was found, what is allowed, what to do."""
    shown = "nothing" if found is None else repr(found)
    if len(shown) > LONGEST:
        shown = shown[:LONGEST] + "..."
    return Refused(" ".join(f"{FILE}: {key}: found {shown}; allowed: {allowed}; {do}".split()))


def known(key: str, found: str, names: Iterable[str]) -> str:
    """``found``, if it is one of ``names``; otherwise raise ``Refused`` with the closest one."""
    names = sorted(names)
    if found in names:
        return found
    raise refuse(key, found, ", ".join(names[:20]) or "nothing is defined", _closest(found, names))


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of many names for a message of one line, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def find_root(start: Path | None = None) -> Path:
    """The folder of the study: the nearest one at or above ``start`` (the working directory) that holds params.yaml."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return folder
    raise Refused(f"{FILE}: found none in {start} or above it; allowed: a folder that holds one; run from inside the project")


def read(root: Path) -> dict[Any, Any]:
    """params.yaml by YAML 1.2 rules, exactly as DVC reads it (PyYAML takes ``1e-3`` for a string). Raises ``Refused``."""
    try:
        content = YAML(typ="safe", pure=True).load((root / FILE).read_text("utf-8"))
    except OSError as error:
        raise Refused(f"{FILE}: found none that can be read in {root} ({error.strerror}); allowed: a file; restore it") from None
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start}", error.object[error.start : error.start + 1], "text in UTF-8", "save the file anew") from None
    except YAMLError as error:
        raise _unreadable(error) from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise Refused(f"{FILE}: found {found}; allowed: the sections {', '.join(Study.model_fields)}; restore them")
    return content


def load(root: Path) -> Study:
    """The checked study of ``root/params.yaml``. Raises ``Refused`` with one line for the first thing that is wrong."""
    return parse(read(root))


def parse(content: Mapping[Any, Any]) -> Study:
    """Check types, ranges, names and references. Raises ``Refused``."""
    study = check(Study, content, PARTS)
    _check_names(study)
    _check_references(study)
    return study


def check(form: type[Form], content: Mapping[Any, Any], parts: Mapping[str, type[Part]]) -> Form:
    """Types and ranges of a whole params.yaml of this form; ``parts`` as in ``schema.PARTS``. Raises ``Refused``."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise _explain(error, content, parts) from None


def trials(grid: Mapping[str, list[float]]) -> list[dict[str, float]]:
    """Every point of a grid, in the order in which params.yaml writes it."""
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


def _check_names(study: Study) -> None:
    for section in ("data", "teachers", "recipes", "methods", "comparisons"):
        for name in getattr(study, section):
            if not NAME.fullmatch(name):
                allowed = "a lower-case letter, then lower-case letters, digits and _ (DVC's stage names would collide on others)"
                raise refuse(f"{section}.{name}", name, allowed, "rename it")


def _check_references(study: Study) -> None:
    general = study.study
    known("study.baseline", general.baseline, study.methods)
    for name in general.challengers:
        known("study.challengers", name, study.methods)
    _check_unique("study.challengers", [*general.challengers, general.baseline])
    _check_unique("study.seeds", general.seeds)
    known("study.headline.data", general.headline.data, study.data)
    for name in general.headline.recipes:
        known("study.headline.recipes", name, study.recipes)
    _check_unique("study.headline.recipes", general.headline.recipes)
    for name in general.tables:
        known("study.tables", name, TABLES)
    _check_unique("study.tables", general.tables)
    for name in general.published:
        known("study.published", name, study.comparisons)
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
        allowed = f"a teacher of data set {comparison.data!r} (this one knows the classes of {teacher.data!r})"
        raise refuse(f"{key}.teacher", comparison.teacher, allowed, "choose or add one")
    for name in comparison.methods:
        known(f"{key}.methods", name, study.methods)
    _check_unique(f"{key}.methods", comparison.methods)
    if comparison.methods or comparison.sweep is None:
        _check_baseline(f"{key}.methods", comparison.methods, study)
    if comparison.sweep is not None:
        _check_grids(f"{key}.sweep.grids", comparison.sweep.grids, study)


def _check_grids(key: str, grids: Mapping[str, Mapping[str, list[float]]], study: Study) -> None:
    for name, grid in grids.items():
        known(key, name, study.methods)
        for parameter, values in grid.items():
            known(f"{key}.{name}", parameter, study.methods[name])
            _check_unique(f"{key}.{name}.{parameter}", values)
    _check_baseline(key, list(grids), study)
    counts = {name: len(trials(grid)) for name, grid in grids.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        allowed = "the same number of trials, at least one, for every method"
        raise refuse(key, counts, allowed, "a fair choice needs equal effort: even the grids out")


def _check_baseline(key: str, methods: list[str], study: Study) -> None:
    if study.study.baseline not in methods:
        allowed = f"methods that include {study.study.baseline!r} (study.baseline)"
        raise refuse(key, methods, allowed, "add it: the others are compared with it, paired by seed")


def _check_unique(key: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise refuse(key, values, "each value once", "remove the duplicate")


def _unreadable(error: YAMLError) -> Refused:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    key = "not YAML" if mark is None else f"line {mark.line + 1}"
    found = str(problem or error).removeprefix("found ").removeprefix("but found ")
    return refuse(key, found, "YAML 1.2, every key once", "correct it")


def _explain(error: ValidationError, content: Mapping[Any, Any], parts: Mapping[str, type[Part]]) -> Refused:
    """The first finding of pydantic as one line of ours."""
    first = error.errors()[0]
    kind, found, limits = first["type"], first["input"], first.get("ctx", {})
    path = [str(step) for step in first["loc"] if step != "[key]"]  # pydantic's word for "the key, not its value"
    if len(path) > 2 and path[0] == "data":
        del path[2]  # which member of the union it tried
    key = ".".join(path)
    if kind == "extra_forbidden":
        fields = list(_part(path[:-1], content, parts).model_fields)
        close = difflib.get_close_matches(path[-1], fields, n=1)
        return refuse(key, path[-1], f"the keys {', '.join(fields)}", f"unknown key: did you mean {close[0]!r}?" if close else "remove it")
    if kind == "missing":
        return refuse(key, None, "a value", "add this key")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        found = found.get("source") if isinstance(found, Mapping) else found
        return refuse(f"{key}.source", found, ", ".join(SOURCES), _closest(found, SOURCES))
    if kind == "literal_error":
        return refuse(key, found, limits["expected"], _closest(found, re.findall(r"'(.*?)'", limits["expected"])))
    allowed = _ALLOWED.get(kind, first["msg"].removeprefix("Input should be ")).format_map(limits)
    if isinstance(found, str) and kind in ("float_type", "int_type"):
        return refuse(key, found, allowed, "this is text: write a number, without quotes, and 5.0e-4 rather than 5e-4")
    return refuse(key, found, allowed, "change it")


def _part(path: list[str], content: Mapping[Any, Any], parts: Mapping[str, type[Part]]) -> type[Part]:
    """The form of what stands at a place in params.yaml."""
    if path and path[0] == "data":
        return SOURCES[content["data"][path[1]]["source"]]
    chosen = 2 if path[:2] == ["study", "published"] else len(path) if path[:1] == ["study"] else 1  # the step that is a person's own name
    named = path[:chosen] + [step for step in path[chosen + 1 :] if not step.isdecimal()]  # nor which of a list
    return parts[".".join(named)]


def _closest(found: object, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, list(names), n=1, cutoff=0.4) if isinstance(found, str) else []
    return f"did you mean {close[0]!r}?" if close else "choose one of them"
