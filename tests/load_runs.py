"""Load runs made of known numbers: every answer of a run has the same times, so that its metrics are what was asked."""

from __future__ import annotations

from dataclasses import replace

from parity.timings import Failure, LoadRun, RequestTiming


def answer(number: int, *, ttft_s: float, tpot_s: float, tokens: int, failure: Failure | None = None) -> RequestTiming:
    """One answer of `tokens` tokens, a chunk each, due ten a second."""
    due_s = 0.1 * number
    chunk_s = tuple(due_s + ttft_s + tpot_s * token for token in range(tokens))
    return RequestTiming(
        id=f"r{number:06d}",
        scheduled_s=due_s,
        sent_s=due_s,
        first_byte_s=chunk_s[0],
        chunk_s=chunk_s if failure is None else (),
        chunk_tokens=(1,) * tokens if failure is None else None,
        prompt_tokens=8,
        output_tokens=tokens if failure is None else None,
        ended_s=chunk_s[-1],
        status=200 if failure is None else 500,
        failure=failure,
        detail="",
    )


def load_run(
    *, ttft_s: float = 0.1, tpot_s: float = 0.01, requests: int = 6, tokens: int = 5, failed: int = 0
) -> LoadRun:
    """A run whose last `failed` requests failed."""
    answers = [
        answer(
            n, ttft_s=ttft_s, tpot_s=tpot_s, tokens=tokens, failure=Failure.STATUS if n >= requests - failed else None
        )
        for n in range(requests)
    ]
    return LoadRun(
        profile="toy",
        seed=7,
        began_at="2026-11-24T12:00:00+00:00",
        measured_s=max(a.ended_s for a in answers),
        requests=tuple(answers),
        host=(),
        facts={},
        start_up_s=1.5,
        warnings=(),
    )


def slower(run: LoadRun, factor: float) -> LoadRun:
    """The same with every token that much later after its request was due, and the run that much longer."""
    return replace(
        run,
        measured_s=run.measured_s * factor,
        requests=tuple(
            replace(r, chunk_s=tuple(r.scheduled_s + (at - r.scheduled_s) * factor for at in r.chunk_s))
            for r in run.requests
        ),
    )
