"""The greedy check: planted faults fail for the right reason, correct pairs pass, error rates are as promised."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greedy_cases import (
    BENIGN,
    MAX_TOKENS,
    MISMATCH,
    NOISE,
    OTHER,
    SAMPLING,
    SIGMA,
    SUSPICIOUS,
    TOKENS,
    Answers,
    answers,
    judged,
    many,
    recordings_of,
    short_by_one,
)
from parity.checks import greedy, load
from parity.checks.greedy import Limits
from parity.errors import IncomparableError
from parity.fingerprint import Scalar
from parity.recording import Completion, FinishReason, Terminator
from parity.stats import critical_count, detectable_share
from parity.verdict import Finding, Outcome, Verdict
from recordings import EOS, completion, plausible_row, recording, token_logprobs

SUSPICIOUS_COUNT, MISMATCHES, OWN_ARGMAX, LENGTHS, DATA = range(5)
NAN = float("nan")


def failed(verdict: Verdict) -> list[str]:
    return [f.metric for f in verdict.findings if f.outcome is Outcome.FAIL]


def only_failure(verdict: Verdict) -> Finding:
    (finding,) = [f for f in verdict.findings if f.outcome is not Outcome.PASS]
    assert verdict.outcome is finding.outcome
    return finding


# Correct pairs ------------------------------------------------------------------------------------------------------


def test_a_recording_passes_against_itself() -> None:
    side, _ = recordings_of(many([BENIGN, None], identical=38))
    for noise in (NOISE, None):
        verdict = greedy.check(side, side, noise=noise, limits=Limits())
        assert verdict.passed
        assert verdict.headline == "40 of 40 prompts identical"
        assert not any((verdict.causes, verdict.changed))
        assert verdict.findings[SUSPICIOUS_COUNT].sentence.startswith("none of 40 prompts diverges; 0 suspicious ")
        assert [f.metric for f in verdict.findings] == [
            "suspicious divergences",
            "mismatches",
            "greedy decoding",
            "length and finish reason",
            "data",
        ]


def test_tie_flips_and_benign_flips_pass_on_every_prompt() -> None:
    verdict = judged(many([0.0] * 20 + [BENIGN] * 19 + [6 * SIGMA]))
    assert verdict.passed
    assert verdict.headline == "0 of 40 prompts identical, 20 ties, 20 benign, largest S 1.500 nats (6.0 sigma)"


def test_the_sentence_has_the_numbers_and_the_witness_both_texts() -> None:
    """32 prompts: 2 suspicious allowed; 3 of 32 show with 90 % probability at a share of 16 %."""
    verdict = judged([answers("w", 1.25, at=2, share=0.2), *many([], identical=31)])
    finding = verdict.findings[SUSPICIOUS_COUNT]
    assert finding.sentence == (
        "1 of 32 prompts diverges, at token 2; slack S (shift of the margin between the two tokens) largest "
        "1.250 nats; 0 suspicious (S over 6 sigma = 1.5 nats), 2 allowed; a fault that makes 16 % of prompts "
        "suspicious is caught with 90 % probability"
    )
    assert finding.evidence == (
        "w, token 2: S 1.250 nats (5.0 sigma) = 0.250 in the reference + 1.000 in the candidate; after 't30 t31 t' "
        "reference '32', candidate '90'",
    )
    assert verdict.findings[DATA].sentence == (
        "enough to judge: 32 prompts; sigma (the rounding noise in S) 0.25 nats, measured on 5000 positions of "
        "40 prompts (replay 1 against replay 2)"
    )


def test_a_divergence_that_the_texts_do_not_show_is_told() -> None:
    ours, theirs = answers("w", BENIGN)
    verdict = judged([(ours, replace(theirs, text=ours.text)), *many([], identical=31)])
    assert verdict.findings[SUSPICIOUS_COUNT].evidence[0].endswith("; the texts are the same, the tokens are not")


def test_stopping_elsewhere_by_a_small_slack_is_a_flip_like_any_other() -> None:
    """The candidate stops where the reference goes on; both see the two tokens 0.25 nats apart."""
    end = Terminator(token_id=EOS, logprobs=token_logprobs([EOS], [[(EOS, -0.5), (31, -0.75)]]))
    rows = [plausible_row(30), [(31, -0.5), (EOS, -0.75)], plausible_row(32)]
    pair = completion("e", rows=rows, terminator=None), completion("e", token_ids=TOKENS[:1], terminator=end)
    verdict = judged([pair, *many([], identical=31)])
    assert verdict.passed
    assert verdict.findings[SUSPICIOUS_COUNT].evidence[0].endswith("after 't30' reference ' t31 t32', candidate ends")
    assert verdict.findings[LENGTHS].sentence == (
        "every answer ends where it should; by itself, not by length: 0 in the reference, 1 in the candidate; "
        "tokens in all: 96 and 94"
    )


def test_the_end_of_the_context_window_on_both_sides_is_no_fault() -> None:
    cut = completion("long", token_ids=TOKENS[:2], terminator=None)
    verdict = judged([(cut, cut), *many([], identical=31)])
    assert verdict.passed
    assert verdict.findings[LENGTHS].sentence.endswith("; 1 by length before max_tokens 3, on both sides alike")


# Planted faults -----------------------------------------------------------------------------------------------------


def test_one_mismatch_fails() -> None:
    verdict = judged(many([MISMATCH, BENIGN], identical=38))
    finding = only_failure(verdict)
    assert finding.metric == "mismatches"
    assert finding.sentence == (
        "1 of 40 prompts diverges by more than rounding can (S over 25 sigma = 6.25 nats, or a token outside the "
        "other's top k)"
    )
    assert finding.evidence[0].startswith("p-001, token 1: S 6.500 nats (26.0 sigma) = 3.250 in the reference + 3.250 ")
    assert verdict.headline == (
        "38 of 40 prompts identical, 1 benign, 1 mismatch, largest S 6.500 nats (26.0 sigma); decided by mismatches"
    )
    assert verdict.findings[SUSPICIOUS_COUNT].evidence[0].startswith("p-002, "), "mismatches are told once"


def test_a_token_outside_the_top_k_fails_whatever_its_slack() -> None:
    rows = [plausible_row(30), [(31, -0.5), (98, -0.5), (99, -0.625)], plausible_row(32)]
    ours = completion("o", rows=rows, terminator=None)
    finding = only_failure(judged([(ours, answers("o", 0.0)[1]), *many([], identical=31)]))
    assert finding.metric == "mismatches"
    assert "S at least 0.125 nats (0.5 sigma) = 0.125 in the reference + 0.000 in the cand" in finding.evidence[0]
    assert "a token is outside the other's top k; after" in finding.evidence[0]


@pytest.mark.parametrize(("prompts", "allowed"), [(32, 2), (97, 2), (98, 3), (128, 3)])
def test_suspicious_prompts_are_counted_against_the_critical_count(prompts: int, allowed: int) -> None:
    """Source of the counts: P(Poisson(0.0025 N) >= c) <= 0.002, tested against scipy in test_stats."""
    assert judged(many([SUSPICIOUS] * allowed, identical=prompts - allowed)).passed
    verdict = judged(many([SUSPICIOUS] * (allowed + 1), identical=prompts - allowed - 1))
    finding = only_failure(verdict)
    assert finding.metric == "suspicious divergences"
    assert finding.candidate == allowed + 1
    assert finding.limit == f"at most {allowed} of {prompts}: correct pairs show more with probability <= 0.002"
    assert len(finding.evidence) == 3
    assert verdict.headline.startswith(
        f"{prompts - allowed - 1} of {prompts} prompts identical, {allowed + 1} suspicious"
    )


def test_a_candidate_that_samples_fails_and_is_told_so() -> None:
    """Its own log-probabilities say that another token was more probable by 2 nats, 8 sigma."""
    ours, theirs = answers("s", 0.0)
    rows = [plausible_row(30), [(31, -0.5), (OTHER, -2.5)], plausible_row(32)]
    sampled = replace(theirs, logprobs=token_logprobs(theirs.token_ids, rows))
    verdict = judged([(ours, sampled), *many([], identical=39)])
    assert verdict.causes == (
        "the candidate samples where greedy decoding was asked: 1 of its 120 tokens is not its own most probable "
        "(temperature, or an engine default that overrides it)",
    )
    assert failed(verdict) == ["greedy decoding"]
    assert verdict.findings[OWN_ARGMAX].evidence == ("s, token 1: chosen 2.00 nats below its own most probable",)


def test_a_forced_stop_fails_and_is_told_so() -> None:
    """The candidate's own distribution is against stopping by 8 nats: S alone would cancel to nothing."""
    end = Terminator(token_id=EOS, logprobs=token_logprobs([EOS], [[(31, -0.5), (EOS, -8.5)]]))
    rows = [plausible_row(30), [(31, -0.5), (EOS, -8.5)], plausible_row(32)]
    pair = completion("e", rows=rows, terminator=None), completion("e", token_ids=TOKENS[:1], terminator=end)
    verdict = judged([pair, *many([], identical=39)])
    assert failed(verdict) == ["mismatches", "greedy decoding"]
    assert verdict.causes[0].startswith(
        "the candidate ends answers by stop tokens that it did not choose: 1 of its 119"
    )


