"""Is the candidate slower? Decided by starts of the engine, never by requests.

Requests of one start share its luck (memory layout, clocks, neighbours), so thousands of them are one observation: a
test on requests alarms on correct engines in a sixth to a third of runs where it promises one in a hundred. A start
gives one value of a metric. Reference and candidate are started in turn (ABBA), and a pair of neighbours gives one
difference of logarithms, the loss, positive where the candidate is worse, whichever way is better for the metric.

    AB    losses of pairs, looked at after each of them (Wald's SPRT) with a spread known from history, or a paired t
          test after a fixed number where there is none. What fails is confirmed on fresh pairs by their own spread.
    G     a day against a golden's history of days (prediction limit): raises suspicion, gates from five days on.
    A/A   the same engine on both sides: may this host judge at all? Its spread is the history of the next run.

    PASS           a loss of `margin` or more is ruled out
    FAIL           a loss beyond `tolerated` is shown, twice
    INCONCLUSIVE   neither; what would have been seen, and how many more pairs would decide, is part of the answer

Sources, simulated error rates and planned numbers: docs/checks/performance.md. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from statistics import NormalDist, median

import numpy as np

from parity.losses import (
    ENOUGH_DEGREES,
    LEAST_SPREAD,
    MOST,
    Floats,
    Rule,
    Spread,
    as_share,
    badness,
    by_t,
    estimate,
    needed,
    seen,
    smallest,
    spread_of_pairs,
    thresholds,
)
from parity.service_metrics import while_measured
from parity.stats import student_t_quantile
from parity.timings import LoadRun
from parity.verdict import Outcome

GATING_DAYS = 5
"""Days of a golden's history below which it decides nothing: a limit from four deviations is wider than most losses."""
MOST_THROTTLED = 0.05
"""Of a start's samples: more than a moment."""
MOST_CLOCK_DRIFT = 0.03
"""Between the median clocks of two starts: beyond it a clock explains most of a margin."""

_NORMAL = NormalDist()
_LEAST_CONFIRMING = 4
_CONFIRMS = 0.98
"""The probability that a flagged loss is confirmed."""
_SURE_LOWER = 0.05


# Stage AB -------------------------------------------------------------------------------------------------------------


