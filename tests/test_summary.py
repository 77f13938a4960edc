"""What a report shows, computed from recordings: effects, positions, prompts, facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedy_cases import BENIGN, MISMATCH, SUSPICIOUS, many, recordings_of
from lockstep_cases import World, sides
from parity import lockstep, noise
from parity.checks import lockstep as lockstep_check
from parity.decision import Advice, Decision
from parity.errors import IncomparableError
from parity.fingerprint import Scalar
from parity.noise import Noise
from parity.recording import Recording
from parity.summary import Summary, summarise
from parity.verdict import Finding, Outcome, Verdict
from recordings import completion, recording

DECISION = Decision(advice=Advice.UPGRADE, sentence="all is well", evidence=())
FINDING = Finding(
    metric="KL divergence",
    outcome=Outcome.PASS,
    sentence="a sentence",
    unit="nats a token",
    reference=None,
    candidate=0.5,
    delta=None,
    interval=None,
    limit="the limit",
    n=1,
    evidence=(),
    margin=2.0,
)


def verdict(*findings: Finding) -> Verdict:
    return Verdict(
        check="lockstep",
        reference="one",
        candidate="two",
        outcome=Outcome.PASS,
        headline="all is well",
        findings=findings,
        causes=(),
        changed=(),
        warnings=(),
    )


def summary_of(
    reference: Recording,
    candidate: Recording,
    *,
    verdicts: tuple[Verdict, ...] = (),
    scores: Recording | None = None,
    measured: Noise | None = None,
) -> Summary:
    return summarise(
        title="one against two",
        created_at="2026-11-24T12:00:00+00:00",
        decision=DECISION,
        verdicts=verdicts,
        diagnosis=None,
        reference=reference,
        candidate=candidate,
        scores=scores,
        noise=measured,
        recovery=None,
        reproduce=("parity compare a b",),
        token_text=lambda token_id: None if token_id == 0 else f" t{token_id}",
    )


def effects_of(*findings: Finding) -> list[tuple[float, float | None, float | None, bool]]:
    found = summary_of(*recordings_of(many([], identical=1)), verdicts=(verdict(*findings),)).effects
    assert all((e.check, e.metric) == ("lockstep", "KL divergence") for e in found)
    return [(e.value, e.low, e.high, e.passed) for e in found]


# Effects ------------------------------------------------------------------------------------------------------------


def test_an_effect_is_in_units_of_its_limit() -> None:
    with_delta = replace(FINDING, delta=3.0, interval=(1.0, 8.0), outcome=Outcome.INCONCLUSIVE)
    assert effects_of(FINDING, with_delta) == [(0.25, None, None, True), (1.5, 0.5, 4.0, False)]


def test_an_interval_of_something_else_is_left_out() -> None:
    assert effects_of(replace(FINDING, interval=(1.0, 8.0))) == [(0.25, None, None, True)]


@pytest.mark.parametrize("margin", [None, 0.0, -1.0, math.inf, math.nan])
def test_a_finding_whose_rule_is_no_positive_number_has_no_effect(margin: float | None) -> None:
    assert effects_of(replace(FINDING, margin=margin)) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_finding_without_a_finite_value_has_no_effect(value: float | None) -> None:
    assert effects_of(replace(FINDING, candidate=value)) == []


# Positions ----------------------------------------------------------------------------------------------------------


def test_without_scores_there_are_no_positions() -> None:
    assert summary_of(*recordings_of(many([BENIGN], identical=1))).kl_by_position == ()


def test_scores_of_other_tokens_leave_positions_out_and_nothing_else() -> None:
    reference, candidate, _ = sides(World(prompts=2, tokens=4))
    other = World(prompts=2, tokens=4, seed=8)
    wrong = other.recording(other.model(), other.tokens_of(other.model()), dtype="bfloat16", forced_from="x" * 64)
    found = summary_of(reference, own_answers(candidate), scores=wrong)
    assert found.kl_by_position == ()
    assert [p.kl_nats for p in found.prompts] == [None, None]


def own_answers(scores: Recording) -> Recording:
    """The same answers as if the engine had decoded them itself."""
    return recording(scores.completions, engine="candidate", dtype="bfloat16")


@pytest.mark.parametrize(
    ("tokens", "edges"),
    [
        (1, [(0, 8)]),
        (8, [(0, 8)]),
        (9, [(0, 8), (8, 16)]),
        (40, [(0, 8), (8, 16), (16, 32), (32, 64)]),
    ],
)
def test_positions_are_binned_from_eight_in_doubles(tokens: int, edges: list[tuple[int, int]]) -> None:
    reference, candidate, _ = sides(World(prompts=2, tokens=tokens))
    found = summary_of(reference, own_answers(candidate), scores=candidate).kl_by_position
    assert [(b.start, b.stop) for b in found] == edges


def test_the_mean_its_error_and_the_floor_are_what_numpy_makes_of_them() -> None:
    reference, scores, noisy = sides(World(prompts=6, tokens=12), reference_dtype="bfloat16")
    measured = noise.measure(reference, noisy, candidate_dtype="bfloat16")
    assert measured.sides == 2.0
    assert measured.steps is not None
    found = summary_of(reference, own_answers(scores), scores=scores, measured=measured).kl_by_position
    kl = lockstep.measure(reference, scores).kl_nats.reshape(6, 12)
    floor = measured.steps.kl_nats.reshape(6, 12)
    for part, (start, stop) in zip(found, [(0, 8), (8, 12)], strict=True):
        inside = kl[:, start:stop]
        assert part.prompts == 6
        assert part.mean_nats == pytest.approx(inside.mean())
        # Of equally long parts a ratio of sums is a mean of means.
        assert part.error_nats == pytest.approx(inside.mean(axis=1).std(ddof=1) / math.sqrt(6))
        assert part.floor_nats == pytest.approx(2.0 * floor[:, start:stop].mean())


def test_one_prompt_has_no_error() -> None:
    reference, scores, _ = sides(World(prompts=1, tokens=4))
    (part,) = summary_of(reference, own_answers(scores), scores=scores).kl_by_position
    assert (part.prompts, part.error_nats, part.floor_nats) == (1, None, None)


def test_the_floor_is_that_of_the_scored_prompts_only() -> None:
    reference, scores, noisy = sides(World(prompts=6, tokens=4))
    measured = noise.measure(reference, noisy, candidate_dtype="bfloat16")
    some = replace(scores, completions=scores.completions[:2])
    (part,) = summary_of(reference, own_answers(scores), scores=some, measured=measured).kl_by_position
    assert measured.steps is not None
    assert part.prompts == 2
    assert part.floor_nats == pytest.approx(measured.sides * measured.steps.kl_nats[:8].mean())
    assert part.floor_nats != pytest.approx(measured.sides * measured.steps.kl_nats.mean())


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), prompts=st.integers(1, 5), tokens=st.integers(1, 40))
def test_every_scored_token_is_in_one_bin(seed: int, prompts: int, tokens: int) -> None:
    reference, scores, _ = sides(World(prompts=prompts, tokens=tokens, seed=seed))
    found = summary_of(reference, own_answers(scores), scores=scores).kl_by_position
    total = sum(b.mean_nats * prompts * (min(b.stop, tokens) - b.start) for b in found)
    assert total == pytest.approx(float(np.sum(lockstep.measure(reference, scores).kl_nats)))


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_that_differ_come_first_by_slack_and_say_where() -> None:
    reference, candidate = recordings_of(many([BENIGN, None, MISMATCH, SUSPICIOUS], identical=1))
    found = summary_of(reference, candidate)
    assert [p.id for p in found.prompts] == ["p-003", "p-004", "p-001", "p-002", "p-005"]
    assert found.first_divergences == (1, 1, 1)


def test_the_noise_decides_what_a_difference_means() -> None:
    reference, candidate = recordings_of(many([BENIGN]))
    noisy = partial(Noise, measured_nats=0.1, positions=1, prompts=1, source="here")
    (small,) = summary_of(reference, candidate, measured=noisy(sigma_nats=0.01)).prompts
    (large,) = summary_of(reference, candidate, measured=noisy(sigma_nats=1.0)).prompts
    assert small.sigmas == pytest.approx(50.0)
    assert large.sigmas == pytest.approx(0.5)


def test_other_prompts_cannot_be_summarised() -> None:
    one, two = recording([completion("a")]), recording([completion("b")])
    with pytest.raises(IncomparableError):
        summary_of(one, two)


def test_token_ids_of_witnesses_are_named_where_their_text_is_known() -> None:
    reference, scores, _ = sides(World(prompts=4, tokens=4), fault=0.3)
    judged = lockstep_check.check(reference, scores, noise=None, limits=lockstep_check.Limits())
    shown = summary_of(reference, own_answers(scores), scores=scores, verdicts=(judged,)).verdicts[0]
    before = [e for f in judged.findings for e in f.evidence]
    after = [e for f in shown.findings for e in f.evidence]
    assert any("(token id:log-probability)" in e for e in before)
    assert all("token id" not in e for e in after)
    assert any("' t" in e for e in after)
    assert replace(shown, findings=()) == replace(judged, findings=())


def test_a_witness_keeps_the_ids_of_unknown_tokens() -> None:
    witness = "p, token 1: KL 1 nats, reference 0:-1.000, candidate 0:-1.000 (token id:log-probability)"
    other = "p: 7:-1 is no token"
    found = summary_of(
        *recordings_of(many([], identical=1)), verdicts=(verdict(replace(FINDING, evidence=(witness, other))),)
    )
    assert found.verdicts[0].findings[0].evidence == (witness, other)


# Facts --------------------------------------------------------------------------------------------------------------


def test_facts_that_differ_leave_out_what_is_new_at_every_start() -> None:
    one, two = recordings_of(many([], identical=1))
    changes = {"env.VLLM_DIST_IDENT": "b", "env.VLLM_X_SHM_BUFFER_NAME": "b", "engine.attention": "sdpa"}
    fingerprint = replace(two.fingerprint, context={**two.fingerprint.context, **changes}, packages={"vllm": "2"})
    healthy = replace(fingerprint, health={"load_average_1min": 3.0})
    found = summary_of(one, replace(two, fingerprint=healthy))
    assert [(d.name, d.reference, d.candidate) for d in found.packages] == [("vllm", None, "2")]
    assert [d.name for d in found.facts] == ["engine.attention", "engine.version"]


def test_a_side_says_what_is_known_of_it_and_nothing_else() -> None:
    _, candidate = recordings_of(many([], identical=2))
    found = summary_of(candidate, candidate).candidate
    assert found.label == candidate.label
    assert dict(found.facts) == {
        "engine": "vllm",
        "version": "0.32.0",
        "model": "tiny",
        "weights (sha256)": "1" * 12,
        "number format": "float32",
        "asked": "2 prompts, at most 3 tokens each, greedy",
    }


def test_a_graphics_card_is_the_hardware_where_there_is_one() -> None:
    cards: Mapping[str, Scalar] = {
        "gpu.0.name": "NVIDIA H100",
        "gpu.0.driver_version": "570.1",
        "host.cpu": "EPYC",
        "host.cores": 2,
    }
    one = recording([completion()], context=cards)
    assert summary_of(one, one).reference.facts["hardware"] == "NVIDIA H100"
    two = recording([completion()], context={"host.cpu": "EPYC", "host.cores": 2})
    assert summary_of(two, two).reference.facts["hardware"] == "EPYC, 2 cores"
