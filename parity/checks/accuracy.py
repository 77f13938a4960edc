"""Accuracy: on the same documents, does the candidate get fewer of them right, by more than the policy allows?

Both sides answered the same documents of the same tasks, so documents are compared in pairs, and only those on which
the sides differ count. All tasks pooled decide; each task is asked by itself too, where it can show a loss that the
pool hides (Holm), while one that is too small to show anything is named in a warning.

Rules: `parity.paired`, and `parity.sequential` where documents were drawn until the answer was certain. Sources, error
rates and what a number of documents can certify: docs/checks/accuracy.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity import fingerprint
from parity.comparable import MODEL
from parity.documents import Part, pair_up, pooled
from parity.evals import EvalSample, TaskRun
from parity.paired import (
    Counts,
    Decision,
    Outcomes,
    Rule,
    decide,
    holm,
    points,
    unpaired_documents,
    unpaired_threshold,
)
from parity.sequential import State
from parity.stats import log_ratio
from parity.verdict import Finding, Outcome, Policy, Verdict, worst

ROLES = ("accuracy-reference", "accuracy-candidate")
REQUIRES = MODEL

_WITNESSES = 5
_EXCERPT = 60
_GENERATED = "generate_until"
_ABOUT_A_SIDE = "recording."
"""Facts of an invocation that say which side it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source of each: docs/checks/accuracy.md, "Limits".

    margin, tolerated: shares of documents (0.02 is two points): so large a loss does not pass, so small a one does not
        fail. alpha_pass, alpha_fail: the probabilities that they do. power: of what is called detectable.
    noise: the share of documents on which two correct engines are expected to differ; twice as many are a warning.
    shortest_ratio, longest_ratio, confidence, min_answers: of the lengths of generated answers.
    """

    margin: float = 0.02
    tolerated: float = 0.0
    alpha_pass: float = 0.05
    alpha_fail: float = 0.005
    power: float = 0.8
    noise: float = 0.04
    shortest_ratio: float = 0.9
    longest_ratio: float = 1.1
    confidence: float = 0.99
    min_answers: int = 32

    @classmethod
    def of(cls, policy: Policy) -> Limits:
        """The defaults of a policy."""
        return cls(tolerated=0.005 if policy is Policy.QUANTIZED else 0.0)

    @property
    def rule(self) -> Rule:
        """The rule for one judgement, which also plans and monitors."""
        return Rule(
            margin=self.margin,
            tolerated=self.tolerated,
            alpha_pass=self.alpha_pass,
            alpha_fail=self.alpha_fail,
            power=self.power,
        )


def judge_tasks(
    reference: Sequence[TaskRun],
    candidate: Sequence[TaskRun],
    *,
    limits: Limits,
    label_reference: str,
    label_candidate: str,
    sequential: State | None = None,
) -> Verdict:
    """Judge a candidate's accuracy against a reference's.

    sequential: what the monitor says that decided when to stop; the tasks are then not judged one by one, since nobody
    chose when to stop for their sake.

    Raises:
        IncomparableError: If the two did not answer the same documents of the same tasks, or a score is missing.
    """
    parts = pair_up(reference, candidate)
    pool = [part for part in parts if part.is_first and part.in_points]
    drawn = [] if sequential is None else [_drawn(pool, sequential, limits)]
    deciding, single = (drawn, []) if drawn else _judged(parts, pool, limits)
    lengths = _output_length(parts, limits)
    # A task that is too small to pass by itself does not keep the pool from passing.
    judged = [*deciding, *(f for f in single if f.outcome is Outcome.FAIL), *lengths]
    outcome = worst([f.outcome for f in judged])
    lost = any(f.outcome is Outcome.FAIL for f in (*deciding, *single))
    return Verdict(
        check="accuracy",
        reference=label_reference,
        candidate=label_candidate,
        outcome=outcome,
        headline=_headline(deciding[0], judged, outcome),
        # What is too small to say anything by itself is named in a warning, and has its row in the table of recoveries.
        findings=(*deciding, *(f for f in single if f.outcome is not Outcome.INCONCLUSIVE), *lengths),
        causes=_causes(parts) if lost else (),
        changed=_changed(reference, candidate),
        warnings=tuple(_warnings(parts, single, limits)),
        basis=tuple(_basis(limits, deciding[0].n, shared=bool(single))),
    )


# Findings -------------------------------------------------------------------------------------------------------------


def _judged(parts: Sequence[Part], pool: Sequence[Part], limits: Limits) -> tuple[list[Finding], list[Finding]]:
    """What decides, and what other tasks say by themselves; the rate of false alarms is shared between the two."""
    rule = limits.rule
    if len(parts) == 1:
        return [_finding(parts, parts[0].outcomes, decide(parts[0].outcomes, rule), rule)], []
    half = replace(rule, alpha_fail=rule.alpha_fail / 2)
    others = [part for part in parts if list(pool) != [part]]
    decisions = [decide(part.outcomes, half) for part in others]
    single = []
    for part, found, lost in zip(others, decisions, holm([d.p_fail for d in decisions], half.alpha_fail), strict=True):
        by_holm = Outcome.FAIL if lost else Outcome.INCONCLUSIVE
        said = found if found.outcome is Outcome.PASS else replace(found, outcome=by_holm)
        single.append(_finding([part], part.outcomes, said, half))
    if not pool:
        return single, []
    outcomes = pooled(pool)
    return [_finding(pool, outcomes, decide(outcomes, half), half)], single


def _finding(parts: Sequence[Part], outcomes: Outcomes, found: Decision, rule: Rule) -> Finding:
    in_points = parts[0].in_points
    unit = "points" if in_points else "percent of the reference's mean"
    shares = [100 * float(side.mean()) if in_points else None for side in (outcomes.reference, outcomes.candidate)]
    scored = f"{shares[0]:.2f} in the reference and {shares[1]:.2f} in the candidate, of 100: " if in_points else ""
    if found.more is not None:
        add = f"; about {found.more} more documents would decide if the loss stays as it is"
    elif found.outcome is Outcome.PASS and found.p_fail <= rule.alpha_fail:
        add = "; the loss is real, and under the margin"
    else:
        add = ""
    return Finding(
        metric=_metric(parts),
        outcome=found.outcome,
        sentence=f"{scored}{_loss(100 * found.drop, unit)} on {found.n} documents ({_range(found.interval)}), "
        f"{found.lost} lost and {found.won} won; p {found.p_pass:.2g} against {_at_least(rule)}, {found.p_fail:.2g} "
        f"against {_at_most(rule)}; a loss of {100 * found.detectable:.2g} would fail with probability "
        f"{rule.power:g}{add}",
        unit=unit,
        reference=shares[0],
        candidate=shares[1],
        delta=100 * found.drop,
        interval=(100 * found.interval[0], 100 * found.interval[1]),
        limit=_limit(rule, counted=isinstance(outcomes.estimate, Counts)),
        n=found.n,
        evidence=_lost(parts),
        margin=100 * rule.margin,
    )


def _drawn(pool: Sequence[Part], state: State, limits: Limits) -> Finding:
    """The monitor's answer, which knows when it stopped and what each document counts."""
    rule, x = limits.rule, pooled(pool).differences
    return Finding(
        metric=_metric(pool),
        outcome=state.outcome,
        sentence=f"{_loss(100 * state.drop, 'points')} ({_range(state.interval)}) after {state.n} documents; "
        f"{int((x > 0).sum())} lost and {int((x < 0).sum())} won of {len(x)} that were answered; {state.sentence}",
        unit="points",
        reference=None,  # where small margins were drawn more often, the share of right answers is no accuracy
        candidate=None,
        delta=100 * state.drop,
        interval=(100 * state.interval[0], 100 * state.interval[1]),
        limit=f"passes where {_at_least(rule)} is ruled out at {rule.alpha_pass:g}, fails where {_at_most(rule)} is "
        f"ruled out at {rule.alpha_fail:g}, however often one looks",
        n=state.n,
        evidence=_lost(pool),
        margin=100 * rule.margin,
    )


