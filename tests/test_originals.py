"""Images that stay in their files: views and evaluation against torchvision and timm, alone and by other processes, and bad input."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as oracle

from kdlib.config.schema import Originals
from kdlib.data import lazy_images, sources
from kdlib.data.dataset import DataSet, load_dataset
from kdlib.data.lazy_images import iterate_batches
from kdlib.decoding import pixels
from kdlib.decoding.pixels import Cut
from kdlib.decoding.pool import Pool
from kdlib.views.mixup import mix_groups
from kdlib.views.stream import ViewStream
from tests import jpegs, tiny
from tests.refusals import refused
from tests.test_views import recipe, same

SIZE = 16
CROPS = {"batch_size": 12, "group_size": 4, "repeats": 3, "crop_min_area": 0.08}
TIMM = CROPS | {"augment": "timm", "randaugment": {"operations": 2, "magnitude": 7.0, "magnitude_std": 0.5}}


def params(path: Path | str, **changes: object) -> Originals:
    return Originals.model_validate(jpegs.entry(path, size=SIZE) | changes)


def prepared(to: Path, made: Originals) -> DataSet:
    return sources.prepare("net", made, to / "net", progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jpegs.write(tmp_path_factory.mktemp("imagenet") / "in")


@pytest.fixture(scope="module")
def listed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepared(tmp_path_factory.mktemp("listed"), params(root))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process but this one decodes, however many cores there are."""
    monkeypatch.setattr(lazy_images, "pool", lambda: Pool(0))


@pytest.fixture(scope="module")
def workers(request: pytest.FixtureRequest) -> Iterator[Pool]:
    made = Pool(request.param)
    yield made
    made.close()


def stream(of: DataSet, **changes: object) -> ViewStream:
    split = of.train
    index = np.arange(len(split.labels))
    return ViewStream(split.images, split.labels, index, classes=4, recipe=recipe(**CROPS | changes), hflip=0.5, seed=1)


def by_hand(split_images: lazy_images.LazyImages, row: int) -> Image.Image:
    """An image by Pillow alone."""
    place = split_images.byte_range(row)
    with Image.open(place.file) as image:
        return image.convert("RGB")


# What is listed


