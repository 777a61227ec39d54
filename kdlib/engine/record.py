"""What a finished run writes: its measures, its curve, its weights, the seconds that it took and where it ran."""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdlib.data.dataset import DataSet, Split
from kdlib.engine import checkpoint
from kdlib.engine.learner import Learner
from kdlib.engine.metrics import EVALUATION_BATCH, measure, predict
from kdlib.engine.probe import StepCost
from kdlib.engine.setting import Setting
from kdlib.engine.teacher import Teacher
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.files import write_bytes, write_csv, write_json
from kdlib.models.build import Classifier
from kdlib.parallel.ranks import rank, world


def write_runs(
    setting: Setting, learners: Sequence[Learner], costs: Sequence[StepCost], teacher: TeacherCache | None, teacher_seconds: float
) -> None:
    """Measure the learners and write the folders of their runs; the teacher's seconds are shared out in equal parts."""
    measured = _SplitMeasures(setting.data, setting.teacher, setting.device)
    where = environment(setting.device) | {
        "processes": world(),
        "teacher_bf16": teacher.teacher.bf16 if teacher else None,
        "teacher_compiled": teacher.teacher.kind if teacher else None,
    }
    for learner, cost in zip(learners, costs, strict=True):
        _write(learner, setting, measured, cost, teacher_seconds / len(learners), where | learner.backend.record())


class _SplitMeasures:
    """Measures of models against the labels and the teacher, whose logits of a split are computed once."""

    def __init__(self, data: DataSet, teacher: Teacher | None, device: torch.device) -> None:
        self._data, self._teacher, self._device = data, teacher, device
        self._logits: dict[str, Tensor] = {}  # of the teacher, by split

    def __call__(self, student: Classifier, name: str) -> dict[str, float]:
        split: Split = getattr(self._data, name)
        logits = self._predict(student, split)
        if self._teacher and name not in self._logits:
            self._logits[name] = self._predict(self._teacher, split)
        measures = asdict(measure(logits, self._logits.get(name, logits), torch.from_numpy(np.asarray(split.labels))))
        without = () if self._teacher else ("agreement", "teacher_kl")
        return {f"{name}_{key}": value for key, value in measures.items() if key not in without}

    def _predict(self, model: Classifier | Teacher, split: Split) -> Tensor:
        return predict(model, split.images, EVALUATION_BATCH, self._device)


def _write(
    learner: Learner, setting: Setting, measured: _SplitMeasures, cost: StepCost, teacher_seconds: float, where: dict[str, Any]
) -> None:
    recipe, shape, curve, folder = setting.recipe, (setting.data.channels, setting.data.size), learner.curve, learner.job.folder
    diverged = curve.diverged_step
    splits = ("val", "test") if learner.job.on_test else ("val",)  # once, at the last epoch
    averages = {decay: learner.average(decay) for decay in learner.averages}
    measures: dict[str, Any] = {}
    try:
        if diverged is None:
            measures = _measures(learner.student, measured, splits)
            measures["averages"] = {decay: _measures(student, measured, splits) for decay, student in averages.items()}
    except FloatingPointError:  # a finite loss, but statistics of BatchNorm that are not
        diverged, measures = learner.step - 1, {}
    if rank() > 0:
        return
    steps = learner.step if diverged is None else diverged + 1
    rows = [row for row in curve.rows if diverged is None or (row["step"] or 0) <= diverged]
    seen = steps * recipe.batch_size
    metrics: dict[str, Any] = {
        "status": "finished" if diverged is None else "diverged",
        "diverged_step": diverged,
        "diverged_cause": None if diverged is None else curve.diverged_cause,
        "images_seen": seen,
        "steps": steps,
        "student_parameters": _count(learner.student),
        "extra_parameters": _count(learner.method),
        "extra_bytes": learner.method.nbytes,
        "step_bytes": cost.peak_bytes,
        # a backward pass costs two forward passes (the FLOP counter over-counts grouped convolutions backward)
        "train_flops": 3 * seen * forward_flops(learner.student, *shape),
        "teacher_flops": seen * forward_flops(setting.teacher, *shape) if setting.teacher and learner.method.asks_teacher else 0,
        **measures,
    }
    columns = ["epoch", "step", "images_seen", "loss", *(f"loss_{name}" for name in curve.names), "val_top1"]
    write_csv(folder / "curve.csv", pd.DataFrame(rows, columns=columns))
    write_bytes(folder / "weights.safetensors", save(weights(learner.student)))
    for decay, student in averages.items():
        write_bytes(folder / f"weights_{decay}.safetensors", save(weights(student)))
    write_json(folder / "timing.json", {"student_seconds": learner.seconds, "teacher_seconds_share": teacher_seconds})
    write_json(folder / "environment.json", where)
    write_json(folder / "metrics.json", metrics)
    checkpoint.clear(folder)


def _measures(student: Classifier, measured: _SplitMeasures, splits: Sequence[str]) -> dict[str, Any]:
    return {name: value for split in splits for name, value in measured(student, split).items()}


def write_measured(folder: Path, classifier: Classifier, data: DataSet, device: torch.device) -> None:
    """The files of a finished run for a model that was trained elsewhere: measured here, an empty curve."""
    measured = _SplitMeasures(data, None, device)
    write_csv(folder / "curve.csv", pd.DataFrame(columns=["epoch", "step", "images_seen", "loss", "val_top1"]))
    write_bytes(folder / "weights.safetensors", save(weights(classifier)))
    write_json(folder / "timing.json", {"student_seconds": 0.0, "teacher_seconds_share": 0.0})
    write_json(folder / "environment.json", environment(device))
    write_json(
        folder / "metrics.json",
        {"status": "finished", "student_parameters": _count(classifier)} | measured(classifier, "val") | measured(classifier, "test"),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def weights(classifier: Classifier) -> dict[str, Tensor]:
    """The timm model's own state, contiguous, on the CPU: what ``timm.models.load_checkpoint`` takes."""
    return {name: value.detach().cpu().contiguous() for name, value in classifier.net.state_dict().items()}


def forward_flops(model: Classifier | Teacher, channels: int, size: int) -> int:
    """Floating-point operations (two per multiply-add) of one forward pass of one image, in evaluation mode."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, channels, size, size, device=device))
    model.train(training)
    return int(counter.get_total_flops())


def environment(device: torch.device) -> dict[str, Any]:
    """What bit-for-bit repetition depends on beside the code: hardware, versions, threads."""
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
    }
