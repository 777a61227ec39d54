"""Average precision as COCO measures it, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from kdlib.parallel.ranks import rank, world
from kdlib.parallel.signals import watched
from projects.detection.coco import Instances, loader

KINDS = {"box": "bbox", "mask": "segm"}  # our name: pycocotools'
# In the order of COCOeval's stats: mean over IoU .50 to .95, at .50, at .75, and of objects below 32^2, up to 96^2, above (pixels)
MEASURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
MASK_THRESHOLD = 0.5  # of a mask's probability (He et al., "Mask R-CNN", ICCV 2017, section 3.1)
Detection = dict[str, Any]  # in COCO's format of results


class Images(Dataset[tuple[int, UInt8[Tensor, "3 height width"]]]):
    """This process's share of a split: every ``world()``-th image, whole, with its id."""

    def __init__(self, instances: Instances) -> None:
        self.instances, self.images = instances, instances.images[rank() :: world()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, UInt8[Tensor, "3 height width"]]:
        image = self.images[number]
        return image, self.instances.decode(image)


def detect(detector: nn.Module, instances: Instances, device: torch.device, workers: int) -> list[Detection]:
    """Detect the objects of every image, one image at a time; the detector is in evaluation mode afterwards.

    Processes share the images out, and each returns the detections of all.
    """
    detector.eval()
    images, detections = Images(instances), list[Detection]()
    with torch.inference_mode(), loader(images, workers, batch_size=None) as items:
        for image, pixels in tqdm(items, total=len(images), desc="evaluation", unit="image", disable=not watched() or rank() > 0):
            (output,) = detector([pixels.to(device).float() / 255])
            detections += as_results(int(image), {name: values.cpu() for name, values in output.items()}, instances.categories)
    return gather(detections)


def gather(detections: list[Detection]) -> list[Detection]:
    """The detections of all processes, in the order of their ranks. Every process calls it."""
    if world() == 1:
        return detections
    by_rank: list[list[Detection]] = [[] for _ in range(world())]
    dist.all_gather_object(by_rank, detections)
    return [detection for of_rank in by_rank for detection in of_rank]


def as_results(image: int, output: dict[str, Tensor], categories: Sequence[int]) -> list[Detection]:
    """Convert a detector's output to COCO's format: boxes from corners to corner and size, masks to run lengths, labels to category ids."""
    boxes = output["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    masks = (output["masks"][:, 0] >= MASK_THRESHOLD).to(torch.uint8).numpy()
    return [
        {
            "image_id": image,
            "category_id": categories[int(label) - 1],
            "bbox": box,
            "score": score,
            "segmentation": rle.encode(np.asfortranarray(mask)),
        }
        for box, score, label, mask in zip(boxes.tolist(), output["scores"].tolist(), output["labels"], masks, strict=True)
    ]


def average_precision(instances: Instances, detections: Sequence[Detection]) -> dict[str, float | None]:
    """Average precisions of boxes and masks in [0, 1]; None where the annotations have no object of that size."""
    measured: dict[str, float | None] = {}
    for kind, type_of_cocoeval in KINDS.items():
        # without bbox, pycocotools sorts masks by their own area and not by that of the box
        results = [{key: value for key, value in detection.items() if kind == "box" or key != "bbox"} for detection in detections]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            evaluation = COCOeval(instances.api, _load_results(instances, results), type_of_cocoeval)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = evaluation.stats[: len(MEASURES)].tolist()
        measured |= {f"{kind}_{name}": None if value < 0 else value for name, value in zip(MEASURES, values, strict=True)}
    return measured


def _load_results(instances: Instances, results: list[Detection]) -> Any:
    if results:
        return instances.api.loadRes(results)
    empty = type(instances.api)()  # loadRes looks at the first result
    empty.dataset = {"images": instances.api.dataset["images"], "categories": instances.api.dataset["categories"], "annotations": []}
    empty.createIndex()
    return empty
