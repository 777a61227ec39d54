"""Data sets that Hugging Face's `datasets` saved: the same images and views as from files, and as timm's reader gives them; bad input."""

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from timm.data.readers.reader_hfds import ReaderHfds

from kdlib.config.schema import Originals
from kdlib.data import lazy_images
from kdlib.data.dataset import DataSet
from kdlib.data.sources import huggingface
from kdlib.decoding import pixels
from kdlib.decoding.pool import Pool
from tests import jpegs
from tests.refusals import refused
from tests.test_originals import params, prepared, stream
from tests.test_views import same


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bars of `datasets`, and no process but this one decodes."""
    monkeypatch.setattr(lazy_images, "pool", lambda: Pool(0))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jpegs.write(tmp_path_factory.mktemp("imagenet") / "in")


@pytest.fixture(scope="module")
def listed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepared(tmp_path_factory.mktemp("listed"), params(root))


@pytest.fixture(scope="module")
def saved(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jpegs.to_arrow(root, tmp_path_factory.mktemp("hf") / "saved")


def arrow(path: Path, **changes: object) -> Originals:
    return params(path, stored="huggingface", **changes)


def test_the_same_images_and_views_as_from_files(saved: Path, listed: DataSet, tmp_path: Path) -> None:
    found = prepared(tmp_path, arrow(saved))
    assert found.class_names == listed.class_names
    for ours, theirs in ((found.train, listed.train), (found.val, listed.val), (found.test, listed.test)):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.images[:], theirs.images[:])
    assert all(same(stream(found).batch(step, 2), stream(listed).batch(step, 2)) for step in range(3))


def test_every_image_has_the_bytes_and_the_class_that_timms_reader_gives(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm reads what ``load_dataset`` does; from what is saved, here."""
    names, parts = huggingface.index_arrow("data.net.path", saved)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, **_: datasets.load_from_disk(name)[split])
    for part, split in (("train", "train"), ("val", "validation")):
        reader = ReaderHfds(str(saved), split=split)
        assert len(reader) == len(parts[part])
        for number, stored in enumerate(parts[part]):
            if stored.length:  # timm would open a file of that name
                image, label = reader[number]
                assert Path(stored.file).read_bytes()[stored.first :][: stored.length] == image.read()
                assert names[label] == stored.kind


def test_what_load_dataset_made_of_image_folders_brings_the_bytes_along(root: Path, listed: DataSet, tmp_path: Path) -> None:
    loaded = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    found = prepared(tmp_path, arrow(tmp_path / "saved"))
    np.testing.assert_array_equal(found.test.images[:], listed.test.images[:])


def test_classes_keep_the_numbers_that_the_data_set_gives_them(root: Path, tmp_path: Path) -> None:
    """As teachers know them: not the order of their names."""
    turned = list(reversed(jpegs.CLASSES))
    loaded = datasets.load_from_disk(str(jpegs.to_arrow(root, tmp_path / "saved")))
    loaded.cast_column("label", datasets.Value("string")).map(lambda row: {"label": jpegs.CLASSES[int(row["label"])]}).cast_column(
        "label", datasets.ClassLabel(names=turned)
    ).save_to_disk(str(tmp_path / "turned"))
    found = prepared(tmp_path, arrow(tmp_path / "turned"))
    assert found.class_names == turned
    assert by_class(found)[turned[0]] == by_class(prepared(tmp_path / "b", params(root)))[turned[0]]


def by_class(found: DataSet) -> dict[str, set[bytes]]:
    """The bytes of the test images of each class."""
    images = [pixels.read_bytes(found.test.images.byte_range(row)) for row in range(len(found.test.images))]
    return {name: {images[row] for row in np.flatnonzero(found.test.labels == number)} for number, name in enumerate(found.class_names)}


def test_val_and_other_names_of_columns_will_do(root: Path, listed: DataSet, tmp_path: Path) -> None:
    found = prepared(tmp_path, arrow(jpegs.to_arrow(root, tmp_path / "saved", "val", {"image": "jpg", "label": "wnid"})))
    np.testing.assert_array_equal(found.test.images[:], listed.test.images[:])


def test_it_may_be_moved_once_it_is_saved(saved: Path, tmp_path: Path) -> None:
    first = prepared(tmp_path / "a", arrow(saved))
    assert prepared(tmp_path / "b", arrow(jpegs.copied(saved, tmp_path / "elsewhere"))).fingerprint == first.fingerprint


def test_images_that_cannot_be_read_are_named(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = datasets.load_from_disk(str(saved)).cast_column("image", datasets.Image(decode=False))
    loaded.map(lambda row, i: {"image": None if i == 5 else row["image"]}, with_indices=True).save_to_disk(str(tmp_path / "gaps"))
    found = prepared(tmp_path, arrow(tmp_path / "gaps"))
    assert "leaves out 5 of 75 images" in capsys.readouterr().out
    left_out = found.train.images.folder / "data.json"
    assert all(Path(name).stem in left_out.read_text() for name in jpegs.BROKEN)


def unlabelled(rows: datasets.DatasetDict) -> datasets.DatasetDict:
    return rows.map(lambda row, i: {"label": -1 if i == 5 else row["label"]}, with_indices=True)


def without_val(rows: datasets.DatasetDict) -> datasets.DatasetDict:
    return datasets.DatasetDict({"train": rows["train"], "test": rows["validation"]})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (unlabelled, ("row 5 without a class", "filter it")),
        (without_val, ("with train, test", "train and validation")),
        (lambda rows: rows["train"], ("with no splits", "train and validation")),
        (lambda rows: rows.remove_columns("label"), ("0 columns of kind ClassLabel among image", "one of ClassLabel")),
        (
            lambda rows: rows.map(lambda row: {"again": row["image"]}).cast_column("again", datasets.Image()),
            ("2 columns of kind Image among image, label, again", "select_columns"),
        ),
    ],
    ids=["no class", "no validation", "one split", "no classes", "two images"],
)
def test_a_data_set_without_an_image_and_a_class_for_each_row_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[datasets.DatasetDict], datasets.DatasetDict], parts: tuple[str, ...]
) -> None:
    loaded = datasets.load_from_disk(str(saved)).cast_column("image", datasets.Image(decode=False))
    change(loaded).save_to_disk(str(tmp_path / "changed"))
    with refused("data.net.path", *parts):
        prepared(tmp_path, arrow(tmp_path / "changed"))


def test_a_folder_of_another_kind_is_refused(root: Path, tmp_path: Path) -> None:
    for path in (root, tmp_path / "nowhere"):
        with refused("data.net.path", str(path), "a folder that `datasets` saved", "save_to_disk"):
            prepared(tmp_path, arrow(path))


def test_a_file_that_is_cut_off_is_refused(saved: Path, tmp_path: Path) -> None:
    moved = jpegs.copied(saved, tmp_path / "cut")
    file = moved / "train" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with refused("data.net.path", str(moved), "a folder that `datasets` saved"):
        prepared(tmp_path, arrow(moved))


def test_the_package_that_is_missing_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("datasets", "found no such package", 'pip install -e ".[huggingface]"'):
        prepared(tmp_path, arrow(saved))
