"""arXiv 2203.08679: b = (p_t, p_not_t), p_hat = the other classes renormalised, DKD = alpha TCKD + beta NCKD."""

import numpy as np

from tests.references.common import Array, Given, Said, kl, log_softmax

HOLDS = {"zero_at_teacher", "shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(
    student: Said, teacher: Said, given: Given, own: dict[str, Array], *, alpha: float, beta: float, temperature: float
) -> dict[str, float]:
    target, others = [], []
    for s, t, y in zip(student.logits / temperature, teacher.logits / temperature, given.labels, strict=True):
        student_logp, teacher_logp = log_softmax(s), log_softmax(t)
        rest = [i for i in range(len(s)) if i != y]
        b_student = np.array([student_logp[y], np.logaddexp.reduce(student_logp[rest])])
        b_teacher = np.array([teacher_logp[y], np.logaddexp.reduce(teacher_logp[rest])])
        target.append(kl(b_teacher, b_student))
        others.append(kl(teacher_logp[rest] - b_teacher[1], student_logp[rest] - b_student[1]))
    scale = temperature**2
    return {"tckd": scale * alpha * float(np.mean(target)), "nckd": scale * beta * float(np.mean(others))}
