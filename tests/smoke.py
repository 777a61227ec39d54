"""Short trainings with edited copies of kdlib: ``python tests/smoke.py FOLDER...``, where each folder holds a copy; prints their digests.

One process imports what kdlib stands on, and forks a child for each copy: a training then takes less than a second.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

SECONDS = 30  # an edit may make a loop endless
BENEATH = (
    *(
        "numpy",
        "pandas",
        "pydantic.main",
        "pydantic.types",
        "ruamel.yaml",
        "filelock",
        "jaxtyping",
        "psutil",
        "PIL.Image",
        "tqdm.auto",
        "safetensors.torch",
    ),
    *("torch", "torch.nn.parallel", "torch.utils.flop_counter", "torch.utils._pytree", "torchvision.transforms", "timm", "timm.data"),
    *("timm.data.auto_augment", "timm.loss", "timm.models._features", "timm.optim", "timm.scheduler", "timm.utils"),
)


def digest(folder: Path) -> str:
    """Train two students for a few steps, each by a method of its own, with the kdlib in this folder; hash weights, curves and measures."""
    sys.path.insert(0, str(folder))
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    import kdlib  # noqa: PLC0415
    from kdlib.config.schema import ComputeParams, Recipe  # noqa: PLC0415
    from kdlib.data.dataset import DataSet, Split  # noqa: PLC0415
    from kdlib.engine.learner import Job  # noqa: PLC0415
    from kdlib.engine.setting import Setting  # noqa: PLC0415
    from kdlib.engine.teacher import Teacher  # noqa: PLC0415
    from kdlib.engine.train import train  # noqa: PLC0415
    from kdlib.losses.crd import CRD  # noqa: PLC0415
    from kdlib.losses.dkd import DKD  # noqa: PLC0415
    from kdlib.models.build import build  # noqa: PLC0415

    assert Path(str(kdlib.__file__)).is_relative_to(folder)
    rng = np.random.default_rng(0)
    splits = [Split(rng.integers(256, size=(24, 8, 8, 1), dtype=np.uint8), np.arange(24) % 3) for _ in range(3)]
    data = DataSet("noise", 3, ["a", "b", "c"], 8, 1, 0.5, (0.5,), (0.25,), "", *splits)
    compute = ComputeParams(precision="fp32", compile=False, resident=False, ahead=False)
    recipe = Recipe.model_validate(
        {
            **{"epochs": 2.0, "batch_size": 12, "group_size": 6, "repeats": 2, "optimizer": "sgd", "learning_rate": 0.1, "ema": [0.5]},
            **{"weight_decay": 5e-4, "clip_norm": 1.0, "warmup": 0.3, "warmup_lr": 0.01, "min_lr": 0.001, "milestones": []},
            **{"hard_loss": "bce", "label_smoothing": 0.1, "drop_path": 0.3, "crop_padding": 0.125, "crop_min_area": 0.5, "erasing": 0.5},
            **{"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "augment": "batched"},
            "randaugment": {"operations": 2, "magnitude": 7.0, "magnitude_std": 0.5},
        }
    )
    torch.manual_seed(0)
    net = "kd_resnet8_w8_s1"
    setting = Setting(data, np.arange(20), net, 8, Teacher(build(net, 3, 1, 8)), recipe, 0, torch.device("cpu"), "smoke", compute)
    methods = {
        "dkd": lambda: DKD(hard_weight=0.5, weight=1.0, warmup=0.5, alpha=1.0, beta=2.0, temperature=4.0),
        "crd": lambda: CRD(hard_weight=1.0, weight=0.8, dim=4.0, negatives=8.0, temperature=0.07, momentum=0.5),
    }
    with tempfile.TemporaryDirectory() as made:
        jobs = [Job(name, make, True, Path(made) / name) for name, make in methods.items()]
        for job in jobs:
            job.folder.mkdir()
        train(setting, jobs, save_seconds=1e9)
        files = [job.folder / name for job in jobs for name in ("weights.safetensors", "curve.csv", "metrics.json")]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def send(folder: str, line: "multiprocessing.connection.Connection") -> None:
    """In a child: what came of it, and "crashed" with the reason where nothing did."""
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        line.send(digest(Path(folder)))
    except BaseException as error:
        line.send(f"crashed: {type(error).__name__}: {error}")


def main(folders: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in BENEATH:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    context, found = multiprocessing.get_context("fork"), {}
    for folder in folders:
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=send, args=(folder, there))
        child.start()
        there.close()
        try:
            found[folder] = here.recv()
        except EOFError:
            found[folder] = "crashed: ended from outside"
        child.join()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.pop(0)  # tests/
    main(sys.argv[1:])
