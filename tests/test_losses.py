"""Every registered method, none of them named, against its reference; then what all of them promise."""

import ast
import functools
import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kdlib import config
from kdlib.errors import Refused
from kdlib.losses import HARD, METHODS, Method
from kdlib.losses import rkd as angles
from kdlib.study.training.checks import check_without_data
from kdlib.types import Batch, Feature, Output, OutputShape, Terms
from tests import references, tiny
from tests.refusals import change
from tests.toys import (
    BATCH,
    CLASSES,
    HALFWAY,
    IMAGES,
    STUDENT,
    TEACHER,
    Case,
    asked,
    assemble,
    compute,
    convert,
    distillation,
    draw,
    expect,
    fresh,
    gradients,
    make,
    parameters,
    reorder,
    reorder_batch,
    require_grad,
    tensors,
    total,
)

NAMES = sorted(METHODS)
every_method = pytest.mark.parametrize("name", NAMES)


def holds(name: str, claim: str) -> bool:
    return claim in references.of(name).HOLDS


@every_method
@pytest.mark.parametrize("std", [0.1, 1.0, 4.0, 10.0])
def test_equals_its_reference(name: str, std: float) -> None:
    """In its first step and in the next: some methods remember what they have seen."""
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        method = make(name).to(dtype)
        case = draw(std, dtype)
        for _ in range(2):
            expected = expect(name, method, *case)
            terms = compute(method, *case)
            assert list(terms) == list(expected)
            for key, value in expected.items():
                noise = 8 * torch.finfo(dtype).eps  # of a small difference of logarithms; 4 is too little for AVX-512's order of additions
                assert terms[key].item() == pytest.approx(value, rel=rtol, abs=noise), key


def differentiate(method: Method, case: Case, dtype: torch.dtype) -> tuple[Terms, list[Tensor | None]]:
    """The terms for answers in this precision, and the gradients of the distillation terms, or of the hard loss where it is alone."""
    student, teacher, batch = case
    said = require_grad(convert(student, dtype))
    terms = compute(method, said, convert(teacher, dtype), batch)
    method.zero_grad()
    torch.stack(distillation(terms) or list(terms.values())).sum().backward()
    return terms, gradients(said, method)


@every_method
@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_gradient_in_fp32_equals_fp64(name: str, std: float) -> None:
    """In the second step, where what a method remembers counts."""
    case, found = draw(std), []
    for dtype in (torch.float32, torch.float64):
        method = make(name).to(dtype)
        compute(method, convert(case[0], dtype), convert(case[1], dtype), case[2])
        found.append(differentiate(method, case, dtype)[1])
    for mine, exact in zip(*found, strict=True):
        if mine is None or exact is None:
            assert mine is exact
        else:
            assert (mine - exact).abs().max() <= 2e-5 * exact.abs().max()


@every_method
def test_gradient_equals_finite_differences(name: str) -> None:
    """With respect to all that the student says and to the method's own parameters."""
    method = make(name).double()
    student, teacher, batch = draw(dtype=torch.float64, batch=4)
    compute(method, student, teacher, batch)  # constants that a method estimates from its first batch are constants in its gradient
    said, answers = asked(student, method.asks_student), asked(teacher, method.asks_teacher)
    names = [key for key, _ in method.named_parameters()]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in [*tensors(said), *method.parameters()]]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        outputs, own = given[: len(given) - len(names)], dict(zip(names, given[len(given) - len(names) :], strict=True))
        call = (assemble(said, list(outputs)), answers, batch, HARD["ce"], torch.tensor(HALFWAY).double())
        terms: Terms = torch.func.functional_call(fresh(method), own, call)
        return tuple(terms.values())

    torch.autograd.gradcheck(function, leaves, fast_mode=True)


def extremes() -> Iterator[Case]:
    """What a model may say when it is very sure, undecided, or says the same of every image."""
    for std in (40.0, 1e3, 1e4):
        yield draw(std)
    student, teacher, batch = draw()
    sure = 1e4 * F.one_hot(batch.labels, 7).float()
    variants = [_with(student, student.logits), _with(student, sure), _with(student, -sure), _same(student), _scaled(student, 0.0)]
    answers = [_with(teacher, teacher.logits), _with(teacher, sure), _same(teacher), _scaled(teacher, 0.0)]
    answers.append(_scaled(teacher, 5e3))  # a standard deviation of 1e4: more would leave the range of fp16
    for a in variants:
        for b in answers:
            yield a, b, batch


def _with(output: Output, logits: Tensor) -> Output:
    return Output(logits.clone(), output.embedding, output.maps, output.preactivations)


def _same(output: Output) -> Output:
    return assemble(output, [tensor[:1].expand_as(tensor).clone() for tensor in tensors(output)])


