"""Output parity: did both engines read the same prompts, and do they answer alike beyond rounding?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parity import Verdict

pytestmark = pytest.mark.parity


def test_inputs(parity_judge: Callable[[str], Verdict]) -> None:
    """Both engines work on the same token ids, and their own tokenizers and templates agree."""
    parity_judge("inputs")


def test_shape(parity_judge: Callable[[str], Verdict]) -> None:
    """Answers end where they should, and numbers, tokens and texts keep the laws of any correct engine."""
    parity_judge("shape")


def test_greedy(parity_judge: Callable[[str], Verdict]) -> None:
    """Greedy answers part ways only where rounding explains it, and end where they should."""
    parity_judge("greedy")


def test_lockstep(parity_judge: Callable[[str], Verdict]) -> None:
    """The candidate's scores of the reference's tokens are as close as rounding makes two correct engines."""
    parity_judge("lockstep")


def test_decode(parity_judge: Callable[[str], Verdict]) -> None:
    """What the candidate decodes, the reference scores alike: cache and positions are right."""
    parity_judge("decode")


def test_logic(parity_judge: Callable[[str], Verdict]) -> None:
    """In float32, where rounding hides nothing, both engines compute the same function."""
    parity_judge("logic")


def test_stepwise(parity_judge: Callable[[str], Verdict]) -> None:
    """In float32, what the candidate decodes token by token, the reference scores alike."""
    parity_judge("stepwise")


def test_sampling(parity_judge: Callable[[str], Verdict]) -> None:
    """Each engine samples as it was asked: temperature and filters, by its own log-probabilities."""
    parity_judge("sampling")


def test_contract(parity_judge: Callable[[str], Verdict]) -> None:
    """Each engine does with a request what it says: sampling, penalties, ends, log-probabilities, streams."""
    parity_judge("contract")


def test_determinism(parity_judge: Callable[[str], Verdict]) -> None:
    """The same request again, alone or from the prefix cache gives the same answer, up to rounding."""
    parity_judge("determinism")


def test_structured(parity_judge: Callable[[str], Verdict]) -> None:
    """Answers that must follow a schema, an expression or a choice follow it."""
    parity_judge("structured")


def test_laws(parity_judge: Callable[[str], Verdict]) -> None:
    """However the candidate is asked the same thing, it gives the same answer, whole and in form."""
    parity_judge("laws")
