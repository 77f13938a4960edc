"""How fast either engine serves when it is busy: output tokens/s of each start, and what a token saves in seconds.

Seconds of a server for a token are what traffic costs, and unlike tokens/s they add up. A start of the engine is the
unit. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parity import service_metrics
from parity.errors import ConfigError, IncomparableError
from parity.losses import LEAST_SPREAD, Floats
from parity.stats import student_t_quantile
from parity.timings import LoadRun

CONFIDENCE = 0.9
"""Of every interval; an answer that holds at one of its ends is wrong with probability 0.05."""

_HARDWARE = ("host.cpu", "host.cores", "gpu.0.name", "gpu.count")
_SAME_LENGTH = 0.01
_DRAWS, _SEED = 1000, 7
_LEAST = 0.01
"""No engine is a hundred times as fast as measured, however wide an interval of two starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One engine. label: for people. output_tokens_per_s: of each start."""

    label: str
    output_tokens_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Both engines under the same requests on the same machine.

    profile: the traffic they met. output_tokens_per_request: mean of an answer.
    paired: start n of one was measured beside start n of the other.
    notes: what makes the numbers doubtful.
    """

    reference: Speed
    candidate: Speed
    profile: str
    paired: bool
    output_tokens_per_request: float
    notes: tuple[str, ...] = ()


def speeds(reference: Sequence[LoadRun], candidate: Sequence[LoadRun], *, paired: bool) -> Speeds:
    """The speeds of either engine's starts.

    Raises:
        IncomparableError: If they did not answer the same requests on the same machine.
        ConfigError: If the runs do not show how fast an engine can be, since requests came slower than it answers.
        EngineError: If no request of a start was answered.
    """
    runs = [*reference, *candidate]
    metrics = [service_metrics.measure(run) for run in runs]
    if any("output_tokens_per_s" not in found for found in metrics):
        raise IncomparableError("a start has answers whose tokens nobody counted; ask the servers for their usage")
    first = runs[0]
    for run in runs[1:]:
        for what, ours, theirs in _circumstances(first, run):
            if ours != theirs:
                raise IncomparableError(
                    f"the starts are not of one comparison: {what} is {ours!r} in one and {theirs!r} in another; "
                    "measure both engines with one `parity bench`"
                )
    _require_capacity(runs)
    lengths = [found["output_tokens_per_s"] / found["requests_per_s"] for found in metrics]
    ours, theirs = float(np.mean(lengths[: len(reference)])), float(np.mean(lengths[len(reference) :]))
    if abs(ours - theirs) > _SAME_LENGTH * ours:
        raise IncomparableError(
            f"an answer has {ours:.4g} output tokens in the reference and {theirs:.4g} in the candidate, so a token is "
            "not the same work; measure both with the same numbers of tokens"
        )
    per_s = [found["output_tokens_per_s"] for found in metrics]
    return Speeds(
        reference=Speed(
            label=_label(reference[0], "the reference"), output_tokens_per_s=tuple(per_s[: len(reference)])
        ),
        candidate=Speed(
            label=_label(candidate[0], "the candidate"), output_tokens_per_s=tuple(per_s[len(reference) :])
        ),
        profile=first.profile,
        paired=paired,
        output_tokens_per_request=ours,
        notes=_notes(reference, candidate),
    )


def _circumstances(one: LoadRun, other: LoadRun) -> list[tuple[str, object, object]]:
    facts = [(key, one.facts.get(key), other.facts.get(key)) for key in ("plan.sha256", *_HARDWARE)]
    return [("profile", one.profile, other.profile), ("seed", one.seed, other.seed), *facts]


def _require_capacity(runs: Sequence[LoadRun]) -> None:
    """In an open loop all starts meet requests at the same moments; below saturation those moments are its speed."""
    schedules = {tuple(r.scheduled_s for r in run.requests) for run in runs}
    moments = next(iter(schedules))
    if len(runs) < 2 or len(schedules) > 1 or max(moments) == min(moments):
        return
    shares = [max(moments) / run.measured_s for run in runs]
    if max(shares) > 0.5:
        raise ConfigError(
            f"profile {runs[0].profile!r} sent requests at moments of its own for {max(shares):.0%} of the time, so "
            "tokens/s is the rate of arrivals and not what an engine can do; measure with an offline or a closed-loop "
            "profile"
        )


def _label(run: LoadRun, otherwise: str) -> str:
    return str(run.facts.get("engine", otherwise))


