"""What a check says: PASS, FAIL or INCONCLUSIVE, and why.

Values only. Exceptions mean "could not judge"; a bad judgement is a Verdict. INCONCLUSIVE is never a silent pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from parity.fingerprint import Difference


class Outcome(Enum):
    """The three answers. There is no fourth."""

    PASS = "PASS"  # noqa: S105  not a password
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


class Policy(str, Enum):
    """How much the candidate may differ.

    IDENTITY: same weights, same numerics (a rebuild, a flag). EQUIVALENCE: another engine or version at the same
    precision. QUANTIZED: a budgeted loss.
    """

    IDENTITY = "identity"
    EQUIVALENCE = "equivalence"
    QUANTIZED = "quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing a check looked at.

    sentence: what was found, in words, with its numbers; complete without the other fields.
    reference, candidate, delta, interval: the numbers behind it, in `unit`; None where they do not apply.
    limit: the rule it was held against, and where that rule comes from.
    n: how many independent units (prompts, unless the unit says otherwise) it rests on.
    evidence: witnesses a person can look at, most telling first.
    margin: the number in `limit`, in the unit of `delta` or, where there is none, of `candidate`; None where the rule
        is not one number.
    """

    metric: str
    outcome: Outcome
    sentence: str
    unit: str
    reference: float | None
    candidate: float | None
    delta: float | None
    interval: tuple[float, float] | None
    limit: str
    n: int
    evidence: tuple[str, ...]
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A check's answer about a candidate, held against a reference.

    headline: the answer in one line, for a table.
    causes: what is probably wrong, most probable first; empty unless something is.
    changed: the fingerprint facts that differ between the two sides.
    warnings: what a reader must know to weigh the answer.
    basis: what it was judged by: the noise and where it was measured, the error rates.
    """

    check: str
    reference: str
    candidate: str
    outcome: Outcome
    headline: str
    findings: tuple[Finding, ...]
    causes: tuple[str, ...]
    changed: tuple[Difference, ...]
    warnings: tuple[str, ...]
    basis: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the check passed; false also when it was inconclusive."""
        return self.outcome is Outcome.PASS


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """FAIL if any failed, else INCONCLUSIVE if any was; PASS only if all passed and there was at least one."""
    if Outcome.FAIL in outcomes:
        return Outcome.FAIL
    if Outcome.INCONCLUSIVE in outcomes or not outcomes:
        return Outcome.INCONCLUSIVE
    return Outcome.PASS
