"""Tables and README from a small study whose numbers can be computed by hand."""

import dataclasses
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from kdlib import config
from kdlib.config import schema
from kdlib.config.schema import Params
from kdlib.errors import Refused
from kdlib.study.report import build, published
from kdlib.study.report.differences import hard_labels, leads, verdict_table
from kdlib.study.report.readme import insert_between_markers
from kdlib.study.report.render import MINUS, Table, latex, markdown, number, write_table
from kdlib.study.report.tables.effort import grid_tables
from tests import builders

ROOT = Path(__file__).parents[1]
T2 = 4.302652729911275  # the .975 quantile of Student's t with 2 degrees of freedom: any printed table has 4.303


@pytest.fixture(scope="module")
def params() -> Params:
    return builders.params()


@pytest.fixture(scope="module")
def found(params: Params, tmp_path_factory: pytest.TempPathFactory) -> build.Numbers:
    return builders.numbers(tmp_path_factory.mktemp("study"), params)


@pytest.fixture(scope="module")
def runs(found: build.Numbers) -> pd.DataFrame:
    return found.runs


@pytest.fixture(scope="module")
def numbers(found: build.Numbers) -> pd.DataFrame:
    return found.published


@pytest.fixture(scope="module")
def everything(params: Params, found: build.Numbers) -> dict[str, Table]:
    return {table.name: table for table in build.build_tables(params, found)}


def pick(frame: pd.DataFrame, **where: object) -> pd.Series:
    """The only row with these values."""
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1, f"{len(frame)} rows with {where}"
    return frame.iloc[0]


def diverge(runs: pd.DataFrame, comparison: str, variant: str, seed: int, measure: float = math.nan) -> pd.DataFrame:
    runs = runs.copy()
    row = (runs["comparison"] == comparison) & (runs["variant"] == variant) & (runs["seed"] == seed)
    runs.loc[row, "status"] = "diverged"
    runs.loc[row, runs.columns.str.match("^(val|test)_")] = measure
    return runs


def test_a_lead_by_hand(params: Params, runs: pd.DataFrame) -> None:
    """dkd minus kd is .10, .11, .10: mean .31/3, standard deviation .01/sqrt(3), half width t .01/3."""
    row = pick(leads(params, runs), question="lead", comparison="small_weak", method="dkd")
    assert row["mean"] == pytest.approx(0.31 / 3)
    assert (row["high"] - row["low"]) / 2 == pytest.approx(T2 * 0.01 / 3)
    assert (row["n"], row["seeds"], row["verdict"], row["train_images"]) == (3, "0 1 2", "better", 100)


def test_the_headline_by_hand(params: Params, runs: pd.DataFrame) -> None:
    """Leads of dkd: weak .10 .11 .10 at 10 %, .02 .02 .01 at 100 %; strong .05 .06 .06 at 10 %."""
    ahead = leads(params, runs)
    scale = pick(ahead, question="scale", comparison="small_weak minus large_weak", method="dkd")
    assert (scale["mean"], scale["verdict"]) == (pytest.approx((0.08 + 0.09 + 0.09) / 3), "shrinks")
    recipe = pick(ahead, question="recipe", comparison="small_weak minus small_strong", method="dkd")
    assert (recipe["mean"], recipe["recipe"]) == (pytest.approx((0.05 + 0.05 + 0.04) / 3), "weak minus strong")
    assert pick(ahead, question="scale", comparison="small_weak minus large_weak", method="dist")["verdict"] == "inconclusive"


def test_a_lead_that_grows_says_so(params: Params, runs: pd.DataFrame) -> None:
    swapped = runs.copy()
    swapped["comparison"] = runs["comparison"].replace({"small_weak": "large_weak", "large_weak": "small_weak"})
    row = pick(leads(params, swapped), question="scale", comparison="small_weak minus large_weak", method="dkd")
    assert (row["mean"], row["verdict"]) == (pytest.approx(-0.26 / 3), "grows")


def test_each_question_is_one_family_per_data_set(params: Params, runs: pd.DataFrame) -> None:
    """The smallest p of a family is multiplied by its size: 8 leads, 4 changes of scale, 4 of recipe, 3 pairs of the sweep."""
    ahead = leads(params, runs)
    assert ahead.groupby("question").size().to_dict() == {"lead": 8, "scale": 4, "recipe": 4, "tuning": 3}
    t = (0.31 / 3) / (0.01 / 3)
    p = 1 - t / math.sqrt(t**2 + 2)  # Student's t with 2 degrees of freedom, two-sided, in closed form
    assert pick(ahead, question="lead", comparison="small_weak", method="dkd")["p_holm"] == pytest.approx(8 * p)


