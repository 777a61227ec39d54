"""A timm classifier, distilled or not, as the backbone of a detector: maps at strides 4, 8, 16 and 32, and a pyramid on them."""

from pathlib import Path
from typing import Any

import timm
from jaxtyping import Float
from timm.layers import LayerNorm2d  # type: ignore[attr-defined]
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from kdlib.errors import refuse
from kdlib.models.checkpoints import load_weights
from kdlib.models.features import stage_indices
from projects.detection.settings import Recipe, Run

STRIDES = (4, 8, 16, 32)
CHANNELS = 256  # of the pyramid (Lin et al., "Feature pyramid networks", CVPR 2017, section 3)


class Backbone(nn.Module):
    """A classifier's stages and a feature pyramid on them.

    From normalised images to maps, named as torchvision's detectors expect: "0" to "3", and "pool" at stride 64.
    """

    def __init__(self, net: nn.Module, indices: tuple[int, ...], widths: tuple[int, ...], output_norms: bool) -> None:
        super().__init__()
        self.net, self._indices, self.out_channels = net, list(indices), CHANNELS  # the latter for torchvision
        self.norms = nn.ModuleList(LayerNorm2d(width) if output_norms else nn.Identity() for width in widths)
        self.pyramid = FeaturePyramidNetwork(list(widths), CHANNELS, LastLevelMaxPool())

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        net: Any = self.net
        maps = net.forward_intermediates(images, indices=self._indices, output_fmt="NCHW", intermediates_only=True)
        named = {str(i): norm(stage_map) for i, (norm, stage_map) in enumerate(zip(self.norms, maps, strict=True))}
        pyramid: dict[str, Tensor] = self.pyramid(named)
        return pyramid

    def train(self, mode: bool = True) -> "Backbone":
        """Switch the mode, but leave BatchNorm whose weights are frozen in evaluation: it keeps its statistics too."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm) and layer.weight is not None and not layer.weight.requires_grad:
                layer.eval()
        return self


def build(key: str, run: Run, recipe: Recipe, root: Path) -> Backbone:
    """Build the backbone of a run, its first stages frozen.

    Raises ``Refused`` about ``key``.model for a model without such maps, about ``key``.weights for a file that is not of this model.
    """
    net, indices, widths = _create(f"{key}.model", run.model, recipe.drop_path)
    if run.weights is not None:
        load_weights(f"{key}.weights", root / Path(run.weights).expanduser(), net, run.model, classes=None)
    net.prune_intermediate_layers(list(indices))
    freeze(net, recipe.frozen_stages)
    return Backbone(net, indices, widths, recipe.output_norms)


def freeze(net: nn.Module, stages: int) -> None:
    """Switch off the gradient of the stem and of the first ``stages`` stages; nothing for 0."""
    if stages:
        layers = layers_of(net)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(layers[name] > stages)


def layers_of(net: Any) -> dict[str, int]:
    """The stage of each parameter as timm counts: 0 is the stem, what follows the stages comes last."""
    groups: dict[int, list[str]] = group_parameters(net, net.group_matcher(coarse=True))
    return {name: layer for layer, names in groups.items() for name in names}


def _create(key: str, model: str, drop_path: float) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """Create the timm model; returns it with the indices and the channels of its maps. Raises ``Refused``."""
    if not timm.is_model(model):
        raise refuse(key, model, "a model that timm knows", "see timm.list_models()")
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}  # not every family takes it
    net: Any = timm.create_model(model, **options)
    indices = stage_indices(net)
    info = [net.feature_info[i] for i in indices] if indices else []
    strides = [stage["reduction"] for stage in info]
    if strides != list(STRIDES) or not hasattr(net, "prune_intermediate_layers"):
        do = "choose another, resnet50 or convnextv2_tiny for example"
        raise refuse(key, f"{model} with maps at strides {strides}", f"a model with maps at strides {list(STRIDES)}", do)
    return net, indices, tuple(stage["num_chs"] for stage in info)
