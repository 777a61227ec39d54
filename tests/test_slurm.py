"""A study as a Slurm job: what Slurm is asked for, and what is refused before it is submitted. These need no Slurm."""

import math
from pathlib import Path
from typing import Any

import pytest

from kdlib.config.schema import Launch
from kdlib.errors import Refused

slurm = pytest.importorskip("kdlib.study.cli.slurm", reason="submitit is not installed")


def asked(**changed: Any) -> Any:
    return slurm.Asked(**{"hours": 1.0, "partition": None, "gpus": 0, "cores": None, "options": []} | changed)


def test_what_is_asked_of_slurm() -> None:
    given = slurm._parameters(
        Path("/a/mine"), asked(hours=1.5, gpus=2, options=["account=abc", "exclusive"]), Launch(processes=2, nodes=3, rendezvous=None)
    )
    assert (given["time"], given["nodes"], given["cpus_per_task"], given["gpus_per_node"]) == (90, 3, 2, 2)
    assert given["additional_parameters"] == {"requeue": True, "account": "abc", "exclusive": True}
    assert "partition" not in given


@pytest.mark.parametrize("hours", [0.0, -1.0, math.inf, math.nan])
def test_hours_that_are_none_are_refused(hours: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TOOLS", ())
    with pytest.raises(Refused, match="--hours"):
        slurm._check(asked(hours=hours), Launch(processes=1, nodes=1, rendezvous=None))


def test_without_slurm_it_says_what_it_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="sbatch: found none on PATH"):
        slurm._check(asked(), Launch(processes=1, nodes=1, rendezvous=None))


def test_as_many_gpus_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TOOLS", ())
    with pytest.raises(Refused, match=r"study\.launch\.processes: found 1; allowed: 2"):
        slurm._check(asked(gpus=2), Launch(processes=1, nodes=1, rendezvous=None))