def test_a_stop_where_the_reference_is_sure_to_go_on_is_a_mismatch() -> None:
    end = Terminator(token_id=EOS, logprobs=token_logprobs([EOS], [[(EOS, -0.25), (31, -4.25)]]))
    rows = [plausible_row(30), [(31, -0.25), (EOS, -4.25)], plausible_row(32)]
    pair = completion("e", rows=rows, terminator=None), completion("e", token_ids=TOKENS[:1], terminator=end)
    for sides in (pair, pair[::-1]):
        finding = only_failure(judged([sides, *many([], identical=39)]))
        assert finding.metric == "mismatches"
        assert "S 8.000 nats (32.0 sigma)" in finding.evidence[0]


def test_an_ignored_end_of_sequence_fails() -> None:
    """The candidate emits the stop token as text and goes on; by log-probabilities the two agree entirely."""
    stops = completion("e", token_ids=TOKENS[:1], terminator=EOS)
    goes_on = completion("e", token_ids=[TOKENS[0], EOS, 33], terminator=None)
    verdict = judged([(stops, goes_on), *many([], identical=39)])
    assert failed(verdict) == ["length and finish reason"]
    assert verdict.causes == (
        "1 of 40 answers ends wrongly: 1 going on after the stop token at which the reference ends",
    )
    assert verdict.findings[LENGTHS].evidence == ("e: 3 tokens, length; the reference 1, stop",)
    assert verdict.headline == "39 of 40 prompts identical, 1 ends elsewhere; decided by length and finish reason"


