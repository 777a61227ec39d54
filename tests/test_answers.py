"""A teacher's answers: live or from the disk the same training, to the bit; and what is wrong on the disk does no harm."""

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdlib.engine import teacher_cache as module
from kdlib.engine import train
from kdlib.engine.setting import Setting
from kdlib.engine.teacher_cache import KEPT, DifferentAnswers, TeacherCache, rounded
from kdlib.losses import METHODS
from kdlib.study.training import identity
from kdlib.study.training.experiment import Experiment
from kdlib.types import Feature, Output
from tests import training
from tests.training import Numbers, method, setting, trained

TAUGHT = tuple(name for name, made in METHODS.items() if made.asks_teacher and made.asks_teacher <= set(KEPT))
SOME = {name: method(name) for name in ("kd", "rkd")}  # logits; embeddings
GROUPS = 12  # of two epochs of 6
LIVE = GROUPS + 1  # passes: one comes before the training, to measure memory
SAMPLES = 2 * 2 + 1  # at most two of each epoch's file


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[TeacherCache]:
    """Every ``TeacherCache`` that a training makes."""
    made: list[TeacherCache] = []

    def note(*given: Any) -> TeacherCache:
        made.append(TeacherCache(*given))
        return made[-1]

    monkeypatch.setattr(train, "TeacherCache", note)
    return made


def keeping(folder: Path, gigabytes: float = 1.0, **changes: Any) -> Setting:
    return dataclasses.replace(setting(**changes), cache_folder=folder, answers_gb=gigabytes)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return trained(setting(), SOME, tmp_path_factory.mktemp("live"))


def test_cached_is_live(tmp_path: Path, live: Numbers, passes: list[TeacherCache]) -> None:
    first = trained(keeping(tmp_path / "answers"), SOME, tmp_path / "first")
    again = trained(keeping(tmp_path / "answers"), SOME, tmp_path / "again")
    assert first == again == live
    assert passes[0].passes == LIVE
    assert passes[1].passes <= SAMPLES


@pytest.mark.parametrize("name", TAUGHT)
def test_another_method_needs_no_teacher(tmp_path: Path, passes: list[TeacherCache], name: str) -> None:
    alone = trained(setting(), {name: method(name)}, tmp_path / "alone")
    trained(keeping(tmp_path / "answers"), SOME, tmp_path / "first")
    assert trained(keeping(tmp_path / "answers"), {name: method(name)}, tmp_path / "second") == alone
    assert passes[-1].passes <= SAMPLES


def test_embeddings_that_nobody_asked_for_yet_are_added(tmp_path: Path, live: Numbers, passes: list[TeacherCache]) -> None:
    trained(keeping(tmp_path / "answers"), {"kd": SOME["kd"]}, tmp_path / "first")
    assert not list((tmp_path / "answers").glob("embedding*"))
    for _ in range(2):
        found = trained(keeping(tmp_path / "answers"), {"rkd": SOME["rkd"]}, tmp_path / f"run {len(passes)}")
        assert found["rkd"] == live["rkd"]
    assert [made.passes for made in passes[1:]] == [LIVE, pytest.approx(4, abs=1)]


def test_maps_are_asked_live_and_their_logits_kept(tmp_path: Path, live: Numbers, passes: list[TeacherCache]) -> None:
    trained(keeping(tmp_path / "answers"), {"fitnet": method("fitnet")}, tmp_path / "maps")
    assert trained(keeping(tmp_path / "answers"), {"kd": SOME["kd"]}, tmp_path / "kd")["kd"] == live["kd"]
    assert passes[1].passes <= SAMPLES


def test_a_study_with_another_parameter_needs_no_teacher(tmp_path: Path, passes: list[TeacherCache]) -> None:
    content = training.content(methods=["kd", "dkd"])
    root = training.fresh(tmp_path, content)
    Experiment(root).distill(training.COMPARISON)
    assert passes[-1].passes == 6 + 1
    content["methods"]["dkd"]["beta"] = 3.0
    training.tiny.write(root, content)
    Experiment(root).distill(training.COMPARISON)
    assert len(passes) == 2
    assert passes[-1].passes <= 2 + 1


# What the files are named after


