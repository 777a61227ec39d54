"""params.yaml as frozen, typed objects; the forms of its sections are in ``kdlib.config.schema``."""

from kdlib.config.reader import find_root, load, parse, read_yaml, validate
from kdlib.config.schema import Params

__all__ = ["Params", "find_root", "load", "parse", "read_yaml", "validate"]