class Step(str, Enum):
    """What a decision still wants to be measured."""

    NOTHING = "nothing"
    PAIRS = "pairs"
    CONFIRMATION = "fresh pairs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was measured says of one metric; losses as shares.

    flagged: the first pairs failed, or the golden's history raises suspicion; no verdict by itself.
    step, wanted: how many pairs of which kind are to be measured next.
    n: pairs, or days of history, that `loss` and `interval` rest on.
    interval: of the true loss. It passes when all of it is under the margin; all of it over what is tolerated is a
        flag, and a failure if the pairs are the fresh ones. None where nothing is known of the spread.
    detectable: the true loss that would have been flagged with the rule's power.
    more: how many more would probably decide if the loss stays as it is; None where it is decided.
    sigma: the spread of a pair (of a day) that was judged with.
    evidence: after each pair, what the sequential test knew; empty for the others.
    """

    outcome: Outcome
    flagged: bool
    step: Step
    wanted: int
    n: int
    loss: float
    interval: tuple[float, float] | None
    detectable: float | None
    more: int | None
    sigma: float
    evidence: tuple[float, ...]
    sentence: str


def decide(values: Floats, fresh: Floats, *, spread: Spread | None, rule: Rule) -> Decision:
    """Judge the losses of pairs, float64 [P], as if one had looked after each; what comes after a decision is not used.

    spread: from history; with fewer than `ENOUGH_DEGREES` it is not used. fresh: losses of pairs that were measured to
    confirm what the others flagged, float64 [F], in a list of their own.

    Raises:
        ValueError: If there is no pair.
    """
    if not len(values):
        raise ValueError("no pair was measured")
    if spread is not None and spread.degrees >= ENOUGH_DEGREES:
        first = _sequential(values[: rule.most], spread, rule)
    else:
        first = _fixed(values[: rule.unknown], rule)
    return (_confirmed(first, values[: first.n], fresh, rule) if first.flagged else first).told(rule)


def next_step(decisions: Sequence[Decision]) -> tuple[Step, int]:
    """What to measure next for all metrics of a run, and how many pairs.

    A flag is confirmed at once, and a confirmed one ends the run: nothing that the others say could undo it.
    """
    if any(decision.outcome is Outcome.FAIL for decision in decisions):
        return Step.NOTHING, 0
    for step in (Step.CONFIRMATION, Step.PAIRS):
        wanted = [decision.wanted for decision in decisions if decision.step is step]
        if wanted:
            return step, max(wanted)
    return Step.NOTHING, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A decision on the scale it was made on, differences of logarithms."""

    n: int
    mean: float
    how: str
    word: str = "on"
    unit: str = "pairs"
    outcome: Outcome = Outcome.INCONCLUSIVE
    flagged: bool = False
    step: Step = Step.NOTHING
    wanted: int = 0
    interval: tuple[float, float] | None = None
    detectable: float | None = None
    more: int | None = None
    sigma: float = 0.0
    evidence: tuple[float, ...] = ()

    def told(self, rule: Rule) -> Decision:
        loss = as_share(self.mean, rule.direction)
        text = f"a {'loss' if loss >= 0 else 'gain'} of {abs(loss):.2%} {self.word} {self.n} {self.unit}"
        interval = detectable = None
        if self.interval is not None:
            interval = as_share(self.interval[0], rule.direction), as_share(self.interval[1], rule.direction)
            text += f" (loss between {interval[0]:.2%} and {interval[1]:.2%})"
        text += f"; {self.how}"
        if self.detectable is not None:
            detectable = as_share(self.detectable, rule.direction)
            text += f"; a loss of {detectable:.2%} would have been flagged with probability {rule.power:g}"
        if self.more is not None:
            text += f"; {_about(self.more)} more {self.unit} would decide if the loss stays as it is"
        return Decision(
            outcome=self.outcome,
            flagged=self.flagged,
            step=self.step,
            wanted=self.wanted,
            n=self.n,
            loss=loss,
            interval=interval,
            detectable=detectable,
            more=self.more,
            sigma=self.sigma,
            evidence=self.evidence,
            sentence=text,
        )


def _beyond(n: int, enough: int) -> int:
    return max(1, enough - n) if enough < MOST else MOST


def _about(more: int | None) -> str:
    return f"about {more}" if more is not None and more < MOST else f"{MOST} or"


def _sequential(values: Floats, spread: Spread, rule: Rule) -> _Found:
    """Wald's SPRT of a loss of `tolerated` against one of `margin`, with a known spread.

    The interval holds all losses l for which the same test, moved to l, would not have decided: of a true loss its
    upper end is too low with probability at most `alpha_pass`, its lower end too high with at most `alpha_fail`,
    whenever one looks.
    """
    tolerated, margin = rule.bounds
    width, middle, sigma = margin - tolerated, (margin + tolerated) / 2, spread.cautious
    up, down = thresholds(rule)
    evidence = np.cumsum(values - middle) * width / sigma**2
    decided = np.flatnonzero((evidence >= up) | (evidence <= down))
    decided = decided[decided >= rule.least - 1]
    n = int(decided[0]) + 1 if len(decided) else len(values)
    known, mean, per_pair = float(evidence[n - 1]), float(values[:n].mean()), sigma**2 / (n * width)
    found = _Found(
        n=n,
        mean=mean,
        how=f"looking after each pair, with a spread of {spread.sigma:.2%} a pair ({spread.source}, "
        f"{spread.degrees} degrees of freedom), taken as {sigma:.2%}",
        interval=(mean - width / 2 - up * per_pair, mean + width / 2 - down * per_pair),
        detectable=middle + _NORMAL.inv_cdf(rule.power) * sigma / math.sqrt(n) + up * per_pair,
        sigma=sigma,
        evidence=tuple(evidence[:n].tolist()),
    )
    if len(decided):
        return replace(found, flagged=True) if known >= up else replace(found, outcome=Outcome.PASS)
    drift = known / n
    gap = ((up if drift > 0.0 else down) - known) / drift if drift else math.inf
    wanted = max(1, rule.least - n) if n < rule.most else 0
    more = max(1, math.ceil(min(gap, MOST)))
    return replace(found, more=more, wanted=wanted, step=Step.PAIRS if wanted else Step.NOTHING)


