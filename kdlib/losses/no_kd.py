"""No distillation: the hard label alone."""

from typing import ClassVar

from kdlib.losses.base import Method
from kdlib.types import Batch, Output, Terms


class NoKD(Method):
    """The hard loss times ``hard_weight``, and nothing else: what a student learns without a teacher."""

    needs_teacher: ClassVar[bool] = False

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:  # noqa: ARG002
        return {}
