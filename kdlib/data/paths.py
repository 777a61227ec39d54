"""Paths that params.yaml names, and what must lie there."""

import os
import re
from pathlib import Path

from kdlib import config
from kdlib.errors import refuse

LAYOUT = "a folder that holds train/ and val/"


def resolve_path(key: str, path: str) -> Path:
    """Resolve a path of params.yaml: absolute, or from the home folder (~), or relative to the folder of params.yaml.

    ``$NAME`` in it stands for an environment variable. Raises ``Refused`` about ``key`` if it is not set.
    """
    given = Path(os.path.expandvars(path)).expanduser()
    if unset := re.search(r"\$\w+|\$\{.*?\}", str(given)):
        do = f"set {unset.group().strip('${}')} to where the images lie, or write the path here"
        raise refuse(key, path, "a path whose environment variables are set", do)
    return given if given.is_absolute() else config.find_root() / given


def check_folder(key: str, root: Path, allowed: str) -> None:
    """Raise ``Refused`` about ``key`` if there is no such folder. ``allowed``: what it is to hold, for people."""
    if not root.is_dir():
        raise refuse(key, str(root), allowed, "correct the path")


def check_layout(key: str, root: Path) -> None:
    """Raise ``Refused`` about ``key`` if this is no folder that holds train/ and val/."""
    check_folder(key, root, LAYOUT)
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        present = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        fault = f"no {' and no '.join(str(root / name) for name in missing)}, but {present}"
        raise refuse(key, fault, LAYOUT, "correct the path")
