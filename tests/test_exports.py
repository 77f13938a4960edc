"""One table of metrics in the forms that dashboards read, each held against that dashboard's own rules."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from load_runs import load_run
from parity import exports, service_metrics
from parity.errors import EngineError
from parity.exports import BENCHER, BIGGER, SMALLER, TIDY
from parity.service_metrics import DEFINITIONS, Direction
from session_cases import LABELS, PROFILE, starts

RUNS = {"reference": starts(), "candidate": starts(slower=1.1)}

BMF = {
    "type": "object",
    "patternProperties": {
        ".+": {
            "type": "object",
            "patternProperties": {
                ".+": {
                    "type": "object",
                    "properties": {name: {"type": "number"} for name in ("value", "lower_value", "upper_value")},
                    "required": ["value"],
                }
            },
        }
    },
}
"""Bencher's schema, https://bencher.dev/bmf.json."""

ACTION = {
    "type": "array",
    "minItems": 1,  # it refuses a file without benchmarks
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "value": {"type": "number"},
            "unit": {"type": "string"},
            "range": {"type": "string"},
            "extra": {"type": "string"},
        },
        "required": ["name", "value", "unit"],
        "additionalProperties": False,
    },
}
"""`BenchmarkResult` of github-action-benchmark's src/extract.ts; it has no schema, and no version on npm."""


def files() -> dict[str, str]:
    return exports.export(RUNS, PROFILE, target="cpu", labels=LABELS)


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_metric_that_all_starts_have_is_in_the_table_once_for_each_side_with_its_exact_values() -> None:
    table = exports.table(RUNS, PROFILE, target="cpu", labels=LABELS)
    measured = [service_metrics.measure(run, PROFILE.slo) for run in RUNS["candidate"]]
    assert [s.metric.id for s in table if s.side == "candidate"] == list(measured[0])
    for series in table:
        if series.side == "candidate":
            assert series.values == tuple(m[series.metric.id] for m in measured)
            assert series.label == "vllm 1.0 bfloat16"
    assert len({series.name for series in table}) == len(table)


def test_a_metric_that_one_start_lacks_is_left_out() -> None:
    runs = {"candidate": [*starts(2), replace(load_run(), start_up_s=None)]}
    found = {s.metric.id for s in exports.table(runs, PROFILE, target="cpu", labels=LABELS)}
    assert "start_up_s" not in found
    assert "ttft_p50_s" in found


def test_statistics_of_the_same_samples_go_with_a_series_and_no_others() -> None:
    table = exports.table(RUNS, PROFILE, target="cpu", labels=LABELS)
    ttft = next(s for s in table if s.name == "cpu/toy/candidate/ttft_p50_s")
    assert set(ttft.related) == {"ttft_mean_s", "ttft_p95_s", "ttft_p99_s"}
    assert next(s for s in table if s.metric.id == "requests_per_s").related == {}


def test_only_facts_of_what_was_measured_that_all_starts_share_are_kept() -> None:
    other = [replace(run, facts={**run.facts, "host.cpu": f"cpu {n}"}) for n, run in enumerate(starts())]
    series = exports.table({"candidate": other}, PROFILE, target="cpu", labels=LABELS)[0]
    assert series.facts["environment.digest"] == "abc"
    assert "host.cpu" not in series.facts  # not the same in all starts
    assert "client.lag_p50_s" not in series.facts  # another number in every start


def test_both_lists_for_github_action_benchmark_are_as_it_reads_them_and_no_metric_is_in_the_wrong_one() -> None:
    for name, direction in ((BIGGER, Direction.HIGHER), (SMALLER, Direction.LOWER)):
        found: list[dict[str, Any]] = json.loads(files()[name])
        jsonschema.validate(found, ACTION)
        for entry in found:
            assert DEFINITIONS[entry["name"].rsplit("/", 1)[1]].direction is direction
    named = [e["name"] for name in (BIGGER, SMALLER) for e in json.loads(files()[name])]
    table = exports.table(RUNS, PROFILE, target="cpu", labels=LABELS)
    assert sorted(named) == sorted(s.name for s in table if s.metric.direction is not Direction.NEITHER)


