"""The whole pipeline on a tiny params.yaml, driven as a user drives it."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from kdlib.config.reader import load
from kdlib.files import read_json
from kdlib.losses import METHODS
from kdlib.study.cli.notebook import describe
from kdlib.study.training import code_hash, planned
from kdlib.types import Feature
from tests import project, tiny

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished study in a path with a space, and what it printed."""
    folder = project.copy(tmp_path_factory.mktemp("with space") / "study")
    return folder, project.study(folder)


def edit(folder: Path, old: str, new: str, file: str = "params.yaml") -> None:
    """Replace exactly one text."""
    text = (folder / file).read_text()
    assert text.count(old) == 1, (old, text.count(old))
    (folder / file).write_text(text.replace(old, new))


def set_param(folder: Path, keys: str, value: object) -> None:
    """Change one value of params.yaml."""
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((folder / "params.yaml").read_text())
    *path, last = keys.split(".")
    place = content
    for key in path:
        place = place[key]
    assert place[last] != value
    place[last] = value
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)


def test_every_planned_run_is_a_row_of_the_table(done: tuple[Path, str]) -> None:
    folder, _ = done
    runs = pd.read_csv(folder / "results/runs.csv")
    assert list(zip(runs["comparison"], runs["variant"], runs["seed"], strict=True)) == planned.expected(load(folder))
    assert (runs["status"] == "finished").all()
    assert runs.loc[~runs["trial"], "test_top1"].notna().all()
    assert runs.loc[runs["trial"], "test_top1"].isna().all(), "a trial must not ask the test split"
    assert runs.groupby("comparison")["images_seen"].nunique().max() == 1
    assert (
        runs.loc[runs["comparison"] == "small_weak", "images_seen"].iloc[0]
        == runs.loc[runs["comparison"] == "tuned", "images_seen"].iloc[0]
    )


def test_the_reader_gets_tables_figures_and_the_readme(done: tuple[Path, str]) -> None:
    folder, printed = done
    for table in ("data_scale", "recipes", "tuning", "cost", "measures"):
        for form in ("md", "csv", "tex"):
            assert (folder / f"results/tables/{table}.{form}").stat().st_size > 0
    figures = {path.stem for path in (folder / "results/figures").glob("*.png")}
    assert {"data_scale", "accuracy_fractals", "learning_curves_fractals", "grid_tuned", "teachers"} <= figures
    assert {path.stem for path in (folder / "results/figures").glob("*.svg")} == figures
    headline = (folder / "results/headline.md").read_text().strip()
    assert headline in (folder / "README.md").read_text()
    assert headline in printed
    assert "No committed verdicts" in printed


def test_logs_have_one_line_per_epoch(done: tuple[Path, str]) -> None:
    _, printed = done
    lines = [line for line in project.trained(printed) if line.startswith("small_weak seed 0 ")]
    assert [re.search(r"epoch (\d+)/8", line)[1] for line in lines] == [str(epoch) for epoch in range(1, 9)]  # type: ignore[index]


def test_executed_notebooks_hold_their_outputs_and_nothing_volatile(done: tuple[Path, str]) -> None:
    folder, _ = done
    found = sorted(path.name for path in (folder / "runs/notebooks").iterdir())
    assert found == [
        "data.fractals.ipynb",
        "distill.large_strong.ipynb",
        "distill.small_weak.ipynb",
        "distill.tuned.ipynb",
        "tables.ipynb",
        "teacher.small.ipynb",
    ]
    notebook = json.loads((folder / "runs/notebooks/distill.small_weak.ipynb").read_text())
    assert any(output["output_type"] == "display_data" for cell in notebook["cells"] for output in cell.get("outputs", []))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


def test_again_runs_nothing_and_reproduces_every_verdict(done: tuple[Path, str]) -> None:
    folder, _ = done
    project.commit(folder, "results")
    printed = project.study(folder)
    assert project.stages(printed) == []
    count = len(pd.read_csv(folder / "results/verdicts.csv"))
    assert f"This machine reproduced {count} of the {count} committed verdicts." in printed
    assert project.run(folder, "git", "status", "--short") == ""