def test_max_tokens_one_short_fails_and_says_exactly_that() -> None:
    pairs = [short_by_one(f"p-{n}") for n in range(38)]
    stopped = completion("stopped", token_ids=TOKENS[:1])
    ours, theirs = answers("parted", BENIGN, at=0)
    theirs = replace(theirs, token_ids=theirs.token_ids[:2], logprobs=theirs.logprobs and theirs.logprobs.rows(0, 2))
    verdict = judged([*pairs, (stopped, stopped), (ours, theirs)])
    assert failed(verdict) == ["length and finish reason"]
    assert verdict.causes == (
        "39 of 40 answers end wrongly: each that ran to its limit is 1 token too short (2 for max_tokens 3); "
        "max_tokens does not reach the engine as asked",
    )


def test_max_tokens_two_too_many_says_that() -> None:
    ours = answers("p-000")[0]
    long = completion("p-000", token_ids=[*TOKENS, 33, 34], terminator=None)
    verdict = judged([(ours, long)], limits=Limits(min_prompts=1))
    assert (
        "1 of 1 answer ends wrongly: each that ran to its limit is 2 tokens too long (5 for max_" in verdict.causes[0]
    )


def test_an_output_limit_that_strikes_some_is_not_called_max_tokens() -> None:
    verdict = judged([short_by_one("a"), short_by_one("b"), *many([], identical=38)])
    assert verdict.causes == (
        "2 of 40 answers end wrongly: 2 cut off before max_tokens (look for a context or output limit of the engine)",
    )


