"""Accept, and be killed one file operation later each time: `python golden_kills.py DIRECTORY`.

Each time on a fresh copy of DIRECTORY/start, in a process of its own, which is killed before its n-th operation on a
file of that copy; a file that is about to be renamed is cut in half first, as if the kill had come while it was
written. With the log-probabilities in the folder, and moving into a store.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

from golden_cases import scored, shelf_in

_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def accept(directory: Path, place: Path, *, stored: bool) -> None:
    """What is killed: run 2 takes the place of run 1, whose log-probabilities may move into a store."""
    shelf = shelf_in(place, elsewhere=str(place / "store") if stored else None)
    shelf.accept(scored(directory / "run-2", seed=2))


def _killed(directory: Path, place: Path, number: int, *, stored: bool) -> bool:
    """Whether the process was killed, or had fewer operations than that."""
    child = os.fork()
    if child == 0:
        _die_before(place, number)
        accept(directory, place, stored=stored)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "accepting failed"
    return os.WIFSIGNALED(status)


def _die_before(place: Path, number: int) -> None:
    left = itertools.count(number - 1, -1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _OPERATIONS or not str(arguments[0]).startswith(str(place)):
            return
        if event == "open" and not int(str(arguments[2])) & _WRITING:
            return
        if next(left) == 0:
            moved = str(arguments[0])
            if event == "os.rename" and os.path.isfile(moved):  # noqa: PTH113  no new events from in here
                os.truncate(moved, os.stat(moved).st_size // 2)  # noqa: PTH116
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(directory: Path, *, stored: bool) -> None:
    for number in itertools.count(0):
        place = directory / ("store" if stored else "folder") / f"{number:03}"
        shutil.copytree(directory / "start", place)
        if number == 0:  # what a process loads when it first reads and writes, it need not load in each child again
            accept(directory, place, stored=stored)
        elif not _killed(directory, place, number, stored=stored):
            return


if __name__ == "__main__":
    for each in (False, True):
        main(Path(sys.argv[1]), stored=each)
