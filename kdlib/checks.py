"""Refuse, before anything is trained, what params.yaml names and nobody knows, and what cannot work with the data as they are."""

import inspect
from collections.abc import Mapping
from functools import cache

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import nn

from kdlib.config import FILE, Comparison, DataSource, Recipe, Refused, Study, known, refuse
from kdlib.data.splits import DataSet, subset
from kdlib.losses import METHODS
from kdlib.models import build
from kdlib.plan import trials_of

Shape = tuple[int, int, int]  # classes, channels, size in pixels


def check_names(study: Study) -> None:
    """Methods with their parameters, optimisers, and models as far as params.yaml tells the data's shape. Raises ``Refused``."""
    for name, parameters in study.methods.items():
        check_method(f"methods.{name}", name, parameters)
    for name, recipe in study.recipes.items():
        _check_optimizer(f"recipes.{name}.optimizer", recipe)
    for name, comparison in study.comparisons.items():
        for trial in trials_of(comparison, study):
            check_method(f"comparisons.{name}.sweep.grids.{trial.method}", trial.method, trial.parameters)
    for data, source in study.data.items():
        _check_users(study, data, _declared(source))


def check_method(key: str, name: str, parameters: Mapping[str, float]) -> None:
    """A registered method that takes exactly these parameters. Raises ``Refused``."""
    known(key, name, METHODS)
    takes = list(inspect.signature(METHODS[name]).parameters)
    for parameter in parameters:
        known(f"{key}.{parameter}", parameter, takes)
    missing = [parameter for parameter in takes if parameter not in parameters]
    if missing:
        raise refuse(f"{key}.{missing[0]}", None, "a number", "add this key")
    try:
        METHODS[name](**parameters)
    except ValueError as error:
        parameter, _, reason = str(error).partition(": ")
        raise refuse(f"{key}.{parameter}", parameters.get(parameter), reason.partition("allowed: ")[2] or reason, "change it") from error


def check_against_data(study: Study, data: DataSet) -> None:
    """Batch sizes, models and methods of everything that uses this data set. Raises ``Refused``."""
    for name, teacher in study.teachers.items():
        if teacher.data == data.name:
            _check_batch(study, teacher.recipe, f"teachers.{name}", len(data.train.labels))
    for name, comparison in study.comparisons.items():
        if comparison.data == data.name:
            _check_batch(study, comparison.recipe, f"comparisons.{name}", len(subset(data.train.labels, comparison.fraction, seed=0)))
    _check_users(study, data.name, (data.classes, data.channels, data.size))


def _check_users(study: Study, data: str, shape: Shape) -> None:
    """Models and methods that learn from a data set of this shape."""
    for name, teacher in study.teachers.items():
        if teacher.data == data:
            drop_path = 0.0 if teacher.checkpoint else study.recipes[teacher.recipe].drop_path
            _check_model(f"teachers.{name}.model", teacher.model, shape, drop_path)
    for name, comparison in study.comparisons.items():
        if comparison.data == data:
            _check_model(f"comparisons.{name}.student", comparison.student, shape, study.recipes[comparison.recipe].drop_path)
            _check_classes(f"comparisons.{name}", comparison, shape[0])


def _check_model(key: str, name: str, shape: Shape, drop_path: float) -> None:
    fault = _fault(name, *shape, drop_path)
    if fault:
        raise Refused(f"{FILE}: {key}: {fault}")


@cache  # many comparisons share a student, and a large model takes seconds to build
def _fault(name: str, classes: int, channels: int, size: int, drop_path: float) -> str | None:
    """Why a model cannot be had, as "found ...; allowed: ...; what to do"."""
    try:
        build(name, classes, channels, size, drop_path)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _check_classes(key: str, comparison: Comparison, classes: int) -> None:
    grids = comparison.sweep.grids if comparison.sweep else {}
    for place, methods in ((f"{key}.methods", comparison.methods), (f"{key}.sweep.grids", list(grids))):
        for method in methods:
            least = METHODS[method].min_classes
            if classes < least:
                found = f"{method} for the {classes} classes of {comparison.data}"
                raise refuse(place, found, f"{method} for {least} classes or more", "remove it, or choose other data")


def _check_optimizer(key: str, recipe: Recipe) -> None:
    """One that timm knows and that can take a step here: some need a GPU, a package, or second derivatives."""
    known(key, recipe.optimizer, [str(name) for name in list_optimizers()])
    try:
        net = nn.Linear(2, 2, device="cuda" if torch.cuda.is_available() else "cpu")
        optimizer = create_optimizer_v2(net, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        net(torch.ones_like(net.weight)).sum().backward()
        optimizer.step()
    except (RuntimeError, AssertionError, ImportError, TypeError, ValueError) as error:
        raise refuse(key, recipe.optimizer, f"an optimiser that works on this machine ({error})", "choose another, such as sgd") from error


def _declared(source: DataSource) -> Shape:
    """What params.yaml alone tells of a data set. Where it does not tell the classes, many: only their lack is ever refused."""
    if source.source == "digits":
        return 10, 1, 8
    if source.source == "fractals":
        return source.classes, 1, source.size
    return (100, 3, 32) if source.source == "cifar100" else (1000, 3, source.size)


def _check_batch(study: Study, recipe: str, user: str, images: int) -> None:
    batch = study.recipes[recipe].batch_size
    if batch > images:
        raise refuse(
            f"recipes.{recipe}.batch_size", batch, f"at most the {images} training images of {user}", "make it smaller, or use more data"
        )
