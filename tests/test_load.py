"""The load client: when it sends, what it times, what it counts, and what becomes of every kind of bad answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_server import serving
from parity import service_load, timings
from parity.alarm import Alarm
from parity.errors import ConfigError, EngineError
from parity.service_answer import Answer, Expected, Reader
from parity.service_load import Limits, drive
from parity.timings import Failure, HostSample, LoadRun
from parity.traffic import Arrivals, ClosedLoop, Fixed, Lengths, Offline, OpenLoop, Plan, Profile, Slo, plan

QUICK = Limits(connect_s=2.0, silence_s=0.4, answer_s=0.8)
LOOSE_S = 0.25  # what a busy machine may add to a moment


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    truth = tmp_path_factory.mktemp("mock") / "truth.jsonl"
    with serving(ttft_s=0.02, tpot_s=0.002, truth=str(truth)) as url:
        yield url, truth


@pytest.fixture(scope="module")
def url(mock: tuple[str, Path]) -> str:
    return mock[0]


def fixed(tokens: int) -> Lengths:
    return Lengths(shape=Fixed(tokens=tokens), least=1, most=tokens)


def planned(arrivals: Arrivals, requests: int, *, output: int = 8, warmup: int = 0) -> Plan:
    profile = Profile(
        name="test",
        description="",
        arrivals=arrivals,
        prompt_tokens=fixed(10),
        output_tokens=fixed(output),
        requests=requests,
        warmup=warmup,
        slo=Slo(),
        gated=(),
    )
    return plan(profile, seed=3, vocabulary=range(100, 9000), max_positions=4096)


def turned(**knobs: Any) -> str:
    """A model name that turns the mock server's knobs."""
    return json.dumps(knobs)


def failures(run: LoadRun) -> list[Failure | None]:
    return [request.failure for request in run.requests]


def warned(run: LoadRun, words: str) -> list[str]:
    return [warning for warning in run.warnings if re.search(words, warning)]


# When requests are sent -----------------------------------------------------------------------------------------------


def test_every_request_of_an_open_loop_is_timed_from_its_schedule_to_its_end(url: str) -> None:
    asked = planned(OpenLoop(rate_per_s=60.0), 30, warmup=4)
    run = drive(asked, url=f"{url}/v1/", model="mock")
    assert [request.id for request in run.requests] == [request.id for request in asked.requests]
    assert failures(run) == [None] * 30
    for want, got in zip(asked.requests, run.requests, strict=True):
        assert got.scheduled_s == pytest.approx(want.at_s, abs=1e-5)
        moments = [got.scheduled_s, got.sent_s, got.first_byte_s, *got.chunk_s, got.ended_s]
        assert moments == sorted(moments)  # type: ignore[type-var]
        assert got.chunk_tokens == (1,) * 8
        assert (got.prompt_tokens, got.output_tokens, got.status, got.detail) == (10, 8, 200, "")
    assert run.measured_s == pytest.approx(max(r.ended_s for r in run.requests) - run.requests[0].scheduled_s, abs=1e-5)
    assert (run.profile, run.seed, run.facts["plan.sha256"]) == ("test", 3, asked.sha256())
    assert isinstance(run.facts["client.real_time"], bool)
    assert timings.from_json_lines("".join(timings.to_json_lines(run))) == run


def test_times_agree_with_what_the_server_wrote_down_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    truth = tmp_path / "truth.jsonl"
    asked = planned(OpenLoop(rate_per_s=60.0), 16, warmup=3)
    bad = {str(r.prompt_token_ids[0]): "few" for r in asked.requests[::4]}
    with serving(ttft_s=0.02, tpot_s=0.005, chunk_tokens=3, truth=str(truth), faults=bad, key="s3cret") as own:
        run = drive(asked, url=own, model="mock", api_key="s3cret")
    assert failures(run) == [Failure.WRONG_COUNT, None, None, None] * 4
    assert "s3cret" not in "".join(timings.to_json_lines(run))
    rows = [json.loads(line) for line in truth.read_text().splitlines()]
    # One more: the tiny question by which the client learns what the server takes.
    first = [r.prompt_token_ids[0] for r in (asked.warmup[0], *asked.warmup, *asked.requests)]
    assert sorted(row[0] for row in rows) == sorted(first)
    found, zero_s = {row[0]: row[1:] for row in rows}, run.facts["client.zero_monotonic_s"]
    assert isinstance(zero_s, float)
    for want, got in zip(asked.requests, run.requests, strict=True):
        received_s, sent_s = found[want.prompt_token_ids[0]]
        assert got.chunk_tokens == ((3, 1) if got.failure else (3, 3, 2))
        assert got.sent_s is not None
        assert -1e-3 <= received_s - zero_s - got.sent_s <= LOOSE_S
        for ours, theirs in zip(got.chunk_s, sent_s, strict=True):
            assert -1e-3 <= ours - (theirs - zero_s) <= LOOSE_S


