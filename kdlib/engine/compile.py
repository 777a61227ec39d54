"""Compiled models, CUDA graphs of them, and which pays: that depends on the model, the device and the version of torch."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType, MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kdlib.errors import refuse
from kdlib.parallel.ranks import gather_ranks, say

Kind = bool | Literal["graphs"]  # not compiled, compiled, compiled and replayed as a CUDA graph
TRIALS = 10  # of which the quickest counts
# a graph saves the host's work, which a longer step hides (an H200's BEiTv2-B gained 3 %), and keeps the memory of its step to itself
GRAPHS_BELOW = 0.02  # seconds of a step
WARM_UP = 3  # passes before a recording: libraries choose and load kernels in them
Result = TypeVar("Result")


def compiled(module: nn.Module) -> nn.Module:
    """For inputs of the same sizes."""
    # dynamo counts what it compiles by code object, and after eight it goes on uncompiled: each module has one of its own
    forward = type(module).forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    module.forward = MethodType(own, module)
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]


class Replayed:
    """A function of tensors (in dicts and tuples, beside values of other types) as one launch: recorded once for all inputs of the same
    sizes, as a CUDA graph, and replayed.

    The recording changes in place what the function changes in place, and the host has no part in it: what it returns lies where the next
    replay writes. ``unchanged``: within it the passes before a recording, which do change things, leave nothing behind.
    """

    def __init__(self, do: Callable[..., Result], unchanged: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._do, self._unchanged = do, unchanged
        self._recorded: list[tuple[Any, list[Any], Callable[[], None], Any]] = []  # of what, its inputs, how it is replayed, its outputs

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = tree_flatten(arguments)
        signature = structure, [(leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        recorded = next((known for known in self._recorded if known[0] == signature), None)
        if not recorded:
            recorded = signature, *self._record(leaves, structure)
            self._recorded.append(recorded)
        _, inputs, replay, outputs = recorded
        pairs = [(here, leaf) for here, leaf in zip(inputs, leaves, strict=True) if isinstance(leaf, Tensor)]
        torch._foreach_copy_([here for here, _ in pairs], [leaf for _, leaf in pairs])
        replay()
        return outputs

    def _record(self, leaves: list[Any], structure: Any) -> tuple[list[Any], Callable[[], None], Any]:
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(inputs, structure)
        with self._unchanged():
            warm_up(lambda: self._do(*arguments))
        return inputs, *recording(lambda: self._do(*arguments))


def warm_up(do: Callable[[], object]) -> None:
    """As a recording wants it: in another stream than the usual one."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            do()
    torch.cuda.current_stream().wait_stream(aside)


def recording(do: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """How it is replayed, and where the results are then."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread may prepare the next batch meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = do()
    return graph.replay, outputs


def quickest(name: str, steps: Mapping[Kind, Callable[[], object]]) -> Kind:
    """The kind whose step takes the least time; the same for all processes. CUDA graphs are tried only where steps are short.

    Raises ``Refused`` where one fails: what a broken recording leaves behind does not train on.
    """
    if len(steps) == 1:
        return next(iter(steps))
    least = _seconds(name, {kind: step for kind, step in steps.items() if kind != "graphs"})
    if "graphs" in steps and min(least.values()) < GRAPHS_BELOW:
        least |= _seconds(name, {"graphs": steps["graphs"]})
    best = min(least, key=lambda kind: least[kind])
    say(f"{name}: {_named(best)}; a step takes {', '.join(f'{seconds:.3g} s {_named(kind)}' for kind, seconds in least.items())}")
    return best


def _seconds(name: str, steps: Mapping[Kind, Callable[[], object]]) -> dict[Kind, float]:
    """Of a step, in the slowest process."""
    try:
        here = in_turn(list(steps.values()), TRIALS)
    except RuntimeError as error:
        tried = " or ".join(_named(kind) for kind in steps)
        what = f"what works, which {name} {tried} does not ({str(error).splitlines()[0]})"
        raise refuse("study.compute.compile", "auto", what, "set it to false") from error
    return dict(zip(steps, gather_ranks(torch.tensor([here], dtype=torch.float64)).amax(dim=0).tolist(), strict=True))


def _named(kind: Kind) -> str:
    return "as a CUDA graph" if kind == "graphs" else "compiled" if kind else "not compiled"


def in_turn(candidates: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The least seconds of each, tried one after the other in every round; one round before does not count."""
    least = [float("inf")] * len(candidates)
    for number in range(rounds + 1):
        for i, candidate in enumerate(candidates):
            started = time.perf_counter()
            candidate()
            if number:
                least[i] = min(least[i], time.perf_counter() - started)
    return least
