"""Decision rules as plain functions of numbers. Every constant has a source; nothing here reads a recording."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def poisson_tail(mean: float, at_least: int) -> float:
    """P(X >= at_least) for a Poisson variable; nine digits and more, also where it is 1e-280."""
    if at_least <= 0 or mean <= 0.0:
        return float(at_least <= 0)
    above = at_least > mean
    k = at_least if above else at_least - 1
    first = math.exp(k * math.log(mean) - mean - math.lgamma(k + 1))
    if above:
        return min(1.0, _falling_sum(first, (mean / j for j in itertools.count(k + 1))))
    return max(0.0, 1.0 - _falling_sum(first, (j / mean for j in range(k, -1, -1))))


def binomial_tail(n: int, p: float, at_least: int) -> float:
    """P(X >= at_least) for a binomial variable; nine digits and more, also where it is 1e-280."""
    if at_least <= 0 or at_least > n or p <= 0.0 or p >= 1.0:
        return float(at_least <= 0 or (at_least <= n and p >= 1.0))
    above = at_least > n * p
    k = at_least if above else at_least - 1
    log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    first = math.exp(log_ways + k * math.log(p) + (n - k) * math.log1p(-p))
    odds = p / (1.0 - p)
    if above:
        return min(1.0, _falling_sum(first, ((n - j) / (j + 1) * odds for j in range(k, n + 1))))
    return max(0.0, 1.0 - _falling_sum(first, (j / (n - j + 1) / odds for j in range(k, -1, -1))))


def mcnemar(more: int, fewer: int, *, two_sided: bool) -> float:
    """The exact probability that chance splits the discordant pairs as unevenly as `more` to `fewer`.

    One-sided: that at least `more` of them fall to the first side.
    """
    if not two_sided:
        return binomial_tail(more + fewer, 0.5, more)
    return min(1.0, 2.0 * binomial_tail(more + fewer, 0.5, max(more, fewer)))


def critical_count(*, rate: float, n: int, alpha: float) -> int:
    """The smallest count that chance at `rate` per unit reaches on `n` units with probability at most `alpha`.

    Raises:
        ValueError: If `alpha` is negative, which no count satisfies.
    """
    if alpha < 0.0:
        raise ValueError(f"alpha is a probability, not {alpha}")
    too_low, enough = 0, 1
    while poisson_tail(rate * n, enough) > alpha:
        too_low, enough = enough, 2 * enough
    while enough - too_low > 1:
        middle = (too_low + enough) // 2
        if poisson_tail(rate * n, middle) > alpha:
            too_low = middle
        else:
            enough = middle
    return enough


def detectable_share(*, n: int, count: int, power: float) -> float:
    """The share of units that must be affected for at least `count` of `n` to show with probability `power`.

    1 where even all units do not suffice.
    """
    if count > n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if binomial_tail(n, middle, count) < power:
            low = middle
        else:
            high = middle
    return high


def exact_interval(count: int, n: int, *, confidence: float) -> tuple[float, float]:
    """Between which shares the true one lies when `count` of `n` units show it, with at least `confidence`.

    Source: Clopper & Pearson 1934: the shares at which this count, or a more extreme one, just becomes improbable.

    Raises:
        ValueError: If `count` is not between 0 and `n`, or `confidence` is not between 0 and 1.
    """
    if not 0 <= count <= n or not 0.0 < confidence < 1.0:
        raise ValueError(f"no interval for {count} of {n} units with confidence {confidence}")
    tail = (1.0 - confidence) / 2
    low = detectable_share(n=n, count=count, power=tail) if count else 0.0
    return low, detectable_share(n=n, count=count + 1, power=1.0 - tail)


def _falling_sum(first: float, ratios: Iterable[float]) -> float:
    """The sum of first, first * r0, first * r0 * r1, ..., until the terms no longer count; they must fall."""
    terms, term = [], first
    for ratio in ratios:
        if term <= first * 1e-18:
            break
        terms.append(term)
        term *= ratio
    return math.fsum(terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRatio:
    """A ratio of two sums over prompts, on the log scale, with its jackknife standard error.

    prompts: the independent units; the tokens of one prompt are never independent of each other.
    """

    ln: float
    standard_error: float
    prompts: int

    @property
    def value(self) -> float:
        """The ratio itself."""
        return math.exp(self.ln)

    def lower(self, alpha: float) -> float:
        """One-sided bound: the true ratio lies below it with probability at most about `alpha`."""
        return math.exp(self.ln - student_t_quantile(1.0 - alpha, self.prompts - 1) * self.standard_error)

    def upper(self, alpha: float) -> float:
        """One-sided bound: the true ratio lies above it with probability at most about `alpha`."""
        return math.exp(min(700.0, self.ln + student_t_quantile(1.0 - alpha, self.prompts - 1) * self.standard_error))


def log_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> LogRatio | None:
    """The ratio of the sums of per-prompt numbers, by delete-one-prompt jackknife; None where it is not defined.

    Not defined: fewer than two prompts, or a sum that is not positive, also with any one prompt left out.
    Source: cluster jackknife-t on the log ratio, e.g. Efron & Tibshirani 1993, chapter 11; its coverage at the prompt
    counts used here is a test.
    """
    m = len(numerators)
    top, bottom = math.fsum(numerators), math.fsum(denominators)
    tops = [top - value for value in numerators]
    bottoms = [bottom - value for value in denominators]
    # What is left after subtracting must stand clear of the subtraction's own rounding.
    if m < 2 or min(tops, default=0.0) <= 1e-12 * top or min(bottoms, default=0.0) <= 1e-12 * bottom:
        return None
    without = [math.log(a / b) for a, b in zip(tops, bottoms, strict=True)]
    mean = math.fsum(without) / m
    variance = (m - 1) / m * math.fsum((value - mean) ** 2 for value in without)
    return LogRatio(ln=math.log(top / bottom), standard_error=math.sqrt(variance), prompts=m)


@functools.cache
def student_t_quantile(probability: float, degrees: int) -> float:
    """The value below which a Student t variable lies with `probability` (0.5 to 1); nine digits.

    Raises:
        ValueError: If the probability or the degrees of freedom are outside that range.
    """
    if not 0.5 <= probability < 1.0 or degrees < 1:
        raise ValueError(f"no t quantile for probability {probability} and {degrees} degrees of freedom")
    low, high = 0.0, 1.0
    while _student_t_tail(high, degrees) > 1.0 - probability:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = (low + high) / 2
        if _student_t_tail(middle, degrees) > 1.0 - probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_t_tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0, by the finite sums for whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for step in range(2 if odd else 1, degrees - 1, 2):
        term *= cosine * cosine * step / (step + 1)
        total += term
    inside = 2.0 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return max(0.0, (1.0 - inside) / 2)