def test_an_open_loop_never_waits_for_an_answer(url: str) -> None:
    run = drive(planned(OpenLoop(rate_per_s=200.0), 40, output=3), url=url, model=turned(ttft_s=0.9))
    late_s = [request.sent_s - request.scheduled_s for request in run.requests if request.sent_s is not None]
    assert len(late_s) == 40
    assert max(late_s) < 0.6
    first_chunk_s = min(request.chunk_s[0] for request in run.requests)
    assert sum(request.sent_s < first_chunk_s for request in run.requests if request.sent_s is not None) >= 35


def test_a_closed_loop_keeps_its_slots_busy_and_never_more(url: str) -> None:
    run = drive(planned(ClosedLoop(concurrency=3), 12, warmup=6), url=url, model="mock")
    assert failures(run) == [None] * 12
    ends = sorted(request.ended_s for request in run.requests)
    for request in run.requests:
        assert request.sent_s is not None
        busy = sum(r.sent_s <= request.sent_s < r.ended_s for r in run.requests if r.sent_s is not None)
        assert busy <= 3
        # A slot is free when its last answer ended.
        assert request.scheduled_s == 0.0 or request.scheduled_s in ends
    assert sum(request.scheduled_s == 0.0 for request in run.requests) == 3


def test_a_batch_is_sent_at_once_and_its_client_is_not_called_late(url: str) -> None:
    run = drive(planned(Offline(), 60, output=2), url=url, model="mock")
    assert {request.scheduled_s for request in run.requests} == {0.0}
    assert failures(run) == [None] * 60
    assert not warned(run, "was sent more than")


def test_a_client_that_cannot_keep_up_says_so(url: str) -> None:
    run = drive(planned(OpenLoop(rate_per_s=20_000.0), 200, output=1), url=url, model="mock")
    assert failures(run) == [None] * 200
    assert warned(run, r"the client itself was the limit: one request in a hundred was sent more than \d+\.\d ms after")


# What comes back ------------------------------------------------------------------------------------------------------


EXPECTED = {
    "": (None, ""),
    "429": (Failure.STATUS, r"429 .*too busy"),
    "500": (Failure.STATUS, r"500 .*too busy"),
    "redirect": (Failure.STATUS, "307"),
    "silent": (Failure.STALLED, "Timeout on reading"),
    "stall": (Failure.STALLED, "Timeout on reading"),
    "drip": (Failure.STALLED, "took longer than its limit"),
    "close": (Failure.CLOSED, "not completed"),
    "reset": (Failure.CLOSED, "."),
    "error": (Failure.CLOSED, "the server said: the engine died"),
    "few": (Failure.WRONG_COUNT, r"the server counts 4 output tokens, and 8 were asked for \(stop\)"),
    "many": (Failure.WRONG_COUNT, "the server counts 11 output tokens, and 8 were asked for"),
    "prompt": (Failure.WRONG_COUNT, "the server counts 9 prompt tokens of the 10 that were sent"),
    "garbage": (Failure.UNREADABLE, "JSON"),
    "html": (Failure.UNREADABLE, "cut within a line: .<html>"),
}


def test_each_fault_is_counted_as_what_it_is_and_nothing_hangs(mock: tuple[str, Path]) -> None:
    asked = planned(OpenLoop(rate_per_s=200.0), len(EXPECTED))
    faults = {str(r.prompt_token_ids[0]): f for r, f in zip(asked.requests, EXPECTED, strict=True)}
    began = time.monotonic()
    run = drive(asked, url=mock[0], model=turned(faults=faults), limits=QUICK)
    assert time.monotonic() - began < 8.0
    for request, (failure, detail) in zip(run.requests, EXPECTED.values(), strict=True):
        assert (request.failure, bool(re.search(detail, request.detail))) == (failure, True), request
        assert "\n" not in request.detail
    halves = [request for request in run.requests if request.failure in (Failure.STALLED, Failure.CLOSED)]
    assert sum(len(request.chunk_s) == 4 for request in halves) >= 4  # what had come is kept
    assert warned(
        run, rf"{len(EXPECTED) - 1} of {len(EXPECTED)} requests failed \(4 unexpected|3 no byte|; first r000001"
    )


