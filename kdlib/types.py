"""What flows between the layers."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, overload

from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]  # in [0, 1], not normalised: each model normalises for itself
Logits = Float[Tensor, "batch classes"]
Embedding = Float[Tensor, "batch features"]
Maps = tuple[Float[Tensor, "batch _ _ _"], ...]  # of a model's stages, from the image to the head: channels and sizes differ
Terms = dict[str, Float[Tensor, ""]]  # named loss terms; their sum is the loss


class Feature(StrEnum):
    """What a method may ask a model for. Maps are those of all stages, which all students of a comparison share.

    Logits come with every answer: the head that gives them is 0.05 % of a ResNet-50's forward pass, 3 % of a MobileNetV3-small's.
    """

    LOGITS = "logits"
    EMBEDDING = "embedding"
    MAPS = "maps"
    PREACTIVATIONS = "preactivations"


Asks = frozenset[Feature]  # empty: the model is not asked at all


@dataclass(frozen=True)
class Batch:
    """One global batch of training views, the same for every student of a comparison and for the teacher."""

    images: Images
    targets: Float[Tensor, "batch classes"]  # the hard label, as probabilities: soft when images are mixed
    labels: Int[Tensor, " batch"]  # the class with the largest share of each (mixed) image
    index: Int[Tensor, " batch"]  # which of the run's training images each came from, before mixing
    mixed: Bool[Tensor, " batch"]  # whether another image has a share in it


@dataclass(frozen=True)
class Output:
    """What a model says about a batch: its logits, and of the rest what it was asked for."""

    logits: Logits
    embedding: Embedding | None = None  # pooled: what the classifier reads
    maps: Maps | None = None  # the stages' outputs, as the next stage reads them
    preactivations: Maps | None = None  # the same before the activation that ends a stage; equal where none does

    @overload
    def need(self, feature: Literal[Feature.LOGITS, Feature.EMBEDDING]) -> Tensor: ...
    @overload
    def need(self, feature: Literal[Feature.MAPS, Feature.PREACTIVATIONS]) -> Maps: ...
    def need(self, feature: Feature) -> Tensor | Maps:
        """This part of it. Raises ValueError, as "found ...; allowed: ...; what to do", if the model did not give it."""
        part: Tensor | Maps | None = getattr(self, feature.value)
        if part is None:
            do = "ask the model for it, or choose another model or method"
            raise ValueError(f"found an answer without {feature.value}; allowed: one that has it; {do}")
        return part

    def map(self, change: Callable[[Tensor], Tensor]) -> "Output":
        """The same parts, each tensor of them changed."""
        maps, before = (None if part is None else tuple(map(change, part)) for part in (self.maps, self.preactivations))
        return Output(change(self.logits), None if self.embedding is None else change(self.embedding), maps, before)


@dataclass(frozen=True)
class OutputShape:
    """What a model's ``Output`` for one image looks like; what it cannot give is 0 or empty."""

    classes: int
    embedding: int  # features
    maps: tuple[tuple[int, int, int], ...]  # channels, height, width of each stage; the preactivations have the same


@dataclass(frozen=True)
class Setup:
    """What a method is made for: what both models' answers look like, and the label of each training image."""

    student: OutputShape
    teacher: OutputShape
    labels: Int[Tensor, " images"]