def test_lists_what_can_be_read_and_names_the_rest(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(tmp_path, params(root))
    assert found.class_names == list(jpegs.CLASSES)
    assert [len(split.images) for split in (found.train, found.val, found.test)] == [36, 12, 24]
    assert np.bincount(found.test.labels).tolist() == [6, 6, 6, 6]
    for split in (found.train, found.val, found.test):
        for row, label in enumerate(split.labels):
            assert Path(split.images.byte_range(row).file).parent.name == jpegs.CLASSES[label]
            assert by_hand(split.images, row).size[::-1] == tuple(split.images.sides(np.array([row]))[:, 0])
    left_out = json.loads((tmp_path / "net" / "data.json").read_text())["originals"]["left_out"]
    assert len(left_out) == len(jpegs.BROKEN)
    for name, reason in jpegs.BROKEN.items():
        assert any(line.startswith(f"{name}: ") and reason in line for line in left_out)
        assert name in capsys.readouterr().out or name != next(iter(jpegs.BROKEN))
    assert sum(file.stat().st_size for file in (tmp_path / "net").iterdir()) < 40_000


def test_mean_and_deviation_are_imagenets(listed: DataSet) -> None:
    assert (listed.mean, listed.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_fingerprint_knows_names_bytes_and_parameters_but_not_the_place(root: Path, listed: DataSet, tmp_path: Path) -> None:
    moved = jpegs.copied(root, tmp_path / "elsewhere")
    assert prepared(tmp_path / "a", params(moved)).fingerprint == listed.fingerprint
    for changes in ({"size": 24}, {"crop_pct": 0.875}, {"seed": 1}):
        assert prepared(tmp_path / "b", params(root, **changes)).fingerprint != listed.fingerprint
    file = Path(moved / "train" / jpegs.CLASSES[0] / f"{jpegs.CLASSES[0]}_006.JPEG")
    jpegs.picture(99, 40, 40).save(file, quality=90)
    assert prepared(tmp_path / "c", params(moved)).fingerprint != listed.fingerprint


# Evaluation


@pytest.mark.parametrize("crop_pct", [0.95, 0.875, 1.0])
def test_evaluation_is_timms_to_the_pixel(root: Path, tmp_path: Path, crop_pct: float) -> None:
    """But of an image 50 times as high as wide, of which only what is seen is resized."""
    found = prepared(tmp_path, params(root, crop_pct=crop_pct))
    transform = create_transform((3, SIZE, SIZE), use_prefetcher=True, interpolation="bicubic", crop_pct=crop_pct)
    for split in (found.train, found.test):
        for row, ours in enumerate(split.images[:]):
            image = by_hand(split.images, row)
            expected = np.asarray(transform(image)).transpose(1, 2, 0).astype(int)
            assert np.abs(ours - expected).max() <= (image.height > pixels.LONG * image.width)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    deep = (np.arange(256, dtype=np.uint16) * 256 + 255).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(pixels.rgb(Image.fromarray(deep)))[..., 1], np.arange(256).reshape(16, 16))


def test_rows_in_any_order_and_what_was_kept(listed: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = copy.deepcopy(listed.test.images)
    everything = kept[:]
    monkeypatch.setattr(pixels, "read_bytes", lambda _: pytest.fail("read again"))
    np.testing.assert_array_equal(kept[np.array([5, 2, 5])], everything[[5, 2, 5]])
    np.testing.assert_array_equal(kept[3], everything[3])


def test_without_memory_to_spare_nothing_is_kept(listed: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = listed.test.images[:]
    monkeypatch.setattr(lazy_images, "KEPT_SHARE", 0.0)
    images = copy.deepcopy(listed.test.images)
    np.testing.assert_array_equal(images[:], expected)
    assert images._kept is None


def test_a_split_in_parts(listed: DataSet) -> None:
    parts = [np.array([3, 1]), np.array([0]), np.array([7, 8, 9])]
    for images in (listed.test.images, listed.test.images[:]):
        for part, found in zip(parts, iterate_batches(images, parts), strict=True):
            np.testing.assert_array_equal(found, listed.test.images[part])


# Views


def test_crops_are_torchvisions(listed: DataSet) -> None:
    """To the pixel; from images decoded at a fraction of their size, within 6 levels in the mean of an image."""
    images, rng = listed.train.images, np.random.default_rng(0)
    reduced = 0
    for row in range(len(images)):
        original = by_hand(images, row)
        for bicubic in (False, True):
            height, width = (int(rng.integers(1, side + 1)) for side in (original.height, original.width))
            top, left = int(rng.integers(0, original.height - height + 1)), int(rng.integers(0, original.width - width + 1))
            cut = Cut(top, left, height, width, bicubic)
            (found,) = pixels.decode_views([(images.byte_range(row), [cut])], SIZE, 0.95)
            how = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
            expected = oracle.resized_crop(original, top, left, height, width, [SIZE, SIZE], how)
            gap = np.abs(found.astype(int) - np.asarray(expected))
            if min(cut.height, cut.width) >= 2 * pixels.SURPLUS * SIZE and original.height == 1600:
                reduced += 1
                assert gap.mean() < 6
            else:
                assert not gap.any()
    assert reduced >= 4


def test_views_are_crops_of_the_originals_each_drawn_for_itself(listed: DataSet) -> None:
    """What is drawn of the sides of each image: boxes within them, half of them bicubic, the same for the same step and group."""
    views = stream(listed)
    cuts = []
    for step in range(40):
        rows, wanted = views.prefetch.wanted(step, step % 3)
        for row, cut in zip(rows, wanted, strict=True):
            assert isinstance(cut, Cut)
            height, width = listed.train.images.sides(np.array([row]))[:, 0]
            assert 0 <= cut.top <= cut.top + cut.height <= height
            assert 0 <= cut.left <= cut.left + cut.width <= width
            cuts.append((cut.height * cut.width / (height * width), cut.bicubic))
    share, bicubic = np.array(cuts).T
    assert share.min() < 0.2
    assert share.max() > 0.7
    assert bicubic.mean() == pytest.approx(0.5, abs=0.15)


def test_a_view_holds_the_crop_mirrored_or_not(listed: DataSet) -> None:
    views = stream(listed)
    mirrored = []
    for step in range(4):
        batch = views.batch(step, 1)
        rows, wanted = views.prefetch.wanted(step, 1)
        for row, cut, image in zip(rows.tolist(), wanted, batch.images, strict=True):
            (expected,) = pixels.decode_views([(listed.train.images.byte_range(row), [cut])], SIZE, 0.95)
            found = (image.permute(1, 2, 0) * 255).round().byte().numpy()
            flipped = np.array_equal(found, expected[:, ::-1])
            assert flipped or np.array_equal(found, expected)
            mirrored.append(flipped)
    assert 0 < np.mean(mirrored) < 1


def test_without_resized_crops_a_view_is_what_evaluation_sees(listed: DataSet) -> None:
    views = stream(listed, crop_min_area=1.0)
    batch = views.batch(0)
    expected = listed.train.images[batch.index.numpy()]
    found = (batch.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    for view, image in zip(found, expected, strict=True):
        assert np.array_equal(view, image) or np.array_equal(view, image[:, ::-1])


@pytest.mark.parametrize(
    ("workers", "augment"), [(1, CROPS), (3, CROPS), (1, TIMM | {"group_size": 6})], ids=["one", "three", "timm's"], indirect=["workers"]
)
def test_other_processes_make_the_same_views(
    listed: DataSet, workers: Pool, augment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = mix_groups(recipe(**augment))
    expected = [[stream(listed, **augment).batch(step, group) for group in range(groups)] for step in (0, 1, 5)]
    monkeypatch.setattr(lazy_images, "pool", lambda: workers)
    views = stream(listed, **augment)
    for step, batches in zip((0, 1, 5), expected, strict=True):
        assert all(same(views.batch(step, group), batch) for group, batch in enumerate(batches))
    assert not same(expected[0][0], expected[1][0])


def test_timms_views_are_timms(listed: DataSet) -> None:
    from kdlib.seed import global_draws  # noqa: PLC0415
    from kdlib.views import timm_pil  # noqa: PLC0415

    made = recipe(**TIMM)
    rows, keys = stream(listed, **TIMM).prefetch.wanted(2, 1)
    transform = timm_pil._transform(0.08, made.randaugment, 0.5, (SIZE, SIZE))
    batch = stream(listed, **TIMM).batch(2, 1)
    for row, key, image in zip(rows.tolist(), keys, batch.images, strict=True):
        with global_draws(*key):
            expected = np.asarray(transform(by_hand(listed.train.images, row)))
        np.testing.assert_array_equal((image * 255).round().byte().numpy(), expected)


def test_shards_hold_the_same_views(root: Path, listed: DataSet, tmp_path: Path) -> None:
    names = jpegs.class_map(tmp_path / "classes.txt")
    for numbered in (True, False):
        shards = jpegs.to_shards(root, tmp_path / f"shards {numbered}", numbered)
        made = params(shards, stored="shards", class_map=str(names) if numbered else None)
        found = prepared(tmp_path / f"{numbered}", made)
        assert found.class_names == listed.class_names
        assert all(same(stream(found).batch(step, 2), stream(listed).batch(step, 2)) for step in range(3))
        np.testing.assert_array_equal(found.test.images[:], listed.test.images[:])


def test_an_image_of_several_groups_is_decoded_once_a_step(listed: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read, times = pixels.read_bytes, []
    monkeypatch.setattr(pixels, "read_bytes", lambda place: times.append(place.file) or read(place))
    views = stream(listed)
    for group in range(3):
        views.batch(0, group)
    assert len(times) == len(set(times)) == 4  # 12 views, 3 of each image


def test_any_group_may_be_asked_for(listed: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a process takes care of its own alone: the second of three here."""
    monkeypatch.setattr("kdlib.views.stream.local_groups", lambda _: range(1, 2))
    views = stream(listed)
    assert same(views.batch(1, 1), stream(listed).batch(1, 1))
    assert same(views.batch(1, 0), stream(listed).batch(1, 0))


# Copies


def test_copies_are_small_and_the_same(listed: DataSet) -> None:
    packed = pickle.dumps(listed.train)
    assert len(packed) < 1000 + listed.train.labels.nbytes
    images = pickle.loads(packed).images
    np.testing.assert_array_equal(images[:3], listed.train.images[:3])
    assert isinstance(copy.deepcopy(listed).val.images.ranges, np.memmap)


# Bad input


def spoiled(root: Path, listed: DataSet, to: Path) -> tuple[DataSet, Path]:
    """A copy of all, and the first training file."""
    moved, folder = jpegs.copied(root, to / "in"), to / "net"
    shutil.copytree(listed.train.images.folder, folder)
    facts = json.loads((folder / "data.json").read_text())
    facts["originals"]["path"] = str(moved)
    (folder / "data.json").write_text(json.dumps(facts))
    found = load_dataset(folder)
    return found, Path(found.train.images.byte_range(0).file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(Path.unlink, "No such file"), (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "other bytes")],
    ids=["gone", "changed"],
)
@pytest.mark.parametrize("processes", [0, 1])
def test_what_changed_since_it_was_listed_is_refused(
    root: Path,
    listed: DataSet,
    tmp_path: Path,
    change: Callable[[Path], object],
    reason: str,
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, file = spoiled(root, listed, tmp_path)
    change(file)
    made = Pool(processes)
    monkeypatch.setattr(lazy_images, "pool", lambda: made)
    with refused("data.net.path", reason, file.name[:9], "run the data stage again"):
        _ = found.train.images[:]
    with refused("data.net.path", reason):
        for step in range(9):  # a pass
            stream(found).batch(step)
    made.close()


def test_an_environment_variable_names_the_path(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDLIB_IMAGENET", str(root))
    found = prepared(tmp_path, params("$KDLIB_IMAGENET"))
    assert found.train.images.root == root
    monkeypatch.delenv("KDLIB_IMAGENET")
    with refused("data.net.path", "found '$KDLIB_IMAGENET'", "set KDLIB_IMAGENET to where the images lie"):
        prepared(tmp_path, params("$KDLIB_IMAGENET"))
    with refused("data.net.path", "KDLIB_IMAGENET"):
        load_dataset(tmp_path / "net")


def test_a_path_that_is_not_imagenet_is_refused(root: Path, tmp_path: Path) -> None:
    with refused("data.net.path", "nowhere", "a folder that holds train/ and val/"):
        prepared(tmp_path, params(tmp_path / "nowhere"))
    with refused("data.net.path", "no ", "n01440764, n01443537", "a folder that holds train/ and val/"):
        prepared(tmp_path, params(root / "train"))
    with refused("data.net.path", "shards named *.tar"):
        prepared(tmp_path, params(root, stored="shards"))


def test_more_unreadable_images_than_allowed_are_refused(root: Path, tmp_path: Path) -> None:
    with refused("data.net.unreadable", "found '3 of 75 images that cannot be read'", "at most a share of 0.01", *jpegs.BROKEN):
        prepared(tmp_path, params(root, unreadable=0.01))


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (jpegs.CLASSES[1:], ("1 unexpected: n01440764",)),
        ((*jpegs.CLASSES, "n9"), ("1 missing: n9",)),
        ((*jpegs.CLASSES[1:], "n9"), ("1 missing: n9", "1 unexpected: n01440764")),
        ((*jpegs.CLASSES, jpegs.CLASSES[0]), ("5 lines with 4 different names", "each class once")),
        (("one two three",), ("each class once",)),
        (("a 0", "b 2"), ("each class once",)),
    ],
)
@pytest.mark.parametrize("stored", ["folders", "shards"])
def test_a_class_map_that_does_not_fit_is_refused(
    root: Path, tmp_path: Path, lines: tuple[str, ...], parts: tuple[str, ...], stored: str
) -> None:
    names = jpegs.class_map(tmp_path / "classes.txt", lines)
    path = root if stored == "folders" else jpegs.to_shards(root, tmp_path / "shards", numbered=False)
    with refused("data.net.class_map", *parts):
        prepared(tmp_path, params(path, stored=stored, class_map=str(names)))


def test_a_class_map_gives_the_order(root: Path, tmp_path: Path) -> None:
    for lines in (reversed(jpegs.CLASSES), [f"{name} {3 - i}" for i, name in enumerate(jpegs.CLASSES)]):
        found = prepared(tmp_path, params(root, class_map=str(jpegs.class_map(tmp_path / "classes.txt", lines))))
        assert found.class_names == list(reversed(jpegs.CLASSES))
        for row, label in enumerate(found.test.labels):
            assert Path(found.test.images.byte_range(row).file).parent.name == found.class_names[label]


def test_shards_without_an_image_are_refused(root: Path, tmp_path: Path) -> None:
    shards = jpegs.to_shards(root, tmp_path / "shards", numbered=False)
    for file in (shards / "val").glob("*.tar"):
        with tarfile.open(file, "w"):
            pass
    with refused("data.net.path", "no image in the shards of", "val", "images named <key>.jpg"):
        prepared(tmp_path, params(shards, stored="shards"))


def test_shards_may_name_their_members_from_the_folder_on(root: Path, tmp_path: Path) -> None:
    """As `tar -cf SHARD .` does."""
    for part in ("train", "val"):
        (tmp_path / "shards" / part).mkdir(parents=True)
        with tarfile.open(tmp_path / "shards" / part / "0.tar", "w") as tar:
            tar.add(root / part, arcname=".")
    found = prepared(tmp_path, params(tmp_path / "shards", stored="shards"))
    assert found.class_names == prepared(tmp_path / "too", params(root)).class_names


def test_a_class_map_that_lacks_a_number_of_the_shards_is_refused(root: Path, tmp_path: Path) -> None:
    shards = jpegs.to_shards(root, tmp_path / "shards")
    names = jpegs.class_map(tmp_path / "classes.txt", jpegs.CLASSES[:3])
    with refused("data.net.class_map", "1 unexpected: 3"):
        prepared(tmp_path, params(shards, stored="shards", class_map=str(names)))


def test_a_shard_that_is_cut_off_is_refused(root: Path, tmp_path: Path) -> None:
    shards = jpegs.to_shards(root, tmp_path / "shards")
    file = shards / "val" / "imagenet-val-0001.tar"
    file.write_bytes(file.read_bytes()[:5000])
    with refused("data.net.path", "imagenet-val-0001.tar"):
        prepared(tmp_path, params(shards, stored="shards"))


# Processes


def test_an_exception_of_a_process_comes_through_and_it_works_on() -> None:
    made = Pool(1)
    with pytest.raises(ValueError, match="this one"):
        made.ask(int, "this one")()
    assert made.ask(abs, -2)() == 2
    made.close()


def test_a_process_that_is_ended_from_outside_is_told() -> None:
    made = Pool(1)
    with pytest.raises(RuntimeError, match="ended from outside: lack of memory"):
        made.ask(os._exit, 9)()
    with pytest.raises(RuntimeError, match="ended from outside"):
        made.ask(abs, -2)()
    made.close()


PARENT = """
import sys, time
from kdlib.decoding.pool import Pool
made = Pool(2)
print([made.ask(abs, -2)() for _ in range(2)], flush=True)
for _ in range(9):
    made.ask(time.sleep, 0.5)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [psutil.Process.kill, psutil.Process.terminate], ids=["killed", "terminated"])
def test_processes_end_with_their_parent(end: Callable[[psutil.Process], None]) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=tiny.ROOT) as parent:
        assert parent.stdout
        assert parent.stdout.readline().strip() == b"[2, 2]"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        for child in children:
            child.terminate()  # they take no notice: their parent would lose its step
        time.sleep(0.2)
        assert all(child.is_running() for child in children)
        end(psutil.Process(parent.pid))
        _, left = psutil.wait_procs(children, timeout=10)
        assert not left
