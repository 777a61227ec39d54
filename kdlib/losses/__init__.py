"""Distillation losses, one file per method. A new one is added by its file, a line here, and its reference in tests/references."""

from kdlib.losses.base import Method
from kdlib.losses.bkl import BKL
from kdlib.losses.dist import DIST
from kdlib.losses.dkd import DKD
from kdlib.losses.funmatch import FunMatch
from kdlib.losses.hard import HARD
from kdlib.losses.kd import KD
from kdlib.losses.lskd import LSKD
from kdlib.losses.nkd import NKD
from kdlib.losses.no_kd import NoKD
from kdlib.losses.ofa import OFA
from kdlib.losses.reviewkd import ReviewKD

METHODS: dict[str, type[Method]] = {
    "no_kd": NoKD,
    "kd": KD,
    "bkl": BKL,
    "dist": DIST,
    "dkd": DKD,
    "funmatch": FunMatch,
    "lskd": LSKD,
    "nkd": NKD,
    "ofa": OFA,
    "reviewkd": ReviewKD,
}

__all__ = ["HARD", "METHODS", "Method"]
