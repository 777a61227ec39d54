"""arXiv 2305.15781, soft label BKL: C yes-or-no questions per image, the teacher's softmax against the student's sigmoid.

Not zero at student = teacher: a softmax is no sigmoid. Not shift-invariant: a sigmoid reads the logit itself.
"""

import numpy as np

from tests.references.common import Array, Given, Said, bce, log_softmax

HOLDS = {"order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array]) -> dict[str, float]:
    return {"bkl": bce(student.logits, np.exp([log_softmax(z) for z in teacher.logits]))}
