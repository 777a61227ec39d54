"""What methods.ipynb shows of a method: what it says of itself, and its value and gradient for four images of three classes."""

import copy
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdlib.losses import HARD, METHODS, Method
from kdlib.seed import generator, seed_torch
from kdlib.types import Asks, Batch, Feature, Output, OutputShape, Setup, Terms

CLASSES = ["ant", "bee", "cat"]
STUDENT = OutputShape(3, 3, ((2, 4, 4), (2, 4, 4), (3, 2, 2), (3, 2, 2)))
TEACHER = OutputShape(3, 4, ((2, 4, 4), (3, 4, 4), (3, 2, 2), (4, 2, 2)))
LABELS = torch.arange(3).repeat(4)  # of the training images
# unsure and right, as sure as the teacher (the same but for a constant), wrong, wrong
STUDENT_LOGITS = [[0.5, 0.2, 0.0], [-1.0, 3.0, 0.0], [1.5, 0.0, 1.0], [1.0, -0.5, 0.5]]
TEACHER_LOGITS = [[3.0, 1.0, 0.0], [0.0, 4.0, 1.0], [0.5, 0.0, 2.5], [0.0, 2.0, 1.5]]
BATCH = Batch(
    images=torch.zeros(4, 1, 4, 4),
    targets=torch.eye(3)[[0, 1, 2, 1]],
    labels=torch.tensor([0, 1, 2, 1]),
    index=torch.tensor([3, 1, 8, 4]),
    mixed=torch.zeros(4, dtype=torch.bool),
)


def output_of(who: str) -> Output:
    """What the "student" or the "teacher" says of the four images; embedding and maps are a fixed draw, rounded to one decimal."""
    shape, logits = {"student": (STUDENT, STUDENT_LOGITS), "teacher": (TEACHER, TEACHER_LOGITS)}[who]
    rng = generator("toy", who)
    draws = (rng.standard_normal((4, *size)).round(1) for size in ((shape.embedding,), *shape.maps))
    embedding, *before = (torch.tensor(draw, dtype=torch.float32) for draw in draws)
    return Output(torch.tensor(logits), embedding, tuple(stage.relu() for stage in before), tuple(before))


def adapted_method(name: str, parameters: Mapping[str, float]) -> Method:
    """A method with its adapters, the same ones in each call."""
    with torch.random.fork_rng():
        seed_torch("toy", "adapters")
        method = METHODS[name](**parameters)
        method.adapt(Setup(STUDENT, TEACHER, LABELS))
    return method


def terms(method: Method, student: Output, teacher: Output, batch: Batch) -> Terms:
    """Its loss terms with the plain hard label, as at the end of a training, where warm-ups are over; each call draws the same."""
    with torch.random.fork_rng():
        seed_torch("toy", "step")
        parts: Terms = method(student, teacher, batch, HARD["ce"], torch.ones(()))
    return parts


def looks(method: Method) -> dict[str, str]:
    """What a method asks of the models, and what else its own terms depend on: seen by changing it, over two steps."""

    def own(batch: Batch) -> list[float]:
        remembers = copy.deepcopy(method)
        with torch.no_grad():
            first, then = (terms(remembers, output_of("student"), output_of("teacher"), batch) for _ in range(2))
        return [value.item() for step in (first, then) for key, value in step.items() if key != "hard"]

    changed = {
        "the label": replace(BATCH, labels=(BATCH.labels + 1) % 3),
        "which training image it is": replace(BATCH, index=(BATCH.index + 3) % len(LABELS)),
    }
    rest = [what for what, batch in changed.items() if own(batch) != own(BATCH)]
    rest += ["the other images of the batch (a per-device loss)"] * method.relational + ["unmixed images alone"] * method.unmixed
    return {
        "of the student": _parts(method.asks_student if own(BATCH) else frozenset()),
        "of the teacher": _parts(method.asks_teacher),
        "of the batch": ", ".join(rest) or "nothing",
        "parameters of its own": f"{sum(parameter.numel() for parameter in method.parameters()):,} here" if own(BATCH) else "none",
    }


def _parts(asks: Asks) -> str:
    return ", ".join(part.value for part in Feature if part in asks) or "nothing"


