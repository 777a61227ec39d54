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
from kdlib.types import Feature

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

__all__ = ["HARD", "METHODS", "Method", "looks_at"]


def looks_at(method: type[Method]) -> str:
    """What a method asks for, in words; "hint: ..." (a term of the literature) where it asks the teacher for more than logits."""
    if not method.asks_teacher:
        return "no teacher"
    hints, own = (
        [part.value for part in Feature if part in asks and part is not Feature.LOGITS]
        for asks in (method.asks_teacher, method.asks_student)
    )
    if hints:
        return f"hint: {', '.join(hints)}"
    return ", ".join([Feature.LOGITS.value, *(f"student's {part}" for part in own)])