def test_an_aborted_answer_fails() -> None:
    ours, _ = answers("a")
    gone = completion("a", token_ids=(), text="", terminator=None, finish_reason=FinishReason.ABORT)
    verdict = judged([(ours, gone), short_by_one("b"), *many([], identical=38)])
    assert failed(verdict) == ["length and finish reason"]
    assert verdict.causes[0].startswith("2 of 40 answers end wrongly: 1 aborted by the engine; 1 cut off before max_")
    assert verdict.findings[LENGTHS].evidence[0] == "a: 0 tokens, abort; the reference 3, length"


def test_log_probabilities_that_are_not_numbers_fail() -> None:
    """NaN compares false with everything, and must not slip through any limit."""
    ours, _ = answers("n")
    broken = replace(ours, logprobs=token_logprobs(TOKENS, [[(t, NAN), (1, NAN), (3, NAN)] for t in TOKENS]))
    pairs = [(ours, broken), *many([], identical=39)]
    verdict = judged(pairs)
    assert failed(verdict) == ["greedy decoding"]
    assert verdict.causes == ("the candidate's numbers are broken: 3 of 120 log-probabilities are not a number",)
    with pytest.raises(
        IncomparableError, match=r"did not decode greedily: 3 of 120 log-probabilities are not a number"
    ):
        judged([(theirs, ours) for ours, theirs in pairs])


def test_a_differing_configuration_is_a_cause_only_of_a_failure() -> None:
    identity: dict[str, Scalar] = {
        "model.config.rope_theta": 10000.0,
        "model.config.text.transformers_version": "5",
        "quantization": "fp8",
    }
    fine, wrong = (judged(many([slack], identical=39), identity=identity) for slack in (BENIGN, MISMATCH))
    assert fine.passed
    assert fine.causes == ()
    assert [d.name for d in fine.changed] == ["model.config.rope_theta", "quantization", "engine.version"]
    assert wrong.changed == fine.changed
    assert wrong.causes == (
        "the candidate's model configuration differs: rope_theta is 100000.0 in the reference and 10000.0 in the "
        "candidate",
        "quantization is not set in the reference and 'fp8' in the candidate",
    )


def test_differing_weights_are_a_cause() -> None:
    (cause,) = judged(many([MISMATCH], identical=39), identity={"model.weights_sha256": "4" * 64}).causes
    assert cause == (
        "the weights are not the same: sha256 111111111111 in the reference, 444444444444 in the candidate"
    )


# Not enough to say --------------------------------------------------------------------------------------------------


def test_too_few_prompts_are_inconclusive_unless_one_fails() -> None:
    finding = only_failure(judged(many([BENIGN], identical=30)))
    assert finding.outcome is Outcome.INCONCLUSIVE
    assert finding.sentence == "too little data: 31 prompts, at least 32 are needed"
    assert judged(many([MISMATCH], identical=30)).outcome is Outcome.FAIL
    assert judged(many([], identical=32)).passed


def test_too_few_noise_positions_are_inconclusive_once_something_diverged() -> None:
    little = replace(NOISE, positions=1999)
    finding = only_failure(judged(many([BENIGN], identical=39), noise=little))
    assert finding.outcome is Outcome.INCONCLUSIVE
    assert finding.sentence == "too little data: sigma rests on 1999 positions, at least 2000 are needed"
    assert judged(many([BENIGN], identical=39), noise=replace(NOISE, positions=2000)).passed
    assert judged(many([], identical=40), noise=little).passed, "sigma is not needed where nothing diverged"


def hidden(pair: Answers, *, both: bool = True) -> Answers:
    ours, theirs = pair
    return replace(ours, logprobs=None) if both else ours, replace(theirs, logprobs=None)


