"""How sure a difference between two methods is: paired by seed, Student's t, Holm over a family of questions."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtr, stdtrit  # Student's t: distribution and quantile; scipy.stats' own take 100 times as long

BySeed = dict[int, float]  # one number per seed
Verdict = Literal["better", "worse", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval. Without spread between seeds (fewer than two, or all the same) there is none: NaN."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, of the mean being zero
    seeds: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def estimate(values: Mapping[int, float], confidence: float) -> Estimate:
    """Mean and Student's t interval, mean +- t(n - 1) s / sqrt(n). Source: Student, Biometrika 1908.

    Values that are all the same (they happen: accuracies are counts) would give a width of zero and p = 0 from no evidence about the
    spread, so they get no interval. A bootstrap would not do here: with three values its "95 %" covers 75 %.
    """
    seeds = tuple(sorted(values))
    numbers = [values[seed] for seed in seeds]
    n = len(numbers)
    mean = statistics.fmean(numbers) if n else math.nan
    spread = statistics.stdev(numbers) if n > 1 else 0.0
    if spread <= 1e-9 * max(map(abs, numbers), default=0.0):  # equal but for rounding
        return Estimate(mean, math.nan, math.nan, math.nan, seeds)
    error = spread / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return Estimate(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean) / error)), seeds)


def paired_differences(a: Mapping[int, float], b: Mapping[int, float]) -> BySeed:
    """a - b at each seed that has both: what a seed does to both (its subset, its views, its initialisation) cancels.

    Applied to two leads it is the headline statistic: lead at the small scale minus lead at the large one, weak minus strong recipe.
    """
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values: max over j <= i of (m - j + 1) p_(j), at most 1. Source: Holm, Scandinavian Journal of Statistics 1979.

    NaN is a question that was not tested: it stays NaN and does not count in m.
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted = [math.nan] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def verdict(mean: float, p_adjusted: float, confidence: float) -> Verdict:
    """ "better" or "worse" (higher is better) where the family-wise error stays within 1 - confidence; no test, no claim."""
    if math.isnan(p_adjusted) or p_adjusted > 1 - confidence:
        return "inconclusive"
    return "better" if mean > 0 else "worse"


def holm_verdicts(family: Sequence[Estimate], confidence: float) -> list[tuple[Verdict, float]]:
    """The verdict and the adjusted p value of each member of one family."""
    adjusted = holm([member.p for member in family])
    return [(verdict(member.mean, p, confidence), p) for member, p in zip(family, adjusted, strict=True)]
