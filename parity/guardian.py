"""Starts a command, keeps its log within bounds, and ends everything it started when told to or when its host is gone.

A script of its own (`python -I -S guardian.py`), so that it outlives a host that is killed: the host's end of the pipe
then closes. It adopts whatever its command leaves behind, so that a process in a session of its own is found as well.

In:  a line: {"argv", "env", "log", "log_bytes", "grace_s"}; then anything, or the end, means: end it
Out: {"event": "started", "pid"} {"event": "failed", "message"} {"event": "exited", "code"}
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PIPE_BYTES = 1 << 20
_STEP_S = 0.05


def descendants(root: int) -> list[int]:
    """Every living process that `root` started, directly or not; zombies are not alive."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # The name in parentheses may hold anything, spaces and parentheses included.
                state, parent = Path(entry.path, "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


class CappedLog:
    """A file that keeps its beginning and its end when there is more than it may hold."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._file = path.open("w+b", buffering=0)
        self._most, self._kept = most_bytes, most_bytes // 4
        self._size = self._left_out = 0

    def write(self, data: bytes) -> None:
        """Add to it; a full disk loses lines, never the server."""
        with contextlib.suppress(OSError):
            self._file.write(data)
            self._size += len(data)
            if self._size > self._most:
                self._shorten()

    def close(self) -> None:
        """No more."""
        self._file.close()

    def _shorten(self) -> None:
        self._file.seek(self._size - self._kept)
        tail = self._file.read()
        tail = tail[tail.find(b"\n") + 1 :]
        self._left_out += self._size - self._kept - len(tail)
        self._file.seek(self._kept)
        self._file.write(b"\n[... about %d bytes are left out here ...]\n" % self._left_out + tail)
        self._file.truncate()
        self._size = self._file.tell()


class _Guardian:
    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._log = CappedLog(Path(order["log"]), order["log_bytes"])
        self._ends, self._wakes = os.pipe(), os.pipe()
        self._selector = selectors.DefaultSelector()
        self._command: subprocess.Popen[bytes] | None = None
        self._code: int | None = None

    def run(self) -> int:
        for end in (*self._ends, *self._wakes):
            os.set_blocking(end, False)
        with contextlib.suppress(OSError):  # room for a burst; an unprivileged user may be refused
            fcntl.fcntl(self._ends[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._ends[1], True)  # the command's own end
        signal.set_wakeup_fd(self._wakes[1])
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._end())
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            # Kept, and never asked: a forgotten one buries its process, and with it how that ended.
            self._command = self._start()
        except OSError as error:
            _say(event="failed", message=os.strerror(error.errno or 0).lower())
            return 1
        os.close(self._ends[1])
        with contextlib.suppress(OSError):  # the host may be gone; its end of our input then says so
            _say(event="started", pid=self._command.pid)
        for end in (0, self._ends[0], self._wakes[0]):
            self._selector.register(end, selectors.EVENT_READ)
        while self._code is None and 0 not in self._wait(None):
            pass
        if self._code is not None:
            self._drain()
            with contextlib.suppress(OSError):
                _say(event="exited", code=self._code)
        self._end()
        return 0

    def _start(self) -> subprocess.Popen[bytes]:
        prctl = ctypes.CDLL(None).prctl
        return subprocess.Popen(
            self._order["argv"],
            env=self._order["env"],
            stdin=subprocess.DEVNULL,
            stdout=self._ends[1],
            stderr=self._ends[1],
            start_new_session=True,
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509  we have one thread
        )

    def _wait(self, timeout_s: float | None) -> list[int]:
        """Sleep until something happens; log what was said, bury who died; returns the descriptors that woke us."""
        woken = [int(key.fd) for key, _ in self._selector.select(timeout_s)]
        if self._wakes[0] in woken:
            os.read(self._wakes[0], 4096)
        if self._ends[0] in woken:
            self._log_some()
        self._bury()
        return woken

    def _log_some(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._ends[0], _PIPE_BYTES)
            self._log.write(data)
            if not data and self._ends[0] in self._selector.get_map():
                self._selector.unregister(self._ends[0])
            return bool(data)
        return False

    def _drain(self) -> None:
        """What the command said last; its children may keep the pipe open, and talking."""
        for _ in range(64):
            if not self._log_some():
                return

    def _bury(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if self._command is not None and pid == self._command.pid:
                    self._code = os.waitstatus_to_exitcode(status)

    def _end(self) -> None:
        """Ask, wait, then insist until nobody is left. Does not return."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if 0 in self._selector.get_map():
            self._selector.unregister(0)
        for number, patience_s in ((signal.SIGTERM, self._order["grace_s"]), (signal.SIGKILL, 30.0)):
            deadline_s, asked = time.monotonic() + patience_s, set[int]()
            for left in self._living():
                # Insisting, everybody again and again: one of them may just have started another.
                for pid in left if number == signal.SIGKILL else set(left) - asked:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
                asked.update(left)
                if time.monotonic() > deadline_s:
                    break
                self._wait(_STEP_S)
        self._drain()
        os._exit(0)

    def _living(self) -> Iterator[list[int]]:
        while left := descendants(os.getpid()):
            yield left


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _order() -> dict[str, Any]:
    """Read byte by byte: what follows the first line is a sign of its own."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        line += byte
    order: dict[str, Any] = json.loads(line)
    return order


if __name__ == "__main__":
    sys.exit(_Guardian(_order()).run())
