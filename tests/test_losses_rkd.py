"""What only RKD promises: what it does not see, images that are alike, memory, precision."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kdlib.engine.probe import peak_bytes
from kdlib.losses.rkd import ELEMENTS, rkd
from tests.toys import compute, distillation, draw, expect, make, require_grad


def embeddings(batch: int, features: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of a student and a teacher, far from the origin as those of a ReLU are, with some images alike."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(8, features, generator=rng, dtype=torch.float64) + 3
    a, b = (centres[torch.arange(batch) % 8] + 0.5 * torch.randn(batch, features, generator=rng, dtype=torch.float64) for _ in range(2))
    return a.relu().to(dtype), b.relu().to(dtype)


def whole_loss(student: Tensor, teacher: Tensor, elements: int = ELEMENTS) -> Tensor:
    distance, angle = rkd(student, teacher, elements)
    return distance + angle


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


def test_does_not_see_position_rotation_or_scale() -> None:
    student, teacher = embeddings(20, 6)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    before = rkd(student, teacher)
    assert_close(rkd(7 * student @ turned + 5, 1e-3 * teacher @ turned.T - 2), before)
    assert_close(torch.stack(rkd(student, 3 * student @ turned + 1)), torch.zeros(2).double(), atol=1e-12, rtol=0)
    assert not torch.isclose(rkd(student * torch.arange(1, 7), teacher)[1], before[1], rtol=1e-2)  # it does see a stretched axis


@pytest.mark.parametrize("batch", [2, 7, 16])
def test_is_the_same_however_many_angles_are_computed_at_a_time(batch: int) -> None:
    """From one vertex at a time to all; a last chunk that is smaller included."""
    student, teacher = embeddings(batch, 5)
    whole, slope = rkd(student, teacher), gradient(lambda own: whole_loss(own, teacher), student)
    for vertices in range(batch + 1):
        elements = vertices * batch**2
        assert_close(rkd(student, teacher, elements), whole)
        assert_close(gradient(lambda own, e=elements: whole_loss(own, teacher, e), student), slope)


def test_takes_64_mb_at_most_at_a_batch_of_256_and_2048_features() -> None:
    """Measured: 28 MB. One chunk of angles are 4 MB, all of them 67 MB, the differences of all pairs of images 537 MB."""
    student, teacher = embeddings(256, 2048, torch.float32)
    leaf = student.requires_grad_()
    assert peak_bytes(lambda: whole_loss(leaf, teacher).backward()) < 64e6
    assert peak_bytes(lambda: whole_loss(leaf, teacher, 256**3).backward()) > 4 * 67e6  # the measurement sees what a chunk saves


@pytest.mark.parametrize("features", [16, 2048])
def test_in_fp32_equals_fp64_far_from_the_origin(features: int) -> None:
    """Squared distances are differences of squared lengths: without centring fp32 would lose them."""
    student, teacher = embeddings(64, features, torch.float32)
    student, teacher = student + 100, teacher + 100
    for mine, exact in zip(rkd(student, teacher), rkd(student.double(), teacher.double()), strict=True):
        assert mine.item() == pytest.approx(exact.item(), rel=2e-5)
    mine, exact = (gradient(lambda own, t=one: rkd(own, t.to(own))[1], student.to(one)) for one in (teacher, teacher.double()))
    assert (mine.double() - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "alike", ["two of the student", "two of the teacher", "two of both", "all of the student", "all of the teacher", "all of both"]
)
def test_of_images_that_are_alike(alike: str, dtype: torch.dtype) -> None:
    """Their distance is 0 and no distance to be averaged, they have no direction, and no gradient between them."""
    student, teacher, batch = draw(dtype=torch.float64)
    assert student.embedding is not None and teacher.embedding is not None
    images = slice(None) if "all" in alike else slice(4, 6)
    for who, output in (("student", student), ("teacher", teacher)):
        if who in alike or "both" in alike:
            assert output.embedding is not None
            output.embedding[images] = output.embedding[4].clone()
    student, teacher = (replace(one, embedding=one.embedding.to(dtype), logits=one.logits.to(dtype)) for one in (student, teacher))
    said, expected = require_grad(student), expect("rkd", make("rkd"), student, teacher, batch)
    terms = compute(make("rkd"), said, teacher, batch)
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=2e-5, abs=1e-9)
    sum(distillation(terms), start=torch.zeros(())).backward()
    assert said.embedding is not None and said.embedding.grad is not None
    sizes = said.embedding.grad.norm(dim=1)
    assert sizes.isfinite().all()
    if "all" in alike and "teacher" not in alike:
        assert not sizes.any()
    else:
        assert sizes.max() < 1e3


def test_images_closer_than_fp32_can_tell_count_as_alike() -> None:
    """Else their direction is made of rounding errors, and so is a gradient a thousand times that of the others."""
    student, teacher = embeddings(24, 512, torch.float32)
    alike = student.clone()
    alike[12:] = alike[:12]
    noise = torch.randn(12, 512, generator=torch.Generator().manual_seed(2))
    nearly = torch.cat([alike[:12], alike[12:] * (1 + 1e-6 * noise)])
    for mine, expected in zip(rkd(nearly, teacher), rkd(alike, teacher), strict=True):
        assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    slopes = [gradient(lambda own: whole_loss(own, teacher), one) for one in (nearly, alike)]
    assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-3 * slopes[1].abs().max().item())
