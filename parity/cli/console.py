"""What every verb of the command line shares: where things are, how it speaks, how it ends."""

from __future__ import annotations

import argparse
from pathlib import Path

from parity.verdict import Outcome

EXIT_OF = {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 3}
EXIT_COULD_NOT_JUDGE = 2
EXIT_INTERRUPTED = 130


def add_places(parser: argparse.ArgumentParser) -> None:
    """The folders that a verb works in."""
    parser.add_argument(
        "--suites", type=Path, default=Path("suites"), help="folder with targets.toml (default: suites)"
    )
    parser.add_argument("--home", type=Path, default=Path(".parity"), help="cache folder (default: .parity)")


def say(text: str) -> None:
    """One line for a person."""
    print(text)  # noqa: T201
