"""Accuracy: on the same documents of the same lm-eval tasks, does the candidate get as many right?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parity import Verdict

pytestmark = pytest.mark.parity


def test_accuracy(parity_judge: Callable[[str], Verdict]) -> None:
    """Document by document against the reference, beyond what rounding changes."""
    parity_judge("accuracy")
