"""What is chosen for a device, and that it computes what fp32 without it does."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves, tree_map_only

from kdlib.config.schema import ComputeParams, Recipe
from kdlib.engine import backend as module
from kdlib.engine import compile, train
from kdlib.engine.backend import Backend, choose_backend, fastest_teacher, threads
from kdlib.engine.compile import in_turn, quickest
from kdlib.engine.prefetch import prefetch
from kdlib.engine.teacher import Teacher
from kdlib.engine.teacher_cache import TeacherCache, rounded
from kdlib.errors import Refused
from kdlib.losses import METHODS
from kdlib.models.build import build
from kdlib.seed import seed_torch
from kdlib.types import Feature, Setup
from kdlib.views.stream import ViewStream
from tests import training
from tests.refusals import refused
from tests.training import method, setting, trained

CUDA = torch.device("cuda")
RECIPE = training.recipe()
LOGITS = frozenset({Feature.LOGITS})
SOME = {name: method(name) for name in ("kd", "rkd")}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def params(**changes: object) -> ComputeParams:
    return ComputeParams.model_validate({"precision": "auto", "compile": "auto", "resident": "auto", "ahead": "auto", **changes})


def choose(compute: ComputeParams, device: torch.device, recipe: Recipe, steps: int, size: int) -> Backend:
    """With a teacher that is asked."""
    return choose_backend(compute, device, recipe, steps, size, LOGITS)


def test_a_cpu_computes_plainly() -> None:
    assert choose(params(), training.CPU, RECIPE, 10**6, 10) == Backend(training.CPU, bf16=False, kinds=(False,), resident=False)
    forced = choose(params(compile=True, resident=True, precision="fp32"), training.CPU, RECIPE, 1, 10)
    assert forced == Backend(training.CPU, bf16=False, kinds=(True,), resident=True)
    with pytest.raises(
        Refused, match=r"study.compute.compile: found 'graphs'; allowed: auto, true or false, but for one process with a GPU"
    ):
        choose(params(compile="graphs"), training.CPU, RECIPE, 1, 1)


@pytest.mark.parametrize(("count", "ahead"), [(1, 0), (2, 1), (5, 2), (8, 4)])
def test_half_of_the_threads_work_ahead(count: int, ahead: int) -> None:
    with threads(count):
        assert choose(params(), training.CPU, RECIPE, 1, 1).ahead == ahead
        assert choose(params(ahead=False), training.CPU, RECIPE, 1, 1).ahead == 0
        assert choose_backend(params(), training.CPU, RECIPE, 1, 1, frozenset()).ahead == 0, "a view alone does not take long"
        assert choose(params(), training.CPU, training.recipe(augment="timm", crop_padding=0.0), 1, 1).ahead == 0
        for wanted in ("auto", False):
            assert choose(params(precision="fp32", resident=False, ahead=wanted), CUDA, RECIPE, 1, 1).ahead == 0
        with refused("study.compute.ahead"):
            choose(params(precision="fp32", resident=False, ahead=True), CUDA, RECIPE, 1, 1)


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_made_ahead_comes_in_order(count: int) -> None:
    asked: list[int] = []
    given = prefetch(lambda place: -place, (asked.append(place) or place for place in range(5)), count)  # type: ignore[func-returns-value]
    assert next(given) == (0, 0)
    assert len(asked) == 1 + count
    assert list(given) == [(1, -1), (2, -2), (3, -3), (4, -4)]
    assert list(prefetch(lambda place: place, [], count)) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda place: 1 // place, [1, 0], count))


def test_training_with_work_ahead_is_the_same(tmp_path: Path) -> None:
    """Of several groups too, and where a run diverges meanwhile, and gone on from the middle."""
    methods = {name: method(name) for name in ("kd", "fitnet", "no_kd")}
    for number, changes in enumerate(({}, {"group_size": 8})):
        among = setting(**changes)
        plain = trained(among, methods, tmp_path / f"plain {number}")
        with threads(2):  # one for each; the measures at the end have both
            ahead = trained(among, methods, tmp_path / f"ahead {number}")
        for name, files in plain.items():
            assert [ahead[name][file] for file in ("weights.safetensors", "curve.csv")] == [
                files[file] for file in ("weights.safetensors", "curve.csv")
            ]
        said = json.loads((tmp_path / f"ahead {number}" / "kd" / "environment.json").read_text())
        assert (said["ahead"], said["threads"]) == (1, 2)


def test_a_student_is_compiled_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: asked.append(module) or module)
    for compiled in (False, True):
        student, made = build(training.NET, 6, 1, 8), method("no_kd")()
        of = choose(params(compile=compiled), training.CPU, RECIPE, 1, 1)
        assert training.learner("no_kd", student, made, RECIPE, total_steps=2, seed=0, backend=of)
        assert len(asked) == compiled


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What CUDA graphs do, on a CPU: a recording changes nothing; a replay does the same again with the same tensors, and what the last one
    returned anywhere is lost.
    """
    recordings: list[Callable[[], object]] = []
    returned: list[torch.Tensor] = []

    def recording(do: Callable[[], dict[str, object]]) -> tuple[Callable[[], None], dict[str, object]]:
        said: dict[str, object] = {}

        def replay() -> None:
            for one in returned:
                one.fill_(torch.nan)
            found = do()
            if not said:
                said.update(tree_map_only(torch.Tensor, torch.clone, found))
                returned.extend(one for one in tree_leaves(said) if isinstance(one, torch.Tensor))
            for here, value in zip(tree_leaves(said), tree_leaves(found), strict=True):
                if isinstance(here, torch.Tensor):
                    here.copy_(value)

        recordings.append(replay)
        return replay, said

    monkeypatch.setattr(compile, "recording", recording)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(compile, "warm_up", lambda do: [do() for _ in range(3)])
    return recordings


