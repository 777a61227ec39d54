"""Every registered method, none of them named, against its reference; then what all of them promise."""

import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.losses import HARD, METHODS, Method
from kdlib.types import Batch, Output, Terms
from tests import references

NAMES = sorted(METHODS)
every_method = pytest.mark.parametrize("name", NAMES)


def parameters(name: str) -> dict[str, float]:
    """A different number, none of them 1, for each parameter: one that is ignored or confused shows."""
    return {key: 0.5 + 0.75 * i for i, key in enumerate(inspect.signature(METHODS[name]).parameters)}


def make_batch(labels: Tensor, classes: int) -> Batch:
    targets = torch.full((len(labels), classes), 0.3 / classes).scatter_(1, labels[:, None], 0.7 + 0.3 / classes)
    return Batch(torch.zeros(len(labels), 1, 8, 8), targets, labels, torch.arange(len(labels)))


def draw(std: float = 2.0, dtype: torch.dtype = torch.float32, *, batch: int = 12, classes: int = 7) -> tuple[Tensor, Tensor, Batch]:
    """Logits of a student and of a teacher that it resembles, with given standard deviation; labels are often the teacher's answer."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, batch, classes, generator=generator, dtype=torch.float64)
    teacher = std * normal[0]
    student = std * (0.6 * normal[0] + 0.8 * normal[1])
    labels = (teacher + std * normal[2]).argmax(dim=1)
    return student.to(dtype), teacher.to(dtype), make_batch(labels, classes)


def compute(method: nn.Module, student: Tensor, teacher: Tensor, batch: Batch) -> Terms:
    terms: Terms = method(Output(student), Output(teacher), batch, HARD["ce"](student, batch.targets))
    return terms


def distillation(terms: Terms) -> list[Tensor]:
    return [value for name, value in terms.items() if name != "hard"]


def expect(name: str, student: Tensor, teacher: Tensor, batch: Batch) -> dict[str, float]:
    """The reference's terms for the numbers that these tensors hold."""
    z_s, z_t, targets = (tensor.double().numpy() for tensor in (student, teacher, batch.targets))
    return references.REFERENCES[name](z_s, z_t, batch.labels.numpy(), references.ce(z_s, targets), **parameters(name))


@every_method
@pytest.mark.parametrize("std", [0.1, 1.0, 4.0, 10.0])
def test_equals_its_reference(name: str, std: float) -> None:
    assert name in references.REFERENCES, f"write {name} from its paper into tests/references.py"
    method = METHODS[name](**parameters(name))
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        student, teacher, batch = draw(std, dtype)
        terms, expected = compute(method, student, teacher, batch), expect(name, student, teacher, batch)
        assert list(terms) == list(expected)
        for key, value in expected.items():
            assert terms[key].item() == pytest.approx(value, rel=rtol, abs=rtol), key


@every_method
def test_gradient_equals_finite_differences(name: str) -> None:
    method = METHODS[name](**parameters(name))
    student, teacher, batch = draw(dtype=torch.float64, batch=4, classes=5)
    torch.autograd.gradcheck(lambda z: tuple(compute(method, z, teacher, batch).values()), student.requires_grad_())


def extremes() -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """Logits that a model may give when it is very sure, undecided, or says the same of every image."""
    for std in (40.0, 1e3, 1e4):
        yield draw(std)
    student, teacher, batch = draw()
    sure = 1e4 * F.one_hot(batch.labels, 7).float()
    same = teacher[:1].expand_as(teacher)
    for a in (student, sure, -sure, same, torch.zeros_like(student), 1e4 * same):
        for b in (teacher, sure, same, torch.zeros_like(teacher)):
            yield a.clone(), b.clone(), batch


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_in_fp32_for_extreme_logits(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name](**parameters(name))
    for student, teacher, batch in extremes():
        z = student.to(dtype).requires_grad_()
        terms = compute(method, z, teacher.to(dtype), batch)
        assert all(value.dtype == torch.float32 and value.isfinite() and value > -1e-5 for value in terms.values()), terms
        sum(terms.values(), start=torch.zeros(())).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_lose_nothing_more(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name](**parameters(name))
    student, teacher, batch = draw(dtype=dtype)
    assert compute(method, student, teacher, batch) == compute(method, student.float(), teacher.float(), batch)


