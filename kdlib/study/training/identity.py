"""What a run and a teacher's answers are known by: a hash of everything that can change a number of theirs."""

import hashlib
from typing import Any

import timm
import torch

from kdlib.engine.setting import Setting
from kdlib.losses import METHODS
from kdlib.study.training.code_hash import code_fingerprint, fingerprint
from kdlib.study.training.planned import Variant

# What a fingerprint covers by value, what only names other modules, moves files about or says how far it is: it changes no number.
UNCOUNTED = frozenset(f"kdlib.{name}" for name in ("config", "config.schema", "losses"))


def of_run(setting: Setting, teacher: str | None, variant: Variant) -> str:
    """Of the weights and measures that training ends with."""
    described = _views(setting) | {
        "teacher": teacher,
        "student": setting.student,
        "size": setting.size,
        "recipe": setting.recipe.model_dump(),
        "method": variant.method,
        "parameters": dict(sorted(variant.parameters.items())),
        "trial": variant.trial,
    }
    return fingerprint(described, code_fingerprint(["kdlib.engine.train", METHODS[variant.method].__module__], UNCOUNTED))


def of_answers(setting: Setting, teacher: str) -> str:
    """Of what a teacher says of the views, to the bit: on one kind of device, versions of torch and timm, and number of threads."""
    on_gpu = setting.device.type == "cuda"
    device = torch.cuda.get_device_name(setting.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    exact = (torch.__version__, timm.__version__, torch.get_num_threads(), device)
    code = code_fingerprint(["kdlib.views.stream", "kdlib.engine.teacher_cache"], UNCOUNTED)
    return fingerprint(_views(setting) | {"teacher": teacher, "recipe": setting.recipe.views()}, exact, code)


def _views(setting: Setting) -> dict[str, Any]:
    return {
        "data": setting.data.fingerprint,
        "hflip": setting.data.hflip,
        "images": hashlib.sha256(setting.index.tobytes()).hexdigest(),
        "seed": setting.seed,
        "compute": setting.compute.model_dump(),
        "device": setting.device.type,
    }
