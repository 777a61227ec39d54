"""How models compute on this machine: precision, compilation, where the pixels lie. Chosen here, overridden by study.compute, recorded."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F

from kdlib.config import ComputeParams, Recipe, refuse
from kdlib.ranks import say
from kdlib.train.teacher import Teacher
from kdlib.types import Images

COMPILE_STEPS = 2000  # compiling takes half a minute to minutes: a shorter run would not earn it back
TEACHER_GAP = 0.02  # of its logits, relative, in bf16 beside fp32: what rounding to 8 bits costs a deep network (to be measured on a GPU)
RESIDENT_SHARE = 0.5  # of the free memory of a GPU that training images may take


@dataclass(frozen=True)
class Compute:
    """What was chosen for one training."""

    device: torch.device
    bf16: bool = False  # autocast of students; losses stay in fp32, and no scaler is needed
    compiled: bool | Literal["graphs"] = False  # a student with its loss; "graphs": replayed as CUDA graphs
    resident: bool = False  # all training images lie on the device
    ahead: int = 0  # torch's threads that make the next views and teacher's answers meanwhile; on a GPU in a stream of their own

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def record(self) -> dict[str, Any]:
        """For environment.json."""
        return {name: value for name, value in asdict(self).items() if name != "device"}


def choose(params: ComputeParams, device: torch.device, recipe: Recipe, steps: int, image_bytes: int) -> Compute:
    """What params.yaml says; where it says ``auto``, what pays on the device.

    Raises ``Refused`` for bf16 where it is slower than fp32: that is measured.
    """
    on_gpu = device.type == "cuda"
    bf16 = params.precision == "bf16" or (params.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False))
    if bf16 and not on_gpu and (slowdown := bf16_slowdown()) > 1:
        allowed = f"fp32 or auto on this machine, where a convolution in bf16 takes {slowdown:.1f} times as long"
        raise refuse("study.compute.precision", params.precision, allowed, "change it")
    compiled = steps >= COMPILE_STEPS and on_gpu if params.compile == "auto" else params.compile
    resident = params.resident
    if resident == "auto":
        resident = on_gpu and image_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    wanted = params.ahead is True or (params.ahead == "auto" and not on_gpu)  # what a second stream gains on a GPU nobody has measured
    # timm's transforms draw from global generators, which dropout needs meanwhile
    ahead = 0 if not wanted or recipe.augment == "timm" else 1 if on_gpu else torch.get_num_threads() // 2
    return Compute(device, bf16, compiled, resident, ahead)


def answering(teacher: Teacher, compute: Compute, images: Images) -> Teacher:
    """In bf16 where the students are, if its answers to these images stay what they are in fp32; says so if they do not."""
    if not compute.bf16:
        return teacher
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
