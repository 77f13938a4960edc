"""Do two engines sample from the same distribution, where neither tells its log-probabilities? The last resort.

Each prompt is drawn several times on each side. Two answers are as alike as the share of positions at which they hold
the same token; the statistic is the maximum mean discrepancy under that kernel, summed over prompts, and its p-value
comes from permuting the answers of a prompt between the sides, which is exact whatever the answers are.

A small p shows a difference. A large one shows nothing: with log-probabilities a hundredth of the tokens would say
more, and on very many tokens two correct 16-bit engines differ too (measured numbers: docs/checks/sampling.md). So this
never passes a candidate. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Answer: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSample:
    """A permutation test's result.

    discrepancy: summed over prompts; 0 in the mean where the sides draw alike. p: share of the permutations that are at
        least as far apart. prompts: with two answers or more on each side. widest: which of them are farthest apart.
    """

    discrepancy: float
    p: float
    prompts: int
    widest: tuple[int, ...]


def compare(
    reference: Sequence[Sequence[Answer]], candidate: Sequence[Sequence[Answer]], *, permutations: int, seed: int
) -> TwoSample:
    """Compare the answers of each prompt; prompts with fewer than two on a side are left out.

    Shapes: both hold the same prompts in the same order, each with its answers' token ids.
    """
    draw = np.random.default_rng(seed)
    found: list[tuple[int, float]] = []
    permuted = np.zeros(permutations)
    for number, (ours, theirs) in enumerate(zip(reference, candidate, strict=True)):
        if min(len(ours), len(theirs)) < 2:
            continue
        alike = _alike([*ours, *theirs])
        sides = np.repeat([0, 1], [len(ours), len(theirs)])
        found.append((number, float(_discrepancy(alike, sides[None])[0])))
        shuffled = np.stack([draw.permutation(sides) for _ in range(permutations)])
        permuted += _discrepancy(alike, shuffled)
    total = sum(value for _, value in found)
    # What is equal up to rounding counts as equal: many permutations change nothing.
    p = (1 + int(np.sum(permuted >= total - 1e-9))) / (1 + permutations)
    widest = sorted(found, key=lambda pair: -pair[1])
    return TwoSample(
        discrepancy=total, p=p if found else 1.0, prompts=len(found), widest=tuple(n for n, _ in widest[:3])
    )


def _alike(answers: Sequence[Answer]) -> NDArray[np.float64]:
    """The share of positions at which two answers hold the same token; ends count as tokens. Shape: [A, A]."""
    longest = max(map(len, answers)) + 1
    padded = np.array([[*answer, *[-1] * (longest - len(answer))] for answer in answers])
    return np.asarray((padded[:, None, :] == padded[None, :, :]).mean(axis=2))


def _discrepancy(alike: NDArray[np.float64], sides: NDArray[np.int64]) -> NDArray[np.float64]:
    """The unbiased squared discrepancy for each of P ways to share the A answers out. Shapes: [A, A], [P, A] -> [P]."""
    kernel = alike - np.diag(np.diag(alike))
    one, two = (sides == 0).astype(float), (sides == 1).astype(float)
    m, n = one.sum(axis=1), two.sum(axis=1)
    within = np.einsum("pa,ab,pb->p", one, kernel, one) / (m * (m - 1))
    within += np.einsum("pa,ab,pb->p", two, kernel, two) / (n * (n - 1))
    return np.asarray(within - 2.0 * np.einsum("pa,ab,pb->p", one, kernel, two) / (m * n))
