"""Crops and flips of a batch. The draws are made on the host, the pixels move on the images' device, as 8-bit levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from kdlib.config.schema import Recipe
from kdlib.decoding.pixels import Cut

Levels = UInt8[Tensor, "batch height width channels"]  # what image files hold; augmentations of PIL's kind are defined on it
Sides = Int[np.ndarray, "2 batch"]  # height, width of each image, in pixels
ASPECTS = (3 / 4, 4 / 3)  # width over height of a resized crop (Szegedy et al., arXiv 1409.4842, section 6)
ATTEMPTS = 10  # at a crop that fits into the image, of which the last one does (as torchvision's): the centre, of a square image all of it


@dataclass(frozen=True)
class Crops:
    """Crops of a batch, in pixels: view[y, x] = image[y + down, x + right], then mirrored, then one box of it stretched."""

    shifts: Int[np.ndarray, "2 batch"]  # down, right
    flips: Bool[np.ndarray, " batch"]
    boxes: Int[np.ndarray, "4 batch"] | None  # top, left, height, width


def to_device(array: Shaped[np.ndarray, "..."], device: torch.device | str) -> Shaped[Tensor, "..."]:
    """The array on ``device``. On a GPU through pinned memory, and without waiting for what the device is still doing."""
    values = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def draw_crops(rng: np.random.Generator, recipe: Recipe, hflip: float, shape: Sequence[int], sides: Sides | None = None) -> Crops:
    """Draw the crops of a batch of views of ``shape`` (batch, height, width), from images of these sides, or of the views' own."""
    batch, height, width = shape
    reach = np.array([[round(recipe.crop_padding * height)], [round(recipe.crop_padding * width)]])
    shifts = rng.integers(-reach, reach + 1, (2, batch))
    flips = rng.random(batch) < hflip
    if sides is None:
        sides = np.broadcast_to([[height], [width]], (2, batch))
    return Crops(shifts, flips, draw_boxes(rng, recipe.crop_min_area, sides) if recipe.crop_min_area < 1 else None)


def draw_cuts(rng: np.random.Generator, recipe: Recipe, hflip: float, size: int, sides: Sides) -> tuple[Crops, list[Cut | None]]:
    """Draw the crops of views of ``size`` out of original images, and their boxes as a decoder takes them; None: as evaluation sees it."""
    batch: int = sides.shape[1]
    crops = draw_crops(rng, recipe, hflip, (batch, size, size), sides)
    bicubic = rng.random(batch) < 0.5
    if crops.boxes is None:
        return crops, [None] * batch
    return crops, [Cut(*box) for box in zip(*crops.boxes.tolist(), bicubic.tolist(), strict=True)]


def draw_boxes(rng: np.random.Generator, min_area: float, sides: Sides) -> Int[np.ndarray, "4 batch"]:
    """Draw boxes (top, left, height, width) with a share of the image uniform in [min_area, 1] and log-uniform aspect.

    Where none fits, the centre of the image: as much of it as has an aspect within ``ASPECTS``.
    """
    (height, width), batch = sides, sides.shape[1]
    area = rng.uniform(min_area, 1, (ATTEMPTS, batch)) * height * width
    aspect = np.exp(rng.uniform(np.log(ASPECTS[0]), np.log(ASPECTS[1]), (ATTEMPTS, batch)))
    high, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    high[-1], wide[-1] = np.minimum(height, np.rint(width / ASPECTS[0])), np.minimum(width, np.rint(height * ASPECTS[1]))
    first = np.argmax((high <= height) & (wide <= width), axis=0)
    high, wide = (np.maximum(np.take_along_axis(sides, first[None], 0)[0], 1) for sides in (high, wide))
    offset = rng.random((2, batch))
    top, left = np.floor(offset[0] * (height - high + 1)), np.floor(offset[1] * (width - wide + 1))
    fell_back = first == ATTEMPTS - 1
    top, left = np.where(fell_back, (height - high) // 2, top), np.where(fell_back, (width - wide) // 2, left)
    return np.stack([top, left, high, wide]).astype(np.int64)


def crop(images: Levels, crops: Crops) -> Levels:
    """Cut out the views that ``crops`` describes. Without boxes every pixel of a view is a pixel of its image, or 0 beyond its border."""
    views = shift_and_flip(images, crops.shifts, crops.flips)
    return views if crops.boxes is None else resize_boxes(views, crops.boxes)


def shift_and_flip(images: Levels, shifts: Int[np.ndarray, "2 batch"], flips: Bool[np.ndarray, " batch"]) -> Levels:
    """Move each image by whole pixels, fill with 0 (as CIFAR's "pad by 4, crop at random" does), then mirror it left to right."""
    batch, height, width, _ = images.shape
    down, right = (int(reach) for reach in np.abs(shifts).max(1))
    rows = np.arange(height) + shifts[0, :, None] + down
    columns = np.where(flips[:, None], np.arange(width)[::-1], np.arange(width)) + shifts[1, :, None] + right
    padded = F.pad(images, (0, 0, right, right, down, down))
    indices = (np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :])
    return padded[tuple(to_device(index, images.device) for index in indices)]


def resize_boxes(images: Levels, boxes: Int[np.ndarray, "4 batch"]) -> Levels:
    """Stretch each box to the size of the image: bilinear, with nothing from outside the box.

    No antialiasing, because a box is never larger than the image.
    """
    _, height, width, _ = images.shape
    top, left, high, wide = (side[:, None] for side in boxes)
    y = np.clip(top + (np.arange(height) + 0.5) * high / height, top + 0.5, top + high - 0.5)
    x = np.clip(left + (np.arange(width) + 0.5) * wide / width, left + 0.5, left + wide - 0.5)
    y, x = (to_device(points.astype(np.float32), images.device) for points in (y, x))
    return sample(images, y[:, :, None].expand(-1, -1, width), x[:, None, :].expand(-1, height, -1))


def sample(images: Levels, y: Float[Tensor, "batch height width"], x: Float[Tensor, "batch height width"]) -> Levels:
    """Interpolate bilinearly at points in pixels: pixel (0, 0) covers [0, 1) x [0, 1), the outermost pixels go on beyond their centres."""
    _, height, width, _ = images.shape
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), dim=-1)
    values = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (values + 0.5).byte().permute(0, 2, 3, 1).contiguous()
