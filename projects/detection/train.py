"""Train a detector on a distilled backbone, measure it once, and put it beside the published numbers.

A run is an entry of `runs` in params.yaml. It starts from its last checkpoint, if there is one: interrupt it at any moment, and repeat the
same command. Results: FOLDER/runs/NAME/ (metrics, curve, weights) and FOLDER/results/tables/table11_coco.md, which is also printed.
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
from projects.detection.evaluate import average_precision, detect
from projects.detection.fit import Learner, fit
from projects.detection.model import build
from projects.detection.settings import Params, load

HERE = Path(__file__).parent  # the project's own params.yaml
RUNS = Path("runs")  # <name>/ below it


@refuse_full_disk()
def run(root: Path, name: str) -> dict[str, Any]:
    """Train and measure a run from its last checkpoint on, unless it is finished; returns its metrics. Raises ``Refused``."""
    params = load(root)
    known("runs", name, params.runs)
    folder = root / RUNS / name
    _refuse_changes(folder, identity(root, name, params))
    if not (folder / "metrics.json").is_file():
        launch, work = params.study.launch, functools.partial(train, root, name)
        run_distributed(launch, work, Refused) if launch.processes > 1 else work()
    return read_json(folder / "metrics.json")


def train(root: Path, name: str) -> None:
    """Train and measure a run; every process calls it. The first one writes, metrics.json last. Raises ``Refused``."""
    params = load(root)
    chosen = params.runs[name]
    recipe, folder = params.recipes[chosen.recipe], root / RUNS / name
    on_train, on_val = read_data(root, params)
    views = Views(on_train, recipe, chosen.seed)
    if len(views) < recipe.batch_size:
        images = f"{len(views)} images with instances"
        raise refuse("coco.train_annotations", images, f"at least a batch of {recipe.batch_size}", "use more, or a smaller batch_size")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_torch(chosen.seed, "init")
    detector = build(f"runs.{name}", chosen, recipe, root, len(on_train.categories)).to(device)
    learner = Learner(detector, recipe, chosen.seed, len(views) // recipe.batch_size)
    state = checkpoint.newest(folder)
    wait_for_all()  # all have read it before the first one writes another
    if state is not None:
        learner.load_state_dict(state)
        say(f"{name}: goes on from step {learner.step} of {learner.total_steps}")
    elif rank() == 0:
        write_json(folder / "run.json", identity(root, name, params))
    do = "set it lower (more GPUs then share a batch), or use larger ones"
    with out_of_memory_refused(f"recipes.{chosen.recipe}.group_size", recipe.group_size, "what fits", do):
        fit(learner, views, params.study, folder)
        detections = detect(learner.detector, on_val, device, params.study.workers)
    if rank() == 0:
        metrics = average_precision(on_val, detections) | {"images": len(on_val.images), "steps": learner.step}
        _write(folder, learner, metrics, device)
    wait_for_all()


def read_data(root: Path, params: Params) -> tuple[Instances, Instances]:
    """Read the training and the validation images' annotations, and check that they fit together. Raises ``Refused``."""
    paths = {key: root / Path(path).expanduser() for key, path in params.coco.model_dump().items()}
    on_train, on_val = (coco.read(f"coco.{split}", paths[f"{split}_images"], paths[f"{split}_annotations"]) for split in ("train", "val"))
    coco.check_same_categories(on_train, on_val)
    return on_train, on_val


def identity(root: Path, name: str, params: Params) -> dict[str, Any]:
    """Everything that a run's numbers depend on, beside the images and the code."""
    chosen = params.runs[name]
    weights = root / Path(chosen.weights).expanduser() if chosen.weights else None
    return {
        "run": name,
        **chosen.model_dump(),
        "settings": params.recipes[chosen.recipe].model_dump(),
        "weights_sha256": sha256(weights) if weights and weights.is_file() else None,
    }


def _refuse_changes(folder: Path, now: dict[str, Any]) -> None:
    """Raise ``Refused`` where the folder holds a run that was begun with another identity."""
    before = read_json(folder / "run.json") if (folder / "run.json").is_file() else now
    if before != now:
        changed = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        do = f"undo the change, name it anew, or delete {folder}"
        raise refuse(f"runs.{now['run']}", f"a run begun with another {changed}", "what it was begun with", do)


def _write(folder: Path, learner: Learner, metrics: dict[str, Any], device: torch.device) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in learner.detector.state_dict().items()}
    write_bytes(folder / "weights.safetensors", save(weights))
    write_csv(folder / "curve.csv", pd.DataFrame(learner.curve))
    write_json(folder / "environment.json", environment(device) | {"processes": world(), "fp16": learner.scaler.is_enabled()})
    write_json(folder / "metrics.json", metrics)
    checkpoint.clear(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m projects.detection.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a run of params.yaml, resnet50_1x for example")
    parser.add_argument("--folder", type=Path, default=HERE, help="where params.yaml lies and results go; default: the project's own")
    arguments = parser.parse_args()
    try:
        table.check(arguments.folder)  # before hours of training
        run(arguments.folder, arguments.name)
        print(table.write(arguments.folder, load(arguments.folder), RUNS))
    except Refused as error:
        sys.exit(str(error))
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
