"""Average precision as COCO measures it, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from kdlib.parallel.ranks import gather_items, rank, world
from kdlib.parallel.signals import watched
from projects.detection.coco import Instances, loaded

KINDS = {"box": "bbox", "mask": "segm"}  # ours: pycocotools'
# In the order of COCOeval's stats: mean over IoU .50 to .95, at .50, at .75, and of objects below 32^2, up to 96^2, above (pixels)
MEASURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
MASK_THRESHOLD = 0.5  # of a mask's probability (He et al., "Mask R-CNN", ICCV 2017, section 3.1)
Detected = dict[str, Any]  # one of COCO's results


class Images(Dataset[tuple[int, UInt8[Tensor, "3 height width"]]]):
    """Every so many-th image of the whole split as it is, with its id."""

    def __init__(self, instances: Instances) -> None:
        self.instances, self.images = instances, instances.images[rank() :: world()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, UInt8[Tensor, "3 height width"]]:
        image = self.images[number]
        return image, self.instances.decode(image)


def detect(detector: nn.Module, instances: Instances, device: torch.device, workers: int) -> list[Detected]:
    """COCO's results for every image, one at a time; the detector is in evaluation mode afterwards. Processes share the images out, and
    all get all results.
    """
    detector.eval()
    images, found = Images(instances), list[Detected]()
    with torch.inference_mode(), loaded(images, workers, batch_size=None) as items:
        for image, pixels in tqdm(items, total=len(images), desc="evaluation", unit="image", disable=not watched() or rank() > 0):
            (answer,) = detector([pixels.to(device).float() / 255])
            found += results(int(image), {name: values.cpu() for name, values in answer.items()}, instances.categories)
    return gather_items(found)


def results(image: int, answer: dict[str, Tensor], categories: Sequence[int]) -> list[Detected]:
    """Boxes from corners to corner and size, masks to COCO's run lengths, labels to category ids."""
    boxes = answer["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    masks = (answer["masks"][:, 0] >= MASK_THRESHOLD).to(torch.uint8).numpy()
    return [
        {
            "image_id": image,
            "category_id": categories[int(label) - 1],
            "bbox": box,
            "score": score,
            "segmentation": rle.encode(np.asfortranarray(mask)),
        }
        for box, score, label, mask in zip(boxes.tolist(), answer["scores"].tolist(), answer["labels"], masks, strict=True)
    ]


def measure(instances: Instances, found: Sequence[Detected]) -> dict[str, float | None]:
    """Average precisions of boxes and masks in [0, 1]; None where the annotations have no object of that size."""
    measured: dict[str, float | None] = {}
    for kind, theirs in KINDS.items():
        # of masks the area, which sorts them by size, is their own and not that of the box
        parts = [{key: value for key, value in one.items() if kind == "box" or key != "bbox"} for one in found]
        with contextlib.redirect_stdout(io.StringIO()):  # it tells how far it is
            evaluation = COCOeval(instances.api, _as_annotations(instances, parts), theirs)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = evaluation.stats[: len(MEASURES)].tolist()
        measured |= {f"{kind}_{name}": None if value < 0 else value for name, value in zip(MEASURES, values, strict=True)}
    return measured


def _as_annotations(instances: Instances, found: list[Detected]) -> Any:
    if found:
        return instances.api.loadRes(found)
    empty = type(instances.api)()  # loadRes looks at the first result
    empty.dataset = {"images": instances.api.dataset["images"], "categories": instances.api.dataset["categories"], "annotations": []}
    empty.createIndex()
    return empty
