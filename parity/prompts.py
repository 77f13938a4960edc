"""What is asked: prompts, sampling parameters, requests and workloads.

Pure values. A workload's digest names the question itself, so two recordings of the same question carry the same digest
whatever engine, tokenizer or machine answered it. Standard library only: engines' interpreters import this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from parity.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One input, in exactly one of three forms.

    `messages` go through the model's chat template; `text` is tokenised as it stands, with the special tokens that the
    tokenizer itself adds; `token_ids` are sent untouched.

    Raises:
        ConfigError: If not exactly one form is given.
    """

    id: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("text", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ConfigError(f"prompt {self.id!r} must have exactly one of text, messages, token_ids; it has {found}")


class Grammar(str, Enum):
    """The ways to say what a structured answer must look like."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """What every answer must match as a whole.

    definition: the JSON text of a schema, a regular expression, or the JSON text of a list of strings.
    """

    grammar: Grammar
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample. Every field is sent to every engine, so that no engine default ever decides.

    The same empty object means greedy in TensorRT-LLM and temperature 1 in vLLM; hence no field has a default here.
    `top_k` 0 and `top_p` 1 keep all tokens. `logprobs` is the number of top tokens returned with each token, in nats,
    before temperature and filters ("raw"). One completion per request: repeats are requests of their own.
    `structured` None leaves the answer free.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    structured: Structured | None

    @classmethod
    def greedy(cls, *, max_tokens: int, logprobs: int) -> SamplingParams:
        """The argmax at every step, stopping at the model's end-of-sequence tokens."""
        return cls(
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=0,
            max_tokens=max_tokens,
            min_tokens=0,
            stop=(),
            stop_token_ids=(),
            ignore_eos=False,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logprobs=logprobs,
            structured=None,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether every step takes the most probable token."""
        return self.temperature == 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplingParams:
        """Read what `dataclasses.asdict` wrote, also before answers could be structured."""
        structured = data.get("structured")
        return cls(
            **{
                **data,
                "stop": tuple(data["stop"]),
                "stop_token_ids": tuple(data["stop_token_ids"]),
                "structured": None
                if structured is None
                else Structured(grammar=Grammar(structured["grammar"]), definition=structured["definition"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt with its sampling parameters.

    `forced_token_ids` asks for teacher forcing: the engine scores these tokens instead of choosing its own.
    `prompt_token_ids` are filled in once, by the reference's tokenizer, and then sent to every engine.
    Requests of one `turn` go to the engine as one offline batch, turn after turn.
    `stream` asks for the answer piece by piece; its text is the pieces put together.
    `reuse_prefix` lets the engine take the beginning of the prompt from its prefix cache, which no other request may:
    a cached prefix changes numerics.
    """

    prompt: Prompt
    sampling: SamplingParams
    forced_token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    turn: int = 0
    stream: bool = False
    reuse_prefix: bool = False

    @property
    def id(self) -> str:
        """The prompt's id: one request per prompt in a workload."""
        return self.prompt.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A named list of requests. `forced_from` is the digest of the recording whose tokens are forced, if any."""

    name: str
    requests: tuple[Request, ...]
    forced_from: str | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for request in self.requests:
            if request.id in seen:
                raise ConfigError(f"workload {self.name!r} has two prompts with the id {request.id!r}; ids must differ")
            seen.add(request.id)

    @property
    def digest(self) -> str:
        """SHA-256 of the question: prompts, sampling and forced tokens; not names, tags or a tokenizer's splitting."""
        question = [
            {
                "id": request.id,
                "text": request.prompt.text,
                "messages": [[m.role, m.content] for m in request.prompt.messages or ()],
                "token_ids": request.prompt.token_ids,
                "sampling": {k: v for k, v in asdict(request.sampling).items() if k != "structured" or v},
                "forced": request.forced_token_ids,
                # Left out where they are ordinary: the digests of plain questions never change.
                **({"turn": request.turn} if request.turn else {}),
                **({"stream": True} if request.stream else {}),
                **({"reuse_prefix": True} if request.reuse_prefix else {}),
            }
            for request in self.requests
        ]
        return sha256_of_json(question)

    def with_prompt_token_ids(self, ids_of: Mapping[str, Sequence[int]]) -> Workload:
        """The same workload with the given token ids, by prompt id, as what is sent."""
        requests = tuple(replace(r, prompt_token_ids=tuple(ids_of[r.id])) for r in self.requests)
        return replace(self, requests=requests)

    def forced(self, *, tokens_of: Mapping[str, Sequence[int]], forced_from: str) -> Workload:
        """The teacher-forced twin: score `tokens_of[id]` after each prompt. Prompts without tokens are left out."""
        requests = tuple(
            replace(r, forced_token_ids=tuple(tokens_of[r.id])) for r in self.requests if tokens_of.get(r.id)
        )
        return Workload(name=f"{self.name}-forced", requests=requests, forced_from=forced_from)


def sha256_of_json(value: object) -> str:
    """SHA-256 of the canonical JSON text: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _all(value: object, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(right, value))


def _is_message(value: object) -> bool:
    wanted = {f.name for f in fields(Message)}
    return isinstance(value, Mapping) and set(value) == wanted and _all(list(value.values()), _is_text)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_FORMS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("text", _is_text, "a string"),
    ("messages", lambda v: _all(v, _is_message), "a list of objects with the strings 'role' and 'content'"),
    ("token_ids", lambda v: _all(v, lambda i: type(i) is int and i >= 0), "a list of whole numbers"),
    ("tags", lambda v: _all(v, _is_text), "a list of strings"),
)


def prompt_from_json(data: Mapping[str, Any]) -> Prompt:
    """Read one line of a prompt set.

    Raises:
        ConfigError: If a key is unknown, a value is of the wrong kind, or the prompt has not exactly one form.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"a prompt must be a JSON object, not {data!r}")
    known = {f.name for f in fields(Prompt)}
    if unknown := sorted(set(data) - known):
        raise ConfigError(f"prompt {data.get('id')!r} has the unknown key {unknown[0]!r}; known are {sorted(known)}")
    if not isinstance(data.get("id"), str):
        raise ConfigError(f"a prompt needs an id that is a string, not {data.get('id')!r}")
    for name, right, wanted in _FORMS:
        if data.get(name) is not None and not right(data[name]):
            raise ConfigError(f"prompt {data['id']!r}: {name!r} must be {wanted}, not {data[name]!r}")
    messages = data.get("messages")
    token_ids = data.get("token_ids")
    return Prompt(
        id=data["id"],
        text=data.get("text"),
        messages=None if messages is None else tuple(Message(**m) for m in messages),
        token_ids=None if token_ids is None else tuple(token_ids),
        tags=tuple(data.get("tags") or ()),
    )


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """One line of a prompt set; absent forms are left out."""
    return {key: value for key, value in asdict(prompt).items() if value is not None}


def request_to_json(request: Request) -> dict[str, Any]:
    """The wire form of a request; its turn is the host's business."""
    return {
        "prompt": prompt_to_json(request.prompt),
        "sampling": asdict(request.sampling),
        "forced_token_ids": request.forced_token_ids,
        "prompt_token_ids": request.prompt_token_ids,
        "stream": request.stream,
        "reuse_prefix": request.reuse_prefix,
    }


def request_from_json(data: Mapping[str, Any]) -> Request:
    """Read what `request_to_json` wrote."""
    forced, sent = data["forced_token_ids"], data["prompt_token_ids"]
    return Request(
        prompt=prompt_from_json(data["prompt"]),
        sampling=SamplingParams.from_json(data["sampling"]),
        forced_token_ids=None if forced is None else tuple(forced),
        prompt_token_ids=None if sent is None else tuple(sent),
        stream=data["stream"],
        reuse_prefix=data["reuse_prefix"],
    )
