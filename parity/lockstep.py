"""Two engines' scores of the same tokens, position by position: nothing is lost after a first divergence.

One side chose or was given the tokens, the other scored them by teacher forcing, so at every position both saw the same
prefix. Per position, in nats, with p the reference's and q the candidate's distribution:

    KL         sum over tokens in both top k of p ln(p/q), plus one bucket for all other tokens. By the data processing
               inequality a lower bound of the full KL divergence; `covered` is the reference's probability outside the
               bucket.
    half variance   half of the p-weighted variance of ln q - ln p over the shared tokens: what KL becomes when the two
               are so close (float32) that the KL sum itself is rounding noise.
    shift      change of the margin between the reference's two most probable tokens; its spread is sigma, see
               `parity.noise`.
    slack      S of `parity.divergence`, at positions where the two prefer different tokens.

Pure; whole recordings at once, in chunks that stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from parity.errors import IncomparableError
from parity.recording import NO_TOKEN, Completion, Recording, TokenLogprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

_CHUNK = 4096
_PROMPTS = 256
_SMALLEST_TAIL = 2.0**-22
"""Probability below which one minus a float32 sum is rounding and no longer a tail."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What two engines say about the same T tokens of m prompts. One value a position, prompt after prompt.

    starts: where each prompt begins, int64 [m + 1].
    context: tokens before the position, int64 [T].
    kl_nats, covered, half_variance_nats2: see the module, float64 [T].
    delta_nats: candidate's minus reference's log-probability of the token itself, float64 [T].
    shift_nats: NaN where one of the two tokens is not in the other's top k, float64 [T].
    gap_nats: the reference's margin between its two most probable tokens, float64 [T].
    slack_nats: 0 where both prefer the same token, else S; a lower bound where `outside`, float64 [T].
    outside: the preferred token of one is not in the other's top k, bool [T].
    flipped: the two prefer different tokens, bool [T].
    broken: a log-probability is NaN or +inf on either side, bool [T]. Never dropped: that would improve every mean.
    """

    prompt_ids: tuple[str, ...]
    starts: NDArray[np.int64]
    context: NDArray[np.int64]
    kl_nats: Floats
    covered: Floats
    half_variance_nats2: Floats
    delta_nats: Floats
    shift_nats: Floats
    gap_nats: Floats
    slack_nats: Floats
    outside: Bools
    flipped: Bools
    broken: Bools

    def __len__(self) -> int:
        return int(self.starts[-1])

    def per_prompt(self, values: NDArray[np.generic]) -> Floats:
        """The sum of [T] values in each prompt, float64 [m]."""
        return np.add.reduceat(np.asarray(values, np.float64), self.starts[:-1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Positions of each prompt, int64 [m]."""
        return np.diff(self.starts)

    @property
    def perplexity_ratio(self) -> tuple[float, float]:
        """The candidate's perplexity on the scored tokens by the reference's, and one standard error by prompt."""
        sums, count = self.per_prompt(np.where(self.broken, 0.0, -self.delta_nats)), self.lengths
        mean, m = float(sums.sum() / count.sum()), len(count)
        ratio = math.exp(min(mean, 50.0))
        spread = math.sqrt(m / max(m - 1, 1) * float(((sums - mean * count) ** 2).sum()))
        return ratio, ratio * spread / float(count.sum())

    def place(self, position: int) -> tuple[str, int]:
        """The prompt and the token within its answer, for a position in [0, T)."""
        prompt = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.prompt_ids[prompt], position - int(self.starts[prompt])

    def only(self, prompt_ids: Sequence[str]) -> Steps:
        """The same, for some of the prompts, in the given order."""
        if tuple(prompt_ids) == self.prompt_ids:
            return self
        index = {id_: number for number, id_ in enumerate(self.prompt_ids)}
        spans = [(int(self.starts[index[i]]), int(self.starts[index[i] + 1])) for i in prompt_ids]
        rows = np.concatenate([np.arange(a, b) for a, b in spans]) if spans else np.empty(0, np.int64)
        return Steps(
            prompt_ids=tuple(prompt_ids),
            starts=np.cumsum([0, *(b - a for a, b in spans)]),
            context=self.context[rows],
            kl_nats=self.kl_nats[rows],
            covered=self.covered[rows],
            half_variance_nats2=self.half_variance_nats2[rows],
            delta_nats=self.delta_nats[rows],
            shift_nats=self.shift_nats[rows],
            gap_nats=self.gap_nats[rows],
            slack_nats=self.slack_nats[rows],
            outside=self.outside[rows],
            flipped=self.flipped[rows],
            broken=self.broken[rows],
        )

    def _spans(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)


