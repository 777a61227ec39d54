"""Peak memory against allocations whose size is known."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.engine import probe
from kdlib.engine.probe import peak_bytes
from kdlib.losses import METHODS
from kdlib.losses.base import Method
from kdlib.types import Batch, Output, Terms
from tests import toys
from tests.training import method, setting, trained

N = 1000
SIZE = 4 * N * N  # bytes of one N x N tensor in fp32
OLDER = torch.ones(N, N)
WEIGHT = torch.eye(N, requires_grad=True)


def new() -> Tensor:
    return torch.empty(N, N)


def result() -> list[Tensor]:
    return [new(), new()]


def one_after_another() -> None:
    for _ in range(3):
        new()


def two_at_once_of_three() -> None:
    a = new()
    b = new()
    del a
    a = new()
    del a, b


def views() -> list[Tensor]:
    a = new()
    return [a, a.t(), a.view(-1)[:5], a.expand(3, N, N), a.detach()]


def in_place() -> None:
    new().fill_(1.0).add_(OLDER).relu_()


def what_was_there_before() -> Tensor:
    return OLDER.view(-1)


def within_a_kernel() -> None:
    """logsumexp subtracts each row's maximum in a tensor of its own."""
    torch.logsumexp(OLDER, dim=1)


def saved_for_backward() -> None:
    """At the end the first relu's result, which the second product keeps for its backward, that product, and the second relu's result."""
    h = OLDER @ WEIGHT
    h = h.relu()
    h = h @ WEIGHT
    h.relu()


def kept_by_a_later_result() -> Tensor:
    """The square's backward needs ``a``, which nobody else holds."""
    a = OLDER * WEIGHT
    loss = a.square()
    del a
    return loss


def gone_after_backward() -> None:
    for _ in range(3):
        (OLDER @ WEIGHT).square().sum().backward()
        WEIGHT.grad = None


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda: None, 0),
        (new, 1),
        (result, 2),
        (one_after_another, 1),
        (two_at_once_of_three, 2),
        (views, 1),
        (in_place, 1),
        (what_was_there_before, 0),
        (within_a_kernel, 1),
        (saved_for_backward, 3),
        (kept_by_a_later_result, 2),
    ],
)
def test_known_allocations(step: Callable[[], object], expected: int) -> None:
    small = 0.01 * SIZE  # rows of a matrix
    assert peak_bytes(step) == pytest.approx(expected * SIZE, abs=small)


def test_a_chain_without_gradient_keeps_nothing() -> None:
    with torch.no_grad():
        assert peak_bytes(saved_for_backward) == 2 * SIZE


def test_the_same_to_the_byte_when_repeated() -> None:
    assert len({peak_bytes(gone_after_backward) for _ in range(3)}) == 1


def test_what_an_earlier_call_left_behind_is_older_memory() -> None:
    """Freed by the next call it does not count against that call's peak."""
    held: dict[str, Tensor] = {}

    def step() -> None:
        held.clear()
        held["new"] = new()

    assert [peak_bytes(step) for _ in range(3)] == [SIZE] * 3


def test_garbage_stays_until_the_end() -> None:
    def cycle() -> None:
        for _ in range(3):
            knot: list[Any] = [new()]
            knot.append(knot)

    assert gc.isenabled()
    before = gc.get_threshold()
    gc.set_threshold(1)  # collect all the time
    try:
        assert peak_bytes(cycle) == 3 * SIZE
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()


def test_numbers_are_not_touched() -> None:
    case = toys.draw()

    def terms() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        return toys.compute(toys.make("kd"), *case), F.dropout(OLDER)

    expected, found = terms(), []
    peak_bytes(lambda: found.append(terms()))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


def test_a_running_profiler_is_refused_and_goes_on() -> None:
    with torch.autograd.profiler.profile(profile_memory=True) as outer:
        with pytest.raises(RuntimeError, match="found a running profiler"):
            peak_bytes(new)
        new()
    assert "aten::empty" in {event.name for event in outer.function_events}


def test_an_error_in_the_step_comes_out_and_the_next_call_works() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 // 0)
    assert gc.isenabled()
    assert peak_bytes(new) == SIZE


def test_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_bytes(new)
    assert capfd.readouterr() == ("", "")


# Of a training step


class Greedy(Method):
    """Its backward pass needs ``SIZE`` bytes."""

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:  # noqa: ARG002
        return {"much": (student.logits.sum() * OLDER).square().mean()}


def test_a_runs_step_is_measured_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, BatchNorm, what a method remembers, drop path, curve: as if nobody had looked."""
    methods: dict[str, Callable[[], Method]] = {name: method(name) for name in METHODS}
    methods["greedy"] = lambda: Greedy(hard_weight=1.0, weight=1.0)
    measured = trained(setting(epochs=1.0), methods, tmp_path / "measured")
    monkeypatch.setattr(probe, "_step_bytes", lambda *_: 0)
    untouched = trained(setting(epochs=1.0), methods, tmp_path / "untouched")
    found = {name: json.loads(files.pop("metrics.json")) for name, files in measured.items()}
    expected = {name: json.loads(files.pop("metrics.json")) for name, files in untouched.items()}
    sizes = {name: metrics.pop("step_bytes") for name, metrics in found.items()}
    assert all(metrics.pop("step_bytes") == 0 for metrics in expected.values())
    assert (measured, found) == (untouched, expected)
    assert all(size >= 4 * (found[name]["student_parameters"] + found[name]["extra_parameters"]) for name, size in sizes.items())
    assert sizes["greedy"] > SIZE > sizes["no_kd"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    device = torch.device("cuda")
    assert peak_bytes(lambda: [torch.empty(N, N, device=device) for _ in range(2)], device) == pytest.approx(2 * SIZE, rel=0.01)