def test_an_entry_is_the_median_over_starts_with_their_standard_deviation() -> None:
    entry = next(e for e in json.loads(files()[BIGGER]) if e["name"] == "cpu/toy/candidate/output_tokens_per_s")
    values = [service_metrics.measure(run)["output_tokens_per_s"] for run in RUNS["candidate"]]
    assert entry["value"] == statistics.median(values)
    assert entry["range"] == f"± {statistics.stdev(values):.4g}"
    assert entry["unit"] == "tokens/s"
    assert "vllm 1.0 bfloat16, 3 starts" in entry["extra"]


def test_one_start_has_no_spread_and_claims_none() -> None:
    one = exports.export({"candidate": starts(1)}, PROFILE, target="cpu", labels=LABELS)
    assert all("range" not in entry for entry in json.loads(one[SMALLER]))
    assert json.loads(one[BENCHER])["cpu/toy/candidate"]["ttft-p50-s"].keys() == {"value"}


def test_the_names_do_not_hold_the_engines_version_so_that_a_line_goes_on_through_an_upgrade() -> None:
    upgraded = exports.export(RUNS, PROFILE, target="cpu", labels=dict.fromkeys(LABELS, "vllm 2.0"))
    for name in (BIGGER, SMALLER):
        assert [e["name"] for e in json.loads(upgraded[name])] == [e["name"] for e in json.loads(files()[name])]
    assert json.loads(upgraded[BENCHER]) == json.loads(files()[BENCHER])


def test_benchers_own_schema_takes_the_metrics_and_limits_lie_around_the_value() -> None:
    found = json.loads(files()[BENCHER])
    jsonschema.validate(found, BMF)
    assert set(found) == {"cpu/toy/reference", "cpu/toy/candidate"}
    for measures in found.values():
        for slug, metric in measures.items():
            assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
            assert len(slug) <= 64
            assert metric["lower_value"] <= metric["value"] <= metric["upper_value"]


def test_the_tidy_table_has_a_row_for_each_start_and_metric_with_time_first_and_the_value_exact() -> None:
    text = files()[TIDY]
    found, table = rows(text), exports.table(RUNS, PROFILE, target="cpu", labels=LABELS)
    assert text.startswith("time,")
    assert len(found) == sum(len(series.values) for series in table)
    row = next(r for r in found if r["side"] == "candidate" and r["metric"] == "tpot_p50_s")
    assert float(row["value"]) == service_metrics.measure(RUNS["candidate"][0])["tpot_p50_s"]
    assert row == row | {"time": "2026-11-24T12:00:00+00:00", "engine": "vllm 1.0 bfloat16", "hardware": "EPYC"}
    assert row == row | {"environment": "abc", "plan": "0123456789ab", "unit": "s", "direction": "lower is better"}


def test_otava_gets_a_row_for_each_start_with_time_first_and_a_column_for_each_metric() -> None:
    found = rows(files()["starts-candidate.csv"])
    assert [row["time"][14:16] for row in found] == ["00", "01", "02"]
    measured = [service_metrics.measure(run, PROFILE.slo) for run in RUNS["candidate"]]
    assert [{name: float(row[name]) for name in measured[0]} for row in found] == measured


def test_a_side_without_starts_has_no_rows_and_no_file_of_its_own() -> None:
    one = exports.export({"reference": [], "candidate": starts()}, PROFILE, target="cpu", labels=LABELS)
    assert "starts-reference.csv" not in one
    assert "reference" not in one[TIDY]


def test_a_start_in_which_every_request_failed_is_an_error_and_no_number() -> None:
    with pytest.raises(EngineError, match="none of the 6 requests"):
        exports.export({"candidate": [load_run(failed=6)]}, PROFILE, target="cpu", labels=LABELS)


def test_samples_that_a_run_only_looks_to_have_are_left_out() -> None:
    lacking = replace(load_run(), facts={service_metrics.LACKS: "itl_s icl_s"})
    found = set(service_metrics.measure(lacking, PROFILE.slo))
    assert not {name for name in found if name.startswith(("itl_", "icl_"))}
    assert {"ttft_p50_s", "tpot_p50_s"} <= found
