"""Is the candidate still what was accepted? The golden takes the reference's place; its engine is not needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parity import Verdict

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("check", ["inputs", "shape", "greedy", "lockstep", "accuracy"])
def test_golden(parity_judge_golden: Callable[[str], Verdict], check: str) -> None:
    """The candidate reads, ends, answers and scores like what was accepted, beyond rounding."""
    parity_judge_golden(check)
