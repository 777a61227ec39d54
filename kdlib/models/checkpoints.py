"""Weights as people keep them: read without running code, unwrapped, brought into timm's names, and told apart where they do not fit."""

import argparse
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.data.imagenet_info import infer_imagenet_subset
from timm.models import clean_state_dict
from torch import Tensor, nn

from kdlib.errors import refuse, some
from kdlib.models.build import Classifier, build

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


def load_checkpoint(key: str, path: Path, model: str, shape: tuple[int, int, int], averaged: bool = True) -> Classifier:
    """A timm model for ``shape`` (classes, channels, size in pixels) with the weights of a file, by ``load_weights``.

    Says on stderr which of several weights it took (averaged ones, unless ``averaged=False`` prefers the plain ones), and what was resized.
    """
    classifier = build(model, *shape)
    taken, resized = load_weights(key, path, classifier.net, model, shape[0], averaged)
    notes = [f"took {taken}"] * bool(taken) + [f"resized {len(resized)} tables of positions to {shape[2]} px"] * bool(resized)
    if notes:
        print(f"{path.name}: {', '.join(notes)}", file=sys.stderr, flush=True)
    return classifier


def load_weights(key: str, path: Path, net: nn.Module, model: str, classes: int | None, averaged: bool = True) -> tuple[str, list[str]]:
    """Copy the weights of a .safetensors or .pth file into a timm model for so many classes; None: its classifier stays as it is.

    Takes timm's layouts, those of trainers around them, and what timm converts. What is given back: the keys under which the weights were,
    as by ``unwrap``, and the positions that were resized, as by ``convert``.
    Raises ``Refused`` about ``key`` when they are not weights of this model.
    """
    if not path.is_file():
        do = "correct the path (it counts from the folder of params.yaml), or write null to train from scratch"
        raise refuse(key, str(path), "a .safetensors or .pth file", do)
    allowed = f"weights of {model}" + (f" for {classes} classes" if classes is not None else "")
    do = "choose the model and data set that it was trained with" if classes is not None else "choose the model that they are of"
    try:
        given, taken = unwrap(read(path), averaged)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise refuse(key, str(path), allowed, f"{do} ({str(error)[:400] or type(error).__name__})") from error
    state, resized = convert(given, net)
    if classes is None:
        state = {name: value for name, value in state.items() if not _of_head(name, net)}
        state |= {name: value for name, value in net.state_dict().items() if _of_head(name, net)}
    if found := differences(state, net):
        do = (classes is not None and _another_head(known_classes(given), classes)) or do
        raise refuse(key, str(path), allowed, f"{do} ({found}; it looks like {looks_like(given)})")
    net.load_state_dict(state)
    return taken, resized


def _of_head(name: str, net: Any) -> bool:
    named = net.pretrained_cfg["classifier"]
    return name.startswith(tuple(f"{head}." for head in ((named,) if isinstance(named, str) else named)))


def _another_head(classes: int, wanted: int) -> str:
    """What to do about a file whose classifier knows other classes than are wanted; nothing where it is not that."""
    if classes == wanted:
        return ""
    if classes == 0:
        return f"choose a file that was fine-tuned for {wanted:,} classes: this one has no classifier, as after pre-training"
    known = infer_imagenet_subset({"num_classes": classes})
    whose = f"{classes:,} classes" + (f" ({known})" if known else "")
    return f"choose the file that was fine-tuned for {wanted:,} classes: this one's classifier knows {whose}"


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
            code: list[str] = []  # what unpickling would call beyond what is allowed
            with suppress(Exception):  # of a file that is no such archive
                code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
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
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"it holds no weights but {what}")
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


def differences(state: State, net: nn.Module) -> str:
    """What keeps ``net`` from taking these weights, in words; empty where they fit. "key 5x32 for 6x32": in the file, in ``net``."""
    wanted = net.state_dict()
    others = [name for name, value in state.items() if name in wanted and value.shape != wanted[name].shape]
    kinds = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [f"{name} {_shape(state[name])} for {_shape(wanted[name])}" for name in others],
    }
    parts = [f"{len(keys)} {kind} ({some(keys, 3)})" for kind, keys in kinds.items() if keys]
    return f"of {len(wanted)} weights {', '.join(parts)}" if parts else ""


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


def known_classes(state: State) -> int:
    """That the classifier of weights in any layout knows; 0 where there is none, as after pre-training."""
    return next((len(value) for name, value in reversed(state.items()) if _CLASSIFIER.fullmatch(name) and value.ndim > 1), 0)


def _shape(value: Tensor) -> str:
    return "x".join(str(side) for side in value.shape) or "one number"
