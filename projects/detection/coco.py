"""Images and instances in COCO's format, as torchvision's detectors take them.

Source: Lin et al., "Microsoft COCO: common objects in context", ECCV 2014; the format: https://cocodataset.org/#format-data.
"""

import contextlib
import io
import json
import signal
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from kdlib.errors import Refused, refuse
from kdlib.parallel.ranks import local_groups
from kdlib.seed import generator, global_draws
from projects.detection.settings import Recipe

SECTIONS = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"), "categories": ("id",)}
SECONDS_TO_FINISH = 20  # that a worker lives on after SIGTERM
Target = dict[str, Tensor]
View = tuple[UInt8[Tensor, "3 _ _"], Target]  # of one image, and images of a list differ in size
ViewIndex = tuple[int, int]  # epoch, number of the image


@dataclass(frozen=True)
class Instances:
    """An annotation file and the folder of its images; label ``i + 1`` is category ``categories[i]``; label 0 is the background."""

    key: str  # in params.yaml
    folder: Path
    api: COCO
    categories: tuple[int, ...]
    images: tuple[int, ...]  # ids in order

    def decode(self, image: int) -> UInt8[Tensor, "3 height width"]:
        """Read an image as RGB. Raises ``Refused``, naming the file."""
        file = self.folder / self.api.imgs[image]["file_name"]
        try:
            with Image.open(file) as opened:
                pixels = np.array(opened.convert("RGB"))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            reason = " ".join(str(error).split())
            raise refuse(f"{self.key}_images", f"{file}: {reason}", "images that Pillow can read", "replace this file") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def instances(self, image: int) -> list[dict[str, Any]]:
        """The instances of an image that a detector learns: no crowds, at least a pixel wide and high."""
        annotations: list[dict[str, Any]] = self.api.imgToAnns[image]
        return [annotation for annotation in annotations if not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) >= 1]

    def mask(self, instance: dict[str, Any]) -> UInt8[np.ndarray, "height width"]:
        """The mask of an instance over its whole image: 1 where it is."""
        with warnings.catch_warnings():  # pycocotools 2.0.11 is behind numpy's protocol here, without consequence
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            mask: np.ndarray = self.api.annToMask(instance)
        return mask


def read(key: str, folder: Path, file: Path) -> Instances:
    """Read and check a split. Raises ``Refused`` about ``key``_annotations or ``key``_images for what is missing or does not fit."""
    content = _read_annotations(f"{key}_annotations", file)
    categories = sorted(category["id"] for category in content["categories"])
    _check_ids(f"{key}_annotations", content)
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for image in content["images"]:
        name = image["file_name"]
        if name not in files and not (folder / name).is_file():  # one listing of the folder: COCO has 118,287 images
            raise refuse(f"{key}_images", str(folder), f"a folder with {name} and all others of {file.name}", "correct the path")
    api = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        api.createIndex()
    return Instances(key, folder, api, tuple(categories), tuple(image["id"] for image in content["images"]))


def _read_annotations(key: str, file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except OSError as error:
        raise refuse(key, f"{file} ({error.strerror})", "a file that can be read", "correct the path") from error
    except ValueError as error:
        raise refuse(key, f"{file}: {error}", "JSON", "download it again") from error
    for section, fields in SECTIONS.items():
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise refuse(key, f"{file} without {section}", f"COCO's instances: {', '.join(SECTIONS)}", "choose instances_*.json")
        lacking = next((field for row in rows for field in fields if field not in row), None)
        if lacking:
            raise refuse(key, f"{file} with {section} without {lacking}", f"{', '.join(fields)} in each", "choose instances_*.json")
    return content


def _check_ids(key: str, content: dict[str, Any]) -> None:
    for field, section in (("image_id", "images"), ("category_id", "categories")):
        ids = {row["id"] for row in content[section]}
        stray = next((annotation for annotation in content["annotations"] if annotation[field] not in ids), None)
        if stray is not None:
            allowed = f"an id of {section} ({len(ids)} of them, {min(ids)} to {max(ids)})"
            do = "use the annotation file that belongs to these images"
            raise refuse(key, f"annotation {stray['id']} with {field} {stray[field]}", allowed, do)


@contextlib.contextmanager
def loader(dataset: Dataset[Any], workers: int, **options: Any) -> Iterator[Iterator[Any]]:
    """Iterate over a data set by torch's DataLoader, whose worker processes end with the block; with 0 of them this process does the work.

    Workers are forked, however this process was started: they share the annotations, which take a gigabyte, and are ready at once. What one
    of them refuses is raised here.
    """
    method: dict[str, Any] = {"multiprocessing_context": "fork", "worker_init_fn": _outlive_the_step} if workers else {}
    with contextlib.closing(_raise_refusals(DataLoader(_RefusalsAsItems(dataset), num_workers=workers, **method, **options))) as items:
        yield items


class _RefusalsAsItems(Dataset[Any]):
    """Hands a refusal on as an item: as an exception from a worker it would come with a traceback in its text."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Refused as error:
            return error


def _raise_refusals(batches: DataLoader[Any]) -> Generator[Any, None, None]:
    for batch in batches:
        for item in batch if isinstance(batch, list) else [batch]:
            if isinstance(item, Refused):
                raise item
        yield batch


def _outlive_the_step(_: int) -> None:
    """Let a worker ignore SIGINT, and SIGTERM for some seconds: the step that is being made needs its images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_FINISH))


