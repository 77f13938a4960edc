"""What rounding alone does to this model on this hardware: the yardstick for every divergence.

The reference's tokens are scored once more by an engine in another precision (the noise engine: normally Transformers
in the candidate's dtype, or in float32). At each position the margin between the reference's two most probable tokens
shifts a little; the spread of these shifts is sigma. It is measured on the reference side only: a faulty candidate
must not be able to widen its own tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parity import lockstep
from parity.errors import IncomparableError
from parity.lockstep import Steps
from parity.recording import Recording

SIGMA_FLOOR_NATS = 0.02
"""No sigma below this: float32 pairs shift by 1e-5, and dividing by that would call any new kernel a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Margin-shift noise between two correct engines of the judged pair's precisions.

    sigma_nats: robust standard deviation (68 % quantile of the absolute shift) for the judged pair.
    measured_nats: the same between the reference and the noise engine, before scaling to the pair.
    positions, prompts: what it was measured on.
    source: the two engines it was measured between.
    sides: 16-bit sides of the judged pair for each one of the measured pair; variances and KL grow with it.
    scores: the noise engine's recording, and `steps`, its comparison with the reference: the KL floor and the shifts.
    """

    sigma_nats: float
    measured_nats: float
    positions: int
    prompts: int
    source: str
    sides: float = 1.0
    scores: Recording | None = None
    steps: Steps | None = None

    @property
    def floor_nats(self) -> float | None:
        """KL divergence a token that rounding alone gives the judged pair; None where it was not measured."""
        return None if self.steps is None else float(self.steps.kl_nats.mean()) * self.sides


def measure(reference: Recording, scored: Recording, *, candidate_dtype: str) -> Noise:
    """Measure sigma from the noise engine's scores of the reference's own tokens.

    Rounding errors of two 16-bit engines are nearly uncorrelated (rho 0.09 to 0.17, measured), so variances add: with
    v the variance that one 16-bit side contributes, a pair has v times its number of 16-bit sides. The measured
    (reference, noise engine) gives v, the judged pair (reference, candidate) gets its multiple; a float32 pair judged
    by 16-bit noise gets none of it, which leaves the floor.

    Raises:
        IncomparableError: If `scored` does not score this reference's tokens, or both sides are float32 and the
            candidate is not, which measures nothing.
    """
    steps = lockstep.measure(reference, scored)
    shifts = np.abs(steps.shift_nats[np.isfinite(steps.shift_nats)])
    measured = float(np.quantile(shifts, 0.6827)) if shifts.size else 0.0
    reference_dtype, scored_dtype = dtype_of(reference), dtype_of(scored)
    measured_sides = _is_16_bit(reference_dtype) + _is_16_bit(scored_dtype)
    judged_sides = _is_16_bit(reference_dtype) + _is_16_bit(candidate_dtype)
    if measured_sides == 0 and judged_sides > 0:
        raise IncomparableError(
            f"noise between {reference_dtype} and {scored_dtype} says nothing about a {candidate_dtype} "
            "candidate; give the noise engine the candidate's dtype"
        )
    sides = judged_sides / measured_sides if measured_sides else 1.0
    return Noise(
        sigma_nats=max(measured * math.sqrt(sides), SIGMA_FLOOR_NATS),
        measured_nats=measured,
        positions=int(shifts.size),
        prompts=len(steps.prompt_ids),
        source=f"{reference.label} against {scored.label}",
        sides=sides,
        scores=scored,
        steps=steps,
    )


def sixteen_bit_sides(reference: Recording, candidate: Recording) -> int:
    """How many of the two sides round to 16 bits."""
    return _is_16_bit(dtype_of(reference)) + _is_16_bit(dtype_of(candidate))


def dtype_of(recording: Recording) -> str:
    """What the engine worked in: where `auto` was asked, what it said it chose."""
    asked = recording.spec.dtype
    return str(recording.fingerprint.context.get("engine.dtype", asked)) if asked == "auto" else asked


def _is_16_bit(dtype: str) -> bool:
    """An `auto` that nobody resolved counts: models are stored in 16 bits."""
    return dtype != "float32"
