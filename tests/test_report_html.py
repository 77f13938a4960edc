"""The HTML report: nothing in it can break out or get lost, nothing is loaded, every summary renders."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import cycle, pairwise
from unittest import mock
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import charts
from parity.decision import Advice, Decision
from parity.diagnose import Confidence, Diagnosis
from parity.differences import Choice, PromptDifference
from parity.divergence import Kind
from parity.fingerprint import Difference
from parity.reports import html
from parity.summary import Effect, PositionBin, Side, Summary
from parity.verdict import Finding, Outcome, Verdict
from report_cases import HOSTILE, answer, choice, difference, identical, recovery, summary

EFFECT = Effect(check="lockstep", metric="KL divergence", value=0.5, low=0.25, high=0.75, passed=True)
BIN = PositionBin(start=0, stop=8, prompts=3, mean_nats=1e-3, error_nats=1e-4, floor_nats=2e-3)
MEASURED = {"effects": (EFFECT,), "kl_by_position": (BIN,)}

VOID = {"meta", "link", "input", "br"}
OPTIONAL_END = {"tr", "td"}
ATTRIBUTES = {
    "aria-label", "autocomplete", "charset", "class", "content", "dir", "hidden", "href", "http-equiv", "id", "lang",
    "name", "open", "rel", "role", "scope", "spellcheck", "title", "type",
}  # fmt: skip
TAGS = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "main", "section", "nav", "h1", "h2", "h3",
    "h4", "p", "b", "i", "small", "span", "mark", "code", "a", "ul", "li", "dl", "dt", "dd", "div", "table", "caption",
    "thead", "tbody", "tr", "th", "td", "details", "summary", "label", "input", "script",
}  # fmt: skip
SIGNS = {"␣": " ", "↵": "\n", "⇥": "\t", "␡": "\x7f"} | {chr(0x2400 + code): chr(code) for code in range(0x20)}


class Page(HTMLParser):
    """A page as a browser takes it: elements, attributes, and the text with its signs turned back."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.answers: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag in OPTIONAL_END and any(t == tag for t, _ in self._open[-2:]):
            while self._open.pop()[0] != tag:
                pass
        if tag not in VOID:
            kind = dict(attrs).get("class") or ""
            self._open.append((tag, kind))
            if kind == "text":
                self.answers.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open[-1][0] != tag and self._open[-1][0] in OPTIONAL_END:
            self._open.pop()
        assert self._open, f"{tag} closes nothing"
        assert self._open[-1][0] == tag, f"{tag} closes {self._open[-1]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = [kind for _, kind in self._open]
        if self._open and self._open[-1][0] == "i":
            data = chr(int(f"0x{data[2:]}", 0)) if data.startswith("U+") else "".join(SIGNS[sign] for sign in data)
        self.pieces.append(data)
        if "text" in inside and "ends" not in inside and "summary" not in [t for t, _ in self._open]:
            self.answers[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@contextmanager
def without_charts() -> Iterator[None]:
    with mock.patch.object(charts, "available", return_value=False):
        yield


def rendered(**changes: object) -> Page:
    with without_charts():
        return Page(html.render(summary(**changes)))


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# Hostile text -------------------------------------------------------------------------------------------------------


def hostile(texts: list[str]) -> tuple[Summary, list[str]]:
    """A summary with these texts in turn in every field that is text, each behind a number of its own; and those."""
    take = cycle(texts)
    used: list[str] = []

    def text() -> str:
        used.append(f"({len(used)}){next(take)}")
        return used[-1]

    def changed() -> tuple[Difference, ...]:
        return (Difference(name=text(), reference=text(), candidate=None),)

    finding = Finding(
        metric=text(),
        outcome=Outcome.FAIL,
        sentence=text(),
        unit="prompts",
        reference=None,
        candidate=1.0,
        delta=None,
        interval=None,
        limit=text(),
        n=1,
        evidence=(text(),),
    )
    verdict = Verdict(
        check=text(),
        reference=text(),
        candidate=text(),
        outcome=Outcome.FAIL,
        headline=text(),
        findings=(finding,),
        causes=(text(),),
        changed=changed(),
        warnings=(text(),),
        basis=(text(),),
    )
    top = (choice(7, text(), -0.5), choice(8, text(), math.nan))
    ours, theirs = (answer(text(), chosen=c, top=top) for c in top)
    found = Summary(
        title=text(),
        created_at=text(),
        decision=Decision(advice=Advice.HOLD, sentence=text(), evidence=(text(),)),
        reference=Side(label=text(), created_at=text(), facts={text(): text()}),
        candidate=Side(label=text(), created_at=text(), facts={text(): text()}),
        verdicts=(verdict,),
        diagnosis=Diagnosis(confidence=Confidence.LIKELY, sentence=text(), evidence=(text(),)),
        effects=(replace(EFFECT, check=text(), metric=text()),),
        first_divergences=(1,),
        kl_by_position=(BIN,),
        prompts=(difference(ours, theirs, id=text(), prompt=text()), identical(text())),
        packages=changed(),
        facts=changed(),
        recovery=recovery(text()),
        reproduce=(text(),),
    )
    return found, used


@settings(max_examples=25)
@given(texts=st.lists(HOSTILE, min_size=7, max_size=7))
def test_any_text_in_any_field_is_kept_and_stays_text(texts: list[str]) -> None:
    found, used = hostile(texts)
    with without_charts():
        written = html.render(found)
    written.encode("utf-8")  # lone surrogates too
    page = Page(written)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= ATTRIBUTES
    assert len(page.all("script")) == 1
    assert not [c for c in written if ord(c) < 0x20 and c not in "\n\t"]
    assert [text for text in used if text not in page.text] == []


@settings(max_examples=100)
@given(text=HOSTILE)
def test_texts_are_kept_to_the_character(text: str) -> None:
    shown = difference(answer(text), answer(f"{text}and on"), prompt=text)
    page = rendered(prompts=(shown, replace(identical(text), prompt=text)))
    assert page.answers == [text, text, f"{text}and on", text, text]


def test_what_shows_nothing_is_shown() -> None:
    page = html.visible("a\x00b\u202ec\ud800\u2028\x85<\x7f\t\n")
    assert page == ("a<i>␀</i>b<i>U+202E</i>c<i>U+D800</i><i>U+2028</i><i>U+0085</i>&lt;<i>␡</i>\t\n")


def test_joiners_and_accents_stay_as_they_are() -> None:
    for text in ("👩\u200d🔬", "e\u0301", "\u0645\u06cc\u200c\u062e", "\u00a0"):
        assert html.visible(text) == text


@pytest.mark.parametrize("common", [0, 10, 5_000, 50_000, 99_990, 100_000])
def test_a_long_text_is_folded_around_its_divergence_and_never_lost(common: int) -> None:
    text = "".join(chr(0x4E00 + n % 20_000) for n in range(100_000))
    page = rendered(prompts=(difference(answer(text), answer(text[:common] + "!"), prompt=text),))
    assert page.answers == [text, text, text[:common] + "!"]
    with without_charts():
        written = html.render(summary(prompts=(difference(answer(text), answer(text[:common] + "!")),)))
    unfolded = re.sub(r"<details><summary>[^<]*</summary>.*?</details>", "", written, flags=re.DOTALL)
    assert len(unfolded) < 60_000
    if 0 < common < len(text):
        assert f"{text[common - 1]}<mark>{text[common]}" in unfolded


def test_the_part_of_its_own_is_marked_from_the_exact_character_on() -> None:
    with without_charts():
        written = html.render(summary(prompts=(difference(answer("one <two"), answer("one <three")),)))
    assert "one &lt;t<mark>wo</mark></div>" in written
    assert "one &lt;t<mark>hree</mark></div>" in written


# What is shown ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advice", list(Advice))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"verdicts": ()},
        {"prompts": (), "first_divergences": ()},
        {"diagnosis": None, "reproduce": (), "packages": (), "facts": ()},
        {"effects": (EFFECT, replace(EFFECT, low=None, high=None, passed=False))},
        {"kl_by_position": (BIN, replace(BIN, start=8, stop=16, error_nats=None, floor_nats=None, mean_nats=math.nan))},
    ],
)
def test_every_summary_renders_with_its_decision_first(advice: Advice, changes: dict[str, object]) -> None:
    decision = Decision(advice=advice, sentence="this is why", evidence=("first", "second"))
    page = rendered(decision=decision, **changes)
    body = page.text[page.text.index("Dated") :]
    assert re.match(rf"Dated \S+\s+{advice.value}\s+(The|It) [a-z' ]+: this is why\.\s+first\s+second\s", body)


