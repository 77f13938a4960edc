"""From verdicts to one decision: which of three, and the strongest evidence first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.decision import Advice, decide
from parity.diagnose import Confidence, Diagnosis
from parity.verdict import Finding, Outcome, Verdict

PASS, FAIL, UNSURE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE


def finding(
    sentence: str,
    *,
    outcome: Outcome = FAIL,
    candidate: float | None = None,
    delta: float | None = None,
    margin: float | None = None,
) -> Finding:
    return Finding(
        metric=sentence,
        outcome=outcome,
        sentence=sentence,
        unit="nats",
        reference=None,
        candidate=candidate,
        delta=delta,
        interval=None,
        limit="a rule",
        n=40,
        evidence=(),
        margin=margin,
    )


def verdict(check: str, outcome: Outcome, *findings: Finding) -> Verdict:
    return Verdict(
        check=check,
        reference="old",
        candidate="new",
        outcome=outcome,
        headline=f"what {check} says",
        findings=findings,
        causes=(),
        changed=(),
        warnings=(),
    )


def cause(confidence: Confidence) -> Diagnosis:
    return Diagnosis(confidence=confidence, sentence="a wrong mask", evidence=())


def test_equivalence_shown_by_every_check_is_an_upgrade() -> None:
    found = decide([verdict(check, PASS) for check in ("inputs", "shape", "greedy", "lockstep", "laws")])
    assert found.advice is Advice.UPGRADE
    assert found.sentence == "all 5 checks passed"
    # What shows most that two engines are the same comes first, whatever the order of asking.
    assert found.evidence == ("lockstep: what lockstep says", "greedy: what greedy says", "laws: what laws says")


def test_a_single_check_is_said_to_be_the_only_one() -> None:
    assert decide([verdict("inputs", PASS)]).sentence == "the only check, inputs, passed"


def test_one_failure_is_enough_to_hold() -> None:
    found = decide([verdict("inputs", PASS), verdict("greedy", FAIL, finding("one mismatch")), verdict("laws", UNSURE)])
    assert found.advice is Advice.HOLD
    assert found.sentence == "1 of 3 checks failed: greedy"
    assert found.evidence == ("greedy: one mismatch",)


def test_what_is_inconclusive_is_undecided_and_says_why() -> None:
    found = decide([verdict("inputs", PASS), verdict("greedy", UNSURE)])
    assert found.advice is Advice.UNDECIDED
    assert found.sentence == "nothing failed, and 1 of 2 checks is undecided: greedy"
    assert found.evidence == ("greedy: what greedy says",)


def test_what_could_not_judge_never_counts_as_passed() -> None:
    found = decide([verdict("inputs", PASS), verdict("greedy", UNSURE)], could_not={"lockstep": "no scores"})
    assert found.advice is Advice.UNDECIDED
    assert found.sentence == "nothing failed, and 2 of 3 checks are undecided: greedy, lockstep"
    assert found.evidence == ("lockstep could not judge: no scores", "greedy: what greedy says")


def test_nothing_judged_is_undecided() -> None:
    found = decide([])
    assert (found.advice, found.sentence, found.evidence) == (Advice.UNDECIDED, "nothing was judged", ())


@pytest.mark.parametrize("confidence", [Confidence.CERTAIN, Confidence.LIKELY])
def test_a_cause_that_is_known_comes_first_with_how_sure_it_is(confidence: Confidence) -> None:
    failed = verdict("shape", FAIL, finding("a law is broken"))
    found = decide([failed], diagnosis=cause(confidence))
    assert found.evidence == (f"a wrong mask ({confidence.value})", "shape: a law is broken")


def test_a_cause_that_nobody_knows_is_no_evidence() -> None:
    failed = verdict("shape", FAIL, finding("a law is broken"))
    assert decide([failed], diagnosis=cause(Confidence.NONE)).evidence == ("shape: a law is broken",)


def test_the_finding_farthest_beyond_its_limit_comes_first_one_a_check() -> None:
    """Each in units of its own limit: the delta where there is one, else the candidate's number."""
    greedy = verdict(
        "greedy",
        FAIL,
        finding("twice the limit", candidate=4.0, margin=2.0),
        finding("ninefold but passed", outcome=PASS, candidate=18.0, margin=2.0),
    )
    lockstep = verdict(
        "lockstep",
        FAIL,
        finding("threefold", candidate=3.0, margin=1.0),
        finding("fourfold downwards", candidate=1.0, delta=-4.0, margin=1.0),
    )
    assert decide([greedy, lockstep]).evidence == ("lockstep: fourfold downwards", "greedy: twice the limit")


def test_a_law_has_no_measure_and_comes_before_every_number() -> None:
    measured = verdict("lockstep", FAIL, finding("a million", candidate=1e6, margin=1.0))
    law = verdict("shape", FAIL, finding("once", candidate=2.0, margin=1.0), finding("a law is broken", candidate=0.0))
    nothing_allowed = verdict("greedy", FAIL, finding("none is allowed", candidate=1.0, margin=0.0))
    broken = verdict("decode", FAIL, finding("no number", candidate=math.nan, margin=1.0))
    found = decide([measured, law, nothing_allowed, broken], diagnosis=None)
    assert found.evidence == ("shape: a law is broken", "greedy: none is allowed", "decode: no number")


def test_a_failure_without_a_finding_is_shown_by_its_headline() -> None:
    assert decide([verdict("greedy", FAIL)]).evidence == ("greedy: what greedy says",)


@given(
    st.lists(st.sampled_from(Outcome), max_size=6),
    st.dictionaries(st.sampled_from(["logic", "decode"]), st.just("no scores")),
    st.none() | st.sampled_from(Confidence).map(cause),
)
def test_the_three_decisions(
    outcomes: Sequence[Outcome], could_not: Mapping[str, str], diagnosis: Diagnosis | None
) -> None:
    """HOLD exactly where something failed; UPGRADE exactly where everything that was asked passed, and it was asked."""
    verdicts = [verdict(f"check-{n}", outcome, finding("one two")) for n, outcome in enumerate(outcomes)]
    found = decide(verdicts, could_not=could_not, diagnosis=diagnosis)
    assert (found.advice is Advice.HOLD) == (FAIL in outcomes)
    assert (found.advice is Advice.UPGRADE) == (set(outcomes) == {PASS} and not could_not)
    assert len(found.evidence) <= 3
    assert bool(found.evidence) == bool(verdicts or could_not)


@given(st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)), min_size=1, max_size=3))
def test_evidence_falls_in_units_of_the_limit(pairs: Sequence[tuple[float, float]]) -> None:
    verdicts = [
        verdict(f"check-{n}", FAIL, finding("x", delta=value, margin=margin)) for n, (value, margin) in enumerate(pairs)
    ]
    order = [int(piece.split(":")[0].removeprefix("check-")) for piece in decide(verdicts).evidence]
    excesses = [pairs[n][0] / pairs[n][1] for n in order]
    assert excesses == sorted(excesses, reverse=True)
    assert sorted(order) == list(range(len(pairs)))
