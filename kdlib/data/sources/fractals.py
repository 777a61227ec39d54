"""Fractals: a class is an iterated function system of 2 to 4 affine maps, an image a jittered rendering of it.

Sources: Kataoka et al., "Pre-training without natural images" (FractalDB), ACCV 2020: classes as systems, jittered coefficients, maps
chosen by their determinants, systems rejected by filling rate. Anderson and Farrell, "Improving fractal pre-training", WACV 2022
(arXiv 2110.03091): contractive maps by their singular values, whose weighted sum decides how good a system looks.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from kdlib.config.schema import Fractals
from kdlib.data.dataset import BLOCK, SPLITS, Content, Images
from kdlib.seed import generator

LARGEST = 0.95  # singular value; nearer to 1 a point would need more than the burn-in to come to the attractor
FILL = (0.15, 0.5)  # accepted share of non-empty pixels in a class's 30 x 30 trial rendering of 1,000 points
# What full jitter adds to (theta, phi, singular values as a factor, translation), at most to either side.
SPREAD = np.array([0.75, 0.75, 0.45, 0.45, 0.6, 0.6])


def contents(name: str, params: Fractals) -> Content:  # noqa: ARG001  (every source is called alike)
    """Render ``<split>_per_class`` images of each class, in the order of the classes."""
    counts = {"train": params.train_per_class, "val": params.val_per_class, "test": params.test_per_class}
    labels = {split: np.repeat(np.arange(params.classes, dtype=np.int64), counts[split]) for split in SPLITS}
    systems = [draw_system(params.seed, label) for label in range(params.classes)]

    def blocks(split: str) -> Iterator[Images]:
        step = max(1, min(BLOCK // 8, 2**18) // (params.points + params.size**2))
        for label, system in enumerate(systems):
            for start in range(0, counts[split], step):
                yield render_images(params, system, (split, label), range(start, min(start + step, counts[split])))

    return Content([f"system_{label:04d}" for label in range(params.classes)], params.size, 1, labels, blocks)


def draw_system(seed: int, label: int) -> Float64[np.ndarray, "maps 6"]:
    """Draw the maps of a class as (theta, phi, s1, s2, x, y), see ``coefficients``; again until one looks neither empty nor full."""
    from kdlib.data.sources.ifs_numba import BURN_IN, render  # noqa: PLC0415  (see its docstring)

    random = generator(seed, "fractals", "class", label)
    while True:
        system = _draw_candidate(random)
        maps = coefficients(system[None])
        trial = render(maps, chances(maps), random.random((1, BURN_IN + 1000)), 32)
        if FILL[0] <= np.count_nonzero(trial) / 30**2 <= FILL[1]:
            return system


def render_images(params: Fractals, system: Float64[np.ndarray, "maps 6"], part: tuple[str, int], numbers: range) -> Images:
    """Render the images of these numbers of (split, label). Each is a function of (seed, split, label, number) alone."""
    from kdlib.data.sources.ifs_numba import BURN_IN, render  # noqa: PLC0415

    steps = BURN_IN + params.points
    draws = np.stack([generator(params.seed, "fractals", *part, number).random(system.size + steps) for number in numbers])
    noise = 2 * draws[:, : system.size].reshape(-1, *system.shape) - 1
    maps = coefficients(jitter(system, params.jitter * noise))
    images: np.ndarray = render(maps, chances(maps), np.ascontiguousarray(draws[:, system.size :]), params.size)
    return images[..., None]


def jitter(system: Float64[np.ndarray, "maps 6"], noise: Float64[np.ndarray, "images maps 6"]) -> Float64[np.ndarray, "images maps 6"]:
    """Shift angles and translation, multiply singular values; the maps stay contractive. Noise in [-1, 1]."""
    out: np.ndarray = system + SPREAD * noise
    out[..., 2:4] = np.clip(system[:, 2:4] * (1 + SPREAD[2:4] * noise[..., 2:4]), -LARGEST, LARGEST)
    return out


def coefficients(maps: Float64[np.ndarray, "images maps 6"]) -> Float64[np.ndarray, "images maps 6"]:
    """Turn (theta, phi, s1, s2, x, y) into (a, b, c, d, e, f): [[a, b], [c, d]] = R(theta) diag(s1, s2) R(phi), then + (e, f) = (x, y).

    Rounded to 2^-20, so that a last bit of another machine's sine changes no pixel.
    """
    theta, phi, s1, s2, x, y = np.moveaxis(maps, -1, 0)
    ct, st, cp, sp = np.cos(theta), np.sin(theta), np.cos(phi), np.sin(phi)
    a, b = ct * s1 * cp - st * s2 * sp, -ct * s1 * sp - st * s2 * cp
    c, d = st * s1 * cp + ct * s2 * sp, -st * s1 * sp + ct * s2 * cp
    rounded: np.ndarray = np.round(np.stack([a, b, c, d, x, y], -1) * 2**20) / 2**20
    return rounded


def chances(maps: Float64[np.ndarray, "images maps 6"]) -> Float64[np.ndarray, "images maps"]:
    """Cumulative chance of each map: proportional to |det| (FractalDB), but at least a twentieth of the likeliest map's."""
    size = np.abs(maps[..., 0] * maps[..., 3] - maps[..., 1] * maps[..., 2])
    size = np.maximum(size, np.maximum(size.max(-1, keepdims=True) / 20, 1e-6))
    return np.cumsum(size / size.sum(-1, keepdims=True), -1)


def _draw_candidate(random: np.random.Generator) -> Float64[np.ndarray, "maps 6"]:
    """Draw 2 to 4 maps whose sum of s1 + 2 s2 lies between (5 + maps) / 2 and (6 + maps) / 2 (Anderson and Farrell's sigma-factor)."""
    maps = int(random.integers(2, 5))
    while True:
        values = np.sort(random.uniform(0, LARGEST, (maps, 2)), axis=1)[:, ::-1]
        if (5 + maps) / 2 <= values.sum() + values[:, 1].sum() <= (6 + maps) / 2:
            break
    values = values * np.stack([np.ones(maps), random.choice([-1.0, 1.0], maps)], 1)  # half of the maps mirror
    angles = random.uniform(-np.pi, np.pi, (maps, 2))
    return np.concatenate([angles, values, random.uniform(-1, 1, (maps, 2))], 1)
