"""What only the methods that look inside the models promise: values by hand, maps that differ in size, refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.losses import METHODS, Method
from kdlib.losses.sp import similarity
from kdlib.losses.stages import same_size
from kdlib.types import Batch, Output, OutputShape, Setup
from tests.toys import ALL_LABELS, STUDENT, TEACHER, compute, draw, expect, make, reorder, reorder_batch, require_grad, total

NEEDS = {"hard_weight": 0.0, "weight": 10.0}


def build(name: str, student: OutputShape, teacher: OutputShape, weights: list[Any] | None = None, **params: float) -> Method:
    """A method in float64 with these weights, in the order of its parameters; by hand means all of them."""
    method = METHODS[name](**NEEDS | params)
    method.adapt(Setup(student, teacher, ALL_LABELS))
    method.double()
    if weights is not None:
        for parameter, value in zip(method.parameters(), weights, strict=True):
            parameter.data = torch.tensor(value, dtype=torch.float64).reshape(parameter.shape)
    return method


def term(method: Method, student: Output, teacher: Output) -> dict[str, float]:
    n = len(student.logits)
    batch = Batch(torch.zeros(n, 1, 1, 1), torch.full((n, 2), 0.5), torch.zeros(n).long(), torch.arange(n), torch.zeros(n).bool())
    return {key: value.item() for key, value in compute(method, student, teacher, batch).items()}


def says(maps: list[Any] | None = None, embedding: Any = None) -> Output:
    """Of maps (batch, channels, height, width), or of an embedding."""
    stages = tuple(torch.tensor(stage, dtype=torch.float64) for stage in maps or ())
    vectors = None if embedding is None else torch.tensor(embedding, dtype=torch.float64)
    return Output(torch.zeros(len(stages[0] if stages else embedding), 2).double(), vectors, stages, None)


def shaped(*maps: tuple[int, int, int], embedding: int = 2) -> OutputShape:
    return OutputShape(2, embedding, maps)


def test_fitnet_by_hand() -> None:
    """The second stage from the end: one channel that says 2 becomes (1 * 2 + 0, 2 * 2 + 1) = (2, 5), the hint is (1, 1)."""
    last = (1, 1, 1)
    method = build("fitnet", shaped((1, 1, 1), last), shaped((2, 1, 1), last), [[1.0, 2.0], [0.0, 1.0]], stage=2.0)
    student, teacher = says([[[[[2.0]]]], [[[[7.0]]]]]), says([[[[[1.0]], [[1.0]]]], [[[[9.0]]]]])
    assert term(method, student, teacher) == pytest.approx({"hint": 10 * (1**2 + 4**2) / 2})


def test_at_by_hand() -> None:
    """Stage one: attention (1, 0) against (1, 1) / sqrt 2. Stage two: (1, 0) against (16, 9 + 3) / 20 = (0.8, 0.6), means of squares."""
    student = says([[[[[3.0, 0.0]]]], [[[[2.0, 0.0]]]]])
    teacher = says([[[[[5.0, -5.0]]]], [[[[4.0, 3.0]], [[0.0, math.sqrt(3)]]]]])
    method = build("at", shaped((1, 1, 2), (1, 1, 2)), shaped((1, 1, 2), (2, 1, 2)))
    first, second = ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 2, (0.2**2 + 0.6**2) / 2
    assert term(method, student, teacher) == pytest.approx({"attention": 10 * (first + second)})


def test_sp_by_hand() -> None:
    """The student's images are at right angles (G the identity), the teacher's are alike (each row (1, 1) / sqrt 2)."""
    method = build("sp", shaped((2, 1, 1)), shaped((1, 1, 1)))
    student, teacher = says([[[[[3.0]], [[0.0]]], [[[0.0]], [[2.0]]]]]), says([[[[[5.0]]], [[[5.0]]]]])
    assert term(method, student, teacher) == pytest.approx({"similarity": 10 * 2 * ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 2**2})


def test_vid_by_hand() -> None:
    """-2 becomes 6 = relu(relu(-2 * -1) * 1.5) * 2, the target is 3; variance 5. The same with 0 against 2."""
    alpha = math.log(math.expm1(5 - 1e-5))
    method = build("vid", shaped((1, 1, 2)), shaped((1, 1, 2)), [[-1.0], [1.5], [2.0], [alpha]], variance=4.0)
    student, teacher = says([[[[[-2.0, 0.0]]]]]), says([[[[[3.0, 2.0]]]]])
    assert term(method, student, teacher) == pytest.approx({"information": 10 * 0.5 * ((9 + 4) / 2 / 5 + math.log(5))})


def test_cc_by_hand() -> None:
    """Gaps (1, 2), (3, 1), (0, 1): neighbours give 1 * 3 + 2 * 1 = 5 and 3 * 0 + 1 * 1 = 1."""
    same = [[[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]]
    method = build("cc", shaped(), shaped(), [*same, *same], scale=0.02, dim=2.0)
    student, teacher = says(embedding=[[1.0, 0.0], [3.0, 5.0], [0.0, 0.0]]), says(embedding=[[0.0, 2.0], [0.0, 4.0], [0.0, 1.0]])
    assert term(method, student, teacher) == pytest.approx({"correlation": 10 * 0.02 * (5 + 1) / 2})


def test_rkd_by_hand() -> None:
    """A right angle against a straight line with the vertex in its middle.

    Student: distances 1, 1, sqrt 2; cosines 0, and sqrt 1/2 twice. Teacher: distances 1, 1, 2; cosines -1, and 1 twice. A difference of 1
    or less costs half its square; each pair of two images is met twice.
    """
    method = build("rkd", shaped(), shaped(embedding=1), distance_weight=25.0, angle_weight=50.0)
    terms = term(method, says(embedding=[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), says(embedding=[[0.0], [1.0], [-1.0]]))
    short, long = 3 / (2 + math.sqrt(2)) - 3 / 4, 3 * math.sqrt(2) / (2 + math.sqrt(2)) - 6 / 4
    distance = 2 * (short**2 + short**2 + long**2) / 2 / 3**2
    angle = 2 * (1 + 2 * (1 - math.sqrt(0.5)) ** 2) / 2 / 3**3
    assert terms == pytest.approx({"distance": 10 * 25 * distance, "angle": 10 * 50 * angle})


@pytest.mark.parametrize("name", ["at", "fitnet", "vid"])
@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_counts_as_its_average_at_the_smaller_size(name: str, larger: str) -> None:
    """Whichever model's it is, and where one is higher and the other wider, both are averaged."""
    torch.manual_seed(0)
    for size, other in (((8, 8), (4, 4)), ((7, 5), (3, 2)), ((6, 2), (3, 4))):
        first, second = (size, other) if larger == "student" else (other, size)
        maps = torch.rand(3, 2, *first), torch.rand(3, 4, *second)
        pooled = same_size(*maps)
        assert pooled[0].shape[2:] == pooled[1].shape[2:] == tuple(map(min, size, other))
        values = []
        for a, b in (maps, pooled):
            method = build(name, shaped((2, *a.shape[2:])), shaped((4, *b.shape[2:])), **_own(name))
            for parameter in method.parameters():
                parameter.data.fill_(0.3)
            values.append(term(method, says([a.tolist()]), says([b.tolist()])))
        assert values[0] == pytest.approx(values[1])


