"""A batch of several mix groups: what each holds, and what a step makes of them. Averaged weights and clipped gradients."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from kdlib.engine import checkpoint
from kdlib.engine.learner import Learner
from kdlib.errors import Refused
from kdlib.losses import METHODS
from kdlib.losses.hard import HARD
from kdlib.models.build import build
from kdlib.seed import seed_torch
from kdlib.study.training.experiment import Experiment
from kdlib.types import Setup
from kdlib.views.stream import ViewStream
from tests import tiny, training
from tests.test_survival import stop_after
from tests.training import method, setting, trained

MIXED = {"mixup_alpha": 1.0, "cutmix_alpha": 0.0}


def stream(**changes: object) -> ViewStream:
    among = setting(**changes)
    split = among.data.train
    return ViewStream(split.images, split.labels, np.arange(96), classes=6, recipe=among.recipe, hflip=0.5, seed=3)


# What groups hold


@pytest.mark.parametrize("repeats", [1, 3])
def test_groups_share_out_a_batch(repeats: int) -> None:
    """All groups together hold what a batch of one group would; each step starts where the last one ended."""
    whole, parts = (stream(batch_size=24, repeats=repeats, group_size=size) for size in (None, 8))
    for step in range(9):
        places = np.stack([parts.positions(step, group) for group in range(3)], axis=1).ravel()
        np.testing.assert_array_equal(places, whole.positions(step))


def test_groups_are_mixed_and_drawn_by_themselves() -> None:
    views = stream(batch_size=24, group_size=8, **MIXED)
    groups = [views.batch(2, number) for number in range(3)]
    assert [len(group.labels) for group in groups] == [8, 8, 8]
    assert len({tuple(group.targets.unique().tolist()) for group in groups}) == 3  # a share of its own
    again = stream(batch_size=24, group_size=8, **MIXED).batch(2, 1)
    assert torch.equal(again.images, groups[1].images)


def test_repeats_come_in_a_row_to_different_groups() -> None:
    """Three views of an image in three groups, each with draws of its own; every image equally often."""
    views = stream(batch_size=24, group_size=8, repeats=3)
    counts = np.zeros(96, int)
    for step in range(12):
        groups = [views.batch(step, number) for number in range(3)]
        assert torch.equal(groups[0].index, groups[1].index)
        assert torch.equal(groups[0].index, groups[2].index)
        assert not torch.equal(groups[0].images, groups[1].images)
        for group in groups:
            np.add.at(counts, group.index.numpy(), 1)
    assert set(counts) == {3}
    assert len(set(views.positions(0, 0)) & set(views.positions(1, 0))) == 0


def test_repeats_go_on_in_one_group() -> None:
    places = stream(batch_size=12, repeats=3).positions(0)
    assert (places.reshape(4, 3) == places[::3, None]).all()


def test_a_group_that_does_not_divide_its_batch_is_refused(tmp_path: Path) -> None:
    content = tiny.content()
    content["recipes"]["weak"]["group_size"] = 6
    with pytest.raises(Refused, match=r"recipes.weak.group_size: found 6; allowed: a divisor of batch_size, 16: \[2, 4, 8, 16\]"):
        Experiment(tiny.write(tmp_path, content))


# What a step makes of them


def learner(name: str = "kd", **changes: object) -> Learner:
    recipe = training.recipe(batch_size=24, group_size=8, hard_loss="ce", **changes)
    torch.manual_seed(8)
    student, made = build(training.NET, 6, 1, 8), method(name)()
    made.adapt(Setup(student.shape, training.teacher().shape, torch.arange(96) % 6))
    return training.learner(name, student.double(), made.double(), recipe, total_steps=10, seed=0)


def in_double(views: ViewStream, step: int, number: int) -> object:
    batch = views.batch(step, number)
    return dataclasses.replace(batch, images=batch.images.double(), targets=batch.targets.double())


def test_a_step_takes_the_mean_of_its_groups() -> None:
    """Of losses, of gradients and of BatchNorm's statistics, all groups starting from the same ones."""
    views, ours, teacher = stream(batch_size=24, group_size=8), learner(drop_path=0.0), training.teacher().double()
    losses, slopes, statistics = [], [], []
    for number in range(3):
        alone, batch = copy.deepcopy(ours), in_double(views, 0, number)
        seed_torch(0, "step", number)
        output = alone.student(batch.images, alone.method.asks_student)
        terms = alone.method(output, teacher(batch.images), batch, HARD["ce"], torch.tensor(0.1))
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        losses.append(loss.item())
        slopes.append([weight.grad for weight in alone.student.parameters()])
        statistics.append([values for name, values in alone.student.named_buffers() if "running" in name])
    start = [weight.detach().clone() for weight in ours.student.parameters()]
    for number in range(3):
        batch = in_double(views, 0, number)
        ours.take(number, batch, teacher(batch.images))
    assert [torch.equal(a, b) for a, b in zip(start, ours.student.parameters(), strict=True)]
    for weight, *of_groups in zip(ours.student.parameters(), *slopes, strict=True):
        assert_close(weight.grad, torch.stack(of_groups).mean(0))
    ours.advance()
    ours.curve.close_epoch(1, ours.step, 24, None)
    assert ours.curve.rows[-1]["loss"] == pytest.approx(np.mean(losses))
    kept = [values for name, values in ours.student.named_buffers() if "running" in name]
    for values, *of_groups in zip(kept, *statistics, strict=True):
        assert_close(values, torch.stack(of_groups).mean(0))
    assert ours.step == 1