def test_answers_are_known_by_all_that_they_depend_on() -> None:
    plain, recipe, data = setting(), training.recipe(), setting().data
    seen = [{"batch_size": 24}, {"group_size": 8}, {"repeats": 2}, {"crop_padding": 0.5}, {"crop_min_area": 0.9}, {"mixup_alpha": 0.9}]
    seen += [{"cutmix_alpha": 0.9}, {"randaugment": recipe.randaugment.model_copy(update={"operations": 1})}]
    others = [dataclasses.replace(plain, recipe=recipe.model_copy(update=change)) for change in seen]
    others += [dataclasses.replace(plain, **change) for change in ({"seed": 9}, {"index": np.arange(9)})]
    others += [dataclasses.replace(plain, data=dataclasses.replace(data, **change)) for change in ({"fingerprint": "x"}, {"hflip": 0.1})]
    found = {identity.of_answers(other, "teacher") for other in [plain, *others]} | {identity.of_answers(plain, "other teacher")}
    assert len(found) == len(others) + 2
    unseen = [{"learning_rate": 1.0}, {"epochs": 9.0}, {"drop_path": 0.5}, {"hard_loss": "ce"}, {"label_smoothing": 0.5}, {"ema": [0.5]}]
    for change in unseen:
        same = dataclasses.replace(plain, recipe=recipe.model_copy(update=change), student="other", title="other")
        assert identity.of_answers(same, "teacher") == identity.of_answers(plain, "teacher")


# What is kept


def test_rounding() -> None:
    logits = torch.tensor([[1 / 3, 1e6, -1e6, 1e-12], [torch.nan, torch.inf, 0.0, 1.0]])
    maps = (torch.rand(2, 1, 1, 1),)
    found = rounded(Output(logits, logits, maps))
    expected = torch.tensor([[0.333251953125, 65504.0, -65504.0, 0.0], [torch.nan, 65504.0, 0.0, 1.0]])
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.embedding, expected, rtol=0, atol=0, equal_nan=True)
    assert found.maps is maps
    assert rounded(Output(logits.double())).logits.dtype == torch.float64


def test_the_size_that_is_announced(tmp_path: Path, passes: list[TeacherCache], capsys: pytest.CaptureFixture[str]) -> None:
    trained(keeping(tmp_path / "answers"), SOME, tmp_path / "runs")
    size = sum(file.stat().st_size for file in (tmp_path / "answers").iterdir())
    assert passes[0].bytes(GROUPS, frozenset({Feature.LOGITS, Feature.EMBEDDING})) == size
    assert f"the teacher's answers, {size / 1e9:.3g} GB, are kept in {tmp_path / 'answers'}" in capsys.readouterr().out


def test_beyond_the_budget_the_teacher_stays_live(
    tmp_path: Path, live: Numbers, passes: list[TeacherCache], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert trained(keeping(tmp_path / "answers", gigabytes=1e-9), SOME, tmp_path / f"run {len(passes)}") == live
    assert [made.passes for made in passes] == [LIVE, LIVE]
    assert not (tmp_path / "answers").exists()
    assert "are not kept: more than study.answers_gb, 1e-09 GB" in capsys.readouterr().out


# What goes wrong


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


@pytest.mark.parametrize("damage", [cut, flip, zeros, lengthen, Path.unlink])
def test_damage_is_mended(tmp_path: Path, live: Numbers, passes: list[TeacherCache], damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "answers"
    trained(keeping(folder), SOME, tmp_path / "first")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for file in folder.iterdir():
        damage(file)
    assert trained(keeping(folder), SOME, tmp_path / "second") == live
    assert {file.name: file.read_bytes()[: len(whole[file.name])] for file in folder.iterdir()} == whole
    assert passes[1].passes < GROUPS or damage in (zeros, Path.unlink)


def test_another_teachers_answers_are_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    trained(keeping(folder), SOME, tmp_path / "first")
    other = dataclasses.replace(keeping(folder), teacher=training.teacher(seed=6))
    with pytest.raises(DifferentAnswers, match=r"found answers to group 0 that differ .* delete .*answers"):
        trained(other, SOME, tmp_path / "second")


def test_an_edit_with_a_right_checksum_is_found_by_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "answers"
    trained(keeping(folder), {"kd": SOME["kd"]}, tmp_path / "first")
    file = folder / "logits-00000.bin"
    block = np.fromfile(file, module._block(16, 6))
    block["values"][4, 3, 2] += 0.5
    block["sum"][4] = module._sum(block["values"][4])
    block.tofile(file)
    monkeypatch.setattr(module.secrets, "randbelow", lambda _: 4)
    with pytest.raises(DifferentAnswers, match=r"group 4 .* by 0.49"):
        trained(keeping(folder), {"kd": SOME["kd"]}, tmp_path / "second")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_costs_nothing_else(
    tmp_path: Path, live: Numbers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    os_open, left = os.open, 5

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        nonlocal left
        left -= str(path).endswith(".bin")
        if left < 0 and str(path).endswith(".bin"):
            raise OSError(number, os.strerror(number))
        return os_open(path, *rest, **more)

    monkeypatch.setattr(module.os, "open", refuse)
    assert trained(keeping(tmp_path / "answers"), SOME, tmp_path / "runs") == live
    assert capsys.readouterr().err.count(f"{os.strerror(number)}: going on without keeping") == 1
    monkeypatch.undo()
    assert trained(keeping(tmp_path / "answers"), SOME, tmp_path / "again") == live
