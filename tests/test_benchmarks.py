"""The benchmarks run and write what their pages say; none of their times is asserted."""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdlib import config
from kdlib.losses import METHODS

ROOT = Path(__file__).parents[1]
CLAIMS = ("RKD, all its angles", "CRD's step", "CRD's index tables", "the loss alone", "with the step of a")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def ran(name: str, factory: pytest.TempPathFactory) -> Path:
    """A folder with what this benchmark writes with --quick."""
    folder = factory.mktemp(name)
    importlib.import_module(name).main(["--quick", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran("methods", tmp_path_factory)


def found(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "results").glob("methods_*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_every_method_with_a_term_of_its_own_has_a_row_beside_the_baselines(quick: Path) -> None:
    rows, baseline = found(quick)["rows"], config.load(ROOT).study.baseline
    assert {row["method"] for row in rows} == {name for name in METHODS if METHODS[name].asks_teacher}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["teacher"], row["batch"]), []).append(row)
    assert len(groups) == 4  # two teachers; logits and embeddings, maps
    for group in groups.values():
        first = group[0]
        assert (first["method"], first["ratio"], first["ratio_min"], first["ratio_max"]) == (baseline, 1, 1, 1)
        assert len({row["method"] for row in group}) == len(group)


def test_rows_hold_plausible_figures(quick: Path) -> None:
    content = found(quick)
    for row in content["rows"]:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["ms"] > 0
        own = METHODS[row["method"]].asks_student
        gradient = 4 * row["batch"] * content["shapes"]["student"]["classes"] if own else 0
        assert row["peak_mb"] >= (gradient + 4 * row["extra_parameters"]) / 1e6  # of logits, and of its own parameters


def test_claims_are_measured_and_judged(quick: Path) -> None:
    claims = found(quick)["claims"]
    assert len(claims) == len(CLAIMS)
    for claim, text in zip(claims, CLAIMS, strict=True):
        assert text in claim["claim"]
        assert claim["measured"]
        assert isinstance(claim["holds"], bool)


def test_the_page_shows_all_of_it(quick: Path) -> None:
    page, content = (quick / "methods.md").read_text(), found(quick)
    assert all(f"| {claim['claim']} | {claim['measured']} |" in page for claim in content["claims"])
    assert all(f"| {row['method']} | {row['teacher']} | {row['batch']} | {row['ms']:.1f} |" in page for row in content["rows"])
    assert f"batch of {content['shapes']['map_batch']}" in page


def test_the_committed_page_is_of_the_committed_results() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("methods_*.json"))
    page = ROOT / "benchmarks" / "methods.md"
    assert page.is_file() == bool(results)
    if results:
        assert page.read_text() == importlib.import_module("methods").markdown([json.loads(path.read_text()) for path in results])


def test_the_page_of_the_studies_is_of_the_committed_results() -> None:
    module = importlib.import_module("studies")
    found = json.loads((ROOT / "benchmarks" / "results" / "studies.json").read_text())
    assert (ROOT / "benchmarks" / "studies.md").read_text() == module.markdown(found)


# The engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It ends with an error unless all implementations compute the same."""
    return ran("engine", tmp_path_factory)


def test_the_engine_is_measured_beside_its_peers(engine: Path) -> None:
    (path,) = (engine / "results").glob("*.json")
    content = json.loads(path.read_text())
    assert [(row["case"], row["baseline"]) for row in content["rows"]] == [
        ("one_student", "official"),
        ("one_student", "timm"),
        ("cached_rerun", "first_run"),
        ("two_students", "official"),
        ("two_students", "timm"),
        ("two_students", "one_student"),
    ]
    for row in content["rows"]:
        assert 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        assert row["rounds"] == 2
        assert row["ceiling"] > 0
    page = (engine / "engine.md").read_text()
    assert all(f"| {row['case']} | {row['baseline']} | {row['ratio_median']:.2f} (" in page for row in content["rows"])
    (task,) = content["tasks"]
    assert all(f"| {part} |" in page for part in task["milliseconds_of_a_step"])
    assert task["seconds_of_the_first_steps"].keys() == {"official", "timm", "ours"}


def test_implementations_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, peers = importlib.import_module("engine"), importlib.import_module("peers")
    task = peers.Task(student="kd_resnet8_w8_s1", teacher="kd_resnet8_w8_s1", batch=32, images=400, students=1)
    monkeypatch.setattr(peers.KD, "distill", lambda self, *given: {"kd": 2 * given[0].logits.sum()})  # noqa: ARG005
    with pytest.raises(SystemExit, match=r"found losses that differ by .*; nothing was timed"):
        module.agree([peers.Official(task, 1, 0), peers.Ours(task, range(1))], range(3), 5e-3)


def test_a_gpu_is_measured_with_its_own_nets_and_targets() -> None:
    """As far as a CPU can say: the tasks are the issue's, their nets compute the same in all three loops at a small size."""
    module, peers = importlib.import_module("engine"), importlib.import_module("peers")
    assert {task.device for task in module.GPU.values()} == {"cuda"}
    small = dataclasses.replace(module.GPU["small_nets_"], device="cpu", size=8, batch=8, images=64)
    module.agree([peers.Official(small, 1, 0), peers.Timm(small, 0), peers.Ours(small, range(1))], range(2), 5e-3)
    found = module.used(dataclasses.replace(small, student="resnet50", size=32), 10.0)["used"]
    assert found.keys() == {"matmul_tflops", "copy_gb_per_second", "mfu", "share_of_roofline"}
    assert all(value > 0 for value in found.values())


def test_the_readme_and_the_page_say_what_the_results_say() -> None:
    module = importlib.import_module("engine")
    every = module.committed(ROOT / "benchmarks")
    readme, page = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "engine.md"
    assert readme.split("<!-- engine:begin -->")[1].split("<!-- engine:end -->")[0].strip() == module.for_readme(every).strip()
    if every:
        assert page.read_text() == module.markdown(every)


def test_growth_is_measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    (path,) = (ran("growth", tmp_path_factory) / "results").glob("growth_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["what"], row["case"]) for row in rows] == [
        *(("images", count) for count in ("600", "6,000")),
        *(("students", count) for count in ("1", "2")),
        *(("classes", count) for count in ("10", "100")),
        *(("processes", count) for count in ("1", "2")),
    ]
    assert all(row["ms"] > 0 for row in rows)


def test_decoding_is_measured_beside_timm(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = ran("decoding", tmp_path_factory)
    (path,) = (folder / "results").glob("decoding_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["repeats"] for row in rows] == [1, 3]
    assert all(row["kdlib"] > 0 and row["timm"] > 0 for row in rows)
    assert (folder / "decoding.md").read_text().count(f"{rows[1]['ratio']:.2f} (") >= 1
