"""Every registered method, none of them named, from first to last step: student and teacher of other families, sizes and resolutions."""

import copy
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load as load_weights
from torch import Tensor

from kdlib import config
from kdlib.engine.learner import Learner
from kdlib.engine.setting import Setting
from kdlib.engine.teacher import Teacher
from kdlib.losses import METHODS, Method
from kdlib.models.build import Classifier, build
from kdlib.seed import seed_torch
from kdlib.study.training.experiment import Experiment
from kdlib.types import Batch, Feature, Setup
from kdlib.views.stream import ViewStream
from tests import toys, training, zoo
from tests.test_survival import stop_after

STEPS = 3
every_method = pytest.mark.parametrize("name", list(METHODS))


@dataclass(frozen=True)
class Pair:
    """A student that timm knows by name, the pixels that it looks at, and the family of a teacher of tests/zoo.py."""

    student: str
    size: int
    teacher: str


PAIRS = {
    "convolutions learn from tokens": Pair("kd_resnet8_w16_s2", 32, "vit"),
    "a student with an expanding head learns from windows": Pair("mobilenetv3_small_050", 32, "swin"),
    "tokens learn from convolutions": Pair("test_vit", 32, "resnet, bottleneck"),
    "from two tokens, by a student of three stages": Pair("kd_resnet8_w8_s1", 8, "deit"),
}
FIRST, *_ = PAIRS
every_pair = pytest.mark.parametrize("pair", list(PAIRS))


@functools.cache
def parameters(name: str) -> dict[str, float]:
    """Those of the study's params.yaml; a method that is not there yet gets those of the tests."""
    return config.load(training.ROOT).methods.get(name) or toys.parameters(name)


def methods() -> dict[str, Callable[[], Method]]:
    return {name: lambda name=name: METHODS[name](**parameters(name)) for name in METHODS}


@functools.cache
def taught(family: str) -> Teacher:
    """With random weights, for images of one channel; it looks at 32 or 64 pixels where the data have 8."""
    member = zoo.MEMBERS[family]
    seed_torch(9)
    net = timm.create_model(member.name, num_classes=6, in_chans=1, **member.options)
    return Teacher(Classifier(net, (0.5,), (0.25,), member.size))


def setting(pair: str) -> Setting:
    """Nothing is mixed, so that all methods have something to learn from, and nothing decays: what moves was moved by its gradient."""
    chosen = PAIRS[pair]
    changes = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "weight_decay": 0.0, "drop_path": 0.2, "learning_rate": 1e-3, "epochs": STEPS / 6}
    among = training.setting(taught_by=taught(chosen.teacher), **changes)
    return replace(among, student=chosen.student, size=chosen.size)


class Watched(Learner):
    """Remembers how its method started, and itself."""

    made: dict[str, "Watched"]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.start = copy.deepcopy(self.method.state_dict())
        Watched.made[self.job.name] = self


@dataclass(frozen=True)
class Done:
    files: dict[str, dict[str, bytes]]
    learners: dict[str, Watched]


