"""What flows between the layers."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]  # in [0, 1], not normalised: each model normalises for itself
Logits = Float[Tensor, "batch classes"]
Terms = dict[str, Float[Tensor, ""]]  # named loss terms; their sum is the loss


@dataclass(frozen=True)
class Batch:
    """One global batch of training views, the same for every student of a comparison and for the teacher."""

    images: Images
    targets: Float[Tensor, "batch classes"]  # the hard label, as probabilities: soft when images are mixed
    labels: Int[Tensor, " batch"]  # the class with the largest share of each (mixed) image
    index: Int[Tensor, " batch"]  # which training sample each image came from, before mixing


@dataclass(frozen=True)
class Output:
    """What a model says about a batch."""

    logits: Logits
