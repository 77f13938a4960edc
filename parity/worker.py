"""The only code that meets a live engine: runs inside the engine's interpreter and answers over a pipe.

Speaks JSON Lines on private copies of standard input and output, taken before any engine is imported; afterwards file
descriptor 1 is standard error, so nothing an engine prints can reach the stream. Standard library only: the engines'
pins conflict, the worker must add none. Knows nothing about verdicts. Never pickles.

In:  {"op": "open", "spec", "model"}   {"op": "run", "requests"}   {"op": "close"}
Out: {"event": "hello"} {"event": "opened", "fingerprint"} {"event": "completion", ...} {"event": "progress", "tokens"}
     {"event": "finished", "count"} {"event": "failed", "message"} {"event": "closed"}
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from parity import fingerprint
from parity.engines import Engine, EngineSpec, Progress
from parity.errors import EngineError
from parity.fingerprint import Fingerprint
from parity.prompts import Request, request_from_json
from parity.recording import Completion

PROTOCOL = 1

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def main() -> int:
    """Serve one host until it says close or goes away."""
    commands_in, events_out = _take_streams()
    events = _Events(events_out)
    commands = _read_in_background(commands_in)
    events.send({"event": "hello", "protocol": PROTOCOL, "pid": os.getpid()})
    server = _Server(events)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(server.close)
        while True:
            command = commands.get()
            if command["op"] == "close":
                break
            try:
                server.handle(command)
            except Exception as error:
                traceback.print_exc()
                events.send({"event": "failed", "message": _one_line(error)})
    events.send({"event": "closed"})
    return 0


class _Events:
    """The stream to the host."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def send(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event, separators=(",", ":")) + "\n")
        self._out.flush()


class _Server:
    """One engine, opened once, answering many workloads."""

    def __init__(self, events: _Events) -> None:
        self._events = events
        self._engine: Engine | None = None

    def handle(self, command: dict[str, Any]) -> None:
        if command["op"] == "open":
            self._open(EngineSpec.from_json(command["spec"]), Path(command["model"]))
        elif command["op"] == "run":
            self._run([request_from_json(r) for r in command["requests"]])
        else:
            raise EngineError(f"the worker does not know the operation {command['op']!r}")

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _open(self, spec: EngineSpec, model: Path) -> None:
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(spec.threads)))
        # Waiting threads sleep instead of spinning: on a busy machine spinning was measured 2 to 10 times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.update(spec.env)
        if not model.is_dir():
            raise EngineError(f"the model directory {str(model)!r} does not exist where the engine runs")
        try:
            self._engine = _adapter(spec.engine).open_engine(spec, model)
        except ModuleNotFoundError as error:
            raise EngineError(
                f"engine {spec.engine_label!r} cannot start: the package {error.name!r} is missing from "
                f"{sys.executable}"
            ) from error
        facts = dict(self._engine.facts())
        identity = {
            "dtype": spec.dtype,
            "quantization": spec.quantization,
            **fingerprint.model_identity(model),
        }
        context = {
            **fingerprint.machine(),
            **fingerprint.environment_variables(),
            **{f"option.{name}": json.dumps(value) for name, value in spec.options.items()},
            **facts,
        }
        found = Fingerprint(
            identity=identity, context=context, health=fingerprint.health(), packages=fingerprint.packages()
        )
        self._events.send({"event": "opened", "fingerprint": found.to_json()})

    def _run(self, requests: list[Request]) -> None:
        if self._engine is None:
            raise EngineError("the worker was asked to run before an engine was opened")
        count = 0
        for answer in _answers(self._engine, requests):
            if isinstance(answer, Progress):
                self._events.send({"event": "progress", "tokens": answer.tokens})
            else:
                count += 1
                self._events.send({"event": "completion", "completion": answer.to_json()})
        self._events.send({"event": "finished", "count": count})


def _answers(engine: Engine, requests: list[Request]) -> Iterator[Completion | Progress]:
    """Run the requests, adding to each completion what the engine's own tokenizer makes of its prompt."""
    tokenizable = [r.prompt for r in requests if r.prompt.token_ids is None and r.forced_token_ids is None]
    own = dict(zip([p.id for p in tokenizable], engine.tokenize(tokenizable), strict=True)) if tokenizable else {}
    ready = []
    for request in requests:
        ids = request.prompt_token_ids or request.prompt.token_ids
        if ids is None and request.id not in own:
            raise EngineError(f"prompt {request.id!r} has no token ids to score after; send those of the reference")
        ids = own[request.id].token_ids if ids is None else ids
        ready.append(replace(request, prompt_token_ids=ids))
    for answer in engine.generate(ready):
        if isinstance(answer, Completion):
            added: dict[str, Any] = {}
            if mine := own.get(answer.id):
                added = {"own_prompt_token_ids": mine.token_ids, "prompt_text": mine.text}
            if (decoded := _decoded_otherwise(engine, answer)) is not None:
                added["decoded_text"] = decoded
            yield replace(answer, **added)
        else:
            yield answer


def _decoded_otherwise(engine: Engine, answer: Completion) -> str | None:
    """What the engine's tokenizer makes of the answer's tokens, if that is not its text."""
    if answer.text is None:
        return None
    decoded = engine.detokenize(answer.token_ids)
    if decoded is None or decoded == answer.text:
        return None
    # Some tokenizers drop or add a space at the very beginning; an engine decodes behind its prompt.
    prompt = answer.prompt_token_ids
    before, whole = engine.detokenize(prompt), engine.detokenize(prompt + answer.token_ids)
    behind = before is not None and whole is not None and whole == before + answer.text
    return None if behind else decoded


def _adapter(name: str) -> ModuleType:
    """The adapter module: a file of `parity.engines`, or any Python file by path."""
    if name.endswith(".py"):
        located = importlib.util.spec_from_file_location(f"parity_engine_{Path(name).stem}", name)
        if located is None or located.loader is None or not Path(name).is_file():
            raise EngineError(f"the engine file {name!r} does not exist where the engine runs")
        module = importlib.util.module_from_spec(located)
        sys.modules[located.name] = module  # dataclasses with deferred annotations look their module up
        located.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(f"parity.engines.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"parity.engines.{name}":
            raise EngineError(f"there is no engine adapter {name!r} in parity.engines") from error
        raise


def _take_streams() -> tuple[IO[str], IO[str]]:
    """Move the protocol to private descriptors; leave the engine an empty input and standard error as its output."""
    commands_in = os.fdopen(os.dup(0), "r", encoding="utf-8")
    events_out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return commands_in, events_out


def _read_in_background(commands_in: IO[str]) -> queue.Queue[dict[str, Any]]:
    """Queue the host's commands; when the host is gone, end this process and everything it started."""
    commands: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        closing = False
        for line in commands_in:
            command = json.loads(line)
            closing = command["op"] == "close"
            commands.put(command)
        if not closing:
            _end_process_group()

    threading.Thread(target=read, name="parity-commands", daemon=True).start()
    return commands


def _end_process_group() -> None:
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, EngineError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


if __name__ == "__main__":
    sys.exit(main())