def test_saving_a_notebook_runs_nothing_but_its_copy(done: tuple[Path, str]) -> None:
    folder, _ = done
    path = folder / "notebooks/3_distill.ipynb"
    before = path.read_text()
    notebook = json.loads(before)
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["outputs"], code["execution_count"] = [{"output_type": "stream", "name": "stdout", "text": ["hi"]}], 3
    path.write_text(json.dumps(notebook))
    assert project.stages(project.dvc(folder, "repro")) == ["notebook@3_distill"]
    path.write_text(before)
    assert project.stages(project.dvc(folder, "repro")) in ([], ["notebook@3_distill"])


def test_one_methods_parameter_retrains_that_method_and_reverting_trains_nothing(done: tuple[Path, str]) -> None:
    folder, _ = done
    before = (folder / "results/runs.csv").read_text()
    set_param(folder, "methods.dist.beta", 2.0)
    printed = project.dvc(folder, "repro")
    lines = project.trained(printed)
    assert lines, "the edited method was not trained"
    assert all(" dist " in line and " kd " not in line and " dkd " not in line for line in lines)
    assert (folder / "results/runs.csv").read_text() != before
    set_param(folder, "methods.dist.beta", 1.0)
    assert project.trained(project.dvc(folder, "repro")) == []
    assert (folder / "results/runs.csv").read_text() == before


def test_editing_the_report_trains_nothing(done: tuple[Path, str]) -> None:
    folder, _ = done
    path = folder / "kdlib/study/report/render.py"
    before = path.read_text()
    path.write_text(before + "\nSPARE = 1\n")
    assert project.stages(project.dvc(folder, "repro"))[0] == "tables"
    path.write_text(before)
    project.dvc(folder, "repro")


@pytest.fixture(scope="module")
def second(done: tuple[Path, str]) -> tuple[Path, str, dict[Path, bytes]]:
    """studies/methods beside the finished default study, run from its own folder; what it printed; the default study's files before."""
    folder, _ = done
    project.dvc(folder, "repro")
    before = {path: path.read_bytes() for path in default_files(folder)}
    place = folder / "studies/methods"
    return place, project.run(place, "env", f"PYTHONPATH={folder}", "python", "-m", "kdlib.study", "run"), before


def default_files(folder: Path) -> list[Path]:
    """What the default study has written, and reads."""
    places = [folder / part for part in ("runs", "results", "build")]
    return [path for place in places for path in sorted(place.rglob("*")) if path.is_file()] + [folder / "dvc.lock", folder / "README.md"]


def test_a_second_study_makes_its_tables_figures_and_readme(second: tuple[Path, str, dict[Path, bytes]]) -> None:
    place, printed, _ = second
    runs = pd.read_csv(place / "results/runs.csv")
    assert list(zip(runs["comparison"], runs["variant"], runs["seed"], strict=True)) == planned.expected(load(place))
    assert set(runs["method"]) == set(METHODS)
    assert (runs["status"] == "finished").all()
    assert runs["step_bytes"].gt(0).all()
    for table in ("methods", "losses", "measures"):
        for form in ("md", "csv", "tex"):
            assert (place / f"results/tables/{table}.{form}").stat().st_size > 0
    figures = {path.name for path in (place / "results/figures").iterdir()}
    assert figures == {f"{name}.{form}" for name in ("methods", "methods_cost", "teachers") for form in ("svg", "png")}
    block = (place / "results/headline.md").read_text().strip()
    assert block in (place / "README.md").read_text()
    assert block in printed


def test_a_method_says_what_it_looks_at(second: tuple[Path, str, dict[Path, bytes]]) -> None:
    place, _, _ = second
    runs = pd.read_csv(place / "results/runs.csv")
    for method, looks, relational in set(zip(runs["method"], runs["looks_at"], runs["relational"], strict=True)):
        asked = METHODS[method].asks_teacher | METHODS[method].asks_student
        parts = {part.value for part in Feature if part.value in looks}
        assert relational == METHODS[method].relational
        logits = {"logits"} if METHODS[method].asks_teacher == {Feature.LOGITS} else set()
        assert parts == {part.value for part in asked - {Feature.LOGITS}} | logits
    assert len(set(runs["looks_at"])) > 4


