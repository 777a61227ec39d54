"""How models compute on this machine: precision, compilation, where the pixels lie. Chosen here, overridden by study.compute, recorded."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from kdlib.config.schema import ComputeParams, Recipe
from kdlib.engine.compile import Kind, in_turn, quickest
from kdlib.engine.teacher import Teacher
from kdlib.errors import refuse
from kdlib.parallel.ranks import say, world
from kdlib.types import Asks, Images

# To compile takes about a minute, on an H200 70 s for a ResNet-50 and its BEiT, which saves 21 ms a step, and 45 s for ResNets of CIFAR's
# size, which saves 7 ms: a shorter run would not earn it back.
COMPILE_STEPS = 5000
TEACHER_GAP = 0.02  # of its logits, relative, in bf16 beside fp32: what rounding to 8 bits costs a deep network
RESIDENT_SHARE = 0.5  # of the free memory of a GPU that training images may take


@dataclass(frozen=True)
class Backend:
    """What was chosen for one training."""

    device: torch.device
    bf16: bool = False  # autocast of students; losses stay in fp32, and no scaler is needed
    kinds: tuple[Kind, ...] = (False,)  # how a student with its loss, and the teacher, may be compiled; more than one: what is quickest
    resident: bool = False  # all training images lie on the device
    ahead: int = 0  # torch's threads that make the next views and the teacher's outputs meanwhile

    @property
    def compiled(self) -> Kind:
        """As decided."""
        return self.kinds[0]

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def forked(self) -> AbstractContextManager[None]:
        """Within, draws of torch's global generators leave no trace."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def record(self) -> dict[str, Any]:
        """For environment.json."""
        return {"bf16": self.bf16, "compiled": self.compiled, "resident": self.resident, "ahead": self.ahead}


def choose_backend(params: ComputeParams, device: torch.device, recipe: Recipe, steps: int, image_bytes: int | None, asks: Asks) -> Backend:
    """What params.yaml says; where it says ``auto``, what pays on the device.

    ``image_bytes``: of all training images, None if they stay in their files. ``asks``: what the runs ask of the teacher.
    Raises ``Refused`` for bf16 where it is slower than fp32, which is measured, for CUDA graphs where there are none, for resident images
    that stay in their files, and for work ahead on a GPU.
    """
    on_gpu = device.type == "cuda"
    bf16 = params.precision == "bf16" or (params.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False))
    if bf16 and not on_gpu and (slowdown := bf16_slowdown()) > 1:
        allowed = f"fp32 or auto on this machine, where a convolution in bf16 takes {slowdown:.1f} times as long"
        raise refuse("study.compute.precision", params.precision, allowed, "change it")
    if params.compile == "graphs" and not (on_gpu and world() == 1):
        raise refuse("study.compute.compile", "graphs", "auto, true or false, but for one process with a GPU", "change it")
    if params.resident is True and image_bytes is None:
        raise refuse("study.compute.resident", True, "auto or false where images stay in their files (source: originals)", "change it")
    resident = params.resident
    if resident == "auto":
        resident = on_gpu and image_bytes is not None and image_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    if params.ahead is True and on_gpu:  # measured: 1 % of a ResNet-50's steps, and what a CUDA graph gains is lost
        raise refuse("study.compute.ahead", True, "auto or false on a GPU, which works beside the host anyway", "change it")
    # a view alone does not take long to make; timm's transforms draw from global generators, which dropout needs meanwhile
    pays = bool(asks) and not on_gpu and recipe.augment != "timm"
    ahead = torch.get_num_threads() // 2 if params.ahead and pays else 0
    return Backend(device, bf16, _kinds(params, steps) if on_gpu or params.compile is True else (False,), resident, ahead)


def _kinds(params: ComputeParams, steps: int) -> tuple[Kind, ...]:
    if params.compile != "auto":
        return (params.compile,)
    if steps < COMPILE_STEPS:
        return (False,)
    return (False, True, "graphs") if world() == 1 else (False, True)


def fastest_teacher(teacher: Teacher, backend: Backend, images: Images, asks: Asks) -> Teacher:
    """The fastest equivalent of ``teacher`` for this batch shape: bf16 if the students use it, compiled if that is measured to help."""
    exact = bf16_if_exact(teacher, images) if backend.bf16 else teacher

    def answer(kind: Kind) -> None:
        candidates[kind](images, asks)
        torch.get_device_module(images.device).synchronize()

    candidates = {kind: exact.compiled(kind) for kind in backend.kinds}
    return candidates[quickest("the teacher", {kind: partial(answer, kind) for kind in candidates})]


def bf16_if_exact(teacher: Teacher, images: Images) -> Teacher:
    """``teacher`` in bf16 if its logits of these images stay what they are in fp32; else itself, and says so."""
    rough = teacher.in_bf16()
    exact = teacher(images).logits.float()
    gap = float((rough(images).logits.float() - exact).norm() / exact.norm())
    if gap <= TEACHER_GAP:
        return rough
    say(f"the teacher answers in fp32: in bf16 its logits differ by {gap:.1%} (more than {TEACHER_GAP:.0%})")
    return teacher


@cache
def bf16_slowdown() -> float:
    """How many times longer a small convolution and its backward pass take on the CPU under bf16 autocast than in fp32."""
    images, weight = torch.rand(64, 32, 16, 16), torch.rand(32, 32, 3, 3, requires_grad=True)

    def work(enabled: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            F.conv2d(images, weight, padding=1).sum().backward()

    fp32, bf16 = in_turn([lambda: work(False), lambda: work(True)], rounds=5)
    return bf16 / fp32


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, torch computes with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
