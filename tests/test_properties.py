"""Drawing examples and shrinking failing ones, on an engine without a model."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import properties
from parity.errors import ConfigError
from parity.laws import Role
from parity.prompts import Workload
from parity.properties import Example
from parity.recording import Recording
from parity.verdict import Finding, Outcome, Verdict
from toy_laws import Fault, ToyEngine

DRAWN = properties.draw(48, seed=1)
PLAIN = Example(prompt="a", chat=False, short=1, long=2, min_tokens=0, stop=("e",), temperature=1.0, top_k=2, seed=0)


def searched(engine: ToyEngine, *, count: int = 20, can_stream: bool = True) -> Verdict:
    return properties.search(engine.ask, count=count, seed=1, can_stream=can_stream, noise=None)


def failures(verdict: Verdict) -> dict[str, Finding]:
    return {f.metric: f for f in verdict.findings if f.outcome is Outcome.FAIL}


def has_a_digit(prompt: str) -> bool:
    return any(character.isdigit() for character in prompt)


# Drawing ------------------------------------------------------------------------------------------------------------


def test_one_seed_draws_the_same_examples_and_another_seed_others() -> None:
    assert len(set(DRAWN)) == 48
    assert properties.draw(48, seed=1) == DRAWN
    assert not set(properties.draw(48, seed=2)) & set(DRAWN)


def test_fewer_examples_are_the_beginning_of_more() -> None:
    assert properties.draw(5, seed=1) == DRAWN[:5]
    assert properties.draw(0, seed=1) == ()


def test_what_else_is_loaded_does_not_change_the_draw() -> None:
    """Hypothesis mixes constants of loaded modules into what it generates; here no test module is loaded."""
    code = "from parity import properties; print(ascii(properties.draw(48, seed=1)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii(DRAWN)


def test_examples_are_of_every_kind() -> None:
    examples = properties.draw(120, seed=3)
    prompts = [e.prompt for e in examples]
    assert {e.chat for e in examples} == {True, False}
    assert all(e.prompt or e.chat for e in examples)
    assert sum(not p for p in prompts) > 1
    assert sum(p.isspace() for p in prompts) > 1
    assert sum("<|im_start|>" in p for p in prompts) > 1
    assert sum(has_a_digit(p) for p in prompts) > 5
    assert sum(not p.isascii() for p in prompts) > 20
    assert 1 < sum(len(p.encode()) > 500 for p in prompts) < 20
    assert max(len(p.encode()) for p in prompts) <= 1200, "so that no tokenizer makes more than 1,200 tokens of one"
    assert max(e.long for e in examples) == properties.LONGEST


def test_without_hypothesis_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ConfigError, match=r"pip install 'engine-parity\[properties\]'"):
        properties.draw(1, seed=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"short": 0},
        {"short": 2},
        {"min_tokens": 3},
        {"stop": ()},
        {"stop": ("",)},
        {"top_k": 1},
        {"temperature": 0.0},
    ],
)
def test_an_example_that_no_engine_could_answer_rightly_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        replace(PLAIN, **changes)  # type: ignore[arg-type]


# Asking -------------------------------------------------------------------------------------------------------------


def test_a_workload_asks_every_example_in_every_way() -> None:
    asked = properties.workload(DRAWN, can_stream=True)
    assert [r.id for r in asked.requests if r.id.startswith("007:")] == [f"007:{role.value}" for role in Role]
    assert len(asked.requests) == len(DRAWN) * len(Role)
    assert [r.id for r in asked.requests if r.stream] == [f"{n:03}:stream" for n in range(48)]
    plain = {r.id: r for r in properties.workload(DRAWN, can_stream=False).requests}
    assert len(plain) == len(DRAWN) * (len(Role) - 1)
    assert not any(r.stream for r in plain.values())


def test_all_requests_of_a_workload_ask_for_equally_many_log_probabilities() -> None:
    assert {r.sampling.logprobs for r in properties.workload(DRAWN, can_stream=True).requests} == {20}


def test_seeds_and_neighbours_come_in_small_turns() -> None:
    """Prompts with seeds must not be cut in two: vLLM on a CPU ends with an error where one is."""
    turns: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for request in properties.workload(properties.draw(60, seed=3), can_stream=True).requests:
        turns.setdefault(request.turn, []).append(request.id)
        text = request.prompt.text or "".join(m.content for m in request.prompt.messages or ())
        sizes[request.turn] = sizes.get(request.turn, 0) + len(text.encode())
        apart = request.id.partition(":")[2] in ("alone", "seeded", "seeded-again")
        assert apart == (request.turn > 0)
        assert request.sampling.is_greedy or request.sampling.seed is None or apart
    assert 8 < max(len(ids) for turn, ids in turns.items() if turn) <= 16
    assert max(size for turn, size in sizes.items() if turn) <= 2000
    assert all(len({i.partition(":")[2] for i in ids}) == 1 for turn, ids in turns.items() if turn)


# Searching ----------------------------------------------------------------------------------------------------------


def test_a_correct_engine_passes_and_is_asked_once() -> None:
    engine = ToyEngine()
    verdict = searched(engine, count=64)
    assert verdict.outcome is Outcome.PASS
    assert verdict.headline == "11 laws kept on 64 examples, 576 answers"
    assert len(engine.asked) == 1
    assert not verdict.causes


def test_an_engine_that_rounds_differently_in_every_batch_passes() -> None:
    rounds = ToyEngine(rounding=0.005)
    assert searched(rounds).outcome is Outcome.PASS
    answers = ToyEngine().ask(rounds.asked[0]).by_id
    assert any(c.token_ids != answers[c.id].token_ids for c in rounds.ask(rounds.asked[0]).completions)


def test_an_engine_that_cannot_stream_is_asked_the_other_laws() -> None:
    verdict = searched(ToyEngine(), can_stream=False)
    assert verdict.outcome is Outcome.PASS
    assert "stream" not in [f.metric for f in verdict.findings]
    assert "not asked, because no request of this workload asks for it: stream" in verdict.warnings


BROKEN_LAWS = {
    Fault.PROMPT_CUT: {"input tokens"},
    Fault.ONE_TOKEN_MORE: {"ends"},
    Fault.LENGTH_TOO_EARLY: {"ends", "max_tokens"},
    Fault.SPACES_LOST: {"text and tokens", "stop strings"},
    Fault.LOGITS: {"numbers"},
    Fault.MAX_TOKENS_STEERS: {"max_tokens"},
    Fault.MIN_TOKENS_IGNORED: {"min_tokens"},
    Fault.STOP_IGNORED: {"stop strings"},
    Fault.STOP_KEPT: {"stop strings"},
    Fault.STREAMED_TOKEN_BY_TOKEN: {"text and tokens", "stream"},
    Fault.NEIGHBOUR_LEAKS: {"neighbours"},
    Fault.TOP_K_IGNORED: {"top_k 1"},
    Fault.SEED_IGNORED: {"seed"},
}


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name)
def test_each_fault_breaks_its_law_and_no_other_and_is_shrunk(fault: Fault) -> None:
    engine = ToyEngine(fault=fault, hits=lambda prompt: "<" not in prompt)
    verdict = searched(engine)
    found = failures(verdict)
    assert found.keys() == BROKEN_LAWS[fault]
    assert len(verdict.causes) == len(found)
    assert len(engine.asked) <= 5
    for finding in found.values():
        *witnesses, minimal, again = finding.evidence
        assert witnesses[0].startswith("example ")
        assert minimal.startswith(
            ("smallest found that breaks it: text ", "smallest found that breaks it: chat message ")
        )
        assert len(minimal) < 180
        assert again == "see it again: parity laws TARGET --seed 1 --examples 20"


@pytest.mark.parametrize("fault", [Fault.PROMPT_CUT, Fault.LOGITS, Fault.NEIGHBOUR_LEAKS, Fault.SEED_IGNORED])
def test_a_fault_that_only_some_prompts_show_is_shrunk_to_what_shows_it(fault: Fault) -> None:
    (finding,) = failures(searched(ToyEngine(fault=fault, hits=has_a_digit))).values()
    smallest = re.fullmatch(r"smallest found that breaks it: (text|chat message) '\d'; (.*)", finding.evidence[-2])
    assert smallest is not None, finding.evidence
    assert re.fullmatch(
        r"max_tokens [23] and 1, min_tokens 0, stop \['[^']+'\], temperature 1, top_k 2, seed 0", smallest[2]
    )


def test_all_broken_laws_are_shrunk_in_the_same_batches() -> None:
    """Each batch may be a start of the engine."""
    engine = ToyEngine(fault=Fault.LENGTH_TOO_EARLY, hits=lambda prompt: "\u00e9" not in prompt)
    assert len(failures(searched(engine))) == 2
    assert len(engine.asked) <= 5


# Shrinking ----------------------------------------------------------------------------------------------------------


LONG = replace(
    PLAIN,
    prompt="The quick brown fox jumps over the lazy dog. " * 10 + "[INST]" + "\u0301 0123 \n" * 40,
    chat=True,
    short=9,
    long=20,
    min_tokens=12,
    stop=("the", "in", "."),
    temperature=0.3,
    top_k=7,
    seed=12345,
)


@pytest.mark.parametrize(
    ("breaks", "smallest"),
    [
        (lambda e: "[INST]" in e.prompt, replace(PLAIN, prompt="[INST]", stop=("the",))),
        (lambda e: "\u0301" in e.prompt, replace(PLAIN, prompt="\u0301", stop=("the",))),
        (lambda e: e.chat, replace(PLAIN, prompt="", chat=True, stop=("the",))),
        (lambda e: e.stop != ("the",) and "in" in e.stop, replace(PLAIN, prompt="", chat=True, stop=("in",))),
    ],
    ids=["special piece", "combining mark", "chat", "stop string"],
)
def test_shrinking_finds_the_part_that_breaks(breaks: object, smallest: Example) -> None:
    assert callable(breaks)
    found = properties.shrink(LONG, lambda proposals: [breaks(e) for e in proposals])
    assert (found.prompt, found.chat) == (smallest.prompt, smallest.chat)
    assert set(found.stop) >= set(smallest.stop) & {"in"}


def test_shrinking_a_fault_of_long_prompts_ends_near_the_shortest() -> None:
    found = properties.shrink(LONG, lambda proposals: [len(e.prompt) >= 100 for e in proposals])
    assert 100 <= len(found.prompt) < 200
    assert found.prompt.isascii()


def test_shrinking_asks_at_most_as_often_as_it_may() -> None:
    batches: list[Sequence[Example]] = []

    def long_ones_break(proposals: Sequence[Example]) -> list[bool]:
        batches.append(proposals)
        return [len(e.prompt) > 300 for e in proposals]

    properties.shrink(LONG, long_ones_break, rounds=2)
    assert len(batches) == 2
    assert len(batches[0]) < 80, "one batch must stay a batch"


def test_shrinking_stops_where_nothing_smaller_breaks() -> None:
    batches: list[Sequence[Example]] = []

    def none_breaks(proposals: Sequence[Example]) -> list[bool]:
        batches.append(proposals)
        return [False] * len(proposals)

    assert properties.shrink(LONG, none_breaks) == LONG
    assert len(batches) == 1
    assert properties.shrink(replace(PLAIN, prompt="", chat=True), none_breaks).prompt == ""


@given(st.sampled_from(DRAWN), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_a_shrunk_example_still_breaks_and_is_never_larger(example: Example, salt: int) -> None:
    def breaks(proposals: Sequence[Example]) -> list[bool]:
        return [e == example or hash((e.prompt, e.long, salt)) % 3 == 0 for e in proposals]

    found = properties.shrink(example, breaks)
    assert breaks([found]) == [True]
    assert len(found.prompt) <= len(example.prompt)


def test_an_engine_that_fails_while_shrinking_is_not_hidden() -> None:
    engine = ToyEngine(fault=Fault.LOGITS)

    def ask(workload: Workload) -> Recording:
        if engine.asked:
            raise RuntimeError("the engine is gone")
        return engine.ask(workload)

    with pytest.raises(RuntimeError, match="the engine is gone"):
        properties.search(ask, count=16, seed=1, can_stream=True, noise=None)
