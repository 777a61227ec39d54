"""What only reviewkd and ofa promise: values worked out by hand, sizes of any pair of models, adapters, refusals."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.losses.ofa import branch, halving, ofa
from kdlib.losses.reviewkd import Fusion, hcl, resized
from kdlib.types import Output, OutputShape
from tests.toys import CLASSES, STUDENT, TEACHER, Case, compute, convert, distillation, draw, make, require_grad

SHAPES = {
    "image-like": OutputShape(CLASSES, 10, ((6, 9, 9), (8, 4, 4), (12, 2, 2))),
    "token-like": OutputShape(CLASSES, 12, ((12, 4, 4), (12, 4, 4), (12, 4, 4), (12, 4, 4))),
    "down to one place": OutputShape(CLASSES, 16, ((4, 4, 4), (6, 2, 2), (8, 1, 1), (16, 1, 1))),
    "not square": OutputShape(CLASSES, 5, ((3, 3, 8), (5, 1, 4))),
}


def between(student: OutputShape, teacher: OutputShape) -> Case:
    """What two models of these shapes say, in float64."""
    batch = draw()[2]
    rng = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(len(batch.labels), *size, generator=rng, dtype=torch.float64)

    def say(shape: OutputShape) -> Output:
        return Output(noise(CLASSES), noise(shape.embedding), *(tuple(noise(*stage) for stage in shape.maps) for _ in range(2)))

    return say(student), say(teacher), batch


@pytest.mark.parametrize("name", ["reviewkd", "ofa"])
@pytest.mark.parametrize("student", SHAPES)
@pytest.mark.parametrize("teacher", SHAPES)
def test_students_and_teachers_of_any_sizes(name: str, student: str, teacher: str) -> None:
    """Every stage that faces one of the other model learns; reviewkd leaves out the first ones of a student that has more."""
    said, answers, batch = between(SHAPES[student], SHAPES[teacher])
    said = require_grad(said)
    terms = distillation(compute(make(name, SHAPES[student], SHAPES[teacher]).double(), said, answers, batch))
    assert all(term.isfinite() for term in terms)
    sum(terms, start=torch.zeros(())).backward()
    stages = said.preactivations if name == "reviewkd" else said.maps
    assert stages is not None
    used = len(stages) if name == "ofa" else min(len(stages), len(SHAPES[teacher].maps))
    assert [stage.grad is not None and stage.grad.abs().max().item() > 0 for stage in stages] == [
        i >= len(stages) - used for i in range(len(stages))
    ]


def test_ofa_takes_any_teacher() -> None:
    assert len(make("ofa", teacher=OutputShape(CLASSES, 0, ())).branches) == 3
    student, teacher, batch = draw()
    nothing_to_pool = make("ofa", replace(STUDENT, embedding=0), OutputShape(CLASSES, 0, ()))  # as wide as the last stage then
    assert all(term.isfinite() for term in distillation(compute(nothing_to_pool, student, teacher, batch)))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("mid", [4.0, 512.0])
@pytest.mark.parametrize("student", SHAPES.values(), ids=SHAPES)
def test_reviewkd_is_sized_by_the_models(student: OutputShape, mid: float) -> None:
    """Of a level: 1x1 and 3x3 convolution without bias, two BatchNorms; all but the deepest have an attention with bias."""
    m = min(int(mid), student.embedding)
    n = min(len(student.maps), len(TEACHER.maps))
    levels = [(student.embedding, TEACHER.embedding)] + [(a[0], b[0]) for a, b in zip(student.maps[-n:], TEACHER.maps[-n:], strict=True)]
    expected = sum(a * m + 2 * m + 9 * m * b + 2 * b for a, b in levels) + n * (2 * m * 2 + 2)
    method = make("reviewkd", student, TEACHER, mid=mid)
    assert size(method) == expected
    assert not list(method.buffers())


def test_ofa_is_sized_by_the_models() -> None:
    """Stages of 6, 8 and 12 channels; 14 is the wider embedding. A halving: 3x3 twice, 1x1 twice, two BatchNorms."""

    def halved(a: int, b: int) -> int:
        return 9 * a + a * a + 2 * a + 9 * a + a * b + 2 * b

    method = make("ofa")
    linear = 14 * CLASSES + CLASSES
    sizes = [halved(6, 12) + halved(12, 14) + linear, halved(8, 14) + linear, 12 * 14 + 14 + linear]
    assert [size(one) for one in method.branches] == sizes
    assert not list(method.buffers())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (4, 4), (5, 5), (14, 14), (3, 7)])
def test_hcl_of_equal_maps_is_zero_and_of_maps_one_apart_one(height: int, width: int) -> None:
    """The weights sum to 1 at every size."""
    one = torch.randn(3, 2, height, width, dtype=torch.float64)
    assert hcl((one, one), (one, one)) == 0
    assert_close(hcl((one, one), (one + 1, one - 1)), torch.tensor(2.0, dtype=torch.float64))


def columns(*values: float) -> Tensor:
    """Two images of two channels, square, equal in each row."""
    return torch.tensor(values, dtype=torch.float32).expand(2, 2, len(values), -1)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (columns(1), 1),
        (columns(1, -1), 1 / (1 + 1 / 2)),  # the mean over 1 is 0
        (columns(2, 0), (2 + 1 / 2) / (1 + 1 / 2)),  # (4 + 0) / 2 in places, 1 at 1
        (columns(1, 1, -1, -1), (1 + 1 / 2) / (1 + 1 / 2 + 1 / 4)),  # 4 is no smaller than the map: 2 weighs 1/2
        (columns(1, -1, 1, -1), 1 / (1 + 1 / 2 + 1 / 4)),
        (columns(1, 1, -1, -1, 1, 1, -1, -1), (1 + 1 / 2) / (1 + 1 / 2 + 1 / 4 + 1 / 8)),  # seen at 4, not at 2
    ],
)
def test_hcl_by_hand(difference: Tensor, expected: float) -> None:
    zero = torch.zeros(())
    assert_close(hcl((zero.expand_as(difference),), (difference,)), torch.tensor(float(expected)))


def test_a_map_grows_by_repetition_and_shrinks_by_averages() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    assert_close(resized(one, 4, 4)[0, 0], torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]))
    assert_close(resized(one, 1, 1)[0, 0], torch.tensor([[2.5]]))
    assert_close(resized(one, 1, 4)[0, 0], torch.tensor([[2.0, 2, 3, 3]]))  # each side by itself
    assert_close(resized(one, 3, 2)[0, 0], torch.tensor([[1.0, 2], [1, 2], [3, 4]]))
    assert resized(one, 2, 2) is one


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_the_teachers_map_is_compared_as_it_is(side: int) -> None:
    """The student's comes to its size, and each of the student's places has a share in it."""
    fusion = Fusion(3, 4, 5, deeper=False).double()
    level = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    result, handed_on = fusion(level, None, (side, side))
    assert result.shape == (6, 5, side, side)
    assert handed_on.shape == (6, 4, 4, 4)
    result.square().sum(dim=(0, 2, 3))[0].backward()
    assert level.grad is not None
    assert (level.grad.abs().amax(dim=(0, 1)) > 0).all()


def test_attention_chooses_between_a_level_and_what_is_deeper() -> None:
    fusion = Fusion(3, 4, 5, deeper=True)
    level, deeper = torch.randn(6, 3, 4, 4), torch.randn(6, 4, 2, 2)
    own = fusion.enter_norm(fusion.enter(level))
    assert fusion.attention is not None
    nn.init.zeros_(fusion.attention.weight)
    for bias, expected in (((99.0, -99.0), own), ((-99.0, 99.0), resized(deeper, 4, 4)), ((0.0, 0.0), (own + resized(deeper, 4, 4)) / 2)):
        with torch.no_grad():
            fusion.attention.bias.copy_(torch.tensor(bias))
        assert_close(fusion(level, deeper, (4, 4))[1], expected)


def test_knowledge_flows_from_deep_to_shallow_only() -> None:
    """The deepest level hears of nothing shallower; the shallowest hears of all."""
    method = make("reviewkd").double()
    student, teacher, batch = draw(dtype=torch.float64)
    assert student.preactivations is not None
    assert student.embedding is not None
    results: list[Tensor] = []
    for fusion in method.fusions:
        fusion.register_forward_hook(lambda _, __, output: results.append(output[0]))
    for changed in (student, replace(student, preactivations=(-student.preactivations[0], *student.preactivations[1:]))):
        compute(method, changed, teacher, batch)
    compute(method, replace(student, embedding=student.embedding.flip(0)), teacher, batch)
    before, shallow, deep = results[:4], results[4:8], results[8:]
    assert [torch.equal(a, b) for a, b in zip(before, shallow, strict=True)] == [True, True, True, False]
    assert [torch.equal(a, b) for a, b in zip(before, deep, strict=True)] == [False] * 4


def test_reviewkd_warms_up_in_steps() -> None:
    """One of 300 epochs: the first of 1,000 steps has a share already, the fourth has the whole."""
    case = draw()
    whole = compute(make("reviewkd", warmup=0.0), *case, progress=1e-3)["hcl"]
    for step, expected in ((1, 1 / 3.3), (2, 2 / 3.3), (4, 1.0), (1000, 1.0)):
        assert_close(compute(make("reviewkd", warmup=0.0033), *case, progress=step / 1000)["hcl"], expected * whole)


def of_one(p: list[float], q: list[float], eps: float, temperature: float = 1.0) -> float:
    """Given as probabilities at this temperature; label 0."""
    student, teacher = (temperature * torch.tensor([one], dtype=torch.float64).log() for one in (p, q))
    return ofa(student, teacher, torch.tensor([0]), eps, temperature).item()


def test_ofa_by_hand() -> None:
    """Against 1/3 each class costs ln 3. At eps 2 the target weighs (3/2)^2 - 1 = 5/4 and the others 1/16; there is no factor T^2."""
    uniform, teacher = [1 / 3] * 3, [1 / 2, 1 / 4, 1 / 4]
    for temperature in (1.0, 2.0):
        assert of_one(uniform, teacher, 1.0, temperature) == pytest.approx(math.log(3))
        assert of_one(uniform, teacher, 2.0, temperature) == pytest.approx((5 / 4 + 1 / 16 + 1 / 16) * math.log(3))
        assert of_one(teacher, uniform, 2.0, temperature) == pytest.approx(7 / 9 * math.log(2) + 2 / 9 * math.log(4))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ofa_at_eps_1_is_the_cross_entropy_with_the_teacher(temperature: float) -> None:
    student, teacher, batch = draw(dtype=torch.float64)
    expected = F.cross_entropy(student.logits / temperature, (teacher.logits / temperature).softmax(dim=1))
    assert_close(ofa(student.logits, teacher.logits, batch.labels, 1.0, temperature), expected)


def test_limits_of_eps() -> None:
    """Towards 0 each class but the target weighs 1; a large one leaves the target alone, 2^eps - 1 for a teacher that is sure of it."""
    p, q = [1 / 2, 3 / 8, 1 / 8], [1 / 2, 1 / 4, 1 / 4]
    assert of_one(p, q, 1e-9) == pytest.approx(math.log(8 / 3) + math.log(8), rel=1e-6)
    assert of_one(p, q, 50.0) == pytest.approx((1.5**50 - 1) * math.log(2), rel=1e-9)
    assert of_one(p, [1 - 2e-12, 1e-12, 1e-12], 1.5) == pytest.approx((2**1.5 - 1) * math.log(2), rel=1e-9)


def test_ofa_keeps_the_digits_of_a_target_that_the_teacher_rejects() -> None:
    """(1 + q)^eps - 1 is eps q for q = 1e-8, which 1 + q in fp32 does not hold; the student is so far off that it counts."""
    student, teacher = torch.tensor([[-1e8, 0.0, -100.0]]), torch.tensor([[0.0, math.log(1e8), -100.0]])
    assert_close(ofa(student, teacher, torch.tensor([0]), 1.5, 1.0), torch.tensor(1.5))


def test_ofas_gradient_at_the_final_logits_by_hand() -> None:
    """With weights w and their sum W: (W p - w) / batch, for a student that is wrong and sure too."""
    student, teacher, batch = convert(draw(40.0)[0], torch.float64), draw(dtype=torch.float64)[1], draw()[2]
    one = F.one_hot(batch.labels, CLASSES)
    w = (teacher.logits.softmax(dim=1) + one) ** 1.5 - one
    z = student.logits.clone().requires_grad_()
    ofa(z, teacher.logits, batch.labels, 1.5, 1.0).backward()
    assert_close(z.grad, (w.sum(dim=1, keepdim=True) * student.logits.softmax(dim=1) - w) / len(w))


def test_the_majority_label_is_ofas_target() -> None:
    student, teacher, batch = draw()
    other = (batch.labels + 1) % CLASSES
    mixed = replace(batch, targets=0.6 * F.one_hot(batch.labels, CLASSES).float() + 0.4 * F.one_hot(other, CLASSES).float())
    terms = distillation(compute(make("ofa"), student, teacher, mixed))
    assert terms == distillation(compute(make("ofa"), student, teacher, batch))
    assert terms != distillation(compute(make("ofa"), student, teacher, replace(mixed, labels=other)))


@pytest.mark.parametrize(("side", "expected"), [(1, 1), (2, 1), (7, 4), (56, 28)])
def test_a_halving_halves(side: int, expected: int) -> None:
    assert halving(3, 5)(torch.randn(2, 3, side, side)).shape == (2, 5, expected, expected)
    assert branch(3, 2, 6, CLASSES)(torch.randn(2, 3, side, side)).shape == (2, CLASSES)


def test_adapters_start_as_the_authors_do() -> None:
    """reviewkd: uniform, variance 1 / inputs. ofa: convolutions normal, variance 2 / (outputs x places), linear 0.02 and no bias."""
    fusion, one = Fusion(64, 48, 32, deeper=False), branch(128, 1, 64, 100)
    first, *_, last = [module for module in one.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    expected = [(fusion.enter, 1 / 64), (fusion.leave, 1 / (48 * 9)), (first, 2 / (128 * 9)), (last, 0.02**2)]
    for layer, variance in expected:
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.3)
    assert fusion.enter.weight.abs().max() <= (3 / 64) ** 0.5
    assert not last.bias.any()
