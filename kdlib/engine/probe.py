"""What one step costs, tried on a fresh student: memory at its peak, and time in each way of computing it."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.autograd.profiler import profile

from kdlib.engine.backend import Backend
from kdlib.engine.compile import Kind, quickest
from kdlib.engine.gradients import Gradients, StudentWithLoss
from kdlib.types import Batch, Output

CPU = torch.device("cpu")
Factory = Callable[[], StudentWithLoss]  # makes the student of a run with its loss, as training begins


@dataclass(frozen=True)
class StepCost:
    """Of one run: peak memory of a step on the device, computed eagerly, and the kind in which a step takes the least time."""

    peak_bytes: int  # forward pass, loss, backward pass, first gradients; not the batch, the teacher's pass, the weights, the optimiser
    kind: Kind


def try_step(name: str, make: Factory, batch: Batch, teacher: Output | None, backend: Backend, groups: int) -> StepCost:
    """Try one step of a run. ``groups``: those of a batch that a process takes. Random draws leave no trace."""
    with backend.forked():
        return StepCost(_step_bytes(make, batch, teacher, backend, groups), _fastest_kind(name, make, batch, teacher, backend, groups))


def _step_bytes(make: Factory, batch: Batch, teacher: Output | None, backend: Backend, groups: int) -> int:
    peak = 0
    for _ in range(2 if backend.device.type == "cuda" else 1):  # the first makes cuBLAS allocate what it keeps
        model = make()
        state = model.state_dict()  # held: what a step replaces is not freed meanwhile
        gradients = Gradients(model, replace(backend, kinds=(False,)), groups, distributed=False)
        peak = peak_bytes(partial(gradients, batch, teacher, 1.0), backend.device)
        del state
    return peak


def _fastest_kind(name: str, make: Factory, batch: Batch, teacher: Output | None, backend: Backend, groups: int) -> Kind:
    if len(backend.kinds) == 1:
        return backend.compiled

    def step(gradients: Gradients) -> None:
        gradients(batch, teacher, 1.0)
        torch.get_device_module(backend.device).synchronize()

    ways = {kind: Gradients(make(), replace(backend, kinds=(kind,)), groups, distributed=False) for kind in backend.kinds}
    return quickest(name, {kind: partial(step, gradients) for kind, gradients in ways.items()})


def peak_bytes(step: Callable[[], object], device: torch.device = CPU) -> int:
    """The most bytes that ``step`` had allocated on ``device`` and not yet freed at any one time, its result included.

    On the CPU: of torch's allocator, to the byte the same in each call with the same number of threads. It sees what a kernel frees
    before it returns, and not what lies outside of torch: NumPy's arrays, oneDNN's own scratch. On CUDA: the growth of
    ``torch.cuda.max_memory_allocated``, so what ``step`` frees of older memory counts against its peak.
    Raises RuntimeError on the CPU while torch.profiler runs: there can be one at a time.
    """
    with _no_garbage_collection():
        return _on_cuda(step, device) if device.type == "cuda" else _on_cpu(step)


def _on_cpu(step: Callable[[], object]) -> int:
    """By the profiler's record of the allocator. (A TorchDispatchMode changes what it watches: under one, autograd adds gradients up
    out of place, which costs ReviewKD 12 % more; and it cannot see within a kernel.)"""
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise RuntimeError("found a running profiler; allowed: none while memory is measured, as only one can run; stop it first")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each call writes two lines, and the first "ERROR" where there is no GPU
    with profile(profile_memory=True) as watched:
        result = step()
    del result
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    allocations = [event["args"] for event in events if event["name"] == "[memory]"]
    return _peak((event["Addr"], event["Bytes"]) for event in sorted(allocations, key=lambda event: event["Ev Idx"]))


def _peak(allocations: Iterator[tuple[int, int]]) -> int:
    """From addresses and bytes, negative where they are freed. What is freed and was not allocated here does not count."""
    alive: dict[int, int] = {}
    now = peak = 0
    for address, size in allocations:
        if size < 0:
            now -= alive.pop(address, 0)
        else:
            alive[address] = size
            now += size
            peak = max(peak, now)
    return peak


def _on_cuda(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """GC runs at arbitrary times and frees tensors in reference cycles; it would blur the peak."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
