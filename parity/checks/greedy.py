"""Greedy decoding, free-running: is every divergence small enough to be rounding?

Two correct 16-bit engines part ways on most prompts, because near-ties fall either way. So texts are not compared; at
the first divergence of each prompt (the last position where both engines saw the same prefix) the slack

    S = [l_ref(a) - l_ref(b)] + [l_cand(b) - l_cand(a)]     a, b: the tokens they chose; l: raw log-probability, nats

is exactly the margin shift between the engines, and is held against sigma, the measured noise of that shift:

    tie         S <= 1e-6
    benign      S <= 6 sigma
    suspicious  6 sigma < S <= 25 sigma     two in a thousand prompts of correct pairs; counted over the set
    mismatch    S > 25 sigma, or a token that is not among the other's top k; one is enough

Length and finish reason are findings of their own: nothing is cut off silently. An engine that does not take its own
most probable token fails by that alone, since S would say nothing about it.

Source of the rule (R1), of its constants and of their measured error rates: docs/checks/greedy.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from parity import diagnose
from parity.comparable import MODEL, first_difference, require_same_inputs
from parity.divergence import Kind, OffArgmax, Pair, Scale, WrongEnd, compare_all, in_asked_order, off_argmax, wrong_end
from parity.errors import IncomparableError
from parity.noise import Noise
from parity.prompts import SamplingParams
from parity.recording import FinishReason, Recording
from parity.stats import critical_count, detectable_share
from parity.verdict import Finding, Outcome, Verdict, worst

REQUIRES = MODEL
_WITNESSES = 3
_EXCERPT = 24
_MOVES_CHOICE = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos")
_of_candidate = partial(Finding, unit="prompts", reference=None, delta=None, interval=None)
_WORDS = {
    Kind.TIE: ("tie", "ties"),
    Kind.BENIGN: ("benign", "benign"),
    Kind.SUSPICIOUS: ("suspicious", "suspicious"),
    Kind.MISMATCH: ("mismatch", "mismatches"),
    Kind.LENGTH: ("ends elsewhere", "end elsewhere"),
    Kind.UNKNOWN: ("without log-probabilities", "without log-probabilities"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/greedy.md.

    sigma_without_noise_nats: used, with a warning, where no noise was measured; the documented value for one 16-bit
        135M model on a CPU. It is a guess about any other model.
    """

    tie_nats: float = 1e-6
    benign_sigmas: float = 6.0
    mismatch_sigmas: float = 25.0
    suspicious_rate: float = 0.0025
    alpha: float = 0.002
    power: float = 0.9
    min_prompts: int = 32
    min_noise_positions: int = 2000
    sigma_without_noise_nats: float = 0.13

    RATES: ClassVar[tuple[str, ...]] = ("alpha",)

    def at(self, alpha: float) -> Limits:
        """The same, with every rule of chance at this error rate."""
        return replace(self, alpha=alpha)


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge a candidate's greedy answers against a reference's.

    Raises:
        IncomparableError: If the two did not answer the same prompts, or plain greedy decoding was not asked, or the
            reference did not decode greedily or gave an answer up.
    """
    require_same_inputs(reference, candidate)
    _require_plain_greedy(reference)
    sigma = limits.sigma_without_noise_nats if noise is None else noise.sigma_nats
    _require_sound_reference(reference, sigma, limits)
    scale = Scale(
        tie_nats=limits.tie_nats,
        benign_nats=limits.benign_sigmas * sigma,
        mismatch_nats=limits.mismatch_sigmas * sigma,
    )
    pairs = compare_all(reference, candidate, scale)
    findings = (
        _divergences(pairs, sigma, limits),
        _mismatches(pairs, sigma, limits),
        _own_argmax(pairs, sigma, limits),
        _lengths(pairs, candidate.workload.sampling.max_tokens),
        _data(pairs, noise, sigma, limits),
    )
    outcome = worst([f.outcome for f in findings])
    decided_by = [f for f in findings if f.outcome is outcome is not Outcome.PASS]
    differing = diagnose.changed(reference, candidate)
    causes = [f.sentence for f in findings[2:4] if f.outcome is Outcome.FAIL]
    if outcome is Outcome.FAIL:
        causes += diagnose.causes(differing)
    return Verdict(
        check="greedy",
        reference=reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(pairs, decided_by, sigma),
        findings=findings,
        causes=tuple(causes),
        changed=differing,
        warnings=_warnings(noise, sigma),
    )


def _require_plain_greedy(reference: Recording) -> None:
    """Greedy, and nothing that moves the choice away from the raw log-probabilities, which are all this check sees."""
    asked, name = reference.workload.sampling, reference.workload.name
    if not asked.is_greedy:
        raise IncomparableError(
            f"workload {name!r} samples at temperature {asked.temperature:g}; "
            "sampled texts are never compared token by token"
        )
    plain = SamplingParams.greedy(max_tokens=asked.max_tokens, logprobs=asked.logprobs)
    moved = [f"{key} {getattr(asked, key)!r}" for key in _MOVES_CHOICE if getattr(asked, key) != getattr(plain, key)]
    if moved:
        raise IncomparableError(
            f"workload {name!r} sets {', '.join(moved)}: the chosen token is then not the most probable one by the raw "
            "log-probabilities, which the greedy check rests on; record both sides without it"
        )


def _require_sound_reference(reference: Recording, sigma: float, limits: Limits) -> None:
    answers = in_asked_order(reference)
    aborted = [c.id for c in answers if c.finish_reason is FinishReason.ABORT]
    if aborted:
        raise IncomparableError(
            f"the reference {reference.label} gave up {len(aborted)} of {_many(len(answers), 'answer')}, "
            f"first {aborted[0]!r}; record it again"
        )
    found = off_argmax(answers, tolerance_nats=limits.benign_sigmas * sigma)
    if found.off:
        raise IncomparableError(
            f"the reference {reference.label} did not decode greedily: {_off_tokens(found)} "
            f"({found.witnesses[0]}); record it again with greedy decoding"
        )


def _divergences(pairs: Sequence[Pair], sigma: float, limits: Limits) -> Finding:
    """The set verdict on suspicious divergences."""
    suspicious = [p for p in pairs if p.kind is Kind.SUSPICIOUS]
    unknown = sum(p.kind is Kind.UNKNOWN for p in pairs)
    allowed = critical_count(rate=limits.suspicious_rate, n=len(pairs), alpha=limits.alpha) - 1
    outcome = Outcome.FAIL if len(suspicious) > allowed else Outcome.PASS
    if unknown and outcome is Outcome.PASS:
        outcome = Outcome.INCONCLUSIVE
    sentence = (
        f"{_where(pairs)}; {len(suspicious)} suspicious (S over {limits.benign_sigmas:g} sigma = "
        f"{limits.benign_sigmas * sigma:.3g} nats), {allowed} allowed"
    )
    if unknown:
        sentence += f"; {unknown} cannot be judged, because log-probabilities are missing"
    if allowed < len(pairs):
        share = detectable_share(n=len(pairs), count=allowed + 1, power=limits.power)
        sentence += (
            f"; a fault that makes {100 * share:.0f} % of prompts suspicious is caught with "
            f"{100 * limits.power:.0f} % probability"
        )
    else:
        sentence += "; too few prompts for this count ever to fail"
    return _of_candidate(
        metric="suspicious divergences",
        outcome=outcome,
        sentence=sentence,
        candidate=float(len(suspicious)),
        limit=f"at most {allowed} of {len(pairs)}: correct pairs show more with probability <= {limits.alpha:g}",
        margin=float(allowed),
        n=len(pairs),
        evidence=_witnesses(suspicious or [p for p in pairs if p.kind is not Kind.MISMATCH], sigma),
    )


def _mismatches(pairs: Sequence[Pair], sigma: float, limits: Limits) -> Finding:
    found = [p for p in pairs if p.kind is Kind.MISMATCH]
    return _of_candidate(
        metric="mismatches",
        outcome=Outcome.FAIL if found else Outcome.PASS,
        sentence=f"{len(found) or 'none'} of {_many(len(pairs), 'prompt')} "
        f"{'diverges' if len(found) <= 1 else 'diverge'} by more than rounding can "
        f"(S over {limits.mismatch_sigmas:g} sigma = {limits.mismatch_sigmas * sigma:.3g} nats, or a token outside "
        "the other's top k)",
        candidate=float(len(found)),
        limit="none: the largest shift seen between correct pairs was 11.8 sigma in 117,000 positions",
        n=len(pairs),
        evidence=_witnesses(found, sigma),
    )


def _own_argmax(pairs: Sequence[Pair], sigma: float, limits: Limits) -> Finding:
    """Greedy means: the most probable token by the engine's own account. Needs no reference."""
    found = off_argmax([p.candidate for p in pairs], tolerance_nats=limits.benign_sigmas * sigma)
    outcome = Outcome.FAIL if found.off else Outcome.PASS
    if found.not_numbers:
        sentence = f"the candidate's numbers are broken: {_off_tokens(found)}"
    elif found.off and found.off == found.off_stops:
        sentence = f"the candidate ends answers by stop tokens that it did not choose: {_off_tokens(found)}"
    elif found.off:
        sentence = (
            f"the candidate samples where greedy decoding was asked: {_off_tokens(found)} "
            "(temperature, or an engine default that overrides it)"
        )
    elif found.steps:
        sentence = (
            f"each of the candidate's {_many(found.steps, 'token')}, stop tokens included, is its own most probable"
        )
    elif all(p.kind is Kind.IDENTICAL for p in pairs):
        sentence = "the candidate returned no log-probabilities, and took the reference's tokens throughout"
    else:
        outcome = Outcome.INCONCLUSIVE
        sentence = "cannot be seen: the candidate returned no log-probabilities"
    return Finding(
        metric="greedy decoding",
        outcome=outcome,
        sentence=sentence,
        unit="tokens",
        reference=0.0,
        candidate=float(found.off),
        delta=float(found.off),
        interval=None,
        limit=f"none more than {limits.benign_sigmas:g} sigma below the engine's own top-1",
        n=found.steps,
        evidence=found.witnesses,
    )


