"""Weights that were trained elsewhere, as a classifier."""

import sys
from pathlib import Path

from timm.data.imagenet_info import infer_imagenet_subset

from kdlib.errors import Refused, refuse
from kdlib.models import layouts
from kdlib.models.build import Classifier, build


def load_checkpoint(key: str, path: Path, model: str, shape: tuple[int, int, int], averaged: bool = True) -> Classifier:
    """A timm model for ``shape`` (classes, channels, size in pixels) with the weights of a .safetensors or .pth file.

    Takes timm's layouts, those of trainers around them, and what timm converts (``kdlib.models.layouts``); says on stderr which of several
    weights it took (averaged ones, unless ``averaged=False`` prefers the plain ones), and what was resized.
    Raises ``Refused`` about ``key`` when they are not weights of this model.
    """
    if not path.is_file():
        do = "correct the path (it counts from the folder of params.yaml), or write null to train"
        raise refuse(key, str(path), "a .safetensors or .pth file", do)
    classifier = build(model, *shape)
    allowed = f"weights of {model} for {shape[0]} classes"
    try:
        given, taken = layouts.unwrap(layouts.read(path), averaged)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = str(error)[:400] or type(error).__name__
        raise refuse(key, str(path), allowed, f"choose the model and data set that it was trained with ({reason})") from error
    state, resized = layouts.convert(given, classifier.net)
    found = layouts.differences(state, classifier.net)
    if found:
        raise _unfit(key, path, allowed, f"{found}; it looks like {layouts.looks_like(given)}", layouts.classes(given), shape[0])
    classifier.net.load_state_dict(state)
    notes = [f"took {taken}"] * bool(taken) + [f"resized {len(resized)} tables of positions to {shape[2]} px"] * bool(resized)
    if notes:
        print(f"{path.name}: {', '.join(notes)}", file=sys.stderr, flush=True)
    return classifier


def _unfit(key: str, path: Path, allowed: str, reason: str, classes: int, wanted: int) -> Refused:
    if classes == wanted:
        return refuse(key, str(path), allowed, f"choose the model and data set that it was trained with ({reason})")
    if classes == 0:
        do = f"choose a file that was fine-tuned for {wanted:,} classes: this one has no classifier, as after pre-training"
    else:
        known = infer_imagenet_subset({"num_classes": classes})
        whose = f"{classes:,} classes" + (f" ({known})" if known else "")
        do = f"choose the file that was fine-tuned for {wanted:,} classes: this one's classifier knows {whose}"
    return refuse(key, str(path), allowed, f"{do} ({reason})")
