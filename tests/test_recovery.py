"""What is kept of the accuracy: rows worked by hand, intervals that are those of the paired difference, and how far
the distributions moved, computed another way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accuracy_cases import edited, right, run, scores, with_text
from lockstep_cases import World, sides
from parity import judge, lockstep, recovery
from parity.checks import accuracy
from parity.checks.accuracy import Limits
from parity.errors import IncomparableError
from parity.evals import TaskRun
from parity.judge import Evidence
from parity.paired import Counts
from parity.recording import Completion, Recording
from parity.recovery import Moved, Recovery
from parity.verdict import Policy
from recordings import completion, recording, token_logprobs

TAIL = 0.05


def kept(reference: Sequence[TaskRun], candidate: Sequence[TaskRun], *, tail: float = TAIL) -> Recovery:
    found = recovery.of(reference, candidate, tail=tail, moved=None)
    assert found is not None
    return found


# The table ----------------------------------------------------------------------------------------------------------


def test_one_task_worked_by_hand() -> None:
    """Of ten documents the reference gets 0 to 7 right; the candidate loses 5, 6, 7 and wins 8."""
    found = kept([run("arc", [1.0] * 8 + [0.0] * 2)], [run("arc", [1.0] * 5 + [0.0] * 3 + [1.0, 0.0])])
    (row,) = found.tasks
    assert (row.name, row.n, row.lost, row.won) == ("arc", 10, 3, 1)
    assert (row.reference, row.candidate) == pytest.approx((0.8, 0.6))
    assert row.recovery == pytest.approx(0.75)
    assert found.total == replace(row, name="all tasks")
    assert found.confidence == pytest.approx(0.9)
    assert found.moved is None


def test_the_interval_is_that_of_the_paired_difference() -> None:
    """At its ends, as drops, the score test of the same counts leaves out just the tail on either side."""
    n, lost = 300, right(300, 9)
    won = [k for k in range(n) if k % 3 == 0][:4]
    theirs = [1.0 if k in won else v for k, v in enumerate(scores(n, lost))]
    row = kept([run("arc", scores(n))], [run("arc", theirs)]).total
    assert (row.lost, row.won) == (9, 4)
    assert row.reference == pytest.approx(2 / 3)
    assert row.interval is not None
    low, high = (row.reference * (1 - end) for end in reversed(row.interval))  # as drops
    assert low < 5 / n < high
    assert Counts(lost=9, won=4, n=n).p_pass(high) == pytest.approx(TAIL, abs=1e-9)
    assert Counts(lost=4, won=9, n=n).p_pass(-low) == pytest.approx(TAIL, abs=1e-9)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60).filter(lambda p: any(a for a, _ in p)),
    st.sampled_from([0.005, 0.05, 0.2]),
)
def test_the_interval_is_the_one_that_the_check_shows(pairs: list[tuple[bool, bool]], tail: float) -> None:
    ours, theirs = ([run("arc", [float(pair[side]) for pair in pairs])] for side in (0, 1))
    row = kept(ours, theirs, tail=tail).total
    verdict = accuracy.judge_tasks(
        ours, theirs, limits=Limits(alpha_pass=tail), label_reference="old", label_candidate="new"
    )
    shown = verdict.findings[0].interval
    assert shown is not None
    assert row.interval is not None
    assert row.recovery is not None
    possible = (shown[0], min(shown[1], 100 * row.reference))  # nobody keeps less than nothing
    assert [100 * row.reference * (1 - end) for end in reversed(row.interval)] == pytest.approx(possible, abs=1e-6)
    assert row.interval[0] <= row.recovery <= row.interval[1]


def test_several_tasks_each_have_their_row_and_every_document_counts_the_same_in_the_total() -> None:
    ours = [run("arc", [1.0] * 8), run("boolq", [1.0, 0.0])]
    theirs = [run("arc", [1.0] * 4 + [0.0] * 4), run("boolq", [0.0, 1.0])]
    found = kept(ours, theirs)
    assert [
        (r.name, r.n, r.reference, r.candidate, r.recovery, r.lost, r.won) for r in (*found.tasks, found.total)
    ] == [
        ("arc", 8, 1.0, 0.5, 0.5, 4, 0),
        ("boolq", 2, 0.5, 0.5, 1.0, 1, 1),
        ("all tasks", 10, 0.9, 0.5, pytest.approx(5 / 9), 5, 1),
    ]


def test_of_a_task_of_which_nothing_is_right_nothing_can_be_kept() -> None:
    nothing, some = run("hard", [0.0] * 5), run("hard", [1.0] + [0.0] * 4)
    (row,) = kept([nothing], [some]).tasks
    assert (row.reference, row.candidate, row.won) == (0.0, 0.2, 1)
    assert row.recovery is None
    assert row.interval is None
    found = kept([nothing, run("arc", [1.0] * 5)], [some, run("arc", [1.0] * 5)])
    assert [r.recovery for r in (*found.tasks, found.total)] == [None, 1.0, pytest.approx(6 / 5)]


def test_nobody_keeps_less_than_nothing() -> None:
    """Of two right documents both are lost, and the drop may be larger than the reference's share of right ones."""
    (row,) = kept([run("arc", [1.0] * 2 + [0.0] * 8)], [run("arc", [0.0] * 10)]).tasks
    assert row.recovery == 0.0
    assert row.interval is not None
    assert row.interval[0] == 0.0 < row.interval[1]


