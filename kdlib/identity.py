"""What a run and a teacher's answers are known by: a hash of everything that can change a number of theirs."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch

from kdlib.config import Recipe
from kdlib.data.stream import ViewStream
from kdlib.losses import METHODS
from kdlib.plan import Variant
from kdlib.provenance import code_fingerprint, fingerprint
from kdlib.train.answers import Answers
from kdlib.train.run import Setting, train

# Imported by what trains, and not followed from there:
UNCOUNTED = frozenset(
    {
        "kdlib.config",  # training takes refusals of it, and the schema: classes of values, which are hashed, and of nothing else
        "kdlib.losses",  # names of the classes: the one of a run is hashed by name, and its file counts
        "kdlib.data",  # makes the folders of data sets, which are known by a digest of their content
    }
)


def of_run(setting: Setting, teacher: str | None, variant: Variant) -> str:
    """Of the weights and measures that training ends with."""
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
    """Of what a teacher says of the views, to the bit: on one kind of device, versions of torch and timm, and number of threads."""
    on_gpu = setting.device.type == "cuda"
    device = torch.cuda.get_device_name(setting.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    exact = (torch.__version__, timm.__version__, torch.get_num_threads(), device)
    code = code_fingerprint([ViewStream.__module__, Answers.__module__], UNCOUNTED)
    return fingerprint(_views(setting) | {"teacher": teacher, "recipe": of_views(setting.recipe)}, exact, code)


def of_views(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe the training views depend on."""
    sizes, crops, mixing = {"batch_size", "group_size", "repeats"}, {"crop_padding", "crop_min_area"}, {"mixup_alpha", "cutmix_alpha"}
    return recipe.model_dump(include=sizes | crops | mixing | {"randaugment", "erasing", "augment"})


def of_file(path: Path) -> str:
    """SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _views(setting: Setting) -> dict[str, Any]:
    return {
        "data": setting.data.fingerprint,
        "hflip": setting.data.hflip,
        "images": hashlib.sha256(setting.index.tobytes()).hexdigest(),
        "seed": setting.seed,
        "compute": setting.compute.model_dump(),
        "device": setting.device.type,
    }
