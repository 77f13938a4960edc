"""Two stages: what screening flags is decided on fresh prompts, and a run of correct engines stays silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from lockstep_cases import ROUNDING, Logits, World, logprobs_of, sides
from parity import judge, stages
from parity.equivalence import Limits
from parity.judge import Evidence
from parity.recording import Recording
from parity.verdict import Outcome, Policy

MARGIN = Limits().kl_ratio_one_side
STAGED = ("shape", "greedy", "lockstep", "decode")
GOLDEN_CHECKS = ("shape", "greedy", "lockstep")
"""Of those that a golden is asked, the ones that rest on chance."""


def evidence(world: World, *, size: float = ROUNDING, confirmation: Evidence | None = None) -> Evidence:
    """A whole run of simulated engines: answers, scores both ways, noise."""
    reference, scores, noise = sides(world, size=size)
    own = world.rounded(11, size=size)
    answers = world.recording(own, world.tokens_of(own), dtype="bfloat16", engine="candidate")
    theirs = world.recording(world.model(), world.tokens_of(own), dtype="float32", forced_from=answers.digest)
    recordings = {
        "reference": reference,
        "candidate": answers,
        "noise": noise,
        "candidate-scores": scores,
        "reference-scores": theirs,
    }
    return Evidence(
        recordings=recordings, policy=Policy.EQUIVALENCE, limits={}, directories={}, confirmation=confirmation
    )


def against_a_golden(world: World, *, candidates: int = 1, size: float = ROUNDING) -> Iterator[Evidence]:
    """Candidates held against what an engine of the same precision answered, on the same hardware."""
    accepted, _, noise = sides(world, reference_dtype="bfloat16")
    forced = replace(accepted.workload, forced_from=accepted.digest, digest="forced")
    tokens = [np.array(c.token_ids) for c in accepted.completions]
    for number in range(candidates):
        own = world.rounded(11 + number, size=size)
        answers = answered(accepted, own, world.tokens_of(own))
        scores = replace(answered(accepted, own, tokens), workload=forced)
        yield Evidence(
            recordings={"reference": accepted, "candidate": answers, "noise": noise, "candidate-scores": scores},
            policy=Policy.IDENTITY,
            limits={},
            directories={},
            accepted=True,
        )


def answered(made: Recording, logits: Sequence[Logits], tokens: Sequence[NDArray[np.int64]]) -> Recording:
    """The recording with other answers; much faster than to make one from nothing."""
    completions = [
        replace(c, token_ids=tuple(t.tolist()), text=" ".join(f"t{i}" for i in t), logprobs=logprobs_of(each, t))
        for c, each, t in zip(made.completions, logits, tokens, strict=True)
    ]
    return replace(made, completions=tuple(completions))


@cache
def flagged_by_chance() -> Evidence:
    """A run whose candidate is correct by a wide margin and whose lock step is flagged all the same."""
    for seed in range(400):
        # Close to the margin, so that screening flags now and then.
        found = evidence(World(prompts=24, tokens=8, seed=seed), size=ROUNDING * (MARGIN**0.5))
        if "lockstep" in judge.flagged(found):
            return found
    raise AssertionError("screening never flags, so the second stage would never be seen")


def fresh(*, size: float) -> Evidence:
    return evidence(World(prompts=48, tokens=12, seed=9001), size=size)


def test_a_flag_that_fresh_prompts_do_not_confirm_is_no_fail_and_stays_visible() -> None:
    verdict = judge.judge(replace(flagged_by_chance(), confirmation=fresh(size=0.8 * ROUNDING)), "lockstep")
    assert verdict.outcome is Outcome.PASS
    assert "a flag on the others was not confirmed" in verdict.headline
    assert any("screened: KL divergence" in w for w in verdict.warnings)


def test_a_flag_that_fresh_prompts_confirm_is_a_fail() -> None:
    verdict = judge.judge(replace(flagged_by_chance(), confirmation=fresh(size=1.6 * ROUNDING)), "lockstep")
    assert verdict.outcome is Outcome.FAIL
    assert "fresh prompts; flagged before on the others" in verdict.headline


def test_a_flag_that_too_few_fresh_prompts_can_decide_is_inconclusive() -> None:
    few = evidence(World(prompts=4, tokens=8, seed=9001), size=0.8 * ROUNDING)
    assert judge.judge(replace(flagged_by_chance(), confirmation=few), "lockstep").outcome is Outcome.INCONCLUSIVE


def test_without_fresh_prompts_a_flag_is_judged_once_at_the_stricter_rate_and_says_so() -> None:
    verdict = judge.judge(flagged_by_chance(), "lockstep")
    assert verdict.outcome is not Outcome.FAIL
    assert any("no fresh prompts to confirm it on" in w for w in verdict.warnings)
    assert any("one stage at 0.002" in b for b in verdict.basis)


def test_a_gross_fault_needs_no_second_look() -> None:
    gross = evidence(World(prompts=48), size=3 * ROUNDING)
    assert judge.flagged(gross) == ()
    assert judge.judge(gross, "lockstep").outcome is Outcome.FAIL


def test_rates_that_the_user_has_set_are_left_alone_and_judged_in_one_stage() -> None:
    own = {"lockstep": {"alpha_fail": 0.3, "source": "a test"}}
    found = replace(flagged_by_chance(), limits=own)
    assert "lockstep" not in judge.flagged(found)
    assert judge.judge(found, "lockstep").outcome is Outcome.FAIL


def test_a_verdict_says_what_it_was_judged_by() -> None:
    verdict = judge.judge(evidence(World(prompts=48)), "lockstep")
    assert verdict.basis[0].startswith("sigma ")
    assert "positions of 48 prompts" in verdict.basis[0]
    assert "at most 1 %" in verdict.basis[1]


def test_the_budget_of_a_run_is_one_per_cent() -> None:
    assert stages.RULES * (stages.SCREEN * stages.CONFIRM + stages.DECISIVE) <= 0.005


@pytest.mark.parametrize("alpha", [0.02, 0.002, 5e-6])
def test_limits_at_a_rate_move_every_rule_of_chance(alpha: float) -> None:
    moved = Limits().at(alpha)
    assert moved.alpha_fail == alpha
    assert NormalDist().cdf(moved.excess_flips_z) == pytest.approx(1 - alpha, abs=1e-9)
    assert moved.kl_ratio_one_side == Limits().kl_ratio_one_side


def test_at_most_one_correct_run_in_a_hundred_raises_any_alarm() -> None:
    """1,000 runs of correct engines, all staged checks; in two stages, and in one where nothing fresh was recorded."""
    one_stage = two_stages = 0
    for seed in range(1000):
        found = evidence(World(prompts=16, tokens=8, seed=seed))
        verdicts = [judge.judge(found, check) for check in STAGED]
        one_stage += any(v.outcome is Outcome.FAIL for v in verdicts)
        if any("no fresh prompts" in w for v in verdicts for w in v.warnings):
            again = evidence(World(prompts=16, tokens=8, seed=100_000 + seed))
            verdicts = [judge.judge(replace(found, confirmation=again), check) for check in STAGED]
        two_stages += any(v.outcome is Outcome.FAIL for v in verdicts)
    assert two_stages <= one_stage <= 10


def test_at_most_one_correct_candidate_in_a_hundred_raises_any_alarm_against_its_golden() -> None:
    """1,000 candidates of the build that was accepted, four for each golden, all rules of chance in one stage."""
    alarms = 0
    for seed in range(250):
        for found in against_a_golden(World(prompts=16, tokens=8, seed=seed), candidates=4):
            alarms += any(judge.judge(found, check).outcome is Outcome.FAIL for check in GOLDEN_CHECKS)
    assert alarms <= 10


def test_a_candidate_that_is_farther_from_float32_than_its_golden_is_an_alarm() -> None:
    """So that the silence above is none of rules that never speak."""
    (found,) = against_a_golden(World(prompts=48), size=2 * ROUNDING)
    assert judge.judge(found, "lockstep").outcome is Outcome.FAIL
