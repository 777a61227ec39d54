"""arXiv 1904.05068: Huber loss of distances over their mean, and of cosines at each image between each two others."""

import numpy as np

from tests.references.common import Array, Given, Said

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def huber(x: Array, y: Array) -> Array:
    gap = np.abs(x - y)
    return np.where(gap <= 1, gap**2 / 2, gap - 0.5)


def distances(f: Array) -> Array:
    found = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in f] for a in f])
    return found / found[found > 0].mean() if (found > 0).any() else found


def cosines(f: Array) -> Array:
    def towards(a: Array, b: Array) -> Array:
        norm = np.sqrt(((a - b) ** 2).sum())
        return (a - b) / norm if norm > 0 else a - b

    return np.array([[[towards(a, vertex) @ towards(b, vertex) for b in f] for a in f] for vertex in f])


def terms(
    student: Said, teacher: Said, given: Given, own: dict[str, Array], *, distance_weight: float, angle_weight: float
) -> dict[str, float]:
    distance = huber(distances(student.embedding), distances(teacher.embedding)).mean()
    angle = huber(cosines(student.embedding), cosines(teacher.embedding)).mean()
    return {"distance": distance_weight * float(distance), "angle": angle_weight * float(angle)}