def test_the_table_of_what_is_kept_has_a_row_for_all_tasks_and_one_a_task() -> None:
    page = rendered()
    assert (
        flat(page.text).count(
            "taskdocumentsreferencecandidaterecoveryrangelostwon "
            "all tasks1200.75000.700093.33 %85.0 to 101.0 %41 "
            "parity_facts600.75000.700093.33 %85.0 to 101.0 %41 "
            "parity_facts 2600.00000.700001 "
        )
        == 1
    )
    assert "90 % sure" in page.text
    assert (
        "How far the candidate's probabilities moved, on 500 tokens of the reference: KL divergence 0.01" in page.text
    )
    assert "Nothing was measured" not in page.text


def test_one_task_is_all_tasks() -> None:
    two = recovery()
    page = rendered(recovery=replace(two, tasks=two.tasks[:1], moved=None))
    assert "parity_facts600.7500" in page.text
    assert "all tasks" not in page.text
    assert "probabilities moved" not in page.text


def test_without_scored_documents_there_is_no_such_table() -> None:
    page = rendered(recovery=None, first_divergences=())
    assert "How much accuracy is kept?" not in page.text
    assert "Nothing was measured" in page.text


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_of_difference_has_its_words(kind: Kind) -> None:
    page = rendered(prompts=(difference(kind=kind, position=None if kind is Kind.IDENTICAL else 1),))
    word = "same tokens, other text" if kind is Kind.IDENTICAL else html._KINDS[kind][0]
    assert word in page.text


