"""Structured answers: does what must follow a JSON schema, a regular expression or a choice follow it?

Texts are never compared: two correct engines may fill one schema in many ways. Each answer is held against what its own
request asked for. An answer that ended by itself must match as a whole: a law, one breach of the candidate fails. One
that max_tokens cut says nothing about the end; a cut choice must still be the beginning of one.

The reference may be missing: many engines cannot structure answers. Where it is there, its breaches are a warning, and
a candidate that no longer comes to an end where the reference did fails by an exact McNemar test.

What counts as a match, and the limits: docs/checks/structured.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from parity import diagnose
from parity.comparable import require_same_inputs
from parity.divergence import in_asked_order
from parity.errors import ConfigError, IncomparableError
from parity.noise import Noise
from parity.prompts import Grammar, SamplingParams, Structured
from parity.recording import Completion, FinishReason, Recording
from parity.stats import mcnemar
from parity.verdict import Finding, Outcome, Verdict, worst

ROLES = ("structured-reference", "structured-candidate")
ALONE = True
"""A candidate can be judged without a reference."""
_WITNESSES = 3
_EXCERPT = 60
_DIALECT = jsonschema.Draft202012Validator
_finding = partial(Finding, interval=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/structured.md.

    alpha: of the paired count of answers that come to an end.
    min_ended: fewer answers that ended by themselves can fail and not pass.
    """

    alpha: float = 0.0005
    min_ended: int = 4


class _Breach(Enum):
    """What is wrong with an answer; the value completes "3 answers are ..."."""

    ABORTED = "given up by the engine"
    NOT_JSON = "no JSON"
    OFF_SCHEMA = "JSON that breaks its schema"
    OFF_REGEX = "no match of its regular expression"
    NO_CHOICE = "none of its choices"
    NO_BEGINNING = "cut, and the beginning of none of its choices"


