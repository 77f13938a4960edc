"""Lock step: the candidate scores the reference's tokens in one prefill, so that every token is a comparison.

After a first divergence two free-running engines answer different questions; forced along the same tokens they never
do. What is held against the measured rounding noise: the KL divergence a token (R3), how often and how far the most
probable token changes (R2, R1), drift with context length, and for a rebuild the distance from float32 (R3g).

Rules in `parity.equivalence`; source, constants and measured error rates: docs/checks/lockstep.md.
"""

from __future__ import annotations

from parity import equivalence, lockstep
from parity.comparable import MODEL
from parity.equivalence import Limits
from parity.noise import Noise, sixteen_bit_sides
from parity.recording import Recording
from parity.verdict import Verdict

__all__ = ["Limits", "check"]

ROLES = ("reference", "candidate-scores")
REQUIRES = MODEL


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge a candidate's scores of the reference's tokens.

    Raises:
        IncomparableError: If `candidate` did not score this reference's tokens, log-probabilities are missing, or the
            arbiter does not run the same model.
    """
    pair = equivalence.Pair(
        reference=reference,
        candidate=candidate,
        steps=lockstep.measure(reference, candidate),
        noise=noise,
        judged_sides=sixteen_bit_sides(reference, candidate),
        limits=limits,
    )
    return equivalence.verdict("lockstep", pair, headline="scores of the reference's tokens")
