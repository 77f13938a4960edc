"""Prompt by prompt: what changed, where the answers part, and what that means."""

from __future__ import annotations

import math
import unicodedata
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greedy_cases import (
    BENIGN,
    MISMATCH,
    OTHER,
    SAMPLING,
    SIGMA,
    SUSPICIOUS,
    TOKENS,
    answers,
    many,
    recordings_of,
    short_by_one,
)
from lockstep_cases import World, sides
from parity import lockstep
from parity.differences import PromptDifference, compare, meaning, most_telling_first, tally, visible
from parity.divergence import Kind
from parity.errors import IncomparableError
from parity.recording import NO_TOKEN, FinishReason, Recording
from recordings import BOS, EOS, completion, plausible_row, recording
from report_cases import ANY_TEXT, answer, choice, difference, identical


def text_of(token_id: int) -> str | None:
    return f" t{token_id}"


def compared(
    reference: Recording, candidate: Recording, *, scores: Recording | None = None
) -> tuple[PromptDifference, ...]:
    return compare(reference, candidate, scores=scores, scale_sigma_nats=SIGMA, token_text=text_of)


def of_texts(ours: str, theirs: str) -> PromptDifference:
    left = recording([completion(text=ours)])
    right = recording([completion(text=theirs, token_ids=(30, 31, 33))])
    return compared(left, right)[0]


# The same -----------------------------------------------------------------------------------------------------------


@given(texts=st.lists(st.tuples(st.lists(st.integers(3, 40), max_size=4), ANY_TEXT), min_size=1, max_size=5))
def test_a_recording_compared_with_itself_has_no_differences(texts: list[tuple[list[int], str]]) -> None:
    one = recording([completion(f"p-{n}", token_ids=ids, text=text) for n, (ids, text) in enumerate(texts)])
    found = compared(one, one)
    assert [d.id for d in found] == [c.id for c in one.completions]
    for each in found:
        assert (each.kind, each.position, each.slack_nats, each.differs) == (Kind.IDENTICAL, None, None, False)
        assert each.reference == each.candidate
        assert each.reference.common == len(each.reference.text)
        assert (each.reference.chosen, each.reference.top) == (None, ())
    assert most_telling_first(found) == ()


def test_the_same_tokens_with_another_text_differ() -> None:
    left, right = recording([completion(text="a b")]), recording([completion(text="ab")])
    (found,) = compared(left, right)
    assert (found.kind, found.differs, found.reference.common) == (Kind.IDENTICAL, True, 1)
    assert "turn tokens into text differently" in meaning(found)


# Where they part ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slack", "kind"),
    [(0.0, Kind.TIE), (BENIGN, Kind.BENIGN), (SUSPICIOUS, Kind.SUSPICIOUS), (MISMATCH, Kind.MISMATCH)],
)
def test_a_divergence_is_weighed_as_by_the_greedy_check(slack: float, kind: Kind) -> None:
    (found,) = compared(*recordings_of([answers("p", slack)]))
    assert (found.kind, found.position, found.slack_nats, found.sigmas) == (kind, 1, slack, slack / SIGMA)
    assert found.differs
    assert not found.is_bound


def test_both_sides_tables_are_shown_at_the_divergence() -> None:
    (found,) = compared(*recordings_of([answers("p", 0.5)]))
    ours, theirs = found.reference, found.candidate
    assert ours.chosen == choice(TOKENS[1], " t31", -0.5)
    assert theirs.chosen == choice(OTHER, " t90", -0.5)
    assert [(c.token_id, c.logprob_nats) for c in ours.top] == [(31, -0.5), (90, -0.75), (99, -20.25)]
    assert [c.token_id for c in theirs.top] == [90, 31, 99]
    assert (ours.tokens, ours.finish_reason) == (3, FinishReason.LENGTH)


def test_a_stop_token_counts_as_a_choice() -> None:
    stops = completion(token_ids=(30,), terminator=EOS)
    goes_on = completion(token_ids=(30, 31), rows=[plausible_row(30), [(31, -0.1), (EOS, -0.2), (NO_TOKEN, -9.0)]])
    (found,) = compared(recording([stops]), recording([goes_on]))
    assert found.position == 1
    assert found.reference.chosen == choice(EOS, " t2", -0.25)
    assert [c.token_id for c in found.reference.top] == [EOS, EOS + 1, EOS + 2]
    assert [c.token_id for c in found.candidate.top] == [31, EOS]