def method_card(name: str, parameters: Mapping[str, float]) -> str:
    """A method's equation, paper, parameters and what it looks at, as Markdown."""
    method = adapted_method(name, parameters)
    rows = looks(method) | {"params.yaml": ", ".join(f"{key} {value:g}" for key, value in parameters.items())}
    table = "\n".join(f"| {what} | {answer} |" for what, answer in rows.items())
    return f"## {name}\n\n{paper(name)}\n\n$${method.equation}$$\n\n| it looks at | |\n|---|---|\n{table}\n"


def paper(name: str) -> str:
    """The first line of a method's file."""
    return (inspect.getdoc(sys.modules[METHODS[name].__module__]) or "").partition("\n")[0]


def values(name: str, parameters: Mapping[str, float]) -> pd.DataFrame:
    """The terms of the loss, weighted as in training, in one row."""
    parts = terms(adapted_method(name, parameters), output_of("student"), output_of("teacher"), BATCH)
    return pd.DataFrame({key: [value.item()] for key, value in parts.items()}, index=["value"]).round(4)


def gradient(name: str, parameters: Mapping[str, float]) -> Output:
    """Of a method's own terms (of the hard loss where it has none) by all that the student says; zero where it does not look."""
    student = output_of("student").map(lambda part: part.clone().requires_grad_())
    parts = terms(adapted_method(name, parameters), student, output_of("teacher"), BATCH)
    own = [value for key, value in parts.items() if key != "hard"] or list(parts.values())
    torch.stack(own).sum().backward()
    return student.map(lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def probabilities() -> Figure:
    """The four images: probabilities at temperature 1 that student and teacher give the classes, the label in bold type."""
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.2))
    for axis, who in zip(axes, ("student", "teacher"), strict=True):
        _heat(axis, output_of(who).logits.softmax(dim=1), f"{who}'s probabilities", CLASSES, "Blues")
        for row, label in enumerate(BATCH.labels.tolist()):
            axis.texts[3 * row + label].set_fontweight("bold")
    return _finished(figure)


def gradients(name: str, parameters: Mapping[str, float]) -> Figure:
    """``gradient`` as heat maps: of logits and embedding with sign, of a stage its size over the channels, for the first image."""
    slopes = gradient(name, parameters)
    parts = {"logits": slopes.logits, "embedding": slopes.need(Feature.EMBEDDING)}
    for what, stages in (("maps", slopes.need(Feature.MAPS)), ("preactivations", slopes.need(Feature.PREACTIVATIONS))):
        parts |= {f"{what}\nstage {i + 1}, image 1": stage for i, stage in enumerate(stages)}
    shown = [(what, part) for what, part in parts.items() if part.abs().max() > 0]
    figure, axes = plt.subplots(1, max(1, len(shown)), figsize=(0.4 + 2.1 * max(1, len(shown)), 2.2), squeeze=False)
    for axis, (what, part) in zip(axes.flat, shown, strict=False):
        if part.ndim == 2:
            _heat(axis, part, what, CLASSES if what == "logits" else [f"{i + 1}" for i in range(part.shape[1])], "RdBu_r")
        else:
            _heat(axis, part[0].norm(dim=0), what, [], "Reds")
    return _finished(figure)


def _heat(axis: Axes, values: Tensor, title: str, columns: list[str], colours: str) -> None:
    """One cell per number, written into it if the cells are wide enough. Colours with a sign are centred on 0."""
    most, signed = max(values.abs().max().item(), 1e-30), colours == "RdBu_r"
    axis.imshow(values.numpy(), cmap=colours, vmin=-most if signed else 0, vmax=most, aspect="auto")
    digits = max(0, 1 - math.floor(math.log10(most)))
    for (row, column), value in np.ndenumerate(values.numpy() if values.shape[1] < 4 else np.empty((0, 0))):
        text = f"{value:{'+' if signed else ''}.{digits}f}" if abs(value) > 0.5 * 10**-digits else "0"
        colour = "white" if abs(value) > 0.6 * most else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize="small", color=colour)
    axis.set_title(title, fontsize="medium")
    rows = [f"image {row + 1}" for row in range(len(values))] if columns else []
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, labelsize="small")


def _finished(figure: Figure) -> Figure:
    figure.tight_layout()
    plt.close(figure)  # shown by whoever asked for it, and not a second time at the end of the cell
    return figure