def measure(reference: Recording, candidate: Recording) -> Steps:
    """Compare every position of every prompt that both sides hold, in the reference's order of asking.

    Raises:
        IncomparableError: If tokens or prompts differ, log-probabilities are missing, or k is below 2.
    """
    shared = [i for i in reference.workload.request_ids if i in candidate.by_id and i in reference.by_id]
    pairs = [(reference.by_id[i], candidate.by_id[i]) for i in shared if reference.by_id[i].token_ids]
    for ours, theirs in pairs:
        _require_comparable(ours, theirs)
    if not pairs:
        raise IncomparableError("the two recordings share no prompt with an answer; record both from one workload")
    starts = np.cumsum([0, *(len(ours.token_ids) for ours, _ in pairs)])
    into = _Columns.of(int(starts[-1]))
    for first in range(0, len(pairs), _PROMPTS):
        # A few prompts at a time: joining whole recordings would double the memory they take.
        some = pairs[first : first + _PROMPTS]
        span = into.part(slice(int(starts[first]), int(starts[first + len(some)])))
        ids, top, chosen = _joined([ours for ours, _ in some])
        other_ids, other_top, other_chosen = _joined([theirs for _, theirs in some])
        for start in range(0, len(chosen), _CHUNK):
            rows = slice(start, start + _CHUNK)
            _compare((ids[rows], top[rows]), (other_ids[rows], other_top[rows]), span.part(rows))
        with np.errstate(invalid="ignore"):
            span.delta[:] = other_chosen.astype(np.float64) - chosen
        span.broken[:] = _broken(top, chosen) | _broken(other_top, other_chosen)
    return Steps(
        prompt_ids=tuple(ours.id for ours, _ in pairs),
        starts=starts,
        context=np.concatenate([len(c.prompt_token_ids) + np.arange(len(c.token_ids)) for c, _ in pairs]),
        kl_nats=into.kl,
        covered=into.covered,
        half_variance_nats2=into.half_variance,
        delta_nats=into.delta,
        shift_nats=into.shift,
        gap_nats=into.gap,
        slack_nats=into.slack,
        outside=into.outside,
        flipped=into.flipped,
        broken=into.broken,
    )


def _require_comparable(ours: Completion, theirs: Completion) -> None:
    if ours.prompt_token_ids != theirs.prompt_token_ids or ours.token_ids != theirs.token_ids:
        raise IncomparableError(f"prompt {ours.id!r}: the two sides scored different tokens; record the target again")
    for side, completion in (("reference", ours), ("candidate", theirs)):
        if completion.logprobs is None or completion.logprobs.k < 2:
            raise IncomparableError(
                f"prompt {ours.id!r}: the {side} has {'no' if completion.logprobs is None else 'too few'} "
                "log-probabilities; set the workload's 'logprobs' to 20"
            )


