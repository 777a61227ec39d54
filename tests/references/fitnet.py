"""arXiv 1412.6550: squared difference of the hint and the regressed guided map; mean over images, channels and places."""

import numpy as np

from tests.references.common import Array, Given, Said, pooled

HOLDS = {"shift_invariant", "order_invariant"}
CHOSEN: dict[str, float] = {"stage": 2.0, "stage:other": 1.0}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, stage: float) -> dict[str, float]:
    guided, hint = student.maps[len(student.maps) - int(stage)], teacher.maps[len(teacher.maps) - int(stage)]
    weight, bias = own["regressor.weight"][:, :, 0, 0], own["regressor.bias"]
    regressed = np.stack([np.einsum("oc,chw->ohw", weight, image) + bias[:, None, None] for image in guided])  # before pooling
    height, width = min(guided.shape[2], hint.shape[2]), min(guided.shape[3], hint.shape[3])
    return {"hint": float(np.mean((pooled(regressed, height, width) - pooled(hint, height, width)) ** 2))}
