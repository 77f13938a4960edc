"""Logic: both engines in float32; the candidate scores what the reference answered, in one prefill.

Rule in `parity.exact`; source of the limit and measured values: docs/checks/logic.md.
"""

from __future__ import annotations

from parity import exact
from parity.exact import Limits
from parity.noise import Noise
from parity.recording import Recording
from parity.verdict import Verdict

__all__ = ["Limits", "check"]

ROLES = ("logic-reference", "logic-candidate")


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:  # noqa: ARG001
    """Judge whether two float32 engines compute the same function; `noise` is not used.

    Raises:
        IncomparableError: If one side did not run in float32, or they did not score the same tokens.
    """
    return exact.verdict("logic", reference, candidate, limits)
