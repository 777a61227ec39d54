"""Refuse, before anything is trained, what params.yaml names and nobody knows, and what cannot work with the data as they are."""

import inspect
from collections.abc import Mapping

from timm.optim import list_optimizers

from kdlib.config import Study, known, refuse
from kdlib.data.splits import DataSet, subset
from kdlib.losses import METHODS
from kdlib.models import build
from kdlib.plan import trials_of


def check_names(study: Study) -> None:
    """Methods with their parameters, and optimisers. Raises ``Refused``."""
    for name, parameters in study.methods.items():
        check_method(f"methods.{name}", name, parameters)
    for name, recipe in study.recipes.items():
        known(f"recipes.{name}.optimizer", recipe.optimizer, list_optimizers())
    for name, comparison in study.comparisons.items():
        for trial in trials_of(comparison, study):
            check_method(f"comparisons.{name}.sweep.grids.{trial.method}", trial.method, trial.parameters)
    for name, teacher in study.teachers.items():
        _check_declared(f"teachers.{name}.model", teacher.model, study, teacher.data)
    for name, comparison in study.comparisons.items():
        _check_declared(f"comparisons.{name}.student", comparison.student, study, comparison.data)


def check_method(key: str, name: str, parameters: Mapping[str, float]) -> None:
    """A registered method that takes exactly these parameters. Raises ``Refused``."""
    known(key, name, METHODS)
    takes = list(inspect.signature(METHODS[name]).parameters)
    for parameter in parameters:
        known(f"{key}.{parameter}", parameter, takes)
    missing = [parameter for parameter in takes if parameter not in parameters]
    if missing:
        raise refuse(f"{key}.{missing[0]}", "nothing", "a number", "add this key")
    try:
        METHODS[name](**parameters)
    except ValueError as error:
        parameter, _, reason = str(error).partition(": ")
        raise refuse(f"{key}.{parameter}", parameters.get(parameter), reason.partition("allowed: ")[2] or reason, "change it") from error


def check_against_data(study: Study, data: DataSet) -> None:
    """Batch sizes and models of everything that uses this data set. Raises ``Refused``."""
    for name, teacher in study.teachers.items():
        if teacher.data == data.name:
            _check_batch(study, teacher.recipe, f"teachers.{name}", len(data.train.labels))
            check_model(f"teachers.{name}.model", teacher.model, data.classes, data.channels, data.size)
    for name, comparison in study.comparisons.items():
        if comparison.data == data.name:
            _check_batch(study, comparison.recipe, f"comparisons.{name}", len(subset(data.train.labels, comparison.fraction, seed=0)))
            check_model(f"comparisons.{name}.student", comparison.student, data.classes, data.channels, data.size)


def check_model(key: str, name: str, classes: int, channels: int, size: int) -> None:
    """A model that timm knows and that takes images of this size. Raises ``Refused``."""
    try:
        build(name, classes, channels, size)
    except ValueError as error:
        raise refuse(key, name, *_after_found(str(error))) from error


def _check_declared(key: str, name: str, study: Study, data: str) -> None:
    """The model at the size that params.yaml alone tells: digits are 8 px, CIFAR-100 is 32 px, the rest say."""
    source = study.data[data]
    size = getattr(source, "size", {"digits": 8, "cifar100": 32}.get(source.source))
    check_model(key, name, classes=2, channels=1 if source.source in ("digits", "fractals") else 3, size=size)


def _check_batch(study: Study, recipe: str, user: str, images: int) -> None:
    batch = study.recipes[recipe].batch_size
    if batch > images:
        raise refuse(f"recipes.{recipe}.batch_size", batch, f"at most the {images} training images of {user}", "make it smaller, or use more data")


def _after_found(message: str) -> tuple[str, str]:
    """The last two parts of "found ...; allowed: ...; what to do"."""
    _, allowed, do = message.split("; ", 2)
    return allowed.removeprefix("allowed: "), do
