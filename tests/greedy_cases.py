"""Two engines' answers with a divergence of exactly the slack a test asks for.

Sigma is 0.25 nats here, so that the limits (6 sigma = 1.5, 25 sigma = 6.25) and every slack used against them are exact
in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parity.checks import greedy
from parity.checks.greedy import Limits
from parity.fingerprint import Scalar
from parity.noise import Noise
from parity.prompts import SamplingParams
from parity.recording import Completion, FinishReason, Recording
from parity.verdict import Verdict
from recordings import completion, plausible_row, recording

SIGMA = 0.25
BENIGN, SUSPICIOUS, MISMATCH = 2 * SIGMA, 8 * SIGMA, 26 * SIGMA
MAX_TOKENS = 3
SAMPLING = SamplingParams.greedy(max_tokens=MAX_TOKENS, logprobs=3)
TOKENS, OTHER = (30, 31, 32), 90
NOISE = Noise(sigma_nats=SIGMA, measured_nats=SIGMA, positions=5000, prompts=40, source="replay 1 against replay 2")

CONFIG: Mapping[str, Scalar] = {
    "model.config.layer_types": str(["full_attention"] * 30),
    "model.config.rope_theta": 100000.0,
}

Answers = tuple[Completion, Completion]


def answers(id_: str, slack: float | None = None, *, at: int = 1, share: float = 0.5) -> Answers:
    """Both sides' answers to one prompt, identical if `slack` is None.

    Where they part, the reference prefers its own token by `share` of the slack, the candidate by the rest.
    """
    ours = completion(id_, token_ids=TOKENS, terminator=None, k=3)
    if slack is None:
        return ours, ours
    own = TOKENS[at]
    left, right = share * slack, (1 - share) * slack
    rows = [plausible_row(t) for t in TOKENS]
    rows[at] = ((own, -0.5), (OTHER, -0.5 - left), (99, -20.0 - left))
    ours = completion(id_, token_ids=TOKENS, rows=rows, terminator=None)
    tokens = (*TOKENS[:at], OTHER, *TOKENS[at + 1 :])
    rows = [plausible_row(t) for t in TOKENS]
    rows[at] = ((OTHER, -0.5), (own, -0.5 - right), (99, -20.0 - right))
    return ours, completion(id_, token_ids=tokens, rows=rows, terminator=None)


def many(slacks: Sequence[float | None], *, identical: int = 0) -> list[Answers]:
    """One prompt for each slack, then `identical` more."""
    return [answers(f"p-{number:03}", slack) for number, slack in enumerate([*slacks, *[None] * identical], start=1)]


def recordings_of(
    pairs: Sequence[Answers],
    *,
    sampling: SamplingParams = SAMPLING,
    identity: Mapping[str, Scalar] | None = None,
) -> tuple[Recording, Recording]:
    """Reference and candidate; `identity` is laid over the candidate's."""
    return (
        recording(
            [ours for ours, _ in pairs], sampling=sampling, engine="transformers", version="5.19.0", identity=CONFIG
        ),
        recording(
            [theirs for _, theirs in pairs],
            sampling=sampling,
            engine="vllm",
            version="0.32.0",
            identity={**CONFIG, **(identity or {})},
        ),
    )


def judged(
    pairs: Sequence[Answers],
    *,
    noise: Noise | None = NOISE,
    limits: Limits | None = None,
    identity: Mapping[str, Scalar] | None = None,
    sampling: SamplingParams = SAMPLING,
) -> Verdict:
    reference, candidate = recordings_of(pairs, identity=identity, sampling=sampling)
    return greedy.check(reference, candidate, noise=noise, limits=limits or Limits())


def short_by_one(id_: str) -> Answers:
    """The candidate stops by length one token early."""
    ours, _ = answers(id_)
    return ours, completion(id_, token_ids=TOKENS[:-1], terminator=None, finish_reason=FinishReason.LENGTH)


def verdicts() -> dict[str, Verdict]:
    """The verdicts whose reports lie in tests/data/reports, by file name."""
    facts: Mapping[str, Scalar] = {
        "model.config.rope_theta": 10000.0,
        "model.weights_sha256": "4" * 64,
        "model.config.layer_types": str(["full_attention"] * 29 + ["sliding_attention"]),
    }
    benign = [0.0, 0.125, 0.25, 0.25, 0.5, 1.0, 1.5]
    return {
        "pass": judged(many([*benign, SUSPICIOUS], identical=32)),
        "fail": judged(
            [*many([*benign, *([SUSPICIOUS] * 4), MISMATCH], identical=27), short_by_one("short")], identity=facts
        ),
        "inconclusive": judged(many([BENIGN]), noise=None),
    }