_NOT_ENFORCED = "the {} does not reach the engine, or the engine does not hold its answers to it to the end"
_CAUSES = {
    _Breach.ABORTED: "the engine gave requests up: look in its log for a grammar that it cannot use",
    _Breach.NOT_JSON: _NOT_ENFORCED.format("schema"),
    _Breach.OFF_SCHEMA: "the engine holds its answers to JSON but not to all of the schema: look for a keyword that it "
    "ignores",
    _Breach.OFF_REGEX: _NOT_ENFORCED.format("regular expression"),
    _Breach.NO_CHOICE: _NOT_ENFORCED.format("list of choices"),
    _Breach.NO_BEGINNING: _NOT_ENFORCED.format("list of choices"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One answer, held against what it had to match. `detail` says where it breaks it."""

    completion: Completion
    grammar: Grammar
    ended: bool
    breach: _Breach | None
    detail: str


_Fault = tuple[_Breach, str] | None
_Rule = Callable[[str], _Fault]


def structured_from_json(data: Mapping[str, Any]) -> Structured:
    """Read what a prompt set says of its answers: `json_schema`, `regex` or `choice`, and nothing else.

    The definition keeps the order of a schema's keys, in which engines write them.

    Raises:
        ConfigError: If the key is unknown or not alone, or its value is no such definition.
    """
    known = [grammar.value for grammar in Grammar]
    if not isinstance(data, Mapping) or len(data) != 1 or not set(data) <= set(known):
        raise ConfigError(f"'structured' must be an object with one of the keys {', '.join(known)}, not {data!r}")
    ((key, value),) = data.items()
    grammar = Grammar(key)
    right, wanted = {
        Grammar.JSON_SCHEMA: (isinstance(value, Mapping), "an object"),
        Grammar.REGEX: (isinstance(value, str), "a string"),
        Grammar.CHOICE: (_are_choices(value), "a list of at least one string"),
    }[grammar]
    if not right:
        raise ConfigError(f"'structured': {key!r} must be {wanted}, not {value!r}")
    definition = value if grammar is Grammar.REGEX else json.dumps(value, ensure_ascii=False)
    found = Structured(grammar=grammar, definition=definition)
    _rule(found)
    return found


def check(reference: Recording | None, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge whether the candidate's answers follow what they were asked to. `noise` is not used.

    Raises:
        IncomparableError: If a request leaves its answer free, the workload scores given tokens, or the two sides did
            not answer the same prompts.
        ConfigError: If what a request asks for is itself wrong; the sentence names the prompt.
    """
    del noise
    if reference is not None:
        require_same_inputs(reference, candidate)
    theirs = _judged(candidate)
    ours = None if reference is None else _judged(reference)
    findings = [_validity(theirs, ours)]
    causes = [_CAUSES[b] for b in _Breach if any(a.breach is b for a in theirs)]
    warnings = []
    if ours is not None:
        ends = _ends(theirs, ours, limits)
        findings.append(ends)
        if ends.outcome is Outcome.FAIL:
            causes.append("the candidate's answers do not come to an end: white space or strings without bound in it")
        if bad := [a for a in ours if a.breach]:
            warnings.append(f"the reference itself breaks what was asked, {_breaches(bad)}; {_witness(bad[0])}")
    findings.append(_data(theirs, limits))
    outcome = worst([f.outcome for f in findings])
    return Verdict(
        check="structured",
        reference="what was asked" if reference is None else reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline="; ".join(f.sentence for f in findings if f.metric == "validity" or f.outcome is not Outcome.PASS),
        findings=tuple(findings),
        causes=tuple(dict.fromkeys(causes)),
        changed=() if reference is None else diagnose.changed(reference, candidate),
        warnings=tuple(warnings),
    )


# Answers -------------------------------------------------------------------------------------------------------------


def _judged(recording: Recording) -> tuple[_Answer, ...]:
    """Every answer, in the order of asking."""
    if recording.workload.forced_from is not None:
        raise IncomparableError(
            f"workload {recording.workload.name!r} scores given tokens, which follow nothing; judge one that generates"
        )
    return tuple(_judge(c, recording.workload.sampling_of(c.id)) for c in in_asked_order(recording))


def _judge(answer: Completion, asked: SamplingParams) -> _Answer:
    wanted, text = asked.structured, answer.text or ""
    if wanted is None:
        raise IncomparableError(
            f"prompt {answer.id!r} leaves its answer free; the structured check judges only what must follow a "
            "schema, an expression or a choice"
        )
    ended = _ended(answer, asked)
    try:
        rule, fault = _rule(wanted), None
        if answer.finish_reason is FinishReason.ABORT:
            fault = _Breach.ABORTED, "aborted"
        elif ended:
            fault = rule(text)
        elif wanted.grammar is Grammar.CHOICE:
            fault = _cut_choice(json.loads(wanted.definition), text)
    except ConfigError as error:
        raise ConfigError(f"prompt {answer.id!r}: {error}") from error
    breach, detail = fault or (None, "")
    return _Answer(completion=answer, grammar=wanted.grammar, ended=ended, breach=breach, detail=detail)


def _ended(answer: Completion, asked: SamplingParams) -> bool:
    """Whether the engine held the answer to be complete, rather than cut by a limit or a stop that was asked for."""
    by = answer.stop_reason
    if by is None and answer.terminator is not None:
        by = answer.terminator.token_id
    return answer.finish_reason is FinishReason.STOP and not isinstance(by, str) and by not in asked.stop_token_ids


def _rule(wanted: Structured) -> _Rule:
    """What a whole answer must satisfy.

    Raises:
        ConfigError: If the definition is wrong.
    """
    if wanted.grammar is Grammar.REGEX:
        try:
            return partial(_regex_fault, re.compile(wanted.definition))
        except re.error as error:
            raise ConfigError(f"the regular expression {wanted.definition!r} is wrong: {error}") from error
    try:
        definition = json.loads(wanted.definition)
    except ValueError as error:
        raise ConfigError(f"the {wanted.grammar.value} {wanted.definition!r} is no JSON: {error}") from error
    if wanted.grammar is Grammar.CHOICE:
        if not _are_choices(definition):
            raise ConfigError(f"the choice {wanted.definition!r} is no list of at least one string")
        return partial(_choice_fault, definition)
    if not isinstance(definition, dict):
        raise ConfigError(f"the JSON schema {wanted.definition!r} is no object")
    kind = jsonschema.validators.validator_for(definition, default=_DIALECT)
    try:
        kind.check_schema(definition)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"the JSON schema is wrong at {error.json_path}: {error.message}") from error
    # An empty registry: without it a reference to another document would be fetched from the network.
    return partial(_schema_fault, kind(definition, registry=Registry()))


def _schema_fault(validator: Any, text: str) -> _Fault:
    try:
        value = json.loads(text, parse_constant=_no_json_number)
    except (ValueError, RecursionError) as error:
        return _Breach.NOT_JSON, str(error)
    try:
        found = jsonschema.exceptions.best_match(validator.iter_errors(value))
    except (Unresolvable, RecursionError) as error:
        raise ConfigError(f"the JSON schema refers to what it does not hold, or to itself: {error}") from error
    if found is None:
        return None
    return _Breach.OFF_SCHEMA, f"at {found.json_path} against {found.validator} {found.validator_value!r}"


def _no_json_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _regex_fault(pattern: re.Pattern[str], text: str) -> _Fault:
    return None if pattern.fullmatch(text) else (_Breach.OFF_REGEX, f"not all of it matches {pattern.pattern!r}")


def _choice_fault(choices: Sequence[str], text: str) -> _Fault:
    return None if text in choices else (_Breach.NO_CHOICE, f"the choices are {', '.join(map(repr, choices))}")


def _cut_choice(choices: Sequence[str], text: str) -> _Fault:
    beginning = text.rstrip("\ufffd")  # some engines show the first bytes of a character that is cut in two so
    if any(choice.startswith(beginning) for choice in choices):
        return None
    return _Breach.NO_BEGINNING, f"the choices are {', '.join(map(repr, choices))}"


def _are_choices(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(choice, str) for choice in value)


# Findings ------------------------------------------------------------------------------------------------------------


def _validity(theirs: Sequence[_Answer], ours: Sequence[_Answer] | None) -> Finding:
    bad = [a for a in theirs if a.breach]
    looked_at = [a for a in theirs if a.ended or a.breach]
    before = None if ours is None else float(sum(a.breach is not None for a in ours))
    kinds = Counter(a.grammar.value for a in looked_at)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none ended by itself"
    sentence = f"{_many(len(looked_at))} held against what was asked ({shown}): "
    return _finding(
        metric="validity",
        outcome=Outcome.FAIL if bad else Outcome.PASS,
        sentence=sentence + (_breaches(bad) if bad else "every one follows it"),
        unit="answers",
        reference=before,
        candidate=float(len(bad)),
        delta=None if before is None else len(bad) - before,
        limit="none: an answer that ended by itself matches as a whole (law)",
        n=len(looked_at),
        evidence=tuple(map(_witness, bad[:_WITNESSES])),
    )


def _ends(theirs: Sequence[_Answer], ours: Sequence[_Answer], limits: Limits) -> Finding:
    """Whether the candidate still comes to an end where the reference did."""
    before = {a.completion.id: a.ended for a in ours}
    lost = [a for a in theirs if before[a.completion.id] and not a.ended]
    gained = sum(a.ended and not before[a.completion.id] for a in theirs)
    p = mcnemar(len(lost), gained, two_sided=True)
    failed = p < limits.alpha and len(lost) > gained
    ended = sum(a.ended for a in theirs)
    return _finding(
        metric="answers that come to an end",
        outcome=Outcome.FAIL if failed else Outcome.PASS,
        sentence=f"{sum(before.values())} of {_many(len(ours))} end by themselves in the reference, {ended} in the "
        f"candidate; {len(lost)} only in the reference, {gained} only in the candidate (p {p:.2g})",
        unit="prompts",
        reference=float(sum(before.values())),
        candidate=float(ended),
        delta=float(ended - sum(before.values())),
        limit=f"two-sided exact McNemar test, p at least {limits.alpha:g}, where the candidate has fewer",
        n=len(theirs),
        evidence=tuple(map(_witness, lost[:_WITNESSES])) if failed else (),
    )


def _data(theirs: Sequence[_Answer], limits: Limits) -> Finding:
    """Whether there is enough to pass on. Too little data can still fail."""
    ended = sum(a.ended for a in theirs)
    cut = sum(not a.ended and a.completion.finish_reason is not FinishReason.ABORT for a in theirs)
    counts = f"{ended} of {_many(len(theirs))} ended by themselves, {cut} cut by a limit and not judged as a whole"
    few = ended < limits.min_ended
    remedy = "raise max_tokens, or bound what the answers may hold" if cut else "ask more prompts"
    return _finding(
        metric="data",
        outcome=Outcome.INCONCLUSIVE if few else Outcome.PASS,
        sentence=f"too little data: {counts}, at least {limits.min_ended} must end; {remedy}" if few else counts,
        unit="answers",
        reference=None,
        candidate=float(ended),
        delta=None,
        limit=f"at least {limits.min_ended} answers that ended by themselves",
        n=len(theirs),
        evidence=tuple(_witness(a) for a in theirs if not a.ended)[:_WITNESSES] if few else (),
    )


def _breaches(bad: Sequence[_Answer]) -> str:
    """How many answers break it, and how."""
    found = Counter(a.breach.value for a in bad if a.breach)
    return ", ".join(f"{_many(count)} {'is' if count == 1 else 'are'} {what}" for what, count in found.most_common())


def _witness(answer: _Answer) -> str:
    text = answer.completion.text or ""
    shown = repr(text) if len(text) <= 2 * _EXCERPT else f"{text[:_EXCERPT]!r} ... {text[-_EXCERPT:]!r}"
    tokens = f"{len(answer.completion.token_ids)} tokens, {answer.completion.finish_reason.value}"
    why = f"{answer.breach.value} ({answer.detail})" if answer.breach else "not ended"
    return f"{answer.completion.id}, {answer.grammar.value}, {tokens}: {why}; {shown}"


def _many(n: int) -> str:
    return f"{n} answer{'s' * (n != 1)}"
