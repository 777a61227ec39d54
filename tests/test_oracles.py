"""Our losses and measures against installed packages that compute the same thing: timm, torchdistill, torchmetrics.

Optional: `make test-oracles` installs them; without a package its tests are skipped. Where a package disagrees, the test asserts how: it
computes what the package computes, and the cause is in its name. All of this is read from the versions of the extra ``oracles``.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kdlib.engine.metrics import calibration_error, measure
from kdlib.losses import HARD, METHODS
from kdlib.losses.at import at, attention
from kdlib.losses.cc import cc
from kdlib.losses.crd import log_mean_exp, nce, remembered, similarities
from kdlib.losses.dist import pearson
from kdlib.losses.kd import kd
from kdlib.losses.lskd import lskd
from kdlib.losses.reviewkd import Fusion, hcl
from kdlib.losses.rkd import squares
from kdlib.losses.sp import sp
from kdlib.losses.vid import FLOOR, vid
from kdlib.types import Batch, Output
from tests.toys import draw

CLASSES = 7
NO_DISTILL, NO_METRICS = (f"{name} is not installed: make test-oracles" for name in ("torchdistill", "torchmetrics"))
PATHS = {"student_module_path": "z", "student_module_io": "output", "teacher_module_path": "z", "teacher_module_io": "output"}


def _case(std: float = 2.0) -> tuple[Output, Output, Batch]:
    return draw(std, torch.float64)


def _io(value: Any) -> dict[str, dict[str, Any]]:
    """What torchdistill's hooks would have collected of a module named z."""
    return {"z": {"output": value}}


def _torchdistill(name: str, **parameters: Any) -> nn.Module:
    losses = pytest.importorskip("torchdistill.losses.mid_level", reason=NO_DISTILL)
    made: nn.Module = getattr(losses, name)(**parameters)
    return made


def _torchmetrics(name: str, **parameters: Any) -> Any:
    found = pytest.importorskip("torchmetrics", reason=NO_METRICS)
    for part in name.split("."):
        found = getattr(found, part)
    return found(**parameters)


# timm


class Says(nn.Module):
    """A model by timm's interfaces that has a fixed answer."""

    pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}  # noqa: RUF012
    num_classes, in_chans = CLASSES, 1

    def __init__(self, output: Output) -> None:
        super().__init__()
        assert output.embedding is not None
        self.logits, self.embedding = nn.Parameter(output.logits), output.embedding
        self.num_features = output.embedding.shape[1]

    def forward_features(self, images: Tensor) -> Tensor:
        return images

    def forward_head(self, images: Tensor, pre_logits: bool = False) -> Tensor:  # noqa: ARG002
        return self.embedding if pre_logits else self.logits

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(images)


