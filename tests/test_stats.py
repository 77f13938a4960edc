"""The decision rules as numbers, against scipy and against values worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from parity.stats import (
    binomial_tail,
    critical_count,
    detectable_share,
    exact_interval,
    log_ratio,
    poisson_tail,
    student_t_quantile,
)

ALPHA, RATE = 0.002, 0.0025  # of the greedy check
SHARES = st.floats(0.0, 1.0)


@pytest.mark.parametrize("mean", [0.0, 1e-9, 0.01, 0.08, 0.32, 1.0, 5.0, 30.0, 100.0])
def test_poisson_tail_is_scipys(mean: float) -> None:
    """Relative, so that a tail of 1e-200 is as good as one of a half: subtracting from 1 would leave nothing of it."""
    for k in (0, 1, 2, 3, 5, 10, 30, 100, 200):
        assert poisson_tail(mean, k) == pytest.approx(stats.poisson.sf(k - 1, mean), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("mean", "at_least"), [(745.0, 700), (800.0, 801), (800.0, 1500), (5000.0, 5000), (1e5, 101000)]
)
def test_poisson_tail_of_a_large_mean(mean: float, at_least: int) -> None:
    """exp(-800) is 0 in floating point; the tail is not."""
    assert poisson_tail(mean, at_least) == pytest.approx(stats.poisson.sf(at_least - 1, mean), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 10, 128, 1000])
@pytest.mark.parametrize("p", [0.0, 1e-12, RATE, 0.1, 0.5, 0.9, 1.0 - 1e-9, 1.0])
def test_binomial_tail_is_scipys(n: int, p: float) -> None:
    for k in (-1, 0, 1, 2, 4, 10, 64, 128, 500, 1000, 1001):
        assert binomial_tail(n, p, k) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=2e-12, abs=1e-300)


def test_binomial_tail_of_many_units() -> None:
    """C(100000, 50000) is no floating-point number; the probability is."""
    for p, at_least in ((0.5, 50_000), (0.0025, 300), (0.9, 90_500)):
        assert binomial_tail(100_000, p, at_least) == pytest.approx(stats.binom.sf(at_least - 1, 100_000, p), rel=1e-9)


def test_tails_by_hand() -> None:
    """P(Poisson(1) >= 2) = 1 - 2/e. Three coins: P(>= 2 heads) = 4/8."""
    assert poisson_tail(1.0, 2) == pytest.approx(1 - 2 / math.e, rel=1e-14)
    assert binomial_tail(3, 0.5, 2) == pytest.approx(0.5, rel=1e-14)


@given(mean=st.floats(0.0, 300.0), at_least=st.integers(-3, 600))
def test_poisson_tail_anywhere(mean: float, at_least: int) -> None:
    tail = poisson_tail(mean, at_least)
    assert 0.0 <= tail <= 1.0
    assert tail == pytest.approx(stats.poisson.sf(at_least - 1, mean), rel=2e-12, abs=1e-290)
    assert poisson_tail(mean, at_least + 1) <= tail


@given(n=st.integers(0, 300), p=SHARES, at_least=st.integers(-3, 310))
def test_binomial_tail_anywhere(n: int, p: float, at_least: int) -> None:
    tail = binomial_tail(n, p, at_least)
    assert 0.0 <= tail <= 1.0
    assert tail == pytest.approx(stats.binom.sf(at_least - 1, n, p), rel=1e-11, abs=1e-290)
    assert binomial_tail(n, p, at_least + 1) <= tail + 1e-15


@pytest.mark.parametrize(("n", "count"), [(32, 3), (48, 3), (97, 3), (98, 4), (100, 4), (128, 4), (134, 4)])
def test_critical_counts_of_the_greedy_rule(n: int, count: int) -> None:
    """Source: the rule's definition, P(Poisson(0.0025 N) >= c) <= 0.002."""
    assert critical_count(rate=RATE, n=n, alpha=ALPHA) == count


@given(rate=st.floats(0.0, 1.0), n=st.integers(0, 2000), alpha=st.floats(1e-12, 1.0))
def test_the_critical_count_is_the_smallest(rate: float, n: int, alpha: float) -> None:
    count = critical_count(rate=rate, n=n, alpha=alpha)
    assert count >= 1
    assert poisson_tail(rate * n, count) <= alpha
    assert count == 1 or poisson_tail(rate * n, count - 1) > alpha


