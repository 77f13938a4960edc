"""The engine's numbers: are log-probabilities those of a distribution, raw, and at the right place when scoring?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.comparable import first_difference
from parity.probes.choices import NO_LOGPROBS
from parity.probes.probe import Cause, Found, as_asked, many, otherwise, unknown
from parity.probes.questions import Experiment
from parity.probes.seen import Seen, Step
from parity.recording import Completion
from parity.rows import Tolerance, examine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_SLOPE_TOLERANCE = 0.15
_FEWEST_SHARED = 5
_FEWEST_SCORES = 8


def distribution(seen: Seen) -> Found:
    """The laws of `parity.rows`, at every step of every answer; what was scored has a probe of its own."""
    rows = examine([c for c in seen.answers if seen.experiment(c) is not Experiment.SCORE], Tolerance())
    if not rows.scored:
        return unknown(NO_LOGPROBS)
    if rows.bad:
        sentence = (
            f"{len({b.id for b in rows.bad})} of {many(rows.scored, 'answer')} hold impossible log-probabilities, "
        )
        sentence += f"the first {rows.bad[0].rule}: {rows.bad[0].cause}"
        return otherwise(Cause.NOT_A_DISTRIBUTION, sentence, rows.scored, [b.witness for b in rows.bad])
    return as_asked(f"those of {many(rows.scored, 'answer')} are finite, at most 0, sorted, and add up", rows.scored)


def raw(seen: Seen) -> Found:
    """The first row of a question is the same at every temperature and with every filter."""
    pairs = [*seen.first_rows(Experiment.COOL), *seen.first_rows(Experiment.TOP_K_2)]
    if not pairs:
        return unknown(NO_LOGPROBS)
    changes = [_change(*pair) for pair in pairs]
    moved = [
        (change, s)
        for change, (_, s) in zip(changes, pairs, strict=True)
        if change.largest_nats > 3 * seen.tolerance_nats
    ]
    for change, step in moved:
        asked = step.asked.temperature
        if abs(change.slope * asked - 1.0) < _SLOPE_TOLERANCE:
            sentence = (
                f"log-probabilities asked at temperature {asked:g} spread {change.slope:.2f} times as wide as greedy"
            )
            return otherwise(Cause.AFTER_TEMPERATURE, f"{sentence} ones", len(pairs), [s.id for _, s in moved])
    for plain, step in pairs:
        if len(step.row) <= step.asked.top_k < len(plain.row):
            sentence = f"a row asked with top_k {step.asked.top_k} holds {many(len(step.row), 'token')}, and "
            return otherwise(Cause.AFTER_FILTERS, f"{sentence}{len(plain.row)} without it", len(pairs), [step.id])
    largest = max(change.largest_nats for change in changes)
    if moved:
        return unknown(
            f"rows of one question differ by up to {largest:.2f} nats, which no temperature explains", len(pairs)
        )
    return as_asked(f"rows at other temperatures differ by at most {largest:.2f} nats, which is rounding", len(pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """Of the log-probabilities that two rows share: the largest one, and how much they are stretched.

    slope: NaN where too few are shared, whose differences are mostly rounding.
    """

    largest_nats: float
    slope: float


def _change(plain: Step, other: Step) -> _Change:
    both = [i for i in plain.row if i in other.row]
    x, y = (np.array([row[i] for i in both]) for row in (plain.row, other.row))
    if not both:
        return _Change(largest_nats=math.inf, slope=math.nan)
    spread = x - x.mean()
    known = len(both) >= _FEWEST_SHARED and spread.any()
    slope = float(spread @ (y - y.mean()) / (spread @ spread)) if known else math.nan  # least squares
    return _Change(largest_nats=float(np.abs(x - y).max()), slope=slope)


def scoring(seen: Seen) -> Found:
    """The engine's own greedy tokens get, when scored, the log-probabilities that decoding gave them."""
    pairs = [pair for answer in seen.of(Experiment.SCORE) if (pair := _twice(answer, seen.base(answer))) is not None]
    n = sum(len(decoded) for decoded, _ in pairs)
    if n < _FEWEST_SCORES:
        few = f"only {many(n, 'token')} were both decoded and scored, {_FEWEST_SCORES} are needed"
        return unknown(few if seen.steps(Experiment.BASE) else NO_LOGPROBS, n)
    apart = {offset: _mean_difference(pairs, offset) for offset in (0, -1, 1)}
    fits = [offset for offset, nats in apart.items() if nats <= seen.tolerance_nats]
    sentence = (
        f"scores and decoding differ by {apart[0]:.2f} nats a token, by {apart[-1]:.2f} and {apart[1]:.2f} if one "
    )
    sentence += "token earlier and later"
    if fits == [0]:
        return as_asked(sentence, n)
    if len(fits) > 1:
        return unknown(f"{sentence}: the answers are too even to tell the places apart", n)
    cause = Cause.SCORES_DIFFER if not fits else Cause.SCORES_EARLY if fits == [-1] else Cause.SCORES_LATE
    return otherwise(cause, sentence, n, [a.id for a in seen.of(Experiment.SCORE)])


def _twice(scored: Completion, base: Completion | None) -> tuple[Floats, Floats] | None:
    """Decoding's and scoring's log-probabilities of the tokens that both have: the base answer was given anew."""
    if base is None or base.logprobs is None or scored.logprobs is None:
        return None
    same = first_difference(base.token_ids, scored.token_ids)
    decoded, again = (
        np.frombuffer(c.chosen, np.float32)[:same].astype(np.float64) for c in (base.logprobs, scored.logprobs)
    )
    return decoded, again


def _mean_difference(pairs: Sequence[tuple[Floats, Floats]], offset: int) -> float:
    """The mean absolute difference in nats, if the score of a token belongs to the token `offset` places later."""
    parts = []
    for decoded, scored in pairs:
        ours = decoded[max(0, offset) : len(decoded) + min(0, offset)]
        theirs = scored[max(0, -offset) : len(scored) + min(0, -offset)]
        parts.append(np.abs(ours - theirs))
    return float(np.concatenate(parts).mean())
