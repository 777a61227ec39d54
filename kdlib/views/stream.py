"""The endless stream of training views: any batch of it can be asked for, in any order, in any process, and is always the same."""

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from kdlib.config.schema import Recipe
from kdlib.data.lazy_images import LazyImages, Rows
from kdlib.decoding.pixels import Cut
from kdlib.parallel.ranks import local_groups
from kdlib.seed import generator
from kdlib.types import Batch
from kdlib.views import crop, erasing, mixup, randaugment, timm_pil
from kdlib.views.crop import to_device
from kdlib.views.mixup import mix_groups
from kdlib.views.prefetch import DecodePrefetch


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
    images: UInt8[np.ndarray, "samples height width channels"] | UInt8[Tensor, "samples height width channels"] | LazyImages
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
        """Make the views of one group of a step, both counted from 0: float32 in [0, 1], channels_last."""
        recipe, images, device = self.recipe, self.images, self.device
        number = step * mix_groups(recipe) + group  # over all steps
        positions = self.positions(step, group)
        rng = generator(self.seed, "views", number)
        rows = np.asarray(self.index[positions], np.int64)
        index = to_device(positions, device)
        labels = to_device(np.asarray(self.labels[rows], np.int64), device)
        if isinstance(images, LazyImages):
            levels = to_device(self.prefetch.levels(step, group), device)
            if recipe.augment == "batched":  # boxes are cut out while decoding
                crops, _ = crop.draw_cuts(rng, recipe, self.hflip, images.size, images.sides(rows))
                levels = crop.shift_and_flip(levels, crops.shifts, crops.flips)
        elif recipe.augment == "timm":
            keys = timm_pil.view_keys(self.seed, number, len(rows))
            pixels = torch.as_tensor(images[rows]).numpy(force=True)
            levels = to_device(timm_pil.transform_images(pixels, recipe, self.hflip, keys), device)
        else:
            levels = images[to_device(rows, device)] if isinstance(images, Tensor) else to_device(np.asarray(images[rows]), device)
            levels = crop.crop(levels, crop.draw_crops(rng, recipe, self.hflip, levels.shape[:3]))
        if recipe.augment == "batched":
            levels = randaugment.augment(levels, randaugment.draw_operations(rng, recipe.randaugment, len(rows)))
        views = levels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(255)
        height, width = views.shape[2:]
        mix = mixup.draw_mix(rng, recipe, height, width)
        views = mixup.mix_images(views, mix)
        targets = mixup.mix_targets(labels, self.classes, recipe.label_smoothing, mix)
        labels = mixup.majority_labels(labels, mix)
        if recipe.erasing:
            views = erasing.erase(views, erasing.draw_erasures(rng, recipe.erasing, (len(rows), height, width)))
        return Batch(views, targets, labels, index, mixed=torch.full((len(rows),), mix.share != 1, device=device))

    @functools.cached_property
    def prefetch(self) -> DecodePrefetch:
        """Decodes views of images that stay in their files, ahead of the steps that want them."""
        images, recipe = self.images, self.recipe
        assert isinstance(images, LazyImages)

        def wanted(step: int, group: int) -> tuple[Rows, Sequence[timm_pil.Keys | Cut | None]]:
            number = step * mix_groups(recipe) + group
            rows = np.asarray(self.index[self.positions(step, group)], np.int64)
            if recipe.augment == "timm":
                return rows, timm_pil.view_keys(self.seed, number, len(rows))
            rng = generator(self.seed, "views", number)
            return rows, crop.draw_cuts(rng, recipe, self.hflip, images.size, images.sides(rows))[1]

        decode = images.decode
        if recipe.augment == "timm":
            decode = functools.partial(timm_pil.transform_files, recipe=recipe, hflip=self.hflip, size=images.size)
        return DecodePrefetch(images, wanted, decode, local_groups(mix_groups(recipe)))

    def positions(self, step: int, group: int = 0) -> Int[np.ndarray, " batch"]:
        """Positions in ``index`` that a group of this step holds: of two passes where it runs on from one into the next."""
        recipe, subset = self.recipe, len(self.index)
        views = np.arange(step * recipe.batch_size + group, (step + 1) * recipe.batch_size, mix_groups(recipe))
        images = views // recipe.repeats
        first, last = images[0] // subset, images[-1] // subset
        orders = np.concatenate([self._order(number) for number in range(first, last + 1)])
        return np.asarray(orders[images - first * subset], np.int64)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, of as many views as there are images, is completed within this step."""
        size, subset = self.recipe.batch_size, len(self.index)
        return (step + 1) * size // subset > step * size // subset

    def _order(self, number: int) -> Int[np.ndarray, " subset"]:
        """Permute the subset for a pass. The last two orders are kept: recomputing one costs as much as a small batch."""
        order = self._orders.get(number)
        if order is None:
            for old in [kept for kept in tuple(self._orders) if abs(kept - number) > 1]:
                self._orders.pop(old, None)
            order = self._orders[number] = generator(self.seed, "order", number).permutation(len(self.index))
        return order
