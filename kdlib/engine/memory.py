"""How much memory a piece of work needs at its peak."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.autograd.profiler import profile

CPU = torch.device("cpu")


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
    return _peak((one["Addr"], one["Bytes"]) for one in sorted(allocations, key=lambda one: one["Ev Idx"]))


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
    """It comes when it likes, and with it the end of tensors in cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
