"""A tiny engine without a model that honours every sampling parameter, so that one changed rule is one planted fault.

The raw logits of a step are a hash of everything before it, tilted like a small language model's: some words are
common, what followed a token before is likely to follow it again, an answer in a chat ends after a few tokens, and the
bytes of a character stay together. `noise_nats` moves the logits a little with every request and rounds them, as 16
bits do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from parity import probes
from parity.engines import EngineSpec
from parity.fingerprint import Fingerprint, Scalar
from parity.prompts import Prompt, Request, SamplingParams, Workload
from parity.recording import Completion, FinishReason, Recording, Terminator, Timing, TokenLogprobs, WorkloadRecord

Floats: TypeAlias = "NDArray[np.float64]"
_Row: TypeAlias = "tuple[float, NDArray[np.int64], Floats]"  # the chosen token's, and the best tokens' with their ids

BOS, END, USER, ASSISTANT, ODD = range(5)
"""Special tokens; ODD stands for every character of a prompt that the vocabulary lacks."""
_COMMON = (" the", " of", " and", " was", ".", ",")
_WORDS = ("apple", "river", "stone", "winter", "lamp", "garden", "window", "letter", "drum", "house", "baker",
          "candle", "market", "doctor", "silver", "harbour", "engine", "morning", "pocket", "ladder", "orange",
          "thunder", "village", "kitchen", "paper", "mirror", "valley", "island", "forest", "bridge", "tower",
          "castle")  # fmt: skip
_EMOJI = tuple(bytes([b]) for b in "🙂".encode())
_PIECES = (*(p.encode() for p in (*_COMMON, *(f" {w}" for w in _WORDS), "ing", "er", "s", "\n")), *_EMOJI)
_VOCABULARY = dict(enumerate(_PIECES, ODD + 1))
_IDS = {piece: token_id for token_id, piece in _VOCABULARY.items()}
_SIZE = max(_VOCABULARY) + 1
_NEWLINE, _EMOJI_IDS = _IDS[b"\n"], [_IDS[b] for b in _EMOJI]
_UNUSABLE = [BOS, END, USER, ASSISTANT, ODD, *_EMOJI_IDS[1:]]
_LONGEST = max(map(len, _PIECES))
_BATCH_GRID_NATS = 1 / 32
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 4096) for i in range(4096)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a correct engine does, and what a wrong one does in its place."""

    end_ids: frozenset[int] = frozenset({END})
    end_masked: bool = False
    repetition_spares_prompt: bool = False
    presence_counts_prompt: bool = False
    frequency_counts_prompt: bool = False
    frequency_counts_once: bool = False
    logprobs_after_temperature: bool = False
    logprobs_after_filters: bool = False
    stops_compared_as_tokens: bool = False


def unchanged(request: Request) -> Request:
    """Every parameter reaches the engine as asked."""
    return request


def unedited(completion: Completion, request: Request) -> Completion:
    """Every answer is handed out as it was made."""
    return completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """One engine. `salt`: another text is another model. `rewrite`: what reaches it; `edit`: what it hands out."""

    salt: str = ""
    noise_nats: float = 0.0
    rules: Rules = Rules()
    rewrite: Callable[[Request], Request] = unchanged
    edit: Callable[[Completion, Request], Completion] = unedited
    can_stream: bool = True
    identity: tuple[tuple[str, Scalar], ...] = (("model.config.bos_token_id", BOS), ("model.config.eos_token_id", END))

    def record(self, workload: Workload) -> Recording:
        """Answer a workload."""
        fingerprint = Fingerprint(
            identity={"dtype": "float32", **dict(self.identity)},
            context={"engine.version": "1", **({"engine.can_stream": True} if self.can_stream else {})},
            health={},
            packages={},
        )
        common = workload.requests[0].sampling
        asked = WorkloadRecord(  # not `of`: its digest takes as long as the answers
            name=workload.name,
            digest="toy",
            forced_from=None,
            sampling=common,
            request_ids=tuple(r.id for r in workload.requests),
            others={r.id: r.sampling for r in workload.requests if r.sampling != common},
        )
        return Recording(
            spec=EngineSpec(engine="toy", model="toy", dtype="float32", options={}, env={}),
            workload=asked,
            fingerprint=fingerprint,
            completions=tuple(self._completion(request) for request in workload.requests),
            created_at="2026-11-24T12:00:00+00:00",
            resumed=0,
            digest="toy",
        )

    def probed(self) -> Recording:
        """The answers that contract probes judge."""
        return self.record(probes.second(self.record(probes.first())))

    def _completion(self, request: Request) -> Completion:
        ids = tokenize(request.prompt)
        sent = self.rewrite(replace(request, prompt_token_ids=request.prompt_token_ids or ids))
        made = replace(_answered(self.salt, self.noise_nats, self.rules, sent), own_prompt_token_ids=ids)
        return self.edit(made, request)


