"""arXiv 2205.10536: d = 1 - correlation, over each image's classes and over each class's images, both averaged."""

import numpy as np

from tests.references.common import Array, Given, Said, correlation, log_softmax

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, beta: float, gamma: float, tau: float) -> dict[str, float]:
    p = np.exp([log_softmax(z) for z in student.logits / tau])
    q = np.exp([log_softmax(z) for z in teacher.logits / tau])
    inter = np.mean([1 - correlation(p[i, :], q[i, :]) for i in range(p.shape[0])])
    intra = np.mean([1 - correlation(p[:, j], q[:, j]) for j in range(p.shape[1])])
    return {"inter": tau**2 * beta * float(inter), "intra": tau**2 * gamma * float(intra)}
