"""What a run and a teacher's outputs are known by: a hash of everything that can change a number of theirs."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch

from kdlib.config.schema import Recipe, TeacherParams
from kdlib.data.dataset import DataSet
from kdlib.engine.setting import Setting
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.engine.train import train
from kdlib.files import sha256
from kdlib.losses import METHODS
from kdlib.study.training.code_hash import code_fingerprint, fingerprint
from kdlib.study.training.planned import Variant
from kdlib.views.stream import ViewStream

# Imported by what trains, and not followed from there:
UNCOUNTED = (
    "kdlib.config",  # the package only hands on names
    "kdlib.config.schema",  # classes of values, which are hashed themselves; they have no behaviour
    "kdlib.losses",  # names of the classes: the one of a run is hashed by name, and its file counts
)


def of_run(setting: Setting, teacher: str | None, variant: Variant) -> str:
    """Fingerprint of the weights and measures that training ends with."""
    method = METHODS[variant.method]
    described = _views(setting) | {
        "teacher": teacher,
        "student": setting.student,
        "size": setting.size,
        "recipe": setting.recipe.model_dump(),
        "method": variant.method,
        "class": method.__qualname__,  # a file may hold several
        "parameters": dict(sorted(variant.parameters.items())),
        "trial": variant.trial,
    }
    return fingerprint(described, code_fingerprint([train.__module__, method.__module__], UNCOUNTED))


def of_answers(setting: Setting, teacher: str) -> str:
    """Fingerprint of the teacher's cached outputs. Bit-exact, so it covers device, library versions and threads."""
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    exact = (torch.__version__, timm.__version__, torch.get_num_threads(), device)
    code = code_fingerprint([ViewStream.__module__, TeacherCache.__module__], UNCOUNTED)
    return fingerprint(_views(setting) | {"teacher": teacher, "recipe": of_views(setting.recipe)}, exact, code)


def of_teacher(teacher: TeacherParams, weights: Path) -> str:
    """Fingerprint of what tells a teacher's outputs from another's: its model and its weights."""
    return fingerprint(teacher.model, teacher.size, sha256(weights))


def of_checkpoint(path: Path, model: str, size: int, data: DataSet) -> str:
    """Fingerprint of a teacher's checkpoint from elsewhere, measured on a data set."""
    return fingerprint("checkpoint", sha256(path), model, size, data.fingerprint)


def of_views(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that the training views depend on."""
    sizes, crops, mixing = {"batch_size", "group_size", "repeats"}, {"crop_padding", "crop_min_area"}, {"mixup_alpha", "cutmix_alpha"}
    return recipe.model_dump(include=sizes | crops | mixing | {"randaugment", "erasing", "augment"})


def _views(setting: Setting) -> dict[str, Any]:
    return {
        "data": setting.data.fingerprint,
        "hflip": setting.data.hflip,
        "images": hashlib.sha256(setting.index.tobytes()).hexdigest(),
        "seed": setting.seed,
        "compute": setting.compute.model_dump(),
        "device": setting.device.type,
    }
