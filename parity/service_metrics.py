"""What a load run says of an engine: every metric with its definition, its unit, its direction and where it comes from.

Ids are `NAME_STATISTIC_UNIT`: `ttft_p95_s` is the 95th percentile of the samples `ttft_s`. Two tools mean different
things by one word (TPOT with and without the first token, ITL by token and by chunk), so a number is kept with the id
of its definition and never compared across definitions.

Only complete answers have latencies and count as throughput. Failed requests have a metric of their own that is always
there, and where all failed there is no metric at all. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from parity.errors import EngineError
from parity.timings import HostSample, LoadRun, RequestTiming
from parity.traffic import Slo

Floats: TypeAlias = NDArray[np.float64]

_VLLM = "vllm bench serve (vLLM 0.32.0)"
_NVML = "NVML, as sampled while the run lasted"
_OURS = "parity"


LACKS = "import.lacks"
"""A fact of a run: ids of samples, separated by spaces, that it looks to have and has not (see parity.load_imports)."""


class Direction(str, Enum):
    """Which way is better. NEITHER: a fact that explains other numbers and is no merit by itself."""

    LOWER = "lower is better"
    HIGHER = "higher is better"
    NEITHER = "neither is better"


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a number means.

    text: its formula in words. source: where that formula comes from.
    samples: the id of the samples that it is a statistic of, in `SAMPLES`; None where a run has one number of it.
    """

    id: str
    unit: str
    direction: Direction
    text: str
    source: str
    samples: str | None = None


def _latency(name: str, text: str, source: str) -> Definition:
    return Definition(id=f"{name}_s", unit="s", direction=Direction.LOWER, text=text, source=source)


def _by_id(definitions: Sequence[Definition]) -> Mapping[str, Definition]:
    return MappingProxyType({definition.id: definition for definition in definitions})


SAMPLES: Mapping[str, Definition] = _by_id(
    (
        _latency("ttft", "time to first token: arrival of the first chunk with tokens less sending", _VLLM),
        _latency(
            "ttft_scheduled",
            "the same less the schedule, so that an engine which delays the next request is not excused",
            "G. Tene, How NOT to measure latency (coordinated omission)",
        ),
        _latency(
            "tpot",
            "time per output token of an answer after its first: (last chunk - first chunk) / (output tokens - 1); "
            "answers of one token have none",
            _VLLM,
        ),
        _latency(
            "itl",
            "inter-token latency, once for every token after the first chunk: the gap before its chunk, divided by the "
            "tokens that the chunk carries",
            "aiperf 0.13.0 divides by tokens as well, by answer; here by chunk",
        ),
        _latency(
            "icl", "inter-chunk latency, once for every chunk after the first: the gap before it", f"ITL of {_VLLM}"
        ),
        _latency("e2e", "an answer's last chunk with tokens less sending", _VLLM),
        _latency("e2e_scheduled", "an answer's last chunk with tokens less the schedule", "as ttft_scheduled_s"),
        _latency("queue", "sending less the schedule: how long the client held a request back", _OURS),
    )
)
"""What has a number for each request (for each token or chunk: `itl_s`, `icl_s`)."""

_STATISTICS: Mapping[str, str] = MappingProxyType(
    {"mean": "mean", "p50": "median", "p95": "95th percentile", "p99": "99th percentile"}
)
"""Percentiles interpolate between the two nearest samples (NumPy's default, as vLLM's)."""


def _statistic(samples: Definition, short: str) -> Definition:
    return replace(
        samples,
        id=f"{samples.id.removesuffix('_s')}_{short}_s",
        text=f"{_STATISTICS[short]} of {samples.id}: {samples.text}",
        samples=samples.id,
    )


def _number(name: str, unit: str, direction: Direction, text: str, source: str = _OURS) -> Definition:
    return Definition(id=name, unit=unit, direction=direction, text=text, source=source)


