"""Crops and flips of a batch. The draws are made on the host, the pixels move on the images' device, as 8-bit levels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kdlib.config.schema import Recipe
from kdlib.views.transfer import to_device

Levels = UInt8[Tensor, "batch height width channels"]  # what image files hold; augmentations of PIL's kind are defined on it
Sides = Int[np.ndarray, "2 batch"]  # height, width of each image, in pixels
ASPECTS = (3 / 4, 4 / 3)  # width over height of a resized crop (Szegedy et al., arXiv 1409.4842, section 6)
ATTEMPTS = 10  # at a crop that fits into the image, of which the last one does (as torchvision's): the centre, of a square image all of it


@dataclass(frozen=True)
class Crops:
    """Of each image, in pixels: moved so that view[y, x] = image[y + down, x + right], mirrored, then one box of it stretched."""

    shifts: Int[np.ndarray, "2 batch"]  # down, right
    flips: Bool[np.ndarray, " batch"]
    boxes: Int[np.ndarray, "4 batch"] | None  # top, left, height, width


def draw(rng: np.random.Generator, recipe: Recipe, hflip: float, shape: tuple[int, int, int], sides: Sides | None = None) -> Crops:
    """The crops of a batch of views of ``shape`` (batch, height, width), from images of these sides, or of the views' own."""
    batch, height, width = shape
    reach = np.array([[round(recipe.crop_padding * height)], [round(recipe.crop_padding * width)]])
    shifts = rng.integers(-reach, reach + 1, (2, batch))
    flips = rng.random(batch) < hflip
    if sides is None:
        sides = np.broadcast_to([[height], [width]], (2, batch))
    return Crops(shifts, flips, draw_boxes(rng, recipe.crop_min_area, sides) if recipe.crop_min_area < 1 else None)


def draw_boxes(rng: np.random.Generator, min_area: float, sides: Sides) -> Int[np.ndarray, "4 batch"]:
    """Boxes (top, left, height, width) with a share of the image uniform in [min_area, 1] and log-uniform aspect.

    Where none fits, the centre of the image: as much of it as has an aspect within ``ASPECTS``.
    """
    (height, width), batch = sides, sides.shape[1]
    area = rng.uniform(min_area, 1, (ATTEMPTS, batch)) * height * width
    aspect = np.exp(rng.uniform(np.log(ASPECTS[0]), np.log(ASPECTS[1]), (ATTEMPTS, batch)))
    high, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    high[-1], wide[-1] = np.minimum(height, np.rint(width / ASPECTS[0])), np.minimum(width, np.rint(height * ASPECTS[1]))
    first = np.argmax((high <= height) & (wide <= width), axis=0)
    high, wide = (np.maximum(np.take_along_axis(sides, first[None], 0)[0], 1) for sides in (high, wide))
    place = rng.random((2, batch))
    top, left = np.floor(place[0] * (height - high + 1)), np.floor(place[1] * (width - wide + 1))
    fell_back = first == ATTEMPTS - 1
    top, left = np.where(fell_back, (height - high) // 2, top), np.where(fell_back, (width - wide) // 2, left)
    return np.stack([top, left, high, wide]).astype(np.int64)


def crop(images: Levels, crops: Crops) -> Levels:
    """The views that ``crops`` describes. Without boxes every pixel of a view is a pixel of its image, or 0 beyond its border."""
    views = shift_and_flip(images, crops.shifts, crops.flips)
    return views if crops.boxes is None else resize_boxes(views, crops.boxes)


def shift_and_flip(images: Levels, shifts: Int[np.ndarray, "2 batch"], flips: Bool[np.ndarray, " batch"]) -> Levels:
    """Move each image by whole pixels, fill with 0 (as CIFAR's "pad by 4, crop at random" does), then mirror it left to right."""
    batch, height, width, _ = images.shape
    down, right = (int(reach) for reach in np.abs(shifts).max(1))
    rows = np.arange(height) + shifts[0, :, None] + down
    columns = np.where(flips[:, None], np.arange(width)[::-1], np.arange(width)) + shifts[1, :, None] + right
    padded = F.pad(images, (0, 0, right, right, down, down))
    places = (np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :])
    return padded[tuple(to_device(place, images.device) for place in places)]


def resize_boxes(images: Levels, boxes: Int[np.ndarray, "4 batch"]) -> Levels:
    """Each box stretched to the size of the image: bilinear, with nothing from outside the box.

    No antialiasing, because a box is never larger than the image.
    """
    _, height, width, _ = images.shape
    top, left, high, wide = (side[:, None] for side in boxes)
    y = np.clip(top + (np.arange(height) + 0.5) * high / height, top + 0.5, top + high - 0.5)
    x = np.clip(left + (np.arange(width) + 0.5) * wide / width, left + 0.5, left + wide - 0.5)
    y, x = (to_device(places.astype(np.float32), images.device) for places in (y, x))
    return sample(images, y[:, :, None].expand(-1, -1, width), x[:, None, :].expand(-1, height, -1))


def sample(images: Levels, y: Float[Tensor, "batch height width"], x: Float[Tensor, "batch height width"]) -> Levels:
    """Bilinear values at places in pixels; pixel (0, 0) covers [0, 1) x [0, 1), beyond the outermost centres the outermost pixels go on."""
    _, height, width, _ = images.shape
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), dim=-1)
    values = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (values + 0.5).byte().permute(0, 2, 3, 1).contiguous()