def _off_tokens(found: OffArgmax) -> str:
    verb = "is" if found.off == 1 else "are"
    if found.not_numbers:
        return (
            f"{found.not_numbers} of {_many(found.steps, 'log-probability', 'log-probabilities')} {verb} not a number"
        )
    return f"{found.off} of its {_many(found.steps, 'token')} {verb} not its own most probable"


def _lengths(pairs: Sequence[Pair], wanted: int) -> Finding:
    """Answers that end where they should not."""
    ends = [(p, end) for p in pairs if (end := wrong_end(p, max_tokens=wanted)) is not None]
    ref_stops = sum(p.reference.finish_reason is FinishReason.STOP for p in pairs)
    stops = sum(p.candidate.finish_reason is FinishReason.STOP for p in pairs)
    ref_tokens, tokens = sum(len(p.reference.token_ids) for p in pairs), sum(len(p.candidate.token_ids) for p in pairs)
    early = sum(p.candidate.finish_reason is FinishReason.LENGTH and len(p.candidate.token_ids) < wanted for p in pairs)
    sentence = (
        f"every answer ends where it should; by itself, not by length: {ref_stops} in the reference, {stops} in the "
        f"candidate; tokens in all: {ref_tokens} and {tokens}"
    )
    if early:
        sentence += f"; {early} by length before max_tokens {wanted}, on both sides alike"
    if ends:
        sentence = _length_cause([end for _, end in ends], pairs, wanted)
    return Finding(
        metric="length and finish reason",
        outcome=Outcome.FAIL if ends else Outcome.PASS,
        sentence=sentence if pairs else "there is no answer",
        unit="prompts",
        reference=float(ref_stops),
        candidate=float(stops),
        delta=float(stops - ref_stops),
        interval=None,
        limit=f"an answer that ends by length has max_tokens = {wanted} tokens, or as many as the reference's; none is "
        "aborted",
        n=len(pairs),
        evidence=tuple(
            f"{p.candidate.id}: {_many(len(p.candidate.token_ids), 'token')}, {p.candidate.finish_reason.value}; the "
            f"reference {len(p.reference.token_ids)}, {p.reference.finish_reason.value}"
            for p, _ in ends[:_WITNESSES]
        ),
    )