def test_of_a_metric_of_which_less_is_better_the_rest_is_kept() -> None:
    """Errors of 0.2 and 0.4 are scores of 0.8 and 0.6."""
    ours, theirs = ([run("errors", v, higher_is_better=False)] for v in ([0.0] * 8 + [1.0] * 2, [0.0] * 6 + [1.0] * 4))
    (row,) = kept(ours, theirs).tasks
    assert (row.reference, row.candidate) == pytest.approx((0.8, 0.6))
    assert (row.lost, row.won) == (2, 0)
    assert row.recovery == pytest.approx(0.75)


def test_scores_between_0_and_1_count_as_they_are() -> None:
    (row,) = kept([run("f", [0.5, 1.0, 0.25])], [run("f", [0.25, 1.0, 0.5])]).tasks
    assert (row.reference, row.candidate, row.recovery) == pytest.approx((7 / 12, 7 / 12, 1.0))
    assert (row.lost, row.won) == (1, 1)


def test_a_metric_that_is_no_share_is_left_out() -> None:
    """A perplexity of 20 is no accuracy: a row would call it 2000 % right."""
    perplexity = run("wiki", [20.0, 30.0], higher_is_better=False)
    found = kept([run("arc", [1.0] * 4), perplexity], [run("arc", [1.0] * 4), perplexity])
    assert [row.name for row in found.tasks] == ["arc"]
    assert found.total.n == 4
    assert recovery.of([perplexity], [perplexity], tail=TAIL, moved=None) is None


def test_the_first_filter_of_a_task_counts() -> None:
    ours = run("gsm", [1.0] * 4, filters=("strict", "flexible"))
    theirs = replace(ours, samples=tuple(replace(s, metrics={"acc": 0.0}) if s.filter == "flexible" else s
                                         for s in ours.samples))  # fmt: skip
    found = kept([ours], [theirs])
    assert [(row.name, row.n, row.lost) for row in found.tasks] == [("gsm, strict", 4, 0)]


def test_documents_that_are_not_the_same_have_no_table() -> None:
    ours = run("arc", [1.0] * 4)
    with pytest.raises(IncomparableError, match="document 3 of task 'arc'"):
        recovery.of([ours], [run("arc", [1.0] * 3)], tail=TAIL, moved=None)
    other = edited(ours, 2, lambda s: with_text(s, prompt_hash="another"))
    with pytest.raises(IncomparableError, match="has the prompt_hash"):
        recovery.of([ours], [other], tail=TAIL, moved=None)


# How far the distributions moved -----------------------------------------------------------------------------------

P, Q = (0.7, 0.2, 0.1), (0.5, 0.3, 0.2)
KL = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


def answer(id_: str, distributions: Sequence[Sequence[float]], tokens: Sequence[int]) -> Completion:
    """Tokens out of a vocabulary of three, whose whole distribution is recorded."""
    rows = [
        sorted(((token, math.log(p)) for token, p in enumerate(each)), key=lambda pair: -pair[1])
        for each in distributions
    ]
    made = completion(id_, token_ids=tokens, terminator=None)
    return replace(made, logprobs=token_logprobs(tokens, rows))


def toy() -> tuple[Recording, Recording]:
    """The reference says P everywhere; the candidate says Q at two of three tokens, and at one what it prefers differs.

    -log p of the tokens. a: reference 0.7, 0.2, candidate 0.5, 0.3. b: reference 0.1, candidate 0.6.
    """
    ours = [answer("a", [P, P], [0, 1]), answer("b", [P], [2])]
    theirs = [answer("a", [Q, Q], [0, 1]), answer("b", [(0.3, 0.1, 0.6)], [2])]
    reference = recording(ours)
    return reference, recording(theirs, forced_from=reference.digest)