@pytest.mark.parametrize("changes", [{"group_size": 8}, {"drop_path": 0.3}, {"clip_norm": 1.0, "ema": [0.9]}])
def test_a_replayed_training_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[Callable[[], object]], changes: dict[str, object]
) -> None:
    """Of students that take turns, one with a bank and buffers that its method replaces; nothing that a replay returned is used later."""
    methods = {name: method(name) for name in ("kd", "crd", "rkd", "no_kd")}
    unmixed = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    plain = trained(setting(**unmixed, **changes), methods, tmp_path / "plain")
    monkeypatch.setattr(train, "choose_backend", lambda *_: Backend(training.CPU, kinds=("graphs",)))
    monkeypatch.setattr(train, "fastest_teacher", lambda teacher, *_: teacher)
    graphs = trained(setting(**unmixed, **changes), methods, tmp_path / "graphs")
    assert len(recorded) == len(methods)
    assert graphs == plain


def test_a_replayed_teacher_says_the_same(recorded: list[Callable[[], object]]) -> None:
    plain, every = training.teacher(), frozenset(Feature)
    graph = plain.compiled("graphs")
    first, second = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    said = [graph(first), graph(second), graph(first, every), graph(second[:2])]
    expected = [plain(first), plain(second), plain(first, every), plain(second[:2])]
    assert len(recorded) == 3
    for mine, its in zip(said, expected, strict=True):
        torch.testing.assert_close(vars(mine), vars(its), rtol=0, atol=0)


def test_a_gpu_gets_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    assert choose(params(), CUDA, RECIPE, 10**6, 500) == Backend(CUDA, bf16=True, kinds=(False, True, "graphs"), resident=True)
    assert choose(params(), CUDA, RECIPE, 10, 501) == Backend(CUDA, bf16=True, kinds=(False,), resident=False)
    assert choose(params(compile="graphs"), CUDA, RECIPE, 10, 501).kinds == ("graphs",)
    off = choose(params(precision="fp32", compile=False, resident=False), CUDA, RECIPE, 10**6, 500)
    assert off == Backend(CUDA)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert not choose(params(), CUDA, RECIPE, 10, 10).bf16


def test_bf16_is_refused_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bf16_slowdown", lambda: 9.7)
    with pytest.raises(Refused, match=r"study.compute.precision: found 'bf16'; allowed: fp32 or auto .* takes 9.7 times as long"):
        choose(params(precision="bf16"), training.CPU, RECIPE, 1, 1)
    monkeypatch.setattr(module, "bf16_slowdown", lambda: 0.5)
    assert choose(params(precision="bf16"), training.CPU, RECIPE, 1, 1).bf16


def test_the_slowdown_is_measured() -> None:
    assert 0.05 < module.bf16_slowdown() < 1000


def test_in_turn_takes_the_least_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = 0.0, iter([50, 70, 5, 7, 4, 9, 6, 8])

    def clock() -> float:
        return now

    def work() -> None:
        nonlocal now
        now += next(costs)

    monkeypatch.setattr(compile.time, "perf_counter", clock)
    assert in_turn([work, work], rounds=3) == [4, 7]


