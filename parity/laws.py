"""Laws that one correct engine keeps with itself: one prompt, asked in several ways that must agree.

Each example is one prompt with drawn parameters, asked in the ways of `Role`: for fewer tokens, with a stop string,
streamed, with other neighbours in the batch, sampled without a choice, sampled twice with one seed. A law says how the
answers belong together.

    exact laws        texts, ends, numbers, input tokens: nothing is explained by rounding
    laws up to noise  two answers must be the same; where they part, the slack S of `parity.divergence` is held against
                      sigma, since another batch rounds differently
    one seed          sampled answers part with a probability that both sides' own rows bound

Pure. What the breaches of many examples add up to is decided by `parity.checks.laws`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from parity import detokenised
from parity.comparable import first_difference
from parity.divergence import Kind, Pair, Scale, compare, in_asked_order
from parity.prompts import SamplingParams
from parity.recording import Completion, FinishReason, Recording, TokenLogprobs
from parity.rows import Tolerance, examine

_EXCERPT = 40


class Role(str, Enum):
    """The ways in which one example is asked; a request's id is `NUMBER:role`, e.g. `007:short`."""

    LONG = "long"
    SHORT = "short"
    AT_LEAST = "at-least"
    STOP = "stop"
    STREAM = "stream"
    """As STOP, piece by piece."""
    ALONE = "alone"
    TOP_1 = "top-1"
    SEEDED = "seeded"
    AGAIN = "seeded-again"

    def id_of(self, number: str) -> str:
        """The id of this request of an example."""
        return f"{number}:{self.value}"


class Weight(Enum):
    """What a breach is worth."""

    PROVEN = "proven"
    SUSPICIOUS = "suspicious"
    """Chance explains some of these."""
    UNKNOWN = "unknown"
    """Log-probabilities are missing, so chance cannot be ruled out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """One way in which one example breaks a law, in a sentence without its prompt."""

    weight: Weight
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a law says about one example.

    expected: the number of suspicious breaches that chance leads one to expect of it.
    """

    breaches: tuple[Breach, ...] = ()
    expected: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One example: its answers and what was asked, by role; `sent` the token ids that each request was given."""

    number: str
    answers: Mapping[Role, Completion]
    asked: Mapping[Role, SamplingParams]
    sent: Mapping[Role, tuple[int, ...] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the laws up to noise hold a breach against.

    suspicious_rate: how often two correct answers part by more than the scale calls benign.
    impossible: two answers with one seed that part with at most this probability break the law by themselves.
    """

    sigma_nats: float
    scale: Scale
    suspicious_rate: float
    impossible: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """One law. An example without the answers it `needs` cannot be asked; `cause` is what a breach points to."""

    name: str
    needs: frozenset[Role]
    look: Callable[[Case, Rules], Seen]
    cause: str

    @property
    def rule(self) -> str:
        """The law in words."""
        return (self.look.__doc__ or "").strip()


def cases_of(candidate: Recording, reference: Recording | None = None) -> tuple[Case, ...]:
    """The examples of a recording, in the order of asking; a request whose id names no role is left out."""
    by_number: dict[str, dict[Role, Completion]] = {}
    for answer in in_asked_order(candidate):
        number, _, role = answer.id.rpartition(":")
        if number and role in set(Role):
            by_number.setdefault(number, {})[Role(role)] = answer
    theirs = {} if reference is None else reference.by_id
    return tuple(
        Case(
            number=number,
            answers=answers,
            asked={role: candidate.workload.sampling_of(a.id) for role, a in answers.items()},
            sent={
                role: theirs[a.id].prompt_token_ids if a.id in theirs else a.own_prompt_token_ids
                for role, a in answers.items()
            },
        )
        for number, answers in by_number.items()
    )


def described(asked: Mapping[Role, SamplingParams]) -> str:
    """The parameters of an example, for a person who wants to ask it again."""
    words = f"max_tokens {asked[Role.LONG].max_tokens}"
    if Role.SHORT in asked:
        words += f" and {asked[Role.SHORT].max_tokens}"
    if Role.AT_LEAST in asked:
        words += f", min_tokens {asked[Role.AT_LEAST].min_tokens}"
    if Role.STOP in asked:
        words += f", stop {list(asked[Role.STOP].stop)!r}"
    if Role.SEEDED in asked:
        drawn = asked[Role.SEEDED]
        words += f", temperature {drawn.temperature:g}, top_k {drawn.top_k}, seed {drawn.seed}"
    return words


# Exact laws ----------------------------------------------------------------------------------------------------------