def _fixed(values: Floats, rule: Rule) -> _Found:
    """A paired t test with the pairs' own spread, after `rule.unknown` pairs and not before.

    It passes at half of `alpha_pass`, since fresh pairs may pass what it flags.
    """
    n, missing = len(values), rule.unknown - len(values)
    if missing:
        return _Found(
            n=n,
            mean=float(values.mean()),
            how=f"no history says how much pairs spread, so {rule.unknown} are looked at, once",
            step=Step.PAIRS,
            wanted=missing,
            more=missing,
        )
    tolerated, margin = rule.bounds
    mean, error = estimate(values)
    low, high = _limits(mean, error, n, rule.alpha_fail, rule.alpha_pass / 2)
    sigma = error * math.sqrt(n)
    found = _Found(
        n=n,
        mean=mean,
        how=f"one look, with their own spread of {sigma:.2%} a pair",
        interval=(low, high),
        detectable=tolerated + seen(n, rule.alpha_fail, rule.power) * error,
        sigma=sigma,
    )
    if high < margin:
        return replace(found, outcome=Outcome.PASS)
    if low > tolerated:
        return replace(found, flagged=True)
    return replace(found, more=_beyond(n, by_t(lambda k: sigma / math.sqrt(k), mean, rule)))


def _confirmed(first: _Found, values: Floats, fresh: Floats, rule: Rule) -> _Found:
    """What a paired t test of fresh pairs makes of a flag by the losses `values`; it looks once.

    As many pairs as show, with probability `_CONFIRMS`, the loss that the first ones have shown at least, or the
    margin; where the first ones spread more than the history says, by their spread. A loss that is real and shown to
    be under the margin passes, at half of `alpha_pass`: the first pairs had a chance.
    """
    tolerated, margin = rule.bounds
    shown = max(margin, 0.0 if first.interval is None else first.interval[0]) - tolerated
    sigma = max(first.sigma, float(values.std(ddof=1)))
    pairs = smallest(lambda n: shown * math.sqrt(n) / sigma >= seen(n, rule.confirming, _CONFIRMS))
    pairs = max(_LEAST_CONFIRMING, min(pairs, rule.most))
    missing = pairs - len(fresh)
    if missing > 0:
        how = f"{first.how}; flagged, which {pairs} fresh pairs have to confirm"
        return replace(first, how=how, step=Step.CONFIRMATION, wanted=missing)
    mean, error = estimate(fresh[:pairs])
    low, high = _limits(mean, error, pairs, rule.confirming, rule.alpha_pass / 2)
    outcome = Outcome.PASS if high < margin else Outcome.FAIL if low > tolerated else Outcome.INCONCLUSIVE
    said = {
        Outcome.PASS: "which rule out the margin",
        Outcome.FAIL: "which confirm it",
        Outcome.INCONCLUSIVE: "which do not confirm it",
    }[outcome]
    sigma, before = error * math.sqrt(pairs), as_share(first.mean, rule.direction)
    return _Found(
        n=pairs,
        unit="fresh pairs",
        mean=mean,
        how=f"{said}, with their own spread of {sigma:.2%} a pair; the {first.n} pairs before them had {before:.2%}",
        outcome=outcome,
        flagged=True,
        interval=(low, high),
        detectable=tolerated + seen(pairs, rule.confirming, rule.power) * error,
        more=_beyond(pairs, by_t(lambda k: sigma / math.sqrt(k), mean, rule))
        if outcome is Outcome.INCONCLUSIVE
        else None,
        sigma=sigma,
        evidence=first.evidence,
    )


