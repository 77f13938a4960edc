"""Did a candidate lose accuracy? Judged while documents come in; the run stops as soon as the answer is certain.

Documents are drawn in a seeded order, answered in batches and given to a monitor, whose answer is as if it had looked
after every single document: how the batches were cut changes nothing. Two rules keep the promised error rates although
they look often:

    GroupSequential   `paired` at eight looks, each with a share of the error rates (alpha spending). Needs the number
                      of documents beforehand, and decides more often where there are not many.
    EProcess          two bets, one against "the drop is `margin` or more", one against "it is `tolerated` or less". A
                      bet that is fair or worse multiplies its stake by 1 / alpha with probability at most alpha,
                      whenever one looks (Ville). Open-ended, and for weighted documents too.

Where the margins of the reference's choices are known, the documents with the smallest ones, which hold nearly all
benign flips, can be drawn more often than the others and weighted down by as much: the mean of weighted differences is
the same drop, with a fraction of the spread, and this does not depend on the margins telling anything.

Sources and simulated error rates: docs/checks/accuracy.md. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from parity.paired import Codes, Floats, Outcomes, Rule, needed
from parity.paired import outcome as answer
from parity.verdict import Outcome

OPEN_ENDED_FROM = 5
"""Times the documents that a clean build needs: with more, bets stop earlier, and small margins do not run out."""
LOW_MARGIN_SHARE = 0.1
LOW_MARGIN_DRAWS = 0.25
LOOKS = (0.03, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""Shares of all documents after which a group-sequential monitor looks."""

_NORMAL = NormalDist()
_STAKES = np.array([0.03, 0.06, 0.12, 0.25, 0.5, 0.9])
"""Shares of the capital that each bet risks; the best for a margin and a discordance d is about margin / d."""


# The order ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Draws:
    """In which order documents are answered, and what each counts.

    Shapes: documents: int64 [M], places in the list that was drawn from. weights: float64 [M], such that the mean over
    units of their summed weighted differences is the drop. units: int64 [M], rising by at most one: documents of one
    cluster follow each other and are one unit.
    """

    documents: Codes
    weights: Floats
    units: Codes

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def weighted(self) -> bool:
        """Whether documents of a small margin are drawn more often than others."""
        return int(self.units[-1]) + 1 == len(self) and bool((self.weights != 1.0).any())

    @property
    def largest(self) -> float:
        """The largest absolute value of a unit, where scores lie between 0 and 1."""
        return float(np.bincount(self.units, self.weights).max())


def draw(
    keys: Sequence[str],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    margins_nats: Sequence[float | None] | None = None,
) -> Draws:
    """Put documents into an order that depends on nothing but the seed and their names.

    With `margins_nats`, of the reference's answers, a quarter of the draws falls on the tenth of the documents with the
    smallest ones, until either kind is used up; a document without a margin is not one of them.

    Raises:
        ValueError: If two documents have one name, or both clusters and margins are given.
    """
    if len(set(keys)) != len(keys) or not keys:
        raise ValueError("every document needs a name of its own, to have a place of its own in the order")
    if clusters is not None and margins_nats is not None:
        raise ValueError("documents in clusters are not drawn by their margins")
    shuffled = sorted(range(len(keys)), key=lambda place: _uniform(seed, keys[place]))
    if margins_nats is not None:
        return _stratified(shuffled, margins_nats, seed)
    if clusters is None:
        return Draws(documents=np.array(shuffled), weights=np.ones(len(keys)), units=np.arange(len(keys)))
    together: dict[Hashable, list[int]] = {}
    for place in shuffled:
        together.setdefault(clusters[place], []).append(place)
    # By name, not by the order of first documents, in which large clusters would come first.
    order = sorted(together, key=lambda label: _uniform(seed, f"cluster {label}"))
    units = np.repeat(np.arange(len(order)), [len(together[label]) for label in order])
    return Draws(
        documents=np.array([place for label in order for place in together[label]]),
        weights=np.full(len(keys), len(order) / len(keys)),
        units=units,
    )


def _stratified(shuffled: Sequence[int], margins_nats: Sequence[float | None], seed: int) -> Draws:
    def margin(place: int) -> float:
        found = margins_nats[place]
        return math.inf if found is None else found

    small = set(sorted(shuffled, key=margin)[: round(LOW_MARGIN_SHARE * len(shuffled))])
    low, high = ([p for p in shuffled if (p in small) is wanted] for wanted in (True, False))
    share = len(low) / len(shuffled)
    weights, documents = [], []
    for step in range(len(shuffled)):
        is_low = _uniform(seed, f"draw {step}") < LOW_MARGIN_DRAWS
        if not (low if is_low else high):
            break
        documents.append((low if is_low else high).pop())
        weights.append(share / LOW_MARGIN_DRAWS if is_low else (1.0 - share) / (1.0 - LOW_MARGIN_DRAWS))
    return Draws(documents=np.array(documents), weights=np.array(weights), units=np.arange(len(documents)))


