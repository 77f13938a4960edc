"""A tiny engine without a model that honours every parameter, and that can be told to break one law."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import lru_cache
from itertools import groupby

from parity.prompts import Request, SamplingParams, Workload
from parity.recording import Completion, FinishReason, Recording, Terminator, TokenLogprobs, WorkloadRecord
from recordings import EOS, completion, recording

_FIRST = 10
_PIECES = [bytes([i]) for i in range(256)] + [b" the", b"ing", b"in", b", ", b"I ", b"<|", b"e.", b"\n\n", b"a "]
_LIKELY = [*(_FIRST + i for i in b"aeiost \n.1:"), *range(_FIRST + 256, _FIRST + len(_PIECES))]
_CANDIDATES = 12


class Fault(Enum):
    """One broken law each; see `ToyEngine`."""

    PROMPT_CUT = auto()
    ONE_TOKEN_MORE = auto()
    LENGTH_TOO_EARLY = auto()
    SPACES_LOST = auto()
    LOGITS = auto()
    MAX_TOKENS_STEERS = auto()
    MIN_TOKENS_IGNORED = auto()
    STOP_IGNORED = auto()
    STOP_KEPT = auto()
    STREAMED_TOKEN_BY_TOKEN = auto()
    NEIGHBOUR_LEAKS = auto()
    TOP_K_IGNORED = auto()
    SEED_IGNORED = auto()


def tokenized(request: Request) -> tuple[str, tuple[int, ...]]:
    """One token for every byte, behind a template for messages."""
    prompt = request.prompt
    text = f"user: {prompt.messages[0].content}\nanswer:" if prompt.messages else prompt.text or ""
    return text, tuple(_FIRST + byte for byte in text.encode())


def decoded(token_ids: Sequence[int]) -> str:
    return b"".join(_PIECES[i - _FIRST] for i in token_ids).decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class ToyEngine:
    """Answers workloads.

    fault: what is broken, for prompts of which `hits` is true.
    rounding: how far logits move with the batch that a request is in, in nats.
    asked: the workloads so far.
    """

    fault: Fault | None = None
    hits: Callable[[str], bool] = lambda prompt: True
    rounding: float = 0.0
    scored: bool = True
    asked: list[Workload] = field(default_factory=list)

    def ask(self, workload: Workload) -> Recording:
        self.asked.append(workload)
        by_turn = sorted(workload.requests, key=lambda r: r.turn)
        batches = [list(batch) for _, batch in groupby(by_turn, key=lambda r: r.turn)]
        answers = {r.id: self._answer(r, batch) for batch in batches for r in batch}
        return recording([answers[r.id] for r in workload.requests], asked=WorkloadRecord.of(workload))

    def _answer(self, request: Request, batch: Sequence[Request]) -> Completion:
        prompt_text, sent = tokenized(request)
        hit = self.fault if self.hits(prompt_text) else None
        worked_on = sent[:-1] if hit is Fault.PROMPT_CUT else sent
        asked = _asked(request.sampling, hit)
        salt = len(batch) if hit is Fault.NEIGHBOUR_LEAKS else request.turn if self.rounding else 0
        salt = asked.max_tokens if hit is Fault.MAX_TOKENS_STEERS else salt
        chance = random.Random(asked.seed if asked.seed is not None else request.id)
        body: list[int] = []
        rows: list[Sequence[tuple[int, float]]] = []
        end, cut_at, reason = None, None, None
        while len(body) < asked.max_tokens and cut_at is None:
            row = _row((*worked_on, *body), salt, self.rounding)
            token_id = _chosen(row, asked, chance, masked=len(body) < asked.min_tokens)
            rows.append([(i, value + 3.0) for i, value in row] if hit is Fault.LOGITS else row)
            if token_id == EOS:
                end = EOS
                break
            body.append(token_id)
            found = [(decoded(body).index(s), s) for s in asked.stop if s in decoded(body)]
            if found and len(body) > asked.min_tokens:
                cut_at, reason = min(found, key=lambda place: place[0] + len(place[1]))
        made = [*body, *([] if end is None else [end])]
        chosen = [dict(row)[token_id] for row, token_id in zip(rows, made, strict=True)]
        scores = TokenLogprobs.from_rows(chosen, [r[:20] for r in rows], k=20)
        text = _text(body, request, hit, cut_at, reason)
        ended = end is not None or cut_at is not None
        whole = decoded(body)
        answer = replace(
            completion(
                request.id,
                prompt_token_ids=worked_on,
                own_prompt_token_ids=sent,
                prompt_text=prompt_text,
                token_ids=body,
                text=text,
                rows=None,
                terminator=None if end is None else Terminator(token_id=end, logprobs=None),
                finish_reason=FinishReason.STOP if ended else FinishReason.LENGTH,
                stop_reason=reason,
            ),
            decoded_text=whole if whole != text else None,
        )
        if not self.scored:
            return answer
        answer = replace(answer, logprobs=scores.rows(0, len(body)))
        if end is None:
            return answer
        last = scores.rows(len(body), len(body) + 1)
        return replace(answer, terminator=Terminator(token_id=end, logprobs=last))


@lru_cache(maxsize=1 << 16)
def _row(context: tuple[int, ...], salt: int, rounding: float) -> tuple[tuple[int, float], ...]:
    """The model: log-probabilities of a few tokens, most probable first, that follow from the context.

    Another salt is another model, or, if there is rounding, only rounds differently.
    """
    here = random.Random(hash((context, 0 if rounding else salt)))
    ids = [*here.sample(_LIKELY, _CANDIDATES - 3), EOS, _FIRST + 0xC3, _FIRST + 0xA9]
    logits = {i: here.gauss(0.0, 1.5) for i in ids}
    if context and context[-1] == _FIRST + 0xC3:  # the second half of an accented letter, nearly always
        logits[_FIRST + 0xA9] += 6.0
    if rounding:
        other = random.Random(hash((context, salt)))
        logits = {i: value + other.gauss(0.0, rounding) for i, value in logits.items()}
    total = math.log(sum(map(math.exp, logits.values())))
    return tuple(sorted(((i, value - total) for i, value in logits.items()), key=lambda entry: -entry[1]))


def _asked(sampling: SamplingParams, hit: Fault | None) -> SamplingParams:
    """What reaches the engine."""
    if hit is Fault.ONE_TOKEN_MORE:
        return replace(sampling, max_tokens=sampling.max_tokens + 1)
    if hit is Fault.LENGTH_TOO_EARLY:
        return replace(sampling, max_tokens=max(1, sampling.max_tokens - 1))
    if hit is Fault.MIN_TOKENS_IGNORED:
        return replace(sampling, min_tokens=0)
    if hit is Fault.STOP_IGNORED:
        return replace(sampling, stop=())
    if hit is Fault.TOP_K_IGNORED:
        return replace(sampling, top_k=0)
    return replace(sampling, seed=None) if hit is Fault.SEED_IGNORED else sampling


def _chosen(row: Sequence[tuple[int, float]], asked: SamplingParams, chance: random.Random, *, masked: bool) -> int:
    allowed = [(i, value) for i, value in row if not (masked and i == EOS)]
    if asked.is_greedy:
        return allowed[0][0]
    kept = allowed[: asked.top_k or None]
    luck = {i: -math.log(-math.log(chance.random())) for i in sorted(i for i, _ in row)}
    return max(kept, key=lambda entry: entry[1] / asked.temperature + luck[entry[0]])[0]


def _text(body: Sequence[int], request: Request, hit: Fault | None, cut_at: int | None, reason: str | None) -> str:
    text = decoded(body)
    if hit is Fault.STREAMED_TOKEN_BY_TOKEN and request.stream:
        text = "".join(decoded([i]) for i in body)
    if cut_at is not None:
        text = text[: cut_at + (len(reason or "") if hit is Fault.STOP_KEPT else 0)]
    return text.replace(" ", "") if hit is Fault.SPACES_LOST else text
