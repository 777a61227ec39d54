"""VanillaKD's correlation loss: scale * mean over i of sum over d of |f_s - f_t|_{i, d} |f_s - f_t|_{i + 1, d}, f linear embeddings."""

import numpy as np

from tests.references.common import Array, Given, Said

HOLDS = {"shift_invariant"}
CHOSEN: dict[str, float] = {"dim": 6.0, "dim:other": 5.0}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, scale: float, dim: float) -> dict[str, float]:
    ours = [own["embed_student.weight"] @ f + own["embed_student.bias"] for f in student.embedding]
    theirs = [own["embed_teacher.weight"] @ f + own["embed_teacher.bias"] for f in teacher.embedding]
    assert len(ours[0]) == dim
    neighbours = [
        sum(abs(ours[i][d] - theirs[i][d]) * abs(ours[i + 1][d] - theirs[i + 1][d]) for d in range(int(dim))) for i in range(len(ours) - 1)
    ]
    return {"correlation": scale * float(np.mean(neighbours))}
