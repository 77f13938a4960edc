"""Laws of any correct engine, on prompts and parameters drawn at random; no second engine takes part."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parity import Verdict

pytestmark = pytest.mark.parity


def test_laws(parity_judge: Callable[[str], Verdict]) -> None:
    """However the candidate is asked the same thing, it gives the same answer, whole and in form."""
    parity_judge("laws")
