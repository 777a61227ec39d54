"""The paper's own views, image by image: timm's transforms on PIL images, for those to whom fidelity matters more than speed.

Grey images pass through them as grey colours, which stay grey. Beside ours (augment, randaugment): resized crops interpolate bilinear
or bicubic, drawn per image, and antialias; RandAugment's movements do as well. Mixing comes afterwards and is the same.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from kdlib.config.schema import RandAugmentParams, Recipe
from kdlib.decoding.pixels import ByteRange, decode, read
from kdlib.seed import global_draws

Keys = tuple[int | str, ...]
Pixels = UInt8[np.ndarray, "batch height width channels"]


def views(images: Pixels, recipe: Recipe, hflip: float, keys: Keys) -> Pixels:
    """A view of each image; what image i's transforms draw is named by (*keys, i), whatever came before."""
    _, height, width, channels = images.shape
    found = np.empty_like(images)
    for i, image in enumerate(images):
        made = view(Image.fromarray(np.broadcast_to(image, (height, width, 3))), recipe, hflip, (height, width), (*keys, i))
        found[i] = made[..., :channels]
    return found


def view(image: Image.Image, recipe: Recipe, hflip: float, sides: tuple[int, int], keys: Keys) -> UInt8[np.ndarray, "height width 3"]:
    """One view, of these sides, of a colour image of any."""
    with global_draws(*keys):
        made = np.asarray(_transform(recipe.crop_min_area, recipe.randaugment, hflip, sides)(image))
    return made.transpose(1, 2, 0)


def views_of_files(units: Sequence[tuple[ByteRange, Sequence[Keys]]], recipe: Recipe, hflip: float, size: int) -> Pixels:
    """The views of each unit, named by their keys, in order. Each image is decoded once. Raises ``Changed``."""
    found = []
    for place, views in units:
        image, _ = decode(read(place))
        found += [view(image, recipe, hflip, (size, size), keys) for keys in views]
    return np.stack(found)


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
