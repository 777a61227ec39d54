"""Function matching (Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov, "A good teacher is patient and consistent", CVPR 2022).

arXiv 2106.05237. Most of what the paper adds to KD is no loss: teacher and student see the same view, mixed, for very many epochs. Here
every method sees the teacher's view; mixing and epochs belong to the recipe in params.yaml.
"""

from kdlib.losses.base import positive
from kdlib.losses.kd import KD


class FunMatch(KD):
    """``weight * kd`` and no hard label, whatever the recipe's hard loss is: the teacher is the function to match.

    Source: arXiv 2106.05237; the factor T^2 of ``kd`` is from the authors' code.
    """

    equation = r"T^2\, \mathrm{KL}\left(\sigma(z_t / T) \,\|\, \sigma(z_s / T)\right)\quad\text{and no hard label}"

    def __init__(self, *, weight: float, temperature: float) -> None:
        super().__init__(hard_weight=0.0, weight=positive("weight", weight), temperature=temperature)