@pytest.mark.parametrize("measure", [math.nan, 0.01])
def test_a_diverged_run_reduces_n_and_its_pair(params: Params, runs: pd.DataFrame, measure: float) -> None:
    ahead = leads(params, diverge(runs, "small_weak", "kd", 1, measure))
    row = pick(ahead, question="lead", comparison="small_weak", method="dkd")
    assert (row["n"], row["seeds"]) == (2, "0 2")
    change = pick(ahead, question="scale", comparison="small_weak minus large_weak", method="dkd")
    assert (change["n"], change["mean"]) == (2, pytest.approx((0.08 + 0.09) / 2))


def test_what_nobody_measured_is_blank(params: Params, found: build.Numbers) -> None:
    runs = found.runs
    for seed in (0, 1, 2):
        runs = diverge(runs, "small_weak", "dkd", seed)
    row = pick(leads(params, runs), question="lead", comparison="small_weak", method="dkd")
    assert (row["n"], row["verdict"]) == (0, "")
    found = dataclasses.replace(found, runs=runs)
    shown = build.build_tables(params, found)[0].shown
    assert pick(shown, recipe="weak", **{"training images": "10 % (100 images)"})["dkd minus kd"] == ""
    assert "dkd" not in build.metrics_summary(runs)["small_weak"]
    assert any("diverged" in line for line in build.headline(params, found, []).split("\n"))


def test_data_scale_shows_ours_and_the_papers_with_sources(everything: dict[str, Table]) -> None:
    shown = everything["data_scale"].shown
    ours = pick(shown, recipe="weak", **{"training images": "10 % (100 images)"})
    assert ours[["dkd minus kd", "source"]].to_list() == ["+10.3 ± 1.4 (n=3) better", "measured here"]
    paper = pick(shown, **{"data set": "imagenet1k", "training images": "100 %"})
    assert paper[["dkd minus kd", "dist minus kd"]].to_list() == ["+0.01", f"{MINUS}0.46"]
    assert "Figure 1" in paper["source"] and "read off figure" in paper["source"]
    assert (pick(shown, recipe="weak", **{"training images": "10 % minus 100 %"})["dkd minus kd"]) == "+8.7 ± 1.4 (n=3) shrinks"
    assert len(shown) == 4 + 2 + 2 + 4
    assert "Seeds 0, 1, 2" in everything["data_scale"].caption and "95 %" in everything["data_scale"].caption


def test_recipes_stand_beside_published_rows(everything: dict[str, Table]) -> None:
    shown = everything["recipes"].shown
    ours = pick(shown, recipe="weak", **{"training images": "10 % (100 images)"})
    assert ours["kd"] == f"52.0 ± {100 * T2 * 0.02 / math.sqrt(3):.1f} (n=3)"
    assert ours["teacher"] == "90.0"
    assert ours["dkd minus kd"] == "+10.3 ± 1.4 (n=3) better"
    cifar = pick(shown, **{"teacher → student": "resnet56 → resnet20"})
    assert cifar[["recipe", "teacher", "no_kd", "kd", "dkd", "dist", "dkd minus kd"]].to_list() == [
        *("previous, 240 epochs", "72.34", "69.06", "70.66", "71.97", "71.75", "")
    ]
    strong = pick(shown, recipe="A1, 600 epochs")
    assert strong[["no_kd", "kd", "dkd", "dist"]].to_list() == ["", "81.68", "81.83", ""]


def test_tuning_compares_equal_effort(everything: dict[str, Table]) -> None:
    shown = everything["tuning"].shown.set_index("method")
    assert shown.index.to_list() == ["kd", "kd_tuned", "dkd", "dkd_tuned"]
    assert shown["trials"].to_list() == ["0", "4", "0", "4"]
    assert shown["parameters"].to_list() == [
        *("temperature 1, weight 1", "temperature 4, weight 1", "beta 2, temperature 1", "beta 2, temperature 4")
    ]
    assert shown.loc["kd", "test top-1"].startswith("52.0 ±"), "the untuned kd of the comparison with the same setting"
    assert shown.loc["kd_tuned", "minus kd"] == "+10.7 ± 1.4 (n=3) better"
    assert shown.loc["dkd_tuned", "minus kd_tuned"] == "+1.0 ± 2.5 (n=3) inconclusive"
    assert "seed 0" in everything["tuning"].caption and "validation" in everything["tuning"].caption
    frame = everything["tuning"].frame
    assert pick(frame, method="dkd_tuned", baseline="kd_tuned")["mean"] == pytest.approx(0.01)


