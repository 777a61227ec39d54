"""Images and instances: views follow their instances, repeat and are shared out; annotations that do not fit are refused."""

import json
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import masks_to_boxes

from projects.detection import coco
from projects.detection.coco import GroupSampler, Instances, Views
from projects.detection.tests import shapes
from tests.refusals import refused


def test_a_view_is_its_images_whatever_is_done_to_it(root: Path) -> None:
    views = Views(shapes.split(root, "train"), shapes.recipe(crop=[40, 60], crop_sides=[60, 70]), seed=0)
    sizes = set()
    for epoch in range(3):
        for number in range(len(views)):
            image, target = views[epoch, number]
            assert image.dtype == torch.uint8
            assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
            sizes.add(image.shape)
            for mask, box, label in zip(target["masks"], target["boxes"], target["labels"], strict=True):
                if mask.any():  # of an ellipse nothing but the corner of its box may be left
                    tight = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
                    assert (tight[:2] >= box[:2] - 1.5).all() and (tight[2:] <= box[2:] + 1.5).all()
                    colour = image[:, mask.bool()].float().mean(dim=1)
                    assert (colour.argmax() == 0) == (label == 1)  # rectangles are red, ellipses blue
    assert len(sizes) > 10


def test_views_repeat_in_any_order_and_leave_global_draws_alone(root: Path) -> None:
    views = Views(shapes.split(root, "train"), shapes.recipe(), seed=0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [views[1, number][0] for number in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    for number in (3, 0, 2, 1):
        assert torch.equal(views[1, number][0], first[number])
    flipped = sum(not torch.equal(views[0, number][0], views[epoch, number][0]) for epoch in (1, 2, 3) for number in range(8))
    assert 6 <= flipped <= 18  # of 24, each with probability 1/2


def test_crowds_and_lines_are_not_learnt(root: Path) -> None:
    train = shapes.split(root, "train")
    assert len(train.api.imgToAnns[10]) == 3
    assert [instance["category_id"] for instance in train.instances(10)] == [3, 7]
    train.api.imgToAnns[10][0]["bbox"][2] = 0.5
    assert [instance["category_id"] for instance in train.instances(10)] == [7]


def test_each_image_once_in_an_epoch_and_on_from_any_step() -> None:
    recipe = shapes.recipe(batch_size=4, group_size=2, epochs=2)
    groups = list(GroupSampler(9, recipe, seed=0, first=0))
    assert len(groups) == len(GroupSampler(9, recipe, seed=0, first=0)) == 2 * 2 * 2  # epochs, steps, groups
    for epoch in range(2):
        images = [index for group in groups for index in group if index[0] == epoch]
        assert len(images) == len(set(images)) == 8
    assert groups[0] != [(0, image) for _, image in groups[4]]
    assert list(GroupSampler(9, recipe, seed=0, first=3)) == groups[6:]


def annotations(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "val.json").read_text())
    return content


def read_again(root: Path, folder: Path, content: dict[str, Any]) -> Instances:
    (folder / "new.json").write_text(json.dumps(content))
    return coco.read("coco.val", root / "val", folder / "new.json")


def test_annotations_that_cannot_be_read_are_refused(root: Path, tmp_path: Path) -> None:
    with refused("coco.val_annotations", "No such file or directory", "correct the path"):
        coco.read("coco.val", root / "val", tmp_path / "none.json")
    (tmp_path / "cut.json").write_text((root / "val.json").read_text()[:100])
    with refused("coco.val_annotations", "cut.json", "allowed: JSON"):
        coco.read("coco.val", root / "val", tmp_path / "cut.json")
    (tmp_path / "captions.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": []}))
    with refused("coco.val_annotations", "without annotations", "instances_*.json"):
        coco.read("coco.val", root / "val", tmp_path / "captions.json")
    content = annotations(root)
    del content["annotations"][1]["segmentation"]
    with refused("coco.val_annotations", "annotations without segmentation"):
        read_again(root, tmp_path, content)


def test_ids_that_do_not_fit_are_refused(root: Path, tmp_path: Path) -> None:
    for field, section in (("category_id", "categories"), ("image_id", "images")):
        content = annotations(root)
        content["annotations"][2][field] = 99
        with refused("coco.val_annotations", f"annotation 3 with {field} 99", f"an id of {section}"):
            read_again(root, tmp_path, content)
    content = annotations(root)
    content["categories"].append({"id": 9, "name": "star"})
    with refused("coco.val_annotations", "category ids [9] in only one of train and val"):
        coco.check_same_categories(shapes.split(root, "val"), read_again(root, tmp_path, content))


def test_images_that_are_not_there_or_damaged_are_refused(root: Path, tmp_path: Path) -> None:
    with refused("coco.val_images", str(tmp_path), "000.png"):
        coco.read("coco.val", tmp_path, root / "val.json")
    for number in range(3):
        (tmp_path / f"00{number}.png").write_bytes(b"nothing")
    val = coco.read("coco.val", tmp_path, root / "val.json")
    with refused("coco.val_images", "000.png: cannot identify image file"):
        val.decode(10)
