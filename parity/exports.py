"""Measured metrics as the files that dashboards read: github-action-benchmark, Bencher, and CSV for Grafana and Otava.

One table of series, a metric of one side with a value for each start, is written in every form. Names hold the target,
the profile, the side and the metric, never an engine's version: a dashboard draws one line through an upgrade. Pure.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity import service_metrics
from parity.fingerprint import Scalar
from parity.service_metrics import DEFINITIONS, Definition, Direction
from parity.timings import LoadRun
from parity.traffic import Profile

BIGGER, SMALLER = "bigger-is-better.json", "smaller-is-better.json"
BENCHER, TIDY = "bencher.json", "metrics.csv"

_FACTS = ("engine", "model", "environment.", "import.", "host.", "gpu.", "plan.", "client.version", "client.asks")
_HARDWARE = ("gpu.0.name", "host.cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of one side.

    label: the engine, for people. values: one for each start, in the metric's unit. at: when each of them began.
    related: medians over starts of the other statistics of the same samples, by id; empty for a metric without samples.
    facts: what all starts have in common, of engine, hardware, requests and client.
    """

    target: str
    profile: str
    side: str
    label: str
    metric: Definition
    values: tuple[float, ...]
    at: tuple[str, ...]
    related: Mapping[str, float]
    facts: Mapping[str, Scalar]

    @property
    def name(self) -> str:
        """What a dashboard knows it by; the same for every version of an engine."""
        return f"{self.target}/{self.profile}/{self.side}/{self.metric.id}"

    @property
    def median(self) -> float:
        """Over starts."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation between starts; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def table(
    runs: Mapping[str, Sequence[LoadRun]], profile: Profile, *, target: str, labels: Mapping[str, str]
) -> tuple[Series, ...]:
    """Every metric that all starts of a side have, side by side in the order of `runs`.

    runs, labels: by side.

    Raises:
        EngineError: If no request of a start was answered completely.
    """
    found = []
    for side, starts in runs.items():
        measured = [service_metrics.measure(run, profile.slo) for run in starts]
        common = {name: [m[name] for m in measured] for name in DEFINITIONS if all(name in m for m in measured)}
        facts = _in_common(starts)
        for name, values in common.items() if starts else ():
            metric = DEFINITIONS[name]
            siblings = [n for n in common if metric.samples and DEFINITIONS[n].samples == metric.samples and n != name]
            found.append(
                Series(
                    target=target,
                    profile=profile.name,
                    side=side,
                    label=labels.get(side, side),
                    metric=metric,
                    values=tuple(values),
                    at=tuple(run.began_at for run in starts),
                    related={n: statistics.median(common[n]) for n in siblings},
                    facts=facts,
                )
            )
    return tuple(found)


def export(
    runs: Mapping[str, Sequence[LoadRun]], profile: Profile, *, target: str, labels: Mapping[str, str]
) -> dict[str, str]:
    """The files of one comparison, name to text; docs/performance_exports.md says what to do with each.

    Raises:
        EngineError: If no request of a start was answered completely.
    """
    series = table(runs, profile, target=target, labels=labels)
    wide = {f"starts-{side}.csv": wide_csv([s for s in series if s.side == side]) for side in runs}
    return {
        BIGGER: action_json(series, Direction.HIGHER),
        SMALLER: action_json(series, Direction.LOWER),
        BENCHER: bencher_json(series),
        TIDY: tidy_csv(series),
        **{name: text for name, text in wide.items() if text},
    }


def action_json(series: Iterable[Series], direction: Direction) -> str:
    """The metrics of one direction for github-action-benchmark: `customBiggerIsBetter` or `customSmallerIsBetter`.

    Medians over starts; `range` is their standard deviation. A metric of which neither way is better is in neither.
    """
    entries: list[dict[str, Any]] = []
    for one in series:
        if one.metric.direction is direction:
            spread = {} if one.spread is None else {"range": f"± {one.spread:.4g}"}
            extra = [f"{one.label}, {len(one.values)} start{'s' * (len(one.values) != 1)}", one.metric.text]
            extra += [f"{name}: {value}" for name, value in one.facts.items() if name in (*_HARDWARE, "plan.sha256")]
            entries.append(
                {
                    "name": one.name,
                    "unit": one.metric.unit,
                    "value": one.median,
                    **spread,
                    "extra": "\n".join(extra),
                }
            )
    return _json(entries)


def bencher_json(series: Iterable[Series]) -> str:
    """Bencher Metric Format: a benchmark for each side, a measure for each metric.

    `value` is the median over starts; `lower_value` and `upper_value` are the least and the greatest start.
    """
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    for one in series:
        measured = {"value": one.median}
        if len(one.values) > 1:
            measured |= {"lower_value": min(one.values), "upper_value": max(one.values)}
        benchmark = benchmarks.setdefault(f"{one.target}/{one.profile}/{one.side}", {})
        benchmark[one.metric.id.replace("_", "-")] = measured
    return _json(benchmarks)


def tidy_csv(series: Iterable[Series]) -> str:
    """A row for each start and metric, time first. Rows of later comparisons can be appended."""
    head = ["time", "target", "profile", "side", "engine", "environment", "hardware", "plan", "metric", "value", "unit",
            "direction"]  # fmt: skip
    rows = [
        [
            *(at, one.target, one.profile, one.side, one.label, one.facts.get("environment.digest")),
            *(_hardware(one.facts), str(one.facts.get("plan.sha256", ""))[:12]),
            *(one.metric.id, repr(value), one.metric.unit, one.metric.direction.value),
        ]
        for one in series
        for at, value in zip(one.at, one.values, strict=True)
    ]
    return _csv(head, rows)


def wide_csv(series: Sequence[Series]) -> str:
    """A row for each start of one side, a column for each metric, time first: what Otava reads. Empty for no series."""
    if not series:
        return ""
    first = series[0]
    rows = [
        [at, first.label, first.facts.get("environment.digest"), *(repr(one.values[start]) for one in series)]
        for start, at in enumerate(first.at)
    ]
    return _csv(["time", "engine", "environment", *(one.metric.id for one in series)], rows)


def _in_common(runs: Sequence[LoadRun]) -> dict[str, Scalar]:
    """Facts that say what was measured, where every start has the same one."""
    if not runs:
        return {}
    return {
        name: value
        for name, value in runs[0].facts.items()
        if name.startswith(_FACTS) and all(run.facts.get(name) == value for run in runs)
    }


def _hardware(facts: Mapping[str, Scalar]) -> str:
    return next((str(facts[name]) for name in _HARDWARE if facts.get(name)), "")


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
