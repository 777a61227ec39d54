"""arXiv 1910.10699, section 3: noise-contrastive estimation with D = P / (P + m P_n), P = exp(u . v / T) / Z, P_n = 1 / N.

The images that are drawn are kdlib's, from ``step``; the banks and Z / N are those before the step.
"""

import numpy as np
import torch

from kdlib.losses.crd import draw
from tests.references.common import Array, Given, Said

HOLDS = {"shift_invariant", "order_invariant"}
CHOSEN = {"dim": 5.0, "negatives": 30.0, "temperature": 0.6, "momentum": 0.4, "momentum:other": 0.9}


def unit(vector: Array) -> Array:
    return vector / np.sqrt((vector**2).sum())


def terms(
    student: Said, teacher: Said, given: Given, own: dict[str, Array], *, negatives: float, temperature: float, **rest: float
) -> dict[str, float]:
    images = len(given.all_labels)
    pool = draw(torch.tensor(int(own["step"])), int(negatives), images).tolist()
    of_student = [unit(own["student.weight"] @ f + own["student.bias"]) for f in student.embedding]
    of_teacher = [unit(own["teacher.weight"] @ f + own["teacher.bias"]) for f in teacher.embedding]
    found = {}
    for direction, (name, anchors, others) in enumerate((("student", of_student, of_teacher), ("teacher", of_teacher, of_student))):
        bank = own["teacher_bank" if name == "student" else "student_bank"]
        pairs = []
        for anchor, other, label in zip(anchors, others, given.labels, strict=True):
            against = [bank[i] for i in pool if given.all_labels[i] != label]
            pairs.append([np.exp(anchor @ vector / temperature) for vector in (other, *against)])
        known = own["log_means"][direction]
        z = images * (np.mean([score for row in pairs for score in row]) if np.isnan(known) else np.exp(known))
        found[f"crd_{name}"] = float(np.mean([loss(np.array(row) / z, images) for row in pairs]))
    return found


def loss(p: Array, images: int) -> float:
    """-log D of the first, which is the pair, and -log(1 - D) of the others."""
    noise = (len(p) - 1) / images
    return float(-np.log(p[0] / (p[0] + noise)) - np.log(noise / (p[1:] + noise)).sum())
