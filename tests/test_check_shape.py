"""The shape check: each law fails on its own planted fault and alone, correct pairs pass, counts are as promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from parity.checks import shape
from parity.checks.shape import Limits
from parity.errors import IncomparableError
from parity.prompts import SamplingParams
from parity.recording import NO_TOKEN, Completion, FinishReason, Recording, Terminator
from parity.stats import mcnemar
from parity.verdict import Finding, Outcome, Verdict
from recordings import EOS, completion, plausible_row, recording

MAX_TOKENS = 64
GREEDY = SamplingParams.greedy(max_tokens=MAX_TOKENS, logprobs=3)
SAMPLED = replace(GREEDY, temperature=0.8, seed=None)
NAN, INF = float("nan"), float("inf")
N = 40


def answer(number: int, *, length: int | None = None, **changes: object) -> Completion:
    """The usual answer to prompt `number`: 20 to 29 tokens of its own, then end-of-sequence."""
    count = 20 + number % 10 if length is None else length
    token_ids = [100 + (7 * number + 3 * i + i * i) % 97 for i in range(count)]
    made: Completion = completion(f"p-{number:03}", **{"token_ids": token_ids, "k": 3, **changes})  # type: ignore[arg-type]
    return made


def usual(n: int = N) -> list[Completion]:
    return [answer(number) for number in range(n)]


def sides(
    ours: Sequence[Completion], theirs: Sequence[Completion], sampling: SamplingParams = GREEDY
) -> tuple[Recording, Recording]:
    reference = recording(ours, sampling=sampling, engine="transformers")
    return reference, recording(theirs, asked=reference.workload, engine="vllm")


def judged(
    ours: Sequence[Completion],
    theirs: Sequence[Completion],
    sampling: SamplingParams = GREEDY,
    limits: Limits | None = None,
) -> Verdict:
    return shape.check(*sides(ours, theirs, sampling), noise=None, limits=limits or Limits())


def with_first(*changed: Completion, n: int = N) -> list[Completion]:
    """The usual answers with some of the first ones replaced."""
    return [*changed, *usual(n)[len(changed) :]]


def only_failure(verdict: Verdict) -> Finding:
    (finding,) = [f for f in verdict.findings if f.outcome is not Outcome.PASS]
    assert finding.outcome is verdict.outcome is Outcome.FAIL
    assert len(finding.evidence) <= 3
    return finding


def found(verdict: Verdict, metric: str) -> Finding:
    (finding,) = [f for f in verdict.findings if f.metric == metric]
    return finding


def metrics(verdict: Verdict) -> list[str]:
    return [f.metric for f in verdict.findings]


# Correct pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_recording_passes_against_itself(sampling: SamplingParams) -> None:
    verdict = judged(usual(), usual(), sampling)
    assert verdict.passed
    assert verdict.headline == "8 of 8 findings pass on 40 prompts"
    assert not any((verdict.causes, verdict.warnings))
    assert metrics(verdict) == [
        "numbers",
        "ends",
        "end-of-sequence tokens",
        "text and tokens",
        "output length",
        "answers that end by themselves",
        "degenerate output",
        "data",
    ]


def test_a_benign_variation_passes() -> None:
    """Other tokens on every prompt, slightly other lengths, some ending by length, no log-probabilities at the end."""
    theirs = [
        answer(
            n,
            token_ids=[300 + (n + 5 * i * i) % 89 for i in range(21 + (n + 1) % 10)],
            terminator=Terminator(token_id=EOS, logprobs=None),
        )
        for n in range(N - 3)
    ]
    theirs += [answer(n, length=MAX_TOKENS, terminator=None) for n in range(N - 3, N)]
    ours = [*usual()[:-3], *[answer(n, length=MAX_TOKENS, terminator=None) for n in range(N - 3, N)]]
    assert judged(ours, theirs).passed


def test_without_log_probabilities_the_numbers_are_left_out() -> None:
    bare = [answer(n, rows=None, terminator=Terminator(token_id=EOS, logprobs=None)) for n in range(N)]
    verdict = judged(bare, bare)
    assert verdict.passed
    assert "numbers" not in metrics(verdict)


def test_what_has_nothing_to_look_at_is_left_out() -> None:
    cut = [answer(n, length=MAX_TOKENS, terminator=None, text="") for n in range(N)]
    cut = [replace(c, text=None, logprobs=None) for c in cut]
    assert metrics(judged(cut, cut)) == ["ends", "output length", "degenerate output", "data"]


def test_masked_tokens_and_short_rows_are_no_fault() -> None:
    token_ids = (100, 101)
    rows = [[(100, -0.01), (101, -INF)], [(101, -0.01)]]
    odd = answer(0, token_ids=token_ids, rows=rows)
    assert odd.logprobs is not None
    assert odd.logprobs.top_token_ids.tolist() == [100, 101, NO_TOKEN, 101, NO_TOKEN, NO_TOKEN]
    assert judged(with_first(odd), with_first(odd)).passed


def test_the_end_of_the_context_window_on_both_sides_is_no_fault() -> None:
    cut = answer(0, length=30, terminator=None)
    assert judged(with_first(cut), with_first(cut)).passed


# 1 numbers ----------------------------------------------------------------------------------------------------------


def scored(rows: Sequence[Sequence[tuple[int, float]]], chosen: Sequence[float] | None = None) -> Completion:
    """Answer 0 with these rows for its first tokens, and these log-probabilities of theirs."""
    token_ids = answer(0).token_ids
    usual_rows = [plausible_row(t) for t in token_ids]
    all_rows = [*rows, *usual_rows[len(rows) :]]
    values = [-0.25] * len(token_ids)
    return answer(0, rows=all_rows, chosen=[*(chosen or []), *values[len(chosen or []) :]])


T0 = 100  # the first token of answer 0
BROKEN_NUMBERS = {
    "NaN chosen": (scored([], [NAN]), "a log-probability that is not finite"),
    "-inf chosen": (scored([[(T0, -INF)]], [-INF]), "a log-probability that is not finite"),
    "+inf chosen": (scored([], [INF]), "a log-probability that is not finite"),
    "NaN in row": (scored([[(T0, -0.25), (7, NAN)]]), "a log-probability that is not finite"),
    "+inf in row": (scored([[(7, INF), (T0, -0.25)]]), "a log-probability that is not finite"),
    "chosen above 0": (scored([[(7, -1.0)]], [0.001]), "a log-probability above 0"),
    "row above 0": (scored([[(7, 0.001), (8, -9.0)]], [-9.0]), "a log-probability above 0"),
    "unsorted": (scored([[(7, -2.0), (T0, -0.25)]]), "a top-k row that is not sorted"),
    "other entry": (scored([[(T0, -0.25), (7, -2.0)]], [-0.252]), "a chosen token whose log-probability is not that"),
    "over 1": (scored([[(T0, -0.25), (7, -0.25)]]), "a top-k row whose probabilities add up to more than 1"),
    "twice": (scored([[(T0, -0.25), (7, -3.0), (7, -3.0)]]), "a token that is twice in a top-k row"),
    "gap": (scored([[(T0, -0.25), (NO_TOKEN, -INF), (7, -INF)]]), "a gap inside a top-k row"),
}


@pytest.mark.parametrize("name", BROKEN_NUMBERS)
def test_one_impossible_number_fails_by_its_own_rule(name: str) -> None:
    broken, rule = BROKEN_NUMBERS[name]
    verdict = judged(usual(), with_first(broken))
    finding = only_failure(verdict)
    assert finding.sentence.startswith(f"1 of 40 answers wrong: 1 with {rule}")
    assert ";" not in finding.sentence, "one fault breaks one rule"
    assert finding.evidence[0].startswith(f"p-000, token 0: {T0} has ")
    assert (finding.n, finding.reference, finding.candidate) == (40, 0.0, 1.0)
    assert len(verdict.causes) == 1


def test_numbers_within_tolerance_pass() -> None:
    ours = scored([[(7, 0.00005), (8, -20.0)], [(9, -0.69314), (10, -0.69305)]], [-0.25, -2.0])
    fine = scored([[(T0, -0.25), (7, -1.6)]], [-0.2505])
    assert judged(usual(), with_first(ours)).passed
    assert judged(usual(), with_first(fine)).passed


def test_nan_from_a_token_on_is_told_with_its_place() -> None:
    count = len(answer(3).token_ids)
    broken = answer(3, chosen=[-0.25] * 12 + [NAN] * (count - 12), terminator=None, finish_reason=FinishReason.LENGTH)
    sampling = replace(GREEDY, max_tokens=count)
    ours = [answer(n, length=count, terminator=None) for n in range(N)]
    verdict = judged(ours, [*ours[:3], replace(broken, finish_reason=FinishReason.LENGTH), *ours[4:]], sampling)
    assert only_failure(verdict).metric == "numbers"
    assert verdict.causes == ("NaN from token 12 on: broken kernel or overflow",)
    once = answer(3, chosen=[-0.25] * 12 + [NAN] + [-0.25] * (count - 13))
    assert judged(usual(), [*usual()[:3], once, *usual()[4:]]).causes[0].startswith("NaN at token 12: ")


def test_the_terminators_numbers_are_looked_at() -> None:
    end = answer(0).terminator
    assert end is not None
    assert end.logprobs is not None
    broken = replace(end, logprobs=scored([], [NAN]).logprobs.rows(0, 1))  # type: ignore[union-attr]
    finding = only_failure(judged(usual(), with_first(answer(0, terminator=broken))))
    assert finding.evidence[0].startswith("p-000, token 20: 2 has nan nats")


def test_faults_beyond_the_first_block_name_the_right_answer() -> None:
    theirs = usual(150)
    theirs[140] = answer(140, chosen=[-0.25] * 5 + [NAN] + [-0.25] * 14)
    assert only_failure(judged(usual(150), theirs)).evidence[0].startswith("p-140, token 5: ")


def test_a_reference_that_breaks_a_law_is_warned_about() -> None:
    verdict = judged(with_first(scored([], [NAN])), usual())
    assert verdict.passed
    assert found(verdict, "numbers").reference == 1.0
    (warning,) = verdict.warnings
    assert warning.startswith(
        "the reference itself breaks the law on numbers, 1 of 40 answers wrong: 1 with a log-prob"
    )


# 2 ends -------------------------------------------------------------------------------------------------------------

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP
STOPS = replace(GREEDY, stop_token_ids=(9,), min_tokens=3)
IGNORES = replace(GREEDY, ignore_eos=True, stop_token_ids=(9,))
body = answer(0).token_ids
WRONG_ENDS = {
    "cut off": (GREEDY, answer(0, terminator=None), "cut off before max_tokens"),
    "too long": (GREEDY, answer(0, length=MAX_TOKENS + 1, terminator=None), "longer than max_tokens"),
    "too long, stopped": (GREEDY, answer(0, length=MAX_TOKENS + 1), "longer than max_tokens"),
    "aborted": (GREEDY, answer(0, terminator=None, finish_reason=FinishReason.ABORT), "aborted by the engine"),
    "nameless": (GREEDY, answer(0, terminator=None, finish_reason=STOP), "stopped and naming neither"),
    "own end inside": (GREEDY, answer(0, token_ids=(*body, EOS, *body)), "going on after a token that ends answers"),
    "stop inside": (STOPS, answer(0, token_ids=(*body, 9, *body)), "going on after a token that ends answers"),
    "too short": (STOPS, answer(0, token_ids=(30, 31)), "shorter than min_tokens 3"),
    "eos": (IGNORES, answer(0), "ended by an end-of-sequence token under ignore_eos"),
}


@pytest.mark.parametrize("name", WRONG_ENDS)
def test_one_wrong_end_fails_by_its_own_rule(name: str) -> None:
    sampling, broken, rule = WRONG_ENDS[name]
    ours = usual()
    if sampling is IGNORES:
        ours = [answer(n, terminator=9) for n in range(N)]
    verdict = judged(ours, [broken, *ours[1:]], sampling)
    finding = only_failure(verdict)
    assert finding.sentence.startswith(f"1 of 40 answers wrong: 1 {rule}")
    assert "; " not in finding.sentence
    assert finding.evidence[0].startswith("p-000: ")
    assert verdict.causes


def test_what_ends_no_answer_may_stand_in_it() -> None:
    """Stop tokens within min_tokens, and end-of-sequence tokens under ignore_eos."""
    early = answer(0, token_ids=(30, 9, EOS, *body))
    assert judged(with_first(early), with_first(early), STOPS).passed
    ours = [answer(n, terminator=9) for n in range(N)]
    ours[0] = answer(0, token_ids=(*body, EOS, *body), terminator=9)
    verdict = judged(ours, ours, IGNORES)
    assert verdict.passed
    assert "end-of-sequence tokens" not in metrics(verdict)


def test_one_end_of_sequence_under_ignore_eos_is_one_fault() -> None:
    """The same token inside another answer is as asked, and no sign of other end-of-sequence tokens."""
    ours = [answer(n, terminator=9) for n in range(N)]
    ours[1] = answer(1, token_ids=(*body, EOS), terminator=9)
    finding = only_failure(judged(ours, [answer(0), *ours[1:]], IGNORES))
    assert finding.sentence == "1 of 40 answers wrong: 1 ended by an end-of-sequence token under ignore_eos"


def test_a_stop_token_that_is_not_heeded_is_no_end_of_sequence_token() -> None:
    asked = replace(GREEDY, stop_token_ids=(9,))
    ours, theirs = answer(0, terminator=9), answer(0, token_ids=(*body, 9))
    assert only_failure(judged(with_first(ours), with_first(theirs), asked)).metric == "ends"


def test_a_stop_token_that_the_engine_only_names_ends_an_answer() -> None:
    named = answer(0, terminator=None, finish_reason=STOP, stop_reason=EOS)
    assert judged(usual(), with_first(named)).passed


def test_one_length_for_all_says_that_max_tokens_does_not_arrive() -> None:
    ours = [answer(n, length=MAX_TOKENS, terminator=None) for n in range(N)]
    theirs = [answer(n, length=MAX_TOKENS - 1, terminator=None) for n in range(N)]
    verdict = judged(ours, theirs)
    assert only_failure(verdict).metric == "ends"
    assert verdict.causes == ("max_tokens does not reach the engine as asked: 63 tokens for max_tokens 64",)


# 3 stop strings -----------------------------------------------------------------------------------------------------

WITH_STOP = replace(GREEDY, stop=("\n\n", "User:"))
by_string = {"terminator": None, "finish_reason": STOP}


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (
            answer(0, text="One.\n\nTwo.", terminator=None, finish_reason=STOP, stop_reason="\n\n"),
            "stop strings do not",
        ),
        (answer(0, text="One.\n\nTwo."), "stop strings do not end the candidate's answers"),
        (answer(0, text="One.User:", terminator=None, finish_reason=STOP, stop_reason="User:"), "the candidate leaves"),
        (
            answer(0, text="One.", terminator=None, finish_reason=STOP, stop_reason="###"),
            "the candidate ends answers by",
        ),
    ],
)
def test_a_stop_string_that_does_not_stop_fails(broken: Completion, cause: str) -> None:
    ours = answer(0, text="One.", terminator=None, finish_reason=STOP, stop_reason="\n\n", token_ids=(30, 31, 32))
    assert judged(with_first(ours), with_first(ours), WITH_STOP).passed
    verdict = judged(with_first(ours), with_first(broken), WITH_STOP)
    assert only_failure(verdict).metric == "stop strings"
    assert verdict.causes[0].startswith(cause)


def test_a_stop_string_within_min_tokens_may_stand_in_the_text() -> None:
    early = with_first(answer(0, text="\n\nOne."))
    sampling = replace(WITH_STOP, min_tokens=2)
    assert judged(early, early, sampling).passed
    assert not judged(early, early, WITH_STOP).passed


def test_a_stop_string_that_nobody_asked_fails() -> None:
    verdict = judged(usual(), with_first(answer(0, terminator=None, finish_reason=STOP, stop_reason="x")))
    assert only_failure(verdict).metric == "stop strings"
    assert found(verdict, "stop strings").n == 1


# 4 end-of-sequence tokens -------------------------------------------------------------------------------------------


def test_other_end_of_sequence_tokens_fail_with_their_ids() -> None:
    """The reference ends at 2 where the candidate goes on to 0."""
    theirs = [answer(n, token_ids=(*answer(n).token_ids[:-1], EOS), terminator=0) for n in range(N)]
    verdict = judged(usual(), theirs)
    assert only_failure(verdict).metric == "end-of-sequence tokens"
    assert verdict.causes == (
        "the candidate ends at other end-of-sequence tokens: 2 in the reference, 0 in the candidate",
    )
    assert verdict.findings[2].evidence[0] == "p-000: token 2 at position 19 of 20 in the candidate"
    turned = judged(theirs, usual())
    assert only_failure(turned).metric == "end-of-sequence tokens"
    assert turned.findings[2].evidence[0] == "p-000: token 2 at position 19 of 20 in the reference"


def test_another_end_that_neither_side_contradicts_passes() -> None:
    """Two of the model's end-of-sequence tokens; the reference just never chose the second, though it weighed it."""
    rows = [plausible_row(t) for t in answer(1).token_ids]
    rows[3] = (rows[3][0], (7, -3.0), (8, -4.0))
    assert judged(with_first(answer(0), answer(1, rows=rows)), with_first(answer(0, terminator=7))).passed


