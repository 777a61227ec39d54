"""Distillation losses, one file per method. A new one is added by its file, a line here, and its reference in tests/references.py."""

from kdlib.losses.base import Method
from kdlib.losses.dist import DIST
from kdlib.losses.dkd import DKD
from kdlib.losses.hard import HARD
from kdlib.losses.kd import KD
from kdlib.losses.no_kd import NoKD

METHODS: dict[str, type[Method]] = {"no_kd": NoKD, "kd": KD, "dkd": DKD, "dist": DIST}

__all__ = ["HARD", "METHODS", "Method"]
