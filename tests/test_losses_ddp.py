"""Every registered method, none of them named, in two processes that share a batch, against one process that has all of it.

DistributedDataParallel trains by the mean of the processes' gradients. So either that mean is the gradient of the joined batch, and what a
method remembers is the same everywhere, or the method says that it is a per-device loss: then each process is as if it were alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from kdlib.losses import METHODS, Method
from kdlib.types import Batch, Output
from tests.toys import BATCH, STUDENT, Case, compute, draw, make, reorder, reorder_batch, require_grad, tensors, total
from tests.training import start

NAMES = sorted(METHODS)
RANKS, STEPS = 2, 3
HALVES = [slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS) for rank in range(RANKS)]
Step = dict[str, Any]  # terms, gradients of what the student says and of the method's parameters, buffers after it
REMEMBERING = [name for name in NAMES if not METHODS[name].relational and list(make(name).buffers())]
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


class Trained(nn.Module):
    """A student, of two linear layers, and its method in one module: what DistributedDataParallel wraps."""

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.logits, self.embedding = nn.Linear(STUDENT.classes, STUDENT.classes), nn.Linear(STUDENT.embedding, STUDENT.embedding)
        self.method = make(name)
        self.double()

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        said = replace(student, logits=self.logits(student.logits), embedding=self.embedding(student.embedding))
        return total(compute(self.method, said, teacher, batch))


def train(model: nn.Module, half: slice = slice(None)) -> dict[str, Tensor]:
    """What is trained and remembered after three steps on this part of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for case in cases():
        optimizer.zero_grad()
        model(*part(case, half)).backward()
        optimizer.step()
    return {key.removeprefix("module."): value.clone() for key, value in model.state_dict().items()}


def train_distributed(name: str, rank: int, broadcast: bool) -> dict[str, Tensor]:
    """By processes that start differently, as far as DistributedDataParallel makes them equal: without ``broadcast`` not in buffers."""
    model = Trained(name, seed=rank)
    with torch.no_grad():
        for value in [*model.method.parameters(), *(model.method.buffers() if broadcast else ())]:
            value.add_(rank)
    return train(DistributedDataParallel(model, broadcast_buffers=broadcast), HALVES[rank])


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


def run(rank: int, folder: Path) -> None:
    """One of the processes: every method, on this rank's half of each batch; those that remember in DistributedDataParallel too."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    torch.save({name: steps(make(name).double(), HALVES[rank]) for name in NAMES}, folder / f"{rank}.pt")
    wrapped = {(name, broadcast): train_distributed(name, rank, broadcast) for name in REMEMBERING for broadcast in (True, False)}
    torch.save(wrapped, folder / f"wrapped_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each process wrote what it found. One pair for all methods: its start is what takes time."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [start(run, rank, folder) for rank in range(RANKS)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * RANKS
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, list[Step]]]:
    """What each process found, by method."""
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


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    same(found, expected)
    for key, value in expected.items():
        assert value.is_floating_point() or torch.equal(found[key], value), key  # assert_close would compare integers within fp32


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
                same_state(rank["buffers"], joined[step]["buffers"])
    assert differs == METHODS[name].relational
    assert ("per-device loss" in (METHODS[name].__doc__ or "")) == METHODS[name].relational


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("name", REMEMBERING)
def test_in_distributed_data_parallel_processes_train_and_remember_as_one(name: str, broadcast: bool, folder: Path) -> None:
    start, joined = Trained(name).state_dict(), train(Trained(name))
    for rank in range(RANKS):
        same_state(torch.load(folder / f"wrapped_{rank}.pt", weights_only=True)[name, broadcast], joined)
    moved = {key for key in start if not torch.equal(joined[key], start[key])}
    assert moved >= {key for key, _ in Trained(name).named_parameters()}


def test_what_processes_share_is_needed() -> None:
    """Halves that know nothing of each other remember something else than the joined batch: the tests above could have failed."""
    assert REMEMBERING
    for name in REMEMBERING:
        joined = steps(make(name).double())[-1]["buffers"]
        half = steps(make(name).double(), HALVES[0])[-1]["buffers"]
        assert any(not torch.allclose(half[key], value, equal_nan=True) for key, value in joined.items()), name