def _input_tokens(case: Case, _: Rules) -> Seen:
    """The engine worked on the ids it was sent; in every way of asking on the same ones."""
    found = []
    for role, answer in case.answers.items():
        sent, got = case.sent[role] or case.answers[Role.LONG].prompt_token_ids, answer.prompt_token_ids
        if got != sent:
            at = first_difference(sent, got)
            found.append(f"{_WORDS[role]} is to {len(got)} tokens, {len(sent)} were sent; they part at token {at}")
    return _proven(found)


def _ends(case: Case, _: Rules) -> Seen:
    """At most max_tokens; by length with exactly max_tokens and no end of its own; else by something that was asked."""
    found = []
    for role, answer in case.answers.items():
        asked, count, reason = case.asked[role], len(answer.token_ids), answer.stop_reason
        limit = f"max_tokens {asked.max_tokens}"
        if answer.finish_reason is FinishReason.ABORT:
            found.append(f"{_WORDS[role]} was given up by the engine after {_many(count, 'token')}")
        elif count > asked.max_tokens:
            found.append(f"{_WORDS[role]} has {_many(count, 'token')} for {limit}")
        elif answer.finish_reason is FinishReason.LENGTH:
            if count != asked.max_tokens or answer.terminator is not None:
                by = "" if answer.terminator is None else f" and the end token {answer.terminator.token_id}"
                found.append(f"{_WORDS[role]} ends by length with {_many(count, 'token')}{by} for {limit}")
        elif isinstance(reason, str) and reason not in asked.stop:
            found.append(f"{_WORDS[role]} was ended by {reason!r}, asked were {list(asked.stop)!r}")
        elif answer.terminator is None and reason is None:
            found.append(f"{_WORDS[role]} stopped after {_many(count, 'token')} without a stop token or string")
    return _proven(found)


def _texts(case: Case, _: Rules) -> Seen:
    """A text is what its tokens decode to, or under a stop string the beginning of that; no token has no text."""
    found = []
    for role, answer in case.answers.items():
        text, whole = answer.text or "", answer.decoded_text
        if not answer.token_ids and text:
            found.append(f"{_WORDS[role]} has no token and the text {_shown(text)}")
        elif whole is not None:
            cut = isinstance(answer.stop_reason, str)
            # Some tokenizers drop the space at the very beginning when they decode an answer by itself.
            ours = [text, text.removeprefix(" ")]
            if not any(detokenised.begins(whole, t) if cut else detokenised.alike(whole, t) for t in ours):
                at = first_difference(text, whole)
                found.append(
                    f"{_WORDS[role]} has the text {_shown(text, at)} where its tokens decode to {_shown(whole, at)}"
                )
    return _proven(found)


def _numbers(case: Case, _: Rules) -> Seen:
    """Log-probabilities are finite, at most 0, sorted, and add up to at most 1."""
    rows = examine(tuple(case.answers.values()), Tolerance())
    if not rows.scored:
        return Seen(breaches=(Breach(weight=Weight.UNKNOWN, sentence="there are no log-probabilities"),))
    return _proven([f"an answer {bad.rule}: {bad.witness}" for bad in rows.bad])


# Laws up to noise ----------------------------------------------------------------------------------------------------


def _max_tokens(case: Case, rules: Rules) -> Seen:
    """The answer of n tokens is the beginning of the answer of m."""
    return _agree(case, Role.SHORT, case.asked[Role.SHORT].max_tokens, rules)[1]


def _min_tokens(case: Case, rules: Rules) -> Seen:
    """min_tokens are kept, and change nothing where the answer is as long by itself."""
    asked, answer = case.asked[Role.AT_LEAST], case.answers[Role.AT_LEAST]
    plain = len(case.answers[Role.LONG].token_ids)
    seen = _agree(case, Role.AT_LEAST, plain if plain < asked.min_tokens else asked.max_tokens, rules)[1]
    if answer.finish_reason is FinishReason.STOP and len(answer.token_ids) < asked.min_tokens:
        short = (
            f"{_WORDS[Role.AT_LEAST]} stops after {_many(len(answer.token_ids), 'token')}, before {asked.min_tokens}"
        )
        return replace(seen, breaches=(Breach(weight=Weight.PROVEN, sentence=short), *seen.breaches))
    return seen


