"""What a candidate lost, start by start: differences of logarithms, how much they spread, how many of them decide.

A start of an engine gives one value of a metric; a pair of starts, reference and candidate, one difference of
logarithms: the loss, positive where the candidate is worse, whichever way is better. People read losses as shares, 0.05
is 5 % fewer tokens/s or 5 % more seconds; rules work on logarithms, where a loss has the same spread at any speed.

Sources and tables: docs/checks/performance.md. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from parity.service_metrics import Definition, Direction
from parity.stats import student_t_quantile

Floats: TypeAlias = NDArray[np.float64]

ENOUGH_DEGREES = 6
"""Degrees of freedom from which on a history's spread is used."""
LEAST_SPREAD = 0.001
"""No spread below this is believed: the steadiest engines repeat themselves to a tenth of a per cent."""
TAIL_REQUESTS, TAIL_MARGIN = 5000, 0.20
"""A 99th percentile decides only with so many requests a start, and only about so large a loss."""

MOST = 1000
"""Pairs or days; nobody measures more."""

_NORMAL = NormalDist()
_LEAST_INFLATION = 1.15
_CAUTIOUS = 0.83
"""Confidence of the limit that stands for a spread: 1.15 times an estimate of 30 degrees of freedom, 1.33 of 9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is asked of one metric; losses as shares: 0.05 is 5 % fewer tokens/s, or 5 % more seconds.

    margin: a loss so large must not pass. tolerated: a loss so small must not fail.
    alpha_fail: the probability that a loss of `tolerated` is flagged; `confirming`: that fresh pairs then confirm it.
    alpha_pass: the probability that a loss of `margin` passes. power: of planned numbers of pairs.
    least, most: pairs after which the first and the last look is taken. unknown: pairs where no history says how much
        they spread.
    """

    direction: Direction
    margin: float = 0.05
    tolerated: float = 0.0
    alpha_fail: float = 0.01
    confirming: float = 0.05
    alpha_pass: float = 0.05
    power: float = 0.9
    least: int = 2
    most: int = 20
    unknown: int = 12

    def __post_init__(self) -> None:
        """Raises ValueError if the numbers make no rule."""
        if self.direction is Direction.NEITHER:
            raise ValueError("a metric of which neither way is better cannot get worse")
        if not 0.0 <= self.tolerated < self.margin < 1.0:
            raise ValueError(f"0 <= tolerated < margin < 1 is needed, not {self.tolerated} and {self.margin}")
        if not all(0.0 < rate < 0.5 for rate in (self.alpha_fail, self.confirming, self.alpha_pass)):
            raise ValueError("error rates lie between 0 and 0.5")
        if not 0.5 < self.power < 1.0 or not 2 <= self.least <= self.most or self.unknown < 3:
            raise ValueError("a power between 0.5 and 1, at least 2 and at most `most` pairs, and 3 without history")

    def among(self, gated: int) -> Rule:
        """The rule for one of `gated` metrics of a run, which share its false alarms (Bonferroni)."""
        return replace(self, alpha_fail=self.alpha_fail / gated)

    @property
    def bounds(self) -> tuple[float, float]:
        """`tolerated` and `margin` as differences of logarithms."""
        return _in_ln(self.tolerated, self.direction), _in_ln(self.margin, self.direction)


def not_gated(metric: Definition, *, margin: float, requests: int) -> str | None:
    """Why a metric may not decide; None if it may. `requests`: measured in one start."""
    if metric.direction is Direction.NEITHER:
        return f"{metric.id} is shown and decides nothing: {metric.direction.value}"
    if metric.id == "failed_share" or metric.samples == "queue_s":
        return f"{metric.id} is shown and decides nothing: ratios are judged, and it may be 0"
    if metric.id.endswith("_p99_s") and (requests < TAIL_REQUESTS or margin < TAIL_MARGIN):
        return (
            f"{metric.id} is shown and decides nothing: a 99th percentile needs {TAIL_REQUESTS} requests a start and a "
            f"margin of {TAIL_MARGIN:.0%}, and has {requests} and {margin:.0%}"
        )
    return None


# Losses and how much they spread --------------------------------------------------------------------------------------


