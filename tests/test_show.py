"""What the notebooks show, on hand-made data whose numbers can be worked out in the head."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kdlib.data.dataset import DataSet, Split
from kdlib.study.display import stages


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


def _split(labels: list[int], channels: int) -> Split:
    """Images whose every pixel is their place in the split."""
    images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 8, 8, channels)).copy()
    return Split(images, np.array(labels, dtype=np.int64))


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def data(request: pytest.FixtureRequest) -> DataSet:
    names = ["ant", "bee", "a very long name of a cat"]
    means = (0.25,) * request.param
    splits = (_split([0, 1, 2, 2, 1, 0, 0], request.param), _split([0, 1, 2], request.param), _split([0, 0, 1, 1, 2, 2], request.param))
    return DataSet("zoo", 3, names, 8, request.param, 0.5, means, means, "f" * 64, *splits)


@pytest.fixture
def answers() -> pd.DataFrame:
    """Images 0 and 3: both right. 1, 2: only the teacher. 4: only the student. 5: both wrong."""
    rows = [(0, 0, 0.9, 0, 0.8), (0, 0, 0.5, 1, 0.5), (1, 1, 0.9, 2, 0.9), (1, 1, 0.6, 1, 0.6), (2, 0, 0.7, 2, 0.4), (2, 1, 0.3, 0, 0.2)]
    return pd.DataFrame(rows, columns=["label", "teacher", "teacher_p", "student", "student_p"])


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    run = {"variant": name, "seed": 0, "parameters": {"weight": 1.0, "temperature": 2.5}, "trial": False}
    (folder / "run.json").write_text(json.dumps(run))
    metrics = {"status": "finished", "diverged_step": None, "images_seen": 36000}
    metrics |= {"val_top1": 0.5, "val_nll": 1.25, "test_top1": 0.4, "test_nll": 1.5}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    curve = {"images_seen": [8, 16, 24], "loss": [3.0, 2.0, 1.5], "val_top1": [None, 0.25, 0.5]}
    pd.DataFrame(curve).to_csv(folder / "curve.csv", index=False)
    return folder


def test_facts(data: DataSet) -> None:
    facts = stages.summary(data)
    assert (facts["train images"], facts["test images"]) == (7, 6)
    assert facts["image"] == f"8 x 8 x {data.channels}"
    assert facts["mean"] == ", ".join(["0.2500"] * data.channels)


def test_classes_shows_each_class_in_its_row(data: DataSet) -> None:
    axes = np.array(stages.images_by_class(data, rows=3, columns=2).axes).reshape(3, 2)
    shown = [[int(axis.images[0].get_array().ravel()[0]) for axis in row] for row in axes]
    assert shown == [[0, 5], [1, 4], [2, 3]]
    assert [row[0].get_ylabel() for row in axes] == data.class_names


def test_balance_counts_every_split(data: DataSet) -> None:
    heights = [[bar.get_height() for bar in axis.patches] for axis in stages.balance(data).axes]
    assert heights == [[3, 2, 2], [1, 1, 1], [2, 2, 2]]


def test_by_class(data: DataSet, answers: pd.DataFrame) -> None:
    found = stages.by_class(data, answers)
    assert list(found.index) == ["a very long name of a cat", "ant", "bee"]  # least agreed on first, then in the order of the classes
    assert found["images"].tolist() == [2, 2, 2]
    assert found["teacher_top1"].tolist() == [0, 1, 1]
    assert found["student_top1"].tolist() == [0.5, 0.5, 0.5]
    assert found["agreement"].tolist() == [0, 0.5, 0.5]


def test_by_class_leaves_out_classes_without_images(data: DataSet, answers: pd.DataFrame) -> None:
    assert list(stages.by_class(data, answers[answers["label"] == 1]).index) == ["bee"]


def test_disagreements(data: DataSet, answers: pd.DataFrame) -> None:
    figure = stages.disagreements(data, answers, columns=2)
    assert figure.get_suptitle() == "zoo: teacher and student differ on 4 of 6 test images"
    rows = np.array(figure.axes).reshape(3, 2)
    shown = [[int(axis.images[0].get_array().ravel()[0]) for axis in row if axis.images] for row in rows]
    assert shown == [[2, 1], [4], [5]]  # in a row, first where both are surest
    assert [row[0].get_ylabel().replace("\n", " ") for row in rows] == [
        "only the teacher is right: 2 images",
        "only the student is right: 1 image",
        "both are wrong: 1 image",
    ]
    assert rows[1, 0].get_xlabel().split("\n") == ["true a very long n…", "teacher ant (70 %)", "student a very long n… (40 %)"]


def test_disagreements_with_fewer_ways_or_none(data: DataSet, answers: pd.DataFrame) -> None:
    assert len(stages.disagreements(data, answers.iloc[:3], columns=5).axes) == 5
    agreed = stages.disagreements(data, answers.iloc[[0, 3]])
    assert agreed.get_suptitle() == "zoo: teacher and student differ on 0 of 2 test images"
    assert not any(axis.images for axis in agreed.axes)


def test_run_puts_validation_and_test_side_by_side(tmp_path: Path) -> None:
    found = stages.describe_run(_folder(tmp_path, "kd"))
    assert list(found.columns) == ["/".join((tmp_path / "kd").parts[-3:])]
    assert found.iloc[:, 0].to_dict() == {
        "variant": "kd",
        "seed": "0",
        "parameters": "weight 1, temperature 2.5",
        "trial": "False",
        "status": "finished",
        "images_seen": "36,000",
        "top1": "0.5000 / 0.4000",
        "nll": "1.2500 / 1.5000",
    }


def test_run_of_a_trial_has_no_test(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "kd")
    (folder / "metrics.json").write_text(json.dumps({"status": "finished", "val_top1": 0.5}))
    assert stages.describe_run(folder).iloc[-1, 0] == "0.5000"


def test_measures(tmp_path: Path) -> None:
    diverged = _folder(tmp_path, "dkd")
    (diverged / "metrics.json").write_text(json.dumps({"status": "diverged", "diverged_step": 0}))
    pd.DataFrame(columns=["images_seen", "loss", "val_top1"]).to_csv(diverged / "curve.csv", index=False)
    named = {"mine": _folder(tmp_path, "kd"), "other": diverged}
    found = stages.measures_of_runs(named)
    assert list(found.columns) == ["status", "training loss", "top1", "nll"]
    assert found.loc["mine"].tolist() == ["finished", 1.5, 0.5, 1.25]
    assert found.loc["other", "status"] == "diverged"
    assert found.loc["other", ["training loss", "top1"]].isna().all()
    assert stages.measures_of_runs(named, "test").loc["mine", "top1"] == 0.4


def test_metrics_drops_what_is_blank_everywhere() -> None:
    found = stages.metrics({"a": {"top1": 0.5, "none": None}, "b": {"top1": 0.25}})
    assert found.to_dict() == {"a": {"top1": 0.5}, "b": {"top1": 0.25}}


def test_runs_and_names(tmp_path: Path) -> None:
    folders = [_folder(tmp_path, "small/kd/seed_0"), _folder(tmp_path, "small/trial/kd.weight_2/seed_0")]
    assert stages.by_name(folders) == {"kd, seed 0": folders[0]}
    assert stages.runs(folders)["test_top1"].tolist() == [0.4, 0.4]
    assert "diverged_cause" not in stages.runs(folders)


def test_curves_colour_runs_by_method(tmp_path: Path) -> None:
    named = {f"{name}, seed {seed}": _folder(tmp_path, f"{name}{seed}") for name in ("kd", "dkd") for seed in (0, 1)}
    left, right = stages.training_curves(named).axes
    assert [line.get_color() for line in left.lines] == ["C0", "C0", "C1", "C1"]
    assert right.lines[0].get_xydata().tolist() == [[16, 25], [24, 50]]  # per cent, where it was measured
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["kd", "dkd"]
