"""What only one method promises, known values worked out by hand, and the hard losses."""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kdlib.losses import HARD, METHODS
from kdlib.losses.bkl import bkl
from kdlib.losses.dkd import dkd
from kdlib.losses.kd import kd
from kdlib.losses.lskd import STILL, lskd, standardise
from kdlib.losses.nkd import nkd
from kdlib.types import Batch, Output
from tests.references import common
from tests.toys import CLASSES, compute, distillation, draw, expect, make, parameters

WHOLE = torch.tensor(1.0)  # progress at the end of a training


def labelled(labels: Tensor, classes: int) -> Batch:
    n = len(labels)
    targets = F.one_hot(labels, classes).float()
    return Batch(torch.zeros(n, 1, 8, 8), targets, labels, torch.arange(n), torch.zeros(n, dtype=torch.bool))


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


@pytest.mark.parametrize(
    ("name", "key"), [("kd", "temperature"), ("dkd", "temperature"), ("dist", "tau"), ("nkd", "temperature"), ("lskd", "temperature")]
)
def test_refuses_a_temperature_of_zero(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: found 0; allowed: a number > 0$"):
        METHODS[name](**parameters(name) | {key: 0.0})


def by_hand(name: str, student: list[list[float]], teacher: list[list[float]], **params: float) -> dict[str, float]:
    """Terms for probabilities (or multiples of them) at the method's temperature instead of logits; label 0, hard loss 3."""
    temperature = params.get("temperature", params.get("tau", 1.0))
    z_s, z_t = (temperature * torch.tensor(p, dtype=torch.float64).log() for p in (student, teacher))
    batch = labelled(torch.zeros(len(z_s), dtype=torch.long), z_s.shape[1])
    terms = METHODS[name](**params)(Output(z_s), Output(z_t), batch, lambda logits, targets: torch.tensor(3.0), WHOLE)  # noqa: ARG005
    return {key: value.item() for key, value in terms.items()}


def test_kd_by_hand() -> None:
    """KL((1/2, 1/4, 1/4) || uniform) = 1/2 ln 3/2 + 1/2 ln 3/4; the factor at T = 2 is 4; weights of 1/10 and 10."""
    terms = by_hand("kd", [[1 / 3, 1 / 3, 1 / 3]] * 2, [[0.5, 0.25, 0.25]] * 2, hard_weight=0.1, weight=10.0, temperature=2.0)
    assert terms == pytest.approx({"hard": 0.3, "kd": 10 * 4 * 0.5 * (math.log(3 / 2) + math.log(3 / 4))})


def test_funmatch_by_hand() -> None:
    """As ``test_kd_by_hand``; there is a hard loss, and it does not count."""
    terms = by_hand("funmatch", [[1 / 3, 1 / 3, 1 / 3]], [[0.5, 0.25, 0.25]], weight=10.0, temperature=2.0)
    assert terms == pytest.approx({"kd": 10 * 4 * 0.5 * (math.log(3 / 2) + math.log(3 / 4))})


def test_funmatch_without_weight_would_learn_nothing() -> None:
    with pytest.raises(ValueError, match=r"^weight: found 0; allowed: a number > 0$"):
        METHODS["funmatch"](weight=0.0, temperature=1.0)


def test_bkl_by_hand() -> None:
    """Sigmoids 1/4, 1/2, 3/4 of odds 1/3, 1, 3. At logits 0 every question costs ln 2, whatever the teacher says."""
    terms = by_hand("bkl", [[1 / 3, 1.0, 3.0]], [[0.5, 0.25, 0.25]], hard_weight=1.0, weight=10.0)
    assert terms == pytest.approx({"hard": 3.0, "bkl": 10 / 3 * (1.25 * math.log(4) + 0.75 * math.log(4 / 3) + math.log(2))})
    undecided = by_hand("bkl", [[1.0, 1.0, 1.0]] * 2, [[0.5, 0.25, 0.25], [0.0, 0.125, 0.875]], hard_weight=0.0, weight=1.0)
    assert undecided == pytest.approx({"bkl": math.log(2)})


@pytest.mark.parametrize("classes", [10, 1000])
def test_bkl_pulls_as_many_times_less_than_kl_as_there_are_classes(classes: int) -> None:
    """Exactly so where sigmoid and softmax of the student agree: at logits -ln(C - 1) both are 1/C."""
    student = torch.full((4, classes), -math.log(classes - 1), dtype=torch.float64)
    teacher = 3 * torch.randn(4, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    binary, multi = gradient(lambda z: bkl(z, teacher), student), gradient(lambda z: kd(z, teacher, 1.0), student)
    assert_close(classes * binary, multi)


def test_dkd_by_hand() -> None:
    """Target or not: KL((1/2, 1/2) || (1/3, 2/3)). Among the others: KL((3/4, 1/4) || (1/2, 1/2))."""
    params = {"hard_weight": 1.0, "weight": 10.0, "warmup": 0.0, "alpha": 2.0, "beta": 3.0, "temperature": 2.0}
    terms = by_hand("dkd", [[1 / 3, 1 / 3, 1 / 3]], [[0.5, 0.375, 0.125]], **params)
    target = 0.5 * (math.log(3 / 2) + math.log(3 / 4))
    others = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    assert terms == pytest.approx({"hard": 3.0, "tckd": 10 * 2 * 4 * target, "nckd": 10 * 3 * 4 * others})


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_dkd_is_kd_with_the_teachers_doubt_as_beta(temperature: float, std: float) -> None:
    """arXiv 2203.08679: KD = TCKD + (1 - p_t of the teacher) NCKD, image by image."""
    student, teacher, batch = draw(std, torch.float64)
    for i in range(len(batch.labels)):
        one = Batch(**{field.name: getattr(batch, field.name)[i : i + 1] for field in fields(batch)})
        said = Output(student.logits[i : i + 1]), Output(teacher.logits[i : i + 1])
        doubt = 1 - (teacher.logits[i] / temperature).softmax(dim=0)[batch.labels[i]].item()
        whole = METHODS["kd"](hard_weight=0.0, weight=1.0, temperature=temperature)
        parts = METHODS["dkd"](hard_weight=0.0, weight=1.0, warmup=0.0, alpha=1.0, beta=doubt, temperature=temperature)
        expected = compute(whole, *said, one)["kd"].item()
        assert sum(value.item() for value in distillation(compute(parts, *said, one))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("function", [dkd, nkd])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("target", [-1e4, 0.0, 1e4])
def test_the_targets_logit_has_no_part_among_the_others(
    function: Callable[..., tuple[Tensor, Tensor]], temperature: float, target: float
) -> None:
    student, teacher, batch = draw()
    places = batch.labels[:, None]
    before, after = (
        function(*(temperature * one.logits.scatter(1, places, to) for one in (student, teacher)), batch.labels, temperature)[1]
        for to in (1.0, target)
    )
    assert_close(after, before, rtol=1e-6, atol=0)


def test_nkd_by_hand() -> None:
    """Given at T = 2, squared for T = 1. Target: 2/3 of ln(13/8). Others: (1/2, 1/2) against (3/4, 1/4)."""
    params = {"hard_weight": 1.0, "weight": 10.0, "gamma": 3.0, "temperature": 2.0}
    terms = by_hand("nkd", [[0.5, 0.375, 0.125]], [[0.5, 0.25, 0.25]], **params)
    assert terms == pytest.approx({"hard": 3.0, "target": 10 * 2 / 3 * math.log(13 / 8), "others": 10 * 3 * 4 * 0.5 * math.log(16 / 3)})


def test_nkds_target_still_pulls_at_the_teachers_answer_and_the_others_rest() -> None:
    """The gradient of -q_y log p_y at p = q is q_y (p - 1_y): that of a hard label of weight q_y."""
    _, teacher, batch = draw(dtype=torch.float64)
    target, others = (gradient(lambda z, i=i: nkd(z, teacher.logits, batch.labels, 2.0)[i], teacher.logits) for i in (0, 1))
    p, one_hot = teacher.logits.softmax(dim=1), F.one_hot(batch.labels, CLASSES)
    assert_close(target, (p * one_hot).sum(dim=1, keepdim=True) * (p - one_hot) / len(p))
    assert_close(others, torch.zeros_like(others), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_the_majority_label_of_a_mixed_image_is_the_target(name: str) -> None:
    student, teacher, batch = draw()
    method = make(name)
    other = (batch.labels + 1) % CLASSES
    mixed = replace(batch, targets=0.6 * F.one_hot(batch.labels, CLASSES).float() + 0.4 * F.one_hot(other, CLASSES).float())
    terms = distillation(compute(method, student, teacher, mixed))
    assert terms == distillation(compute(method, student, teacher, batch))
    assert terms != distillation(compute(method, student, teacher, replace(mixed, labels=other)))


@pytest.mark.parametrize("function", [lambda z, y: dkd(z, z, y, 1.0), lambda z, y: nkd(z, z, y, 1.0), lambda z, y: lskd(z, z, 1.0)])  # noqa: ARG005
def test_the_mathematics_refuses_two_classes_too(function: Callable[[Tensor, Tensor], object]) -> None:
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^found 2 classes; allowed: 3 or more"):
        function(torch.randn(4, 2), labels)
    function(torch.randn(4, 3), labels)


def test_lskd_by_hand() -> None:
    """Logits 5, 2, 2 have mean 3 and deviation 2^(1/2): z-scores 2^(1/2) and -2^(-1/2). T such that softmax is (1/2, 1/4, 1/4)."""
    temperature = 3 / math.sqrt(2) / math.log(2)
    z_s, z_t = torch.tensor([[2.0, 5.0, 2.0]], dtype=torch.float64), torch.tensor([[50.0, 20.0, 20.0]], dtype=torch.float64)
    assert_close(standardise(z_t), torch.tensor([[math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)]], dtype=torch.float64))
    assert lskd(z_s, z_t, temperature).item() == pytest.approx(temperature**2 * 0.25 * math.log(2))


def test_lskd_sees_neither_scale_nor_shift_of_the_logits() -> None:
    student, teacher, batch = draw(dtype=torch.float64)
    scale = torch.logspace(-2, 4, len(batch.labels), dtype=torch.float64)[:, None]
    expected = lskd(student.logits, teacher.logits, 2.0)
    assert_close(lskd(scale * student.logits - 30, teacher.logits, 2.0), expected)
    assert_close(lskd(student.logits, scale.flip(0) * teacher.logits + 30, 2.0), expected)
    assert not math.isclose(lskd(-student.logits, teacher.logits, 2.0).item(), expected.item(), rel_tol=0.1)


@pytest.mark.parametrize("classes", [3, 100])
def test_lskd_with_the_deviation_of_a_sample_is_another_temperature(classes: int) -> None:
    """As in the authors' code: torch's std, which divides by C - 1. Their paper, and we, divide by C."""
    z_s, z_t = torch.randn(2, 5, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample_s, sample_t = ((z - z.mean(dim=1, keepdim=True)) / z.std(dim=1, keepdim=True) for z in (z_s, z_t))
    warmer = 2.0 * math.sqrt(classes / (classes - 1))
    assert_close(kd(sample_s, sample_t, 2.0), (2.0 / warmer) ** 2 * lskd(z_s, z_t, warmer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lskd_moves_a_student_that_says_nothing_and_not_too_far(dtype: torch.dtype) -> None:
    """Constant logits: p is uniform, and the gradient is T (p - q) / B over the floor of the deviation."""
    teacher = draw(dtype=dtype)[1].logits
    p, q = 1 / CLASSES, (standardise(teacher) / 2).softmax(dim=1)
    for constant in (0.0, 3.0):
        found = gradient(lambda z: lskd(z, teacher, 2.0), torch.full_like(teacher, constant))
        assert_close(found, 2 * (p - q) / len(q) / STILL, rtol=1e-4, atol=1e-4)
    value = lskd(teacher, torch.zeros_like(teacher), 2.0)
    assert value.isfinite()
    assert value > 0


def test_dist_by_hand() -> None:
    """Each image: correlation -1/2. Of two images, two classes correlate by -1; the third does not vary, which counts as 0."""
    one, other = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    terms = by_hand("dist", [one, other], [other, one], hard_weight=1.0, weight=10.0, beta=2.0, gamma=3.0, tau=2.0)
    assert terms == pytest.approx({"hard": 3.0, "inter": 10 * 2 * 4 * 1.5, "intra": 10 * 3 * 4 * (1 + 2 / 3)})


def test_dist_counts_rare_classes_like_others() -> None:
    """A class of probability around 1e-12 correlates as the paper says, in fp32; an image that says nothing has correlation 0."""
    student, teacher, batch = draw()
    tau = parameters("dist")["tau"]
    rare = tau * torch.tensor([0.0, 0, 0, 0, 0, -30, -30])
    case = replace(student, logits=student.logits + rare), replace(teacher, logits=teacher.logits + rare), batch
    method = make("dist")
    terms, expected = compute(method, *case), expect("dist", method, *case)
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-5)
    plain = METHODS["dist"](hard_weight=0.0, weight=1.0, beta=1.0, gamma=1.0, tau=1.0)
    silent = compute(plain, Output(torch.zeros_like(student.logits)), teacher, batch)
    assert {key: value.item() for key, value in silent.items()} == pytest.approx({"inter": 1, "intra": 1}, abs=1e-6)


@pytest.mark.parametrize("name", ["kd", "bkl", "dkd", "nkd", "lskd", "funmatch"])
@pytest.mark.parametrize("std", [40.0, 1e4])
def test_losses_of_very_sure_models_are_right_and_not_only_finite(name: str, std: float) -> None:
    case, method = draw(std), make(name)
    expected = expect(name, method, *case)
    assert {key: value.item() for key, value in compute(method, *case).items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["ce", "bce"])
def test_hard_losses_equal_their_reference(name: str) -> None:
    student, _, batch = draw(4.0)
    loss, logits = HARD[name], student.logits
    expected = getattr(common, name)(logits.double().numpy(), batch.targets.double().numpy())
    assert loss(logits, batch.targets).item() == pytest.approx(expected, rel=1e-6)
    half = loss(logits.bfloat16(), batch.targets)
    assert half == loss(logits.bfloat16().float(), batch.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(logits.bfloat16(), batch.targets) == half


def test_hard_losses_by_hand() -> None:
    """All logits 0: cross-entropy ln 3 whatever the target; each binary one ln 2, averaged over classes."""
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert HARD["ce"](torch.zeros(2, 3), targets).item() == pytest.approx(math.log(3))
    assert HARD["bce"](torch.zeros(2, 3), targets).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_without_a_hard_loss_the_rest_stays(name: str) -> None:
    case = draw()
    with_it = compute(make(name), *case)
    without = make(name)(*case, HARD["none"], torch.tensor(0.4))
    assert without == {key: value for key, value in with_it.items() if key != "hard"}
