"""Random erasing against timm's, and timm's own transforms as views."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing

from kdlib.errors import Refused
from kdlib.seed import global_draws
from kdlib.study.training.experiment import Experiment
from kdlib.views import erasing, timm_pil
from tests import tiny
from tests.test_views import position_images, recipe, same, stream

BATCH, HEIGHT, WIDTH = 4000, 24, 20


def test_boxes_have_timms_distribution() -> None:
    """Area, aspect and place, as whole pixels; how many are erased."""
    ours = erasing.draw_erasures(np.random.default_rng(0), 0.5, (BATCH, HEIGHT, WIDTH))
    theirs = []
    random.seed(0)
    erase = RandomErasing(probability=0.5, mode="const", device="cpu")
    for _ in range(BATCH):
        image = erase(torch.ones(1, HEIGHT, WIDTH))
        rows, columns = (torch.where((image[0] == 0).any(dim))[0] for dim in (1, 0))
        if len(rows):
            theirs.append([rows[0].item(), columns[0].item(), len(rows), len(columns)])
    assert np.count_nonzero(ours[2]) / BATCH == pytest.approx(0.5, abs=0.03)
    assert len(theirs) / BATCH == pytest.approx(0.5, abs=0.03)
    chosen = ours[:, ours[2] > 0]
    for side, expected in zip(chosen, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(side, expected).statistic < 0.06
    assert (chosen[0] + chosen[2] <= HEIGHT).all()
    assert (chosen[1] + chosen[3] <= WIDTH).all()


def test_the_box_is_grey_and_nothing_else() -> None:
    images = torch.rand(3, 2, 6, 5)
    boxes = np.array([[1, 0, 0], [2, 0, 4], [3, 0, 6], [2, 0, 1]])
    found = erasing.erase(images, boxes)
    assert (found[0, :, 1:4, 2:4] == erasing.FILL).all()
    assert (found[2, :, :, 4] == erasing.FILL).all()
    images[0, :, 1:4, 2:4] = images[2, :, :, 4] = erasing.FILL
    assert torch.equal(found, images)


def test_erasing_comes_last_and_changes_no_other_draw() -> None:
    plain, erased = (stream(mixup_alpha=0.5, hflip=0.5, crop_padding=0.2, erasing=share).batch(3) for share in (0.0, 1.0))
    grey = erased.images == erasing.FILL
    assert torch.equal(erased.images[~grey], plain.images[~grey])
    assert torch.equal(erased.targets, plain.targets)
    assert 0.02 < grey.float().mean() < 0.34


# timm's transforms


TIMM = {"augment": "timm", "crop_min_area": 0.5, "randaugment": {"operations": 2, "magnitude": 7.0, "magnitude_std": 0.5}}


def test_views_are_timms_to_the_pixel() -> None:
    images = position_images()[:5]
    found = timm_pil.transform_images(images, recipe(**TIMM), 0.5, timm_pil.view_keys(3, 7, len(images)))
    transform = timm_pil._transform(0.5, recipe(**TIMM).randaugment, 0.5, (15, 11))
    for i, image in enumerate(images):
        with global_draws(3, "timm", 7, i):
            expected = transform(Image.fromarray(image))
        np.testing.assert_array_equal(found[i], np.asarray(expected).transpose(1, 2, 0))
    words = repr(transform)
    for part in ("RandomResizedCropAndInterpolation", "scale=(0.5, 1.0)", "RandomHorizontalFlip", "RandAugment(n=2"):
        assert part in words
    assert math.isclose(transform.transforms[1].p, 0.5)


def test_timms_views_depend_on_seed_and_step_alone() -> None:
    for images in (position_images(), position_images()[..., :1]):
        ahead, back = stream(images, hflip=0.5, **TIMM), stream(images, hflip=0.5, **TIMM)
        forwards, backwards = [ahead.batch(step) for step in range(4)], [back.batch(step) for step in reversed(range(4))][::-1]
        assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
        assert not torch.equal(forwards[0].images, forwards[1].images)
        assert not same(stream(images, hflip=0.5, seed=9, **TIMM).batch(0), forwards[0])


def test_global_generators_go_on_as_if_nothing_was_drawn() -> None:
    def three() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = three()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    with global_draws(1, "a"):
        first = three()
    assert three() == expected
    with global_draws(1, "a"):
        assert three() == first
    with global_draws(1, "b"):
        assert three() != first


def test_a_crop_that_timm_has_not_is_refused(tmp_path: object) -> None:
    content = tiny.content()
    content["recipes"]["weak"]["augment"] = "timm"
    with pytest.raises(Refused, match=r"recipes.weak.crop_padding: found 0.125; allowed: 0 with augment: timm"):
        Experiment(tiny.write(tmp_path, content))  # type: ignore[arg-type]
