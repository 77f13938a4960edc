"""The lock-step rules: silent on correct engines, sharp on wrong ones, undecided on too little."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lockstep_cases import ROUNDING, World, sides
from parity import noise
from parity.checks import decode, lockstep
from parity.equivalence import Limits
from parity.errors import IncomparableError
from parity.recording import Recording
from parity.stats import log_ratio
from parity.verdict import Finding, Outcome, Policy, Verdict


def judged(recordings: Sequence[Recording], *, limits: Limits | None = None, with_noise: bool = True) -> Verdict:
    reference, candidate, scores = recordings
    measured = noise.measure(reference, scores, candidate_dtype="bfloat16") if with_noise else None
    return lockstep.check(reference, candidate, noise=measured, limits=limits or Limits())


def finding(verdict: Verdict, metric: str) -> Finding:
    return next(f for f in verdict.findings if f.metric == metric)


def test_a_correct_engine_passes_and_the_ratio_is_about_one() -> None:
    verdict = judged(sides(World(prompts=48)))
    assert verdict.outcome is Outcome.PASS
    ratio = finding(verdict, "KL divergence").delta
    assert ratio is not None
    assert 0.85 < ratio < 1.15
    assert verdict.warnings == ()


def test_an_engine_against_itself_agrees_to_the_bit() -> None:
    world = World()
    reference, _, scores = sides(world)
    exact = world.model()
    again = world.recording(exact, world.tokens_of(exact), dtype="bfloat16", forced_from=reference.digest)
    verdict = judged((reference, again, scores))
    assert verdict.outcome is Outcome.PASS
    assert "agree to the bit on 512 tokens of 32 prompts" in finding(verdict, "KL divergence").sentence


def test_a_float32_candidate_is_held_against_what_float32_can_say() -> None:
    world = World(prompts=24)
    reference, _, scores = sides(world)
    tokens = world.tokens_of(world.model())
    for size, outcome in ((1e-6, Outcome.PASS), (0.02, Outcome.FAIL)):
        candidate = world.recording(world.rounded(3, size=size), tokens, dtype="float32", forced_from=reference.digest)
        measured = noise.measure(reference, scores, candidate_dtype="float32")
        found = lockstep.check(reference, candidate, noise=measured, limits=Limits())
        assert finding(found, "KL divergence").outcome is outcome


def test_twice_the_noise_fails_by_its_divergence() -> None:
    verdict = judged(sides(World(prompts=48), size=2 * ROUNDING))
    assert verdict.outcome is Outcome.FAIL
    assert finding(verdict, "KL divergence").outcome is Outcome.FAIL
    assert "decided by KL divergence" in verdict.headline


def test_a_fault_of_the_size_of_the_noise_fails() -> None:
    assert judged(sides(World(prompts=48), fault=ROUNDING)).outcome is Outcome.FAIL


def test_too_few_prompts_are_inconclusive_and_say_so() -> None:
    verdict = judged(sides(World(prompts=6)))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "6 prompts, at least 16 are needed" in finding(verdict, "KL divergence").sentence


def test_a_gross_fault_fails_even_on_too_few_prompts() -> None:
    assert judged(sides(World(prompts=6), fault=2.0)).outcome is Outcome.FAIL


def test_one_prompt_that_holds_the_divergence_is_not_a_pass() -> None:
    """Half of a whole set's divergence in one prompt: the mean is fine, and a person should look."""
    world = World(prompts=48, tokens=8)
    reference, _, scores = sides(world)
    logits = world.rounded(11, size=0.5 * ROUNDING)
    logits[3] = world.rounded(12, size=7 * ROUNDING)[3]
    candidate = world.recording(logits, world.tokens_of(world.model()), dtype="bfloat16", forced_from=reference.digest)
    found = finding(judged((reference, candidate, scores)), "KL divergence")
    assert found.outcome is not Outcome.PASS
    assert "p-003" in found.evidence[0]


