"""Decision rules as plain functions of numbers. Every constant has a source; nothing here reads a recording."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable


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


def _falling_sum(first: float, ratios: Iterable[float]) -> float:
    """The sum of first, first * r0, first * r0 * r1, ..., until the terms no longer count; they must fall."""
    terms, term = [], first
    for ratio in ratios:
        if term <= first * 1e-18:
            break
        terms.append(term)
        term *= ratio
    return math.fsum(terms)
