"""Two answers to one prompt: where they part, and how far apart the engines are there.

The slack at the first divergence, the last position where both engines saw the same prefix:

    S = [l_ref(a) - l_ref(b)] + [l_cand(b) - l_cand(a)]     a, b: the tokens they chose; l: raw log-probability, nats

S is never negative and is exactly the margin shift between the engines, as long as each takes its most probable token.
Where one does not, its half of S counts as nothing: it must not cancel what the other engine says. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from parity.lockstep import arrays
from parity.recording import Completion, FinishReason, Recording, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Where a slack counts as what, in nats."""

    tie_nats: float
    benign_nats: float
    mismatch_nats: float


class Kind(Enum):
    """How a prompt's two answers relate."""

    IDENTICAL = "identical"
    TIE = "tie"
    BENIGN = "benign"
    SUSPICIOUS = "suspicious"
    MISMATCH = "mismatch"
    LENGTH = "length"
    """One side ended where the other went on, and no choice between tokens explains it: a limit, an ignored stop."""
    UNKNOWN = "unknown"
    """They diverge and log-probabilities are missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One chosen token (or the terminator) and the distribution it was chosen from."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One prompt's two answers, compared.

    halves: what the reference and the candidate contribute to `slack_nats`; None where a side hides it.
    outside: one side's token is not among the other's top k.
    """

    reference: Completion
    candidate: Completion
    kind: Kind
    position: int | None
    slack_nats: float | None
    halves: tuple[float | None, float | None]
    outside: bool

    @property
    def is_bound(self) -> bool:
        """Whether the true slack may be larger than `slack_nats`."""
        return self.outside or None in self.halves


def compare(reference: Completion, candidate: Completion, scale: Scale) -> Pair:
    """Compare one prompt's two answers."""
    position = _first_divergence(reference, candidate)
    kind, slack, outside = Kind.IDENTICAL, None, False
    halves: tuple[float | None, float | None] = (None, None)
    if position is not None:
        ours, theirs = _step(reference, position), _step(candidate, position)
        kind = Kind.LENGTH
        if ours is not None and theirs is not None and ours.token_id != theirs.token_id:
            halves, outside = _halves(ours, theirs)
            known = [half for half in halves if half is not None]
            slack = sum(known) if known else None
            kind = _kind(slack, outside, scale)
    return Pair(
        reference=reference,
        candidate=candidate,
        kind=kind,
        position=position,
        slack_nats=slack,
        halves=halves,
        outside=outside,
    )


def compare_all(reference: Recording, candidate: Recording, scale: Scale) -> tuple[Pair, ...]:
    """Every prompt of the candidate, in the order of asking: answers arrive in any."""
    return tuple(compare(reference.by_id[c.id], c, scale) for c in in_asked_order(candidate))


def in_asked_order(recording: Recording) -> tuple[Completion, ...]:
    """The answers in the order of their questions."""
    place = {id_: number for number, id_ in enumerate(recording.workload.request_ids)}
    return tuple(sorted(recording.completions, key=lambda c: (place.get(c.id, len(place)), c.id)))


def _kind(slack: float | None, outside: bool, scale: Scale) -> Kind:
    if slack is None:
        return Kind.UNKNOWN
    if outside or slack > scale.mismatch_nats:
        return Kind.MISMATCH
    if slack <= scale.tie_nats:
        return Kind.TIE
    return Kind.BENIGN if slack <= scale.benign_nats else Kind.SUSPICIOUS


class WrongEnd(Enum):
    """How an answer ends where it should not; the value completes "3 answers are ..."."""

    ABORTED = "aborted by the engine"
    CUT_OFF = "cut off before max_tokens (look for a context or output limit of the engine)"
    TOO_LONG = "longer than max_tokens"
    PAST_STOP = "going on after the stop token at which the reference ends"
    REFERENCE_CUT_OFF = "going on where the reference is cut off"
    UNASKED = "ending without a stop token where the reference does not"


def wrong_end(pair: Pair, *, max_tokens: int) -> WrongEnd | None:
    """What is wrong with the end of the candidate's answer; None if nothing is."""
    ours, theirs = pair.reference, pair.candidate
    count = len(theirs.token_ids)
    if theirs.finish_reason is FinishReason.ABORT:
        return WrongEnd.ABORTED
    if count > max_tokens:
        return WrongEnd.TOO_LONG
    # The end of the context window is no fault: it comes at the same length on both sides.
    alike = ours.finish_reason is FinishReason.LENGTH and len(ours.token_ids) == count
    if theirs.finish_reason is FinishReason.LENGTH and count < max_tokens and not alike:
        return WrongEnd.CUT_OFF
    if pair.kind is not Kind.LENGTH:
        return None
    if count <= len(ours.token_ids):
        return WrongEnd.UNASKED
    return WrongEnd.REFERENCE_CUT_OFF if ours.terminator is None else WrongEnd.PAST_STOP


