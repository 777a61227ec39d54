"""The view stream: crops decoded from images that encode their own position, mixing against timm's formulae, the stream's promises."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import mixup as timm_mixup
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from kdlib.config.schema import Recipe
from kdlib.types import Batch
from kdlib.views import crop, mixup
from kdlib.views.mixup import Mix
from kdlib.views.stream import ViewStream

CLASSES = 7
STRONG = {
    "crop_padding": 0.2,
    "crop_min_area": 0.5,
    "mixup_alpha": 0.5,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.1,
    "randaugment": {"operations": 2, "magnitude": 7.0, "magnitude_std": 0.5},
}


def recipe(**changes: object) -> Recipe:
    """A recipe that changes nothing about the images, with some changes."""
    plain = {
        "epochs": 1.0,
        "batch_size": 8,
        "group_size": None,
        "repeats": 1,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "warmup": 0.0,
        "warmup_lr": 0.0,
        "min_lr": 0.0,
        "milestones": [],
        "ema": [],
        "hard_loss": "ce",
    }
    off = {"label_smoothing": 0.0, "drop_path": 0.0, "crop_padding": 0.0, "crop_min_area": 1.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    none = {"operations": 0, "magnitude": 0.0, "magnitude_std": 0.0}
    return Recipe.model_validate({**plain, **off, "randaugment": none, "erasing": 0.0, "augment": "batched", **changes})


def position_images(count: int = 40, height: int = 15, width: int = 11) -> np.ndarray:
    """uint8 (count, height, width, 3): each pixel holds its row + 1, its column + 1, its image's number + 1; so 0 means "from outside"."""
    number, row, column = np.mgrid[:count, :height, :width] + 1
    return np.stack([row, column, number], axis=-1).astype(np.uint8)


def stream(
    images: np.ndarray | None = None, index: np.ndarray | None = None, hflip: float = 0.0, seed: int = 3, **changes: object
) -> ViewStream:
    images = position_images() if images is None else images
    index = np.arange(len(images)) if index is None else index
    return ViewStream(images, np.arange(len(images)) % CLASSES, index, classes=CLASSES, recipe=recipe(**changes), hflip=hflip, seed=seed)


def levels(batch: Batch) -> np.ndarray:
    """int (batch, height, width, channels) in 0..255, exactly."""
    values = batch.images.permute(0, 2, 3, 1).double().numpy() * 255
    np.testing.assert_allclose(values, np.rint(values), atol=1e-4)
    return np.rint(values).astype(int)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "targets", "labels", "index", "mixed"))


# Crops and flips


def decode(view: np.ndarray) -> tuple[int, int, bool, int]:
    """Of one view of a position image: how far down, how far right, whether mirrored, which image. Every pixel must agree."""
    inside = view[..., 2] > 0
    rows, columns = np.nonzero(inside)
    source_rows, source_columns, number = view[inside].T - 1
    mirrored = np.polyfit(columns, source_columns, 1)[0] < 0
    seen = view.shape[1] - 1 - columns if mirrored else columns
    (down,), (right,), (which,) = np.unique(source_rows - rows), np.unique(source_columns - seen), np.unique(number)
    assert (view[~inside] == 0).all()
    assert inside.sum() == (view.shape[0] - abs(down)) * (view.shape[1] - abs(right))
    return int(down), int(right), bool(mirrored), int(which)


def test_shift_and_flip_moves_whole_pixels() -> None:
    images, rng = position_images(), np.random.default_rng(0)
    shifts, flips = rng.integers(-3, 4, (2, len(images))), rng.random(len(images)) < 0.5
    views = crop.shift_and_flip(torch.from_numpy(images), shifts, flips).numpy().astype(int)
    found = [decode(view) for view in views]
    assert found == [(*shift, flip, i) for i, (shift, flip) in enumerate(zip(shifts.T.tolist(), flips.tolist(), strict=True))]


