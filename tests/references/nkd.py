"""arXiv 2303.13005: the target by itself at T = 1, and the other classes' probabilities at T, renormalised to sum 1.

Not zero at student = teacher: both terms are cross-entropies, and the target's has a gradient wherever the student is not certain.
"""

import numpy as np

from tests.references.common import Array, Given, Said, log_softmax

HOLDS = {"shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, gamma: float, temperature: float) -> dict[str, float]:
    target, others = [], []
    for s, t, y in zip(student.logits, teacher.logits, given.labels, strict=True):
        target.append(-np.exp(log_softmax(t)[y]) * log_softmax(s)[y])
        rest = [i for i in range(len(s)) if i != y]
        logp, logq = log_softmax(s / temperature)[rest], log_softmax(t / temperature)[rest]
        logp, logq = logp - np.logaddexp.reduce(logp), logq - np.logaddexp.reduce(logq)
        others.append(-sum(np.exp(b) * a for a, b in zip(logp, logq, strict=True)))
    return {"target": float(np.mean(target)), "others": gamma * temperature**2 * float(np.mean(others))}