def _notes(reference: Sequence[LoadRun], candidate: Sequence[LoadRun]) -> tuple[str, ...]:
    found = []
    for name, runs in (("reference", reference), ("candidate", candidate)):
        failed = sum(r.failure is not None for run in runs for r in run.requests)
        if failed:
            asked = sum(len(run.requests) for run in runs)
            found.append(f"{failed} of {asked} requests failed in the {name}; they cost time and count as no tokens")
        warned = [run for run in runs if run.warnings]
        if warned:
            found.append(
                f"{len(warned)} of {len(runs)} starts of the {name} were doubted, first: {warned[0].warnings[0]}"
            )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """How far the means may be off: standard errors in seconds a token, of `degrees` degrees of freedom.

    correlation: of the errors of what is saved and of the reference.
    """

    saved_s: float
    reference_s: float
    correlation: float
    degrees: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds of a server for an output token, means over starts; `saved_s` is reference less candidate.

    doubt: None where starts are too few to tell. method: where it comes from.
    """

    reference_s: float
    candidate_s: float
    saved_s: float
    doubt: Doubt | None
    method: str

    @property
    def interval_s(self) -> tuple[float, float] | None:
        """Of what is saved."""
        if self.doubt is None:
            return None
        reach = student_t_quantile((1.0 + CONFIDENCE) / 2, self.doubt.degrees) * self.doubt.saved_s
        return self.saved_s - reach, self.saved_s + reach

    def plausible(self) -> Floats:
        """Means of reference and candidate that the starts allow, float64 [N, 2], above 0: draws of a bivariate t."""
        if self.doubt is None:
            return np.array([(self.reference_s, self.candidate_s)])
        found, rng = self.doubt, np.random.default_rng(_SEED)
        first, second = rng.standard_normal((2, _DRAWS))
        wide = np.sqrt(found.degrees / rng.chisquare(found.degrees, _DRAWS))
        mixed = found.correlation * first + math.sqrt(1.0 - found.correlation**2) * second
        ours = np.maximum(self.reference_s + wide * found.reference_s * first, _LEAST * self.reference_s)
        saved = self.saved_s + wide * found.saved_s * mixed
        return np.column_stack((ours, np.maximum(ours - saved, _LEAST * self.candidate_s)))


def rates(measured: Speeds) -> Rates:
    """Seconds a token; errors by Student's t of paired differences, or Welch's where starts are not paired.

    Raises:
        ConfigError: If a speed is not above 0, or paired sides have different numbers of starts.
    """
    ours, theirs = (np.array(side.output_tokens_per_s, np.float64) for side in (measured.reference, measured.candidate))
    if not len(ours) or not len(theirs) or not all((x > 0.0).all() and np.isfinite(x).all() for x in (ours, theirs)):
        raise ConfigError("both engines need at least one start with a speed above 0")
    if measured.paired and len(ours) != len(theirs):
        raise ConfigError(f"pairs need both sides: {len(ours)} starts of the reference, {len(theirs)} of the candidate")
    ours, theirs = 1.0 / ours, 1.0 / theirs
    doubt, method = None, "none: one start does not say how much starts vary"
    if min(len(ours), len(theirs)) > 1:
        doubt = (_of_pairs if measured.paired else _of_sides)(ours, theirs)
        starts = f"{len(ours)} pairs of" if measured.paired else f"{len(ours)} and {len(theirs)}"
        method = f"{'Student' if measured.paired else 'Welch'}'s t of {starts} starts"
    return Rates(
        reference_s=float(ours.mean()),
        candidate_s=float(theirs.mean()),
        saved_s=float(ours.mean() - theirs.mean()),
        doubt=doubt,
        method=method,
    )


def _of_pairs(ours: Floats, theirs: Floats) -> Doubt:
    saved, n = ours - theirs, len(ours)
    floor = LEAST_SPREAD * float(ours.mean())
    spreads = float(saved.std(ddof=1)), float(ours.std(ddof=1))
    shared = float(((ours - ours.mean()) * (saved - saved.mean())).sum()) / (n - 1)
    wide = [max(floor, spread) for spread in spreads]
    return Doubt(
        saved_s=wide[0] / math.sqrt(n),
        reference_s=wide[1] / math.sqrt(n),
        correlation=max(-1.0, min(1.0, shared / (wide[0] * wide[1]))),
        degrees=n - 1,
    )


def _of_sides(ours: Floats, theirs: Floats) -> Doubt:
    floor = LEAST_SPREAD * float(ours.mean())
    parts = [max(floor, float(x.std(ddof=1))) ** 2 / len(x) for x in (ours, theirs)]
    lost = [part**2 / (len(x) - 1) for part, x in zip(parts, (ours, theirs), strict=True)]
    return Doubt(
        saved_s=math.sqrt(sum(parts)),
        reference_s=math.sqrt(parts[0]),
        correlation=math.sqrt(parts[0] / sum(parts)),
        degrees=max(1, math.floor(sum(parts) ** 2 / sum(lost))),
    )
