"""One small model of every module of timm: it works, or it is refused in one line."""

import copy

import pytest
import timm
import torch
from torch import Tensor

from kdlib.models.build import Classifier, build
from kdlib.types import Feature, Output
from tests.toys import tensors

pytestmark = pytest.mark.long

MODULES = sorted(set(timm.list_modules()) - {"resnet_small"})  # the latter is ours
LARGEST = 2e8  # parameters; what is larger is left out, for lack of memory
# Models that normalise timm's features once more before their classifier reads them: with their ``head.bn``.
NORMALISED = {"efficientvit_msra", "shvit"}

# Why a module is left out: the process would be ended.
LEFT_OUT = {"gemma4_vit": "at its own resolution it takes more than 24 GB"}
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    # in channels_last, of the plain timm model; not with ONEDNN_MAX_CPU_ISA=SSE41
    LEFT_OUT["fastvit"] = "with AVX2 alone oneDNN (torch 2.15) writes beyond its memory in the backward pass"


def smallest(module: str) -> tuple[str, int, int]:
    """Name, parameters and image size of the module's smallest model, measured without making one."""
    found = []
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            net = timm.create_model(name, num_classes=5)
        if hasattr(net, "get_classifier"):  # not an encoder alone
            found.append((sum(parameter.numel() for parameter in net.parameters()), name, net.pretrained_cfg["input_size"][-1]))
    parameters, name, size = min(found)
    return name, parameters, size


def built(name: str, size: int) -> Classifier:
    """At 64 px if it can be, else at its own size."""
    try:
        return build(name, 5, 3, 64)
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(f"found {name!r} ")
    return build(name, 5, 3, size)


@pytest.mark.parametrize("module", MODULES)
def test_it_answers_everything(module: str) -> None:
    if module in LEFT_OUT:
        pytest.skip(LEFT_OUT[module])
    name, parameters, size = smallest(module)
    if parameters > LARGEST:
        pytest.skip(f"{name} has {parameters:.0f} parameters")
    model = built(name, size)
    images = torch.rand(2, 3, model.size, model.size)
    for training in (False, True):
        model.train(training)
        plain = copy.deepcopy(model)
        torch.manual_seed(0)
        expected = plain(images).logits
        torch.manual_seed(0)
        output = model(images, frozenset(Feature))
        assert torch.equal(output.logits, expected)
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
        consistent(model, output)
        gradients(model, output)
    with torch.no_grad():
        output, given = model.eval()(images, frozenset(Feature)), (images - model.mean) / model.std
        timms = model.net.forward_head(model.net.forward_features(given), pre_logits=True).flatten(1)
        if module in NORMALISED:
            timms = model.net.head.bn(timms)
    torch.testing.assert_close(output.embedding, timms, rtol=0, atol=0)


def consistent(model: Classifier, output: Output) -> None:
    shape = model.shape
    assert output.logits.shape == (2, 5) == (2, shape.classes)
    assert output.embedding is not None
    assert output.embedding.shape == (2, shape.embedding)
    assert output.maps is not None
    assert output.preactivations is not None
    assert 0 < len(shape.maps) <= 4
    for stage, before, declared in zip(output.maps, output.preactivations, shape.maps, strict=True):
        assert stage.shape == before.shape == (2, *declared)
    sides = [side for _, side, _ in shape.maps]
    assert sides == sorted(sides, reverse=True)
    info = getattr(model.net.feature_info, "info", model.net.feature_info)
    channels = [entry["num_chs"] for entry in info]
    assert [depth for depth, _, _ in shape.maps] == [channels[i] for i in model._places.indices]


def gradients(model: Classifier, output: Output) -> None:
    """Nothing that was said has been changed since."""
    total: Tensor = sum((said.square().mean() for said in tensors(output)), torch.zeros(()))
    total.backward()
    model.zero_grad()
