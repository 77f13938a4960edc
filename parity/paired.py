"""Did a candidate lose accuracy on the documents that both sides answered? For a number of documents fixed beforehand.

A document's difference is the reference's score minus the candidate's; its mean is the drop D, positive where the
candidate is worse. Documents on which both sides agree say nothing, so what matters is how many differ (the
discordance): pairing is what makes a thousand documents enough.

    PASS           D >= margin is rejected at alpha_pass: non-inferiority is shown
    FAIL           otherwise, D <= tolerated is rejected at alpha_fail: a loss is shown
    INCONCLUSIVE   neither; how many documents would decide is part of the answer

Scores of 0 and 1 on independent documents are counted (`Counts`): Tango's score test with a continuity correction for
PASS, the exact test of how discordant documents split for FAIL, which is McNemar's where nothing is tolerated. Other
scores, and documents in clusters, are averaged with a standard error over clusters (`Means`).

Sources, exact error rates and what n can certify: docs/checks/accuracy.md. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from parity.stats import binomial_tail
from parity.verdict import Outcome

Floats: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.int64]

_NORMAL = NormalDist()
_HALF = 0.5
"""Lost minus won documents is a whole number: half a step is the continuity correction."""
_FEW = 30
"""Clusters that differ; with as many their mean is near enough to normal."""
_MOST = 10**8
"""Documents; nobody has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is asked of a candidate, in shares: 0.02 is two points.

    margin: a drop so large must not pass. tolerated: a drop so small must not fail. What lies between may do either.
    alpha_pass: the probability that a drop of `margin` passes, at most. alpha_fail: that one of `tolerated` fails.
    power: the probability of being decided that planned numbers of documents have.
    """

    margin: float
    tolerated: float
    alpha_pass: float = 0.05
    alpha_fail: float = 0.005
    power: float = 0.8

    def __post_init__(self) -> None:
        """Raises ValueError if the numbers make no rule."""
        if not 0.0 <= self.tolerated < self.margin < 1.0:
            raise ValueError(f"0 <= tolerated < margin < 1 is needed, not {self.tolerated} and {self.margin}")
        if not all(0.0 < rate < _HALF for rate in (self.alpha_pass, self.alpha_fail)) or not 0.0 < self.power < 1.0:
            raise ValueError("error rates lie between 0 and 0.5, the power between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of `n` independent documents, how many only the reference got right (lost), and only the candidate (won)."""

    lost: int
    won: int
    n: int

    @property
    def drop(self) -> float:
        """The observed D."""
        return (self.lost - self.won) / self.n

    @property
    def spread(self) -> float:
        """The mean square of a difference: of counts, the discordance."""
        return (self.lost + self.won) / self.n

    def p_pass(self, margin: float, *, correction: float = _HALF) -> float:
        """How probable so small a drop is where the true one is `margin`; `correction` in documents."""
        beyond, deviation = score(self.lost, self.won, self.n, margin)
        return _NORMAL.cdf(_ratio(beyond + correction, deviation))

    def p_fail(self, tolerated: float) -> float:
        """How probable so many lost ones among the discordant documents are where the true drop is `tolerated`.

        Exact for the split that is most likely under that drop; an even one, hence McNemar's test, where it is 0.
        """
        lost, won = restricted(self.lost, self.won, self.n, tolerated)
        split = lost / (lost + won) if lost + won > 0.0 else _HALF
        return binomial_tail(self.lost + self.won, split, self.lost)

    def interval(self, tail: float, *, correction: float = _HALF) -> tuple[float, float]:
        """Tango's score interval of the drop, leaving out `tail` on either side; as published, without correction."""

        def upper(one: Counts) -> float:
            return _root(lambda drop: tail - one.p_pass(drop, correction=correction), one.drop, 1.0)

        return -upper(Counts(lost=self.won, won=self.lost, n=self.n)), upper(self)


def restricted(lost: float, won: float, n: float, drop: float) -> tuple[float, float]:
    """The most likely probabilities of a lost and of a won document where the true drop is given.

    Source: Tango, Statistics in Medicine 17 (1998) 891-908: with q = P(won) and P(lost) = q + drop, the larger root of
    2 n q^2 - (lost + won - drop (2 n - lost + won)) q - won drop (1 - drop) = 0.
    """
    linear = lost + won - drop * (2 * n - lost + won)
    root = math.sqrt(max(0.0, linear * linear + 8 * n * won * drop * (1.0 - drop)))
    q = max(0.0, -drop, (linear + root) / (4 * n))
    return q + drop, q