@pytest.mark.parametrize(("net", "how"), [(training.NET, "autocast"), ("test_vit", "weights")])
def test_a_teacher_answers_in_bf16(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], net: str, how: str) -> None:
    """One without BatchNorm with weights in it; any one only if its answers stay what they are; and the teacher itself does not change."""
    images, bf16 = torch.rand(16, 3, 32, 32), Backend(training.CPU, bf16=True)
    seed_torch(0, "net")
    teacher = Teacher(build(net, 6, 3, 32))
    every = frozenset(Feature)
    exact = teacher(images, every)
    assert fastest_teacher(teacher, Backend(training.CPU), images, LOGITS) is teacher
    found = fastest_teacher(teacher, bf16, images, LOGITS)
    assert found.bf16 == how
    said = found(images, every)
    assert said.logits.dtype == said.maps[0].dtype == torch.bfloat16
    for mine, its in ((said.logits, exact.logits), (said.embedding, exact.embedding), *zip(said.maps, exact.maps, strict=True)):
        assert 0 < (mine.float() - its).norm() / its.norm() < module.TEACHER_GAP
    assert rounded(said).logits.dtype == torch.float32
    assert torch.equal(teacher(images).logits, exact.logits)
    monkeypatch.setattr(module, "TEACHER_GAP", 0.0)
    assert fastest_teacher(teacher, bf16, images, LOGITS) is teacher
    assert "the teacher answers in fp32: in bf16 its logits differ by" in capsys.readouterr().out


@pytest.mark.parametrize("quicker", [True, False])
def test_a_student_is_compiled_where_it_gets_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quicker: bool
) -> None:
    """Measured on copies: nothing changes in what is learnt."""

    def timed(candidates: Sequence[Callable[[], object]], rounds: int) -> list[float]:
        in_turn(candidates, rounds)
        return [1.0, 0.5 if quicker else 2.0]

    plain = trained(setting(drop_path=0.3), SOME, tmp_path / "plain")
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda together, **_: compiled.append(together) or together)
    monkeypatch.setattr(train, "choose_backend", lambda *_: Backend(training.CPU, kinds=(False, True)))
    monkeypatch.setattr(compile, "in_turn", timed)
    assert trained(setting(drop_path=0.3), SOME, tmp_path / "measured") == plain
    assert len(compiled) == 1 + (2 if quicker else 1) * len(SOME)  # the teacher on a copy that stays, students on copies that do not
    printed = capsys.readouterr().out
    for name in ("the teacher", *SOME):
        said = "compiled; a step takes 1 s not compiled, 0.5 s compiled" if quicker else "not compiled; a step takes 1 s not compiled, 2 s"
        assert f"{name}: {said}" in printed
    for name in SOME:
        record = json.loads((tmp_path / "measured" / name / "environment.json").read_text())
        assert (record["compiled"], record["teacher_compiled"]) == (quicker, quicker)


def test_graphs_are_tried_where_steps_are_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    times = {bool: 0.03, int: 0.019, float: 0.01}
    monkeypatch.setattr(compile, "in_turn", lambda steps, _: [times[step] for step in steps])
    assert quickest("a", {False: bool, True: bool, "graphs": fail}) is False
    assert quickest("b", {False: bool, True: int, "graphs": float}) == "graphs"
    assert quickest("c", {"graphs": fail}) == "graphs"  # there is nothing to choose from
    assert capsys.readouterr().out.splitlines() == [
        "a: not compiled; a step takes 0.03 s not compiled, 0.03 s compiled",
        "b: as a CUDA graph; a step takes 0.03 s not compiled, 0.019 s compiled, 0.01 s as a CUDA graph",
    ]
    monkeypatch.undo()
    refusal = r"compute.compile: found 'auto'; .* which d not compiled or compiled does not \(CUDA out of memory.\); set it to false"
    with pytest.raises(Refused, match=refusal):
        quickest("d", {False: bool, True: fail})


# What is computed


def test_a_resident_training_is_the_same(tmp_path: Path) -> None:
    plain = trained(setting(), {"kd": method("kd")}, tmp_path / "plain")
    resident = trained(dataclasses.replace(setting(), compute=params(resident=True)), {"kd": method("kd")}, tmp_path / "resident")
    assert resident == plain
    said = json.loads((tmp_path / "resident" / "kd" / "environment.json").read_text())
    assert (said["bf16"], said["compiled"], said["resident"]) == (False, False, True)