def _stop_strings(case: Case, rules: Rules) -> Seen:
    """No stop string is in the text, and up to it nothing changes."""
    plain, ended, stops = case.answers[Role.LONG], case.answers[Role.STOP], case.asked[Role.STOP].stop
    found = [
        f"{_WORDS[role]} has the stop string {stop!r} in its text {_shown(text, text.index(stop))}"
        for role in (Role.STOP, Role.STREAM)
        for text in [case.answers[role].text or "" if role in case.answers else ""]
        for stop in [s for s in stops if s in text][:1]
    ]
    by_string = isinstance(ended.stop_reason, str)
    upto = len(ended.token_ids) if by_string else case.asked[Role.STOP].max_tokens
    pair, seen = _agree(case, Role.STOP, upto, rules)
    whole, text = plain.text or "", f"{ended.text or ''}{ended.stop_reason if by_string else ''}"
    same = whole.startswith(text) if by_string else detokenised.alike(whole, text)
    if pair.kind is Kind.IDENTICAL and not same and not found:
        at = first_difference(whole, text)
        found.append(
            f"{_WORDS[Role.STOP]} and its stop string are {_shown(text, at)}, {_WORDS[Role.LONG]} has the same tokens "
            f"and {_shown(whole, at)}"
        )
    return replace(seen, breaches=(*_proven(found).breaches, *seen.breaches))


def _stream(case: Case, rules: Rules) -> Seen:
    """The pieces put together are the answer as a whole."""
    ours, theirs = case.answers[Role.STOP], case.answers[Role.STREAM]
    pair = compare(ours, theirs, rules.scale)
    seen = _up_to_noise(pair, Role.STOP, Role.STREAM, rules)
    whole, pieces = ours.text or "", theirs.text or ""
    if pair.kind is Kind.IDENTICAL and not detokenised.alike(whole, pieces):
        at = first_difference(whole, pieces)
        sentence = f"{_WORDS[Role.STREAM]} is {_shown(pieces, at)}, as a whole {_shown(whole, at)}"
        return replace(seen, breaches=_proven([sentence]).breaches)
    return seen


def _neighbours(case: Case, rules: Rules) -> Seen:
    """Who else is in the batch changes nothing."""
    return _agree(case, Role.ALONE, case.asked[Role.LONG].max_tokens, rules)[1]


def _top_1(case: Case, rules: Rules) -> Seen:
    """Sampling from one token is taking the most probable."""
    return _agree(case, Role.TOP_1, case.asked[Role.LONG].max_tokens, rules)[1]


def _agree(case: Case, role: Role, upto: int, rules: Rules) -> tuple[Pair, Seen]:
    """The first `upto` steps of an answer against those of the plain one."""
    pair = compare(_cut(case.answers[Role.LONG], upto), _cut(case.answers[role], upto), rules.scale)
    return pair, _up_to_noise(pair, Role.LONG, role, rules)


def _cut(answer: Completion, count: int) -> Completion:
    """The first steps of an answer; its end is one of them only if it comes before."""
    if len(answer.token_ids) < count:
        return answer
    return replace(
        answer,
        token_ids=answer.token_ids[:count],
        logprobs=None if answer.logprobs is None else answer.logprobs.rows(0, count),
        terminator=None,
        finish_reason=FinishReason.LENGTH,
    )


_WEIGHTS = {
    Kind.SUSPICIOUS: Weight.SUSPICIOUS,
    Kind.MISMATCH: Weight.PROVEN,
    Kind.LENGTH: Weight.PROVEN,
    Kind.UNKNOWN: Weight.UNKNOWN,
}


def _up_to_noise(pair: Pair, ours: Role, theirs: Role, rules: Rules) -> Seen:
    expected = rules.suspicious_rate
    if pair.kind not in _WEIGHTS:
        return Seen(expected=expected)
    sentence = f"{_WORDS[theirs]} parts from {_WORDS[ours]} at token {pair.position}"
    if pair.slack_nats is not None:
        bound = "at least " * pair.is_bound
        sentence += f" by S {bound}{pair.slack_nats:.3g} nats ({pair.slack_nats / rules.sigma_nats:.1f} sigma)"
    elif pair.kind is Kind.UNKNOWN:
        sentence += ", and log-probabilities are missing"
    else:
        sentence += ", where one ends and the other goes on"
    return Seen(breaches=(Breach(weight=_WEIGHTS[pair.kind], sentence=sentence),), expected=expected)


# One seed ------------------------------------------------------------------------------------------------------------


def _seed(case: Case, rules: Rules) -> Seen:
    """One seed twice gives one answer, as far as the two distributions were the same."""
    first, again = case.answers[Role.SEEDED], case.answers[Role.AGAIN]
    pair = compare(first, again, rules.scale)
    steps = len(first.token_ids) + 1 if pair.position is None else pair.position + 1
    chance = sum(_parting(mine, other, case.asked[Role.SEEDED]) for mine, other in _shared(first, again, steps))
    if pair.kind is Kind.IDENTICAL:
        return Seen(expected=chance)
    sentence = f"{_WORDS[Role.AGAIN]} parts from {_WORDS[Role.SEEDED]} at token {pair.position}"
    if pair.kind is Kind.UNKNOWN:
        return Seen(breaches=(Breach(weight=Weight.UNKNOWN, sentence=f"{sentence}; log-probabilities are missing"),))
    proven = pair.kind is Kind.LENGTH or pair.outside or chance <= rules.impossible
    sentence += f", which rounding explains with probability {min(1.0, chance):.2g} at most"
    weight = Weight.PROVEN if proven else Weight.SUSPICIOUS
    return Seen(breaches=(Breach(weight=weight, sentence=sentence),), expected=chance)


