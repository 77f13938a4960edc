"""Reports for other programs: JSON under stable keys, and one finding a line as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.reports import tabular
from parity.summary import Effect, PositionBin, Summary
from parity.verdict import Finding, Outcome
from report_cases import HOSTILE, answer, choice, difference, summary

NUMBERS = st.one_of(st.none(), st.floats(), st.sampled_from([math.nan, math.inf, -math.inf]))


def read_json(shown: Summary) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(tabular.to_json(shown), parse_constant=refuse)


def read_csv(shown: Summary) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(tabular.to_csv(shown), newline="")))


def with_finding(**changes: Any) -> Summary:
    (verdict,) = summary().verdicts
    return summary(verdicts=(replace(verdict, findings=(replace(verdict.findings[0], **changes),)),))


def encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def keys(value: Any, prefix: str = "") -> set[str]:
    """Every key, with those above it; the items of a list are one."""
    if isinstance(value, dict):
        return {f"{prefix}{k}" for k in value} | {x for k, v in value.items() for x in keys(v, f"{prefix}{k}.")}
    return {x for item in value for x in keys(item, prefix)} if isinstance(value, list) else set()


# JSON ---------------------------------------------------------------------------------------------------------------


def test_the_keys_are_stable() -> None:
    """A dashboard reads these: whoever takes one away raises the schema number."""
    some = summary(
        effects=(Effect(check="greedy", metric="m", value=1.0, low=None, high=None, passed=True),),
        kl_by_position=(PositionBin(start=0, stop=8, prompts=2, mean_nats=0.1, error_nats=0.1, floor_nats=None),),
    )
    found = keys(read_json(some))
    assert found >= {
        "schema",
        "title",
        "created_at",
        "decision.advice",
        "decision.sentence",
        "decision.evidence",
        "reference.label",
        "reference.created_at",
        "reference.facts",
        "candidate.label",
        "verdicts.check",
        "verdicts.outcome",
        "verdicts.headline",
        "verdicts.causes",
        "verdicts.warnings",
        "verdicts.findings.metric",
        "verdicts.findings.outcome",
        "verdicts.findings.sentence",
        "verdicts.findings.unit",
        "verdicts.findings.reference",
        "verdicts.findings.candidate",
        "verdicts.findings.delta",
        "verdicts.findings.interval",
        "verdicts.findings.limit",
        "verdicts.findings.margin",
        "verdicts.findings.n",
        "verdicts.findings.evidence",
        "diagnosis.confidence",
        "diagnosis.sentence",
        "effects.check",
        "effects.value",
        "first_divergences",
        "kl_by_position.start",
        "kl_by_position.mean_nats",
        "recovery.confidence",
        "recovery.tasks.name",
        "recovery.tasks.n",
        "recovery.tasks.reference",
        "recovery.tasks.candidate",
        "recovery.tasks.recovery",
        "recovery.tasks.interval",
        "recovery.tasks.lost",
        "recovery.tasks.won",
        "recovery.total.recovery",
        "recovery.moved.kl_nats",
        "recovery.moved.floor_nats",
        "recovery.moved.same_choice",
        "recovery.moved.perplexity_ratio",
        "prompts.id",
        "prompts.kind",
        "prompts.position",
        "prompts.slack_nats",
        "prompts.sigmas",
        "prompts.kl_nats",
        "prompts.reference.tokens",
        "prompts.reference.common",
        "prompts.reference.finish_reason",
        "prompts.reference.chosen.token_id",
        "prompts.candidate.top.text",
        "prompts.candidate.top.logprob_nats",
        "packages.name",
        "packages.reference",
        "packages.candidate",
        "facts.name",
        "reproduce",
    }
    assert read_json(some)["schema"] == tabular.SCHEMA == 1


def test_values_are_plain() -> None:
    found = read_json(summary())
    assert found["decision"]["advice"] == "HOLD"
    assert found["verdicts"][0]["outcome"] == "FAIL"
    assert found["reference"]["facts"] == {"dtype": "float32"}
    assert found["prompts"][0]["kind"] == "benign"
    assert found["prompts"][0]["slack_nats"] == 0.5
    assert found["prompts"][3]["candidate"]["chosen"] is None
    assert found["first_divergences"] == [1, 1, 2]


def test_the_texts_of_prompts_and_answers_are_left_out() -> None:
    long = "bulk" * 1000
    found = difference(answer(long), answer(long), prompt=long)
    assert "bulk" not in tabular.to_json(summary(prompts=(found,)))
    assert "text" not in read_json(summary(prompts=(found,)))["prompts"][0]["reference"]


@given(number=NUMBERS, words=st.lists(HOSTILE, min_size=4, max_size=4))
def test_it_is_json_whatever_stands_in_it(number: float | None, words: Sequence[str]) -> None:
    title, sentence, token, id_ = words
    found = difference(
        answer("x", top=(choice(1, token, number or 0.0),)), id=id_, slack_nats=number, sigmas=number, kl_nats=number
    )
    (verdict,) = with_finding(delta=number, margin=number, interval=(0.0, number or 0.0), sentence=sentence).verdicts
    read = read_json(summary(title=title, prompts=(found,), verdicts=(verdict,)))
    assert read["title"] == title
    assert read["verdicts"][0]["findings"][0]["sentence"] == sentence
    assert read["prompts"][0]["id"] == id_
    assert read["prompts"][0]["reference"]["top"][0]["text"] == token
    expected = number if number is not None and math.isfinite(number) else None
    assert read["prompts"][0]["slack_nats"] == read["verdicts"][0]["findings"][0]["delta"] == expected


# CSV ----------------------------------------------------------------------------------------------------------------


def test_a_line_says_all_of_a_finding() -> None:
    shown = with_finding(
        metric="KL divergence",
        outcome=Outcome.FAIL,
        unit="nats a token",
        reference=1.0,
        candidate=3.0,
        delta=2.0,
        interval=(1.5, 2.5),
        margin=1.2,
        n=32,
    )
    assert read_csv(shown) == [
        {
            "title": "cpu",
            "created_at": "2026-11-24T12:00:00+00:00",
            "reference": "transformers 5.19.0 float32",
            "candidate": "vllm 0.32.0 float32",
            "check": "greedy",
            "metric": "KL divergence",
            "outcome": "FAIL",
            "value": "2.0",
            "low": "1.5",
            "high": "2.5",
            "margin": "1.2",
            "unit": "nats a token",
            "n": "32",
        }
    ]
    assert list(read_csv(shown)[0]) == list(tabular.COLUMNS)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"delta": None, "candidate": 3.0}, "3.0"),
        ({"delta": None, "candidate": None}, ""),
        ({"delta": math.nan, "candidate": 3.0}, ""),
        ({"delta": -math.inf}, ""),
    ],
)
def test_the_value_is_the_delta_or_the_candidates_number(changes: dict[str, float | None], value: str) -> None:
    (row,) = read_csv(with_finding(interval=None, margin=math.inf, **changes))
    assert (row["value"], row["low"], row["high"], row["margin"]) == (value, "", "", "")


def test_no_finding_gives_the_header_alone() -> None:
    assert tabular.to_csv(summary(verdicts=())) == ",".join(tabular.COLUMNS) + "\r\n"


@given(rows=st.lists(st.tuples(HOSTILE, HOSTILE, NUMBERS), max_size=5), title=HOSTILE, split=st.integers(0, 5))
def test_there_are_as_many_lines_as_findings(
    rows: Sequence[tuple[str, str, float | None]], title: str, split: int
) -> None:
    (verdict,) = summary().verdicts
    findings: list[Finding] = [
        replace(verdict.findings[0], metric=metric, unit=unit, candidate=number, delta=None)
        for metric, unit, number in rows
    ]
    two = (replace(verdict, findings=tuple(findings[:split])), replace(verdict, findings=tuple(findings[split:])))
    read = read_csv(summary(title=title, verdicts=two))
    expected = [(encodable(title), encodable(metric), encodable(unit)) for metric, unit, _ in rows]
    assert [(row["title"], row["metric"], row["unit"]) for row in read] == expected
    for row, (_, _, number) in zip(read, rows, strict=True):
        assert row["value"] == ("" if number is None or not math.isfinite(number) else repr(number))
