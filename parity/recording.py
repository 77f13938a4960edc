"""What was answered: completions, their log-probabilities and timing, and the recording that seals them.

Holds the wire form (JSON Lines, one completion a line) that workers stream. How a recording lies on disk is decided
by `parity.store`. Standard library only: engines' interpreters import this file.

Schema history, newest first:
2  sampling parameters of single requests (`sampling_changes`); `decoded_text`
1  first version
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from parity.engines import EngineSpec
from parity.fingerprint import Fingerprint
from parity.prompts import SamplingParams, Workload

SCHEMA = 2

NO_TOKEN = -1
"""Fills the rest of a top-k row that an engine left short; its log-probability is -inf."""


class FinishReason(str, Enum):
    """Why an engine stopped."""

    STOP = "stop"
    """An end-of-sequence or stop token, or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context window."""
    ABORT = "abort"
    """The engine gave the request up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Raw log-probabilities of T tokens and of the K most probable tokens at each of their positions.

    Shapes: chosen float32 [T]; top_token_ids int32 [T * K] and top float32 [T * K], row by row, most probable first.
    Units: nats. Read-only buffers, so that millions of them cost no objects; `numpy.frombuffer` reads them in place.
    """

    k: int
    chosen: memoryview
    top_token_ids: memoryview
    top: memoryview

    def __len__(self) -> int:
        return len(self.chosen)

    @classmethod
    def from_rows(
        cls, chosen: Sequence[float], rows: Sequence[Sequence[tuple[int, float]]], *, k: int
    ) -> TokenLogprobs:
        """Build from (token id, logprob) rows, most probable first; short rows are filled, long ones cut to K."""
        ids, values = array("i"), array("f")
        for row in rows:
            kept = row[:k]
            ids.extend(token_id for token_id, _ in kept)
            values.extend(value for _, value in kept)
            short = k - len(kept)
            ids.extend([NO_TOKEN] * short)
            values.extend([float("-inf")] * short)
        return cls(k=k, chosen=_frozen(array("f", chosen)), top_token_ids=_frozen(ids), top=_frozen(values))

    def rows(self, start: int, stop: int) -> TokenLogprobs:
        """The positions [start, stop)."""
        k = self.k
        return TokenLogprobs(
            k=k,
            chosen=self.chosen[start:stop],
            top_token_ids=self.top_token_ids[start * k : stop * k],
            top=self.top[start * k : stop * k],
        )

    def row(self, position: int) -> tuple[tuple[int, float], ...]:
        """The (token id, logprob) pairs at one position, most probable first, fillers left out."""
        start = position * self.k
        ids = self.top_token_ids[start : start + self.k].tolist()
        values = self.top[start : start + self.k].tolist()
        return tuple((i, v) for i, v in zip(ids, values, strict=True) if i != NO_TOKEN)

    def to_json(self) -> dict[str, Any]:
        """The wire form: base64 of the little-endian buffers, exact to the bit."""
        return {
            "k": self.k,
            "chosen": _encode(self.chosen),
            "top_token_ids": _encode(self.top_token_ids),
            "top": _encode(self.top),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenLogprobs:
        """Read what `to_json` wrote."""
        return cls(
            k=data["k"],
            chosen=_decode("f", data["chosen"]),
            top_token_ids=_decode("i", data["top_token_ids"]),
            top=_decode("f", data["top"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminator:
    """The end-of-sequence or stop token that ended a completion, kept apart from its body.

    Engines disagree on whether it belongs to the answer; here it never does. `logprobs` has one position, or is None
    where the engine does not return the step (TensorRT engines).
    """

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time points of one request on the worker's monotonic clock, in nanoseconds since its workload began."""

    submitted_ns: int
    first_token_ns: int | None
    finished_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One engine's answer to one request.

    prompt_token_ids: what the engine received and worked on.
    own_prompt_token_ids, prompt_text: what the engine's own tokenizer and chat template make of the same prompt; None
        where the prompt was given as token ids, or under teacher forcing.
    token_ids, logprobs: the body without its terminator; under teacher forcing the forced tokens and their scores.
    text: the engine's own detokenisation of the body; None under teacher forcing.
    decoded_text: what the engine's tokenizer makes of all of `token_ids` at once, where that is not `text`; else None.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    own_prompt_token_ids: tuple[int, ...] | None
    prompt_text: str | None
    token_ids: tuple[int, ...]
    text: str | None
    terminator: Terminator | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: TokenLogprobs | None
    timing: Timing
    decoded_text: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The wire form: one JSON object with the log-probabilities inside."""
        data = completion_text_to_json(self)
        data["logprobs"] = None if self.logprobs is None else self.logprobs.to_json()
        step = None if self.terminator is None else self.terminator.logprobs
        data["terminator_logprobs"] = None if step is None else step.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Completion:
        """Read what `to_json` wrote."""
        body, step = data["logprobs"], data["terminator_logprobs"]
        return completion_from_json(
            data,
            logprobs=None if body is None else TokenLogprobs.from_json(body),
            terminator_logprobs=None if step is None else TokenLogprobs.from_json(step),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRecord:
    """What a recording keeps of its workload: enough to know whether two recordings answered the same question.

    sampling: of the first request, and of all that `others` does not name.
    """

    name: str
    digest: str
    forced_from: str | None
    sampling: SamplingParams
    request_ids: tuple[str, ...]
    others: Mapping[str, SamplingParams] = field(default_factory=dict)

    @classmethod
    def of(cls, workload: Workload) -> WorkloadRecord:
        """What to keep of a workload that has at least one request."""
        common = workload.requests[0].sampling
        return cls(
            name=workload.name,
            digest=workload.digest,
            forced_from=workload.forced_from,
            sampling=common,
            request_ids=tuple(r.id for r in workload.requests),
            others={r.id: r.sampling for r in workload.requests if r.sampling != common},
        )

    def sampling_of(self, request_id: str) -> SamplingParams:
        """What one request asked for."""
        return self.others.get(request_id, self.sampling)


@dataclass(frozen=True)
class Recording:
    """Everything one engine answered to one workload. Immutable once sealed.

    resumed: how many completions came from earlier, interrupted runs.
    digest: names the recording; other recordings refer to it by this.
    """

    spec: EngineSpec
    workload: WorkloadRecord
    fingerprint: Fingerprint
    completions: tuple[Completion, ...]
    created_at: str
    resumed: int
    digest: str
    schema: int = SCHEMA

    @cached_property
    def by_id(self) -> Mapping[str, Completion]:
        """Completions by prompt id."""
        return {c.id: c for c in self.completions}

    @property
    def label(self) -> str:
        """Engine, version and dtype for people, e.g. "vllm 0.32.0 bfloat16"."""
        version = self.fingerprint.context.get("engine.version", "?")
        return " ".join(str(part) for part in (self.spec.engine_label, version, self.spec.dtype) if part)


def completion_text_to_json(completion: Completion) -> dict[str, Any]:
    """Everything but the log-probabilities: the readable half."""
    own = completion.own_prompt_token_ids
    terminator = completion.terminator
    return {
        "id": completion.id,
        "prompt_text": completion.prompt_text,
        "prompt_token_ids": list(completion.prompt_token_ids),
        # Nearly always equal; saying so keeps the file small and makes the odd one stand out.
        "own_prompt_token_ids": "same" if own == completion.prompt_token_ids else (None if own is None else list(own)),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "terminator_id": None if terminator is None else terminator.token_id,
        "finish_reason": completion.finish_reason.value,
        "stop_reason": completion.stop_reason,
        "timing": asdict(completion.timing),
        **({} if completion.decoded_text is None else {"decoded_text": completion.decoded_text}),
    }


def completion_from_json(
    data: Mapping[str, Any], *, logprobs: TokenLogprobs | None, terminator_logprobs: TokenLogprobs | None
) -> Completion:
    """Join the readable half with its log-probabilities.

    Raises:
        KeyError, TypeError, ValueError: If the data is not what `completion_text_to_json` writes.
    """
    prompt_token_ids = tuple(data["prompt_token_ids"])
    own = data["own_prompt_token_ids"]
    terminator_id = data["terminator_id"]
    return Completion(
        id=data["id"],
        prompt_token_ids=prompt_token_ids,
        own_prompt_token_ids=prompt_token_ids if own == "same" else (None if own is None else tuple(own)),
        prompt_text=data["prompt_text"],
        token_ids=tuple(data["token_ids"]),
        text=data["text"],
        terminator=None if terminator_id is None else Terminator(token_id=terminator_id, logprobs=terminator_logprobs),
        finish_reason=FinishReason(data["finish_reason"]),
        stop_reason=data["stop_reason"],
        logprobs=logprobs,
        timing=Timing(**data["timing"]),
        decoded_text=data.get("decoded_text"),
    )


def missing_ids(request_ids: Sequence[str], completions: Iterable[Completion]) -> tuple[str, ...]:
    """The requests that have no completion yet, in order."""
    done = {c.id for c in completions}
    return tuple(i for i in request_ids if i not in done)


def _frozen(values: array[Any]) -> memoryview:
    return memoryview(values).toreadonly()


def _encode(buffer: memoryview) -> str:
    if sys.byteorder == "big":
        swapped = array(buffer.format, buffer.tolist())
        swapped.byteswap()
        buffer = memoryview(swapped)
    return base64.b64encode(buffer).decode("ascii")


def _decode(typecode: str, text: str) -> memoryview:
    values = array(typecode)
    values.frombytes(base64.b64decode(text))
    if sys.byteorder == "big":
        values.byteswap()
    return _frozen(values)