def test_a_server_that_is_not_there_is_a_run_in_which_all_failed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        run = drive(
            planned(OpenLoop(rate_per_s=500.0), 20, warmup=2), url=f"127.0.0.1:{free.getsockname()[1]}", model="m"
        )
    assert failures(run) == [Failure.REFUSED] * 20
    assert all(request.sent_s is None and request.status is None for request in run.requests)
    assert warned(run, "2 of 2 warm-up requests failed, first w000000: connection refused")
    assert warned(run, "20 of 20 requests failed")


def test_a_server_that_dies_or_closes_its_door_under_load_leaves_what_it_answered(tmp_path: Path) -> None:
    for fault in ("dies", "refuses"):
        with serving(fault=fault, after=8, ttft_s=0.01) as own:
            run = drive(planned(OpenLoop(rate_per_s=100.0), 30), url=own, model="mock", limits=QUICK)
        found = failures(run)
        assert found[:5] == [None] * 5
        assert set(found[12:]) == {Failure.REFUSED}
        assert Failure.CLOSED in found


@pytest.mark.parametrize(
    ("knobs", "asks", "chunk_tokens", "output_tokens", "warning"),
    [
        ({"refuses": ["continuous_usage_stats"]}, "counts at the end", None, 8, ""),
        ({"counts": "end"}, "counts each chunk", None, 8, ""),
        ({"counts": "never"}, "counts each chunk", None, None, "did not count the tokens of 6 of 6 answers"),
        ({"refuses": ["ignore_eos"]}, "stops where the model does", None, 4, "does not take ignore_eos"),
    ],
)
def test_a_server_that_takes_or_tells_less_is_asked_and_read_accordingly(
    url: str,
    knobs: dict[str, Any],
    asks: str,
    chunk_tokens: tuple[int, ...] | None,
    output_tokens: int | None,
    warning: str,
) -> None:
    run = drive(planned(ClosedLoop(concurrency=6), 6), url=url, model=turned(**knobs))
    assert failures(run) == [None] * 6
    assert run.facts["client.asks"] == asks
    assert {request.chunk_tokens for request in run.requests} == {chunk_tokens}
    assert {request.output_tokens for request in run.requests} == {output_tokens}
    assert {len(request.chunk_s) for request in run.requests} == {output_tokens or 8}
    assert bool(warned(run, warning)) if warning else not warned(run, "did not count|ignore_eos")


def test_a_server_that_swallows_ignore_eos_gives_wrong_counts(url: str) -> None:
    run = drive(planned(ClosedLoop(concurrency=2), 4), url=url, model=turned(ignores_eos=False))
    assert failures(run) == [Failure.WRONG_COUNT] * 4


def test_a_key_that_is_missing_is_a_status() -> None:
    with serving(key="s3cret") as own:
        run = drive(planned(ClosedLoop(concurrency=1), 1), url=own, model="mock")
    assert failures(run) == [Failure.STATUS]


# Who watches, and how it ends -----------------------------------------------------------------------------------------


def looked(at_s: float) -> HostSample:
    none: dict[str, Any] = dict.fromkeys(("gpu_utilisation", "gpu_power_watts", "gpu_sm_clock_mhz", "gpu_throttled"))
    return HostSample(at_s=at_s, engine_bytes=1, load_average=None, **none)


def clients() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            line = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if b"parity.service_client" in line and parent in (os.getpid(), 1):
                found.append(int(entry.name))
    return found


class Watcher:
    def __init__(self) -> None:
        self.said: list[tuple[str, int, int, str]] = []

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        self.said.append((what, done, total, detail))


def test_progress_is_told_and_the_host_is_looked_at_while_it_lasts(url: str) -> None:
    watcher = Watcher()
    run = drive(
        planned(OpenLoop(rate_per_s=20.0), 26, output=1), url=url, model="mock", observer=watcher, sample=looked
    )
    assert watcher.said[-1] == ("profile test", 26, 26, "")
    assert any(0 < done < 26 for _, done, _, _ in watcher.said)
    assert len(run.host) >= 2
    assert [sample.at_s for sample in run.host] == sorted(sample.at_s for sample in run.host)
    assert run.host[-1].at_s <= run.measured_s + 1.0