def _uniform(seed: int, name: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=8).digest()) / 2**64


# The rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a monitor says, and what of the documents it says it by.

    n: as the monitor's. drop: the mean of their weighted differences.
    interval: of the drop, valid although one looked often: its upper end is under the margin if and only if it passes.
    sentence: how often it looked, and how close it is.
    """

    outcome: Outcome
    n: int
    drop: float
    interval: tuple[float, float]
    sentence: str


class Monitor:
    """Judges documents as they come in. Once decided, what comes later changes nothing."""

    name: ClassVar[str]

    def __init__(self, draws: Draws, rule: Rule) -> None:
        self.draws = draws
        self.rule = rule
        self._differences = np.zeros(0)
        self._decided: tuple[Outcome, int] | None = None

    def update(self, differences: Floats) -> Outcome:
        """Add the reference's less the candidate's scores, float64 [B], of the next documents of the order.

        Raises:
            ValueError: If there are more of them than documents in the order, or one is not between -1 and 1.
        """
        if len(self._differences) + len(differences) > len(self.draws) or not (np.abs(differences) <= 1.0).all():
            raise ValueError(f"at most {len(self.draws)} differences, each from -1 to 1, belong to this order")
        self._differences = np.concatenate([self._differences, differences])
        if self._decided is None:
            self._decided = self._decide(self._values())
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """INCONCLUSIVE as long as nothing is certain."""
        return Outcome.INCONCLUSIVE if self._decided is None else self._decided[0]

    @property
    def n(self) -> int:
        """Documents up to the one that decided, or all so far whose unit is complete."""
        count = len(self._values()) if self._decided is None else self._decided[1]
        return int(np.searchsorted(self.draws.units, count))

    @property
    def state(self) -> State:
        """The answer with its numbers.

        Raises:
            ValueError: If no unit is complete.
        """
        values = self._values()
        if not len(values):
            raise ValueError("nothing was measured yet")
        if self._decided is not None:
            values = values[: self._decided[1]]
        interval, sentence = self._explain(values, self.n)
        return State(outcome=self.outcome, n=self.n, drop=float(values.mean()), interval=interval, sentence=sentence)

    def _values(self) -> Floats:
        """The complete units' values, float64 [U]; their expectation is the drop."""
        seen = len(self._differences)
        units = self.draws.units[: seen + 1]
        complete = int(units[-1]) + (seen == len(self.draws))
        values = np.bincount(units[:seen], self._differences * self.draws.weights[:seen], minlength=complete)
        return np.asarray(values[:complete])

    def _decide(self, values: Floats) -> tuple[Outcome, int] | None:
        """The first decision and after how many units it fell."""
        raise NotImplementedError

    def _explain(self, values: Floats, n: int) -> tuple[tuple[float, float], str]:
        raise NotImplementedError


class EProcess(Monitor):
    """Bets on every unit.

    With X the unit's value and s a stake, the capital is multiplied by 1 + s (margin - X), whose expectation is at most
    1 where the drop is `margin` or more; the mean over a grid of stakes is a bet as well. Sources: Ville 1939;
    Waudby-Smith and Ramdas, Journal of the Royal Statistical Society B 86 (2024) 1-27.
    """

    name = "e-process"

    def _decide(self, values: Floats) -> tuple[Outcome, int] | None:
        rule, largest = self.rule, self.draws.largest
        passing = _log_capital(values, rule.margin, largest) >= -math.log(rule.alpha_pass)
        failing = _log_capital(-values, -rule.tolerated, largest) >= -math.log(rule.alpha_fail)
        either = np.flatnonzero(passing | failing)
        if not len(either):
            return None
        return Outcome.PASS if passing[either[0]] else Outcome.FAIL, int(either[0]) + 1

    def _explain(self, values: Floats, n: int) -> tuple[tuple[float, float], str]:
        rule, largest = self.rule, self.draws.largest
        capitals = (
            math.exp(min(700.0, float(_log_capital(values, rule.margin, largest)[-1]))),
            math.exp(min(700.0, float(_log_capital(-values, -rule.tolerated, largest)[-1]))),
        )
        interval = -_bet_bound(-values, rule.alpha_pass, largest), _bet_bound(values, rule.alpha_pass, largest)
        return interval, (
            f"{self.name}, looking after each of {n} documents: capital {capitals[0]:.3g} against a loss of the margin "
            f"(passes at {1 / rule.alpha_pass:.3g}), {capitals[1]:.3g} against no more than is tolerated (fails at "
            f"{1 / rule.alpha_fail:.3g})"
        )


def _log_capital(values: Floats, null: float, largest: float) -> Floats:
    """After each value, the logarithm of what a stake of 1 has become against "the mean is `null` or more".

    Shapes: values: float64 [U], none over `largest` in size; the result: float64 [U].
    """
    stakes = _STAKES / (largest + max(0.0, -null))
    grown = np.log1p(stakes[:, None] * (null - values)).cumsum(axis=1)
    most = grown.max(axis=0)
    return np.asarray(most + np.log(np.exp(grown - most).mean(axis=0)))