def _length_cause(ends: Sequence[WrongEnd], pairs: Sequence[Pair], wanted: int) -> str:
    head = f"{len(ends)} of {_many(len(pairs), 'answer')} {'ends' if len(ends) == 1 else 'end'} wrongly"
    by_length = {len(p.candidate.token_ids) for p in pairs if p.candidate.finish_reason is FinishReason.LENGTH}
    if set(ends) <= {WrongEnd.CUT_OFF, WrongEnd.TOO_LONG} and len(by_length) == 1:
        (count,) = by_length
        return (
            f"{head}: each that ran to its limit is {_many(abs(wanted - count), 'token')} too "
            f"{'short' if count < wanted else 'long'} ({count} for max_tokens {wanted}); "
            "max_tokens does not reach the engine as asked"
        )
    return f"{head}: {'; '.join(f'{count} {end.value}' for end, count in Counter(ends).most_common())}"


def _data(pairs: Sequence[Pair], noise: Noise | None, sigma: float, limits: Limits) -> Finding:
    """Whether there is enough to pass on. Too little data can still fail."""
    diverged = any(p.kind is not Kind.IDENTICAL for p in pairs)
    problems = []
    if len(pairs) < limits.min_prompts:
        problems.append(f"{_many(len(pairs), 'prompt')}, at least {limits.min_prompts} are needed")
    if noise is not None and diverged and noise.positions < limits.min_noise_positions:
        problems.append(
            f"sigma rests on {_many(noise.positions, 'position')}, at least {limits.min_noise_positions} are needed"
        )
    measured = f"sigma (the rounding noise in S) {sigma:.3g} nats, " + (
        "not measured"
        if noise is None
        else f"measured on {_many(noise.positions, 'position')} of {_many(noise.prompts, 'prompt')} ({noise.source})"
    )
    return _of_candidate(
        metric="data",
        outcome=Outcome.INCONCLUSIVE if problems else Outcome.PASS,
        sentence=f"too little data: {'; '.join(problems)}"
        if problems
        else f"enough to judge: {_many(len(pairs), 'prompt')}; {measured}",
        candidate=float(len(pairs)),
        limit=f"at least {limits.min_prompts} prompts, sigma from at least {limits.min_noise_positions} positions",
        n=len(pairs),
        evidence=(),
    )


