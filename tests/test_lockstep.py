"""Scores of the same tokens: every number by hand, and the laws of divergence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr  # type: ignore[import-untyped]

from lockstep_cases import K, World, logprobs_of
from parity import lockstep
from parity.errors import IncomparableError
from parity.lockstep import Steps
from parity.recording import Completion, Recording
from recordings import Rows, completion, recording

A, B, C, D = 10, 11, 12, 13


def answer(rows: Rows, *, id_: str = "p", tokens: tuple[int, ...] | None = None) -> Completion:
    ids = tokens or tuple(A for _ in rows)
    return completion(id_, token_ids=ids, rows=rows, chosen=[r[0][1] for r in rows], terminator=None, k=len(rows[0]))


def pair(ours: Completion, theirs: Completion) -> tuple[Recording, Recording]:
    reference = recording([ours])
    return reference, recording([theirs], forced_from=reference.digest)


def measured(ours: Rows, theirs: Rows) -> Steps:
    return lockstep.measure(*pair(answer(ours), answer(theirs)))


def row(*probabilities: tuple[int, float]) -> list[tuple[int, float]]:
    return [(token, math.log(p)) for token, p in probabilities]


def test_a_position_worked_by_hand() -> None:
    """p: A .5, B .3, C .1, tail .1; q: A .4, B .4, D .1. Shared: A and B; the rest is one bucket of .2 on both."""
    steps = measured([row((A, 0.5), (B, 0.3), (C, 0.1))], [row((B, 0.4), (A, 0.4), (D, 0.1))])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert steps.kl_nats[0] == pytest.approx(expected, abs=1e-6)
    assert steps.covered[0] == pytest.approx(0.8, abs=1e-6)
    assert steps.delta_nats[0] == pytest.approx(math.log(0.4 / 0.5), abs=1e-6)  # the row's first is the token itself
    assert steps.gap_nats[0] == pytest.approx(math.log(0.5 / 0.3), abs=1e-6)
    assert steps.shift_nats[0] == pytest.approx(math.log(0.4 / 0.4) - math.log(0.5 / 0.3), abs=1e-6)
    assert steps.flipped[0]
    assert steps.slack_nats[0] == pytest.approx(math.log(0.5 / 0.3) + math.log(0.4 / 0.4), abs=1e-6)
    assert not steps.outside[0]


def test_half_variance_worked_by_hand() -> None:
    """Changes of +0.01 and -0.01 at weights .6 and .2: mean .005, variance (.6 * .005^2 + .2 * .015^2), half of it."""
    ours = [[(A, math.log(0.6)), (B, math.log(0.2))]]
    theirs = [[(A, math.log(0.6) - 0.01), (B, math.log(0.2) + 0.01)]]
    assert measured(ours, theirs).half_variance_nats2[0] == pytest.approx(
        0.5 * (0.6 * 0.005**2 + 0.2 * 0.015**2), rel=1e-4
    )


def test_a_preferred_token_outside_the_other_top_k_is_said_and_bounded() -> None:
    steps = measured([row((A, 0.6), (B, 0.3))], [row((C, 0.6), (A, 0.3))])
    assert steps.outside[0]
    assert steps.slack_nats[0] == pytest.approx(math.log(0.6 / 0.3) * 2, abs=1e-6)
    assert np.isnan(steps.shift_nats[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_numbers_are_counted_and_not_dropped(value: float) -> None:
    steps = measured([row((A, 0.6), (B, 0.3))], [[(A, value), (B, -1.0)]])
    assert steps.broken.tolist() == [True]


@given(st.integers(0, 2**32 - 1), st.integers(2, K))
def test_the_bucket_makes_a_lower_bound_that_more_tokens_tighten(seed: int, k: int) -> None:
    """Against scipy's full divergence over the whole vocabulary."""
    draw = np.random.default_rng(seed)
    p_logits = draw.normal(0, 2, (3, 40))
    q_logits = p_logits + draw.normal(0, 0.3, p_logits.shape)
    tokens = p_logits.argmax(axis=1)

    def compared(width: int) -> Steps:
        made = [
            replace(
                completion("p", token_ids=tokens.tolist(), terminator=None), logprobs=logprobs_of(each, tokens, k=width)
            )
            for each in (p_logits, q_logits)
        ]
        return lockstep.measure(*pair(made[0], made[1]))

    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (p_logits, q_logits))
    full = rel_entr(p, q).sum(axis=1)
    found = compared(k)
    assert (found.kl_nats >= 0).all()
    assert (found.kl_nats <= full + 1e-5).all()
    assert compared(40).kl_nats == pytest.approx(full, abs=1e-5)


def test_a_recording_against_itself_is_zero_everywhere() -> None:
    world = World(prompts=3)
    logits = world.model()
    reference = world.recording(logits, world.tokens_of(logits), dtype="float32")
    again = world.recording(logits, world.tokens_of(logits), dtype="float32", forced_from=reference.digest)
    steps = lockstep.measure(reference, again)
    assert len(steps) == 48
    assert steps.kl_nats.max() == 0.0
    assert steps.half_variance_nats2.max() == 0.0
    assert not steps.flipped.any()
    assert steps.context.tolist()[:16] == list(range(5, 21))
    assert steps.place(17) == ("p-001", 1)


def test_a_part_is_what_measuring_the_part_gives() -> None:
    world = World(prompts=4)
    exact, rounded = world.model(), world.rounded(1)
    tokens = world.tokens_of(exact)
    reference = world.recording(exact, tokens, dtype="float32")
    steps = lockstep.measure(
        reference, world.recording(rounded, tokens, dtype="bfloat16", forced_from=reference.digest)
    )
    part = steps.only(["p-002", "p-000"])
    sums = steps.per_prompt(steps.kl_nats)
    assert part.per_prompt(part.kl_nats).tolist() == [sums[2], sums[0]]
    assert part.lengths.tolist() == [16, 16]
    assert sums.sum() == pytest.approx(steps.kl_nats.sum())


def test_recordings_that_do_not_belong_together_are_refused() -> None:
    ours = answer([row((A, 0.6), (B, 0.3))])
    with pytest.raises(IncomparableError, match="'p': the two sides scored different tokens"):
        lockstep.measure(*pair(ours, answer([row((B, 0.6), (A, 0.3))], tokens=(B,))))
    with pytest.raises(IncomparableError, match="share no prompt"):
        lockstep.measure(*pair(ours, answer([row((A, 0.6), (B, 0.3))], id_="q")))