def test_a_second_study_reuses_runs_and_leaves_the_default_one_alone(second: tuple[Path, str, dict[Path, bytes]]) -> None:
    place, printed, before = second
    folder = place.parents[1]
    assert {path: path.read_bytes() for path in default_files(folder)} == before
    assert project.stages(project.dvc(folder, "repro")) == []
    lines = project.trained(printed)
    assert not [line for line in lines if line.startswith("teacher")]
    small = [line for line in lines if line.startswith("small seed 0")]
    assert small and not any(f" {method} " in line for line in small for method in ("no_kd", "kd", "dkd", "dist")), small
    assert "small seed 0  4 of" in printed
    ignored = project.run(folder, "git", "status", "--short", "--untracked-files=all")
    assert not re.search(r"studies/methods/(runs|build|\.state)/", ignored), ignored


def test_a_second_study_runs_the_projects_code(second: tuple[Path, str, dict[Path, bytes]]) -> None:
    """From the project's folder, by name; nothing says where kdlib is but the study's own dvc.yaml."""
    place, _, _ = second
    folder = place.parents[1]
    edit(folder, "Which loss on the hard label, beside", "What hard label, beside", "kdlib/study/report/tables/by_label.py")
    printed = project.run(folder, "python", "-m", "kdlib.study", "run", "methods")
    assert project.stages(printed) == ["tables"]
    assert "Tables: studies/methods/results/tables" in printed
    assert (place / "results/tables/losses.md").read_text().startswith("### What hard label, beside")
    edit(folder, "What hard label, beside", "Which loss on the hard label, beside", "kdlib/study/report/tables/by_label.py")
    project.run(folder, "python", "-m", "kdlib.study", "run", "methods")


def test_runs_of_every_study_are_used(second: tuple[Path, str, dict[Path, bytes]]) -> None:
    place, _, _ = second
    folder = place.parents[1]
    shown = [project.run(where, "env", f"PYTHONPATH={folder}", "python", "-m", "kdlib.study", "gc") for where in (folder, place)]
    unused = [re.search(r"(\d+) runs, .*\n +not used by any runs/: (\d+) runs", text) for text in shown]
    assert unused[0] and unused[1] and unused[0].groups() == unused[1].groups()
    used = {read_json(path)["fingerprint"] for home in (folder, place) for path in (home / "runs").rglob("run.json")}
    assert int(unused[0][1]) - int(unused[0][2]) == len(used)


def test_a_study_that_is_not_there_is_refused(done: tuple[Path, str]) -> None:
    folder, _ = done
    said = project.run(folder, "python", "-m", "kdlib.study", "run", "method", code=1)
    assert said == "STUDY: found 'method'; allowed: methods; leave it out for the default study\n"


@pytest.mark.long
def test_temporary_experiments_reuse_the_other_runs(done: tuple[Path, str]) -> None:
    folder, _ = done
    project.run(folder, "git", "checkout", "-q", ".")
    before = (folder / "results/runs.csv").read_text()
    printed = project.dvc(folder, "exp", "run", "--temp", "-n", "trial", "-S", "methods.dist.gamma=3")
    lines = project.trained(printed)
    assert lines and all(" dist " in line and " kd " not in line for line in lines)
    assert (folder / "results/runs.csv").read_text() == before
    shown = project.dvc(folder, "exp", "show", "--csv")
    assert "trial" in shown and "methods.dist.gamma" in shown
    assert "small_weak.dist" in project.dvc(folder, "metrics", "diff", "HEAD", "trial", "--md")
    project.dvc(folder, "plots", "show", "-o", "build/plots")
    assert (folder / "build/plots/index.html").is_file()


