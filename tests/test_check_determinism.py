"""The determinism check: rounding passes and is counted, each planted fault fails by its own way of asking."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.checks import determinism
from parity.checks.determinism import Limits, Twin, twins
from parity.errors import ConfigError, IncomparableError
from parity.noise import Noise
from parity.prompts import Grammar, Prompt, Request, SamplingParams, Structured, Workload
from parity.recording import Completion, FinishReason, Recording, Terminator
from parity.verdict import Finding, Outcome, Policy, Verdict
from recordings import EOS, completion, plausible_row, recording, token_logprobs, workload

N = 12
GREEDY = SamplingParams.greedy(max_tokens=64, logprobs=3)
ALL = tuple(Twin)
TOKENS = (30, 40, 50, 60)
Fault = Callable[[Completion], Completion]


def answer(number: int, twin: Twin | None = None) -> Completion:
    """The usual answer to a prompt: the same however it is asked."""
    name = f"p-{number:03}"
    return completion(
        twin.of(name) if twin else name, prompt_token_ids=(1, 20, number), token_ids=[t + number for t in TOKENS], k=3
    )


def other_token(half_nats: float, *, position: int = 1, inside: bool = True) -> Fault:
    """Another token at `position`, `half_nats` more probable there than the usual one; S is that and 2 nats."""

    def planted(usual: Completion) -> Completion:
        own = usual.token_ids[position]
        other = own + 1 if inside else own + 99
        token_ids = (*usual.token_ids[:position], other, *usual.token_ids[position + 1 :])
        rows = [plausible_row(t) for t in token_ids]
        rows[position] = ((other, -0.25), (own, -0.25 - half_nats), (9000, -9.0))
        return replace(
            usual, token_ids=token_ids, logprobs=token_logprobs(token_ids, rows), text=" ".join(map(str, token_ids))
        )

    return planted


def side(
    faults: Mapping[Twin, tuple[Fault, Collection[int]]] | None = None,
    *,
    n: int = N,
    asked: Sequence[Twin] = ALL,
    dtype: str = "bfloat16",
    sampling: SamplingParams = GREEDY,
    engine: str = "vllm",
) -> Recording:
    """A recording of `n` prompts and their twins; a fault is planted in one kind of twin, on some prompts."""
    completions = [answer(number) for number in range(n)]
    for twin in asked:
        fault, where = (faults or {}).get(twin, (None, ()))
        completions += [
            fault(answer(i, twin)) if fault is not None and i in where else answer(i, twin) for i in range(n)
        ]
    return recording(completions, dtype=dtype, sampling=sampling, engine=engine)


def judged(candidate: Recording, reference: Recording | None = None, policy: Policy = Policy.EQUIVALENCE) -> Verdict:
    return determinism.check(reference, candidate, noise=None, limits=Limits.of(policy))


def only_failure(verdict: Verdict) -> Finding:
    (finding,) = [f for f in verdict.findings if f.outcome is not Outcome.PASS]
    assert finding.outcome is verdict.outcome is Outcome.FAIL
    return finding


def found(verdict: Verdict, metric: str) -> Finding:
    (finding,) = [f for f in verdict.findings if f.metric == metric]
    return finding


METRICS = {
    Twin.AGAIN: "asked again in another order",
    Twin.ALONE: "asked alone",
    Twin.CACHED: "asked with a cached prefix",
}
# Between 16-bit answers of one engine, where no noise was measured: 0.13 nats and the square root of two sides.
SIGMA = 0.13 * 2**0.5
SUSPICIOUS = other_token(0.0)  # with the 2 nats of the usual rows: 11 sigma


def near_tie(usual: Completion) -> Completion:
    """Another token, of which both answers say that it is as probable as the usual one to within 0.2 nats."""
    return replace(other_token(0.1)(usual), id=usual.id)


def near_tied(where: Collection[int], *twin_kinds: Twin, n: int = N, engine: str = "vllm") -> Recording:
    """A recording in which some twins fall the other way at a near-tie that the answers in the batch show too."""
    made = side(dict.fromkeys(twin_kinds, (near_tie, where)), n=n, engine=engine)

    def level(usual: Completion) -> Completion:
        rows = [plausible_row(t) for t in usual.token_ids]
        own = usual.token_ids[1]
        if dict(rows[1]).get(own) == -0.25 and "#" not in usual.id:
            rows[1] = ((own, -0.7), (own + 1, -0.8), (9000, -9.0))
            return replace(usual, logprobs=token_logprobs(usual.token_ids, rows))
        return usual

    return replace(made, completions=tuple(map(level, made.completions)))


# One engine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", list(Policy))
def test_an_engine_that_answers_alike_passes_alone_and_against_itself(policy: Policy) -> None:
    for reference in (None, side()):
        verdict = judged(side(), reference, policy)
        assert verdict.passed
        assert not verdict.causes
        assert verdict.headline == ("prompts with other tokens, of 12: again 0, alone 0, cached 0; largest S none")
    assert "0 of 12 prompts give other tokens, 0 the same tokens and other numbers" in verdict.findings[0].sentence


def test_near_ties_that_fall_the_other_way_pass_and_are_counted_with_a_bound_and_a_witness() -> None:
    """Three of twelve: Clopper and Pearson's 95 % interval is 5.5 to 57.2 % (scipy's binomtest)."""
    verdict = judged(near_tied({2, 5, 7}, Twin.ALONE))
    assert verdict.passed
    finding = found(verdict, "asked alone")
    assert finding.candidate == 3 / 12
    assert finding.interval == pytest.approx((0.054861, 0.571858), abs=1e-6)
    assert finding.sentence.startswith(
        "3 of 12 prompts give other tokens, 9 the same tokens and other numbers (by up to 0.45 nats)"
    )
    assert f"largest S 0.200 nats ({0.2 / SIGMA:.1f} sigma)" in finding.sentence
    assert finding.evidence[0] == (
        f"p-002, token 1: S 0.200 nats ({0.2 / SIGMA:.1f} sigma); after '' p-002 has 't32 t42 t52 t62' (token 42: "
        "-0.700 nats; token 43: -0.800 nats) but p-002#alone has '32 43 52 62' (token 43: -0.250 nats; "
        "token 42: -0.350 nats)"
    )
    assert found(verdict, "asked with a cached prefix").candidate == 0.0


@pytest.mark.parametrize("twin", ALL)
def test_one_divergence_beyond_rounding_fails_under_every_policy_and_names_its_cause(twin: Twin) -> None:
    faulty = side({twin: (other_token(6.0), {4})})
    for policy in Policy:
        verdict = judged(faulty, None if policy is Policy.QUANTIZED else faulty, policy)
        finding = only_failure(verdict)
        assert finding.metric == METRICS[twin]
        assert "1 beyond rounding, 0 suspicious" in finding.sentence
        assert finding.evidence[0].startswith("p-004, token 1: S 8.000 nats")
        assert verdict.headline.endswith(f"decided by {METRICS[twin]}")
        (cause,) = verdict.causes
        assert {Twin.AGAIN: "order", Twin.ALONE: "padding, mask", Twin.CACHED: "block reuse"}[twin] in cause


def test_a_token_outside_the_other_answers_top_k_fails() -> None:
    finding = only_failure(judged(side({Twin.CACHED: (other_token(0.1, inside=False), {0})})))
    assert "token 139 is not in its top k" in finding.evidence[0]


def shorter(usual: Completion) -> Completion:
    return completion(usual.id, prompt_token_ids=usual.prompt_token_ids, token_ids=usual.token_ids[:2], terminator=None)


def aborted(usual: Completion) -> Completion:
    return replace(usual, finish_reason=FinishReason.ABORT)


@pytest.mark.parametrize(("fault", "words"), [(shorter, "p-003#again ends (length)"), (aborted, "p-003#again")])
def test_another_end_of_the_same_tokens_fails(fault: Fault, words: str) -> None:
    finding = only_failure(judged(side({Twin.AGAIN: (fault, {3})})))
    assert words in finding.evidence[0]
    assert "1 beyond rounding" in finding.sentence


def test_a_prompt_that_is_given_up_both_times_fails() -> None:
    """Two answers that were given up alike are the same and still no answers."""
    made = side({twin: (aborted, {3}) for twin in ALL})
    made = replace(made, completions=tuple(aborted(c) if c.id == "p-003" else c for c in made.completions))
    verdict = judged(made)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].evidence == ("p-003#again: abort, p-003: abort",)


def test_suspicious_divergences_fail_once_chance_does_not_explain_their_number() -> None:
    """At 12 prompts and 2.5 in a thousand, P(Poisson(0.03) >= 2) = 0.0004: one is allowed."""
    one = judged(side({Twin.AGAIN: (SUSPICIOUS, {3})}))
    assert one.passed
    assert "1 suspicious (1 allowed)" in one.findings[0].sentence
    two = judged(side({Twin.AGAIN: (SUSPICIOUS, {3, 4})}))
    assert "2 suspicious (1 allowed)" in only_failure(two).sentence


def test_sigma_is_that_of_two_answers_of_one_engine() -> None:
    """0.5 nats is nothing in bfloat16; between float32 answers, whose sigma is the floor of 0.02, it is 25 sigma."""
    assert judged(near_tied({1}, Twin.ALONE)).passed
    exact = replace(near_tied({1}, Twin.ALONE), spec=replace(side().spec, dtype="float32"))
    assert judged(exact).passed  # 0.2 nats are 10 sigma: suspicious, and one is allowed
    assert "1 suspicious" in found(judged(exact), "asked alone").sentence
    gross = side({Twin.ALONE: (SUSPICIOUS, {1})}, dtype="float32")
    assert judged(gross).outcome is Outcome.FAIL
    # A pair of two 16-bit engines has both of its sides in sigma already.
    noise = Noise(sigma_nats=0.3, measured_nats=0.3, positions=9000, prompts=99, source="tests")
    for reference, sigma in ((None, 0.3 * 2**0.5), (side(), 0.3), (side(dtype="float32"), 0.3 * 2**0.5)):
        verdict = determinism.check(reference, near_tied({1}, Twin.ALONE), noise=noise, limits=Limits())
        assert f"largest S 0.200 nats ({0.2 / sigma:.1f} sigma)" in found(verdict, "asked alone").sentence
        assert not verdict.warnings


def test_other_numbers_of_the_same_tokens_are_counted_to_the_bit() -> None:
    def shifted(usual: Completion) -> Completion:
        rows = [plausible_row(t) for t in usual.token_ids]
        rows[2] = (rows[2][0], (rows[2][1][0], -2.5), rows[2][2])  # not the chosen token's
        return replace(usual, logprobs=token_logprobs(usual.token_ids, rows))

    def other_end(usual: Completion) -> Completion:
        step = token_logprobs([EOS], [[(EOS, -0.375), (3, -2.25), (4, -4.25)]])
        return replace(usual, terminator=Terminator(token_id=EOS, logprobs=step))

    def hidden_end(usual: Completion) -> Completion:
        return replace(usual, terminator=Terminator(token_id=EOS, logprobs=None))

    faults = {Twin.AGAIN: (shifted, {1, 2}), Twin.ALONE: (other_end, {5}), Twin.CACHED: (hidden_end, {6})}
    verdict = judged(side(faults))
    assert verdict.passed
    again, alone, cached = (found(verdict, metric).sentence for metric in METRICS.values())
    assert "0 of 12 prompts give other tokens, 2 the same tokens and other numbers (by up to 0 nats)" in again
    assert "1 the same tokens and other numbers (by up to 0.12 nats)" in alone
    assert "1 the same tokens and other numbers (by up to 0 nats)" in cached


def bare(made: Recording) -> Recording:
    return replace(
        made,
        completions=tuple(
            replace(c, logprobs=None, terminator=Terminator(token_id=EOS, logprobs=None)) for c in made.completions
        ),
    )


def test_a_divergence_without_log_probabilities_is_inconclusive() -> None:
    same = judged(bare(side()))
    assert same.passed
    assert "numbers are not recorded" in same.findings[0].sentence
    verdict = judged(bare(side({Twin.ALONE: (SUSPICIOUS, {0})})))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "1 cannot be judged, because log-probabilities are missing" in found(verdict, "asked alone").sentence


def test_an_engine_without_a_prefix_cache_is_judged_on_the_rest() -> None:
    verdict = judged(side(asked=(Twin.AGAIN, Twin.ALONE)))
    assert verdict.passed
    assert [f.metric for f in verdict.findings] == ["asked again in another order", "asked alone", "data"]


def test_too_few_prompts_can_fail_and_not_pass() -> None:
    few = judged(side(n=7))
    assert few.outcome is Outcome.INCONCLUSIVE
    assert few.headline.endswith("decided by too little data: 7 prompts, at least 8 are needed")
    assert judged(side(n=8)).passed
    assert judged(side({Twin.CACHED: (other_token(6.0), {0})}, n=3)).outcome is Outcome.FAIL
    assert judged(side(n=0)).outcome is Outcome.INCONCLUSIVE


@given(order=st.permutations(range(3 * 9)))
def test_the_order_of_arrival_does_not_matter(order: list[int]) -> None:
    made = side({Twin.AGAIN: (SUSPICIOUS, {3, 7})}, n=9, asked=(Twin.AGAIN, Twin.ALONE))
    shuffled = replace(made, completions=tuple(made.completions[i] for i in order))
    assert judged(shuffled) == judged(made)


# Beside a reference --------------------------------------------------------------------------------------------------


def test_under_identity_a_candidate_must_be_as_deterministic_as_the_reference() -> None:
    """Eleven prompts that only the candidate answers otherwise: 0.5^11 = 0.00049; ten are not enough."""
    candidate = near_tied(range(11), Twin.ALONE)
    assert judged(candidate, side()).passed
    verdict = judged(candidate, side(), Policy.IDENTITY)
    finding = only_failure(verdict)
    assert finding.metric == "as the reference, asked alone"
    assert (
        finding.sentence == "other tokens only in the candidate on 11 prompts, only in the reference on 0 (p 0.00049)"
    )
    assert len(finding.evidence) == 3
    assert verdict.causes == ("the candidate is less deterministic than the reference where a prompt is asked alone",)
    assert judged(near_tied(range(10), Twin.ALONE), side(), Policy.IDENTITY).passed
    assert judged(candidate, candidate, Policy.IDENTITY).passed
    assert judged(side(), candidate, Policy.IDENTITY).passed


def test_eight_prompts_are_too_few_to_compare_determinism() -> None:
    verdict = judged(near_tied(range(8), Twin.ALONE, n=8), side(n=8), Policy.IDENTITY)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert found(verdict, "as the reference, asked alone").sentence.endswith(
        "8 prompts are too few for this ever to fail"
    )
    assert judged(near_tied(range(8), Twin.ALONE, n=8), side(n=8)).passed


def test_what_only_one_side_was_asked_is_judged_on_that_side() -> None:
    verdict = judged(side(), side(asked=(Twin.AGAIN, Twin.ALONE)), Policy.IDENTITY)
    assert verdict.passed
    metrics = [f.metric for f in verdict.findings]
    assert "asked with a cached prefix" in metrics
    assert "as the reference, asked with a cached prefix" not in metrics
    assert found(verdict, "asked with a cached prefix").reference is None


def test_both_sides_are_shown_and_a_faulty_reference_only_warns() -> None:
    reference = side({Twin.CACHED: (other_token(6.0), {4})}, engine="transformers")
    verdict = judged(side(), reference)
    assert verdict.passed
    finding = found(verdict, "asked with a cached prefix")
    assert (finding.reference, finding.candidate, finding.delta) == (1 / 12, 0.0, -1 / 12)
    assert "the reference: 1 of 12 prompts give other tokens" in finding.sentence
    assert finding.evidence[0].startswith("in the reference, p-004, token 1: S 8.000 nats")
    assert any("differs beyond rounding on 1 prompt" in w and "p-004#cached" in w for w in verdict.warnings)


def test_identity_without_a_reference_says_what_it_could_not_see() -> None:
    assert any("the reference was not asked" in w for w in judged(side(), None, Policy.IDENTITY).warnings)
    assert not any("the reference was not asked" in w for w in judged(side()).warnings)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.8}, "is sampled at temperature 0.8"),
        ({"repetition_penalty": 1.1}, "sets repetition_penalty"),
        ({"min_tokens": 4, "presence_penalty": 0.5}, "sets presence_penalty, min_tokens"),
        ({"structured": Structured(grammar=Grammar.REGEX, definition="a")}, "sets structured"),
    ],
)
def test_anything_but_plain_greedy_decoding_is_refused(changes: Mapping[str, object], words: str) -> None:
    with pytest.raises(IncomparableError, match=words):
        judged(side(sampling=replace(GREEDY, **changes)))  # type: ignore[arg-type]
    one = side()
    others = {"p-003": replace(GREEDY, **changes)}  # type: ignore[arg-type]
    with pytest.raises(IncomparableError, match=f"candidate's prompt 'p-003' .*{words}"):
        judged(replace(one, workload=replace(one.workload, others=others)))


def test_scores_of_given_tokens_are_refused() -> None:
    made = side()
    asked = workload([c.id for c in made.completions], forced_from="f" * 64)
    with pytest.raises(IncomparableError, match="scores given tokens"):
        judged(replace(made, workload=asked))


def without(made: Recording, prompt_id: str) -> Recording:
    return replace(made, completions=tuple(c for c in made.completions if c.id != prompt_id))


def test_a_recording_of_other_questions_is_refused() -> None:
    for gone, words in (
        ("p-003#again", "'p-003#again' is missing"),
        ("p-003#cached", "'p-003#cached' is missing"),
        ("p-003", "'p-003#again' is not the twin of another"),
    ):
        with pytest.raises(IncomparableError, match=words):
            judged(without(side(), gone))
    with pytest.raises(IncomparableError, match="'p-000#again' is missing"):
        judged(recording([answer(0)], dtype="bfloat16"))


def test_a_twin_of_other_token_ids_is_refused() -> None:
    def resent(usual: Completion) -> Completion:
        return replace(usual, prompt_token_ids=(1, 99))

    with pytest.raises(
        IncomparableError, match="prompt 'p-002' reached the engine as other token ids when it was asked al"
    ):
        judged(side({Twin.ALONE: (resent, {2})}))


def test_two_sides_that_were_asked_different_prompts_are_refused() -> None:
    with pytest.raises(IncomparableError, match="not asked the same: prompt 'p-011'"):
        judged(side(), side(n=11))
    with pytest.raises(IncomparableError, match=r"not asked the same: prompt 'p-000' .*sampling\.max_tokens 32 vs 64"):
        judged(side(), side(sampling=replace(GREEDY, max_tokens=32)))


def test_a_reference_that_gave_an_answer_up_is_refused() -> None:
    with pytest.raises(IncomparableError, match="gave up 1 of 48 answers, first 'p-001#alone'"):
        judged(side(), side({Twin.ALONE: (aborted, {1})}))


# What is asked -------------------------------------------------------------------------------------------------------

IDS = st.lists(st.text("abc-", min_size=1, max_size=4), unique=True, max_size=6)


@given(ids=IDS, can_reuse_prefix=st.booleans())
def test_every_prompt_is_asked_in_a_batch_again_alone_and_from_the_cache(
    ids: list[str], can_reuse_prefix: bool
) -> None:
    requests = tuple(
        Request(prompt=Prompt(id=i, text=i), sampling=GREEDY, prompt_token_ids=(n,)) for n, i in enumerate(ids)
    )
    made = twins(Workload(name="w", requests=requests), can_reuse_prefix=can_reuse_prefix)
    assert made.name == "w-determinism"
    turns: dict[int, list[str]] = {}
    for request in made.requests:
        turns.setdefault(request.turn, []).append(request.id)
        assert request.reuse_prefix == request.id.endswith("#cached")
        assert request.prompt_token_ids == (ids.index(request.id.partition("#")[0]),)
        assert request.sampling == GREEDY
    expected = [ids, [f"{i}#again" for i in reversed(ids)], *([f"{i}#alone"] for i in ids)]
    expected += [[f"{i}#cached" for i in ids]] * can_reuse_prefix
    assert [turns[turn] for turn in sorted(turns)] == [turn for turn in expected if turn]


def test_an_id_with_the_mark_of_a_twin_is_refused() -> None:
    asked = Workload(name="w", requests=(Request(prompt=Prompt(id="a#b", text="x"), sampling=GREEDY),))
    with pytest.raises(ConfigError, match="prompt 'a#b' of workload 'w'"):
        twins(asked, can_reuse_prefix=False)
