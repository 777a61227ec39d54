"""Contrastive representation distillation (Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdlib.losses.base import Method, count, positive, share
from kdlib.parallel.ranks import gather_ranks
from kdlib.types import Batch, Feature, Output, Setup, Terms

Vectors = Float[Tensor, "batch dim"]
# splitmix64's increment and multipliers (Steele, Lea, Flood, OOPSLA 2014) as int64, whose products wrap around like those of uint64
INCREMENT, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def draw(step: Int[Tensor, ""], size: int, images: int) -> Int[Tensor, " size"]:
    """``size`` images of 0..images-1, uniform and with replacement, other ones in each step: a hash of step * size + 0..size-1.

    Names its own randomness: the same on every device and in every process, whatever else draws numbers, and nothing waits for the device.
    """
    state = (step * size + torch.arange(size, device=step.device) + 1) * INCREMENT
    state = (state ^ _shift(state, 30)) * FIRST
    state = (state ^ _shift(state, 27)) * SECOND
    drawn: Tensor = _shift(state ^ _shift(state, 31), 1) % images  # 63 bits: no image is favoured by more than images / 2^63
    return drawn


def _shift(values: Int[Tensor, " size"], bits: int) -> Int[Tensor, " size"]:
    """To the right, zeros from the left: >> repeats the sign."""
    return torch.bitwise_and(values >> bits, 2 ** (64 - bits) - 1)


def similarities(
    anchors: Vectors, partners: Vectors, pool: Float[Tensor, "size dim"], skipped: Bool[Tensor, "batch size"], temperature: float
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch size"]]:
    """a . b / T of each anchor with its partner and with the whole pool, -inf where skipped; all vectors have length 1."""
    anchors = anchors / temperature
    return (anchors * partners).sum(dim=1), (anchors @ pool.T).masked_fill(skipped, -math.inf)


def log_mean_exp(
    positives: Float[Tensor, " batch"], negatives: Float[Tensor, "batch size"], noise: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """log of the mean of exp(similarity) over all positives and negatives, of every process; ``noise``: negatives of each anchor."""
    total = torch.logaddexp(positives.logsumexp(dim=0), negatives.logsumexp(dim=(0, 1)))
    total_and_pairs = gather_ranks(torch.stack([total, (1 + noise).sum().log()])[None]).logsumexp(dim=0)
    return total_and_pairs[0] - total_and_pairs[1]


def nce(
    positives: Float[Tensor, " batch"], negatives: Float[Tensor, "batch size"], noise: Float[Tensor, " batch"], log_mean: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """-log h(positive) - sum over the anchor's m = ``noise`` negatives of log(1 - h(negative)), batch mean, in nats.

    h = (e^s / Z) / (e^s / Z + m / N), "these two are a pair", for a similarity s. N, the number of images, cancels: with Z = N mean(e^s),
    log(h / (1 - h)) = s - ``log_mean`` - log m. An anchor without negatives has nothing to tell apart: h = 1, its loss is 0.
    """
    threshold = log_mean + noise.clamp(min=1).log()
    missed = -F.logsigmoid(positives - threshold)
    mistaken = -F.logsigmoid(threshold[:, None] - negatives).sum(dim=1)  # 0 where a negative is skipped, value and gradient
    return torch.where(noise > 0, missed + mistaken, 0.0).mean()


def remembered(rows: Vectors, seen: Vectors, index: Int[Tensor, " batch"], mixed: Bool[Tensor, " batch"], momentum: float) -> Vectors:
    """New rows of a bank for the images ``index``: momentum * row + (1 - momentum) * what was ``seen`` of that image, at length 1.

    Of an image that the batch has more than once (repeated augmentation) the mean is seen. What is seen of a mixed image counts for nobody:
    the row of an image that was seen only mixed stays as it is. Takes a (batch, batch) matrix: 16 MB for 2,048 images of all processes.
    """
    same = index[:, None] == index
    views = (same & ~mixed).to(seen.dtype)
    number = views.sum(dim=1, keepdim=True)
    moved = F.normalize(momentum * rows + (1 - momentum) * (views @ seen) / number.clamp(min=1))
    first = same.int().argmax(dim=1)  # so that all rows of one image are the same bits, whichever is written last
    return torch.where(number > 0, moved, rows)[first]


class CRD(Method):
    """``hard_weight * hard + weight * (student + teacher)``: tell an image's pair of embeddings from pairs with other classes' images.

    s = normalise(W_s f_s + b_s) and t = normalise(W_t f_t + b_t), of ``dim`` features; both layers are trained. The student's term is
    ``nce`` of s . t / T against the negatives s . t' / T, t' of the teacher's bank; the teacher's term is that of t . s / T against
    t . s' / T, s' of the student's bank. Source: arXiv 1910.10699, section 3; N negatives and M images there are m and N here.

    The banks hold one vector of each for every training image, first random (of length 1; the authors' have not), later a running mean: 1.3
    GB for 1.28 million images and 128 features, the most that any method keeps. In each step one pool of ``negatives``
    images is drawn from them for the whole batch, of which an anchor skips those of its own class; so the step is a product of (batch, dim)
    with (dim, negatives), whatever the number of images. Z is estimated for each direction from the first batch, as the authors do.
    A mixed image is an anchor like others but enters no bank. Where all are mixed nothing is remembered: studies refuse recipes that mix.

    The positive is the other model's embedding of the very same view: the paper's joint distribution. The authors' code takes that image's
    older vector from the bank instead, of other views and without gradient, and draws negatives for each anchor apart.

    Every process must start with the same banks: by the same seed, or by DistributedDataParallel's ``broadcast_buffers=True`` (with False
    it leaves them as they are, at the start too). Each applies the updates of all, so that equal banks stay equal.
    Raises RuntimeError for an index outside of the bank.
    """

    asks_student = asks_teacher = frozenset({Feature.EMBEDDING})
    unmixed = True
    equation = (
        r"-\tfrac{1}{B} \sum_b \Big[ \log h(s_b, t_b) + \sum_{k=1}^{m} \log\left(1 - h(s_b, t'_k)\right)"
        r" + \log h(t_b, s_b) + \sum_{k=1}^{m} \log\left(1 - h(t_b, s'_k)\right) \Big],\quad"
        r" h(u, v) = \frac{e^{u^\top v / T} / Z}{e^{u^\top v / T} / Z + m / N},\quad"
        r" s = \frac{W_s f_s + b_s}{\|W_s f_s + b_s\|},\quad t = \frac{W_t f_t + b_t}{\|W_t f_t + b_t\|}"
    )

    def __init__(self, *, hard_weight: float, weight: float, dim: float, negatives: float, temperature: float, momentum: float) -> None:
        super().__init__(hard_weight=hard_weight, weight=weight)
        self.dim = count("dim", dim)
        self.negatives = count("negatives", negatives)
        self.temperature = positive("temperature", temperature)
        self.momentum = share("momentum", momentum)

    def adapt(self, setup: Setup) -> None:
        super().adapt(setup)
        self.student = nn.Linear(setup.student.embedding, self.dim)
        self.teacher = nn.Linear(setup.teacher.embedding, self.dim)
        self.labels: Tensor = nn.Buffer(setup.labels.clone())
        self.student_bank: Tensor = nn.Buffer(F.normalize(torch.randn(len(setup.labels), self.dim)))
        self.teacher_bank: Tensor = nn.Buffer(F.normalize(torch.randn(len(setup.labels), self.dim)))
        self.step: Tensor = nn.Buffer(torch.randint(2**31, ()))  # counts from a random number: another seed draws other negatives
        self.log_means: Tensor = nn.Buffer(torch.full((2,), math.nan))  # log(Z / N) of both directions; nan before the first batch

    def distill(self, student: Output, teacher: Output, batch: Batch) -> Terms:
        inside = (batch.index >= 0) & (batch.index < len(self.labels))
        torch._assert_async(inside.all(), "an image's index lies outside of CRD's banks")  # does not wait for the device
        pool = draw(self.step, self.negatives, len(self.labels))
        skipped = batch.labels[:, None] == self.labels[pool]
        s, t = F.normalize(self.student(student.need(Feature.EMBEDDING))), F.normalize(self.teacher(teacher.need(Feature.EMBEDDING)))
        noise = (~skipped).sum(dim=1, dtype=s.dtype)
        of_student = similarities(s, t, self.teacher_bank[pool], skipped, self.temperature)
        of_teacher = similarities(t, s, self.student_bank[pool], skipped, self.temperature)
        with torch.no_grad():
            # estimated in each step, 3 % of its time: to ask whether it is the first would wait for the device
            estimates = torch.stack([log_mean_exp(*of_student, noise), log_mean_exp(*of_teacher, noise)])
            # step and log_means are replaced, not changed in place: torch.compile would compute the pool again for the backward pass,
            # from the step that is changed by then, and its gradients would be silently wrong (pytorch/pytorch#197039)
            self.log_means = torch.where(self.log_means.isnan(), estimates, self.log_means)
            self.step = self.step + 1
            self._remember(s, t, batch)
        return {"crd_student": nce(*of_student, noise, self.log_means[0]), "crd_teacher": nce(*of_teacher, noise, self.log_means[1])}

    def _remember(self, s: Vectors, t: Vectors, batch: Batch) -> None:
        index, mixed = gather_ranks(torch.stack([batch.index, batch.mixed.long()], dim=1)).unbind(dim=1)
        for bank, seen in ((self.student_bank, s), (self.teacher_bank, t)):
            bank[index] = remembered(bank[index], gather_ranks(seen), index, mixed.bool(), self.momentum)