# 5 lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "outcome"), [(0.5, Outcome.FAIL), (0.95, Outcome.PASS), (1.6, Outcome.FAIL)])
def test_lengths_outside_a_tenth_fail(share: float, outcome: Outcome) -> None:
    theirs = [answer(n, length=round(share * len(answer(n).token_ids))) for n in range(N)]
    verdict = judged(usual(), theirs)
    finding = found(verdict, "output length")
    assert finding.outcome is verdict.outcome is outcome
    if outcome is Outcome.FAIL:
        assert only_failure(verdict) is finding
        assert verdict.causes[0].startswith(f"the candidate's answers are {'shorter' if share < 1 else 'longer'}")


def test_a_hand_worked_interval() -> None:
    """Three prompts, 10 tokens each against 8, 10 and 12: ratios without one are 1.1, 1 and 0.9.

    ln: 0.09531, 0, -0.10536, mean -0.003350; squared deviations 0.009734 + 0.000011 + 0.010406 = 0.020151; times 2/3
    is 0.013434, root 0.11591; Student t (99.5 %, 2 degrees) 9.9248: exp(-1.15035) = 0.3165 to exp(1.15035) = 3.159.
    """
    ours = [answer(n, length=10) for n in range(3)]
    theirs = [answer(n, length=length) for n, length in enumerate((8, 10, 12))]
    finding = found(judged(ours, theirs), "output length")
    assert finding.interval == pytest.approx((0.3165, 3.159), rel=1e-3)
    assert finding.outcome is Outcome.INCONCLUSIVE
    assert "; too few prompts" in finding.sentence