def test_a_divergence_without_log_probabilities_is_inconclusive() -> None:
    verdict = judged([hidden(answers("u", BENIGN)), *many([], identical=39)])
    finding = only_failure(verdict)
    assert (finding.metric, finding.outcome) == ("suspicious divergences", Outcome.INCONCLUSIVE)
    assert "; 1 cannot be judged, because log-probabilities are missing; " in finding.sentence
    assert (
        verdict.headline == "39 of 40 prompts identical, 1 without log-probabilities; decided by suspicious divergences"
    )


def test_a_candidate_without_log_probabilities_passes_only_where_it_equals_the_reference() -> None:
    same = judged([hidden(pair, both=False) for pair in many([], identical=40)])
    assert same.passed
    assert same.findings[OWN_ARGMAX].sentence.startswith("the candidate returned no log-probabilities, and took ")
    parted = judged([hidden(pair, both=False) for pair in many([BENIGN], identical=39)])
    finding = only_failure(parted)
    assert (finding.metric, finding.outcome) == ("greedy decoding", Outcome.INCONCLUSIVE)
    assert "S at least 0.250 nats (1.0 sigma) = 0.250 in the reference + ? in the cand" in "".join(
        parted.findings[SUSPICIOUS_COUNT].evidence
    )


def test_nothing_is_inconclusive() -> None:
    verdict = judged([])
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.headline == (
        "0 of 0 prompts identical; decided by too little data: 0 prompts, at least 32 are needed"
    )
    assert verdict.findings[LENGTHS].sentence == "there is no answer"


def test_one_prompt_can_not_fail_by_count_and_the_sentence_does_not_promise_it() -> None:
    verdict = judged(many([SUSPICIOUS]))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.findings[SUSPICIOUS_COUNT].sentence == (
        "1 of 1 prompt diverges, at token 1; slack S (shift of the margin between the two tokens) largest 2.000 nats; "
        "1 suspicious (S over 6 sigma = 1.5 nats), 1 allowed; "
        "too few prompts for this count ever to fail"
    )


def test_without_measured_noise_a_documented_sigma_is_used_with_a_warning() -> None:
    """0.13 nats: 0.78 is 6 sigma."""
    assert judged(many([], identical=40)).warnings == ()
    verdict = judged(many([0.75, 0.875], identical=38), noise=None)
    assert verdict.passed
    assert verdict.findings[SUSPICIOUS_COUNT].candidate == 1
    assert len(verdict.warnings) == 1
    assert verdict.warnings[0].startswith("no noise was measured: sigma 0.13 nats is a documented value for one 135M ")


# Must not be judged -------------------------------------------------------------------------------------------------


def test_a_reference_that_samples_is_refused() -> None:
    rows = [plausible_row(30), [(98, -0.5), (31, -2.5)], plausible_row(32)]
    sampled = completion("s", rows=rows, terminator=None)
    refused = (
        r"^the reference transformers 5\.19\.0 float32 did not decode greedily: 1 of its 120 tokens is not its own "
        r"most probable \(s, token 1: chosen 2\.00 nats below its own most probable\); record it again"
    )
    with pytest.raises(IncomparableError, match=refused):
        judged([(sampled, sampled), *many([], identical=39)])


def test_a_reference_that_gave_up_is_refused() -> None:
    gone = completion("a", token_ids=(), terminator=None, finish_reason=FinishReason.ABORT)
    with pytest.raises(IncomparableError, match=r"gave up 1 of 40 answers, first 'a'; record it again$"):
        judged([(gone, gone), *many([], identical=39)])


def test_a_workload_that_samples_is_refused() -> None:
    with pytest.raises(IncomparableError, match=r"^workload 'tests' samples at temperature 0\.7; "):
        judged(many([], identical=40), sampling=replace(SAMPLING, temperature=0.7))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("min_tokens", 2),
        ("ignore_eos", True),
    ],
)
def test_a_workload_that_moves_the_choice_off_the_raw_argmax_is_refused(field: str, value: object) -> None:
    with pytest.raises(IncomparableError, match=f"^workload 'tests' sets {field} {re.escape(repr(value))}: the chosen"):
        judged(many([], identical=40), sampling=replace(SAMPLING, **{field: value}))  # type: ignore[arg-type]


