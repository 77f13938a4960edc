"""Two recordings prompt by prompt, for people: which answers changed, where they part, and what each engine preferred.

Judges nothing: the checks do. Pure.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from parity import lockstep
from parity.checks.greedy import Limits
from parity.comparable import first_difference, require_same_inputs
from parity.divergence import Kind, Pair, Scale, compare_all
from parity.errors import IncomparableError
from parity.prompts import SamplingParams
from parity.recording import Completion, FinishReason, Recording, TokenLogprobs

TokenText = Callable[[int], str | None]

_WEIGHED = (Kind.TIE, Kind.BENIGN, Kind.SUSPICIOUS, Kind.MISMATCH)
_IN_A_TALLY = {
    Kind.IDENTICAL: "in the text only, not in the tokens",
    Kind.LENGTH: "in where the answer ends",
    Kind.MISMATCH: "by more than rounding can",
    Kind.SUSPICIOUS: "by more than rounding usually does",
    Kind.UNKNOWN: "in a way that cannot be weighed",
    Kind.BENIGN: "by rounding",
    Kind.TIE: "by a tie",
}
_CLEAR_NATS = math.log(2)
"""Between an engine's first token and the one it took: twice as probable is no rounding."""
_ATTACHED = ("Mn", "Mc", "Me", "Cf")
_JOINER = "\N{ZERO WIDTH JOINER}"
_LARGEST_NATS = 700.0
"""exp() of more is infinite in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One token of a top-k row.

    text: None where no tokenizer is at hand.
    logprob_nats: NaN where the engine did not say.
    """

    token_id: int
    text: str | None
    logprob_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One side's answer to a prompt.

    common: how many characters of `text` both texts share from their beginning, so that a report can mark the rest;
        not between a character and the accents that belong to it.
    chosen: the token at the divergence (the terminator counts as one); None where the answer had ended.
    top: the most probable tokens there, most probable first; empty where there is no such step, or it is not known.
    """

    text: str
    common: int
    tokens: int
    finish_reason: FinishReason
    chosen: Choice | None
    top: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDifference:
    """One prompt, both answers.

    kind: UNKNOWN also where the answers were not asked for by plain greedy decoding: log-probabilities then do not
        explain the choice.
    position: token index of the first divergence; None where the answers are the same.
    slack_nats: S of `parity.divergence`; None where it is unknown. A lower bound where `is_bound`.
    sigmas: the slack in units of the rounding noise.
    kl_nats: KL divergence a token of the scored tokens; None where there are no scores, NaN where they are broken.
    """

    id: str
    prompt: str
    kind: Kind
    position: int | None
    slack_nats: float | None
    sigmas: float | None
    kl_nats: float | None
    reference: Answer
    candidate: Answer
    is_bound: bool = False

    @property
    def differs(self) -> bool:
        """Whether there is anything to show: other tokens, another end, or the same tokens with another text."""
        return self.kind is not Kind.IDENTICAL or self.reference.text != self.candidate.text


def compare(
    reference: Recording,
    candidate: Recording,
    *,
    scores: Recording | None,
    scale_sigma_nats: float,
    token_text: TokenText,
) -> tuple[PromptDifference, ...]:
    """Every prompt, in the order of asking.

    `scores` is the candidate's recording of the reference's tokens. `scale_sigma_nats`, the rounding noise of a margin,
    decides what counts as what, by the limits of the greedy check.

    Raises:
        IncomparableError: If the two did not answer the same prompts, one only scores given tokens, or `scores` are not
            of the reference's tokens.
    """
    for side, recording in (("reference", reference), ("candidate", candidate)):
        if recording.workload.forced_from is not None:
            raise IncomparableError(
                f"the {side} ({recording.workload.name!r} of {recording.label}) scores tokens that it was given and "
                "holds no answers of its own; give the recording of that engine's answers"
            )
    require_same_inputs(reference, candidate)
    limits = Limits()
    scale = Scale(
        tie_nats=limits.tie_nats,
        benign_nats=limits.benign_sigmas * scale_sigma_nats,
        mismatch_nats=limits.mismatch_sigmas * scale_sigma_nats,
    )
    kl_nats = {} if scores is None else _kl_by_prompt(reference, scores)
    return tuple(
        _difference(
            pair,
            is_plain=_is_plain(candidate.workload.sampling_of(pair.candidate.id)),
            kl_nats=kl_nats.get(pair.candidate.id),
            sigma_nats=scale_sigma_nats,
            token_text=token_text,
        )
        for pair in compare_all(reference, candidate, scale)
    )


def most_telling_first(differences: Iterable[PromptDifference]) -> tuple[PromptDifference, ...]:
    """The prompts that differ: unexplained ends and texts, then the largest slack, then what cannot be weighed."""
    return tuple(sorted((d for d in differences if d.differs), key=_weight))


def tally(differences: Sequence[PromptDifference]) -> str:
    """How many answers are the same, and how many differ by what, e.g. "3 prompts: 1 the same, 2 differ (2 ...)"."""
    found = [d for d in differences if d.differs]
    count = Counter(d.kind for d in found)
    parts = ", ".join(f"{count[kind]} {words}" for kind, words in _IN_A_TALLY.items() if count[kind])
    plural = "" if len(differences) == 1 else "s"
    differ = f"{len(found)} {'differs' if len(found) == 1 else 'differ'}" if found else "none differs"
    return f"{len(differences)} prompt{plural}: {len(differences) - len(found)} the same, {differ}" + (
        f" ({parts})" if parts else ""
    )


def meaning(difference: PromptDifference) -> str:
    """What a prompt's kind says, in one plain sentence without its capital and full stop."""
    for side, answer in (("reference", difference.reference), ("candidate", difference.candidate)):
        if difference.kind in _WEIGHED and (passed_over := _passed_over(answer)) is not None:
            return (
                f"no greedy decoding: the {side} took a token although it finds its own first {passed_over:.3g} times "
                "as probable (a temperature, a penalty, or a default of the engine)"
            )
    limits = Limits()
    apart = ""
    if difference.slack_nats is not None and difference.sigmas is not None:
        apart = (
            f"the two engines' odds between the two tokens are {'at least ' * difference.is_bound}a factor of "
            f"{_factor(difference.slack_nats):.3g} apart ({difference.slack_nats:.3g} nats), {difference.sigmas:.2g} "
            "times the rounding noise"
        )
    return {
        Kind.IDENTICAL: "the same tokens but another text: the engines turn tokens into text differently"
        if difference.differs
        else "the same tokens and the same text",
        Kind.TIE: "a tie: both engines find the two tokens equally probable, so either may be chosen",
        Kind.BENIGN: f"rounding: {apart}; up to {limits.benign_sigmas:g} times is normal between correct engines",
        Kind.SUSPICIOUS: f"suspicious: {apart}; correct engines pass {limits.benign_sigmas:g} times on about one "
        "prompt in 500, so several such prompts are a fault",
        Kind.MISMATCH: f"more than rounding: {apart}; correct engines stay below {limits.mismatch_sigmas:g} times and "
        "choose among each other's most probable tokens",
        Kind.LENGTH: "one answer ends where the other goes on, and no choice between tokens explains it: look for a "
        "length limit or an ignored stop",
        Kind.UNKNOWN: "cannot be weighed: log-probabilities are missing, or the answers are not plain greedy ones",
    }[difference.kind]


