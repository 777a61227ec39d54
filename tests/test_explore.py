"""explore.ipynb on a finished study of seconds, as a person runs it; and what it asks of kdlib, against what the runs say of themselves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import tiny
from safetensors.torch import load_file, save_file

from kdlib.errors import Refused
from kdlib.study.display import explore
from kdlib.study.report import collect
from kdlib.study.training import planned
from kdlib.study.training.experiment import Experiment

NOTEBOOK = tiny.ROOT / "notebooks" / "explore.ipynb"
EDIT = """\
file = experiment.root / "kdlib" / "losses" / "kd.py"
file.write_text(file.read_text().replace("kd(student.logits", "3 * kd(student.logits"))"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A finished study, made without DVC, in a folder with a space; with its own copy of kdlib, which a test may edit."""
    root = tiny.write(tmp_path_factory.mktemp("a study"))
    shutil.copytree(tiny.ROOT / "kdlib", root / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    made = Experiment(root)
    made.prepare_data("fractals")
    made.make_teacher("small")
    for name in made.params.comparisons:
        made.distill(name)
    return made


def _all(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below runs/."""
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in sorted((root / "runs").rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def executed(experiment: Experiment) -> Iterator[list[nbformat.NotebookNode]]:
    """The code cells after Run All, and after them: the pipeline's own parameters, the same with an edited loss, a misspelt method."""
    notebook = nbformat.read(NOTEBOOK, 4)
    again = "print(experiment.try_method(comparison, method, seed).name)"
    notebook.cells += [
        nbformat.v4.new_code_cell(source) for source in (again, EDIT, again, "experiment.try_method(comparison, 'dkdd', seed)")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(experiment.root))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        patch.delenv("KDLIB_LOG", raising=False)
        before = _all(experiment.root)
        nbclient.execute(notebook, cwd=str(experiment.root / "notebooks"), allow_errors=True, timeout=200, kernel_name="python3")
        assert _all(experiment.root) == before
    yield [cell for cell in notebook.cells if cell.cell_type == "code"]


def _of(cells: list[nbformat.NotebookNode], part: str) -> list[nbformat.NotebookNode]:
    (cell,) = (cell for cell in cells if part in cell.source)
    return cell.outputs


def _text(outputs: list[nbformat.NotebookNode]) -> str:
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_run_all_ends_without_an_error_or_a_warning(executed: list[nbformat.NotebookNode]) -> None:
    for cell in executed[:-1]:
        for output in cell.outputs:
            assert output.output_type != "error", output.evalue
            assert "Warning" not in output.get("text", ""), output.text


def test_every_run_is_listed_and_can_be_chosen(experiment: Experiment, executed: list[nbformat.NotebookNode]) -> None:
    assert f"{len(explore.finished(experiment))} finished runs" in _text(_of(executed, "explore.finished"))
    assert "application/vnd.jupyter.widget-view+json" in _of(executed, "interact(")[0].data


@pytest.mark.parametrize("part", ["stages.training_curves(explore", "stages.disagreements", "stages.training_curves(named"])
def test_figures_are_shown_once(executed: list[nbformat.NotebookNode], part: str) -> None:
    assert [list(output.data) for output in _of(executed, part)] == [["text/plain", "image/png"]]


def test_the_method_was_trained_again_with_other_parameters(executed: list[nbformat.NotebookNode]) -> None:
    lines = _text(_of(executed, "stages.measures_of_runs(named)")).splitlines()
    assert [line.split("finished")[0].strip() for line in lines if "finished" in line] == ["pipeline", "weight 2"]
    before, after = (line.split() for line in lines if "finished" in line)
    assert before[2:] != after[3:]


def test_the_pipelines_own_parameters_give_the_pipelines_run(experiment: Experiment, executed: list[nbformat.NotebookNode]) -> None:
    run = explore.finished(experiment).query("method == 'kd' and not trial").iloc[0]
    outputs = executed[-4].outputs
    assert _text(outputs).splitlines()[-1] == run["fingerprint"]
    assert "finished already" in _text(outputs)


def test_an_edited_loss_is_another_run(executed: list[nbformat.NotebookNode]) -> None:
    """%autoreload trains the edited code: under the old fingerprint it would pass for the pipeline's run."""
    before, after = (_text(executed[place].outputs).splitlines()[-1] for place in (-4, -2))
    assert before != after
    assert "finished already" not in _text(executed[-2].outputs)


def test_a_refusal_is_one_line_in_a_notebook(executed: list[nbformat.NotebookNode]) -> None:
    (error,) = (output for output in executed[-1].outputs if output.output_type == "error")
    assert error.ename == "Refused"
    assert error.traceback == [f"Refused: {error.evalue}"]
    assert "did you mean 'dkd'" in error.evalue


def test_finished_has_every_run_with_all_columns(experiment: Experiment) -> None:
    runs = explore.finished(experiment)
    assert runs.index.names == ["comparison", "variant", "seed"]
    assert list(runs.reset_index()[collect.COLUMNS]) == collect.COLUMNS
    assert list(runs.index.unique("comparison")) == list(experiment.params.comparisons)
    assert runs["trial"].sum() == 4
    assert set(runs["status"]) == {"finished"}


def test_finished_takes_a_study_in_progress(experiment: Experiment, tmp_path: Path) -> None:
    root = tiny.write(tmp_path / "part")
    place = Path("runs/distill/small_weak/dkd/seed_1")
    shutil.copytree(experiment.root / place, root / place)
    part = Experiment(root)
    assert list(explore.finished(part).index) == [("small_weak", "dkd", 1)]
    assert explore.folders(part, explore.finished(part)) == {"small_weak dkd, seed 1": root / place}


def test_without_runs_one_line_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="run `make study`") as caught:
        explore.finished(Experiment(tiny.write(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["val", "test"])
def test_answers_agree_with_the_measures_of_the_run(experiment: Experiment, split: str) -> None:
    folder = planned.run_folder(experiment.root, ("small_weak", "dist", 1))
    answers = explore.predictions(experiment, "small_weak", folder, split)
    measured = json.loads((folder / "metrics.json").read_text())
    taught = json.loads((experiment.root / "runs/teacher/small/metrics.json").read_text())
    labels = getattr(experiment.data("fractals"), split).labels
    assert answers["label"].tolist() == labels.tolist()
    assert (answers["student"] == labels).mean() == pytest.approx(measured[f"{split}_top1"])
    assert (answers["teacher"] == labels).mean() == pytest.approx(taught[f"{split}_top1"])
    assert (answers["student"] == answers["teacher"]).mean() == pytest.approx(measured[f"{split}_agreement"])
    right = answers[answers["student"] == labels]
    assert -np.log(right["student_p"]).sum() / len(labels) <= measured[f"{split}_nll"]
    assert answers[["student_p", "teacher_p"]].min(axis=None) >= 1 / 6
    assert answers[["student_p", "teacher_p"]].max(axis=None) <= 1


def test_answers_refuse_what_diverged_and_what_is_unknown(experiment: Experiment, tmp_path: Path) -> None:
    folder = planned.run_folder(experiment.root, ("small_weak", "kd", 0))
    weights = load_file(folder / "weights.safetensors")
    save_file(
        {name: value * float("nan") if value.is_floating_point() else value for name, value in weights.items()},
        tmp_path / "weights.safetensors",
    )
    with pytest.raises(Refused, match="diverged"):
        explore.predictions(experiment, "small_weak", tmp_path)
    with pytest.raises(Refused, match="did you mean 'small_weak'"):
        explore.predictions(experiment, "small_week", folder)


def test_equal_numbers_are_one_run(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole number, or a seed out of a table, is the number of params.yaml."""
    monkeypatch.setenv("KDLIB_LOG", "test")
    seed = explore.finished(experiment).index[0][2]
    first = experiment.try_method("small_weak", "kd", 0, weight=1.0)
    assert first == experiment.try_method("small_weak", "kd", seed, weight=np.float64(1))
    assert first.name == json.loads((planned.run_folder(experiment.root, ("small_weak", "kd", 0)) / "run.json").read_text())["fingerprint"]


def test_try_method_refuses_before_training(experiment: Experiment) -> None:
    stored = sorted(experiment.store.folder.iterdir())
    for message, arguments, parameters in [
        ("did you mean 'small_weak'", ("small_week", "kd", 0), {}),
        ("did you mean 'kd'", ("small_weak", "kdd", 0), {}),
        ("did you mean 'weight'", ("small_weak", "kd", 0), {"wieght": 1.0}),
        ("temperature.*found 0", ("small_weak", "kd", 0), {"temperature": 0.0}),
    ]:
        with pytest.raises(Refused, match=message):
            experiment.try_method(*arguments, **parameters)
    assert sorted(experiment.store.folder.iterdir()) == stored
