"""Random erasing of a batch: one box of some images becomes grey (Zhong et al., AAAI 2020, arXiv 1708.04896), with timm's box draws.

As in timm's loader it comes last, after mixing. timm erases normalised images with 0, each model's mean; our batch belongs to several
models, so the box is 0.5.
"""

import numpy as np
import torch
from jaxtyping import Int

from kdlib.types import Images
from kdlib.views.crop import to_device

AREA = (0.02, 1 / 3)  # of the image
ASPECT = 0.3  # height over width, log-uniform between this and its inverse
ATTEMPTS = 10  # at a box that fits; then the image stays as it is
FILL = 0.5


def draw_erasures(rng: np.random.Generator, probability: float, shape: tuple[int, int, int]) -> Int[np.ndarray, "4 batch"]:
    """Draw boxes (top, left, height, width) for a batch of ``shape`` (batch, height, width); sides of 0 where nothing is erased."""
    batch, height, width = shape
    area = rng.uniform(*AREA, (ATTEMPTS, batch)) * height * width
    aspect = np.exp(rng.uniform(np.log(ASPECT), -np.log(ASPECT), (ATTEMPTS, batch)))
    high, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (high < height) & (wide < width)
    first = np.argmax(fits, axis=0)
    chosen = fits.any(axis=0) & (rng.random(batch) < probability)
    high, wide = (np.where(chosen, np.take_along_axis(sides, first[None], 0)[0], 0) for sides in (high, wide))
    offset = rng.random((2, batch))
    return np.stack([np.floor(offset[0] * (height - high + 1)), np.floor(offset[1] * (width - wide + 1)), high, wide]).astype(np.int64)


def erase(images: Images, boxes: Int[np.ndarray, "4 batch"]) -> Images:
    """Fill the images' boxes."""
    top, left, high, wide = to_device(boxes, images.device)[..., None]
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((y >= top) & (y < top + high))[:, :, None] & ((x >= left) & (x < left + wide))[:, None, :]
    return images.clone().masked_fill_(inside[:, None], FILL)  # a new tensor would leave channels_last
