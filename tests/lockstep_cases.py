"""Simulated engines: one seeded model of logits, and engines that round it, each in its own way.

Rounding is Gaussian on the logits, with a size that varies by prompt as it does in real engines; a fault is a fixed
disturbance of the model itself.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from parity.recording import Completion, Recording, TokenLogprobs
from recordings import completion, recording

VOCABULARY, K = 60, 20
ROUNDING = 0.05

Logits = NDArray[np.float64]


def logprobs_of(logits: Logits, tokens: NDArray[np.int64], *, k: int = K) -> TokenLogprobs:
    """Top-k log-probabilities of [T, V] logits, and those of the given tokens."""
    scores = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    scores -= logits.max(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(scores, order, axis=1)
    chosen = scores[np.arange(len(tokens)), tokens]
    return TokenLogprobs(
        k=k,
        chosen=memoryview(array("f", chosen)).toreadonly(),
        top_token_ids=memoryview(array("i", order.ravel())).toreadonly(),
        top=memoryview(array("f", top.ravel())).toreadonly(),
    )


@dataclass(frozen=True)
class World:
    """`prompts` prompts of `tokens` positions each; float32 is the model itself."""

    prompts: int = 32
    tokens: int = 16
    seed: int = 7
    context: int = 5

    def model(self) -> list[Logits]:
        draw = np.random.default_rng(self.seed)
        return [draw.normal(0.0, 2.0, (self.tokens, VOCABULARY)) for _ in range(self.prompts)]

    def rounded(self, seed: int, *, size: float = ROUNDING, fault: float = 0.0) -> list[Logits]:
        """One engine's logits. `fault`: size of a disturbance that has nothing to do with rounding."""
        draw = np.random.default_rng([self.seed, seed])
        wrong = np.random.default_rng([self.seed, 99])
        hard = np.random.default_rng([self.seed, 55])  # a prompt that rounds badly does so in every engine
        found = []
        for logits in self.model():
            scale = size * float(hard.lognormal(0.0, 0.3) * draw.lognormal(0.0, 0.05))
            found.append(logits + draw.normal(0.0, scale, logits.shape) + fault * wrong.normal(0.0, 1.0, logits.shape))
        return found

    def tokens_of(self, logits: list[Logits]) -> list[NDArray[np.int64]]:
        return [each.argmax(axis=1) for each in logits]

    def recording(
        self,
        logits: list[Logits],
        tokens: list[NDArray[np.int64]],
        *,
        dtype: str,
        forced_from: str | None = None,
        engine: str = "replay",
    ) -> Recording:
        answers: list[Completion] = []
        for number, (each, chosen) in enumerate(zip(logits, tokens, strict=True)):
            made = completion(
                f"p-{number:03}", prompt_token_ids=list(range(self.context)), token_ids=chosen.tolist(), terminator=None
            )
            answers.append(replace(made, logprobs=logprobs_of(each, chosen)))
        return recording(answers, dtype=dtype, forced_from=forced_from, engine=engine)


def sides(
    world: World, *, seed: int = 1, size: float = ROUNDING, fault: float = 0.0, reference_dtype: str = "float32"
) -> tuple[Recording, Recording, Recording]:
    """Reference, candidate's scores and noise engine's scores. A bfloat16 reference has a float32 noise engine."""
    exact, one, two = world.model(), world.rounded(10 * seed), world.rounded(10 * seed + 1, size=size, fault=fault)
    own, other = (exact, one) if reference_dtype == "float32" else (one, exact)
    tokens = world.tokens_of(own)
    reference = world.recording(own, tokens, dtype=reference_dtype)
    noise_dtype = "bfloat16" if reference_dtype == "float32" else "float32"
    scores = world.recording(other, tokens, dtype=noise_dtype, forced_from=reference.digest)
    candidate = world.recording(two, tokens, dtype="bfloat16", forced_from=reference.digest, engine="candidate")
    return reference, candidate, scores
