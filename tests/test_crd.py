"""What CRD alone promises: of its draws, its banks, its constants and its checkpoints."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.losses.crd import CRD, draw, remembered
from kdlib.types import Batch, Setup
from tests.toys import (
    ALL_LABELS,
    BATCH,
    IMAGES,
    STUDENT,
    TEACHER,
    Case,
    compute,
    distillation,
    make,
    reorder,
    reorder_batch,
    require_grad,
    tensors,
    total,
)
from tests.toys import draw as draw_case


def crd(**changes: float) -> CRD:
    method = make("crd", **changes)
    assert isinstance(method, CRD)
    return method


def unmixed(batch: Batch) -> Batch:
    return replace(batch, mixed=torch.zeros_like(batch.mixed))


def embedded(method: CRD, case: Case) -> tuple[Tensor, Tensor]:
    """What enters the banks, (batch, dim) of student and teacher."""
    student, teacher, _ = case
    return F.normalize(method.student(student.embedding)).detach(), F.normalize(method.teacher(teacher.embedding)).detach()


def moved(method: CRD, before: CRD) -> list[bool]:
    """Of which images the rows of either bank are not the same bits as before."""
    changed = (method.student_bank != before.student_bank).any(dim=1)
    assert torch.equal(changed, (method.teacher_bank != before.teacher_bank).any(dim=1))
    return changed.tolist()


# The pool


def test_hashes_as_splitmix64_does() -> None:
    """Against Python's integers, which have no sign to trip over."""

    def splitmix64(counter: int) -> int:
        state = (counter + 1) * 0x9E3779B97F4A7C15 % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first number from seed 0, as published
    for step in (0, 1, 2**31 - 1):
        expected = [(splitmix64(step * 50 + i) >> 1) % 1_281_167 for i in range(50)]
        assert draw(torch.tensor(step), 50, 1_281_167).tolist() == expected


@pytest.mark.parametrize("images", [10, 1_000])
def test_draws_every_image_equally_often(images: int) -> None:
    """Chi-square of 100 steps has mean ``images - 1`` and variance twice that; the draws of neighbouring steps and places are unrelated."""
    pools = torch.stack([draw(torch.tensor(step), 5_000, images) for step in range(100)])
    counts = torch.bincount(pools.flatten(), minlength=images).double()
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert abs(chi - (images - 1)) < 4 * math.sqrt(2 * (images - 1))
    for a, b in ((pools[1:], pools[:-1]), (pools[:, 1:], pools[:, :-1])):
        same = (a == b).double()
        assert abs(same.mean().item() - 1 / images) < 4 / math.sqrt(images * same.numel())


def test_draws_something_else_in_each_step_and_seed_whatever_else_is_drawn() -> None:
    first, second = (draw(torch.tensor(step), 100, 10**6).tolist() for step in (7, 8))
    assert not set(first) & set(second)
    torch.rand(3)
    assert draw(torch.tensor(7), 100, 10**6).tolist() == first
    starts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        method = CRD(hard_weight=1.0, weight=1.0, dim=2.0, negatives=4.0, temperature=0.1, momentum=0.5)
        method.adapt(Setup(STUDENT, TEACHER, ALL_LABELS))
        starts.add(int(method.step))
    assert len(starts) == 5


def test_skips_images_of_the_anchors_own_class() -> None:
    """What the banks hold of a class is no matter where a batch has that class alone, and is where it has another."""
    case, label = draw_case(), 2
    for labels, matters in ((torch.full((BATCH,), label), False), (torch.full((BATCH,), label + 1), True)):
        terms = []
        for method in (crd(), crd()):
            if terms:
                of_class = torch.where(label == ALL_LABELS)[0]
                method.student_bank[of_class], method.teacher_bank[of_class] = 1.0, -1.0
            method.log_means = torch.zeros(2)  # known from an earlier batch
            terms.append(distillation(compute(method, case[0], case[1], replace(case[2], labels=labels))))
        assert (terms[0] != terms[1]) == matters


