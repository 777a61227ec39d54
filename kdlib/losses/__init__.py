"""Distillation losses, one file per method. A new one is added by its file, a line here, and its reference in tests/references."""

from kdlib.losses.at import AT
from kdlib.losses.base import Method
from kdlib.losses.bkl import BKL
from kdlib.losses.cc import CC
from kdlib.losses.crd import CRD
from kdlib.losses.dist import DIST
from kdlib.losses.dkd import DKD
from kdlib.losses.fitnet import FitNet
from kdlib.losses.funmatch import FunMatch
from kdlib.losses.hard import HARD
from kdlib.losses.kd import KD
from kdlib.losses.lskd import LSKD
from kdlib.losses.nkd import NKD
from kdlib.losses.no_kd import NoKD
from kdlib.losses.ofa import OFA
from kdlib.losses.reviewkd import ReviewKD
from kdlib.losses.rkd import RKD
from kdlib.losses.sp import SP
from kdlib.losses.vid import VID

METHODS: dict[str, type[Method]] = {
    "no_kd": NoKD,
    "kd": KD,
    "at": AT,
    "bkl": BKL,
    "cc": CC,
    "crd": CRD,
    "dist": DIST,
    "dkd": DKD,
    "fitnet": FitNet,
    "funmatch": FunMatch,
    "lskd": LSKD,
    "nkd": NKD,
    "ofa": OFA,
    "reviewkd": ReviewKD,
    "rkd": RKD,
    "sp": SP,
    "vid": VID,
}

__all__ = ["HARD", "METHODS", "Method"]