def test_a_token_that_is_not_a_number_fails_alone() -> None:
    reference, candidate, scores = sides(World())
    first = candidate.completions[0]
    assert first.logprobs is not None
    broken = np.frombuffer(first.logprobs.top, np.float32).copy()
    broken[5] = np.nan
    spoilt = replace(first, logprobs=replace(first.logprobs, top=memoryview(array("f", broken))))
    candidate = replace(candidate, completions=(spoilt, *candidate.completions[1:]))
    verdict = judged((reference, candidate, scores))
    assert finding(verdict, "numbers").outcome is Outcome.FAIL
    assert verdict.outcome is Outcome.FAIL


def test_without_measured_noise_a_documented_floor_is_used_and_said() -> None:
    verdict = judged(sides(World(), size=0.02), with_noise=False)
    assert "no noise was measured" in verdict.warnings[0]
    assert "documented floor" in finding(verdict, "KL divergence").limit


def test_a_noise_engine_that_shares_its_kernels_is_warned_of() -> None:
    world = World()
    reference, candidate, _ = sides(world)
    exact = world.model()
    same = world.recording(exact, world.tokens_of(exact), dtype="bfloat16", forced_from=reference.digest)
    assert "reads zero" in judged((reference, candidate, same)).warnings[0]


def test_a_budget_judges_a_quantized_candidate_absolutely() -> None:
    spoilt = sides(World(prompts=48), fault=2 * ROUNDING)
    assert judged(spoilt).outcome is Outcome.FAIL
    mean = finding(judged(spoilt), "KL divergence").candidate
    assert mean is not None
    roomy, tight = (replace(Limits.of(Policy.QUANTIZED), budget_nats=factor * mean) for factor in (1.5, 0.6))
    assert judged(spoilt, limits=roomy).outcome is Outcome.PASS
    assert judged(spoilt, limits=tight).outcome is Outcome.FAIL


def test_a_fault_of_long_contexts_is_not_averaged_away() -> None:
    """Wrong from the 57th token of 60 on: a few per cent of the positions, in the range that begins at 64."""
    world = World(prompts=48, tokens=60, context=8)
    reference, _, scores = sides(world)
    clean, wrong = world.rounded(11), world.rounded(11, fault=1.2 * ROUNDING)
    for ours, theirs in zip(clean, wrong, strict=True):
        ours[56:] = theirs[56:]
    candidate = world.recording(clean, world.tokens_of(world.model()), dtype="bfloat16", forced_from=reference.digest)
    verdict = judged((reference, candidate, scores))
    assert finding(verdict, "KL divergence").outcome is not Outcome.FAIL
    assert finding(verdict, "drift with context").outcome is Outcome.FAIL
    assert "from 64 tokens on" in finding(verdict, "drift with context").sentence


# A bfloat16 reference and a float32 arbiter -------------------------------------------------------------------------


def test_two_16_bit_engines_are_held_against_the_noise_of_both() -> None:
    verdict = judged(sides(World(prompts=48), reference_dtype="bfloat16"))
    assert verdict.outcome is Outcome.INCONCLUSIVE or verdict.outcome is Outcome.PASS
    ratio = finding(verdict, "KL divergence").delta
    assert ratio is not None
    assert 0.85 < ratio < 1.15


@pytest.mark.parametrize(("fault", "who"), [(0.0, "neither is farther off"), (0.2, "the candidate is the one")])
def test_the_arbiter_says_which_side_moved(fault: float, who: str) -> None:
    verdict = judged(sides(World(prompts=48), fault=fault, reference_dtype="bfloat16"))
    assert who in finding(verdict, "who moved").sentence


def test_a_rebuild_is_held_against_the_builds_own_distance_from_float32() -> None:
    limits = Limits.of(Policy.IDENTITY)
    good = judged(sides(World(prompts=64), size=0.9 * ROUNDING, reference_dtype="bfloat16"), limits=limits)
    bad = judged(sides(World(prompts=64), fault=1.2 * ROUNDING, reference_dtype="bfloat16"), limits=limits)
    assert finding(good, "distance from float32").outcome is Outcome.PASS
    assert finding(bad, "distance from float32").outcome is Outcome.FAIL


