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
from kdlib.parallel.ranks import rank, world
from kdlib.seed import generator, global_draws
from projects.detection.settings import Recipe

SECTIONS = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"), "categories": ("id",)}
SECONDS_TO_FINISH = 20  # of processes that make views, when they are asked to end
Target = dict[str, Tensor]
View = tuple[UInt8[Tensor, "3 _ _"], Target]  # of one image, and images of a list differ in size
Place = tuple[int, int]  # epoch, image


@dataclass(frozen=True)
class Instances:
    """An annotation file and the folder of its images. Label ``i + 1`` is category ``categories[i]``; label 0 is the background."""

    key: str  # in params.yaml
    folder: Path
    api: COCO
    categories: tuple[int, ...]
    images: tuple[int, ...]  # ids in order

    def decode(self, image: int) -> UInt8[Tensor, "3 height width"]:
        """RGB. Raises ``Refused``, naming the file."""
        file = self.folder / self.api.imgs[image]["file_name"]
        try:
            with Image.open(file) as opened:
                pixels = np.array(opened.convert("RGB"))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            found = f"{file}: {' '.join(str(error).split())}"
            raise refuse(f"{self.key}_images", found, "images that Pillow can read", "replace this file") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def instances(self, image: int) -> list[dict[str, Any]]:
        """Those that a detector learns: no crowds, at least a pixel wide and high."""
        found: list[dict[str, Any]] = self.api.imgToAnns[image]
        return [one for one in found if not one.get("iscrowd", 0) and min(one["bbox"][2:]) >= 1]

    def mask(self, instance: dict[str, Any]) -> UInt8[np.ndarray, "height width"]:
        """1 where the instance is, of its whole image."""
        with warnings.catch_warnings():  # pycocotools 2.0.11 is behind numpy's protocol here, without consequence
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            found: np.ndarray = self.api.annToMask(instance)
        return found


def read(key: str, folder: Path, file: Path) -> Instances:
    """Checked. Raises ``Refused`` about ``key``_annotations or ``key``_images for what is missing, not JSON, or does not fit together."""
    content = _content(f"{key}_annotations", file)
    categories = sorted(one["id"] for one in content["categories"])
    _check_ids(f"{key}_annotations", content)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for one in content["images"]:
        name = one["file_name"]
        if name not in there and not (folder / name).is_file():  # asked of the folder once: there are 118,287
            raise refuse(f"{key}_images", str(folder), f"a folder with {name} and all others of {file.name}", "correct the path")
    api = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how far it is
        api.createIndex()
    return Instances(key, folder, api, tuple(categories), tuple(one["id"] for one in content["images"]))


def _content(key: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
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
    found: dict[str, Any] = content
    return found


def _check_ids(key: str, content: dict[str, Any]) -> None:
    for field, section in (("image_id", "images"), ("category_id", "categories")):
        known = {one["id"] for one in content[section]}
        odd = next((one for one in content["annotations"] if one[field] not in known), None)
        if odd is not None:
            found = f"annotation {odd['id']} with {field} {odd[field]}"
            raise refuse(key, found, f"an id of {section} ({_range(known)})", "use the annotation file that belongs to these images")


@contextlib.contextmanager
def loaded(of: Dataset[Any], workers: int, **options: Any) -> Iterator[Iterator[Any]]:
    """What torch's DataLoader makes of a data set, by so many processes of their own, 0 by this one; they end with the block.

    Forked, wherever this process comes from: they share the annotations, which take a gigabyte, and COCO's are soon there. What one of
    them refuses is raised here.
    """
    method: dict[str, Any] = {"multiprocessing_context": "fork", "worker_init_fn": _finish_first} if workers else {}
    with contextlib.closing(_items(DataLoader(_Telling(of), num_workers=workers, **method, **options))) as items:
        yield items


class _Telling(Dataset[Any]):
    """Hands a refusal on as an item: an exception would come from another process with its way there in its text."""

    def __init__(self, of: Dataset[Any]) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of)  # type: ignore[arg-type]

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.of[place]
        except Refused as error:
            return error


