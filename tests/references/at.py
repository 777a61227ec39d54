"""arXiv 1612.03928: attention = mean over channels of |A|^2, vectorised, by its norm; mean squared difference, stages added."""

import numpy as np

from tests.references.common import Array, Given, Said, pooled

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def attention(image: Array) -> Array:
    looked = np.array([np.mean([channel.flat[place] ** 2 for channel in image]) for place in range(image[0].size)])
    norm = np.sqrt((looked**2).sum())
    return looked / norm if norm > 0 else looked


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array]) -> dict[str, float]:
    n = min(len(student.maps), len(teacher.maps))
    total = 0.0
    for a, b in zip(student.maps[-n:], teacher.maps[-n:], strict=True):
        height, width = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
        images = zip(pooled(a, height, width), pooled(b, height, width), strict=True)
        total += float(np.mean([(attention(s) - attention(t)) ** 2 for s, t in images]))
    return {"attention": total}
