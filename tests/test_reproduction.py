"""Published numbers beside measured ones, and tables of a study of which some comparisons were made."""

import math
import shutil
from pathlib import Path

import pytest

from kdlib.config.schema import Params
from kdlib.errors import Refused
from kdlib.study.report import build
from kdlib.study.report.render import MINUS, Table
from kdlib.study.training import planned
from tests import builders
from tests.test_tables import pick

FIGURE = {"table": "figure1", "where": {"dataset": "imagenet1k"}}
TABLE1 = {"table": "table1_imagenet", "where": {"teacher": "resnet34", "student": "resnet18"}}
ZOO = {"table": "model_zoo", "where": {"student": "resnet50"}}
MIM = {"table": "table10_mim", "where": {}}
REPEATED = {
    "large_weak": {"rows": [TABLE1, ZOO, MIM], "settings": "verified"},
    "small_weak": {"rows": [{"table": "table1_cifar100", "where": {"student": "resnet20", "epochs": "240"}}], "settings": "assumed"},
    "large_strong": {"rows": [FIGURE, MIM], "settings": "verified"},
}


@pytest.fixture(scope="module")
def params() -> Params:
    return builders.params(published=REPEATED, missing="blank", tables=["published", *builders.TABLES])


@pytest.fixture(scope="module")
def root(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    builders.numbers(folder, params)
    return folder


def table(root: Path, planned: Params) -> Table:
    made = build.finished_part(root, planned)
    first, *others = build.build_tables(made, build.read_numbers(root, made, planned))
    assert len(others) >= len(builders.TABLES)
    return first


def test_every_published_number_stands_beside_what_was_measured(root: Path, params: Params) -> None:
    found = table(root, params)
    assert len(found.frame) == len(found.shown) == len(build.read_numbers(root, params, params).published) + 1  # one is repeated twice
    kd = pick(found.frame, comparison="large_weak", method="kd", metric="top1")
    assert (kd["value"], kd["mean"], kd["n"]) == (71.03, pytest.approx(0.71), 3)
    assert kd["gap"] == pytest.approx(-0.0003)
    assert kd["verdict"] == "met"  # 70, 71, 72
    assert pick(found.frame, comparison="large_weak", method="dkd")["verdict"] == "met"  # 72, 73, 73: 72.7 ± 1.4; published 71.70
    assert pick(found.frame, comparison="large_weak", method="dist")["verdict"] == "met"
    shown = pick(found.shown, comparison="large_weak", method="kd", measure="top1")
    assert shown["published"] == "71.03"
    assert shown["measured here"].startswith("71.0 ± ")
    assert shown["measured minus published"] in ("0.0", f"{MINUS}0.0")


def test_a_number_beyond_the_interval_is_not_met(root: Path, params: Params) -> None:
    numbers = build.read_numbers(root, params, params)
    for value, verdict in ((60.0, "above"), (90.0, "below")):
        numbers.published["value"] = value
        row = pick(build.build_tables(params, numbers)[0].frame, comparison="large_weak", method="kd", metric="top1")
        assert row["verdict"] == verdict


def test_a_published_lead_is_paired_by_seed(root: Path, params: Params) -> None:
    lead = pick(table(root, params).frame, comparison="large_strong", method="dist_minus_kd")
    assert lead["mean"] == pytest.approx((0.70 + 0.71 + 0.73 - 0.71 - 0.72 - 0.73) / 3)
    assert lead["value"] == -0.46


def test_assumed_settings_give_no_verdict(root: Path, params: Params) -> None:
    found = table(root, params).frame
    assert set(found.loc[found["comparison"] == "small_weak", "verdict"]) == {"assumed settings"}
    student = pick(found, comparison="small_weak", method="student")
    assert student["mean"] == pytest.approx(0.41)  # of the method without a teacher
    teacher = pick(found, comparison="small_weak", method="teacher")
    assert (teacher["mean"], teacher["n"]) == (0.9, 1)


def test_each_measure_is_set_beside_its_own(root: Path, params: Params) -> None:
    numbers = build.read_numbers(root, params, params)
    top5 = pick(build.build_tables(params, numbers)[0].frame, comparison="large_weak", metric="top5")
    ours = numbers.runs.query("comparison == 'large_weak' and variant == 'kd'")["test_top5"]
    assert (top5["value"], top5["mean"], top5["n"]) == (96.35, pytest.approx(ours.mean()), 3)


def test_masked_image_modelling_stands_beside_our_baseline(root: Path, params: Params) -> None:
    found = table(root, params)
    rows = found.frame[found.frame["method"] == "fcmae_best_mim"]
    assert rows["comparison"].tolist() == ["large_weak", "large_strong"]
    assert rows["mean"].tolist() == pytest.approx([pick(found.frame, comparison="large_weak", method="kd", metric="top1")["mean"], 0.72])
    assert rows["gap"].tolist() == pytest.approx((rows["mean"] - 0.8389).tolist())
    assert set(rows["verdict"]) == {""}


def test_captions_name_comparisons_of_assumed_settings(root: Path, params: Params) -> None:
    made = build.finished_part(root, params)
    said = "Assumed settings, of which nobody can say that they are the paper's: small_weak."
    for built in build.build_tables(made, build.read_numbers(root, made, params)):
        assert (said in built.caption) == ("Seeds 0" in built.caption)


def test_of_one_seed_nothing_is_said(tmp_path: Path) -> None:
    params = builders.params(published=REPEATED, missing="blank", tables=["published", *builders.TABLES], seeds=[1])
    builders.numbers(tmp_path, params)
    row = pick(table(tmp_path, params).frame, comparison="large_weak", method="kd", metric="top1")
    assert (row["mean"], row["verdict"]) == (pytest.approx(0.71), "")


def test_what_was_not_made_is_blank(root: Path, params: Params, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / planned.DISTILL / "large_weak" / "kd" / "seed_2")  # one run of it is missing
    made = build.finished_part(tmp_path, params)
    assert set(params.comparisons) - set(made.comparisons) == {"large_weak"}
    row = pick(table(tmp_path, params).frame, comparison="large_weak", method="kd", metric="top1")
    assert math.isnan(row["mean"]) and (row["n"], row["verdict"]) == (0, "")
    with pytest.raises(Refused, match=r"runs: 1 of \d+ are missing \(runs/distill/large_weak/kd/seed_2\)"):
        build.read_numbers(tmp_path, params, params)
    fail = builders.params(missing="fail")
    assert build.finished_part(tmp_path, fail) is fail
    shutil.rmtree(tmp_path / planned.DISTILL)
    with pytest.raises(Refused, match=r"comparisons: found 'none that was brought to its end'; allowed: at least one; run `dvc repro"):
        build.finished_part(tmp_path, params)


def test_a_row_that_nobody_published_is_refused(root: Path) -> None:
    wrong = builders.params(
        published={"large_weak": {"rows": [{**FIGURE, "where": {"epochs": "7"}}], "settings": "assumed"}}, tables=["published"]
    )
    with pytest.raises(Refused, match=r"study.published.large_weak: found 'figure1 with epochs 7'; allowed: rows of results/published"):
        build.build_tables(wrong, build.read_numbers(root, wrong, wrong))


def test_a_comparison_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"study.published: found 'large_weka'; allowed: .*; did you mean 'large_weak'"):
        builders.params(published={"large_weka": {"rows": [FIGURE], "settings": "assumed"}})