def test_weak_views_are_pixel_exact_and_cover_the_drawn_range() -> None:
    views = stream(hflip=0.5, crop_padding=0.2)  # 3 rows of 15, 2 columns of 11
    found = []
    for step in range(100):
        batch = views.batch(step)
        decoded = [decode(view) for view in levels(batch)]
        assert [which for *_, which in decoded] == batch.index.tolist()
        found += decoded
    down, right, mirrored, _ = np.array(found).T
    assert (set(down), set(right)) == ({-3, -2, -1, 0, 1, 2, 3}, {-2, -1, 0, 1, 2})
    assert np.bincount(down + 3) / 800 == pytest.approx(np.full(7, 1 / 7), abs=0.05)
    assert mirrored.mean() == pytest.approx(0.5, abs=0.05)


def test_nothing_switched_on_gives_the_images() -> None:
    batch = stream().batch(0)
    np.testing.assert_array_equal(levels(batch), position_images()[batch.index])


@pytest.mark.parametrize(("hflip", "mirrored"), [(0.0, False), (1.0, True)])
def test_flip_probability_has_its_ends(hflip: float, mirrored: bool) -> None:
    assert {decode(view)[2] for step in range(5) for view in levels(stream(hflip=hflip).batch(step))} == {mirrored}


def test_resized_crop_is_pillows_bilinear_resize_of_the_box() -> None:
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (30, 15, 11, 3), dtype=np.uint8)
    boxes = crop.draw_boxes(rng, 0.2, sides(30, 15, 11))
    views = crop.resize_boxes(torch.from_numpy(images), boxes).numpy().astype(int)
    for image, view, (top, left, high, wide) in zip(images, views, boxes.T, strict=True):
        box = tuple(int(side) for side in (left, top, left + wide, top + high))
        expected = np.asarray(Image.fromarray(image).crop(box).resize((11, 15), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(view - expected).max() <= 2  # Pillow rounds twice, after each axis


def sides(batch: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to([[height], [width]], (2, batch))


def test_boxes_lie_inside_with_the_drawn_area_and_aspect() -> None:
    top, left, high, wide = crop.draw_boxes(np.random.default_rng(4), 0.3, sides(20_000, 64, 64))
    assert min(top.min(), left.min()) == 0
    assert max((top + high).max(), (left + wide).max()) == 64
    area, aspect = high * wide / 64**2, wide / high
    assert 0.28 < area.min() < 0.32  # sides are rounded to pixels
    assert 0.71 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.40
    # small crops always fit, so there the draws are uniform; the larger a crop, the more aspects are refused
    small = area[area < 0.6]
    assert stats.kstest((small - 0.3) / 0.3, "uniform").statistic < 0.03
    assert np.median(np.log(aspect[area < 0.6])) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 8), (8, 32), (1, 5), (5, 1)])
def test_boxes_fall_back_to_what_torchvision_falls_back_to(height: int, width: int) -> None:
    boxes = crop.draw_boxes(np.random.default_rng(4), 1.0, sides(50, height, width))  # none of all the area has another aspect
    image = Image.new("L", (width, height))
    expected = RandomResizedCrop.get_params(image, (2.0, 2.0), crop.ASPECTS)  # twice the area never fits
    assert (boxes == np.array(expected)[:, None]).all()


