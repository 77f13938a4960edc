"""Where two answers part, and how far apart the engines are there: worked by hand, then as laws."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parity.divergence import Kind, Scale, WrongEnd, compare, compare_all, in_asked_order, off_argmax, wrong_end
from parity.recording import Completion, FinishReason, Terminator
from recordings import EOS, Rows, completion, plausible_row, recording, token_logprobs, workload

SCALE = Scale(tie_nats=1e-6, benign_nats=1.5, mismatch_nats=6.25)
A, B, C = 50, 51, 52
NAN = float("nan")


def step(token_id: int, row: list[tuple[int, float]], *, chosen: float | None = None) -> Completion:
    """An answer of one token, and its distribution."""
    return completion(
        token_ids=[token_id], rows=[row], chosen=[dict(row)[token_id] if chosen is None else chosen], terminator=None
    )


def parting(left: float, right: float) -> tuple[Completion, Completion]:
    """The reference prefers A by `left` nats, the candidate B by `right`."""
    return step(A, [(A, -0.5), (B, -0.5 - left)]), step(B, [(B, -0.5), (A, -0.5 - right)])


# By hand ------------------------------------------------------------------------------------------------------------


def test_slack_of_two_two_token_distributions_by_hand() -> None:
    """Reference: P(A) = 0.6, P(B) = 0.4; candidate: P(A) = 0.3, P(B) = 0.7.

    S = ln(0.6 / 0.4) + ln(0.7 / 0.3) = ln 1.5 + ln 2.3333 = 0.4055 + 0.8473 = 1.2528 nats. The margin A over B moves
    from ln 1.5 to ln(3/7), which is the same 1.2528 nats.
    """
    reference = step(A, [(A, math.log(0.6)), (B, math.log(0.4))])
    candidate = step(B, [(B, math.log(0.7)), (A, math.log(0.3))])
    pair = compare(reference, candidate, SCALE)
    assert pair.slack_nats == pytest.approx(1.252763, abs=1e-6)
    assert pair.halves[0] == pytest.approx(math.log(1.5))
    assert pair.halves[1] == pytest.approx(math.log(7 / 3))
    assert (pair.kind, pair.position, pair.outside, pair.is_bound) == (Kind.BENIGN, 0, False, False)


def test_the_first_divergence_counts_and_later_ones_do_not() -> None:
    ours = completion(token_ids=[30, 31, 32])
    theirs = completion(token_ids=[30, 32, 99], rows=[plausible_row(30), [(32, -0.25), (31, -1.25)], plausible_row(99)])
    pair = compare(ours, theirs, SCALE)
    assert (pair.position, pair.slack_nats) == (1, 2.0 + 1.0)


def test_the_same_answer_is_identical() -> None:
    pair = compare(completion(), completion(), SCALE)
    assert (pair.kind, pair.position, pair.slack_nats, pair.halves) == (Kind.IDENTICAL, None, None, (None, None))
    hidden = completion(rows=None)
    assert compare(hidden, hidden, SCALE).kind is Kind.IDENTICAL


@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [
        (0.0, 0.0, Kind.TIE),
        (2.0**-21, 0.0, Kind.TIE),
        (2.0**-19, 0.0, Kind.BENIGN),
        (1.0, 0.5, Kind.BENIGN),
        (1.0, 0.5 + 2.0**-20, Kind.SUSPICIOUS),
        (6.25, 0.0, Kind.SUSPICIOUS),
        (0.0, 6.25, Kind.SUSPICIOUS),
        (6.25, 2.0**-18, Kind.MISMATCH),
        (40.0, 40.0, Kind.MISMATCH),
    ],
)
def test_a_boundary_belongs_to_the_milder_kind(left: float, right: float, kind: Kind) -> None:
    assert compare(*parting(left, right), SCALE).kind is kind


def test_a_token_outside_the_top_k_is_a_mismatch_and_a_lower_bound() -> None:
    """The candidate ranks A below its 2nd best, which is 0.25 nats down: S is at least 0.125 + 0.25."""
    reference = step(A, [(A, -0.5), (B, -0.625)])
    candidate = step(B, [(B, -0.5), (C, -0.75)])
    pair = compare(reference, candidate, SCALE)
    assert (pair.kind, pair.outside, pair.is_bound, pair.slack_nats) == (Kind.MISMATCH, True, True, 0.375)


def test_a_masked_token_is_outside_and_its_slack_is_finite() -> None:
    """An engine may return -inf for a token that it barred; the last finite entry bounds the slack."""
    reference = step(A, [(A, -0.5), (B, -0.625)])
    candidate = step(B, [(B, -0.5), (C, -0.75), (A, -math.inf)])
    pair = compare(reference, candidate, SCALE)
    assert (pair.kind, pair.outside, pair.slack_nats) == (Kind.MISMATCH, True, 0.375)


def test_rows_that_an_engine_left_short_end_where_they_end() -> None:
    reference = step(A, [(A, -0.5), (B, -0.625)])
    short = completion(token_ids=[B], rows=[[(B, -0.5)]], terminator=None, k=5)
    pair = compare(reference, short, SCALE)
    assert (pair.kind, pair.slack_nats) == (Kind.MISMATCH, 0.125)


# Ends ---------------------------------------------------------------------------------------------------------------


def stopping(row: Rows | None, *, token_id: int = EOS) -> Completion:
    """An answer without a body."""
    logprobs = None if row is None else token_logprobs([token_id], row)
    return completion(token_ids=[], terminator=Terminator(token_id=token_id, logprobs=logprobs))


def test_a_stop_against_a_token_is_judged_by_the_stops_distribution() -> None:
    """The reference stops, 0.25 nats before A; the candidate takes A, 0.5 nats before the stop."""
    stops = stopping([[(EOS, -0.5), (A, -0.75)]])
    goes_on = completion(token_ids=[A, B], rows=[[(A, -0.25), (EOS, -0.75)], plausible_row(B)], terminator=None)
    for pair in compare(stops, goes_on, SCALE), compare(goes_on, stops, SCALE):
        assert (pair.kind, pair.position, pair.slack_nats) == (Kind.BENIGN, 0, 0.75)
        assert wrong_end(pair, max_tokens=2) is None


def test_a_hidden_stop_leaves_the_other_half_as_a_bound() -> None:
    goes_on = completion(token_ids=[A], rows=[[(A, -0.25), (EOS, -2.25)]], terminator=None)
    pair = compare(stopping(None), goes_on, SCALE)
    assert (pair.kind, pair.slack_nats, pair.halves) == (Kind.SUSPICIOUS, 2.0, (None, 2.0))
    assert pair.is_bound
    assert not pair.outside


def test_two_different_stop_tokens_diverge() -> None:
    pair = compare(stopping([[(EOS, -0.5), (9, -1.0)]]), stopping([[(9, -0.5), (EOS, -1.0)]], token_id=9), SCALE)
    assert (pair.kind, pair.slack_nats) == (Kind.BENIGN, 1.0)


def test_an_ignored_stop_token_is_no_tie() -> None:
    """Both chose the stop token; the candidate kept it as text and went on. S would be 0."""
    stops = completion(token_ids=[A], terminator=EOS)
    goes_on = completion(token_ids=[A, EOS, B], terminator=None)
    pair = compare(stops, goes_on, SCALE)
    assert (pair.kind, pair.position, pair.slack_nats) == (Kind.LENGTH, 1, None)
    assert wrong_end(pair, max_tokens=3) is WrongEnd.PAST_STOP
    assert wrong_end(compare(goes_on, stops, SCALE), max_tokens=3) is WrongEnd.UNASKED


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.ABORT])
def test_the_same_tokens_with_another_finish_reason_are_not_identical(reason: FinishReason) -> None:
    ours = completion(terminator=None)
    assert compare(ours, replace(ours, finish_reason=reason), SCALE).kind is Kind.LENGTH
    stopped = completion()
    assert compare(stopped, replace(stopped, finish_reason=FinishReason.LENGTH), SCALE).kind is Kind.LENGTH


@pytest.mark.parametrize(
    ("reference", "candidate", "end"),
    [
        ((3, FinishReason.LENGTH), (3, FinishReason.LENGTH), None),
        ((4, FinishReason.LENGTH), (3, FinishReason.LENGTH), WrongEnd.CUT_OFF),
        ((3, FinishReason.LENGTH), (4, FinishReason.LENGTH), WrongEnd.REFERENCE_CUT_OFF),
        ((4, FinishReason.LENGTH), (5, FinishReason.LENGTH), WrongEnd.TOO_LONG),
        ((4, FinishReason.LENGTH), (5, FinishReason.STOP), WrongEnd.TOO_LONG),
        ((4, FinishReason.LENGTH), (3, FinishReason.ABORT), WrongEnd.ABORTED),
        ((4, FinishReason.LENGTH), (3, FinishReason.STOP), WrongEnd.UNASKED),
        ((3, FinishReason.STOP), (4, FinishReason.LENGTH), WrongEnd.REFERENCE_CUT_OFF),
    ],
)
def test_ends_without_a_stop_token(
    reference: tuple[int, FinishReason], candidate: tuple[int, FinishReason], end: WrongEnd | None
) -> None:
    """max_tokens is 4; (3, length) on both sides is the end of the context window."""
    ours, theirs = (
        completion(token_ids=range(30, 30 + count), terminator=None, finish_reason=reason)
        for count, reason in (reference, candidate)
    )
    pair = compare(ours, theirs, SCALE)
    assert pair.kind is (Kind.IDENTICAL if end is None else Kind.LENGTH)
    assert wrong_end(pair, max_tokens=4) is end


def test_an_answer_cut_off_after_a_benign_divergence_is_found() -> None:
    ours = completion(token_ids=[A, 30, 31], rows=[[(A, -0.5), (B, -0.5)], plausible_row(30), plausible_row(31)])
    ours = replace(ours, terminator=None, finish_reason=FinishReason.LENGTH)
    theirs = completion(token_ids=[B, 30], rows=[[(B, -0.5), (A, -0.5)], plausible_row(30)], terminator=None)
    pair = compare(ours, theirs, SCALE)
    assert pair.kind is Kind.TIE
    assert wrong_end(pair, max_tokens=3) is WrongEnd.CUT_OFF


# Missing and broken numbers -----------------------------------------------------------------------------------------


def test_without_log_probabilities_nothing_is_known() -> None:
    pair = compare(completion(token_ids=[A], rows=None), completion(token_ids=[B], rows=None), SCALE)
    assert (pair.kind, pair.position, pair.slack_nats) == (Kind.UNKNOWN, 0, None)
    no_top = completion(token_ids=[A], rows=[[]], chosen=[-0.5], k=0)
    assert compare(no_top, completion(token_ids=[B], rows=None), SCALE).kind is Kind.UNKNOWN


def test_without_one_sides_log_probabilities_the_other_bounds() -> None:
    pair = compare(parting(2.0, 1.0)[0], completion(token_ids=[B], rows=None, terminator=None), SCALE)
    assert (pair.kind, pair.slack_nats, pair.halves) == (Kind.SUSPICIOUS, 2.0, (2.0, None))


def test_a_slack_that_is_not_a_number_is_never_a_tie() -> None:
    broken = step(B, [(B, NAN), (A, NAN)])
    assert compare(broken, replace(broken, token_ids=(A,)), SCALE).kind is Kind.UNKNOWN
    assert compare(parting(8.0, 0.0)[0], broken, SCALE).kind is Kind.MISMATCH
    broken = step(B, [(B, -0.5), (A, -0.5)], chosen=NAN)
    assert compare(parting(0.0, 0.0)[0], broken, SCALE).halves == (0.0, None)


def test_a_token_that_its_own_engine_disowns_cancels_nothing() -> None:
    """The reference prefers A by 8 nats and so does the candidate, which emits B all the same: 8 - 8 is not a tie."""
    reference, _ = parting(8.0, 0.0)
    sampled = step(B, [(A, -0.5), (B, -8.5)])
    pair = compare(reference, sampled, SCALE)
    assert (pair.kind, pair.slack_nats) == (Kind.MISMATCH, 8.0)


def test_off_argmax_counts_steps_places_and_stop_tokens() -> None:
    rows = [plausible_row(30), [(90, -0.5), (31, -1.5)], [(90, -0.25), (32, -1.5)]]
    late = Terminator(token_id=EOS, logprobs=token_logprobs([EOS], [[(90, -0.5), (EOS, -4.5)]]))
    found = off_argmax(
        [completion("a", rows=rows), completion("b"), completion("c", terminator=late), completion("d", rows=None)],
        tolerance_nats=1.0,
    )
    assert (found.steps, found.off, found.off_stops, found.not_numbers) == (4 + 4 + 4 + 1, 2, 1, 0)
    assert found.witnesses == (
        "a, token 2: chosen 1.25 nats below its own most probable",
        "c, stop token 3: chosen 4.00 nats below its own most probable",
    )
    assert off_argmax([completion(rows=rows)], tolerance_nats=1.25).off == 0


def test_off_argmax_takes_nan_for_off_and_needs_no_top_k() -> None:
    broken = step(A, [(A, NAN), (B, NAN)])
    found = off_argmax([broken] * 4, tolerance_nats=1.0, witnesses=2)
    assert (found.steps, found.off, found.not_numbers) == (4, 4, 4)
    assert found.witnesses == ("p-001, token 0: its log-probability is not a number",) * 2
    assert off_argmax([step(A, [(B, -0.5), (A, -math.inf)])], tolerance_nats=1.0).off == 1
    no_top = completion(token_ids=[A], rows=[[]], chosen=[-0.5], k=0, terminator=None)
    assert off_argmax([no_top], tolerance_nats=1.0).steps == 0


def test_pairs_come_in_the_order_of_asking() -> None:
    asked = workload(["b", "a", "c"])
    side = recording([completion(i) for i in "cab"], asked=asked)
    assert [c.id for c in in_asked_order(side)] == ["b", "a", "c"]
    assert [p.candidate.id for p in compare_all(side, side, SCALE)] == ["b", "a", "c"]


# Laws ---------------------------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5)


def greedy_step(logits: list[float]) -> tuple[Completion, list[float]]:
    """An engine that answers one token, and its full log-probabilities."""
    norm = math.log(sum(math.exp(x) for x in logits))
    values = [x - norm for x in logits]
    row = sorted(enumerate(values), key=lambda entry: -entry[1])
    return completion(token_ids=[row[0][0]], rows=[row], terminator=None), values


@given(left=LOGITS, right=LOGITS)
def test_slack_is_the_margin_shift_never_negative_and_symmetric(left: list[float], right: list[float]) -> None:
    (reference, ours), (candidate, theirs) = greedy_step(left), greedy_step(right)
    a, b = reference.token_ids[0], candidate.token_ids[0]
    assume(a != b)
    pair, mirrored = compare(reference, candidate, SCALE), compare(candidate, reference, SCALE)
    assert pair.slack_nats is not None
    assert pair.slack_nats >= 0.0
    assert mirrored.slack_nats == pair.slack_nats
    assert mirrored.kind is pair.kind
    assert pair.slack_nats == pytest.approx(abs((ours[a] - ours[b]) - (theirs[a] - theirs[b])), abs=1e-5)
    assert off_argmax([reference, candidate], tolerance_nats=0.0).off == 0


@given(left=LOGITS, right=LOGITS, k=st.integers(1, 5))
def test_a_smaller_top_k_only_lowers_the_slack(left: list[float], right: list[float], k: int) -> None:
    (reference, _), (candidate, _) = greedy_step(left), greedy_step(right)
    assume(reference.token_ids != candidate.token_ids)
    full = compare(reference, candidate, SCALE)

    def cut(answer: Completion) -> Completion:
        assert answer.logprobs is not None
        row = answer.logprobs.row(0)
        return completion(token_ids=answer.token_ids, rows=[row[:k]], chosen=[row[0][1]], terminator=None)

    bound = compare(cut(reference), cut(candidate), SCALE)
    assert full.slack_nats is not None
    assert bound.slack_nats is not None
    assert bound.slack_nats <= full.slack_nats
    assert bound.outside or bound.slack_nats == full.slack_nats
    assert not bound.outside or bound.kind is Kind.MISMATCH