def tokenize(prompt: Prompt) -> tuple[int, ...]:
    """The longest known pieces first; a chat is BOS, then each message between its role and END."""
    if prompt.messages is None:
        return split(prompt.text or "")
    ids = [BOS]
    for message in prompt.messages:
        ids += [USER, *split(message.content), END, _NEWLINE]
    return (*ids, ASSISTANT)


@lru_cache
def split(text: str) -> tuple[int, ...]:
    """Text to tokens."""
    data, ids, at = text.encode(), [], 0
    while at < len(data):
        length = next((n for n in range(_LONGEST, 0, -1) if data[at : at + n] in _IDS), 1)
        ids.append(_IDS.get(data[at : at + length], ODD))
        at += length
    return tuple(ids)


def decode(token_ids: Sequence[int]) -> str:
    """Tokens to text, all at once, special ones left out."""
    return b"".join(_VOCABULARY.get(i, b"") for i in token_ids).decode("utf-8", "replace")


@lru_cache(maxsize=200_000)
def _logits(salt: str, context: tuple[int, ...]) -> Floats:
    """The model. Shape: [vocabulary]."""
    chance = hashlib.shake_256(f"{salt}{context}".encode()).digest(2 * _SIZE)
    logits = 14.0 + 2.0 * _NORMAL[np.frombuffer(chance, np.uint16) % len(_NORMAL)]
    logits[ODD + 1 : ODD + 1 + len(_COMMON)] += 2.0
    last = context[-1]
    for at in range(len(context) - 1):
        if context[at] == last:
            same_before = at > 0 and context[at - 1] == context[-2]
            logits[context[at + 1]] += 1.5 if same_before else 0.75
    logits[_UNUSABLE] = -10.0
    if last in _EMOJI_IDS[:-1]:
        logits[_EMOJI_IDS[_EMOJI_IDS.index(last) + 1]] = 50.0
    if last == END:
        logits[_NEWLINE] = 50.0
    if ASSISTANT in context:
        begin = context.index(ASSISTANT) + 1
        if len(context) - begin >= 3 + sum(context[:begin]) % 25 and END not in context[begin:]:
            logits[END] = logits.max() + 2.0
    logits.setflags(write=False)
    return logits


@lru_cache(maxsize=100_000)
def _answered(salt: str, noise_nats: float, rules: Rules, request: Request) -> Completion:
    s, forced, prompt = request.sampling, request.forced_token_ids, request.prompt_token_ids or ()
    rng = np.random.default_rng([s.seed or 0, 7])
    batch = np.random.default_rng(list(hashlib.sha256(f"{salt}{request.id}".encode()).digest()))
    output: list[int] = []
    rows: list[_Row] = []
    ended, stopped_by = False, None
    while len(output) < (s.max_tokens if forced is None else len(forced)):
        raw = _logits(salt, (*prompt, *output))
        if noise_nats:
            raw = np.round((raw + noise_nats * batch.standard_normal(_SIZE)) / _BATCH_GRID_NATS) * _BATCH_GRID_NATS
        policy = raw if forced is not None else _policy(raw, s, prompt, output, rules)
        token_id = forced[len(output)] if forced is not None else _chosen(policy, s, rng)
        rows.append(_row(_shown(raw, policy, s, rules), token_id, s.logprobs))
        output.append(token_id)
        if forced is None:
            ended = (token_id in rules.end_ids and not s.ignore_eos) or token_id in s.stop_token_ids
            stopped_by = None if ended else _stop(output, s, rules)
            if ended or stopped_by is not None:
                break
    body = len(output) - ended
    whole, text = decode(output[:body]), decode(output[:body])
    if stopped_by is not None:
        text = text[: text.index(stopped_by)]
    return Completion(
        id=request.id,
        prompt_token_ids=prompt,
        own_prompt_token_ids=None,
        prompt_text=None,
        token_ids=tuple(output[:body]),
        text=None if forced is not None else text,
        terminator=Terminator(token_id=output[-1], logprobs=_logprobs(rows[body:], s.logprobs)) if ended else None,
        finish_reason=FinishReason.LENGTH if not ended and stopped_by is None else FinishReason.STOP,
        stop_reason=stopped_by if not ended or output[-1] not in s.stop_token_ids else output[-1],
        logprobs=_logprobs(rows[:body], s.logprobs),
        timing=Timing(submitted_ns=0, first_token_ns=None, finished_ns=1),
        decoded_text=None if forced is not None or whole == text else whole,
    )


