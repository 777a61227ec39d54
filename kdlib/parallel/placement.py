"""Which processes train which runs: seeds and shares of methods side by side on the cores of a CPU, or one run on several GPUs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from kdlib.config.schema import Launch
from kdlib.parallel.launch import on_cluster, run_distributed
from kdlib.parallel.workers import side_by_side

Item = TypeVar("Item")
Group = TypeVar("Group")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Placement:
    """``cores``: to train on side by side; OMP_NUM_THREADS sets it. One on a GPU, and where several processes train a run together."""

    cores: int
    launch: Launch
    raises: type[Exception]  # what may be the same in all processes that train together, and is to come through

    @staticmethod
    def on(device: torch.device, launch: Launch, raises: type[Exception]) -> "Placement":
        """For the device and the machines at hand."""
        alone = device.type == "cpu" and launch.processes * launch.nodes == 1
        return Placement(torch.get_num_threads() if alone else 1, on_cluster(launch), raises)

    def groups(self, variants: Sequence[Item], seeds: Sequence[int]) -> list[tuple[Sequence[Item], int]]:
        """The variants that train together, with their seed: all of them; for the seeds that are left over for the last round, shares that
        keep the cores busy. A share costs a teacher's pass of its own.
        """
        whole = len(seeds) // self.cores * self.cores
        size = -(-len(variants) // max(1, self.cores // max(1, len(seeds) - whole)))
        shares = [variants[first : first + size] for first in range(0, len(variants), max(1, size))]
        return [(variants, seed) for seed in seeds[:whole]] + [(share, seed) for seed in seeds[whole:] for share in shares]

    def threads(self, variants: int, seeds: int) -> int:
        """Torch's threads of one process. Numbers depend on them."""
        return self.cores // max(1, min(self.cores, len(self.groups(range(variants), range(seeds)))))

    def run(self, work: Callable[[Group], Result], groups: Sequence[Group]) -> list[Result]:
        """Return ``work`` of every group, in their order. It must be picklable, and so must the groups."""
        if self.cores > 1:
            return side_by_side(work, groups, self.cores)
        return self.run_together(functools.partial(_one_by_one, work, groups))

    def run_together(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``, done here or in all processes that params.yaml wants to train together."""
        if self.launch.processes * self.launch.nodes == 1:
            return work()
        return run_distributed(self.launch, work, self.raises)


def _one_by_one(work: Callable[[Group], Result], groups: Sequence[Group]) -> list[Result]:
    return [work(group) for group in groups]