def test_grid_marks_the_chosen_point_and_a_diverged_trial(params: Params, runs: pd.DataFrame) -> None:
    runs = diverge(runs, "tune", "trial/kd.temperature_1.weight_2", 0)
    table = next(table for table in grid_tables(params, runs) if table.name == "grid_tune_kd")
    assert table.shown.to_numpy().tolist() == [["1", "61.0", "diverged"], ["4", "62.0 (chosen)", "61.0"]]
    assert list(table.shown.columns) == ["temperature", "weight 1", "weight 2"]
    assert "4 trials" in table.caption and "seed 0 (n=1" in table.caption


def test_cost_is_relative_to_the_baseline_and_counts_trials(everything: dict[str, Table]) -> None:
    frame = everything["cost"].frame
    dkd = pick(frame, comparison="small_weak", method="dkd")
    assert dkd[["relative", "sharing", "trials", "train_flops", "teacher_flops"]].to_list() == [1.5, 3, 0, 3 * 10**12, 9 * 10**12]
    assert pick(frame, comparison="small_weak", method="no_kd")["sharing"] == 0
    assert pick(frame, comparison="small_weak", method="dist")["extra_parameters"] == 7
    assert pick(frame, comparison="tune", method="dkd_tuned")[["relative", "trials"]].to_list() == [1.5, 4]
    assert "seconds" not in frame.columns


def test_measures_have_their_units(everything: dict[str, Table]) -> None:
    row = pick(everything["measures"].shown, comparison="small_weak", method="kd")
    assert row["nll (nats)"] == f"1.480 ± {T2 * 0.02 / math.sqrt(3):.3f} (n=3)"
    assert row["ece (%)"].startswith("5.2 ±")
    assert row["top5 (%)"] == "100.0 (n=3)", "no interval where all seeds agree exactly"
    assert len(everything["measures"].frame) == (16 + 2) * 6


def test_verdicts_and_summary_are_what_another_machine_compares(params: Params, runs: pd.DataFrame) -> None:
    frame = verdict_table(params, runs)
    assert list(frame.columns) == [
        *("question", "data", "comparison", "method", "baseline", "verdict", "lead", "low", "high", "n", "p_holm", "seeds")
    ]
    assert not frame.duplicated(["question", "comparison", "method", "baseline"]).any()
    assert set(frame["verdict"]) == {"better", "inconclusive", "shrinks"}
    assert build.metrics_summary(runs)["tune"] == {"kd_tuned": 0.626667, "dkd_tuned": 0.636667}


def test_tables_do_not_depend_on_the_order_of_rows(params: Params, found: build.Numbers, everything: dict[str, Table]) -> None:
    turned = build.TABLES["data_scale"](params, dataclasses.replace(found, runs=found.runs.iloc[::-1].reset_index(drop=True)))[0]
    assert markdown(turned) == markdown(everything["data_scale"])


def test_every_table_is_written_in_three_forms(everything: dict[str, Table], tmp_path: Path) -> None:
    assert list(everything) == ["data_scale", "recipes", "tuning", "grid_tune_kd", "grid_tune_dkd", "cost", "measures"]
    for table in everything.values():
        write_table(table, tmp_path)
        again = pd.read_csv(tmp_path / f"{table.name}.csv")
        assert list(again.columns) == list(table.frame.columns) and len(again) == len(table.frame)
        rows = (tmp_path / f"{table.name}.md").read_text().split("\n")
        assert len({len(line) for line in rows if line.startswith("|")}) == 1, "columns stand below each other"
        tex = (tmp_path / f"{table.name}.tex").read_text()
        body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().split("\n")
        assert len(body) == len(table.shown)
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(table.shown.columns) - 1 for line in body)
    assert len(list(tmp_path.iterdir())) == 3 * len(everything)


def test_special_characters_do_not_break_a_table() -> None:
    shown = pd.DataFrame({"a_b": ["50 % & {x}", "1 | 2"], "±": [f"{MINUS}1 ± 2", "\\"]})
    table = Table("t", "T_1", "C", shown, shown)
    assert r"50 \% \& \{x\} & $-$1 $\pm$ 2 \\" in latex(table)
    assert r"1 $|$ 2 & \textbackslash{} \\" in latex(table)
    assert r"| 1 \| 2     |" in markdown(table)


