"""What either engine costs a month, from which traffic on the candidate pays, and what would flip that.

Serving costs time: seconds of a server for each output token, which is what a start of an engine measures. The change
costs work: once, and again for each change of the model. Uncertainty is that of the seconds which a token saves, from
the spread of starts; prices and hours are the user's own and taken as they are. The break-even traffic is the fixed
cost divided by what a token saves, so its interval is the saving's interval turned over (Fieller's interval where the
numerator is known); it reaches to infinity where the starts do not show that anything is saved. What steps with whole
servers has an interval by simulation with a fixed seed.

Formulas, coverage and a worked example: docs/decide.md. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from parity.errors import ConfigError
from parity.serving_rates import CONFIDENCE, Rates

HOURS_A_MONTH = 730.0
SECONDS_A_DAY = 86400.0
_ROUNDING = 1e-12
_FARTHEST = 100.0
"""A flip that takes an input to more than so many times its value, or to less than such a part, is none."""


class Machines(str, Enum):
    """How servers are paid."""

    WHOLE = "whole"
    """Whole servers, day and night, as many as the traffic needs."""
    FRACTIONAL = "fractional"
    """Hours as they are used: a cluster that others fill, or serverless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The user's numbers. Prices are in one currency, whichever; hours and prices may be 0.

    gpus_per_server: what the recordings were measured on (on a CPU 1: the price is then a server's).
    output_tokens_per_day: the least and the most that is expected.
    utilisation: the share of its measured speed that a server gives on average; the rest is nights and headroom.
    build_hours_per_change: of one server that builds the candidate for a changed model; the reference's beside it.
    engineer_hours_per_change: a person's, for the candidate; the reference's beside it.
    one_time_engineer_hours: to bring the candidate into service.
    horizon_months: how long the candidate is expected to stay; the one-time cost is spread over it.
    """

    gpu_hour_price: float
    output_tokens_per_day: tuple[float, float]
    utilisation: float
    changes_per_month: float
    build_hours_per_change: float
    engineer_hours_per_change: float
    engineer_hour_price: float
    one_time_engineer_hours: float
    horizon_months: float
    gpus_per_server: int = 1
    machines: Machines = Machines.FRACTIONAL
    reference_build_hours_per_change: float = 0.0
    reference_engineer_hours_per_change: float = 0.0

    def __post_init__(self) -> None:
        """Raises ConfigError if a number makes no cost."""
        least, most = self.output_tokens_per_day
        for name in NUMBERS:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0.0:
                raise ConfigError(f"{name} must be a number of at least 0, not {value}")
        if not (math.isfinite(most) and 0.0 <= least <= most):
            raise ConfigError(f"output_tokens_per_day must be least and most, 0 <= {least:g} <= {most:g} does not hold")
        if not 0.0 < self.utilisation <= 1.0:
            raise ConfigError(f"utilisation must be a share above 0 and at most 1, not {self.utilisation:g}")
        for name in ("gpu_hour_price", "horizon_months", "gpus_per_server"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name):g}")

    @property
    def server_month(self) -> float:
        """The price of one server for a month."""
        return HOURS_A_MONTH * self.gpus_per_server * self.gpu_hour_price

    @property
    def once(self) -> float:
        """The price of bringing the candidate into service."""
        return self.one_time_engineer_hours * self.engineer_hour_price

    @property
    def kept(self) -> tuple[float, float]:
        """What keeping the reference and the candidate costs a month, without serving."""
        server_hour = self.gpus_per_server * self.gpu_hour_price
        sides = (
            (self.reference_build_hours_per_change, self.reference_engineer_hours_per_change),
            (self.build_hours_per_change, self.engineer_hours_per_change),
        )
        ours, theirs = (
            self.changes_per_month * (build * server_hour + work * self.engineer_hour_price) for build, work in sides
        )
        return ours, theirs

    @property
    def extra(self) -> float:
        """What the candidate costs a month beyond the reference, whatever the traffic; may be negative."""
        ours, theirs = self.kept
        return theirs - ours + self.once / self.horizon_months

    @property
    def middle(self) -> float:
        """Output tokens a day in the middle of the expected range."""
        return sum(self.output_tokens_per_day) / 2

    def serving(self, tokens_per_day: float, s_per_token: float) -> float:
        """What serving so much traffic costs a month at so many seconds a token."""
        busy = tokens_per_day * s_per_token / (SECONDS_A_DAY * self.utilisation)
        return self.server_month * (busy if self.machines is Machines.FRACTIONAL else math.ceil(busy))


NUMBERS = tuple(f.name for f in fields(Costs) if f.name not in ("output_tokens_per_day", "machines"))
"""The fields of `Costs` that are one number."""


# What it costs --------------------------------------------------------------------------------------------------------


def advantage(costs: Costs, tokens_per_day: float, reference_s: float, candidate_s: float) -> float:
    """What the candidate saves a month at this traffic, all in all; negative where it costs more."""
    saved = costs.serving(tokens_per_day, reference_s) - costs.serving(tokens_per_day, candidate_s)
    return saved - costs.extra


def break_even(costs: Costs, reference_s: float, candidate_s: float) -> float:
    """Output tokens a day, 0 to infinity.

    Where the candidate's extra cost is not negative it pays above; infinity: at no traffic. Where it is negative, the
    candidate is cheaper to keep and pays below; infinity: at any. Of whole servers the saving goes up and down with
    each server that one side needs first: here is the traffic from which on, or up to which, it never turns again.
    """
    extra = costs.extra
    full = SECONDS_A_DAY * costs.utilisation  # seconds in which a server works, a day
    faster, slower = (candidate_s, reference_s) if extra >= 0.0 else (reference_s, candidate_s)
    if slower <= faster:
        return math.inf
    if costs.machines is Machines.FRACTIONAL:
        return abs(extra) / costs.server_month * full / (slower - faster)
    servers, narrow = abs(extra) / costs.server_month, slower - faster
    if extra >= 0.0:
        # n servers less pay. With m + 1 of the fast ones, n are surely saved once n + m of the slow ones are full.
        n = math.floor(servers) + 1
        m = max(1, math.ceil(n * faster / narrow * (1.0 - _ROUNDING))) - 1
    else:
        # n servers more eat up what is cheaper to keep: the first traffic at which so many can be needed.
        n = math.ceil(servers)
        m = max(0, math.floor((n * faster - slower) / narrow * (1.0 + _ROUNDING)) + 1)
    return (n + m) * full / slower


def interval_of(costs: Costs, found: Rates, of: Callable[[float, float], float]) -> tuple[float, float] | None:
    """Where a number of both engines' seconds a token lies, as far as the starts can tell; None where they cannot.

    Hours in fractions depend on what a token saves alone, so its interval gives theirs exactly. Whole servers depend on
    either engine, in steps: quantiles over what is plausible (`Rates.plausible`).
    """
    if found.interval_s is None:
        return None
    if costs.machines is Machines.FRACTIONAL:
        low, high = sorted(of(found.reference_s, found.reference_s - saved) for saved in found.interval_s)
        return low, high
    values = sorted(of(ours, theirs) for ours, theirs in found.plausible().tolist())
    tail = math.floor(len(values) * (1.0 - CONFIDENCE) / 2)
    return values[tail], values[-1 - tail]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """The traffic at which both engines cost the same, in output tokens a day; infinity: none.

    above: the candidate pays above it; otherwise below it. interval: None where starts are too few.
    """

    tokens_per_day: float
    interval: tuple[float, float] | None
    above: bool


def break_even_of(costs: Costs, found: Rates) -> BreakEven:
    """With the interval that the starts leave."""
    at = break_even(costs, found.reference_s, found.candidate_s)
    interval = interval_of(costs, found, lambda ours, theirs: break_even(costs, ours, theirs))
    return BreakEven(tokens_per_day=at, interval=interval, above=costs.extra >= 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaid:
    """Months after which the one-time cost is earned back at one traffic; infinity: never."""

    tokens_per_day: float
    months: float
    interval: tuple[float, float] | None


def repaid(costs: Costs, found: Rates, tokens_per_day: float) -> Repaid:
    """When the one-time cost is earned back at this traffic."""
    running = replace(costs, one_time_engineer_hours=0.0)

    def months(reference_s: float, candidate_s: float) -> float:
        saved = advantage(running, tokens_per_day, reference_s, candidate_s)
        return math.inf if saved <= 0.0 else costs.once / saved

    return Repaid(
        tokens_per_day=tokens_per_day,
        months=months(found.reference_s, found.candidate_s),
        interval=interval_of(costs, found, months),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What either engine costs a month at one traffic, the one-time cost spread over the horizon included."""

    tokens_per_day: float
    reference: float
    candidate: float
    advantage_interval: tuple[float, float] | None


def row(costs: Costs, found: Rates, tokens_per_day: float) -> Row:
    """What both cost at this traffic."""
    ours, theirs = costs.kept
    return Row(
        tokens_per_day=tokens_per_day,
        reference=ours + costs.serving(tokens_per_day, found.reference_s),
        candidate=theirs + costs.once / costs.horizon_months + costs.serving(tokens_per_day, found.candidate_s),
        advantage_interval=interval_of(costs, found, lambda r, c: advantage(costs, tokens_per_day, r, c)),
    )


# What would flip the answer -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """At which value of one input, all others as they are, the engine that pays in the middle of the traffic changes.

    now, at: in the unit of the name. at: None where no value within a hundred times or a hundredth does.
    """

    name: str
    now: float
    at: float | None

    @property
    def distance(self) -> float:
        """How many times larger or smaller it has to be, as a logarithm; infinity where none flips."""
        return abs(math.log(self.at / self.now)) if self.at and self.now else math.inf


def flips(costs: Costs, found: Rates) -> tuple[Flip, ...]:
    """One for each input, the one that needs the smallest change of its value first."""

    def of(changed: Costs, tokens: float, s_per_token: float) -> float:
        return advantage(changed, tokens, found.reference_s, s_per_token)

    middle, theirs = costs.middle, found.candidate_s
    stepping: dict[str, tuple[float, Callable[[float], float], float]] = {
        "output_tokens_per_day": (middle, lambda x: of(costs, x, theirs), math.inf),
        "candidate_output_tokens_per_s": (1.0 / theirs, lambda x: of(costs, middle, 1.0 / x), math.inf),
        "utilisation": (costs.utilisation, lambda x: of(replace(costs, utilisation=x), middle, theirs), 1.0),
    }
    made = [Flip(name=name, now=x, at=_nearest(value, x, most)) for name, (x, value, most) in stepping.items()]
    for name in NUMBERS:
        if name in ("utilisation", "gpus_per_server"):  # the GPUs flip where their price does
            continue
        now = float(getattr(costs, name))
        # Linear in each, in the horizon's reciprocal.
        power = -1.0 if name == "horizon_months" else 1.0
        there = now + max(1.0, now)
        base = of(costs, middle, theirs)
        slope = (of(_with(costs, name, there), middle, theirs) - base) / (there**power - now**power)
        x = now**power - base / slope if slope else -1.0
        at = x**power if x > 0.0 else None
        if at is not None and now and not 1.0 / _FARTHEST <= at / now <= _FARTHEST:
            at = None
        made.append(Flip(name=name, now=now, at=at))
    return tuple(sorted(made, key=lambda flip: (flip.distance, flip.at is None)))


def _with(costs: Costs, name: str, value: float) -> Costs:
    change: dict[str, Any] = {name: value}
    return replace(costs, **change)


def _nearest(value: Callable[[float], float], now: float, most: float) -> float | None:
    """The value nearest to `now`, by its ratio, at which the sign turns; steps are looked for one per cent apart."""
    pays, steps = value(now) > 0.0, math.ceil(math.log(_FARTHEST) / math.log(1.01))
    for step in range(1, steps + 1) if now > 0.0 else ():
        for way in (1, -1):
            near, far = now * 1.01 ** (way * (step - 1)), min(most, now * 1.01 ** (way * step))
            if (value(far) > 0.0) is pays:
                continue
            for _ in range(50):
                between = math.sqrt(near * far)
                near, far = (between, far) if (value(between) > 0.0) is pays else (near, between)
            return far
    return None
