"""The report people read: three verdicts word for word, and what holds for every report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greedy_cases import BENIGN, judged, many, recordings_of, verdicts
from parity.differences import visible
from parity.fingerprint import Difference
from parity.reports import terminal
from parity.verdict import Finding, Outcome, Verdict
from recordings import completion, recording
from report_cases import HOSTILE, recovery

REPORTS = Path(__file__).parent / "data" / "reports"
VERDICTS = verdicts()
WIDTH = 120


def verdict(headline: str = "all is well", **changes: object) -> Verdict:
    plain = Verdict(
        check="greedy",
        reference="one 1 float32",
        candidate="two 2 bfloat16",
        outcome=Outcome.PASS,
        headline=headline,
        findings=(),
        causes=(),
        changed=(),
        warnings=(),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def finding(sentence: str, *evidence: str, outcome: Outcome = Outcome.PASS) -> Finding:
    return Finding(
        metric="metric",
        outcome=outcome,
        sentence=sentence,
        unit="prompts",
        reference=None,
        candidate=None,
        delta=None,
        interval=None,
        limit="the limit",
        n=1,
        evidence=evidence,
    )


@pytest.mark.parametrize("name", VERDICTS)
def test_a_report_reads_word_for_word(name: str) -> None:
    """Rewritten by tests/data/make_reports.py, never by a test."""
    assert terminal.render(VERDICTS[name]) + "\n" == (REPORTS / f"{name}.txt").read_text("utf-8")


def test_there_is_no_expected_report_without_a_case() -> None:
    assert {path.stem for path in REPORTS.iterdir()} == set(VERDICTS)


@pytest.mark.parametrize("name", VERDICTS)
def test_the_first_word_is_the_outcome(name: str) -> None:
    assert terminal.render(VERDICTS[name]).split()[0] == VERDICTS[name].outcome.value == name.upper()


def test_causes_come_before_findings_and_facts_last() -> None:
    lines = terminal.render(VERDICTS["fail"]).splitlines()
    starts = ("  probable cause: ", "  FAIL  ", "  pass  ", "  differs between ")
    first = [next(n for n, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert first == sorted(first)
    assert [line.strip().partition(":")[0] for line in lines[first[-1] + 1 :]] == [
        d.name for d in VERDICTS["fail"].changed
    ]


def test_a_limit_is_printed_where_it_was_not_kept() -> None:
    for outcome, shown in ((Outcome.PASS, False), (Outcome.FAIL, True), (Outcome.INCONCLUSIVE, True)):
        text = terminal.render(verdict(findings=(finding("a sentence", "a witness", outcome=outcome),)))
        assert ("        limit: the limit" in text.splitlines()) is shown
        assert "        - a witness" in text.splitlines()


def test_warnings_are_printed() -> None:
    assert "  warning: look out" in terminal.render(verdict(warnings=("look out",))).splitlines()


# Layout -------------------------------------------------------------------------------------------------------------


@given(words=st.lists(st.text("ab'1%", min_size=1, max_size=200), min_size=1, max_size=40))
def test_no_line_is_longer_than_120_and_no_word_is_lost(words: list[str]) -> None:
    text = " ".join(words)
    difference = Difference(name="n" * 100, reference=text, candidate=text[::-1])
    failure = finding(text, text, outcome=Outcome.FAIL)
    report = terminal.render(
        verdict(text, candidate=text, causes=(text,), warnings=(text,), findings=(failure,), changed=(difference,))
    )
    for rendered in (report, terminal.table([verdict(text)] * 2)):
        assert max(map(len, rendered.splitlines())) <= WIDTH
        assert "\N{NO-BREAK SPACE}" not in rendered
    assert "".join(terminal.render(verdict(text)).split()).endswith("".join(words))


@pytest.mark.parametrize("kept", ["90 %", "0.304 nats", "6.2 sigma", "S 0.5", "token 12", "sigma 0.13", "' a b  c'"])
@pytest.mark.parametrize("before", range(95, 122))
def test_a_number_keeps_its_unit_and_a_quotation_its_spaces(kept: str, before: int) -> None:
    text = terminal.render(verdict(headline=f"{'x' * before} {kept} and more"))
    assert any(re.search(rf"(?<!\S){re.escape(kept)}", line) for line in text.splitlines())


def test_long_values_show_where_they_part() -> None:
    same = "full_attention, " * 30
    changed = Difference(name="layer_types", reference=f"{same}full", candidate=f"{same}sliding")
    (line,) = [x.strip() for x in terminal.render(verdict(changed=(changed,))).splitlines() if "layer_types" in x]
    assert line == "layer_types: ...ttention, full -> ...ttention, sliding"
    digests = Difference(name="sha256", reference="1" * 64, candidate="4" * 64)
    assert f"    sha256: {'1' * 20}... -> {'4' * 20}..." in terminal.render(verdict(changed=(digests,))).splitlines()


def test_an_absent_value_is_none() -> None:
    changed = Difference(name="quantization", reference=None, candidate="fp8")
    assert terminal.render(verdict(changed=(changed,))).endswith("    quantization: none -> fp8")


# Tables and headers -------------------------------------------------------------------------------------------------


def test_the_table_has_one_row_a_check_and_aligned_columns() -> None:
    long = "word " * 40
    rows = terminal.table(
        [
            verdict("short", check="inputs"),
            verdict(long, check="a", outcome=Outcome.INCONCLUSIVE),
            verdict("", outcome=Outcome.FAIL),
        ]
    ).splitlines()
    assert rows[0] == "PASS          inputs  short"
    assert rows[1].startswith("INCONCLUSIVE  a       word word")
    assert rows[2].startswith(" " * 22 + "word")
    assert rows[-1] == "FAIL          greedy"
    assert terminal.table([]) == ""


def test_the_table_of_a_real_verdict() -> None:
    assert terminal.table([judged(many([BENIGN], identical=39))]) == (
        "PASS  greedy  39 of 40 prompts identical, 1 benign, largest S 0.500 nats (2.0 sigma)"
    )


def test_sides_say_who_and_on_what() -> None:
    reference, candidate = recordings_of(many([], identical=2))
    cpu = recording(candidate.completions, context={"host.cpu": "EPYC", "host.cores": 2}, asked=candidate.workload)
    gpu = recording(reference.completions, context={"gpu.0.name": "H200", "host.cpu": "EPYC"})
    assert terminal.sides(gpu, replace(cpu, resumed=1)) == (
        "reference: replay 1 float32, tiny, H200, recorded 2026-11-23T12:00:00+00:00",
        "candidate: replay 1 float32, tiny, EPYC x2, recorded 2026-11-23T12:00:00+00:00, "
        "1 completion from an interrupted run",
        "workload: tests, 2 prompts, 6 candidate tokens, at most 3 each, temperature 0",
    )
    assert "3 completions from" in terminal.describe(replace(cpu, resumed=3))
    assert ", tiny, ? x?, recorded" in terminal.describe(reference)
    one = recording([completion(token_ids=[30])])
    assert terminal.sides(one, one)[2].startswith("workload: tests, 1 prompt, 1 candidate token, at most 64 each")


# What is kept of the accuracy ---------------------------------------------------------------------------------------


def test_the_table_of_what_is_kept_word_for_word() -> None:
    assert terminal.recovery(recovery()).splitlines() == [
        "task            documents  reference  candidate   recovery        90% interval  lost   won",
        "parity_facts           60     0.7500     0.7000     93.33%     85.0% to 101.0%     4     1",
        "parity_facts 2         60     0.0000     0.7000          -                   -     0     1",
        "all tasks             120     0.7500     0.7000     93.33%     85.0% to 101.0%     4     1",
        "on 500 tokens of the reference: KL divergence 0.01 nats a token (rounding alone: 0.001), the same most "
        "probable token",
        "on 98.00%, perplexity 1.0200 times the reference's (+- 0.0030)",
    ]


def test_one_task_is_all_tasks() -> None:
    two = recovery()
    assert terminal.recovery(replace(two, tasks=two.tasks[:1], moved=None)).splitlines() == [
        "task          documents  reference  candidate   recovery        90% interval  lost   won",
        "parity_facts         60     0.7500     0.7000     93.33%     85.0% to 101.0%     4     1",
    ]


@given(name=HOSTILE)
def test_no_name_of_a_task_breaks_its_line_or_reaches_the_terminal_as_a_command(name: str) -> None:
    text = terminal.recovery(replace(recovery(name), moved=None))
    head, first, second, total = text.split("\n")
    assert first.startswith(f"{visible(name)} ")
    assert second.startswith(visible(f"{name} 2"))
    assert all(line.isprintable() for line in (head, first, second, total))
    assert len({len(line) for line in (head, first, second, total)}) == 1
