"""Small ResNets for small images, registered with timm: ``timm.create_model("kd_resnet8_w16_s2")`` once this module is imported.

After He et al., CVPR 2016 (arXiv 1512.03385), section 4.2: three stages, n basic blocks each, depth 6n + 2. What differs: the
stem's stride is a parameter (2 keeps a 24 px study affordable on a CPU) and the shortcut is a projection, as timm's blocks have it.

A name says depth, width and the stem's stride. Width 16 and stride 1 are the CIFAR literature's (kd_resnet20_w16_s1, kd_resnet56_w16_s1).
The default study's student is kd_resnet8_w16_s2 (84 k parameters at 100 classes) and its teacher kd_resnet14_w32_s2 (0.7 M), for 24 to 32
px; for 8 to 16 px they are kd_resnet8_w8_s1 (23 k) and kd_resnet14_w32_s1.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

Pixels = Float[Tensor, "batch channels height width"]
Maps = Float[Tensor, "batch _ _ _"]  # of any depth: channels and sizes differ from the input's


class SmallResNet(nn.Module):
    """Stem, three stages of ``blocks`` basic blocks with ``width``, 2 and 4 ``width`` channels, pooled linear head.

    ``drop_path_rate`` grows linearly over the blocks, as in timm.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (timm's builder passes these by name)
        self,
        blocks: int,
        width: int,
        stem_stride: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if global_pool != "avg":
            raise ValueError(f"global_pool: found {global_pool!r}; allowed: 'avg'")
        self.num_classes, self.in_chans = num_classes, in_chans  # timm.task asks for them
        self.num_features = self.head_hidden_size = 4 * width
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        rates = [drop_path_rate * i / max(1, 3 * blocks - 1) for i in range(3 * blocks)]
        widths = (width, width, 2 * width, 4 * width)  # of the stem, then of the stages
        stages = [_stage(widths[i], widths[i + 1], 2 if i else 1, rates[i * blocks : (i + 1) * blocks]) for i in range(3)]
        self.stages = nn.Sequential(*stages)
        self.feature_info = [{"num_chs": widths[i + 1], "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i in range(3)]
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Pixels) -> Maps:
        maps: Maps = self.stages(self.stem(x))
        return maps

    def forward_head(self, x: Maps, pre_logits: bool = False) -> Float[Tensor, "batch out"]:
        pooled = self.drop(x.mean((2, 3)))
        logits: Tensor = pooled if pre_logits else self.fc(pooled)
        return logits

    def forward_intermediates(
        self, x: Pixels, indices: int | list[int] | None = None, intermediates_only: bool = False, **_: object
    ) -> list[Maps] | tuple[Maps, list[Maps]]:
        """The stages' maps in timm's way; of its further options the only value that there is here is the default."""
        take, _last = feature_take_indices(len(self.stages), indices)
        maps, x = [], self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward(self, x: Pixels) -> Float[Tensor, "batch classes"]:
        return self.forward_head(self.forward_features(x))


def _stage(channels: int, out: int, stride: int, drop_paths: list[float]) -> nn.Sequential:
    blocks = []
    for rate in drop_paths:
        project = stride > 1 or channels != out
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if project else None
        blocks.append(BasicBlock(channels, out, stride, shortcut, drop_path=DropPath(rate) if rate else None))
        channels, stride = out, 1
    return nn.Sequential(*blocks)


CFG = {
    "url": "",
    "input_size": (3, 32, 32),
    "min_input_size": (3, 8, 8),
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "stem.0",
    "classifier": "fc",
}
DEPTHS, WIDTHS, STRIDES = range(8, 111, 6), (8, 16, 32), (1, 2)
SHAPES = {f"kd_resnet{depth}_w{width}_s{stride}": (depth, width, stride) for depth, width, stride in product(DEPTHS, WIDTHS, STRIDES)}
default_cfgs = generate_default_cfgs(dict.fromkeys(SHAPES, CFG))


def _entry_point(name: str, depth: int, width: int, stride: int) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        shape: dict[str, Any] = {"blocks": (depth - 2) // 6, "width": width, "stem_stride": stride}
        net: nn.Module = build_model_with_cfg(SmallResNet, name, pretrained, **shape, **kwargs)
        return net

    create.__name__ = name  # by which timm knows it
    return register_model(create)


globals().update({name: _entry_point(name, *shape) for name, shape in SHAPES.items()})
