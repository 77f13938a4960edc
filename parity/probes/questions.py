"""What is asked of one engine: base questions, and experiments made from the answers to them.

An experiment repeats a base question and changes one thing about it, so that whatever else changes in the answer is the
engine's doing. Nothing here knows a model's vocabulary: stop strings are taken from answered text, stop tokens from
answered tokens, minimum lengths from answered ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from parity.errors import IncomparableError
from parity.prompts import Message, Prompt, Request, SamplingParams, Workload
from parity.recording import Completion, FinishReason, Recording

HOT = 1.8
"""A temperature at which the second-best token is taken often, and others too where nothing forbids it; vLLM and the
OpenAI API refuse more than 2."""
PENALTY = 2.0
_BASE_TOKENS, _DRAWN_TOKENS = 24, 32
_GREEDY = SamplingParams.greedy(max_tokens=_BASE_TOKENS, logprobs=20)
_DRAWS, _TWINS = 16, 2
_SCORED, _STOPPED, _ENDED = 2, 3, 2  # so many base questions each
_EXTRA_TOKENS = 5  # that an answer must go on beyond its own end
_SHORTEST_TO_STOP = 6  # tokens: the stop lies inside, not at an end
_TWO_WORDS = re.compile(r" (?=(\w{3,}) (\w{2,}))")


class Experiment(str, Enum):
    """What is changed about a base question; the part of a request's id before the colon."""

    BASE = "base"
    DRAW = "draw"
    SAME_SEED = "same seed"
    COOL = "temperature 0.5"
    TOP_K_1 = "top_k 1"
    TOP_K_2 = "top_k 2"
    TOP_P_TINY = "top_p tiny"
    TOP_P_HALF = "top_p 0.5"
    MIN_P_1 = "min_p 1"
    REPETITION = "repetition_penalty"
    PRESENCE = "presence_penalty"
    FREQUENCY = "frequency_penalty"
    SCORE = "score"
    MAX_TOKENS = "max_tokens"
    MIN_TOKENS = "min_tokens"
    IGNORE_EOS = "ignore_eos"
    STOP_AT_WORDS = "stop at words"
    STOP_INSIDE_WORD = "stop inside a word"
    STOP_TOKEN = "stop token"  # noqa: S105  not a password
    STREAM = "stream"


