"""Training: a run among others is the run alone; the loop against one written out in plain PyTorch; what diverges hurts nobody else."""

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_weights
from torch import Tensor, nn

from kdlib.data.splits import subset
from kdlib.engine import checkpoint
from kdlib.engine.loop import TrainingLoop
from kdlib.engine.probe import StepCost
from kdlib.engine.setting import Setting
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.losses import METHODS
from kdlib.losses.base import HardLoss, Method
from kdlib.losses.kd import KD
from kdlib.losses.no_kd import NoKD
from kdlib.models.build import build
from kdlib.study.training.experiment import Diverged, Experiment
from kdlib.types import Asks, Batch, Output, Setup, Terms
from kdlib.views.stream import ViewStream
from tests import training
from tests.training import method, setting, trained

ALL = {name: method(name) for name in METHODS}


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


@dataclass
class Seen:
    """What a method was shown, step by step."""

    batches: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    students: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)


class Spy(Method):
    """Learns as ``of`` does and writes down what it was shown."""

    def __init__(self, seen: Seen, of: Method) -> None:
        super().__init__(hard_weight=1.0, weight=1.0)
        self.seen, self.of = seen, of
        self.asks_student, self.asks_teacher, self.adapt = of.asks_student, of.asks_teacher, of.adapt  # type: ignore[misc, method-assign]

    def forward(self, student: Output, teacher: Output, batch: Batch, hard: HardLoss | None, progress: Tensor) -> Terms:
        self.seen.batches.append(digest(batch.images, batch.targets, batch.labels, batch.index))
        self.seen.answers.append(digest(teacher.logits))
        self.seen.students.append(student.logits.detach().clone())
        self.seen.index.append(batch.index)
        self.seen.progress.append(progress.item())
        terms = self.of(student, teacher, batch, hard, progress)
        self.seen.terms.append({name: term.item() for name, term in terms.items()})
        return terms


def spies(seen: dict[str, Seen]) -> dict[str, Callable[[], Method]]:
    return {name: lambda name=name: Spy(seen[name], ALL[name]()) for name in seen}


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is tried before training, so that a method is shown nothing but its training."""
    monkeypatch.setattr("kdlib.engine.train.try_step", lambda *_: StepCost(0, False))


# Isolation


def test_a_run_among_others_is_the_run_alone(tmp_path: Path) -> None:
    """Students with BatchNorm and drop path, mixed and augmented views; the order of the methods is no matter either."""
    together = trained(setting(), ALL, tmp_path / "together")
    backwards = trained(setting(), dict(reversed(ALL.items())), tmp_path / "backwards")
    alone = {name: trained(setting(), {name: make}, tmp_path / "alone")[name] for name, make in ALL.items()}
    for name in ALL:
        assert together[name] == alone[name] == backwards[name], name
    assert len({files["weights.safetensors"] for files in together.values()}) == len(ALL)


@pytest.mark.usefixtures("untried")
def test_every_student_sees_the_same_batches_and_the_teacher_passes_once(tmp_path: Path) -> None:
    seen = {name: Seen() for name in METHODS}
    teacher, calls = training.teacher(), []
    teacher.classifier.net.fc.register_forward_hook(lambda *_: calls.append(1))
    among = setting(taught_by=teacher, epochs=1.0)
    counted: list[int] = []
    trained(among, spies(seen) | {"count": lambda: Counting(calls, counted)}, tmp_path)
    assert counted == list(range(2, 8))  # passes so far, at each of the 6 steps: one before them, to measure memory
    for one in seen.values():
        assert one.batches == seen["kd"].batches
        assert one.answers == seen["kd"].answers
    assert len(set(seen["kd"].batches)) == len(seen["kd"].batches) == 6


class Counting(Spy):
    """Notes how often the teacher has answered."""

    def __init__(self, calls: list[int], counted: list[int]) -> None:
        super().__init__(Seen(), NoKD(hard_weight=1.0))
        self.calls, self.counted = calls, counted

    def forward(self, student: Output, teacher: Output, batch: Batch, hard: HardLoss | None, progress: Tensor) -> Terms:
        self.counted.append(len(self.calls))
        return super().forward(student, teacher, batch, hard, progress)


@pytest.mark.usefixtures("untried")
def test_progress_is_the_share_of_all_steps_with_the_one_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a run that goes on from a checkpoint."""
    seen, save = {"kd": Seen()}, checkpoint.save

    def interrupted(folder: Path, step: int, state: dict[str, Any]) -> None:
        save(folder, step, state)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(setting(), spies(seen), tmp_path, save_seconds=0.0)
    assert len(seen["kd"].progress) == 5
    trained(setting(), spies(seen), tmp_path)
    assert seen["kd"].progress == pytest.approx([(i + 1) / 12 for i in range(12)])


