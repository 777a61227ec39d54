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
from kdlib.decoding.pixels import ByteRange, decode, read_bytes
from kdlib.seed import global_draws

Keys = tuple[int | str, ...]
Pixels = UInt8[np.ndarray, "batch height width channels"]


def view_keys(seed: int, group: int, views: int) -> list[Keys]:
    """The keys of each view's draws; ``group``: of the stream, counted over all steps. Nothing drawn before matters."""
    return [(seed, "timm", group, view) for view in range(views)]


def transform_images(images: Pixels, recipe: Recipe, hflip: float, keys: Sequence[Keys]) -> Pixels:
    """Make a view of each image by the draws of its keys."""
    _, height, width, channels = images.shape
    colours = (Image.fromarray(np.broadcast_to(image, (height, width, 3))) for image in images)
    views = [transform_image(colour, recipe, hflip, (height, width), key) for colour, key in zip(colours, keys, strict=True)]
    return np.stack(views)[..., :channels]


def transform_files(units: Sequence[tuple[ByteRange, Sequence[Keys]]], recipe: Recipe, hflip: float, size: int) -> Pixels:
    """Make the views of each unit by the draws of their keys, in order. Each image is decoded once. Raises ``Changed``."""
    decoded = ((decode(read_bytes(source))[0], keys) for source, keys in units)
    return np.stack([transform_image(image, recipe, hflip, (size, size), key) for image, keys in decoded for key in keys])


def transform_image(
    image: Image.Image, recipe: Recipe, hflip: float, sides: tuple[int, int], key: Keys
) -> UInt8[np.ndarray, "height width 3"]:
    """Make one view, of these sides, of a colour image of any."""
    with global_draws(*key):
        planes = np.asarray(_transform(recipe.crop_min_area, recipe.randaugment, hflip, sides)(image))
    return planes.transpose(1, 2, 0)


@functools.lru_cache(4)
def _transform(min_area: float, params: RandAugmentParams, hflip: float, sides: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    policy = f"rand-m{params.magnitude:g}-n{params.operations}-mstd{params.magnitude_std:g}" if params.operations else None
    transform: Callable[[Image.Image], Tensor] = create_transform(
        (3, *sides),
        is_training=True,
        use_prefetcher=True,  # leaves pixels as they are: every model normalises for itself
        scale=(min_area, 1.0),
        hflip=hflip,
        auto_augment=policy,
        color_jitter=0.0,
        interpolation="random",
    )
    return transform