def _policy(raw: Floats, s: SamplingParams, prompt: Sequence[int], output: Sequence[int], rules: Rules) -> Floats:
    """Logits after minimum length, penalties, temperature, min_p, top_k and top_p, in vLLM's order."""
    logits = raw.copy()
    if len(output) < s.min_tokens or rules.end_masked:
        logits[[*rules.end_ids, *s.stop_token_ids]] = -math.inf
    if (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0):
        _penalise(logits, s, prompt, output, rules)
    if s.is_greedy:
        return logits
    logits /= s.temperature
    if (s.min_p, s.top_k, s.top_p) == (0.0, 0, 1.0):
        return logits
    order = np.argsort(-logits, kind="stable")
    kept = logits[order]
    if s.min_p > 0.0:
        kept[kept < kept[0] + math.log(s.min_p)] = -math.inf
    if s.top_k > 0:
        kept[kept < kept[s.top_k - 1]] = -math.inf
    p = np.exp(kept - kept[0])
    p /= p.sum()
    if s.top_p < 1.0:
        kept[np.cumsum(p) - p >= s.top_p] = -math.inf
    logits[order] = kept
    return logits


def _penalise(logits: Floats, s: SamplingParams, prompt: Sequence[int], output: Sequence[int], rules: Rules) -> None:
    held = list({*output, *(() if rules.repetition_spares_prompt else prompt)})
    logits[held] = np.where(logits[held] > 0, logits[held] / s.repetition_penalty, logits[held] * s.repetition_penalty)
    counts = np.bincount(np.array([*output, *(prompt if rules.frequency_counts_prompt else ())], int), minlength=_SIZE)
    logits -= s.frequency_penalty * (np.minimum(counts, 1) if rules.frequency_counts_once else counts)
    logits[list({*output, *(prompt if rules.presence_counts_prompt else ())})] -= s.presence_penalty


def _chosen(policy: Floats, s: SamplingParams, rng: np.random.Generator) -> int:
    if s.is_greedy:
        return int(policy.argmax())
    return int((policy - np.log(-np.log(rng.random(_SIZE)))).argmax())


def _shown(raw: Floats, policy: Floats, s: SamplingParams, rules: Rules) -> Floats:
    """The log-probabilities that are handed out."""
    logits = raw
    if rules.logprobs_after_temperature and not s.is_greedy:
        logits = raw / s.temperature
    if rules.logprobs_after_filters and not s.is_greedy:
        logits = np.where(np.isfinite(policy), raw, -math.inf)
    top = float(logits.max())
    return np.asarray(logits - (top + math.log(np.exp(logits - top).sum())))


def _row(logprobs: Floats, token_id: int, k: int) -> _Row:
    best = np.argsort(-logprobs, kind="stable")[:k]
    return float(logprobs[token_id]), best, logprobs[best]


def _logprobs(rows: Sequence[_Row], k: int) -> TokenLogprobs:
    """As `TokenLogprobs.from_rows` makes them, faster."""
    columns = (
        np.array([r[0] for r in rows], "f"),
        np.array([r[1] for r in rows], "i"),
        np.array([r[2] for r in rows], "f"),
    )
    chosen, ids, top = (c.reshape(-1).data.toreadonly() for c in columns)
    return TokenLogprobs(k=k, chosen=chosen, top_token_ids=ids, top=top)


def _stop(output: Sequence[int], s: SamplingParams, rules: Rules) -> str | None:
    """The stop string that the newest token completed."""
    if not s.stop or len(output) <= s.min_tokens:
        return None
    if rules.stops_compared_as_tokens:
        return next((stop for stop in s.stop if tuple(output[-len(split(stop)) :]) == split(stop)), None)
    text = decode(output)
    return next((stop for stop in s.stop if stop in text), None)


def forget() -> None:
    """Free what is kept for equal requests."""
    _logits.cache_clear()
    _answered.cache_clear()
