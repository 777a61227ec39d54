"""Cascade Mask R-CNN: three heads in a row, each on the boxes of the one before, each learning to be stricter.

Source: Cai and Vasconcelos, "Cascade R-CNN: high quality object detection and instance segmentation", TPAMI 2021, arXiv 1906.09756; loss,
heads and averaging of scores as results/published/coco_recipes.csv and ConvNeXt's official code for detection have them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, remove_small_boxes

from projects.detection.coco import Target

WIDTH = 1024  # of a head's vector
MASK_WIDTH = 256
CONVOLUTIONS = 4  # of a head, for boxes and for masks
GIOU_WEIGHT = 10.0
Boxes = Float[Tensor, "_ 4"]  # corners in pixels; images of a list have different numbers of them


class Strictness(NamedTuple):
    """How strict one head is."""

    iou: float  # with an object, from which on a box counts as one
    weight: float  # of its losses
    box_weights: tuple[float, float, float, float]  # one over the standard deviations that its offsets are scaled with


STAGES = (
    Strictness(0.5, 1.0, (10.0, 10.0, 5.0, 5.0)),
    Strictness(0.6, 0.5, (20.0, 20.0, 10.0, 10.0)),
    Strictness(0.7, 0.25, (30.0, 30.0, 15.0, 15.0)),
)


class BoxHead(nn.Module):
    """From the maps of boxes to the classes' logits and to one refinement of the box for all classes."""

    def __init__(self, channels: int, classes: int, side: int) -> None:
        super().__init__()
        self.trunk = FastRCNNConvFCHead((channels, side, side), [channels] * CONVOLUTIONS, [WIDTH], nn.BatchNorm2d)
        self.logits, self.offsets = nn.Linear(WIDTH, classes), nn.Linear(WIDTH, 4)

    def forward(self, maps: Float[Tensor, "boxes channels side side"]) -> tuple[Float[Tensor, "boxes classes"], Boxes]:
        embedding = self.trunk(maps)
        return self.logits(embedding), self.offsets(embedding)


class Sampled(NamedTuple):
    """The boxes of a batch that a head learns from; lists have an entry for each image."""

    boxes: list[Boxes]
    labels: list[Int[Tensor, " _"]]  # 0 is the background
    objects: list[Int[Tensor, " _"]]  # of the image's targets, which one each box is matched with
    proposed: list[Tensor]  # which of the boxes were proposed, and not the objects' own