def _headline(pairs: Sequence[Pair], decided_by: Sequence[Finding], sigma: float) -> str:
    count = Counter(p.kind for p in pairs)
    parts = [f"{count[Kind.IDENTICAL]} of {_many(len(pairs), 'prompt')} identical"]
    parts += [f"{n} {one if n == 1 else many}" for kind, (one, many) in _WORDS.items() if (n := count[kind])]
    if ordered := _by_slack(pairs):
        parts.append(f"largest S {_slack(ordered[0], sigma)}")
    reasons = ", ".join(f.sentence if f.metric == "data" else f.metric for f in decided_by)
    return ", ".join(parts) + (f"; decided by {reasons}" if reasons else "")


def _where(pairs: Sequence[Pair]) -> str:
    """How many prompts diverged, where, and with what slack."""
    at = np.array([p.position for p in pairs if p.position is not None])
    if not at.size:
        return f"none of {_many(len(pairs), 'prompt')} diverges"
    text = f"{at.size} of {_many(len(pairs), 'prompt')} {'diverges' if at.size == 1 else 'diverge'}, "
    first, last = at.min(), at.max()
    text += f"at token {first}" if first == last else f"in the median at token {np.median(at):.0f} ({first} to {last})"
    slack = np.array([p.slack_nats for p in pairs if p.slack_nats is not None])
    if slack.size:
        text += f"; slack S (shift of the margin between the two tokens) largest {slack.max():.3f} nats"
    if slack.size > 1:
        text += f", median {np.median(slack):.3f} nats, 90 % below {np.quantile(slack, 0.9):.3f} nats"
    return text


def _by_slack(pairs: Iterable[Pair]) -> list[Pair]:
    return sorted((p for p in pairs if p.slack_nats is not None), key=lambda p: -(p.slack_nats or 0.0))


def _slack(pair: Pair, sigma: float) -> str:
    slack = pair.slack_nats or 0.0
    return f"{'at least ' * pair.is_bound}{slack:.3f} nats ({slack / sigma:.1f} sigma)"


def _witnesses(pairs: Iterable[Pair], sigma: float) -> tuple[str, ...]:
    """The largest divergences, for a person to look at: where, how far apart, and how the texts go on."""
    return tuple(_witness(p, sigma) for p in _by_slack(pairs)[:_WITNESSES])


def _witness(pair: Pair, sigma: float) -> str:
    ours, theirs = pair.reference.text or "", pair.candidate.text or ""
    shared = first_difference(ours, theirs)
    own, other = ("?" if half is None else f"{half:.3f}" for half in pair.halves)
    outside = ", a token is outside the other's top k" * pair.outside
    texts = f"after {ours[max(0, shared - _EXCERPT) : shared]!r} reference {_next(ours, shared)}, "
    texts += f"candidate {_next(theirs, shared)}"
    if ours == theirs:
        texts = "the texts are the same, the tokens are not"
    return (
        f"{pair.reference.id}, token {pair.position}: S {_slack(pair, sigma)} = {own} in the reference + {other} in "
        f"the candidate{outside}; {texts}"
    )


def _next(text: str, start: int) -> str:
    return repr(text[start : start + _EXCERPT]) if start < len(text) else "ends"


def _many(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _warnings(noise: Noise | None, sigma: float) -> tuple[str, ...]:
    if noise is None:
        return (
            f"no noise was measured: sigma {sigma:g} nats is a documented value for one 135M model on a CPU, a guess "
            "for yours; add a noise engine to the target",
        )
    return ()