def losses(reference: Sequence[float], candidate: Sequence[float], direction: Direction) -> Floats:
    """Of each pair of starts the difference of logarithms, float64 [P]; positive where the candidate is worse.

    Raises:
        ValueError: If the sides have different numbers of starts, or a value is not positive.
    """
    if len(reference) != len(candidate):
        raise ValueError(
            f"pairs need both sides: {len(reference)} starts of the reference, {len(candidate)} of the other"
        )
    return badness(candidate, direction) - badness(reference, direction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The standard deviation of a pair's loss where nothing is lost, from `degrees` degrees of freedom.

    source: where it was measured, and when.
    """

    sigma: float
    degrees: int
    source: str

    def limit(self, confidence: float) -> float:
        """Under which the true one lies with this confidence; the chi-squared quantile of Wilson and Hilferty 1931."""
        part = 2.0 / (9.0 * self.degrees)
        root = max(0.01, 1.0 - part - _NORMAL.inv_cdf(confidence) * math.sqrt(part))
        return max(LEAST_SPREAD, self.sigma * math.pow(root, -1.5))

    @property
    def cautious(self) -> float:
        """What is judged with, since a spread that is taken for too small makes false alarms."""
        return max(_LEAST_INFLATION * self.sigma, self.limit(_CAUTIOUS))


def spread_of_pairs(values: Floats, source: str) -> Spread:
    """From the losses of at least two pairs, float64 [P]; a loss that all of them share does not count.

    Raises:
        ValueError: If there are fewer.
    """
    if len(values) < 2:
        raise ValueError(f"a spread needs two pairs, not {len(values)}")
    return Spread(sigma=float(values.std(ddof=1)), degrees=len(values) - 1, source=source)


def spread_of_starts(days: Sequence[Sequence[float]], source: str) -> Spread:
    """From a metric's values of starts of one engine, day by day: those of one day differ by their luck alone.

    Raises:
        ValueError: If no day has two starts, or a value is not positive.
    """
    logs = [badness(day, Direction.LOWER) for day in days]
    degrees = sum(len(day) - 1 for day in logs)
    if degrees < 1:
        raise ValueError("a spread needs a day with two starts")
    squares = sum(float(((day - day.mean()) ** 2).sum()) for day in logs)
    return Spread(sigma=math.sqrt(2.0 * squares / degrees), degrees=degrees, source=source)


def pooled(spreads: Sequence[Spread]) -> Spread | None:
    """One spread from several of the same host and metric; None from none."""
    degrees = sum(spread.degrees for spread in spreads)
    if not degrees:
        return None
    variance = sum(spread.degrees * spread.sigma**2 for spread in spreads) / degrees
    return Spread(sigma=math.sqrt(variance), degrees=degrees, source=", ".join(s.source for s in spreads))


# Planning -------------------------------------------------------------------------------------------------------------


def needed(*, sigma: float, rule: Rule, known: bool = True) -> int:
    """How many pairs decide with the rule's power, whether nothing is lost or the margin.

    sigma: the spread of a pair that the test works with. known: from history, hence by SPRT, which mostly ends
    sooner (that it may is not counted); else by one t test.
    """
    tolerated, margin = rule.bounds
    width, z = margin - tolerated, _NORMAL.inv_cdf(rule.power)
    if not known:
        alpha = min(rule.alpha_fail, rule.alpha_pass / 2)
        return smallest(lambda n: width * math.sqrt(n) / sigma >= seen(n, alpha, rule.power))
    reach = z + math.sqrt(z * z + 2.0 * max(map(abs, thresholds(rule))))
    return max(rule.least, math.ceil((reach * sigma / width) ** 2))


def thresholds(rule: Rule) -> tuple[float, float]:
    """Where the evidence flags, and where it passes. Source: Wald, Sequential Analysis, 1947."""
    up = math.log((1.0 - rule.alpha_pass) / rule.alpha_fail)
    return up, math.log(rule.alpha_pass / (1.0 - rule.alpha_fail))


def by_t(error: Callable[[int], float], mean: float, rule: Rule) -> int:
    """How many units of which a mean has this standard error decide a loss, either way, with the rule's power."""
    tolerated, margin = rule.bounds
    return smallest(
        lambda n: (
            mean - tolerated >= seen(n, rule.alpha_fail, rule.power) * error(n)
            or margin - mean >= seen(n, rule.alpha_pass, rule.power) * error(n)
        )
    )


def seen(n: int, alpha: float, power: float) -> float:
    """How many standard errors a mean of n has to be from 0 for a t test at `alpha` to see it with this power.

    The noncentral t by Abramowitz & Stegun 26.7.10.
    """
    t, degrees = student_t_quantile(1.0 - alpha, n - 1), n - 1
    return t * (1.0 - 0.25 / degrees) + _NORMAL.inv_cdf(power) * math.sqrt(1.0 + t * t / (2.0 * degrees))


def smallest(enough: Callable[[int], bool]) -> int:
    """The smallest number from 2 on that is enough, where larger ones are too; `MOST` where none is."""
    few, many = 1, 2
    while many < MOST and not enough(many):
        few, many = many, min(2 * many, MOST)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def estimate(values: Floats) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), max(LEAST_SPREAD, float(values.std(ddof=1))) / math.sqrt(len(values))


# Logarithms and shares ------------------------------------------------------------------------------------------------


def badness(values: Sequence[float], direction: Direction) -> Floats:
    """Logarithms, turned so that more is worse."""
    found = np.asarray(values, np.float64)
    if direction is Direction.NEITHER or not (np.isfinite(found) & (found > 0.0)).all():
        raise ValueError(f"a loss needs positive values of which one way is better, not {values} ({direction.value})")
    return np.log(found) if direction is Direction.LOWER else -np.log(found)


def _in_ln(share: float, direction: Direction) -> float:
    return math.log1p(share) if direction is Direction.LOWER else -math.log1p(-share)


def as_share(ln: float, direction: Direction) -> float:
    """A difference of logarithms as people read it."""
    return math.expm1(ln) if direction is Direction.LOWER else -math.expm1(-ln)