def _own(name: str) -> dict[str, float]:
    return {"fitnet": {"stage": 1.0}, "vid": {"variance": 5.0}}.get(name, {})


def test_sp_compares_maps_of_any_size_as_they_are() -> None:
    """A map of which each place is repeated four times says the same: only directions count."""
    student, teacher, batch = draw(dtype=torch.float64)
    assert student.maps is not None
    large = replace(student, maps=tuple(stage.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for stage in student.maps))
    assert_close(compute(make("sp"), large, teacher, batch), compute(make("sp"), student, teacher, batch))


def test_fitnet_refuses_a_stage_that_one_of_the_models_does_not_have() -> None:
    make("fitnet", stage=3.0)
    for who, shapes, has in (("student", (STUDENT, TEACHER), 3), ("teacher", (TEACHER, STUDENT), 3)):
        with pytest.raises(ValueError, match=rf"^found a {who} with {has} stages; allowed: 4 or more; choose another model, or an earlier"):
            make("fitnet", *shapes, stage=4.0)
    for stage in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"^stage: found {stage:g}; allowed: a whole number >= 1$"):
            make("fitnet", stage=stage)


def test_at_refuses_stages_that_leave_nothing_to_look_at() -> None:
    one_place = OutputShape(7, 10, ((6, 4, 1), (12, 1, 1)))
    with pytest.raises(ValueError, match=r"^found stages of one place each, where attention is always 1; allowed: a stage of two places"):
        make("at", one_place, OutputShape(7, 10, ((6, 1, 4), (12, 2, 2))))
    make("at", one_place, TEACHER)


