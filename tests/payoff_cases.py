"""Load runs of a chosen speed, and a session of them on disk as `parity bench` leaves one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parity import timings
from parity.fingerprint import Scalar
from parity.timings import LoadRun, RequestTiming

FACTS: dict[str, Scalar] = {
    "engine": "old-engine 1.0 bfloat16",
    "plan.sha256": "9f2c",
    "gpu.0.name": "Example GPU",
    "gpu.count": 1,
}


def run_of(tokens_per_s: float, *, engine: str = "old-engine 1.0 bfloat16", tokens: int = 300) -> LoadRun:
    """Two answers of `tokens` tokens each, asked at once, that together take as long as this speed needs."""
    lasts_s = round(2 * tokens / tokens_per_s, 9)
    requests = tuple(
        RequestTiming(
            id=f"r{number}",
            scheduled_s=0.0,
            sent_s=0.0,
            first_byte_s=0.01,
            chunk_s=(0.01, lasts_s),
            chunk_tokens=(1, tokens - 1),
            prompt_tokens=64,
            output_tokens=tokens,
            ended_s=lasts_s,
            status=200,
            failure=None,
            detail="",
        )
        for number in range(2)
    )
    return LoadRun(
        profile="offline",
        seed=7,
        began_at="2026-11-24T12:00:00+00:00",
        measured_s=lasts_s,
        requests=requests,
        host=(),
        facts={**FACTS, "engine": engine},
        start_up_s=20.0,
        warnings=(),
    )


def in_an_open_loop(run: LoadRun) -> LoadRun:
    """The second request was due near the end."""
    return replace(run, requests=(run.requests[0], replace(run.requests[1], scheduled_s=0.9 * run.measured_s)))


def write(path: Path, run: LoadRun) -> Path:
    path.write_text("".join(timings.to_json_lines(run)), "utf-8")
    return path


def write_session(directory: Path, reference: Sequence[float], candidate: Sequence[float]) -> Path:
    directory.mkdir(exist_ok=True)
    for side, speeds in (("reference", reference), ("candidate", candidate)):
        engine = {"reference": "old-engine 1.0 bfloat16", "candidate": "new-engine 2.0 bfloat16"}[side]
        for number, speed in enumerate(speeds, start=1):
            write(directory / f"pair-{number:02}-{side}.jsonl", run_of(speed, engine=engine))
    return directory


if __name__ == "__main__":  # the made-up session that docs/decide.md looks at
    write_session(Path(__file__).parent / "data" / "decide", (2405, 2391, 2422, 2398), (2911, 2934, 2870, 2889))