def test_an_interval_across_a_limit_passes_with_enough_prompts_and_says_so() -> None:
    rng = np.random.default_rng(7)
    ours = [answer(n, length=int(rng.integers(2, 60))) for n in range(N)]
    theirs = [answer(n, length=int(rng.integers(2, 60))) for n in range(N)]
    finding = found(judged(ours, theirs), "output length")
    assert finding.outcome is Outcome.PASS
    assert finding.sentence.endswith("; not shown to lie within 0.9 and 1.1, nor outside")


def test_lengths_of_correct_pairs_fail_less_often_than_promised() -> None:
    """Independent lengths of one distribution, the hardest correct case: at most 0.5 % fail on either side."""
    rng = np.random.default_rng(3)
    pool = [[answer(n, length=length, rows=None) for length in (1, 4, 16, 60)] for n in range(32)]
    failed = 0
    for _ in range(200):
        ours, theirs = ([row[i] for row, i in zip(pool, rng.integers(0, 4, 32), strict=True)] for _ in range(2))
        finding = found(judged(ours, theirs), "output length")
        failed += finding.outcome is Outcome.FAIL
    assert stats.binom.sf(failed - 1, 200, 0.01) > 1e-3


@pytest.mark.parametrize(("count", "outcome"), [(10, Outcome.PASS), (11, Outcome.FAIL)])
def test_answers_that_end_by_themselves_are_counted_in_pairs(count: int, outcome: Outcome) -> None:
    """2 / 2**10 is over 0.001, 2 / 2**11 is not. Lengths are alike, so that nothing else fails."""
    ours = [answer(n, length=MAX_TOKENS - 1) for n in range(N)]
    theirs = [*[answer(n, length=MAX_TOKENS, terminator=None) for n in range(count)], *ours[count:]]
    verdict = judged(ours, theirs)
    finding = found(verdict, "answers that end by themselves")
    assert finding.outcome is verdict.outcome is outcome
    assert finding.sentence.startswith(f"40 of 40 answers end by themselves in the reference, {40 - count} in the cand")
    assert found(judged(theirs, ours), "answers that end by themselves").outcome is outcome


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys_binomial_test(more: int, fewer: int) -> None:
    for two_sided, alternative in ((True, "two-sided"), (False, "greater")):
        expected = stats.binomtest(more, more + fewer, 0.5, alternative=alternative).pvalue if more + fewer else 1.0
        assert mcnemar(more, fewer, two_sided=two_sided) == pytest.approx(expected, rel=1e-9)