def arrays(logprobs: TokenLogprobs) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Top-k token ids and log-probabilities as [T, K] arrays, without a copy."""
    shape = (len(logprobs), logprobs.k)
    ids = np.frombuffer(logprobs.top_token_ids, np.int32).reshape(shape)
    return ids, np.frombuffer(logprobs.top, np.float32).reshape(shape)


def _broken(top: NDArray[np.float32], chosen: NDArray[np.float32]) -> Bools:
    return np.asarray((np.isnan(top) | (top == np.inf)).any(axis=1) | np.isnan(chosen) | (chosen == np.inf))


def _joined(
    completions: Sequence[Completion],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    parts = [c.logprobs for c in completions if c.logprobs is not None]
    tables = [arrays(part) for part in parts]
    return (
        np.concatenate([ids for ids, _ in tables]),
        np.concatenate([top for _, top in tables]),
        np.concatenate([np.frombuffer(part.chosen, np.float32) for part in parts]),
    )


class _Columns(NamedTuple):
    """What is computed a position; filled in place, chunk by chunk."""

    kl: Floats
    covered: Floats
    half_variance: Floats
    shift: Floats
    gap: Floats
    slack: Floats
    delta: Floats
    outside: Bools
    flipped: Bools
    broken: Bools

    @classmethod
    def of(cls, count: int) -> _Columns:
        floats, bools = np.empty((7, count)), np.zeros((3, count), bool)
        return cls._make([*floats, *bools])

    def part(self, rows: slice) -> _Columns:
        return _Columns._make(column[rows] for column in self)


_TopK: TypeAlias = "tuple[NDArray[np.int32], NDArray[np.float32]]"


def _compare(reference: _TopK, candidate: _TopK, into: _Columns) -> None:
    """Fill the columns for one chunk of n positions; ids and log-probabilities are [n, K] each."""
    # Rank by rank: numpy is fast along n positions and slow along K ranks.
    (ids, top), (other_ids, other_top) = ((i.T.copy(), t.T.astype(np.float64)) for i, t in (reference, candidate))
    p_log, q_log = top, _scores_of(ids, other_ids, other_top)
    with np.errstate(invalid="ignore", over="ignore"):  # a masked token is -inf on both sides
        finite = np.isfinite(p_log) & np.isfinite(q_log)
        p = np.where(finite, np.exp(p_log), 0.0)
        q = np.where(finite, np.exp(q_log), 0.0)
        ratio = np.where(finite, p_log - q_log, 0.0)
    covered = p.sum(axis=0)
    p_tail = np.maximum(1.0 - covered, _SMALLEST_TAIL)
    q_tail = np.maximum(1.0 - q.sum(axis=0), _SMALLEST_TAIL)
    weighted = (p * ratio).sum(axis=0)
    # Rounding of float32 sums can leave -1e-8 where the true value is 0.
    into.kl[:] = np.maximum(weighted + p_tail * np.log(p_tail / q_tail), 0.0)
    into.covered[:] = covered
    mean = weighted / np.maximum(covered, 1e-300)
    into.half_variance[:] = 0.5 * (p * (ratio - mean) ** 2).sum(axis=0)
    into.shift[:] = np.where(finite[0] & finite[1], ratio[1] - ratio[0], np.nan)
    with np.errstate(invalid="ignore"):
        gap = top[0] - top[1]
    into.gap[:] = np.where(np.isfinite(gap), gap, np.inf)
    # S needs each side's margin between the two preferred tokens; one outside the top k counts as the k-th.
    flipped = ids[0] != other_ids[0]
    into.flipped[:] = flipped
    hit_here = (ids == other_ids[0]).any(axis=0)
    hit_there = (other_ids == ids[0]).any(axis=0) & (ids[0] != NO_TOKEN)
    with np.errstate(invalid="ignore"):
        ours_half = top[0] - np.where(hit_here, _scores_of(other_ids[0], ids, top), top[-1])
        theirs_half = other_top[0] - np.where(hit_there, q_log[0], other_top[-1])
        slack = np.nan_to_num(ours_half + theirs_half, nan=np.inf)
    into.slack[:] = np.where(flipped, slack, 0.0)
    into.outside[:] = flipped & ~(hit_here & hit_there)


def _scores_of(token_ids: NDArray[np.int32], ids: NDArray[np.int32], top: Floats) -> Floats:
    """The log-probabilities that top-k rows [K, n] hold of tokens [..., n]; NaN where they hold none."""
    found = np.full(token_ids.shape, np.nan)
    for rank in reversed(range(len(ids))):  # of a token that is there twice the more probable one
        np.copyto(found, top[rank], where=token_ids == ids[rank])
    return found