# Mixing


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("height", "width"), [(15, 11), (8, 8)])
def test_cutmix_box_is_timms(share: float, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for row, column in np.ndindex(height, width):
        centre = iter([row, column])
        monkeypatch.setattr(np.random, "randint", lambda *_, centre=centre, **__: next(centre))
        (top, bottom, left, right), kept = timm_mixup.cutmix_bbox_and_lam((1, height, width), share)
        mix = mixup.cutmix(share, row, column, height, width)
        assert mix.box == (top, bottom, left, right)
        assert mix.share == pytest.approx(kept, abs=1e-12)
        assert 0 <= top <= bottom <= height
        assert 0 <= left <= right <= width


@pytest.mark.parametrize("mix", [Mix(1.0), Mix(0.3), mixup.cutmix(0.6, 2, 9, 15, 11)], ids=["unmixed", "mixup", "cutmix"])
def test_images_and_targets_are_timms(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(6, 3, 15, 11, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 3, 3, 6, 1, 0])
    timm_mix = timm_mixup.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    monkeypatch.setattr(timm_mix, "_params_per_batch", lambda: (mix.share, mix.box is not None))
    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *_, **__: (mix.box, mix.share))
    expected_images, expected_targets = timm_mix(images.clone(), labels)
    mixed = mixup.mix_images(images, mix)
    torch.testing.assert_close(mixed, expected_images, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixup.mix_targets(labels, CLASSES, 0.1, mix), expected_targets, rtol=0, atol=1e-6)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_majority_is_the_larger_share_and_ties_are_the_images_own() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    assert mixup.majority_labels(labels, Mix(0.5)).tolist() == [0, 1, 2, 3]
    assert mixup.majority_labels(labels, Mix(0.51)).tolist() == [0, 1, 2, 3]
    assert mixup.majority_labels(labels, Mix(0.49)).tolist() == [3, 2, 1, 0]


def test_cutmix_targets_are_the_shares_of_the_pixels() -> None:
    views = stream(cutmix_alpha=1.0)
    for step in range(30):
        batch = views.batch(step)
        owners = levels(batch)[..., 2].reshape(8, -1) - 1
        for own, target, label, pixels in zip(batch.index, batch.targets, batch.labels, owners, strict=True):
            shares = np.bincount(pixels % CLASSES, minlength=CLASSES) / pixels.size
            np.testing.assert_allclose(target, shares, atol=1e-6)
            assert shares[label] == pytest.approx(shares.max())
            assert set(pixels) <= {int(own), int(batch.index.flip(0)[batch.index.tolist().index(own)])}


def test_mixup_targets_are_the_shares_of_the_blend() -> None:
    flat = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None] * 5, (40, 15, 11, 1))
    views = stream(np.ascontiguousarray(flat), mixup_alpha=1.0, label_smoothing=0.1)
    for step in range(10):
        batch = views.batch(step)
        own, partner = batch.index, batch.index.flip(0)
        different = own % CLASSES != partner % CLASSES
        own, partner, targets = own[different], partner[different], batch.targets[different]
        share = (targets.gather(1, own[:, None] % CLASSES)[:, 0] - 0.1 / CLASSES) / 0.9
        blend: Tensor = share * own * 5 / 255 + (1 - share) * partner * 5 / 255
        torch.testing.assert_close(batch.images[different][:, 0, 4, 4], blend, rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))


@pytest.mark.parametrize("changes", [{}, {"mixup_alpha": 0.5}, {"cutmix_alpha": 0.1}, {"mixup_alpha": 0.5, "cutmix_alpha": 0.1}])
def test_an_image_is_said_to_be_mixed_where_another_one_has_a_share_in_it(changes: dict[str, float]) -> None:
    """There pixels, and the targets of images with partners of other classes, differ from those of the recipe that does not mix."""
    views, plain = stream(hflip=0.5, **changes), stream(hflip=0.5)
    said = []
    for step in range(30):
        batch, alone = views.batch(step), plain.batch(step)
        others = alone.labels != alone.labels.flip(0)
        assert torch.equal((batch.images != alone.images).flatten(1).any(dim=1), batch.mixed)
        assert torch.equal((batch.targets != alone.targets).any(dim=1), batch.mixed & others)
        said += batch.mixed.tolist()
    assert set(said) == ({False, True} if "cutmix_alpha" in changes else {bool(changes)})  # a box may be smaller than a pixel


def test_mixing_draws_have_timms_distribution() -> None:
    rng = np.random.default_rng(8)
    both = [mixup.draw_mix(rng, recipe(mixup_alpha=0.2, cutmix_alpha=1.0), 16, 16) for _ in range(4000)]
    assert np.mean([mix.box is not None for mix in both]) == pytest.approx(0.5, abs=0.03)
    shares = [mix.share for mix in both if mix.box is None]
    assert stats.kstest(shares, stats.beta(0.2, 0.2).cdf).statistic < 0.04
    assert all(mix.box for mix in (mixup.draw_mix(rng, recipe(cutmix_alpha=1.0), 16, 16) for _ in range(50)))
    assert not any(mix.box for mix in (mixup.draw_mix(rng, recipe(mixup_alpha=1.0), 16, 16) for _ in range(50)))
    assert mixup.draw_mix(rng, recipe(), 16, 16) == mixup.Mix(1.0)


