"""Contract: does an engine do what its requests say? Judged from its own answers, without a second engine.

The experiments and what they can show stand in `parity.probes`. One that shows something else than was asked fails; one
that could not be seen passes with a sentence that says so, unless more than half could not: then nothing is shown.

Source of the rules and of their limits: docs/checks/contract.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from parity import diagnose
from parity.noise import Noise
from parity.probes import Answer, Probe, observe
from parity.recording import Recording
from parity.verdict import Finding, Outcome, Verdict, worst

ROLES = ("contract-reference", "contract-candidate")
ALONE = True
"""The candidate's recording suffices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/contract.md.

    unknown_share: if more of the probes could not be seen, the verdict is INCONCLUSIVE.
    """

    unknown_share: float = 0.5
    sigma_without_noise_nats: float = 0.13


def check(reference: Recording | None, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge what the candidate does with its requests. The reference's own faults are warnings.

    Raises:
        IncomparableError: If a recording does not answer the workload of `parity.probes.second`.
    """
    sigma = limits.sigma_without_noise_nats if noise is None else noise.sigma_nats
    theirs = observe(candidate, sigma_nats=sigma)
    ours = () if reference is None else observe(reference, sigma_nats=sigma)
    findings = (*(_finding(p) for p in theirs), _data(theirs, limits))
    outcome = worst([f.outcome for f in findings])
    return Verdict(
        check="contract",
        reference="itself" if reference is None else reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(theirs),
        findings=findings,
        causes=tuple(p.cause.value for p in theirs if p.cause is not None),
        changed=() if reference is None else diagnose.changed(reference, candidate),
        warnings=tuple(_warnings(ours, reference, noise, sigma)),
    )


def _finding(probe: Probe) -> Finding:
    outcome = Outcome.FAIL if probe.answer is Answer.OTHERWISE else Outcome.PASS
    unseen = probe.answer is Answer.UNKNOWN
    return Finding(
        metric=probe.name,
        outcome=outcome,
        sentence=f"could not be seen: {probe.sentence}" if unseen else probe.sentence,
        unit=probe.unit,
        reference=None,
        candidate=None,
        delta=None,
        interval=None,
        limit=f"as asked: {probe.question}",
        n=probe.n,
        evidence=probe.evidence,
    )


def _data(probes: Sequence[Probe], limits: Limits) -> Finding:
    """Whether enough could be seen to pass on. One fault is enough to fail."""
    unseen = [p.name for p in probes if p.answer is Answer.UNKNOWN]
    enough = len(unseen) <= limits.unknown_share * len(probes)
    sentence = f"{len(probes) - len(unseen)} of {len(probes)} probes could be seen"
    return Finding(
        metric="data",
        outcome=Outcome.PASS if enough else Outcome.INCONCLUSIVE,
        sentence=f"{'enough to judge' if enough else 'too little data'}: {sentence}",
        unit="probes",
        reference=None,
        candidate=float(len(probes) - len(unseen)),
        delta=None,
        interval=None,
        limit=f"at most {limits.unknown_share:.0%} of the probes could not be seen",
        n=len(probes),
        evidence=tuple(unseen) if not enough else (),
    )


def _headline(probes: Sequence[Probe]) -> str:
    counts = Counter(p.answer for p in probes)
    text = f"{counts[Answer.AS_ASKED]} of {len(probes)} probes as asked"
    for answer, words in ((Answer.OTHERWISE, "otherwise"), (Answer.UNKNOWN, "could not be seen")):
        if counts[answer]:
            text += f", {counts[answer]} {words} ({', '.join(p.name for p in probes if p.answer is answer)})"
    return text


def _warnings(
    ours: Sequence[Probe], reference: Recording | None, noise: Noise | None, sigma_nats: float
) -> Sequence[str]:
    warnings = [
        f"the reference {reference.label if reference else ''} itself does not do as asked, {p.name}: {p.sentence}: a "
        "doubtful yardstick"
        for p in ours
        if p.answer is Answer.OTHERWISE
    ]
    if noise is None:
        warnings.append(
            f"no noise was measured: sigma {sigma_nats:g} nats is a documented value for one 135M model on a CPU, a "
            "guess for yours; add a noise engine to the target"
        )
    return warnings
