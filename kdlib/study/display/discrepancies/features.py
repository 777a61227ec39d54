"""Methods that look at embeddings and maps."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdlib.losses import Method
from kdlib.losses.at import at, attention
from kdlib.losses.cc import cc
from kdlib.losses.crd import CRD, draw, log_mean_exp, nce, similarities
from kdlib.losses.fitnet import fitnet
from kdlib.losses.reviewkd import resized
from kdlib.losses.rkd import rkd, squares
from kdlib.losses.sp import sp
from kdlib.losses.vid import VID
from kdlib.study.display import methods
from kdlib.study.display.discrepancies.base import Pair, differs, drawn, share, slope
from kdlib.types import Feature

RKD_CODE = "lenscloth/RKD metric/loss.py; Hao840/vanillaKD losses/rkd.py; torchdistill 1.1 RKDLoss"

STUDENT, TEACHER = (methods.output_of(who) for who in ("student", "teacher"))
EMBEDDINGS = STUDENT.need(Feature.EMBEDDING), TEACHER.need(Feature.EMBEDDING)
MAPS = STUDENT.need(Feature.MAPS), TEACHER.need(Feature.MAPS)


def _made(name: str, **parameters: float) -> Method:
    return methods.adapted_method(name, {"hard_weight": 0.0, "weight": 1.0, **parameters})


def _loss(method: Method, progress: float = 1.0) -> Tensor:
    return torch.stack(list(method(STUDENT, TEACHER, methods.BATCH, None, torch.tensor(progress)).values())).sum()


@differs(
    "cc",
    "Peng et al., ICCV 2019, the paper of that name; torchdistill 1.1 CCKDLoss but for a square root",
    "the loss on three features of the toy, at length 1",
)
def kernel_matrices() -> Pair:
    """mean squared difference of two kernel matrices (Gaussian, gamma 0.4, Taylor series to p = 2)"""
    student, teacher = (F.normalize(embedding[:, :3]) for embedding in EMBEDDINGS)
    a, b = (1 + 0.8 * f @ f.T + 0.8**2 / 2 * (f @ f.T).square() for f in (student, teacher))
    return float((torch.tensor(-0.8).exp() * (a - b)).square().mean()), float(cc(student, teacher))


class _Largest(TorchDispatchMode):
    """MB of the largest tensor that is made inside."""

    megabytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.megabytes = max(self.megabytes, made.numel() * made.element_size() / 1e6)
        return made


@differs("rkd", RKD_CODE, "MB of the largest tensor: 64 embeddings of 2,048 features")
def angles_by_all_differences() -> Pair:
    """angles by way of all differences, (B, B, D)"""
    student, teacher, _ = drawn(64, 2048, 1.0)
    with torch.no_grad(), _Largest() as there:
        for embedding in (student, teacher):
            ways = F.normalize(embedding[None] - embedding[:, None], dim=2)
            ways @ ways.transpose(1, 2)
    with torch.no_grad(), _Largest() as here:
        rkd(student, teacher)
    return there.megabytes, here.megabytes


@differs("rkd", RKD_CODE, "share of distances that stay above 0 in bf16: 64 embeddings of 512 features, 1 + noise of std 0.01")
def distances_in_half_precision() -> Pair:
    """under autocast, distances from a Gram matrix in half precision, of embeddings that are not centred"""
    f, others = 1 + drawn(64, 512, 0.01)[0], ~torch.eye(64, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = f @ f.T
    lengths = f.square().sum(dim=1)
    return share((lengths[:, None] + lengths - 2 * gram)[others] > 0), share(squares(f)[others] > 0)


def _crd() -> CRD:
    method = _made("crd", dim=4.0, negatives=30.0, temperature=0.07, momentum=0.5)
    assert isinstance(method, CRD)
    return method


@differs(
    "crd",
    "HobbitLong/RepDistiller crd/memory.py; Hao840/vanillaKD losses/crd.py; torchdistill 1.1 CRDLoss",
    "the student's term in the first step on the toy, T = 0.07, 30 negatives",
)
def positive_from_the_bank() -> Pair:
    """the positive is the image's older vector in the other model's bank, at first a random one"""
    method = _crd()
    student, teacher = (F.normalize(layer(of)) for layer, of in zip((method.student, method.teacher), EMBEDDINGS, strict=True))
    pool = draw(method.step, 30, len(methods.LABELS))
    skipped = methods.BATCH.labels[:, None] == method.labels[pool]
    noise = (~skipped).sum(dim=1).float()
    positives = (method.teacher_bank[methods.BATCH.index], teacher)
    pairs = [similarities(student, positive, method.teacher_bank[pool], skipped, 0.07) for positive in positives]
    there, here = (float(nce(*pair, noise, log_mean_exp(*pair, noise)).detach()) for pair in pairs)
    return there, here


@differs(
    "crd",
    "Hao840/vanillaKD train-crd.py with mixup or cutmix",
    "how far mixed images move their rows of the student's bank, which have length 1",
)
def mixed_images_in_the_banks() -> Pair:
    """a mixed image is written into the banks as the image that it was first"""
    moved = []
    for told in (False, True):
        method = _crd()
        before = method.student_bank.clone()
        methods.terms(method, STUDENT, TEACHER, replace(methods.BATCH, mixed=torch.full((4,), told)))
        moved.append(float((method.student_bank - before)[methods.BATCH.index].norm(dim=1).mean()))
    return moved[0], moved[1]


@differs("reviewkd", "Hao840/vanillaKD losses/review.py", "mean weight in the first of 10 epochs of 10 steps, warm-up of 1 epoch")
def warmup_by_whole_epochs() -> Pair:
    """warm-up by whole epochs, counted from 0: no loss at all in the first"""
    method, steps = _made("reviewkd", warmup=0.1, mid=4.0), range(10)
    there = [min((step // 10) / 1, 1.0) for step in steps]
    here = [float((_loss(method, (step + 1) / 100) / _loss(method)).detach()) for step in steps]
    return sum(there) / len(there), sum(here) / len(here)


@differs(
    "reviewkd",
    "megvii-research/mdistiller ReviewKD.py; Hao840/vanillaKD losses/review.py",
    "share of the places of a 4 x 4 map that get a gradient from a 2 x 2 one",
)
def nearest_place_when_shrinking() -> Pair:
    """a map that must shrink keeps one place of each cell (nearest): the others learn nothing"""
    maps = torch.ones(1, 1, 4, 4)
    there = slope(lambda of: F.interpolate(of, (2, 2), mode="nearest").sum(), maps)
    return share(there != 0), share(slope(lambda of: resized(of, 2, 2).sum(), maps) != 0)


@differs("fitnet", "Romero et al., arXiv 1412.6550, the paper", "3 channels of the toy's last stage")
def half_the_sum() -> Pair:
    """half the sum over channels and places"""
    student, teacher = (maps[-1][:, :3] for maps in MAPS)
    return float((student - teacher).square().sum(dim=(1, 2, 3)).mean() / 2), float(fitnet(student, teacher))


@differs("at", "Zagoruyko, Komodakis, arXiv 1612.03928, the paper; torchdistill 1.1 ATLoss(mode='paper')")
def norm_of_the_difference() -> Pair:
    """the norm of the difference, not its mean square (the authors' code: szagoruyko/attention-transfer, issue 34)"""
    there = [(attention(a) - attention(b)).norm(dim=1).mean() for a, b in zip(*MAPS, strict=True)]
    return float(torch.stack(there).sum()), float(at(*MAPS))


@differs("sp", "torchdistill 1.1 SPKDLoss")
def rows_at_sum_one() -> Pair:
    """rows of the Gram matrices at sum 1, not length 1 (dimension 1 is passed as p)"""
    student, teacher = (maps[-1] for maps in MAPS)
    a, b = (F.normalize(maps.flatten(1) @ maps.flatten(1).T, p=1.0, dim=1) for maps in (student, teacher))
    return float((a - b).square().mean()), float(sp(student, teacher))


@differs("vid", "megvii-research/mdistiller VID.py", "mean variance after 50 steps of SGD at 0.1 on the toy, from 5")
def variances_never_trained() -> Pair:
    """the variances are in a plain list, where the optimiser never finds them"""
    found = []
    for trained in (False, True):
        method = _made("vid", variance=5.0)
        assert isinstance(method, VID)
        optimiser = torch.optim.SGD(method.parameters() if trained else method.regressors.parameters(), lr=0.1)
        for _ in range(50):
            optimiser.zero_grad()
            _loss(method).backward()
            optimiser.step()
        found.append(float(torch.cat([F.softplus(alpha.detach()) for alpha in method.alphas]).mean()))
    return found[0], found[1]