def _timm(name: str, student: Output, teacher: Output, **parameters: Any) -> Any:
    task = pytest.importorskip("timm.task", reason="this timm has no distillation tasks")
    return getattr(task, name)(
        Says(student), Says(teacher), criterion=nn.CrossEntropyLoss(), verbose=False, dtype=torch.float64, **parameters
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_timms(temperature: float) -> None:
    student, teacher, batch = _case()
    theirs = _timm("LogitDistillationTask", student, teacher, task_loss_weight=0.3, distill_loss_weight=0.7, temperature=temperature)
    method = METHODS["kd"](hard_weight=0.3, weight=0.7, temperature=temperature)
    said = Output(student.logits.requires_grad_())
    targets = F.one_hot(batch.labels, CLASSES).double()
    found = theirs(batch.images.double(), batch.labels)
    ours = method(said, teacher, Batch(batch.images, targets, batch.labels, batch.index, batch.mixed), HARD["ce"], torch.ones(()))
    assert_close(ours["kd"], 0.7 * found["kd_loss"])
    assert_close(ours["hard"], 0.3 * found["task_loss"])
    found["loss"].backward()
    sum(ours.values()).backward()
    assert_close(said.logits.grad, theirs.trainable_module.logits.grad)


def test_fitnet_on_pooled_features_is_timms_feature_distillation() -> None:
    student, teacher, batch = _case()
    theirs = _timm("FeatureDistillationTask", student, teacher)
    found = theirs(batch.images.double(), batch.labels)["kd_loss"]
    assert student.embedding is not None
    assert teacher.embedding is not None
    method = METHODS["fitnet"](hard_weight=0.0, weight=1.0, stage=1.0).double()
    projection = theirs.trainable_module.projection
    method.regressor = nn.Conv2d(*projection.weight.shape[::-1], 1).double()
    method.regressor.load_state_dict({"weight": projection.weight[:, :, None, None], "bias": projection.bias})
    as_maps = [Output(one.logits, None, (one.embedding[:, :, None, None],)) for one in (student, teacher)]
    assert_close(method.distill(*as_maps, batch)["hint"], found)


# torchdistill


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_torchdistills(temperature: float) -> None:
    student, teacher, batch = _case()
    loss = _torchdistill("KDLoss", temperature=temperature, alpha=0.1, **PATHS)
    theirs = loss(_io(student.logits), _io(teacher.logits), batch.labels)
    assert_close(0.1 * F.cross_entropy(student.logits, batch.labels) + 0.9 * kd(student.logits, teacher.logits, temperature), theirs)


def test_kd_without_a_hard_loss_lacks_the_temperatures_square_in_torchdistill() -> None:
    student, teacher, _ = _case()
    theirs = _torchdistill("KDLoss", temperature=4.0, alpha=0.0, **PATHS)(_io(student.logits), _io(teacher.logits))
    assert_close(kd(student.logits, teacher.logits, 4.0), 4.0**2 * theirs)


@pytest.mark.parametrize("std", [1.0, 4.0, 10.0])
def test_dist_is_torchdistills(std: float) -> None:
    """Theirs floors each norm at 1e-8: no class of this batch is that rare."""
    student, teacher, batch = _case(std)
    method = METHODS["dist"](hard_weight=0.0, weight=1.0, beta=2.0, gamma=0.5, tau=2.0)
    theirs = _torchdistill("DISTLoss", beta=2.0, gamma=0.5, tau=2.0, **PATHS)(_io(student.logits), _io(teacher.logits))
    assert_close(sum(method.distill(student, teacher, batch).values()), theirs, rtol=1e-6, atol=1e-9)


def test_lskd_takes_the_deviation_of_a_population_and_torchdistill_of_a_sample() -> None:
    student, teacher, _ = _case()
    theirs = _torchdistill("LogitStdKDLoss", temperature=2.0, alpha=1.0, beta=1.0, eps=0.0, **PATHS)
    labels = torch.zeros(len(student.logits), dtype=torch.long)
    found = theirs(_io(student.logits), _io(teacher.logits), labels) - F.cross_entropy(student.logits, labels)
    widened = 2.0 * math.sqrt(CLASSES / (CLASSES - 1))
    assert_close(lskd(student.logits, teacher.logits, widened) * (2.0 / widened) ** 2, found)
    assert not torch.allclose(lskd(student.logits, teacher.logits, 2.0), found, rtol=0.05)


def _pairs(output: Output) -> tuple[Tensor, ...]:
    assert output.maps is not None
    return output.maps[-2:]


def _same_sized(student: Output, teacher: Output) -> tuple[Output, Output]:
    """Two stages of equal sizes: torchdistill does not match them."""
    assert student.maps is not None
    assert teacher.maps is not None
    sizes = [stage.shape[2:] for stage in student.maps[-2:]]
    pooled = tuple(F.adaptive_avg_pool2d(stage, size) for stage, size in zip(teacher.maps[-2:], sizes, strict=True))
    return Output(student.logits, None, student.maps[-2:]), Output(teacher.logits, None, pooled)


def _at(mode: str, student: Output, teacher: Output) -> Tensor:
    where = {name: {"io": "output", "path": name} for name in "ab"}
    loss = _torchdistill("ATLoss", at_pairs={name: {"student": path, "teacher": path} for name, path in where.items()}, mode=mode)
    found: Tensor = loss(*({name: {"output": stage} for name, stage in zip("ab", _pairs(one), strict=True)} for one in (student, teacher)))
    return found


def test_at_is_torchdistills_and_the_authors_code() -> None:
    student, teacher = _same_sized(*_case()[:2])
    assert_close(at(_pairs(student), _pairs(teacher)), _at("code", student, teacher))


def test_at_of_the_paper_is_the_norm_not_the_mean_square() -> None:
    student, teacher = _same_sized(*_case()[:2])
    norms = [(attention(a) - attention(b)).norm(dim=1).mean() for a, b in zip(_pairs(student), _pairs(teacher), strict=True)]
    assert_close(torch.stack(norms).sum(), _at("paper", student, teacher))


def test_sp_has_rows_of_length_one_and_torchdistill_rows_of_sum_one() -> None:
    """torchdistill passes 1 to torch's normalize as the dimension; in that place it is the norm's p."""
    student, teacher = (one.maps[-1] for one in _case()[:2])
    theirs = _torchdistill("SPKDLoss", student_output_path="z", teacher_output_path="z", reduction="batchmean")(_io(student), _io(teacher))
    grams = [maps.flatten(1) @ maps.flatten(1).T for maps in (student, teacher)]
    by_p = {p: (F.normalize(grams[0], p=p, dim=1) - F.normalize(grams[1], p=p, dim=1)).square().mean() for p in (1, 2)}
    assert_close(theirs, by_p[1])
    assert_close(sp(student, teacher), by_p[2])


def test_rkd_is_torchdistills() -> None:
    student, teacher, batch = _case()
    method = METHODS["rkd"](hard_weight=0.0, weight=1.0, distance_weight=25.0, angle_weight=50.0)
    loss = _torchdistill("RKDLoss", student_output_path="z", teacher_output_path="z", dist_factor=25.0, angle_factor=50.0, reduction="mean")
    assert_close(sum(method.distill(student, teacher, batch).values()), loss(_io(student.embedding), _io(teacher.embedding)))


def test_vid_is_torchdistills() -> None:
    wrapper = pytest.importorskip("torchdistill.models.wrapper", reason=NO_DISTILL)
    student, teacher = _same_sized(*_case()[:2])
    regressor = wrapper.Regressor4VID(12, 16, 16, eps=FLOOR, init_pred_var=5.0).double()
    where = {"io": "output", "path": "z"}
    loss = _torchdistill("VIDLoss", feature_pairs={"one": {"student": where, "teacher": where}})
    guess = _pairs(student)[-1]
    theirs = loss(_io(regressor(guess)), _io(_pairs(teacher)[-1]))
    assert_close(vid(regressor.regressor(guess), _pairs(teacher)[-1], regressor.soft_plus_param), theirs)


def test_cc_of_the_official_repository_is_not_the_papers_which_torchdistill_has() -> None:
    """torchdistill's is the norm, not the squared norm, of the difference of the kernel matrices, over B^2."""
    student, teacher = (F.normalize(one.embedding[:, :10]) for one in _case()[:2])
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    loss = _torchdistill("CCKDLoss", student_linear_path="z", teacher_linear_path="z", kernel_config=kernel, reduction="batchmean")
    a, b = (math.exp(-0.8) * (1 + 0.8 * f @ f.T + 0.32 * (f @ f.T) ** 2) for f in (student, teacher))
    theirs = loss(_io(student), _io(teacher))
    assert_close(theirs, (a - b).norm() / len(a) ** 2)
    assert not torch.allclose(cc(student, teacher), theirs, rtol=0.1)


def test_reviewkds_fusion_and_loss_are_torchdistills() -> None:
    wrapper = pytest.importorskip("torchdistill.models.wrapper", reason=NO_DISTILL)
    theirs = wrapper.AttentionBasedFusion(8, 6, 9, uses_attention=True).double()
    ours = Fusion(8, 6, 9, deeper=True).double()
    names = {"enter": "conv1.0", "enter_norm": "conv1.1", "attention": "attention_conv.0", "leave": "conv2.0", "leave_norm": "conv2.1"}
    weights = dict(theirs.named_parameters())
    ours.load_state_dict(
        {
            f"{mine}.{part}": weights[f"{name}.{part}"]
            for mine, name in names.items()
            for part in ("weight", "bias")
            if f"{name}.{part}" in weights
        }
    )
    rng = torch.Generator().manual_seed(0)
    level, deeper, teacher = (torch.randn(4, n, size, size, generator=rng, dtype=torch.float64) for n, size in ((8, 8), (6, 4), (9, 8)))
    compared, fused = theirs(level, deeper, 8)
    found = ours(level, deeper, (8, 8))
    assert_close(found, (compared, fused))
    loss = _torchdistill("HierarchicalContextLoss", **PATHS)
    assert_close(hcl((found[0],), (teacher,)), loss(_io((compared, fused)), _io(teacher)))


def test_crd_is_torchdistills_but_for_where_the_positive_comes_from() -> None:
    """Theirs: the image's older vector in the bank. The rest agrees: noise contrast, its constant, the banks' update.

    Theirs adds 1e-7 to m / N, of which it is 1e-7 here. It cannot draw negatives by itself (a misnamed attribute), so they are given.
    """
    rng = torch.Generator().manual_seed(0)
    images, dim, pool = 40, 6, torch.randint(40, (30,), generator=rng)
    student, teacher = (F.normalize(torch.randn(5, dim, generator=rng)) for _ in range(2))
    index = torch.tensor([3, 11, 24, 30, 39])
    loss = _torchdistill(
        "CRDLoss", student_norm_module_path="z", teacher_norm_module_path="z", student_empty_module_path="e", input_size=dim,
        output_size=images, num_negative_samples=30, num_samples=images, temperature=0.5, eps=0.0,
    )  # fmt: skip
    banks = loss.memory_v1.clone(), loss.memory_v2.clone()
    drawn = {"e": {"input": {"pos_idx": index, "contrast_idx": torch.cat([index[:, None], pool.expand(5, -1)], dim=1)}}}
    theirs = loss(_io(student) | drawn, _io(teacher))
    noise, nobody = torch.full((5,), 30.0), torch.zeros(5, 30, dtype=torch.bool)
    ours = []
    for said, bank in ((student, banks[1]), (teacher, banks[0])):
        found = similarities(said, bank[index], bank[pool], nobody, 0.5)
        ours.append(nce(*found, noise, log_mean_exp(*found, noise)))
    assert_close(torch.stack(ours).sum(), theirs.squeeze(), rtol=1e-5, atol=1e-5)
    unmixed = torch.zeros(5, dtype=torch.bool)
    assert_close(remembered(banks[0][index], student, index, unmixed, 0.5), loss.memory_v1[index])
    assert_close(remembered(banks[1][index], teacher, index, unmixed, 0.5), loss.memory_v2[index])


# torchmetrics


def test_kd_at_temperature_one_is_torchmetrics_kl_divergence() -> None:
    student, teacher, _ = _case()
    theirs = _torchmetrics("KLDivergence", log_prob=True)(teacher.logits.log_softmax(1), student.logits.log_softmax(1))
    assert_close(kd(student.logits, teacher.logits, 1.0), theirs.double(), rtol=1e-5, atol=1e-7)


def test_dists_correlation_is_torchmetrics() -> None:
    p, q = (one.logits.softmax(dim=1) for one in _case()[:2])
    theirs = _torchmetrics("PearsonCorrCoef", num_outputs=len(p))(p.T, q.T)
    assert_close(pearson(p, q), theirs.double(), rtol=1e-5, atol=1e-6)


def test_rkds_distances_are_torchmetrics() -> None:
    embedding = _case()[0].embedding
    assert embedding is not None
    theirs = pytest.importorskip("torchmetrics.functional", reason=NO_METRICS).pairwise_euclidean_distance(embedding)
    assert_close(squares(embedding).sqrt(), theirs)


def test_measures_are_torchmetrics() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(500, CLASSES, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(CLASSES, (500,), generator=rng)
    found = measure(student, teacher, labels)
    for value, name, parameters in (
        (found.top1, "classification.MulticlassAccuracy", {"average": "micro"}),
        (found.top5, "classification.MulticlassAccuracy", {"average": "micro", "top_k": 5}),
        (found.ece, "classification.MulticlassCalibrationError", {"n_bins": 15, "norm": "l1"}),
    ):
        theirs = _torchmetrics(name, num_classes=CLASSES, **parameters)(student.softmax(dim=1), labels)
        assert value == pytest.approx(theirs.item(), abs=1e-6), name
    theirs = _torchmetrics("KLDivergence", log_prob=True)(teacher.log_softmax(1), student.log_softmax(1))
    assert found.teacher_kl == pytest.approx(theirs.item(), rel=1e-5)


def test_a_confidence_on_the_edge_of_two_bins_lies_in_the_lower_here_and_in_the_upper_in_torchmetrics() -> None:
    """arXiv 1706.04599: bin m is ((m - 1) / M, m / M]."""
    edge = torch.linspace(0, 1, 16, dtype=torch.float64)[12]
    confidence, correct = torch.stack([edge, edge - 0.01, edge + 0.02]), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    compute = pytest.importorskip("torchmetrics.functional.classification.calibration_error", reason=NO_METRICS)._ce_compute

    def by_hand(*bins: list[int]) -> float:
        return sum(abs(float((correct[inside] - confidence[inside]).sum())) for inside in bins) / 3

    assert calibration_error(confidence, correct) == pytest.approx(by_hand([0, 1], [2]))
    assert compute(confidence, correct, 15, "l1").item() == pytest.approx(by_hand([1], [0, 2]))