def _shared(first: Completion, again: Completion, steps: int) -> list[tuple[TokenLogprobs, TokenLogprobs]]:
    """Both distributions of each of the first `steps` steps, the ends included, as far as both are known."""
    rows = []
    for answer in (first, again):
        end = None if answer.terminator is None else answer.terminator.logprobs
        body = [] if answer.logprobs is None else [answer.logprobs.rows(i, i + 1) for i in range(len(answer.logprobs))]
        rows.append([*body, *([] if end is None else [end])][:steps])
    return list(zip(*rows, strict=False))


def _parting(mine: TokenLogprobs, other: TokenLogprobs, asked: SamplingParams) -> float:
    """A bound on the probability that one random number draws different tokens from two nearly equal distributions.

    k times their total variation suffices for the Gumbel trick and exponential races (2 TV) and for inverting a
    cumulated distribution of k tokens ((k - 1) TV); where equally probable tokens change places, the latter may also
    move by all that they have.
    """
    ours, theirs = _policy(mine, asked), _policy(other, asked)
    variation = sum(abs(ours.get(i, 0.0) - theirs.get(i, 0.0)) for i in {*ours, *theirs}) / 2
    moved = sum(ours[a] for a, b in zip(ours, theirs, strict=False) if a != b)
    return max(len(ours), 2) * variation + moved


def _policy(row: TokenLogprobs, asked: SamplingParams) -> dict[int, float]:
    """What temperature and top_k make of a row, most probable first; tokens as probable as the last kept one stay."""
    entries = [(i, value) for i, value in row.row(0) if math.isfinite(value)]
    if not entries:
        return {}
    edge = entries[min(asked.top_k or len(entries), len(entries)) - 1][1]
    weights = {i: math.exp((value - entries[0][1]) / asked.temperature) for i, value in entries if value >= edge}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


_WORDS = {
    Role.LONG: "the plain answer",
    Role.SHORT: "the answer of fewer tokens",
    Role.AT_LEAST: "the answer with min_tokens",
    Role.STOP: "the answer with stop strings",
    Role.STREAM: "the streamed answer",
    Role.ALONE: "the answer with other neighbours",
    Role.TOP_1: "the answer sampled with top_k 1",
    Role.SEEDED: "the answer with a seed",
    Role.AGAIN: "the second answer with that seed",
}


def _law(name: str, look: Callable[[Case, Rules], Seen], cause: str, *needs: Role) -> Law:
    return Law(name=name, needs=frozenset((Role.LONG, *needs)), look=look, cause=cause)


LAWS = (
    _law("input tokens", _input_tokens, "the engine changes prompts on their way: cut off, or special tokens added"),
    _law("ends", _ends, "max_tokens, stop tokens or finish reasons do not mean what they say"),
    _law("text and tokens", _texts, "texts are put together piece by piece and lose or gain characters"),
    _law("numbers", _numbers, "log-probabilities are of something else than the whole vocabulary's distribution"),
    _law("max_tokens", _max_tokens, "max_tokens changes which tokens are chosen", Role.SHORT),
    _law(
        "min_tokens",
        _min_tokens,
        "min_tokens do not reach the engine, or do more than hold the end back",
        Role.AT_LEAST,
    ),
    _law("stop strings", _stop_strings, "stop strings do not end answers where they first appear", Role.STOP),
    _law(
        "stream", _stream, "pieces of a stream lose, repeat or change what the whole answer has", Role.STOP, Role.STREAM
    ),
    _law("neighbours", _neighbours, "requests of one batch reach into each other: cache, masks, padding", Role.ALONE),
    _law("top_k 1", _top_1, "top_k does not reach the engine, or sampling takes another path than greedy", Role.TOP_1),
    _law("seed", _seed, "seeds do not reach the engine, or requests share a random stream", Role.SEEDED, Role.AGAIN),
)


def _proven(sentences: Sequence[str]) -> Seen:
    return Seen(breaches=tuple(Breach(weight=Weight.PROVEN, sentence=sentence) for sentence in sentences))


def _shown(text: str, at: int = 0) -> str:
    """The part of a text around a place, in quotes."""
    start = max(0, at - _EXCERPT // 2)
    return f"{'...' * (start > 0)}{text[start : at + _EXCERPT]!r}{'...' * (at + _EXCERPT < len(text))}"


def _many(n: int, one: str) -> str:
    return f"{n} {one if n == 1 else one + 's'}"
