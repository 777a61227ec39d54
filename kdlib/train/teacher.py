"""A teacher: frozen where it is made, and in evaluation mode whatever ``train()`` is called on."""

import torch
from torch import nn

from kdlib.models import Classifier
from kdlib.types import Asks, Images, Output, OutputShape, Part


class Teacher(nn.Module):
    """Answers once for all students of a comparison. Its forward pass takes un-normalised images and keeps no gradient."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.shape: OutputShape = classifier.shape
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002 (a teacher has one mode)
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a student's backward pass must be able to keep these logits
    def forward(self, images: Images, asks: Asks = frozenset({Part.LOGITS})) -> Output:
        output: Output = self.classifier(images, asks)
        return output
