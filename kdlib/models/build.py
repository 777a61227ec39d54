"""Any timm model (our own nets are registered there) as a model that takes un-normalised images of a data set."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdlib.errors import some
from kdlib.models import NAMES, features
from kdlib.types import Asks, Feature, Images, Output

_UNFIT = (RuntimeError, AssertionError, ValueError, TypeError, ArithmeticError)  # what models raise for a size that is not theirs


class Classifier(nn.Module):
    """A timm model behind its own normalisation and resolution: un-normalised images in [0, 1] go in, an ``Output`` comes out.

    ``size``: the side in pixels that images of other sizes are resized to. ``shape``: of its answer to one image.
    """

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: int) -> None:
        super().__init__()
        self.net, self.size = net, size
        self._places, self.shape = features.explore(net, torch.zeros(1, len(mean), size, size))
        # not persistent: the weights file stays that of the timm model
        self.mean: Float[Tensor, "1 channels 1 1"] = nn.Buffer(torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.std: Float[Tensor, "1 channels 1 1"] = nn.Buffer(torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Images, asks: Asks = frozenset({Feature.LOGITS})) -> Output:
        if images.shape[-1] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return features.answer(self.net, self._places, (images - self.mean) / self.std, asks)


def build(name: str, classes: int, channels: int, size: int, drop_path: float = 0.0) -> Classifier:
    """A freshly initialised ``name`` that looks at images of ``channels`` x ``size`` x ``size``.

    Raises ValueError, as "found ...; allowed: ...; what to do", for a name that timm does not know and for a size that the model
    cannot take.
    """
    if not timm.is_model(name):
        raise ValueError(f"found {name!r}; allowed: a timm model or one of {some(NAMES)}; {_closest(name)}")
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    options |= {"drop_path_rate": drop_path} if drop_path else {}  # not every family knows it
    net = _create(name, options)
    cfg: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    least = (cfg.get("min_input_size") or (0,))[-1]
    if size < least:
        raise ValueError(f"found {name!r} with images of {size} px; allowed: at least {least} px; choose another model or a larger size")
    try:
        if cfg.get("fixed_input_size", False) and cfg["input_size"][-1] != size:
            net = timm.create_model(name, **options, img_size=size)
        # one forward pass: the only honest test of an image size, and cheap beside a training run
        net = net.to(memory_format=torch.channels_last)
        return Classifier(net, _per_channel(cfg["mean"], channels), _per_channel(cfg["std"], channels), size)
    except _UNFIT as error:
        reason = " ".join(str(error).split())[:160]
        do = "choose another model or size"
        raise ValueError(f"found {name!r} with images of {size} px; allowed: a classifier of such images; {do} ({reason})") from error


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(name, **options)
    except TypeError as error:
        do = "set drop_path to 0, or choose another model"
        raise ValueError(f"found {name!r}; allowed: a model that takes {', '.join(options)}; {do} ({error})") from error
    except RuntimeError as error:  # what follows the "." in a name: weights that nobody has trained
        raise ValueError(f"found {name!r}; allowed: a timm model; {_closest(name)} ({error})") from error
    return net


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of the model's own pre-training; their average where the channels are not red, green and blue."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _closest(name: str) -> str:
    pool = NAMES if name.startswith("kd_") else timm.list_models()
    close = difflib.get_close_matches(name, pool, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else "see timm.list_models()"