# 6 degenerate output ------------------------------------------------------------------------------------------------


def long(number: int, make: Callable[[int], int] | None = None) -> Completion:
    token_ids = None if make is None else [make(i) for i in range(MAX_TOKENS)]
    return answer(number, length=MAX_TOKENS, terminator=None, **({} if token_ids is None else {"token_ids": token_ids}))


@pytest.mark.parametrize(("count", "outcome"), [(9, Outcome.PASS), (10, Outcome.FAIL)])
@pytest.mark.parametrize("period", [1, 8])
def test_loops_are_counted_in_pairs(period: int, count: int, outcome: Outcome) -> None:
    """1 / 2**9 is over 0.001, 1 / 2**10 is not."""
    ours = [long(n) for n in range(N)]
    theirs = [*[long(n, lambda i: 500 + i % period) for n in range(count)], *ours[count:]]
    verdict = judged(ours, theirs)
    finding = found(verdict, "degenerate output")
    assert finding.outcome is verdict.outcome is outcome
    assert finding.evidence[0].startswith("p-000: its last 32 tokens repeat [50")
    assert finding.evidence[0].count(",") == period - 1
    assert judged(theirs, ours).passed, "a reference that loops more is no fault of the candidate"


def test_what_only_resembles_a_loop_is_none() -> None:
    ours = [long(n) for n in range(N)]
    nine = [long(n, lambda i: 500 + i % 9) for n in range(N)]
    short = [long(n, lambda i: 500 if i >= MAX_TOKENS - 31 else 600 + i) for n in range(N)]
    for theirs in (nine, short):
        assert found(judged(ours, theirs), "degenerate output").candidate == 0


