"""Tables and figures of a study of methods whose numbers can be computed by hand: ``builders.methodwise``."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from kdlib.config.schema import Params
from kdlib.study.report import build, plots, stats
from kdlib.study.report.differences import leads
from kdlib.study.report.plots.style import save_figure
from kdlib.study.report.render import MINUS, TIMES, write_table
from tests import builders
from tests.test_tables import T2, diverge, pick


@pytest.fixture(scope="module")
def methods() -> Params:
    return builders.methodwise()


@pytest.fixture(scope="module")
def theirs(methods: Params, tmp_path_factory: pytest.TempPathFactory) -> build.Numbers:
    return builders.numbers(tmp_path_factory.mktemp("methods"), methods)


def test_the_tables_are_those_that_params_yaml_names_in_its_order(methods: Params, theirs: build.Numbers, tmp_path: Path) -> None:
    assert [table.name for table in build.build_tables(methods, theirs)] == ["methods", "losses", "measures"]
    chosen = builders.methodwise(tables=["measures", "tuning", "cost"])
    assert [table.name for table in build.build_tables(chosen, theirs)] == ["measures", "cost"], "nothing was tuned"
    for table in build.build_tables(methods, theirs):
        write_table(table, tmp_path)
        again = pd.read_csv(tmp_path / f"{table.name}.csv")
        assert list(again.columns) == list(table.frame.columns) and len(again) == len(table.frame)


def test_every_method_has_its_row_beside_those_of_its_kind(methods: Params, theirs: build.Numbers) -> None:
    table = build.build_tables(methods, theirs)[0]
    shown = table.shown.set_index("method")
    assert shown["looks at"].to_dict() == {
        **{"no_kd": "no teacher", "kd": "logits", "dkd": "logits", "maps_only": "hint: maps"},
        "ranks": "hint: embedding, across the batch",
    }
    assert shown.index.to_list() == ["no_kd", "kd", "dkd", "maps_only", "ranks"], "in params.yaml maps_only comes before dkd"
    small, large = "10 % (100 images)", "100 % (1000 images)"
    maps = shown.loc["maps_only"]
    assert maps[f"{small}: top-1"] == f"60.3 ± {100 * T2 * math.sqrt(13 / 3) / 100 / math.sqrt(3):.1f} (n=3)"  # .58 .62 .61
    assert maps[f"{small}: minus kd"] == "+8.3 ± 1.4 (n=3) better"
    assert maps[f"{large}: minus kd"] == "0.0 ± 2.5 (n=3) inconclusive"
    assert maps["lead, 10 % minus 100 %"] == f"+8.3 ± {T2 * math.sqrt(7 / 3) / math.sqrt(3):.1f} (n=3) shrinks"  # .08 .07 .10
    assert (shown.loc["kd", f"{small}: minus kd"], shown.loc["kd", "lead, 10 % minus 100 %"]) == ("", "")
    costs = ["step time", "extra parameters", "kept beside (MiB)", "step memory (MiB)"]
    assert maps[costs].to_list() == [f"1.50{TIMES} (n=3)", "1,000", "0.5", "3.0"]
    assert shown.loc["kd", "step time"] == f"1.00{TIMES} (n=3)"
    published = [column for column in shown.columns if column.startswith("published")]
    assert published == ["published: A2, 300 epochs", "published: A1, 600 epochs"]
    assert shown.loc["dkd", published].to_list() == ["80.77", "81.83"]
    assert shown.loc["ranks", published].to_list() == ["", ""], "unknown, hence blank"
    assert "net (90.0 %) → net" in table.title
    assert "Cui et al. 2024" in table.caption and "beitv2_large_patch16_224 → resnet50" in table.caption


def test_the_methods_frame_holds_one_number_per_row(methods: Params, theirs: build.Numbers) -> None:
    frame = build.build_tables(methods, theirs)[0].frame
    assert frame.groupby("question").size().to_dict() == {"accuracy": 10, "lead": 8, "scale": 4, "cost": 5, "published": 5}
    assert pick(frame, question="cost", method="maps_only")[["mean", "n", "extra_parameters", "step_bytes", "together"]].to_list() == [
        *(1.5, 3, 1000, 3 * 2**20, True)
    ]
    assert pick(frame, question="lead", method="ranks", comparison="small")["mean"] == pytest.approx(-0.29 / 3)
    assert frame["source"].notna().all()


def test_time_is_compared_within_one_process_where_that_can_be(methods: Params, theirs: build.Numbers) -> None:
    """kd's run of seed 0 came from the store, so seed 0 pairs no method with it; of maps_only all seeds did."""
    timing = theirs.timing.copy()
    here = timing["comparison"] == "large"
    timing.loc[here & (timing["variant"] == "kd") & (timing["seed"] == 0), ["student_seconds", "teacher_seconds_share"]] = [99.0, 0.75]
    timing.loc[here & (timing["variant"] == "maps_only"), "teacher_seconds_share"] = [0.1, 0.2, 0.3]
    shown = build.build_tables(methods, dataclasses.replace(theirs, timing=timing))[0].shown.set_index("method")
    assert shown.loc["ranks", "step time"] == f"1.10{TIMES} (n=2)"
    ratios = [15 / 99, 1.5, 1.5]
    mean = sum(ratios) / 3
    half = T2 * math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / 2) / math.sqrt(3)
    assert shown.loc["maps_only", "step time"] == f"≈ {mean:.2f} ± {half:.2f}{TIMES} (n=3)"
    timing.loc[here & (timing["variant"] == "maps_only"), "on"] = "cpu, 1 threads, torch 2.15.0"
    shown = build.build_tables(methods, dataclasses.replace(theirs, timing=timing))[0].shown.set_index("method")
    assert shown.loc["maps_only", "step time"] == "", "seconds of another machine are no comparison"


