"""arXiv 2106.05237: sum_c q_c (log q_c - log p_c) at temperature T, and nothing of the label."""

import numpy as np

from tests.references.common import Array, Given, Said, log_softmax

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, temperature: float) -> dict[str, float]:
    total = 0.0
    for s, t in zip(student.logits, teacher.logits, strict=True):
        logp, logq = log_softmax(s / temperature), log_softmax(t / temperature)
        total += sum(np.exp(logq[c]) * (logq[c] - logp[c]) for c in range(len(s)))
    return {"kd": temperature**2 * total / len(student.logits)}