def test_one_repeated_character_is_degenerate() -> None:
    ours = usual()
    theirs = [replace(c, text="! " * 16, token_ids=(*c.token_ids[:-1], 777)) for c in ours]
    theirs = [replace(c, token_ids=(*c.token_ids[:-1], 700 + n)) for n, c in enumerate(theirs)]
    finding = only_failure(judged(ours, theirs))
    assert finding.metric == "degenerate output"
    assert finding.evidence[0] == "p-000: '!' 16 times and nothing else"
    assert judged(ours, [replace(c, text="!" * 15) for c in theirs]).passed


def test_empty_answers_count_where_the_other_side_is_not_empty() -> None:
    empty = [answer(n, token_ids=(), rows=None, text="") for n in range(10)]
    finding = found(judged(usual(), with_first(*empty)), "degenerate output")
    assert finding.outcome is Outcome.FAIL
    assert finding.evidence[0] == "p-000: empty, the other side's has 20 tokens"
    assert found(judged(with_first(*empty), with_first(*empty)), "degenerate output").candidate == 0


@pytest.mark.parametrize(("n", "outcome"), [(15, Outcome.PASS), (16, Outcome.FAIL)])
def test_more_than_half_fails_without_a_test_on_few_prompts(n: int, outcome: Outcome) -> None:
    """9 of 16: p is 1/512, which the paired test alone lets pass."""
    ours = [long(i) for i in range(n)]
    theirs = [*[long(i, lambda _: 500) for i in range(9)], *ours[9:]]
    assert found(judged(ours, theirs), "degenerate output").outcome is outcome
    half = [*theirs[: n // 2], *ours[n // 2 :]]
    assert found(judged(ours, half), "degenerate output").outcome is Outcome.PASS, "half is not more than half"
    some = [*theirs[:2], *ours[2:]]
    assert found(judged(some, theirs), "degenerate output").outcome is Outcome.PASS, "2 of 16 is not under a tenth"


def test_the_rule_of_half_errs_less_often_than_the_paired_test() -> None:
    """Two independent sides with one rate of degenerate answers, whatever it is."""
    rates = np.linspace(0.01, 0.99, 99)
    for n in range(Limits().min_share_prompts, 200):
        both = stats.binom.sf(n // 2, n, rates) * stats.binom.cdf(np.ceil(0.1 * n) - 1, n, rates)
        assert both.max() < Limits().alpha


# 7 text and tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("caf\ufffd\ufffd au lait", "the candidate detokenises token by token"),
        (" café au lait", "the texts differ in white space only"),
        ("cafe au lait", "another tokenizer or detokeniser"),
    ],
)
def test_equal_tokens_with_another_text_fail(text: str, cause: str) -> None:
    ours = with_first(answer(0, text="café au lait"))
    verdict = judged(ours, with_first(answer(0, text=text)))
    finding = only_failure(verdict)
    assert finding.metric == "text and tokens"
    assert finding.evidence[0].startswith("p-000: the texts of equal tokens part at character ")
    assert verdict.causes[0].startswith(cause)


def test_texts_are_held_together_across_prompts() -> None:
    """The candidate's answer to prompt 1 has the tokens of the reference's to prompt 0."""
    other = answer(1, token_ids=answer(0).token_ids, text="something else")
    finding = only_failure(judged(usual(), with_first(answer(0), other)))
    assert finding.metric == "text and tokens"
    assert "in p-000" in finding.evidence[0]


def test_texts_are_held_together_within_the_candidate() -> None:
    twins = [answer(n, token_ids=(30, 31, 32), text=text) for n, text in enumerate(("one", "two"))]
    assert only_failure(judged(usual(), with_first(*twins))).metric == "text and tokens"


def test_no_tokens_have_no_text() -> None:
    broken = answer(0, token_ids=(), rows=None, text="out of nothing")
    finding = only_failure(judged(with_first(answer(0, token_ids=(), rows=None, text="")), with_first(broken)))
    assert finding.sentence == f"1 of {finding.n} answers wrong: 1 with a text and without a token"


def test_a_character_cut_in_two_at_the_end_and_absent_texts_are_no_fault() -> None:
    cut = with_first(answer(0, text="caf\ufffd"), answer(1, text="x"))
    theirs = with_first(answer(0, text="caf"), replace(answer(1), text=None))
    assert judged(cut, theirs).passed


# Data and refusals --------------------------------------------------------------------------------------------------


def test_too_little_data_is_inconclusive_and_can_still_fail() -> None:
    few = judged(usual(31), usual(31))
    assert few.outcome is Outcome.INCONCLUSIVE
    assert few.headline.endswith("decided by too little data: 31 prompts, at least 32 are needed")
    assert judged(usual(32), usual(32)).passed
    assert judged(usual(31), with_first(scored([], [NAN]), n=31)).outcome is Outcome.FAIL
    assert judged([], []).outcome is Outcome.INCONCLUSIVE
    assert judged(usual(5), [answer(n, length=5) for n in range(5)]).outcome is Outcome.INCONCLUSIVE


def test_other_inputs_are_refused() -> None:
    with pytest.raises(IncomparableError, match="only by the reference"):
        judged(usual(), usual()[1:])
    with pytest.raises(IncomparableError, match="different token ids"):
        judged(usual(), with_first(answer(0, prompt_token_ids=(1, 2, 3))))
    reference = recording(usual(), sampling=GREEDY)
    with pytest.raises(IncomparableError, match="workloads differ"):
        shape.check(reference, recording(usual(), sampling=SAMPLED), noise=None, limits=Limits())


def test_a_reference_that_gave_up_and_scores_of_given_tokens_are_refused() -> None:
    gave_up = answer(0, terminator=None, finish_reason=FinishReason.ABORT)
    with pytest.raises(IncomparableError, match=r"gave up 1 of 40 answers, first 'p-000'; record it again"):
        judged(with_first(gave_up), usual())
    forced = recording(usual(), forced_from="f" * 64)
    with pytest.raises(IncomparableError, match="scores given tokens"):
        shape.check(forced, forced, noise=None, limits=Limits())


# Laws ---------------------------------------------------------------------------------------------------------------

FAULTS = [
    *[broken for broken, _ in BROKEN_NUMBERS.values()],
    *[broken for sampling, broken, _ in WRONG_ENDS.values() if sampling is GREEDY],
]


@given(st.permutations(range(N)), st.permutations(range(N)), st.integers(0, len(FAULTS) - 1))
@settings(max_examples=25, deadline=None)
def test_the_order_of_completions_does_not_matter(left: list[int], right: list[int], fault: int) -> None:
    ours, theirs = usual(), with_first(FAULTS[fault], long(1, lambda i: 500 + i % 3))
    for n in (5, 6, 7):
        theirs[n] = answer(n, chosen=[NAN] * len(answer(n).token_ids))
        ours[n] = answer(n, token_ids=(30, 31, 32), text=f"text {n}")
    theirs[8] = answer(8, token_ids=(30, 31, 32), text="another")
    asked = recording(ours, sampling=GREEDY).workload
    verdicts = [
        shape.check(recording(a, asked=asked), recording(b, asked=asked), noise=None, limits=Limits())
        for a, b in ((ours, theirs), ([ours[i] for i in left], [theirs[i] for i in right]))
    ]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].outcome is Outcome.FAIL


