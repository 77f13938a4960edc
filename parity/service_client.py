"""The load client's process: `python -m parity.service_client`, started by `parity.service_load`.

One thread, one session, no limit on connections, no retry, no redirect. Requests are due at absolute moments of one
monotonic clock and are sent then, whatever became of the ones before. While answers come in, only their bytes and the
moments of their arrival are kept; what they say is read when they are complete, a little at a time.

In:  a head (JSON), then a line for each request: [id, at_s, max_tokens, prompt tokens] TAB prompt token ids
Out: {"event": "began", "zero_s"} {"event": "progress", "done", "failed"} {"event": "finished", "lines"} and a LoadRun
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import platform
import resource
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import IO, Any, cast

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from parity import service_jobs as jobs
from parity import timings
from parity.alarm import Alarm
from parity.fingerprint import Scalar
from parity.service_answer import Expected, Reader
from parity.service_jobs import Job
from parity.timings import Failure, LoadRun

_LEAD_S = 0.05  # between "go" and the first request's moment
_HEARTBEAT_S = 0.02
_PORTION = 16  # pieces of an answer, read in a fraction of a millisecond
_KEEP_ALIVE_S = 2.0  # below every server's own limit: one that closes just as we send would look like a failure
_ANSWER_BYTES_LEAST, _ANSWER_BYTES_PER_TOKEN = 1 << 20, 1 << 14

_DIALECTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (
        "counts each chunk",
        {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    ("counts at the end", {"ignore_eos": True, "stream_options": {"include_usage": True}}),
    ("stops where the model does", {"stream_options": {"include_usage": True}}),
)
"""What is asked beside the OpenAI API's core, most first; a server that refuses gets the next."""


class _Body(aiohttp.BytesPayload):
    """A request's body that notes when it is sent; its head is sent with it, in one write."""

    def __init__(self, data: bytes, job: Job) -> None:
        super().__init__(data, content_type="application/json")
        self._job = job

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self._job.sent_s = time.monotonic()
        await super().write_with_length(writer, content_length)


@dataclass(slots=True)
class _Arrivals:
    """The bytes of one answer as they came."""

    pieces: list[bytes] = field(default_factory=list)
    moments: array[float] = field(default_factory=lambda: array("d"))


def main() -> int:
    """Read the plan, drive it, write the run."""
    order, plan = _read_plan(sys.stdin.buffer)
    threading.Thread(target=_end_with_host, name="parity-host", daemon=True).start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))  # a connection for each request
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        run = runner.run(_Driver(order, plan, sys.stdout.buffer).run())
    _say(sys.stdout.buffer, event="finished", lines=1 + len(run.requests))
    for line in timings.to_json_lines(run):
        sys.stdout.buffer.write(line.encode())
    sys.stdout.buffer.flush()
    return 0


def _read_plan(stream: IO[bytes]) -> tuple[dict[str, Any], list[Job]]:
    order: dict[str, Any] = json.loads(stream.readline())
    found = []
    for _ in range(order["warmup"] + order["requests"]):
        head, _, prompt = stream.readline().rstrip(b"\n").partition(b"\t")
        name, at_s, max_tokens, prompt_tokens = json.loads(head)
        found.append(Job(id=name, at_s=at_s, max_tokens=max_tokens, prompt_tokens=prompt_tokens, prompt=prompt))
    return order, found


def _end_with_host() -> None:
    """The host keeps our input open for as long as it lives."""
    while os.read(0, 1):  # not through the buffer, whose lock would be held when we end
        pass
    os._exit(1)


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """That of uvloop where it is installed: measured, the client then needs a third less of its core."""
    with contextlib.suppress(ImportError):
        return cast("Callable[[], asyncio.AbstractEventLoop]", importlib.import_module("uvloop").new_event_loop)
    return None


