# ruff: noqa: ARG001, PLR0913 (one signature for all: each method's arguments and parameters)
"""Every method again: slowly, image by image, in float64 NumPy, from its paper and not from kdlib. One missing here fails its tests.

Each function takes logits (batch, classes), labels (batch,), the hard loss and the method's parameters, and returns the weighted terms.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def log_softmax(z: Array) -> Array:
    """Of one image: log p_i = z_i - log sum_j exp(z_j)."""
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(logp: Array, logq: Array) -> float:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), in nats."""
    return float(sum(np.exp(a) * (a - b) for a, b in zip(logp, logq, strict=True)))


def correlation(a: Array, b: Array) -> float:
    """Pearson's: covariance over the product of the standard deviations; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def no_kd(student: Array, teacher: Array, labels: Array, hard: float, *, hard_weight: float) -> dict[str, float]:
    return {"hard": hard_weight * hard}


def kd(
    student: Array, teacher: Array, labels: Array, hard: float, *, hard_weight: float, weight: float, temperature: float
) -> dict[str, float]:
    """arXiv 1503.02531, section 2; the factor T^2 is its last paragraph."""
    losses = [kl(log_softmax(t / temperature), log_softmax(s / temperature)) for s, t in zip(student, teacher, strict=True)]
    return {"hard": hard_weight * hard, "kd": weight * temperature**2 * float(np.mean(losses))}


def dkd(
    student: Array,
    teacher: Array,
    labels: Array,
    hard: float,
    *,
    hard_weight: float,
    weight: float,
    alpha: float,
    beta: float,
    temperature: float,
) -> dict[str, float]:
    """arXiv 2203.08679: b = (p_t, p_not_t), p_hat = the other classes renormalised, DKD = alpha TCKD + beta NCKD."""
    target, others = [], []
    for s, t, y in zip(student / temperature, teacher / temperature, labels, strict=True):
        student_logp, teacher_logp = log_softmax(s), log_softmax(t)
        rest = [i for i in range(len(s)) if i != y]
        b_student = np.array([student_logp[y], np.logaddexp.reduce(student_logp[rest])])
        b_teacher = np.array([teacher_logp[y], np.logaddexp.reduce(teacher_logp[rest])])
        target.append(kl(b_teacher, b_student))
        others.append(kl(teacher_logp[rest] - b_teacher[1], student_logp[rest] - b_student[1]))
    scale = weight * temperature**2
    return {"hard": hard_weight * hard, "tckd": scale * alpha * float(np.mean(target)), "nckd": scale * beta * float(np.mean(others))}


def dist(
    student: Array,
    teacher: Array,
    labels: Array,
    hard: float,
    *,
    hard_weight: float,
    weight: float,
    beta: float,
    gamma: float,
    tau: float,
) -> dict[str, float]:
    """arXiv 2205.10536: d = 1 - correlation, over each image's classes and over each class's images, both averaged."""
    p = np.exp([log_softmax(z) for z in student / tau])
    q = np.exp([log_softmax(z) for z in teacher / tau])
    inter = np.mean([1 - correlation(p[i, :], q[i, :]) for i in range(p.shape[0])])
    intra = np.mean([1 - correlation(p[:, j], q[:, j]) for j in range(p.shape[1])])
    scale = weight * tau**2
    return {"hard": hard_weight * hard, "inter": scale * beta * float(inter), "intra": scale * gamma * float(intra)}


REFERENCES: dict[str, Callable[..., dict[str, float]]] = {"no_kd": no_kd, "kd": kd, "dkd": dkd, "dist": dist}


def ce(logits: Array, targets: Array) -> float:
    """Soft cross-entropy: sum over classes, mean over images."""
    return float(np.mean([-(target * log_softmax(z)).sum() for z, target in zip(logits, targets, strict=True)]))


def bce(logits: Array, targets: Array) -> float:
    """-(t log sigmoid(z) + (1 - t) log(1 - sigmoid(z))): mean over images and classes."""
    return float(np.mean(targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)))


def calibration_error(confidence: Array, correct: Array) -> float:
    """arXiv 1706.04599, equation 3, bin by bin; bin m is ((m - 1) / 15, m / 15]."""
    total = 0.0
    for m in range(1, 16):
        inside = [i for i, value in enumerate(confidence) if (m - 1) / 15 < value <= m / 15]
        if inside:
            total += len(inside) / len(confidence) * abs(np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
    return total
