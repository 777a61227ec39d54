"""The pixels of a stream's views out of original files, asked for two steps before they are wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from kdlib.data.lazy_images import LazyImages, Wanted

AHEAD = 2  # steps; each holds batch_size x 3 size^2 bytes of this process's groups

Rows = Int[np.ndarray, " batch"]
Levels = UInt8[np.ndarray, "batch size size 3"]


@dataclass(frozen=True, eq=False)
class DecodePrefetch:
    """An image of which several groups of a step want views, as with repeated augmentation, is decoded once for those of this process."""

    images: LazyImages
    wanted: Callable[[int, int], tuple[Rows, Sequence[Any]]]  # of (step, group): the image of each view, and what view of it
    work: Callable[..., Levels]  # what makes views of units (image, views that are wanted of it)
    more: tuple[Any, ...]  # that it needs
    groups: range  # of this process
    _asked: dict[int, Callable[[], dict[int, Levels]]] = field(default_factory=dict, init=False, repr=False)

    def levels(self, step: int, group: int) -> Levels:
        """The views of a group. Any may be asked for, but only those of ``groups``, step after step, are there in time."""
        if group not in self.groups:
            return self.ask(step, range(group, group + 1))()[group]
        near = range(step, step + AHEAD + 1)
        for old in [other for other in self._asked if other not in near]:
            del self._asked[old]
        for other in near:
            if other not in self._asked:
                self._asked[other] = self.ask(other, self.groups)
        return self._asked[step]()[group]

    def ask(self, step: int, groups: range) -> Callable[[], dict[int, Levels]]:
        """What returns the views of these groups when they are there."""
        made: dict[int, Levels] = {}
        wanted: dict[int, list[Wanted]] = {}
        for group in groups:
            rows, views = self.wanted(step, group)
            made[group] = np.empty((len(rows), self.images.size, self.images.size, 3), np.uint8)
            for row, view, home in zip(rows.tolist(), views, made[group], strict=True):
                wanted.setdefault(row, []).append((view, home))
        waiting = self.images.ask(self.work, wanted, *self.more)

        def there() -> dict[int, Levels]:
            waiting()
            return made

        return there
