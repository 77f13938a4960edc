"""What a candidate keeps of the reference's accuracy, task by task, beside how far its distributions moved. Pure.

"Recovery" is the word of quantization reports: the candidate's score in percent of the reference's. Here it comes with
its interval, which is that of the paired difference, and with the documents that changed in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parity.documents import Part, pair_up, pooled
from parity.evals import TaskRun
from parity.lockstep import Steps
from parity.paired import Outcomes

_COVERED = 0.95
"""From less on a KL divergence is called a lower bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One task, or all of them together.

    reference, candidate: mean scores, so that more is better. recovery: the candidate's by the reference's; with its
        interval None where the reference gets nothing right.
    lost, won: documents on which only the reference, only the candidate scores higher.
    """

    name: str
    n: int
    reference: float
    candidate: float
    recovery: float | None
    interval: tuple[float, float] | None
    lost: int
    won: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far the candidate's distributions are from the reference's, on the reference's tokens.

    kl_nats: a token, a lower bound where `covered`, the share of the reference's probability on tokens that both sides
        kept, is far from 1. floor_nats: what rounding alone does, where it was measured. same_choice: the share of
        tokens whose most probable one is the same. perplexity_ratio: the candidate's by the reference's, with one
        standard error by prompt.
    """

    kl_nats: float
    covered: float
    floor_nats: float | None
    same_choice: float
    perplexity_ratio: float
    perplexity_error: float
    tokens: int

    @property
    def sentence(self) -> str:
        """All of it for a person."""
        floor = "" if self.floor_nats is None else f" (rounding alone: {self.floor_nats:.2g})"
        return (
            f"on {self.tokens} tokens of the reference: KL divergence {'' if self.covered > _COVERED else 'at least '}"
            f"{self.kl_nats:.3g} nats a token{floor}, the same "
            f"most probable token on {self.same_choice:.2%}, perplexity {self.perplexity_ratio:.4f} times the "
            f"reference's (+- {self.perplexity_error:.4f})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Every task whose score lies between 0 and 1, then all together; and the distributions, where they were scored."""

    tasks: tuple[Row, ...]
    total: Row
    confidence: float
    moved: Moved | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every task, then all of them together where there are several."""
        return (*self.tasks, self.total) if len(self.tasks) > 1 else self.tasks


def of(
    reference: Sequence[TaskRun], candidate: Sequence[TaskRun], *, tail: float, moved: Moved | None
) -> Recovery | None:
    """The table; None where no task is scored between 0 and 1.

    tail: left out on either side of an interval.

    Raises:
        IncomparableError: If the two did not answer the same documents of the same tasks.
    """
    parts = [part for part in pair_up(reference, candidate) if part.is_first and part.in_points]
    if not parts:
        return None
    return Recovery(
        tasks=tuple(_row(part.name, [part], tail) for part in parts),
        total=_row("all tasks", parts, tail),
        confidence=1.0 - 2.0 * tail,
        moved=moved,
    )


def moved(steps: Steps, floor_nats: float | None) -> Moved:
    """How far the scores of the same tokens are apart."""
    ratio, error = steps.perplexity_ratio
    return Moved(
        kl_nats=float(steps.kl_nats.mean()),
        covered=float(steps.covered.mean()),
        floor_nats=floor_nats,
        same_choice=1.0 - float(steps.flipped.mean()),
        perplexity_ratio=ratio,
        perplexity_error=error,
        tokens=len(steps),
    )


def _row(name: str, parts: Sequence[Part], tail: float) -> Row:
    outcomes: Outcomes = pooled(parts)
    ours, theirs, x = float(outcomes.reference.mean()), float(outcomes.candidate.mean()), outcomes.differences
    low, high = outcomes.estimate.interval(tail)
    return Row(
        name=name,
        n=len(outcomes),
        reference=ours,
        candidate=theirs,
        recovery=theirs / ours if ours > 0.0 else None,
        interval=(max(0.0, (ours - high) / ours), (ours - low) / ours) if ours > 0.0 else None,
        lost=int((x > 0).sum()),
        won=int((x < 0).sum()),
    )
