"""Distillation losses, one file per method. A new one is added by its file, its entry here, and its reference in tests/references."""

from kdlib.losses import at, bkl, cc, crd, dist, dkd, fitnet, funmatch, kd, lskd, nkd, no_kd, ofa, reviewkd, rkd, sp, vid
from kdlib.losses.base import Method
from kdlib.losses.hard import HARD
from kdlib.types import Feature

METHODS: dict[str, type[Method]] = {
    "no_kd": no_kd.NoKD,
    "kd": kd.KD,
    "at": at.AT,
    "bkl": bkl.BKL,
    "cc": cc.CC,
    "crd": crd.CRD,
    "dist": dist.DIST,
    "dkd": dkd.DKD,
    "fitnet": fitnet.FitNet,
    "funmatch": funmatch.FunMatch,
    "lskd": lskd.LSKD,
    "nkd": nkd.NKD,
    "ofa": ofa.OFA,
    "reviewkd": reviewkd.ReviewKD,
    "rkd": rkd.RKD,
    "sp": sp.SP,
    "vid": vid.VID,
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