def test_answers_to_other_prompts_are_refused() -> None:
    reference, candidate = recordings_of(many([], identical=40))
    other = recording([replace(c, prompt_token_ids=(1, 2)) for c in candidate.completions], asked=candidate.workload)
    with pytest.raises(IncomparableError, match="reached the engines as different token ids"):
        greedy.check(reference, other, noise=NOISE, limits=Limits())


def test_it_is_loaded_by_name() -> None:
    assert load("greedy") is greedy


# Laws ---------------------------------------------------------------------------------------------------------------

FEW = Limits(min_prompts=1)  # a single suspicious prompt of up to 17 is allowed
SLACKS = st.none() | st.sampled_from([0.0, BENIGN, 6 * SIGMA, SUSPICIOUS, 25 * SIGMA, MISMATCH]) | st.floats(0.0, 10.0)


@given(slacks=st.lists(SLACKS, min_size=1, max_size=6), data=st.data())
@settings(max_examples=60)
def test_the_order_of_answers_changes_nothing(slacks: list[float | None], data: st.DataObject) -> None:
    reference, candidate = recordings_of([*many(slacks), short_by_one("short")])
    verdict = greedy.check(reference, candidate, noise=NOISE, limits=FEW)
    shuffled = (
        replace(s, completions=tuple(data.draw(st.permutations(s.completions)))) for s in (reference, candidate)
    )
    assert greedy.check(*shuffled, noise=NOISE, limits=FEW) == verdict


@given(slacks=st.lists(SLACKS, min_size=1, max_size=6), data=st.data())
@settings(max_examples=60)
def test_one_mismatch_in_a_benign_pairs_place_turns_pass_into_fail(
    slacks: list[float | None], data: st.DataObject
) -> None:
    benign = [s if s is None or s <= 6 * SIGMA else BENIGN for s in slacks]
    assert judged(many(benign), limits=FEW).passed
    benign[data.draw(st.integers(0, len(benign) - 1))] = data.draw(st.floats(25.1 * SIGMA, 100.0))
    assert judged(many(benign), limits=FEW).outcome is Outcome.FAIL


@given(slacks=st.lists(SLACKS, min_size=1, max_size=6), more=st.lists(st.floats(0.0, 10.0), min_size=6, max_size=6))
@settings(max_examples=60)
def test_a_larger_slack_never_turns_fail_into_pass(slacks: list[float | None], more: list[float]) -> None:
    larger = [s if s is None else s + extra for s, extra in zip(slacks, more, strict=False)]
    before, after = judged(many(slacks), limits=FEW), judged(many(larger), limits=FEW)
    assert before.passed or not after.passed


@given(slacks=st.lists(SLACKS, min_size=1, max_size=6))
@settings(max_examples=60)
def test_exchanging_the_sides_keeps_the_answer(slacks: list[float | None]) -> None:
    pairs = many(slacks)
    mirrored = judged([(theirs, ours) for ours, theirs in pairs], limits=FEW)
    verdict = judged(pairs, limits=FEW)
    assert mirrored.outcome is verdict.outcome
    assert mirrored.headline == verdict.headline


# Calibration --------------------------------------------------------------------------------------------------------

LIMITS = Limits()
PROMPTS = 128
BEYOND_6_SIGMA = 0.0025  # of correct pairs' prompts; measured 2.1 per 1,000, docs/checks/greedy.md


def heavy_tailed(generator: np.random.Generator, sets: int, *, beyond: float = BEYOND_6_SIGMA) -> np.ndarray:
    """Slacks in sigma, [sets, PROMPTS]: a bulk below 6, and a share `beyond` of them on a generalised Pareto tail.

    Shape 0.4, as measured on flips, with the scale that halves the tail twice by 10 sigma; cut at 12, above the largest
    shift ever seen (11.8), because the tail beyond it is extrapolation.
    """
    bulk = np.minimum(np.abs(generator.normal(0.0, 1.2, (sets, PROMPTS))), 6.0)
    tail = 6.0 + 2.1 / 0.4 * (generator.uniform(size=(sets, PROMPTS)) ** -0.4 - 1.0)
    return np.where(generator.uniform(size=(sets, PROMPTS)) < beyond, np.clip(tail, 6.01, 12.0), bulk)


