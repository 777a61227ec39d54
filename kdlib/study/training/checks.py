"""Refuse, before anything is trained, what params.yaml names and nobody knows, and what cannot work with the data as they are."""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import nn

from kdlib.config.schema import Launch, Params, Recipe
from kdlib.data.dataset import DataSet
from kdlib.data.sources import Shape, declared_shape
from kdlib.data.splits import subset
from kdlib.errors import FILE, Refused, known, refuse
from kdlib.losses import METHODS
from kdlib.models.build import build
from kdlib.study.training.planned import methods_of, trials_of
from kdlib.types import OutputShape, Setup
from kdlib.views.mixup import mix_groups


def check_without_data(params: Params) -> None:
    """Methods with their parameters, optimisers, and models as far as params.yaml tells the data's shape. Raises ``Refused``."""
    for name, parameters in params.methods.items():
        check_method(f"methods.{name}", name, parameters)
    for name, recipe in params.recipes.items():
        _check_optimizer(f"recipes.{name}.optimizer", recipe)
        _check_groups(f"recipes.{name}.group_size", recipe)
        _check_rates(f"recipes.{name}", recipe)
        if recipe.augment == "timm" and recipe.crop_padding:
            raise refuse(f"recipes.{name}.crop_padding", recipe.crop_padding, "0 with augment: timm, which has no such crop", "change one")
    for name, comparison in params.comparisons.items():
        for trial in trials_of(comparison, params):
            check_method(f"comparisons.{name}.sweep.grids.{trial.method}", trial.method, trial.parameters)
    for data, source in params.data.items():
        _check_users(params, data, declared_shape(source))


def _check_groups(key: str, recipe: Recipe) -> None:
    if recipe.group_size is not None and recipe.batch_size % recipe.group_size:
        sizes = [size for size in range(2, recipe.batch_size + 1) if recipe.batch_size % size == 0]
        raise refuse(key, recipe.group_size, f"a divisor of batch_size, {recipe.batch_size}: {sizes}", "change one of the two")


def _check_rates(key: str, recipe: Recipe) -> None:
    """A warm-up that rises, then one way down: by the cosine to min_lr, or by milestones."""
    for name in ("warmup_lr", "min_lr"):
        if getattr(recipe, name) > recipe.learning_rate:
            raise refuse(f"{key}.{name}", getattr(recipe, name), f"at most the learning_rate, {recipe.learning_rate:g}", "make it smaller")
    milestones = recipe.milestones
    if milestones != sorted(set(milestones)) or any(share < recipe.warmup for share in milestones):
        allowed = f"rising shares of all steps, none within the warm-up ({recipe.warmup:g})"
        raise refuse(f"{key}.milestones", milestones, allowed, "change or sort them")
    if milestones and recipe.min_lr:
        raise refuse(f"{key}.min_lr", recipe.min_lr, "0 with milestones, which alone lower the rate", "change one of the two")


def check_machines(launch: Launch) -> None:
    """Processes and machines fit together and to the hardware of this one. Raises ``Refused``."""
    gpus = torch.cuda.device_count()
    most, of = (gpus, "GPUs") if gpus else (len(os.sched_getaffinity(0)), "cores")
    if launch.processes > most:
        raise refuse("study.launch.processes", launch.processes, f"at most the {most} {of} of this machine", "start fewer")
    if (launch.nodes > 1) != (launch.rendezvous is not None):
        allowed = "host:port where there are several nodes, null where there is one"
        do = "change it, or study.launch.nodes; `python -m kdlib.study submit` needs none"
        raise refuse("study.launch.rendezvous", launch.rendezvous, allowed, do)
    if launch.rendezvous is not None and not re.fullmatch(r".+:\d{1,5}", launch.rendezvous):
        raise refuse("study.launch.rendezvous", launch.rendezvous, "host:port of the first machine", "write it as gpu1:29500")


def check_shares(params: Params) -> None:
    """Every batch has mix groups for all processes of study.launch, wherever they are. Raises ``Refused``."""
    processes = params.study.launch.processes * params.study.launch.nodes
    for name in sorted({item.recipe for item in params.teachers.values()} | {item.recipe for item in params.comparisons.values()}):
        recipe = params.recipes[name]
        if mix_groups(recipe) % processes:
            what = f"{mix_groups(recipe)} mix groups in a batch of {recipe.batch_size}"
            allowed = f"a number of groups that {processes} processes can share out (they take whole groups)"
            raise refuse(f"recipes.{name}.group_size", what, allowed, f"set it to {recipe.batch_size // processes}, or change study.launch")


