"""What only one method promises, known values worked out by hand, and the hard losses."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.losses import HARD, METHODS
from kdlib.types import Batch, Output
from tests import references
from tests.test_losses import compute, distillation, draw, expect, make_batch, parameters


@pytest.mark.parametrize(("name", "key"), [("kd", "temperature"), ("dkd", "temperature"), ("dist", "tau")])
def test_refuses_a_temperature_of_zero(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: found 0; allowed: a number > 0$"):
        METHODS[name](**parameters(name) | {key: 0.0})


def by_hand(name: str, student: list[list[float]], teacher: list[list[float]], **params: float) -> dict[str, float]:
    """Terms for probabilities instead of logits, label 0, hard loss 3."""
    temperature = params.get("temperature", params.get("tau", 1.0))
    z_s, z_t = (temperature * torch.tensor(p, dtype=torch.float64).log() for p in (student, teacher))
    terms = METHODS[name](**params)(Output(z_s), Output(z_t), make_batch(torch.zeros(len(z_s), dtype=torch.long), 3), torch.tensor(3.0))
    return {key: value.item() for key, value in terms.items()}


def test_kd_by_hand() -> None:
    """KL((1/2, 1/4, 1/4) || uniform) = 1/2 ln 3/2 + 1/2 ln 3/4; the factor at T = 2 is 4; weights of 1/10 and 10."""
    terms = by_hand("kd", [[1 / 3, 1 / 3, 1 / 3]] * 2, [[0.5, 0.25, 0.25]] * 2, hard_weight=0.1, weight=10.0, temperature=2.0)
    assert terms == pytest.approx({"hard": 0.3, "kd": 10 * 4 * 0.5 * (math.log(3 / 2) + math.log(3 / 4))})


def test_dkd_by_hand() -> None:
    """Target or not: KL((1/2, 1/2) || (1/3, 2/3)). Among the others: KL((3/4, 1/4) || (1/2, 1/2))."""
    params = {"hard_weight": 1.0, "weight": 10.0, "alpha": 2.0, "beta": 3.0, "temperature": 2.0}
    terms = by_hand("dkd", [[1 / 3, 1 / 3, 1 / 3]], [[0.5, 0.375, 0.125]], **params)
    target = 0.5 * (math.log(3 / 2) + math.log(3 / 4))
    others = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert terms == pytest.approx({"hard": 3.0, "tckd": 10 * 2 * 4 * target, "nckd": 10 * 3 * 4 * others})


def test_dist_by_hand() -> None:
    """Each image: correlation -1/2. Of two images, two classes correlate by -1; the third does not vary, which counts as 0."""
    one, other = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    terms = by_hand("dist", [one, other], [other, one], hard_weight=1.0, weight=10.0, beta=2.0, gamma=3.0, tau=2.0)
    assert terms == pytest.approx({"hard": 3.0, "inter": 10 * 2 * 4 * 1.5, "intra": 10 * 3 * 4 * (1 + 2 / 3)})


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_dkd_is_kd_with_the_teachers_doubt_as_beta(temperature: float, std: float) -> None:
    """arXiv 2203.08679: KD = TCKD + (1 - p_t of the teacher) NCKD, image by image."""
    student, teacher, batch = draw(std, torch.float64)
    for i in range(len(student)):
        one = Batch(batch.images[i : i + 1], batch.targets[i : i + 1], batch.labels[i : i + 1], batch.index[i : i + 1])
        doubt = 1 - (teacher[i] / temperature).softmax(dim=0)[batch.labels[i]].item()
        kd = METHODS["kd"](hard_weight=0.0, weight=1.0, temperature=temperature)
        dkd = METHODS["dkd"](hard_weight=0.0, weight=1.0, alpha=1.0, beta=doubt, temperature=temperature)
        expected = compute(kd, student[i : i + 1], teacher[i : i + 1], one)["kd"].item()
        found = sum(value.item() for value in distillation(compute(dkd, student[i : i + 1], teacher[i : i + 1], one)))
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["kd", "dkd"])
@pytest.mark.parametrize("std", [40.0, 1e4])
def test_divergences_of_very_sure_models_are_right_and_not_only_finite(name: str, std: float) -> None:
    student, teacher, batch = draw(std)
    terms, expected = compute(METHODS[name](**parameters(name)), student, teacher, batch), expect(name, student, teacher, batch)
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_dkd_takes_the_majority_label_of_a_mixed_image() -> None:
    student, teacher, batch = draw()
    method = METHODS["dkd"](**parameters("dkd"))
    other = (batch.labels + 1) % 7
    mixed = replace(batch, targets=0.6 * F.one_hot(batch.labels, 7).float() + 0.4 * F.one_hot(other, 7).float())
    terms = distillation(compute(method, student, teacher, mixed))
    assert terms == distillation(compute(method, student, teacher, batch))
    assert terms != distillation(compute(method, student, teacher, replace(mixed, labels=other)))


def test_dkd_refuses_two_classes() -> None:
    student, teacher, batch = draw(classes=2)
    with pytest.raises(ValueError, match="dkd: found 2 classes; allowed: 3 or more"):
        compute(METHODS["dkd"](**parameters("dkd")), student, teacher, batch)


def test_dist_counts_rare_classes_like_others() -> None:
    """A class of probability around 1e-12 correlates as the paper says, in fp32; an image that says nothing has correlation 0."""
    student, teacher, batch = draw()
    rare = torch.tensor([0.0, 0, 0, 0, 0, -30, -30])
    params = {"hard_weight": 0.0, "weight": 1.0, "beta": 1.0, "gamma": 1.0, "tau": 1.0}
    method = METHODS["dist"](**params)
    z_s, z_t = student + rare, teacher + rare
    expected = references.dist(z_s.double().numpy(), z_t.double().numpy(), batch.labels.numpy(), 0.0, **params)
    assert compute(method, z_s, z_t, batch)["intra"].item() == pytest.approx(expected["intra"], rel=1e-5)
    silent = compute(method, torch.zeros_like(student), teacher, batch)
    assert {key: value.item() for key, value in silent.items()} == pytest.approx({"hard": 0, "inter": 1, "intra": 1}, abs=1e-6)


@pytest.mark.parametrize("name", sorted(HARD))
def test_hard_losses_equal_their_reference(name: str) -> None:
    logits, _, batch = draw(4.0)
    expected = getattr(references, name)(logits.double().numpy(), batch.targets.double().numpy())
    assert HARD[name](logits, batch.targets).item() == pytest.approx(expected, rel=1e-6)
    half = HARD[name](logits.bfloat16(), batch.targets)
    assert half == HARD[name](logits.bfloat16().float(), batch.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert HARD[name](logits.bfloat16(), batch.targets) == half


def test_hard_losses_by_hand() -> None:
    """All logits 0: cross-entropy ln 3 whatever the target; each binary one ln 2, averaged over classes."""
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert HARD["ce"](torch.zeros(2, 3), targets).item() == pytest.approx(math.log(3))
    assert HARD["bce"](torch.zeros(2, 3), targets).item() == pytest.approx(math.log(2))


def test_kd_equals_timms() -> None:
    """timm's LogitDistillationTask, another team's KD, on the same logits."""
    distillation_task = pytest.importorskip("timm.task.distillation")
    student, teacher, batch = draw()

    class Says(nn.Module):
        num_classes, in_chans, pretrained_cfg = 7, 1, {"mean": (0.0,), "std": (1.0,)}

        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, images: Tensor) -> Tensor:  # noqa: ARG002
            return self.logits

    task = distillation_task.LogitDistillationTask(
        Says(student), Says(teacher), nn.CrossEntropyLoss(), distill_loss_weight=1.0, temperature=3.0, verbose=False
    )
    ours = compute(METHODS["kd"](hard_weight=1.0, weight=1.0, temperature=3.0), student, teacher, batch)
    assert ours["kd"].item() == pytest.approx(task(batch.images, batch.labels)["kd_loss"].item(), rel=1e-5)
