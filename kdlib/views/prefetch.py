"""The pixels of a stream's views out of original files, asked for two steps before they are wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdlib.data.lazy_images import Decode, LazyImages, Levels, Rows

AHEAD = 2  # steps; each holds batch_size x 3 size^2 bytes of this process's groups


@dataclass(frozen=True, eq=False)
class DecodePrefetch:
    """Decodes an image once for all views of it that this process's groups of a step want, as with repeated augmentation."""

    images: LazyImages
    wanted: Callable[[int, int], tuple[Rows, Sequence[Any]]]  # of (step, group): the image of each view, and what view of it
    decode: Decode
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
        """Have the views of these groups decoded; the returned function waits for them."""
        levels: dict[int, Levels] = {}
        wanted: list[tuple[int, Any, np.ndarray]] = []
        for group in groups:
            rows, views = self.wanted(step, group)
            levels[group] = np.empty((len(rows), self.images.size, self.images.size, 3), np.uint8)
            wanted += zip(rows.tolist(), views, levels[group], strict=True)
        return self.images.ask(self.decode, wanted, levels)