# The stream


@pytest.mark.parametrize("subset", [8, 11, 40])
def test_every_image_is_seen_equally_often(subset: int) -> None:
    index = np.arange(40)[::-1][:subset]
    views = stream(position_images(), index=index)
    counts = np.zeros(subset, int)  # by place in the subset
    for step in range(37):
        batch = views.batch(step)
        np.testing.assert_array_equal(levels(batch), position_images()[index[batch.index]])
        np.add.at(counts, batch.index.numpy(), 1)
        assert counts.max() - counts.min() <= 1
        assert views.ends_epoch(step) == (counts.sum() // subset > (counts.sum() - 8) // subset)
    assert counts.sum() == 37 * 8  # nothing from outside the subset, and as many images for every subset


def test_passes_have_orders_of_their_own() -> None:
    views = stream(np.zeros((40, 8, 8, 1), np.uint8))
    first, second = (np.concatenate([views.positions(step) for step in range(5 * epoch, 5 * epoch + 5)]) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first != second).any()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    ahead, back, other = stream(hflip=0.5, **STRONG), stream(hflip=0.5, **STRONG), stream(hflip=0.5, seed=4, **STRONG)
    forwards = [ahead.batch(step) for step in range(12)]
    backwards = [back.batch(step) for step in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert same(ahead.batch(7), forwards[7])
    assert not any(same(other.batch(step), forwards[step]) for step in range(12))
    assert not torch.equal(forwards[0].images, forwards[5].images)


def test_strong_views_are_well_formed() -> None:
    for images in (position_images(), position_images()[..., :1]):
        views = stream(images, hflip=0.5, erasing=0.5, **STRONG)
        batch = views.batch(0)
        # to the last stride, of one channel too: a compiled student is compiled again for others
        strides = torch.empty(8, images.shape[3], 15, 11, memory_format=torch.channels_last).stride()
        assert {views.batch(step).images.stride() for step in range(12)} == {strides}
        assert batch.images.shape == (8, images.shape[3], 15, 11)
        assert batch.images.dtype == batch.targets.dtype == torch.float32
        assert 0 <= batch.images.min() <= batch.images.max() <= 1
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))
        assert batch.targets.min() >= 0.1 / CLASSES - 1e-7
        assert (batch.targets.gather(1, batch.labels[:, None])[:, 0] >= batch.targets.max(1).values - 1e-6).all()


def test_memory_mapped_images_are_read_and_left_alone(tmp_path: object) -> None:
    path = f"{tmp_path}/images.npy"
    np.save(path, position_images())
    mapped = np.load(path, mmap_mode="r")
    assert same(stream(mapped, hflip=0.5, **STRONG).batch(3), stream(hflip=0.5, **STRONG).batch(3))
    np.testing.assert_array_equal(mapped, position_images())


def test_batch_larger_than_the_subset_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: found 8; allowed: at most the 7 training images"):
        stream(index=np.arange(7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_views_are_the_hosts() -> None:
    """Same draws; pixels within two levels (float32 places may round otherwise), but for the few on a border or a threshold."""
    host = stream(hflip=0.5, **STRONG)
    device = ViewStream(host.images, host.labels, host.index, classes=CLASSES, recipe=host.recipe, hflip=0.5, seed=host.seed, device="cuda")
    for step in range(10):
        ours, theirs = host.batch(step), device.batch(step)
        assert torch.equal(ours.index, theirs.index.cpu())
        assert torch.equal(ours.labels, theirs.labels.cpu())
        torch.testing.assert_close(ours.targets, theirs.targets.cpu())
        assert ((ours.images - theirs.images.cpu()).abs() <= 2.01 / 255).float().mean() > 0.98
