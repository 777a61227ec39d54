"""Every operation against timm's own, which works image by image on Pillow's."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops

from kdlib.config.schema import RandAugmentParams
from kdlib.views import randaugment
from kdlib.views.randaugment import OPERATIONS

MAGNITUDES = np.array([0.0, 0.4, 1.0, 3.3, 5.0, 6.5, 7.0, 7.49, 9.9, 10.0])
MOVEMENTS = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
# Levels by which an operation may differ from Pillow's. AutoContrast: Pillow's float64 table can miss a level that is reached exactly.
# Blends: float32 on both sides, but a product that is contracted to one rounding (FMA) can fall on the other side of a whole level.
TOLERANCES = {"AutoContrast": 1, "Color": 1, "Contrast": 1, "Brightness": 1, "Sharpness": 1}


def pictures(channels: int) -> np.ndarray:
    """uint8 (10, 34, 26, channels): noise, dark noise, two levels, one level, waves."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:34, :26]
    waves = [
        127.5 + 127.5 * np.sin(x * a + y * b)[..., None] * np.ones(channels) for a, b in ((0.1, 0.2), (0.3, -0.1), (0.05, 0.4), (0.2, 0.2))
    ]
    noise = rng.integers(0, 256, (3, 34, 26, channels))
    dark = rng.integers(20, 60, (1, 34, 26, channels))
    two = rng.choice([40, 200], (1, 34, 26, channels))
    one = np.full((1, 34, 26, channels), 77)
    return np.concatenate([noise, dark, two, one, np.stack(waves)]).astype(np.uint8)


def by_timm(name: str, image: np.ndarray, arguments: tuple[float, ...]) -> np.ndarray:
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    fill = 128 if image.shape[2] == 1 else (128, 128, 128)
    moved = timm_ops.NAME_TO_OP[name](picture, *arguments, fillcolor=fill, resample=Image.Resampling.BILINEAR)
    return np.asarray(moved).reshape(image.shape)


def arguments_by_timm(name: str, magnitude: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    monkeypatch.setattr(random, "random", lambda: 0.75 if sign < 0 else 0.25)
    level = timm_ops.LEVEL_TO_ARG[name]
    return tuple(level(magnitude, {})) if level else ()


def test_operations_are_timms() -> None:
    assert list(OPERATIONS) == timm_ops._RAND_TRANSFORMS
    policy = timm_ops.rand_augment_transform("rand-m7-n2-mstd0.5")
    assert {op.prob for op in policy.ops} == {randaugment.APPLIED}
    assert (randaugment.FILL,) * 3 == timm_ops._FILL


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_arguments_are_timms(name: str, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OPERATIONS[name][1](MAGNITUDES / 10, np.full(len(MAGNITUDES), sign))
    for value, magnitude in zip(ours, MAGNITUDES, strict=True):
        theirs = arguments_by_timm(name, magnitude, sign, monkeypatch)
        assert value == pytest.approx(theirs[0] if theirs else 0, abs=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operation_matches_timm(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(channels)
    act, argument = OPERATIONS[name]
    signs = np.resize([1, -1], len(images))
    ours = act(torch.from_numpy(images), torch.from_numpy(argument(MAGNITUDES / 10, signs).astype(np.float32))).numpy()
    for image, view, magnitude, sign in zip(images, ours, MAGNITUDES, signs, strict=True):
        arguments = arguments_by_timm(name, magnitude, int(sign), monkeypatch)
        if name == "Posterize" and arguments == (0,):
            np.testing.assert_array_equal(view, 0)
            continue
        gap = view.astype(int) - by_timm(name, image, arguments)
        if name in MOVEMENTS:  # ours are rounded, Pillow's cut off; a float32 place may fall on the other side of a border
            assert np.isin(gap, (0, 1)).mean() > 0.995
        else:
            assert np.abs(gap).max() <= TOLERANCES.get(name, 0)
            assert (gap != 0).mean() < 0.1


def test_equalize_leaves_tiny_images_alone() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8))
    assert torch.equal(randaugment.equalize(images, torch.zeros(4)), images)
    np.testing.assert_array_equal(images[0].numpy(), by_timm("Equalize", images[0].numpy(), ()))


def test_apply_gives_each_image_its_own_operations_in_order() -> None:
    images = torch.from_numpy(np.resize(pictures(3), (60, 34, 26, 3)))
    before = images.clone()
    draws = randaugment.draw_operations(np.random.default_rng(1), RandAugmentParams(operations=2, magnitude=7.0, magnitude_std=0.5), 60)
    views = randaugment.augment(images, draws)
    assert torch.equal(images, before)
    for i in range(60):
        expected = images[i : i + 1]
        for step in range(2):
            act, argument = list(OPERATIONS.values())[draws.operation[step, i]]
            if draws.applied[step, i]:
                value = argument(draws.magnitude[step, i : i + 1] / 10, draws.sign[step, i : i + 1]).astype(np.float32)
                expected = act(expected, torch.from_numpy(value))
        assert torch.equal(views[i : i + 1], expected)


def test_no_operations_change_nothing() -> None:
    images = torch.from_numpy(pictures(1))
    draws = randaugment.draw_operations(np.random.default_rng(1), RandAugmentParams(operations=0, magnitude=7.0, magnitude_std=0.5), 10)
    assert torch.equal(randaugment.augment(images, draws), images)


def test_draws_have_timms_distribution() -> None:
    draws = randaugment.draw_operations(np.random.default_rng(5), RandAugmentParams(operations=2, magnitude=9.5, magnitude_std=0.5), 30_000)
    shares = np.bincount(draws.operation.ravel(), minlength=15) / 60_000
    assert shares == pytest.approx(np.full(15, 1 / 15), abs=0.005)
    assert (draws.operation[0] == draws.operation[1]).mean() == pytest.approx(1 / 15, abs=0.01)  # with replacement
    assert draws.applied.mean() == pytest.approx(0.5, abs=0.01)
    assert (draws.sign == 1).mean() == pytest.approx(0.5, abs=0.01)
    assert draws.magnitude.max() == 10
    assert (draws.magnitude == 10).mean() == pytest.approx(0.1587, abs=0.01)  # P(normal > 1 std)
    assert np.median(draws.magnitude) == pytest.approx(9.5, abs=0.02)
