"""The endless stream of training views: any batch of it can be asked for, in any order, in any process, and is always the same."""

from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from jaxtyping import Int, UInt8

from kdlib.config import Recipe
from kdlib.data import augment, mixing, randaugment
from kdlib.seed import generator
from kdlib.types import Batch


@dataclass(frozen=True, eq=False)
class ViewStream:
    """Passes over ``images[index]``, each in an order of its own, cut into batches that run on from one pass into the next.

    So there is no partial batch, and after any number of batches each image was seen equally often, give or take one. Position
    p = step * batch size + i lies in epoch p // n. The batch is one mix group; seed and step alone decide what it holds.

    Raises ValueError when a batch is larger than the subset.
    """

    images: UInt8[np.ndarray, "samples height width channels"]  # may be memory-mapped: only the rows of a batch are read
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

    def batch(self, step: int) -> Batch:
        """The views of one step, from 0: float32 in [0, 1], channels_last."""
        places = self.places(step)
        rows = np.asarray(self.index[places], np.int64)
        rng = generator(self.seed, "views", step)
        levels = torch.from_numpy(np.asarray(self.images[rows])).to(self.device)
        height, width = levels.shape[1:3]
        levels = augment.crop(levels, augment.draw(rng, self.recipe, self.hflip, (len(rows), height, width)))
        levels = randaugment.apply(levels, randaugment.draw(rng, self.recipe.randaugment, len(rows)))
        mix = mixing.draw(rng, self.recipe, height, width)
        labels = torch.from_numpy(np.asarray(self.labels[rows], np.int64)).to(self.device)
        mixed = torch.full((len(rows),), mix.share != 1, device=self.device)
        return Batch(
            images=mixing.images(levels.permute(0, 3, 1, 2).float().div_(255), mix),
            targets=mixing.targets(labels, self.classes, self.recipe.label_smoothing, mix),
            labels=mixing.majority(labels, mix),
            index=torch.from_numpy(places).to(self.device),
            mixed=mixed,
        )

    def places(self, step: int) -> Int[np.ndarray, " batch"]:
        """Which entries of ``index`` the batch of this step holds. From two passes where it runs on from one into the next."""
        size, subset = self.recipe.batch_size, len(self.index)
        places = np.arange(step * size, (step + 1) * size)
        first = step * size // subset
        orders = np.concatenate([self._order(epoch) for epoch in range(first, self.epoch(step) + 1)])
        return np.asarray(orders[places - first * subset], np.int64)

    def epoch(self, step: int) -> int:
        """The pass, from 0, in which the last view of this step lies."""
        return ((step + 1) * self.recipe.batch_size - 1) // len(self.index)

    def ends_epoch(self, step: int) -> bool:
        """Whether a pass is completed within this step."""
        size, subset = self.recipe.batch_size, len(self.index)
        return (step + 1) * size // subset > step * size // subset

    def _order(self, epoch: int) -> Int[np.ndarray, " subset"]:
        """A pass's permutation of the subset. The last two are kept: recomputing one costs as much as a small batch."""
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = generator(self.seed, "order", epoch).permutation(len(self.index))
            for old in [kept for kept in tuple(self._orders) if abs(kept - epoch) > 1]:
                self._orders.pop(old, None)
        return order