@contextlib.contextmanager
def _first_in_line() -> Iterator[bool]:
    """Real-time scheduling where we may have it (as root): an engine that keeps all cores busy makes us late otherwise.

    Measured with two of two cores busy: the event loop's lag p99 fell from 3.7 to 0.3 ms; nice -10 left it as it was.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield os.sched_getscheduler(0) == os.SCHED_RR
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class _Driver:
    def __init__(self, order: Mapping[str, Any], plan: Sequence[Job], out: IO[bytes]) -> None:
        self._order = order
        self._warmup, self._measured = plan[: order["warmup"]], plan[order["warmup"] :]
        self._out = out
        self._url = URL(f"{order['url']}/v1/completions")
        self._takes, self._extras = _DIALECTS[0]
        self._body_head = b""
        self._warnings: list[str] = []
        self._loop_lag_s = array("d")
        self._done = self._failed = 0
        self._tasks: asyncio.TaskGroup

    async def run(self) -> LoadRun:
        self._loop_name = type(asyncio.get_running_loop()).__module__.partition(".")[0]
        async with self._session() as session:
            await self._learn_dialect(session)
            await self._warm_up(session)
            gc.collect()
            gc.freeze()  # the plan need not be looked through again by every collection
            with _first_in_line() as self._real_time:
                began_at, cpu_s = datetime.now(timezone.utc), time.process_time()
                zero_s = time.monotonic() + _LEAD_S
                _say(self._out, event="began", zero_s=zero_s)
                watching = [asyncio.create_task(self._tell()), asyncio.create_task(self._feel_the_pulse())]
                if self._order["concurrency"] is None:
                    await self._open_loop(session, zero_s)
                else:
                    await self._closed_loop(session, self._measured, self._order["concurrency"], zero_s)
                for task in watching:
                    task.cancel()
                busy_share = (time.process_time() - cpu_s) / (time.monotonic() - zero_s + _LEAD_S)
        return self._load_run(began_at, zero_s, busy_share)

    def _session(self) -> aiohttp.ClientSession:
        limits = self._order["limits"]
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if self._order["api_key"] is not None:
            headers["Authorization"] = f"Bearer {self._order['api_key']}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(
                total=limits["answer_s"], sock_connect=limits["connect_s"], sock_read=limits["silence_s"]
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
        )

    async def _learn_dialect(self, session: aiohttp.ClientSession) -> None:
        """Ask one tiny question in each dialect until one is not refused; other failures are for the run to count."""
        first = (*self._warmup, *self._measured)[0].prompt.strip(b"[]").split(b",")[0]
        for takes, extras in _DIALECTS:
            self._use(takes, extras)
            # One token fills no block of any prefix cache.
            job = Job(id="dialect", at_s=None, max_tokens=2, prompt_tokens=1, prompt=b"[" + first + b"]")
            async with self._phase():
                await self._ask(session, job, time.monotonic())
            if job.status not in (400, 422):
                break
        else:
            self._use(*_DIALECTS[0])
        if not self._extras.get("ignore_eos"):
            self._warnings.append(
                "the server does not take ignore_eos: answers end where the model ends them, so two engines may do "
                "different amounts of work"
            )

    def _use(self, takes: str, extras: Mapping[str, Any]) -> None:
        self._takes, self._extras = takes, extras
        body = {"model": self._order["model"], "stream": True, "temperature": 0.0, **extras}
        self._body_head = json.dumps(body).encode()[:-1]

    async def _warm_up(self, session: aiohttp.ClientSession) -> None:
        if not self._warmup:
            return
        slots = self._order["concurrency"] or (len(self._warmup) + 1) // 2
        await self._closed_loop(session, self._warmup, slots, time.monotonic())
        failed = [job for job in self._warmup if job.failure is not None]
        if failed:
            self._warnings.append(
                f"{len(failed)} of {len(self._warmup)} warm-up requests failed, first {failed[0].id}: "
                f"{failed[0].failure.value if failed[0].failure else ''} ({failed[0].detail})"
            )
        self._done = self._failed = 0

    async def _open_loop(self, session: aiohttp.ClientSession, zero_s: float) -> None:
        with Alarm() as alarm:
            async with self._phase() as tasks:
                for job in self._measured:
                    due_s = zero_s + (job.at_s or 0.0)
                    await alarm.until(due_s)
                    tasks.create_task(self._ask(session, job, due_s))

    async def _closed_loop(
        self, session: aiohttp.ClientSession, jobs: Sequence[Job], slots: int, zero_s: float
    ) -> None:
        waiting = iter(jobs)

        async def slot() -> None:
            free_s = zero_s
            if (wait_s := free_s - time.monotonic()) > 0.0:
                await asyncio.sleep(wait_s)
            for job in waiting:
                await self._ask(session, job, free_s)
                free_s = job.ended_s

        async with self._phase() as tasks:
            for _ in range(min(slots, len(jobs))):
                tasks.create_task(slot())

    @contextlib.asynccontextmanager
    async def _phase(self) -> AsyncIterator[asyncio.TaskGroup]:
        """Over when every request is answered and every answer is read."""
        async with asyncio.TaskGroup() as self._tasks:
            yield self._tasks

    async def _ask(self, session: aiohttp.ClientSession, job: Job, scheduled_s: float) -> None:
        job.scheduled_s, job.started_s = scheduled_s, time.monotonic()
        arrived = _Arrivals()
        try:
            await self._exchange(session, job, arrived)
        except aiohttp.ClientConnectorError as error:
            job.failure, job.detail = Failure.REFUSED, str(error)
        except TimeoutError as error:
            job.failure, job.detail = Failure.STALLED, str(error) or "the answer took longer than its limit"
        except aiohttp.ClientResponseError as error:
            job.failure, job.detail = Failure.UNREADABLE, f"not HTTP: {error.message}"
        except (aiohttp.ClientError, OSError) as error:
            job.failure, job.detail = Failure.CLOSED, str(error) or type(error).__name__
        job.ended_s = time.monotonic()
        job.prompt = b""
        if arrived.pieces:
            self._tasks.create_task(self._read(job, arrived))  # the slot is free now, not when that is read
            return
        if job.failure is None:
            job.failure, job.detail = Failure.CLOSED, "an empty answer"
        self._count(job)

    async def _read(self, job: Job, arrived: _Arrivals) -> None:
        """What the answer says; in portions, so that what arrives meanwhile gets its moment in time."""
        reader = Reader(
            Expected(
                prompt_tokens=job.prompt_tokens,
                output_tokens=job.max_tokens,
                exactly=bool(self._extras.get("ignore_eos")),
            )
        )
        for number, (piece, moment) in enumerate(zip(arrived.pieces, arrived.moments, strict=True), start=1):
            reader.feed(piece, moment)
            if number % _PORTION == 0:
                await asyncio.sleep(0)
        job.answer = reader.end()
        if job.failure is None:
            job.failure, job.detail = job.answer.failure, job.answer.detail
        self._count(job)

    def _count(self, job: Job) -> None:
        self._done += 1
        self._failed += job.failure is not None

    async def _exchange(self, session: aiohttp.ClientSession, job: Job, arrived: _Arrivals) -> None:
        body = b'%b, "max_tokens": %d, "prompt": %b}' % (self._body_head, job.max_tokens, job.prompt)
        async with session.post(self._url, data=_Body(body, job), allow_redirects=False) as response:
            job.head_s, job.status = time.monotonic(), response.status
            if response.status != 200:
                said = (await response.content.read(2000)).decode("utf-8", "replace")
                job.failure, job.detail = Failure.STATUS, f"{response.status} {' '.join(said.split())[:200]}".strip()
                return
            content, left = response.content, _ANSWER_BYTES_LEAST + _ANSWER_BYTES_PER_TOKEN * job.max_tokens
            while piece := await content.readany():
                arrived.moments.append(time.monotonic())
                arrived.pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    job.failure, job.detail = Failure.UNREADABLE, "far more bytes than the tokens asked for could need"
                    return

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            _say(self._out, event="progress", done=self._done, failed=self._failed)

    async def _feel_the_pulse(self) -> None:
        """How late is the event loop? As late as this are the moments that it gives to what arrives."""
        with Alarm() as alarm:
            while True:
                due_s = time.monotonic() + _HEARTBEAT_S
                await alarm.until(due_s)
                self._loop_lag_s.append(time.monotonic() - due_s)

    def _load_run(self, began_at: datetime, zero_s: float, busy_share: float) -> LoadRun:
        facts: dict[str, Scalar] = {
            "client.version": f"{self._loop_name}, aiohttp {aiohttp.__version__}, Python {platform.python_version()}",
            "client.asks": self._takes,
            "client.real_time": self._real_time,
            "client.cpu_share": round(busy_share, 3),
            "client.peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            "client.zero_monotonic_s": round(zero_s, 6),
            **jobs.lags(self._measured, self._loop_lag_s),
        }
        requests = tuple(jobs.timing(job, zero_s) for job in self._measured)
        return LoadRun(
            profile=self._order["profile"],
            seed=self._order["seed"],
            began_at=began_at.isoformat(timespec="milliseconds"),
            measured_s=max(r.ended_s for r in requests) - min(r.scheduled_s for r in requests),
            requests=requests,
            host=(),
            facts=facts,
            start_up_s=None,
            warnings=(*self._warnings, *jobs.doubts(self._measured, facts)),
        )


def _say(out: IO[bytes], **event: Any) -> None:
    out.write(json.dumps(event).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
