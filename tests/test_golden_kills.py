"""Killed at any moment, an acceptance leaves the old golden or the new one, and nothing in the next one's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import golden_kills
from golden_cases import TARGET, contents, document_of, scored, shelf_in
from parity import golden


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of one shelf, each left behind by an acceptance that was killed one file operation later."""
    directory = tmp_path_factory.mktemp("killed")
    first = scored(directory / "run-1", seed=1)
    scored(directory / "run-2", seed=2)
    shelf_in(directory / "start").accept(first)
    subprocess.run([sys.executable, golden_kills.__file__, str(directory)], check=True)
    return directory


@pytest.mark.parametrize("kept", ["folder", "store"])
def test_a_kill_at_any_moment_leaves_the_old_golden_or_the_new_one(kept: str, killed: Path) -> None:
    """The old one has its log-probabilities in the folder; in the new one they may have moved into a store."""
    whole, *places, last = sorted((killed / kept).iterdir())
    assert len(places) > 28
    read, cut_short = [], 0
    for place in places:
        cut_short += len(list((place / "golden" / TARGET).glob(".samples-*")))
        shelf = shelf_in(place, elsewhere=str(place / "store") if kept == "store" else None)
        read.append(shelf.read(TARGET).reason)
        golden_kills.accept(killed, place, stored=kept == "store")
        found = shelf.read(TARGET)
        assert (found.reason, len(found.runs)) == ("run 2", 2)
        assert contents(shelf.folder(TARGET)).keys() == contents(whole / "golden" / TARGET).keys()
        assert "run 1" in [document_of(path.parent)["reason"] for path in shelf.aside.glob(f"*/{golden.FILE}")]
    assert cut_short == 1  # a kill while the scored documents were written is among them
    assert read == sorted(read)
    assert (read[0], read[-1]) == ("run 1", "run 2")
    assert contents(last / "golden").keys() == contents(whole / "golden").keys()


def test_no_kill_touches_the_run_that_was_to_be_accepted(killed: Path, tmp_path: Path) -> None:
    """Seeded, so recorded again it is the same to the byte."""
    scored(tmp_path / "run-2", seed=2)
    assert contents(killed / "run-2") == contents(tmp_path / "run-2")
