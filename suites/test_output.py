"""Output parity: did both engines read the same prompts, and do they answer alike beyond rounding?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parity import Verdict

pytestmark = pytest.mark.parity


def test_inputs(parity_judge: Callable[[str], Verdict]) -> None:
    """Both engines work on the same token ids, and their own tokenizers and templates agree."""
    parity_judge("inputs")


def test_greedy(parity_judge: Callable[[str], Verdict]) -> None:
    """Greedy answers part ways only where rounding explains it, and end where they should."""
    parity_judge("greedy")