def score(lost: float, won: float, n: float, drop: float) -> tuple[float, float]:
    """Tango's score for a true drop: how many documents were lost beyond it, and the standard deviation of that."""
    p_lost, p_won = restricted(lost, won, n, drop)
    return lost - won - n * drop, math.sqrt(max(0.0, n * (p_lost + p_won - drop * drop)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Differences of documents in clusters, averaged; documents of one cluster are not independent of each other.

    total: the sum of the differences of `n` documents. most: what a document can lose; where scores are not bounded by
        0 and 1, what one did lose or win at most.
    squares: the sum over clusters of the square of their summed deviations from the mean of their stratum.
    degrees: of freedom, clusters less strata. differing: clusters in which any document differs.

    Where little differs, the spread that was seen is no measure of what was not. So half of one more cluster counts as
    lost, as half a document does for counts; and with fewer than `_FEW` that differ the spread is not taken for less
    than that of complete losses which add up to the drop in question.
    """

    total: float
    n: int
    clusters: int
    squares: float
    degrees: int
    most: float
    differing: int

    @property
    def drop(self) -> float:
        """The observed D."""
        return self.total / self.n

    @property
    def spread(self) -> float:
        """The mean square of a difference of as many independent documents with this standard error."""
        return self.squares / self.n + self.drop**2

    def p_pass(self, margin: float) -> float:
        """How probable so small a drop is where the true one is `margin`."""
        mean, error = self._half_lost()
        if self.differing < _FEW:
            error = max(error, math.sqrt(max(0.0, margin * (self.most - margin)) / self.clusters))
        return _NORMAL.cdf(-_as_normal(_ratio(margin - mean, error), self.degrees))

    def p_fail(self, tolerated: float) -> float:
        """How probable so large a drop is where the true one is `tolerated`."""
        return replace(self, total=-self.total).p_pass(-tolerated)

    def interval(self, tail: float) -> tuple[float, float]:
        """The interval of the drop, which leaves out `tail` on either side."""

        def upper(one: Means) -> float:
            mean, error = one._half_lost()
            t = _as_student(-_NORMAL.inv_cdf(tail), one.degrees)
            if one.differing >= _FEW:
                return mean + t * error
            a = min(t * t / one.clusters, 1e12)
            # The larger root of (drop - mean)^2 = t^2 drop (most - drop) / clusters.
            middle = 2 * mean + a * one.most
            root = middle + math.sqrt(max(0.0, middle * middle - 4 * (1 + a) * mean * mean))
            return max(mean + t * error, root / (2 * (1 + a)))

        return -upper(replace(self, total=-self.total)), upper(self)

    def _half_lost(self) -> tuple[float, float]:
        size, k, half = self.n / self.clusters, self.clusters + 1, self.most / 2
        n = self.n + size
        squares = self.squares + (size * (half - self.drop)) ** 2
        return (self.total + size * half) / n, math.sqrt(k / (k - 1) * squares) / n


def _as_normal(t: float, degrees: int) -> float:
    """The normal deviate with a Student t's tail.

    Source: Wallace 1959. The tail is never too small, and within 1.2 % of the exact one from 8 degrees of freedom on
    for tails down to 0.005 (a test holds it against SciPy).
    """
    if degrees < 1:
        return 0.0
    scaled = (8 * degrees + 1) / (8 * degrees + 3)
    return math.copysign(scaled * math.sqrt(degrees * math.log1p(min(t * t, 1e300) / degrees)), t)


def _as_student(z: float, degrees: int) -> float:
    """The inverse of `_as_normal`."""
    if degrees < 1:
        return math.inf
    return math.sqrt(degrees * math.expm1(min(700.0, (z * (8 * degrees + 3) / (8 * degrees + 1)) ** 2 / degrees)))


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What both sides scored on the same documents.

    Shapes: reference, candidate: float64 [N], higher is better. clusters, strata: int64 [N], labels; documents of one
    cluster are not independent of each other, and a stratum (a task, say) holds whole clusters. None: every document by
    itself, and one stratum.
    """

    reference: Floats
    candidate: Floats
    clusters: Codes | None = None
    strata: Codes | None = None
    differences: Floats = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError if the shapes differ, there is no document, or a score is not finite."""
        object.__setattr__(self, "differences", self.reference - self.candidate)
        shapes = {a.shape for a in (self.reference, self.candidate, self.clusters, self.strata) if a is not None}
        if len(shapes) != 1 or not len(self.reference) or not np.isfinite(self.differences).all():
            raise ValueError(f"scores must be finite, one a document and side, not of shapes {sorted(shapes)}")

    def __len__(self) -> int:
        return len(self.differences)

    @cached_property
    def estimate(self) -> Counts | Means:
        """Counts where scores are 0 and 1 and no two documents share a cluster, else means."""
        x, n = self.differences, len(self)
        labels = np.arange(n) if self.clusters is None else np.unique(self.clusters, return_inverse=True)[1]
        clusters = int(labels.max()) + 1
        if clusters == n and np.isin((self.reference, self.candidate), (0.0, 1.0)).all():
            return Counts(lost=int((x > 0).sum()), won=int((x < 0).sum()), n=n)
        bounded = min(self.reference.min(), self.candidate.min()) >= 0.0
        bounded = bounded and max(self.reference.max(), self.candidate.max()) <= 1.0
        strata = np.zeros(n, np.int64) if self.strata is None else np.unique(self.strata, return_inverse=True)[1]
        means = np.bincount(strata, x) / np.bincount(strata)
        return Means(
            total=float(x.sum()),
            n=n,
            clusters=clusters,
            squares=float((np.bincount(labels, x - means[strata]) ** 2).sum()),
            degrees=clusters - int(strata.max()) - 1,
            most=1.0 if bounded or not x.any() else float(np.abs(x).max()),
            differing=int((np.bincount(labels, np.abs(x)) > 0.0).sum()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the documents say.

    interval: of the drop, leaving out the rule's `alpha_pass` on either side; it passes when all of it is under the
        margin. lost, won: documents that only the reference, only the candidate scored higher on.
    detectable: the true drop that this many documents, with this discordance, would fail with the rule's power.
    more: documents that would probably decide, if the drop stays as it is; None where it is decided.
    """

    outcome: Outcome
    n: int
    lost: int
    won: int
    drop: float
    interval: tuple[float, float]
    p_pass: float
    p_fail: float
    detectable: float
    more: int | None


def outcome(p_pass: float, p_fail: float, rule: Rule) -> Outcome:
    """A loss that is real and shown to be under the margin passes."""
    if p_pass <= rule.alpha_pass:
        return Outcome.PASS
    return Outcome.FAIL if p_fail <= rule.alpha_fail else Outcome.INCONCLUSIVE


def decide(outcomes: Outcomes, rule: Rule) -> Decision:
    """Judge a drop by a rule, on documents whose number did not depend on their scores."""
    found, x, n = outcomes.estimate, outcomes.differences, len(outcomes)
    p_pass, p_fail = found.p_pass(rule.margin), found.p_fail(rule.tolerated)
    decided = outcome(p_pass, p_fail, rule)
    noise = max(0.0, found.spread - abs(found.drop))
    more = None
    if decided is Outcome.INCONCLUSIVE:
        more = max(1, needed(drop=found.drop, noise=noise, rule=rule) - n)
    return Decision(
        outcome=decided,
        n=n,
        lost=int((x > 0).sum()),
        won=int((x < 0).sum()),
        drop=found.drop,
        interval=found.interval(rule.alpha_pass),
        p_pass=p_pass,
        p_fail=p_fail,
        detectable=detectable(n=n, noise=noise, rule=rule),
        more=more,
    )


def holm(p_values: Sequence[float], alpha: float) -> tuple[bool, ...]:
    """Which hypotheses fall when any false rejection among all of them is to have probability at most `alpha`.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. Valid however the tests depend on each other.
    """
    rejected = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > alpha / (len(p_values) - rank):
            break
        rejected[place] = True
    return tuple(rejected)


# Before anything runs: what n documents can and cannot say ------------------------------------------------------------


def passes(*, n: int, drop: float, noise: float, rule: Rule) -> float:
    """The probability that a true drop passes on `n` documents; `noise`: the discordance of a clean build."""
    lost, won = n * (noise / 2 + max(drop, 0.0)), n * (noise / 2 + max(-drop, 0.0))
    beyond, deviation = score(lost, won, n, rule.margin)
    room = -beyond - _HALF + _NORMAL.inv_cdf(rule.alpha_pass) * deviation
    return _NORMAL.cdf(_ratio(room, math.sqrt(max(0.0, lost + won - n * drop * drop))))


def fails(*, n: int, drop: float, noise: float, rule: Rule) -> float:
    """The probability that a true drop fails on `n` documents."""
    lost, won = n * (noise / 2 + max(drop, 0.0)), n * (noise / 2 + max(-drop, 0.0))
    beyond, deviation = score(lost, won, n, rule.tolerated)
    room = beyond - _HALF + _NORMAL.inv_cdf(rule.alpha_fail) * deviation
    return _NORMAL.cdf(_ratio(room, math.sqrt(max(0.0, lost + won - n * drop * drop))))


def needed(*, drop: float, noise: float, rule: Rule) -> int:
    """How many documents decide a true drop, either way, with the rule's power."""
    few, enough = 0, 1
    while not _decides(enough, drop, noise, rule) and enough < _MOST:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if _decides(middle, drop, noise, rule) else (middle, enough)
    return enough


def _decides(n: int, drop: float, noise: float, rule: Rule) -> bool:
    asked = (passes(n=n, drop=drop, noise=noise, rule=rule), fails(n=n, drop=drop, noise=noise, rule=rule))
    return max(asked) >= rule.power


def detectable(*, n: int, noise: float, rule: Rule) -> float:
    """The smallest true drop that fails on `n` documents with the rule's power; 1 where not even a total loss does."""
    return _root(lambda drop: fails(n=n, drop=drop, noise=noise, rule=rule) - rule.power, rule.tolerated, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `n` documents can and cannot certify, said before any of them is answered.

    noise: the discordance that a clean build is expected to have. passes: the probability that a clean build passes.
    needed: documents with which it passes with the rule's power. certifiable: the smallest margin that these documents
        certify with it. detectable: the smallest drop that they fail with it.
    unpaired: documents a side that TensorRT-LLM's rule asks for, to see a drop of the same margin.
    """

    n: int
    noise: float
    rule: Rule
    passes: float
    needed: int
    certifiable: float
    detectable: float
    unpaired: int

    @property
    def sentence(self) -> str:
        """The plan for a person."""
        can = "can" if self.passes >= self.rule.power else "cannot"
        return (
            f"{self.n} documents {can} certify a loss under {points(self.rule.margin)} where {self.noise:.1%} of "
            f"documents differ by chance: a clean build passes with probability {self.passes:.2f} "
            f"({self.needed} documents: {self.rule.power:.2f}); the smallest margin they certify is "
            f"{points(self.certifiable)}, the smallest loss they catch {points(self.detectable)}"
        )


def plan(*, n: int, noise: float, rule: Rule) -> Plan:
    """What `n` documents can say of a candidate.

    Raises:
        ValueError: If there is no document, or `noise` is no share.
    """
    if n < 1 or not 0.0 <= noise <= 1.0:
        raise ValueError(f"at least one document and a discordance between 0 and 1 are needed, not {n} and {noise}")

    def power(margin: float) -> float:
        return passes(n=n, drop=0.0, noise=noise, rule=replace(rule, margin=margin, tolerated=0.0))

    return Plan(
        n=n,
        noise=noise,
        rule=rule,
        passes=power(rule.margin),
        needed=needed(drop=0.0, noise=noise, rule=rule),
        certifiable=_root(lambda margin: power(margin) - rule.power, 1e-9, 1.0 - 1e-9),
        detectable=detectable(n=n, noise=noise, rule=rule),
        unpaired=unpaired_documents(rule.margin),
    )


# For comparison: the rule of TensorRT-LLM, which takes two runs on the same documents for independent ones. Source: its
# tests/integration/defs/accuracy/accuracy_core.py: sigma 50 points, alpha 0.05, beta 0.2.


def unpaired_threshold(n: int) -> float:
    """The drop from which on TensorRT-LLM's rule fails `n` documents."""
    return -_NORMAL.inv_cdf(0.05) * math.sqrt(2 * 0.5**2 / n)


def unpaired_documents(margin: float) -> int:
    """How many documents a side that rule asks for, to see a drop of `margin`."""
    return math.ceil(2 * (0.5 * (_NORMAL.inv_cdf(0.05) + _NORMAL.inv_cdf(0.2)) / margin) ** 2)


def points(share: float) -> str:
    """A share in words: 0.02 is '2 points'."""
    number = f"{100 * share:.3g}"
    return f"{number} point{'' if number == '1' else 's'}"


def _ratio(value: float, deviation: float) -> float:
    if deviation > 0.0:
        return value / deviation
    return math.copysign(math.inf, value) if value else 0.0


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function reaches 0 between `low` and `high`; `high` where it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) >= 0.0 else (middle, high)
    return high
