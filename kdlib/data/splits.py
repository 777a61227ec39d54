"""Which images of a data set: a fraction of every class, or disjoint parts of all."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from kdlib.errors import refuse
from kdlib.seed import generator

Labels = Int64[np.ndarray, " images"]
Index = Int64[np.ndarray, " chosen"]


def subset(labels: Labels, fraction: float, seed: int) -> Index:
    """Choose, sorted, the positions of ``round(fraction * n)`` images of every class, at least one. Raises ``Refused`` outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise refuse("comparisons: fraction", fraction, "a number > 0 and <= 1", "change it")
    chosen = []
    for label, members in _by_class(labels):
        count = max(1, round(fraction * len(members)))
        chosen.append(generator(seed, "subset", label).permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def stratified_split(labels: Labels, shares: Sequence[float], seed: int, key: str, names: Sequence[str]) -> list[Index]:
    """Split into sorted positions: the rest first, then one part for each share: ``round(share * n)`` images of every class, at least one.

    The parts are disjoint and exhaust the labels. Raises ``Refused`` about ``key`` when a class (of ``names``) has too few images.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(len(shares) + 1)]
    for label, members in _by_class(labels):
        counts = [max(1, round(share * len(members))) for share in shares]
        if sum(counts) >= len(members):
            fault = f"{len(members)} images of class {names[label]!r}, of which {sum(counts)} are to be held out"
            raise refuse(key, fault, "at least one image of every class left to train on", "hold out less, or add images")
        order = generator(seed, "split", label).permutation(members)
        for part, share_members in zip(parts[1:] + parts[:1], np.split(order, np.cumsum(counts)), strict=True):
            part.append(share_members)
    return [np.sort(np.concatenate(part)) for part in parts]


def _by_class(labels: Labels) -> Iterator[tuple[int, Index]]:
    """Yield each class that occurs, with the positions of its images in rising order."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    yield from zip(present.tolist(), np.split(order, starts[1:]), strict=True)
