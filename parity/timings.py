"""What one load run measured: a timing per request, and how the host was meanwhile. Pure values and their form.

All times are seconds on one monotonic clock that begins with the run. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from parity.errors import RecordingError
from parity.fingerprint import Scalar

SCHEMA = 1


class Failure(str, Enum):
    """Why a request has no complete answer."""

    REFUSED = "connection refused"
    STATUS = "http status"
    STALLED = "no byte in time"
    CLOSED = "stream closed early"
    WRONG_COUNT = "wrong token count"
    UNREADABLE = "unreadable answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """One request, from its schedule to its last byte.

    scheduled_s: when it should have been sent; in a closed loop, when its slot became free. sent_s: when it was handed
        to the socket. first_byte_s: the answer's head. chunk_s: the arrival of each chunk that carried tokens.
    chunk_tokens: how many tokens each of them carried, where the server says so; None where it does not.
    prompt_tokens, output_tokens: the server's own count; None where it gave none.
    ended_s: the answer's end, or when it was given up.
    status: of HTTP; None where there was no answer. failure: None for a complete answer.
    """

    id: str
    scheduled_s: float
    sent_s: float | None
    first_byte_s: float | None
    chunk_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...] | None
    prompt_tokens: int | None
    output_tokens: int | None
    ended_s: float
    status: int | None
    failure: Failure | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSample:
    """What the machine looked like at one moment; None where nothing measures it.

    engine_bytes: memory of the engine's processes: resident on a CPU, device memory on a GPU.
    """

    at_s: float
    engine_bytes: int | None
    gpu_utilisation: float | None
    gpu_power_watts: float | None
    gpu_sm_clock_mhz: float | None
    gpu_throttled: bool | None
    load_average: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """One profile, driven once against one started engine.

    profile, seed: what was asked. began_at: wall clock, ISO 8601 in UTC. measured_s: from the first measured request's
        schedule to the last answer's end; warm-up lies before it and is not in `requests`.
    facts: engine, environment, hardware, command line, client; flat, as in a fingerprint.
    start_up_s: from starting the server to its first answered request; None where it was running already.
    warnings: what makes the numbers doubtful, one sentence each (the client itself was the limit, say).
    """

    profile: str
    seed: int
    began_at: str
    measured_s: float
    requests: tuple[RequestTiming, ...]
    host: tuple[HostSample, ...]
    facts: Mapping[str, Scalar]
    start_up_s: float | None
    warnings: tuple[str, ...]


def to_json_lines(run: LoadRun) -> Iterable[str]:
    """A head, then a line for each request and each host sample; every line ends with a newline."""
    yield json.dumps({"schema": SCHEMA, **_head(run), "requests": len(run.requests), "host": len(run.host)}) + "\n"
    for request in run.requests:
        yield json.dumps(asdict(request)) + "\n"
    for sample in run.host:
        yield json.dumps(asdict(sample)) + "\n"


def from_json_lines(text: str) -> LoadRun:
    """Read what `to_json_lines` wrote.

    Raises:
        RecordingError: If it was cut short, is of a newer schema, or is something else.
    """
    lines = text.splitlines()
    try:
        head: dict[str, Any] = json.loads(lines[0])
        schema = head.pop("schema")
        if schema != SCHEMA:
            raise RecordingError(f"these timings have schema {schema}, and this version reads {SCHEMA}; upgrade parity")
        wanted, sampled = head.pop("requests"), head.pop("host")
        if len(lines) != 1 + wanted + sampled:
            raise RecordingError(
                f"these timings should have {1 + wanted + sampled} lines and have {len(lines)}: they were cut short; "
                "measure again"
            )
        rows = [json.loads(line) for line in lines[1:]]
        return LoadRun(
            **{**head, "warnings": tuple(head["warnings"])},
            requests=tuple(_timing(row) for row in rows[:wanted]),
            host=tuple(HostSample(**row) for row in rows[wanted:]),
        )
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordingError(f"these timings are damaged ({error}); measure again") from error


def without_requests(run: LoadRun) -> LoadRun:
    """The head alone, for tables of many runs."""
    return replace(run, requests=(), host=())


def _head(run: LoadRun) -> dict[str, Any]:
    head = asdict(without_requests(run))
    return {key: value for key, value in head.items() if key not in ("requests", "host")}


def _timing(row: Mapping[str, Any]) -> RequestTiming:
    tokens: Sequence[int] | None = row["chunk_tokens"]
    return RequestTiming(
        **{
            **row,
            "chunk_s": tuple(row["chunk_s"]),
            "chunk_tokens": None if tokens is None else tuple(tokens),
            "failure": None if row["failure"] is None else Failure(row["failure"]),
        }
    )
