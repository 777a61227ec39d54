"""arXiv 2104.09044, section 3: attention-based fusion from the pooled features to the shallowest stage, hierarchical context loss."""

import numpy as np

from tests.references.common import Array, Given, Said, batch_norm, convolution, pooled

HOLDS = {"shift_invariant", "order_invariant"}  # a teacher's own maps are fused to something else
CHOSEN = {"mid": 4.0, "mid:other": 7.0}


def terms(student: Said, teacher: Said, given: Given, own: dict[str, Array], *, mid: float) -> dict[str, float]:
    ours, theirs = ([said.embedding[:, :, None, None], *said.preactivations[::-1]] for said in (student, teacher))
    total = 0.0
    handed = None
    for k, (level, answer) in enumerate(zip(ours, theirs, strict=False)):  # the last faces the last; the longer one's first have no pair
        here = {key.removeprefix(f"fusions.{k}."): value for key, value in own.items() if key.startswith(f"fusions.{k}.")}
        x = batch_norm(convolution(level, here["enter.weight"]), here["enter_norm.weight"], here["enter_norm.bias"])
        assert x.shape[1] == min(mid, student.embedding.shape[1])
        if handed is not None:
            y = at_size(handed, x.shape[2], x.shape[3])
            attention = convolution(np.concatenate([x, y], axis=1), here["attention.weight"], here["attention.bias"])
            attention = 1 / (1 + np.exp(-attention))
            x = attention[:, 0:1] * x + attention[:, 1:2] * y
        handed = x
        compared = convolution(at_size(x, answer.shape[2], answer.shape[3]), here["leave.weight"])
        total += context(batch_norm(compared, here["leave_norm.weight"], here["leave_norm.bias"]), answer)
    return {"hcl": total}


def at_size(maps: Array, height: int, width: int) -> Array:
    """First what shrinks, by averages, then what grows: row i of n is row floor(i h / n) of h."""
    maps = pooled(maps, min(height, maps.shape[2]), min(width, maps.shape[3]))
    rows = [i * maps.shape[2] // height for i in range(height)]
    columns = [i * maps.shape[3] // width for i in range(width)]
    return maps[:, :, rows][:, :, :, columns]


def context(ours: Array, theirs: Array) -> float:
    """Mean squared errors at full size, 4, 2 and 1, as far as they are smaller; each weighs half of the one before; weights sum to 1."""
    sides = [side for side in (4, 2, 1) if side < ours.shape[2] and side < ours.shape[3]]
    differences = [ours - theirs, *(pooled(ours, side, side) - pooled(theirs, side, side) for side in sides)]
    errors = [(difference**2).mean() for difference in differences]
    weights = [1, 1 / 2, 1 / 4, 1 / 8][: len(errors)]
    return float(np.average(errors, weights=weights))
