"""The small nets against arithmetic and timm's conventions; ``build`` on what it takes and what it must refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import FeatureListNet
from torch import Tensor, nn

from kdlib.engine.record import forward_flops, weights
from kdlib.models import NAMES
from kdlib.models.build import Classifier, build
from kdlib.models.features import stage_indices
from tests import training

SHAPES = {  # of those that studies use: blocks per stage, width, stem stride
    "kd_resnet8_w8_s1": (1, 8, 1),
    "kd_resnet8_w16_s2": (1, 16, 2),
    "kd_resnet14_w32_s1": (2, 32, 1),
    "kd_resnet14_w32_s2": (2, 32, 2),
    "kd_resnet20_w16_s1": (3, 16, 1),
    "kd_resnet56_w16_s1": (9, 16, 1),
}


def count(blocks: int, width: int, channels: int, classes: int) -> int:
    """Parameters by hand: 3x3 convolutions without bias, two numbers per normalised channel, projections where the depth grows."""

    def block(into: int, out: int) -> int:
        convolutions = 9 * into * out + 9 * out * out + 4 * out
        return convolutions + (into * out + 2 * out if into != out else 0)

    stem = 9 * channels * width + 2 * width
    depths = ((width, width), (width, 2 * width), (2 * width, 4 * width))
    stages = sum(block(into, out) + (blocks - 1) * block(out, out) for into, out in depths)
    return stem + stages + 4 * width * classes + classes


def test_every_net_is_known_to_timm() -> None:
    assert set(SHAPES) < set(NAMES) == set(timm.list_models("kd_*"))
    assert all(timm.get_pretrained_cfg(name).architecture == name for name in NAMES)
    code = "import timm, kdlib.models; print(len(timm.list_models('kd_*')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=training.ROOT)
    assert int(done.stdout) == len(NAMES)


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 44, 56, 110])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_depth_of_the_literature_is_there(depth: int, stride: int) -> None:
    """Depth counts the weighted layers on the longest way, as He et al. do; the shortcuts' projections lie beside it."""
    net = timm.create_model(f"kd_resnet{depth}_w16_s{stride}", num_classes=10)
    weighted = [module for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name]
    assert len(weighted) == depth
    assert net.num_features == 64
    assert [info["reduction"] for info in net.feature_info] == [stride, 2 * stride, 4 * stride]
    assert sum(parameter.numel() for parameter in net.parameters()) == count((depth - 2) // 6, 16, 3, 10)


@pytest.mark.parametrize(
    ("name", "parameters", "maps"),
    [
        ("kd_cifar_resnet50", 23_705_252, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
        ("kd_cifar_mobilenetv2_050", 812_836, [(12, 16), (16, 8), (48, 4), (160, 2)]),
    ],
)
def test_nets_of_the_literature_have_its_sizes(name: str, parameters: int, maps: list[tuple[int, int]]) -> None:
    """Those of mdistiller's classes at 100 classes and 32 px: parameters, and channels and side of the stages that hints look at."""
    net = build(name, 100, 3, 32).net
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    taken = net.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=list(stage_indices(net)), intermediates_only=True)
    assert [(one.shape[1], one.shape[2]) for one in taken] == maps
    assert net.reset_classifier(7) is None
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert not any(isinstance(module, nn.ReLU6) for module in net.modules())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("channels", "classes"), [(3, 100), (1, 10)])
def test_parameters_are_as_many_as_by_hand(name: str, channels: int, classes: int) -> None:
    blocks, width, _ = SHAPES[name]
    net = timm.create_model(name, num_classes=classes, in_chans=channels)
    assert sum(parameter.numel() for parameter in net.parameters()) == count(blocks, width, channels, classes)
    assert sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in net.modules()) == 6 * blocks + 1


def test_the_sizes_that_the_docstring_promises() -> None:
    assert round(count(1, 8, 3, 100), -3) == 23_000
    assert round(count(1, 16, 3, 100), -3) == 84_000
    assert round(count(2, 32, 3, 100), -5) == 700_000


@pytest.mark.parametrize(("name", "size"), [("kd_resnet8_w16_s2", 24), ("kd_resnet14_w32_s1", 8)])
def test_flops_are_as_many_as_by_hand(name: str, size: int) -> None:
    """Two per multiply-add of every convolution and of the head."""
    blocks, width, stride = SHAPES[name]
    side = size // stride
    adds = 9 * 1 * width * side**2
    for stage, (into, out) in enumerate(((width, width), (width, 2 * width), (2 * width, 4 * width))):
        pixels = (side // 2**stage) ** 2
        adds += pixels * (9 * into * out + 9 * out * out + (blocks - 1) * 18 * out * out + (into * out if into != out else 0))
    adds += 4 * width * 10
    assert forward_flops(build(name, 10, 1, size), 1, size) == 2 * adds


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [8, 15, 24])
def test_forward_in_its_parts(name: str, size: int) -> None:
    net = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, size, size)
    features = net.forward_features(images)
    assert features.shape[1] == net.num_features == net.head_hidden_size
    pooled = net.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(net(images), net.forward_head(features))
    torch.testing.assert_close(net(images), nn.functional.linear(pooled, net.fc.weight, net.fc.bias))
    assert net(images).shape == (2, 7)


