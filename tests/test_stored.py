"""Recordings on disk, handed out by role: what stays in memory, and what is read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity import judge, store
from parity.recording import Recording
from recordings import completion, recording

ROLES = ("reference", "candidate", "noise")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roles in the order of reading, with no memory to hold large recordings in."""
    found: list[str] = []
    own = store.read

    def counted(path: Path) -> Recording:
        found.append(path.name)
        return own(path)

    monkeypatch.setattr(store, "read", counted)
    monkeypatch.setattr(judge, "_HELD_BYTES", 0)
    return found


def stored(directory: Path) -> judge._Stored:
    made = recording([completion()])
    for role in ROLES:
        header = store.make_header(
            spec=made.spec,
            workload=made.workload,
            fingerprint=made.fingerprint,
            created_at=made.created_at,
            resumed=0,
            key="",
        )
        store.write(directory / role, header=header, completions=made.completions)
    return judge._Stored({role: directory / role for role in ROLES})


def test_what_somebody_still_holds_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    kept = stored(tmp_path)
    sides = kept["reference"], kept["candidate"]
    assert kept["noise"].completions
    assert (kept["reference"], kept["candidate"]) == sides
    assert read == list(ROLES)


def test_what_nobody_holds_is_gone_before_the_next_is_read(tmp_path: Path, read: list[str]) -> None:
    kept = stored(tmp_path)
    for role in (*ROLES, "reference"):
        assert kept[role].completions
    assert read == [*ROLES, "reference"]
