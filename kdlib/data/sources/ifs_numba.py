"""The chaos game, compiled. A file of its own, because importing numba would cost every stage a third of a second.

Compiling takes about 2 s, once per process: a cache on disk would need a writable folder beside this file.
``no_type_check``: numba cannot compile the tests' shape checks.
"""

import math
from typing import no_type_check

import numpy as np
from jaxtyping import Float64, UInt8
from numba import njit

BURN_IN = 20  # steps from the origin until a point is on the attractor, to less than a pixel


@njit(nogil=True)
@no_type_check
def iterate(maps: np.ndarray, chances: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Iterate one image's system; returns its points, [2, steps - BURN_IN]."""
    points = np.empty((2, len(draws) - BURN_IN))
    x, y = 0.0, 0.0
    for step in range(len(draws)):
        chosen = 0
        while chosen < len(chances) - 1 and draws[step] >= chances[chosen]:
            chosen += 1
        a, b, c, d, e, f = maps[chosen]
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= BURN_IN:
            points[0, step - BURN_IN] = x
            points[1, step - BURN_IN] = y
    return points


@njit(nogil=True)
@no_type_check
def count_points(points: np.ndarray, counts: np.ndarray) -> None:
    """Add one to the pixel of every point; their bounding box fills all but a margin of one pixel, each axis by itself."""
    inner = len(counts) - 2
    left, top = points[0].min(), points[1].min()
    width, height = points[0].max() - left, points[1].max() - top
    across = inner / width if width > 0 else 0.0
    down = inner / height if height > 0 else 0.0
    for point in range(points.shape[1]):
        row = min(int((points[1, point] - top) * down), inner - 1)
        column = min(int((points[0, point] - left) * across), inner - 1)
        counts[row + 1, column + 1] += 1


@njit(nogil=True)
@no_type_check
def render(
    maps: Float64[np.ndarray, "images maps 6"],
    chances: Float64[np.ndarray, "images maps"],
    draws: Float64[np.ndarray, "images steps"],
    size: int,
) -> UInt8[np.ndarray, "images size size"]:
    """Play the chaos game: each draw of [0, 1) applies the first map whose cumulative chance exceeds it, from the origin on.

    A pixel of n points after ``BURN_IN``, where the fullest pixel has m, becomes ``floor(255 log(1 + n) / log(1 + m) + 1/2)``; see
    ``count_points`` for the frame.
    """
    images = np.zeros((len(draws), size, size), np.uint8)
    for image in range(len(draws)):
        counts = np.zeros((size, size), np.int64)
        count_points(iterate(maps[image], chances[image], draws[image]), counts)
        full = math.log1p(counts.max())
        for row in range(size):
            for column in range(size):
                if counts[row, column]:
                    images[image, row, column] = int(255 * math.log1p(counts[row, column]) / full + 0.5)
    return images