def _bet_bound(values: Floats, alpha: float, largest: float) -> float:
    """The smallest mean against which the bets have won by now."""
    low, high = float(values.mean()), largest
    for _ in range(40):
        middle = (low + high) / 2
        won = _log_capital(values, middle, largest)[-1] >= -math.log(alpha)
        low, high = (low, middle) if won else (middle, high)
    return high


class GroupSequential(Monitor):
    """Looks after `LOOKS` of the documents; for documents of equal weight, or in clusters.

    Raises:
        ValueError: If documents of a small margin are drawn more often than others.
    """

    name = "group-sequential"

    def __init__(self, draws: Draws, rule: Rule) -> None:
        super().__init__(draws, rule)
        if draws.weighted:
            raise ValueError("weighted documents are judged by an e-process")
        units = int(draws.units[-1]) + 1
        self.looks = tuple(sorted({max(1, round(share * units)) for share in LOOKS}))
        shares = tuple(look / units for look in self.looks)
        self.rules = tuple(
            replace(rule, alpha_pass=at_pass, alpha_fail=at_fail)
            for at_pass, at_fail in zip(levels(rule.alpha_pass, shares), levels(rule.alpha_fail, shares), strict=True)
        )

    def _decide(self, values: Floats) -> tuple[Outcome, int] | None:
        for look, rule in zip(self.looks, self.rules, strict=True):
            if look > len(values):
                return None
            found = self._outcomes(look).estimate
            decided = answer(found.p_pass(rule.margin), found.p_fail(rule.tolerated), rule)
            if decided is not Outcome.INCONCLUSIVE:
                return decided, look
        return None

    def _explain(self, values: Floats, n: int) -> tuple[tuple[float, float], str]:
        done = sum(look <= len(values) for look in self.looks)
        looked = f"{self.name}, {done} of {len(self.looks)} looks, {n} of {len(self.draws)} documents"
        if not done:
            return (-1.0, 1.0), looked
        found, rule = self._outcomes(self.looks[done - 1]).estimate, self.rules[done - 1]
        return found.interval(rule.alpha_pass), (
            f"{looked}: p {found.p_pass(rule.margin):.2g} against a loss of the margin (passes at "
            f"{rule.alpha_pass:.2g} here), {found.p_fail(rule.tolerated):.2g} against no more than is tolerated (fails "
            f"at {rule.alpha_fail:.2g} here)"
        )

    def _outcomes(self, units: int) -> Outcomes:
        differences = self._differences[: int(np.searchsorted(self.draws.units, units))]
        return Outcomes(
            reference=np.maximum(differences, 0.0),
            candidate=np.maximum(-differences, 0.0),
            clusters=self.draws.units[: len(differences)],
        )


@lru_cache(maxsize=64)
def levels(alpha: float, shares: tuple[float, ...]) -> tuple[float, ...]:
    """At which rate to reject at each look, so that any rejection has probability `alpha` where the null holds.

    The rate spent by a look is `alpha` times the share of the documents seen (`shares`, rising, up to 1). Source: Lan
    and DeMets, Biometrika 70 (1983) 659-663; computed by the recursion of Armitage, McPherson and Rowe, Journal of the
    Royal Statistical Society A 132 (1969) 235-244, for a statistic that moves like a Brownian motion.
    """
    grid = np.linspace(-8.0, 8.0, 4001)
    step = grid[1] - grid[0]
    found, density, before = [], None, 0.0
    for share, spent in zip(shares, np.diff((0.0, *shares)) * alpha, strict=True):
        if density is None:
            density = np.exp(-(grid**2) / (2 * share)) / math.sqrt(2 * math.pi * share)
        else:
            width = share - before
            kernel = np.exp(-(grid**2) / (2 * width)) / math.sqrt(2 * math.pi * width)
            density = np.convolve(density, kernel, mode="same") * step
        # The rate above each point of the grid; the boundary lies where it is what may be spent.
        above = density[::-1].cumsum()[::-1] * step - density * step / 2
        bound = float(np.interp(-spent, -above, grid))
        density = np.where(grid < bound, density, 0.0)
        before = share
        found.append(_NORMAL.cdf(-bound / math.sqrt(share)))
    return tuple(found)


def monitor(
    keys: Sequence[str],
    *,
    rule: Rule,
    noise: float,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    margins_nats: Sequence[float | None] | None = None,
) -> Monitor:
    """The order and the rule that need the fewest documents, where a clean build has the discordance `noise`.

    Raises:
        ValueError: As `draw`.
    """
    if len(keys) <= OPEN_ENDED_FROM * needed(drop=0.0, noise=noise, rule=rule):
        return GroupSequential(draw(keys, seed=seed, clusters=clusters), rule)
    known = clusters is None and margins_nats is not None and any(margin is not None for margin in margins_nats)
    return EProcess(
        draw(keys, seed=seed, clusters=clusters, margins_nats=margins_nats if known else None),
        rule,
    )