def _limits(mean: float, error: float, n: int, below: float, above: float) -> tuple[float, float]:
    """Student's: the true value lies below the first with the rate `below`, above the second with `above`."""
    t_below, t_above = (student_t_quantile(1.0 - rate, n - 1) for rate in (below, above))
    return mean - t_below * error, mean + t_above * error


# Stage G --------------------------------------------------------------------------------------------------------------


def against_history(days: Sequence[Sequence[float]], today: Sequence[float], rule: Rule) -> Decision:
    """Judge today's starts against those of a golden's days: one metric, as the same host measured it.

    A day's value is the mean logarithm of its starts. Flagged: a prediction limit at `alpha_fail` is exceeded, or the
    loss is at least the margin; with fewer than `GATING_DAYS` nothing more is said.

    Raises:
        ValueError: If there is no day, a value is not positive, or today has fewer starts than one of the days, so
            that its mean would vary more than theirs.
    """
    most = max((len(day) for day in days), default=0)
    if not days or not min(len(day) for day in days) or len(today) < most:
        raise ValueError(
            f"today needs as many starts as a day of its history has, {max(1, most)}, and has {len(today)}"
        )
    means = np.array([badness(day, rule.direction).mean() for day in days])
    mean, m = float(badness(today, rule.direction).mean() - means.mean()), len(days)
    tolerated, margin = rule.bounds
    found = _Found(
        n=m,
        mean=mean,
        word="against",
        unit="days",
        how="one day does not say how much days vary",
        flagged=mean >= margin,
    )
    if m > 1:
        sigma = max(LEAST_SPREAD, float(means.std(ddof=1)))
        error = sigma * math.sqrt(1.0 + 1.0 / m)
        low, high = _limits(mean, error, m, rule.alpha_fail, rule.alpha_pass)
        found = replace(
            found,
            how=f"days vary by {sigma:.2%}",
            flagged=found.flagged or low > tolerated,
            interval=(low, high),
            detectable=tolerated + seen(m, rule.alpha_fail, rule.power) * error,
            sigma=sigma,
        )
        if m >= GATING_DAYS and high < margin:
            return replace(found, outcome=Outcome.PASS, flagged=False).told(rule)
        if m >= GATING_DAYS and low > tolerated:
            return replace(found, outcome=Outcome.FAIL).told(rule)
        enough = by_t(lambda days: sigma * math.sqrt(1.0 + 1.0 / days), mean, rule)
        found = replace(found, more=_beyond(m, max(GATING_DAYS, enough)))
    how = f"{found.how}; {'raises suspicion, ' if found.flagged else ''}which pairs with the old engine decide"
    if m < GATING_DAYS:
        how += f": fewer than {GATING_DAYS} days never do"
    return replace(found, how=how, step=Step.PAIRS, wanted=rule.least).told(rule)


