"""What a study will cost: counted, tried for a few steps, and refused where it cannot fit."""

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kdlib.errors import Refused
from kdlib.study.cli import study
from kdlib.study.cost.estimate import Row, largest_group
from kdlib.study.cost.plan import Kind, check_disk, too_large
from kdlib.study.cost.table import WIDTH, frame, notes, screen
from kdlib.study.training.experiment import Experiment
from tests import jpegs, tiny, training
from tests.refusals import refused


def planned(root: Path, made: dict[str, Any], steps: int) -> pd.DataFrame:
    tiny.write(root, made)
    study.plan(root, steps)
    return pd.read_csv(root / study.PLAN).set_index("name")


def on_originals(path: Path | str, **entry: Any) -> dict[str, Any]:
    made = training.content(methods=("kd",), epochs=1.0)
    made["data"] = {"net": jpegs.entry(path, **entry)}
    made["study"]["headline"]["data"] = made["teachers"]["small"]["data"] = made["comparisons"][training.COMPARISON]["data"] = "net"
    for recipe in made["recipes"].values():
        recipe |= {"crop_min_area": 0.08, "crop_padding": 0.0}
    return made


def test_images_operations_hours_memory_and_disk(tmp_path: Path) -> None:
    made = training.content(methods=("no_kd", "kd"), epochs=2.0, seeds=(0, 1))
    found = planned(tmp_path, made, 2)
    row, recipe = found.loc[training.COMPARISON], made["recipes"]["strong"]
    data = made["data"]["fractals"]
    steps = -(-2 * data["classes"] * data["train_per_class"] // recipe["batch_size"])
    assert (row["runs"], row["images"]) == (4, 4 * steps * recipe["batch_size"])
    assert set(found["what"]) == {"teacher", "comparison"}
    columns = ["flops", "images_a_second", "hours", "wall_hours", "peak_bytes", "checkpoint_bytes", "weights_bytes"]
    assert (found[columns] > 0).all().all()


def test_without_steps_nothing_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, training.content(methods=("kd",)), 0)
    assert found[["hours", "images_a_second", "peak_bytes"]].isna().all().all()
    assert (found["flops"] > 0).all()
    assert "total" in capsys.readouterr().out


def test_a_run_of_two_comparisons_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = training.content(methods=("kd", "dkd"))
    alone = planned(tmp_path / "alone", made, 0).loc[training.COMPARISON]
    more = made["comparisons"][training.COMPARISON] | {"methods": ["kd", "dist"]}
    made["comparisons"] |= {"same": copy.deepcopy(made["comparisons"][training.COMPARISON]), "some": more}
    made["comparisons"]["whole"] = more | {"fraction": 1.0}
    found = planned(tmp_path / "all", made, 0)
    assert found.loc[[training.COMPARISON, "same", "some", "whole"], "runs"].tolist() == [2, 0, 1, 2]
    assert found.loc[["same", "some", "whole"], "shared"].tolist() == [2, 1, 0]
    assert found.loc["same", "images"] == 0
    assert found.loc[training.COMPARISON, "flops"] == alone["flops"]
    assert "3 runs that an earlier comparison makes too" in capsys.readouterr().out


def test_originals_that_nobody_counted_are_taken_for_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, on_originals("$NOWHERE", val_fraction=0.002), 0)
    assert found.loc[training.COMPARISON, "images"] == pytest.approx(1_281_167 * 0.998, rel=1e-3)
    assert "net: counted as ImageNet's official images" in capsys.readouterr().out


def test_decoding_is_timed_once_the_images_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = on_originals(jpegs.write(tmp_path / "in"))
    tiny.write(tmp_path / "study", made)
    Experiment(tmp_path / "study").prepare_data("net")
    quick = planned(tmp_path / "study", made, 1).loc[training.COMPARISON]
    assert quick["decoding"] > 0
    monkeypatch.setattr("kdlib.study.cost.measure.decoding", lambda *_: 10.0)  # seconds for each view
    slow = planned(tmp_path / "study", made, 1).loc[training.COMPARISON]
    assert slow["hours"] == pytest.approx(slow["images"] * 10 / 3600, rel=0.1)
    assert slow["decoding"] > 10


def test_decoding_that_takes_longer_than_training_is_told() -> None:
    rows = [Row("comparison", name, "net", "resnet50", "large", "a2", 3, decoding=share) for name, share in (("t2", 0.9), ("t3", 2.04))]
    told = [note for note in notes(rows, "a GPU", 1, 1, []) if "decoding" in note]
    assert told == ["t3: reading and decoding take 2 times what training takes; more cores would help"]


def test_hours_of_a_gpu_are_named_so_in_lines_that_fit_a_screen() -> None:
    known = {"images": 10**9, "flops": 10**20, "images_a_second": 3e3, "hours": 98.6}
    rows = [Row("comparison", "a_rather_long_name_of_one", "net", "convnextv2_tiny" * 3, "large", "a2", 3, **known)]
    for on_gpu, head in ((True, "GPU time"), (False, "time")):
        heads, line, _ = screen(rows, on_gpu).splitlines()
        assert head in [one.strip() for one in heads.split("  ")]
        assert line.endswith("98.6 h")
        assert len(heads) <= WIDTH


def test_operations_may_be_too_many_for_64_bits() -> None:
    made = frame([Row("comparison", "t3", "net", "resnet50", "large", "a2", 3, images=10**9, flops=10**20)])
    assert made["flops"].tolist() == [1e20]


def test_a_group_too_large_for_the_memory_is_refused_with_the_one_that_fits() -> None:
    kind = Kind("net", "large", "resnet50", None, "a2", ("kd", "dkd"), 1)
    raised = too_large(kind, "comparisons.t3", 256, 200 * 10**9, 80 * 10**9, lambda group: group * 10**9)
    assert "recipes.a2.group_size" in str(raised)
    assert "at most 64" in str(raised)
    assert "comparisons.t3 takes 200 GB" in str(raised)
    nothing = too_large(kind, "comparisons.t3", 256, None, 80 * 10**9, lambda _: None)
    assert "a smaller student" in str(nothing)


@pytest.mark.parametrize(("group", "found"), [(64, 64), (96, 48), (99, None)])
def test_the_largest_group_is_a_half_of_a_half(group: int, found: int | None) -> None:
    assert largest_group(lambda size: size, group, 64) == found


def test_memory_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlib.study.cost.measure.room", lambda _: 1000)
    tiny.write(tmp_path, training.content(methods=("kd",)))
    with pytest.raises(Refused, match=r"recipes\.\w+\.group_size.*does not fit"):
        study.plan(tmp_path, 1)


def test_a_disk_that_is_too_small_is_refused() -> None:
    needs = Row("", "total", "", "", None, "", 3, weights_bytes=4 * 10**9, checkpoint_bytes=10**9, answers_bytes=20 * 10**9)
    check_disk(needs, 25 * 10**9)
    with refused("study.answers_gb", "25 GB", "set it to 0"):
        check_disk(needs, 24 * 10**9)
    with refused("study.seeds", "fewer of them"):
        check_disk(needs, 4 * 10**9)
