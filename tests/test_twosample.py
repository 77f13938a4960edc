"""The permutation test: exact by enumeration, uniform under the null, sharp on another distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from parity.twosample import Answer, compare


def drawn(rng: np.random.Generator, probabilities: list[float], *, draws: int, tokens: int = 8) -> list[Answer]:
    ids = rng.choice(len(probabilities), size=(draws, tokens), p=probabilities)
    return [tuple(row) for row in ids.tolist()]


FLAT, STEEP = [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]


def test_the_discrepancy_and_its_p_value_are_those_of_all_ways_to_share_the_answers_out() -> None:
    """Three answers a side by hand: 20 ways to choose the first side's, each worked out from its definition."""
    answers: list[Answer] = [(1, 2, 3), (1, 2, 4), (1, 5, 3), (6, 2, 3), (6, 7, 8), (6, 7, 9)]

    def alike(a: Answer, b: Answer) -> float:
        return (sum(x == y for x, y in zip(a, b, strict=True)) + 1) / 4  # the end is a position too

    def discrepancy(ours: tuple[int, ...]) -> float:
        theirs = [i for i in range(6) if i not in ours]
        within = np.mean([alike(answers[i], answers[j]) for i, j in itertools.permutations(ours, 2)])
        other = np.mean([alike(answers[i], answers[j]) for i, j in itertools.permutations(theirs, 2)])
        between = np.mean([alike(answers[i], answers[j]) for i in ours for j in theirs])
        return float(within + other - 2 * between)

    every = [discrepancy(some) for some in itertools.combinations(range(6), 3)]
    found = compare([answers[:3]], [answers[3:]], permutations=20_000, seed=1)
    assert found.discrepancy == pytest.approx(discrepancy((0, 1, 2)))
    assert found.p == pytest.approx(np.mean([d >= every[0] - 1e-9 for d in every]), abs=0.02)


def test_equal_distributions_give_p_values_that_are_uniform_or_larger() -> None:
    rng = np.random.default_rng(3)
    p = []
    for run in range(200):
        ours = [drawn(rng, FLAT, draws=4) for _ in range(6)]
        theirs = [drawn(rng, FLAT, draws=4) for _ in range(6)]
        p.append(compare(ours, theirs, permutations=199, seed=run).p)
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    assert 0.4 < np.mean(p) < 0.6


def test_another_distribution_is_seen_and_the_prompt_that_differs_is_named() -> None:
    rng = np.random.default_rng(4)
    ours = [drawn(rng, FLAT, draws=6) for _ in range(6)]
    theirs = [drawn(rng, STEEP if n == 4 else FLAT, draws=6) for n in range(6)]
    assert compare(ours, theirs, permutations=999, seed=0).widest[0] == 4
    everywhere = [drawn(rng, STEEP, draws=6) for _ in range(6)]
    assert compare(ours, everywhere, permutations=999, seed=0).p == 0.001


def test_prompts_with_one_answer_a_side_say_nothing() -> None:
    found = compare([[(1,)], [(1,), (2,)]], [[(2,)], [(1,)]], permutations=99, seed=0)
    assert (found.prompts, found.p, found.widest) == (0, 1.0, ())