def check_method(key: str, name: str, parameters: Mapping[str, float]) -> None:
    """A registered method that takes exactly these parameters. Raises ``Refused``."""
    known(key, name, METHODS)
    takes = list(inspect.signature(METHODS[name]).parameters)
    for parameter in parameters:
        known(f"{key}.{parameter}", parameter, takes)
    if missing := [parameter for parameter in takes if parameter not in parameters]:
        raise refuse(f"{key}.{missing[0]}", None, "a number", "add this key")
    try:
        METHODS[name](**parameters)
    except ValueError as error:
        parameter, _, reason = str(error).partition(": ")
        raise refuse(f"{key}.{parameter}", parameters.get(parameter), reason.partition("allowed: ")[2] or reason, "change it") from error


def check_against_data(params: Params, data: DataSet) -> None:
    """Batch sizes, models and methods of everything that uses this data set. Raises ``Refused``."""
    users = [(f"teachers.{name}", item.recipe, 1.0) for name, item in params.teachers.items() if item.data == data.name]
    users += [(f"comparisons.{name}", item.recipe, item.fraction) for name, item in params.comparisons.items() if item.data == data.name]
    for user, recipe, fraction in users:
        batch, images = params.recipes[recipe].batch_size, len(subset(data.train.labels, fraction, seed=0))
        if batch > images:
            allowed = f"at most the {images} training images of {user}"
            raise refuse(f"recipes.{recipe}.batch_size", batch, allowed, "make it smaller, or use more data")
    _check_users(params, data.name, (data.classes, data.channels, data.size))


def _check_users(params: Params, data: str, shape: Shape) -> None:
    """Models and methods that learn from a data set of this shape."""
    classes, channels, size = shape
    teachers: dict[str, OutputShape] = {}
    for name, teacher in params.teachers.items():
        if teacher.data == data:
            drop_path = 0.0 if teacher.checkpoint else params.recipes[teacher.recipe].drop_path
            teachers[name] = _check_model(f"teachers.{name}.model", teacher.model, (classes, channels, teacher.size or size), drop_path)
    for name, comparison in params.comparisons.items():
        if comparison.data == data:
            drop_path = params.recipes[comparison.recipe].drop_path
            student = _check_model(f"comparisons.{name}.student", comparison.student, shape, drop_path)
            _check_methods(params, name, student, teachers[comparison.teacher])


def _check_model(key: str, name: str, shape: Shape, drop_path: float) -> OutputShape:
    """The shape of a model's answers. Raises ``Refused`` where the model cannot be had."""
    try:
        return _output_shape(name, *shape, drop_path)
    except ValueError as error:  # says "found ...; allowed: ...; what to do"
        raise Refused(f"{FILE}: {key}: {' '.join(str(error).split())}") from None


@cache  # many comparisons share a student, and a large model takes seconds to build
def _output_shape(name: str, classes: int, channels: int, size: int, drop_path: float) -> OutputShape:
    return build(name, classes, channels, size, drop_path).shape


def _check_methods(params: Params, name: str, student: OutputShape, teacher: OutputShape) -> None:
    """Every method of a comparison can learn from this teacher with this student under this recipe."""
    comparison, key = params.comparisons[name], f"comparisons.{name}"
    recipe = params.recipes[comparison.recipe]
    for variant in (*methods_of(comparison, params), *trials_of(comparison, params)):
        place, method = f"{key}.{'sweep.grids' if variant.trial else 'methods'}", METHODS[variant.method](**variant.parameters)
        if recipe.hard_loss == "none" and not method.asks_teacher:
            found, do = f"{variant.method} with recipe {comparison.recipe!r}, whose hard_loss is none", "remove it, or choose ce or bce"
            raise refuse(place, found, "a method that asks the teacher", do)
        if method.unmixed and (recipe.mixup_alpha or recipe.cutmix_alpha):
            found = f"{variant.method} with recipe {comparison.recipe!r}, which mixes every image"
            do = "remove it, or set mixup_alpha and cutmix_alpha to 0 (it learns from unmixed images alone)"
            raise refuse(place, found, f"{variant.method} under a recipe that does not mix", do)
        try:
            method.adapt(Setup(student, teacher, torch.zeros(2, dtype=torch.int64)))
        except ValueError as error:
            raise Refused(f"{FILE}: {place}: {str(error).replace('found', f'found {variant.method} with', 1)}") from error


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


def full_memory_refused(name: str, recipe: Recipe) -> AbstractContextManager[None]:
    """The GPU's memory running out in a training by this recipe becomes one line that says what to change."""
    allowed = "what fits; `python -m kdlib.study plan` finds the largest that does"
    do = "set it lower (it changes which images are mixed and normalised together), train fewer methods at once, or use a larger GPU"
    return out_of_memory_refused(f"recipes.{name}.group_size", recipe.batch_size // mix_groups(recipe), allowed, do)


@contextmanager
def out_of_memory_refused(key: str, images: int, allowed: str, do: str) -> Iterator[None]:
    """The GPU's memory running out becomes ``Refused`` about ``key``, which says how many images a GPU has at a time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = f"{images} images, more than the memory of the GPU is enough for ({str(error).splitlines()[0]})"
        raise refuse(key, found, allowed, do) from error
