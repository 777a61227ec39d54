"""Methods that look at logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.losses.bkl import bkl
from kdlib.losses.dist import pearson
from kdlib.losses.dkd import dkd
from kdlib.losses.kd import kd
from kdlib.losses.lskd import lskd
from kdlib.losses.nkd import nkd
from kdlib.losses.ofa import ofa
from kdlib.study.display import methods
from kdlib.study.display.discrepancies.base import Pair, differs, drawn, share, slope

DKD_CODE = "megvii-research/mdistiller DKD.py; Hao840/vanillaKD losses/dkd.py"
DIST_CODE = "hunto/image_classification_sota dist_kd.py; Hao840/vanillaKD losses/dist.py"
LSKD_CODE = "sunshangquan/logit-standardization-KD KD.py; torchdistill 1.1 LogitStdKDLoss"
SURE = "share of finite losses: 200 images, 10 logits of std 40"


def _said() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the toy's student and teacher, and its labels."""
    return torch.tensor(methods.STUDENT_LOGITS), torch.tensor(methods.TEACHER_LOGITS), methods.BATCH.labels


@differs("kd", "facebookresearch/deit losses.py; torch's kl_div unless told otherwise")
def mean_over_classes_too() -> Pair:
    """mean over images and classes: C times smaller"""
    student, teacher, _ = _said()
    p, q = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return float((q.exp() * (q - p)).mean()), float(kd(student, teacher, 1.0))


@differs("kd", "torchdistill 1.1 KDLoss without a hard loss", "the loss on the toy, T = 4")
def no_squared_temperature() -> Pair:
    """no factor T^2: T^2 times smaller"""
    student, teacher, _ = _said()
    return float(kd(student / 4, teacher / 4, 1.0)), float(kd(student, teacher, 4.0))


@differs("dkd", DKD_CODE, SURE)
def tckd_by_log_of_softmax() -> Pair:
    """log(softmax): -inf where the student's probability rounds to 0"""
    student, teacher, labels = drawn(200, 10, 40.0)
    target = F.one_hot(labels, 10).bool()
    p, q = (torch.stack([of[target], (of * ~target).sum(dim=1)]) for of in (student.softmax(dim=1), teacher.softmax(dim=1)))
    ours = [dkd(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], 1.0)[0] for i in range(len(labels))]
    return share((q.xlogy(q) - q * p.log()).sum(dim=0).isfinite()), share(torch.stack(ours).isfinite())


@differs("dkd", DKD_CODE, "NCKD: the label's logit is 1200, the others are 0, 1 and 1, 0")
def label_hidden_by_subtracting() -> Pair:
    """hide the label by subtracting 1000 from it"""
    student, teacher = torch.tensor([[1200.0, 0.0, 1.0]]), torch.tensor([[1200.0, 1.0, 0.0]])
    hide = torch.tensor([[1000.0, 0.0, 0.0]])
    return float(kd(student - hide, teacher - hide, 1.0)), float(dkd(student, teacher, torch.tensor([0]), 1.0)[1])


def _by_product(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of rows, kept from 0 / 0 by 1e-8 beside the product of the norms."""
    a, b = (rows - rows.mean(dim=1, keepdim=True) for rows in (a, b))
    correlation: Tensor = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    return correlation


@differs("dist", DIST_CODE, "1 - correlation of a class with itself: probabilities of 1, 2 and 4 in a million")
def epsilon_beside_the_norms() -> Pair:
    """1e-8 beside the product of the norms: rare classes seem uncorrelated"""
    p = torch.tensor([[1e-6, 2e-6, 4e-6]])
    return float(1 - _by_product(p, p)), float(1 - pearson(p, p))


@differs("dist", DIST_CODE, "share of finite correlations: 1,000 classes of 64 images, logits of std 10 in fp16")
def correlation_in_half_precision() -> Pair:
    """in the precision of the logits: in fp16 the 1e-8 is 0, and 0 / 0 follows"""
    p, q = (logits.half().softmax(dim=1).T for logits in drawn(64, 1000, 10.0)[:2])
    return share(_by_product(p, q).isfinite()), share(pearson(p.float(), q.float()).isfinite())


@differs(
    "bkl",
    "KL, with which arXiv 2305.15781 compares it at the same weight",
    "length of the gradient: 64 images, 100 logits of std 1, moved so that softmax is near sigmoid",
)
def kl_at_the_same_weight() -> Pair:
    """KL is a sum over the classes, BKL their mean: its gradient is smaller by about their number"""
    student, teacher = (logits.log_softmax(dim=1) for logits in drawn(64, 100, 1.0)[:2])
    there, here = slope(lambda logits: kd(logits, teacher, 1.0), student), slope(lambda logits: bkl(logits, teacher), student)
    return float(there.norm()), float(here.norm())


@differs("nkd", "yzd-v/cls_KD nkd.py at 1c2c0ff, and its copies", "others, on the toy")
def no_class_masked() -> Pair:
    """masks no class: the label counts among the others"""
    student, teacher, labels = _said()
    return float(F.cross_entropy(student, teacher.softmax(dim=1))), float(nkd(student, teacher, labels, 1.0)[1])


def _by_sample(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, keepdim=True))


@differs("lskd", LSKD_CODE, "the loss on the toy, T = 2")
def deviation_of_a_sample() -> Pair:
    """standard deviation of a sample: C - 1 instead of C"""
    student, teacher, _ = _said()
    return float(kd(_by_sample(student), _by_sample(teacher), 2.0)), float(lskd(student, teacher, 2.0))


@differs("lskd", LSKD_CODE, "length of the gradient by logits that are 1e-6, 0 and 0")
def epsilon_beside_the_deviation() -> Pair:
    """1e-7 beside the standard deviation"""
    teacher, still = torch.tensor(methods.TEACHER_LOGITS), torch.tensor([[1e-6, 0.0, 0.0]]).repeat(4, 1)
    there = slope(lambda logits: kd(_by_sample(logits), _by_sample(teacher), 2.0), still)
    return float(there.norm()), float(slope(lambda logits: lskd(logits, teacher, 2.0), still).norm())


@differs("ofa", "Hao840/OFAKD distillers/ofa.py", SURE)
def ofa_by_log_of_softmax() -> Pair:
    """log(softmax): -inf where the student's probability rounds to 0"""
    student, teacher, labels = drawn(200, 10, 40.0)
    target = F.one_hot(labels, 10)
    there = ((target - (teacher.softmax(dim=1) + target) ** 1.5) * student.softmax(dim=1).log()).sum(dim=1)
    ours = [ofa(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], 1.5, 1.0) for i in range(len(labels))]
    return share(there.isfinite()), share(torch.stack(ours).isfinite())
