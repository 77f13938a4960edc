"""The command `parity`: verbs on targets, recordings, goldens and environments. Plumbing only.

Exit codes: 0 pass, upgrade (or done), 1 fail, hold, 2 usage error or could not judge, 3 inconclusive, undecided, 130
interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from parity.cli import evaluations, goldens, machine, payoff, performance, runs, upgrades
from parity.cli.console import EXIT_COULD_NOT_JUDGE, EXIT_INTERRUPTED
from parity.errors import ParityError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model's answer may hold what the terminal cannot show
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
    except ParityError as error:
        print(f"parity: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_COULD_NOT_JUDGE
    except KeyboardInterrupt:
        print(  # noqa: T201
            "parity: interrupted; engines are ended, finished completions are kept and the next run resumes from them",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output went away; the interpreter must not try to write the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_COULD_NOT_JUDGE
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        print(f"parity: {where}{error.strerror or error}", file=sys.stderr)  # noqa: T201
        return EXIT_COULD_NOT_JUDGE
    return code


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parity",
        description="Decides whether an inference engine may be upgraded, rebuilt, quantized or replaced.",
        epilog="exit codes: 0 pass or upgrade, 1 fail or hold, 2 usage error or could not judge, 3 inconclusive or "
        "undecided, 130 interrupted",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in (upgrades, runs, evaluations, performance, payoff, goldens, machine):
        module.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
