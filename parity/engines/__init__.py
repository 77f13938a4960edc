"""Engines: how one is named, and what an adapter must do.

An adapter is one file in this folder (or one named by path), imported only by the worker, inside the engine's own
interpreter. It translates requests to the engine's words and the engine's answers back; it never judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from parity.fingerprint import Scalar
    from parity.prompts import Prompt, Request
    from parity.recording import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Which engine, which model, and how it is started.

    engine: an adapter's name ("vllm"), or the path of a Python file with an `open_engine` of its own.
    model: a directory, `hub:ORG/NAME@REVISION`, or `package:NAME==VERSION`.
    environment: a locked environment's name; or else `python`: an interpreter that has the engine installed.
    launcher: words put before the interpreter, e.g. ("docker", "exec", "-i", "box") or ("ssh", "host").
    url: a running server, for adapters that speak HTTP.
    threads: CPU threads of the engine. Two busy cores punish oversubscription tenfold, so it is never left open.
    options: passed verbatim to the engine's constructor, and recorded.
    env: environment variables set before the engine is imported, and recorded.
    """

    engine: str
    model: str
    dtype: str
    quantization: str | None = None
    environment: str | None = None
    python: str | None = None
    launcher: tuple[str, ...] = ()
    url: str | None = None
    threads: int = 1
    options: Mapping[str, Any]
    env: Mapping[str, str]

    @property
    def engine_label(self) -> str:
        """The adapter's name, also where it was given as a path."""
        return PurePath(self.engine).stem

    def to_json(self) -> dict[str, Any]:
        """Plain data for the wire and for recordings."""
        return {**asdict(self), "launcher": list(self.launcher)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineSpec:
        """Read what `to_json` wrote."""
        return cls(**{**data, "launcher": tuple(data["launcher"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompt:
    """What an engine's own tokenizer makes of a prompt; `text` is the rendered chat template."""

    text: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A sign of life between completions: tokens produced so far by the running call."""

    tokens: int


class Engine(Protocol):
    """A loaded engine. Made by the adapter's `open_engine(spec: EngineSpec, model: Path) -> Engine`."""

    def facts(self) -> Mapping[str, Scalar]:
        """Versions and effective settings; "engine.version" is required.

        What not every engine can do is named here where it can: "engine.can_stream", "engine.can_structure",
        "engine.can_reuse_prefix".
        """

    def tokenize(self, prompts: Sequence[Prompt]) -> Sequence[TokenizedPrompt]:
        """What the engine's own tokenizer and chat template make of each prompt."""

    def detokenize(self, token_ids: Sequence[int]) -> str | None:
        """The text of these tokens, special ones left out, decoded all at once; None where there is no tokenizer."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """Answer all requests as one offline batch; yield each completion as it finishes, in any order.

        Every request has `prompt_token_ids`. One with `forced_token_ids` is scored, not generated.
        Raises: `parity.errors.EngineError` for a parameter the engine cannot honour. Refused, never ignored.
        """

    def close(self) -> None:
        """Free the engine."""


def tokenize(tokenizer: Any, prompt: Prompt) -> TokenizedPrompt:
    """What a Hugging Face tokenizer makes of a prompt, as the engines' own chat and completions entry points do."""
    if prompt.messages is None:
        return TokenizedPrompt(text=prompt.text, token_ids=tuple(tokenizer.encode(prompt.text)))
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself; adding them again is the classic doubled BOS.
    return TokenizedPrompt(text=text, token_ids=tuple(tokenizer.encode(text, add_special_tokens=False)))