def train_all(pair: str, folder: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float = 1e9) -> Done:
    with monkeypatch.context() as patched:
        patched.setattr("kdlib.engine.setting.Learner", Watched)
        Watched.made = {}
        return Done(training.trained(setting(pair), methods(), folder, save_seconds), Watched.made)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Every method trained on a pair: once for all tests."""

    @functools.cache
    def once(pair: str) -> Done:
        with pytest.MonkeyPatch.context() as patched:
            return train_all(pair, tmp_path_factory.mktemp("done"), patched)

    return once


@every_pair
def test_the_two_differ_in_all_that_there_is(pair: str) -> None:
    student, teacher = build(PAIRS[pair].student, 6, 1, PAIRS[pair].size), taught(PAIRS[pair].teacher).classifier
    assert student.shape.embedding != teacher.shape.embedding
    assert not set(student.shape.maps) & set(teacher.shape.maps)
    assert len({student.size, teacher.size, 8}) > 1
    assert type(student.net) is not type(teacher.net)


@every_pair
def test_every_method_finishes(pair: str, done: Callable[[str], Done]) -> None:
    for name, files in done(pair).files.items():
        metrics = json.loads(files["metrics.json"])
        assert (metrics["status"], metrics["steps"]) == ("finished", STEPS), name
        assert 0 <= metrics["test_top1"] <= 1
        header, *rows = files["curve.csv"].decode().splitlines()
        assert len(rows) == 1, name
        assert all(np.isfinite(float(value)) for value in rows[0].split(",")), (header, rows)


@every_pair
def test_extra_parameters_are_the_methods_own(pair: str, done: Callable[[str], Done]) -> None:
    student, teacher = build(PAIRS[pair].student, 6, 1, PAIRS[pair].size).shape, taught(PAIRS[pair].teacher).shape
    labels = torch.zeros(48, dtype=torch.long)
    counted = {}
    for name, files in done(pair).files.items():
        method = METHODS[name](**parameters(name))
        method.adapt(Setup(student, teacher, labels))
        metrics = json.loads(files["metrics.json"])
        counted[name] = sum(parameter.numel() for parameter in method.parameters())
        assert metrics["extra_parameters"] == counted[name], name
        net = timm.create_model(PAIRS[pair].student, num_classes=6, in_chans=1, **_sized(pair))
        assert metrics["student_parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert set(counted.values()) > {0}


@every_pair
def test_adapters_are_optimised_and_move(pair: str, done: Callable[[str], Done]) -> None:
    for name, learner in done(pair).learners.items():
        optimised = [id(parameter) for group in learner.optimizer.param_groups for parameter in group["params"]]
        trained = [*learner.student.parameters(), *learner.method.parameters()]
        assert sorted(optimised) == sorted(id(parameter) for parameter in trained), name
        for key, parameter in learner.method.named_parameters():
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, learner.start[key]), (name, key)


@every_pair
def test_the_exported_student_is_timms_alone(pair: str, done: Callable[[str], Done]) -> None:
    images = torch.rand(2, 1, PAIRS[pair].size, PAIRS[pair].size)
    answers = []
    for files in done(pair).files.values():
        net = timm.create_model(PAIRS[pair].student, num_classes=6, in_chans=1, **_sized(pair)).eval()
        weights = load_weights(files["weights.safetensors"])
        assert set(weights) == set(net.state_dict())
        net.load_state_dict(weights)
        answers.append(net(images))
    assert all(answer.shape == (2, 6) and answer.isfinite().all() for answer in answers)
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == len(METHODS)


def _sized(pair: str) -> dict[str, int]:
    """What plain timm must be told of a model that takes images of one size alone."""
    fixed = timm.get_pretrained_cfg(PAIRS[pair].student).fixed_input_size
    return {"img_size": PAIRS[pair].size} if fixed else {}


@pytest.mark.parametrize("saves", [len(METHODS) + 3, 2 * len(METHODS)])
def test_interrupted_it_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Callable[[str], Done], saves: int) -> None:
    """After the first steps, some having more of them than others, and before the last: adapters, banks and momentum go on as they were."""
    undisturbed = done(FIRST)
    stop_after(monkeypatch, saves, lambda: train_all(FIRST, tmp_path, monkeypatch, save_seconds=0.0))
    resumed = train_all(FIRST, tmp_path, monkeypatch)
    for name in METHODS:
        assert resumed.files[name] == undisturbed.files[name], name
        for part in ("method", "optimizer", "student"):
            ours, theirs = (learners[name].state_dict()[part] for learners in (resumed.learners, undisturbed.learners))
            assert equal(ours, theirs), (name, part)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@every_method
def test_a_learners_state_is_all_that_the_next_step_depends_on(name: str) -> None:
    """Banks, running estimates, adapters, momentum: a fresh learner that is given the state of another takes the same step."""
    among = setting(FIRST)
    split = among.data.train
    stream = ViewStream(split.images, split.labels, among.index, classes=6, recipe=among.recipe, hflip=0.5, seed=0)
    labels = torch.from_numpy(np.asarray(split.labels[among.index], np.int64))

    def fresh(seed: int) -> Learner:
        seed_torch(seed)
        student = build(among.student, 6, 1, among.size)
        method = METHODS[name](**parameters(name))
        method.adapt(Setup(student.shape, among.teacher.shape, labels))
        return training.learner(name, student, method, among.recipe, total_steps=8, seed=0)

    def step(learner: Learner) -> None:
        batch = stream.batch(learner.step)
        learner.take(learner.step, batch, among.teacher(batch.images, learner.method.asks_teacher) if learner.method.asks_teacher else None)
        learner.advance()

    first, second = fresh(1), fresh(2)
    for _ in range(2):
        step(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        step(first)
        step(second)
    ours, theirs = first.state_dict(), second.state_dict()
    for part in ("student", "method", "optimizer", "sums"):
        assert equal(ours[part], theirs[part]), part


# Every family, a step each


HINTS = {name: (made.asks_student, made.asks_teacher) for name, made in METHODS.items() if made.asks_teacher - {Feature.LOGITS}}
every_family = pytest.mark.parametrize("family", list(zoo.MEMBERS))


def learn_by_hints_alone(student: Classifier, teacher: Teacher, names: Iterable[str]) -> None:
    """One step of a copy of this student by each of these methods, without hard label: student and adapters move."""
    seed_torch(3)
    recipe, labels = training.recipe(hard_loss="none", weight_decay=0.0), torch.arange(6)
    batch = Batch(torch.rand(4, 1, 8, 8), torch.eye(6)[:4], labels[:4], torch.arange(4), torch.zeros(4, dtype=torch.bool))
    answers = teacher(batch.images, frozenset(Feature))
    for name in names:
        method, own = METHODS[name](**parameters(name)), copy.deepcopy(student)
        method.adapt(Setup(own.shape, teacher.shape, labels))
        before = copy.deepcopy(dict(method.named_parameters()))
        learner = training.learner(name, own, method, recipe, total_steps=8, seed=0)
        learner.take(learner.step, batch, toys.asked(answers, method.asks_teacher))
        learner.advance()
        assert learner.curve.diverged_step is None, name
        assert any(not torch.equal(*pair) for pair in zip(own.parameters(), student.parameters(), strict=True)), name
        for key, parameter in method.named_parameters():
            assert parameter.isfinite().all()
            assert not torch.equal(parameter, before[key]), (name, key)


@every_family
def test_every_family_gives_every_hint(family: str) -> None:
    seed_torch(9)
    learn_by_hints_alone(build(training.NET, 6, 1, 8), taught(family), HINTS)


@every_family
def test_every_family_learns_from_every_kind_of_hint(family: str) -> None:
    kinds = {asks: name for name, asks in HINTS.items()}
    learn_by_hints_alone(copy.deepcopy(taught(family).classifier).requires_grad_().train(), training.teacher(), kinds.values())


def test_every_method_learns_from_a_transformer_through_params_yaml(tmp_path: Path) -> None:
    params = training.content(methods=list(METHODS), epochs=STEPS / 6)
    params["methods"] = {name: parameters(name) for name in METHODS}
    params["recipes"]["strong"] |= {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "learning_rate": 1e-3}
    params["recipes"]["weak"] |= {"epochs": 0.5}
    params["teachers"]["small"] |= {"model": "test_vit", "size": 32}
    root = training.fresh(tmp_path / "project", params)
    experiment = Experiment(root)
    assert experiment.make_teacher("small")["status"] == "finished"
    folders = experiment.distill(training.COMPARISON)
    assert len(folders) == len(METHODS)
    for folder in folders:
        assert json.loads((folder / "metrics.json").read_text())["status"] == "finished", folder
        student = experiment.student(training.COMPARISON, folder)
        assert student(torch.rand(2, 1, 8, 8)).logits.shape == (2, 6)