def test_published_numbers_keep_their_settings_apart(methods: Params, theirs: build.Numbers) -> None:
    """Another student under the same recipe, and epochs that nobody told; none at all leaves the table as it is."""
    here = theirs.published["table"] == "table3_methods"
    other = theirs.published[here].assign(student="vit_tiny", value=50.0)
    other.loc[other["recipe"] == "A1", "epochs"] = pd.NA
    shown = build.build_tables(methods, dataclasses.replace(theirs, published=pd.concat([theirs.published, other])))[0].shown.set_index(
        "method"
    )
    cells = {column: value for column, value in shown.loc["kd"].items() if str(column).startswith("published")}
    teacher = "beitv2_large_patch16_224"
    assert cells == {
        f"published: A2, 300 epochs, {teacher} → resnet50": "80.89",
        f"published: A1, 600 epochs, {teacher} → resnet50": "81.68",
        f"published: A2, 300 epochs, {teacher} → vit_tiny": "50.00",
        f"published: A1, {teacher} → vit_tiny": "50.00",
    }
    table = build.build_tables(methods, dataclasses.replace(theirs, published=theirs.published[~here]))[0]
    assert not any(column.startswith("published") for column in table.shown)
    assert "ublished top-1" not in table.caption


def test_a_method_that_diverged_is_no_blank(methods: Params, theirs: build.Numbers) -> None:
    runs = theirs.runs
    for seed in (0, 1, 2):
        runs = diverge(runs, "small", "maps_only", seed)
    runs = diverge(runs, "large", "maps_only", 1)
    found = dataclasses.replace(theirs, runs=runs)
    row = build.build_tables(methods, found)[0].shown.set_index("method").loc["maps_only"]
    assert row[["10 % (100 images): top-1", "10 % (100 images): minus kd", "lead, 10 % minus 100 %"]].to_list() == ["diverged", "", ""]
    assert row["step time"] == f"1.50{TIMES} (n=2)"
    assert "**diverged** maps_only" in build.headline(methods, found, [])


def test_memory_may_be_unknown(methods: Params, theirs: build.Numbers) -> None:
    runs = theirs.runs.copy()
    runs["step_bytes"] = pd.array([pd.NA] * len(runs), dtype="Int64")
    table = build.build_tables(methods, dataclasses.replace(theirs, runs=runs))[0]
    assert set(table.shown["step memory (MiB)"]) == {""}


def test_hard_labels_are_compared_method_by_method(methods: Params, theirs: build.Numbers) -> None:
    """kd: ce .70 .71 .72, bce .66 .66 .68; its baseline's row has no difference to itself."""
    table = build.build_tables(methods, theirs)[1]
    assert list(table.shown.columns) == ["hard label", "kd", "dkd", "dkd minus kd", "kd: minus ce", "dkd: minus ce"]
    shown = table.shown.set_index("hard label")
    assert shown.index.to_list() == ["ce", "bce", "none"], "in the order of the recipes in params.yaml"
    assert shown.loc["ce", ["kd: minus ce", "dkd: minus ce"]].to_list() == ["", ""]
    assert shown.loc["bce", "kd: minus ce"] == f"{MINUS}4.3 ± {T2 / 3:.1f} (n=3) worse"
    assert shown.loc["ce", "dkd minus kd"] == "+1.7 ± 1.4 (n=3) inconclusive"
    assert "The recipes are weak with another loss" in table.caption
    row = pick(leads(methods, theirs.runs), question="hard label", comparison="large_bce minus large", method="kd")
    assert row[["baseline", "recipe", "verdict"]].to_list() == ["kd", "weak_bce minus weak", "worse"]
    p = stats.estimate({0: -0.04, 1: -0.05, 2: -0.04}, 0.95).p
    assert row["p_holm"] == pytest.approx(4 * p), "a family of its own: two methods, two hard labels"


