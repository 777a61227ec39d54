"""A detector by torchvision on a backbone of ours."""

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.detection import MaskRCNN

from kdlib.detection import backbone
from kdlib.detection.settings import Recipe, Run

PROPOSALS = 1000  # that the region proposal network leaves of an image, in training and evaluation (mmdetection 2's Mask R-CNN)


def build(key: str, run: Run, recipe: Recipe, root: Path, categories: int) -> nn.Module:
    """The detector of a run: a list of images in [0, 1] of any size, and in training their targets, go in.

    Raises ``Refused`` about keys below ``key``, as ``backbone.build``.
    """
    trunk = backbone.build(key, run, recipe, root)
    cfg: Any = trunk.net.pretrained_cfg
    detector: nn.Module = MaskRCNN(
        trunk,
        categories + 1,
        min_size=tuple(recipe.short_sides),
        max_size=recipe.long_side,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
        rpn_post_nms_top_n_train=PROPOSALS,
        rpn_post_nms_top_n_test=PROPOSALS,
    )
    return detector