def _chat(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


_OPEN, _STREAMED = ("keeper", "letter"), ("fruits", "faces", "scripts")
# A penalty of likely tokens shows on an open question, one of sure tokens on a question that repeats a word.
_PENALISED = ("keeper", "drum")
_BASE = (
    # Answers that end by themselves.
    Prompt(id="capital", messages=_chat("What is the capital of France? Answer with one word.")),
    Prompt(id="sum", messages=_chat("What is 7 plus 5? Answer with the number only.")),
    Prompt(id="hot", messages=_chat("Is fire hot? Answer yes or no.")),
    Prompt(id="opposite", messages=_chat("What is the opposite of up? Answer with one word.")),
    # Answers with a shape.
    Prompt(id="fruits", messages=_chat("List six fruits, one on each line.")),
    Prompt(id="count", text="One, two, three, four, five, six, seven,"),
    # Answers that go on repeating.
    Prompt(id="drum", text="drum drum drum drum drum drum drum drum drum drum drum drum drum"),
    Prompt(id="stone", messages=_chat("Write the word stone thirty times, with spaces between.")),
    # Characters of several tokens.
    Prompt(id="scripts", messages=_chat("Repeat this line exactly: Привет, 你好, مرحبا, γειά 🙂🚀")),
    Prompt(id="faces", text="🙂 🚀 🦊 🙂 🚀 🦊 🙂 🚀 🦊 🙂"),
    # Answers that may go anywhere.
    Prompt(id="keeper", text="When the old lighthouse keeper opened the door, she saw"),
    Prompt(id="letter", text="Dear Martin,\n\nThe first thing I noticed in the new town was"),
)


def request_id(experiment: Experiment, base: str, number: int = 0) -> str:
    """The id of a request: `experiment:base`, with a number where there are several of a kind."""
    return f"{experiment.value}:{base}" + (f"#{number}" if number else "")


CHATS = frozenset(request_id(Experiment.BASE, p.id) for p in _BASE if p.messages is not None)
"""The base questions that go through the chat template."""


def base_id(id_: str) -> str:
    """The id of the base question that an experiment's id belongs to."""
    return request_id(Experiment.BASE, id_.partition(":")[2].partition("#")[0])


def first() -> Workload:
    """The 12 base questions: greedy, at most 24 tokens each."""
    prompts = [replace(p, id=request_id(Experiment.BASE, p.id)) for p in _BASE]
    return Workload(name="contract-first", requests=tuple(Request(prompt=p, sampling=_GREEDY) for p in prompts))


def second(first: Recording) -> Workload:
    """The base questions once more, and the experiments made from the answers to them: at most 90 requests, one batch.

    Raises:
        IncomparableError: If `first` does not answer the base questions.
    """
    base = [_Base(prompt=p, answer=_answer(first, request_id(Experiment.BASE, p.id))) for p in _BASE]
    requests = [b.ask(Experiment.BASE) for b in base]
    requests += _chances([b for b in base if b.prompt.id in _OPEN])
    requests += _penalties([b for b in base if b.prompt.id in _PENALISED])
    sound = [b for b in base if b.answer.finish_reason is not FinishReason.ABORT and b.answer.token_ids]
    requests += _scores_and_lengths(sound)
    requests += _stops(sound)
    if first.fingerprint.context.get("engine.can_stream") is True:
        requests += [replace(b.ask(Experiment.STREAM), stream=True) for b in base if b.prompt.id in _STREAMED]
    return Workload(name="contract", requests=tuple(requests))


def _answer(first: Recording, id_: str) -> Completion:
    if id_ not in first.by_id:
        raise IncomparableError(
            f"workload {first.workload.name!r} of {first.label} has no answer to {id_!r}; the experiments are made "
            "from the answers to the base questions: record those of parity.probes.first"
        )
    return first.by_id[id_]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """A base question and the engine's answer to it."""

    prompt: Prompt
    answer: Completion

    @property
    def length(self) -> int:
        return len(self.answer.token_ids)

    def ask(self, experiment: Experiment, number: int = 0, **changed: Any) -> Request:
        """The question again, with some sampling parameters changed."""
        return Request(
            prompt=replace(self.prompt, id=request_id(experiment, self.prompt.id, number)),
            sampling=replace(_GREEDY, **changed),
            prompt_token_ids=self.answer.prompt_token_ids,
        )


def _chances(base: Sequence[_Base]) -> Iterator[Request]:
    """Everything with a temperature. No two have one seed, or equal questions would rightly get equal answers."""
    seed = 0
    for b in base:
        for number in range(1, _DRAWS + 1):
            seed += 1
            drawn = {"temperature": 1.0, "max_tokens": _DRAWN_TOKENS, "seed": seed}
            yield b.ask(Experiment.DRAW, number, **drawn)
            if number <= _TWINS:
                yield b.ask(Experiment.SAME_SEED, number, **drawn)
    for experiment, repeats, changed in (
        # Its policy is known wherever the top_k is within the known tokens; cool, hardly anything lies beyond it.
        (Experiment.COOL, 1, {"temperature": 0.5, "top_k": 10, "max_tokens": _DRAWN_TOKENS}),
        (Experiment.TOP_K_1, 1, {"temperature": 1.0, "top_k": 1}),
        (Experiment.TOP_K_2, 2, {"temperature": HOT, "top_k": 2, "max_tokens": _DRAWN_TOKENS}),
        (Experiment.TOP_P_TINY, 1, {"temperature": 1.0, "top_p": 1e-4}),
        (Experiment.TOP_P_HALF, 2, {"temperature": 1.0, "top_p": 0.5, "max_tokens": _DRAWN_TOKENS}),
        (Experiment.MIN_P_1, 1, {"temperature": 1.0, "min_p": 1.0}),
    ):
        for b in base:
            for number in range(1, repeats + 1):
                seed += 1
                yield b.ask(experiment, number, seed=seed, **changed)


def _penalties(base: Iterable[_Base]) -> Iterator[Request]:
    for b in base:
        yield b.ask(Experiment.REPETITION, repetition_penalty=PENALTY)
        yield b.ask(Experiment.PRESENCE, presence_penalty=PENALTY)
        yield b.ask(Experiment.FREQUENCY, frequency_penalty=PENALTY)


def _scores_and_lengths(base: Sequence[_Base]) -> Iterator[Request]:
    for b in sorted(base, key=_certainty)[:_SCORED]:
        yield replace(b.ask(Experiment.SCORE), forced_token_ids=b.answer.token_ids)
    for b in sorted(base, key=lambda b: -b.length)[:1]:
        for number in (1, 5, 16):
            yield b.ask(Experiment.MAX_TOKENS, number, max_tokens=number)
    ended = [b for b in base if b.answer.terminator is not None and b.length + _EXTRA_TOKENS <= _BASE_TOKENS]
    for b in ended[:_ENDED]:
        yield b.ask(Experiment.MIN_TOKENS, min_tokens=b.length + _EXTRA_TOKENS)
        yield b.ask(Experiment.IGNORE_EOS, ignore_eos=True, max_tokens=b.length + _EXTRA_TOKENS)


def _certainty(b: _Base) -> float:
    """Sure tokens all have a log-probability near 0, and say little about where a score belongs."""
    return -float(b.length) if b.answer.logprobs is None else sum(b.answer.logprobs.chosen)


def _stops(base: Sequence[_Base]) -> Iterator[Request]:
    long = [b for b in base if b.length >= _SHORTEST_TO_STOP]
    spaced = [(b, words) for b in long if (words := _two_words(b.answer.text or "")) is not None]
    for b, words in spaced[:_STOPPED]:
        yield b.ask(Experiment.STOP_AT_WORDS, stop=(f" {words[0]} {words[1]}",))
        yield b.ask(Experiment.STOP_INSIDE_WORD, stop=(f"{words[0][1:]} {words[1][:1]}",))
    new = [(b, token_id) for b in long if (token_id := _new_token(b.answer.token_ids)) is not None]
    for b, token_id in new[: _STOPPED - 1]:
        yield b.ask(Experiment.STOP_TOKEN, stop_token_ids=(token_id,))


def _two_words(text: str) -> tuple[str, str] | None:
    """Two neighbouring words near the middle. Hardly a tokenizer joins two words, or splits one at each letter."""
    found = sorted(_TWO_WORDS.finditer(text), key=lambda m: abs(m.start() - len(text) // 2))
    return (found[0][1], found[0][2]) if found else None


def _new_token(token_ids: Sequence[int]) -> int | None:
    """A token from the second third that does not occur before."""
    middle = range(len(token_ids) // 3, 2 * len(token_ids) // 3 + 1)
    return next((token_ids[at] for at in middle if token_ids[at] not in token_ids[:at]), None)
