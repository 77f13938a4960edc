"""What one host has measured of a target under one profile: days of an accepted engine, and runs of one with itself.

Days are a golden: a later run is held against them (`parity.regression.against_history`), and say how much starts vary.
Runs of an engine with itself (A/A) say whether the host may judge at all. Both hold only for the hardware and the plan
of requests that they were measured with. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from parity.checks.performance import Metrics, Pair
from parity.errors import IncomparableError, RecordingError
from parity.fingerprint import Scalar
from parity.losses import Spread, losses, pooled, spread_of_pairs, spread_of_starts
from parity.service_metrics import DEFINITIONS

SCHEMA = 1
_DAYS = 64
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """Starts of the accepted engine, measured together."""

    at: str
    engine: str
    by: str
    reason: str
    starts: tuple[Metrics, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfRun:
    """An engine beside itself: both sides of each pair."""

    at: str
    engine: str
    pairs: tuple[tuple[Metrics, Metrics], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """hardware: what a run must share to be held against it. plan_sha256: exactly what was sent."""

    target: str
    profile: str
    plan_sha256: str
    hardware: Mapping[str, Scalar]
    days: tuple[Day, ...] = ()
    self_runs: tuple[SelfRun, ...] = ()

    def is_alike(self, other: History) -> bool:
        """Whether both are of the same hardware, under the same requests."""
        return (self.plan_sha256, self.hardware) == (other.plan_sha256, other.hardware)

    def require_alike(self, other: History, where: str) -> None:
        """Refuse another host or other requests.

        Raises:
            IncomparableError: Naming the first fact that differs, with both values.
        """
        ours = {"profile": self.profile, "plan": self.plan_sha256[:12], **self.hardware}
        theirs = {"profile": other.profile, "plan": other.plan_sha256[:12], **other.hardware}
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                raise IncomparableError(
                    f"{where} was measured with {name} {ours.get(name)!r}, this run with {theirs.get(name)!r}: times "
                    "of the one say nothing about the other; measure both sides here"
                )

    def with_day(self, day: Day) -> History:
        """One more; the oldest of more than 64 goes."""
        return replace(self, days=(*self.days, day)[-_DAYS:])

    def with_self_run(self, run: SelfRun) -> History:
        """One more."""
        return replace(self, self_runs=(*self.self_runs, run)[-_DAYS:])

    def days_of(self, metric: str) -> list[list[float]]:
        """The metric's values, start by start, of each day that has it in every start."""
        days = [[start[metric] for start in day.starts if metric in start] for day in self.days]
        return [values for values, day in zip(days, self.days, strict=True) if len(values) == len(day.starts)]

    def spread(self, metric: str) -> Spread | None:
        """How much a pair of this metric spreads on this host; None where nothing says."""
        direction, found = DEFINITIONS[metric].direction, []
        for run in self.self_runs:
            if len(run.pairs) > 1 and all(metric in side for pair in run.pairs for side in pair):
                values = losses([a[metric] for a, _ in run.pairs], [b[metric] for _, b in run.pairs], direction)
                found.append(spread_of_pairs(values, f"{run.engine} with itself, {run.at[:10]}"))
        days = [day for day in self.days_of(metric) if len(day) > 1]
        if days:
            found.append(spread_of_starts(days, f"starts of {len(days)} accepted days"))
        return pooled(found)


def spreads(histories: Sequence[History], metrics: Sequence[str]) -> dict[str, Spread]:
    """What several histories of one host say of these metrics' pairs, by id."""
    known = {name: [s for h in histories if (s := h.spread(name)) is not None] for name in metrics}
    return {name: found for name, parts in known.items() if (found := pooled(parts)) is not None}


def self_run(at: str, engine: str, pairs: Sequence[Pair]) -> SelfRun:
    """An engine's pairs with itself, with the digits that are kept."""
    return SelfRun(at=at, engine=engine, pairs=tuple((_kept(p.reference), _kept(p.candidate)) for p in pairs))


def day(at: str, engine: str, *, by: str, reason: str, starts: Sequence[Metrics]) -> Day:
    """Starts that were measured together, with the digits that are kept."""
    return Day(at=at, engine=engine, by=by, reason=reason, starts=tuple(map(_kept, starts)))


def render(history: History) -> str:
    """As text to be reviewed: a line for each start and each pair."""
    head = {"schema": SCHEMA, **{k: v for k, v in asdict(history).items() if k not in ("days", "self_runs")}}
    body = json.dumps(head, indent=1, sort_keys=True, ensure_ascii=False)[:-2]
    days = [_lines(asdict(found), "starts") for found in history.days]
    runs = [_lines(asdict(found), "pairs") for found in history.self_runs]
    return f'{body},\n "days": [{",".join(days)}],\n "self_runs": [{",".join(runs)}]\n}}\n'


def parse(text: str, *, where: str) -> History:
    """Read what `render` wrote.

    Raises:
        RecordingError: If it is truncated, of a newer schema, or something else.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        schema = data.pop("schema")
        if schema != SCHEMA:
            raise RecordingError(f"{where} has schema {schema!r}, this parity reads {SCHEMA}; upgrade engine-parity")
        days = tuple(Day(**{**found, "starts": tuple(map(_numbers, found["starts"]))}) for found in data.pop("days"))
        runs = tuple(
            SelfRun(**{**found, "pairs": tuple((_numbers(a), _numbers(b)) for a, b in found["pairs"])})
            for found in data.pop("self_runs")
        )
        return History(**data, days=days, self_runs=runs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(
            f"{where} is damaged ({error}); restore it from git, or measure and accept anew"
        ) from error


def _kept(metrics: Metrics) -> dict[str, float]:
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in metrics.items()}


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, dict) or not all(isinstance(v, (int, float)) for v in metrics.values()):
        raise TypeError("metrics must be a table of numbers")
    return {str(name): float(value) for name, value in metrics.items()}


def _lines(found: Mapping[str, Any], key: str) -> str:
    items = ",\n   ".join(json.dumps(item, sort_keys=True) for item in found[key])
    head = json.dumps({k: v for k, v in found.items() if k != key}, ensure_ascii=False)[:-1]
    return f'\n  {head}, "{key}": [\n   {items}\n  ]}}'
