"""What a timm model can be asked for beside its logits, through timm's own interfaces: pooled embedding, maps of its stages."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.types import Asks, Embedding, Feature, Images, Maps, Output, OutputShape

STAGES = 4  # the deepest ones; a stem before them is no stage
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")


class Tap:
    """Keeps what a module is given while it is ``on``, and changes nothing.

    An object, registered once: it is copied together with its model, as a function would not be, and torch.compile looks through it,
    but not through hooks that come and go.
    """

    def __init__(self, module: nn.Module) -> None:
        self.on = False
        self.given: Tensor | None = None
        module.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        if self.on:
            self.given = given[0].clone()  # timm's activations work in place


@dataclass(frozen=True)
class TapPoints:
    """Where a model's answers are found."""

    indices: tuple[int, ...] = ()  # entries of its feature_info at which its stages end
    activations: tuple[Tap | None, ...] = ()  # the activation module that each of the stages ends with, if it does
    classifiers: tuple[Tap, ...] = ()  # two in a model with a distillation token


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


def explore(net: nn.Module, images: Images) -> tuple[TapPoints, OutputShape]:
    """One forward pass in evaluation mode: where the answers are found, and their shapes.

    Raises what the model raises, and ValueError for one that is no classifier.
    """
    indices = stage_indices(net)
    places = TapPoints(indices, (None,) * len(indices), tuple(map(Tap, _classifiers(net))))
    training = net.training
    last: dict[nn.Module, Tensor] = {}
    activations = [module for module in net.modules() if type(module).__module__ in _ACTIVATIONS]
    handles = [module.register_forward_hook(lambda one, _, output: last.__setitem__(one, output)) for module in activations]
    try:
        with torch.no_grad():
            output = answer(net.eval(), places, images, frozenset({Feature.EMBEDDING, Feature.MAPS}))
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    if not isinstance(output.logits, Tensor) or output.logits.ndim != 2:
        raise ValueError("its answer is not one row of logits for each image")
    maps = output.maps or ()
    # the activation that a stage ends with is the one whose output *is* the stage's
    endings = [next((module for module, made in last.items() if made is stage), None) for stage in maps]
    taps = tuple(None if ending is None else Tap(ending) for ending in endings)
    features = 0 if output.embedding is None else output.embedding.shape[1]
    shape = OutputShape(output.logits.shape[1], features, tuple((*stage.shape[1:],) for stage in maps))
    return TapPoints(indices, taps, places.classifiers), shape


def answer(net: nn.Module, places: TapPoints, images: Images, asks: Asks) -> Output:
    """The model's answer to normalised images. What the model cannot give stays None.

    The network and its head run once, whatever is asked: its BatchNorm counts each image once, its dropout draws once.
    """
    net_: Any = net
    endings = places.activations if Feature.PREACTIVATIONS in asks else (None,) * len(places.indices)
    taps = [tap for tap in (*endings, *(places.classifiers if Feature.EMBEDDING in asks else ())) if tap is not None]
    maps: Maps | None = None
    before: Maps | None = None
    try:
        for tap in taps:
            tap.on = True
        if asks & {Feature.MAPS, Feature.PREACTIVATIONS} and places.indices:
            features, found = net_.forward_intermediates(images, indices=list(places.indices), output_fmt="NCHW")
            logits, maps = net_.forward_head(features), tuple(found)
            before = tuple(stage if tap is None or tap.given is None else tap.given for tap, stage in zip(endings, maps, strict=True))
        else:
            logits = net_(images)
        embedding = _read(places.classifiers)
    finally:
        for tap in taps:
            tap.on, tap.given = False, None
    return Output(logits, embedding, maps if Feature.MAPS in asks else None, before if Feature.PREACTIVATIONS in asks else None)


def _classifiers(net: Any) -> list[nn.Module]:
    """The layers that give the logits. Empty for a model that does not name them."""
    named: Any = net.get_classifier() if hasattr(net, "get_classifier") else []
    layers = list(named) if isinstance(named, tuple | list | nn.ModuleList) else [named]
    return [getattr(layer, "fc", layer) for layer in layers]  # some models name their whole head, pooling included


def _read(classifiers: tuple[Tap, ...]) -> Embedding | None:
    """What the classifier was given. Of several, as in timm: the mean (of a distillation token's), or side by side if sizes differ."""
    given = [tap.given.flatten(1) for tap in classifiers if tap.given is not None]
    if len({one.shape for one in given}) > 1:
        return torch.cat(given, dim=1)
    return torch.stack(given).mean(dim=0) if given else None
