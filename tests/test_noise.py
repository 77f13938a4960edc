"""Sigma: planted margin shifts are recovered, and scaled to the pair that is judged."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import numpy as np
import pytest

from parity import noise
from parity.errors import IncomparableError
from parity.noise import SIGMA_FLOOR_NATS, measure
from parity.recording import Completion, Recording
from recordings import Rows, completion, recording

A, B, C = 50, 51, 52


def answer(rows: Rows | None, *, id_: str = "p-001", tokens: Sequence[int] | None = None, k: int = 3) -> Completion:
    """An answer that is A throughout, with these top-k rows."""
    count = len(rows or ())
    return completion(
        id_, token_ids=[A] * count if tokens is None else tokens, rows=rows, chosen=[-0.5] * count, terminator=None, k=k
    )


def row(margin: float) -> list[tuple[int, float]]:
    """A over B by `margin`, most probable first."""
    return sorted([(A, -1.0), (B, -1.0 - margin), (C, -30.0)], key=lambda entry: -entry[1])


def sides(
    reference: Sequence[Completion], scored: Sequence[Completion], *, dtypes: tuple[str, str] = ("float32", "bfloat16")
) -> tuple[Recording, Recording]:
    first = recording(reference, dtype=dtypes[0], engine="transformers")
    return first, recording(scored, dtype=dtypes[1], engine="transformers", forced_from=first.digest)


def shifted(
    shifts: Sequence[float], *, dtypes: tuple[str, str] = ("float32", "bfloat16")
) -> tuple[Recording, Recording]:
    """The noise engine sees A's margin over B, 2 nats, moved by each shift."""
    return sides([answer([row(2.0)] * len(shifts))], [answer([row(2.0 + s) for s in shifts])], dtypes=dtypes)


@pytest.mark.parametrize("sigma", [0.05, 0.13, 0.4])
def test_a_planted_gaussian_sigma_is_recovered(sigma: float) -> None:
    """The 68.27 % quantile of |x| over 8,000 draws has a standard error of 1.1 %; 4 % is more than three of them."""
    shifts = np.random.default_rng(7).normal(0.0, sigma, 8000)
    found = measure(*shifted(shifts.tolist()), candidate_dtype="bfloat16")
    assert found.measured_nats == pytest.approx(sigma, rel=0.04)
    assert found.sigma_nats == found.measured_nats
    assert (found.positions, found.prompts) == (8000, 1)
    assert found.source == "transformers 1 float32 against transformers 1 bfloat16"


def test_a_few_gross_shifts_do_not_widen_sigma() -> None:
    shifts = np.random.default_rng(7).normal(0.0, 0.13, 4000)
    shifts[::100] = 8.0
    assert measure(*shifted(shifts.tolist()), candidate_dtype="bfloat16").measured_nats == pytest.approx(0.13, rel=0.06)


def test_by_hand() -> None:
    """Shifts -0.25, 0.5, 0, -1: the 68.27 % quantile of 0, 0.25, 0.5, 1 lies at 2.0481: 0.5 + 0.0481 * 0.5."""
    found = measure(*shifted([-0.25, 0.5, 0.0, -1.0]), candidate_dtype="bfloat16")
    assert found.measured_nats == pytest.approx(0.5 + 0.0481 * 0.5, abs=1e-4)


def test_no_sigma_is_below_the_floor() -> None:
    found = measure(*shifted([2.0**-16] * 10, dtypes=("float32", "float32")), candidate_dtype="float32")
    assert found.measured_nats == pytest.approx(2.0**-16, rel=0.01)
    assert found.sigma_nats == SIGMA_FLOOR_NATS == 0.02


@pytest.mark.parametrize(
    ("reference", "scored", "candidate", "scale"),
    [
        ("float32", "bfloat16", "bfloat16", 1.0),
        ("float32", "float16", "bfloat16", 1.0),
        ("float32", "bfloat16", "float16", 1.0),
        ("bfloat16", "float32", "bfloat16", math.sqrt(2)),
        ("float16", "float32", "float16", math.sqrt(2)),
        ("bfloat16", "bfloat16", "bfloat16", 1.0),
        ("bfloat16", "float32", "float32", 1.0),
        ("bfloat16", "bfloat16", "float32", math.sqrt(1 / 2)),
        ("float32", "float32", "float32", 1.0),
        ("float32", "bfloat16", "auto", 1.0),
        ("bfloat16", "float32", "auto", math.sqrt(2)),
    ],
)
def test_sigma_is_scaled_by_the_16_bit_sides(reference: str, scored: str, candidate: str, scale: float) -> None:
    found = measure(*shifted([0.5] * 10, dtypes=(reference, scored)), candidate_dtype=candidate)
    assert found.measured_nats == 0.5
    assert found.sigma_nats == pytest.approx(0.5 * scale)