@pytest.mark.parametrize("confidence", list(Confidence))
def test_a_cause_says_how_sure_it_is(confidence: Confidence) -> None:
    page = rendered(diagnosis=Diagnosis(confidence=confidence, sentence="a wrong mask", evidence=()))
    assert f"A wrong mask.\nHow sure: {confidence.value}: " in page.text


def test_a_check_that_did_not_pass_is_unfolded() -> None:
    (failed,) = summary().verdicts
    passed = replace(failed, outcome=Outcome.PASS, check="shape")
    page = rendered(verdicts=(failed, passed))
    assert ["open" in each for each in page.all("details") if each.get("class") == "check"] == [True, False]


def test_what_differs_between_the_sides_is_marked() -> None:
    ours = Side(label="one", created_at="now", facts={"engine": "vllm", "version": "1"})
    page = rendered(reference=ours, candidate=replace(ours, facts={"engine": "vllm", "version": "2", "driver": "570"}))
    rows = [each for each in page.all("tr") if each.get("class") == "differs"]
    assert len(rows) == 2
    assert "version ≠12" in page.text
    assert "driver ≠not known570" in page.text


def test_packages_that_changed_come_before_those_of_one_side() -> None:
    page = rendered(
        packages=(
            Difference(name="added", reference=None, candidate="1"),
            Difference(name="vllm", reference="1", candidate="2"),
        )
    )
    text = flat(page.text)
    assert text.index("1 package changed version") < text.index("vllm12") < text.index("1 package in one environment")
    assert "addednone1" in text


def rows_of(prompt: PromptDifference) -> list[str]:
    page = rendered(prompts=(prompt,))
    written = flat(page.text)
    return re.findall(r"What the (?:reference|candidate) found most probable (.*?)(?=What the|Run it again)", written)


def test_a_token_is_shown_as_text_and_the_chosen_one_marked() -> None:
    ours, theirs = rows_of(difference())
    assert ours.startswith("tokenidprobabilitynats two (chosen)760.7 %-0.500 three836.8 %-1.000 token 995.0 %-3.000")
    assert theirs.startswith("tokenidprobabilitynats two760.7 %-0.500 three (chosen)836.8 %-1.000")


def test_a_chosen_token_outside_the_top_k_is_listed_too() -> None:
    lost = choice(55, "lost", -9.0)
    ours, _ = rows_of(difference(answer(chosen=lost)))
    assert "lost (chosen)55< 0.1 %-9.000" in ours


def test_the_less_probable_tokens_are_folded_and_kept() -> None:
    top = tuple(choice(n, f"t{n}", -1.0 - n) for n in range(20))
    ours, _ = rows_of(difference(answer(chosen=top[9], top=top)))
    assert "14 less probable tokens" in ours
    assert [int(n) for n in re.findall(r"t(\d+)(?: \(chosen\))?\d", ours.replace("tokens", ""))] != []
    assert "t9 (chosen)9" in ours
    assert ours.count("(chosen)") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "<code><i>␣</i>the</code>"),
        ("a b", "<code>a b</code>"),
        ("\n", "<code><i>↵</i></code>"),
        ("\n  x ", "<code><i>↵</i>  x<i>␣</i></code>"),
        ("", "<small>(no text)</small>"),
        (None, "token 7"),
        ("<b>", "<code>&lt;b&gt;</code>"),
    ],
)
def test_spaces_at_the_ends_of_a_token_are_shown(text: str | None, shown: str) -> None:
    assert html._token(Choice(token_id=7, text=text, logprob_nats=-1.0)) == shown


def test_an_answer_that_had_ended_says_so() -> None:
    page = rendered(prompts=(difference(answer(chosen=None, top=())),))
    assert "Then the reference's answer has ended, the candidate three." in flat(page.text)
    assert "The reference's answer had ended before this token." in page.text


