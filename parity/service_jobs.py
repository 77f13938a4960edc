"""What became of each request of a plan, and what makes the client's own word doubtful. Pure."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity.fingerprint import Scalar
from parity.service_answer import Answer
from parity.timings import Failure, RequestTiming

LATE_S = 0.002
"""A client that is later than this once in a hundred times is part of what it measures."""


@dataclass(slots=True, kw_only=True)
class Job:
    """One request and what became of it; moments are of the monotonic clock.

    prompt: its token ids as JSON, empty once they are sent. started_s: when the client began with it.
    """

    id: str
    at_s: float | None
    max_tokens: int
    prompt_tokens: int
    prompt: bytes
    scheduled_s: float = 0.0
    started_s: float = 0.0
    sent_s: float | None = None
    head_s: float | None = None
    ended_s: float = 0.0
    status: int | None = None
    answer: Answer | None = None
    failure: Failure | None = None
    detail: str = ""


def timing(job: Job, zero_s: float) -> RequestTiming:
    """The same on the clock that begins with the run, in whole microseconds."""

    def since(moment_s: float) -> float:
        return round(moment_s - zero_s, 6)

    answer = job.answer
    return RequestTiming(
        id=job.id,
        scheduled_s=since(job.scheduled_s),
        sent_s=None if job.sent_s is None else since(job.sent_s),
        first_byte_s=None if job.head_s is None else since(job.head_s),
        chunk_s=() if answer is None else tuple(map(since, answer.chunk_s)),
        chunk_tokens=None if answer is None or answer.chunk_tokens is None else tuple(answer.chunk_tokens),
        prompt_tokens=None if answer is None else answer.prompt_tokens,
        output_tokens=None if answer is None else answer.output_tokens,
        ended_s=since(job.ended_s),
        status=job.status,
        failure=job.failure,
        detail=job.detail,
    )


def lags(jobs: Sequence[Job], loop_lag_s: Sequence[float] | array[float]) -> dict[str, Scalar]:
    """Facts: how late requests were begun, and how late the event loop was."""
    lag_s = [job.started_s - job.scheduled_s for job in jobs]
    return {
        "client.lag_p50_s": _quantile(lag_s, 0.5),
        "client.lag_p99_s": _quantile(lag_s, 0.99),
        "client.loop_lag_p99_s": _quantile(loop_lag_s, 0.99),
    }


def doubts(jobs: Sequence[Job], facts: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each reason why the numbers may not be the engine's, or not of all requests."""
    at_once = len(jobs) > 1 and all(job.at_s == 0.0 for job in jobs)
    if facts["client.lag_p99_s"] > LATE_S and not at_once:  # nobody can send a whole batch at one moment
        yield (
            f"the client itself was the limit: one request in a hundred was sent more than "
            f"{1e3 * facts['client.lag_p99_s']:.1f} ms after it was due (at most {1e3 * LATE_S:g} ms is sound); give "
            "it a core of its own or ask less"
        )
    if facts["client.loop_lag_p99_s"] > LATE_S:
        yield (
            f"the client itself was the limit: one time in a hundred it read its clock more than "
            f"{1e3 * facts['client.loop_lag_p99_s']:.1f} ms late (at most {1e3 * LATE_S:g} ms is sound), and so late "
            "are its moments; give it a core of its own or ask less"
        )
    complete = [job.answer for job in jobs if job.failure is None and job.answer is not None]
    uncounted = sum(answer.output_tokens is None for answer in complete)
    if uncounted:
        yield (
            f"the server did not count the tokens of {uncounted} of {len(complete)} answers: nothing in tokens can be "
            "measured on them"
        )
    failures = Counter(job.failure for job in jobs if job.failure is not None)
    if failures:
        told = ", ".join(f"{count} {failure.value}" for failure, count in failures.most_common())
        first = next(job for job in jobs if job.failure is not None)
        yield f"{failures.total()} of {len(jobs)} requests failed ({told}); first {first.id}: {first.detail}"


def _quantile(values: Sequence[float] | array[float], share: float) -> float:
    if len(values) < 2:
        return round(max(values, default=0.0), 6)
    return round(statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1], 6)
