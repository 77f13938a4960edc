"""What rounding alone does to this model on this hardware: the yardstick for every divergence.

The reference's tokens are scored once more by an engine in another precision (the noise engine: normally Transformers
in the candidate's dtype, or in float32). At each position the margin between the reference's two most probable tokens
shifts a little; the spread of these shifts is sigma. It is measured on the reference side only: a faulty candidate
must not be able to widen its own tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.errors import IncomparableError
from parity.recording import NO_TOKEN, Completion, Recording, TokenLogprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIGMA_FLOOR_NATS = 0.02
"""No sigma below this: float32 pairs shift by 1e-5, and dividing by that would call any new kernel a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Margin-shift noise between two correct engines of the judged pair's precisions.

    sigma_nats: robust standard deviation (68 % quantile of the absolute shift) for the judged pair.
    measured_nats: the same between the reference and the noise engine, before scaling to the pair.
    positions, prompts: what it was measured on.
    source: the two engines it was measured between.
    """

    sigma_nats: float
    measured_nats: float
    positions: int
    prompts: int
    source: str


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
    if scored.workload.forced_from != reference.digest:
        raise IncomparableError(
            f"the noise recording scores the tokens of recording {str(scored.workload.forced_from)[:12]}, the "
            f"reference is {reference.digest[:12]}; record the noise engine again"
        )
    shifts = [
        shift
        for completion in scored.completions
        if (shift := _margin_shifts(reference.by_id[completion.id], completion)) is not None
    ]
    everything = np.concatenate(shifts) if shifts else np.empty(0)
    measured = float(np.quantile(np.abs(everything), 0.6827)) if everything.size else 0.0
    reference_dtype, scored_dtype = dtype_of(reference), dtype_of(scored)
    measured_sides = _is_16_bit(reference_dtype) + _is_16_bit(scored_dtype)
    judged_sides = _is_16_bit(reference_dtype) + _is_16_bit(candidate_dtype)
    if measured_sides == 0 and judged_sides > 0:
        raise IncomparableError(
            f"noise between {reference_dtype} and {scored_dtype} says nothing about a {candidate_dtype} "
            "candidate; give the noise engine the candidate's dtype"
        )
    scale = math.sqrt(judged_sides / measured_sides) if measured_sides else 1.0
    return Noise(
        sigma_nats=max(measured * scale, SIGMA_FLOOR_NATS),
        measured_nats=measured,
        positions=int(everything.size),
        prompts=len(shifts),
        source=f"{reference.label} against {scored.label}",
    )


def dtype_of(recording: Recording) -> str:
    """What the engine worked in: where `auto` was asked, what it said it chose."""
    asked = recording.spec.dtype
    return str(recording.fingerprint.context.get("engine.dtype", asked)) if asked == "auto" else asked


def _is_16_bit(dtype: str) -> bool:
    """An `auto` that nobody resolved counts: models are stored in 16 bits."""
    return dtype != "float32"


def _margin_shifts(reference: Completion, scored: Completion) -> NDArray[np.float64] | None:
    """Shift of (top-1 minus top-2) at each position where both tokens are in the other's top k; None without data."""
    if reference.logprobs is None or scored.logprobs is None or not len(scored.logprobs):
        return None
    if reference.logprobs.k < 2 or scored.logprobs.k < 2:
        return None
    if reference.token_ids != scored.token_ids:
        raise IncomparableError(
            f"the noise recording scored other tokens than the reference's on {reference.id!r}; record it again"
        )
    ids, top = arrays(reference.logprobs)
    other_ids, other_top = arrays(scored.logprobs)
    first = _looked_up(other_ids, other_top, ids[:, 0])
    second = _looked_up(other_ids, other_top, ids[:, 1])
    with np.errstate(invalid="ignore"):  # a masked token's -inf on both sides is no shift
        shift = (first - second) - (top[:, 0].astype(np.float64) - top[:, 1])
    return shift[np.isfinite(shift)]


def arrays(logprobs: TokenLogprobs) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Top-k token ids and log-probabilities as [T, K] arrays, without a copy."""
    shape = (len(logprobs), logprobs.k)
    ids = np.frombuffer(logprobs.top_token_ids, np.int32).reshape(shape)
    return ids, np.frombuffer(logprobs.top, np.float32).reshape(shape)


def _looked_up(ids: NDArray[np.int32], top: NDArray[np.float32], wanted: NDArray[np.int32]) -> NDArray[np.float64]:
    """The log-probability of wanted[t] in row t; NaN where it is not among the top k."""
    hit = (ids == wanted[:, None]) & (ids != NO_TOKEN)
    found = top[np.arange(len(ids)), hit.argmax(axis=1)].astype(np.float64)
    return np.where(hit.any(axis=1), found, np.nan)
