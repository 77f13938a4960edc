"""From verdicts to one decision about a new engine, with its strongest evidence. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from parity.diagnose import Confidence, Diagnosis
from parity.verdict import Finding, Outcome, Verdict

_PIECES = 3
_TELLING = ("logic", "lockstep", "decode", "greedy", "stepwise", "contract", "sampling", "determinism", "laws")
"""What shows most that two engines are the same, first."""


class Advice(str, Enum):
    """What to do with the new engine."""

    UPGRADE = "UPGRADE"
    """Every check passed: equivalence was shown."""
    HOLD = "HOLD"
    """A difference was shown."""
    UNDECIDED = "UNDECIDED"
    """Neither: some check was inconclusive or could not judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision, why, and up to three pieces of evidence, strongest first."""

    advice: Advice
    sentence: str
    evidence: tuple[str, ...]


def decide(
    verdicts: Sequence[Verdict], *, could_not: Mapping[str, str] | None = None, diagnosis: Diagnosis | None = None
) -> Decision:
    """One decision from all verdicts.

    could_not: checks that could not judge, with the reason; they never count as passed.
    """
    could_not = could_not or {}
    failed = [v for v in verdicts if v.outcome is Outcome.FAIL]
    unsure = [v for v in verdicts if v.outcome is Outcome.INCONCLUSIVE]
    asked = len(verdicts) + len(could_not)
    if failed:
        return Decision(
            advice=Advice.HOLD,
            sentence=f"{len(failed)} of {asked} checks failed: {', '.join(v.check for v in failed)}",
            evidence=_against(failed, diagnosis),
        )
    if unsure or could_not or not verdicts:
        open_ = [*(v.check for v in unsure), *could_not]
        undecided = f"{len(open_)} of {asked} checks {'is' if len(open_) == 1 else 'are'} undecided"
        return Decision(
            advice=Advice.UNDECIDED,
            sentence=f"nothing failed, and {undecided}: {', '.join(open_)}" if open_ else "nothing was judged",
            evidence=(
                *(f"{check} could not judge: {reason}" for check, reason in could_not.items()),
                *(f"{v.check}: {v.headline}" for v in unsure),
            )[:_PIECES],
        )
    passed = {v.check: v for v in verdicts}
    order = [*(name for name in _TELLING if name in passed), *(name for name in passed if name not in _TELLING)]
    return Decision(
        advice=Advice.UPGRADE,
        sentence=f"all {asked} checks passed" if asked > 1 else f"the only check, {order[0]}, passed",
        evidence=tuple(f"{name}: {passed[name].headline}" for name in order[:_PIECES]),
    )


def _against(failed: Sequence[Verdict], diagnosis: Diagnosis | None) -> tuple[str, ...]:
    """The cause where there is one, then the finding that is farthest beyond its limit, of each check."""
    cause = []
    if diagnosis is not None and diagnosis.confidence is not Confidence.NONE:
        cause.append(f"{diagnosis.sentence} ({diagnosis.confidence.value})")
    worst = sorted(((*_worst(v), v.check) for v in failed), key=lambda each: -each[0])  # of equals the one asked first
    return (*cause, *(f"{check}: {sentence}" for _, sentence, check in worst))[:_PIECES]


def _worst(verdict: Verdict) -> tuple[float, str]:
    """How many times its limit the worst finding of a failed check is, and what it says."""
    broken = [f for f in verdict.findings if f.outcome is Outcome.FAIL]
    if not broken:
        return math.inf, verdict.headline
    finding = max(broken, key=_excess)
    return _excess(finding), finding.sentence


def _excess(finding: Finding) -> float:
    """How many times its limit a finding is; a breach of a law has no measure and comes first."""
    value = finding.candidate if finding.delta is None else finding.delta
    if finding.margin is None or value is None or not finding.margin > 0.0 or not math.isfinite(value):
        return math.inf
    return abs(value) / finding.margin
