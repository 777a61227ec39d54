"""Nets of the CIFAR literature beside the small ResNets, for 32 px, of timm's own blocks; registered with timm as those are.

After Tian et al., ICLR 2020 (arXiv 1910.10699), whose pairs of models later papers took over; strides and widths as in mdistiller's
mdistiller/models/cifar, mobilenetv2.py and resnetv2.py.
"""

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_bn_args
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from kdlib.models.resnet_small import CFG

default_cfgs = generate_default_cfgs(
    {
        "kd_cifar_resnet50": {**CFG, "first_conv": "conv1", "classifier": "fc"},
        "kd_cifar_mobilenetv2_050": {**CFG, "first_conv": "conv_stem", "classifier": "classifier"},
    }
)


@register_model
def kd_cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 whose stem is one 3x3 convolution of stride 1: 23.7 M parameters at 100 classes."""
    made: Any = build_model_with_cfg(ResNet, "kd_cifar_resnet50", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
    made.conv1, made.maxpool = nn.Conv2d(made.conv1.in_channels, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(made.conv1.weight, mode="fan_out", nonlinearity="relu")
    for info, reduction in zip(made.feature_info, (1, 1, 2, 4, 8), strict=True):
        info["reduction"] = reduction
    net: nn.Module = made
    return net


@register_model
def kd_cifar_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 of half the width, its second stage without a stride and ReLU for ReLU6: 0.8 M parameters at 100 classes."""
    # expansion, channels before they are halved, blocks, stride of the first (Sandler et al., CVPR 2018, table 2, but for the strides)
    shapes = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    stages = [[f"ir_r{count}_k3_s{stride}_e{grow}_c{width}"] for grow, width, count, stride in shapes]
    net: nn.Module = build_model_with_cfg(
        EfficientNet,
        "kd_cifar_mobilenetv2_050",
        pretrained,
        block_args=decode_arch_def(stages),
        num_features=1280,
        stem_size=32,
        round_chs_fn=lambda channels: channels // 2,
        norm_layer=partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=nn.ReLU,
        **kwargs,
    )
    return net
