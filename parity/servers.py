"""Servers of OpenAI-compatible completions: started on a free port, awaited, watched, and ended with all they started.

Any command that ends up serving such a port will do. It runs under a guardian (`parity.guardian`), which keeps its log
within bounds and ends it even when this process is killed. A server that runs already is named by its url.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from parity import guardian, host
from parity.errors import ConfigError, EngineError
from parity.fingerprint import Scalar
from parity.service_load import base_url
from parity.timings import HostSample

_IN_USE = re.compile(r"address already in use|address in use|EADDRINUSE|port \S+ is (already )?in use", re.IGNORECASE)
_SECRET = re.compile(r"api[-_]?key|secret|password|[-_]token$", re.IGNORECASE)
_PORTS_TRIED = 4
_POLL_S = 0.1
_LAST_LINES = 5
_LOG_TAIL_BYTES = 16 << 10
_PROBE_TOKEN_IDS = (11, 12, 13)  # every vocabulary has them


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How a server is started. In `argv` and the values of `env`, `{port}` and `{model}` are replaced.

    name: for messages. model: a directory or name, as the command takes it. env: added to ours.
    """

    name: str
    argv: tuple[str, ...]
    model: str
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """start_s: until the first answered request. end_s: between asking and insisting. log_bytes: of its log."""

    start_s: float = 900.0
    end_s: float = 10.0
    log_bytes: int = 32 << 20


class Server:
    """A server that answers.

    url: its root, without `/v1`. model: the name that it serves. start_up_s: from starting it to its first answer;
    None where it ran already. facts: how it was started, and the GPUs that it may see.
    """

    def __init__(
        self, *, url: str, model: str, start_up_s: float | None, facts: Mapping[str, Scalar], process: _Process | None
    ) -> None:
        self.url, self.model, self.start_up_s, self.facts = url, model, start_up_s, facts
        self._process = process

    def sample(self, at_s: float) -> HostSample:
        """The machine now, for `service_load.drive`.

        Raises:
            EngineError: If the server has died; with the last lines of its log.
        """
        if self._process is None:
            return host.look(at_s, root=None, gpus=None, idle_bytes=None)
        self._process.check("serving")
        return self._process.look(at_s)


def running(url: str, *, model: str | None = None, api_key: str | None = None, patience_s: float = 10.0) -> Server:
    """A server that somebody else started.

    model: None takes the first that it serves.

    Raises:
        ConfigError: If the url is none.
        EngineError: If it does not answer a completion in time.
    """
    root = base_url(url)
    client = _Http(root, api_key)
    name = _await_answer(client, label=f"the server at {root}", model=model, within_s=patience_s, process=None)
    return Server(url=root, model=name, start_up_s=None, facts={"server.started": False}, process=None)


@contextlib.contextmanager
def started(
    command: ServerCommand, *, log: Path, limits: ServerLimits | None = None, api_key: str | None = None
) -> Iterator[Server]:
    """Start a server, wait until it has answered a completion, and end it with all it started, whatever happens.

    log: where all that it says is kept, up to a limit. api_key: what it wants to be asked with.

    Raises:
        ConfigError: If the command has no place for the port.
        EngineError: If it cannot be started, dies, or is not ready in time; with the last lines of its log.
    """
    limits = limits or ServerLimits()
    if not any("{port}" in word for word in (*command.argv, *command.env.values())):
        raise ConfigError(f"{command.name}: its command says nowhere which port to serve; write {{port}} there")
    for tries_left in reversed(range(_PORTS_TRIED)):
        with contextlib.ExitStack() as held:
            # A server that wants the port for itself alone cannot have it while we reserve it.
            port = _free_port(held if tries_left == _PORTS_TRIED - 1 else None)
            process = held.enter_context(_process(command, port, log, limits))
            client = _Http(f"http://127.0.0.1:{port}", api_key)
            try:
                name = _await_answer(client, label=command.name, model=None, within_s=limits.start_s, process=process)
            except EngineError:
                if tries_left and process.code is not None and _IN_USE.search(process.log_end()):
                    continue
                raise
            facts: dict[str, Scalar] = {
                "server.started": True,
                "server.name": command.name,
                "server.command": _without_secrets(command.argv),
                **process.facts,
            }
            yield Server(
                url=client.root,
                model=name,
                start_up_s=round(time.monotonic() - process.began_s, 3),
                facts=facts,
                process=process,
            )
            return


def _free_port(held: contextlib.ExitStack | None) -> int:
    """A port that nobody has. Held, it stays bound and unheard until the stack closes.

    Two runs then never get the same: the kernel gives a bound port to nobody who asks for any. A server may still bind
    it, as servers allow sharing an address with sockets that do not listen (SO_REUSEADDR).
    """
    with contextlib.ExitStack() as briefly:
        reserved = (briefly if held is None else held).enter_context(socket.socket())
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        return int(reserved.getsockname()[1])


