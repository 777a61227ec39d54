"""BatchNorm's running statistics where a batch falls into several groups."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdlib.parallel.ranks import mean_over_ranks


class RunningStatistics:
    """Within it a group starts from the statistics that the step started from; ``average`` ends the step with the mean over all groups.

    Torch by itself would let each group start from the one before, which processes side by side cannot repeat. Of one group nothing is
    averaged, and nothing is copied.
    """

    def __init__(self, *modules: nn.Module, groups: int) -> None:
        layers = [layer for module in modules for layer in module.modules() if isinstance(layer, _BatchNorm)]
        statistics = [values for layer in layers for values in (layer.running_mean, layer.running_var) if values is not None]
        self._kept: list[Float[Tensor, " features"]] = statistics if groups > 1 else []
        counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        self._counts: list[Tensor] = counts if groups > 1 else []  # of steps, then
        self._start: list[Tensor] = []
        self._after: list[list[Tensor]] = []  # of each group

    def __enter__(self) -> None:
        if self._after:
            for values, start in zip((*self._kept, *self._counts), self._start, strict=True):
                values.copy_(start)
        else:
            self._start = [values.clone() for values in (*self._kept, *self._counts)]

    def __exit__(self, *_: Any) -> None:
        self._after.append([values.clone() for values in self._kept])

    def average(self) -> None:
        """Over the groups of this process, then over all processes."""
        for values, *after in zip(self._kept, *self._after, strict=True):
            values.copy_(torch.stack(after).mean(0))
        mean_over_ranks(self._kept)
        self._after = []