def test_an_arbiter_that_runs_another_model_is_no_verdict() -> None:
    world = World(prompts=32)
    reference, candidate, _ = sides(world, reference_dtype="bfloat16")
    other = world.rounded(5, size=0.0, fault=3.0)
    tokens = world.tokens_of(world.rounded(10))
    wrong = world.recording(other, tokens, dtype="float32", forced_from=reference.digest)
    with pytest.raises(IncomparableError, match="does not run the same model"):
        judged((reference, candidate, wrong))


def test_decoding_is_held_against_the_reference_in_the_same_way() -> None:
    world = World(prompts=32)
    reference, _, scores = sides(world)
    rounded = world.rounded(11)
    tokens = world.tokens_of(rounded)
    answers = world.recording(rounded, tokens, dtype="bfloat16", engine="candidate")
    scored = world.recording(world.model(), tokens, dtype="float32", forced_from=answers.digest)
    measured = noise.measure(reference, scores, candidate_dtype="bfloat16")
    assert decode.check(scored, answers, noise=measured, limits=Limits()).outcome is Outcome.PASS
    spoilt = world.recording(world.rounded(11, fault=2 * ROUNDING), tokens, dtype="bfloat16", engine="candidate")
    scored = world.recording(world.model(), tokens, dtype="float32", forced_from=spoilt.digest)
    assert decode.check(scored, spoilt, noise=measured, limits=Limits()).outcome is Outcome.FAIL


def test_more_changed_choices_than_gaps_and_shifts_explain_fail() -> None:
    world = World(prompts=48, tokens=40)
    name = "number of changed choices"
    assert finding(judged(sides(world)), name).outcome is Outcome.PASS
    assert finding(judged(sides(world, size=4 * ROUNDING)), name).outcome is Outcome.FAIL


def test_a_noise_engine_that_changes_more_choices_than_predicted_raises_what_is_expected() -> None:
    """Ties fall the other way in every correct engine of this precision; two tokens' gaps do not predict that."""
    world = World(prompts=48, tokens=40)
    reference, candidate, scores = sides(world)
    logits = world.rounded(10)
    for each, exact in zip(logits, world.model(), strict=True):
        near = np.sort(exact, axis=1)[:, -1] - np.sort(exact, axis=1)[:, -2] < 0.15
        rows = np.flatnonzero(near)
        first, second = np.argsort(-exact[rows], axis=1)[:, :2].T
        each[rows, first], each[rows, second] = exact[rows, second], exact[rows, first]
    flipping = world.recording(logits, world.tokens_of(world.model()), dtype="bfloat16", forced_from=reference.digest)
    plain, raised = (
        finding(judged((reference, candidate, n)), "number of changed choices") for n in (scores, flipping)
    )
    expected = [float(f.sentence.split(" changed choices, ")[1].split(" expected")[0]) for f in (plain, raised)]
    assert expected[1] > 1.3 * expected[0]


# Error rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [16, 32, 64])
def test_the_intervals_cover_what_they_say_at_the_prompt_counts_used(prompts: int) -> None:
    """Skewed per-prompt sums (log-normal, 0.8), a shared prompt effect, true ratio 1; 4,000 draws.

    Nominal 0.002 for FAIL stays below 0.008, nominal 0.01 for PASS below 0.06: the skew that stats measured too.
    """
    draw = np.random.default_rng(prompts)
    above = below = 0
    runs = 4000
    for _ in range(runs):
        shared = draw.lognormal(0.0, 0.5, prompts)
        ratio = log_ratio(
            (shared * draw.lognormal(0.0, 0.8, prompts)).tolist(), (shared * draw.lognormal(0.0, 0.8, prompts)).tolist()
        )
        assert ratio is not None
        above += ratio.lower(0.002) > 1.0
        below += ratio.upper(0.01) < 1.0
    assert above / runs < 0.008
    assert below / runs < 0.06


def test_a_ratio_that_cannot_be_formed_is_none() -> None:
    assert log_ratio([1.0], [1.0]) is None
    assert log_ratio([1.0, 0.0], [1.0, 1.0]) is None  # without the first prompt nothing is left
    assert log_ratio([0.0, 0.0], [1.0, 1.0]) is None
    assert log_ratio([], []) is None
