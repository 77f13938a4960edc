"""Performance: under the same traffic, start by start in turn, is the candidate slower than the reference?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from parity import Verdict

if TYPE_CHECKING:
    from parity.exports import Series

pytestmark = pytest.mark.parity


def test_performance(parity_judge_performance: Callable[[], Verdict]) -> None:
    """No gated metric of the profile lost more than its margin, beyond what starts of one engine vary."""
    parity_judge_performance()


def test_metric(parity_series: Series, parity_benchmark: Callable[[Series], None]) -> None:
    """A row in pytest-benchmark's table and JSON; no verdict."""
    parity_benchmark(parity_series)
