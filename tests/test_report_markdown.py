"""The step summary: what it says in which order, that no text breaks it, and that its size is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from parity.decision import Advice, Decision
from parity.differences import visible
from parity.fingerprint import Difference
from parity.recording import FinishReason
from parity.reports import markdown
from parity.summary import Summary
from parity.verdict import Outcome
from report_cases import HOSTILE, answer, choice, difference, identical, recovery, summary

READER = MarkdownIt("commonmark").enable("table")
SHOWN_AS_IT_IS = "\n\t\u200d\u200c"


def parsed(report: str) -> list[Token]:
    return READER.parse(report)


def fences(report: str) -> list[str]:
    return [token.content for token in parsed(report) if token.type == "fence"]


def html(report: str) -> list[str]:
    """Every piece of HTML that is not our own two ends of a detail, with the title's text left out."""
    blocks = [token.content for token in parsed(report) if token.type == "html_block"]
    inline = [
        child.content
        for token in parsed(report)
        for child in token.children or ()
        if child.type in ("html_inline", "link_open", "image", "code_inline")
    ]
    ours = re.compile(r"<details><summary>[^<>]*</summary>\n|</details>\n")
    return [block for block in blocks if not ours.fullmatch(block)] + inline


def details(report: str) -> int:
    """How many there are, each with its end."""
    ends = [token.content[:9] for token in parsed(report) if token.type == "html_block"]
    assert ends == ["<details>", "</details"] * (len(ends) // 2)
    return len(ends) // 2


def texts(report: str) -> list[str]:
    """Every sentence and cell as a reader sees it."""
    return [
        "".join(child.content for child in token.children or ()) for token in parsed(report) if token.type == "inline"
    ]


def of_prompt(reference: str, candidate: str, **changes: object) -> Summary:
    found = difference(answer(reference), answer(candidate))
    return summary(prompts=(replace(found, **changes),), verdicts=())  # type: ignore[arg-type]


# What it says -------------------------------------------------------------------------------------------------------


def test_the_decision_is_the_first_line_and_its_evidence_follows() -> None:
    lines = markdown.render(summary()).splitlines()
    assert lines[0] == "## HOLD: do not upgrade"
    assert lines[2] == "cpu, 2026-11-24T12:00:00+00:00"
    assert lines[4] == "- one prompt is wrong"


@pytest.mark.parametrize("advice", list(Advice))
def test_each_decision_is_named(advice: Advice) -> None:
    decision = Decision(advice=advice, sentence="a sentence", evidence=())
    assert markdown.render(summary(decision=decision)).startswith(f"## {advice.value}: a sentence\n")


def test_the_parts_come_in_the_order_of_their_weight() -> None:
    report = markdown.render(summary())
    parts = [
        "## HOLD",
        "**Cause (likely):** a wrong mask",
        "| reference | transformers 5.19.0 float32 |",
        "| FAIL | greedy |",
        "**Accuracy kept:**",
        "| task | documents | reference | candidate | recovery | 90% interval | lost | won |",
        "on 500 tokens of the reference: KL divergence 0.01 nats a token",
        "**Answers:** 4 prompts: 1 the same, 3 differ",
        "**What changed:** 1 package\n",
        "| vllm | 0.31.0 | 0.32.0 |",
        "<details><summary>1 recorded fact on one side only</summary>",
        "| engine.attention | none | sdpa |",
        "To reproduce:\n\n```sh\nparity compare a b\n```",
        "<details><summary>FAIL greedy: ",
        "<details><summary>short: one answer ends",
        "<details><summary>p-002: more than rounding",
        "<details><summary>p-001: rounding",
    ]
    places = [report.index(part) for part in parts]
    assert places == sorted(places)


def test_the_table_of_what_is_kept_has_a_row_a_task_and_one_for_all() -> None:
    rows = [
        "| parity&#95;facts | 60 | 0.7500 | 0.7000 | 93.33% | 85.0% to 101.0% | 4 | 1 |",
        "| parity&#95;facts 2 | 60 | 0.0000 | 0.7000 |  |  | 0 | 1 |",
        "| all tasks | 120 | 0.7500 | 0.7000 | 93.33% | 85.0% to 101.0% | 4 | 1 |",
    ]
    assert "\n".join(rows) + "\n\non 500 tokens" in markdown.render(summary())
    two = recovery()
    one = markdown.render(summary(recovery=replace(two, tasks=two.tasks[:1], moved=None)))
    assert rows[0] in one
    assert "all tasks" not in one
    assert "500 tokens" not in one
    assert "Accuracy kept" not in markdown.render(summary(recovery=None))


def test_a_check_that_did_not_pass_is_unfolded_with_its_limits_and_one_that_passed_is_not() -> None:
    (failed,) = summary().verdicts
    doubted = replace(failed, check="shape", outcome=Outcome.INCONCLUSIVE)
    passed = replace(failed, check="inputs", outcome=Outcome.PASS)
    report = markdown.render(summary(verdicts=(passed, doubted, failed)))
    titles = re.findall(r"<details><summary>(\w+ \w+): ", report)
    assert titles == ["FAIL greedy", "INCONCLUSIVE shape"]
    assert "| PASS | inputs |" in report
    wrong = next(f for f in failed.findings if f.outcome is Outcome.FAIL)
    assert f"- FAIL **{wrong.metric}**: " in report
    assert f"  - limit: {wrong.limit}" in texts(report) or f"limit: {wrong.limit}" in texts(report)
    assert f"  - {wrong.evidence[0]}" in report or wrong.evidence[0] in texts(report)


def test_both_texts_are_shown_with_the_mark_where_they_part() -> None:
    report = markdown.render(of_prompt("one two", "one three", prompt="Count"))
    assert fences(report)[1:] == ["Count\n", "one t►wo\n", "one t►hree\n"]
    assert "► is the place where the two texts part" in report
    same = markdown.render(of_prompt("one", "one"))
    assert fences(same)[2:] == ["one\n", "one\n"]
    assert "the two texts part" not in same


def test_a_table_shows_what_each_side_preferred() -> None:
    report = markdown.render(of_prompt("one two", "one three"))
    assert '| ► " two" | 7 | 60.65 % (-0.500 nats) | ► " two" | 7 | 60.65 % (-0.500 nats) |' in report
    assert "| ? | 9 | 4.98 % (-3.000 nats) |" in report
    ended = difference(candidate=answer("one", chosen=None, top=()))
    assert "| (had ended) |" in markdown.render(summary(prompts=(ended,)))
    outside = difference(candidate=answer("one", chosen=choice(99, "late", float("nan"))))
    assert '| ► "late" | 99 | ? |' in markdown.render(summary(prompts=(outside,)))


@pytest.mark.parametrize("reason", list(FinishReason))
def test_each_answer_says_how_it_ended(reason: FinishReason) -> None:
    report = markdown.render(summary(prompts=(difference(answer("a", finish_reason=reason, tokens=1)),)))
    assert re.search(r"\nReference, 1 token, (ended by itself|ended by a length limit|aborted by the engine);", report)


def test_prompts_that_are_the_same_are_only_counted() -> None:
    report = markdown.render(summary(prompts=(identical(), identical())))
    assert "2 prompts: 2 the same, none differs" in report
    assert "<summary>p-001" not in report


def test_very_long_texts_are_shown_around_the_mark() -> None:
    report = markdown.render(of_prompt(f"{'a' * 5000}X{'b' * 9000}", "a" * 5000, prompt="p" * 3000))
    prompt, ours, theirs = fences(report)[1:]
    assert prompt == f"[1000 characters before]\n{'p' * 2000}\n"
    assert ours == f"[4000 characters before]\n{'a' * 1000}►X{'b' * 2999}\n[6001 characters after]\n"
    assert theirs == f"[4000 characters before]\n{'a' * 1000}►\n"


def test_many_changes_are_folded() -> None:
    changed = tuple(Difference(name=f"package-{n:02}", reference="1", candidate="2") for n in range(20))
    report = markdown.render(summary(packages=changed))
    assert "**What changed:** 20 packages" in report
    assert "<details><summary>8 packages more that changed</summary>" in report
    assert all(f"| package-{n:02} | 1 | 2 |" in report for n in range(20))


def test_an_empty_summary_is_still_a_report() -> None:
    bare = summary(verdicts=(), prompts=(), packages=(), facts=(), reproduce=(), diagnosis=None, recovery=None)
    report = markdown.render(replace(bare, decision=replace(bare.decision, evidence=())))
    assert report.startswith("## HOLD: do not upgrade")
    assert "0 prompts: 0 the same, none differs" in report
    assert "<details>" not in report


# Whatever a model wrote ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(prompt=HOSTILE, ours=HOSTILE, theirs=HOSTILE)
def test_no_text_breaks_its_fence(prompt: str, ours: str, theirs: str) -> None:
    shown = of_prompt(ours, theirs, prompt=prompt)
    common = shown.prompts[0].reference.common
    marked = [text if ours == theirs else f"{text[:common]}►{text[common:]}" for text in (ours, theirs)]
    report = markdown.render(shown)
    expected = [visible(text, keep=SHOWN_AS_IT_IS) + "\n" for text in (prompt, *marked)]
    assert fences(report)[1:] == expected
    assert html(report) == []
    assert details(report) == 2


@settings(max_examples=40)
@given(words=st.lists(HOSTILE, min_size=9, max_size=9))
def test_no_sentence_becomes_markup(words: Sequence[str]) -> None:
    title, sentence, evidence, cause, headline, name, token, task, id_ = words
    (verdict,) = summary().verdicts
    finding = replace(verdict.findings[0], sentence=sentence, limit=cause, evidence=(evidence,), outcome=Outcome.FAIL)
    shown = summary(
        title=title,
        decision=Decision(advice=Advice.HOLD, sentence=sentence, evidence=(evidence, cause)),
        verdicts=(replace(verdict, headline=headline, causes=(cause,), findings=(finding,), warnings=(title,)),),
        packages=(Difference(name=name, reference=token, candidate="2"),),
        prompts=(difference(answer("one two", chosen=choice(1, token, -0.5)), id=id_),),
        recovery=recovery(task),
    )
    report = markdown.render(shown)
    assert html(report) == []
    plain = texts(report)
    for text in (title, evidence, cause, headline, name, token, task):
        assert any(visible(text).strip() in line for line in plain)
    assert plain[0] == f"HOLD: {visible(sentence).strip()}".strip()
    assert f'► "{visible(token)}"'.strip() in plain
    kinds = [token_.type for token_ in parsed(report)]
    assert kinds.count("heading_open") == 1
    assert kinds.count("fence") == 4
    assert kinds.count("table_open") == 5 + 1
    assert kinds.count("ordered_list_open") == kinds.count("blockquote_open") == kinds.count("hr") == 0
    assert kinds.count("code_block") == 0


@pytest.mark.parametrize("text", ["- a", "+ a", "1. a", "12) a", "# a", "> a", "===", "---", "    a", "~~~", "| a | b"])
def test_no_beginning_of_a_sentence_opens_a_block(text: str) -> None:
    decision = Decision(advice=Advice.HOLD, sentence="x", evidence=(text,))
    plain = texts(markdown.render(summary(decision=decision, title=text)))
    assert plain.count(text.strip()) == 1
    assert f"{text}, 2026-11-24T12:00:00+00:00".strip() in plain


def test_numbers_stay_readable_in_the_source() -> None:
    decision = Decision(advice=Advice.HOLD, sentence="x", evidence=("0.5 nats in 3 prompts",))
    assert "\n- 0.5 nats in 3 prompts\n" in markdown.render(summary(decision=decision))


# Size ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    texts_=st.lists(st.tuples(HOSTILE, HOSTILE), max_size=6),
    most_bytes=st.integers(0, 9000),
    sentence=HOSTILE,
)
def test_the_size_is_always_kept(texts_: Sequence[tuple[str, str]], most_bytes: int, sentence: str) -> None:
    found = tuple(difference(answer(a * 9), answer(b * 9), id=f"p-{n}") for n, (a, b) in enumerate(texts_))
    decision = Decision(advice=Advice.HOLD, sentence=sentence, evidence=())
    shown = summary(prompts=found, decision=decision)
    report, whole = markdown.render(shown, most_bytes=most_bytes), markdown.render(shown)
    assert len(report.encode()) <= most_bytes
    assert report == whole or len(whole.encode()) > most_bytes
    if most_bytes > 3000:
        assert report == whole or re.search(r"the last (\d+) of \d+ parts\. The HTML report .*_\n$", report)
        assert html(report) == []
        details(report)


def test_what_is_left_out_is_counted() -> None:
    found = tuple(difference(id=f"p-{n}", slack_nats=float(9 - n)) for n in range(9))
    shown = summary(prompts=found)
    whole = markdown.render(shown)
    report = markdown.render(shown, most_bytes=len(whole.encode()) - 1)
    assert [f"p-{n}" in report for n in range(9)] == [True] * 8 + [False]
    assert "the last 1 of " in report
    assert markdown.render(shown, most_bytes=len(whole.encode())) == whole
    few = markdown.render(shown, most_bytes=len(whole.encode()) // 2)
    left = re.search(r"the last (\d+) of (\d+) parts", few)
    assert left is not None
    assert int(left[1]) == 9 - sum(f"<summary>p-{n}:" in few for n in range(9))


def test_a_real_failure_fits_by_far() -> None:
    assert len(markdown.render(summary()).encode()) < 20_000
