"""What a probe says: a question about one engine, its answer, and the cause where the engine does otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Answer(Enum):
    """Whether the engine does what it is asked."""

    AS_ASKED = "as asked"
    OTHERWISE = "otherwise"
    UNKNOWN = "unknown"


class Cause(Enum):
    """What an engine does in place of what it was asked; the value is a sentence for people."""

    NOT_A_DISTRIBUTION = "log-probabilities are not those of a distribution: broken numbers, or logits in their place"
    AFTER_TEMPERATURE = "log-probabilities are taken after the temperature and not before it"
    AFTER_FILTERS = "log-probabilities are taken after top_k and not before it"
    SCORES_EARLY = "scores of given tokens are off by one: each token gets the score of the one before it"
    SCORES_LATE = "scores of given tokens are off by one: each token gets the score of the one after it"
    SCORES_DIFFER = (
        "the decode path: decoding gives other log-probabilities than scoring the same tokens in one prefill"
    )
    REPETITION_APPLIED = "repetition_penalty is applied though 1.0 was asked"
    PRESENCE_APPLIED = "presence_penalty is applied though 0 was asked"
    FREQUENCY_APPLIED = "frequency_penalty is applied though 0 was asked"
    END_MASKED = "the end-of-sequence token is never taken: a minimum length or a mask applies though none was asked"
    GREEDY_SAMPLES = "temperature 0 samples: a default of the engine overrides it, or 0 is read as another temperature"
    TEMPERATURE_IGNORED = "temperature has no effect: what should be drawn is always the most probable token"
    TEMPERATURE_OFF = "another temperature is applied than was asked"
    FILTER_APPLIED = "top_k or top_p is applied though neither was asked"
    SEED_IGNORED = "the seed is ignored: one seed gives two answers"
    SEED_FIXED = "one seed is used for all requests: other seeds give the same answer"
    TOP_K_IGNORED = "top_k is not applied"
    TOP_K_ONE_MORE = "top_k is off by one: it keeps one token more than asked"
    TOP_K_FEWER = "top_k keeps fewer tokens than asked"
    TOP_P_IGNORED = "top_p is not applied"
    TOP_P_FEWER = "top_p keeps only the most probable token where more were asked"
    MIN_P_IGNORED = "min_p is not applied"
    REPETITION_IGNORED = "repetition_penalty is not applied"
    REPETITION_SPARES_PROMPT = "repetition_penalty leaves out the tokens of the prompt"
    REPETITION_OTHER = "repetition_penalty is applied in another way than asked"
    PRESENCE_IGNORED = "presence_penalty is not applied"
    PRESENCE_COUNTS_PROMPT = "presence_penalty counts the tokens of the prompt, and should count the answer's only"
    PRESENCE_OTHER = "presence_penalty is applied in another way than asked"
    FREQUENCY_IGNORED = "frequency_penalty is not applied"
    FREQUENCY_COUNTS_PROMPT = "frequency_penalty counts the tokens of the prompt, and should count the answer's only"
    FREQUENCY_OTHER = "frequency_penalty is applied in another way than asked"
    MAX_TOKENS_OTHER = "max_tokens does not reach the engine as asked"
    FINISH_REASON_WRONG = "the finish reason does not say how the answer ended"
    GIVES_UP = "the engine gives requests up"
    MIN_TOKENS_IGNORED = "min_tokens is not applied"
    IGNORE_EOS_IGNORED = "ignore_eos is not applied"
    STOP_STRING_IGNORED = "stop strings do not end the answer"
    STOP_STRING_BY_TOKENS = (
        "stop strings are compared as tokens: one that starts inside a token does not end the answer"
    )
    STOP_STRING_KEPT = "the stop string is left in the text that it ends"
    STOP_STRING_UNNAMED = "the stop string ends the answer and is not named as its reason"
    STOP_TOKEN_IGNORED = "stop_token_ids do not end the answer"  # noqa: S105  not a password
    STOP_TOKEN_KEPT = "the stop token or stop string that ends an answer is left in its text"  # noqa: S105
    END_PASSED = "an end-of-sequence token does not end the answer"
    END_OF_TURN_PASSED = "the token that ends a message in the chat template does not end the answer"
    BOS_DOUBLED = (
        "the beginning-of-sequence token is there twice: the chat template writes it and the tokenizer adds it"
    )
    TEXT_SPACES = "spaces are lost or added in the text: tokens are detokenised piece by piece"
    TEXT_CHARACTERS = "characters of several tokens are broken in the text: tokens are detokenised one by one"
    TEXT_OTHER = "the text is not that of the answer's tokens"
    STREAM_TOKENS = "streaming gives other tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One experiment's result.

    root_causes: ids of the known root causes of wrong answers that it looks for (docs/probes.md).
    sentence: what was seen, complete in itself; for UNKNOWN why it could not be seen.
    n: how many answers or tokens were looked at, in `unit`.
    evidence: witnesses for a person to look at, most telling first.
    cause: None unless the answer is OTHERWISE, and there too where nothing known explains what was seen.
    """

    name: str
    root_causes: tuple[str, ...]
    question: str
    answer: Answer
    sentence: str
    n: int
    unit: str
    evidence: tuple[str, ...]
    cause: Cause | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an experiment showed; the fields are those of `Probe`."""

    answer: Answer
    sentence: str
    n: int
    evidence: tuple[str, ...]
    cause: Cause | None


_WITNESSES = 3


def as_asked(sentence: str, n: int) -> Found:
    """The engine does what it is asked."""
    return Found(answer=Answer.AS_ASKED, sentence=sentence, n=n, evidence=(), cause=None)


def otherwise(cause: Cause | None, sentence: str, n: int, evidence: Sequence[str]) -> Found:
    """The engine does something else."""
    kept = tuple(evidence[:_WITNESSES])
    return Found(answer=Answer.OTHERWISE, sentence=sentence, n=n, evidence=kept, cause=cause)


def unknown(why: str, n: int = 0) -> Found:
    """It cannot be seen."""
    return Found(answer=Answer.UNKNOWN, sentence=why, n=n, evidence=(), cause=None)


def many(n: int, one: str) -> str:
    """A count with its noun."""
    return f"{n} {one if n == 1 else one + 's'}"
