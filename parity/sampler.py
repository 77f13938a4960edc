"""A sampler, seen through its raw log-probabilities: what it drew, and what it should have drawn from. Pure.

At each step the raw distribution p is known on the top K tokens; the policy q is what the asked temperature and filters
make of it:

    p -> p^(1/T) -> min_p -> top_k -> top_p -> renormalised        (vLLM's order)

q is exact where the filters end within the top K, or at T = 1 without filters, where all other tokens share one bucket
of known mass. Where it is exact depends on the context alone, never on the drawn token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from parity.errors import IncomparableError
from parity.lockstep import arrays
from parity.prompts import SamplingParams
from parity.recording import Completion, Recording

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]
    Rows = NDArray[np.float32]

_Number = TypeVar("_Number", bound=np.generic)

FLOOR_NATS = -100.0
"""Stands for a masked token's -inf, so that sums stay finite."""
_NO_MASS = 1e-6  # what float32 leaves of the tail's mass when the row holds everything
_LOWEST_T, _HIGHEST_T = 0.1, 10.0  # among which a temperature is fitted
_BLOCK = 8192  # steps; what is made of their rows then stays in the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """N drawn tokens, stop tokens included, with the distributions they were drawn from.

    owner: which of `answers` drew it, int64 [N]. position: token of that answer, int64 [N]. token_id: int64 [N].
    rank: place among the top K, K outside them, int64 [N]. logprob: its own raw one, nats, float64 [N].
    top: of the K most probable tokens, descending, nats, float32 [N, K].
    """

    answers: tuple[Completion, ...]
    owner: Ints
    position: Ints
    token_id: Ints
    rank: Ints
    logprob: Floats
    top: Rows

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def k(self) -> int:
        """How many tokens of each distribution are known."""
        return int(self.top.shape[1])

    def blocks(self) -> Iterator[Steps]:
        """The same, some thousand steps at a time, at least once: what is made of rows is many times as large."""
        for start in range(0, max(len(self), 1), _BLOCK):
            rows = slice(start, start + _BLOCK)
            yield Steps(
                answers=self.answers,
                owner=self.owner[rows],
                position=self.position[rows],
                token_id=self.token_id[rows],
                rank=self.rank[rows],
                logprob=self.logprob[rows],
                top=self.top[rows],
            )


def steps_of(recording: Recording) -> Steps:
    """All that was drawn, sorted by prompt id: a verdict must not depend on the order of asking or of finishing.

    Raises:
        IncomparableError: If a token or a stop token has no log-probabilities.
    """
    answers = tuple(sorted(recording.completions, key=lambda c: c.id))
    owners, positions, tokens, ranks, chosen, rows = [], [], [], [], [], []
    for owner, answer in enumerate(answers):
        parts = [(0, answer.token_ids, answer.logprobs)]
        if answer.terminator is not None:
            # Leaving out the steps that chose to stop would select by what was drawn.
            parts.append((len(answer.token_ids), (answer.terminator.token_id,), answer.terminator.logprobs))
        for start, token_ids, logprobs in parts:
            if not token_ids:
                continue
            if logprobs is None or not logprobs.k:
                what = "the answer" if token_ids is answer.token_ids else "the stop token"
                raise IncomparableError(
                    f"{recording.label} returned no log-probabilities for {what} of {answer.id!r}, and the audit rests "
                    "on them; ask for the top 20 of every token"
                )
            ids, top = arrays(logprobs)
            drawn = np.asarray(token_ids, np.int64)
            hit = ids == drawn[:, None]
            owners.append(np.full(len(drawn), owner))
            positions.append(start + np.arange(len(drawn)))
            tokens.append(drawn)
            ranks.append(np.where(hit.any(axis=1), hit.argmax(axis=1), logprobs.k))
            chosen.append(np.frombuffer(logprobs.chosen, np.float32))
            rows.append(top)
    k = min((row.shape[1] for row in rows), default=1)
    table = np.concatenate([np.empty((0, k), np.float32), *(row[:, :k] for row in rows)])
    rank = np.minimum(np.concatenate([np.empty(0, np.int64), *ranks]), k)
    own = np.concatenate([np.empty(0), *chosen])
    return Steps(
        answers=answers,
        owner=np.concatenate([np.empty(0, np.int64), *owners]),
        position=np.concatenate([np.empty(0, np.int64), *positions]),
        token_id=np.concatenate([np.empty(0, np.int64), *tokens]),
        rank=rank,
        logprob=np.where(rank < k, at(table, np.minimum(rank, k - 1)), own),
        top=table,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """How far rounding may move the edge of a filter: a nucleus by so much probability, every edge by so many nats."""

    top_p_margin: float
    edge_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One filter of the policy at each of N steps.

    seen: where its edge is known, bool [N]. edge: the lowest raw log-probability it allows, nats, float64 [N].
    leak: the mass beyond it, NaN where that is not known, float64 [N].
    """

    name: str
    seen: Bools
    edge: Floats
    leak: Floats

    @classmethod
    def joined(cls, parts: Sequence[Filter]) -> Filter:
        """One filter at the steps of several blocks, in their order."""
        return cls(
            name=parts[0].name,
            seen=np.concatenate([part.seen for part in parts]),
            edge=np.concatenate([part.edge for part in parts]),
            leak=np.concatenate([part.leak for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPolicy:
    """What was asked, at each of N steps.

    q: probabilities of the top K and, last, of all other tokens; NaN rows where not exact, float64 [N, K + 1].
    ceiling: an upper bound of the largest probability, known at every step, float64 [N].
    """

    q: Floats
    ceiling: Floats
    filters: tuple[Filter, ...]


def policy_of(rows: Rows, asked: SamplingParams, edges: Edges) -> SamplingPolicy:
    """Apply temperature, min_p, top_k and top_p, in vLLM's order, to what is known of each distribution.

    rows: raw log-probabilities of the most probable tokens, descending, nats [N, K].
    """
    top, (n, k) = rows.astype(np.float64), rows.shape
    scaled = (top - top[:, :1]) / asked.temperature
    weight = np.exp(scaled)  # relative to the most probable token's, as is `tail`
    mass = np.maximum(1.0 - np.exp(top).sum(axis=1), 0.0)
    mass[mass < _NO_MASS] = 0.0
    unknown = mass / np.exp(top[:, 0]) if asked.temperature == 1.0 else np.full(n, np.nan)
    tail = np.where(mass == 0.0, 0.0, unknown)
    kept = np.ones(top.shape, np.bool_)
    filters = []

    def cut_tail(closed: Bools) -> None:
        """Nothing of the tail is left where the filter ends within the top K; how much is left elsewhere is unknown."""
        tail[~closed & (tail != 0.0)] = np.nan
        tail[closed] = 0.0

    def add(name: str, edge: Floats, seen: Bools) -> None:
        inside = np.where(kept & (top >= edge[:, None] - edges.edge_nats), weight, 0.0).sum(axis=1)
        whole = np.where(kept, weight, 0.0).sum(axis=1) + tail
        filters.append(Filter(name=name, seen=seen, edge=edge, leak=1.0 - inside / whole))

    if asked.min_p > 0.0:
        lowest = math.log(asked.min_p)
        add(f"min_p {asked.min_p:g}", top[:, 0] + asked.temperature * lowest, np.ones(n, np.bool_))
        kept &= scaled >= lowest
        cut_tail(~kept[:, -1])
    # Which of two equally probable tokens an edge keeps, or whether both, is the engine's choice. Logits in 16 bits tie
    # often, and what a tie at the edge of top_k adds also moves the nucleus of top_p, which comes after it.
    tied_k = np.zeros(n, np.bool_)
    if 0 < asked.top_k < k:
        tied_k = top[:, asked.top_k - 1] - top[:, asked.top_k] < edges.edge_nats
    if asked.top_k > 0:
        # A copy: a column's view would keep all of `top` for as long as the filter is kept.
        edge = top[:, asked.top_k - 1].copy() if asked.top_k <= k else np.full(n, -np.inf)
        add(f"top_k {asked.top_k}", edge, np.full(n, asked.top_k <= k))
        kept[:, asked.top_k :] = False
        cut_tail(np.full(n, asked.top_k <= k))
    inside = np.where(kept, weight, 0.0)
    whole = inside.sum(axis=1) + tail
    ceiling = 1.0 / (inside.sum(axis=1) * asked.top_p)
    if asked.top_p < 1.0:
        before = (np.cumsum(inside, axis=1) - inside) / whole[:, None]
        wide = asked.top_p + edges.top_p_margin
        last = np.maximum((kept & (before < wide)).sum(axis=1) - 1, 0)
        seen = (inside.sum(axis=1) / whole >= wide) & ~tied_k
        add(f"top_p {asked.top_p:g}", at(top, last), seen)
        kept &= before < asked.top_p
        cut_tail(inside.sum(axis=1) / whole >= asked.top_p)
    q = np.concatenate([np.where(kept, weight, 0.0), tail[:, None]], axis=1)
    q /= q.sum(axis=1, keepdims=True)
    last = np.maximum(kept.sum(axis=1) - 1, 0)
    tied = tied_k | ((last < k - 1) & (at(top, last) - at(top, np.minimum(last + 1, k - 1)) < edges.edge_nats))
    q[tied] = np.nan
    exact = ~np.isnan(q[:, 0])
    return SamplingPolicy(q=q, ceiling=np.where(exact, q[:, 0], np.minimum(ceiling, 1.0)), filters=tuple(filters))


def transformed(q: Floats, rank: Ints, random: np.random.Generator) -> Floats:
    """The probability integral transform of draws, most probable token first: uniform if they were drawn from q.

    Shapes: q [N, any], rank [N], result [N]. `random` spreads a token's draws over its probability, a number a draw.
    """
    drawn = at(q, rank)
    return np.clip(at(np.cumsum(q, axis=1), rank) - drawn + random.random(len(rank)) * drawn, 0.0, 1.0)


Draws: TypeAlias = "tuple[Rows, Ints]"
"""Raw log-probabilities [N, K], most probable first, -inf where a token may not be drawn; and the drawn ranks [N]."""


def tempered(rows: Rows, temperature: float) -> Floats:
    """The distributions at a temperature among the tokens that are not -inf. Shapes: [N, K]."""
    weight = np.where(np.isfinite(rows), np.exp(_below_best(rows) / temperature), 0.0)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


def fitted_temperature(draws: Sequence[Draws]) -> float:
    """The most likely temperature, between 0.1 and 10, of draws among tokens that are all known.

    Conditioning on these tokens makes every temperature computable. The derivative of the log-likelihood by 1/T falls
    strictly, so its zero is found by bisection, in ln T.
    """
    drawn = sum(float(at(_below_best(rows), rank).sum()) for rows, rank in draws)
    low, high = math.log(_LOWEST_T), math.log(_HIGHEST_T)
    for _ in range(20):
        middle = (low + high) / 2
        expected = sum(float((tempered(rows, math.exp(middle)) * _below_best(rows)).sum()) for rows, _ in draws)
        low, high = (low, middle) if drawn > expected else (middle, high)
    return math.exp((low + high) / 2)


def _below_best(rows: Rows) -> Floats:
    return np.asarray(np.maximum(rows - rows[:, :1].astype(np.float64), FLOOR_NATS))


def at(table: NDArray[_Number], column: Ints) -> NDArray[_Number]:
    """table[i, column[i]] for every row i."""
    return table[np.arange(len(table)), column]