def test_no_teacher_pass_for_nobody(tmp_path: Path) -> None:
    teacher, calls = training.teacher(), []
    teacher.classifier.net.fc.register_forward_hook(lambda *_: calls.append(1))
    trained(setting(taught_by=teacher, epochs=1.0), {"no_kd": ALL["no_kd"]}, tmp_path)
    assert len(calls) < 6  # only to measure agreement


def test_a_method_without_its_teacher_is_an_error(tmp_path: Path) -> None:
    orphan = setting()
    object.__setattr__(orphan, "teacher", None)
    with pytest.raises(ValueError, match="KD: found no teacher's output"):
        trained(orphan, {"kd": ALL["kd"]}, tmp_path)


@pytest.mark.usefixtures("untried")
def test_every_method_starts_from_the_same_student(tmp_path: Path) -> None:
    """Same initialisation, batch and drop path give the same logits at the first step, and no longer at the second."""
    seen = {name: Seen() for name in METHODS}
    trained(setting(epochs=0.3), spies(seen), tmp_path)
    first = [one.students[0] for one in seen.values()]
    assert all(torch.equal(logits, first[0]) for logits in first)
    assert not torch.equal(seen["kd"].students[1], seen["dkd"].students[1])


def test_seeds_differ_in_start_views_and_subset(tmp_path: Path) -> None:
    """With a learning rate of nothing the weights at the end are those at the start."""
    starts, batches, orders = [], [], []
    for seed in (0, 1):
        seen = {"kd": Seen()}
        files = trained(setting(seed=seed, epochs=0.3, learning_rate=1e-30, weight_decay=0.0), spies(seen), tmp_path / str(seed))["kd"]
        starts.append(load_weights(files["weights.safetensors"])["fc.weight"])
        batches.append(seen["kd"].batches)
        orders.append(torch.cat(seen["kd"].index))
    assert not torch.equal(*starts)
    assert not set(batches[0]) & set(batches[1])
    assert not torch.equal(*orders)
    labels = np.repeat(np.arange(6), 16)
    assert set(subset(labels, 0.5, 0)) != set(subset(labels, 0.5, 1))