def train_plain_and_compiled(folder: Path) -> None:
    """In a process without the tests' type checks, which a tracer cannot pass."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    # once for each learner: dynamo would go on uncompiled and say it in a warning
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 1, True
    methods = {name: method(name) for name, made in METHODS.items() if not made.unmixed}
    short = setting(epochs=0.5, drop_path=0.0)
    trained(short, methods, folder / "plain")
    trained(dataclasses.replace(short, compute=params(compile=True)), methods, folder / "compiled")


def test_a_compiled_student_learns_the_same(tmp_path: Path) -> None:
    """With its loss, by the tracer without the code generator."""
    process = training.start(train_plain_and_compiled, tmp_path)
    process.join(280)
    assert process.exitcode == 0
    plain = sorted((tmp_path / "plain").rglob("weights.safetensors"))
    assert len(plain) == len([made for made in METHODS.values() if not made.unmixed])
    for path in plain:
        ours, theirs = load_file(path), load_file(tmp_path / "compiled" / path.relative_to(tmp_path / "plain"))
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4, msg=f"{path} {key}")


# On a GPU


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_step_waits_for_the_device(tmp_path: Path, name: str) -> None:
    """Views, teacher or its answers, student, loss, optimiser, averages and clipping, with CUDA's synchronisations turned into errors."""
    mixes = {} if not METHODS[name].unmixed else {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    among = setting(ema=[0.9], clip_norm=1.0, **mixes)
    split = among.data.train
    images = torch.from_numpy(np.array(split.images)).to(CUDA)
    for held, kept in ((images, None), (split.images, None), (images, tmp_path), (images, tmp_path)):  # the last one reads
        stream = ViewStream(held, split.labels, among.index, classes=6, recipe=among.recipe, hflip=0.5, seed=0, device=CUDA)
        teacher, student, made = training.teacher().to(CUDA), build(training.NET, 6, 1, 8, 0.3).to(CUDA), method(name)()
        made.adapt(Setup(student.shape, teacher.shape, torch.from_numpy(split.labels[among.index].astype("int64"))))
        compute = Backend(CUDA, bf16=True)
        learner = training.learner(name, student, made.to(CUDA), among.recipe, total_steps=20, seed=0, backend=compute)
        answers = TeacherCache(teacher.in_bf16(), kept, 16, 6, tolerance=1.0)
        for step in range(6):
            with warnings.catch_warnings(action="ignore"):  # torch's: that this mode does not see everything yet
                torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            try:
                batch = stream.batch(step)
                asks = made.asks_teacher
                learner.take(step, batch, answers(step, batch.images, asks) if asks else None)
                learner.advance()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        answers.finish()


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # torch offers them where fp32 was asked for
@pytest.mark.parametrize("changes", [{"compile": True}, {"compile": "graphs"}])
def test_what_is_quicker_learns_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    """A compiled student, and its graphs, compute the same."""
    losses = {}
    for name, compute in (
        ("plain", params(precision="fp32", compile=False)),
        ("quick", params(**{"precision": "fp32", "compile": False, **changes})),
    ):
        among = dataclasses.replace(setting(epochs=8.0, drop_path=0.0), device=CUDA, teacher=training.teacher().to(CUDA), compute=compute)
        trained(among, {one: method(one) for one in ("kd", "fitnet")}, tmp_path / name)
        losses[name] = pd.read_csv(tmp_path / name / "kd" / "curve.csv")["loss"].to_numpy()
    assert losses["quick"] == pytest.approx(losses["plain"], rel=0.02)


@pytest.mark.gpu
@gpu
def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path) -> None:
    """In fp32 and in bf16 as far as rounding goes: the loss of every epoch."""
    losses = {}
    for device, precision in ((training.CPU, "fp32"), (CUDA, "fp32"), (CUDA, "bf16")):
        teacher = training.teacher().to(device)
        among = dataclasses.replace(setting(drop_path=0.0), device=device, teacher=teacher, compute=params(precision=precision))
        trained(among, {"kd": method("kd")}, tmp_path / f"{device}{precision}")
        losses[device.type, precision] = pd.read_csv(tmp_path / f"{device}{precision}" / "kd" / "curve.csv")["loss"].to_numpy()
    assert losses["cuda", "fp32"] == pytest.approx(losses["cpu", "fp32"], rel=0.02)
    assert losses["cuda", "bf16"] == pytest.approx(losses["cpu", "fp32"], rel=0.1)