def check_same_categories(train: Instances, val: Instances) -> None:
    """Raise ``Refused`` unless training and validation have the same categories."""
    if train.categories != val.categories:
        different = sorted(set(train.categories) ^ set(val.categories))
        found = f"category ids {different[:5]} in only one of train and val"
        raise refuse(f"{val.key}_annotations", found, "the same categories in both", "choose two files of one data set")


class RangeCrop(v2.Transform):  # type: ignore[misc] # torchvision has no types
    """Crop to a height and a width that are each drawn between two limits in pixels, or to the image's where that is less."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = functional.get_size(next(value for value in flat_inputs if isinstance(value, tv_tensors.Image)))
        height, width = (_draw_between(min(self.low, side), min(self.high, side)) for side in size)
        top, left = _draw_between(0, size[0] - height), _draw_between(0, size[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.crop(inpt, **params)


def _draw_between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def augmentation(recipe: Recipe) -> v2.Transform:
    """Flip, and for every other view crop from a smaller image; the detector itself resizes to the recipe's sides."""
    steps: list[Any] = [v2.RandomHorizontalFlip(recipe.flip)]
    if recipe.crop:
        cropped = v2.Compose([v2.RandomShortestSize(recipe.crop_sides, recipe.long_side), RangeCrop(*recipe.crop)])
        steps.append(v2.RandomApply([cropped], p=0.5))
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(labels_getter=_labels)])


def _labels(view: tuple[Any, dict[str, Any]]) -> Any:
    return view[1]["labels"]


class Views(Dataset[View]):
    """Training views: each a function of (seed, epoch, image), whichever process makes it. Images without instances are left out."""

    def __init__(self, instances: Instances, recipe: Recipe, seed: int) -> None:
        self.instances, self.seed = instances, seed
        self.images = [image for image in instances.images if instances.instances(image)]
        self._augmentation = augmentation(recipe)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: ViewIndex) -> View:
        epoch, number = index
        image = self.images[number]
        pixels = tv_tensors.Image(self.instances.decode(image))
        with global_draws(self.seed, "view", epoch, number):
            view, target = self._augmentation(pixels, self._target(image, functional.get_size(pixels)))
        return view.as_subclass(Tensor), {name: values.as_subclass(Tensor) for name, values in target.items()}

    def _target(self, image: int, size: list[int]) -> dict[str, Any]:
        instances = self.instances.instances(image)
        boxes = torch.tensor([instance["bbox"] for instance in instances], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.from_numpy(np.stack([self.instances.mask(instance) for instance in instances]))
        labels = torch.tensor([self.instances.categories.index(instance["category_id"]) + 1 for instance in instances])
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(size[0], size[1])),
            "masks": tv_tensors.Mask(masks),
            "labels": labels,
        }


class GroupSampler:
    """The images of this process's groups, step by step, from step ``first`` on, for torch's DataLoader.

    Each epoch has an order of its own; images that do not fill a batch are left out.
    """

    def __init__(self, images: int, recipe: Recipe, seed: int, first: int) -> None:
        self.images, self.recipe, self.seed, self.first = images, recipe, seed, first
        self.steps_per_epoch = images // recipe.batch_size

    def __len__(self) -> int:
        return (self.recipe.epochs * self.steps_per_epoch - self.first) * len(local_groups(self.recipe.groups))

    def __iter__(self) -> Iterator[list[ViewIndex]]:
        size = self.recipe.group_size
        for step in range(self.first, self.recipe.epochs * self.steps_per_epoch):
            epoch, batch = divmod(step, self.steps_per_epoch)
            order = generator(self.seed, "order", epoch).permutation(self.images)
            start = batch * self.recipe.batch_size
            for group in local_groups(self.recipe.groups):
                yield [(epoch, int(image)) for image in order[start + group * size : start + (group + 1) * size]]
