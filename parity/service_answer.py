"""What a streamed completion says: when which tokens came, and whether it is what was asked for. Pure.

The stream is server-sent events, each a JSON object of the OpenAI completions API. A chunk counts where it brings
tokens: by the server's running count where it gives one with every chunk (`continuous_usage_stats`), else each
chunk but an empty last one.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from typing import Any

from parity.timings import Failure

_decode = json.JSONDecoder().decode
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading arbitrary bytes as a completion may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What was asked for. exactly: whether the server was told to ignore the model's end of an answer."""

    prompt_tokens: int
    output_tokens: int
    exactly: bool


@dataclass(slots=True, kw_only=True)
class Answer:
    """chunk_s: arrival of each chunk with tokens, on the clock of its bytes. chunk_tokens: None where not counted.

    prompt_tokens, output_tokens: the server's count; None where it gave none. failure: None for a complete answer.
    """

    chunk_s: array[float] = field(default_factory=lambda: array("d"))
    chunk_tokens: array[int] | None = field(default_factory=lambda: array("I"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    done: bool = False
    failure: Failure | None = None
    detail: str = ""


class Reader:
    """Reads an answer piece by piece; what it finds is in `answer`."""

    def __init__(self, expected: Expected) -> None:
        self.answer = Answer()
        self._expected = expected
        self._rest = b""

    def feed(self, piece: bytes, moment: float) -> None:
        """The next bytes. An event's moment is that of the piece that completed its line."""
        if self.answer.failure is not None:
            return
        *lines, self._rest = (self._rest + piece).split(b"\n")
        try:
            for line in lines:
                _read_line(self.answer, line, moment)
        except _UNREADABLE as error:
            self._give_up(error)

    def end(self) -> Answer:
        """There are no more: is the answer what was asked for?"""
        if self.answer.failure is None and self._rest.strip() and not self.answer.done:
            self._give_up(ValueError(f"cut within a line: {_shown(self._rest)}"))
        if self.answer.failure is None:
            try:
                _check(self.answer, self._expected)
            except _UNREADABLE as error:
                self._give_up(error)
        return self.answer

    def _give_up(self, error: Exception) -> None:
        self.answer.failure = Failure.UNREADABLE
        self.answer.detail = f"{type(error).__name__}: {error}"[:200]


def _read_line(answer: Answer, line: bytes, moment: float) -> None:
    if line.startswith(b"data:"):
        _take(answer, line[5:].strip(), moment)
    elif line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
        raise ValueError(f"not a server-sent event: {_shown(line)}")


def _shown(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", "replace"))


def _take(answer: Answer, data: bytes, moment: float) -> None:
    if data == b"[DONE]":
        answer.done = True
        return
    event: dict[str, Any] = _decode(data.decode())
    if "error" in event or event.get("object") == "error":
        said = event.get("error", event)
        answer.failure = Failure.CLOSED
        answer.detail = f"the server said: {said.get('message', said) if isinstance(said, dict) else said}"[:200]
        return
    usage, choices = event.get("usage"), event.get("choices")
    before = answer.output_tokens or 0
    if usage:
        answer.prompt_tokens, answer.output_tokens = (_count(usage[k]) for k in ("prompt_tokens", "completion_tokens"))
    if not choices:
        return
    choice = choices[0]
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if usage and answer.chunk_tokens is not None:
        if usage["completion_tokens"] > before:
            answer.chunk_s.append(moment)
            answer.chunk_tokens.append(usage["completion_tokens"] - before)
    elif choice.get("text") or not choice.get("finish_reason"):  # a token may well have no text
        # Without a count of its own, one chunk leaves all of them uncounted: a later count would be of several.
        answer.chunk_s.append(moment)
        answer.chunk_tokens = None


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"not a count of tokens: {value!r}")
    return value


def _check(answer: Answer, expected: Expected) -> None:
    if not answer.done and answer.finish_reason is None:
        answer.failure = Failure.CLOSED
        answer.detail = f"it ended after {len(answer.chunk_s)} chunks, with neither a finish reason nor [DONE]"
        return
    complaint = _miscount(answer, expected)
    if complaint is not None:
        answer.failure, answer.detail = Failure.WRONG_COUNT, complaint


def _miscount(answer: Answer, expected: Expected) -> str | None:
    found, wanted, chunks = answer.output_tokens, expected.output_tokens, len(answer.chunk_s)
    if found is None:
        return None if 0 < chunks <= wanted else f"{chunks} chunks, and {wanted} tokens were asked for"
    early = not expected.exactly and found < wanted and answer.finish_reason == "stop"
    carried = found if answer.chunk_tokens is None else sum(answer.chunk_tokens)
    rules = (
        (found == wanted or early, f"{found} output tokens, and {wanted} were asked for ({answer.finish_reason})"),
        (
            answer.prompt_tokens == expected.prompt_tokens,
            f"{answer.prompt_tokens} prompt tokens of the {expected.prompt_tokens} that were sent",
        ),
        (
            carried == found and min(found, 1) <= chunks <= found,
            f"{found} output tokens, and {carried} in {chunks} chunks",
        ),
    )
    return next((f"the server counts {complaint}" for kept, complaint in rules if not kept), None)