class CascadeHeads(RoIHeads):  # type: ignore[misc] # torchvision has no types
    """The heads of a cascade, in the place of those of torchvision's Mask R-CNN: their pools, sampler and thresholds stay."""

    def __init__(self, plain: RoIHeads, channels: int, classes: int) -> None:
        super().__init__(
            plain.box_roi_pool,
            nn.ModuleList(BoxHead(channels, classes, plain.box_roi_pool.output_size[0]) for _ in STAGES),
            None,
            *(0.5, 0.5, 512, 0.25, None),  # the stages and the next lines replace all of these
            *(plain.score_thresh, plain.nms_thresh, plain.detections_per_img),
            plain.mask_roi_pool,
            nn.ModuleList(MaskRCNNHeads(channels, [MASK_WIDTH] * CONVOLUTIONS, 1) for _ in STAGES),
            nn.ModuleList(MaskRCNNPredictor(MASK_WIDTH, MASK_WIDTH, classes) for _ in STAGES),
        )
        self.fg_bg_sampler = plain.fg_bg_sampler
        self.matchers = [Matcher(stage.iou, stage.iou, allow_low_quality_matches=False) for stage in STAGES]
        self.coders = [BoxCoder(stage.box_weights) for stage in STAGES]

    def forward(
        self, features: dict[str, Tensor], proposals: list[Boxes], image_shapes: list[tuple[int, int]], targets: list[Target] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            assert targets is not None  # as in torchvision: the model has refused it before
            return [], self._learn(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _learn(
        self, features: dict[str, Tensor], proposals: list[Boxes], image_shapes: list[tuple[int, int]], targets: list[Target]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, stage in enumerate(STAGES):
            sampled = self._sample(number, proposals, targets)
            logits, offsets = self.box_head[number](self.box_roi_pool(features, sampled.boxes, image_shapes))
            refined = self._refine(number, offsets, sampled.boxes)
            terms = {
                "classifier": F.cross_entropy(logits, torch.cat(sampled.labels)),
                "box": self._box_loss(refined, sampled, targets),
                "mask": self._mask_loss(number, features, image_shapes, sampled, targets),
            }
            losses |= {f"loss_{name}_{number + 1}": stage.weight * loss for name, loss in terms.items()}
            by_image = zip(refined, sampled.proposed, image_shapes, strict=True)
            proposals = [_clip(boxes.detach()[proposed], shape) for boxes, proposed, shape in by_image]
        return losses

    def _sample(self, number: int, proposals: list[Boxes], targets: list[Target]) -> Sampled:
        """Sample from the proposals and the objects' own boxes: a quarter of the sample lies on objects, if there are as many."""
        self.proposal_matcher = self.matchers[number]
        objects = [target["boxes"].to(proposals[0].dtype) for target in targets]
        boxes = self.add_gt_proposals(proposals, objects)
        matched, labels = self.assign_targets_to_proposals(boxes, objects, [target["labels"] for target in targets])
        chosen = self.subsample(labels)
        return Sampled(
            [of_image[index] for of_image, index in zip(boxes, chosen, strict=True)],
            [of_image[index] for of_image, index in zip(labels, chosen, strict=True)],
            [of_image[index] for of_image, index in zip(matched, chosen, strict=True)],
            [index < len(of_image) for of_image, index in zip(proposals, chosen, strict=True)],
        )

    def _refine(self, number: int, offsets: Boxes, boxes: Sequence[Boxes]) -> list[Boxes]:
        """Move the boxes by a head's offsets, in fp32: half precision cannot hold 1,333 pixels and a fraction."""
        moved: Boxes = self.coders[number].decode_single(offsets.float(), torch.cat(list(boxes)))
        return list(moved.split([len(of_image) for of_image in boxes]))

    def _box_loss(self, refined: list[Boxes], sampled: Sampled, targets: list[Target]) -> Float[Tensor, ""]:
        """1 - generalised IoU of the boxes that lie on objects with those objects, summed, over the number of all sampled boxes."""
        on_object = [labels > 0 for labels in sampled.labels]
        expected = [target["boxes"][matched[on]] for target, matched, on in zip(targets, sampled.objects, on_object, strict=True)]
        boxes = [of_image[on] for of_image, on in zip(refined, on_object, strict=True)]
        loss: Tensor = generalized_box_iou_loss(torch.cat(boxes), torch.cat(expected), reduction="sum")
        return GIOU_WEIGHT * loss / sum(map(len, refined))

    def _mask_loss(
        self, number: int, features: dict[str, Tensor], image_shapes: list[tuple[int, int]], sampled: Sampled, targets: list[Target]
    ) -> Float[Tensor, ""]:
        on_object = [labels > 0 for labels in sampled.labels]
        boxes = [of_image[on] for of_image, on in zip(sampled.boxes, on_object, strict=True)]
        matched = [of_image[on] for of_image, on in zip(sampled.objects, on_object, strict=True)]
        masks, labels = [target["masks"] for target in targets], [target["labels"] for target in targets]
        logits = self.mask_predictor[number](self.mask_head[number](self.mask_roi_pool(features, boxes, image_shapes)))
        loss: Tensor = maskrcnn_loss(logits, boxes, masks, labels, matched)
        return loss

    def _detect(self, features: dict[str, Tensor], proposals: list[Boxes], image_shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Detect objects: boxes by the last head, scores by the mean of all heads' logits, masks by the mean of their probabilities."""
        votes = []
        for number in range(len(STAGES)):
            logits, offsets = self.box_head[number](self.box_roi_pool(features, proposals, image_shapes))
            votes.append(logits.float())
            if number < len(STAGES) - 1:
                refined = self._refine(number, offsets, proposals)  # a box that left the image becomes a line: all heads vote on it
                proposals = [clip_boxes_to_image(boxes, shape) for boxes, shape in zip(refined, image_shapes, strict=True)]
        mean = torch.stack(votes).mean(dim=0)
        self.box_coder = self.coders[-1]
        by_class = offsets.float().repeat(1, mean.shape[1])  # torchvision's way to the detections wants a box for each class
        boxes, scores, labels = self.postprocess_detections(mean, by_class, proposals, image_shapes)
        maps = self.mask_roi_pool(features, boxes, image_shapes)
        heads = zip(self.mask_head, self.mask_predictor, strict=True)
        masks = [maskrcnn_inference(predictor(head(maps)), labels) for head, predictor in heads]
        means = [torch.stack(of_image).mean(dim=0) for of_image in zip(*masks, strict=True)]
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, of_image, strict=True)) for of_image in zip(boxes, scores, labels, means, strict=True)]


def _clip(boxes: Boxes, shape: tuple[int, int]) -> Boxes:
    """Clip boxes to the image, without those outside of it, of which no more than a line would be left."""
    clipped: Boxes = clip_boxes_to_image(boxes, shape)
    return clipped[remove_small_boxes(clipped, min_size=1e-2)]
