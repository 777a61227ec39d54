"""Weights that were trained elsewhere."""

from pathlib import Path

import timm

from kdlib.config import refuse
from kdlib.data.splits import DataSet
from kdlib.models.build import Classifier, build


def load_checkpoint(key: str, path: Path, model: str, data: DataSet, size: int) -> Classifier:
    """A timm model that looks at images of ``size`` pixels, with the weights of a .safetensors or .pth file.

    Raises ``Refused`` when they are not weights of this model.
    """
    if not path.is_file():
        do = "correct the path (it counts from the folder of params.yaml), or write null to train"
        raise refuse(key, str(path), "a .safetensors or .pth file", do)
    classifier = build(model, data.classes, data.channels, size)
    try:
        timm.models.load_checkpoint(classifier.net, str(path))
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = str(error)[:200] or type(error).__name__
        do = f"choose the model and data set that it was trained with ({reason})"
        raise refuse(key, str(path), f"weights of {model} for {data.classes} classes", do) from error
    return classifier
