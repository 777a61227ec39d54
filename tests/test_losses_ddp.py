"""Every registered method, none of them named, in two processes that share a batch, against one process that has all of it.

DistributedDataParallel trains by the mean of the processes' gradients. So either that mean is the gradient of the joined batch, and what a
method remembers is the same everywhere, or the method says that it is a per-device loss: then each process is as if it were alone.
"""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from kdlib.losses import METHODS, Method
from tests.toys import BATCH, Case, compute, draw, make, reorder, reorder_batch, require_grad, tensors, total
from tests.training import start

NAMES = sorted(METHODS)
RANKS, STEPS = 2, 3
HALVES = [slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS) for rank in range(RANKS)]
Step = dict[str, Any]  # terms, gradients of what the student says and of the method's parameters, buffers after it
every_method = pytest.mark.parametrize("name", NAMES)


def cases() -> Iterator[Case]:
    """One joined batch per step. An image comes to other processes in other steps, and more than once in a batch, with other views."""
    rng = torch.Generator().manual_seed(0)
    for std in (1.0, 2.0, 4.0):
        student, teacher, batch = draw(std, torch.float64)
        order, again = torch.randperm(BATCH, generator=rng), torch.randint(BATCH, (BATCH,), generator=rng)
        yield reorder(student, order), reorder(teacher, order), reorder_batch(batch, again)


def part(case: Case, half: slice) -> Case:
    student, teacher, batch = case
    places = torch.arange(BATCH)[half]
    return reorder(student, places), reorder(teacher, places), reorder_batch(batch, places)


def steps(method: Method, half: slice = slice(None)) -> list[Step]:
    """What a process that sees this part of each batch computes; nothing is trained, so that only what is remembered changes."""
    found = []
    for case in cases():
        student, teacher, batch = part(case, half)
        said = require_grad(student)
        method.zero_grad()
        terms = compute(method, said, teacher, batch)
        total(terms).backward()
        found.append(
            {
                "terms": {key: value.detach() for key, value in terms.items()},
                "student": [_gradient(leaf) for leaf in tensors(said)],
                "own": {key: _gradient(parameter) for key, parameter in method.named_parameters()},
                "buffers": {key: value.clone() for key, value in method.named_buffers()},
            }
        )
    return found


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


def run(rank: int, folder: Path) -> None:
    """One of the processes: every method, on this rank's half of each batch."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    torch.save({name: steps(make(name).double(), HALVES[rank]) for name in NAMES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Step]]]:
    """What each process found, by method. One pair for all methods: its start is what takes time."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [start(run, rank, folder) for rank in range(RANKS)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def averaged(parts: list[Step]) -> Step:
    """As DistributedDataParallel does: a student's gradient by an image counts for the mean loss of all processes."""
    return {
        "terms": {key: _mean([one["terms"][key] for one in parts]) for key in parts[0]["terms"]},
        "student": [torch.cat(grads) / len(parts) for grads in zip(*(one["student"] for one in parts), strict=True)],
        "own": {key: _mean([one["own"][key] for one in parts]) for key in parts[0]["own"]},
    }


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(dim=0)


def same(found: Any, expected: Any) -> None:
    assert_close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@every_method
def test_two_processes_are_one_on_the_joined_batch_or_say_that_they_are_not(name: str, ranks: list[dict[str, list[Step]]]) -> None:
    joined = steps(make(name).double())
    alone = [steps(make(name).double(), half) for half in HALVES]
    differs = False
    for step in range(STEPS):
        found = [rank[name][step] for rank in ranks]
        together, one = averaged(found), {key: value for key, value in joined[step].items() if key != "buffers"}
        if METHODS[name].relational:
            same(found, [half[step] for half in alone])
            differs |= any(not torch.allclose(together["terms"][key], one["terms"][key], rtol=1e-6) for key in one["terms"])
        else:
            same(together, one)
            for rank in found:
                same(rank["buffers"], joined[step]["buffers"])
    assert differs == METHODS[name].relational
    assert ("per-device loss" in (METHODS[name].__doc__ or "")) == METHODS[name].relational


def test_what_processes_share_is_needed() -> None:
    """Halves that know nothing of each other remember something else than the joined batch: the test above could have failed."""
    remembering = [name for name in NAMES if not METHODS[name].relational and list(make(name).buffers())]
    assert remembering
    for name in remembering:
        joined = steps(make(name).double())[-1]["buffers"]
        half = steps(make(name).double(), HALVES[0])[-1]["buffers"]
        assert any(not torch.allclose(half[key], value, equal_nan=True) for key, value in joined.items()), name
