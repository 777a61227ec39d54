"""RandAugment on a batch of 8-bit images: each image gets operations and magnitudes of its own.

Cubuk et al., CVPRW 2020 (arXiv 1909.13719), with the operations, magnitude scales and probabilities of timm's
``rand-m<magnitude>-n<operations>-mstd<magnitude_std>`` and the arithmetic of Pillow, on which that is defined. Differences from timm:
points between pixels are always bilinear (timm draws bilinear or bicubic), and posterizing to 0 bits gives black (Pillow refuses it).
As in timm, what moves in from outside is grey, and Posterize, Solarize and the four enhancements are *weaker* for some larger magnitudes
(at magnitude 7: 2 bits, threshold 179, factor 1.36).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kdlib.config.schema import RandAugmentParams
from kdlib.views.crop import Levels, sample, to_device

APPLIED = 0.5  # probability that a chosen operation is applied (timm's default)
FILL = 128
HIGHEST = 10.0  # magnitudes are from 0 to this

PerImage = Float[Tensor, " batch"]
Shares = Float[np.ndarray, " chosen"]  # of the highest magnitude


@dataclass(frozen=True)
class Draws:
    """The operations of each image, in the order of the first axis."""

    operation: Int[np.ndarray, "operations batch"]  # position in OPERATIONS
    applied: Bool[np.ndarray, "operations batch"]
    magnitude: Float[np.ndarray, "operations batch"]  # in [0, 10]
    sign: Int[np.ndarray, "operations batch"]  # -1 or 1, the direction of a movement


def draw_operations(rng: np.random.Generator, params: RandAugmentParams, batch: int) -> Draws:
    """Draw operations uniformly and with replacement, magnitudes from a clipped normal distribution."""
    shape = (params.operations, batch)
    return Draws(
        operation=rng.integers(len(OPERATIONS), size=shape),
        applied=rng.random(shape) < APPLIED,
        magnitude=np.clip(rng.normal(params.magnitude, params.magnitude_std, shape), 0, HIGHEST),
        sign=rng.choice([-1, 1], shape),
    )


def augment(images: Levels, draws: Draws) -> Levels:
    """Apply their operations to the images. Which image needs what is sorted out on the host, so that a device is never waited for."""
    if not draws.applied.any():
        return images
    passes: list[tuple[Callable[[Levels, PerImage], Levels], np.ndarray, np.ndarray]] = []  # an operation, its images, their arguments
    for operation, applied, magnitude, sign in zip(draws.operation, draws.applied, draws.magnitude, draws.sign, strict=True):
        for number, (operate, argument) in enumerate(OPERATIONS.values()):
            chosen = np.flatnonzero(applied & (operation == number))
            if len(chosen):
                passes.append((operate, chosen, argument(magnitude[chosen] / HIGHEST, sign[chosen]).astype(np.float32)))
    operations, *arrays = zip(*passes, strict=True)
    sizes = [len(chosen) for chosen in arrays[0]]
    rows, arguments = (to_device(np.concatenate(array), images.device).split(sizes) for array in arrays)
    images = images.clone()
    for operate, chosen, values in zip(operations, rows, arguments, strict=True):
        images[chosen] = operate(images[chosen], values)
    return images


def _columns(values: PerImage) -> Float[Tensor, "batch 1 1 1"]:
    return values[:, None, None, None]


# Tables: the new value of each of the 256 levels


def _look_up(images: Levels, table: Int[Tensor, "batch channels 256"]) -> Levels:
    """Replace the levels of each channel of each image by its table's."""
    planes = images.permute(0, 3, 1, 2)
    replaced = table.clamp(0, 255).byte().gather(2, planes.flatten(2).long())
    return replaced.reshape(planes.shape).permute(0, 2, 3, 1)


def auto_contrast(images: Levels, _: PerImage) -> Levels:
    """Stretch each channel linearly, so that its darkest level becomes 0 and its lightest 255."""
    low, high = images.amin((1, 2)).long()[..., None], images.amax((1, 2)).long()[..., None]
    levels = torch.arange(256, device=images.device)
    stretched = (levels - low).clamp(min=0) * 255 // (high - low).clamp(min=1)
    return _look_up(images, torch.where(high > low, stretched, levels))


