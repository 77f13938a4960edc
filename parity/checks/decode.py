"""Decoding: the reference scores the tokens that the candidate decoded, each with its KV cache, one by one.

The candidate's log-probabilities were made while it decoded; the reference's, of the same tokens, in one prefill. A
fault of the decode path alone (positions, a stale or low-precision KV cache) shows here and nowhere else (R3p, on all
tokens instead of those before the first divergence).

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

ROLES = ("reference-scores", "candidate")
REQUIRES = MODEL


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:
    """Judge a candidate's decoding against the reference's scores of the same tokens.

    Raises:
        IncomparableError: If `reference` did not score this candidate's tokens, or log-probabilities are missing.
    """
    pair = equivalence.Pair(
        reference=reference,
        candidate=candidate,
        steps=lockstep.measure(reference, candidate),
        noise=noise,
        judged_sides=sixteen_bit_sides(reference, candidate),
        limits=limits,
    )
    return equivalence.verdict("decode", pair, headline="tokens the candidate decoded")