@pytest.mark.parametrize("what", [EngineError("the server died"), KeyboardInterrupt()])
def test_whatever_ends_the_watch_ends_the_client_at_once(
    url: str, what: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_load, "_SAMPLE_EVERY_S", 0.1)

    def broken(at_s: float) -> HostSample:
        if at_s < 0.15:
            return looked(at_s)
        raise what

    began = time.monotonic()
    with pytest.raises(type(what)):
        drive(planned(OpenLoop(rate_per_s=5.0), 500), url=url, model="mock", sample=broken)
    assert time.monotonic() - began < 6.0
    assert clients() == []


def test_a_client_whose_host_is_killed_ends_by_itself(url: str, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_load as t\n"
        "t.drive(t.planned(t.OpenLoop(rate_per_s=5.0), 500), url=sys.argv[2], model='mock',"
        " sample=lambda at_s: print('running', flush=True) or t.looked(at_s))"
    )
    here = str(Path(__file__).parent)
    with subprocess.Popen([sys.executable, "-c", script, here, url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while clients() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert clients() == []


def test_a_client_that_cannot_run_is_an_error_that_says_why(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError(\"No module named 'aiohttp'\", name='aiohttp')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"pip install 'engine-parity\[performance\]'"):
        drive(planned(ClosedLoop(concurrency=1), 1), url=url, model="mock")
    (tmp_path / "aiohttp.py").write_text("raise ValueError('broken')")
    with pytest.raises(EngineError, match="the load client failed: ValueError: broken"):
        drive(planned(ClosedLoop(concurrency=1), 1), url=url, model="mock")


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1"])
def test_a_url_is_taken_with_and_without_its_version(given: str) -> None:
    assert service_load.base_url(given) == "http://h:1"


@pytest.mark.parametrize("given", ["", "ftp://h:1", "http://", "http://h:port", "http://h:99999"])
def test_what_is_no_url_is_refused_before_anything_starts(given: str) -> None:
    with pytest.raises(ConfigError, match="is no url of a server; write it as 'http://host:port'"):
        drive(planned(ClosedLoop(concurrency=1), 1), url=given, model="m")


def test_an_alarm_rings_when_it_should_and_never_early() -> None:
    async def late_s(after_s: float) -> float:
        with Alarm() as alarm:
            await alarm.until(time.monotonic() - 1.0)
            due_s = time.monotonic() + after_s
            await alarm.until(due_s)
            return time.monotonic() - due_s

    for after_s in (0.0, 0.0004, 0.003, 0.03):
        assert -1e-6 < asyncio.run(late_s(after_s)) < LOOSE_S


# Reading one answer ---------------------------------------------------------------------------------------------------


def event(text: str = " a", *, usage: tuple[int, int] | None = None, finish: str | None = None) -> bytes:
    data: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    if usage is not None:
        data["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def total(prompt: int, output: int) -> bytes:
    data = {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
WANTED = Expected(prompt_tokens=7, output_tokens=4, exactly=True)


def answered(*pieces: bytes, expected: Expected = WANTED) -> Answer:
    reader = Reader(expected)
    for moment, piece in enumerate(pieces):
        reader.feed(piece, float(moment))
    return reader.end()


def said(answer: Answer) -> tuple[list[float], list[int] | None, int | None, Failure | None]:
    counted = None if answer.chunk_tokens is None else list(answer.chunk_tokens)
    return list(answer.chunk_s), counted, answer.output_tokens, answer.failure


def test_running_counts_say_how_many_tokens_a_chunk_brings() -> None:
    pieces = (event(usage=(7, 1)), event("", usage=(7, 3)), event(usage=(7, 4), finish="length"), total(7, 4) + DONE)
    assert said(answered(*pieces)) == ([0.0, 1.0, 2.0], [1, 2, 1], 4, None)


def test_a_running_count_that_stands_still_brings_no_token() -> None:
    pieces = (event("", usage=(7, 0)), event(usage=(7, 4)), event("!", usage=(7, 4), finish="length"), DONE)
    assert said(answered(*pieces)) == ([1.0], [4], 4, None)


def test_without_counts_each_chunk_counts_but_an_empty_last_one() -> None:
    pieces = (event(), event(""), event(" bc"), event("", finish="length"), total(7, 4), DONE)
    assert said(answered(*pieces)) == ([0.0, 1.0, 2.0], None, 4, None)
    # A last chunk with text and the only count: what it says is of all of them.
    assert said(answered(event(), event(), event(usage=(7, 4), finish="length"), DONE)) == (
        [0.0, 1.0, 2.0],
        None,
        4,
        None,
    )


def test_chunks_that_arrive_together_have_one_moment() -> None:
    assert said(answered(event(usage=(7, 1)) + event(usage=(7, 4), finish="length"), DONE)) == (
        [0.0, 0.0],
        [1, 3],
        4,
        None,
    )


@pytest.mark.parametrize(
    ("pieces", "failure"),
    [
        ((event(usage=(7, 4), finish="length"),), None),  # no [DONE], but a reason
        ((event(usage=(7, 4)), DONE), None),
        ((event(usage=(7, 4)),), Failure.CLOSED),
        ((event(usage=(7, 3), finish="length"), DONE), Failure.WRONG_COUNT),
        ((event(usage=(6, 4), finish="length"), DONE), Failure.WRONG_COUNT),
        ((event(usage=(7, 2)), event(usage=(7, 3), finish="length"), total(7, 4), DONE), Failure.WRONG_COUNT),
        ((event(), event(), event(), event(), event(finish="length"), total(7, 4), DONE), Failure.WRONG_COUNT),
        ((total(7, 4), DONE), Failure.WRONG_COUNT),
        ((DONE,), Failure.WRONG_COUNT),
        ((event(), event(), event(), event(), event(), DONE), Failure.WRONG_COUNT),
        ((b'data: {"error": "overloaded"}\n\n', DONE), Failure.CLOSED),
        ((b'data: {"object": "error", "message": "no"}\n\n', DONE), Failure.CLOSED),
        ((b"data: {\n\n",), Failure.UNREADABLE),
        ((b"data: 5\n\n",), Failure.UNREADABLE),
        ((b'data: {"choices": [5]}\n\n',), Failure.UNREADABLE),
        (
            (b'data: {"usage": {"prompt_tokens": 7, "completion_tokens": "4"}, "choices": []}\n\n' + DONE,),
            Failure.UNREADABLE,
        ),
        ((b"<html>\n",), Failure.UNREADABLE),
        ((b"data: \xff\n\n",), Failure.UNREADABLE),
    ],
)
def test_an_answer_is_complete_or_says_what_it_lacks(pieces: tuple[bytes, ...], failure: Failure | None) -> None:
    answer = answered(*pieces)
    assert answer.failure == failure
    assert bool(answer.detail) == (failure is not None)


def test_an_early_end_is_complete_only_where_the_model_may_end() -> None:
    pieces = (event(usage=(7, 2), finish="stop"), DONE)
    assert answered(*pieces).failure is Failure.WRONG_COUNT
    may_end = Expected(prompt_tokens=7, output_tokens=4, exactly=False)
    assert answered(*pieces, expected=may_end).failure is None
    assert answered(event(usage=(7, 2), finish="length"), DONE, expected=may_end).failure is Failure.WRONG_COUNT


@given(cuts=st.lists(st.integers(0, 700), max_size=30), crlf=st.booleans())
def test_where_the_network_cuts_a_stream_changes_no_count(cuts: list[int], crlf: bool) -> None:
    whole = b": hello\n\nevent: x\n" + b"".join(
        event(usage=(7, n), finish="length" if n == 4 else None) for n in range(1, 5)
    )
    whole += total(7, 4) + DONE
    whole = whole.replace(b"\n", b"\r\n") if crlf else whole
    ends = sorted({min(cut, len(whole)) for cut in cuts} | {len(whole)})
    pieces = [whole[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    answer = answered(*pieces)
    assert (said(answer)[1:], answer.prompt_tokens) == (([1, 1, 1, 1], 4, None), 7)
    assert list(answer.chunk_s) == sorted(answer.chunk_s)
    # An event has the moment of the piece that completed its line.
    closed = [whole.index(b'"completion_tokens": %d' % n) for n in range(1, 5)]
    for moment, place in zip(answer.chunk_s, closed, strict=True):
        assert ends[int(moment)] > place


@given(pieces=st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([event(usage=(7, 1)), DONE, b"data: "]))))
def test_no_bytes_make_reading_fail(pieces: list[bytes]) -> None:
    answer = answered(*pieces)
    assert answer.failure is None or answer.detail


@given(
    value=st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda v: st.lists(v, max_size=3), max_leaves=5)
)
@pytest.mark.parametrize("key", ["choices", "usage", "error", "object"])
def test_no_json_makes_reading_fail(key: str, value: object) -> None:
    line = b"data: " + json.dumps({"choices": [{"text": "a"}], key: value}).encode() + b"\n"
    answer = answered(line, event(usage=(7, 4), finish="length"), DONE)
    assert isinstance(answer.failure, Failure | None)
