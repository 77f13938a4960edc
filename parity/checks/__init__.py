"""Checks: one judgement each about a candidate, held against a reference.

A check is one file in this folder that defines

    ROLES: tuple[str, str]         the two recordings it looks at (default: reference, candidate), see `judge.Evidence`
    REQUIRES: tuple[str, ...]      the fingerprint's facts that a golden must share with the candidate (default: none);
                                   between two live engines a difference is evidence, and no reason not to judge
    Limits                         a frozen dataclass of its thresholds, each with its source
    check(reference, candidate, *, noise, limits) -> Verdict

    judge_tasks(reference, candidate, *, limits, ...) in the place of `check`, where what is judged are the scored
                                   documents of both roles, see `parity.evals`

and is pure: it is handed recordings and returns a verdict; no files, clock, network or processes. Checks never import
each other; what all must ask first is in `parity.comparable`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from types import ModuleType

from parity.errors import ConfigError


@functools.cache
def names() -> tuple[str, ...]:
    """Every check, by its file's name; imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    """Import a check by its file's name.

    Raises:
        ConfigError: If there is no such check; the sentence names the nearest ones.
    """
    known = names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known) or known
        raise ConfigError(f"there is no check {name!r}; did you mean {' or '.join(map(repr, nearest))}?")
    return importlib.import_module(f"{__name__}.{name}")
