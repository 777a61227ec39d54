"""A study as a job of a real Slurm on this machine: taken away while it trains and gone on with to the same bytes; cancelled; failing."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import project, training
from tests.slurm import local

pytestmark = [
    pytest.mark.long,
    pytest.mark.pipeline,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(local.missing()), reason=f"of Slurm, {', '.join(local.missing())} is not here"),
]
SECONDS = 400  # for anything that is waited for, on a busy machine


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SLURM_CONF", str(local.start(folder)))
        yield
        local.stop(folder)


def content(processes: int, nodes: int, **changes: Any) -> dict[str, Any]:
    """Two students of 240 steps each."""
    launch = {"processes": processes, "nodes": nodes, "rendezvous": "first:29500" if nodes > 1 else None}
    made = training.content(epochs=40.0, methods=("kd", "dkd"), launch=launch, challengers=["dkd"], tables=["cost"])
    made["study"]["headline"]["recipes"] = ["strong"]
    for recipe in made["recipes"].values():
        recipe["group_size"] = 8
    made["teachers"]["small"] |= changes
    return made


def submitted(root: Path) -> str:
    """The number of the job."""
    said = project.run(root, "python", "-m", "kdlib.study", "submit", "--hours", "0.5", "--partition", "low", "--cores", "2")
    found = re.match(r"job (\d+):", said)
    assert found, said
    return found[1]


def about(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return dict(part.partition("=")[::2] for part in shown.split())


def log(root: Path) -> str:
    return "".join(path.read_text() for path in sorted((root / ".state" / "slurm").rglob("*_log.out")))


def until(found: Callable[[], object], root: Path) -> None:
    """Wait for it."""
    end = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < end, log(root)
        time.sleep(0.1)


def ended(job: str) -> bool:
    return about(job)["JobState"] not in ("RUNNING", "PENDING", "COMPLETING")


@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (2, 1), (1, 2)])
def test_a_job_that_is_preempted_goes_on_to_the_same_bytes(tmp_path: Path, processes: int, nodes: int) -> None:
    """As those of a job that nobody disturbs."""
    root, undisturbed = (project.copy(tmp_path / name / "study", content(processes, nodes)) for name in ("taken", "left"))
    job = submitted(root)
    until(lambda: "only seed 0  epoch 2/" in log(root) or ended(job), root)
    first = ["sbatch", "--parsable", "--partition=high", f"--nodes={len(local.NODES)}", "--exclusive", "--output=/dev/null"]
    subprocess.run([*first, "--wrap=sleep 1"], check=True, cwd=tmp_path)
    until(lambda: about(job)["Restarts"] == "1" or ended(job), root)
    assert not (root / "results/runs.csv").exists()
    until(lambda: about(job)["JobState"] == "PENDING" or ended(job), root)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # of itself it waits two minutes
    until(lambda: ended(job), root)
    assert (about(job)["JobState"], about(job)["Restarts"]) == ("COMPLETED", "1"), log(root)
    assert re.search(r"stopped after step [1-9]\d* of 240; the same command goes on from there", log(root))
    other = submitted(undisturbed)
    until(lambda: ended(other), undisturbed)
    assert about(other)["JobState"] == "COMPLETED", log(undisturbed)
    assert training.numbers(root) == training.numbers(undisturbed)


def test_a_job_that_is_cancelled_has_saved_what_it_had_and_is_gone(tmp_path: Path) -> None:
    root = project.copy(tmp_path / "study", content(1, 1))
    job = submitted(root)
    until(lambda: "teacher small  epoch" in log(root), root)
    subprocess.run(["scancel", job], check=True)
    until(lambda: about(job)["JobState"] == "CANCELLED", root)
    until(lambda: "the study stopped, for the reason above" in log(root), root)
    assert any(training.store(root).rglob("checkpoint-*.pt"))
    assert "Traceback" not in log(root)


def test_a_study_that_fails_is_not_begun_again(tmp_path: Path) -> None:
    root = project.copy(tmp_path / "study", content(1, 1, min_top1=1.0))
    job = submitted(root)
    until(lambda: ended(job), root)
    assert (about(job)["JobState"], about(job)["Restarts"]) == ("FAILED", "0")
    assert "params.yaml: teachers.small.min_top1: found" in log(root)
    assert "Traceback" not in log(root)
