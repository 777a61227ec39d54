"""What a timm model can be asked for beside its logits, through timm's own interfaces: pooled embedding, maps of its stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.types import Asks, Images, Maps, Output, OutputShape, Part

STAGES = 4  # the deepest ones; a stem before them is no stage
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")


@dataclass(frozen=True)
class Places:
    """Where a model's stages end: entries of its feature_info, and the activation that each of them ends with, if it does."""

    indices: tuple[int, ...]
    activations: tuple[nn.Module | None, ...]


NOWHERE = Places((), ())


def stage_indices(net: nn.Module) -> tuple[int, ...]:
    """Entries of timm's feature_info at which the (up to four) last stages end, from the image to the head.

    Where resolution falls a stage ends before it does. Where all entries have one resolution (ViT, DeiT, BEiT) the stages are quarters
    of the depth. Empty for a model that has no ``forward_intermediates``.
    """
    if not hasattr(net, "forward_intermediates"):
        return ()
    info: Any = net.feature_info
    reductions = [entry["reduction"] for entry in getattr(info, "info", info)]
    ends = [i for i, reduction in enumerate(reductions) if reduction not in reductions[i + 1 :]]
    if len(ends) > 1:
        return tuple(ends[-STAGES:])
    parts = min(STAGES, len(reductions))
    return tuple(len(reductions) * (k + 1) // parts - 1 for k in range(parts))


def explore(net: nn.Module, images: Images) -> tuple[Places, OutputShape]:
    """One forward pass in evaluation mode: where the stages end, and the shape of every answer. Raises what the model raises."""
    indices = stage_indices(net)
    training = net.training
    last: dict[nn.Module, Tensor] = {}
    activations = [module for module in net.modules() if type(module).__module__ in _ACTIVATIONS]
    handles = [module.register_forward_hook(lambda one, _, output: last.__setitem__(one, output)) for module in activations]
    try:
        with torch.no_grad():
            output = answer(net.eval(), Places(indices, (None,) * len(indices)), images, frozenset({Part.EMBEDDING, Part.MAPS}))
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    maps = output.maps or ()
    # the activation that a stage ends with is the one whose output *is* the stage's
    endings = tuple(next((module for module, made in last.items() if made is stage), None) for stage in maps)
    features = 0 if output.embedding is None else output.embedding.shape[1]
    return Places(indices, endings), OutputShape(output.logits.shape[1], features, tuple((*stage.shape[1:],) for stage in maps))


def answer(net: nn.Module, places: Places, images: Images, asks: Asks) -> Output:
    """The model's answer to normalised images. What the model cannot give stays None."""
    net_: Any = net
    if not asks - {Part.LOGITS}:
        return Output(net_(images))
    maps: Maps | None = None
    before: Maps | None = None
    if asks & {Part.MAPS, Part.PREACTIVATIONS} and places.indices:
        with _inputs(places.activations if Part.PREACTIVATIONS in asks else ()) as kept:
            features, found = net_.forward_intermediates(images, indices=list(places.indices), output_fmt="NCHW")
        maps = tuple(found)
        before = tuple(kept.get(activation, stage) for activation, stage in zip(places.activations, maps, strict=True))
    else:
        features = net_.forward_features(images)
    logits = net_.forward_head(features)
    # timm's pooled features, after the head's dropout if it has one (none by default: then both calls of the head agree)
    embedding = net_.forward_head(features, pre_logits=True).flatten(1) if Part.EMBEDDING in asks else None
    return Output(logits, embedding, maps if Part.MAPS in asks else None, before if Part.PREACTIVATIONS in asks else None)


@contextmanager
def _inputs(modules: tuple[nn.Module | None, ...]) -> Iterator[dict[nn.Module | None, Tensor]]:
    """What these modules are given meanwhile. A copy: timm's activations work in place."""
    kept: dict[nn.Module | None, Tensor] = {}
    handles = [module.register_forward_pre_hook(lambda one, given: kept.__setitem__(one, given[0].clone())) for module in modules if module]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