@pytest.mark.long
def test_a_clone_with_the_cache_pulled_trains_nothing(done: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = done
    project.run(folder, "git", "checkout", "-q", ".")
    project.dvc(folder, "repro")
    project.dvc(folder, "remote", "add", "-f", "-d", "spare", str(tmp_path / "remote"))
    project.dvc(folder, "push", "--run-cache")
    clone = tmp_path / "clone"
    project.run(tmp_path, "git", "clone", "-q", str(folder), str(clone))
    project.dvc(clone, "remote", "add", "-f", "-d", "spare", str(tmp_path / "remote"))
    assert project.trained(project.dvc(clone, "repro", "--pull")) == []
    assert (clone / "results/runs.csv").read_bytes() == (folder / "results/runs.csv").read_bytes()
    assert (clone / "runs/distill/small_weak/kd/seed_0/weights.safetensors").is_file()


@pytest.mark.long
def test_a_deleted_store_and_an_older_commit_give_the_same_numbers(done: tuple[Path, str]) -> None:
    folder, _ = done
    project.run(folder, "git", "checkout", "-q", ".")
    project.dvc(folder, "repro")
    before = (folder / "results/runs.csv").read_bytes()
    shutil.rmtree(folder / ".dvc/kdlib-runs")
    assert project.trained(project.dvc(folder, "repro", "-f", "distill@small_weak"))
    assert (folder / "results/runs.csv").read_bytes() == before
    set_param(folder, "methods.dkd.alpha", 2.0)
    project.dvc(folder, "repro")
    project.commit(folder, "another alpha")
    assert (folder / "results/runs.csv").read_bytes() != before
    project.run(folder, "git", "checkout", "-q", "HEAD~1")
    assert project.trained(project.dvc(folder, "repro")) == []
    assert (folder / "results/runs.csv").read_bytes() == before


@pytest.mark.long
def test_gc_shows_and_frees(done: tuple[Path, str]) -> None:
    folder, _ = done
    shown = project.run(folder, "python", "-m", "kdlib.study", "gc")
    assert "nothing was deleted" in shown
    project.run(folder, "python", "-m", "kdlib.study", "gc", "--free")
    assert "not used by any runs/: 0 runs" in project.run(folder, "python", "-m", "kdlib.study", "gc")
    assert project.trained(project.dvc(folder, "repro")) == []


def same_results(folder: Path, undisturbed: Path) -> None:
    """Every run's numbers and weights are the undisturbed study's, byte for byte."""
    for run in planned.expected(load(folder)):
        for name in ("metrics.json", "curve.csv", "weights.safetensors"):
            here, there = (planned.run_folder(place, run) / name for place in (folder, undisturbed))
            assert here.read_bytes() == there.read_bytes(), (run, name)


def start(folder: Path) -> subprocess.Popen[str]:
    """`make study` in a process group of its own."""
    command = [sys.executable, "-m", "kdlib.study", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=project.environment(), start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


def read_until(study: subprocess.Popen[str], text: str) -> None:
    """Read what it prints until a line holds the text."""
    assert study.stdout is not None
    assert any(text in line for line in study.stdout), f"ended without {text!r}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project.copy(tmp_path_factory.mktemp("undisturbed") / "study")
    project.study(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("moment", ["teacher small  epoch 3", "small_weak seed 1  epoch 4", "tuned seed 7  epoch 2"])
def test_a_killed_study_goes_on_to_the_same_bytes(moment: str, undisturbed: Path, tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "study")
    study = start(folder)
    read_until(study, moment)
    os.killpg(study.pid, signal.SIGKILL)
    study.communicate()
    project.study(folder)
    same_results(folder, undisturbed)


@pytest.mark.long
def test_an_orphaned_study_and_two_at_once_end_as_one_does(undisturbed: Path, tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "study")
    orphaned = start(folder)
    read_until(orphaned, "small_weak seed 0  epoch 2")
    orphaned.kill()  # the command alone: its dvc works on
    first, second = start(folder), start(folder)
    printed = [study.communicate()[0] for study in (first, second)]
    orphaned.communicate()  # not earlier: closing its pipe would end the dvc that writes to it
    assert [first.returncode, second.returncode] == [0, 0], printed
    assert all("another study runs in this project" in text for text in printed)
    same_results(folder, undisturbed)


@pytest.mark.long
def test_a_zip_without_git_works(tmp_path: Path) -> None:
    content = tiny.content()
    content["comparisons"] = {"large_strong": content["comparisons"]["large_strong"] | {"methods": ["kd", "dkd", "dist"]}}
    folder = project.copy(tmp_path / "un zipped", content, git=False)
    project.study(folder)
    assert "This machine reproduced" in project.study(folder)


def test_code_edited_during_a_stage_is_not_recorded(tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "study", git=False)
    notebook = json.loads((folder / "notebooks/1_data.ipynb").read_text())
    notebook["cells"][-1]["source"] = [
        "from pathlib import Path\n",
        "Path('params.yaml').write_text(Path('params.yaml').read_text().replace('points: 100', 'points: 101'))",
    ]
    (folder / "build/nb").mkdir(parents=True)
    (folder / "build/nb/1_data.ipynb").write_text(json.dumps(notebook))
    printed = project.run(folder, "python", "-m", "kdlib.study.cli.notebook", "run", "data@fractals", code=1)
    assert "data@fractals: code or parameters changed while it ran" in printed
    assert not (folder / "runs/notebooks").exists()


STUDIES = {"": tiny.ROOT, "methods": tiny.ROOT / "studies" / "methods"}
TITLES = ["data@fractals", "teacher@fractals", "tables"]


def holds_code(path: Path) -> bool:
    """More than a docstring, as the __init__ of a package may have alone."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


@pytest.mark.parametrize(
    ("study", "title"),
    [("", "distill@small_weak"), ("methods", "distill@small"), *((study, title) for study in STUDIES for title in TITLES)],
)
def test_a_stage_depends_on_every_module_that_its_notebook_imports(study: str, title: str) -> None:
    stage = describe(STUDIES[study], title)
    notebook = json.loads((tiny.ROOT / "notebooks" / stage.notebook.name).read_text())
    named: set[str] = set()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.ImportFrom):
                    named |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = code_hash.closure(name for name in named if name.startswith("kdlib.") and code_hash.path(name).is_file())
    files = {code_hash.path(module).relative_to(tiny.ROOT).as_posix() for module in modules if holds_code(code_hash.path(module))}
    kdlib = Path(os.path.relpath(tiny.ROOT, STUDIES[study])) / "kdlib"
    deps = {f"kdlib/{Path(dep).relative_to(kdlib)}" for dep in stage.deps if Path(dep).is_relative_to(kdlib)}
    covered = {dep: {file for file in files if file == dep or file.startswith(dep + "/")} for dep in deps}
    assert files == set().union(*covered.values()), "a module that the notebook imports is not a dep"
    assert all(covered.values()), f"deps that it does not import: {[dep for dep, found in covered.items() if not found]}"


def test_another_study_has_the_stages_of_the_default_one() -> None:
    """The same but for the way to what all studies share: notebooks, kdlib, published numbers."""
    default, other = ((folder / "dvc.yaml").read_text().partition("stages:\n")[2] for folder in STUDIES.values())
    assert other.replace("PYTHONPATH=../.. python", "python").replace("../../", "") == default
    assert not re.search(r"(?<!\.\./\.\./)(kdlib/|results/published|(?<!runs/)notebooks/)", other)
    assert not re.search(r"(?<!PYTHONPATH=\.\./\.\. )python -m", other), "the kdlib that is installed may be another project's"


def test_stage_names_do_not_collide() -> None:
    params = load(tiny.ROOT)
    listed = [
        f"{kind}@{name}"
        for kind, names in (("data", params.data), ("teacher", params.teachers), ("distill", params.comparisons))
        for name in names
    ]
    lock = YAML(typ="safe", pure=True).load((tiny.ROOT / "dvc.lock").read_text())["stages"]
    assert set(listed) <= set(lock), "dvc.lock was not made from this params.yaml"
    assert len(listed) == len(set(listed))
