"""Performance: is the candidate slower than the reference, by more than the margin?

Both engines were started in turn on one machine and met the same requests at the same moments, so starts are compared
in pairs. Each gated metric is judged by its own pairs; they share the run's rate of false alarms. What is not gated is
shown. Requests that failed are a finding of their own.

Rules: `parity.regression`. Sources, error rates and how many pairs decide what: docs/checks/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from parity import regression
from parity.errors import ConfigError
from parity.losses import TAIL_MARGIN, Floats, Rule, Spread, as_share, estimate, losses, not_gated
from parity.regression import Decision, Step
from parity.service_metrics import DEFINITIONS, Definition, Direction, measure
from parity.stats import binomial_tail, student_t_quantile
from parity.timings import LoadRun
from parity.traffic import Slo
from parity.verdict import Finding, Outcome, Verdict, worst

Metrics: TypeAlias = "Mapping[str, float]"
"""Of one start of an engine, by id; see `parity.service_metrics`."""

_USUAL = Rule(direction=Direction.LOWER)
_FAILED = 0.001
_SHOWN = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source of each: docs/checks/performance.md, "Limits".

    margin: a loss so large must not pass, as a share; ttft_margin, tail_margin: the same for times to the first token
        and for 99th percentiles. tolerated: a loss so small must not fail.
    alpha_fail: the probability of any flag in a run of an engine with itself, over all gated metrics; confirming: that
        fresh pairs then confirm one. alpha_pass: that a loss of the margin passes. power: of planned numbers of pairs.
    least, most, unknown: pairs at the first and the last look, and where no history says how much pairs spread.
    """

    margin: float = _USUAL.margin
    ttft_margin: float = 0.10
    tail_margin: float = TAIL_MARGIN
    tolerated: float = _USUAL.tolerated
    alpha_fail: float = _USUAL.alpha_fail
    confirming: float = _USUAL.confirming
    alpha_pass: float = _USUAL.alpha_pass
    power: float = _USUAL.power
    least: int = _USUAL.least
    most: int = _USUAL.most
    unknown: int = _USUAL.unknown

    def rule(self, metric: Definition, gated: int) -> Rule:
        """The rule for one of `gated` metrics.

        Raises:
            ConfigError: If the numbers make no rule.
        """
        try:
            return Rule(
                direction=metric.direction,
                margin=self.margin_of(metric),
                tolerated=self.tolerated,
                alpha_fail=self.alpha_fail,
                confirming=self.confirming,
                alpha_pass=self.alpha_pass,
                power=self.power,
                least=int(self.least),
                most=int(self.most),
                unknown=int(self.unknown),
            ).among(gated)
        except ValueError as error:
            raise ConfigError(f"limits.performance: {error}") from error

    def margin_of(self, metric: Definition) -> float:
        """What a loss of this metric is held against."""
        if metric.id.endswith("_p99_s"):
            return self.tail_margin
        return self.ttft_margin if metric.id.startswith("ttft_") else self.margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two neighbouring starts: every metric of either side, and how many requests failed of how many."""

    reference: Metrics
    candidate: Metrics
    failed: tuple[int, int]
    requests: int

    @classmethod
    def of(cls, reference: LoadRun, candidate: LoadRun, slo: Slo) -> Pair:
        """Measure two neighbouring starts.

        Raises:
            EngineError: If no request of one of them was answered completely.
        """
        return cls(
            reference=measure(reference, slo),
            candidate=measure(candidate, slo),
            failed=(_failed(reference), _failed(candidate)),
            requests=len(reference.requests),
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One comparison.

    pairs: in the order they were measured. fresh: pairs that were measured to confirm a flag.
    gated: ids of the metrics that decide. spreads: what is known of a metric's pairs on this host, by id.
    disturbances: why the machine was not fit to judge; empty if it was. warnings: what makes numbers doubtful.
    """

    profile: str
    pairs: Sequence[Pair]
    fresh: Sequence[Pair]
    gated: Sequence[str]
    spreads: Mapping[str, Spread]
    disturbances: Sequence[str]
    warnings: Sequence[str] = ()


