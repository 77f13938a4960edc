"""Texts of the same tokens, shown in different ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.detokenised import alike, begins

CUT = "\ufffd"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("word", f"word{CUT}"),
        ("word", f"word {CUT}"),  # vLLM 0.29.0 holds the space back with the bytes; seen with Devanagari
        ("word ", f"word {CUT}"),
        (f"word{CUT}", f"word{CUT}{CUT}"),
        ("", f" {CUT}"),
    ],
)
def test_a_character_cut_in_two_is_no_difference(one: str, other: str) -> None:
    assert alike(one, other)
    assert alike(other, one)
    assert begins(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("word", "word "),  # nothing is cut in two here: a lost space is a lost space
        ("word", f"wor{CUT}"),
        (f"a{CUT}b", "ab"),
        ("word", f"words {CUT}"),
    ],
)
def test_anything_else_is_one(one: str, other: str) -> None:
    assert not alike(one, other)


@given(st.text())
def test_a_text_is_like_itself_and_is_its_own_beginning(text: str) -> None:
    assert alike(text, text)
    assert begins(text, text)