def equalize(images: Levels, _: PerImage) -> Levels:
    """Spread the levels of each channel as evenly as its histogram allows; fewer than 255 pixels below the lightest stay as they are."""
    flat = images.permute(0, 3, 1, 2).flatten(2).long()
    counts = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(flat))
    lightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - lightest) // 255
    below = counts.cumsum(2) - counts
    spread = (step // 2 + below) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, spread, torch.arange(256, device=images.device)))


def invert(images: Levels, _: PerImage) -> Levels:
    """Turn dark into light."""
    return 255 - images


def posterize(images: Levels, bits: PerImage) -> Levels:
    """Keep the highest ``bits`` bits of every level."""
    return images & _columns(256 - 2 ** (8 - bits)).byte()


def solarize(images: Levels, threshold: PerImage) -> Levels:
    """Invert the levels from ``threshold`` on."""
    return torch.where(images < _columns(threshold), images, 255 - images)


def solarize_add(images: Levels, added: PerImage) -> Levels:
    """Lighten the levels below 128 by ``added``."""
    return torch.where(images < 128, (images + _columns(added)).clamp(max=255).byte(), images)


# Enhancements: away from a degenerate image, or towards it


def _blend(degenerate: Levels | Float[Tensor, "batch 1 1 1"], images: Levels, factor: PerImage) -> Levels:
    """``degenerate`` at factor 0, ``images`` at 1, extrapolated beyond; cut to whole levels as Pillow does."""
    start = degenerate.float()
    return (start + _columns(factor) * (images.float() - start)).clamp(0, 255).byte()


def _grey(images: Levels) -> Int[Tensor, "batch height width 1"]:
    """Luma by ITU-R 601-2 in Pillow's 16-bit integers."""
    if images.shape[3] == 1:
        return images.int()
    red, green, blue = images.int().unbind(3)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[..., None]


def color(images: Levels, factor: PerImage) -> Levels:
    """Blend with the grey image; a grey image stays as it is."""
    return images if images.shape[3] == 1 else _blend(_grey(images).expand_as(images).byte(), images, factor)


def contrast(images: Levels, factor: PerImage) -> Levels:
    """Blend with the mean grey."""
    grey = _grey(images).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])
    return _blend(_columns(mean.float()), images, factor)


def brightness(images: Levels, factor: PerImage) -> Levels:
    """Blend with black."""
    return _blend(torch.zeros_like(images), images, factor)


def sharpness(images: Levels, factor: PerImage) -> Levels:
    """Blend with the image smoothed by ((1 1 1) (1 5 1) (1 1 1)) / 13; the outermost pixels stay as they are."""
    total = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 3, stride=1, divisor_override=1).permute(0, 2, 3, 1)
    smooth = images.clone()
    smooth[:, 1:-1, 1:-1] = ((total + 4 * images[:, 1:-1, 1:-1].float()) / 13 + 0.5).byte()
    return _blend(smooth, images, factor)


# Movements


def _move(images: Levels, origin: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Levels:
    """Sample each pixel at the point ``origin(y, x)`` of its centre, in pixels; grey where that lies outside the image."""
    batch, height, width, _ = images.shape
    y, x = (torch.arange(side, device=images.device, dtype=torch.float32) + 0.5 for side in (height, width))
    y, x = (points.expand(batch, height, width) for points in origin(y[:, None], x))
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return torch.where(inside[..., None], sample(images, y, x), FILL)


def rotate(images: Levels, degrees: PerImage) -> Levels:
    """Turn counter-clockwise about the centre."""
    down, right = images.shape[1] / 2, images.shape[2] / 2
    cos, sin = torch.cos(torch.deg2rad(degrees))[:, None, None], torch.sin(torch.deg2rad(degrees))[:, None, None]
    return _move(images, lambda y, x: (down + sin * (x - right) + cos * (y - down), right + cos * (x - right) - sin * (y - down)))


def shear_x(images: Levels, factor: PerImage) -> Levels:
    """Move each row to the left by ``factor`` times its distance from the upper border."""
    return _move(images, lambda y, x: (y, x + factor[:, None, None] * y))


def shear_y(images: Levels, factor: PerImage) -> Levels:
    """Move each column up by ``factor`` times its distance from the left border."""
    return _move(images, lambda y, x: (y + factor[:, None, None] * x, x))


def translate_x(images: Levels, share: PerImage) -> Levels:
    """Move to the left by ``share`` of the width."""
    return _move(images, lambda y, x: (y, x + share[:, None, None] * images.shape[2]))


def translate_y(images: Levels, share: PerImage) -> Levels:
    """Move up by ``share`` of the height."""
    return _move(images, lambda y, x: (y + share[:, None, None] * images.shape[1], x))


# Each operation with its argument, from the share of the highest magnitude and the sign


def _enhancement(share: Shares, _: Int[np.ndarray, " chosen"]) -> Shares:
    return 0.1 + 1.8 * share


def _signed(largest: float) -> Callable[[Shares, Int[np.ndarray, " chosen"]], Shares]:
    return lambda share, sign: largest * share * sign


def _whole(largest: int) -> Callable[[Shares, Int[np.ndarray, " chosen"]], Shares]:
    return lambda share, _: np.floor(largest * share)


OPERATIONS: dict[str, tuple[Callable[[Levels, PerImage], Levels], Callable[[Shares, Int[np.ndarray, " chosen"]], Shares]]] = {
    "AutoContrast": (auto_contrast, _whole(0)),
    "Equalize": (equalize, _whole(0)),
    "Invert": (invert, _whole(0)),
    "Rotate": (rotate, _signed(30.0)),
    "Posterize": (posterize, _whole(4)),
    "Solarize": (solarize, _whole(256)),
    "SolarizeAdd": (solarize_add, _whole(110)),
    "Color": (color, _enhancement),
    "Contrast": (contrast, _enhancement),
    "Brightness": (brightness, _enhancement),
    "Sharpness": (sharpness, _enhancement),
    "ShearX": (shear_x, _signed(0.3)),
    "ShearY": (shear_y, _signed(0.3)),
    "TranslateXRel": (translate_x, _signed(0.45)),
    "TranslateYRel": (translate_y, _signed(0.45)),
}
