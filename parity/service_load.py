"""Drives a plan of requests against one OpenAI-compatible server and measures every answer: `drive`.

The client (`parity.service_client`) is a process of its own, so that nothing the host does (drawing a bar, sampling the
machine) can make it late, and so that ending it ends all of its connections at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from parity import timings
from parity.errors import ConfigError, EngineError
from parity.timings import HostSample, LoadRun
from parity.traffic import Plan, PlannedRequest

_SAMPLE_EVERY_S = 1.0
_SILENCE_S = 60.0  # the client says how far it is every second


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When an answer is given up, in seconds.

    connect_s: no connection. silence_s: no byte of the answer. answer_s: no end of it, however much it says.
    """

    connect_s: float = 10.0
    silence_s: float = 60.0
    answer_s: float = 1800.0


class Observer(Protocol):
    """Whoever watches."""

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        """`done` of `total` for the task named `what`; a task ends when done equals total."""


def drive(  # noqa: PLR0913  where to, how long, who watches
    plan: Plan,
    *,
    url: str,
    model: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    observer: Observer | None = None,
    sample: Callable[[float], HostSample] | None = None,
) -> LoadRun:
    """Send the plan's requests when they are due, warm-up first, and return what every one of them met.

    A failed request is a `RequestTiming` with its `Failure`, never an exception, and never sent again; a run in which
    all failed is returned like any other. `facts` and `warnings` are the client's own; `start_up_s` is None.

    url: of the server, with or without `/v1`. api_key: sent as a bearer token, kept nowhere.
    sample: looks at the machine, given the seconds since the run began; called about every second while it lasts. What
        it raises ends the run (a server that died, say).

    Raises:
        ConfigError: If the url is none.
        EngineError: If the client itself cannot run.
    """
    root = base_url(url)
    head = {
        "url": root,
        "model": model,
        "api_key": api_key,
        "limits": asdict(limits or Limits()),
        "profile": plan.profile,
        "seed": plan.seed,
        "concurrency": plan.concurrency,
        "warmup": len(plan.warmup),
        "requests": len(plan.requests),
    }
    with _client() as client:
        client.send(head, plan)
        run, host = client.listen(f"profile {plan.profile}", len(plan.requests), observer, sample)
    facts = {**run.facts, "plan.sha256": plan.sha256(), "server.url": root, "server.model": model}
    return replace(run, host=tuple(host), facts=facts)


def base_url(url: str) -> str:
    """The server's root: with its scheme, without a slash at the end, and without `/v1`.

    Raises:
        ConfigError: If it is no url of a server.
    """
    root = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(root)
        fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        fit = False
    if not fit:
        raise ConfigError(f"{url!r} is no url of a server; write it as 'http://host:port'")
    return root


@contextlib.contextmanager
def _client() -> Iterator[_Client]:
    """A started client; ended with all its connections, whatever happens."""
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "parity.service_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is ours to hear; the client then ends with the kill below
        )
        try:
            yield _Client(process, complaints)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


class _Client:
    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[bytes]) -> None:
        self._process = process
        self._complaints = complaints
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, name="parity-load", daemon=True).start()

    def send(self, head: Mapping[str, Any], plan: Plan) -> None:
        """Hand the whole plan over; the pipe stays open, and its end is the client's sign that we are gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(head).encode() + b"\n")
            for request in (*plan.warmup, *plan.requests):
                self._process.stdin.write(_line(request))
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def listen(
        self, what: str, total: int, observer: Observer | None, sample: Callable[[float], HostSample] | None
    ) -> tuple[LoadRun, list[HostSample]]:
        """Follow the run to its end."""
        host: list[HostSample] = []
        zero_s, heard_s, due_s = None, time.monotonic(), 0.0
        while True:
            now_s = time.monotonic()
            if zero_s is not None and sample is not None and now_s >= due_s:
                host.append(sample(now_s - zero_s))
                due_s = now_s + _SAMPLE_EVERY_S
            if now_s - heard_s > _SILENCE_S:
                raise EngineError(f"the load client hangs: it said nothing for {_SILENCE_S:g} s; it was ended")
            try:
                line = self._lines.get(timeout=min(_SAMPLE_EVERY_S, max(0.0, due_s - now_s) or _SAMPLE_EVERY_S))
            except queue.Empty:
                continue
            heard_s = time.monotonic()
            if line is None:
                raise self._ended()
            event = json.loads(line)
            if event["event"] == "began":
                zero_s = event["zero_s"]
            elif event["event"] == "progress" and observer is not None:
                observer.progress(what, event["done"], total, f"{event['failed']} failed")
            elif event["event"] == "finished":
                if observer is not None:
                    observer.progress(what, total, total, "")
                return timings.from_json_lines(self._rest(event["lines"])), host

    def _rest(self, count: int) -> str:
        lines = []
        for _ in range(count):
            line = self._lines.get(timeout=_SILENCE_S)
            if line is None:
                raise self._ended()
            lines.append(line)
        return b"".join(lines).decode()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # closed while we read: the run is over
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _ended(self) -> EngineError:
        self._process.kill()
        self._process.wait()
        self._complaints.seek(0)
        said = self._complaints.read().decode("utf-8", "replace").strip()
        if "No module named 'aiohttp'" in said:
            return EngineError("load is made with aiohttp, which is missing; pip install 'engine-parity[performance]'")
        last = said.splitlines()[-1] if said else f"exit code {self._process.returncode}"
        return EngineError(f"the load client failed: {last}")


def _line(request: PlannedRequest) -> bytes:
    """The prompt stands apart, as the JSON that goes into the request's body: nothing is encoded when it is due."""
    head = json.dumps([request.id, request.at_s, request.max_tokens, len(request.prompt_token_ids)])
    return f"{head}\t[{','.join(map(str, request.prompt_token_ids))}]\n".encode()
