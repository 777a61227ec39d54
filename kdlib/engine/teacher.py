"""A teacher: frozen where it is made, and in evaluation mode whatever ``train()`` is called on."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from kdlib.engine.compile import Kind, Replayed, compiled
from kdlib.models.build import Classifier
from kdlib.types import Asks, Feature, Images, Output, OutputShape


class Teacher(nn.Module):
    """Answers once for all students of a comparison. Its forward pass takes un-normalised images and keeps no gradient.

    With ``bf16`` it computes in half the precision: its weights too, or autocast. ``kind``: how it is compiled.
    """

    def __init__(self, classifier: Classifier, bf16: Literal[False, "autocast", "weights"] = False, kind: Kind = False) -> None:
        super().__init__()
        self.shape: OutputShape = classifier.shape
        self.bf16, self.kind = bf16, kind
        self.classifier = classifier.requires_grad_(False)
        self._model = compiled(classifier) if kind else classifier
        self._replayed = Replayed(self._answer)
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002 (a teacher has one mode)
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a student's backward pass must be able to keep these logits
    def forward(self, images: Images, asks: Asks = frozenset({Feature.LOGITS})) -> Output:
        if self.kind == "graphs":  # what is replayed is overwritten by the next replay
            return Output(**tree_map_only(Tensor, torch.clone, self._replayed(images, asks)))
        return Output(**self._answer(images, asks))

    def _answer(self, images: Images, asks: Asks) -> dict[str, Any]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16 == "autocast"):
            output: Output = self._model(images.bfloat16() if self.bf16 == "weights" else images, asks)
        return vars(output)

    def compiled(self, kind: Kind) -> "Teacher":
        """The same answers, computed in another way; without compiling, this one."""
        return Teacher(copy.deepcopy(self.classifier), self.bf16, kind) if kind else self

    def in_bf16(self) -> "Teacher":
        """Without BatchNorm, a copy with weights in bf16, where nothing is cast any more; with it autocast, since statistics need fp32."""
        if any(isinstance(module, _BatchNorm) for module in self.modules()):
            return Teacher(self.classifier, "autocast")
        return Teacher(copy.deepcopy(self.classifier).bfloat16(), "weights")