def failing_sets(slacks_sigma: np.ndarray) -> float:
    """The share of sets whose number of suspicious prompts reaches the critical count."""
    sets, prompts = slacks_sigma.shape
    count = critical_count(rate=LIMITS.suspicious_rate, n=prompts, alpha=LIMITS.alpha)
    return float(((slacks_sigma > LIMITS.benign_sigmas).sum(axis=1) >= count).sum() / sets)


def test_correct_pairs_fail_at_most_at_the_promised_rate() -> None:
    """97 prompts are the worst case below 128: the last number with 2 allowed. Three standard errors are given."""
    slacks = heavy_tailed(np.random.default_rng(11), 20_000)
    error = 3 * (LIMITS.alpha / len(slacks)) ** 0.5
    assert failing_sets(slacks) <= LIMITS.alpha + error
    worst = failing_sets(slacks[:, :97])
    assert LIMITS.alpha / 2 < worst <= LIMITS.alpha + error, "the count is as small as it may be"
    assert failing_sets(heavy_tailed(np.random.default_rng(11), 20_000, beyond=4 * BEYOND_6_SIGMA)) > 10 * LIMITS.alpha


def test_a_fault_on_a_tenth_of_the_prompts_is_caught() -> None:
    assert failing_sets(heavy_tailed(np.random.default_rng(12), 4_000, beyond=0.1)) >= 0.9


def test_the_promised_detectable_share_is_caught_with_the_promised_power() -> None:
    count = critical_count(rate=LIMITS.suspicious_rate, n=PROMPTS, alpha=LIMITS.alpha)
    share = detectable_share(n=PROMPTS, count=count, power=LIMITS.power)
    caught = failing_sets(heavy_tailed(np.random.default_rng(13), 20_000, beyond=share))
    assert caught == pytest.approx(LIMITS.power, abs=3 * (0.09 / 20_000) ** 0.5)


def verdicts_on(slacks_sigma: np.ndarray) -> list[Outcome]:
    """The check itself on synthetic recordings; only the candidate's margins vary."""
    names = [f"p-{number:03}" for number in range(slacks_sigma.shape[1])]
    pairs = [answers(name, 0.0) for name in names]
    reference, candidate = recordings_of(pairs)

    def with_slack(answer: Completion, slack: float) -> Completion:
        rows = [[(OTHER, -0.5), (TOKENS[1], -0.5 - slack), (99, -30.0)]]
        return replace(
            answer,
            token_ids=(TOKENS[0], OTHER),
            logprobs=token_logprobs((TOKENS[0], OTHER), [plausible_row(TOKENS[0]), *rows]),
            terminator=Terminator(token_id=EOS, logprobs=None),
            finish_reason=FinishReason.STOP,
        )

    return [
        greedy.check(
            reference,
            replace(
                candidate,
                completions=tuple(
                    with_slack(answer, SIGMA * slack) for answer, slack in zip(candidate.completions, row, strict=True)
                ),
            ),
            noise=NOISE,
            limits=LIMITS,
        ).outcome
        for row in slacks_sigma
    ]


def test_the_check_itself_keeps_the_rates() -> None:
    """200 correct sets: at most 3 may fail (P < 0.001 at alpha); 100 faulty ones: at least 90 must.

    The check and the count of the numbers agree on every set.
    """
    generator = np.random.default_rng(14)
    correct, faulty = heavy_tailed(generator, 200), heavy_tailed(generator, 100, beyond=0.1)
    said = verdicts_on(correct)
    assert said.count(Outcome.FAIL) <= 3
    assert said.count(Outcome.PASS) == len(said) - said.count(Outcome.FAIL)
    assert verdicts_on(faulty).count(Outcome.FAIL) >= 90
    assert said.count(Outcome.FAIL) / len(said) == failing_sets(correct)


def test_max_tokens_of_the_cases_is_their_length() -> None:
    assert len(TOKENS) == MAX_TOKENS == SAMPLING.max_tokens
