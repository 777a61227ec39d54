"""The authors' loss for arXiv 2310.19444, of the final logits and of one exit branch (for a convolutional student) for each stage.

Not zero at student = teacher: a cross-entropy.
"""

import numpy as np

from tests.references.common import Array, Given, Said, batch_norm, convolution, log_softmax

HOLDS = {"shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, eps: float, temperature: float) -> dict[str, float]:
    def loss(logits: Array) -> float:
        values = []
        for s, t, y in zip(logits / temperature, teacher.logits / temperature, given.labels, strict=True):
            one = np.eye(len(s))[y]
            values.append(-(((np.exp(log_softmax(t)) + one) ** eps - one) * log_softmax(s)).sum())
        return float(np.mean(values))

    stages = len(student.maps)
    exits = [exit_logits(x, stages - 1 - k, own, f"branches.{k}") for k, x in enumerate(student.maps)]
    return {"ofa": loss(student.logits), "branches": sum(loss(logits) for logits in exits)}


def exit_logits(x: Array, halvings: int, own: dict[str, Array], name: str) -> Array:
    """Halvings of two rounds each: depthwise 3x3, 1x1, BatchNorm, ReLU; without any a 1x1 convolution. Then means and a linear map."""
    for i in range(halvings):
        for first, stride in ((0, 2), (4, 1)):
            x = convolution(x, own[f"{name}.{i}.{first}.weight"], stride=stride)
            x = convolution(x, own[f"{name}.{i}.{first + 1}.weight"])
            x = np.maximum(0, batch_norm(x, own[f"{name}.{i}.{first + 2}.weight"], own[f"{name}.{i}.{first + 2}.bias"]))
    if not halvings:
        x = convolution(x, own[f"{name}.0.weight"], own[f"{name}.0.bias"])
    last = f"{name}.{max(halvings, 1) + 2}"
    return x.mean((2, 3)) @ own[f"{last}.weight"].T + own[f"{last}.bias"]