def visible(text: str, *, keep: str = "") -> str:
    r"""The text with every character that shows nothing, but a space and those in `keep`, as an escape like "\n"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def _passed_over(answer: Answer) -> float | None:
    """How many times as probable as the chosen token the engine's own first one is, where that is clear."""
    if answer.chosen is None or not answer.top:
        return None
    gap_nats = answer.top[0].logprob_nats - answer.chosen.logprob_nats
    return _factor(gap_nats) if gap_nats > _CLEAR_NATS else None


def _factor(nats: float) -> float:
    return math.exp(min(nats, _LARGEST_NATS))


def _weight(difference: PromptDifference) -> tuple[int, float]:
    if difference.slack_nats is not None:
        return 1, -difference.slack_nats
    return (2 if difference.kind is Kind.UNKNOWN else 0), 0.0


def _difference(
    pair: Pair, *, is_plain: bool, kl_nats: float | None, sigma_nats: float, token_text: TokenText
) -> PromptDifference:
    slack, kind = pair.slack_nats, pair.kind
    if not is_plain and slack is not None:
        slack, kind = None, Kind.UNKNOWN
    ours, theirs = pair.reference.text or "", pair.candidate.text or ""
    common = _common(ours, theirs)
    return PromptDifference(
        id=pair.candidate.id,
        prompt=_prompt(pair, token_text),
        kind=kind,
        position=pair.position,
        slack_nats=slack,
        sigmas=None if slack is None else slack / sigma_nats,
        kl_nats=kl_nats,
        reference=_answer(pair.reference, pair.position, common, token_text),
        candidate=_answer(pair.candidate, pair.position, common, token_text),
        is_bound=slack is not None and pair.is_bound,
    )


