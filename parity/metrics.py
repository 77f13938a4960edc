"""What a golden remembers of its answers as numbers: small, comparable, recomputable from the recording.

One function a kind of metric, one row a metric. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.evals import TaskRun
from parity.noise import Noise
from parity.recording import Completion, FinishReason, Recording
from parity.stats import student_t_quantile

DISTANCE = "KL divergence from the arbiter"
_ENOUGH_RUNS = 8
_DIGITS = 6
"""Significant digits kept: beyond them sums differ between machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number with its unit, on how many independent units (prompts) it rests."""

    value: float
    unit: str
    n: int

    def equals(self, other: Metric) -> bool:
        """The same up to the last digit that is kept."""
        return (self.unit, self.n) == (other.unit, other.n) and same(self.value, other.value)


def kept(value: float) -> float:
    """The value with the digits that are kept."""
    return float(f"{value:.{_DIGITS}g}")


def same(left: float, right: float) -> bool:
    """Equal up to the last digit that is kept: what two machines may differ by. NaN equals nothing."""
    return math.isclose(left, right, rel_tol=2 * 10.0 ** (1 - _DIGITS), abs_tol=1e-12)


def of_answers(answers: Recording) -> dict[str, Metric]:
    """How long the answers are, how they end, how probable the engine finds them; by metric name, sorted."""
    completions = answers.completions
    n = len(completions)
    tokens = [len(c.token_ids) for c in completions]
    found = {
        "answer tokens": Metric(value=float(sum(tokens)), unit="tokens", n=n),
        "answers": Metric(value=float(n), unit="prompts", n=n),
        "mean answer length": _metric(sum(tokens) / max(n, 1), "tokens", n),
        "share that ends by itself": _metric(
            sum(c.finish_reason is FinishReason.STOP for c in completions) / max(n, 1), "of prompts", n
        ),
    }
    scored = [c for c in completions if c.logprobs is not None and len(c.logprobs)]
    if scored:
        found["negative log-likelihood"] = _metric(_nll(scored), "nats a token", len(scored))
    return dict(sorted(found.items()))


def of_noise(noise: Noise | None) -> dict[str, Metric]:
    """How far the engine is from its arbiter, by metric name; empty where nothing was measured."""
    if noise is None or noise.steps is None:
        return {}
    steps, n = noise.steps, len(noise.steps.prompt_ids)
    return {
        DISTANCE: _metric(float(steps.kl_nats.mean()), "nats a token", n),
        "changed choices against the arbiter": _metric(float(steps.flipped.mean()), "of tokens", n),
        "margin shift against the arbiter": _metric(noise.measured_nats, "nats", n),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How much a metric varied over accepted runs: mean and standard deviation of n of them."""

    n: int
    mean: float
    deviation: float


def spread(values: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Of each metric that at least two runs have."""
    return {
        name: Spread(n=len(found), mean=float(np.mean(found)), deviation=float(np.std(found, ddof=1)))
        for name, found in values.items()
        if len(found) > 1
    }


def learned_ratio(values: Sequence[float]) -> float | None:
    """How far the ratio of two accepted runs' values goes by itself, from the spread of at least eight of them.

    A one-sided 0.999 prediction limit of the difference of two logarithms, held between 1.05 and 1.5: eight equal runs
    are no proof that there is no spread, and no history may excuse everything. None where the history is too short.
    """
    if len(values) < _ENOUGH_RUNS or min(values) <= 0.0:
        return None
    deviation = float(np.std(np.log(values), ddof=1))
    limit = math.exp(student_t_quantile(0.999, len(values) - 1) * math.sqrt(2.0) * deviation)
    return float(f"{min(max(limit, 1.05), 1.5):.{_DIGITS}g}")


def of_tasks(runs: Sequence[TaskRun]) -> dict[str, Metric]:
    """The mean of each task's judged metric over its documents, under its first filter; by metric name."""
    found = {}
    for run in runs:
        first = [s.metrics[run.metric] for s in run.samples if s.filter == run.samples[0].filter]
        found[f"{run.metric} on {run.task}"] = _metric(sum(first) / len(first), "mean of documents", len(first))
    return found


def _metric(value: float, unit: str, n: int) -> Metric:
    return Metric(value=kept(value), unit=unit, n=n)


def _nll(completions: list[Completion]) -> float:
    chosen = [np.frombuffer(c.logprobs.chosen, np.float32) for c in completions if c.logprobs is not None]
    return -float(np.concatenate(chosen).astype(np.float64).mean())
