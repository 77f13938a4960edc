"""Determinism: does one engine answer the same request alike, whatever else it has to do?

Each prompt is asked in a batch, and then once more in three ways (`Twin`): in another order of the batch, alone, and
with the beginning of its prompt from the prefix cache. 16-bit kernels round differently for another batch, so other
tokens are normal and are counted, with an exact bound on their share. What rounding cannot do is a fault: a wrong
mask, padding or cache. Each first divergence is held against sigma by the rule of the greedy check (R1):

    beyond rounding   S > 25 sigma, or a token outside the other's top k, or another end of the same tokens: FAIL
    suspicious        6 sigma < S <= 25 sigma: FAIL where chance does not explain so many

Where the candidate must be as the reference was (policy identity), it fails too if it gives other tokens on more
prompts than the reference did, by an exact one-sided McNemar test. The reference may be missing.

Source of the rules, of their constants and of measured counts: docs/checks/determinism.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from parity import diagnose
from parity.comparable import first_difference, workload_detail
from parity.divergence import Kind, Pair, Scale, compare, in_asked_order
from parity.errors import ConfigError, IncomparableError
from parity.noise import SIGMA_FLOOR_NATS, Noise, sixteen_bit_sides
from parity.prompts import Request, SamplingParams, Workload
from parity.recording import Completion, FinishReason, Recording, TokenLogprobs
from parity.stats import critical_count, exact_interval, mcnemar
from parity.verdict import Finding, Outcome, Policy, Verdict, worst

ROLES = ("determinism-reference", "determinism-candidate")
ALONE = True
"""A candidate can be judged without a reference."""
_MARK = "#"
_WITNESSES = 3
_EXCERPT = 24
_MOVES_CHOICE = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "structured")


class Twin(str, Enum):
    """How a prompt is asked once more; the value is in the twin's id."""

    AGAIN = "again"
    """In the same batch, the other way round."""
    ALONE = "alone"
    """With nothing beside it."""
    CACHED = "cached"
    """In the same batch, with the beginning of the prompt from the prefix cache."""

    def of(self, prompt_id: str) -> str:
        """The twin's id."""
        return f"{prompt_id}{_MARK}{self.value}"