def test_one_class_alone_leaves_nothing_to_tell_apart() -> None:
    """No negatives, so h = 1: a loss and gradients of 0, and a constant from the pairs alone."""
    torch.manual_seed(0)
    method = CRD(hard_weight=0.0, weight=1.0, dim=5.0, negatives=30.0, temperature=0.07, momentum=0.5)
    method.adapt(Setup(STUDENT, TEACHER, torch.zeros(IMAGES, dtype=torch.int64)))
    student, teacher, batch = draw_case()
    case = require_grad(student), teacher, replace(batch, labels=torch.zeros_like(batch.labels))
    terms = compute(method, *case)
    total(terms).backward()
    assert [value.item() for value in terms.values()] == [0.0, 0.0]
    gradients = [tensor.grad for tensor in (*tensors(case[0]), *method.parameters()) if tensor.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)
    s, t = embedded(method, case)
    assert method.log_means.tolist() == pytest.approx([((s * t).sum(dim=1) / 0.07).exp().mean().log().item()] * 2, abs=1e-5)


# The banks


def test_starts_from_random_vectors_of_length_1() -> None:
    method = crd()
    for bank in (method.student_bank, method.teacher_bank):
        assert bank.shape == (IMAGES, 5)
        assert torch.allclose(bank.norm(dim=1), torch.ones(IMAGES))
    assert not torch.equal(method.student_bank, method.teacher_bank)


@pytest.mark.parametrize("momentum", [0.0, 0.4, 1.0])
def test_moves_the_rows_of_the_images_it_saw_by_its_momentum(momentum: float) -> None:
    method, (student, teacher, batch) = crd(momentum=momentum), draw_case()
    before = copy.deepcopy(method)
    compute(method, student, teacher, unmixed(batch))
    seen = embedded(method, (student, teacher, batch))
    for bank, old, vectors in zip(
        (method.student_bank, method.teacher_bank), (before.student_bank, before.teacher_bank), seen, strict=True
    ):
        for place, image in enumerate(batch.index.tolist()):
            row = momentum * old[image] + (1 - momentum) * vectors[place]
            assert torch.allclose(bank[image], row / row.norm(), atol=1e-6)
    if momentum < 1:
        assert moved(method, before) == [image in batch.index.tolist() for image in range(IMAGES)]


def test_a_mixed_image_enters_no_bank() -> None:
    method, (student, teacher, batch) = crd(), draw_case()
    before = copy.deepcopy(method)
    compute(method, student, teacher, batch)
    assert batch.mixed.any()
    assert moved(method, before) == [image in batch.index[~batch.mixed].tolist() for image in range(IMAGES)]
    before = copy.deepcopy(method)
    compute(method, student, teacher, replace(batch, mixed=torch.ones_like(batch.mixed)))
    assert not any(moved(method, before))


def test_of_an_image_seen_twice_the_mean_enters_in_any_order() -> None:
    """Repeated augmentation: four views of image 5, one of them mixed, which does not count; of image 6 a mixed one alone."""
    student, teacher, batch = draw_case()
    index, mixed = torch.arange(20, 20 + BATCH), torch.zeros_like(batch.mixed)
    index[[0, 3, 4, 9]], index[7] = 5, 6
    mixed[[4, 7]] = True
    before = crd()
    s, t = embedded(before, (student, teacher, batch))
    for order in (torch.arange(BATCH), torch.arange(BATCH).flip(0)):
        method, shuffled = crd(), reorder_batch(replace(batch, index=index, mixed=mixed), order)
        compute(method, reorder(student, order), reorder(teacher, order), shuffled)
        for bank, old, vectors in ((method.student_bank, before.student_bank, s), (method.teacher_bank, before.teacher_bank, t)):
            row = 0.4 * old[5] + 0.6 * vectors[[0, 3, 9]].mean(dim=0)
            assert torch.allclose(bank[5], row / row.norm(), atol=1e-6)
            assert torch.equal(bank[6], old[6])


def test_all_new_rows_of_an_image_are_the_same_bits() -> None:
    """So it is no matter which of them a device writes last."""
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(40, (300,), generator=rng)
    seen, bank = torch.randn(300, 128, generator=rng), torch.randn(40, 128, generator=rng)
    rows = remembered(bank[index], seen, index, torch.rand(300, generator=rng) < 0.3, 0.5)
    for image in index.unique():
        assert (rows[index == image] == rows[index == image][0]).all()


