"""Torchvision's Mask R-CNN, plain or with the heads of a cascade, on a distilled backbone."""

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.detection import MaskRCNN

from projects.detection import backbone
from projects.detection.cascade import CascadeHeads
from projects.detection.settings import Recipe, Run

# Of an image; the values of mmdetection 2
PROPOSALS = {"mask_rcnn": 1000, "cascade_mask_rcnn": 2000}  # that the region proposal network leaves; in evaluation at most 1,000
SAMPLES = 512  # of them that heads learn from
DETECTIONS = 100  # that are kept; COCO counts no more


def build(key: str, run: Run, recipe: Recipe, root: Path, categories: int) -> nn.Module:
    """Build the detector of a run; its input is a list of images in [0, 1], of any size, and in training their targets.

    Raises ``Refused`` about keys below ``key``, as ``backbone.build``.
    """
    trunk = backbone.build(key, run, recipe, root)
    cfg: Any = trunk.net.pretrained_cfg
    proposals = PROPOSALS[recipe.detector]
    detector = MaskRCNN(
        trunk,
        categories + 1,
        min_size=tuple(recipe.short_sides),
        max_size=recipe.long_side,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
        rpn_post_nms_top_n_train=proposals,
        rpn_post_nms_top_n_test=min(proposals, 1000),
        box_batch_size_per_image=SAMPLES,
        box_detections_per_img=DETECTIONS,
    )
    if recipe.detector == "cascade_mask_rcnn":
        detector.roi_heads = CascadeHeads(detector.roi_heads, trunk.out_channels, categories + 1)
    return detector  # type: ignore[no-any-return] # torchvision has no types
