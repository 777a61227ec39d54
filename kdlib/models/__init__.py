"""Models: the nets of the default study and any timm model, behind one interface. Importing it registers our nets with timm."""

from kdlib.models import cifar, resnet_small

NAMES = (*resnet_small.SHAPES, *cifar.default_cfgs)
