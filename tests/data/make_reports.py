"""Writes the expected reports beside this file anew: `python tests/data/make_reports.py`, then read the diff.

Run it after a deliberate change of wording. No test does so by itself: an expected text that follows the code expects
nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from greedy_cases import verdicts
from parity.reports import terminal

HERE = Path(__file__).parent


def main() -> None:
    for name, verdict in verdicts().items():
        (HERE / "reports" / f"{name}.txt").write_text(terminal.render(verdict) + "\n", "utf-8")


if __name__ == "__main__":
    main()
