"""params.yaml -> frozen, typed objects. Nothing else reads YAML, and nothing runs with a value that was not checked here."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kdlib.config.references import check_names, check_references
from kdlib.config.schema import SECTIONS, SOURCES, Params, Section
from kdlib.errors import FILE, Refused, closest, refuse

Form = TypeVar("Form", bound=Section)

# pydantic's words where they are Python's rather than YAML's; filled in with the limits of the field
_ALLOWED = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "keys with their values"),
    "list_type": "a list",
    "string_type": "a name or text",
    "bool_type": "true or false",
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    "float_type": "a number",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:g}",
}


def find_root(start: Path | None = None) -> Path:
    """The folder of the study: the nearest one at or above ``start`` (the working directory) that holds params.yaml."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return folder
    raise Refused(f"{FILE}: found none in {start} or above it; allowed: a folder that holds one; run from inside the project")


def read_yaml(root: Path) -> dict[Any, Any]:
    """params.yaml by YAML 1.2 rules, exactly as DVC reads it (PyYAML takes ``1e-3`` for a string). Raises ``Refused``."""
    try:
        content = YAML(typ="safe", pure=True).load((root / FILE).read_text("utf-8"))
    except OSError as error:
        raise Refused(f"{FILE}: found none that can be read in {root} ({error.strerror}); allowed: a file; restore it") from None
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start}", error.object[error.start : error.start + 1], "text in UTF-8", "save the file anew") from None
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        key = "not YAML" if mark is None else f"line {mark.line + 1}"
        found = str(problem or error).removeprefix("found ").removeprefix("but found ")
        raise refuse(key, found, "YAML 1.2, every key once", "correct it") from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise Refused(f"{FILE}: found {found}; allowed: the sections {', '.join(Params.model_fields)}; restore them")
    return content


def load(root: Path) -> Params:
    """The checked study of ``root/params.yaml``. Raises ``Refused`` with one line for the first thing that is wrong."""
    return parse(read_yaml(root))


def parse(content: Mapping[Any, Any]) -> Params:
    """Check types, ranges, names and references. Raises ``Refused``."""
    params = validate(Params, content, SECTIONS)
    check_names(params)
    check_references(params)
    return params


def validate(form: type[Form], content: Mapping[Any, Any], parts: Mapping[str, type[Section]]) -> Form:
    """Check types and ranges of a whole params.yaml of this form; ``parts`` as in ``schema.SECTIONS``. Raises ``Refused``."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise _explain(error, content, parts) from None


def _explain(error: ValidationError, content: Mapping[Any, Any], parts: Mapping[str, type[Section]]) -> Refused:
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
        return refuse(f"{key}.source", found, ", ".join(SOURCES), closest(found, SOURCES))
    if kind == "literal_error":
        return refuse(key, found, limits["expected"], closest(found, re.findall(r"'(.*?)'", limits["expected"])))
    allowed = _ALLOWED.get(kind, first["msg"].removeprefix("Input should be ")).format_map(limits)
    if isinstance(found, str) and kind in ("float_type", "int_type"):
        return refuse(key, found, allowed, "this is text: write a number, without quotes, and 5.0e-4 rather than 5e-4")
    return refuse(key, found, allowed, "change it")


def _part(path: list[str], content: Mapping[Any, Any], parts: Mapping[str, type[Section]]) -> type[Section]:
    """The form of what stands at a place in params.yaml."""
    if path and path[0] == "data":
        return SOURCES[content["data"][path[1]]["source"]]
    chosen = 2 if path[:2] == ["study", "published"] else len(path) if path[:1] == ["study"] else 1  # the step that is a person's own name
    named = path[:chosen] + [step for step in path[chosen + 1 :] if not step.isdecimal()]  # nor which of a list
    return parts[".".join(named)]