def test_the_headline_of_methods_ranks_them(methods: Params, theirs: build.Numbers) -> None:
    block = build.headline(methods, theirs, ["methods"])
    assert "](results/figures/methods.png)" in block
    assert "- recipe weak, 10 % (100 images), against kd: **better** dkd, maps_only; **worse** ranks, no_kd.\n" in block
    assert "- recipe weak, 10 % → 100 %, the lead over kd: **shrinks** dkd, maps_only; **grows** ranks; **inconclusive** no_kd.\n" in block
    assert "- kd, 100 % (1000 images): hard label bce against ce: **worse** (difference" in block
    assert build.build_tables(methods, theirs)[0].caption in block


# Figures


@pytest.fixture(scope="module")
def figures(methods: Params, theirs: build.Numbers) -> plots.Figures:
    return plots.build_figures(methods, theirs)


def test_the_figures_are_those_of_the_tables(figures: plots.Figures) -> None:
    assert list(figures) == ["teachers", "methods", "methods_cost"]


def test_leads_are_drawn_by_kind_at_both_scales(figures: plots.Figures) -> None:
    small, large = figures["methods"].axes
    assert [label.get_text() for label in small.get_yticklabels()] == [
        *("no teacher", "no_kd", "logits", "dkd", "hint: maps", "maps_only", "hint: embedding", "ranks")
    ]
    drawn = {container[0].get_ydata()[0]: container for container in small.containers}
    assert [drawn[place][0].get_xdata()[0] for place in (1, 3, 5, 7)] == pytest.approx([-11, 31 / 3, 25 / 3, -29 / 3])
    hollow = {place: container[0].get_markerfacecolor() == "white" for place, container in drawn.items()}
    assert hollow == {1: False, 3: False, 5: False, 7: False}
    assert all(container[0].get_markerfacecolor() == "white" for container in large.containers), "all inconclusive"
    looks = {(to_rgb(container[0].get_color()), container[0].get_marker()) for container in small.containers}
    assert len(looks) == 4, "colour and marker of each kind"
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 4
    assert small.get_xlim() == large.get_xlim(), "the scales can be compared by eye"
    low, high = small.get_xlim()
    ends = [segment for panel in (small, large) for container in panel.containers for segment in container[2][0].get_segments()]
    assert all(low <= x <= high for segment in ends for x, _ in segment), "no interval is cut off"
    assert "95 % paired t interval" in figures["methods"].get_suptitle() and "n=3" in figures["methods"].get_suptitle()


def test_accuracy_is_drawn_against_time_with_every_name_apart(figures: plots.Figures) -> None:
    for panel, best in zip(figures["methods_cost"].axes, (187 / 3, 218 / 3), strict=True):
        points = {tuple(container[0].get_xydata()[0]) for container in panel.containers}
        assert len(points) == 5
        assert max(y for _, y in points) == pytest.approx(best)
        assert {round(float(x), 6) for x, _ in points} == {0.9, 1.0, 1.1, 1.5}
        heights = sorted(text.xyann[1] for text in panel.texts)
        assert {text.get_text() for text in panel.texts} == {"no_kd", "kd", "dkd", "maps_only", "ranks"}
        assert np.diff(heights).min() > 0.04


def test_a_diverged_method_is_named_and_saved_figures_repeat(methods: Params, theirs: build.Numbers, tmp_path: Path) -> None:
    runs = theirs.runs
    for seed in (0, 1, 2):
        runs = diverge(runs, "small", "maps_only", seed)
    for folder in ("a", "b"):
        for name, figure in plots.build_figures(methods, dataclasses.replace(theirs, runs=runs)).items():
            save_figure(figure, tmp_path / folder, name)
            assert (name != "methods") or [text.get_text().strip() for text in figure.axes[0].texts] == ["diverged"]
    assert len(list((tmp_path / "a").iterdir())) == 6
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
