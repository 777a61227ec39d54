"""Run directories on disk -> frames and files."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from kdlib.errors import Refused
from kdlib.files import to_csv, write_csv, write_json, write_text
from kdlib.study.report import collect
from kdlib.study.training import planned
from tests import builders


@pytest.fixture(scope="module")
def study_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[planned.Run]]:
    root = tmp_path_factory.mktemp("a study with spaces")
    return root, builders.study_on_disk(root, builders.params())


def test_collect_reads_what_is_expected_in_the_order_asked(study_root: tuple[Path, list[planned.Run]]) -> None:
    root, expected = study_root
    wanted = [expected[-1], expected[0]]
    frame = collect.collect(root, wanted)
    assert list(frame.columns) == collect.COLUMNS
    assert list(zip(frame["comparison"], frame["variant"], frame["seed"], strict=True)) == wanted
    assert len(collect.collect(root, expected)) == len(expected) == 4 * 4 * 3 + 8 + 6
    assert frame.loc[1, "test_top1"] == 0.60
    assert json.loads(frame.loc[0, "parameters"]) == {**builders.METHODS["dkd"], **builders.CHOSEN["dkd"]}


def test_runs_csv_says_the_same_after_reading_it_back(study_root: tuple[Path, list[planned.Run]], tmp_path: Path) -> None:
    root, expected = study_root
    frame = collect.collect(root, expected)
    write_csv(tmp_path / "results" / "runs.csv", frame)
    again = collect.read_runs(tmp_path / "results" / "runs.csv")
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    assert to_csv(again).encode() == (tmp_path / "results" / "runs.csv").read_bytes()


def test_runs_csv_by_hand(tmp_path: Path) -> None:
    run, metrics = next(pair for pair in builders.descriptions(builders.params()) if pair[0]["trial"])
    text = to_csv(collect.collect(tmp_path, [builders.write(tmp_path, run, metrics)]))
    head, row = text.removesuffix("\n").split("\n")
    assert head == ",".join(collect.COLUMNS)
    assert row == (
        "tune,digits,10,0.100000,100,big,net,weak,ce,kd,trial/kd.temperature_1.weight_1,logits,False,"
        '"{""hard_weight"":1.0,""weight"":1.0,""temperature"":1.0}",0,True,ffffffff,'
        "finished,,,2000,500,12345,0,0,3145728,2000000000000,9000000000000,"
        "0.610000,1.000000,1.390000,0.061000,0.610000,0.390000,,,,,,"
    )


def test_a_diverged_run_is_a_row_without_measures(tmp_path: Path) -> None:
    run, metrics = next(pair for pair in builders.descriptions(builders.params()) if not pair[0]["trial"])
    frame = collect.collect(tmp_path, [builders.write(tmp_path, run, builders.diverged(metrics))])
    assert frame.loc[0, ["status", "diverged_step"]].to_list() == ["diverged", 17]
    assert frame.filter(regex="^(val|test)_").isna().all(axis=None)


def test_missing_runs_are_counted_and_named(tmp_path: Path) -> None:
    expected = builders.study_on_disk(tmp_path, builders.params())
    for seed in (1, 2):
        (planned.run_folder(tmp_path, ("small_weak", "dkd", seed)) / "metrics.json").unlink()
    for read in (collect.collect, collect.curves, collect.timing):
        with pytest.raises(Refused, match=r"2 of 62 .*small_weak/dkd/seed_1.*small_weak/dkd/seed_2.*`dvc repro`") as refused:
            read(tmp_path, expected)
        assert "\n" not in str(refused.value)
    others = [run for run in expected if run[:2] != ("small_weak", "dkd")]
    assert len(collect.collect(tmp_path, others)) == 59, "runs that nobody expects are not looked at"


def test_a_folder_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    expected = builders.study_on_disk(tmp_path, builders.params())
    folder = planned.run_folder(tmp_path, ("small_weak", "dkd", 0))
    folder.rename(folder.with_name("seed_7"))
    with pytest.raises(Refused, match="folder was moved"):
        collect.collect(tmp_path, [expected[0], ("small_weak", "dkd", 7)])


def test_curves_and_timing_carry_the_run(study_root: tuple[Path, list[planned.Run]]) -> None:
    root, _ = study_root
    wanted = [("small_weak", "kd", 2), ("large_weak", "dkd", 0)]
    curves = collect.curves(root, wanted)
    assert list(curves.columns) == ["comparison", "variant", "seed", "epoch", "step", "images_seen", "loss", "loss_hard", "val_top1"]
    assert list(zip(curves["comparison"], curves["variant"], curves["seed"], strict=True)) == [run for run in wanted for _ in range(2)]
    assert curves["val_top1"].isna().to_list() == [True, False, True, False]
    timing = collect.timing(root, wanted)
    assert timing["student_seconds"].to_list() == [30.0, 10.0]
    assert timing["teacher_seconds_share"].to_list() == [2.5, 0.5]


def test_teachers(tmp_path: Path) -> None:
    for name in ("trained", "loaded"):
        write_json(tmp_path / planned.TEACHERS / name / "metrics.json", {"test_top1": 0.5})
    (tmp_path / planned.TEACHERS / "trained" / "curve.csv").write_text("epoch,loss,val_top1\n1,2.0,0.4\n")
    assert collect.teachers(tmp_path, ["loaded", "trained"]).to_dict("list") == {"teacher": ["loaded", "trained"], "test_top1": [0.5, 0.5]}
    assert collect.teacher_curves(tmp_path, ["loaded", "trained"])["teacher"].to_list() == ["trained"]
    with pytest.raises(Refused, match="runs/teacher/nobody"):
        collect.teachers(tmp_path, ["trained", "nobody"])


def test_write_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "file.json"
    write_json(path, {"b": 1, "a": [0.1, None, "é"]})
    assert path.read_bytes() == '{\n  "b": 1,\n  "a": [\n    0.1,\n    null,\n    "é"\n  ]\n}\n'.encode()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"b": 1, "a": [0.1, None, "é"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_json_knows_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
