"""How runs are shared out among processes and cores."""

import pytest
import torch

from kdlib.config.schema import Launch
from kdlib.parallel.placement import Placement

ALONE = Launch(processes=1, nodes=1, rendezvous=None)
TWO = Launch(processes=2, nodes=1, rendezvous=None)


def on(cores: int) -> Placement:
    return Placement(cores, ALONE, RuntimeError)


@pytest.mark.parametrize(
    ("cores", "variants", "seeds", "sizes", "threads"),
    [
        (1, 17, 3, [17, 17, 17], 1),
        (2, 17, 4, [17, 17, 17, 17], 1),
        (2, 17, 5, [17, 17, 17, 17, 9, 8], 1),  # the last seed would keep one core idle
        (2, 17, 1, [9, 8], 1),
        (2, 1, 1, [1], 2),  # nothing to share out: both cores for one
        (8, 17, 5, [17] * 5, 1),
        (16, 17, 5, [6, 6, 5] * 5, 1),
        (16, 2, 5, [1, 1] * 5, 1),
        (16, 1, 5, [1] * 5, 3),
        (64, 4, 5, [1] * 20, 3),
        (4, 0, 5, [0] * 4, 1),
        (4, 0, 1, [], 4),
    ],
)
def test_cores_are_kept_busy(cores: int, variants: int, seeds: int, sizes: list[int], threads: int) -> None:
    found = on(cores).groups(range(variants), range(seeds))
    assert [len(share) for share, _ in found] == sizes
    for seed in range(seeds):
        assert [variant for share, of in found if of == seed for variant in share] == list(range(variants))
    assert on(cores).threads(variants, seeds) == threads
    assert max(1, min(cores, len(found))) * threads <= cores


def test_gpus_and_processes_that_train_together_have_nothing_side_by_side() -> None:
    assert Placement.on(torch.device("cpu"), ALONE, RuntimeError).cores == torch.get_num_threads()
    assert Placement.on(torch.device("cuda"), ALONE, RuntimeError).cores == 1
    assert Placement.on(torch.device("cpu"), TWO, RuntimeError).cores == 1


def test_one_core_works_in_turn_and_here() -> None:
    done: list[int] = []
    assert on(1).run(lambda item: done.append(item) or -item, [3, 1, 2]) == [-3, -1, -2]  # type: ignore[func-returns-value]
    assert done == [3, 1, 2]