class _Process:
    """A command under its guardian."""

    def __init__(self, command: ServerCommand, port: int, log: Path, limits: ServerLimits) -> None:
        def filled(text: str) -> str:
            return text.replace("{port}", str(port)).replace("{model}", command.model)

        environment = {**os.environ, **{name: filled(value) for name, value in command.env.items()}}
        self._name, self._log, self._limits = command.name, log, limits
        self._gpus = host.Gpus(environment)
        self._idle_bytes = self._gpus.used_bytes()
        self.facts = self._gpus.facts()
        self.code: int | None = None
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        log.parent.mkdir(parents=True, exist_ok=True)
        self.began_s = time.monotonic()
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to hear
            text=True,
        )
        self._order = {
            "argv": [filled(word) for word in command.argv],
            "env": environment,
            "log": str(log.absolute()),
            "log_bytes": limits.log_bytes,
            "grace_s": limits.end_s,
        }

    def begin(self) -> None:
        assert self._guardian.stdin is not None
        self._guardian.stdin.write(json.dumps(self._order) + "\n")
        self._guardian.stdin.flush()
        threading.Thread(target=self._listen, name="parity-guardian", daemon=True).start()
        self._take(self._events.get())

    def look(self, at_s: float) -> HostSample:
        return host.look(at_s, root=self._guardian.pid, gpus=self._gpus, idle_bytes=self._idle_bytes)

    def check(self, doing: str) -> None:
        """Raise if the command is no longer there."""
        with contextlib.suppress(queue.Empty):
            while self.code is None:
                self._take(self._events.get_nowait())
        if self.code is not None:
            how = f"was killed by {_signal_name(-self.code)}" if self.code < 0 else f"exited with code {self.code}"
            raise EngineError(f"{self._name} {how} while {doing}{self.log_hint()}")

    def log_end(self) -> str:
        with contextlib.suppress(OSError), self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
        return ""

    def log_hint(self) -> str:
        lines = [line.rstrip()[:300] for line in self.log_end().splitlines() if line.strip()][-_LAST_LINES:]
        said = "; the end of its log:\n    " + "\n    ".join(lines) + "\n  " if lines else "; it said nothing; "
        return f"{said}full log: {str(self._log)!r}"

    def end(self) -> None:
        assert self._guardian.stdin is not None
        with contextlib.suppress(OSError):
            self._guardian.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(timeout=self._limits.end_s + 30.0)
        self._guardian.kill()
        self._guardian.wait()
        if self._guardian.stdout is not None:
            self._guardian.stdout.close()

    def _listen(self) -> None:
        assert self._guardian.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # closed while we read
            for line in self._guardian.stdout:
                self._events.put(json.loads(line))
        self._events.put(None)

    def _take(self, event: Mapping[str, Any] | None) -> None:
        if event is None:
            raise EngineError(f"{self._name}: the guardian of its processes is gone{self.log_hint()}")
        if event["event"] == "failed":
            raise EngineError(f"{self._name} cannot be started: {event['message']}; check its command")
        if event["event"] == "exited":
            self.code = event["code"]


@contextlib.contextmanager
def _process(command: ServerCommand, port: int, log: Path, limits: ServerLimits) -> Iterator[_Process]:
    process = _Process(command, port, log, limits)
    try:
        process.begin()
        yield process
    finally:
        process.end()


def _await_answer(client: _Http, *, label: str, model: str | None, within_s: float, process: _Process | None) -> str:
    """Wait until a tiny completion is answered; returns the name of the model that answered it."""
    deadline_s, last = time.monotonic() + within_s, "nothing yet"
    while (left_s := deadline_s - time.monotonic()) > 0.0:
        if process is not None:
            process.check("starting")
        try:
            last = _health(client, min(left_s, 5.0))
            if not last:
                name = model or _first_model(client, min(left_s, 30.0))
                body = {"model": name, "prompt": _PROBE_TOKEN_IDS, "max_tokens": 1, "temperature": 0.0}
                status, said = client.ask("/v1/completions", body=body, timeout_s=left_s)
                if status == 200:
                    return name
                last = f"a completion of model {name!r} with status {status}: {' '.join(said.split())[:200]}"
                if 400 <= status < 500 and status != 429:  # a server that gets ready later says 5xx meanwhile
                    raise EngineError(f"{label} answers {last}{_hint(process)}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            last = str(error) or type(error).__name__
        time.sleep(_POLL_S)
    raise EngineError(f"{label} was not ready after {within_s:g} s (last: {last}){_hint(process)}")


def _health(client: _Http, timeout_s: float) -> str:
    """What is wrong; an empty string for a healthy server. One without /health is asked for its models."""
    for path in ("/health", "/v1/models"):
        status, _ = client.ask(path, timeout_s=timeout_s)
        if status == 200:
            return ""
        if status not in (404, 405, 501):
            break
    return f"{path} with status {status}"


def _first_model(client: _Http, timeout_s: float) -> str:
    status, said = client.ask("/v1/models", timeout_s=timeout_s)
    try:
        return str(json.loads(said)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"/v1/models names no model (status {status}); say which") from error


def _hint(process: _Process | None) -> str:
    return "" if process is None else process.log_hint()


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _without_secrets(argv: Sequence[str]) -> str:
    """The command line as one text; what follows an option such as --api-key is nobody's business."""
    words, hide = [], False
    for word in argv:
        option, equals, _ = word.partition("=")
        secret = bool(_SECRET.search(option)) and option.startswith("-")
        words.append("***" if hide else f"{option}=***" if secret and equals else word)
        hide = secret and not equals
    return " ".join(words)


class _Http:
    """Few small requests; no proxy, no redirect."""

    def __init__(self, root: str, api_key: str | None) -> None:
        self.root = root
        self._parts = urlsplit(root)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def ask(self, path: str, *, body: Any = None, timeout_s: float) -> tuple[int, str]:
        """Status and text. Raises OSError or HTTPException where there is no answer."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=timeout_s)
        with contextlib.closing(connection):
            headers = {**self._headers, "Content-Type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", f"{self._parts.path}{path}", data, headers)
            response = connection.getresponse()
            return response.status, response.read(1 << 20).decode("utf-8", "replace")
