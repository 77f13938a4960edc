"""Verdicts for a terminal: the answer first, then the evidence, then how to see it again."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from parity.checks.performance import Row
from parity.comparable import first_difference
from parity.decision import Decision
from parity.diagnose import Diagnosis
from parity.differences import visible
from parity.fingerprint import Difference
from parity.probes import Probe
from parity.recording import Recording
from parity.recovery import Recovery
from parity.verdict import Finding, Outcome, Verdict

_WIDTH = 118
_VALUE = 40
# Kept on one line: a number and its unit, a name and its number, a short quotation with the spaces it begins with.
_WHOLE = re.compile(r"""\d (?:%|nats\b|sigma\b)|\b(?:S|token|sigma) \d|(?<!\S)(['"]).{0,40}?\1(?!\w)""")
_MARK = {Outcome.PASS: "pass", Outcome.FAIL: "FAIL", Outcome.INCONCLUSIVE: "inconclusive"}


def render(verdict: Verdict) -> str:
    """One verdict in full."""
    lines = _wrapped(
        f"{verdict.outcome.value}  {verdict.check}: {verdict.candidate} against {verdict.reference}", "", hang=4
    )
    lines += _wrapped(verdict.headline, "  ")
    for cause in verdict.causes:
        lines += _wrapped(f"probable cause: {cause}", "  ", hang=4)
    for finding in verdict.findings:
        lines += _finding(finding)
    for ground in verdict.basis:
        lines += _wrapped(f"judged by: {ground}", "  ", hang=4)
    for warning in verdict.warnings:
        lines += _wrapped(f"warning: {warning}", "  ", hang=4)
    if verdict.changed:
        lines.append("  differs between the two sides (reference -> candidate):")
        for difference in verdict.changed:
            lines += _wrapped(_difference(difference), "    ", hang=4)
    return "\n".join(lines)


def table(verdicts: Sequence[Verdict]) -> str:
    """One row per check."""
    rows = [(v.outcome.value, v.check, v.headline) for v in verdicts]
    first = max((len(r[0]) for r in rows), default=0)
    second = max((len(r[1]) for r in rows), default=0)
    lines: list[str] = []
    for outcome, check, headline in rows:
        head = f"{outcome:<{first}}  {check:<{second}}  "
        lines += _wrapped(headline, head) or [head.rstrip()]
    return "\n".join(lines)


def diagnosis(found: Diagnosis) -> str:
    """The most likely cause, how sure it is, and what it rests on."""
    lines = _wrapped(f"cause ({found.confidence.value}): {found.sentence}", "", hang=2)
    for witness in found.evidence:
        lines += _wrapped(witness, "  - ", hang=0)
    return "\n".join(lines)


def recovery(found: Recovery) -> str:
    """The table of what is kept, a line a task, then all together, then how far the distributions moved."""
    names = [visible(row.name) for row in found.rows]
    width = max(len("task"), *map(len, names))
    interval = f"{found.confidence:.0%} interval"
    lines = [
        f"{'task':<{width}}  {'documents':>9}  {'reference':>9}  {'candidate':>9}  {'recovery':>9}  {interval:>18}  "
        f"{'lost':>4}  {'won':>4}"
    ]
    for name, row in zip(names, found.rows, strict=True):
        kept = "-" if row.recovery is None else f"{row.recovery:.2%}"
        between = "-" if row.interval is None else f"{row.interval[0]:.1%} to {row.interval[1]:.1%}"
        lines.append(
            f"{name:<{width}}  {row.n:>9}  {row.reference:>9.4f}  {row.candidate:>9.4f}  {kept:>9}  {between:>18}  "
            f"{row.lost:>4}  {row.won:>4}"
        )
    if (moved := found.moved) is not None:
        lines += _wrapped(moved.sentence, "")
    return "\n".join(lines)


def performance(rows: Sequence[Row]) -> str:
    """Every metric of both sides; the loss is positive where the candidate is worse."""
    width = max((len(row.metric.id) for row in rows), default=0)
    lines = [f"{'metric':<{width}}  {'reference':>10}  {'candidate':>10}  {'loss':>8}  {'90% interval':>18}  unit"]
    for row in rows:
        loss = "" if row.loss is None else f"{row.loss:+.2%}"
        between = "" if row.interval is None else f"{row.interval[0]:+.1%} to {row.interval[1]:+.1%}"
        lines.append(
            f"{row.metric.id:<{width}}  {row.reference:>10.4g}  {row.candidate:>10.4g}  {loss:>8}  {between:>18}  "
            f"{row.metric.unit}"
        )
    return "\n".join(lines)


def warnings(verdicts: Sequence[Verdict]) -> str:
    """What a reader must know to weigh the verdicts, each remark once."""
    checks: dict[str, list[str]] = {}
    for verdict in verdicts:
        for warning in verdict.warnings:
            checks.setdefault(warning, []).append(verdict.check)
    lines = [line for text, names in checks.items() for line in _wrapped(f"note ({', '.join(names)}): {text}", "  ")]
    return "\n".join(lines)


def decision(found: Decision, title: str) -> str:
    """The decision, then its evidence, strongest first."""
    lines = _wrapped(f"{found.advice.value}  {title}: {found.sentence}", "", hang=2)
    for number, piece in enumerate(found.evidence, start=1):
        lines += _wrapped(piece, f"  {number}. ", hang=0)
    return "\n".join(lines)


def probes(found: Sequence[Probe]) -> str:
    """One row per probe: what was seen, and the witnesses of what is not as asked."""
    names = max((len(p.name) for p in found), default=0)
    answers = max((len(p.answer.value) for p in found), default=0)
    lines: list[str] = []
    for probe in found:
        causes = "" if probe.cause is None else f"{probe.cause.value}; "
        lines += _wrapped(f"{causes}{probe.sentence}", f"  {probe.answer.value:<{answers}}  {probe.name:<{names}}  ")
        for witness in probe.evidence:
            lines += _wrapped(witness, " " * (answers + names + 6) + "- ", hang=0)
    return "\n".join(lines)


def sides(reference: Recording, candidate: Recording) -> tuple[str, ...]:
    """Who is compared, on what: lines for a header."""
    prompts = len(candidate.completions)
    tokens = sum(len(c.token_ids) for c in candidate.completions)
    sampling = candidate.workload.sampling
    return (
        f"reference: {describe(reference)}",
        f"candidate: {describe(candidate)}",
        f"workload: {candidate.workload.name}, {prompts} prompt{'s' * (prompts != 1)}, {tokens} candidate "
        f"token{'s' * (tokens != 1)}, at most {sampling.max_tokens} each, temperature {sampling.temperature:g}",
    )


def describe(recording: Recording) -> str:
    """Engine, version, dtype, model, hardware and date, on one line."""
    context, count = recording.fingerprint.context, recording.resumed
    hardware = context.get("gpu.0.name") or f"{context.get('host.cpu', '?')} x{context.get('host.cores', '?')}"
    resumed = f", {count} completion{'s' * (count != 1)} from an interrupted run" if count else ""
    return f"{recording.label}, {recording.spec.model}, {hardware}, recorded {recording.created_at}{resumed}"


def _finding(finding: Finding) -> list[str]:
    lines = _wrapped(f"{_MARK[finding.outcome]}  {finding.metric}: {finding.sentence}", "  ", hang=8)
    if finding.outcome is not Outcome.PASS:
        lines += _wrapped(f"limit: {finding.limit}", "        ", hang=2)
    for witness in finding.evidence:
        lines += _wrapped(witness, "        - ", hang=0)
    return lines


def _difference(difference: Difference) -> str:
    left, right = _texts(difference)
    return f"{difference.name}: {left} -> {right}"


def _texts(difference: Difference) -> tuple[str, str]:
    """Both values; of long ones the part where they part, since their beginnings may be the same."""
    left, right = ("none" if v is None else str(v) for v in (difference.reference, difference.candidate))
    shared = first_difference(left, right)
    return _short(left, shared), _short(right, shared)


def _short(text: str, shared: int) -> str:
    if len(text) <= _VALUE:
        return text
    start = max(0, shared - _VALUE // 4)
    end = start + _VALUE // 2
    return f"{'...' * (start > 0)}{text[start:end]}{'...' * (end < len(text))}"


def _wrapped(text: str, indent: str, *, hang: int = 0) -> list[str]:
    lines = textwrap.wrap(
        _WHOLE.sub(lambda whole: whole.group().replace(" ", "\N{NO-BREAK SPACE}"), text),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * (len(indent) + hang),
        break_on_hyphens=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
