"""The paper's own views, image by image: timm's transforms on PIL images, for those to whom fidelity matters more than speed.

Grey images pass through them as grey colours, which stay grey. Beside ours (augment, randaugment): resized crops interpolate bilinear
or bicubic, drawn per image, and antialias; RandAugment's movements do as well. Mixing comes afterwards and is the same.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from kdlib.config import RandAugmentParams, Recipe
from kdlib.seed import global_draws

Pixels = UInt8[np.ndarray, "batch height width channels"]


def views(images: Pixels, recipe: Recipe, hflip: float, keys: tuple[int | str, ...]) -> Pixels:
    """A view of each image; what image i's transforms draw is named by (*keys, i), whatever came before."""
    _, height, width, channels = images.shape
    transform = _transform(recipe.crop_min_area, recipe.randaugment, hflip, (height, width))
    found = np.empty_like(images)
    for i, image in enumerate(images):
        with global_draws(*keys, i):
            view = np.asarray(transform(Image.fromarray(np.broadcast_to(image, (height, width, 3)))))
        found[i] = view[:channels].transpose(1, 2, 0)
    return found


@functools.lru_cache(4)
def _transform(min_area: float, params: RandAugmentParams, hflip: float, sides: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    policy = f"rand-m{params.magnitude:g}-n{params.operations}-mstd{params.magnitude_std:g}" if params.operations else None
    made: Callable[[Image.Image], Tensor] = create_transform(
        (3, *sides),
        is_training=True,
        use_prefetcher=True,  # leaves pixels as they are: every model normalises for itself
        scale=(min_area, 1.0),
        hflip=hflip,
        auto_augment=policy,
        color_jitter=0.0,
        interpolation="random",
    )
    return made
