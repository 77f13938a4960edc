"""The logic check: float32 against float32, one wrong prompt is enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_cases import World
from parity.checks import logic, stepwise
from parity.checks.logic import Limits
from parity.errors import IncomparableError
from parity.recording import Recording
from parity.verdict import Outcome, Verdict


def float32_pair(
    *, prompts: int = 6, size: float = 1e-6, only: int | None = None, fault: float = 0.0, dtype: str = "float32"
) -> tuple[Recording, Recording]:
    """`fault` disturbs every prompt, or the prompt `only`."""
    world = World(prompts=prompts)
    exact, other = world.model(), world.rounded(1, size=size, fault=0.0 if only is not None else fault)
    if only is not None:
        other[only] = world.rounded(1, size=size, fault=fault)[only]
    tokens = world.tokens_of(exact)
    reference = world.recording(exact, tokens, dtype="float32")
    return reference, world.recording(other, tokens, dtype=dtype, forced_from=reference.digest, engine="candidate")


def judged(pair: tuple[Recording, Recording]) -> Verdict:
    """By the rule that `logic` asks of scores and `stepwise` of decoding."""
    verdict = logic.check(*pair, noise=None, limits=Limits())
    decoding = stepwise.check(*pair, noise=None, limits=Limits())
    assert decoding == replace(verdict, check="stepwise")
    return verdict


def test_another_implementation_of_the_same_function_passes() -> None:
    verdict = judged(float32_pair())
    assert verdict.outcome is Outcome.PASS
    assert "the same function on every prompt" in verdict.headline


def test_a_fault_a_thousand_times_below_16_bit_rounding_fails() -> None:
    """1e-4 nats on every logit; bfloat16 rounds by about 0.05."""
    verdict = judged(float32_pair(fault=1e-4))
    assert verdict.outcome is Outcome.FAIL
    assert "another function on 6 of the prompts" in verdict.headline


def test_one_prompt_is_enough_and_is_named() -> None:
    verdict = judged(float32_pair(fault=1e-3, only=4))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].evidence[0].startswith("p-004: ")


def test_too_few_prompts_can_fail_and_not_pass() -> None:
    assert judged(float32_pair(prompts=2)).outcome is Outcome.INCONCLUSIVE
    assert judged(float32_pair(prompts=2, fault=1e-3)).outcome is Outcome.FAIL


def test_a_side_in_16_bits_is_refused() -> None:
    with pytest.raises(IncomparableError, match="candidate of the logic check ran in bfloat16"):
        judged(float32_pair(dtype="bfloat16"))