def test_perplexity_and_its_error_worked_by_hand() -> None:
    found = recovery.moved(lockstep.measure(*toy()), None)
    surprise = [[-math.log(0.5 / 0.7), -math.log(0.3 / 0.2)], [-math.log(0.6 / 0.1)]]
    ours, theirs = 0.7 * 0.2 * 0.1, 0.5 * 0.3 * 0.6
    assert found.tokens == 3
    assert found.perplexity_ratio == pytest.approx((ours / theirs) ** (1 / 3), rel=1e-6)
    mean = sum(map(sum, surprise)) / 3
    left_over = [sum(each) - mean * len(each) for each in surprise]
    error = math.sqrt(2 / 1 * sum(value**2 for value in left_over)) / 3
    assert found.perplexity_error == pytest.approx(found.perplexity_ratio * error, rel=1e-6)


def test_divergence_and_preferences_worked_by_hand() -> None:
    found = recovery.moved(lockstep.measure(*toy()), 0.001)
    other = sum(p * math.log(p / q) for p, q in zip(P, (0.3, 0.1, 0.6), strict=True))
    assert found.kl_nats == pytest.approx((2 * KL + other) / 3, rel=1e-5)
    assert found.same_choice == pytest.approx(2 / 3)
    assert found.floor_nats == 0.001
    assert found.sentence == (
        f"on 3 tokens of the reference: KL divergence {found.kl_nats:.3g} nats a token (rounding alone: 0.001), the "
        f"same most probable token on 66.67%, perplexity {found.perplexity_ratio:.4f} times the reference's (+- "
        f"{found.perplexity_error:.4f})"
    )
    assert "rounding" not in replace(found, floor_nats=None).sentence


def test_where_the_sides_keep_other_tokens_the_divergence_is_called_a_lower_bound() -> None:
    """Of the reference's two tokens the candidate kept one, which has 0.7 of the probability."""
    kept_rows = [[(0, math.log(0.7)), (1, math.log(0.2))], [(0, math.log(0.6)), (2, math.log(0.3))]]
    ours, theirs = (
        recording([replace(completion("a", token_ids=[0], terminator=None), logprobs=token_logprobs([0], [row]))])
        for row in kept_rows
    )
    found = recovery.moved(lockstep.measure(ours, theirs), None)
    assert found.covered == pytest.approx(0.7)
    assert found.kl_nats == pytest.approx(0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4), rel=1e-5)
    assert f"KL divergence at least {found.kl_nats:.3g} nats a token" in found.sentence
    assert recovery.moved(lockstep.measure(*toy()), None).covered == pytest.approx(1.0)


def test_what_did_not_move_reads_one_and_zero() -> None:
    reference, _ = toy()
    found = recovery.moved(lockstep.measure(reference, reference), None)
    assert (found.kl_nats, found.same_choice, found.perplexity_ratio, found.perplexity_error) == (0.0, 1.0, 1.0, 0.0)


def test_one_prompt_has_no_spread_and_no_error_that_divides_by_zero() -> None:
    found = recovery.moved(lockstep.measure(*(recording([answer("a", [d], [0])]) for d in (P, Q))), None)
    assert found.perplexity_ratio == pytest.approx(0.7 / 0.5, rel=1e-6)
    assert found.perplexity_error == pytest.approx(0.0, abs=1e-9)


# In a comparison ----------------------------------------------------------------------------------------------------


def evidence_of(**recordings: Recording) -> Evidence:
    named = {role.replace("_", "-"): made for role, made in recordings.items()}
    return Evidence(recordings=named, policy=Policy.EQUIVALENCE, limits={}, directories={})


@pytest.mark.parametrize(("dtype", "rounding_sides"), [("float32", 1), ("bfloat16", 2)])
def test_the_floor_is_what_the_noise_engine_measured(dtype: str, rounding_sides: int) -> None:
    """Where two sides of the judged pair round and one of the measured one, there is twice the noise."""
    reference, scored, noisy = sides(World(prompts=8, tokens=6), reference_dtype=dtype)
    found = judge._moved(evidence_of(reference=reference, candidate=scored, candidate_scores=scored, noise=noisy))
    assert isinstance(found, Moved)
    measured = lockstep.measure(reference, noisy)
    assert found.floor_nats == pytest.approx(rounding_sides * float(np.mean(measured.kl_nats)))
    without = judge._moved(evidence_of(reference=reference, candidate=scored, candidate_scores=scored))
    assert without == replace(found, floor_nats=None)
    assert judge._moved(evidence_of(reference=reference, candidate=scored)) is None


def test_scores_that_lock_step_cannot_compare_are_left_out() -> None:
    reference, scored, _ = sides(World(prompts=4, tokens=4))
    other, _, _ = sides(World(prompts=4, tokens=4, seed=8))
    with pytest.raises(IncomparableError):
        lockstep.measure(reference, other)
    assert judge._moved(evidence_of(reference=reference, candidate=scored, candidate_scores=other)) is None


def test_without_scored_documents_there_is_no_table() -> None:
    reference, scored, _ = sides(World(prompts=4, tokens=4))
    assert judge.recovery(evidence_of(reference=reference, candidate=scored)) is None
