"""Are two texts the same answer, detokenised in different ways? Pure.

An answer may end in the middle of a character. Some engines show its first bytes as U+FFFD; others hold them back, and
with them whatever else their token said, which is a space at most times. That is no difference between engines.
"""

from __future__ import annotations

import re

CUT = "\N{REPLACEMENT CHARACTER}"
_HELD_BACK = re.compile(rf"\s*{CUT}+$")


def alike(one: str, other: str) -> bool:
    """Whether both may be the text of the same tokens."""
    return not _forms(one).isdisjoint(_forms(other))


def begins(whole: str, text: str) -> bool:
    """Whether `text` may be the beginning of the text `whole`."""
    return any(whole.startswith(form) for form in _forms(text))


def _forms(text: str) -> set[str]:
    return {text, text.rstrip(CUT), _HELD_BACK.sub("", text)}
