"""Shows a long run to a person: rich bars on a terminal, a line now and then where there is none (CI logs)."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_EVERY_S = 20.0


class Display:
    """A `parity.record.Observer`; use as a context manager."""

    def __init__(self, file: IO[str] | None = None) -> None:
        # No emoji: a path may well hold what rich takes for the name of one, such as ":x:".
        self._console = Console(file=file, stderr=file is None, highlight=False, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said_s: dict[str, float] = {}

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """One sentence that stays."""
        self._console.print(f"parity: {text}", markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        """Move the bar named `what`; it goes away when done."""
        if not self._console.is_terminal:
            self._say(what, done, total, detail)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, detail=detail)
        self._bars.update(self._tasks[what], completed=done, total=total, detail=detail)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(what))

    def steps(self, what: str) -> Callable[[str, int, int], None]:
        """A callback (step, done, total) that moves the bar named `what`."""
        return lambda step, done, total: self.progress(what, done, total, step)

    def _say(self, what: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if done < total and (what not in self._said_s or now - self._said_s[what] >= _PLAIN_EVERY_S):
            self._said_s[what] = now
            self._console.print(f"parity: {what}: {done} of {total} {detail}".rstrip(), markup=False, soft_wrap=True)
