"""One started engine: its process, its pipe, its time limits, and its end.

The engine runs in a worker (`parity.worker`) in a process group of its own, reached through pipes. Whatever happens
here (a crash, silence, Ctrl-C) the whole group is ended, so that nothing keeps running or holding GPU memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from parity.engines import EngineSpec, Progress
from parity.errors import EngineError
from parity.fingerprint import Fingerprint
from parity.prompts import Request, request_to_json
from parity.recording import Completion
from parity.worker import PROTOCOL

_LOG_TAIL_BYTES = 64 << 10
_TELLING = ("error", "exception", "killed", "out of memory", "abort", "signal", "refused", "fatal")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimits:
    """How long silence may last before an engine counts as hanging, in seconds."""

    start_s: float = 900.0
    silence_s: float = 300.0
    close_s: float = 60.0


class Session:
    """A worker process with one engine; use as a context manager.

    Raises (all methods): EngineError when the engine crashes, hangs, refuses, or answers what is not protocol. The
    sentence says what was going on, how it ended, the most telling line of the log, and where the log is.
    """

    def __init__(self, *, label: str, command: Sequence[str], log: Path, limits: TimeLimits) -> None:
        self._label = label
        self._log_path = log
        self._limits = limits
        self._doing = "starting"
        self._lines: queue.Queue[str | None] = queue.Queue()
        # A folder that holds nothing but the package: the host's own packages stay invisible to the engine.
        self._path = tempfile.TemporaryDirectory(prefix="parity-path-")
        Path(self._path.name, "parity").symlink_to(Path(__file__).parent)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as log_file:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    env=_environment(self._path.name),
                    start_new_session=True,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                )
            except OSError as error:
                self._path.cleanup()
                raise EngineError(
                    f"{label} cannot be started: {command[0]!r}: {os.strerror(error.errno or 0).lower()}; "
                    "check the target's python, environment or launcher"
                ) from error
        threading.Thread(target=self._read, name="parity-events", daemon=True).start()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._ask_to_close()
        finally:  # also when Ctrl-C comes while the engine closes
            self.kill()

    def open(self, spec: EngineSpec, model: str) -> Fingerprint:
        """Load the model; returns when the engine is ready."""
        self._send({"op": "open", "spec": spec.to_json(), "model": model})
        for event in self._events("opened", limit_s=self._limits.start_s):
            if event["event"] == "opened":
                return Fingerprint.from_json(event["fingerprint"])
            if event["event"] == "hello" and event["protocol"] != PROTOCOL:
                raise EngineError(
                    f"{self._label}: its worker speaks protocol {event['protocol']}, this parity speaks {PROTOCOL}; "
                    "install the same engine-parity on both sides"
                )
        raise AssertionError("unreachable: _events ends with the awaited event")

    def run(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """Send requests; yield completions and signs of life as they come, until all are answered."""
        self._doing = f"answering {len(requests)} requests"
        self._send({"op": "run", "requests": [request_to_json(r) for r in requests]})
        waiting = {r.id for r in requests}
        for event in self._events("finished", limit_s=self._limits.silence_s):
            if event["event"] == "progress":
                yield Progress(tokens=event["tokens"])
            elif event["event"] == "completion":
                completion = Completion.from_json(event["completion"])
                if completion.id not in waiting:
                    raise EngineError(
                        f"{self._label} answered {completion.id!r}, which it was not asked or had answered"
                    )
                waiting.discard(completion.id)
                yield completion
        if waiting:
            raise EngineError(
                f"{self._label} said it had finished and left {len(waiting)} of {len(requests)} requests unanswered, "
                f"first {min(waiting)!r}; see {str(self._log_path)!r}"
            )

    def kill(self) -> None:
        """End the worker and everything it started; safe to call twice."""
        # The group outlives its leader when an engine's own children do; so it is signalled even after the exit.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._path.cleanup()

    def _ask_to_close(self) -> None:
        try:
            self._send({"op": "close"})
            self._process.wait(timeout=self._limits.close_s)
        except (EngineError, subprocess.TimeoutExpired):
            pass  # the recordings are safe already; what is left is ended by kill()

    def _send(self, command: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(line)
        except (OSError, ValueError):
            pass  # closed by kill()
        self._lines.put(None)

    def _events(self, last: str, *, limit_s: float) -> Iterator[dict[str, Any]]:
        """Events up to and including `last`; any event is a sign of life."""
        deadline = time.monotonic() + limit_s
        while True:
            line = self._next_line(deadline, limit_s)
            if line is None:
                raise self._ended()
            event = self._decode(line)
            if event["event"] == "failed":
                raise EngineError(f"{self._label} failed while {self._doing}: {event['message']}{self._log_hint()}")
            yield event
            if event["event"] == last:
                return
            deadline = time.monotonic() + limit_s

    def _next_line(self, deadline: float, limit_s: float) -> str | None:
        try:
            return self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise EngineError(
                f"{self._label} hangs: no sign of life for {limit_s:g} s while {self._doing}; it was ended"
                f"{self._log_hint()}"
            ) from None

    def _decode(self, line: str) -> dict[str, Any]:
        try:
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                return event
        except ValueError:
            pass
        raise EngineError(
            f"{self._label}: a line on its protocol stream is not protocol ({line[:80].strip()!r}); if a launcher "
            "prints a banner, silence it"
        )

    def _ended(self) -> EngineError:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            how = "closed its output"
        else:
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        return EngineError(f"{self._label} {how} while {self._doing}{self._log_hint()}")

    def _log_hint(self) -> str:
        try:
            with self._log_path.open("rb") as file:
                file.seek(max(0, self._log_path.stat().st_size - _LOG_TAIL_BYTES))
                lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
        said = f"; its log says {telling[-1][:200]!r}" if telling else ""
        return f"{said}; full log: {str(self._log_path)!r}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last, which have names
        return f"signal {number}"


def _environment(path: str) -> dict[str, str]:
    """The user's environment, with our package and nothing else of ours on the interpreter's path."""
    ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}
    return {**{k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV")}, **ours}
