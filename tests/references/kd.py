"""arXiv 1503.02531, section 2; the factor T^2 is its last paragraph."""

import numpy as np

from tests.references.common import Array, Given, Said, kl, log_softmax

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, temperature: float) -> dict[str, float]:
    pairs = zip(student.logits / temperature, teacher.logits / temperature, strict=True)
    return {"kd": temperature**2 * float(np.mean([kl(log_softmax(t), log_softmax(s)) for s, t in pairs]))}
