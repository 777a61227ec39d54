"""Which stages of two models face each other, and how maps of different sizes are compared."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdlib.types import Maps, OutputShape

StageShape = tuple[int, int, int]  # channels, height, width


def facing(student: OutputShape, teacher: OutputShape, least: int = 1) -> list[tuple[StageShape, StageShape]]:
    """The stages of student and teacher that face each other, from the image to the head: the last faces the last, as in ``pairs``.

    Raises ValueError for a model with fewer than ``least`` stages.
    """
    for who, shape in (("student", student), ("teacher", teacher)):
        if len(shape.maps) < least:
            found = f"a {who} with {len(shape.maps)} stages"
            raise ValueError(f"found {found}; allowed: {least} or more; choose another model, or an earlier stage or another method")
    n = min(len(student.maps), len(teacher.maps))
    return list(zip(student.maps[-n:], teacher.maps[-n:], strict=True))


def pairs(student: Maps, teacher: Maps) -> list[tuple[Tensor, Tensor]]:
    """Maps of the stages that face each other; the one with more stages leaves out its first."""
    n = min(len(student), len(teacher))
    return list(zip(student[-n:], teacher[-n:], strict=True))


def same_size(
    student: Float[Tensor, "batch a _ _"], teacher: Float[Tensor, "batch b _ _"]
) -> tuple[Float[Tensor, "batch a h w"], Float[Tensor, "batch b h w"]]:
    """Two maps at the smaller of their heights and widths; the larger is averaged (adaptive average pooling)."""
    height, width = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    # a map that has this size is returned as it is
    a, b = (one if one.shape[2:] == (height, width) else F.adaptive_avg_pool2d(one, (height, width)) for one in (student, teacher))
    return a, b