def _scaled(output: Output, factor: float) -> Output:
    return assemble(output, [factor * tensor for tensor in tensors(output)])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_in_fp32_for_extreme_answers(name: str, dtype: torch.dtype) -> None:
    for student, teacher, batch in extremes():
        method, case = make(name), (convert(student, dtype), convert(teacher, dtype), batch)
        terms, found = differentiate(method, case, dtype)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values()), terms
        if dtype == torch.float16:
            # The gradient of an fp16 answer is fp16, which ends at 65,504: a squared error of maps near 1e4 exceeds that. kdlib never
            # trains in fp16; whoever does scales the loss. So what counts is the gradient before it is rounded.
            found = differentiate(make(name), case, torch.float32)[1]
        assert all(gradient is None or gradient.isfinite().all() for gradient in found)


@every_method
@pytest.mark.parametrize("std", [0.1, 2.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_lose_nothing_more(name: str, dtype: torch.dtype, std: float) -> None:
    """Terms and the gradients of the method's parameters are those of the same numbers in fp32; those of the answers too, rounded once."""
    case = draw(std, dtype)
    half, full = (differentiate(make(name), case, precision) for precision in (dtype, torch.float32))
    assert half[0] == full[0]
    for mine, exact in zip(half[1], full[1], strict=True):
        if mine is None or exact is None:
            assert mine is exact
        else:
            assert torch.equal(mine, exact.to(mine.dtype))


@every_method
def test_fp32_under_autocast(name: str) -> None:
    case = draw()
    plain = compute(make(name), *case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compute(make(name), *case)
    assert cast == plain
    assert all(value.dtype == torch.float32 for value in cast.values())


def test_a_matrix_product_in_a_method_stays_fp32_under_autocast() -> None:
    class Gram(Method):
        def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:  # noqa: ARG002
            return {"gram": (student.logits @ teacher.logits.T).mean()}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute(Gram(hard_weight=1.0, weight=1.0), *draw())["gram"].dtype == torch.float32


@every_method
def test_nothing_to_learn_from_a_teacher_that_says_the_same(name: str) -> None:
    method = make(name, TEACHER, TEACHER).double()
    student, teacher, batch = draw(dtype=torch.float64, same=True)
    said = require_grad(student)
    terms = distillation(compute(method, said, teacher, batch))
    total({str(i): value for i, value in enumerate(terms)}).double().backward() if terms else None
    sizes = [value.abs().item() for value in terms] + [leaf.grad.abs().max().item() for leaf in tensors(said) if leaf.grad is not None]
    assert (max(sizes, default=0.0) < 1e-10) == holds(name, "zero_at_teacher")


@every_method
def test_a_constant_added_to_an_images_logits(name: str) -> None:
    student, teacher, batch = draw(dtype=torch.float64)
    shift = torch.linspace(-30, 30, len(batch.labels), dtype=torch.float64)[:, None]
    before = compute(make(name).double(), student, teacher, batch)
    shifted = (_with(student, student.logits + shift), _with(teacher, teacher.logits - 2 * shift))
    assert _close(compute(make(name).double(), *shifted, batch), before) == holds(name, "shift_invariant")


@every_method
def test_order_of_the_batch(name: str) -> None:
    student, teacher, batch = draw(dtype=torch.float64)
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(1))
    shuffled = reorder(student, order), reorder(teacher, order), reorder_batch(batch, order)
    before = compute(make(name).double(), student, teacher, batch)
    assert _close(compute(make(name).double(), *shuffled), before) == holds(name, "order_invariant")


def _close(a: Terms, b: Terms) -> bool:
    return all(torch.allclose(a[key], b[key], rtol=1e-9, atol=1e-12) for key in b)


@every_method
def test_every_parameter_changes_a_term(name: str) -> None:
    """In the second step, where what a method remembers counts."""

    def second(**changes: float) -> Terms:
        method, case = make(name, **changes).double(), draw(dtype=torch.float64)
        compute(method, *case)
        return compute(method, *case)

    before = second()
    for key, value in parameters(name).items():
        other = references.of(name).CHOSEN.get(f"{key}:other", 1.2 * value)
        after = second(**{key: other})
        assert any(not math.isclose(before[term].item(), after[term].item(), rel_tol=1e-3) for term in before), key


@every_method
def test_warm_up_grows_linearly_and_ends(name: str) -> None:
    case = draw(dtype=torch.float64)
    warmup = parameters(name).get("warmup")
    whole = compute(make(name).double(), *case, progress=1.0)
    for progress in (1e-3, 0.4, 0.8, 0.9):
        part = compute(make(name).double(), *case, progress=progress)
        factor = min(1.0, progress / warmup) if warmup else 1.0
        for key, value in whole.items():
            assert part[key].item() == pytest.approx(value.item() * (1.0 if key == "hard" else factor), rel=1e-9)
    if warmup:
        off = compute(make(name, warmup=0.0).double(), *case, progress=1e-3)
        assert_close(off, whole)


@every_method
def test_own_parameters_get_a_gradient_and_the_teacher_none(name: str) -> None:
    student, teacher, batch = draw()
    said, answers, method = require_grad(student), require_grad(teacher), make(name)
    total(compute(method, said, answers, batch)).backward()
    assert all(leaf.grad is None for leaf in tensors(answers))
    assert any(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in tensors(said))
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@every_method
def test_says_what_it_looks_at(name: str) -> None:
    """Asked parts of the student get a gradient: a method that asks for what it does not use costs a pass for nothing."""
    student, teacher, batch = draw()
    method = make(name)
    said = require_grad(student)
    terms = distillation(compute(method, said, teacher, batch))
    if terms:
        total({str(i): value for i, value in enumerate(terms)}).backward()
        for part in method.asks_student:
            asked_for = getattr(said, part.value)
            leaves = asked_for if isinstance(asked_for, tuple) else (asked_for,)
            assert any(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in leaves) or part == "logits", part
    assert METHODS[name].equation


def compile_methods(backend: str, names: list[str]) -> None:
    """Values, gradients and buffers after two steps of hard loss and method compiled into one graph, against those of the plain ones."""
    # at this size one chunk of angles would hold all: two of five images each and one of two, as at larger ones
    angles.rkd = functools.partial(angles.rkd, elements=5 * BATCH**2)
    for name in names:
        student, teacher, batch = draw()
        results = []
        for function in (compute, torch.compile(compute, backend=backend, fullgraph=True)):
            torch._dynamo.reset()
            method, said = make(name), require_grad(student)
            for _ in range(2):
                terms = function(method, said, teacher, batch)
                total(terms).backward()
            results.append((terms, gradients(said, method), dict(method.named_buffers())))
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def run_compiled(backend: str) -> None:
    """In a process of its own: torch.compile cannot look through the shape checks that are switched on here."""
    command = f"from tests.test_losses import NAMES, compile_methods; compile_methods({backend!r}, NAMES)"
    torchs_own = "ignore:`torch._prims_common.check` is deprecated:FutureWarning"  # inductor calls what torch 2.15 deprecates
    subprocess.run([sys.executable, "-W", "error", "-W", torchs_own, "-c", command], cwd=Path(__file__).parents[1], check=True)


def test_compiles() -> None:
    run_compiled("aot_eager")


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_compiles_by_inductor() -> None:
    run_compiled("inductor")


@every_method
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_refuses_a_bad_parameter_and_says_which(name: str, bad: float) -> None:
    for key in parameters(name):
        with pytest.raises(ValueError, match=rf"^{key}: found {bad:g}; allowed: a (whole )?number "):
            METHODS[name](**parameters(name) | {key: bad})


@every_method
def test_a_batch_of_one(name: str) -> None:
    """Refused where images are compared with each other; otherwise a loss like any other."""
    method, case = make(name), draw(batch=1)
    if method.relational:
        with pytest.raises(ValueError, match=r"^found a batch of 1 image; allowed: 2 or more"):
            compute(method, *case)
    else:
        assert all(value.isfinite() for value in compute(method, *case).values())


@every_method
@pytest.mark.parametrize("label", [-1, 7])
def test_refuses_a_label_that_is_no_class(name: str, label: int) -> None:
    student, teacher, batch = draw()
    batch.labels[3] = label
    with pytest.raises(RuntimeError, match="a label lies outside of the classes"):
        compute(make(name), student, teacher, batch)


@every_method
@pytest.mark.parametrize("classes", [CLASSES - 1, CLASSES + 1])
def test_refuses_targets_of_other_classes(name: str, classes: int) -> None:
    student, teacher, batch = draw()
    targets = torch.full((len(batch.labels), classes), 1 / classes)
    with pytest.raises(ValueError, match=rf"^found targets of shape \(12, {classes}\); allowed: .*\(12, {CLASSES}\)"):
        compute(make(name), student, teacher, replace(batch, targets=targets))


@every_method
@pytest.mark.parametrize("classes", [CLASSES - 1, CLASSES + 1])
def test_refuses_a_teacher_of_other_classes_where_its_logits_count(name: str, classes: int) -> None:
    student, teacher, batch = draw()
    other = _with(teacher, torch.zeros(len(batch.labels), classes))
    if Feature.LOGITS in METHODS[name].asks_teacher:
        with pytest.raises(ValueError, match=rf"^found a teacher of {classes} classes; allowed: the student's {CLASSES}; choose another"):
            compute(make(name), student, other, batch)
    else:
        assert compute(make(name), student, other, batch) == compute(make(name), student, teacher, batch)


@every_method
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("parts", [{"maps": ()}, {"embedding": 0}, {"maps": (), "embedding": 0}], ids=["stages", "embedding", "both"])
def test_refuses_a_model_that_lacks_what_it_asks_for_and_no_other(name: str, who: str, parts: dict[str, Any]) -> None:
    models = {"student": STUDENT, "teacher": TEACHER}
    models[who] = replace(models[who], **parts)
    asks = {"maps" if part == Feature.PREACTIVATIONS else part.value for part in getattr(METHODS[name], f"asks_{who}")}
    if asks & set(parts):
        lacks = rf"^found a {who} with(out pooled embedding|\ 0 stages); allowed: .*; choose another"
        with pytest.raises(ValueError, match=lacks):
            make(name, **models)
    else:
        make(name, **models)


@every_method
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_refuses_an_answer_that_lacks_what_it_asks_for(name: str, who: str) -> None:
    """A term of nothing would be a traceback out of torch, or none at all."""
    method, (student, teacher, batch) = make(name), draw()
    for part in {"student": method.asks_student, "teacher": method.asks_teacher}[who] - {Feature.LOGITS}:
        said = {"student": student, "teacher": teacher}
        said[who] = replace(said[who], **{part.value: None})
        with pytest.raises(ValueError, match=f"^found an answer without {part.value}; allowed: one that has it; "):
            method(said["student"], said["teacher"], batch, HARD["ce"], torch.ones(()))


@every_method
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_refused_before_any_training_or_learned_from(name: str, classes: int) -> None:
    models: list[OutputShape] = [replace(shape, classes=classes) for shape in (STUDENT, TEACHER)]
    try:
        method = make(name, *models)
    except ValueError as error:
        assert str(error).startswith(f"found {classes} classes; allowed: {classes + 1} or more")
        assert classes == 2
        return
    student, teacher, batch = draw()
    labels = batch.labels % classes
    few = replace(batch, labels=labels, targets=F.one_hot(labels, classes).float())
    case = _with(student, student.logits[:, :classes]), _with(teacher, teacher.logits[:, :classes]), few
    terms, found = differentiate(method, case, torch.float32)
    assert all(value.isfinite() for value in terms.values())
    assert all(gradient is None or gradient.isfinite().all() for gradient in found)
    assert any(gradient is not None and gradient.any() for gradient in found)


def test_what_is_remembered_of_an_image_is_so_of_unmixed_ones() -> None:
    """A buffer that depends on which images were seen holds something of each: of a mixed one it would be something of another."""
    student, teacher, batch = draw()
    remembering = []
    for name in NAMES:
        methods = make(name), make(name)
        for method, index in zip(methods, (batch.index, (batch.index + 1) % IMAGES), strict=True):
            compute(method, student, teacher, replace(batch, index=index, mixed=torch.zeros_like(batch.mixed)))
        one, other = (dict(method.named_buffers()) for method in methods)
        if any(not torch.equal(value, other[key]) for key, value in one.items()):
            remembering.append(name)
    assert remembering
    assert all(METHODS[name].unmixed for name in remembering)


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.2, 0.2)])
def test_a_recipe_that_mixes_is_refused_to_exactly_the_methods_for_unmixed_images(alphas: tuple[float, float]) -> None:
    content = tiny.content()
    content["recipes"]["weak"] |= dict(zip(("mixup_alpha", "cutmix_alpha"), alphas, strict=True))
    refused = set()
    for name in NAMES:
        try:
            check_without_data(config.parse(change(content, "comparisons.small_weak.methods", sorted({"kd", name}))))
        except Refused as error:
            assert f"{name} with recipe 'weak', which mixes every image" in str(error).replace("\\", "")
            refused.add(name)
    assert refused == {name for name in NAMES if METHODS[name].unmixed and any(alphas)}


@every_method
def test_parameters_are_keywords_that_params_yaml_can_give(name: str) -> None:
    given = inspect.signature(METHODS[name]).parameters.values()
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY and one.default is inspect.Parameter.empty for one in given)


def test_no_method_is_named_outside_of_the_losses() -> None:
    """Loop, tables and checks know methods by what they ask for. The published numbers and variants are facts about named methods."""
    package = Path(inspect.getfile(Method)).parents[1]
    for path in package.rglob("*.py"):
        if not {"losses", "discrepancies", "published.py"} & set(path.relative_to(package).parts):
            constants = {node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)}
            assert not constants & set(METHODS), path


def test_references_are_for_registered_methods_only() -> None:
    files = {path.stem for path in Path(references.__file__).parent.glob("*.py")}
    assert files - {"__init__", "common"} == set(NAMES)