DEFINITIONS: Mapping[str, Definition] = _by_id(
    (
        _number("failed_share", "of requests", Direction.LOWER, "requests without a complete answer, of all"),
        *(_statistic(samples, short) for samples in SAMPLES.values() for short in _STATISTICS),
        _number(
            "output_tokens_per_s",
            "tokens/s",
            Direction.HIGHER,
            "output tokens of complete answers, divided by the time from the first schedule to the last answer's end",
            _VLLM,
        ),
        _number(
            "total_tokens_per_s",
            "tokens/s",
            Direction.HIGHER,
            "prompt and output tokens of complete answers, divided by the same time",
            _VLLM,
        ),
        _number("requests_per_s", "requests/s", Direction.HIGHER, "complete answers, divided by the same time", _VLLM),
        _number(
            "goodput_requests_per_s",
            "requests/s",
            Direction.HIGHER,
            "complete answers within every limit of the profile (TTFT and E2E from the schedule, TPOT), divided by the "
            "same time",
            "DistServe, OSDI 2024; there and in vLLM from sending",
        ),
        _number(
            "start_up_s", "s", Direction.LOWER, "from starting the server to its first answered request: load and ready"
        ),
        _number(
            "peak_memory_bytes",
            "bytes",
            Direction.LOWER,
            "most memory of the engine's processes seen at any moment: resident on a CPU, device memory on a GPU",
        ),
        _number(
            "gpu_joules_per_output_token",
            "J/token",
            Direction.LOWER,
            "mean power of the GPU times measured time, divided by the output tokens of complete answers",
            _NVML,
        ),
        _number(
            "gpu_utilisation_mean_share",
            "of time",
            Direction.NEITHER,
            "mean over measured time of the share of time in which a kernel ran",
            _NVML,
        ),
        _number("gpu_power_mean_watts", "W", Direction.NEITHER, "mean power over measured time", _NVML),
        _number("gpu_sm_clock_mean_mhz", "MHz", Direction.NEITHER, "mean clock over measured time", _NVML),
    )
)
"""What `measure` may give for a run."""


def samples(run: LoadRun, of: str) -> Floats:
    """Every sample of the complete answers, float64 [N], in the order of the requests; `of`: an id of `SAMPLES`.

    Empty where the run lacks them, or some complete answer does not say what the definition needs (its token count,
    say): a part of the answers would be another quantity.

    Raises:
        EngineError: If no request was answered completely.
        ValueError: If there is no such id.
    """
    if of not in SAMPLES:
        raise ValueError(f"no samples '{of}'; there are {', '.join(SAMPLES)}")
    return _samples(run, _complete(run), of)


def measure(run: LoadRun, slo: Slo | None = None) -> dict[str, float]:
    """Every metric that the run has, by id, in the order of `DEFINITIONS`.

    A metric that nothing measured is left out: of tokens where the server counted none, of a GPU on a CPU, goodput
    where there is no `slo`. `failed_share` is always there.

    Raises:
        EngineError: If no request was answered completely, or no time passed.
    """
    complete, seconds = _complete(run), run.measured_s
    if seconds <= 0.0:
        raise EngineError(f"the load run of profile '{run.profile}' lasted {seconds} s, in which nothing is measured")
    output = _sum(_output_tokens(request) for request in complete)
    total = _sum(_all_tokens(request) for request in complete)
    good = None if slo is None else _sum(_within(request, slo) for request in complete)
    power = _mean_over_time(run, lambda sample: sample.gpu_power_watts)
    found: dict[str, float | None] = {
        "failed_share": 1.0 - len(complete) / len(run.requests),
        "output_tokens_per_s": None if output is None else output / seconds,
        "total_tokens_per_s": None if total is None else total / seconds,
        "requests_per_s": len(complete) / seconds,
        "goodput_requests_per_s": None if good is None else good / seconds,
        "start_up_s": run.start_up_s,
        "peak_memory_bytes": max((s.engine_bytes for s in run.host if s.engine_bytes is not None), default=None),
        "gpu_joules_per_output_token": power * seconds / output if power is not None and output else None,
        "gpu_utilisation_mean_share": _mean_over_time(run, lambda sample: sample.gpu_utilisation),
        "gpu_power_mean_watts": power,
        "gpu_sm_clock_mean_mhz": _mean_over_time(run, lambda sample: sample.gpu_sm_clock_mhz),
    }
    for definition in SAMPLES.values():
        values = _samples(run, complete, definition.id)
        numbers = [values.mean(), *np.percentile(values, (50, 95, 99))] if len(values) else [None] * len(_STATISTICS)
        found |= {_statistic(definition, short).id: n for short, n in zip(_STATISTICS, numbers, strict=True)}
    return {name: float(value) for name in DEFINITIONS if (value := found[name]) is not None}


def while_measured(run: LoadRun) -> list[HostSample]:
    """What the host looked like between the first schedule and the last answer's end, without start-up and warm-up."""
    start, end = _measured(run)
    return [sample for sample in run.host if start <= sample.at_s <= end]


