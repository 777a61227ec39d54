"""Data sets written to disk in the formats of their makers, and read back pixel by pixel; every bad input in one line."""

import hashlib
import json
import os
import pickle
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR100

from kdlib.config.schema import Cifar100, DataSource, Digits, Folder, Imagenet
from kdlib.data import dataset, sources
from kdlib.data.splits import stratified_split, subset
from kdlib.errors import Refused
from tests import cifar_pickles

DIGITS = Digits(source="digits", val_fraction=0.2, test_fraction=0.3, seed=0, hflip=0.0)
PARTS = ("train", "val", "test")


def picture(label: int, number: int, width: int = 8, height: int = 8) -> np.ndarray:
    """An image whose pixels say which one it is and where they lie."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 16 * label + number
    image[..., 1] = 10 * np.arange(height)[:, None]
    image[..., 2] = 10 * np.arange(width)
    return image


def write_tree(root: Path, classes: list[str], count: int) -> None:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture(label, number)).save(root / name / f"{number:02d}.png")


def folder(path: Path, **change: object) -> Folder:
    params = {"source": "folder", "path": str(path), "size": 8, "val_fraction": 0.25, "test_fraction": 0.25, "seed": 0, "hflip": 0.5}
    return Folder.model_validate(params | change)


def imagenet(path: Path) -> Imagenet:
    return Imagenet(source="imagenet", path=str(path), size=8, val_fraction=0.25, seed=0, hflip=0.5)


def cifar(path: Path) -> Cifar100:
    return Cifar100(source="cifar100", path=str(path), download=False, val_fraction=0.25, seed=0, hflip=0.5)


def pairs(split: dataset.Split) -> list[tuple[int, int]]:
    """(label, number) of each image, after checking that its pixels are exactly those of ``picture``."""
    out = []
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        number = int(image[0, 0, 0]) - 16 * label
        np.testing.assert_array_equal(image, picture(label, number))
        out.append((label, number))
    return out


def refused(name: str, params: DataSource, out: Path) -> str:
    """The one line of the refusal, after checking that nothing was left behind."""
    with pytest.raises(Refused) as caught:
        sources.prepare(name, params, out / name, progress=False)
    assert not any(path.is_file() and path.suffix != ".lock" for path in out.rglob("*")) and not (out / name).exists()
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"params.yaml: data.{name}")
    return line


# Reading exactly


def test_digits_hold_every_image_once_by_the_documented_grey_rule(tmp_path: Path) -> None:
    made = sources.prepare("digits", DIGITS, tmp_path / "digits", progress=False)
    raw = load_digits()
    expected = sorted(
        (label, bytes(int(np.floor(v * 255 / 16 + 0.5)) for v in image.ravel()))
        for image, label in zip(raw.images, raw.target, strict=True)
    )
    found = [
        (label, image.tobytes())
        for part in PARTS
        for image, label in zip(getattr(made, part).images, getattr(made, part).labels, strict=True)
    ]
    assert sorted(found) == expected
    assert (made.classes, made.size, made.channels, made.hflip) == (10, 8, 1, 0.0)
    share = [np.bincount(getattr(made, part).labels) / np.bincount(raw.target) for part in PARTS]
    np.testing.assert_allclose(share, [[0.5] * 10, [0.2] * 10, [0.3] * 10], atol=0.006)


def test_folder_holds_every_pixel_at_native_size_and_ignores_what_is_no_image(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", ["class10", "class9", "Ape", "ape"], 8)
    (tmp_path / "in" / "class9" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "LICENSE").write_text("not an image")
    (tmp_path / "in" / ".hidden").mkdir()
    made = sources.prepare("pets", folder(tmp_path / "in"), tmp_path / "out", progress=False)
    assert made.class_names == ["Ape", "ape", "class9", "class10"]  # natural order, and the same on every file system
    numbering = {0: 2, 1: 3, 2: 1, 3: 0}  # from these classes to the order in which write_tree wrote them
    seen = []
    for part, count in zip(PARTS, (4, 2, 2), strict=True):
        split = getattr(made, part)
        assert np.bincount(split.labels).tolist() == [count] * 4
        written = dataset.Split(split.images, np.array([numbering[label] for label in split.labels.tolist()]))
        seen += pairs(written)
    assert sorted(seen) == [(label, number) for label in range(4) for number in range(8)]


def test_folder_cuts_the_centre_out_and_resizes_the_short_side(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", ["a", "b"], 4)
    for name in "ab":
        for file in sorted((tmp_path / "in" / name).iterdir()):
            wide = np.zeros((8, 14, 3), np.uint8)
            wide[:, 3:11] = picture(0, int(file.stem))
            Image.fromarray(wide if name == "a" else wide.repeat(5, 0).repeat(5, 1)).save(file)
    made = sources.prepare("pets", folder(tmp_path / "in"), tmp_path / "out", progress=False)
    by_class = [
        np.stack([image for part in PARTS for image in getattr(made, part).images[getattr(made, part).labels == label]]) for label in (0, 1)
    ]
    for image in by_class[0]:
        np.testing.assert_array_equal(image, picture(0, int(image[0, 0, 0])))
    for image in by_class[1]:  # five times as large: bicubic with antialiasing comes near to the original
        number = int(image[4, 4, 0])
        assert np.abs(image[1:-1, 1:-1].astype(int) - picture(0, number)[1:-1, 1:-1]).max() <= 1


def test_folder_reads_grey_and_palette_and_jpeg_as_rgb(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
        grey.save(tmp_path / "in" / name / "grey.png")
        grey.convert("P").save(tmp_path / "in" / name / "palette.png")
        grey.save(tmp_path / "in" / name / "photo.JPEG", quality=95)
    made = sources.prepare("pets", folder(tmp_path / "in"), tmp_path / "out", progress=False)
    for part in PARTS:
        assert (np.abs(getattr(made, part).images.astype(int) - 77) <= 1).all()


def test_imagenet_keeps_the_official_validation_split_for_the_test(tmp_path: Path) -> None:
    names = ["n01440764", "n01443537", "n02084071"]
    write_tree(tmp_path / "in" / "train", names, 8)
    write_tree(tmp_path / "in" / "val", names, 3)
    made = sources.prepare("imagenet", imagenet(tmp_path / "in"), tmp_path / "out", progress=False)
    assert made.class_names == names
    assert pairs(made.test) == [(label, number) for label in range(3) for number in range(3)]
    assert sorted(pairs(made.train) + pairs(made.val)) == [(label, number) for label in range(3) for number in range(8)]
    assert (len(made.train.labels), len(made.val.labels)) == (18, 6)


@pytest.fixture
def pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-100 (3 classes, 8 + 2 images each) in the layout of its python version, known to torchvision by MD5."""
    parts = {}
    for file, count in (("train", 8), ("test", 2)):
        labels = [label for _ in range(count) for label in range(3)]
        parts[file] = np.stack([picture(label, i // 3, 32, 32).transpose(2, 0, 1).ravel() for i, label in enumerate(labels)]), labels
    return cifar_pickles.write(tmp_path / "in", ["apple", "bear", "cup"], parts, monkeypatch)


def test_cifar100_reads_its_pickles(pickles: Path, tmp_path: Path) -> None:
    made = sources.prepare("cifar100", cifar(pickles), tmp_path / "out", progress=False)
    assert (made.class_names, made.size, made.channels) == (["apple", "bear", "cup"], 32, 3)
    found = {}
    for part in PARTS:
        split = getattr(made, part)
        found[part] = [(label, int(image[0, 0, 0]) - 16 * label) for image, label in zip(split.images, split.labels.tolist(), strict=True)]
        for image, (label, number) in zip(split.images, found[part], strict=True):
            np.testing.assert_array_equal(image, picture(label, number, 32, 32))
    assert found["test"] == [(label, number) for number in range(2) for label in range(3)]
    assert sorted(found["train"] + found["val"]) == [(label, number) for label in range(3) for number in range(8)]
    assert len(found["val"]) == 6


# The folder


def test_facts_are_those_of_the_training_split(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", ["a", "b", "c"], 8)
    made = sources.prepare("pets", folder(tmp_path / "in"), tmp_path / "out", progress=False)
    values = made.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(made.mean, values.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(made.std, values.std((0, 1, 2)), rtol=1e-12)
    facts = json.loads((tmp_path / "out" / "data.json").read_text())
    assert facts["counts"] == {"train": 12, "val": 6, "test": 6}
    assert isinstance(made.train.images, np.memmap) and made.train.images.dtype == np.uint8 and made.train.labels.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        made.train.images[0] = 0


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "in", ["a", "b", "c"], 8)
    whole = sources.prepare("pets", folder(tmp_path / "in"), tmp_path / "whole", progress=False)
    monkeypatch.setattr("kdlib.data.sources.folder.BLOCK", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    parts = sources.prepare("pets", folder(tmp_path / "in"), tmp_path / "parts", progress=False)
    assert whole.fingerprint == parts.fingerprint
    np.testing.assert_array_equal(whole.train.images, parts.train.images)


def test_the_fingerprint_knows_content_and_not_place(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", ["a", "b"], 8)
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    base = sources.prepare("x", folder(tmp_path / "in"), tmp_path / "1", progress=False).fingerprint
    assert sources.prepare("y", folder(tmp_path / "copy"), tmp_path / "2", progress=False).fingerprint == base
    for change in ({"seed": 1}, {"hflip": 0.0}, {"size": 9}, {"val_fraction": 0.4}):
        assert sources.prepare("x", folder(tmp_path / "in", **change), tmp_path / "3", progress=False).fingerprint != base
    Image.fromarray(picture(1, 9)).save(tmp_path / "copy" / "b" / "00.png")
    assert sources.prepare("x", folder(tmp_path / "copy"), tmp_path / "4", progress=False).fingerprint != base


def test_the_fingerprint_knows_the_labels(tmp_path: Path) -> None:
    made = []
    for labels in (np.array([0, 1]), np.array([1, 0])):
        content = dataset.Content(
            ["a", "b"], 8, 3, dict.fromkeys(PARTS, labels), lambda _: iter([np.stack([picture(0, 0), picture(0, 1)])])
        )
        made.append(dataset.write_dataset(tmp_path / "x", "x", DIGITS, content, progress=False).fingerprint)
    assert made[0] != made[1]


def test_a_relative_path_starts_at_params_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "my images", ["a", "b"], 4)
    (tmp_path / "params.yaml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert sources.prepare("pets", folder(Path("my images")), tmp_path / "out", progress=False).classes == 2


def test_preparing_again_replaces_the_folder_and_what_a_killed_process_left(tmp_path: Path) -> None:
    sources.prepare("digits", DIGITS, tmp_path / "digits", progress=False)
    (tmp_path / ".digits.partial").mkdir()
    (tmp_path / ".digits.partial" / "train_images.npy").write_bytes(b"half")
    other = DIGITS.model_copy(update={"seed": 1})
    made = sources.prepare("digits", other, tmp_path / "digits", progress=False)
    assert dataset.load_dataset(tmp_path / "digits").fingerprint == made.fingerprint
    assert {path.name for path in tmp_path.iterdir()} <= {"digits", ".digits.lock"}


def test_progress_is_announced_with_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources.prepare("digits", DIGITS, tmp_path / "digits")
    shown = capsys.readouterr()
    assert "1,797 images of 8 x 8 x 1 take 0.000129 GB" in shown.out
    assert "1797/1797" in shown.err


# Bad input


def _cut(file: Path, length: int) -> None:
    os.truncate(file, length)


def _keep_two(place: Path) -> None:
    for file in sorted(place.iterdir())[2:]:
        file.unlink()


def _empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


# what is wrong: (how to make it so, what the line must say)
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "a folder that exists"),
    "no images": (_empty, "at least 2 classes"),
    "one class": (lambda root: shutil.rmtree(root / "b"), "at least 2 classes"),
    "empty class": (lambda root: (root / "c").mkdir(), "/in/c'"),
    "truncated": (lambda root: _cut(root / "a" / "03.png", 60), "a/03.png"),
    "empty file": (lambda root: _cut(root / "b" / "02.png", 0), "b/02.png"),
    "no image inside": (lambda root: (root / "b" / "02.png").write_bytes(b"hello"), "b/02.png"),
    "outside": (lambda root: shutil.copy(root / "a" / "00.png", root / "00.png"), "/in/00.png"),
    "deeper": (lambda root: shutil.copytree(root / "a", root / "b" / "more"), "b/more/00.png"),
    "too few": (lambda root: _keep_two(root / "b"), "2 images of class 'b'"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_bad_folder_is_refused(tmp_path: Path, what: str) -> None:
    write_tree(tmp_path / "in", ["a", "b"], 8)
    damage, said = BAD_FOLDERS[what]
    damage(tmp_path / "in")
    line = refused("pets", folder(tmp_path / "in"), tmp_path / "out")
    assert line.startswith("params.yaml: data.pets.path: found ")
    assert said in line


def test_imagenet_refuses_other_classes_flat_validation_images_and_a_missing_part(tmp_path: Path) -> None:
    write_tree(tmp_path / "in" / "train", ["n1", "n2", "n3"], 4)
    assert "/in/val" in refused("big", imagenet(tmp_path / "in"), tmp_path / "out")
    write_tree(tmp_path / "in" / "val", ["n1", "n3"], 2)
    assert "n2" in refused("big", imagenet(tmp_path / "in"), tmp_path / "out")
    shutil.copy(tmp_path / "in" / "val" / "n1" / "00.png", tmp_path / "in" / "val" / "ILSVRC2012_val_00000001.png")
    assert "ILSVRC2012_val_00000001.png" in refused("big", imagenet(tmp_path / "in"), tmp_path / "out")
    assert "train/ and val/" in refused("big", imagenet(tmp_path / "nowhere"), tmp_path / "out")


def test_cifar100_refuses_a_missing_or_damaged_archive(pickles: Path, tmp_path: Path) -> None:
    assert "download: true" in refused("cifar100", cifar(tmp_path / "nowhere"), tmp_path / "out")
    (pickles / "cifar-100-python" / "test").write_bytes(b"damaged")
    assert "unpack the archive anew" in refused("cifar100", cifar(pickles), tmp_path / "out")


def test_cifar100_refuses_a_class_that_only_the_training_split_has(pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pickles / "cifar-100-python" / "test"
    content = pickle.loads(file.read_bytes())
    content["fine_labels"] = [0, 1, 0, 0, 1, 0]
    file.write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR100, "test_list", [["test", hashlib.md5(file.read_bytes()).hexdigest()]])
    line = refused("cifar100", cifar(pickles), tmp_path / "out")
    assert "'cup' in the test split" in line


def test_held_out_parts_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    params = DIGITS.model_copy(update={"val_fraction": 0.5, "test_fraction": 0.5})
    assert "left to train on" in refused("digits", params, tmp_path)


def test_a_disk_without_room_is_refused_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.prepare("digits", DIGITS, tmp_path / "digits", progress=False)
    before = dataset.load_dataset(tmp_path / "digits").fingerprint
    other = DIGITS.model_copy(update={"seed": 1})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
        with pytest.raises(Refused, match=r"data\.digits: found '1e-06 GB free in .*at least 0\.000129 GB"):
            sources.prepare("digits", other, tmp_path / "digits", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_images", _raise(OSError(28, "No space left on device")))
        with pytest.raises(Refused, match="full disk"):
            sources.prepare("digits", other, tmp_path / "digits", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_images", _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sources.prepare("digits", other, tmp_path / "digits", progress=False)
    assert dataset.load_dataset(tmp_path / "digits").fingerprint == before
    assert {path.name for path in tmp_path.iterdir()} <= {"digits", ".digits.lock"}


def _raise(error: BaseException) -> Callable[..., None]:
    def function(*_: object) -> None:
        raise error

    return function


def _edit(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((place / "data.json").read_text())
    change(facts)
    (place / "data.json").write_text(json.dumps(facts))


INCOMPLETE: dict[str, Callable[[Path], object]] = {
    "no data.json": lambda place: (place / "data.json").unlink(),
    "not json": lambda place: (place / "data.json").write_text("{"),
    "key missing": lambda place: _edit(place, lambda facts: facts.pop("mean")),
    "other count": lambda place: _edit(place, lambda facts: facts["counts"].update(test=7)),
    "no images": lambda place: (place / "val_images.npy").unlink(),
    "short images": lambda place: _cut(place / "train_images.npy", 1000),
    "empty labels": lambda place: _cut(place / "train_labels.npy", 0),
    "other labels": lambda place: np.save(place / "test_labels.npy", np.load(place / "test_labels.npy").astype(np.int32)),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_data_set_folder_is_refused(tmp_path: Path, what: str) -> None:
    sources.prepare("digits", DIGITS, tmp_path / "digits", progress=False)
    INCOMPLETE[what](tmp_path / "digits")
    with pytest.raises(Refused, match=r"^params\.yaml: data\.digits: found [^\n]*run the data stage again$"):
        dataset.load_dataset(tmp_path / "digits")


# Splitting


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.001, 1.0), st.integers(0, 2**40))
def test_a_subset_is_stratified_sorted_and_repeatable(classes: list[int], fraction: float, seed: int) -> None:
    labels = np.array(classes, np.int64)
    chosen = subset(labels, fraction, seed)
    assert (np.diff(chosen) > 0).all()
    for label in set(classes):
        assert np.count_nonzero(labels[chosen] == label) == max(1, round(fraction * classes.count(label)))
    np.testing.assert_array_equal(chosen, subset(labels, fraction, seed))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.integers(0, 2**40))
def test_subsets_of_one_seed_are_nested(classes: list[int], one: float, other: float, seed: int) -> None:
    """So the 30 % of a study lie within its 60 %, and those within all."""
    labels = np.array(classes, np.int64)
    small, large = (set(subset(labels, fraction, seed)) for fraction in sorted((one, other)))
    assert small <= large


def test_thirty_and_sixty_percent_of_classes_as_uneven_as_imagenets_are_stratified_to_one_image() -> None:
    """ImageNet's classes have 732 to 1,300 training images."""
    counts = np.random.default_rng(0).integers(732, 1301, 100)
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(100), counts))
    for share in (0.3, 0.6):
        held = np.bincount(labels[subset(labels, share, 0)], minlength=100)
        assert np.abs(held - share * counts).max() <= 0.5
        assert abs(held.sum() - share * counts.sum()) < 30  # the roundings of 100 classes, which mostly cancel


def test_a_subset_depends_on_its_seed_and_the_whole_is_the_whole() -> None:
    labels = np.repeat(np.arange(5), 40)
    assert not np.array_equal(subset(labels, 0.1, 0), subset(labels, 0.1, 1))
    np.testing.assert_array_equal(subset(labels, 1.0, 0), np.arange(200))
    drawn = np.bincount(np.concatenate([subset(labels, 0.1, seed) for seed in range(400)]), minlength=200)
    assert drawn.min() > 15 and drawn.max() < 70  # every image is drawn about 40 times: no place is preferred


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.2, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(Refused, match="fraction"):
        subset(np.arange(3), fraction, 0)


@given(st.lists(st.integers(4, 40), min_size=1, max_size=5), st.floats(0.01, 0.3), st.floats(0.01, 0.3), st.integers(0, 2**40))
def test_a_split_is_stratified_disjoint_and_exhaustive(counts: list[int], val: float, test: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    parts = stratified_split(labels, (val, test), seed, "data.x", "abcde")
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for share, part in zip((val, test), parts[1:], strict=True):
        assert np.bincount(labels[part]).tolist() == [max(1, round(share * count)) for count in counts]
