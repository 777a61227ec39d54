"""From a resolved description to finished runs: what a run's numbers depend on is here and below."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from jaxtyping import Int, UInt8
from safetensors.torch import save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kdlib.config import ComputeParams, Recipe, Refused
from kdlib.data.mixing import mix_groups
from kdlib.data.originals import Originals
from kdlib.data.splits import DataSet, Split
from kdlib.data.stream import ViewStream
from kdlib.losses.base import Method
from kdlib.models import Classifier, build
from kdlib.ranks import everyones, rank, say, wait_for_all, world
from kdlib.results import write_bytes, write_csv, write_json
from kdlib.seed import seed_torch
from kdlib.train import checkpoint
from kdlib.train.answers import Answers
from kdlib.train.compute import Compute, answering, choose
from kdlib.train.fit import Fit
from kdlib.train.learner import Learner, asked_of_teacher, total_steps
from kdlib.train.measure import measure, predict
from kdlib.train.teacher import Teacher

Images = UInt8[np.ndarray, "samples height width channels"] | UInt8[Tensor, "samples height width channels"]

EVALUATION_BATCH = 512
GPU_TOLERANCE = 0.05  # of a logit: sums there are not repeated in the same order


@dataclass(frozen=True)
class Setting:
    """What the runs of a comparison share at one seed: they see the same batches, and the teacher passes once for all."""

    data: DataSet
    index: Int[np.ndarray, " subset"]  # the training images that are used
    student: str
    size: int  # pixels that the student looks at
    teacher: Teacher | None
    recipe: Recipe
    seed: int
    device: torch.device
    title: str  # in logs
    compute: ComputeParams
    answers_gb: float = 0.0  # that the teacher's answers may take
    answers: Path | None = None  # folder for the teacher's answers, named after all that they depend on; None keeps none


@dataclass(frozen=True)
class Job:
    """One run that is not finished yet, and the folder for it."""

    name: str
    method: Callable[[], Method]
    on_test: bool  # a trial of a sweep is measured on the validation split alone
    folder: Path


def train(setting: Setting, jobs: Sequence[Job], *, save_seconds: float) -> None:
    """Train the jobs together from where their checkpoints left off, measure each, write each folder; metrics.json comes last.

    A loss that is not finite ends that run as ``diverged``; the others go on.
    """
    data, recipe = setting.data, setting.recipe
    steps = total_steps(recipe, len(data.train.labels))
    images = data.train.images
    compute = choose(setting.compute, setting.device, recipe, steps, None if isinstance(images, Originals) else images.nbytes)
    stream = views(setting, torch.from_numpy(np.array(images)).to(setting.device) if compute.resident else images)
    learners = [_started(setting, job, steps, compute) for job in jobs]
    wait_for_all()  # all have read the checkpoints before the first one writes another
    folders = {id(learner): job.folder for learner, job in zip(learners, jobs, strict=True)}
    batch = stream.batch(0)
    asks = asked_of_teacher(learners)
    compute = replace(compute, ahead=compute.ahead if asks else 0)  # there is nothing that takes long to make
    answers = _answers(setting, learners, steps, answering(setting.teacher, compute, batch.images, asks)) if setting.teacher else None
    # not from the files: how many threads compute is not what it will be
    said = answers.of_teacher(batch.images, asks) if answers and asks else None
    step_bytes = [learner.step_bytes(batch, said) for learner in learners]  # first: a run that cannot be measured fails before hours
    for learner in learners:
        learner.compile_if_quicker(batch, said)
    val_labels = torch.from_numpy(np.asarray(data.val.labels))
    fit = Fit(
        learners,
        stream,
        answers,
        validate=lambda learner: _top1(learner.student, data.val, val_labels, setting.device),
        save=lambda learner: _save(folders[id(learner)], learner),
        save_seconds=save_seconds,
        title=setting.title,
        ahead=compute.ahead,
    )
    fit.run()
    measured = _Measured(data, setting.teacher, setting.device)
    where = environment(setting.device) | {
        "processes": world(),
        "teacher_bf16": answers.teacher.bf16 if answers else None,
        "teacher_compiled": answers.teacher.kind if answers else None,
    }
    for learner, job, its_bytes in zip(learners, jobs, step_bytes, strict=True):
        computed = replace(learner.compute, ahead=compute.ahead).record()
        _write(job, learner, setting, measured, its_bytes, fit.teacher_seconds / len(jobs), where | computed)


def _save(folder: Path, learner: Learner) -> None:
    state = learner.state_dict()
    if rank() == 0:
        checkpoint.save(folder, learner.step, state)


def views(setting: Setting, images: Images | Originals) -> ViewStream:
    """The stream of the training views; ``images``: of the training split, wherever they lie."""
    data = setting.data
    return ViewStream(
        images,
        data.train.labels,
        setting.index,
        classes=data.classes,
        recipe=setting.recipe,
        hflip=data.hflip,
        seed=setting.seed,
        device=setting.device,
    )


def new_learner(setting: Setting, name: str, make: Callable[[], Method], steps: int, compute: Compute) -> Learner:
    """At the beginning of its training."""
    data = setting.data
    seed_torch(setting.seed, "init")  # of student and adapters: the same start for every method
    student = build(setting.student, data.classes, data.channels, setting.size, setting.recipe.drop_path).to(setting.device)
    method = make()
    labels = torch.from_numpy(np.asarray(data.train.labels[setting.index], np.int64))
    method.adapt(student.shape, (setting.teacher or student).shape, labels)
    return Learner(name, student, method.to(setting.device), setting.recipe, total_steps=steps, seed=setting.seed, compute=compute)


def _started(setting: Setting, job: Job, steps: int, compute: Compute) -> Learner:
    """From where its checkpoint left off."""
    learner = new_learner(setting, job.name, job.method, steps, compute)
    state = checkpoint.newest(job.folder)
    if state is not None:
        learner.load_state_dict(state)
    steps_done = everyones(torch.tensor([learner.step])).tolist()
    if len(set(steps_done)) > 1:  # a folder that machines share shows all of them the same files, but may take its time
        raise Refused(
            f"{job.folder}: found checkpoints of steps {steps_done} by the processes that train together; allowed: the same for all; "
            "run the same again when all machines see the same files"
        )
    if state is not None:
        say(f"{setting.title}  {job.name}: goes on from step {learner.step} of {steps}")
    return learner


def _answers(setting: Setting, learners: Sequence[Learner], steps: int, teacher: Teacher) -> Answers:
    """The teacher, and where its answers are kept; says how much room they take before they take it."""
    recipe = setting.recipe
    per_epoch = mix_groups(recipe) * max(1, len(setting.data.train.labels) // recipe.batch_size)
    tolerance = 0.0 if setting.device.type == "cpu" else GPU_TOLERANCE
    answers = Answers(teacher, setting.answers, recipe.batch_size // mix_groups(recipe), per_epoch, tolerance)
    asks = asked_of_teacher(learners)
    if asks and setting.answers:
        gigabytes = answers.bytes(steps * mix_groups(recipe), asks) / 1e9
        within = gigabytes <= setting.answers_gb
        what = f"are kept in {setting.answers}" if within else f"are not kept: more than study.answers_gb, {setting.answers_gb:g} GB"
        say(f"{setting.title}  the teacher's answers, {gigabytes:.3g} GB, {what}")
        answers.folder = setting.answers if within else None
    return answers


class _Measured:
    """Measures of models against the labels and the teacher, whose answers to a split are computed once."""

    def __init__(self, data: DataSet, teacher: Teacher | None, device: torch.device) -> None:
        self._data, self._of, self._device = data, teacher, device
        self._teacher: dict[str, Tensor] = {}

    def __call__(self, student: Classifier, name: str) -> dict[str, float]:
        split: Split = getattr(self._data, name)
        logits = self._predict(student, split)
        if self._of is None:
            alone = asdict(measure(logits, logits, torch.from_numpy(np.asarray(split.labels))))
            return {f"{name}_{key}": value for key, value in alone.items() if key not in ("agreement", "teacher_kl")}
        if name not in self._teacher:
            self._teacher[name] = self._predict(self._of, split)
        measures = asdict(measure(logits, self._teacher[name], torch.from_numpy(np.asarray(split.labels))))
        return {f"{name}_{key}": value for key, value in measures.items()}

    def _predict(self, model: Classifier | Teacher, split: Split) -> Tensor:
        return predict(model, split.images, EVALUATION_BATCH, self._device)


def _write(
    job: Job,
    learner: Learner,
    setting: Setting,
    measured: _Measured,
    step_bytes: int,
    teacher_seconds: float,
    where: dict[str, Any],
) -> None:
    recipe, shape = setting.recipe, (setting.data.channels, setting.data.size)
    diverged = learner.diverged_step
    splits = ("val", "test") if job.on_test else ("val",)  # once, at the last epoch
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
    curve = [row for row in learner.curve if diverged is None or (row["step"] or 0) <= diverged]
    seen = steps * recipe.batch_size
    metrics: dict[str, Any] = {
        "status": "finished" if diverged is None else "diverged",
        "diverged_step": diverged,
        "diverged_cause": None if diverged is None else learner.diverged_cause,
        "images_seen": seen,
        "steps": steps,
        "student_parameters": sum(parameter.numel() for parameter in learner.student.parameters()),
        "extra_parameters": sum(parameter.numel() for parameter in learner.method.parameters()),
        "extra_bytes": learner.method.nbytes,
        "step_bytes": step_bytes,
        # a backward pass costs two forward passes (the FLOP counter over-counts grouped convolutions backward)
        "train_flops": 3 * seen * forward_flops(learner.student, *shape),
        "teacher_flops": seen * forward_flops(setting.teacher, *shape) if setting.teacher and learner.method.asks_teacher else 0,
        **measures,
    }
    columns = ["epoch", "step", "images_seen", "loss", *(f"loss_{name}" for name in learner.names), "val_top1"]
    write_csv(job.folder / "curve.csv", pd.DataFrame(curve, columns=columns))
    write_bytes(job.folder / "weights.safetensors", save(weights(learner.student)))
    for decay, student in averages.items():
        write_bytes(job.folder / f"weights_{decay}.safetensors", save(weights(student)))
    write_json(job.folder / "timing.json", {"student_seconds": learner.seconds, "teacher_seconds_share": teacher_seconds})
    write_json(job.folder / "environment.json", where)
    write_json(job.folder / "metrics.json", metrics)
    checkpoint.clear(job.folder)


def _measures(student: Classifier, measured: _Measured, splits: Sequence[str]) -> dict[str, Any]:
    return {name: value for split in splits for name, value in measured(student, split).items()}


def write_measured(folder: Path, classifier: Classifier, data: DataSet, device: torch.device) -> None:
    """The files of a finished run for a model that was trained elsewhere: measured here, an empty curve."""
    measured = _Measured(data, None, device)
    write_csv(folder / "curve.csv", pd.DataFrame(columns=["epoch", "step", "images_seen", "loss", "val_top1"]))
    write_bytes(folder / "weights.safetensors", save(weights(classifier)))
    write_json(folder / "timing.json", {"student_seconds": 0.0, "teacher_seconds_share": 0.0})
    write_json(folder / "environment.json", environment(device))
    about = {"status": "finished", "student_parameters": sum(parameter.numel() for parameter in classifier.parameters())}
    write_json(folder / "metrics.json", about | measured(classifier, "val") | measured(classifier, "test"))


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


def _top1(student: Classifier, split: Split, labels: Tensor, device: torch.device) -> float:
    return float((predict(student, split.images, EVALUATION_BATCH, device).argmax(dim=1) == labels).double().mean())