# Formulas -------------------------------------------------------------------------------------------------------------


def _complete(run: LoadRun) -> list[RequestTiming]:
    complete = [request for request in run.requests if request.failure is None]
    if complete:
        return complete
    reasons = Counter(request.failure.value for request in run.requests if request.failure is not None)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    raise EngineError(
        f"none of the {len(run.requests)} requests of profile '{run.profile}' was answered completely "
        f"({why or 'none was made'}); see the server's log, then measure again"
    )


def _measured(run: LoadRun) -> tuple[float, float]:
    start = min((request.scheduled_s for request in run.requests), default=0.0)
    return start, start + run.measured_s


def _samples(run: LoadRun, complete: Sequence[RequestTiming], of: str) -> Floats:
    if of in str(run.facts.get(LACKS, "")).split():
        return np.zeros(0)
    found = [_FORMULAS[of](request) for request in complete]
    known = [values for values in found if values is not None]
    return np.concatenate(known) if len(known) == len(found) else np.zeros(0)


def _first_chunk(request: RequestTiming, since: float | None) -> Floats | None:
    return None if since is None or not request.chunk_s else np.array([request.chunk_s[0] - since])


def _last_chunk(request: RequestTiming, since: float | None) -> Floats | None:
    return None if since is None or not request.chunk_s else np.array([request.chunk_s[-1] - since])


def _per_output_token(request: RequestTiming) -> Floats | None:
    tokens = _output_tokens(request)
    if tokens is None or not request.chunk_s:
        return None
    return np.array([(request.chunk_s[-1] - request.chunk_s[0]) / (tokens - 1)] if tokens > 1 else [])


def _between_tokens(request: RequestTiming) -> Floats | None:
    tokens = request.chunk_tokens
    if tokens is None and request.output_tokens == len(request.chunk_s):
        tokens = (1,) * len(request.chunk_s)
    if tokens is None:
        return None
    carried = np.array(tokens[1:], np.int64)
    return np.asarray(np.repeat(np.diff(request.chunk_s), carried) / np.repeat(carried, carried))


def _queued(request: RequestTiming) -> Floats | None:
    return None if request.sent_s is None else np.array([request.sent_s - request.scheduled_s])


_FORMULAS: Mapping[str, Callable[[RequestTiming], Floats | None]] = MappingProxyType(
    {
        "ttft_s": lambda request: _first_chunk(request, request.sent_s),
        "ttft_scheduled_s": lambda request: _first_chunk(request, request.scheduled_s),
        "tpot_s": _per_output_token,
        "itl_s": _between_tokens,
        "icl_s": lambda request: np.diff(request.chunk_s) if request.chunk_s else None,
        "e2e_s": lambda request: _last_chunk(request, request.sent_s),
        "e2e_scheduled_s": lambda request: _last_chunk(request, request.scheduled_s),
        "queue_s": _queued,
    }
)


def _output_tokens(request: RequestTiming) -> int | None:
    """The server's count, or what its chunks add up to."""
    if request.output_tokens is None and request.chunk_tokens is not None:
        return sum(request.chunk_tokens)
    return request.output_tokens


def _all_tokens(request: RequestTiming) -> int | None:
    output = _output_tokens(request)
    return None if output is None or request.prompt_tokens is None else output + request.prompt_tokens


def _within(request: RequestTiming, slo: Slo) -> bool | None:
    """Whether an answer met every limit; None where that was not measured. One token has no TPOT and meets any."""
    limits = {"ttft_scheduled_s": slo.ttft_s, "tpot_s": slo.tpot_s, "e2e_scheduled_s": slo.e2e_s}
    asked = [(_FORMULAS[of](request), limit) for of, limit in limits.items() if limit is not None]
    if any(values is None for values, _ in asked):
        return None
    return all(bool((values <= limit).all()) for values, limit in asked if values is not None)


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one of them is."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


def _mean_over_time(run: LoadRun, value: Callable[[HostSample], float | None]) -> float | None:
    """The mean of a line through the samples over measured time; None where nothing sampled it."""
    points = [(sample.at_s, found) for sample in while_measured(run) if (found := value(sample)) is not None]
    if not points:
        return None
    times, values = zip(*points, strict=True)
    start, end = _measured(run)
    at = np.array([start, *times, end])
    line = np.interp(at, times, values)
    return float(((line[1:] + line[:-1]) / 2 * np.diff(at)).sum() / (end - start))