def decisions(measured: Measured, limits: Limits) -> dict[str, Decision]:
    """What the pairs say of each gated metric, by id.

    Raises:
        ConfigError: If a metric is unknown or may not decide.
    """
    found = {}
    for name in measured.gated:
        metric = DEFINITIONS.get(name)
        if metric is None:
            raise ConfigError(
                f"profile {measured.profile!r} gates {name!r}, which is no metric; see docs/performance.md"
            )
        reason = not_gated(metric, margin=limits.margin_of(metric), requests=measured.pairs[0].requests)
        if reason is not None:
            raise ConfigError(f"profile {measured.profile!r} cannot gate on it: {reason}")
        found[name] = regression.withheld(
            regression.decide(
                losses_of(measured.pairs, metric),
                losses_of(measured.fresh, metric),
                spread=measured.spreads.get(name),
                rule=limits.rule(metric, len(measured.gated)),
            ),
            measured.disturbances,
        )
    return found


def next_step(measured: Measured, limits: Limits) -> tuple[Step, int]:
    """What is to be measured next, and how many pairs of it."""
    return regression.next_step(list(decisions(measured, limits).values()))


def judge(measured: Measured, *, limits: Limits, label_reference: str, label_candidate: str) -> Verdict:
    """Judge a candidate's performance against a reference's.

    Raises:
        ConfigError: If a metric is unknown or may not decide.
    """
    found = decisions(measured, limits)
    gated = [_finding(DEFINITIONS[name], decision, measured, limits) for name, decision in found.items()]
    failures = _failures(measured)
    outcome = worst([f.outcome for f in (*gated, *failures)])
    return Verdict(
        check="performance",
        reference=label_reference,
        candidate=label_candidate,
        outcome=outcome,
        headline=_headline(gated, failures, outcome, measured),
        findings=(*gated, *failures),
        causes=(),
        changed=(),
        warnings=(*measured.disturbances, *_few(measured.warnings)),
        basis=tuple(_basis(measured, limits)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of both sides: geometric means over starts, and the loss with a 90 % interval of its own spread.

    reference, candidate: in the metric's unit. loss, interval: as shares, positive where the candidate is worse; None
    where neither way is better or a value is 0, the interval also where there is one pair.
    """

    metric: Definition
    reference: float
    candidate: float
    loss: float | None
    interval: tuple[float, float] | None


def rows(pairs: Sequence[Pair]) -> list[Row]:
    """Every metric that all starts have, in the order of their definitions."""
    found = []
    for name, metric in DEFINITIONS.items():
        sides = [[getattr(pair, side).get(name) for pair in pairs] for side in ("reference", "candidate")]
        if any(value is None for side in sides for value in side) or not pairs:
            continue
        ours, theirs = (_mean(side) for side in sides)
        loss = interval = None
        if metric.direction is not Direction.NEITHER and min(map(min, sides)) > 0.0:
            x = losses_of(pairs, metric)
            loss = as_share(float(x.mean()), metric.direction)
            if len(x) > 1:
                mean, error = estimate(x)
                reach = student_t_quantile((1.0 + _SHOWN) / 2, len(x) - 1) * error
                interval = as_share(mean - reach, metric.direction), as_share(mean + reach, metric.direction)
        found.append(Row(metric=metric, reference=ours, candidate=theirs, loss=loss, interval=interval))
    return found


def _mean(values: Sequence[float]) -> float:
    if min(values) <= 0.0:
        return float(np.mean(values))
    return math.exp(float(np.log(values).mean()))


def _failed(run: LoadRun) -> int:
    return sum(request.failure is not None for request in run.requests)


def losses_of(pairs: Sequence[Pair], metric: Definition) -> Floats:
    """The losses of pairs in one metric, float64 [P].

    Raises:
        ConfigError: If a start has no value of it, or one that has no loss.
    """
    try:
        return losses(
            [p.reference[metric.id] for p in pairs], [p.candidate[metric.id] for p in pairs], metric.direction
        )
    except KeyError:
        raise ConfigError(f"{metric.id} was not measured in every start; gate on another metric") from None
    except ValueError as error:
        raise ConfigError(f"{metric.id} cannot be judged: {error}") from error


def _finding(metric: Definition, decision: Decision, measured: Measured, limits: Limits) -> Finding:
    pairs = [*measured.pairs, *measured.fresh]
    ours, theirs = (_mean([getattr(p, side)[metric.id] for p in pairs]) for side in ("reference", "candidate"))
    margin = limits.margin_of(metric)
    return Finding(
        metric=metric.id,
        outcome=decision.outcome,
        sentence=f"{ours:.4g} {metric.unit} in the reference, {theirs:.4g} in the candidate: {decision.sentence}",
        unit="%",
        reference=ours,
        candidate=theirs,
        delta=100 * decision.loss,
        interval=None if decision.interval is None else (100 * decision.interval[0], 100 * decision.interval[1]),
        limit=f"passes where a loss of {margin:.0%} is ruled out at {limits.alpha_pass:g}; fails where one beyond "
        f"{limits.tolerated:.0%} is shown at {limits.alpha_fail / len(measured.gated):.2g} and again on fresh pairs",
        n=decision.n,
        evidence=(metric.text,),
        margin=100 * margin,
    )


def _failures(measured: Measured) -> list[Finding]:
    """Requests without a complete answer: more of the candidate's than chance makes fail."""
    pairs = [*measured.pairs, *measured.fresh]
    ours, theirs = (sum(pair.failed[side] for pair in pairs) for side in (0, 1))
    asked = sum(pair.requests for pair in pairs)
    if not ours + theirs:
        return []
    p = binomial_tail(ours + theirs, 0.5, theirs)
    return [
        Finding(
            metric="failed requests",
            outcome=Outcome.FAIL if p <= _FAILED else Outcome.PASS,
            sentence=f"{theirs} of {asked} requests failed in the candidate, {ours} in the reference; so uneven by "
            f"chance with probability {p:.2g}",
            unit="requests",
            reference=float(ours),
            candidate=float(theirs),
            delta=float(theirs - ours),
            interval=None,
            limit=f"fails where chance would be under {_FAILED:g} (sign test)",
            n=asked,
            evidence=(),
        )
    ]


def _headline(gated: Sequence[Finding], failures: Sequence[Finding], outcome: Outcome, measured: Measured) -> str:
    said = ", ".join(
        f"{f.metric} {'lost' if (f.delta or 0) >= 0 else 'gained'} {abs(f.delta or 0):.1f} %" for f in gated
    )
    n = len(measured.pairs) + len(measured.fresh)
    text = f"{said} on {n} pair{'s' * (n != 1)} of starts ({measured.profile})"
    if outcome is Outcome.PASS:
        return text
    return f"{text}; decided by {', '.join(f.metric for f in (*gated, *failures) if f.outcome is outcome)}"


def _few(warnings: Sequence[str]) -> tuple[str, ...]:
    """The first, and how many more: each start says it in numbers of its own."""
    more = f"; {len(warnings) - 1} more starts said the like" if len(warnings) > 1 else ""
    return (f"{warnings[0]}{more}",) if warnings else ()


def _basis(measured: Measured, limits: Limits) -> Iterator[str]:
    yield (
        f"any false alarm of the {len(measured.gated)} gated metrics has probability at most {limits.alpha_fail:g} "
        f"before and {limits.alpha_fail * limits.confirming:.2g} after fresh pairs; the unit is a start of the engine, "
        f"not one of its {measured.pairs[0].requests} requests"
    )
    for name in measured.gated:
        if (spread := measured.spreads.get(name)) is not None:
            yield f"{name}: pairs of this host spread by {spread.sigma:.2%} ({spread.degrees} degrees; {spread.source})"
    if not measured.spreads:
        yield (
            "nothing is known of how much pairs spread on this host; `parity aa` measures it, and fewer pairs then "
            "decide"
        )