@pytest.mark.parametrize("outside", [-1, IMAGES])
def test_refuses_an_index_outside_of_its_banks(outside: int) -> None:
    student, teacher, batch = draw_case()
    batch.index[2] = outside
    method = crd()
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(RuntimeError, match="an image's index lies outside of CRD's banks"):
        compute(method, student, teacher, batch)
    assert all(torch.equal(value, before[key]) or value.isnan().all() for key, value in method.state_dict().items())


def test_holds_little_beside_its_banks_for_imagenet() -> None:
    """Index tables below 100 MB for 1.28 million images: their labels, whatever ``dim`` and ``negatives`` are."""
    method = CRD(hard_weight=1.0, weight=1.0, dim=1.0, negatives=16384.0, temperature=0.07, momentum=0.5)
    method.adapt(Setup(STUDENT, TEACHER, torch.arange(1_281_167) % 1000))
    rest = [value for key, value in method.named_buffers() if not key.endswith("_bank")]
    assert sum(value.nbytes for value in rest) < 100e6
    assert sum(parameter.numel() for parameter in method.parameters()) < 100


# The constants, and going on


def test_its_constants_come_from_the_first_batch_alone() -> None:
    method, (student, teacher, batch) = crd(), draw_case()
    assert method.log_means.isnan().all()
    pool, before = draw(method.step, 30, IMAGES), copy.deepcopy(method)
    compute(method, student, teacher, batch)
    s, t = embedded(method, (student, teacher, batch))
    for found, a, b, bank in ((method.log_means[0], s, t, before.teacher_bank), (method.log_means[1], t, s, before.student_bank)):
        others = ALL_LABELS[pool] != batch.labels[:, None]
        scores = torch.cat([(a * b).sum(dim=1), (a @ bank[pool].T)[others]]) / 0.6
        assert found.item() == pytest.approx(scores.exp().mean().log().item(), rel=1e-5)
    first, step = method.log_means.clone(), int(method.step)
    compute(method, *draw_case(9.0))
    assert torch.equal(method.log_means, first)
    assert int(method.step) == step + 1


def test_goes_on_from_a_checkpoint_as_if_nothing_had_happened() -> None:
    cases = [draw_case(std) for std in (1.0, 2.0, 3.0, 4.0)]
    method = crd()
    terms = [compute(method, *case) for case in cases]
    interrupted = crd()
    for case in cases[:2]:
        compute(interrupted, *case)
    torch.manual_seed(99)
    resumed = CRD(hard_weight=0.5, weight=1.25, dim=5.0, negatives=30.0, temperature=0.6, momentum=0.4)
    resumed.adapt(Setup(STUDENT, TEACHER, ALL_LABELS))
    resumed.load_state_dict(interrupted.state_dict())
    assert [compute(resumed, *case) for case in cases[2:]] == terms[2:]
    assert all(torch.equal(value, method.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_learns_to_tell_pairs_apart() -> None:
    """Trained on what never changes, the pair's similarity grows above that with other images."""
    method, (student, teacher, batch) = crd(negatives=200.0, temperature=0.1), draw_case()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = torch.stack(distillation(compute(method, student, teacher, unmixed(batch)))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    s, t = embedded(method, (student, teacher, batch))
    own, others = (s * t).sum(dim=1).mean().item(), (s @ t.T)[batch.labels[:, None] != batch.labels].mean().item()
    assert losses[-1] < 0.7 * losses[0]
    assert own > others + 0.5


def test_takes_the_very_view_as_positive() -> None:
    """Gradients reach the student from both directions, also that in which it is no anchor."""
    method, (student, teacher, batch) = crd(), draw_case()
    for name in ("crd_student", "crd_teacher"):
        said = require_grad(student)
        compute(copy.deepcopy(method), said, teacher, batch)[name].backward()
        assert said.embedding is not None
        assert said.embedding.grad is not None
        assert (said.embedding.grad.abs().sum(dim=1) > 0).all()
