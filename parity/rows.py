"""Log-probabilities that no distribution has: rules that the numbers of any engine's top-k rows keep. Pure.

Needs one engine only. A number that is none is never dropped: that would improve every mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.lockstep import arrays
from parity.recording import NO_TOKEN, Completion

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ENTRIES = 4  # of a top-k row in a witness
_BLOCK = 64  # answers looked at together: numpy's cost per call no longer counts, and memory stays small


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What rounding may do to the numbers of a row. Source: docs/checks/shape.md, "Limits".

    order_nats: how far a log-probability may lie above 0, or above the one ranked before it.
    own_entry_nats: how far the chosen token's may lie from the entry in its own top-k row.
    sum_excess: how far the probabilities of a top-k row may add up to more than 1.
    """

    order_nats: float = 1e-4
    own_entry_nats: float = 1e-3
    sum_excess: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """The first step of an answer that breaks a rule.

    id: the answer's. rule: completes "an answer ...". witness: the numbers, for a person. cause: what it points to.
    """

    id: str
    rule: str
    witness: str
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What was seen: how many answers have log-probabilities at all, and what is wrong with them."""

    scored: int
    bad: tuple[BadRow, ...]


def examine(answers: Sequence[Completion], tolerance: Tolerance) -> Rows:
    """Hold every scored step of these answers, terminators included, against the rules.

    All answers must have one K, as those of a recording do.
    """
    bad: list[BadRow] = []
    scored = 0
    for block in _blocks(answers):
        scored += np.unique(block.owner).size
        for (rule, cause), breaks in zip(_RULES, _broken(block, tolerance), strict=True):
            rows = np.flatnonzero(breaks)
            owners, first = np.unique(block.owner[rows], return_index=True)
            for owner, row in zip(owners.tolist(), rows[first].tolist(), strict=True):
                position, row_ids, values = int(block.position[row]), block.ids[row].tolist(), block.top[row].tolist()
                shown = ", ".join(f"{i}: {v:.4g}" for i, v in list(zip(row_ids, values, strict=True))[:_ENTRIES])
                witness = (
                    f"{answers[owner].id}, token {position}: {block.token_ids[row]} has {block.chosen[row]:.4g} nats; "
                    f"top-k row {shown}"
                )
                on = bool(breaks[(block.owner == owner) & (block.position > position)].all())
                value = "NaN" if np.isnan([block.chosen[row], *values]).any() else "an infinite log-probability"
                where = f"{value} {'from' if on else 'at'} token {position}{' on' * on}"
                bad.append(BadRow(id=answers[owner].id, rule=rule, witness=witness, cause=cause.format(where=where)))
    return Rows(scored=scored, bad=tuple(bad))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """The N scored steps of some answers, terminators included. Shapes: ids int32 [N, K], top float32 [N, K], else [N].

    owner: which answer each step belongs to; position: which step of it.
    """

    owner: NDArray[np.int64]
    position: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    chosen: NDArray[np.float32]
    ids: NDArray[np.int32]
    top: NDArray[np.float32]


def _blocks(answers: Sequence[Completion]) -> Iterator[_Block]:
    for start in range(0, len(answers), _BLOCK):
        parts = []
        for owner, answer in enumerate(answers[start : start + _BLOCK], start):
            end = answer.terminator
            for first, token_ids, scores in (
                (0, answer.token_ids, answer.logprobs),
                (len(answer.token_ids), (end.token_id,) if end else (), end.logprobs if end else None),
            ):
                if scores is not None and len(scores):
                    count = len(scores)
                    steps = np.full(count, owner), np.arange(first, first + count), np.array(token_ids, np.int32)
                    parts.append((*steps, np.frombuffer(scores.chosen, np.float32), *arrays(scores)))
        if parts:
            owner_, position, token_ids_, chosen, ids, top = map(np.concatenate, zip(*parts, strict=True))
            yield _Block(owner=owner_, position=position, token_ids=token_ids_, chosen=chosen, ids=ids, top=top)


_MIXED = "top-k rows are put together wrongly"
_NOT_NORMALISED = "the numbers are not log-probabilities of the whole vocabulary: logits, or not normalised"
_RULES = (
    ("with a log-probability that is not finite", "{where}: broken kernel or overflow"),
    ("with a log-probability above 0", _NOT_NORMALISED),
    ("with a top-k row that is not sorted", "top-k rows come in another order than by probability"),
    (
        "with a chosen token whose log-probability is not that of its own top-k row",
        "the chosen token's log-probabilities are of another position or temperature than the top-k rows",
    ),
    ("with a top-k row whose probabilities add up to more than 1", _NOT_NORMALISED),
    ("with a token that is twice in a top-k row", _MIXED),
    ("with a gap inside a top-k row", _MIXED),
)


def _broken(block: _Block, tolerance: Tolerance) -> tuple[NDArray[np.bool_], ...]:
    """For each of _RULES the steps [N] that break it. A masked token's -inf in a row is no fault."""
    ids, filler = block.ids, block.ids == NO_TOKEN
    hit = ids == block.token_ids[:, None]
    ordered = np.sort(ids, axis=1)
    # What is not finite breaks the first rule and no other: nothing is greater than NaN.
    chosen = np.where(np.isfinite(block.chosen), block.chosen, np.nan)
    top = np.where(np.isposinf(block.top), np.nan, block.top)
    with np.errstate(invalid="ignore"):
        entry = np.where(hit.any(axis=1), top[np.arange(len(ids)), hit.argmax(axis=1)], np.nan)
        mass = np.exp(np.minimum(top, 0.0)).sum(axis=1)  # what lies above 0 breaks its own rule; a filler is -inf
        return (
            np.isnan(chosen) | _any(np.isnan(top)),
            (chosen > tolerance.order_nats) | _any(top > tolerance.order_nats),
            _any(top[:, 1:] > top[:, :-1] + tolerance.order_nats),
            np.abs(entry - chosen) > tolerance.own_entry_nats,
            mass > 1.0 + tolerance.sum_excess,
            _any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)),
            _any(filler[:, :-1] & ~filler[:, 1:]),
        )


def _any(rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(rows.any(axis=1))