def test_16_bit_noise_does_not_widen_a_float32_pair() -> None:
    assert measure(*shifted([0.5] * 10), candidate_dtype="float32").sigma_nats == SIGMA_FLOOR_NATS


@pytest.mark.parametrize(("chosen", "scale"), [("float32", math.sqrt(2)), ("bfloat16", 1.0)])
def test_auto_is_what_the_engine_chose(chosen: str, scale: float) -> None:
    reference, scored = shifted([0.5] * 10, dtypes=("bfloat16", "auto"))
    told = recording(scored.completions, dtype="auto", forced_from=reference.digest, context={"engine.dtype": chosen})
    assert measure(reference, told, candidate_dtype="bfloat16").sigma_nats == pytest.approx(0.5 * scale)


def test_tokens_outside_the_others_top_k_are_left_out() -> None:
    """Of four positions one lacks A, one lacks B, one is a filler; only the last is measured."""
    scored = [[(B, -1.0), (C, -2.0), (9, -3.0)], [(A, -1.0), (C, -2.0), (9, -3.0)], [(A, -1.0)], row(2.5)]
    found = measure(*sides([answer([row(2.0)] * 4)], [answer(scored)]), candidate_dtype="bfloat16")
    assert (found.positions, found.measured_nats) == (1, 0.5)


def test_fillers_and_masked_tokens_are_no_shift() -> None:
    masked = [(A, -1.0), (B, -math.inf), (C, -math.inf)]
    rows = [[(A, -1.0)], masked, [(A, float("nan")), (B, -1.0)]]
    found = measure(*sides([answer(rows)], [answer([[(A, -1.0)], masked, row(2.0)])]), candidate_dtype="bfloat16")
    assert (found.positions, found.prompts, found.sigma_nats) == (0, 1, SIGMA_FLOOR_NATS)


@pytest.mark.parametrize("k", [0, 1])
def test_a_margin_needs_two_tokens(k: int) -> None:
    wide, narrow = answer([row(2.0)]), answer([row(2.0)[:k]], k=k)
    for reference, scored in ((wide, narrow), (narrow, wide)):
        with pytest.raises(IncomparableError, match="has too few log-probabilities"):
            measure(*sides([reference], [scored]), candidate_dtype="bfloat16")


def test_without_log_probabilities_nothing_can_be_measured() -> None:
    full, without = answer([row(2.0)]), answer(None, tokens=[A])
    for reference, scored in ((full, without), (without, full)):
        with pytest.raises(IncomparableError, match="has no log-probabilities"):
            measure(*sides([reference], [scored]), candidate_dtype="bfloat16")


def test_a_share_of_the_prompts_suffices() -> None:
    reference = [answer([row(2.0)] * 3, id_=name) for name in ("a", "b", "c")]
    found = measure(*sides(reference, [answer([row(2.25)] * 3, id_="b")]), candidate_dtype="bfloat16")
    assert (found.positions, found.prompts, found.sigma_nats) == (3, 1, 0.25)


def test_scores_of_the_same_tokens_serve_an_engine_that_was_recorded_again() -> None:
    reference, _ = shifted([0.25])
    again = recording([answer([row(2.25)])], dtype="bfloat16", forced_from="f" * 64)
    assert measure(reference, again, candidate_dtype="bfloat16").positions == 1


def test_scores_of_other_tokens_are_refused() -> None:
    reference, scored = sides([answer([row(2.0)])], [answer([row(2.0)], tokens=[B])])
    with pytest.raises(IncomparableError, match="'p-001': the two sides scored different tokens"):
        measure(reference, scored, candidate_dtype="bfloat16")


@pytest.mark.parametrize("candidate", ["bfloat16", "float16", "auto"])
def test_float32_noise_says_nothing_about_a_16_bit_candidate(candidate: str) -> None:
    with pytest.raises(IncomparableError, match=f"between float32 and float32 says nothing about a {candidate} cand"):
        measure(*shifted([0.1], dtypes=("float32", "float32")), candidate_dtype=candidate)


def test_a_candidate_cannot_widen_its_own_tolerance() -> None:
    """Sigma is made of the reference and the noise engine; of the candidate nothing but its dtype is known."""
    assert list(inspect.signature(noise.measure).parameters) == ["reference", "scored", "candidate_dtype"]