def _metric(parts: Sequence[Part]) -> str:
    return f"loss on {parts[0].name if len(parts) == 1 else 'all tasks'}"


def _loss(loss: float, unit: str) -> str:
    return f"a {'loss' if loss >= 0 else 'gain'} of {abs(loss):.2f} {unit}"


def _range(interval: tuple[float, float]) -> str:
    return f"loss between {100 * interval[0]:.2f} and {100 * interval[1]:.2f}"


def _at_least(rule: Rule) -> str:
    return f"a loss of {100 * rule.margin:g} or more"


def _at_most(rule: Rule) -> str:
    return f"one of {100 * rule.tolerated:g} or less" if rule.tolerated else "none"


def _limit(rule: Rule, *, counted: bool) -> str:
    of_split = "exact test of the split" if rule.tolerated else "exact McNemar test"
    pass_test, fail_test = ("Tango's score test", of_split) if counted else ("t test over clusters",) * 2
    return (
        f"passes where {_at_least(rule)} is rejected at {rule.alpha_pass:g} ({pass_test}), fails where "
        f"{_at_most(rule)} is rejected at {rule.alpha_fail:g} ({fail_test})"
    )


def _lost(parts: Sequence[Part]) -> tuple[str, ...]:
    """The documents that only the reference got right, those of the widest margin first."""
    found = [
        (-math.inf if ours.margin_nats is None else ours.margin_nats, difference, part, ours, theirs)
        for part in parts
        for (ours, theirs), difference in zip(part.pairs, part.outcomes.differences.tolist(), strict=True)
        if difference > 0
    ]
    found.sort(key=lambda each: each[:2], reverse=True)
    return tuple(_witness(part, ours, theirs) for _, _, part, ours, theirs in found[:_WITNESSES])


def _witness(part: Part, ours: EvalSample, theirs: EvalSample) -> str:
    ahead = "" if ours.margin_nats is None else f", {ours.margin_nats:.2f} nats ahead"
    return (
        f"{part.name}, document {ours.doc_id}: {_short(ours.response)} in the reference{ahead}, "
        f"{_short(theirs.response)} in the candidate; right is {_short((ours.target,))}"
    )


