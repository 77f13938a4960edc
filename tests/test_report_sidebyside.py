"""Two answers side by side in a terminal: what is shown, and that no text breaks the columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from parity.differences import PromptDifference, tally, visible
from parity.divergence import Kind
from parity.recording import FinishReason
from parity.reports import sidebyside
from report_cases import HOSTILE, answer, choice, difference, identical, summary

WIDTH = 100
EXAMPLE = """\
1 prompt: 0 the same, 1 differs (1 by rounding)
reference: old 1
candidate: new 2

how to read this
  - ► in a text: here the two answers part, before it they are the same. "\\n" is a line break; other
    characters that show nothing are written in this way too.
  - The tables: what each engine found most probable as the next token, where the tokens part. Text,
    id, probability, and its logarithm in nats; ► is the token it took.
  - Rounding noise (sigma): how far rounding alone moves the odds between two tokens. Where two
    tokens are about equally probable it decides which one is taken, and no engine is wrong.

── p-001: the first token is the same ──────────────────────────────────────────────────────────────
  prompt: Count
  why: rounding: the two engines' odds between the two tokens are a factor of 1.65 apart (0.5 nats),
       2 times the rounding noise; up to 6 times is normal between correct engines
  scores: on the reference's tokens the engines are 0.0025 nats a token apart (KL divergence)

  reference: 2 tokens, length limit               │ candidate: 2 tokens, length limit
  ────────────────────────────────────────────────┼────────────────────────────────────────────────
  one t►wo                                        │ one t►hree
                                                  │
    next token                 id   prob.     log │   next token                 id   prob.     log
  ► " two"                      7  60.7 %  -0.500 │   " two"                      7  60.7 %  -0.500
    " three"                    8  36.8 %  -1.000 │ ► " three"                    8  36.8 %  -1.000
    ?                           9   5.0 %  -3.000 │   ?                           9   5.0 %  -3.000"""


def rendered(*found: PromptDifference, width: int = WIDTH, most: int = 99, whole: bool = False) -> str:
    return sidebyside.render(found, reference="old 1", candidate="new 2", width=width, most=most, whole=whole)


def body(report: str) -> tuple[list[str], list[str]]:
    """The lines of both columns between their heads and the tables, for texts that hold no column line."""
    lines = report.splitlines()
    first = next(number for number, line in enumerate(lines) if "─┼─" in line) + 1
    columns: tuple[list[str], list[str]] = ([], [])
    for line in lines[first:]:
        left, between, right = line[2:].partition("│")
        if not between or not (left.strip() or right.strip()):
            break
        columns[0].append(left.rstrip())
        columns[1].append(right.removeprefix(" "))
    return columns


# What is shown ------------------------------------------------------------------------------------------------------


def test_a_report_reads_word_for_word() -> None:
    assert rendered(difference(kl_nats=0.0025)) == EXAMPLE


def test_nothing_to_show_is_said_in_three_lines() -> None:
    assert rendered(identical(), identical()).splitlines() == [
        "2 prompts: 2 the same, none differs",
        "reference: old 1",
        "candidate: new 2",
    ]
    assert rendered().startswith("0 prompts: ")


def test_the_most_telling_prompts_are_shown_and_the_rest_counted() -> None:
    found = [difference(id=f"p-{n}", slack_nats=float(n)) for n in range(5)]
    report = rendered(identical(), *found, most=2)
    assert report.startswith(tally([identical(), *found]))
    assert [line.split(":")[0] for line in report.splitlines() if line.startswith("── ")] == ["── p-4", "── p-3"]
    assert report.endswith("\n3 more prompts are not shown; --all shows every one, --prompt ID one in full")
    assert rendered(*found, most=4).endswith(
        "\n1 more prompt is not shown; --all shows every one, --prompt ID one in full"
    )
    assert "not shown" not in rendered(*found, most=5)


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (None, "all tokens are the same"),
        (0, "the first token differs"),
        (1, "the first token is the same"),
        (9, "the first 9 tokens are the same"),
    ],
)
def test_the_head_says_how_much_is_the_same(position: int | None, words: str) -> None:
    assert f"── p-001: {words} ──" in rendered(difference(position=position))


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_is_explained(kind: Kind) -> None:
    report = rendered(difference(kind=kind, slack_nats=None, sigmas=None))
    (why,) = [line for line in report.splitlines() if line.startswith("  why: ")]
    assert len(why) > 40


def test_the_mark_stands_where_the_texts_part() -> None:
    left, right = body(rendered(difference(answer("one two"), answer("one three"))))
    assert (left, right) == (["one t►wo"], ["one t►hree"])
    left, right = body(rendered(difference(answer("one"), answer("one three"))))
    assert (left, right) == (["one► (ends here)"], ["one► three"])
    left, right = body(rendered(difference(answer("one"), answer("one"))))
    assert (left, right) == (["one"], ["one"])


def test_a_long_text_is_shown_from_a_little_before_the_mark() -> None:
    before, after = "word " * 100, "more " * 400
    left, right = body(rendered(difference(answer(f"{before}A{after}"), answer(f"{before}B"))))
    assert left[0].startswith("…word word")
    assert " ".join(left).split("►")[0].count("word") == 11
    assert left[-1] == "… (--prompt ID shows the rest)"
    assert len(left) == 8
    assert [line for line in right if line][-1].endswith("►B")


def test_a_line_break_is_shown_and_made() -> None:
    left, _ = body(rendered(difference(answer("one\n two\n"), answer("one"))))
    assert left == ["one►\\n", " two\\n"]


def test_a_whole_prompt_is_shown_to_its_end() -> None:
    text = "".join(f"{n} " for n in range(900))
    found = difference(answer(text), answer(f"{text}A"), prompt="x" * 500)
    left, right = body(rendered(found, whole=True))
    assert " ".join(left).split() == f"{text[:-1]} ► (ends here)".split()
    assert " ".join(right).split() == f"{text}►A".split()
    assert rendered(found, whole=True).count("x") >= 500
    assert rendered(found).count("x") < WIDTH


def test_a_whole_prompt_without_a_difference_is_shown_too() -> None:
    report = rendered(identical("same"), whole=True)
    assert body(report) == (["same"], ["same"])
    assert "►" not in report


def test_the_end_of_a_long_prompt_is_shown_in_one_line() -> None:
    report = rendered(difference(prompt=f"{'begin ' * 50}\nwhat is 漢字?"))
    (line,) = [line for line in report.splitlines() if line.startswith("  prompt: ")]
    assert line.startswith("  prompt: …")
    assert line.endswith("\\nwhat is 漢字?")


@pytest.mark.parametrize(
    ("reason", "words"),
    [(FinishReason.STOP, "ended by itself"), (FinishReason.LENGTH, "length limit"), (FinishReason.ABORT, "aborted")],
)
def test_each_answer_says_how_it_ended(reason: FinishReason, words: str) -> None:
    report = rendered(difference(candidate=answer("one three", finish_reason=reason, tokens=1)))
    assert f"candidate: 1 token, {words}\n" in report


def test_a_table_shows_five_tokens_and_the_one_that_was_taken() -> None:
    top = tuple(choice(n, f"t{n}", -0.1 - n) for n in range(8))
    report = rendered(difference(answer("one", top=top, chosen=top[7]), answer("two", top=top, chosen=top[0])))
    rows = [line for line in report.splitlines() if '"t' in line]
    assert [row.count('"t') for row in rows] == [2, 2, 2, 2, 2, 1]
    assert rows[0].startswith('    "t0"')
    assert '│ ► "t0"' in rows[0]
    assert rows[5].startswith('  ► "t7"')
    assert "<0.1 %" not in rows[5]


def test_a_table_says_what_is_not_known() -> None:
    unknown = answer("one", top=(), chosen=choice(7, None, math.nan))
    ended = answer("one two", top=(), chosen=None)
    row, _ = rendered(difference(unknown, ended)).splitlines()[-1:][0].split("│")
    assert row.split() == ["►", "?", "7", "?", "?"]
    assert "(the answer had ended before this token)" in rendered(difference(unknown, ended))


def test_tiny_probabilities_and_broken_ones_have_a_row() -> None:
    top = (choice(1, "a", math.inf), choice(2, "b", -30.0), choice(3, "c", -math.inf))
    report = rendered(difference(answer("one", top=top, chosen=top[0]), answer("two", top=top, chosen=top[0])))
    assert report.count("100.0 %") == 2
    assert report.count("<0.1 %") == 4


def test_recordings_are_rendered_with_their_real_divergences() -> None:
    found = summary().prompts
    report = rendered(*found)
    assert report.startswith(
        "4 prompts: 1 the same, 3 differ (1 in where the answer ends, 1 by more than rounding can,"
    )
    assert '► " t90"' in report


# No text breaks the columns -----------------------------------------------------------------------------------------


def wide_enough(report: str, width: int) -> bool:
    return all(cell_len(line) <= width for line in report.split("\n"))


@given(texts=st.lists(HOSTILE, min_size=6, max_size=6), width=st.integers(0, 140), whole=st.booleans())
def test_no_line_is_wider_than_the_terminal_and_nothing_unprintable_is_printed(
    texts: Sequence[str], width: int, whole: bool
) -> None:
    prompt, shared, ours, theirs, token, id_ = texts
    top = (choice(5, token, -1.0), choice(999_999, None, math.nan))
    sides = [answer(shared * 3 + text, top=top, chosen=top[0]) for text in (ours, theirs)]
    found = difference(*sides, prompt=prompt, id=id_)
    report = sidebyside.render([found], reference=token, candidate=ours, width=width, most=1, whole=whole)
    assert wide_enough(report, max(width, sidebyside.NARROWEST))
    assert all(line.isprintable() for line in report.split("\n"))
    report.encode()


@given(
    shared=st.text("ab漢字ﾜe\u0301👩", max_size=300),
    ours=st.text("xy漢\u0301\t", max_size=300),
    theirs=st.text("zw字\u0301\x1b", max_size=300),
    width=st.integers(80, 130),
)
def test_a_whole_text_loses_no_character(shared: str, ours: str, theirs: str, width: int) -> None:
    found = difference(answer(f"{shared}1{ours}"), answer(f"{shared}2{theirs}"))
    columns = body(rendered(found, width=width, whole=True))
    for text, column in zip((f"1{ours}", f"2{theirs}"), columns, strict=True):
        assert "".join(column) == f"{visible(shared)}►{visible(text)}"


@given(text=st.text("ab c漢", max_size=200), width=st.integers(80, 100))
def test_only_spaces_at_the_end_of_a_line_are_not_shown(text: str, width: int) -> None:
    left, _ = body(rendered(difference(answer(f"é{text}é"), answer("ü")), width=width, whole=True))
    assert "".join("".join(left).split()) == "►" + "".join(f"é{text}é".split())


def test_words_are_kept_whole_where_they_fit() -> None:
    left, _ = body(rendered(difference(answer("word " * 40), answer("other"))))
    assert all(set(line.replace("►", "").split()) == {"word"} for line in left)


def test_accents_stay_with_their_letters() -> None:
    text = "e\u0301" * 200
    left, _ = body(rendered(difference(answer(text), answer("")), whole=True))
    assert not any(line.startswith("\u0301") for line in left)


def test_most_below_zero_shows_none() -> None:
    assert "1 more prompt is not shown" in rendered(difference(), most=-1)
