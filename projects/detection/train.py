"""Train a detector on a distilled backbone, measure it once, and put it beside the published numbers.

python -m projects.detection.train STUDY_FOLDER NAME    a run of the folder's params.yaml; the same command goes on after an interruption
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save

from kdlib.engine import checkpoint
from kdlib.engine.record import environment
from kdlib.errors import Refused, known, refuse, refuse_full_disk
from kdlib.files import read_json, sha256, write_bytes, write_csv, write_json
from kdlib.parallel.launch import run_distributed
from kdlib.parallel.ranks import rank, say, wait_for_all, world
from kdlib.seed import seed_torch
from kdlib.study.training.checks import out_of_memory_refused
from projects.detection import coco, table
from projects.detection.coco import Instances, Views
from projects.detection.evaluate import detect, measure
from projects.detection.fit import Learning, fit
from projects.detection.model import build
from projects.detection.settings import Detection, load

RUNS = Path("runs/detection")  # <name>/ below it


@refuse_full_disk()
def run(root: Path, name: str) -> dict[str, Any]:
    """The metrics of a run: trained from its last checkpoint on, unless it is finished. Raises ``Refused``."""
    study = load(root)
    known("runs", name, study.runs)
    folder = root / RUNS / name
    _check_same(folder, about(root, name, study))
    if not (folder / "metrics.json").is_file():
        launch, work = study.study.launch, functools.partial(train, root, name)
        run_distributed(launch, work, Refused) if launch.processes > 1 else work()
    return read_json(folder / "metrics.json")


def train(root: Path, name: str) -> None:
    """In each process. The first one writes; metrics.json comes last."""
    study = load(root)
    params = study.runs[name]
    recipe, folder = study.recipes[params.recipe], root / RUNS / name
    on_train, on_val = data(root, study)
    views = Views(on_train, recipe, params.seed)
    if len(views) < recipe.batch_size:
        found = f"{len(views)} images with instances"
        raise refuse("coco.train_annotations", found, f"at least a batch of {recipe.batch_size}", "use more, or a smaller batch_size")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_torch(params.seed, "init")
    detector = build(f"runs.{name}", params, recipe, root, len(on_train.categories)).to(device)
    learning = Learning(detector, recipe, params.seed, len(views) // recipe.batch_size)
    state = checkpoint.newest(folder)
    wait_for_all()  # all have read it before the first one writes another
    if state is not None:
        learning.load_state_dict(state)
        say(f"{name}: goes on from step {learning.step} of {recipe.epochs * learning.per_epoch}")
    elif rank() == 0:
        write_json(folder / "run.json", about(root, name, study))
    do = "set it lower (more GPUs then share a batch), or use larger ones"
    with out_of_memory_refused(f"recipes.{params.recipe}.group_size", recipe.group_size, "what fits", do):
        fit(learning, views, study.study, folder)
        detected = detect(learning.detector, on_val, device, study.study.workers)
    if rank() == 0:
        _write(folder, learning, measure(on_val, detected) | {"images": len(on_val.images), "steps": learning.step}, device)
    wait_for_all()


def data(root: Path, study: Detection) -> tuple[Instances, Instances]:
    """Training and validation, which fit together. Raises ``Refused``."""
    paths = {key: root / Path(path).expanduser() for key, path in study.coco.model_dump().items()}
    on_train, on_val = (coco.read(f"coco.{split}", paths[f"{split}_images"], paths[f"{split}_annotations"]) for split in ("train", "val"))
    coco.check_same_categories(on_train, on_val)
    return on_train, on_val


def about(root: Path, name: str, study: Detection) -> dict[str, Any]:
    """What a run is: all that its numbers depend on beside the images and the code."""
    params = study.runs[name]
    weights = root / Path(params.weights).expanduser() if params.weights else None
    return {
        "run": name,
        **params.model_dump(),
        "settings": study.recipes[params.recipe].model_dump(),
        "weights_sha256": sha256(weights) if weights and weights.is_file() else None,
    }


def _check_same(folder: Path, now: dict[str, Any]) -> None:
    before = read_json(folder / "run.json") if (folder / "run.json").is_file() else now
    if before != now:
        odd = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        found = f"a run begun with another {odd}"
        raise refuse(f"runs.{now['run']}", found, "what it was begun with", f"undo the change, name it anew, or delete {folder}")


def _write(folder: Path, learning: Learning, metrics: dict[str, Any], device: torch.device) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in learning.detector.state_dict().items()}
    write_bytes(folder / "weights.safetensors", save(weights))
    write_csv(folder / "curve.csv", pd.DataFrame(learning.curve))
    write_json(folder / "environment.json", environment(device) | {"processes": world(), "fp16": learning.scaler.is_enabled()})
    write_json(folder / "metrics.json", metrics)
    checkpoint.clear(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("name")
    given = parser.parse_args()
    try:
        table.check(given.study)  # before hours of training
        run(given.study, given.name)
        print(table.write(given.study, load(given.study), RUNS))
    except Refused as error:
        sys.exit(str(error))
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
