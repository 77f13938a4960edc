"""Stepwise: both engines in float32; the reference scores what the candidate decoded token by token.

What `decode` is to `lockstep`: a fault of the decode path (positions, KV cache) that 16 bits hide stands far above
float32's rounding. Rule in `parity.exact`; source of the limit and measured values: docs/checks/logic.md.
"""

from __future__ import annotations

from parity import exact
from parity.exact import Limits
from parity.noise import Noise
from parity.recording import Recording
from parity.verdict import Verdict

__all__ = ["Limits", "check"]

ROLES = ("stepwise-reference", "stepwise-candidate")


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:  # noqa: ARG001
    """Judge a float32 candidate's decoding against a float32 reference's scores; `noise` is not used.

    Raises:
        IncomparableError: If one side did not run in float32, or `reference` did not score this candidate's tokens.
    """
    return exact.verdict("stepwise", reference, candidate, limits)
