"""How quickly original JPEGs become training views: kdlib's processes beside timm's loader, with as many workers.

    python benchmarks/decoding.py [--quick] [--out FOLDER]

Writes results/decoding_<hardware>.json and decoding.md (of all such files) in FOLDER: by default beside this file, with --quick in
build/benchmarks. Run it on an idle machine.

Both read the same files and make views of 224 px, random resized crops in uint8, in batches of 128. Each view is of another image, or, as
recipe A1 has it, three of the same. What is timed begins when all that either had made in advance is used up.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from pages import Row, about, heading, parser, ratio, write_with_page
from PIL import Image, ImageFilter
from timm.data import ImageDataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, RandomSampler

from kdlib import config
from kdlib.config.schema import Originals, Recipe
from kdlib.data.dataset import DataSet, load_dataset
from kdlib.data.sources import prepare
from kdlib.decoding.pool import spare
from kdlib.views.stream import ViewStream

STUDY = Path(__file__).parents[1] / "studies" / "imagenet"
SIZE, CLASSES = 224, 2
PREFETCHED = 2  # batches that each of DataLoader's workers makes in advance

Step = Callable[[], object]


def photographs(folder: Path, count: int) -> Path:
    """In ImageNet's layout: 500 x 375 px, blurred noise of some 110 kB, as its photographs have on average."""
    rng = np.random.default_rng(0)
    for number in range(count + 2 * CLASSES):
        image = Image.fromarray(rng.integers(0, 256, (375, 500, 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
        home = folder / ("train" if number < count else "val") / str(number % CLASSES)
        home.mkdir(parents=True, exist_ok=True)
        image.save(home / f"{number}.jpg", quality=92)
    return folder


def listed(path: Path, folder: Path) -> DataSet:
    params = Originals(
        source="originals", path=str(path), stored="folders", class_map=None, size=SIZE, crop_pct=0.95, unreadable=0, val_fraction=0.01,
        seed=0, hflip=0.5,
    )  # fmt: skip
    prepare("net", params, folder / "net")
    return load_dataset(folder / "net")


def ours(data: DataSet, recipe: Recipe) -> Step:
    every = np.arange(len(data.train.labels))
    stream = ViewStream(data.train.images, data.train.labels, every, classes=CLASSES, recipe=recipe, hflip=0.5, seed=0)
    numbers = itertools.count()
    return lambda: stream.prefetch.levels(next(numbers), 0)


def timms(path: Path, recipe: Recipe, workers: int) -> Step:
    """Its transforms, repeats and collation, as its training script has them with a prefetcher, which comes after what is timed."""
    scale = (recipe.crop_min_area, 1.0)
    transform = create_transform(SIZE, is_training=True, use_prefetcher=True, scale=scale, color_jitter=None, interpolation="random")
    images = ImageDataset(str(path / "train"), transform=transform)
    sampler = RepeatAugSampler(images, num_replicas=1, rank=0, num_repeats=recipe.repeats) if recipe.repeats > 1 else RandomSampler(images)
    loader = DataLoader(
        images, recipe.batch_size, sampler=sampler, num_workers=workers, collate_fn=fast_collate, drop_last=True, persistent_workers=True,
        prefetch_factor=PREFETCHED,
    )  # fmt: skip
    return _endless(loader).__next__


def _endless(loader: DataLoader) -> Iterator[object]:  # type: ignore[type-arg]
    while True:
        yield from loader


def seconds(step: Step, used_up: int, batches: int) -> float:
    for _ in range(used_up):
        step()
    started = time.perf_counter()
    for _ in range(batches):
        step()
    return time.perf_counter() - started


def measured(images: int, batch: int, rounds: int) -> list[Row]:
    workers = max(1, spare())
    used_up, found = PREFETCHED * workers + 1, []
    batches = max(8, 2 * workers)
    with tempfile.TemporaryDirectory() as made:
        path = photographs(Path(made) / "in", images)
        data = listed(path, Path(made))
        recipe = config.load(STUDY).recipes["a1"].model_copy(update={"batch_size": batch, "group_size": None, "crop_padding": 0.0})
        for repeats in (1, 3):
            its = recipe.model_copy(update={"repeats": repeats})
            steps = {"kdlib": ours(data, its), "timm": timms(path, its, workers)}
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    times[name].append(seconds(step, used_up, batches))
            beside = ratio(times["timm"], times["kdlib"])
            rates = {name: batch * batches / sorted(every)[rounds // 2] for name, every in times.items()}
            row = {"repeats": repeats, "workers": workers, **rates, **beside, "rounds": rounds}
            print(f"{repeats} views an image, {workers} workers: {row['kdlib']:.0f} views a second, x {row['ratio']:.2f}", flush=True)
            found.append(row)
            del steps, step  # ends timm's processes, which read in advance, before the files are gone
    return found


def markdown(found: Sequence[Row]) -> str:
    lines = ["# How quickly original images become views", "", "Written by `python benchmarks/decoding.py`. No test asserts a time.", ""]
    lines += ["JPEGs of 500 x 375 px and 110 kB, in the system's cache; random resized crops of 224 px, uint8, before augmentation and"]
    lines += [
        "transfer. kdlib decodes a JPEG at half or a quarter of its sides where the crop leaves at least twice the view's, and once for"
    ]
    lines += ["all its views of a batch; timm's loader decodes the whole image for every view.", ""]
    for one in found:
        lines += heading(one)
        lines += ["| views of an image | workers | kdlib, views/s | timm, views/s | kdlib beside timm: median (least to most) | rounds |"]
        lines += ["|--:|--:|--:|--:|--:|--:|"]
        for row in one["rows"]:
            spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            lines.append(f"| {row['repeats']} | {row['workers']} | {row['kdlib']:.0f} | {row['timm']:.0f} | {spread} | {row['rounds']} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser(str(__doc__)).parse_args(arguments)
    rows = measured(80, 16, 1) if given.quick else measured(2_000, 128, 5)
    write_with_page(about(torch.device("cpu")) | {"rows": rows}, given, "decoding", markdown)


if __name__ == "__main__":
    main()
