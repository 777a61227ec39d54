"""A trained student for other people: weights and configuration that timm loads by itself, a model card, and ONNX.

python -m kdlib.study.cli.export COMPARISON VARIANT SEED FOLDER [--onnx]    as a row of results/runs.csv names the run
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import save_for_hf
from torch import nn

from kdlib.errors import Refused, known
from kdlib.files import read_json, write_text
from kdlib.models import NAMES
from kdlib.models.build import Classifier
from kdlib.study.cli import refusals_in_one_line
from kdlib.study.report import stats
from kdlib.study.training.experiment import Experiment
from kdlib.study.training.planned import Run, expected_runs, run_folder

AGREE = 1e-4  # largest difference of a logit, relative to the largest one, between two runtimes' fp32
MEASURES = {"test_top1": "top-1 on the test split", "test_top5": "top-5", "test_ece": "expected calibration error"}


class Normalising(nn.Module):
    """Images in [0, 1] of the data set's size to logits: what an ONNX file holds."""

    def __init__(self, student: Classifier) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.student(images).logits
        return logits


def export(experiment: Experiment, run: Run, folder: Path) -> None:
    """Write model.safetensors, config.json and README.md (the card): ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads them.

    Adapters and banks of the method are not in it. Raises ``Refused`` for a run that is not there or diverged.
    """
    source = _finished(experiment, run)
    student = experiment.student(run[0], source)
    channels, size = student.mean.shape[1], student.size
    arguments = {"num_classes": student.shape.classes, "in_chans": channels}
    if getattr(student.net, "pretrained_cfg", {}).get("fixed_input_size"):
        arguments["img_size"] = size
    looks: dict[str, Any] = {"input_size": [channels, size, size]}
    looks |= {"mean": student.mean.flatten().tolist(), "std": student.std.flatten().tolist()}
    looks |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "num_classes": student.shape.classes}
    student.net.cpu().to(memory_format=torch.contiguous_format)  # as safetensors wants them
    save_for_hf(student.net, str(folder), model_config={"pretrained_cfg": looks}, model_args=arguments, safe_serialization=True)
    write_text(folder / "README.md", model_card(experiment, run, source))


def to_onnx(experiment: Experiment, run: Run, path: Path) -> float:
    """Write the student, its normalisation included, for any number of images; the largest relative difference of a logit afterwards.

    By torch's own exporter, checked with onnxruntime (``pip install kdlib[export]``). Raises ``Refused`` when the two disagree.
    """
    import onnxruntime  # noqa: PLC0415 (of those who export only)

    student = experiment.student(run[0], _finished(experiment, run))
    model, data = Normalising(student).cpu().eval(), experiment.data(experiment.params.comparisons[run[0]].data)
    images = torch.rand(4, data.channels, data.size, data.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(model, (images,), str(path), **names, dynamic_shapes=shapes, dynamo=True, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    gaps = []
    for batch in (images, torch.rand(1, *images.shape[1:])):
        with torch.no_grad():
            ours = model(batch)
        theirs = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        gaps.append(float((ours - theirs).abs().max() / ours.abs().max()))
    gap = float(np.max(gaps))  # of a NaN, unlike Python's: a NaN
    if not gap <= AGREE:
        path.unlink()
        raise Refused(f"{path}: found logits that differ by {gap:.2g} of the largest; allowed: {AGREE:g}; the file was deleted")
    return gap


def model_card(experiment: Experiment, run: Run, source: Path) -> str:
    """The model card: what it learned from whom, how good it is with n, where it was trained, how to load it. ``source``: of the run."""
    about, metrics, where = (read_json(source / f"{name}.json") for name in ("run", "metrics", "environment"))
    (comparison, variant, seed), params = run, experiment.params
    item, confidence = params.comparisons[comparison], params.study.confidence
    teacher = params.teachers[item.teacher]
    lines = ["---", "library_name: timm", "tags: [image-classification, timm, knowledge-distillation]", "---", ""]
    lines += [f"# {item.student}, taught by {teacher.model} ({variant})", "", "| measure | this run | all seeds |", "|---|---|---|"]
    paths = {seed: run_folder(experiment.root, (comparison, variant, seed)) / "metrics.json" for seed in params.study.seeds}
    measured = {seed: read_json(path) for seed, path in paths.items() if path.is_file()}
    for name, words in MEASURES.items():
        mean = stats.estimate({seed: values[name] for seed, values in measured.items() if name in values}, confidence)
        interval = f" ± {100 * mean.half:.1f}" if mean.n > 1 and mean.half == mean.half else ""
        lines.append(f"| {words} | {100 * metrics[name]:.1f} % | {100 * mean.mean:.1f}{interval} % (n={mean.n}) |")
    lines += ["", f"± is half the width of a {100 * confidence:g} % Student t interval over the seeds.", ""]
    facts = {
        "data": f"{item.data}, {about['train_images']} training images ({100 * item.fraction:g} %), {about['classes']} classes",
        "teacher": f"{teacher.model}, trained on {teacher.data}",
        "method": f"{about['method']} with {about['parameters']}",
        "recipe": ", ".join(f"{name} {value}" for name, value in params.recipes[item.recipe].model_dump().items()),
        "seed": seed,
        "trained on": f"{where['device']}, {where['machine']}, torch {where['torch']}, timm {where['timm']}",
        "run": about["fingerprint"],
    }
    lines += ["| about | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    first = ["import kdlib.models  # registers this net with timm"] if item.student in NAMES else []
    lines += ["```python", "import timm", *first, 'model = timm.create_model("local-dir:.", pretrained=True).eval()', "```", ""]
    return "\n".join([*lines, "Images: un-normalised values in [0, 1], then mean and std of config.json.", ""])


def _finished(experiment: Experiment, run: Run) -> Path:
    """The folder of a run that can be exported."""
    comparison, variant, _ = run
    known("comparison", comparison, experiment.params.comparisons)
    known("variant", variant, {name for _, name, _ in expected_runs(experiment.params, comparison)})
    folder = run_folder(experiment.root, run)
    if not (folder / "metrics.json").is_file():
        raise Refused(f"{folder}: found no finished run; allowed: a run of results/runs.csv; run `make study` first")
    if "test_top1" not in read_json(folder / "metrics.json"):
        raise Refused(f"{folder}: found a run that diverged, or a trial of a sweep; allowed: one with a test accuracy; choose another")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison")
    parser.add_argument("variant")
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx")
    given = parser.parse_args()
    run = (given.comparison, given.variant, given.seed)
    with refusals_in_one_line():
        experiment = Experiment()
        export(experiment, run, given.folder)
        print(f"wrote {given.folder}: timm.create_model('local-dir:{given.folder}', pretrained=True)")
        if given.onnx:
            gap = to_onnx(experiment, run, given.folder / "model.onnx")
            print(f"wrote {given.folder / 'model.onnx'}: logits within {gap:.1g} of torch's")


if __name__ == "__main__":
    main()