def test_a_subset_seed_gives_all_seeds_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And trials too. Without one each seed draws its own; views and initialisation are each seed's own either way."""
    params = training.content(methods=["kd"], seeds=(0, 1))
    params["comparisons"][training.COMPARISON] |= {"sweep": {"seed": 7, "grids": {"kd": {"temperature": [1]}}}}
    settings: dict[int | None, list[Setting]] = {None: [], 5: []}
    for subset_seed, among in settings.items():
        params["comparisons"][training.COMPARISON] |= {"subset_seed": subset_seed}
        study = Experiment(training.fresh(tmp_path / str(subset_seed), params))
        monkeypatch.setattr(study, "_complete", lambda setting, _, among=among: among.append(setting))
        monkeypatch.setattr(study, "_export", lambda *_: tmp_path)
        monkeypatch.setattr(study, "_chosen", lambda _: iter(()))
        study.distill(training.COMPARISON)
    labels = settings[5][0].data.train.labels
    assert {among.seed for among in settings[5]} == {0, 1, 7}
    assert all(np.array_equal(among.index, subset(labels, 0.5, 5)) for among in settings[5])
    assert all(np.array_equal(among.index, subset(labels, 0.5, among.seed)) for among in settings[None])


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("images", [24, 48, 96])
def test_every_fraction_sees_equally_many_images(tmp_path: Path, images: int) -> None:
    seen = {"no_kd": Seen()}
    files = trained(setting(index=np.arange(0, 96, 96 // images)), spies(seen), tmp_path)["no_kd"]
    metrics = json.loads(files["metrics.json"])
    assert (metrics["images_seen"], metrics["steps"]) == (192, 12)  # two passes over the whole training split
    times = torch.cat(seen["no_kd"].index).bincount()
    assert times.tolist() == [192 // images] * images


# The loop, written out


def test_the_loop_is_sgd_on_a_cosine() -> None:
    """Five steps of nesterov SGD (as timm's ``sgd`` means it), weights and not norms or biases decayed, linear warm-up, cosine."""
    rate, decay, momentum, total, warmup, temperature = 0.2, 0.01, 0.9, 10, 3, 2.0
    among = setting(drop_path=0.0, learning_rate=rate, weight_decay=decay, warmup=warmup / total, hard_loss="ce")
    stream = ViewStream(among.data.train.images, among.data.train.labels, among.index, classes=6, recipe=among.recipe, hflip=0.5, seed=3)
    torch.manual_seed(8)
    student = build(training.NET, 6, 1, 8)
    plain, teacher = copy.deepcopy(student.net), copy.deepcopy(among.teacher.classifier.net).eval()
    learner = training.learner(
        "kd", student, KD(hard_weight=0.5, weight=2.0, temperature=temperature), among.recipe, total_steps=total, seed=0
    )
    velocity = {name: torch.zeros_like(weight) for name, weight in plain.named_parameters()}
    for step in range(5):
        batch = stream.batch(step)
        learner.take(learner.step, batch, among.teacher(batch.images))
        learner.advance()
        at = step + 0.5
        now = rate * at / warmup if at < warmup else rate * (1 + math.cos(math.pi * at / total)) / 2
        inputs = (batch.images - 0.5) / 0.5
        logits, answers = plain(inputs), teacher(inputs).detach()
        cross = -(batch.targets * torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))).sum(1).mean()
        kl = F.kl_div((logits / temperature).log_softmax(1), (answers / temperature).softmax(1), reduction="batchmean")
        plain.zero_grad()
        (0.5 * cross + 2.0 * temperature**2 * kl).backward()
        with torch.no_grad():
            for name, weight in plain.named_parameters():
                is_weight = name.endswith("weight") and "bn" not in name and weight.ndim > 1
                slope = weight.grad + (decay * weight if is_weight else 0)
                velocity[name] = momentum * velocity[name] + slope
                weight.sub_(now * (slope + momentum * velocity[name]))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.net.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert learner.step == 5


def test_decay_spares_norms_and_biases() -> None:
    learner = training.learner(
        "no_kd", build(training.NET, 6, 1, 8), NoKD(hard_weight=1.0), training.recipe(weight_decay=0.01), total_steps=5, seed=0
    )
    decayed = {id(weight) for group in learner.optimizer.param_groups if group["weight_decay"] for weight in group["params"]}
    all_weights = {id(weight) for group in learner.optimizer.param_groups for weight in group["params"]}
    for module in learner.student.net.modules():
        for name, weight in module.named_parameters(recurse=False):
            assert id(weight) in all_weights
            assert (id(weight) in decayed) == (isinstance(module, nn.Conv2d | nn.Linear) and name == "weight")


def test_the_learning_rate_is_never_zero() -> None:
    learner = training.learner(
        "no_kd", build(training.NET, 6, 1, 8), NoKD(hard_weight=1.0), training.recipe(warmup=0.5), total_steps=6, seed=0
    )
    split = setting().data.train
    batch = ViewStream(split.images, split.labels, np.arange(96), classes=6, recipe=training.recipe(), hflip=0.0, seed=0).batch(0)
    rates = []
    for _ in range(6):
        learner.take(learner.step, batch, None)
        learner.advance()
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert min(rates) > 0
    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)


# What is asked


ASKING = list({(made.asks_student, made.asks_teacher): name for name, made in METHODS.items()}.values())  # one for each way to ask


def asked(done: dict[str, int]) -> tuple[dict[str, list[Asks]], list[Asks]]:
    """What each student and the teacher are asked for, pass by pass, by a training of two steps of which ``done`` are done already."""
    among = setting()
    split = among.data.train
    stream = ViewStream(split.images, split.labels, among.index, classes=6, recipe=among.recipe, hflip=0.5, seed=0)
    of_students: dict[str, list[Asks]] = {name: [] for name in done}
    of_teacher: list[Asks] = []
    learners = []
    for name, steps in done.items():
        student, made = build(training.NET, 6, 1, 8), ALL[name]()
        made.adapt(Setup(student.shape, among.teacher.shape, torch.from_numpy(split.labels[among.index].astype(np.int64))))
        student.register_forward_pre_hook(lambda _, given, name=name: of_students[name].append(given[1]))
        learners.append(training.learner(name, student, made, among.recipe, total_steps=2, seed=0))
        learners[-1].step = steps
    among.teacher.register_forward_pre_hook(lambda _, given: of_teacher.append(given[1]))
    TrainingLoop(
        learners,
        stream,
        TeacherCache(among.teacher, None, 16, 6),
        validate=lambda _: 0.0,
        save=lambda _: None,
        save_seconds=1e9,
        title="test",
    ).run()
    return of_students, of_teacher


@pytest.mark.parametrize("name", ASKING)
def test_both_models_are_asked_for_what_the_method_needs(name: str) -> None:
    """A method that asks the teacher for nothing costs no pass of it."""
    needs = METHODS[name]
    assert asked({name: 0}) == ({name: [needs.asks_student] * 2}, [needs.asks_teacher] * 2 if needs.asks_teacher else [])


def test_the_teacher_is_asked_for_those_alone_whose_turn_it_is() -> None:
    """After an interruption one method may be a step ahead: until the other has caught up nobody needs what it asks for."""
    for ahead, behind in zip(ASKING, [*ASKING[1:], ASKING[0]], strict=True):
        turns = [METHODS[behind].asks_teacher, METHODS[ahead].asks_teacher | METHODS[behind].asks_teacher]
        students = {ahead: [METHODS[ahead].asks_student], behind: [METHODS[behind].asks_student] * 2}
        assert asked({ahead: 1, behind: 0}) == (students, [asks for asks in turns if asks]), (ahead, behind)


# The teacher


def test_the_teacher_is_frozen(tmp_path: Path) -> None:
    teacher = training.teacher()
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.rand(2, 1, 8, 8)).logits.requires_grad
    trained(setting(taught_by=teacher), {"kd": ALL["kd"], "dist": ALL["dist"]}, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


# What is written


def test_the_weights_on_disk_have_the_accuracies_on_disk(tmp_path: Path) -> None:
    """Of the last epoch, in evaluation mode, on the split that the name says."""
    among = setting()
    files = trained(among, {"kd": ALL["kd"]}, tmp_path)["kd"]
    net = timm.create_model(training.NET, num_classes=6, in_chans=1).eval()
    net.load_state_dict(load_weights(files["weights.safetensors"]))
    metrics, curve = json.loads(files["metrics.json"]), pd.read_csv(tmp_path / "kd" / "curve.csv")
    for name in ("val", "test"):
        split = getattr(among.data, name)
        images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            said, taught = net((images - 0.5) / 0.5), among.teacher(images).logits
        assert metrics[f"{name}_top1"] == (said.argmax(1).numpy() == split.labels).mean()
        assert metrics[f"{name}_agreement"] == (said.argmax(1) == taught.argmax(1)).double().mean()
    assert curve["val_top1"].iloc[-1] == pytest.approx(metrics["val_top1"], abs=1e-6)
    assert (metrics["status"], metrics["student_parameters"], metrics["extra_parameters"]) == (
        "finished",
        sum(p.numel() for p in net.parameters()),
        0,
    )


def test_a_trial_is_not_told_about_the_test_split(tmp_path: Path) -> None:
    job = training.Job("kd", ALL["kd"], False, tmp_path)
    training.train(setting(epochs=0.3), [job], save_seconds=1e9)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [name for name in metrics if name.startswith("val_")]
    assert not [name for name in metrics if name.startswith("test_")]


@pytest.mark.usefixtures("untried")
def test_the_curve_holds_the_means_of_each_epoch(tmp_path: Path) -> None:
    seen = {"dkd": Seen()}
    trained(setting(index=np.arange(40)), spies(seen), tmp_path)  # batches of 16 straddle passes of 40
    curve = pd.read_csv(tmp_path / "dkd" / "curve.csv")
    assert curve["step"].tolist() == [3, 5, 8, 10, 12]
    assert curve["images_seen"].tolist() == [48, 80, 128, 160, 192]
    assert curve["epoch"].tolist() == [1, 2, 3, 4, 4]
    starts = [0, *curve["step"]][:-1]
    for term in ("hard", "tckd", "nckd"):
        means = [np.mean([terms[term] for terms in seen["dkd"].terms[a:b]]) for a, b in zip(starts, curve["step"], strict=True)]
        np.testing.assert_allclose(curve[f"loss_{term}"], means, atol=1e-6)
    np.testing.assert_allclose(curve["loss"], curve[["loss_hard", "loss_tckd", "loss_nckd"]].sum(axis=1), atol=2e-6)


# Divergence


class Breaks(Method):
    """Becomes infinite at one step; at its last it can grow huge instead, which the loss does not show."""

    def __init__(self, at: int, huge: bool = False) -> None:
        super().__init__(hard_weight=1.0, weight=1.0)
        self.step, self.at, self.huge = nn.Buffer(torch.tensor(0)), at, huge

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:  # noqa: ARG002
        self.step += 1
        factor = (1e30 if self.huge else math.inf) if int(self.step) == self.at + 1 else 0.0
        return {"extra": (student.logits.square() * factor).sum() if factor else student.logits.sum() * 0}


def test_a_run_that_diverges_hurts_nobody_else(tmp_path: Path) -> None:
    files = trained(setting(), {"breaks": lambda: Breaks(at=4), "kd": ALL["kd"]}, tmp_path / "both")
    metrics = json.loads(files["breaks"]["metrics.json"])
    assert (metrics["status"], metrics["diverged_step"], metrics["steps"], metrics["images_seen"]) == ("diverged", 4, 5, 80)
    assert metrics["diverged_cause"].startswith("of the loss terms only extra was not finite")
    assert not [name for name in metrics if name.startswith(("val_", "test_"))]
    assert pd.read_csv(tmp_path / "both" / "breaks" / "curve.csv")["step"].max() <= 4
    assert files["kd"] == trained(setting(), {"kd": ALL["kd"]}, tmp_path / "alone")["kd"]


def test_logits_that_are_not_finite_are_divergence_too(tmp_path: Path) -> None:
    files = trained(setting(), {"breaks": lambda: Breaks(at=11, huge=True), "kd": ALL["kd"]}, tmp_path)
    metrics = json.loads(files["breaks"]["metrics.json"])
    assert (metrics["status"], metrics["diverged_step"]) == ("diverged", 11)
    assert "logits" in metrics["diverged_cause"]
    assert json.loads(files["kd"]["metrics.json"])["status"] == "finished"


def test_divergence_is_told_or_stops_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``fail`` the study stops the second time too, when the diverged run is taken from the store."""
    params = training.content(methods=["no_kd", "kd"], on_divergence="fail")
    params["recipes"]["strong"]["learning_rate"] = 1e38
    root = training.fresh(tmp_path / "project", params)
    for _ in range(2):
        with pytest.raises(
            Diverged, match=r"params.yaml: study.on_divergence: found 'fail'; only seed 0: no_kd diverged at step \d+: .*learning rate"
        ):
            Experiment(root).distill(training.COMPARISON)
    params["study"]["on_divergence"] = "continue"
    training.tiny.write(root, params)
    folders = Experiment(root).distill(training.COMPARISON)
    found = [json.loads((folder / "metrics.json").read_text())["status"] for folder in folders]
    assert found == ["diverged", "diverged"]
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


def test_a_diverged_teacher_teaches_nobody(tmp_path: Path) -> None:
    params: dict[str, Any] = training.content()
    params["recipes"]["weak"] |= {"learning_rate": 1e38, "epochs": 1.0}
    root = training.fresh(tmp_path / "project", params)
    with pytest.raises(ValueError, match=r"params.yaml: teachers.small: found 'diverged at step"):
        Experiment(root).make_teacher("small")


def test_equal_runs_under_two_names_are_trained_once(tmp_path: Path) -> None:
    """A sweep may choose the parameters that ``methods`` has."""
    params = training.content(methods=["kd"])
    params["comparisons"][training.COMPARISON]["sweep"] = {"seed": 0, "grids": {"kd": {"temperature": [1]}}}
    root = training.fresh(tmp_path / "project", params)
    trial, plain, tuned = Experiment(root).distill(training.COMPARISON)
    assert [json.loads((folder / "run.json").read_text())["variant"] for folder in (trial, plain, tuned)] == [
        "trial/kd.temperature_1",
        "kd",
        "kd_tuned",
    ]
    assert (plain / "weights.safetensors").read_bytes() == (tuned / "weights.safetensors").read_bytes()
    assert len([folder for folder in training.store(root).iterdir() if folder.is_dir()]) == 2
