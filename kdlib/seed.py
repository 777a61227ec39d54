"""Every random number comes from here: a stream is named by a seed and a few keys, never by what ran before it."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _entropy(*keys: int | str) -> int:
    """128 bits that depend on nothing but the keys (not on Python's salted ``hash``)."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:16], "little")


def generator(*keys: int | str) -> np.random.Generator:
    """Counter-based generator (Philox) for e.g. ``(seed, "views", group)``.

    The same keys give the same draws in any process, at any worker count, after any interruption.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    return np.random.Generator(np.random.Philox(key=_entropy(*keys)))


def seed_torch(*keys: int | str) -> None:
    """Point torch's global generators (initialisation, dropout, drop path) at the stream of these keys."""
    torch.manual_seed(_entropy(*keys) % 2**63)


@contextmanager
def global_draws(*keys: int | str) -> Iterator[None]:
    """Within, Python's, NumPy's and torch's global generators give the draws of these keys, for libraries that ask those; then they go on
    as if nothing had been drawn.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([]):
        entropy = _entropy(*keys)
        random.seed(entropy)
        np.random.seed(entropy % 2**32)  # noqa: NPY002
        seed_torch(*keys)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
