"""The endless stream of training views: any batch of it can be asked for, in any order, in any process, and is always the same."""

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from kdlib.config import Recipe
from kdlib.data import augment, erasing, mixing, pil, randaugment
from kdlib.data.originals import Originals
from kdlib.data.place import sent
from kdlib.data.reading import Reading
from kdlib.decoding import pixels
from kdlib.decoding.pixels import Cut
from kdlib.ranks import own
from kdlib.seed import generator
from kdlib.types import Batch

Rows = Int[np.ndarray, " batch"]


@dataclass(frozen=True, eq=False)
class ViewStream:
    """Passes over ``images[index]``, each in an order of its own, cut into batches that run on from one pass into the next.

    So there is no partial batch, and after any number of batches each image was seen equally often, give or take its repeats in a row.

    A batch falls into mix groups of equal size: what is mixed, what BatchNorm normalises and what a loss compares lies in one group. Seed,
    step and number of the group alone decide what it holds; so one process with two groups trains as two with one each. View v of
    the stream, of n images with r repeats, is of image v // r in pass v // (n r), and lies in group v % groups: repeats fall into different
    groups, as far as there are (as timm's RepeatAugSampler deals them out to processes).

    Raises ValueError when a batch is larger than the subset.
    """

    # may be memory-mapped: only the rows of a batch are read; or a tensor on the device; or in files, decoded by other processes
    images: UInt8[np.ndarray, "samples height width channels"] | UInt8[Tensor, "samples height width channels"] | Originals
    labels: Int[np.ndarray, " samples"]
    index: Int[np.ndarray, " subset"]  # the samples to pass over
    _: KW_ONLY
    classes: int
    recipe: Recipe
    hflip: float  # probability of a mirrored view
    seed: int
    device: torch.device | str = "cpu"  # where the pixels are moved about; the draws do not depend on it
    _orders: dict[int, Int[np.ndarray, " subset"]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.recipe.batch_size > len(self.index):
            raise ValueError(f"batch_size: found {self.recipe.batch_size}; allowed: at most the {len(self.index)} training images")

    def batch(self, step: int, group: int = 0) -> Batch:
        """The views of one group of a step, both from 0: float32 in [0, 1], channels_last."""
        places, rows = self.places(step, group), self._rows(step, group)
        rng = self._generator(step, group)
        levels = self._views(rows, rng, step, group)
        height, width = levels.shape[1:3]
        mix = mixing.draw(rng, self.recipe, height, width)
        labels = sent(np.asarray(self.labels[rows], np.int64), self.device)
        mixed = torch.full((len(rows),), mix.share != 1, device=self.device)
        values = levels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(255)
        images = mixing.images(values, mix)
        if self.recipe.erasing:
            images = erasing.apply(images, erasing.draw(rng, self.recipe.erasing, (len(rows), height, width)))
        return Batch(
            images=images,
            targets=mixing.targets(labels, self.classes, self.recipe.label_smoothing, mix),
            labels=mixing.majority(labels, mix),
            index=sent(places, self.device),
            mixed=mixed,
        )

    def _views(self, rows: Rows, rng: np.random.Generator, step: int, group: int) -> augment.Levels:
        """Cropped and augmented, before anything is mixed or erased."""
        recipe = self.recipe
        if recipe.augment == "timm":
            return sent(self._timms(rows, step, group), self.device)
        if isinstance(self.images, Originals):
            crops, _ = self._cuts(rows, rng)
            levels = sent(self.reading.levels(step, group), self.device)
            levels = augment.shift_and_flip(levels, crops.shifts, crops.flips)
        else:
            images = self.images
            levels = images[sent(rows, self.device)] if isinstance(images, Tensor) else sent(np.asarray(images[rows]), self.device)
            batch, height, width, _ = levels.shape
            levels = augment.crop(levels, augment.draw(rng, recipe, self.hflip, (batch, height, width)))
        return randaugment.apply(levels, randaugment.draw(rng, recipe.randaugment, len(rows)))

    def _timms(self, rows: Rows, step: int, group: int) -> pil.Pixels:
        if isinstance(self.images, Originals):
            return self.reading.levels(step, group)
        images = self.images[rows] if isinstance(self.images, np.ndarray) else self.images[sent(rows, self.device)].cpu().numpy()
        return pil.views(np.asarray(images), self.recipe, self.hflip, self._keys(step, group))

    def _keys(self, step: int, group: int) -> pil.Keys:
        return (self.seed, "timm", step * mixing.mix_groups(self.recipe) + group)

    def _cuts(self, rows: Rows, rng: np.random.Generator) -> tuple[augment.Crops, list[Cut | None]]:
        """What is drawn of views of original images: boxes are cut out of these, shifts and flips move the views."""
        assert isinstance(self.images, Originals)
        size, batch = self.images.size, len(rows)
        crops = augment.draw(rng, self.recipe, self.hflip, (batch, size, size), self.images.sides(rows))
        bicubic = rng.random(batch) < 0.5
        if crops.boxes is None:
            return crops, [None] * batch
        return crops, [Cut(*box) for box in zip(*crops.boxes.tolist(), bicubic.tolist(), strict=True)]

    def _wanted(self, step: int, group: int) -> tuple[Rows, Sequence[pil.Keys | Cut | None]]:
        """The images of a group, and what view of each is to be made."""
        rows = self._rows(step, group)
        if self.recipe.augment == "timm":
            return rows, [(*self._keys(step, group), i) for i in range(len(rows))]
        return rows, self._cuts(rows, self._generator(step, group))[1]

    @functools.cached_property
    def reading(self) -> Reading:
        images = self.images
        assert isinstance(images, Originals)
        groups = own(mixing.mix_groups(self.recipe))
        if self.recipe.augment == "timm":
            return Reading(images, self._wanted, pil.views_of_files, (self.recipe, self.hflip, images.size), groups)
        return Reading(images, self._wanted, pixels.views, (images.size, images.crop_pct), groups)

    def _rows(self, step: int, group: int) -> Rows:
        return np.asarray(self.index[self.places(step, group)], np.int64)

    def _generator(self, step: int, group: int) -> np.random.Generator:
        return generator(self.seed, "views", step * mixing.mix_groups(self.recipe) + group)

    def places(self, step: int, group: int = 0) -> Int[np.ndarray, " batch"]:
        """Which entries of ``index`` a group of this step holds. From two passes where it runs on from one into the next."""
        recipe, subset = self.recipe, len(self.index)
        views = np.arange(step * recipe.batch_size + group, (step + 1) * recipe.batch_size, mixing.mix_groups(recipe))
        images = views // recipe.repeats
        first, last = images[0] // subset, images[-1] // subset
        orders = np.concatenate([self._order(number) for number in range(first, last + 1)])
        return np.asarray(orders[images - first * subset], np.int64)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, of as many views as there are images, is completed within this step."""
        size, subset = self.recipe.batch_size, len(self.index)
        return (step + 1) * size // subset > step * size // subset

    def _order(self, number: int) -> Int[np.ndarray, " subset"]:
        """A pass's permutation of the subset. The last two are kept: recomputing one costs as much as a small batch."""
        order = self._orders.get(number)
        if order is None:
            order = self._orders[number] = generator(self.seed, "order", number).permutation(len(self.index))
            for old in [kept for kept in tuple(self._orders) if abs(kept - number) > 1]:
                self._orders.pop(old, None)
        return order
