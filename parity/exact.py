"""Do two engines compute the same function in float32, where a wiring fault stands far above rounding?

In 16 bits rounding hides an epsilon, a rope base off by one per cent, a small scale error. In float32 two correct
implementations differ by 1e-11 and such faults by 1e-7 and more, on every single prompt. Statistic: half of the
probability-weighted variance of the change of log-probability over the shared top k, a token, by prompt (what KL
divergence becomes when it is small, without its rounding noise).

    PASS every prompt below the limit, FAIL any prompt above it.

Source of the limit and measured values: docs/checks/logic.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity import diagnose, lockstep
from parity.errors import IncomparableError
from parity.lockstep import Steps
from parity.noise import dtype_of
from parity.recording import Recording
from parity.verdict import Finding, Outcome, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_WITNESSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/logic.md.

    half_variance_nats2: per token, the mean over a prompt. min_prompts: fewer can fail and not pass.
    """

    half_variance_nats2: float = 1e-9
    min_prompts: int = 4


def verdict(check: str, reference: Recording, candidate: Recording, limits: Limits) -> Verdict:
    """Judge whether two float32 engines say the same of the same tokens; `check` is the name of who asks.

    Raises:
        IncomparableError: If one side did not run in float32, or they did not score the same tokens.
    """
    for side, recording in (("reference", reference), ("candidate", candidate)):
        if dtype_of(recording) != "float32":
            raise IncomparableError(
                f"the {side} of the {check} check ran in {dtype_of(recording)}; its rounding would hide what it "
                "looks for: run both sides in float32"
            )
    steps = lockstep.measure(reference, candidate)
    values = steps.per_prompt(np.where(steps.broken, np.inf, steps.half_variance_nats2)) / steps.lengths
    bad = np.flatnonzero(~(values <= limits.half_variance_nats2))
    outcome = Outcome.FAIL if bad.size else Outcome.PASS
    if not bad.size and len(values) < limits.min_prompts:
        outcome = Outcome.INCONCLUSIVE
    sentence = _sentence(steps, values, bad, limits)
    differing = diagnose.changed(reference, candidate)
    order = np.argsort(-values)[:_WITNESSES]
    finding = Finding(
        metric="half variance in float32",
        outcome=outcome,
        sentence=sentence,
        unit="nats squared a token",
        reference=None,
        candidate=float(values.max()),
        delta=None,
        interval=None,
        limit=f"{limits.half_variance_nats2:g} on every prompt; correct implementations stay 25 times below it",
        margin=limits.half_variance_nats2,
        n=len(values),
        evidence=tuple(_witness(steps, values, int(n)) for n in order),
    )
    return Verdict(
        check=check,
        reference=reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=sentence,
        findings=(finding,),
        causes=diagnose.causes(differing) if outcome is Outcome.FAIL else (),
        changed=differing,
        warnings=(),
    )


def _sentence(steps: Steps, values: Floats, bad: NDArray[np.intp], limits: Limits) -> str:
    longest = int(steps.context.max()) + 1
    head = f"float32 against float32, {len(values)} prompts, {len(steps)} tokens, context to {longest} tokens: "
    spread = f"largest {values.max():.2g}, median {np.median(values):.2g} nats squared a token"
    if not bad.size:
        few = f"; at least {limits.min_prompts} prompts are needed" if len(values) < limits.min_prompts else ""
        return f"{head}the same function on every prompt ({spread}; limit {limits.half_variance_nats2:g}){few}"
    text = f"{head}another function on {bad.size} of the prompts ({spread}; limit {limits.half_variance_nats2:g})"
    good = np.setdiff1d(np.arange(len(values)), bad)
    contexts = np.array([int(steps.context[b - 1]) + 1 for b in steps.starts[1:]])
    if good.size and contexts[bad].min() > contexts[good].max():
        text += f"; only prompts of more than {contexts[good].max()} tokens are touched"
    return text


def _witness(steps: Steps, values: Floats, prompt: int) -> str:
    start, stop = int(steps.starts[prompt]), int(steps.starts[prompt + 1])
    worst = start + int(np.argmax(np.abs(steps.delta_nats[start:stop])))
    return (
        f"{steps.prompt_ids[prompt]}: {values[prompt]:.2g}; largest change of a log-probability "
        f"{steps.delta_nats[worst]:+.2g} nats at token {worst - start}, context {int(steps.context[worst])}"
    )
