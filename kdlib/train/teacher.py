"""A teacher: frozen where it is made, and in evaluation mode whatever ``train()`` is called on."""

import copy
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdlib.models import Classifier
from kdlib.types import Asks, Images, Output, OutputShape, Part


class Teacher(nn.Module):
    """Answers once for all students of a comparison. Its forward pass takes un-normalised images and keeps no gradient.

    With ``bf16`` it computes in half the precision: its weights too, or autocast.
    """

    def __init__(self, classifier: Classifier, bf16: Literal[False, "autocast", "weights"] = False) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.shape: OutputShape = classifier.shape
        self.bf16 = bf16
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002 (a teacher has one mode)
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a student's backward pass must be able to keep these logits
    def forward(self, images: Images, asks: Asks = frozenset({Part.LOGITS})) -> Output:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16 == "autocast"):
            output: Output = self.classifier(images.bfloat16() if self.bf16 == "weights" else images, asks)
        return output

    def in_bf16(self) -> "Teacher":
        """Without BatchNorm, a copy with weights in bf16, where nothing is cast any more; with it autocast, since statistics need fp32."""
        if any(isinstance(module, _BatchNorm) for module in self.modules()):
            return Teacher(self.classifier, "autocast")
        return Teacher(copy.deepcopy(self.classifier).bfloat16(), "weights")
