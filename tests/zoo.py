"""Small members of many timm families, with what their stages are, told by hand and not by kdlib."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor

from kdlib.models.build import Classifier

CLASSES, BATCH = 5, 4
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)


@dataclass(frozen=True)
class Member:
    """``stages``: modules whose outputs are the stages' maps, once ``unfold`` has brought them into NCHW. ``endings``: what ends them."""

    name: str
    size: int
    maps: tuple[tuple[int, int, int], ...]
    embedding: int
    stages: tuple[str, ...]
    endings: tuple[str | None, ...]
    options: dict[str, Any] = field(default_factory=lambda: {"drop_path_rate": 0.3})
    unfold: Callable[[Tensor], Tensor] = lambda output: output


def _tokens(prefix: int) -> Callable[[Tensor], Tensor]:
    """A square of tokens, row by row, behind class, distillation or register tokens."""

    def unfold(tokens: Tensor) -> Tensor:
        side = int((tokens.shape[1] - prefix) ** 0.5)
        return torch.stack([tokens[:, prefix + i * side : prefix + (i + 1) * side] for i in range(side)], dim=1).permute(0, 3, 1, 2)

    return unfold


def _last_channels(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


def _halving(*channels: int, side: int = 16) -> tuple[tuple[int, int, int], ...]:
    return tuple((width, side >> i, side >> i) for i, width in enumerate(channels))


def _each(form: str, *numbers: int) -> tuple[str, ...]:
    return tuple(form.format(i, number) for i, number in enumerate(numbers))


NONE = (None,) * 4
DROP = {"drop_path_rate": 0.3}
VIT = DROP | {"img_size": 64, "embed_dim": 48, "num_heads": 3}
SWIN = DROP | {"img_size": 64, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
RESNET = DROP | {"channels": (16, 24, 32, 48)}
CONVNEXT = DROP | {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}
LAYERS = ("layer1", "layer2", "layer3", "layer4")
TOKENS = ((48, 4, 4),) * 4
_EVERY = {
    "small": ("kd_resnet8_w8_s1", 8, _halving(8, 16, 32, side=8), 32, _each("stages.{}", 0, 0, 0), _each("stages.{}.0.act2", 0, 0, 0)),
    "small, deeper": (
        *("kd_resnet14_w32_s2", 24, _halving(32, 64, 128, side=12), 128),
        *(_each("stages.{}", 0, 0, 0), _each("stages.{}.1.act2", 0, 0, 0)),
    ),
    "resnet, basic": ("resnet18", 64, _halving(16, 24, 32, 48), 48, LAYERS, tuple(f"{layer}.1.act2" for layer in LAYERS), RESNET),
    "resnet, bottleneck": (
        *("resnet50", 64, _halving(64, 96, 128, 192), 192, LAYERS),
        *(("layer1.2.act3", "layer2.3.act3", "layer3.5.act3", "layer4.2.act3"), RESNET),
    ),
    # its blocks pass one activation three times, its head drops out
    "senet": ("legacy_seresnet18", 32, _halving(64, 128, 256, 512, side=8), 512, LAYERS, tuple(f"{layer}.1.relu" for layer in LAYERS), {}),
    "resnetv2": (
        *("resnetv2_18", 64, _halving(32, 64, 96, 128), 128, _each("stages.{}", 0, 0, 0, 0), NONE),
        DROP | {"channels": (32, 64, 96, 128)},
    ),
    "regnet": (
        "regnetx_002",
        64,
        _halving(24, 56, 152, 368),
        368,
        ("s1", "s2", "s3", "s4"),
        ("s1.b1.act3", "s2.b1.act3", "s3.b4.act3", "s4.b7.act3"),
    ),
    "efficientnet": ("efficientnet_b0", 32, _halving(24, 40, 112, 320, side=8), 1280, _each("blocks.{1}", 1, 2, 4, 6), NONE),
    "mobilenetv3": (
        *("mobilenetv3_small_050", 64, _halving(8, 16, 24, 288), 1024, _each("blocks.{1}", 0, 1, 3, 5)),
        (None, None, None, "blocks.5.0.bn1.act"),
    ),
    # its head has a BatchNorm between pooling and classifier
    "mobilenetv4": (
        *("mobilenetv4_conv_small_035", 64, _halving(16, 24, 32, 336), 1280, _each("blocks.{1}", 0, 1, 2, 4)),
        ("blocks.0.1.bn1.act", "blocks.1.1.bn1.act", None, "blocks.4.0.bn1.act"),
    ),
    "convnextv2": ("convnextv2_atto", 64, _halving(16, 24, 32, 48), 48, _each("stages.{}", 0, 0, 0, 0), NONE, CONVNEXT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        64,
        _halving(24, 48, 96, 192),
        192,
        _each("layers.{}", 0, 0, 0, 0),
        NONE,
        SWIN,
        _last_channels,
    ),
    "vit": ("vit_tiny_patch16_224", 64, TOKENS, 48, _each("blocks.{1}", 0, 2, 3, 5), NONE, VIT | {"depth": 6}, _tokens(1)),
    # two tokens before the image's, two classifiers
    "deit": ("deit_tiny_distilled_patch16_224", 64, TOKENS, 48, _each("blocks.{}", 0, 0, 0, 0), NONE, VIT | {"depth": 4}, _tokens(2)),
    "beitv2": ("beitv2_base_patch16_224", 64, TOKENS, 48, _each("blocks.{1}", 0, 2, 4, 6), NONE, VIT | {"depth": 7}, _tokens(1)),
}
MEMBERS = {family: Member(*given) for family, given in _EVERY.items()}


@functools.cache
def _made(family: str) -> Classifier:
    """With parameters, norms and running statistics that are none of the special ones that a model starts with."""
    member = MEMBERS[family]
    torch.manual_seed(0)
    net = timm.create_model(member.name, num_classes=CLASSES, **member.options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter) + 0.02 * torch.randn_like(parameter))
    classifier = Classifier(net, MEAN, STD, member.size)
    with torch.no_grad():
        for _ in range(3):
            classifier.train()(images(family))
    return classifier


def make(family: str, training: bool = False) -> Classifier:
    """A copy: the same one in each call."""
    return copy.deepcopy(_made(family)).train(training)


def images(family: str, batch: int = BATCH) -> Tensor:
    return torch.rand(batch, 3, MEMBERS[family].size, MEMBERS[family].size, generator=torch.Generator().manual_seed(1))


def normalised(given: Tensor) -> Tensor:
    """By hand."""
    return torch.stack([(given[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
