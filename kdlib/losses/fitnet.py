"""FitNets: hints from one stage (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv 1412.6550)."""

from jaxtyping import Float
from torch import Tensor, nn

from kdlib.losses.base import Method, count
from kdlib.losses.stages import facing, pairs, same_size
from kdlib.types import Batch, Feature, Output, Setup, Terms


def fitnet(guided: Float[Tensor, "batch channels h w"], hint: Float[Tensor, "batch channels h w"]) -> Float[Tensor, ""]:
    """(guided - hint)^2, mean over images, channels and places; in the teacher's squared units.

    ``guided``: the student's map after the regressor. The paper's hint loss (arXiv 1412.6550, its second-stage objective) is half the sum
    over channels and places; the mean, and the weight of 100 that goes with it, are those of the public re-implementations.
    """
    return (guided - hint).square().mean()


class FitNet(Method):
    """``hard_weight * hard + weight * fitnet``, both from the first step on: the paper trains by the hint first and by labels afterwards.

    ``stage``: which stage gives the hint, counted from the last (1) as stages face each other. The regressor is one 1x1 convolution; where
    sizes differ, the larger map is average-pooled to the smaller one, so nothing but channels is learned.
    """

    asks_student = asks_teacher = frozenset({Feature.MAPS})
    equation = r"\mathrm{mean} \left( W \ast f_s - f_t \right)^2"

    def __init__(self, *, hard_weight: float, weight: float, stage: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.stage = count("stage", stage)

    def adapt(self, setup: Setup) -> None:
        (narrow, *_), (wide, *_) = facing(setup.student, setup.teacher, least=self.stage)[-self.stage]
        self.regressor = nn.Conv2d(narrow, wide, kernel_size=1)

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        pair = pairs(student.need(Feature.MAPS), teacher.need(Feature.MAPS))[-self.stage]
        guided, hint = same_size(*pair)  # pooling first: it commutes with a 1x1 convolution
        return {"hint": fitnet(self.regressor(guided), hint)}
