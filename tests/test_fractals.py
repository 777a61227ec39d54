"""Fractals against a chaos game in plain Python, and what they promise: repeatable, recognisable, small in memory."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdlib.config.schema import Fractals
from kdlib.data import sources
from kdlib.data.sources import fractals
from kdlib.data.sources.ifs_numba import BURN_IN, render
from kdlib.seed import generator

ROOT = Path(__file__).parents[1]
PARAMS = Fractals(
    source="fractals", classes=4, train_per_class=9, val_per_class=2, test_per_class=3, size=16, jitter=0.5, points=80, seed=3, hflip=0.5
)


def reference_image(maps: list[list[float]], draws: list[float], size: int) -> list[list[int]]:
    """One image, one step at a time, from the definition: maps as (a, b, c, d, e, f)."""
    weights = [abs(a * d - b * c) for a, b, c, d, _, _ in maps]
    weights = [max(weight, max(weights) / 20) for weight in weights]
    total, x, y, points = sum(weights), 0.0, 0.0, []
    for step, draw in enumerate(draws):
        reached = 0.0
        for weight, (a, b, c, d, e, f) in zip(weights, maps, strict=True):
            reached += weight / total
            if draw < reached:
                x, y = a * x + b * y + e, c * x + d * y + f
                break
        if step >= 20:
            points.append((x, y))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    counts = [[0] * size for _ in range(size)]
    for x, y in points:
        column = min(math.floor((x - min(xs)) / (max(xs) - min(xs)) * (size - 2)), size - 3)
        row = min(math.floor((y - min(ys)) / (max(ys) - min(ys)) * (size - 2)), size - 3)
        counts[row + 1][column + 1] += 1
    full = max(map(max, counts))
    return [[math.floor(255 * math.log(1 + n) / math.log(1 + full) + 0.5) for n in row] for row in counts]


@pytest.mark.parametrize("label", range(4))
def test_an_image_is_the_chaos_game_of_its_jittered_maps(label: int) -> None:
    drawn = fractals.draw_system(PARAMS.seed, label)
    draws = generator(PARAMS.seed, "fractals", "train", label, 5).random(drawn.size + BURN_IN + PARAMS.points)
    maps = []
    for row, noise in zip(drawn.tolist(), (2 * draws[: drawn.size] - 1).reshape(-1, 6).tolist(), strict=True):
        spread = [value * PARAMS.jitter * one for value, one in zip(fractals.SPREAD.tolist(), noise, strict=True)]
        theta, phi = row[0] + spread[0], row[1] + spread[1]
        s1, s2 = (max(-0.95, min(0.95, row[i] * (1 + spread[i]))) for i in (2, 3))
        left = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
        right = np.array([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])
        matrix = left @ np.diag([s1, s2]) @ right
        maps.append([round(v * 2**20) / 2**20 for v in (*matrix.ravel().tolist(), row[4] + spread[4], row[5] + spread[5])])
    image = fractals.render_images(PARAMS, drawn, ("train", label), range(5, 6))[0, :, :, 0]
    expected = reference_image(maps, draws[drawn.size :].tolist(), PARAMS.size)
    np.testing.assert_array_equal(image, expected)


def test_images_do_not_depend_on_how_they_are_divided() -> None:
    drawn = fractals.draw_system(PARAMS.seed, 1)
    whole = fractals.render_images(PARAMS, drawn, ("val", 1), range(9))
    parts = [fractals.render_images(PARAMS, drawn, ("val", 1), range(start, min(start + 2, 9))) for start in (8, 6, 4, 2, 0)]
    np.testing.assert_array_equal(whole, np.concatenate(parts[::-1]))
    assert len(np.unique(whole.reshape(9, -1), axis=0)) == 9


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The data set of PARAMS, prepared by another process, and what memory that took."""
    folder = tmp_path_factory.mktemp("fractals") / "there"
    return folder, _prepare_elsewhere(folder, PARAMS)


def test_another_process_writes_the_same_bytes(tmp_path: Path, elsewhere: tuple[Path, int]) -> None:
    here = sources.prepare("f", PARAMS, tmp_path / "here", progress=False)
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == ["data.json", *(f"{s}_{what}.npy" for s in ("test", "train", "val") for what in ("images", "labels"))]
    for file in names:
        assert (tmp_path / "here" / file).read_bytes() == (elsewhere[0] / file).read_bytes()
    assert np.bincount(here.train.labels).tolist() == [9] * 4
    assert here.class_names == ["system_0000", "system_0001", "system_0002", "system_0003"]


def test_splits_seeds_and_classes_give_other_images_but_size_gives_other_renderings_of_the_same_systems(tmp_path: Path) -> None:
    base = sources.prepare("f", PARAMS, tmp_path / "base", progress=False)
    images = np.concatenate([split.images.reshape(-1, 256) for split in (base.train, base.val, base.test)])
    assert len(np.unique(images, axis=0)) == len(images)
    other = sources.prepare("f", PARAMS.model_copy(update={"seed": 4}), tmp_path / "other", progress=False)
    assert not np.array_equal(base.train.images, other.train.images)
    more = sources.prepare("f", PARAMS.model_copy(update={"classes": 5, "train_per_class": 10}), tmp_path / "more", progress=False)
    np.testing.assert_array_equal(more.train.images[:9], base.train.images[:9])  # a larger set begins with the smaller one's images
    np.testing.assert_array_equal(more.train.images[30:39], base.train.images[27:36])