def test_an_answer_that_had_ended_chose_nothing() -> None:
    (found,) = compared(*recordings_of([short_by_one("p")]))
    assert (found.kind, found.position, found.slack_nats) == (Kind.LENGTH, 2, None)
    assert found.reference.chosen == choice(TOKENS[2], " t32", -0.25)
    assert (found.candidate.chosen, found.candidate.top) == (None, ())


def test_without_log_probabilities_a_divergence_cannot_be_weighed() -> None:
    left = recording([completion(rows=None)])
    right = recording([completion(rows=None, token_ids=(30, 99, 32))])
    (found,) = compared(left, right)
    assert (found.kind, found.slack_nats, found.sigmas) == (Kind.UNKNOWN, None, None)
    assert found.reference.chosen is not None
    assert math.isnan(found.reference.chosen.logprob_nats)
    assert found.reference.top == ()


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {"min_tokens": 2}])
def test_choices_that_log_probabilities_do_not_explain_are_not_weighed(changes: dict[str, float]) -> None:
    (found,) = compared(*recordings_of([answers("p", MISMATCH)], sampling=replace(SAMPLING, **changes)))  # type: ignore[arg-type]
    assert (found.kind, found.slack_nats, found.sigmas, found.is_bound) == (Kind.UNKNOWN, None, None, False)
    assert found.reference.chosen is not None


def test_a_token_outside_the_others_top_makes_the_slack_a_bound() -> None:
    left = recording([completion(token_ids=(30, 31))])
    right = recording([completion(token_ids=(30, 77))])
    (found,) = compared(left, right)
    assert (found.kind, found.is_bound) == (Kind.MISMATCH, True)
    assert "at least a factor of" in meaning(found)


def test_prompts_come_in_the_order_of_asking() -> None:
    reference, candidate = recordings_of(many([BENIGN, None, MISMATCH]))
    shuffled = replace(candidate, completions=candidate.completions[::-1])
    assert [d.id for d in compared(reference, shuffled)] == ["p-001", "p-002", "p-003"]


def test_the_prompt_is_shown_as_the_model_saw_it() -> None:
    def prompt(text: str | None, token_text: object = text_of) -> str:
        one = recording([completion(prompt_text=text, prompt_token_ids=(BOS, 20))])
        return compare(one, one, scores=None, scale_sigma_nats=1.0, token_text=token_text)[0].prompt  # type: ignore[arg-type]

    assert prompt("<s>Hello") == "<s>Hello"
    assert prompt(None) == " t1 t20"
    assert prompt(None, lambda i: None if i == BOS else "x") == "[2 token ids]"


@given(ours=ANY_TEXT, theirs=ANY_TEXT, shared=ANY_TEXT)
def test_the_mark_lies_where_the_texts_part(ours: str, theirs: str, shared: str) -> None:
    found = of_texts(shared + ours, shared + theirs)
    left, right, common = found.reference.text, found.candidate.text, found.reference.common
    assert common == found.candidate.common
    assert left[:common] == right[:common]
    torn = [c for c in (left[common : common + 1] + right[common : common + 1]) if unicodedata.category(c)[0] == "M"]
    assert not torn or common == 0 or left == right
    if (left + right).isascii():
        assert left[common : common + 1] != right[common : common + 1] or left == right


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [
        ("abc", "abd", 2),
        ("ab", "abc", 2),
        ("same", "same", 4),
        ("e\u0301", "e", 0),
        ("xe\u0301\u0323", "xe\u0301\u0324", 1),
        ("a👩\u200d🔬", "a👩\u200d🚀", 1),
    ],
)
def test_a_character_keeps_its_accents(ours: str, theirs: str, common: int) -> None:
    assert of_texts(ours, theirs).reference.common == common


# Scores -------------------------------------------------------------------------------------------------------------


def test_each_prompt_has_its_divergence_a_token() -> None:
    reference, candidate, _ = sides(World(prompts=3), fault=0.3)
    plain = [d.kl_nats for d in compared(reference, reference)]
    assert plain == [None] * 3
    found = [d.kl_nats for d in compared(reference, reference, scores=candidate)]
    same = [d.kl_nats for d in compared(reference, reference, scores=reference)]
    steps = lockstep.measure(reference, candidate)
    assert found == [pytest.approx(steps.only([id_]).kl_nats.mean()) for id_ in steps.prompt_ids]
    assert same == [0.0] * 3


def test_a_prompt_without_scores_has_no_divergence_and_a_broken_one_is_not_a_number() -> None:
    reference, candidate, _ = sides(World(prompts=3))
    one, other, _ = candidate.completions
    assert other.logprobs is not None
    not_numbers = memoryview(array("f", [math.nan] * len(other.logprobs)))
    broken = replace(other, logprobs=replace(other.logprobs, chosen=not_numbers))
    some = replace(candidate, completions=(one, broken))
    first, second, third = (d.kl_nats for d in compared(reference, reference, scores=some))
    assert first is not None
    assert math.isfinite(first)
    assert second is not None
    assert math.isnan(second)
    assert third is None


