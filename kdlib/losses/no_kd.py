"""No distillation: the hard label alone."""

from kdlib.losses.base import Method, positive
from kdlib.types import Batch, Output, Terms


class NoKD(Method):
    """The hard loss times ``hard_weight``, and nothing else: what a student learns without a teacher."""

    asks_teacher = frozenset()
    equation = r"0"

    def __init__(self, *, hard_weight: float) -> None:
        super().__init__(hard_weight=positive("hard_weight", hard_weight), weight=0.0)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        return {}
