"""Results of other load generators as load runs: `vllm bench serve`, guidellm, aiperf.

Their numbers are not ours: each tool means its own by TTFT, TPOT and ITL. What is taken is what each request's times
were; metrics are computed from those by the definitions of `parity.service_metrics`. What a file does not say stays
unknown, and where its times mean something else than ours, a warning of the run says so.

Read are vLLM 0.32.0 (`--save-result --save-detailed`), guidellm 0.8.1 (JSON report) and aiperf 0.13.0
(`profile_export.jsonl`); docs/performance_exports.md says what is kept of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

from parity.errors import RecordingError
from parity.fingerprint import Scalar
from parity.service_metrics import LACKS
from parity.timings import Failure, LoadRun, RequestTiming

_SEED = 0  # none of the files says which seed was used
_OPEN_LOOPS = ("constant", "poisson", "trace")
_KINDS = (
    ("Connect", Failure.REFUSED),
    ("refused", Failure.REFUSED),
    ("imeout", Failure.STALLED),
    ("Disconnected", Failure.CLOSED),
    ("PayloadError", Failure.CLOSED),
    ("RemoteProtocolError", Failure.CLOSED),
    ("ReadError", Failure.CLOSED),
    ("HTTPStatusError", Failure.STATUS),
)
"""Words of the tools' own error texts (aiohttp's and httpx's exceptions); the first that fits says the kind."""


