"""Laws: does the candidate agree with itself, on prompts and parameters drawn at random?

The laws stand in `parity.laws`. An exact one fails by one breach. Where two answers must be the same up to rounding and
part, the slack S decides as in the greedy check: up to 6 sigma it is rounding, since another batch rounds differently;
up to 25 sigma it is suspicious and counted; beyond that one is enough.

Source of the rules and of their limits: docs/checks/laws.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parity import diagnose
from parity.divergence import Scale
from parity.laws import LAWS, Breach, Case, Law, Role, Rules, Weight, cases_of, described
from parity.noise import Noise
from parity.recording import Recording
from parity.stats import critical_count
from parity.verdict import Finding, Outcome, Verdict, worst

ROLES = ("laws-reference", "laws-candidate")
ALONE = True
"""The candidate's recording suffices."""
_WITNESSES = 3
_PROMPT = 160  # characters of a prompt in a witness


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/laws.md; those on slack are the greedy check's.

    impossible: two answers with one seed that part with at most this probability break the law by themselves.
    """

    tie_nats: float = 1e-6
    benign_sigmas: float = 6.0
    mismatch_sigmas: float = 25.0
    suspicious_rate: float = 0.0025
    alpha: float = 0.0005
    impossible: float = 1e-6
    min_examples: int = 16
    sigma_without_noise_nats: float = 0.13


def check(reference: Recording | None, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge whether the candidate keeps the laws.

    reference: what another engine answered to the same workload, if the candidate was sent its token ids.
    """
    rules = rules_of(noise, limits)
    cases = cases_of(candidate, reference)
    asked = {role for case in cases for role in case.asked}
    judged = [(law, _finding(law, cases, rules, limits)) for law in LAWS if law.needs <= asked]
    findings = tuple(finding for _, finding in judged)
    outcome = worst([f.outcome for f in findings])
    warnings = []
    if noise is None:
        warnings.append(
            f"no noise was measured: sigma {rules.sigma_nats:g} nats is a documented value for one 135M model on a "
            "CPU, a guess for yours; add a noise engine to the target"
        )
    if left_out := [law.name for law in LAWS if cases and not law.needs <= asked]:
        warnings.append(f"not asked, because no request of this workload asks for it: {', '.join(left_out)}")
    return Verdict(
        check="laws",
        reference="any correct engine" if reference is None else reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(findings, outcome, cases),
        findings=findings,
        causes=tuple(law.cause for law, finding in judged if finding.outcome is Outcome.FAIL),
        changed=() if reference is None else diagnose.changed(reference, candidate),
        warnings=tuple(warnings),
    )


def rules_of(noise: Noise | None, limits: Limits) -> Rules:
    """The limits with sigma put in: as measured, or else the documented guess."""
    sigma = limits.sigma_without_noise_nats if noise is None else noise.sigma_nats
    scale = Scale(
        tie_nats=limits.tie_nats,
        benign_nats=limits.benign_sigmas * sigma,
        mismatch_nats=limits.mismatch_sigmas * sigma,
    )
    return Rules(sigma_nats=sigma, scale=scale, suspicious_rate=limits.suspicious_rate, impossible=limits.impossible)


def _finding(law: Law, cases: Sequence[Case], rules: Rules, limits: Limits) -> Finding:
    """One breach that is proven fails; suspicious ones fail where chance does not explain so many.

    Where chance could explain a breach by every example the law could never fail, and so must not pass.
    """
    asked = [case for case in cases if law.needs <= case.answers.keys()]
    seen = [(case, law.look(case, rules)) for case in asked]
    of = {w: [(c, b) for c, s in seen for b in s.breaches[:1] if b.weight is w] for w in Weight}
    n, proven, suspicious, unknown = len(asked), of[Weight.PROVEN], of[Weight.SUSPICIOUS], of[Weight.UNKNOWN]
    expected = math.fsum(s.expected for _, s in seen)
    allowed = critical_count(rate=expected, n=1, alpha=limits.alpha) - 1
    outcome, broken, sentence = Outcome.PASS, unknown, f"kept by {'all ' * (n > 1)}{_many(n, 'example')}"
    if suspicious:
        sentence += f"; {len(suspicious)} suspicious, {allowed} allowed"
    if proven or len(suspicious) > allowed:
        outcome, broken = Outcome.FAIL, sorted(proven, key=_size) + sorted(suspicious, key=_size)
        sentence = f"broken by {len(broken)} of {_many(n, 'example')}, for one {broken[0][1].sentence}"
    elif unknown:
        outcome = Outcome.INCONCLUSIVE
        sentence = f"cannot be judged on {len(unknown)} of {_many(n, 'example')}: {unknown[0][1].sentence}"
    elif n < limits.min_examples:
        outcome = Outcome.INCONCLUSIVE
        sentence += f"; at least {limits.min_examples} are needed"
    elif allowed >= n:
        outcome = Outcome.INCONCLUSIVE
        sentence += "; rounding differs so much from batch to batch that it could explain a breach by every one"
    return Finding(
        metric=law.name,
        outcome=outcome,
        sentence=sentence,
        unit="examples",
        reference=None,
        candidate=float(len(broken)),
        delta=None,
        interval=None,
        limit=f"none: {law.rule}",
        n=n,
        evidence=tuple(_witness(case, breach) for case, breach in broken[:_WITNESSES]),
    )


def _size(found: tuple[Case, Breach]) -> tuple[int, int, str]:
    """The smallest example is the easiest to look at."""
    case = found[0]
    return len(case.answers[Role.LONG].prompt_text or ""), case.asked[Role.LONG].max_tokens, case.number


def _witness(case: Case, breach: Breach) -> str:
    prompt, asked = case.answers[Role.LONG].prompt_text or "", case.asked
    shown = repr(prompt) if len(prompt) <= _PROMPT else f"of {len(prompt)} characters, ...{prompt[-_PROMPT:]!r}"
    return f"example {case.number}: {breach.sentence}; prompt {shown}; {described(asked)}"


def _headline(findings: Sequence[Finding], outcome: Outcome, cases: Sequence[Case]) -> str:
    answers = sum(len(case.answers) for case in cases)
    on = f"on {_many(len(cases), 'example')}, {_many(answers, 'answer')}"
    if outcome is Outcome.PASS:
        return f"{_many(len(findings), 'law')} kept {on}"
    decided_by = ", ".join(f.metric for f in findings if f.outcome is outcome)
    if outcome is Outcome.FAIL:
        return f"broken {on}: {decided_by}"
    return f"too little to judge by {on}: {decided_by or 'there is no example'}"


def _many(n: int, one: str) -> str:
    return f"{n} {one if n == 1 else one + 's'}"