@dataclass(frozen=True, slots=True, kw_only=True)
class OffArgmax:
    """Steps whose token lies well below the engine's own most probable one, with the first few places.

    steps: how many tokens were looked at, stop tokens included.
    off_stops: how many of `off` are stop tokens.
    not_numbers: how many of `off` have no number for a log-probability (NaN); they cannot be shown to be right.
    """

    steps: int
    off: int
    off_stops: int
    not_numbers: int
    witnesses: tuple[str, ...]


def off_argmax(completions: Sequence[Completion], *, tolerance_nats: float, witnesses: int = 3) -> OffArgmax:
    """Look for sampling where greedy decoding was asked. Needs no second engine."""
    steps, off, off_stops, not_numbers = 0, 0, 0, 0
    found: list[str] = []
    for completion in completions:
        witness = None
        for start, logprobs in _scored_parts(completion):
            _, top = arrays(logprobs)
            with np.errstate(invalid="ignore"):
                gap = top[:, 0] - np.frombuffer(logprobs.chosen, np.float32)
            bad = np.flatnonzero(~(gap <= tolerance_nats))  # so that NaN is bad
            steps += gap.size
            off += bad.size
            off_stops += bad.size * (start == len(completion.token_ids))
            not_numbers += int(np.isnan(gap).sum())
            if bad.size and witness is None:
                witness = _off_witness(completion, start + int(bad[0]), float(gap[bad[0]]))
        if witness is not None and len(found) < witnesses:
            found.append(witness)
    return OffArgmax(steps=steps, off=off, off_stops=off_stops, not_numbers=not_numbers, witnesses=tuple(found))


def _scored_parts(completion: Completion) -> Iterator[tuple[int, TokenLogprobs]]:
    """The body and the stop token, each with its first position, as far as they have log-probabilities."""
    end = None if completion.terminator is None else completion.terminator.logprobs
    for start, logprobs in ((0, completion.logprobs), (len(completion.token_ids), end)):
        if logprobs is not None and len(logprobs) and logprobs.k:
            yield start, logprobs


def _off_witness(completion: Completion, position: int, gap_nats: float) -> str:
    what = "stop token" if position == len(completion.token_ids) else "token"
    if math.isnan(gap_nats):
        return f"{completion.id}, {what} {position}: its log-probability is not a number"
    return f"{completion.id}, {what} {position}: chosen {gap_nats:.2f} nats below its own most probable"


def _first_divergence(reference: Completion, candidate: Completion) -> int | None:
    """The first step that differs, the terminator counted as a step; None if there is none."""
    if reference.token_ids != candidate.token_ids:
        common = min(len(reference.token_ids), len(candidate.token_ids))
        for position in range(common):
            if reference.token_ids[position] != candidate.token_ids[position]:
                return position
        return common
    ours, theirs = reference.terminator, candidate.terminator
    same_end = (ours and ours.token_id) == (theirs and theirs.token_id)
    return None if same_end and reference.finish_reason is candidate.finish_reason else len(reference.token_ids)


def _step(completion: Completion, position: int) -> _Step | None:
    """What was chosen at `position`; None if the completion had ended by then without a terminator."""
    if position < len(completion.token_ids):
        row = None if completion.logprobs is None else completion.logprobs.rows(position, position + 1)
        return _Step(token_id=completion.token_ids[position], logprobs=row)
    end = completion.terminator
    if end is not None and position == len(completion.token_ids):
        return _Step(token_id=end.token_id, logprobs=end.logprobs)
    return None


def _halves(ours: _Step, theirs: _Step) -> tuple[tuple[float | None, float | None], bool]:
    """Both sides' halves of S, and whether a token was outside the other's top k (S is then a lower bound).

    Where one engine hides the distribution of its last step (TensorRT engines at the terminator), the other's half of
    S still bounds it from below.
    """
    left, right = _half(ours, theirs.token_id), _half(theirs, ours.token_id)
    outside = any(half is not None and half[1] for half in (left, right))
    return (left and left[0], right and right[0]), outside


def _half(step: _Step, other_token_id: int) -> tuple[float, bool] | None:
    """l(own token) - l(other token) under one engine; the last finite log-probability stands in for a token outside."""
    if step.logprobs is None or not len(step.logprobs):
        return None
    own = step.logprobs.chosen[0]
    row = [(token_id, value) for token_id, value in step.logprobs.row(0) if math.isfinite(value)]
    if not row or math.isnan(own):
        return None
    value = dict(row).get(other_token_id)
    return (max(0.0, own - row[-1][1]), True) if value is None else (max(0.0, own - value), False)