# The host -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """May this host judge? PASS: it may. FAIL: it may not. INCONCLUSIVE: `more` pairs would probably say.

    bias: how much worse one side was than the other, the same engine on both; as a share, as `interval`.
    spread: the history for the next comparison of this metric on this host.
    """

    outcome: Outcome
    bias: float
    interval: tuple[float, float]
    spread: Spread
    more: int | None
    sentence: str


def control(values: Floats, rule: Rule, source: str) -> Control:
    """Judge a host by the losses of pairs of one engine with itself, float64 [P].

    It fails with a bias that is shown to be over a tenth of the margin, or if its pairs spread so much that a
    comparison would not end within `rule.most` of them. It passes if the bias is shown to be under the loss at which a
    comparison turns, midway between `tolerated` and `margin`, and comparisons end in time.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    spread, n, (tolerated, margin) = spread_of_pairs(values, source), len(values), rule.bounds
    mean, error = estimate(values)
    low, high = _limits(mean, error, n, rule.alpha_pass, rule.alpha_pass)
    turn = (tolerated + margin) / 2
    biased = _limits(abs(mean), error, n, rule.alpha_fail / 2, rule.alpha_pass)[0] > margin / 10
    wide = needed(sigma=spread.limit(_SURE_LOWER), rule=rule) > rule.most
    pairs = needed(sigma=spread.cautious, rule=rule)
    fit = max(-low, high) < turn and pairs <= rule.most and spread.degrees >= ENOUGH_DEGREES
    outcome = Outcome.FAIL if biased or wide else Outcome.PASS if fit else Outcome.INCONCLUSIVE
    more = None
    if outcome is Outcome.INCONCLUSIVE:
        enough = smallest(
            lambda k: (
                k > ENOUGH_DEGREES
                and turn * math.sqrt(k / n) >= seen(k, rule.alpha_pass, rule.power) * error
                and needed(sigma=replace(spread, degrees=k - 1).cautious, rule=rule) <= rule.most
            )
        )
        more = _beyond(n, enough)
    said = {
        Outcome.PASS: "this host may judge",
        Outcome.FAIL: f"this host may not judge: {'its sides are not alike' if biased else 'its starts vary too much'}",
        Outcome.INCONCLUSIVE: f"whether this host may judge, {_about(more)} more pairs would say",
    }[outcome]
    bias, interval = as_share(mean, rule.direction), (as_share(low, rule.direction), as_share(high, rule.direction))
    return Control(
        outcome=outcome,
        bias=bias,
        interval=interval,
        spread=spread,
        more=more,
        sentence=f"{said}; the same engine on both sides: bias {bias:.2%} (between {interval[0]:.2%} and "
        f"{interval[1]:.2%}), spread {spread.sigma:.2%} on {n} pairs, with which {pairs} pairs decide a margin of "
        f"{rule.margin:.0%} ({rule.most} at most)",
    )


def disturbances(runs: Sequence[LoadRun]) -> tuple[str, ...]:
    """Why the runs of a comparison say more about a GPU's state than about engines; empty if nothing does.

    Reads the host's samples while it measured, and `gpu.processes` in the facts: how many processes were on the GPU
    when the engine had not yet started.
    """
    found, clocks = [], {}
    for place, run in enumerate(runs, 1):
        name = f"start {place} of {len(runs)}"
        samples = while_measured(run)
        throttled = [sample.gpu_throttled for sample in samples if sample.gpu_throttled is not None]
        if throttled and (share := sum(throttled) / len(throttled)) > MOST_THROTTLED:
            found.append(
                f"the GPU was throttled in {share:.0%} of the samples of {name}; cool it, or lock its clocks lower"
            )
        if isinstance(others := run.facts.get("gpu.processes"), int) and others > 0:
            found.append(f"{others} other processes were on the GPU in {name}; measure on one that nobody shares")
        clock = [sample.gpu_sm_clock_mhz for sample in samples if sample.gpu_sm_clock_mhz is not None]
        if clock:
            clocks[name] = median(clock)
    slow, fast = (extreme(clocks, key=clocks.__getitem__, default=None) for extreme in (min, max))
    if slow and fast and clocks[slow] < (1.0 - MOST_CLOCK_DRIFT) * clocks[fast]:
        found.append(
            f"the GPU ran at {clocks[slow]:.0f} MHz in {slow} and at {clocks[fast]:.0f} MHz in {fast}; lock its clocks"
        )
    return tuple(found)


def withheld(decision: Decision, reasons: Sequence[str]) -> Decision:
    """The decision as it is, or an INCONCLUSIVE one with the reasons if there are any."""
    if not reasons:
        return decision
    sentence = f"not judged: {'; '.join(reasons)}; measured was {decision.sentence}"
    return replace(decision, outcome=Outcome.INCONCLUSIVE, step=Step.NOTHING, wanted=0, sentence=sentence)