def test_without_matplotlib_there_are_tables_and_one_line_says_why() -> None:
    page = rendered(**MEASURED)
    assert page.text.count("matplotlib is not installed") == 1
    assert page.all("svg") == []
    assert "lockstepKL divergence0.50.25 to 0.75yes" in page.text
    assert "0 to 730.0010.00010.002" in page.text


# The page as a whole ------------------------------------------------------------------------------------------------


@cache
def whole() -> str:
    return html.render(summary(**MEASURED))


def test_nothing_is_loaded() -> None:
    written = whole()
    assert "http://" not in written
    assert "https://" not in written
    addresses = re.findall(r"""(?:href|src|srcset|action|data|poster)=["']?([^"'\s>]+)|url\(([^)]*)\)""", written)
    assert addresses
    assert all((one or two).startswith(("#", "data:,")) for one, two in addresses)
    assert "@import" not in written


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    written = whole()
    ids = Counter(re.findall(r'\sid="([^"]+)"', written))
    assert written.count("<svg") == 3
    assert {name: count for name, count in ids.items() if count > 1} == {}
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', written)) <= set(ids)


def test_only_our_own_script_may_run() -> None:
    written = whole()
    (script,) = re.findall(r"<script>(.*?)</script>", written, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in written


def test_a_report_is_the_same_when_written_again() -> None:
    assert html.render(summary(**MEASURED)) == whole()


def test_a_large_report_is_small() -> None:
    top = tuple(choice(30_000 + n, f" token{n}", -0.5 - n) for n in range(20))
    text = "These are sixty-four tokens of an answer. " * 7
    prompts = tuple(
        difference(
            answer(f"{text}one", chosen=top[0], top=top),
            answer(f"{text}two", chosen=top[1], top=top),
            id=f"p-{n:03}",
            prompt="A question of some length. " * 8,
        )
        for n in range(128)
    )
    size = len(html.render(summary(prompts=prompts, **MEASURED)).encode())
    assert size < 1_000_000


# Charts -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_every_divergence_is_in_one_bar(found: list[int]) -> None:
    bars = charts.bars(found)
    assert sum(b.prompts for b in bars) == len(found)
    assert 1 <= len(bars) <= 16
    assert bars[0].start == 0
    assert all(a.stop == b.start and a.stop - a.start == b.stop - b.start for a, b in pairwise(bars))
    assert bars[-1].start <= max(found) < bars[-1].stop


def test_no_divergences_have_no_bars() -> None:
    assert charts.bars([]) == ()


@given(HOSTILE)
def test_any_name_makes_a_short_label_that_xml_can_hold(name: str) -> None:
    label = charts._label(name)
    assert label.isprintable()
    assert len(label) == min(len(name), 44)


def test_a_label_is_text_and_no_markup() -> None:
    svg = charts.effects([replace(EFFECT, check="<script>$x^2$&", metric='id="a" href="#b"')])
    assert [e.text for e in ElementTree.fromstring(svg).iter("text")][-2:] == [
        '<script>$x^2$&: id="a" href="#b"',
        "0.5",
    ]


def test_charts_follow_the_page() -> None:
    passed, failed = EFFECT, replace(EFFECT, check="decode", value=1e9, low=2.0, high=1e10, passed=False)
    drawn = (
        charts.effects([passed, failed]),
        charts.first_divergences(charts.bars([0, 1, 5])),
        charts.kl_by_position([BIN, replace(BIN, start=8, stop=16, mean_nats=1.0)]),
    )
    for svg in drawn:
        assert svg.startswith('<svg viewBox="')
        assert 'role="img" aria-label="' in svg
        assert "currentColor" in svg
        assert not re.search(
            r"#0102|font-family|xmlns|<style|#[0-9a-f]{6}\b(?!\w)", svg.replace('href="#', "").replace("url(#", "")
        )
    assert ">lockstep: KL divergence</text>" in drawn[0]
    assert ">1e+09</text>" in drawn[0]
    assert "var(--bad)" in drawn[0]
    assert "var(--bad)" not in charts.effects([passed])
    assert ">equal tokens before the first difference</text>" in drawn[1]
    assert ">8 to 15</text>" in drawn[2]


@pytest.mark.parametrize(
    "bins",
    [
        [replace(BIN, mean_nats=0.0, error_nats=0.0)],
        [replace(BIN, mean_nats=math.nan, floor_nats=None)],
        [replace(BIN, error_nats=None, floor_nats=None), replace(BIN, start=8, stop=16, mean_nats=5.0)],
    ],
)
def test_positions_without_numbers_can_be_drawn(bins: list[PositionBin]) -> None:
    assert ">nats a token</text>" in charts.kl_by_position(bins)
