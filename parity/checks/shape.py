"""Termination and shape: laws that any correct engine keeps, whatever tokens it chose.

Two kinds of finding. A law about the candidate's own answers (numbers, ends, stop strings), about end-of-sequence
tokens, or about text and tokens holds without exception: one breach fails. Lengths, ends and degenerate answers are
counted over paired prompts, and fail only where chance does not explain the difference; they are screens, which catch
what is gross, and a pass of theirs is no proof of equivalence.

Holds for greedy and sampled workloads, with or without log-probabilities. A finding with nothing to look at is left
out. Source of the laws, of their limits and of the error rates: docs/checks/shape.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np

from parity import detokenised, diagnose
from parity.comparable import MODEL, first_difference, require_same_inputs
from parity.divergence import Pair, Scale, WrongEnd, compare_all, in_asked_order, wrong_end
from parity.errors import IncomparableError
from parity.noise import Noise
from parity.recording import Completion, FinishReason, Recording
from parity.rows import Tolerance, examine
from parity.stats import log_ratio, mcnemar
from parity.verdict import Finding, Outcome, Verdict, worst

REQUIRES = MODEL
_WITNESSES = 3
_EXCERPT = 40
_ROUNDING = Tolerance()
_END_TOKENS = "end-of-sequence tokens"
_over_prompts = partial(Finding, unit="prompts", interval=None)
# What is wrong with an end by itself. The other kinds of wrong end rest on a token or string, which are laws here.
_WRONG_ENDS = (WrongEnd.ABORTED, WrongEnd.CUT_OFF, WrongEnd.TOO_LONG)
_ANY_SCALE = Scale(tie_nats=0.0, benign_nats=0.0, mismatch_nats=0.0)  # slack plays no part in those ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source of each: docs/checks/shape.md, "Limits".

    order_nats, own_entry_nats, sum_excess: what rounding may do to the numbers, see `parity.rows.Tolerance`.
    shortest_ratio, longest_ratio: of the mean output lengths, candidate to reference.
    confidence: of the interval of that ratio.
    alpha: of each paired count.
    loop_tokens, loop_period: an answer loops if its last `loop_tokens` tokens repeat `loop_period` tokens or fewer.
    repeated_characters: so many equal characters, and no other, are degenerate.
    degenerate_share, sound_share: over the first of the candidate's answers and under the second of the reference's
        are degenerate: fails without a test, from `min_share_prompts` prompts on.
    """

    order_nats: float = _ROUNDING.order_nats
    own_entry_nats: float = _ROUNDING.own_entry_nats
    sum_excess: float = _ROUNDING.sum_excess
    shortest_ratio: float = 0.9
    longest_ratio: float = 1.1
    confidence: float = 0.99
    alpha: float = 0.001
    loop_tokens: int = 32
    loop_period: int = 8
    repeated_characters: int = 16
    degenerate_share: float = 0.5
    sound_share: float = 0.1
    min_share_prompts: int = 16
    min_prompts: int = 32

    RATES: ClassVar[tuple[str, ...]] = ("alpha", "confidence")

    def at(self, alpha: float) -> Limits:
        """The same, with every rule of chance at this error rate."""
        return replace(self, alpha=alpha, confidence=1.0 - 2.0 * alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """One answer that breaks one rule. `rule` completes "3 answers: ..."; `witness` is for a person to look at."""

    id: str
    rule: str
    witness: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a law saw: in how many answers there was something to look at, what broke it, and what that points to."""

    n: int
    faults: tuple[_Fault, ...] = ()
    causes: tuple[str, ...] = ()


_Law = Callable[[Recording, Recording, Limits], _Seen]


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:  # noqa: ARG001
    """Judge the shape of a candidate's answers. `noise` plays no part.

    Raises:
        IncomparableError: If the two did not answer the same prompts, or the workload scores given tokens, or the
            reference gave an answer up.
    """
    require_same_inputs(reference, candidate)
    _require_answers(reference)
    findings: list[Finding] = []
    causes: list[str] = []
    warnings: list[str] = []
    for metric, law, one_sided, rule in _LAWS:
        seen = law(candidate, reference, limits)
        # A law about both sides at once, turned round, would only say the same again.
        own = law(reference, candidate, limits) if one_sided else None
        if seen.n:
            findings.append(_law_finding(metric, seen, own, rule))
            causes += seen.causes
        if own is not None and own.faults:
            warnings.append(
                f"the reference itself breaks the law on {metric}, {_faults(own)} ({own.faults[0].witness}): "
                "a doubtful yardstick"
            )
    pairs = compare_all(reference, candidate, _ANY_SCALE)
    for finding, cause in (_output_length(pairs, limits), _own_ends(pairs, limits), _degenerate(pairs, limits)):
        if finding is not None:
            findings.append(finding)
            causes += [cause] * (finding.outcome is Outcome.FAIL)
    findings.append(_data(len(pairs), limits))
    outcome = worst([f.outcome for f in findings])
    differing = diagnose.changed(reference, candidate)
    return Verdict(
        check="shape",
        reference=reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(findings, outcome, len(pairs)),
        findings=tuple(findings),
        causes=tuple(causes),
        changed=differing,
        warnings=tuple(warnings),
    )


def _require_answers(reference: Recording) -> None:
    asked = reference.workload
    if asked.forced_from is not None:
        raise IncomparableError(
            f"workload {asked.name!r} scores given tokens: nothing ends by itself there; "
            "judge the shape of a workload that generates"
        )
    aborted = [c.id for c in in_asked_order(reference) if c.finish_reason is FinishReason.ABORT]
    if aborted:
        raise IncomparableError(
            f"the reference {reference.label} gave up {len(aborted)} of {_many(len(reference.completions), 'answer')}, "
            f"first {aborted[0]!r}; record it again"
        )


# Laws ----------------------------------------------------------------------------------------------------------------


def _numbers(own: Recording, _: Recording, limits: Limits) -> _Seen:
    """Log-probabilities that no distribution has."""
    tolerance = Tolerance(
        order_nats=limits.order_nats, own_entry_nats=limits.own_entry_nats, sum_excess=limits.sum_excess
    )
    rows = examine(in_asked_order(own), tolerance)
    causes: dict[str, str] = {}
    for bad in rows.bad:
        causes.setdefault(bad.rule, bad.cause)
    return _Seen(
        n=rows.scored,
        faults=tuple(_Fault(id=bad.id, rule=bad.rule, witness=bad.witness) for bad in rows.bad),
        causes=tuple(dict.fromkeys(causes.values())),
    )


def _ends(own: Recording, other: Recording, limits: Limits) -> _Seen:  # noqa: ARG001  all laws are called alike
    """How and where answers end, against what was asked."""
    asked, stops = own.workload.sampling, set(own.workload.sampling.stop_token_ids)
    enders = stops if asked.ignore_eos else stops | _end_ids(own)
    faults: list[_Fault] = []
    by_length = {len(c.token_ids) for c in own.completions if c.finish_reason is FinishReason.LENGTH}
    for pair in compare_all(other, own, _ANY_SCALE):
        answer, count = pair.candidate, len(pair.candidate.token_ids)
        end, stopped, broken = _end_id(answer), answer.finish_reason is FinishReason.STOP, []
        wrong = wrong_end(pair, max_tokens=asked.max_tokens)
        if wrong in _WRONG_ENDS:
            broken.append(wrong.value)
        if stopped and end is None and not isinstance(answer.stop_reason, str):
            broken.append("stopped and naming neither a stop token nor a stop string")
        if stopped and asked.ignore_eos and end is not None and end not in stops:
            broken.append("ended by an end-of-sequence token under ignore_eos")
        if stopped and count < asked.min_tokens:
            broken.append(f"shorter than min_tokens {asked.min_tokens}")
        if not enders.isdisjoint(later := answer.token_ids[asked.min_tokens :]):
            token_id = next(i for i in later if i in enders)
            broken.append("going on after a token that ends answers")
            witness = f", token {token_id} at position {asked.min_tokens + later.index(token_id)}"
        else:
            witness = ""
        faults += [_Fault(id=answer.id, rule=rule, witness=_ending(pair) + witness) for rule in broken]
    rules = {f.rule for f in faults}
    causes = [text for rule, text in _END_CAUSES.items() if rule in rules]
    if faults and len(by_length) == 1 and rules <= {WrongEnd.CUT_OFF.value, WrongEnd.TOO_LONG.value}:
        (count,) = by_length
        causes = [f"max_tokens does not reach the engine as asked: {count} tokens for max_tokens {asked.max_tokens}"]
    causes += [f"min_tokens {asked.min_tokens} does not reach the engine"] * any("min_tokens" in r for r in rules)
    return _Seen(n=len(own.completions), faults=tuple(faults), causes=tuple(causes))


_END_CAUSES = {
    WrongEnd.ABORTED.value: "the engine gave requests up: see its log",
    WrongEnd.CUT_OFF.value: "a context or output limit of the engine, below what was asked",
    WrongEnd.TOO_LONG.value: "max_tokens does not reach the engine",
    "stopped and naming neither a stop token nor a stop string": "the adapter drops the token that ended the answer",
    "ended by an end-of-sequence token under ignore_eos": "ignore_eos does not reach the engine",
    "going on after a token that ends answers": "stop tokens do not end every answer: stop_token_ids do not reach the "
    "engine, or the adapter leaves the last token in the body",
}


def _ending(pair: Pair) -> str:
    answer, other = pair.candidate, pair.reference
    by = f" by {_end_id(answer)}" if _end_id(answer) is not None else ""
    return (
        f"{answer.id}: {_many(len(answer.token_ids), 'token')}, {answer.finish_reason.value}{by}; the other side's "
        f"answer {len(other.token_ids)}, {other.finish_reason.value}"
    )


def _end_id(answer: Completion) -> int | None:
    """The token that ended an answer, also where an engine names it only as the reason."""
    if answer.terminator is not None:
        return answer.terminator.token_id
    return answer.stop_reason if isinstance(answer.stop_reason, int) else None


def _end_ids(recording: Recording) -> set[int]:
    return {end for c in recording.completions if (end := _end_id(c)) is not None}


def _stop_strings(own: Recording, _: Recording, limits: Limits) -> _Seen:  # noqa: ARG001  all laws are called alike
    """A stop string is never in a text; where min_tokens let some through unheeded, texts do not tell which."""
    asked = own.workload.sampling
    faults, n, kept, passed = [], 0, False, False
    for answer in in_asked_order(own):
        named = answer.stop_reason if isinstance(answer.stop_reason, str) else None
        text = None if asked.min_tokens else answer.text
        n += named is not None or (bool(asked.stop) and text is not None)
        if named is not None and named not in asked.stop:
            witness = f"{answer.id}: stopped by {named!r}, asked were {list(asked.stop)!r}"
            faults.append(_Fault(id=answer.id, rule="stopped by a string that was not asked", witness=witness))
        for stop in [s for s in asked.stop if text is not None and s in text][:1]:
            ends = text is not None and text.endswith(stop) and named is not None
            kept, passed = kept or ends, passed or not ends
            at = (text or "").index(stop)
            words = f"{stop!r} at character {at}, in {(text or '')[max(0, at - _EXCERPT) : at + _EXCERPT]!r}"
            faults.append(_Fault(id=answer.id, rule="with a stop string in the text", witness=f"{answer.id}: {words}"))
    causes = ["the candidate leaves the stop string in the text that it ends"] * kept
    causes += ["stop strings do not end the candidate's answers"] * passed
    if any("not asked" in f.rule for f in faults):
        causes.append("the candidate ends answers by stop strings of its own")
    return _Seen(n=n, faults=tuple(faults), causes=tuple(causes))


def _end_tokens(own: Recording, other: Recording, limits: Limits) -> _Seen:  # noqa: ARG001  all laws are called alike
    """A token that ends answers on one side and stands inside them on the other, where it ends none.

    A side on which such a token merely was among the top k shows nothing: it may never have been chosen.
    """
    asked = own.workload.sampling
    mine, theirs = (_end_ids(side) - set(asked.stop_token_ids) for side in (own, other))
    if asked.ignore_eos or not mine | theirs:
        return _Seen(n=0)
    faults = []
    for side, only, which in ((own, theirs - mine, "candidate"), (other, mine - theirs, "reference")):
        ender = "reference" if which == "candidate" else "candidate"
        for answer in in_asked_order(side):
            later = answer.token_ids[asked.min_tokens :]
            for token_id in sorted(only.intersection(later)):
                at = asked.min_tokens + later.index(token_id)
                rule = f"of the {which} and going on after token {token_id}, at which the {ender} ends"
                witness = f"{answer.id}: token {token_id} at position {at} of {len(answer.token_ids)} in the {which}"
                faults.append(_Fault(id=answer.id, rule=rule, witness=witness))
    cause = f"the candidate ends at other {_END_TOKENS}: {_listed(theirs)} in the reference, {_listed(mine)} in the "
    cause += "candidate"
    return _Seen(n=len(own.completions), faults=tuple(faults), causes=(cause,) if faults else ())


def _listed(token_ids: set[int]) -> str:
    return ", ".join(map(str, sorted(token_ids))) or "none"


def _texts(own: Recording, other: Recording, limits: Limits) -> _Seen:  # noqa: ARG001  all laws are called alike
    """Equal token ids have equal texts, on both sides and across prompts; no token has no text.

    U+FFFD at the very end is left aside: of a character that the answer cuts in two, some engines hold the first bytes
    back and others show them so.
    """
    first: dict[tuple[int, ...], Completion] = {}
    for answer in in_asked_order(other):
        if answer.text is not None:
            first.setdefault(answer.token_ids, answer)
    faults, causes, n = [], [], 0
    for answer in in_asked_order(own):
        if answer.text is None:
            continue
        twin = other.by_id[answer.id]
        n += answer.token_ids in first or not answer.token_ids
        if twin.text is None or twin.token_ids != answer.token_ids:
            twin = first.setdefault(answer.token_ids, answer)
        ours, theirs = twin.text or "", answer.text
        if not answer.token_ids and theirs:
            witness = f"{answer.id}: no token, and the text {theirs[:_EXCERPT]!r}"
            faults.append(_Fault(id=answer.id, rule="with a text and without a token", witness=witness))
            causes.append("the candidate's text holds more than its tokens")
        elif not detokenised.alike(ours, theirs):
            at = first_difference(ours, theirs)
            start = max(0, at - _EXCERPT // 2)
            shown = f"{ours[start : at + _EXCERPT]!r} in {twin.id}, {theirs[start : at + _EXCERPT]!r} in the candidate"
            witness = f"{answer.id}: the texts of equal tokens part at character {at}: {shown}"
            faults.append(_Fault(id=answer.id, rule="with another text than equal tokens have", witness=witness))
            causes.append(_text_cause(ours, theirs))
    return _Seen(n=n, faults=tuple(faults), causes=tuple(dict.fromkeys(causes)))


def _text_cause(ours: str, theirs: str) -> str:
    if "\ufffd" in theirs and "\ufffd" not in ours:
        return "the candidate detokenises token by token: characters of several tokens become U+FFFD"
    if "".join(ours.split()) == "".join(theirs.split()):
        return "the texts differ in white space only: detokenised piece by piece, or with and without the prompt before"
    return "another tokenizer or detokeniser on one side, or texts that belong to other answers"


_LAWS: tuple[tuple[str, _Law, bool, str], ...] = (
    ("numbers", _numbers, True, "log-probabilities are finite, at most 0, sorted, and add up to at most 1 (laws)"),
    ("ends", _ends, True, "every answer ends as max_tokens, min_tokens, stop tokens and ignore_eos ask (law)"),
    ("stop strings", _stop_strings, True, "a stop string ends the answer and is not in its text (law)"),
    (_END_TOKENS, _end_tokens, False, "a token that ends answers on one side stands inside none on the other (law)"),
    ("text and tokens", _texts, False, "equal token ids have equal texts (law)"),
)


def _law_finding(metric: str, seen: _Seen, own: _Seen | None, rule: str) -> Finding:
    broken = len({f.id for f in seen.faults})
    theirs = None if own is None else float(len({f.id for f in own.faults}))
    return Finding(
        metric=metric,
        outcome=Outcome.FAIL if broken else Outcome.PASS,
        sentence=_faults(seen) if broken else f"right in {_many(seen.n, 'answer')}, all there are",
        unit="answers",
        reference=theirs,
        candidate=float(broken),
        delta=None if theirs is None else broken - theirs,
        interval=None,
        limit=f"none: {rule}",
        n=seen.n,
        evidence=tuple(f.witness for f in seen.faults[:_WITNESSES]),
    )


def _faults(seen: _Seen) -> str:
    broken, rules = len({f.id for f in seen.faults}), Counter(f.rule for f in seen.faults)
    return f"{broken} of {_many(seen.n, 'answer')} wrong: {'; '.join(f'{n} {rule}' for rule, n in rules.most_common())}"


# Paired counts -------------------------------------------------------------------------------------------------------


def _output_length(pairs: Sequence[Pair], limits: Limits) -> tuple[Finding | None, str]:
    ours, theirs = ([len(c.token_ids) for c in side] for side in _sides(pairs))
    if not sum(ours) + sum(theirs):
        return None, ""
    low, high = limits.shortest_ratio, limits.longest_ratio
    ratio, interval = log_ratio(theirs, ours), None
    means = f"output tokens per answer: {np.mean(ours):.1f} in the reference, {np.mean(theirs):.1f} in the candidate"
    enough, outcome = len(pairs) >= limits.min_prompts, Outcome.INCONCLUSIVE
    if ratio is None:
        sentence = f"{means}; {_many(len(pairs), 'prompt')} with too few tokens give no ratio"
    else:
        interval = ratio.lower((1.0 - limits.confidence) / 2), ratio.upper((1.0 - limits.confidence) / 2)
        sentence = f"{means}; ratio {ratio.value:.3f}, between {interval[0]:.3f} and {interval[1]:.3f} with "
        sentence += f"{100 * limits.confidence:g} % confidence"
        if low <= interval[0] and interval[1] <= high:
            outcome = Outcome.PASS
        elif not enough:
            sentence += "; too few prompts to say whether that is chance"
        elif interval[1] < low or interval[0] > high:
            outcome = Outcome.FAIL
        else:
            outcome = Outcome.PASS
            sentence += f"; not shown to lie within {low:g} and {high:g}, nor outside"
    finding = Finding(
        metric="output length",
        outcome=outcome,
        sentence=sentence,
        unit="tokens per answer",
        reference=float(np.mean(ours)),
        candidate=float(np.mean(theirs)),
        delta=float(np.mean(theirs) - np.mean(ours)),
        interval=interval,
        limit=f"the interval of the ratio (candidate to reference) not wholly outside {low:g} to {high:g} (MLPerf "
        "Inference's rule for output tokens)",
        n=len(pairs),
        evidence=_length_witnesses(pairs) if outcome is not Outcome.PASS else (),
    )
    direction = "shorter" if sum(theirs) < sum(ours) else "longer"
    return finding, f"the candidate's answers are {direction}: other ends, another prompt, or broken text"


def _sides(pairs: Sequence[Pair]) -> tuple[list[Completion], list[Completion]]:
    return [p.reference for p in pairs], [p.candidate for p in pairs]


def _length_witnesses(pairs: Sequence[Pair]) -> tuple[str, ...]:
    apart = sorted(pairs, key=lambda p: -abs(len(p.candidate.token_ids) - len(p.reference.token_ids)))
    return tuple(map(_ending, apart[:_WITNESSES]))


def _own_ends(pairs: Sequence[Pair], limits: Limits) -> tuple[Finding | None, str]:
    """How many answers end by themselves rather than by length."""
    ours, theirs = ([c.finish_reason is FinishReason.STOP for c in side] for side in _sides(pairs))
    if not any(ours) and not any(theirs):
        return None, ""
    more = [p for p, mine, other in zip(pairs, theirs, ours, strict=True) if mine and not other]
    fewer = [p for p, mine, other in zip(pairs, theirs, ours, strict=True) if other and not mine]
    p = mcnemar(len(more), len(fewer), two_sided=True)
    failed = p < limits.alpha
    finding = _over_prompts(
        metric="answers that end by themselves",
        outcome=Outcome.FAIL if failed else Outcome.PASS,
        sentence=f"{sum(ours)} of {_many(len(pairs), 'answer')} end by themselves in the reference, {sum(theirs)} in "
        f"the candidate; {len(fewer)} only in the reference, {len(more)} only in the candidate (p {p:.2g})",
        reference=float(sum(ours)),
        candidate=float(sum(theirs)),
        delta=float(sum(theirs) - sum(ours)),
        limit=f"two-sided exact McNemar test, p at least {limits.alpha:g}",
        n=len(pairs),
        evidence=tuple(map(_ending, (more if len(more) > len(fewer) else fewer)[:_WITNESSES])) if failed else (),
    )
    often = "more" if len(more) > len(fewer) else "less"
    return finding, f"the candidate ends by itself {often} often: other {_END_TOKENS}, or another chat template"


def _degenerate(pairs: Sequence[Pair], limits: Limits) -> tuple[Finding | None, str]:
    if not pairs:
        return None, ""
    ours, theirs = _degeneration(*_sides(pairs), limits), _degeneration(*_sides(pairs)[::-1], limits)
    only = [number for number, (mine, other) in enumerate(zip(theirs, ours, strict=True)) if mine and not other]
    fewer = sum(bool(other) and not mine for mine, other in zip(theirs, ours, strict=True))
    n, counts = len(pairs), (sum(map(bool, ours)), sum(map(bool, theirs)))
    p = mcnemar(len(only), fewer, two_sided=False)
    gross = counts[1] > limits.degenerate_share * n and counts[0] < limits.sound_share * n
    failed = p < limits.alpha or (gross and n >= limits.min_share_prompts)
    finding = _over_prompts(
        metric="degenerate output",
        outcome=Outcome.FAIL if failed else Outcome.PASS,
        sentence=f"{counts[0]} of {_many(n, 'answer')} loop, repeat one character or are empty in the reference, "
        f"{counts[1]} in the candidate; {fewer} only in the reference, {len(only)} only in the candidate (p {p:.2g})",
        reference=float(counts[0]),
        candidate=float(counts[1]),
        delta=float(counts[1] - counts[0]),
        limit=f"one-sided exact McNemar test, p at least {limits.alpha:g}; and not over {limits.degenerate_share:.0%} "
        f"of the candidate's with under {limits.sound_share:.0%} of the reference's",
        n=n,
        evidence=tuple(f"{pairs[i].candidate.id}: {theirs[i]}" for i in only[:_WITNESSES]),
    )
    return finding, "the candidate's output is degenerate: broken weights, quantization, attention or cache"


def _degeneration(own: Sequence[Completion], other: Sequence[Completion], limits: Limits) -> list[str]:
    """What is degenerate about each of `own`, "" where nothing is. An answer is only empty if the other's is not."""
    found = [""] * len(own)
    for number, (answer, twin) in enumerate(zip(own, other, strict=True)):
        text = "".join((answer.text or "").split())
        if not answer.token_ids and twin.token_ids:
            found[number] = f"empty, the other side's has {_many(len(twin.token_ids), 'token')}"
        elif len(text) >= limits.repeated_characters and len(set(text)) == 1:
            found[number] = f"{text[0]!r} {len(text)} times and nothing else"
    long = [number for number, answer in enumerate(own) if len(answer.token_ids) >= limits.loop_tokens]
    tails = np.array([own[number].token_ids[-limits.loop_tokens :] for number in long])
    for period in range(limits.loop_period if long else 0, 0, -1):  # the shortest comes last and stays
        for row in np.flatnonzero((tails[:, period:] == tails[:, :-period]).all(axis=1)).tolist():
            found[long[row]] = f"its last {limits.loop_tokens} tokens repeat {tails[row, -period:].tolist()}"
    return found


def _data(n: int, limits: Limits) -> Finding:
    """Whether there is enough to pass on. Too little data can still fail."""
    few = f"too little data: {_many(n, 'prompt')}, at least {limits.min_prompts} are needed"
    return _over_prompts(
        metric="data",
        outcome=Outcome.PASS if n >= limits.min_prompts else Outcome.INCONCLUSIVE,
        sentence=f"enough to judge: {_many(n, 'prompt')}" if n >= limits.min_prompts else few,
        reference=None,
        candidate=float(n),
        delta=None,
        limit=f"at least {limits.min_prompts} prompts",
        n=n,
        evidence=(),
    )


def _headline(findings: Sequence[Finding], outcome: Outcome, n: int) -> str:
    decided_by = [f for f in findings if f.outcome is outcome is not Outcome.PASS]
    reasons = ", ".join(f.sentence if f.metric == "data" else f.metric for f in decided_by)
    kept = sum(f.outcome is Outcome.PASS for f in findings)
    text = f"{kept} of {len(findings)} findings pass on {_many(n, 'prompt')}"
    return f"{text}; decided by {reasons}" if reasons else text


def _many(n: int, one: str) -> str:
    return f"{n} {one if n == 1 else one + 's'}"
