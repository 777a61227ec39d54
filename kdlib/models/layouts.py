"""Weights as people keep them: read without running code, unwrapped, brought into timm's names, and told apart where they do not fit."""

import argparse
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from kdlib.errors import some

State = dict[str, Tensor]

AVERAGED = ("state_dict_ema", "model_ema")  # of timm's trainer; of torchvision's and the ConvNeXt authors'
PLAIN = ("state_dict", "model", "module")  # of timm's trainer; of the BEiT, ConvNeXt and DeiT authors'; of DeepSpeed
_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel keeps it beside the weights
_POSITIONS = ("pos_embed", "relative_position_bias_table")  # depend on the image's size, and timm resizes them to it

# The first marker that is among the keys names the layout.
_LAYOUTS = {
    "encoder.downsample_layers.0.0.weight": "ConvNeXt-V2's pre-training in its authors' layout",
    "downsample_layers.0.0.weight": "a ConvNeXt in its authors' layout",
    "stages.0.blocks.0.conv_dw.weight": "a ConvNeXt in timm's layout",
    "rel_pos_bias.relative_position_bias_table": "BEiT's pre-training: one table of relative positions for all blocks",
    "blocks.0.attn.q_bias": "a BEiT",
    "decoder_blocks.0.attn.qkv.weight": "a masked autoencoder's pre-training",
    "blocks.0.attn.qkv.weight": "a ViT in timm's layout",
    "layers.0.blocks.0.attn.relative_position_bias_table": "a Swin transformer",
    "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": "a ViT in torchvision's layout",
    "vit.embeddings.cls_token": "a ViT in Hugging Face's layout",
    "beit.embeddings.cls_token": "a BEiT in Hugging Face's layout",
    "convnextv2.embeddings.patch_embeddings.weight": "a ConvNeXt-V2 in Hugging Face's layout",
    "resnet.embedder.embedder.convolution.weight": "a ResNet in Hugging Face's layout",
    "layer1.0.conv3.weight": "a ResNet with bottlenecks",
    "layer1.0.conv2.weight": "a ResNet with basic blocks",
}
_CLASSIFIER = re.compile(r"(?:.*\.)?(?:head|fc|classifier)\.weight")
_BLOCK = re.compile(r"(?P<stage>(?:.*\.)?(?:blocks|layers?|layer\d|stages\.\d|encoder))\.(?:encoder_layer_)?(?P<block>\d+)\.")


@dataclass(frozen=True)
class Differences:
    """Between a file's weights and a model's, by key; empty where they fit."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]  # "key 5x32 for 6x32": in the file, in the model
    of: int  # how many weights the model has

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.shapes}
        parts = [f"{len(keys)} {kind} ({some(keys, 3)})" for kind, keys in kinds.items() if keys]
        return f"of {self.of} weights {', '.join(parts)}"


def read(path: Path) -> object:
    """What a .safetensors file, or one that ``torch.save`` wrote, holds; argparse.Namespace is allowed: trainers keep their options in it.

    Raises ValueError for a file that would have to run other code, which is never done, and what else a damaged one makes it raise.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            code = _code(path)
            if not code:
                raise
            do = "torch.load(weights_only=True) does not run it: save the state_dict alone"
            raise ValueError(f"beside weights it holds code, {some(code)}; {do}") from error


def unwrap(content: object, averaged: bool = True) -> tuple[State, str]:
    """The weights in what a trainer wrote, without the prefixes of its wrappers, and the keys under which they were, joined by dots.

    Where a file has both, those averaged over the steps come first, as in timm's own loader; ``averaged=False`` prefers the plain ones.
    Raises ValueError where there are none.
    """
    order = (*AVERAGED, *PLAIN) if averaged else (*PLAIN, *AVERAGED)
    taken: list[str] = []
    while isinstance(content, Mapping) and (name := next((name for name in order if isinstance(content.get(name), Mapping)), None)):
        taken.append(name)
        content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it holds no weights but {_what(content)}")
    state = {name: value for name, value in clean_state_dict(dict(content)).items() if name != _COUNTER}
    odd = [f"{name}: {type(value).__name__}" for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"beside weights it holds {some(odd)}")
    return state, ".".join(taken)


def convert(state: State, net: nn.Module) -> tuple[State, list[str]]:
    """The weights by the names and in the shapes of ``net``, as far as timm's own conversion for it goes, and the positions it resized.

    Weights that fit stay as they are. Those that do not depend on the image's size are never resized: timm would make a patch of 16 pixels
    of one of 32, another model.
    """
    conversion = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if conversion is None or not differences(state, net):
        return state, []
    try:
        found: State = conversion(dict(state), net)
    except Exception:  # conversions index what they expect, and this is another model's file: its own keys tell most
        return state, []
    resized = [name for name, value in found.items() if name in state and value.numel() != state[name].numel()]
    moved = {name: state[name] for name in resized if name.rpartition(".")[2] not in _POSITIONS}
    return found | moved, [name for name in resized if name not in moved]


def differences(state: State, net: nn.Module) -> Differences:
    """What keeps ``net`` from taking these weights."""
    wanted = net.state_dict()
    return Differences(
        missing=[name for name in wanted if name not in state],
        unexpected=[name for name in state if name not in wanted],
        shapes=[
            f"{name} {_shape(value)} for {_shape(wanted[name])}"
            for name, value in state.items()
            if name in wanted and value.shape != wanted[name].shape
        ],
        of=len(wanted),
    )


def looks_like(state: State) -> str:
    """The layout of weights, with how many blocks each stage has and how wide the first layer is: enough to name the model."""
    layout = next((words for marker, words in _LAYOUTS.items() if marker in state), "a layout that is not known here")
    blocks = {(found["stage"], found["block"]) for name in state if (found := _BLOCK.match(name))}
    counts = Counter(stage for stage, _ in sorted(blocks))
    stages = [count for stage, count in counts.items() if not any(other.startswith(f"{stage}.") for other in counts)]
    first = next((value for value in state.values() if value.ndim == 4), None)
    depth = f", {'-'.join(str(count) for count in stages)} blocks" if stages else ""
    width = f", {first.shape[0]} channels after a first layer of {first.shape[-1]} px" if first is not None else ""
    return layout + depth + width


def classes(state: State) -> int:
    """That the classifier of weights in any layout knows; 0 where there is none, as after pre-training."""
    found = [len(value) for name, value in state.items() if _CLASSIFIER.fullmatch(name) and value.ndim > 1]
    return found[-1] if found else 0


def _code(path: Path) -> list[str]:
    """What unpickling would call beyond what is allowed; nothing where the file is no such archive."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return []


def _what(content: object) -> str:
    if isinstance(content, Mapping):
        return "nothing"
    return f"a {type(content).__name__}"


def _shape(value: Tensor) -> str:
    return "x".join(str(side) for side in value.shape) or "one number"