@every_method
def test_fp32_under_autocast(name: str) -> None:
    method = METHODS[name](**parameters(name))
    student, teacher, batch = draw()
    plain = compute(method, student, teacher, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compute(method, student, teacher, batch)
    assert cast == plain
    assert all(value.dtype == torch.float32 for value in cast.values())


def test_a_matrix_product_in_a_method_stays_fp32_under_autocast() -> None:
    class Gram(Method):
        def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:  # noqa: ARG002
            return {"gram": (student.logits @ teacher.logits.T).mean()}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute(Gram(hard_weight=1.0), *draw())["gram"].dtype == torch.float32


@every_method
def test_nothing_to_learn_from_a_teacher_that_says_the_same(name: str) -> None:
    method = METHODS[name](**parameters(name))
    _, teacher, batch = draw(dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    for value in distillation(compute(method, student, teacher, batch)):
        assert value.item() == pytest.approx(0, abs=1e-12)
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@every_method
def test_a_constant_added_to_an_images_logits_changes_nothing(name: str) -> None:
    method = METHODS[name](**parameters(name))
    student, teacher, batch = draw(dtype=torch.float64)
    shift = torch.linspace(-30, 30, len(student), dtype=torch.float64)[:, None]
    assert_close(compute(method, student + shift, teacher - 2 * shift, batch), compute(method, student, teacher, batch))


@every_method
def test_order_of_the_batch_changes_nothing(name: str) -> None:
    method = METHODS[name](**parameters(name))
    student, teacher, batch = draw(dtype=torch.float64)
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(1))
    shuffled = Batch(batch.images[order], batch.targets[order], batch.labels[order], batch.index[order])
    assert_close(compute(method, student[order], teacher[order], shuffled), compute(method, student, teacher, batch))


@every_method
def test_every_parameter_changes_a_term(name: str) -> None:
    student, teacher, batch = draw(dtype=torch.float64)
    before = compute(METHODS[name](**parameters(name)), student, teacher, batch)
    for key, value in parameters(name).items():
        after = compute(METHODS[name](**parameters(name) | {key: 1.5 * value}), student, teacher, batch)
        assert any(not math.isclose(before[term].item(), after[term].item(), rel_tol=1e-3) for term in before), key


@every_method
def test_teacher_gets_no_gradient(name: str) -> None:
    student, teacher, batch = draw()
    teacher.requires_grad_()
    terms = compute(METHODS[name](**parameters(name)), student.requires_grad_(), teacher, batch)
    sum(terms.values(), start=torch.zeros(())).backward()
    assert teacher.grad is None
    assert student.grad is not None


def compile_every_method() -> None:
    """Values and gradients of hard loss and method compiled into one graph, against those of the plain ones."""
    for name in NAMES:
        student, teacher, batch = draw()
        method = METHODS[name](**parameters(name))
        results = []
        for function in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
            z = student.clone().requires_grad_()
            terms = function(method, z, teacher, batch)
            sum(terms.values(), start=torch.zeros(())).backward()
            results.append((terms, z.grad))
        assert_close(results[1], results[0])


def test_compiles() -> None:
    """In a process of its own: torch.compile cannot look through the shape checks that are switched on here."""
    command = "from tests.test_losses import compile_every_method; compile_every_method()"
    subprocess.run([sys.executable, "-W", "error", "-c", command], cwd=Path(__file__).parents[1], check=True, timeout=200)


@every_method
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_refuses_a_bad_parameter_and_says_which(name: str, bad: float) -> None:
    for key in parameters(name):
        with pytest.raises(ValueError, match=rf"^{key}: found {bad:g}; allowed: a number >=? 0$"):
            METHODS[name](**parameters(name) | {key: bad})


def test_references_are_for_registered_methods_only() -> None:
    assert sorted(references.REFERENCES) == NAMES