_ASKED = {
    Twin.AGAIN: "asked again in another order",
    Twin.ALONE: "asked alone",
    Twin.CACHED: "asked with a cached prefix",
}
_CAUSES = {
    Twin.AGAIN: "asked again in another order of the batch, the engine computes something else: kernels whose result "
    "depends on chance or on the place in the batch",
    Twin.ALONE: "the result depends on the batch beyond rounding: padding, mask, or a kernel that depends on the batch",
    Twin.CACHED: "the prefix cache, or block reuse, gives other results than computing the prompt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/determinism.md.

    benign_sigmas, mismatch_sigmas, suspicious_rate, sigma_without_noise_nats: as in the greedy check.
    alpha: of each count; these are not confirmed on fresh prompts, so their rate is small.
    as_reference: not 0: the candidate must give other tokens on no more prompts than the reference, at `alpha`.
    confidence: of the shown bound on the share of prompts with other tokens.
    """

    benign_sigmas: float = 6.0
    mismatch_sigmas: float = 25.0
    suspicious_rate: float = 0.0025
    alpha: float = 0.0005
    sigma_without_noise_nats: float = 0.13
    as_reference: float = 0.0
    confidence: float = 0.95
    min_prompts: int = 8

    @classmethod
    def of(cls, policy: Policy) -> Limits:
        """The defaults of a policy."""
        return cls(as_reference=float(policy is Policy.IDENTITY))


def twins(workload: Workload, *, can_reuse_prefix: bool) -> Workload:
    """The questions of this check: a workload, and each of its requests once more in every way the engine can.

    The cached twins come last, when the blocks of all prompts are in the cache.

    Raises:
        ConfigError: If a prompt's id holds the mark that twins are found by.
    """
    asked = workload.requests
    for request in asked:
        if _MARK in request.id:
            raise ConfigError(
                f"prompt {request.id!r} of workload {workload.name!r} cannot be asked for determinism: {_MARK!r} in an "
                "id marks a prompt that is asked once more; rename it"
            )
    turns = [replace(request, turn=0, reuse_prefix=False) for request in asked]
    turns += [_twin(request, Twin.AGAIN, turn=1) for request in reversed(asked)]
    turns += [_twin(request, Twin.ALONE, turn=2 + number) for number, request in enumerate(asked)]
    if can_reuse_prefix:
        turns += [_twin(request, Twin.CACHED, turn=2 + len(asked)) for request in asked]
    return replace(workload, name=f"{workload.name}-determinism", requests=tuple(turns))


def _twin(request: Request, twin: Twin, *, turn: int) -> Request:
    prompt = replace(request.prompt, id=twin.of(request.id))
    return replace(request, prompt=prompt, turn=turn, reuse_prefix=twin is Twin.CACHED)


def check(reference: Recording | None, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge whether the candidate, and the reference where there is one, answers each prompt as it answers its twins.

    Raises:
        IncomparableError: If a side did not answer what `twins` asks, or not by plain greedy decoding; if the two
            sides were asked different prompts; or if the reference gave an answer up.
    """
    pair_sides = 1 if reference is None else max(1, sixteen_bit_sides(reference, candidate))
    ours = None if reference is None else _measure("reference", reference, noise, pair_sides, limits)
    theirs = _measure("candidate", candidate, noise, pair_sides, limits)
    warnings = _warnings(noise, ours, limits)
    if reference is not None:
        _require_same_prompts(reference, candidate)
        if aborted := [c.id for c in in_asked_order(reference) if c.finish_reason is FinishReason.ABORT]:
            raise IncomparableError(
                f"the reference {reference.label} gave up {len(aborted)} of {len(reference.completions)} answers, "
                f"first {aborted[0]!r}; record it again"
            )
    findings, causes = [], []
    for twin in theirs.pairs:
        found = _alike(twin, theirs, ours, limits)
        findings.append(found)
        causes += [_CAUSES[twin]] * (found.outcome is Outcome.FAIL)
        if limits.as_reference and ours is not None and twin in ours.pairs:
            compared = _as_reference(twin, theirs, ours, limits)
            findings.append(compared)
            if compared.outcome is Outcome.FAIL:
                causes.append(
                    f"the candidate is less deterministic than the reference where a prompt is {_ASKED[twin]}"
                )
    findings.append(_data(theirs.prompts, limits))
    outcome = worst([f.outcome for f in findings])
    differing = () if reference is None else diagnose.changed(reference, candidate)
    return Verdict(
        check="determinism",
        reference="itself" if reference is None else reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(theirs, findings, outcome),
        findings=tuple(findings),
        causes=tuple(causes),
        changed=differing,
        warnings=warnings,
    )


# One side -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One engine's answers beside their twins, prompt by prompt; a pair's reference is the answer in the batch.

    sigma_nats: the rounding noise of a margin between two answers of this engine.
    """

    pairs: Mapping[Twin, tuple[Pair, ...]]
    sigma_nats: float

    @property
    def prompts(self) -> int:
        return len(self.pairs[Twin.AGAIN])


def _measure(side: str, recording: Recording, noise: Noise | None, pair_sides: int, limits: Limits) -> _Side:
    """Compare every answer with its twins.

    Sigma belongs to the judged pair; both answers here are of one engine, so it is scaled as `noise.measure` scales.
    """
    answers = recording.by_id
    first = [c for c in in_asked_order(recording) if _MARK not in c.id]
    asked = [twin for twin in Twin if twin is not Twin.CACHED or any(i.endswith(twin.of("")) for i in answers)]
    expected = {c.id for c in first}.union(twin.of(c.id) for c in first for twin in asked)
    if odd := sorted(expected ^ set(answers)):
        raise IncomparableError(
            f"the {side} did not answer the questions of this check: the answer {odd[0]!r} is "
            f"{'missing' if odd[0] in expected else 'not the twin of another'}; record it again"
        )
    for answer in first:
        _require_plain_greedy(side, recording, answer.id)
        for twin in asked:
            if answers[twin.of(answer.id)].prompt_token_ids != answer.prompt_token_ids:
                raise IncomparableError(
                    f"the {side}'s prompt {answer.id!r} reached the engine as other token ids when it was "
                    f"{_ASKED[twin]}; record it again"
                )
    sigma = limits.sigma_without_noise_nats if noise is None else noise.sigma_nats
    sigma = max(SIGMA_FLOOR_NATS, sigma * math.sqrt(sixteen_bit_sides(recording, recording) / pair_sides))
    scale = Scale(tie_nats=0.0, benign_nats=limits.benign_sigmas * sigma, mismatch_nats=limits.mismatch_sigmas * sigma)
    pairs = {twin: tuple(compare(c, answers[twin.of(c.id)], scale) for c in first) for twin in asked}
    return _Side(pairs=pairs, sigma_nats=sigma)


def _require_plain_greedy(side: str, recording: Recording, prompt_id: str) -> None:
    asked, name = recording.workload.sampling_of(prompt_id), recording.workload.name
    if recording.workload.forced_from is not None:
        raise IncomparableError(f"the {side}'s workload {name!r} scores given tokens: nothing is decided there")
    if not asked.is_greedy:
        raise IncomparableError(
            f"the {side}'s prompt {prompt_id!r} of workload {name!r} is sampled at temperature {asked.temperature:g}, "
            "where answers differ by intention; ask for determinism with greedy decoding"
        )
    plain = SamplingParams.greedy(max_tokens=asked.max_tokens, logprobs=asked.logprobs)
    if moved := [key for key in _MOVES_CHOICE if getattr(asked, key) != getattr(plain, key)]:
        raise IncomparableError(
            f"the {side}'s prompt {prompt_id!r} of workload {name!r} sets {', '.join(moved)}: the chosen token is then "
            "not the most probable one, which the size of a divergence rests on; record it without"
        )


def _require_same_prompts(reference: Recording, candidate: Recording) -> None:
    """By prompt: one engine may have twins that the other cannot have, so the workloads differ."""
    left, right = (
        {c.id: (c.prompt_token_ids, r.workload.sampling_of(c.id)) for c in r.completions if _MARK not in c.id}
        for r in (reference, candidate)
    )
    if odd := next((i for i in [*right, *left] if left.get(i) != right.get(i)), None):
        raise IncomparableError(
            f"the two sides were not asked the same: prompt {odd!r} or its sampling differs, "
            f"{workload_detail(reference, candidate)}; record both sides from one workload"
        )


def _is_beyond(pair: Pair) -> bool:
    """What rounding cannot do. An answer that was given up is none."""
    aborted = FinishReason.ABORT in (pair.reference.finish_reason, pair.candidate.finish_reason)
    return aborted or pair.kind in (Kind.MISMATCH, Kind.LENGTH)


def _steps(answer: Completion) -> tuple[TokenLogprobs | None, TokenLogprobs | None]:
    return answer.logprobs, None if answer.terminator is None else answer.terminator.logprobs


def _change_nats(pair: Pair) -> float | None:
    """The largest change of a chosen token's log-probability; None where all numbers are the same to the bit."""
    changed, same = 0.0, True
    for left, right in zip(_steps(pair.reference), _steps(pair.candidate), strict=True):
        if left is None or right is None:
            same = same and left is right
            continue
        buffers = ((left.chosen, right.chosen), (left.top, right.top), (left.top_token_ids, right.top_token_ids))
        same = same and all(a.tobytes() == b.tobytes() for a, b in buffers)
        with np.errstate(invalid="ignore"):
            apart = np.abs(np.frombuffer(left.chosen, np.float32) - np.frombuffer(right.chosen, np.float32))
        changed = max(changed, float(apart.max(initial=0.0)))
    return None if same else changed


# Findings -------------------------------------------------------------------------------------------------------------


def _alike(twin: Twin, candidate: _Side, reference: _Side | None, limits: Limits) -> Finding:
    """One way of asking: what differed on each side, and whether rounding explains it on the candidate's."""
    pairs = candidate.pairs[twin]
    n, suspicious = len(pairs), [p for p in pairs if p.kind is Kind.SUSPICIOUS]
    beyond, unknown = [p for p in pairs if _is_beyond(p)], sum(p.kind is Kind.UNKNOWN for p in pairs)
    allowed = critical_count(rate=limits.suspicious_rate, n=n, alpha=limits.alpha) - 1
    outcome = Outcome.FAIL if beyond or len(suspicious) > allowed else Outcome.PASS
    if unknown and outcome is Outcome.PASS:
        outcome = Outcome.INCONCLUSIVE
    other, interval = _others(pairs), exact_interval(_others(pairs), n, confidence=limits.confidence)
    sentence = (
        f"{_counts(pairs)}; so the share of all such prompts that do is {interval[0]:.0%} to {interval[1]:.0%} "
        f"({limits.confidence:.0%} confidence); largest S {_largest(pairs, candidate.sigma_nats)}; "
        f"{len(beyond)} beyond rounding, {len(suspicious)} suspicious ({allowed} allowed)"
    )
    if unknown:
        sentence += f"; {unknown} cannot be judged, because log-probabilities are missing"
    theirs = None if reference is None else reference.pairs.get(twin)
    evidence = _witnesses(beyond or suspicious or pairs, candidate.sigma_nats)
    if reference is not None and theirs is not None:
        sentence += f"; the reference: {_counts(theirs)}, largest S {_largest(theirs, reference.sigma_nats)}"
        evidence += tuple(f"in the reference, {text}" for text in _witnesses(theirs, reference.sigma_nats)[:1])
    share = other / n if n else 0.0
    before = _others(theirs) / len(theirs) if theirs else None
    return Finding(
        metric=_ASKED[twin],
        outcome=outcome,
        sentence=sentence,
        unit="share of prompts with other tokens",
        reference=before,
        candidate=share,
        delta=None if before is None else share - before,
        interval=interval,
        limit=f"no S over {limits.mismatch_sigmas:g} sigma, no token outside the other's top k and no other end of the "
        f"same tokens; S over {limits.benign_sigmas:g} sigma at most {allowed} times: correct pairs show more with "
        f"probability <= {limits.alpha:g}",
        n=n,
        evidence=evidence,
    )


def _as_reference(twin: Twin, candidate: _Side, reference: _Side, limits: Limits) -> Finding:
    """Whether the candidate gives other tokens where the reference did not, more often than the other way round."""
    before = {p.reference.id: p.kind is not Kind.IDENTICAL for p in reference.pairs[twin]}
    now = {p.reference.id: p.kind is not Kind.IDENTICAL for p in candidate.pairs[twin]}
    more = [i for i in now if now[i] and not before[i]]
    fewer = sum(before[i] and not now[i] for i in now)
    p = mcnemar(len(more), fewer, two_sided=False)
    outcome = Outcome.FAIL if p < limits.alpha else Outcome.PASS
    sentence = f"other tokens only in the candidate on {_many(len(more))}, only in the reference on {fewer} (p {p:.2g})"
    if outcome is Outcome.PASS and mcnemar(len(now), 0, two_sided=False) >= limits.alpha:
        outcome = Outcome.INCONCLUSIVE
        sentence += f"; {_many(len(now))} are too few for this ever to fail"
    return Finding(
        metric=f"as the reference, {_ASKED[twin]}",
        outcome=outcome,
        sentence=sentence,
        unit="prompts",
        reference=float(sum(before.values())),
        candidate=float(sum(now.values())),
        delta=float(len(more) - fewer),
        interval=None,
        limit=f"one-sided exact McNemar test, p at least {limits.alpha:g} (policy identity)",
        n=len(now),
        evidence=_witnesses([p for p in candidate.pairs[twin] if p.reference.id in more], candidate.sigma_nats),
    )


def _data(n: int, limits: Limits) -> Finding:
    """Whether there is enough to pass on. Too little data can still fail."""
    enough = n >= limits.min_prompts
    few = f"too little data: {_many(n)}, at least {limits.min_prompts} are needed"
    return Finding(
        metric="data",
        outcome=Outcome.PASS if enough else Outcome.INCONCLUSIVE,
        sentence=f"enough to judge: {_many(n)}" if enough else few,
        unit="prompts",
        reference=None,
        candidate=float(n),
        delta=None,
        interval=None,
        limit=f"at least {limits.min_prompts} prompts",
        n=n,
        evidence=(),
    )


def _others(pairs: Sequence[Pair]) -> int:
    return sum(p.kind is not Kind.IDENTICAL for p in pairs)


def _counts(pairs: Sequence[Pair]) -> str:
    """How many prompts answered otherwise, in tokens or only in numbers."""
    same = [p for p in pairs if p.kind is Kind.IDENTICAL]
    changes = [change for p in same if (change := _change_nats(p)) is not None]
    text = f"{_others(pairs)} of {_many(len(pairs))} give other tokens, "
    if same and all(p.reference.logprobs is None for p in same):
        return f"{text}numbers are not recorded"
    text += f"{len(changes)} the same tokens and other numbers"
    return f"{text} (by up to {max(changes):.2g} nats)" if changes else text


def _by_slack(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that differ, the worst first; what has no slack differs in its end or hides its numbers."""
    return sorted((p for p in pairs if p.kind is not Kind.IDENTICAL or _is_beyond(p)), key=_badness, reverse=True)


def _badness(pair: Pair) -> tuple[bool, float]:
    return _is_beyond(pair), pair.slack_nats or 0.0


def _largest(pairs: Sequence[Pair], sigma: float) -> str:
    known = [p for p in pairs if p.slack_nats is not None]
    return _slack(max(known, key=_badness), sigma) if known else "none"


def _slack(pair: Pair, sigma: float) -> str:
    if pair.slack_nats is None:
        return "not known"
    return f"{'at least ' * pair.is_bound}{pair.slack_nats:.3f} nats ({pair.slack_nats / sigma:.1f} sigma)"


def _witnesses(pairs: Sequence[Pair], sigma: float) -> tuple[str, ...]:
    return tuple(_witness(p, sigma) for p in _by_slack(pairs)[:_WITNESSES])


def _witness(pair: Pair, sigma: float) -> str:
    """Where the two answers part: S, and on both sides the token, its log-probability and how the text goes on."""
    ours, theirs, at = pair.reference, pair.candidate, pair.position
    if at is None:
        return f"{theirs.id}: {theirs.finish_reason.value}, {ours.id}: {ours.finish_reason.value}"
    shared = first_difference(ours.text or "", theirs.text or "")
    behind = (ours.text or "")[max(0, shared - _EXCERPT) : shared]
    choices = " but ".join(_choice(a, b, at, shared) for a, b in ((ours, theirs), (theirs, ours)))
    return f"{ours.id}, token {at}: S {_slack(pair, sigma)}; after {behind!r} {choices}"


def _choice(answer: Completion, other: Completion, position: int, shared: int) -> str:
    text = (answer.text or "")[shared : shared + _EXCERPT]
    (own, nats), (twins_own, _) = _chosen(answer, position), _chosen(other, position)
    if own is None:
        return f"{answer.id} ends ({answer.finish_reason.value})"
    rows = [f"token {own}: {nats[own]:.3f} nats" if own in nats else f"token {own}"]
    if nats and twins_own is not None:
        known = f": {nats[twins_own]:.3f} nats" if twins_own in nats else " is not in its top k"
        rows.append(f"token {twins_own}{known}")
    return f"{answer.id} has {text!r} ({'; '.join(rows)})"


def _chosen(answer: Completion, position: int) -> tuple[int | None, Mapping[int, float]]:
    """The token or terminator chosen at a position, None behind the end, and the log-probabilities known there."""
    body, end = len(answer.token_ids), answer.terminator
    if position < body:
        token_id, scores, row = answer.token_ids[position], answer.logprobs, position
    elif end is not None:
        token_id, scores, row = end.token_id, end.logprobs, 0
    else:
        return None, {}
    if scores is None or not len(scores):
        return token_id, {}
    return token_id, {**dict(scores.row(row)), token_id: scores.chosen[row]}


def _headline(candidate: _Side, findings: Sequence[Finding], outcome: Outcome) -> str:
    counts = ", ".join(f"{twin.value} {_others(pairs)}" for twin, pairs in candidate.pairs.items())
    pairs = [p for of_twin in candidate.pairs.values() for p in of_twin]
    worst_slack = _largest(pairs, candidate.sigma_nats)
    text = f"prompts with other tokens, of {candidate.prompts}: {counts}; largest S {worst_slack}"
    decided_by = [f for f in findings if f.outcome is outcome is not Outcome.PASS]
    reasons = ", ".join(f.sentence if f.metric == "data" else f.metric for f in decided_by)
    return f"{text}; decided by {reasons}" if reasons else text


def _warnings(noise: Noise | None, reference: _Side | None, limits: Limits) -> tuple[str, ...]:
    found = []
    if noise is None:
        found.append(
            f"no noise was measured: sigma {limits.sigma_without_noise_nats:g} nats is a documented value for one 135M "
            "model on a CPU, a guess for yours; add a noise engine to the target"
        )
    if reference is None and limits.as_reference:
        found.append(
            "the reference was not asked, so nothing says whether the candidate is as deterministic as it was; record "
            "the reference too"
        )
    for twin, pairs in reference.pairs.items() if reference else ():
        if bad := [p for p in pairs if _is_beyond(p)]:
            found.append(
                f"the reference itself differs beyond rounding on {_many(len(bad))} where they are {_ASKED[twin]} "
                f"({bad[0].candidate.id}): a doubtful yardstick"
            )
    return tuple(found)


def _many(n: int) -> str:
    return f"{n} prompt{'s' * (n != 1)}"