def test_without_jitter_every_image_shows_the_class_s_own_maps() -> None:
    drawn = fractals.draw_system(0, 0)
    still = fractals.jitter(drawn, np.zeros((2, *drawn.shape)))
    np.testing.assert_array_equal(still, np.stack([drawn, drawn]))


def test_systems_are_contractive_within_the_published_bound_and_look_neither_empty_nor_full() -> None:
    for label in range(100):
        drawn = fractals.draw_system(0, label)
        maps = len(drawn)
        assert 2 <= maps <= 4
        noise = generator(0, "test", label).uniform(-1, 1, (50, *drawn.shape))
        matrices = fractals.coefficients(fractals.jitter(drawn, noise))[..., :4].reshape(-1, 2, 2)
        assert np.linalg.svd(matrices, compute_uv=False).max() < 0.951
        values = np.linalg.svd(fractals.coefficients(drawn[None])[0, :, :4].reshape(-1, 2, 2), compute_uv=False)
        assert (5 + maps) / 2 - 1e-4 <= (values @ [1, 2]).sum() <= (6 + maps) / 2 + 1e-4
        params = PARAMS.model_copy(update={"jitter": 0.0, "points": 1000, "size": 32})
        share = np.count_nonzero(fractals.render_images(params, drawn, ("test", label), range(20))) / 20 / 900
        assert 0.1 < share < 0.6


def test_classes_are_recognisable_and_not_trivial(tmp_path: Path) -> None:
    """By the nearest class mean in pixels, which knows nothing of fractals."""
    params = PARAMS.model_copy(update={"classes": 20, "train_per_class": 50, "test_per_class": 20, "points": 300, "size": 24})
    made = sources.prepare("f", params, tmp_path / "f", progress=False)
    train = made.train.images.reshape(20, 50, -1).mean(1)
    test = made.test.images.reshape(400, -1).astype(float)
    nearest = ((test[:, None] - train[None]) ** 2).sum(-1).argmin(1)
    accuracy = (nearest == made.test.labels).mean()
    assert 0.3 < accuracy < 0.95


@pytest.mark.parametrize("points", [1, 2])
def test_a_degenerate_image_is_still_an_image(points: int) -> None:
    drawn = fractals.draw_system(0, 0)
    images = fractals.render_images(PARAMS.model_copy(update={"points": points}), drawn, ("train", 0), range(3))
    assert (images.reshape(3, -1).max(1) == 255).all()
    assert (np.count_nonzero(images.reshape(3, -1), axis=1) <= points).all()


def test_points_lie_in_a_frame_of_one_pixel() -> None:
    maps = np.array([[[0.5, 0, 0, 0.5, 0, 0], [0.5, 0, 0, 0.5, 1, 0], [0.5, 0, 0, 0.5, 0, 1]]])  # Sierpinski's triangle
    image = render(maps, np.array([[1 / 3, 2 / 3, 1.0]]), generator(0).random((1, 5000)), 18)[0]
    assert image[0].max() == image[-1].max() == image[:, 0].max() == image[:, -1].max() == 0
    rows, columns = np.nonzero(image)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 16, 1, 16)
    assert (rows + columns <= 2 + 16).all()  # below the diagonal; pixels on it hold points of both sides
    assert image[6, 6] == 0 < image[1, 1]  # the hole in the middle, a corner


def test_eighty_megabytes_of_images_need_no_more_memory_than_a_few_kilobytes(tmp_path: Path, elsewhere: tuple[Path, int]) -> None:
    params = PARAMS.model_copy(update={"classes": 10, "train_per_class": 2_000, "points": 50, "size": 64})
    peak = _prepare_elsewhere(tmp_path / "f", params)
    assert (tmp_path / "f" / "train_images.npy").stat().st_size > 80e6
    assert peak - elsewhere[1] < 20e6


def _prepare_elsewhere(folder: Path, params: Fractals) -> int:
    """Peak resident memory, in bytes, of a process that prepares a data set; 0 where there is no /proc.

    (Not ``ru_maxrss``: a child inherits its parent's.)
    """
    code = """
import re, sys
from pathlib import Path
from kdlib.config.schema import Fractals
from kdlib.data.sources import prepare
prepare("f", Fractals.model_validate_json(sys.argv[2]), Path(sys.argv[1]), progress=False)
status = Path("/proc/self/status")
print(1024 * int(re.search(r"VmHWM:\\s+([0-9]+) kB", status.read_text())[1]) if status.exists() else 0)
"""
    command = [sys.executable, "-c", code, str(folder), params.model_dump_json()]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
