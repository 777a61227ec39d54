"""Models: the small nets of the default study and any timm model, behind one interface."""

from kdlib.models.build import Classifier, build

__all__ = ["Classifier", "build"]
