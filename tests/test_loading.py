"""Checkpoint files in the layouts that people have load into the same classifier; what does not fit is refused with its differences."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kdlib.models import checkpoints
from kdlib.models.build import Classifier, build
from tests import zoo
from tests.refusals import refused

State = dict[str, Tensor]
KEY = "teachers.big.checkpoint"


def blank(family: str, **options: Any) -> Classifier:
    """A member of the zoo before it learned anything."""
    member = zoo.MEMBERS[family]
    torch.manual_seed(1)
    given = {"num_classes": zoo.CLASSES} | member.options | options
    return Classifier(timm.create_model(member.name, **given), zoo.MEAN, zoo.STD, given.get("img_size", member.size))


def state(family: str) -> State:
    return {name: value.clone() for name, value in zoo.make(family).net.state_dict().items()}


def said(classifier: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier.eval()(images).logits


def written(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)  # type: ignore[arg-type]
    else:
        torch.save(content, path)
    return path


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Classifier]:
    """``load_checkpoint`` of a file with this content into a small member of a family."""

    def loaded(family: str, content: object, suffix: str = ".pth", averaged: bool = True, **options: Any) -> Classifier:
        member = zoo.MEMBERS[family]
        monkeypatch.setattr(checkpoints, "build", lambda *_: blank(family, **options))
        path = written(tmp_path / f"weights{suffix}", content)
        return checkpoints.load_checkpoint(KEY, path, member.name, (options.get("num_classes", zoo.CLASSES), 3, member.size), averaged)

    return loaded


# Trainers


def prefixed(weights: State, prefix: str) -> State:
    return {prefix + name: value for name, value in weights.items()}


def others(weights: State) -> State:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def trainer(weights: State, **more: object) -> dict[str, object]:
    """All that timm's writes."""
    about = {
        "epoch": 299,
        "arch": "resnet50",
        "version": 2,
        "metric": 79.8,
        "amp_scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=5e-3),
    }
    return about | {"state_dict": weights, "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3}]}} | more


TRAINERS: dict[str, Callable[[State], object]] = {
    "bare": lambda weights: weights,
    "timm's trainer": trainer,
    "distributed": lambda weights: trainer(prefixed(weights, "module.")),
    "compiled": lambda weights: {"model": prefixed(weights, "_orig_mod.")},
    "compiled, then distributed": lambda weights: {"model": prefixed(weights, "module._orig_mod.")},
    "averaged": lambda weights: trainer(others(weights), state_dict_ema=weights),
    "torchvision's averaged": lambda weights: {
        "model": others(weights),
        "model_ema": {"n_averaged": torch.tensor(7)} | prefixed(weights, "module."),
    },
    "averaging switched off": lambda weights: trainer(weights, state_dict_ema=None),
    "DeiT's": lambda weights: {"model": weights, "epoch": 3},
    "DeepSpeed's": lambda weights: {"module": weights, "optimizer": None, "ds_config": {"train_batch_size": 8}},
    "DeepSpeed's, twice": lambda weights: {"model": {"module": weights}},
}


@pytest.mark.parametrize("layout", TRAINERS)
def test_what_trainers_write(load: Callable[..., Classifier], layout: str) -> None:
    found = load("small", TRAINERS[layout](state("small")))
    assert torch.equal(said(found, zoo.images("small")), said(zoo.make("small"), zoo.images("small")))


def test_plain_weights_on_request(load: Callable[..., Classifier], capsys: pytest.CaptureFixture[str]) -> None:
    weights = state("small")
    for averaged, taken in ((True, "state_dict_ema"), (False, "state_dict")):
        found = load("small", trainer(weights, state_dict_ema=others(weights)), averaged=averaged)
        assert torch.equal(said(found, zoo.images("small")), said(zoo.make("small"), zoo.images("small"))) != averaged
        assert capsys.readouterr().err == f"weights.pth: took {taken}\n"


# Models


@pytest.mark.parametrize("family", zoo.MEMBERS)
def test_timms_layout_of_every_family(load: Callable[..., Classifier], capsys: pytest.CaptureFixture[str], family: str) -> None:
    """Its own conversion leaves what is timm's already alone."""
    found = load(family, state(family), ".safetensors")
    assert torch.equal(said(found, zoo.images(family)), said(zoo.make(family), zoo.images(family)))
    assert capsys.readouterr().err == ""


def convnext_of_its_authors(weights: State) -> State:
    """Names and shapes of ConvNeXt-V2's authors: linear layers for 1x1 convolutions, gamma and beta as 1x1x1xC."""
    renamed = {}
    for name, value in weights.items():
        whose = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        if ".downsample." in whose:
            stage, _, rest = whose.removeprefix("stages.").partition(".downsample.")
            whose = f"downsample_layers.{stage}.{rest}"
        for ours, theirs in (("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("head.norm", "norm"), ("head.fc", "head")):
            whose = whose.replace(ours, theirs)
        whose = whose.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        shape = (1, 1, 1, -1) if ".grn." in whose else value.shape[:2] if "pwconv" in whose else value.shape
        renamed[whose] = value.reshape(shape)
    return renamed


def convnext_by_hand(file: State, images: Tensor) -> Tensor:
    """What the authors' layout means, from the equations: arXiv 2301.00808, section 3 and algorithm 1; channels last within a block."""

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ file[f"{name}.weight"].T + file[f"{name}.bias"]

    x = F.conv2d(zoo.normalised(images), file["downsample_layers.0.0.weight"], file["downsample_layers.0.0.bias"], stride=4)
    x = normed(x.movedim(1, -1), "downsample_layers.0.1")
    for stage in range(4):
        if stage:
            x, way = normed(x, f"downsample_layers.{stage}.0"), f"downsample_layers.{stage}.1"
            x = F.conv2d(x.movedim(-1, 1), file[f"{way}.weight"], file[f"{way}.bias"], stride=2).movedim(1, -1)
        for number in range(2 if stage == 2 else 1):
            block = f"stages.{stage}.{number}"
            mixed = F.conv2d(x.movedim(-1, 1), file[f"{block}.dwconv.weight"], file[f"{block}.dwconv.bias"], padding=3, groups=x.shape[-1])
            wide = F.gelu(linear(normed(mixed.movedim(1, -1), f"{block}.norm"), f"{block}.pwconv1"))
            energy = wide.square().sum((1, 2), keepdim=True).sqrt()
            response = wide * energy / (energy.mean(-1, keepdim=True) + 1e-6)
            x = x + linear(file[f"{block}.grn.gamma"] * response + file[f"{block}.grn.beta"] + wide, f"{block}.pwconv2")
    return linear(normed(x.mean((1, 2)), "norm"), "head")


def index_of_positions(side: int) -> Tensor:
    """BEiT's relative_position_index, cell by cell: which row of the table holds the bias of a query (row) for a key (column)."""
    rows = (2 * side - 1) ** 2 + 3  # the last three: class token to patch, patch to class token, class token to itself
    index = torch.full((side * side + 1, side * side + 1), rows - 1)
    for query in range(side * side + 1):
        for key in range(side * side + 1):
            if query and key:
                (a, b), (c, d) = divmod(query - 1, side), divmod(key - 1, side)
                index[query, key] = (a - c + side - 1) * (2 * side - 1) + b - d + side - 1
            elif query or key:
                index[query, key] = rows - 2 if query else rows - 3
    return index


def with_indices(weights: State, side: int) -> State:
    """BEiT as its authors and timm 0.6.5 write it: each block's index among the weights."""
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    return weights | {name.replace("bias_table", "index"): index_of_positions(side) for name in tables}


def beit_by_hand(file: State, images: Tensor) -> Tensor:
    """What the authors' layout means: arXiv 2106.08254 and 2208.06366, with the file's own indices."""

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ file[f"{name}.weight"].T + file[f"{name}.bias"]

    patches = F.conv2d(zoo.normalised(images), file["patch_embed.proj.weight"], file["patch_embed.proj.bias"], stride=16)
    x = torch.cat([file["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
    for number in range(7):
        block, heads = f"blocks.{number}", 3
        attn = f"{block}.attn"
        bias = torch.cat([file[f"{attn}.q_bias"], torch.zeros_like(file[f"{attn}.q_bias"]), file[f"{attn}.v_bias"]])
        qkv = normed(x, f"{block}.norm1") @ file[f"{attn}.qkv.weight"].T + bias
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        positions = file[f"{attn}.relative_position_bias_table"][file[f"{attn}.relative_position_index"]].movedim(-1, 0)
        scores = query @ key.mT / query.shape[-1] ** 0.5 + positions
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + file[f"{block}.gamma_1"] * linear(mixed, f"{attn}.proj")
        wide = F.gelu(linear(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + file[f"{block}.gamma_2"] * linear(wide, f"{block}.mlp.fc2")
    return linear(normed(x[:, 1:].mean(1), "fc_norm"), "head")


AUTHORS: dict[str, tuple[Callable[[State], State], Callable[[State, Tensor], Tensor]]] = {
    "convnextv2": (convnext_of_its_authors, convnext_by_hand),
    "beitv2": (lambda weights: with_indices(weights, 4), beit_by_hand),
}


@pytest.mark.parametrize("wrap", ["bare", "DeiT's", "DeepSpeed's", "DeepSpeed's, twice", "distributed"])
@pytest.mark.parametrize("family", AUTHORS)
def test_the_authors_layout(load: Callable[..., Classifier], family: str, wrap: str) -> None:
    rename, by_hand = AUTHORS[family]
    file, images = rename(state(family)), zoo.images(family)
    assert file.keys() != state(family).keys()
    found = said(load(family, TRAINERS[wrap](file)), images)
    assert torch.equal(found, said(zoo.make(family), images))
    torch.testing.assert_close(found, by_hand(file, images), rtol=1e-4, atol=1e-5)


# SHA-256 of "name shape" of every weight, sorted, one per line, as timm 0.6.5 has them (the release that the paper's students were
# trained and published with); in its BEiT without the 12 or 24 relative_position_index, which it kept among the weights.
OF_0_6_5 = {
    "resnet50": "fe1d335c3c7786ff",
    "resnet152": "3446679ffd752d79",
    "vit_tiny_patch16_224": "ad61a180eab7cacb",
    "vit_small_patch16_224": "22a4679ba57db1e5",
    "beitv2_base_patch16_224": "39e5ae509423b5cd",
    "beitv2_large_patch16_224": "0882fa3a6f45e14d",
}


@pytest.mark.parametrize("name", OF_0_6_5)
def test_timm_has_not_renamed_what_the_paper_uses(name: str) -> None:
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    lines = sorted(f"{key} {'x'.join(map(str, value.shape))}" for key, value in weights.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == OF_0_6_5[name]


@pytest.mark.long
@pytest.mark.parametrize("name", [*OF_0_6_5, "convnextv2_tiny"])
def test_the_papers_own_models(tmp_path: Path, name: str) -> None:
    """At full size and 1,000 classes, as the released files have them."""
    if name == "beitv2_large_patch16_224":
        pytest.skip("1.2 GB on disk and three times that in memory; its names are compared above")
    torch.manual_seed(2)
    taught = build(name, 1000, 3, 224)
    rename = {"convnextv2_tiny": convnext_of_its_authors, "beitv2_base_patch16_224": lambda weights: with_indices(weights, 14)}
    weights = rename.get(name, dict)(taught.net.state_dict())
    found = checkpoints.load_checkpoint(KEY, written(tmp_path / "released.pth", trainer(weights)), name, (1000, 3, 224))
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(said(found, images), said(taught, images))


# Both of timm's interpolation, about its own code.
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("family", ["vit", "beitv2"])
def test_positions_are_resized_as_timm_resizes_them(
    load: Callable[..., Classifier], capsys: pytest.CaptureFixture[str], family: str
) -> None:
    found = load(family, state(family), img_size=96)
    assert f"tables of positions to {zoo.MEMBERS[family].size} px" in capsys.readouterr().err
    overlay = {"state_dict": state(family), "num_classes": zoo.CLASSES}
    options = zoo.MEMBERS[family].options | {"num_classes": zoo.CLASSES, "img_size": 96}
    net = timm.create_model(zoo.MEMBERS[family].name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    images = torch.rand(2, 3, 96, 96)
    assert torch.equal(said(found, images), said(Classifier(net, zoo.MEAN, zoo.STD, 96), images))


# Refusals


class Code:
    """Would make a file, were it unpickled by somebody careless."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_is_never_run(load: Callable[..., Classifier], tmp_path: Path) -> None:
    with refused(KEY, "holds code", "does not run it: save the state_dict alone"):
        load("small", trainer(state("small"), hook=Code(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


def without(weights: State, *names: str) -> State:
    return {name: value for name, value in weights.items() if name not in names}


def pretrained(weights: State) -> State:
    """BEiT-2 before any fine-tuning: one table for all blocks, no classifier, more heads of its own."""
    kept = {name: value for name, value in weights.items() if "bias_table" not in name and not name.startswith(("head.", "fc_norm."))}
    return kept | {"rel_pos_bias.relative_position_bias_table": torch.zeros(52, 3), "mask_token": torch.zeros(1, 1, 48)}


REFUSED: dict[str, tuple[str, Callable[[], object], tuple[str, ...]]] = {
    "missing": ("small", lambda: without(state("small"), "stem.0.weight"), ("1 missing (stem.0.weight)", "of 56 weights", "1-1-1 blocks")),
    "unexpected": (
        "small",
        lambda: state("small") | {f"adapter.{i}.weight": torch.zeros(1) for i in range(5)},
        ("5 unexpected (adapter.0.weight, adapter.1.weight, adapter.2.weight and 2 more)",),
    ),
    "another shape": (
        "small",
        lambda: state("small") | {"stem.0.weight": torch.zeros(4, 3, 3, 3)},
        ("1 of another shape (stem.0.weight 4x3x3x3 for 8x3x3x3)", "choose the model and data set that it was trained with"),
    ),
    "many classes": (
        "vit",
        lambda: state("vit") | {"head.weight": torch.zeros(21841, 48), "head.bias": torch.zeros(21841)},
        ("choose the file that was fine-tuned for 5 classes: this one's classifier knows 21,841 classes (imagenet-22k)",),
    ),
    "other classes": (
        "vit",
        lambda: state("vit") | {"head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7)},
        ("this one's classifier knows 7 classes (", "head.weight 7x48 for 5x48"),
    ),
    "no classifier": ("vit", lambda: without(state("vit"), "head.weight", "head.bias"), ("has no classifier, as after pre-training",)),
    "pre-training": ("beitv2", lambda: {"model": pretrained(state("beitv2"))}, ("BEiT's pre-training", "no classifier", "7 blocks")),
    "another family": ("vit", lambda: state("convnextv2"), ("looks like a ConvNeXt in timm's layout, 1-1-2-1 blocks, 16 channels",)),
    "its authors' layout": ("vit", lambda: convnext_of_its_authors(state("convnextv2")), ("a ConvNeXt in its authors' layout, 1-1-2-1",)),
    "a deeper one": (
        "beitv2",
        lambda: with_indices(dict(blank("beitv2", depth=9).net.state_dict()), 4),
        ("looks like a BEiT, 9 blocks, 48 channels after a first layer of 16 px", "unexpected"),
    ),
    "larger patches": (
        "vit",
        lambda: dict(blank("vit", patch_size=32).net.state_dict()),
        ("1 of another shape (patch_embed.proj.weight 48x3x32x32 for 48x3x16x16)", "a first layer of 32 px"),
    ),
    "not weights": ("small", lambda: state("small") | {"note": "by hand"}, ("beside weights it holds note: str",)),
    "no weights": ("small", lambda: {"state_dict": {}}, ("it holds no weights but nothing",)),
    "a number": ("small", lambda: 3, ("it holds no weights but a int",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_its_differences(load: Callable[..., Classifier], case: str) -> None:
    family, content, parts = REFUSED[case]
    with refused(KEY, "weights.pth", f"weights of {zoo.MEMBERS[family].name} for 5 classes", *parts):
        load(family, content())


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("resnet, basic", "a ResNet with basic blocks, 2-2-2-2 blocks, 64 channels after a first layer of 7 px"),
        ("resnet, bottleneck", "a ResNet with bottlenecks, 3-4-6-3 blocks, 64 channels after a first layer of 7 px"),
        ("vit", "a ViT in timm's layout, 6 blocks, 48 channels after a first layer of 16 px"),
        ("swin", "a Swin transformer, 2-2-2-2 blocks, 24 channels after a first layer of 4 px"),
        ("mobilenetv3", "a layout that is not known here"),
    ],
)
def test_what_weights_look_like(family: str, words: str) -> None:
    assert checkpoints.looks_like(state(family)).startswith(words)
