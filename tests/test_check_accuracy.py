"""The accuracy check: passes on itself, fails on planted losses, says so where documents are too few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy_cases import edited, generated, right, run, scores, with_text
from parity import documents, judge, sequential
from parity.checks import accuracy
from parity.checks.accuracy import Limits
from parity.documents import Documents
from parity.errors import IncomparableError
from parity.evals import TaskRun
from parity.verdict import Finding, Outcome, Policy, Verdict


def judged(reference: Sequence[TaskRun], candidate: Sequence[TaskRun], **more: object) -> Verdict:
    asked = {"limits": Limits(), "label_reference": "old", "label_candidate": "new", **more}
    return accuracy.judge_tasks(reference, candidate, **asked)  # type: ignore[arg-type]


def found(verdict: Verdict, metric: str) -> Finding:
    (finding,) = [f for f in verdict.findings if f.metric == metric]
    return finding


# One task -------------------------------------------------------------------------------------------------------------


def test_a_run_passes_against_itself() -> None:
    one = [run("arc", scores(600))]
    verdict = judged(one, one)
    assert verdict.passed
    assert (verdict.check, verdict.reference, verdict.candidate) == ("accuracy", "old", "new")
    finding = found(verdict, "loss on arc")
    assert finding.reference == finding.candidate == pytest.approx(66.67, abs=0.01)
    assert finding.delta == 0.0
    assert "0 lost and 0 won" in finding.sentence
    assert "would fail with probability 0.8" in finding.sentence
    assert not any((finding.evidence, verdict.causes, verdict.warnings, verdict.changed))
    assert verdict.headline == "a loss of 0.00 points on 600 documents, and 2 are ruled out"
    assert any("TensorRT-LLM" in line and "7729" in line for line in verdict.basis)


def test_a_planted_loss_fails_and_shows_the_surest_documents() -> None:
    n = 900
    lost = right(n, 40)
    verdict = judged([run("arc", scores(n))], [run("arc", scores(n, lost))])
    finding = found(verdict, "loss on arc")
    assert verdict.outcome is finding.outcome is Outcome.FAIL
    assert finding.delta == pytest.approx(100 * 40 / n)
    assert finding.margin == 2.0
    assert finding.interval is not None
    assert finding.interval[0] < 100 * 40 / n < finding.interval[1]
    assert len(finding.evidence) == 5
    assert finding.evidence[0] == (
        f"arc, document {lost[-1]}: 'B' in the reference, {lost[-1] / 10:.2f} nats ahead, 'C' in the candidate; "
        "right is 'B'"
    )
    assert [w.split(":")[0] for w in finding.evidence] == [f"arc, document {k}" for k in lost[:-6:-1]]
    assert verdict.headline.endswith("decided by loss on arc")
    assert verdict.causes == (
        "only the scores of given texts got worse: prefill, or the log-probabilities that it returns",
    )


def test_too_few_documents_are_inconclusive_and_the_sentence_says_how_many_more() -> None:
    one = [run("arc", scores(100))]
    verdict = judged(one, one)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "more documents would decide" in found(verdict, "loss on arc").sentence


def test_flips_that_cancel_pass_with_a_warning() -> None:
    n = 3000
    lost, won = right(n, 150), [k for k in range(n) if k % 3 == 0][:150]
    candidate = [1.0 if k in won else 0.0 if k in lost else v for k, v in enumerate(scores(n))]
    verdict = judged([run("arc", scores(n))], [run("arc", candidate)])
    assert verdict.passed
    assert "150 lost and 150 won" in found(verdict, "loss on arc").sentence
    assert verdict.warnings[0].startswith("the sides differ on 10.0% of documents, where rounding makes about 4.0%")


def test_a_quantized_candidate_may_lose_what_the_policy_tolerates() -> None:
    assert Limits.of(Policy.IDENTITY) == Limits.of(Policy.EQUIVALENCE) == Limits()
    assert (Limits().margin, Limits().tolerated) == (0.02, 0.0)
    quantized = Limits.of(Policy.QUANTIZED)
    assert (quantized.margin, quantized.tolerated) == (0.02, 0.005)
    n = 900
    ours = [run("arc", scores(n))]
    little, much = ([run("arc", scores(n, right(n, many)))] for many in (12, 40))
    assert judged(ours, little).outcome is Outcome.FAIL
    assert judged(ours, little, limits=quantized).outcome is Outcome.INCONCLUSIVE
    assert judged(ours, much, limits=quantized).outcome is Outcome.FAIL


def test_a_loss_that_is_certain_and_certainly_under_the_margin_passes_and_is_called_real() -> None:
    ours, theirs = ([run("arc", scores(3000, right(3000, lost)))] for lost in (0, 33))
    verdict = judged(ours, theirs)
    assert verdict.passed
    assert "the loss is real, and under the margin" in found(verdict, "loss on arc").sentence
    assert "the loss is real" not in found(judged(ours, ours), "loss on arc").sentence


def test_a_metric_of_which_less_is_better_is_turned_round() -> None:
    ours, theirs = ([run("arc", v, higher_is_better=False)] for v in (scores(900), scores(900, right(900, 40))))
    assert judged(theirs, ours).outcome is Outcome.FAIL
    assert judged(ours, theirs).passed


def test_a_metric_outside_0_and_1_is_judged_relative_to_the_reference() -> None:
    random = np.random.default_rng(1)
    ours = (20 + 5 * random.random(80)).tolist()
    runs = {
        factor: [run("wiki", [factor * v for v in ours], higher_is_better=False, output_type="loglikelihood_rolling")]
        for factor in (1.0, 1.001, 1.2)
    }
    assert judged(runs[1.0], runs[1.001]).passed
    worse = judged(runs[1.0], runs[1.2])
    assert worse.outcome is Outcome.FAIL
    assert found(worse, "loss on wiki").delta == pytest.approx(20.0)
    assert found(worse, "loss on wiki").unit == "percent of the reference's mean"
    with pytest.raises(IncomparableError, match="not between 0 and 1"):
        documents.differences(runs[1.0], runs[1.001])


def test_equal_documents_and_documents_of_a_cluster_are_not_independent() -> None:
    """Thirty lost documents are proof, thirty copies of one are an anecdote."""
    n = 900
    ours, theirs = run("arc", scores(n)), run("arc", scores(n, right(n, 30)))
    assert judged([ours], [theirs]).outcome is Outcome.FAIL

    def copied(one: TaskRun, **same: str) -> TaskRun:
        return replace(one, samples=tuple(with_text(s, **same) if s.doc_id < 45 else s for s in one.samples))

    for same in ({"doc_hash": "one"}, {"cluster": "one"}):
        verdict = judged([copied(ours, **same)], [copied(theirs, **same)])
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert "t test over clusters" in found(verdict, f"loss on {ours.task}").limit


# Several tasks --------------------------------------------------------------------------------------------------------


def test_all_tasks_together_decide_and_one_that_is_too_small_is_named() -> None:
    runs = [run("arc", scores(500)), run("boolq", scores(500)), run("tiny", scores(30))]
    verdict = judged(runs, runs)
    assert verdict.passed
    assert [f.metric for f in verdict.findings] == ["loss on all tasks", "loss on arc", "loss on boolq"]
    assert found(verdict, "loss on all tasks").n == 1030
    assert any("too small" in warning and "tiny" in warning for warning in verdict.warnings)
    assert "half, by Holm" in verdict.basis[0]


def test_a_loss_in_one_task_fails_although_the_pool_hides_it() -> None:
    ours = [run("arc", scores(4000)), run("gsm", scores(150))]
    theirs = [ours[0], run("gsm", scores(150, right(150, 15)), output_type="generate_until")]
    ours[1] = replace(ours[1], output_type="generate_until")
    verdict = judged(ours, theirs)
    assert found(verdict, "loss on all tasks").outcome is Outcome.PASS
    assert found(verdict, "loss on gsm").outcome is verdict.outcome is Outcome.FAIL
    assert found(verdict, "loss on arc").outcome is Outcome.PASS
    assert verdict.headline.endswith("decided by loss on gsm")
    assert verdict.causes[0].startswith("only generated answers got worse")


def test_the_more_tasks_are_asked_the_more_one_must_lose_to_fail_by_itself() -> None:
    """Nine documents lost and none won, p 0.002: a loss of one task that chance makes in one of four."""
    ours = [run("gsm", scores(200)), *(run(name, scores(1000)) for name in "abc")]
    theirs = [run("gsm", scores(200, right(200, 9))), *ours[1:]]
    assert found(judged(ours[:1], theirs[:1]), "loss on gsm").outcome is Outcome.FAIL
    verdict = judged(ours, theirs)
    assert "loss on gsm" not in [f.metric for f in verdict.findings]
    assert any("by themselves too small" in w and "gsm" in w for w in verdict.warnings)
    assert verdict.passed


def test_a_small_loss_everywhere_fails_in_the_pool_alone() -> None:
    names = ("a", "b", "c", "d")
    ours = [run(name, scores(300)) for name in names]
    theirs = [run(name, scores(300, right(300, 8))) for name in names]
    verdict = judged(ours, theirs)
    assert {f.metric: f.outcome for f in verdict.findings} == {"loss on all tasks": Outcome.FAIL}
    assert any("by themselves too small to pass or fail: a; b; c; d" in w for w in verdict.warnings)
    assert verdict.outcome is Outcome.FAIL


def test_a_second_filter_is_judged_and_not_pooled() -> None:
    both = ("strict", "flexible")
    ours = run("gsm", scores(900), filters=both)
    lost = set(right(900, 60))
    theirs = replace(
        ours,
        samples=tuple(
            replace(s, metrics={"acc": 0.0}) if s.filter == "flexible" and s.doc_id in lost else s for s in ours.samples
        ),
    )
    verdict = judged([ours], [theirs])
    assert {f.metric: (f.outcome, f.n) for f in verdict.findings} == {
        "loss on gsm, strict": (Outcome.PASS, 900),
        "loss on gsm, flexible": (Outcome.FAIL, 900),
    }
    assert verdict.outcome is Outcome.FAIL


def test_a_task_of_which_nothing_is_right_cannot_show_a_loss() -> None:
    nothing = [run("arc", [0.0] * 600)]
    assert "gets nothing right on arc" in judged(nothing, nothing).warnings[0]


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_no_answers_fail_against_themselves(seed: int, tasks: int) -> None:
    random = np.random.default_rng(seed)
    runs = [run(f"t{k}", random.choice([0.0, 0.3, 1.0], int(random.integers(1, 300))).tolist()) for k in range(tasks)]
    assert judged(runs, runs).outcome is not Outcome.FAIL


# What must not be compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["doc_hash", "prompt_hash", "target_hash"])
def test_another_document_prompt_or_answer_is_no_comparison(field: str) -> None:
    one = run("arc", scores(20))
    other = edited(one, 7, lambda s: with_text(s, **{field: "something else"}))
    with pytest.raises(
        IncomparableError, match=rf"document 7 of task 'arc' has the {field} '\w+ 7' .* 'something else'"
    ):
        judged([one], [other])


@pytest.mark.parametrize(
    "change", [{"version": "2"}, {"metric": "other"}, {"higher_is_better": False}, {"output_type": "generate_until"}]
)
def test_another_way_of_scoring_is_no_comparison(change: dict[str, object]) -> None:
    one = run("arc", scores(20))
    ((field, value),) = change.items()
    with pytest.raises(IncomparableError, match=rf"task 'arc' has the {field} .* {value!r} in the candidate"):
        judged([one], [replace(one, **change)])  # type: ignore[arg-type]


def test_other_documents_and_other_tasks_are_no_comparison() -> None:
    one, fewer = run("arc", scores(20)), run("arc", scores(19))
    with pytest.raises(IncomparableError, match=r"document 19 of task 'arc' .* only by the reference"):
        judged([one], [fewer])
    with pytest.raises(IncomparableError, match=r"document 19 of task 'arc' .* only by the candidate"):
        judged([fewer], [one])
    with pytest.raises(IncomparableError, match="the tasks arc, the candidate arc, boolq"):
        judged([one], [one, run("boolq", scores(20))])
    with pytest.raises(IncomparableError, match="answered one task twice"):
        judged([one, one], [one])
    with pytest.raises(IncomparableError, match="'arc' has no documents"):
        judged([run("arc", [])], [run("arc", [])])
    with pytest.raises(IncomparableError, match="tasks none"):
        judged([], [])


@pytest.mark.parametrize("metrics", [{}, {"acc": float("nan")}])
def test_a_missing_score_is_no_comparison(metrics: dict[str, float]) -> None:
    one = run("arc", scores(20))
    with pytest.raises(
        IncomparableError, match=r"the 'acc' of document 7 of task 'arc' is 1.0 .* nan in the candidate"
    ):
        judged([one], [edited(one, 7, lambda s: replace(s, metrics=metrics))])


def test_what_else_differs_between_the_runs_is_shown() -> None:
    one = run("arc", scores(600))
    other = replace(one, invocation={"harness.version": "0.4.12", "recording.engine": "y"})
    (changed,) = judged([one], [other]).changed
    assert (changed.name, changed.reference, changed.candidate) == ("harness.version", "0.4.13", "0.4.12")


# Lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "n", "wanted"),
    [
        (1.0, 200, Outcome.PASS),
        (1.05, 200, Outcome.PASS),
        (1.3, 200, Outcome.FAIL),
        (0.7, 200, Outcome.FAIL),
        (1.3, 20, Outcome.INCONCLUSIVE),
    ],
)
def test_answers_must_not_become_longer_or_shorter(factor: float, n: int, wanted: Outcome) -> None:
    ours = [100 + 7 * k % 50 for k in range(n)]
    theirs = [round(factor * length) for length in ours]
    verdict = judged(*([run("arc", scores(600)), generated(lengths)] for lengths in (ours, theirs)))
    finding = found(verdict, "output length")
    assert finding.outcome is verdict.outcome is wanted
    assert finding.n == n
    assert "MLPerf" in finding.limit
    if wanted is Outcome.FAIL:
        assert finding.candidate == pytest.approx(factor, abs=0.01)


# Documents drawn until the answer is certain --------------------------------------------------------------------------


def test_a_run_that_stopped_early_is_judged_by_its_monitor() -> None:
    n = 3000
    ours, theirs = [run("arc", scores(n))], [run("arc", scores(n, right(n, 400)))]
    asked = Documents.of(ours)
    assert asked.keys[7] == "arc/7"
    assert asked.clusters is None
    assert asked.margins_nats[7] == pytest.approx(0.7)
    monitor = sequential.monitor(
        asked.keys, rule=Limits().rule, noise=Limits().noise, seed=1, margins_nats=asked.margins_nats
    )
    drawn = monitor.draws.documents.tolist()
    for start in range(0, n, 100):
        batch = drawn[start : start + 100]
        some = [replace(side[0], samples=tuple(side[0].samples[i] for i in batch)) for side in (ours, theirs)]
        by_key = documents.differences(some[:1], some[1:])
        if monitor.update(np.array([by_key[asked.keys[i]] for i in batch])) is not Outcome.INCONCLUSIVE:
            break
    seen = drawn[: start + 100]
    some = [replace(side[0], samples=tuple(side[0].samples[i] for i in sorted(seen))) for side in (ours, theirs)]
    verdict = judged(some[:1], some[1:], sequential=monitor.state)
    (finding,) = verdict.findings
    assert verdict.outcome is finding.outcome is monitor.outcome is Outcome.FAIL
    assert finding.n == monitor.n < n
    assert finding.delta == pytest.approx(100 * monitor.state.drop)
    assert monitor.state.sentence in finding.sentence
    assert len(finding.evidence) == 5


def test_repeated_documents_are_drawn_together_and_the_first_filter_counts() -> None:
    one = run("gsm", scores(30), filters=("strict", "flexible"))
    assert len(Documents.of([one]).keys) == 30
    twice = edited(one, 7, lambda s: replace(s, doc_hash="document 8"))
    clusters = Documents.of([twice]).clusters
    assert clusters is not None
    assert clusters[7] == clusters[8] != clusters[9]
    assert len(documents.differences([one], [one])) == 30


def test_a_comparison_of_recordings_sends_to_the_command_that_scores_them() -> None:
    evidence = judge.Evidence(recordings={}, policy=Policy.EQUIVALENCE, limits={}, directories={})
    reason = judge.why_not(evidence, "accuracy")
    assert reason is not None
    assert "`parity eval`" in reason
