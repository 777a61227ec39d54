"""arXiv 1907.09682: G = Q Q^T, rows divided by their norms, ||G_t - G_s||_F^2 / b^2."""

import numpy as np

from tests.references.common import Array, Given, Said

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def similarity(maps: Array) -> Array:
    rows = []
    for one in maps:
        row = np.array([(one * other).sum() for other in maps])
        norm = np.sqrt((row**2).sum())
        rows.append(row / norm if norm > 0 else row)
    return np.array(rows)


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array]) -> dict[str, float]:
    gap = similarity(teacher.maps[-1]) - similarity(student.maps[-1])
    return {"similarity": float((gap**2).sum() / len(gap) ** 2)}