def _common(ours: str, theirs: str) -> int:
    """Where two texts part, moved back to where no accent or joined character is torn from what it belongs to."""
    at = first_difference(ours, theirs)
    while 0 < at < max(len(ours), len(theirs)) and (
        ours[at - 1] == _JOINER
        or any(unicodedata.category(c) in _ATTACHED for c in (ours[at : at + 1] + theirs[at : at + 1]))
    ):
        at -= 1
    return at


def _is_plain(asked: SamplingParams) -> bool:
    """Whether the token to choose is the most probable one by the raw log-probabilities."""
    plain = SamplingParams.greedy(max_tokens=asked.max_tokens, logprobs=asked.logprobs)
    moves = (
        "temperature",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
        "ignore_eos",
        "structured",
    )
    return all(getattr(asked, name) == getattr(plain, name) for name in moves)


def _kl_by_prompt(reference: Recording, scores: Recording) -> Mapping[str, float]:
    steps = lockstep.measure(reference, scores)
    means, broken = steps.per_prompt(steps.kl_nats) / steps.lengths, steps.per_prompt(steps.broken)
    return {
        id_: math.nan if is_broken else mean
        for id_, mean, is_broken in zip(steps.prompt_ids, means.tolist(), broken.tolist(), strict=True)
    }


def _prompt(pair: Pair, token_text: TokenText) -> str:
    """The prompt as the model saw it, as far as anybody knows."""
    for completion in (pair.reference, pair.candidate):
        if completion.prompt_text is not None:
            return completion.prompt_text
    ids = pair.reference.prompt_token_ids
    texts = [text for text in map(token_text, ids) if text is not None]
    return "".join(texts) if len(texts) == len(ids) else f"[{len(ids)} token ids]"


def _answer(completion: Completion, position: int | None, common: int, token_text: TokenText) -> Answer:
    chosen, row = _step(completion, position)
    return Answer(
        text=completion.text or "",
        common=common,
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        chosen=None if chosen is None else _choice(*chosen, token_text),
        top=tuple(_choice(token_id, logprob, token_text) for token_id, logprob in row),
    )


def _step(
    completion: Completion, position: int | None
) -> tuple[tuple[int, float] | None, tuple[tuple[int, float], ...]]:
    """What was chosen at a position, and the row it was chosen from."""
    count, end = len(completion.token_ids), completion.terminator
    logprobs: TokenLogprobs | None
    if position is not None and position < count:
        token_id, logprobs, at = completion.token_ids[position], completion.logprobs, position
    elif position == count and end is not None:
        token_id, logprobs, at = end.token_id, end.logprobs, 0
    else:
        return None, ()
    if logprobs is None or at >= len(logprobs):
        return (token_id, math.nan), ()
    return (token_id, logprobs.chosen[at]), logprobs.row(at)


def _choice(token_id: int, logprob_nats: float, token_text: TokenText) -> Choice:
    return Choice(token_id=token_id, text=token_text(token_id), logprob_nats=logprob_nats)