# What cannot be compared --------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused_in_a_sentence() -> None:
    one, other = recording([completion("a")]), recording([completion("b")])
    with pytest.raises(IncomparableError, match="prompt 'a' is answered only by the reference"):
        compared(one, other)
    with pytest.raises(IncomparableError, match="reached the engines as different token ids"):
        compared(one, recording([completion("a", prompt_token_ids=(BOS, 5))]))
    longer = replace(SAMPLING, max_tokens=9)
    with pytest.raises(IncomparableError, match="max_tokens 64 vs 9"):
        compared(one, recording([completion("a")], sampling=longer))


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_scores_of_given_tokens_are_no_answers(side: str) -> None:
    answered, scored = recording([completion()]), recording([completion(text="")], forced_from="0" * 64)
    pair = (scored, answered) if side == "reference" else (answered, scored)
    with pytest.raises(IncomparableError, match=f"the {side} .* scores tokens that it was given"):
        compared(*pair)


def test_scores_of_other_tokens_are_refused() -> None:
    one = recording([completion()])
    with pytest.raises(IncomparableError, match="scored different tokens"):
        compared(one, one, scores=recording([completion(token_ids=(40, 41, 42))]))


# Words --------------------------------------------------------------------------------------------------------------


def test_each_kind_has_its_meaning() -> None:
    said = {kind: meaning(difference(kind=kind, slack_nats=math.log(3.0), sigmas=8.0)) for kind in Kind}
    assert len(set(said.values())) == len(Kind)
    assert said[Kind.SUSPICIOUS].startswith("suspicious: ")
    assert "a factor of 3 apart (1.1 nats), 8 times the rounding noise" in said[Kind.BENIGN]
    assert meaning(identical()) == "the same tokens and the same text"


def test_a_token_that_was_passed_over_is_no_rounding() -> None:
    sampled = answer("one", chosen=choice(9, None, -0.5 - math.log(5.0)))
    said = meaning(difference(candidate=sampled))
    assert said.startswith("no greedy decoding: the candidate took a token although it finds its own first 5 times")
    assert meaning(difference(reference=sampled)).startswith("no greedy decoding: the reference ")
    assert meaning(difference(candidate=sampled, kind=Kind.UNKNOWN)).startswith("cannot be weighed")
    nearly = answer("one", chosen=choice(9, None, -0.5 - math.log(1.9)))
    assert meaning(difference(candidate=nearly)).startswith("rounding")


@pytest.mark.parametrize("slack", [1e9, math.inf])
def test_no_slack_is_too_large_to_be_said(slack: float) -> None:
    assert "nats" in meaning(difference(kind=Kind.MISMATCH, slack_nats=slack, sigmas=slack))


def test_a_tally_counts_every_prompt_once() -> None:
    kinds = [Kind.BENIGN, Kind.BENIGN, Kind.MISMATCH, Kind.LENGTH]
    found = [identical(), *(difference(kind=kind) for kind in kinds), replace(identical(), candidate=answer("other"))]
    assert tally(found) == (
        "6 prompts: 1 the same, 5 differ (1 in the text only, not in the tokens, 1 in where the answer ends, 1 by more "
        "than rounding can, 2 by rounding)"
    )
    assert tally([identical()]) == "1 prompt: 1 the same, none differs"
    assert tally([difference()]) == "1 prompt: 0 the same, 1 differs (1 by rounding)"
    assert tally([]) == "0 prompts: 0 the same, none differs"


def test_the_most_telling_prompt_comes_first() -> None:
    found = [
        identical(),
        difference(id="unknown", kind=Kind.UNKNOWN, slack_nats=None),
        difference(id="small", slack_nats=0.1),
        difference(id="large", slack_nats=3.0),
        difference(id="end", kind=Kind.LENGTH, slack_nats=None),
    ]
    assert [d.id for d in most_telling_first(found)] == ["end", "large", "small", "unknown"]


@given(text=ANY_TEXT)
def test_every_character_is_made_visible(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    shown.encode()
    assert visible(shown) == shown
    assert "".join(visible(c) for c in text) == shown
    kept = visible(text, keep="\n")
    assert kept.count("\n") == text.count("\n")


def test_escapes_are_the_familiar_ones() -> None:
    assert visible("a\tb\x1b[0m\u202e\ud800é漢\n") == r"a\tb\x1b[0m\u202e\ud800é漢\n"