@pytest.mark.parametrize("name", [name for name, made in METHODS.items() if not made.unmixed])
def test_every_method_trains_on_groups_and_goes_on_alike(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    among = setting(batch_size=24, group_size=8, repeats=2, ema=[0.5], clip_norm=1.0)
    undisturbed = trained(among, {name: method(name)}, tmp_path / "undisturbed")
    stop_after(monkeypatch, 3, lambda: trained(among, {name: method(name)}, tmp_path / "stopped", save_seconds=0.0))
    assert checkpoint.newest(tmp_path / "stopped" / name)["step"] == 3
    assert trained(among, {name: method(name)}, tmp_path / "stopped") == undisturbed
    average = "weights_0.5.safetensors"
    assert (tmp_path / "stopped" / name / average).read_bytes() == (tmp_path / "undisturbed" / name / average).read_bytes()


# Averages


def test_averages_are_of_every_step_and_measured(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    among = setting(ema=[0.5, 0.9])
    take, advance = Learner.take, Learner.advance

    def watch_start(self: Learner, *given: Any) -> None:
        if not seen:
            seen.append(copy.deepcopy(self.student.net.state_dict()))
        take(self, *given)

    def watch(self: Learner) -> None:
        advance(self)
        seen.append(copy.deepcopy(self.student.net.state_dict()))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Learner, "take", watch_start)
        patched.setattr(Learner, "advance", watch)
        trained(among, {"kd": method("kd")}, tmp_path)
    metrics = json.loads((tmp_path / "kd" / "metrics.json").read_text())
    assert set(metrics["averages"]) == {"0.5", "0.9"}
    for decay in (0.5, 0.9):
        found = load_file(tmp_path / "kd" / f"weights_{decay}.safetensors")
        for name, expected in seen[0].items():
            value = expected.double()
            for later in seen[1:]:
                value = decay * value + (1 - decay) * later[name].double()
            if value.is_floating_point() and "num_batches" not in name:
                assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)
        student = build(training.NET, 6, 1, 8)
        student.net.load_state_dict(found)
        split = among.data.test
        images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            right = student.eval()(images).logits.argmax(1).numpy() == split.labels
        assert metrics["averages"][f"{decay:g}"]["test_top1"] == right.mean()


def test_averages_change_nothing_about_the_student(tmp_path: Path) -> None:
    plain = trained(setting(), {"kd": method("kd")}, tmp_path / "plain")["kd"]
    averaged = trained(setting(ema=[0.9]), {"kd": method("kd")}, tmp_path / "averaged")["kd"]
    assert averaged["weights.safetensors"] == plain["weights.safetensors"]


# Clipping


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_the_gradient_is_clipped_as_a_whole(limit: float) -> None:
    """Of student and adapters together; 0 and a limit beyond it change nothing."""
    ours, views, teacher = learner("ofa", clip_norm=limit), stream(batch_size=24, group_size=8), training.teacher().double()
    for number in range(3):
        batch = in_double(views, 0, number)
        ours.take(number, batch, teacher(batch.images))
    weights = [*ours.student.parameters(), *ours.method.parameters()]
    before = [weight.grad.clone() for weight in weights]
    norm = nn.utils.get_total_norm(before)
    assert norm > 0.02
    ours.advance()
    scale = limit / (norm + 1e-6) if limit == 0.01 else 1.0
    for weight, slope in zip(weights, before, strict=True):
        assert_close(weight.grad, slope * scale)
