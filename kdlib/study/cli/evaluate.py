"""How good a checkpoint file is on ImageNet and on the sets made for its classes, beside what its authors announced.

python -m kdlib.study.cli.evaluate resnet50 resnet50.pth --data imagenet=/data/imagenet --data v2=/data/imagenetv2
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import timm
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from kdlib.errors import FILE, Refused, refuse, some
from kdlib.files import write_csv
from kdlib.models.build import Classifier
from kdlib.models.checkpoints import load_checkpoint
from kdlib.parallel.signals import watched
from kdlib.study.cli import refusals_in_one_line
from kdlib.study.cli.evaluation_sets import SETS, Answers, EvaluationSet, open_set
from kdlib.study.report import published
from kdlib.study.report.render import number, pipe

CLASSES = 1000
UNREADABLE = 0.01  # share of a set's images that may be: beyond it, its accuracy is another set's


@dataclass(frozen=True)
class View:
    """How an image is shown: its short side resized to ``size / crop`` pixels, the centre of ``size`` cut out."""

    size: int
    crop: float
    interpolation: str


@dataclass(frozen=True)
class Score:
    """Counts of one set. Unreadable files are in none of them."""

    name: str
    images: int
    top1: int
    top5: int
    unreadable: list[str]


class Decoded(Dataset[tuple[UInt8[Tensor, "3 size size"], int, bool]]):
    """Each file as timm's evaluation transform shows it, its place, and whether it could be read at all."""

    def __init__(self, files: list[str], view: View) -> None:
        self.files, self.size = files, view.size
        # Pixels stay as they are: a classifier normalises for itself.
        self.transform = create_transform(view.size, interpolation=view.interpolation, crop_pct=view.crop, normalize=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[UInt8[Tensor, "3 size size"], int, bool]:
        try:
            with Image.open(self.files[place]) as image:
                return self.transform(image.convert("RGB")), place, True
        except Exception:  # a damaged file makes Pillow raise nearly anything
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), place, False


def hits(logits: Float[Tensor, "batch classes"], right: Bool[Tensor, "batch classes"]) -> Int[Tensor, "2"]:
    """How many images have a right class first, and among the first five (or all, with fewer); of equal logits the lower class is first."""
    first = right.gather(1, logits.argsort(dim=1, descending=True, stable=True)[:, :5])
    return torch.stack([first[:, 0].sum(), first.any(dim=1).sum()])


def evaluate(classifier: Classifier, images: EvaluationSet, view: View, batch_size: int, workers: int) -> Score:
    """Every image once, in fp32, on the classifier's device. Only the logits of the set's classes count.

    Raises ``Refused`` when too many images cannot be read, or a logit is not finite.
    """
    kept, unreadable = torch.tensor(images.classes), []
    counts = torch.zeros(2, dtype=torch.int64)
    classifier.eval()
    loader = DataLoader(Decoded(images.files, view), batch_size, num_workers=workers)
    with torch.inference_mode(), tqdm(total=len(images.files), desc=images.name, unit="image", disable=not watched()) as bar:
        for pixels, places, readable in loader:
            unreadable += [images.files[place] for place in places[~readable].tolist()]
            logits = classifier(pixels[readable].to(classifier.mean.device).float() / 255).logits.float().cpu()
            if not logits.isfinite().all():
                raise Refused(f"--data {images.name}: found logits that are not finite; allowed: finite ones; choose another checkpoint")
            right = truth([images.answers[place] for place in places[readable].tolist()])
            counts += hits(logits[:, kept], right[:, kept])
            bar.update(len(places))
    if len(unreadable) > UNREADABLE * len(images.files):
        allowed = f"at most {100 * UNREADABLE:g} % of {len(images.files):,} images that cannot be read"
        raise refuse(f"--data {images.name}", f"{len(unreadable):,}: {some(unreadable)}", allowed, "restore these files")
    return Score(images.name, len(images.files) - len(unreadable), int(counts[0]), int(counts[1]), unreadable)


def truth(answers: list[Answers]) -> Bool[Tensor, "batch classes"]:
    """Which of ImageNet's classes are right for each image."""
    right = torch.zeros(len(answers), CLASSES, dtype=torch.bool)
    for row, labels in enumerate(answers):
        right[row, list(labels)] = True
    return right