@st.composite
def well_formed(draw: st.DrawFn) -> Recording:
    """Any answers that keep the laws: text follows tokens, ends follow the sampling parameters."""
    sampling = replace(
        GREEDY,
        max_tokens=40,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        min_tokens=draw(st.sampled_from([0, 2])),
        stop_token_ids=draw(st.sampled_from([(), (9,)])),
        stop=draw(st.sampled_from([(), ("#",)])),
        ignore_eos=draw(st.booleans()),
    )
    enders = [*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS, 3])]
    answers = []
    for number in range(draw(st.integers(0, 40))):
        ends = draw(st.sampled_from(["length", *(["token"] if enders else []), *(["string"] if sampling.stop else [])]))
        count = 40 if ends == "length" else draw(st.integers(sampling.min_tokens, 40))
        token_ids = [draw(st.integers(10, 12)) for _ in range(min(count, 3))] * 14
        made = completion(
            f"p-{number}",
            token_ids=token_ids[:count] if count < 40 or len(token_ids) >= 40 else [10] * 40,
            rows=draw(st.sampled_from(["plausible", None])),
            k=3,
            terminator=draw(st.sampled_from(enders)) if ends == "token" else None,
            finish_reason=STOP if ends != "length" else LENGTH,
            stop_reason="#" if ends == "string" else None,
        )
        answers.append(made)
    return recording(answers, sampling=sampling)


@given(well_formed())
@settings(max_examples=40, deadline=None)
def test_a_well_formed_recording_never_fails_against_itself(side: Recording) -> None:
    verdict = shape.check(side, side, noise=None, limits=Limits())
    assert verdict.outcome is (Outcome.PASS if len(side.completions) >= 32 else Outcome.INCONCLUSIVE) or any(
        f.metric == "output length" and f.outcome is Outcome.INCONCLUSIVE for f in verdict.findings
    )
    assert verdict.outcome is not Outcome.FAIL
    assert not verdict.warnings
