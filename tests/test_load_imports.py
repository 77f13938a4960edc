"""Results of other load generators: what is exact is kept, what is not there stays unknown, and the rest is refused.

The files in data/load_results are of real runs against tests/mock_server.py with a first token after 50 ms, one every
5 ms, two in a chunk, and one or two of eight requests answered with 500; what is not read is cut out of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parity import exports, service_metrics, timings
from parity.errors import RecordingError
from parity.load_imports import read
from parity.timings import Failure
from session_cases import PROFILE

DATA = Path(__file__).parent / "data" / "load_results"
VLLM, GUIDELLM, AIPERF = (DATA / n for n in ("vllm-0.32.0.json", "guidellm-0.8.1.json", "aiperf-0.13.0.jsonl"))
FAILED = {VLLM: 1, GUIDELLM: 2, AIPERF: 2}
ALL = pytest.mark.parametrize("path", [VLLM, GUIDELLM, AIPERF], ids=["vllm", "guidellm", "aiperf"])


def changed(tmp_path: Path, path: Path, change: Callable[[Any], None]) -> Path:
    """The file with every JSON document of it changed."""
    documents = [json.loads(line) for line in path.read_text().splitlines()] if path == AIPERF else [
        json.loads(path.read_text())
    ]  # fmt: skip
    for document in documents:
        change(document)
    edited = tmp_path / path.name
    edited.write_text("\n".join(json.dumps(document) for document in documents))
    return edited


@ALL
def test_a_run_is_recognised_by_its_content_and_its_times_are_those_of_the_server(path: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "result.txt"
    renamed.write_text(path.read_text())
    run = read(renamed)
    assert len(run.requests) == 8
    assert run.requests[0].scheduled_s == 0.0
    assert [r.scheduled_s for r in run.requests] == sorted(r.scheduled_s for r in run.requests)
    found = service_metrics.measure(run)
    assert found["failed_share"] == FAILED[path] / 8
    assert 0.055 < found["ttft_p50_s"] < 0.065  # the first chunk has two tokens, the second 5 ms after the first
    assert 0.0040 < found["tpot_p50_s"] < 0.0045  # 25 ms for six tokens: the last chunk has one
    assert found["output_tokens_per_s"] == pytest.approx((8 - FAILED[path]) * 7 / run.measured_s)
    assert run.measured_s == max(r.ended_s for r in run.requests)


@ALL
def test_failed_requests_are_kept_with_their_kind_and_no_times_of_an_answer(path: Path) -> None:
    failed = [r for r in read(path).requests if r.failure is not None]
    assert [r.failure for r in failed] == [Failure.STATUS] * FAILED[path]
    for request in failed:
        assert request.chunk_s == ()
        assert request.output_tokens is None
        assert "Internal Server Error" in request.detail
    assert {r.status for r in failed} == {None if path == VLLM else 500}  # vLLM's file says the reason alone


@ALL
def test_a_run_can_be_written_and_read_as_any_of_our_own(path: Path) -> None:
    run = read(path)
    assert timings.from_json_lines("".join(timings.to_json_lines(run))) == run
    exports.export({"candidate": [run]}, replace(PROFILE, name=run.profile), target="imported", labels={})


@ALL
def test_what_the_tools_numbers_mean_is_said_in_warnings_and_its_name_in_facts(path: Path) -> None:
    run = read(path)
    tool = {VLLM: "vllm bench serve", GUIDELLM: "guidellm", AIPERF: "aiperf"}[path]
    assert run.warnings
    assert all(warning.startswith(f"of {tool}: ") for warning in run.warnings)
    assert str(run.facts["import.tool"]).startswith(tool)
    assert "plan.sha256" not in run.facts  # so that it is never taken for a run of a known plan


def test_every_chunk_of_vllms_and_aiperfs_answers_is_there_and_none_is_made_up() -> None:
    for path in (VLLM, AIPERF):
        for request in read(path).requests:
            assert len(request.chunk_s) in ((0,) if request.failure else (4,))
            assert request.chunk_tokens is None  # neither says how many tokens a chunk carried
        assert "itl_p50_s" not in service_metrics.measure(read(path))


def test_vllms_own_statistics_come_out_of_its_single_requests() -> None:
    data, found = json.loads(VLLM.read_text()), service_metrics.measure(read(VLLM))
    assert found["ttft_mean_s"] * 1e3 == pytest.approx(data["mean_ttft_ms"], rel=1e-6)
    assert found["tpot_p50_s"] * 1e3 == pytest.approx(data["median_tpot_ms"], rel=1e-6)
    assert found["icl_p99_s"] * 1e3 == pytest.approx(data["p99_itl_ms"], rel=1e-6)


def test_guidellms_own_latencies_come_out_of_its_moments() -> None:
    data = json.loads(GUIDELLM.read_text())["benchmarks"][0]["requests"]["successful"]
    run = read(GUIDELLM)
    for theirs in data:
        ours = next(r for r in run.requests if r.id == theirs["request_id"])
        assert ours.sent_s is not None
        assert (ours.chunk_s[0] - ours.sent_s) * 1e3 == pytest.approx(theirs["time_to_first_token_ms"], abs=1e-3)
        assert ours.sent_s - ours.scheduled_s == pytest.approx(theirs["request_dispatch_delay"], abs=1e-6)
        assert ours.ended_s - ours.sent_s == pytest.approx(theirs["request_latency"], abs=1e-6)


def test_guidellm_keeps_two_moments_of_an_answer_so_that_gaps_between_chunks_are_no_metric_of_it() -> None:
    found = service_metrics.measure(read(GUIDELLM), PROFILE.slo)
    assert not [name for name in found if name.startswith(("itl_", "icl_"))]
    assert {"ttft_p95_s", "tpot_p95_s", "e2e_p95_s"} <= set(found)


def test_aiperfs_own_latencies_come_out_of_its_moments() -> None:
    rows = [json.loads(line) for line in AIPERF.read_text().splitlines()]
    run = read(AIPERF)
    for row in rows:
        ours = next(r for r in run.requests if r.id == row["metadata"]["x_request_id"])
        if row["metrics"]:
            assert ours.sent_s is not None
            assert (ours.chunk_s[-1] - ours.sent_s) * 1e3 == pytest.approx(
                row["metrics"]["request_latency"]["value"], abs=1e-6
            )
    assert run.began_at.startswith("2026-11-24T17:25:19")


def test_the_wait_for_vllms_concurrency_limit_lies_between_schedule_and_sending(tmp_path: Path) -> None:
    def wait(data: dict[str, Any]) -> None:
        data["queue_times"] = [0.25] * 8

    run = read(changed(tmp_path, VLLM, wait))
    for request in run.requests:
        assert request.sent_s is not None
        assert request.sent_s - request.scheduled_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ("aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host", Failure.REFUSED),
        ("Traceback ...\nasyncio.exceptions.TimeoutError", Failure.STALLED),
        ("Traceback ...\naiohttp.client_exceptions.ServerDisconnectedError: Server disconnected", Failure.CLOSED),
        ("Traceback ...\njson.decoder.JSONDecodeError: Expecting value", Failure.UNREADABLE),
        ("Never received a valid chunk to calculate TTFT.", Failure.UNREADABLE),
        ("Too Many Requests", Failure.STATUS),
    ],
)
def test_the_kind_of_a_failure_is_read_from_the_tools_own_text(tmp_path: Path, error: str, failure: Failure) -> None:
    def fail(data: dict[str, Any]) -> None:
        data["errors"] = [error] * 8

    assert {r.failure for r in read(changed(tmp_path, VLLM, fail)).requests} == {failure}


def test_an_answer_of_vllm_without_an_error_or_a_latency_has_failed(tmp_path: Path) -> None:
    def fail(data: dict[str, Any]) -> None:
        data["errors"], data["latencies"] = [""] * 8, [0.0] * 8

    assert all(r.failure is Failure.STATUS for r in read(changed(tmp_path, VLLM, fail)).requests)


def test_warm_up_and_cancelled_requests_of_aiperf_are_no_answers(tmp_path: Path) -> None:
    def warm(row: dict[str, Any]) -> None:
        row["metadata"]["benchmark_phase"] = "warmup" if row["metadata"]["session_num"] < 2 else "profiling"
        row["metadata"]["was_cancelled"] = row["metadata"]["session_num"] == 2

    run = read(changed(tmp_path, AIPERF, warm))
    assert len(run.requests) == 6
    assert sum(r.detail == "Cancelled cancelled by the client" for r in run.requests) == 1


def test_token_counts_of_aiperfs_own_tokenizer_are_left_out_and_a_warning_says_so(tmp_path: Path) -> None:
    def uncounted(row: dict[str, Any]) -> None:
        row["metrics"].pop("usage_completion_tokens", None)

    run = read(changed(tmp_path, AIPERF, uncounted))
    assert all(r.output_tokens is None for r in run.requests)
    assert "tpot_p50_s" not in service_metrics.measure(run)
    assert any("--use-server-token-count" in warning for warning in run.warnings)


def test_answers_that_were_not_streamed_have_no_latencies(tmp_path: Path) -> None:
    def at_once(row: dict[str, Any]) -> None:
        row["metrics"].pop("time_to_first_token", None)

    run = read(changed(tmp_path, AIPERF, at_once))
    assert "ttft_p50_s" not in service_metrics.measure(run)
    assert any("--streaming" in warning for warning in run.warnings)


def test_what_is_there_is_no_result_of_a_known_tool_is_one_sentence(tmp_path: Path) -> None:
    def short(data: dict[str, Any]) -> None:
        for name in ("ttfts", "itls", "start_times", "errors"):
            del data[name]

    def sweep(data: dict[str, Any]) -> None:
        data["benchmarks"] *= 3

    def broken(data: dict[str, Any]) -> None:
        data["itls"] = data["itls"][:3]

    def warm(row: dict[str, Any]) -> None:
        row["metadata"]["benchmark_phase"] = "warmup"

    refused = {
        "--save-detailed": changed(tmp_path, VLLM, short),
        "3 benchmarks": changed(tmp_path, GUIDELLM, sweep),
        "all are warm-up": changed(tmp_path, AIPERF, warm),
    }
    for said, path in refused.items():
        with pytest.raises(RecordingError, match=said):
            read(path)
    with pytest.raises(RecordingError, match="not as its tool writes it"):
        read(changed(tmp_path, VLLM, broken))
    for said, text in {
        "no result of a known load generator": '{"a": 1}',
        "no JSON object": "[1, 2]",
        "not JSON, or was cut short": VLLM.read_text()[:200],
        "holds 2 runs": f"{VLLM.read_text()}\n{VLLM.read_text()}",
    }.items():
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(RecordingError, match=said):
            read(tmp_path / "x.json")
    with pytest.raises(RecordingError, match="cannot be read"):
        read(tmp_path / "missing.json")