def test_the_critical_count_of_a_million_is_found_at_once() -> None:
    count = critical_count(rate=RATE, n=1_000_000, alpha=ALPHA)
    assert stats.poisson.sf(count - 1, 2500) <= ALPHA < stats.poisson.sf(count - 2, 2500)


def test_no_count_satisfies_a_negative_alpha() -> None:
    with pytest.raises(ValueError, match="alpha is a probability"):
        critical_count(rate=RATE, n=32, alpha=-0.1)
    assert poisson_tail(0.08, critical_count(rate=RATE, n=32, alpha=0.0)) == 0.0


@given(n=st.integers(1, 300), power=st.floats(0.01, 0.99), data=st.data())
def test_the_detectable_share_inverts_the_binomial_tail(n: int, power: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    share = detectable_share(n=n, count=count, power=power)
    assert 0.0 < share <= 1.0
    assert binomial_tail(n, share, count) == pytest.approx(power, abs=1e-9)
    assert stats.binom.sf(count - 1, n, share) == pytest.approx(power, abs=1e-9)
    assert detectable_share(n=n + 1, count=count, power=power) < share
    assert detectable_share(n=n, count=count + 1, power=power) > share or count == n


def test_detectable_shares_by_hand() -> None:
    """One of one with power 0.9: a share of 0.9. One of two: 1 - (1 - x)^2 = 0.9. Three of two: never."""
    assert detectable_share(n=1, count=1, power=0.9) == pytest.approx(0.9)
    assert detectable_share(n=2, count=1, power=0.9) == pytest.approx(1 - math.sqrt(0.1))
    assert detectable_share(n=2, count=3, power=0.9) == 1.0


@given(n=st.integers(1, 300), confidence=st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.998]), data=st.data())
def test_the_exact_interval_is_scipys(n: int, confidence: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    found = exact_interval(count, n, confidence=confidence)
    expected = stats.binomtest(count, n).proportion_ci(confidence, method="exact")
    assert found == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)
    assert found[0] <= count / n <= found[1]


def test_exact_intervals_by_hand() -> None:
    """None of ten: 1 - (1 - x)^10 = 0.975. All of ten: x^10 = 0.025. Of no units nothing is known."""
    assert exact_interval(0, 10, confidence=0.95) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert exact_interval(10, 10, confidence=0.95) == pytest.approx((0.025**0.1, 1.0))
    assert exact_interval(0, 0, confidence=0.95) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "n", "confidence"), [(-1, 3, 0.9), (4, 3, 0.9), (1, 3, 0.0), (1, 3, 1.0)])
def test_an_interval_that_does_not_exist_is_refused(count: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=f"no interval for {count} of {n} units"):
        exact_interval(count, n, confidence=confidence)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 15, 31, 47, 127, 500])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.998, 0.9999])
def test_student_t_quantiles_are_scipys(probability: float, degrees: int) -> None:
    expected = stats.t.ppf(probability, degrees)
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_a_t_quantile_that_does_not_exist_is_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no t quantile"):
        student_t_quantile(probability, degrees)


def test_the_jackknife_of_a_ratio_worked_by_hand() -> None:
    """Sums 6 and 6; without one prompt 5/4, 4/4, 3/4. Pseudo-spread of ln(1.25), 0 and ln(.75), times 2/3."""
    found = log_ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert found is not None
    parts = [math.log(1.25), 0.0, math.log(0.75)]
    mean = sum(parts) / 3
    assert found.ln == 0.0
    assert found.standard_error == pytest.approx(math.sqrt(2 / 3 * sum((p - mean) ** 2 for p in parts)))
    assert found.upper(0.01) == pytest.approx(math.exp(stats.t.ppf(0.99, 2) * found.standard_error))


def test_the_jackknife_agrees_with_scipys_standard_error_of_a_mean() -> None:
    """With a constant denominator and small spread ln of the ratio is the mean's relative deviation."""
    values = 100.0 + np.random.default_rng(3).normal(size=40)
    found = log_ratio(values.tolist(), [1.0] * 40)
    assert found is not None
    assert found.standard_error == pytest.approx(stats.sem(values) / values.mean(), rel=1e-3)
