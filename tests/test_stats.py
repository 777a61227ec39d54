"""Statistics against scipy, by simulation of what they promise, and by properties."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from kdlib.seed import generator
from kdlib.study.report import stats

NUMBERS = st.floats(-10, 10).map(lambda value: round(value, 3))
BY_SEED = st.dictionaries(st.integers(0, 20), NUMBERS, min_size=2, max_size=8)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_estimate_equals_scipys_one_sample_t_test(confidence: float) -> None:
    values = {3: 0.11, 0: 0.02, 7: -0.05, 1: 0.2}
    found = stats.estimate(values, confidence)
    reference = scipy.stats.ttest_1samp(list(values.values()), 0)
    interval = reference.confidence_interval(confidence)
    assert (found.mean, found.p) == pytest.approx((0.07, reference.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.n, found.seeds) == (4, (0, 1, 3, 7))
    assert found.half == pytest.approx((interval.high - interval.low) / 2)


def test_paired_differences_equal_scipys_related_t_test() -> None:
    a, b = {0: 0.5, 1: 0.62, 2: 0.48, 9: 0.9}, {2: 0.41, 1: 0.6, 0: 0.43, 5: 0.1}
    found = stats.estimate(stats.paired_differences(a, b), 0.95)
    assert found.p == pytest.approx(scipy.stats.ttest_rel([0.5, 0.62, 0.48], [0.43, 0.6, 0.41]).pvalue)
    assert found.seeds == (0, 1, 2), "a seed that only one of them finished is left out"


@pytest.mark.parametrize("values", [{}, {0: 0.5}, {0: 0.1 + 0.2, 1: 0.3, 2: 0.3}])
def test_without_spread_there_is_no_interval_and_no_claim(values: dict[int, float]) -> None:
    found = stats.estimate(values, 0.95)
    assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(found.p)
    assert found.n == len(values)
    assert math.isnan(found.mean) == (not values)
    assert stats.holm_verdicts([found], 0.95)[0][0] == "inconclusive"


@pytest.mark.parametrize("n", [3, 5])
def test_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    """Leads whose seeds have a large effect of their own, common to both methods."""
    draws = generator("coverage", n)
    covered, unpaired_widths, widths = 0, [], []
    for _ in range(4000):
        seeds = draws.normal(0, 5, n)
        a = dict(enumerate(seeds + draws.normal(2, 1, n)))
        b = dict(enumerate(seeds + draws.normal(0, 1, n)))
        found = stats.estimate(stats.paired_differences(a, b), 0.95)
        covered += found.low <= 2 <= found.high
        widths.append(found.half)
        unpaired_widths.append(stats.estimate(a, 0.95).half)
    assert 0.93 <= covered / 4000 <= 0.97
    assert np.mean(widths) < 0.5 * np.mean(unpaired_widths), "pairing must remove the seeds' common effect"


def test_headline_statistic_covers_the_truth() -> None:
    """Lead at the small scale minus lead at the large one, four accuracies per seed."""
    draws = generator("headline")
    covered = 0
    for _ in range(4000):
        means = ((3.0, 0.0), (1.0, 0.5))  # the leads are 3 and .5: it shrinks by 2.5
        small, large = (
            stats.paired_differences(dict(enumerate(draws.normal(method, 1, 3))), dict(enumerate(draws.normal(baseline, 1, 3))))
            for method, baseline in means
        )
        found = stats.estimate(stats.paired_differences(small, large), 0.95)
        covered += found.low <= 2.5 <= found.high
    assert 0.93 <= covered / 4000 <= 0.97


def test_holm_keeps_the_family_wise_error_and_one_test_at_a_time_would_not() -> None:
    """Independent questions are the worst case: then Holm's first step is within .002 of the level. 3,000 families: +- .008 by chance."""
    draws = generator("family")
    wrong = naive = 0
    for _ in range(3000):
        family = [stats.estimate(dict(enumerate(draws.normal(0, 1, 3))), 0.95) for _ in range(8)]
        wrong += any(word != "inconclusive" for word, _ in stats.holm_verdicts(family, 0.95))
        naive += any(member.p <= 0.05 for member in family)
    assert 0.035 <= wrong / 3000 <= 0.058
    assert naive / 3000 > 0.25


def test_holm_by_hand() -> None:
    """m = 4: .01 x 4, .02 x 3, then .03 x 2 = .06 again, .9 x 1."""
    assert stats.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert stats.holm([0.5, 0.6]) == pytest.approx([1, 1])
    untested = stats.holm([0.01, math.nan, 0.02])
    assert math.isnan(untested[1])
    assert untested[::2] == pytest.approx([0.02, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = stats.holm(p)
    assert all(raw <= found <= min(1, len(p) * raw) + 1e-12 for raw, found in zip(p, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])


def test_verdict_words() -> None:
    assert stats.verdict(0.1, 0.05, 0.95) == "better"
    assert stats.verdict(-0.1, 0.049, 0.95) == "worse"
    assert stats.verdict(0.1, 0.051, 0.95) == "inconclusive"
    assert stats.verdict(0.1, 0.051, 0.9) == "better"
    assert stats.verdict(0.1, math.nan, 0.95) == "inconclusive"


@given(BY_SEED, st.floats(-5, 5))
def test_a_shift_of_all_values_shifts_mean_and_interval(values: dict[int, float], shift: float) -> None:
    before = stats.estimate(values, 0.95)
    after = stats.estimate({seed: value + shift for seed, value in values.items()}, 0.95)
    assert after.mean == pytest.approx(before.mean + shift, abs=1e-9)
    if not math.isnan(before.low):
        assert (after.low, after.high) == pytest.approx((before.low + shift, before.high + shift), abs=1e-6)


@given(BY_SEED, BY_SEED, st.dictionaries(st.integers(0, 20), NUMBERS))
def test_pairing_ignores_what_a_seed_does_to_both(a: dict[int, float], b: dict[int, float], effect: dict[int, float]) -> None:
    plain = stats.paired_differences(a, b)
    moved = stats.paired_differences(*({seed: value + effect.get(seed, 0) for seed, value in method.items()} for method in (a, b)))
    assert moved == pytest.approx(plain, abs=1e-9)
    assert plain.keys() == a.keys() & b.keys()


@given(BY_SEED, BY_SEED)
def test_exchanging_the_methods_exchanges_the_signs(a: dict[int, float], b: dict[int, float]) -> None:
    forward, backward = (stats.estimate(stats.paired_differences(*pair), 0.95) for pair in ((a, b), (b, a)))
    assert (forward.mean, forward.low, forward.p) == pytest.approx((-backward.mean, -backward.high, backward.p), nan_ok=True)