def _items(made: DataLoader[Any]) -> Generator[Any, None, None]:
    for item in made:
        for one in item if isinstance(item, list) else [item]:
            if isinstance(one, Refused):
                raise one
        yield item


def _finish_first(_: int) -> None:
    """A signal to all is not for these processes at once: the step that is being made needs their images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_FINISH))


def check_same_categories(train: Instances, val: Instances) -> None:
    """What is learnt is what is measured. Raises ``Refused``."""
    if train.categories != val.categories:
        odd = sorted(set(train.categories) ^ set(val.categories))
        found = f"category ids {odd[:5]} in only one of train and val"
        raise refuse(f"{val.key}_annotations", found, "the same categories in both", "choose two files of one data set")


def _range(ids: set[int]) -> str:
    return f"{len(ids)} of them, {min(ids)} to {max(ids)}"


class RangeCrop(v2.Transform):  # type: ignore[misc] # torchvision has no types
    """To a height and a width that are each drawn between two limits in pixels, or to the image's where that is less."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = functional.get_size(next(one for one in flat_inputs if isinstance(one, tv_tensors.Image)))
        height, width = (_between(min(self.low, side), min(self.high, side)) for side in size)
        top, left = _between(0, size[0] - height), _between(0, size[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.crop(inpt, **params)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def augmentation(recipe: Recipe) -> v2.Transform:
    """Flips, and for every other view a crop of a smaller image; resizing to the recipe's sides is the detector's own."""
    steps: list[Any] = [v2.RandomHorizontalFlip(recipe.flip)]
    if recipe.crop:
        cropped = v2.Compose([v2.RandomShortestSize(recipe.crop_sides, recipe.long_side), RangeCrop(*recipe.crop)])
        steps.append(v2.RandomApply([cropped], p=0.5))
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(labels_getter=_labels)])


def _labels(view: tuple[Any, dict[str, Any]]) -> Any:
    return view[1]["labels"]


class Views(Dataset[View]):
    """Training views; a function of (seed, epoch, image), whichever process makes it. Images without instances are left out."""

    def __init__(self, instances: Instances, recipe: Recipe, seed: int) -> None:
        self.instances, self.seed = instances, seed
        self.images = [image for image in instances.images if instances.instances(image)]
        self._augmentation = augmentation(recipe)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> View:
        epoch, number = place
        image = self.images[number]
        pixels = tv_tensors.Image(self.instances.decode(image))
        with global_draws(self.seed, "view", epoch, number):
            view, target = self._augmentation(pixels, self._target(image, functional.get_size(pixels)))
        return view.as_subclass(Tensor), {name: values.as_subclass(Tensor) for name, values in target.items()}

    def _target(self, image: int, size: list[int]) -> dict[str, Any]:
        found = self.instances.instances(image)
        boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.from_numpy(np.stack([self.instances.mask(one) for one in found]))
        labels = torch.tensor([self.instances.categories.index(one["category_id"]) + 1 for one in found])
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(size[0], size[1])),
            "masks": tv_tensors.Mask(masks),
            "labels": labels,
        }


class Groups:
    """The images of each of this process's groups, step by step, from ``first`` on: each epoch in an order of its own, what does not fill
    a batch left out.
    """

    def __init__(self, images: int, recipe: Recipe, seed: int, first: int) -> None:
        self.images, self.recipe, self.seed, self.first = images, recipe, seed, first
        self.per_epoch = images // recipe.batch_size

    def __len__(self) -> int:
        return (self.recipe.epochs * self.per_epoch - self.first) * (self.recipe.groups // world())

    def __iter__(self) -> Iterator[list[Place]]:
        size, share = self.recipe.group_size, self.recipe.groups // world()
        for step in range(self.first, self.recipe.epochs * self.per_epoch):
            epoch, batch = divmod(step, self.per_epoch)
            order = generator(self.seed, "order", epoch).permutation(self.images)
            start = batch * self.recipe.batch_size
            for group in range(rank() * share, (rank() + 1) * share):
                yield [(epoch, int(image)) for image in order[start + group * size : start + (group + 1) * size]]
