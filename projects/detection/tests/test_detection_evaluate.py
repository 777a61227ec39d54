"""Average precisions: those of perfect, shifted and missing detections, by hand and by pycocotools from files."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from projects.detection import evaluate
from projects.detection.coco import Instances
from projects.detection.tests import shapes
from tests.test_distributed import meet
from tests.training import start


@pytest.fixture(scope="module")
def val(root: Path) -> Instances:
    return shapes.split(root, "val")


def perfect(val: Instances, shift: float = 0.0) -> list[evaluate.Detection]:
    """The annotations as a detector's detections, moved to the right by ``shift`` pixels."""
    detections = []
    for image in val.images:
        instances = val.instances(image)
        masks = torch.from_numpy(np.stack([np.roll(val.mask(instance), round(shift), axis=1) for instance in instances]))
        boxes = torch.tensor([[x + shift, y, x + w + shift, y + h] for x, y, w, h in (instance["bbox"] for instance in instances)])
        labels = torch.tensor([val.categories.index(instance["category_id"]) + 1 for instance in instances])
        output = {"boxes": boxes, "scores": torch.linspace(0.9, 0.8, len(instances)), "labels": labels, "masks": masks[:, None].float()}
        detections += evaluate.as_results(image, output, val.categories)
    return detections


def test_perfect_detections_have_a_precision_of_one(val: Instances) -> None:
    measured = evaluate.average_precision(val, perfect(val))
    expected = {f"{kind}_{name}": None if name == "ap_large" else 1.0 for kind in ("box", "mask") for name in evaluate.MEASURES}
    assert measured == pytest.approx(expected)


def test_detections_beside_their_objects_have_what_pycocotools_says(val: Instances, root: Path, tmp_path: Path) -> None:
    """Through files, as one would by hand."""
    detections = perfect(val, shift=3)
    measured = evaluate.average_precision(val, detections)
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        rows = [
            {"image_id": detection["image_id"], "category_id": detection["category_id"], "score": detection["score"]}
            | (
                {"bbox": detection["bbox"]}
                if kind == "box"
                else {"segmentation": detection["segmentation"] | {"counts": detection["segmentation"]["counts"].decode()}}
            )
            for detection in detections
        ]
        (tmp_path / "detections.json").write_text(json.dumps(rows))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(root / "val.json"))
            evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), theirs)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert 0 < evaluation.stats[0] < 1
        assert [measured[f"{kind}_{name}"] for name in evaluate.MEASURES[:5]] == evaluation.stats[:5].tolist()


def test_precision_is_the_share_of_thresholds_that_the_overlap_reaches(val: Instances) -> None:
    """By hand: all boxes moved by an eighth of their width have an IoU of 7/9, which is .50 to .75, six of ten thresholds."""
    detections = perfect(val)
    for detection in detections:
        detection["bbox"][0] += detection["bbox"][2] / 8
    measured = evaluate.average_precision(val, detections)
    assert measured["box_ap"] == pytest.approx(0.6)
    assert (measured["box_ap50"], measured["box_ap75"]) == (1.0, 1.0)


def test_no_detection_has_a_precision_of_zero(val: Instances) -> None:
    measured = evaluate.average_precision(val, [])
    assert measured["box_ap"] == measured["mask_ap"] == 0.0


def test_every_image_has_detections_with_category_ids(val: Instances) -> None:
    class Sees(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            (image,) = images
            assert image.max() <= 1
            masks = torch.ones(1, 1, *image.shape[1:])
            return [{"boxes": torch.tensor([[1.0, 2, 11, 22]]), "scores": torch.ones(1), "labels": torch.tensor([2]), "masks": masks}]

    detections = evaluate.detect(Sees(), val, torch.device("cpu"), workers=0)
    assert [detection["image_id"] for detection in detections] == list(val.images)
    assert {(detection["category_id"], *detection["bbox"]) for detection in detections} == {(7, 1.0, 2.0, 10.0, 20.0)}


def gather_as_one_of_two(number: int, folder: Path) -> None:
    meet(number, folder)
    gathered = evaluate.gather([{"image_id": image} for image in ([1, 2], [3])[number]])
    (folder / f"{number}.json").write_text(json.dumps(gathered))
    dist.destroy_process_group()


def test_each_process_has_the_detections_of_all(tmp_path: Path) -> None:
    processes = [start(gather_as_one_of_two, number, tmp_path) for number in range(2)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(2):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == [{"image_id": 1}, {"image_id": 2}, {"image_id": 3}]