def test_intermediates_are_the_stages_maps() -> None:
    net = timm.create_model("kd_resnet14_w32_s2").eval()
    images = torch.randn(2, 3, 32, 32)
    last, maps = net.forward_intermediates(images)
    assert [tuple(one.shape) for one in maps] == [
        (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"]) for info in net.feature_info
    ]
    assert [info["reduction"] for info in net.feature_info] == [2, 4, 8]
    assert torch.equal(last, net.forward_features(images))
    assert torch.equal(last, maps[-1])
    first, third = net.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert torch.equal(first, maps[0])
    assert torch.equal(third, maps[2])
    (only,) = net.forward_intermediates(images, indices=1, intermediates_only=True)
    assert torch.equal(only, maps[-1])


def test_timm_extracts_features_by_the_modules_that_feature_info_names() -> None:
    net = timm.create_model("kd_resnet8_w8_s1").eval()
    named = FeatureListNet(net, out_indices=(0, 1, 2), flatten_sequential=True).eval()
    assert named.feature_info.channels() == [8, 16, 32]
    images = torch.randn(2, 3, 16, 16)
    for one, other in zip(named(images), net.forward_intermediates(images, intermediates_only=True), strict=True):
        assert torch.equal(one, other)


def test_the_head_can_be_replaced() -> None:
    net = timm.create_model("kd_resnet8_w8_s1", num_classes=7)
    assert net.get_classifier() is net.fc
    net.reset_classifier(3)
    assert net.num_classes == 3
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_only_average_pooling() -> None:
    with pytest.raises(ValueError, match="global_pool: found 'max'; allowed: 'avg'"):
        timm.create_model("kd_resnet8_w8_s1", global_pool="max")


def test_drop_path_grows_over_the_blocks() -> None:
    net = build("kd_resnet14_w32_s1", 10, 1, 8, drop_path=0.5).net
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in net.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(block.drop_path is None for stage in build("kd_resnet14_w32_s1", 10, 1, 8).net.stages for block in stage)


def test_drop_path_draws_from_torchs_generator() -> None:
    net = build("kd_resnet14_w32_s1", 10, 1, 8, drop_path=0.5)
    images = torch.rand(8, 1, 8, 8)
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(net(images).logits)
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


# build


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("kd_resnet8_w8_s1", 1, 8), ("resnet18", 3, 32), ("resnet18", 1, 32), ("vit_tiny_patch16_224", 3, 32)]
)
def test_images_are_normalised_by_the_models_own_statistics(name: str, channels: int, size: int) -> None:
    model = build(name, 5, channels, size).eval()
    cfg = timm.get_pretrained_cfg(name)
    mean, std = (values if channels == 3 else [sum(values) / 3] * channels for values in (cfg.mean, cfg.std))
    images = torch.rand(2, channels, size, size)
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(channels)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, model.net(by_hand))
    assert model(images).logits.shape == (2, 5)
    assert all(module.training for module in build(name, 5, channels, size).modules())


def test_the_same_seed_builds_the_same_net_and_trying_it_draws_nothing() -> None:
    torch.manual_seed(3)
    ours = build("kd_resnet8_w8_s1", 5, 1, 8).net.state_dict()
    torch.manual_seed(3)
    timms = timm.create_model("kd_resnet8_w8_s1", num_classes=5, in_chans=1).state_dict()
    assert all(torch.equal(value, timms[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("name", "size", "drop_path", "message"),
    [
        (
            "kd_resnet8_w16",
            24,
            0.0,
            "found 'kd_resnet8_w16'; allowed: a timm model or one of kd_resnet8_w8_s1.*; did you mean 'kd_resnet8_w.*'?",
        ),
        ("resnet81", 24, 0.0, "found 'resnet81'; allowed: .*; did you mean 'resnet18'?"),
        ("", 24, 0.0, "found ''; allowed: .*; see timm.list_models"),
        ("kd_resnet8_w8_s1", 7, 0.0, "found 'kd_resnet8_w8_s1' with images of 7 px; allowed: at least 8 px; choose"),
        ("vit_tiny_patch16_224", 8, 0.0, "found 'vit_tiny_patch16_224' with images of 8 px; allowed: a classifier of such images; choose"),
        ("inception_v3", 24, 0.0, "found 'inception_v3' with images of 24 px; allowed: "),
        ("xcit_nano_12_p16_224", 24, 0.0, "found 'xcit_nano_12_p16_224' with images of 24 px; allowed: "),
        ("maxvit_tiny_tf_224", 24, 0.0, "found 'maxvit_tiny_tf_224' with images of 24 px; allowed: "),
        (
            "vgg11",
            32,
            0.1,
            "found 'vgg11'; allowed: a model that takes .*drop_path_rate; set drop_path to 0",
        ),
    ],
)
def test_refused_in_one_line(name: str, size: int, drop_path: float, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        build(name, 10, 3, size, drop_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value).split("; ", 2)) == 3  # found, allowed, what to do


def test_the_weights_file_is_timms(tmp_path: Path) -> None:
    """In a process that knows no more of kdlib than that its nets are registered."""
    torch.manual_seed(4)
    model = build(training.NET, 5, 1, 8)
    model(torch.rand(16, 1, 8, 8))
    model.eval()
    images = torch.rand(3, 1, 8, 8)
    save_file(weights(model), tmp_path / "weights.safetensors")
    save_file({"images": images}, tmp_path / "images.safetensors")
    code = f"""
import json, sys, timm, torch
import kdlib.models
from safetensors.torch import load_file
net = timm.create_model({training.NET!r}, num_classes=5, in_chans=1)
net.load_state_dict(load_file(sys.argv[1] + "/weights.safetensors"))
timm.models.load_checkpoint(net, sys.argv[1] + "/weights.safetensors")
images = load_file(sys.argv[1] + "/images.safetensors")["images"]
print(json.dumps(net.eval()((images - 0.5) / 0.5).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True, cwd=training.ROOT)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), said(model, images), rtol=1e-5, atol=1e-5)
    assert set(load_file(tmp_path / "weights.safetensors")) == set(model.net.state_dict())


def said(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).logits
