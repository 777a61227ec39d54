"""Figures of a small study: what is drawn, and that a saved figure repeats."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kdlib.config.schema import Params
from kdlib.study.report import build, plots
from kdlib.study.report.plots import scales
from kdlib.study.report.plots.curves import plot_grids, plot_learning_curves, plot_teachers
from kdlib.study.report.plots.scales import plot_data_scale
from kdlib.study.report.plots.style import colours, save_figure
from tests import builders


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


def curves(runs: pd.DataFrame) -> pd.DataFrame:
    rows = runs.loc[~runs["trial"], ["comparison", "variant", "seed", "test_top1"]]
    parts = [
        rows.assign(images_seen=1000 * epoch, epoch=epoch, val_top1=rows["test_top1"] * epoch / 3, loss=3.0 / epoch) for epoch in (1, 2, 3)
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_figures_are_those_of_the_tables(params: Params, found: build.Numbers) -> None:
    assert list(plots.build_figures(params, found)) == ["teachers", "data_scale", "accuracy_digits", "learning_curves_digits", "grid_tune"]
    assert list(plots.build_figures(builders.params(tables=["cost", "measures"]), found)) == ["teachers"]
    assert set(plots.FIGURES) <= set(build.TABLES)


def test_the_figure_of_data_scale_draws_the_leads(params: Params, runs: pd.DataFrame, numbers: pd.DataFrame) -> None:
    figure = plot_data_scale(params, runs, numbers)
    weak, strong, paper = figure.axes
    drawn = {container.get_label(): container[0].get_ydata() for container in weak.containers}
    assert drawn["dkd"] == pytest.approx([31 / 3, 5 / 3])
    assert weak.get_ylim() == strong.get_ylim(), "the recipes can be compared by eye"
    assert [bar.get_height() for bar in paper.containers[0]] == pytest.approx([0.76, 0.28, 0.14, 0.01])
    assert "Hao et al. 2023" in paper.get_title() and "read off the figure" in paper.get_title()
    assert "95 % paired t interval" in figure.get_suptitle() and "n=3" in figure.get_suptitle()
    ends = [segment for container in strong.containers for segment in container[2][0].get_segments()]
    low, high = strong.get_ylim()
    assert all(low <= y <= high for segment in ends for _, y in segment), "no interval is cut off"


def test_the_other_figures_show_every_run(params: Params, runs: pd.DataFrame) -> None:
    dots = scales.plot_accuracies(params, runs, "digits")
    assert (
        sum(len(collection.get_offsets()) for panel in dots.axes for collection in panel.collections if len(collection.get_offsets()) == 3)
        == 48
    )
    squares = plot_grids(params, runs, "tune")
    assert [patch.get_xy() for panel in squares.axes for patch in panel.patches] == [(0, 1), (1, 1)], "the frames of the chosen points"
    lines = plot_learning_curves(params, curves(runs), "digits")
    assert [len(panel.lines) for panel in lines.axes] == [4 * (3 + 1)] * 4
    teacher = plot_teachers(curves(runs).query("variant == 'kd'").rename(columns={"comparison": "teacher"}), builders.TEACHERS)
    assert teacher.get_suptitle()


def test_a_diverged_seed_does_not_bend_the_mean_curve(params: Params, runs: pd.DataFrame) -> None:
    frame = curves(runs)
    frame = frame[~((frame["comparison"] == "small_weak") & (frame["variant"] == "kd") & (frame["seed"] == 1) & (frame["epoch"] > 1))]
    panel = plot_learning_curves(params, frame, "digits").axes[0]
    mean = next(line for line in panel.lines if line.get_label() == "kd (n=2)")
    assert mean.get_ydata() == pytest.approx([51 / 3, 34, 51])


def test_saved_figures_repeat_byte_for_byte(params: Params, runs: pd.DataFrame, numbers: pd.DataFrame, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_figure(plot_data_scale(params, runs, numbers), tmp_path / folder, "data_scale")
    for name in ("data_scale.svg", "data_scale.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "<dc:date>" not in (tmp_path / "a" / "data_scale.svg").read_text()


def test_a_method_has_one_colour_in_every_figure(params: Params, runs: pd.DataFrame, numbers: pd.DataFrame) -> None:
    wanted = colours(params)["dkd"]
    assert colours(params)["dkd_tuned"] == wanted
    assert len(set(colours(params).values())) == len(params.methods)

    def drawn(figure: Figure, label: str) -> tuple[float, float, float]:
        return to_rgb(next(line for line in figure.axes[0].lines if line.get_label() == label).get_color())

    assert drawn(plot_learning_curves(params, curves(runs), "digits"), "dkd (n=3)") == pytest.approx(wanted)
    bar = plot_data_scale(params, runs, numbers).axes[-1].containers[0]
    assert bar.get_label() == "dkd" and to_rgb(bar[0].get_facecolor()) == pytest.approx(wanted)
