"""The endless stream of training views: any batch of it can be asked for, in any order, in any process, and is always the same."""

from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from kdlib.config import Recipe
from kdlib.data import augment, erasing, mixing, pil, randaugment
from kdlib.data.place import sent
from kdlib.seed import generator
from kdlib.types import Batch


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

    # may be memory-mapped: only the rows of a batch are read; or a tensor on the device
    images: UInt8[np.ndarray, "samples height width channels"] | UInt8[Tensor, "samples height width channels"]
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
        places = self.places(step, group)
        rows = np.asarray(self.index[places], np.int64)
        rng = generator(self.seed, "views", step * self.recipe.groups + group)
        levels = self._views(rows, rng, step * self.recipe.groups + group)
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

    def _views(self, rows: Int[np.ndarray, " batch"], rng: np.random.Generator, group: int) -> augment.Levels:
        """Cropped and augmented, before anything is mixed or erased."""
        recipe = self.recipe
        if recipe.augment == "timm":
            images = self.images[rows] if isinstance(self.images, np.ndarray) else self.images[sent(rows, self.device)].cpu().numpy()
            return sent(pil.views(np.asarray(images), recipe, self.hflip, (self.seed, "timm", group)), self.device)
        if isinstance(self.images, Tensor):
            levels = self.images[sent(rows, self.device)]
        else:
            levels = sent(np.asarray(self.images[rows]), self.device)
        batch, height, width, _ = levels.shape
        levels = augment.crop(levels, augment.draw(rng, recipe, self.hflip, (batch, height, width)))
        return randaugment.apply(levels, randaugment.draw(rng, recipe.randaugment, batch))

    def places(self, step: int, group: int = 0) -> Int[np.ndarray, " batch"]:
        """Which entries of ``index`` a group of this step holds. From two passes where it runs on from one into the next."""
        recipe, subset = self.recipe, len(self.index)
        views = np.arange(step * recipe.batch_size + group, (step + 1) * recipe.batch_size, recipe.groups)
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
