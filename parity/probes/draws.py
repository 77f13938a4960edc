"""What is left to chance: temperature, seeds and filters, by the engine's own raw log-probabilities.

With p the raw distribution of a step on the top K tokens, and all other tokens in one bucket of known mass, unfiltered
draws at temperature 1 follow p exactly. So does the score, z = sum(l(x) - E l) / sqrt(sum Var l): a martingale, N(0, 1)
also with dependent tokens (docs/checks/sampling.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from parity.comparable import first_difference
from parity.probes.choices import NO_LOGPROBS
from parity.probes.probe import Cause, Found, as_asked, many, otherwise, unknown
from parity.probes.questions import HOT, Experiment
from parity.probes.seen import LOG_IMPOSSIBLE, Seen, Step
from parity.recording import Completion
from parity.stats import binomial_tail

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_Z = 3.29  # two-sided normal quantile at 0.001
_LOG_TELLING = math.log(1e4)
_FEWEST_DRAWS = 200
_FEWEST_EQUAL = 2  # pairs of answers with two seeds; by chance each is equal once in a million
_PARTED_BY_ROUNDING, _RARE = 0.05, 1e-3  # of tokens; twice what was measured between two engines with one seed
_SETTLED = 0.95  # where one token has so much, draws say little about the temperature, and skew z
_EDGE_NATS = 1e-3  # of a filter: engines keep one of two equally probable tokens, or both
_NUCLEUS_MARGIN = 0.01
_LOWEST_T, _HIGHEST_T = 0.05, 20.0
_FLOOR_NATS = -100.0  # stands for the -inf of a row that is short, so that sums stay finite


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draws:
    """Drawn tokens and what they were drawn from. Shapes: top [N, K] descending, nats, -inf where short; rank [N].

    `rank` counts the more probable tokens; K outside the row.
    """

    top: Floats
    rank: Ints

    @classmethod
    def of(cls, steps: Sequence[Step]) -> _Draws:
        k = max((len(s.row) for s in steps), default=1)
        top = np.full((len(steps), k), -np.inf)
        for row, step in zip(top, steps, strict=True):
            row[: len(step.row)] = step.values
        return cls(top=top, rank=np.array([s.rank if s.rank < len(s.row) else k for s in steps], np.int64))

    def __len__(self) -> int:
        return len(self.rank)

    def only(self, rows: NDArray[np.bool_]) -> _Draws:
        return _Draws(top=self.top[rows], rank=self.rank[rows])

    def only_best(self, q: Floats) -> tuple[int, float]:
        """How many draws are not the best token, and the log-probability under `q` [N, any] that none is.

        Equally probable tokens are all the best.
        """
        best = self.top >= self.top[:, :1] - _EDGE_NATS
        others = int((self.rank >= best.sum(axis=1)).sum())
        return others, float(np.log(np.where(best[:, : q.shape[1]], q[:, : best.shape[1]], 0.0).sum(axis=1)).sum())

    @property
    def p(self) -> Floats:
        """Raw probabilities; the last column is the mass of all other tokens. Shape: [N, K + 1]."""
        known = np.exp(self.top)
        return np.concatenate([known, np.maximum(1.0 - known.sum(axis=1, keepdims=True), 1e-12)], axis=1)


def temperature(seen: Seen) -> Found:
    """Temperature 1 has the effect of temperature 1, and another one is heeded."""
    draws = _Draws.of(seen.steps(Experiment.DRAW))
    if not len(draws):
        return unknown(NO_LOGPROBS)
    others, log_chance = draws.only_best(draws.p)
    if not others and log_chance < LOG_IMPOSSIBLE:
        sentence = f"each of {many(len(draws), 'token')} drawn at temperature 1 is the most probable one"
        return otherwise(Cause.TEMPERATURE_IGNORED, sentence, len(draws), ())
    chosen = draws.only(draws.p.max(axis=1) < _SETTLED)
    if len(chosen) < _FEWEST_DRAWS:
        few = f"only {many(len(chosen), 'drawn token')} had a choice, {_FEWEST_DRAWS} are needed"
        return unknown(few, len(chosen))
    z = _score(chosen.top, chosen.p, chosen.rank)
    nucleus, log_chance = _untouched(chosen)
    sentence = f"{many(len(chosen), 'token')} drawn at temperature 1, z {z:+.2f}"
    if abs(z) > _Z or log_chance < LOG_IMPOSSIBLE:
        cause, looks_like = _best_explanation(chosen, nucleus)
        return otherwise(cause, f"{sentence}: it looks like {looks_like}", len(chosen), ())
    return _other_temperature(seen, sentence) or as_asked(sentence, len(chosen))


def _other_temperature(seen: Seen, sentence: str) -> Found | None:
    """Whether a temperature that is not 1 is read as 1; None if it is not, or if that cannot be seen.

    A likelihood ratio: under the temperature asked it exceeds 1e4 in at most one of 1e4 runs, whatever the draws.
    """
    steps = [s for s in seen.steps(Experiment.COOL) if s.rank < s.asked.top_k <= len(s.row)]
    if not steps:
        return None
    asked, cool = steps[0].asked, _Draws.of(steps)
    top = cool.top[:, : asked.top_k]
    one, own = (_log_likelihood(_tempered(top, t), cool.rank) for t in (1.0, asked.temperature))
    if one - own <= _LOG_TELLING:
        return None
    sentence += f"; {many(len(cool), 'token')} drawn at temperature {asked.temperature:g}: it looks like temperature "
    return otherwise(Cause.TEMPERATURE_OFF, f"{sentence}{_fitted(top, cool.rank):.2f}", len(cool), ())


def _score(top: Floats, q: Floats, rank: Ints) -> float:
    """Shapes: top [N, K]; q [N, K + 1], whose bucket counts as one nat below the last known token."""
    value = np.maximum(np.concatenate([top, top[:, -1:] - 1.0], axis=1), _FLOOR_NATS)
    mean = (q * value).sum(axis=1)
    variance = (q * (value - mean[:, None]) ** 2).sum(axis=1).sum()
    return float((_at(value, rank) - mean).sum() / math.sqrt(max(variance, 1e-12)))


def _untouched(draws: _Draws) -> tuple[float, float]:
    """The largest mass above a drawn token, and the log-probability that no draw has a larger one.

    Under temperature 1 without filters the latter is below ln(1e-6) about once in a million runs.
    """
    p = draws.p
    above = np.cumsum(p, axis=1) - p
    largest = float(_at(above, draws.rank).max())
    return largest, float(np.log(np.where(above <= largest + 1e-9, p, 0.0).sum(axis=1)).sum())


def _best_explanation(draws: _Draws, nucleus: float) -> tuple[Cause, str]:
    """The most likely of: another temperature, a nucleus, a top k; among the known tokens, where all are computable."""
    known = draws.only(draws.rank < draws.top.shape[1])
    if not len(known):
        return Cause.TEMPERATURE_OFF, "a far higher temperature"
    p = known.p[:, :-1]
    drawn = _at(known.top, known.rank)[:, None]
    deepest = int((known.top > drawn + _EDGE_NATS).sum(axis=1).max())
    fitted = _fitted(known.top, known.rank)
    kept_p = np.where(np.cumsum(p, axis=1) - p <= nucleus + 1e-9, p, 0.0)
    kept_k = np.where(known.top >= known.top[:, deepest : deepest + 1] - _EDGE_NATS, p, 0.0)
    likelihoods = (
        (_log_likelihood(_tempered(known.top, fitted), known.rank), Cause.TEMPERATURE_OFF, f"temperature {fitted:.2f}"),
        (_log_likelihood(kept_p, known.rank), Cause.FILTER_APPLIED, f"top_p {nucleus:.2f}"),
        (_log_likelihood(kept_k, known.rank), Cause.FILTER_APPLIED, f"top_k {deepest + 1}"),
    )
    _, cause, looks_like = max(likelihoods, key=lambda one: one[0])
    return cause, looks_like


def _log_likelihood(weight: Floats, rank: Ints) -> float:
    return float(np.log(_at(weight, rank) / weight.sum(axis=1)).sum())


def _tempered(top: Floats, temperature: float) -> Floats:
    q = np.exp((top - top[:, :1]) / temperature)
    return np.asarray(q / q.sum(axis=1, keepdims=True))


def _fitted(top: Floats, rank: Ints) -> float:
    """The most likely temperature of draws among these tokens.

    The likelihood's derivative by 1/T falls strictly, so its zero is found by bisection, in ln T.
    """
    values = np.maximum(top, _FLOOR_NATS)
    drawn = float(_at(values, rank).sum())
    low, high = math.log(_LOWEST_T), math.log(_HIGHEST_T)
    for _ in range(30):
        middle = (low + high) / 2
        expected = float((_tempered(values, math.exp(middle)) * values).sum())
        low, high = (low, middle) if drawn > expected else (middle, high)
    return math.exp((low + high) / 2)


def seed(seen: Seen) -> Found:
    """One seed gives one answer, other seeds give others.

    Rounding differs from one place of a batch to another and then moves a draw once in some dozen tokens, after which
    everything differs. So one seed is not asked for one answer to its end, but for an agreement beyond chance: the
    tokens before the first differences have, together, a probability of at most 1e-6. Where answers part earlier, the
    seed is called ignored only if rounding would hardly part so many so soon.
    """
    steps, draws = seen.steps(Experiment.DRAW), seen.of(Experiment.DRAW)
    if not steps:
        return unknown(NO_LOGPROBS)
    if all(s.gap() <= _EDGE_NATS for s in steps):
        return unknown("each drawn token is the most probable one, with any seed", len(draws))
    neighbours = [(a, b) for a, b in pairwise(draws) if a.prompt_token_ids == b.prompt_token_ids]
    equal = [(a, b) for a, b in neighbours if _log_agreement(a, b) < LOG_IMPOSSIBLE]
    if len(equal) >= _FEWEST_EQUAL:
        sentence = (
            f"{len(equal)} of {many(len(neighbours), 'pair')} of answers with two seeds begin alike beyond chance"
        )
        return otherwise(Cause.SEED_FIXED, sentence, len(draws), [f"{a.id} and {b.id}: {a.text!r}" for a, b in equal])
    twins = [(d, twin) for twin in seen.of(Experiment.SAME_SEED) for d in draws if _same_question(seen, d, twin)]
    parted = [pair for pair in twins if pair[0].token_ids != pair[1].token_ids]
    if sum(_log_agreement(*pair) for pair in twins) < LOG_IMPOSSIBLE:
        sentence = f"{len(twins) - len(parted)} of {many(len(twins), 'pair')} of answers with one seed are equal"
        sentence += ", the others part after agreeing beyond chance, as rounding makes them" * bool(parted)
        return as_asked(f"{sentence}; other seeds give others", len(twins))
    agreed = sum(first_difference(d.token_ids, t.token_ids) for d, t in twins)
    if binomial_tail(agreed + len(parted), _PARTED_BY_ROUNDING, len(parted)) > _RARE:
        return unknown(
            "answers with one seed agree no longer than by chance, and are too few, short or sure", len(twins)
        )
    sentence = (
        f"{len(parted)} of {many(len(twins), 'pair')} of answers with one seed part, after {many(agreed, 'token')} "
    )
    witnesses = [f"{d.id} and its twin part at token {first_difference(d.token_ids, t.token_ids)}" for d, t in parted]
    return otherwise(Cause.SEED_IGNORED, f"{sentence}in all, no later than by chance", len(twins), witnesses)


def _same_question(seen: Seen, one: Completion, other: Completion) -> bool:
    return one.prompt_token_ids == other.prompt_token_ids and seen.asked(one) == seen.asked(other)


def _log_agreement(one: Completion, other: Completion) -> float:
    """The log-probability that a second draw agrees with the first as long as these two do."""
    agreed = first_difference(one.token_ids, other.token_ids)
    return math.fsum(one.logprobs.chosen[:agreed]) if one.logprobs is not None else 0.0


def top_k(seen: Seen) -> Found:
    """No token beyond the k best, and at a hot temperature not only the best."""
    steps = seen.steps(Experiment.TOP_K_1, Experiment.TOP_K_2)
    steps = [s for s in steps if len(s.row) >= s.asked.top_k]
    off = seen.off(steps, [s.values[s.asked.top_k - 1] - s.logprob for s in steps])
    if off:
        one_more = all(s.logprob >= min(s.values[: s.asked.top_k + 1]) - _EDGE_NATS for s, _ in off)
        sentence = f"{len(off)} of {many(len(steps), 'token')} are not among the top_k asked"
        sentence += ", none of them further down than the next" if one_more else ""
        cause = Cause.TOP_K_ONE_MORE if one_more else Cause.TOP_K_IGNORED
        rank = "token {} is number {} where top_k {} was asked"
        witnesses = [f"{s}: {rank.format(s.token_id, s.rank + 1, s.asked.top_k)}" for s, _ in off]
        return otherwise(cause, sentence, len(steps), witnesses)
    hot = _Draws.of([s for s in steps if s.asked.top_k == 2])
    if not len(hot):
        return unknown(NO_LOGPROBS)
    second, log_chance = hot.only_best(_tempered(hot.top[:, :2], HOT))
    if not second and log_chance < LOG_IMPOSSIBLE:
        sentence = f"top_k 2 at temperature {HOT:g} never takes the second-best of {many(len(hot), 'token')}"
        return otherwise(Cause.TOP_K_FEWER, sentence, len(hot), ())
    if not second:
        return unknown("the second-best token was never probable enough to be drawn", len(hot))
    sentence = f"top_k 1 and 2 keep to the best and the two best tokens; {second} of {len(hot)} are second-best"
    return as_asked(sentence, len(steps))


def top_p(seen: Seen) -> Found:
    """A tiny nucleus is greedy; half of the mass keeps to its nucleus and uses it."""
    half = [s for s in seen.steps(Experiment.TOP_P_HALF) if _nucleus(s) is not None]
    steps = [*seen.steps(Experiment.TOP_P_TINY), *half]
    off = seen.off(steps, [(_nucleus(s) or s.values[:1])[-1] - s.logprob for s in steps])
    if off:
        sentence = f"{len(off)} of {many(len(steps), 'token')} lie outside the top_p asked"
        witnesses = [f"{s}: token {s.token_id} lies {gap:.2f} nats below the last of the nucleus" for s, gap in off]
        return otherwise(Cause.TOP_P_IGNORED, sentence, len(steps), witnesses)
    if not half:
        return unknown(NO_LOGPROBS if not steps else "no nucleus of top_p 0.5 lies within the known tokens", len(steps))
    draws = _Draws.of(half)
    inside = np.arange(draws.top.shape[1]) < np.array([[len(_nucleus(s) or ())] for s in half])
    q = np.where(inside, np.exp(draws.top), 0.0)
    others, log_chance = draws.only_best(q / q.sum(axis=1, keepdims=True))
    if not others and log_chance < LOG_IMPOSSIBLE:
        sentence = f"top_p 0.5 never takes anything but the best of {many(len(half), 'token')}"
        return otherwise(Cause.TOP_P_FEWER, sentence, len(half), ())
    sentence = (
        f"tokens of a tiny top_p are the best ones, those of top_p 0.5 lie in the nucleus; {others} of {len(half)} "
    )
    return as_asked(f"{sentence}are not the best", len(steps))


def _nucleus(step: Step) -> list[float] | None:
    """Log-probabilities of the fewest best tokens with the mass asked and a margin; None if the row is too short."""
    mass, kept = 0.0, []
    for value in step.values:
        kept.append(value)
        mass += math.exp(value)
        if mass >= step.asked.top_p + _NUCLEUS_MARGIN:
            return kept
    return None


def min_p(seen: Seen) -> Found:
    """A min_p of 1 keeps only what is as probable as the best."""
    steps = seen.steps(Experiment.MIN_P_1)
    if not steps:
        return unknown(NO_LOGPROBS)
    off = seen.off(steps, [s.gap() for s in steps])
    if off:
        sentence = f"{len(off)} of {many(len(steps), 'token')} drawn with min_p 1 are not the best ones"
        witnesses = [f"{s}: token {s.token_id} lies {gap:.2f} nats below the best" for s, gap in off]
        return otherwise(Cause.MIN_P_IGNORED, sentence, len(steps), witnesses)
    return as_asked(f"each of {many(len(steps), 'token')} drawn with min_p 1 is the best one", len(steps))


def _at(table: Floats, column: Ints) -> Floats:
    """table[i, column[i]] for every row i."""
    return np.asarray(table[np.arange(len(table)), column])
