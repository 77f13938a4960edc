"""Metrics on pytest-benchmark's rails: in its table, its JSON and its comparisons, and out of the way without it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from parity import bench, benchmark_rails, performance_sessions, service_metrics, timings
from parity.errors import EngineError, RecordingError
from parity.timings import LoadRun
from session_cases import FACTS, GPU, PROFILE, starts, write_session, write_suites

pytest.importorskip("pytest_benchmark")

RAILS = benchmark_rails.__name__
SUITE = Path(__file__).parents[1] / "suites" / "test_performance.py"
CONFTEST = """
from pathlib import Path
import pytest
from parity import benchmark_rails as rails

pytest_plugins = [{rails!r}]

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.stash[rails.ASKED] = rails.Asked(
        suites=config.rootpath / "suites", home=config.rootpath / ".parity", targets=(),
        recordings=Path({recordings!r}), inconclusive_fails={strict})
"""
MEASURES = """
from pathlib import Path
import pytest
from parity import benchmark_rails as rails

pytest_plugins = [{rails!r}]

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.stash[rails.ASKED] = rails.Asked(
        suites=Path({suites!r}), home=config.rootpath / ".parity", targets=("cpu-serve",), recordings=None,
        inconclusive_fails=False)
"""
VERDICT = "test_performance.py::test_performance"
CANDIDATE = starts()[::-1]  # as fast as the reference, and no start like its other
ROW = "test_performance.py::test_metric[cpu-toy-candidate-tpot_p50_s]"


@dataclass
class Suite:
    pytester: pytest.Pytester
    directory: Path

    def run(self, *arguments: str) -> pytest.RunResult:
        """In this process; any warning is an error."""
        return self.pytester.runpytest_inprocess("-W", "error", "-p", "no:cacheprovider", *arguments)

    def saved(self) -> dict[str, Any]:
        """What --benchmark-json=out.json wrote."""
        found: dict[str, Any] = json.loads((self.pytester.path / "out.json").read_text())
        return found


def suite_of(
    pytester: pytest.Pytester,
    *,
    reference: Sequence[LoadRun] | None = None,
    candidate: Sequence[LoadRun] | None = None,
    strict: bool = False,
) -> Suite:
    directory = write_session(
        pytester.path / ".parity", reference=reference or starts(), candidate=candidate or CANDIDATE
    )
    write_suites(pytester.path / "suites")
    pytester.makeconftest(CONFTEST.format(rails=RAILS, recordings=str(directory), strict=strict))
    pytester.makepyfile(test_performance=SUITE.read_text("utf-8"))
    return Suite(pytester=pytester, directory=directory)


@pytest.fixture(autouse=True)
def _not_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark switches itself off in a worker of pytest-xdist, which may run these tests."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    return suite_of(pytester)


def test_each_metric_is_a_row_of_the_table_and_an_entry_of_the_json_with_exactly_the_starts_values(
    suite: Suite,
) -> None:
    result = suite.run("-k", "test_metric", "--benchmark-json=out.json", "--benchmark-columns=median,ops,rounds")
    result.assert_outcomes(passed=26)  # 13 metrics of two sides
    found = {bench["fullname"]: bench for bench in suite.saved()["benchmarks"]}
    measured = [service_metrics.measure(run, PROFILE.slo) for run in CANDIDATE]
    assert found[ROW]["stats"]["data"] == [m["tpot_p50_s"] for m in measured]
    assert found[ROW]["stats"]["rounds"] == 3
    assert found[ROW]["group"] == "cpu/toy tpot_p50_s"
    assert {r["group"] for r in found.values()} == {f"cpu/toy {r['extra_info']['metric']}" for r in found.values()}
    result.stdout.fnmatch_lines(["*benchmark 'cpu/toy tpot_p50_s': 2 tests*"])
    result.stdout.fnmatch_lines(["test_metric?cpu-toy-candidate-tpot_p50_s? *"])


def test_throughput_is_seconds_for_each_token_so_that_the_column_of_operations_is_tokens_a_second(
    suite: Suite,
) -> None:
    suite.run("-k", "output_tokens_per_s", "--benchmark-json=out.json")
    bench = next(b for b in suite.saved()["benchmarks"] if "candidate" in b["name"])
    values = [service_metrics.measure(run)["output_tokens_per_s"] for run in CANDIDATE]
    assert bench["stats"]["data"] == [1.0 / value for value in values]
    assert bench["stats"]["ops"] == pytest.approx(3 / sum(1 / value for value in values))
    assert bench["extra_info"]["sample"] == "seconds for each token; OPS is tokens/s"
    assert bench["extra_info"]["values"] == values


def test_what_the_statistics_do_not_say_is_in_extra_info(suite: Suite) -> None:
    suite.run("-k", "candidate-ttft_p95_s", "--benchmark-json=out.json")
    info = suite.saved()["benchmarks"][0]["extra_info"]
    assert set(info["percentiles"]) == {"ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s"}
    assert info["definition"] == service_metrics.DEFINITIONS["ttft_p95_s"].text
    assert info["fingerprint"] == {name: value for name, value in FACTS.items() if name != "client.lag_p50_s"}
    assert (info["side"], info["engine"], info["unit"]) == ("candidate", "vllm 1.0 bfloat16", "s")


def test_the_gpu_that_was_measured_on_is_in_machine_info_and_a_cpu_adds_none(pytester: pytest.Pytester) -> None:
    suite = suite_of(pytester, candidate=starts(facts={**FACTS, **GPU}))
    suite.run("-k", "candidate-tpot_p50_s", "--benchmark-json=out.json")
    assert suite.saved()["machine_info"]["gpu"] == {"count": 1, "0.name": "H100", "0.driver_version": "580"}
    (suite.directory / "pair-01-candidate.jsonl").write_text((suite.directory / "pair-01-reference.jsonl").read_text())
    suite.run("-k", "candidate-tpot_p50_s", "--benchmark-json=out.json")
    assert "gpu" not in suite.saved()["machine_info"]


def test_three_histories_are_read_and_drawn_by_pytest_benchmarks_own_compare(pytester: pytest.Pytester) -> None:
    suite = suite_of(pytester)
    for number, slower in enumerate((1.0, 1.05, 1.2), 1):
        for place, run in enumerate(starts(slower=slower), 1):
            path = suite.directory / f"pair-{place:02}-candidate.jsonl"
            path.write_text("".join(timings.to_json_lines(run)))
        suite.run("-k", "tpot_p50_s", f"--benchmark-save=day{number}", "--benchmark-save-data")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "--columns=median,rounds", "--sort=fullname"]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for number in (1, 2, 3):
        assert re.search(rf"test_metric\[cpu-toy-candidate-tpot_p50_s\] \(\d+_day{number}\)", done.stdout), done.stdout
    compared = suite.run("-k", "candidate-tpot_p50_s", "--benchmark-compare=0001", "--benchmark-compare-fail=median:5%")
    assert compared.ret != 0  # 20 % slower than the first day
    compared.stderr.fnmatch_lines(["*Performance has regressed*"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-p", "no:benchmark"), "it is not installed, or switched off"),
        (("--benchmark-disable",), "--benchmark-disable"),
    ],
)
def test_without_pytest_benchmark_nothing_is_exported_and_one_remark_says_why(
    suite: Suite, arguments: tuple[str, ...], reason: str
) -> None:
    result = suite.run(*arguments)
    result.stdout.fnmatch_lines(["*26 skipped, 1 inconclusive*"])  # the verdict is made all the same
    said = [line for line in result.outlines if "metrics are not in pytest-benchmark's table" in line]
    assert said == [f"parity: metrics are not in pytest-benchmark's table: {reason}"]


def test_under_xdist_nothing_is_exported_and_the_rest_runs(suite: Suite) -> None:
    result = suite.pytester.runpytest_inprocess("-p", "no:cacheprovider", "-n", "1", "--benchmark-json=out.json")
    result.stdout.fnmatch_lines(["*26 skipped, 1 inconclusive*"])
    result.stdout.fnmatch_lines(["parity: metrics are not in pytest-benchmark's table: it takes nothing under*"])
    assert not (suite.pytester.path / "out.json").exists()


def test_where_another_plugin_has_taken_the_fixtures_place_nothing_is_exported(suite: Suite) -> None:
    path = suite.pytester.path / "conftest.py"
    path.write_text(path.read_text() + "\n@pytest.fixture\ndef benchmark():\n    return None\n")
    result = suite.run("-k", "candidate-tpot_p50_s", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*another plugin took its place*"])


@pytest.mark.skipif(importlib.util.find_spec("pytest_codspeed") is None, reason="pytest-codspeed is not installed")
def test_under_codspeed_nothing_is_exported_and_nothing_breaks(suite: Suite) -> None:
    result = suite.pytester.runpytest_subprocess("--codspeed")
    assert result.ret in (0, 5)
    result.stdout.fnmatch_lines(["parity: metrics are not in pytest-benchmark's table: CodSpeed*"])


def test_benchmark_only_keeps_the_metrics_and_benchmark_skip_leaves_them_out(suite: Suite) -> None:
    suite.run("-k", "tpot_p50_s", "--benchmark-only").assert_outcomes(passed=2)
    suite.run("-k", "tpot_p50_s", "--benchmark-skip").assert_outcomes(skipped=2)


def test_a_missing_cpuinfo_does_not_keep_the_json_from_being_written(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    suite.run("-k", "candidate-tpot_p50_s", "--benchmark-json=out.json").assert_outcomes(passed=1)
    assert suite.saved()["machine_info"]["cpu"]["brand_raw"]


def test_the_verdict_is_our_own_and_a_slower_candidate_fails_it(pytester: pytest.Pytester) -> None:
    suite = suite_of(pytester, reference=starts(12), candidate=starts(12, slower=1.2))
    result = suite.run(VERDICT)
    result.stdout.fnmatch_lines(["*tpot_p50_s lost 20.0 %*", "*parity bench cpu --profile toy*"])


def test_an_inconclusive_verdict_fails_only_where_it_is_asked_to(pytester: pytest.Pytester) -> None:
    suite = suite_of(pytester, strict=True)
    result = suite.run(VERDICT)
    assert result.ret == 1
    path = suite.pytester.path / "conftest.py"
    path.write_text(path.read_text().replace("inconclusive_fails=True", "inconclusive_fails=False"))
    warned = suite.run(VERDICT)
    assert warned.ret == 0
    warned.stdout.fnmatch_lines(["*INCONCLUSIVE  performance toy *"])


def test_a_metric_that_no_start_has_is_skipped_with_a_reason(pytester: pytest.Pytester) -> None:
    running = [replace(run, start_up_s=None) for run in starts()]
    suite = suite_of(pytester, candidate=running)
    result = suite.run("-k", "candidate-start_up_s", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*start_up_s was not measured in every start of the candidate*"])


def test_where_no_target_speaks_of_performance_the_items_are_skipped(pytester: pytest.Pytester) -> None:
    suite = suite_of(pytester)
    (suite.directory / "session.json").unlink()
    suite.run().assert_outcomes(skipped=2)


def test_a_comparison_that_cannot_be_read_fails_with_one_sentence(pytester: pytest.Pytester) -> None:
    suite = suite_of(pytester)
    for path in suite.directory.glob("pair-*-candidate.jsonl"):
        path.unlink()
    result = suite.run(VERDICT)
    result.stdout.fnmatch_lines(["*parity could not judge:*has no complete pair of starts*"])


@dataclass(frozen=True)
class Stub:
    """In the place of `Bench`: what it would have measured is written, and how often is counted."""

    asked: list[str]
    fails: bool = False

    def of(self, target: Any, asked: Any, profile: str, limits: Any, recorder: Any, home: Path) -> Stub:
        self.asked.append(profile)
        if self.fails:
            raise EngineError("the server died")
        write_session(home, reference=starts(), candidate=CANDIDATE, of=(target.name, profile))
        return self

    def compare(self, golden: Any) -> None: ...


@pytest.mark.parametrize("fails", [False, True])
def test_without_recordings_each_profile_is_measured_once_whatever_asks_for_it_and_a_failure_is_not_tried_again(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    stub = Stub(asked=[], fails=fails)
    monkeypatch.setattr(bench, "Bench", stub)
    pytester.makeconftest(MEASURES.format(rails=RAILS, suites=str(SUITE.parent)))
    pytester.makepyfile(test_performance=SUITE.read_text("utf-8"))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "tpot_p50_s or not test_metric")
    assert sorted(stub.asked) == ["small_batch", "small_machine"]
    if fails:
        result.stdout.fnmatch_lines(["*parity could not judge: the server died*"])
    else:
        assert result.ret == 0, result.stdout.str()


def test_half_a_pair_is_left_out_and_a_damaged_start_is_named(tmp_path: Path) -> None:
    directory = write_session(tmp_path, reference=starts(), candidate=starts())
    traffic = write_suites(tmp_path / "suites") / "traffic"
    (directory / "pair-03-candidate.jsonl").unlink()
    found = performance_sessions.read(directory, traffic=traffic, goldens=tmp_path)
    assert {side: len(runs) for side, runs in found.runs.items()} == {"reference": 2, "candidate": 2}
    assert found.runs["candidate"][0] == starts()[0]
    (directory / "pair-01-candidate.jsonl").write_text("{")
    with pytest.raises(RecordingError, match="pair-01-candidate"):
        performance_sessions.read(directory, traffic=traffic, goldens=tmp_path)


def test_the_newest_finished_comparison_is_found_and_no_unfinished_or_other_one(tmp_path: Path) -> None:
    first = write_session(tmp_path, reference=starts(1), candidate=starts(1))
    second = write_session(tmp_path, reference=starts(1), candidate=starts(1), number=2)
    assert performance_sessions.latest(tmp_path, "cpu", "toy") == second
    (second / "verdict.json").unlink()
    assert performance_sessions.latest(tmp_path, "cpu", "toy") == first
    session = first / "session.json"
    session.write_text(session.read_text().replace('"comparison"', '"2 pairs of itself"'))
    assert performance_sessions.latest(tmp_path, "cpu", "toy") is None
    assert performance_sessions.latest(tmp_path, "cpu", "other") is None