def test_vid_refuses_a_variance_below_its_floor() -> None:
    with pytest.raises(ValueError, match=r"^variance: found 1e-05; allowed: a number > 1e-05$"):
        make("vid", variance=1e-5)


def test_at_of_a_map_of_zeros_is_that_of_a_model_that_looks_nowhere() -> None:
    student, teacher, batch = draw()
    assert student.maps is not None and teacher.maps is not None
    for image in range(len(batch.labels)):
        student.maps[1][image] = 0.0
    said = require_grad(student)
    value = compute(make("at"), said, teacher, batch)
    assert value["attention"].item() == pytest.approx(expect("at", make("at"), student, teacher, batch)["attention"], rel=1e-5)
    total(value).backward()
    assert said.maps is not None
    gradients = [stage.grad for stage in said.maps]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert gradients[1] is not None and not gradients[1].any()


def test_sp_gives_an_image_with_a_map_of_zeros_no_gradient_a_million_times_that_of_others() -> None:
    student, teacher, batch = draw()
    assert student.maps is not None
    student.maps[-1][3] = 0.0
    said = require_grad(student)
    terms = compute(make("sp"), said, teacher, batch)
    assert terms["similarity"].item() == pytest.approx(expect("sp", make("sp"), student, teacher, batch)["similarity"], rel=1e-5)
    total(terms).backward()
    assert said.maps is not None and said.maps[-1].grad is not None
    sizes = said.maps[-1].grad.flatten(1).norm(dim=1)
    assert sizes[3] <= 3 * sizes[torch.arange(len(sizes)) != 3].max()


def test_sp_pairs_each_image_of_the_student_with_the_same_of_the_teacher() -> None:
    student, teacher, batch = draw(dtype=torch.float64)
    order = torch.arange(len(batch.labels)).flip(0)
    assert student.maps is not None
    moved = reorder(student, order)
    assert moved.maps is not None
    assert_close(similarity(moved.maps[-1]), similarity(student.maps[-1])[order][:, order])
    before = compute(make("sp"), student, teacher, batch)["similarity"].item()
    assert compute(make("sp"), moved, reorder(teacher, order), reorder_batch(batch, order))["similarity"].item() == pytest.approx(before)
    assert compute(make("sp"), moved, teacher, batch)["similarity"].item() != pytest.approx(before, rel=1e-3)


def test_cc_looks_at_neighbours_only() -> None:
    """Where each second image agrees, all products are 0, however wrong the others are."""
    method = build("cc", shaped(), shaped(), [[[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]] * 2, scale=1.0, dim=2.0)
    teacher = [[float(i), -float(i)] for i in range(6)]
    student = [[a + 100 * (i % 2), b] for i, (a, b) in enumerate(teacher)]
    assert term(method, says(embedding=student), says(embedding=teacher)) == {"correlation": 0.0}
    sorted_rows = [student[i] for i in (0, 2, 4, 1, 3, 5)], [teacher[i] for i in (0, 2, 4, 1, 3, 5)]
    assert term(method, *(says(embedding=rows) for rows in sorted_rows))["correlation"] == pytest.approx(10 * 2 * 100**2 / 5)


def test_vids_variances_are_trained_without_decay_until_they_are_the_mean_squared_error() -> None:
    """d/d sigma^2 of [r^2 / sigma^2 + log sigma^2] / 2 is 0 at sigma^2 = r^2, channel by channel."""
    method = build("vid", shaped((1, 1, 1)), shaped((2, 1, 1)), variance=5.0)
    variances = [parameter for name, parameter in method.named_parameters() if name.startswith("alphas.")]
    assert [variance.shape for variance in variances] == [(2,)]
    groups = param_groups_weight_decay(method, 0.5)
    kept = [parameter for group in groups if group["weight_decay"] == 0 for parameter in group["params"]]
    assert any(parameter is variances[0] for parameter in kept)
    for regressor in (parameter for name, parameter in method.named_parameters() if name.startswith("regressors.")):
        nn.init.zeros_(regressor).requires_grad_(False)
    student, teacher = says([[[[[1.0]]], [[[1.0]]]]]), says([[[[[3.0]], [[0.1]]], [[[1.0]], [[0.3]]]]])
    batch = replace(draw(batch=2)[2], targets=torch.full((2, 2), 0.5), labels=torch.zeros(2).long())
    optimizer = torch.optim.LBFGS(variances, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total(compute(method, student, teacher, batch))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (nn.functional.softplus(variances[0]) + 1e-5).tolist() == pytest.approx([(9 + 1) / 2, (0.01 + 0.09) / 2], rel=1e-3)