def _short(texts: Sequence[str]) -> str:
    text = " | ".join(texts)
    return repr(text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "...")


def _output_length(parts: Sequence[Part], limits: Limits) -> list[Finding]:
    """Of the documents whose answers both sides generated; none where there are no such."""
    lengths = [
        (ours.output_tokens, theirs.output_tokens)
        for part in parts
        if part.is_first
        for ours, theirs in part.pairs
        if ours.output_tokens is not None and theirs.output_tokens is not None
    ]
    if not lengths:
        return []
    reference, candidate = zip(*lengths, strict=True)
    ratio = log_ratio(candidate, reference)
    n, band = len(lengths), f"{limits.shortest_ratio:g} to {limits.longest_ratio:g}"
    finding = Finding(
        metric="output length",
        outcome=Outcome.INCONCLUSIVE,
        sentence=f"too little data: {n} generated answers, at least {limits.min_answers} with tokens are needed",
        unit="ratio",
        reference=1.0,
        candidate=None,
        delta=None,
        interval=None,
        limit=f"ratio of mean output tokens not outside {band} (MLPerf Inference)",
        n=n,
        evidence=(),
    )
    if ratio is None or n < limits.min_answers:
        return [finding]
    tail = (1.0 - limits.confidence) / 2
    low, high = ratio.lower(tail), ratio.upper(tail)
    outside = high < limits.shortest_ratio or low > limits.longest_ratio
    within = limits.shortest_ratio <= low and high <= limits.longest_ratio
    said = "outside" if outside else "inside" if within else "too wide to be sure it is inside"
    judged = replace(
        finding,
        outcome=Outcome.FAIL if outside else Outcome.PASS,
        sentence=f"{ratio.value:.3f} times as many tokens as the reference over {n} generated answers "
        f"({limits.confidence:.0%} interval {low:.3f} to {high:.3f}, {said} {band})",
        candidate=ratio.value,
    )
    return [judged]


# About the verdict ----------------------------------------------------------------------------------------------------


def _headline(first: Finding, judged: Sequence[Finding], outcome: Outcome) -> str:
    text = f"{_loss(first.delta or 0.0, first.unit)} on {first.n} documents"
    reasons = ", ".join(finding.metric for finding in judged if finding.outcome is outcome)
    if outcome is Outcome.PASS:
        return f"{text}, and {first.margin:g} are ruled out"
    return f"{text}; decided by {reasons}"


def _causes(parts: Sequence[Part]) -> tuple[str, ...]:
    """Which way of asking lost."""
    lost = {True: 0.0, False: 0.0}
    for part in parts:
        lost[part.output_type == _GENERATED] += float(part.outcomes.differences.sum())
    if lost[True] > 0 >= lost[False]:
        return ("only generated answers got worse: decoding, stop strings or the cache rather than weights",)
    if lost[False] > 0 >= lost[True]:
        return ("only the scores of given texts got worse: prefill, or the log-probabilities that it returns",)
    return ("generated answers and scores of given texts got worse: weights, quantization or attention",)


def _changed(reference: Sequence[TaskRun], candidate: Sequence[TaskRun]) -> tuple[fingerprint.Difference, ...]:
    theirs = {run.task: run.invocation for run in candidate}
    found = [d for run in reference for d in fingerprint.differences(run.invocation, theirs[run.task])]
    return tuple(dict.fromkeys(d for d in found if not d.name.startswith(_ABOUT_A_SIDE)))


def _warnings(parts: Sequence[Part], single: Sequence[Finding], limits: Limits) -> Iterator[str]:
    for part in parts:
        if part.in_points and not part.outcomes.reference.any():
            yield f"the reference gets nothing right on {part.name}, so no loss can show there"
    small = [f.metric.removeprefix("loss on ") for f in single if f.outcome is Outcome.INCONCLUSIVE]
    if small:
        yield f"all tasks together decide; by themselves too small to pass or fail: {'; '.join(small)}"
    x = np.concatenate([part.outcomes.differences for part in parts if part.in_points] or [np.zeros(1)])
    if (discordance := float(np.abs(x).mean())) > 2 * limits.noise:
        yield (
            f"the sides differ on {discordance:.1%} of documents, where rounding makes about {limits.noise:.1%} "
            "differ: whatever the accuracy, look at lockstep"
        )


def _basis(limits: Limits, n: int, *, shared: bool) -> Iterator[str]:
    how = ", half of it for all tasks together and half, by Holm, for single ones" if shared else ""
    yield (
        f"a loss of {points(limits.margin)} passes with probability at most {limits.alpha_pass:g}, and one of "
        f"{points(limits.tolerated)} fails with probability at most {limits.alpha_fail:g}{how}"
    )
    yield (
        f"for comparison, not judged: at {n} documents TensorRT-LLM's unpaired rule fails from a loss of "
        f"{points(unpaired_threshold(n))} on, and to see {points(limits.margin)} it asks for "
        f"{unpaired_documents(limits.margin)}"
    )