def score_table(scores: list[Score], announced: Mapping[str, float]) -> pd.DataFrame:
    """A row per set: images, correct answers and their shares, unreadable files, and the announced shares, which are of imagenet alone."""
    rows = []
    for score in scores:
        about = {"set": score.name, "images": score.images, "unreadable": len(score.unreadable)}
        top = {"top1_correct": score.top1, "top5_correct": score.top5, "top1": score.top1 / score.images, "top5": score.top5 / score.images}
        theirs = announced if score.name == "imagenet" else {}
        rows.append(about | top | {f"{name}_published": theirs.get(name, float("nan")) for name in ("top1", "top5")})
    return pd.DataFrame(rows)


def shown(frame: pd.DataFrame) -> str:
    """The table for people, in percent, with as many digits as are published."""
    text = frame[["set", "images", "unreadable"]].copy()
    for name in ("top1", "top1_published", "top5", "top5_published"):
        text[name.replace("_", ", ").replace("top", "top-") + " %"] = [number(100 * share, 2) for share in frame[name]]
    return pipe(text)


def _folders(given: list[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for option in given:
        name, _, folder = option.partition("=")
        if not folder or name in folders:
            raise refuse("--data", option, f"NAME=FOLDER, each name once: {', '.join(SETS)}", "correct it")
        folders[name] = Path(folder).expanduser()
    return folders


def _announced(model: str) -> dict[str, float]:
    try:
        return published.announced(published.read_published(Path.cwd()), model.partition(".")[0])
    except FileNotFoundError:
        print(f"{published.FILE}: not found at or above {Path.cwd()}, so nothing is published here", file=sys.stderr)
        return {}


def _check(given: argparse.Namespace) -> None:
    for option, value, least in (("size", given.size, 1), ("batch-size", given.batch_size, 1), ("workers", given.workers, 0)):
        if value is not None and value < least:
            raise refuse(f"--{option}", value, f"at least {least}", "change it")
    if not 0 < given.crop <= 1:
        raise refuse("--crop", given.crop, "a share > 0 and <= 1", "change it")
    if not given.checkpoint.is_file():
        raise refuse("CHECKPOINT", str(given.checkpoint), "a .safetensors or .pth file", "correct the path")


def evaluate_checkpoint(given: argparse.Namespace) -> None:
    """The command. Raises ``Refused``."""
    _check(given)
    folders = _folders(given.data)
    looks = timm.get_pretrained_cfg(given.model) if timm.is_model(given.model) else None
    if looks is None:
        raise refuse("MODEL", given.model, "a timm model", "see timm.list_models()")
    view = View(given.size or looks.input_size[-1], given.crop, looks.interpolation)
    sets = [open_set(name, folder, given.real_labels) for name, folder in folders.items()]
    try:
        classifier = load_checkpoint("CHECKPOINT", given.checkpoint, given.model, (CLASSES, 3, view.size), not given.plain)
    except Refused:
        raise
    except ValueError as error:  # a size that the model cannot take
        raise Refused(f"--size: {error}") from error
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = [evaluate(classifier, images, view, given.batch_size, given.workers) for images in sets]
    for score in scores:
        if score.unreadable:
            print(f"--data {score.name}: {len(score.unreadable)} unreadable: {some(score.unreadable)}", file=sys.stderr)
    frame = score_table(scores, _announced(given.model))
    print(shown(frame))
    write_csv(given.csv, frame.assign(model=given.model, checkpoint=given.checkpoint.name, size=view.size, crop=view.crop))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="its name in timm")
    parser.add_argument("checkpoint", type=Path, help=".safetensors or .pth")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER", help=f"of {', '.join(SETS)}; may be given again")
    parser.add_argument("--real-labels", type=Path, help="ReaL's real.json (default: timm's copy)")
    parser.add_argument("--plain", action="store_true", help="the plain weights of a file that holds averaged ones too")
    parser.add_argument("--size", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--crop", type=float, default=0.95, help="share of the resized image that is looked at (default: 0.95)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that decode (default: one per core)")
    parser.add_argument("--csv", type=Path, default=Path("evaluation.csv"), help="where the table goes (default: evaluation.csv)")
    with refusals_in_one_line(without=f"{FILE}: "):
        evaluate_checkpoint(parser.parse_args())


if __name__ == "__main__":
    main()
