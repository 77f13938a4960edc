"""The HTML report in a real browser: opened from disk, in light and dark, on a phone, with and without its script."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.reports import html
from parity.summary import Effect, PositionBin
from report_cases import answer, choice, difference, identical, summary

if TYPE_CHECKING:
    from browser import Browser

_ABSENT = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(_ABSENT), reason=f"not installed: {', '.join(_ABSENT)}; see .ci/browser"),
]

ATTACK = "<script>window.attacked = true</script><img src=x onerror='window.attacked = true'>"
LONG_LINE = "x" * 100_000
PHONE, DESK = (360, 640), (1280, 800)


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="the Python package selenium is not installed")
    from browser import browser  # noqa: PLC0415  needs selenium

    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 prompts that differ and three odd ones."""
    top = tuple(choice(n, f" token{n}", -0.5 - n) for n in range(20))
    prompts = [
        difference(
            answer(f"An answer of some length. {'word ' * 60}one", chosen=top[0], top=top),
            answer(f"An answer of some length. {'word ' * 60}two", chosen=top[1], top=top),
            id=f"p-{n:03}",
            prompt=f"Question number {n}?",
        )
        for n in range(128)
    ]
    prompts += [
        difference(answer(LONG_LINE), answer(LONG_LINE + "!"), id="long"),
        difference(answer(ATTACK), answer("\u202eright to left\u2028 \u0627\u0644"), id="odd", prompt=ATTACK),
        identical("the needle"),
    ]
    effect = Effect(check="lockstep", metric="KL divergence", value=0.5, low=0.25, high=0.75, passed=True)
    place = PositionBin(start=0, stop=8, prompts=3, mean_nats=1e-3, error_nats=1e-4, floor_nats=2e-3)
    found = summary(title=ATTACK, prompts=tuple(prompts), effects=(effect,), kl_by_position=(place,))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html.render(found), "utf-8")
    return path


def shown(tab: Browser) -> list[str]:
    """The ids of the prompts that can be seen."""
    seen = "[...document.querySelectorAll('.prompt')].filter(each => each.offsetHeight)"
    return list(tab.run(f"return {seen}.map(each => each.querySelector('.id').textContent)"))


def test_it_opens_from_disk_without_a_complaint_or_another_request(tab: Browser, page: Path) -> None:
    tab.open(page, size=DESK)
    assert tab.requests() == [page.as_uri()]
    assert tab.complaints() == []
    assert tab.run("return window.attacked") is None
    milliseconds = tab.run("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"{page.stat().st_size / 1e6:.2f} MB loaded in {milliseconds:.0f} ms")  # noqa: T201  shown, not judged


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_decision_is_seen_first(tab: Browser, page: Path, size: tuple[int, int]) -> None:
    tab.open(page, size=size)
    box = tab.run("return document.getElementById('decision').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] < box["bottom"] < size[1]
    assert tab.run("return document.getElementById('decision').innerText") == "HOLD"


def test_a_prompt_is_found_by_its_text_and_unfolded(tab: Browser, page: Path) -> None:
    tab.open(page, size=DESK)
    assert len(shown(tab)) == 131
    tab.type("find-words", "number 77?")
    assert shown(tab) == ["p-077"]
    assert tab.run("return document.getElementById('find-shown').innerText") == "1 of 131 shown"
    answer_is_seen = "return document.querySelectorAll('.prompt')[77].querySelector('.text').checkVisibility()"
    assert not tab.run(answer_is_seen)
    tab.click(".prompt:not([hidden]) > summary")
    assert tab.run(answer_is_seen)


def test_a_prompt_is_found_by_its_id_whatever_the_case(tab: Browser, page: Path) -> None:
    tab.open(page, size=DESK)
    tab.type("find-words", "P-12")
    assert shown(tab) == [f"p-{n}" for n in range(120, 128)]


def test_only_those_that_differ_can_be_asked_for(tab: Browser, page: Path) -> None:
    tab.open(page, size=DESK)
    tab.click("#find-differing")
    assert len(shown(tab)) == 130
    tab.type("find-words", "needle")
    assert shown(tab) == []
    tab.click("#find-differing")
    assert len(shown(tab)) == 1


def test_dark_and_light_differ_also_in_the_charts(tab: Browser, page: Path) -> None:
    looks = {}
    for dark in (False, True):
        tab.open(page, size=DESK, dark=dark)
        looks[dark] = tab.run(
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('svg text')).fill]"
        )
    for light, dark in zip(looks[False], looks[True], strict=True):
        assert light != dark
    assert looks[True][1] == looks[True][2]


@pytest.mark.parametrize("unfolded", [False, True])
def test_a_phone_does_not_scroll_sideways(tab: Browser, page: Path, unfolded: bool) -> None:
    tab.open(page, size=PHONE)
    if unfolded:
        tab.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert tab.run("return document.documentElement.scrollWidth") == PHONE[0]


def test_without_its_script_everything_is_there_but_the_search(tab: Browser, page: Path) -> None:
    tab.open(page, size=DESK, script=False)
    assert not tab.run("return document.getElementById('find').offsetHeight")
    assert len(shown(tab)) == 131


def test_paper_is_white_and_has_no_search(tab: Browser, page: Path) -> None:
    tab.open(page, size=DESK, dark=True, media="print")
    assert tab.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.run("return document.getElementById('find').offsetHeight")
