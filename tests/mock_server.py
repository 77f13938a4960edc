"""A server of OpenAI-compatible completions with known timings and planted faults: `mock_server.py PORT KNOBS`.

It writes down when it received each request and sent each chunk, on the clock that the client reads, so that a client's
numbers have a truth to be held against. Token i of an answer is due at `ttft_s + i * tpot_s` after the request; a chunk
leaves with its last token.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiohttp import web


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """fault: what goes wrong, from completion number `after` on. truth: file for the moments, a line an answer.

    faults: the same for single requests, by the first token id of their prompt (as text, for JSON).
    refuses: parameters that are answered with 400. counts: whether usage is given: "chunk", "end" or "never".
    key: without this bearer token it answers 401. health: whether there is /health. children: processes that it starts
    in sessions of their own and forgets. deaf: whether it ignores SIGTERM.

    A request whose model is a JSON object turns knobs for itself.
    """

    port: int
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    chunk_tokens: int = 1
    fault: str = ""
    after: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    truth: str = ""
    refuses: tuple[str, ...] = ()
    counts: str = "chunk"
    ignores_eos: bool = True
    model: str = "mock"
    key: str = ""
    health: bool = True
    children: int = 0
    deaf: bool = False


def command(**knobs: Any) -> list[str]:
    """How to start it; `port` is the placeholder "{port}" where it is not given."""
    port = knobs.pop("port", "{port}")
    Knobs(port=0, **knobs)  # a wrong one is found here
    return [sys.executable, str(Path(__file__).resolve()), str(port), json.dumps(knobs)]


@contextlib.contextmanager
def serving(*, on: str = "", **knobs: Any) -> Iterator[str]:
    """A server on a free port; yields its url. on: the cores it may use, as taskset names them."""
    pinned = ["taskset", "-c", on] if on else []
    with subprocess.Popen([*pinned, *command(port=0, **knobs)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@dataclass
class Mock:
    knobs: Knobs
    asked: int = 0
    log: Any = None
    runner: Any = None

    async def health(self, _: web.Request) -> web.Response:
        if not self.knobs.health:
            return web.Response(status=404)
        return web.Response(status=503 if self.knobs.fault == "never ready" else 200)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.knobs.model, "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        received_s = time.monotonic()
        self.asked += 1
        if self.knobs.key and request.headers.get("Authorization") != f"Bearer {self.knobs.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        knobs = replace(self.knobs, **json.loads(asked["model"])) if asked["model"].startswith("{") else self.knobs
        fault = knobs.faults.get(str(asked["prompt"][0]), "") if asked["max_tokens"] > 2 else ""
        if not fault and self.asked > knobs.after:
            fault = knobs.fault
        options = asked.get("stream_options") or {}
        for name in knobs.refuses:
            if name in asked or name in options:
                return web.json_response({"error": {"message": f"unknown parameter {name}"}}, status=400)
        if fault in ("429", "500"):
            return web.json_response({"error": {"message": "too busy\nto answer"}}, status=int(fault))
        if fault == "redirect":
            return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/v1/completions"})
        if fault == "html":
            return web.Response(text="<html>a proxy's page</html>", content_type="text/html")
        if fault == "dies":
            os.write(2, b"RuntimeError: out of memory (planted)\n")
            os._exit(3)
        if fault == "refuses":
            await self.runner.sites.copy().pop().stop()
            request.transport.close() if request.transport else None
            return web.Response()
        if fault == "silent":
            await asyncio.sleep(3600)
        if not asked.get("stream"):
            body = {"choices": [{"index": 0, "text": " a", "finish_reason": "length"}], "usage": {"total_tokens": 1}}
            return web.json_response(body)
        return await self.stream(request, asked, received_s, knobs, fault)

    async def stream(
        self, request: web.Request, asked: dict[str, Any], received_s: float, knobs: Knobs, fault: str
    ) -> web.StreamResponse:
        wanted = asked["max_tokens"]
        prompt = asked["prompt"]
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        if not (knobs.ignores_eos and asked.get("ignore_eos")):
            wanted = max(1, wanted // 2)
        tokens = max(1, wanted // 2) if fault == "few" else wanted + 3 if fault == "many" else wanted
        prompt_said = prompt_tokens - 1 if fault == "prompt" else prompt_tokens
        per_chunk = knobs.counts == "chunk" and (asked.get("stream_options") or {}).get("continuous_usage_stats")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        assert transport is not None
        sent: list[float] = []
        done = 0
        while done < tokens:
            step = min(knobs.chunk_tokens, tokens - done)
            if fault and done >= tokens // 2:
                await self.break_off(request, response, fault)
            done += step
            # Tiny questions are how a client gets to know a server, and are answered at once.
            due_s = received_s + (knobs.ttft_s + (done - 1) * knobs.tpot_s if asked["max_tokens"] > 2 else 0.0)
            if (wait_s := due_s - time.monotonic()) > 0.0:
                await asyncio.sleep(wait_s)
            reason = '"length"' if done == asked["max_tokens"] else '"stop"' if done >= tokens else "null"
            usage = f',"usage":{_usage(prompt_said, done)}' if per_chunk else ""
            chunk = (
                '{"id":"cmpl-1","object":"text_completion","created":1,"model":"mock","choices":[{"index":0,"text":"'
                f'{" a" * step}","logprobs":null,"finish_reason":{reason},"stop_reason":null}}]{usage}}}'
            )
            event = f"data: {chunk}\n\n".encode()
            sent.append(time.monotonic())
            transport.write(b"%x\r\n%b\r\n" % (len(event), event))  # as `response.write` does, without its bookkeeping
        if knobs.counts != "never":
            usage = _usage(prompt_said, done)
            end = f'{{"id":"cmpl-1","object":"text_completion","model":"mock","choices":[],"usage":{usage}}}'
            await response.write(f"data: {end}\n\ndata: [DONE]\n\n".encode())
        else:
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        if self.log is not None:
            first = prompt[0] if isinstance(prompt, list) else None
            self.log.write(json.dumps([first, received_s, sent]) + "\n")
        return response

    async def break_off(self, request: web.Request, response: web.StreamResponse, fault: str) -> None:
        assert request.transport is not None
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "drip":
            while True:
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.05)
        if fault == "garbage":
            await response.write(b"data: {not json}\n\n")
        if fault == "error":
            await response.write(b'data: {"error": {"message": "the engine died", "code": 500}}\n\ndata: [DONE]\n\n')
        if fault == "close":
            request.transport.close()
            raise ConnectionResetError
        if fault == "reset":
            request.transport.abort()
            raise ConnectionResetError


def _usage(prompt: int, output: int) -> str:
    return f'{{"prompt_tokens":{prompt},"completion_tokens":{output},"total_tokens":{prompt + output}}}'


async def serve(knobs: Knobs) -> None:
    mock = Mock(knobs=knobs)
    if knobs.truth:
        mock.log = Path(knobs.truth).open("a", buffering=1 << 16)  # noqa: SIM115  as long as the process
    logging.disable()  # of clients that go away in the middle
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/health", mock.health)
    app.router.add_get("/v1/models", mock.models)
    app.router.add_post("/v1/completions", mock.completions)
    mock.runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await mock.runner.setup()
    await web.TCPSite(mock.runner, "127.0.0.1", knobs.port, backlog=4096).start()
    if not knobs.port:
        sys.stdout.write(f"{mock.runner.addresses[0][1]}\n")
        sys.stdout.flush()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, (lambda: None) if knobs.deaf else stop.set)
    gc.collect()
    gc.freeze()
    await stop.wait()
    if mock.log is not None:
        mock.log.close()
    await mock.runner.cleanup()


def flood() -> None:
    line = "INFO the same line again, about as long as lines of a log are\n" * 100
    while True:
        sys.stdout.write(line)


def main() -> None:
    knobs = Knobs(port=int(sys.argv[1]), **json.loads(sys.argv[2]))
    for _ in range(knobs.children):
        if os.fork() == 0:  # a child in a session of its own, as some launchers make
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(3600)
    if knobs.fault == "exits":
        os.write(2, b"loading weights\nValueError: no such model (planted)\n")
        sys.exit(2)
    if knobs.fault == "floods":
        threading.Thread(target=flood, daemon=True).start()
    asyncio.run(serve(knobs))


if __name__ == "__main__":
    main()
