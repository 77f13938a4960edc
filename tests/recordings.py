"""Small recordings for tests: everything has a default, so that a test states only what it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from parity.engines import EngineSpec
from parity.fingerprint import Fingerprint, Scalar
from parity.prompts import Prompt, Request, SamplingParams, Workload, sha256_of_json
from parity.recording import (
    Completion,
    FinishReason,
    Recording,
    Terminator,
    Timing,
    TokenLogprobs,
    WorkloadRecord,
)

Rows = Sequence[Sequence[tuple[int, float]]]

BOS, EOS = 1, 2
IDENTITY: Mapping[str, Scalar] = {
    "quantization": None,
    "model.weights_sha256": "1" * 64,
    "tokenizer.sha256": "2" * 64,
    "chat_template.sha256": "3" * 64,
    "model.config.bos_token_id": BOS,
    "model.config.eos_token_id": EOS,
    "model.config.pad_token_id": EOS,
}


def plausible_row(token_id: int, *, k: int = 3) -> tuple[tuple[int, float], ...]:
    """A top-k row that `token_id` clearly leads."""
    return tuple((token_id + rank, -0.25 - 2.0 * rank) for rank in range(k))


def token_logprobs(
    token_ids: Sequence[int],
    rows: Rows | None = None,
    *,
    chosen: Sequence[float] | None = None,
    k: int | None = None,
) -> TokenLogprobs:
    """Rows default to plausible ones; `chosen` to what the rows say of the tokens (KeyError where they do not)."""
    rows = [plausible_row(t) for t in token_ids] if rows is None else rows
    if chosen is None:
        chosen = [dict(row)[token_id] for token_id, row in zip(token_ids, rows, strict=True)]
    return TokenLogprobs.from_rows(chosen, rows, k=max(map(len, rows), default=3) if k is None else k)


def completion(
    id: str = "p-001",  # noqa: A002  the field's own name
    *,
    prompt_token_ids: Sequence[int] = (BOS, 20, 21),
    own_prompt_token_ids: Sequence[int] | Literal["same"] | None = "same",
    prompt_text: str | None = "Hello there",
    token_ids: Sequence[int] = (30, 31, 32),
    text: str | None = None,
    rows: Rows | Literal["plausible"] | None = "plausible",
    chosen: Sequence[float] | None = None,
    k: int | None = None,
    terminator: Terminator | int | None = EOS,
    finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
    timing: Timing | None = None,
) -> Completion:
    """One answer.

    `own_prompt_token_ids="same"` repeats the received ids, None means not known. `rows=None` leaves log-probabilities
    out. An integer `terminator` gets a plausible row. `finish_reason` follows the terminator, `text` the token ids.
    """
    if isinstance(terminator, int):
        terminator = Terminator(token_id=terminator, logprobs=token_logprobs([terminator], k=k))
    if finish_reason is None:
        finish_reason = FinishReason.LENGTH if terminator is None else FinishReason.STOP
    logprobs = None
    if rows is not None:
        logprobs = token_logprobs(token_ids, None if rows == "plausible" else rows, chosen=chosen, k=k)
    own = prompt_token_ids if own_prompt_token_ids == "same" else own_prompt_token_ids
    return Completion(
        id=id,
        prompt_token_ids=tuple(prompt_token_ids),
        own_prompt_token_ids=None if own is None else tuple(own),
        prompt_text=prompt_text,
        token_ids=tuple(token_ids),
        text=" ".join(f"t{t}" for t in token_ids) if text is None else text,
        terminator=terminator,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        logprobs=logprobs,
        timing=timing or Timing(submitted_ns=0, first_token_ns=1_000_000, finished_ns=10_000_000),
    )


def workload(
    request_ids: Sequence[str],
    *,
    name: str = "tests",
    sampling: SamplingParams | None = None,
    forced_from: str | None = None,
) -> WorkloadRecord:
    """The record of a workload that asks one text prompt for each id; its digest follows ids and sampling only."""
    sampling = sampling or SamplingParams.greedy(max_tokens=64, logprobs=3)
    requests = tuple(Request(prompt=Prompt(id=i, text=f"prompt {i}"), sampling=sampling) for i in request_ids)
    asked = Workload(name=name, requests=requests, forced_from=forced_from)
    return WorkloadRecord(
        name=name,
        digest=asked.digest,
        forced_from=forced_from,
        sampling=sampling,
        request_ids=tuple(request_ids),
    )


def recording(
    completions: Sequence[Completion],
    *,
    engine: str = "replay",
    model: str = "tiny",
    dtype: str = "float32",
    version: str = "1",
    identity: Mapping[str, Scalar] | None = None,
    context: Mapping[str, Scalar] | None = None,
    options: Mapping[str, object] | None = None,
    asked: WorkloadRecord | None = None,
    sampling: SamplingParams | None = None,
    forced_from: str | None = None,
    created_at: str = "2026-11-23T12:00:00+00:00",
) -> Recording:
    """A sealed recording.

    `identity` and `context` are laid over defaults. `asked` defaults to a workload of the completions' ids in their
    order; `sampling` and `forced_from` go into it.
    """
    asked = asked or workload([c.id for c in completions], sampling=sampling, forced_from=forced_from)
    content = [engine, model, dtype, version, asked.digest, [c.to_json() for c in completions]]
    return Recording(
        spec=EngineSpec(engine=engine, model=model, dtype=dtype, options=dict(options or {}), env={}),
        workload=asked,
        fingerprint=Fingerprint(
            identity={"dtype": dtype, **IDENTITY, **(identity or {})},
            context={"engine.version": version, **(context or {})},
            health={},
            packages={},
        ),
        completions=tuple(completions),
        created_at=created_at,
        resumed=0,
        digest=sha256_of_json(content),
    )
