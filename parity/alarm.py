"""Waking at a moment, to within tens of microseconds.

asyncio's own timers round up to the next millisecond, because epoll counts in them. The kernel's timerfd does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time

_CLOCK_MONOTONIC, _ABSOLUTE = 1, 1


class _Spec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]


class Alarm:
    """For one waiter at a time; a context manager within a running event loop."""

    def __enter__(self) -> Alarm:
        self._loop = asyncio.get_running_loop()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "no timerfd")
        self._rung = asyncio.Event()
        self._loop.add_reader(self._file, self._ring)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)

    async def until(self, moment_s: float) -> None:
        """Wait for a moment of `time.monotonic`; not at all if it has passed."""
        if moment_s <= time.monotonic():
            return
        self._rung.clear()
        seconds, rest = divmod(moment_s, 1.0)
        spec = _Spec(at_s=int(seconds), at_ns=int(rest * 1e9))
        self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(spec), None)
        await self._rung.wait()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._file, 8)
            self._rung.set()
