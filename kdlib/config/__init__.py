"""params.yaml as frozen, typed objects; the forms of its sections are in ``kdlib.config.schema``."""

from kdlib.config.reader import check, find_root, load, parse, read
from kdlib.config.schema import Params

__all__ = ["Params", "check", "find_root", "load", "parse", "read"]