def read(path: Path) -> LoadRun:
    """Read one run of any of the three tools; which one is seen from the file itself.

    The seed of the result is 0 and its plan unknown: it can be compared with runs of the same tool only.

    Raises:
        RecordingError: If the file is of none of them, holds less than single requests, or more than one run.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"{str(path)!r} cannot be read ({error})") from error
    documents = _documents(text, path)
    first = documents[0]
    try:
        if "metadata" in first and "metrics" in first and "request_start_ns" in first["metadata"]:
            return _of_aiperf(documents, path)
        if len(documents) > 1:
            raise RecordingError(f"{str(path)!r} holds {len(documents)} runs; save each run into a file of its own")
        if isinstance(first.get("benchmarks"), list) and "guidellm_version" in first.get("metadata", {}):
            return _of_guidellm(first, path)
        if "request_throughput" in first and "endpoint_type" in first:
            return _of_vllm(first, path)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecordingError(
            f"{str(path)!r} is not as its tool writes it ({type(error).__name__}: {error}); read are vLLM 0.32.0, "
            "guidellm 0.8.1 and aiperf 0.13.0"
        ) from error
    raise RecordingError(
        f"{str(path)!r} is no result of a known load generator; read are the JSON of 'vllm bench serve --save-result "
        "--save-detailed', guidellm's JSON report and aiperf's profile_export.jsonl"
    )


# vllm bench serve -----------------------------------------------------------------------------------------------------


def _of_vllm(data: Mapping[str, Any], path: Path) -> LoadRun:
    if "ttfts" not in data:
        raise RecordingError(
            f"{str(path)!r} has no single requests, or not of generated text; measure with "
            "'vllm bench serve --save-result --save-detailed'"
        )
    sent, queued = data["start_times"], data.get("queue_times") or [0.0] * len(data["start_times"])
    # An answer without a status line's reason has an empty error, and only its latency of 0 says that it failed.
    errors = [
        e or ("" if took else "failed, no reason given")
        for e, took in zip(data["errors"], data["latencies"], strict=True)
    ]
    # Where it failed, vLLM leaves the moment of failure out: it is known to be no earlier than sending.
    requests = [
        RequestTiming(
            id=f"r{number:06d}",
            scheduled_s=start - waited,
            sent_s=start,
            first_byte_s=None,
            chunk_s=() if error else tuple(accumulate((start + ttft, *gaps))),
            chunk_tokens=None,
            prompt_tokens=None if error else prompt,
            output_tokens=None if error else output or None,
            ended_s=start if error else start + latency,
            status=None if error else 200,
            failure=_failure(error) if error else None,
            detail=_last_line(error),
        )
        for number, (start, waited, ttft, gaps, latency, prompt, output, error) in enumerate(
            zip(
                *(sent, queued, data["ttfts"], data["itls"], data["latencies"]),
                *(data["input_lens"], data["output_lens"], errors),
                strict=True,
            )
        )
    ]
    warnings = [
        "of vllm bench serve: a request's schedule is when its client turned to it, so a client that fell behind its "
        "own plan is not seen; only its wait for --max-concurrency is",
        "of vllm bench serve: token counts are the server's where it gave usage, else the client's own; the file does "
        "not say which",
        "of vllm bench serve: the moment a failed request failed is not in the file",
        "of vllm bench serve: the time of day is when the file was saved, in the client's local time",
    ]
    if "chat" in str(data["endpoint_type"]):
        warnings.append("of vllm bench serve: with chat, the first chunk may be one without a token, so TTFT is early")
    return _run(
        requests,
        profile="vllm bench serve",
        began_at=datetime.strptime(data["date"], "%Y%m%d-%H%M%S").isoformat(),  # noqa: DTZ007  its zone is unknown
        facts={
            "import.tool": "vllm bench serve",
            "import.file": path.name,
            "model": data.get("model_id"),
            **{
                f"import.{name}": data.get(name)
                for name in ("backend", "request_rate", "burstiness", "max_concurrency")
            },
        },
        warnings=warnings,
    )


# guidellm -------------------------------------------------------------------------------------------------------------


def _of_guidellm(data: Mapping[str, Any], path: Path) -> LoadRun:
    benchmarks = data["benchmarks"]
    if len(benchmarks) != 1:
        raise RecordingError(f"{str(path)!r} holds {len(benchmarks)} benchmarks; run guidellm with one rate at a time")
    benchmark, spec = benchmarks[0], data["config"]["spec"]
    found = benchmark["requests"]
    strategy = benchmark["config"]["strategy"]["type_"]
    requests = [
        _guidellm_request(request, status) for status in ("successful", "errored", "incomplete") for request in
        found[status] or ()
    ]  # fmt: skip
    began = min((request.scheduled_s for request in requests), default=0.0)
    warnings = [
        "of guidellm: only the first and the last chunk of an answer are in the file, so there is no ITL; TPOT, TTFT "
        "and E2E are exact, and its own 'TPOT' and 'ITL' are other quantities",
    ]
    if strategy not in _OPEN_LOOPS:
        warnings.append(
            f"of guidellm: '{strategy}' has no schedule; a request's is when guidellm first meant to send it"
        )
    if any(r["output_metrics"]["total_tokens"] is None for r in found["successful"]):
        warnings.append("of guidellm: some answers have no token count of the server; the count of chunks is not used")
    if benchmark.get("warmup_duration") or benchmark.get("cooldown_duration"):
        warnings.append("of guidellm: requests of its warm-up and cool-down are counted in")
    return _run(
        requests,
        profile="guidellm",
        began_at=datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="milliseconds"),
        facts={
            "import.tool": f"guidellm {data['metadata']['guidellm_version']}",
            "import.file": path.name,
            "import.strategy": strategy,
            "import.rate": benchmark["config"]["strategy"].get("rate"),
            "model": spec["backend"].get("model"),
            LACKS: "itl_s icl_s",
        },
        warnings=warnings,
    )


def _guidellm_request(request: Mapping[str, Any], status: str) -> RequestTiming:
    info, complete = request["info"], status == "successful"
    times = info["timings"]
    sent = times["request_start"]
    first, last = times["first_token_iteration"], times["last_token_iteration"]
    ends = [t for t in (times["request_end"], times["resolve_end"], times["finalized"]) if t is not None]
    error = info["error"] or ("" if complete else "not finished when the benchmark ended")
    chunks = () if not complete or first is None else (first,) if times["token_iterations"] < 2 else (first, last)
    scheduled = next(t for t in (times["targeted_start"], sent, times["resolve_start"], *ends) if t is not None)
    return RequestTiming(
        id=request["request_id"],
        scheduled_s=scheduled,
        sent_s=sent,
        first_byte_s=times["first_request_iteration"],
        chunk_s=chunks,
        chunk_tokens=None,
        prompt_tokens=request["input_metrics"]["total_tokens"] if complete else None,
        output_tokens=request["output_metrics"]["total_tokens"] if complete else None,
        ended_s=min(ends, default=scheduled),
        status=200 if complete else _status_in(error),
        failure=None if complete else _failure(error),
        detail=_last_line(error),
    )


# aiperf ---------------------------------------------------------------------------------------------------------------


def _of_aiperf(records: Sequence[Mapping[str, Any]], path: Path) -> LoadRun:
    measured = [record for record in records if record["metadata"]["benchmark_phase"] == "profiling"]
    if not measured:
        raise RecordingError(f"{str(path)!r} has {len(records)} requests and all are warm-up; measure some")
    began_ns = min(_scheduled_ns(record["metadata"]) for record in measured)
    requests = [_aiperf_request(record, began_ns) for record in measured]
    warnings = [
        "of aiperf: a request's schedule is when its rate limiter let it go, so a limiter that fell behind its plan is "
        "not seen",
        "of aiperf: TTFT and E2E begin before the connection is opened and the request is written",
    ]
    complete = [record["metrics"] for record in measured if not record.get("error")]
    if any("usage_completion_tokens" not in metrics for metrics in complete):
        warnings.append(
            "of aiperf: the server's token counts are not in the file (--use-server-token-count), and aiperf's own are "
            "of its tokenizer, so they are left out"
        )
    if any("time_to_first_token" not in metrics for metrics in complete):
        warnings.append("of aiperf: some answers were not streamed (--streaming), so their latencies are unknown")
    return _run(
        requests,
        profile="aiperf",
        began_at=datetime.fromtimestamp(began_ns / 1e9, timezone.utc).isoformat(timespec="milliseconds"),
        facts={"import.tool": "aiperf", "import.file": path.name},
        warnings=warnings,
    )


def _aiperf_request(record: Mapping[str, Any], began_ns: int) -> RequestTiming:
    about, metrics, error = record["metadata"], record["metrics"], record.get("error")

    def seconds(name: str) -> float | None:
        return None if about.get(name) is None else (about[name] - began_ns) / 1e9

    def value(name: str) -> Any:
        return metrics[name]["value"] if name in metrics else None

    if error is None and about["was_cancelled"]:
        error = {"type": "Cancelled", "message": "cancelled by the client"}
    sent = (about["request_start_ns"] - began_ns) / 1e9
    ttft, gaps = value("time_to_first_token"), value("inter_chunk_latency") or ()
    streamed = error is None and ttft is not None
    text = "" if error is None else f"{error.get('type') or ''} {error['message']}".strip()
    return RequestTiming(
        id=str(about.get("x_request_id") or about["session_num"]),
        scheduled_s=(_scheduled_ns(about) - began_ns) / 1e9,
        sent_s=sent,
        first_byte_s=seconds("request_ack_ns"),
        chunk_s=tuple(accumulate((sent + ttft / 1e3, *(gap / 1e3 for gap in gaps)))) if streamed else (),
        chunk_tokens=None,
        prompt_tokens=value("usage_prompt_tokens"),
        output_tokens=value("usage_completion_tokens"),
        ended_s=(about["request_end_ns"] - began_ns) / 1e9,
        status=200 if error is None else error.get("code"),
        failure=None if error is None else Failure.STATUS if error.get("code") else _failure(text),
        detail=_last_line(text),
    )


def _scheduled_ns(about: Mapping[str, Any]) -> int:
    issued = about.get("credit_issued_ns")
    return int(about["request_start_ns"] if issued is None else issued)


# Common ---------------------------------------------------------------------------------------------------------------


def _documents(text: str, path: Path) -> list[dict[str, Any]]:
    """The file's JSON objects: one, or one after another (JSON Lines, or vLLM's --append-result)."""
    decoder, at, found = json.JSONDecoder(), 0, []
    try:
        while (at := len(text) - len(text[at:].lstrip())) < len(text):
            document, at = decoder.raw_decode(text, at)
            found.append(document)
    except ValueError as error:
        raise RecordingError(f"{str(path)!r} is not JSON, or was cut short ({error})") from error
    if not found or not all(isinstance(document, dict) for document in found):
        raise RecordingError(f"{str(path)!r} holds no JSON object; it is no result of a load generator")
    return found


def _run(
    requests: Iterable[RequestTiming],
    *,
    profile: str,
    began_at: str,
    facts: Mapping[str, Scalar],
    warnings: Sequence[str],
) -> LoadRun:
    """The run with its clock begun at the first schedule, in the order of schedules."""
    ordered = sorted(requests, key=lambda request: request.scheduled_s)
    if not ordered:
        raise RecordingError(f"the result of {profile} holds no requests; measure some")
    zero = ordered[0].scheduled_s
    moved = tuple(_moved(request, zero) for request in ordered)
    return LoadRun(
        profile=profile,
        seed=_SEED,
        began_at=began_at,
        measured_s=max(request.ended_s for request in moved),
        requests=moved,
        host=(),
        facts=dict(facts),
        start_up_s=None,
        warnings=tuple(warnings),
    )


def _moved(request: RequestTiming, zero_s: float) -> RequestTiming:
    def moved(at_s: float | None) -> float | None:
        return None if at_s is None else at_s - zero_s

    return replace(
        request,
        scheduled_s=request.scheduled_s - zero_s,
        sent_s=moved(request.sent_s),
        first_byte_s=moved(request.first_byte_s),
        chunk_s=tuple(at_s - zero_s for at_s in request.chunk_s),
        ended_s=request.ended_s - zero_s,
    )


def _failure(error: str) -> Failure:
    """A text without an exception's name is the reason of an HTTP status."""
    last = _last_line(error)
    for word, kind in _KINDS:
        if word in last:
            return kind
    return Failure.UNREADABLE if "Traceback" in error or "valid chunk" in last or ":" in last else Failure.STATUS


def _status_in(error: str) -> int | None:
    """The status that httpx names in quotes, as in "Server error '500 Internal Server Error'"."""
    after = error.partition(" error '")[2][:3]
    return int(after) if after.isdigit() else None


def _last_line(error: str) -> str:
    return next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "")