def test_numbers_as_people_read_them() -> None:
    assert [number(value, sign=True) for value in (1.26, -1.26, 0.04, -0.04, math.nan)] == ["+1.3", f"{MINUS}1.3", "0.0", "0.0", ""]
    assert [number(value, 3) for value in (1.26, -0.0006, -0.0004)] == ["1.260", f"{MINUS}0.001", "0.000"]


def test_readme_answers_with_the_numbers(params: Params, found: build.Numbers) -> None:
    assert "](results/figures" not in build.headline(params, found, ["teachers"])
    block = build.headline(params, found, ["teachers", "data_scale"]).replace(MINUS, "-")
    assert "](results/figures/data_scale.png)" in block
    assert (
        "- recipe weak, 10 % → 100 %: dkd's lead over kd +10.3 [+8.9, +11.8] → +1.7 [+0.2, +3.1]: it **shrinks** with more data "
        "(difference +8.7 [+7.2, +10.1], n=3)."
    ) in block
    assert "dist's lead over kd +0.3 [-2.5, +3.2] → -0.3 [-1.8, +1.1]: **inconclusive** whether it changes with more data" in block
    assert "dkd_tuned against kd_tuned: **inconclusive** (difference +1.0 [-1.5, +3.5], n=3)." in block


def test_block_goes_between_its_markers() -> None:
    text = "# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\nrest <!-- other:begin -->\n"
    once = insert_between_markers(text, "new\n", "results")
    assert once == "# Title\n<!-- results:begin -->\n\nnew\n\n<!-- results:end -->\nrest <!-- other:begin -->\n"
    assert insert_between_markers(once, "new\n", "results") == once
    for broken in ("", "<!-- results:begin -->", "<!-- results:end --><!-- results:begin -->", text + text):
        with pytest.raises(Refused, match=r"README.md: .*put them back"):
            insert_between_markers(broken, "new", "results")


def test_published_numbers_keep_their_gaps_and_sources(numbers: pd.DataFrame) -> None:
    figure = published.figure1(numbers)
    assert len(figure) == 8
    assert pick(figure, data="cifar100", method="dist")[["fraction", "lead"]].to_list() == pytest.approx([1.0, 0.0217])
    assert pick(figure, data="imagenet1k", fraction=0.3, method="dkd")["lead"] == pytest.approx(0.0028)
    accuracies = pd.concat([published.table1(numbers), published.strategies(numbers)])
    assert accuracies["mean"].between(0.5, 1).all()
    assert accuracies["source"].notna().all(), "a kind or source that is blank leaves a blank"
    assert accuracies[(accuracies["recipe"] == "A1") & (accuracies["method"] == "dist")].empty


def test_studies_share_the_projects_published_numbers(tmp_path: Path) -> None:
    inner = tmp_path / "studies" / "mine"
    for folder, value in ((tmp_path, "1"), (inner, "2")):
        (folder / published.FILE).parent.mkdir(parents=True)
        (folder / published.FILE).write_text(f"table,epochs,value\nfigure1,,{value}\n")
    assert published.read_published(inner)["value"].to_list() == [2.0], "a study may have its own"
    (inner / published.FILE).unlink()
    assert published.read_published(inner)["value"].to_list() == [1.0]


def test_the_registry_makes_what_params_yaml_may_name() -> None:
    assert set(build.TABLES) == set(schema.TABLES)


def test_a_headline_needs_a_table(found: build.Numbers) -> None:
    with pytest.raises(Refused, match=r"^params\.yaml: study\.tables: found 'losses'; allowed: first a table .*; put another one first$"):
        build.headline(builders.params(tables=["losses", "cost"]), found, [])


def test_comparisons_that_differ_in_more_than_the_hard_label_are_no_set(params: Params, runs: pd.DataFrame) -> None:
    content = params.model_dump()
    content["recipes"]["strong"] |= {"hard_loss": "bce", "mixup_alpha": 0.1}
    assert hard_labels(config.parse(content)) == []
    content["recipes"]["strong"] |= {"mixup_alpha": 0.0}
    groups = hard_labels(config.parse(content))
    assert groups == [{"ce": "small_weak", "bce": "small_strong"}, {"ce": "large_weak", "bce": "large_strong"}]
    changed = config.parse(content)
    assert [table.name for table in build.TABLES["losses"](changed, build.Numbers(changed, runs, *[pd.DataFrame()] * 5))] == [
        *("losses", "losses_large_weak")
    ]
