"""The structured check: answers that follow what was asked pass, each kind of breach fails, cut ones are not judged."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.checks import structured
from parity.checks.structured import Limits, structured_from_json
from parity.errors import ConfigError, IncomparableError
from parity.prompts import Grammar, SamplingParams, Structured
from parity.recording import Completion, FinishReason, Recording
from parity.verdict import Finding, Outcome, Verdict
from recordings import completion, recording, workload

GREEDY = SamplingParams.greedy(max_tokens=96, logprobs=3)
PERSON = {
    "json_schema": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "rows": {"type": "array", "items": {"type": "array", "items": {"enum": [1, 2]}}},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
}
DATE = {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"}
LAND = {"choice": ["Österreich", "Öland", "Ungarn"]}
USUAL: tuple[tuple[Mapping[str, Any], str], ...] = (
    (PERSON, '{"name": "Ilse", "age": 41, "rows": [[1, 2], []]}'),
    (PERSON, '{\n "name": "Ö",\n "age": 0}'),
    (DATE, "1964-05-09"),
    (DATE, "2001-12-31"),
    (LAND, "Öland"),
    (LAND, "Ungarn"),
)


def answer(number: int, text: str, *, cut: bool = False, **changes: object) -> Completion:
    made: Completion = completion(
        f"s-{number:03}",
        text=text,
        k=3,
        **{"terminator": None if cut else 2, **changes},  # type: ignore[arg-type]
    )
    return made


def asked(
    definitions: Sequence[Mapping[str, Any] | Structured | None], sampling: SamplingParams = GREEDY
) -> tuple[SamplingParams, ...]:
    return tuple(
        replace(sampling, structured=structured_from_json(d) if isinstance(d, Mapping) else d) for d in definitions
    )


def side(answers: Sequence[Completion], wanted: Sequence[SamplingParams]) -> Recording:
    made = workload([c.id for c in answers], sampling=wanted[0])
    others = {c.id: s for c, s in zip(answers, wanted, strict=True) if s != wanted[0]}
    return recording(answers, asked=replace(made, others=others))


def usual(*changed: Completion) -> Recording:
    """The usual answers, some of them replaced."""
    by_id = {c.id: c for c in changed}
    answers = [by_id.get(f"s-{n:03}") or answer(n, text) for n, (_, text) in enumerate(USUAL)]
    return side(answers, asked([wanted for wanted, _ in USUAL]))


def judged(candidate: Recording, reference: Recording | None = None) -> Verdict:
    return structured.check(reference, candidate, noise=None, limits=Limits())


def only_failure(verdict: Verdict) -> Finding:
    (finding,) = [f for f in verdict.findings if f.outcome is not Outcome.PASS]
    assert finding.outcome is verdict.outcome is Outcome.FAIL
    return finding


def test_answers_that_follow_what_was_asked_pass_alone_and_against_themselves() -> None:
    for reference in (None, usual()):
        verdict = judged(usual(), reference)
        assert verdict.passed
        assert verdict.headline == (
            "6 answers held against what was asked (2 json_schema, 2 regex, 2 choice): every one follows it"
        )
        assert not any((verdict.causes, verdict.warnings, verdict.findings[0].evidence))
    assert judged(usual()).reference == "what was asked"


def test_other_texts_that_follow_what_was_asked_pass() -> None:
    other = usual(answer(0, '{"age": 7, "name": "Bo"}'), answer(2, "1999-01-01"), answer(4, "Österreich"))
    assert judged(other, usual()).passed


BREACHES = {
    "free text": (0, "The name is Ilse.", "1 answer is no JSON", "the schema does not reach the engine"),
    "ends early": (0, '{"name": "Ilse", "age": 41', "1 answer is no JSON", "to the end"),
    "text after it": (0, '{"name": "Ilse", "age": 41} Done', "1 answer is no JSON", "the schema"),
    "empty": (0, "", "1 answer is no JSON", "the schema"),
    "not a number": (0, '{"name": "Ilse", "age": NaN}', "1 answer is no JSON", "the schema"),
    "deeply nested": (0, "[" * 100_000, "1 answer is no JSON", "the schema"),
    "out of range": (0, '{"name": "Ilse", "age": 121}', "at $.age against maximum 120", "keyword that it ignores"),
    "too long": (0, '{"name": "Ilse Brandt", "age": 1}', "at $.name against maxLength 8", "keyword that it ignores"),
    "other type": (0, '{"name": "Ilse", "age": "41"}', "at $.age against type 'integer'", "keyword that it ignores"),
    "missing key": (0, '{"name": "Ilse"}', "at $ against required ['name', 'age']", "keyword that it ignores"),
    "other key": (0, '{"name": "I", "age": 1, "x": 1}', "at $ against additionalProperties False", "keyword"),
    "nested enum": (0, '{"name": "I", "age": 1, "rows": [[1, 3]]}', "at $.rows[0][1] against enum [1, 2]", "keyword"),
    "other shape": (2, "9 May 1964", "1 answer is no match of its regular expression", "the regular expression does"),
    "more than a match": (2, "1964-05-09.", "1 answer is no match", "the regular expression does not reach"),
    "line end": (2, "1964-05-09\n", "1 answer is no match", "the regular expression does not reach"),
    "other choice": (4, "Ungarn.", "1 answer is none of its choices", "the list of choices does not reach"),
    "half a choice": (4, "Öl", "1 answer is none of its choices", "the list of choices does not reach"),
}


@pytest.mark.parametrize(("number", "text", "words", "cause"), BREACHES.values(), ids=BREACHES)
def test_one_breach_fails_with_witness_and_cause(number: int, text: str, words: str, cause: str) -> None:
    verdict = judged(usual(answer(number, text)))
    finding = only_failure(verdict)
    (witness,) = finding.evidence
    assert witness.startswith(f"s-{number:03}, {next(iter(USUAL[number][0]))}, 3 tokens, stop: ")
    assert words in f"{finding.sentence} {witness}"
    (named,) = verdict.causes
    assert cause in named
    assert finding.sentence in verdict.headline


def test_an_answer_that_the_engine_gave_up_fails() -> None:
    verdict = judged(usual(answer(2, "", finish_reason=FinishReason.ABORT, terminator=None)))
    assert "1 answer is given up by the engine" in only_failure(verdict).sentence
    assert "cannot use" in verdict.causes[0]


@pytest.mark.parametrize(
    "cut",
    [
        answer(0, '{"name": "Il', cut=True),
        answer(2, "1964-", cut=True),
        answer(4, "Ö", cut=True),
        answer(4, "Öl\ufffd", cut=True),
        answer(4, "", cut=True),
        answer(2, "1964", terminator=None, finish_reason=FinishReason.STOP, stop_reason="-"),
        answer(2, "1964", terminator=77),
    ],
    ids=["json", "regex", "choice", "half a character", "nothing yet", "stop string", "stop token"],
)
def test_a_cut_answer_is_counted_and_not_judged_as_a_whole(cut: Completion) -> None:
    made = usual(cut)
    sampling = {i: replace(made.workload.sampling_of(i), stop=("-",), stop_token_ids=(77,)) for i in made.by_id}
    made = replace(made, workload=replace(made.workload, others=sampling))
    verdict = judged(made)
    assert verdict.passed
    assert verdict.findings[-1].sentence == (
        "5 of 6 answers ended by themselves, 1 cut by a limit and not judged as a whole"
    )
    assert verdict.findings[0].n == 5


def test_a_cut_choice_that_begins_none_of_the_choices_fails() -> None:
    verdict = judged(usual(answer(4, "I think", cut=True)))
    finding = only_failure(verdict)
    assert "1 answer is cut, and the beginning of none of its choices" in finding.sentence
    assert finding.n == 6


def test_too_few_complete_answers_can_fail_and_not_pass() -> None:
    cuts = [answer(n, "", cut=True) for n in range(6)]
    verdict = judged(usual(*cuts))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "0 of 6 answers ended by themselves, 6 cut by a limit" in verdict.headline
    assert "at least 4 must end; raise max_tokens" in verdict.headline
    assert verdict.findings[-1].evidence[0] == "s-000, json_schema, 3 tokens, length: not ended; ''"
    assert judged(usual(*cuts[:2])).passed
    assert judged(usual(*cuts[:3])).outcome is Outcome.INCONCLUSIVE
    assert judged(usual(*cuts[:3], answer(5, "Graz"))).outcome is Outcome.FAIL
    assert judged(side([answer(0, "Öland")], asked([LAND]))).outcome is Outcome.INCONCLUSIVE


# Beside a reference --------------------------------------------------------------------------------------------------


def test_the_references_own_breaches_only_warn() -> None:
    verdict = judged(usual(), usual(answer(2, "9 May")))
    assert verdict.passed
    (warning,) = verdict.warnings
    assert "the reference itself breaks what was asked, 1 answer is no match" in warning
    assert "s-002" in warning
    assert (verdict.findings[0].reference, verdict.findings[0].delta) == (1.0, -1.0)


def many(cut: int, *, n: int = 20) -> Recording:
    return side([answer(i, "Ö" if i < cut else "Öland", cut=i < cut) for i in range(n)], asked([LAND] * n))


def test_a_candidate_that_no_longer_comes_to_an_end_fails() -> None:
    """Two-sided, 12 of 12 discordant prompts: 2 * 0.5^12 = 0.00049; 11 are 0.00098."""
    verdict = judged(many(12), many(0))
    finding = only_failure(verdict)
    assert finding.metric == "answers that come to an end"
    assert "20 of 20 answers end by themselves in the reference, 8 in the candidate; 12 only in the" in finding.sentence
    assert len(finding.evidence) == 3
    assert "do not come to an end" in verdict.causes[0]
    assert judged(many(11), many(0)).passed
    assert judged(many(0), many(12)).passed
    assert judged(many(12), many(12)).passed


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_refused() -> None:
    free = side([answer(n, "x") for n in range(2)], asked([LAND, None]))
    with pytest.raises(IncomparableError, match="prompt 's-001' leaves its answer free"):
        judged(free)
    forced = workload(["s-000"], sampling=asked([LAND])[0], forced_from="f" * 64)
    with pytest.raises(IncomparableError, match="scores given tokens"):
        judged(recording([answer(0, "Öland")], asked=forced))
    with pytest.raises(IncomparableError, match="answered only by the candidate"):
        judged(many(0), many(0, n=19))


WRONG = {
    "schema": (Grammar.JSON_SCHEMA, '{"type": "strin"}', r"prompt 's-000': the JSON schema is wrong at \$\.type"),
    "pattern": (Grammar.JSON_SCHEMA, '{"pattern": "("}', r"prompt 's-000': the JSON schema is wrong at \$\.pattern"),
    "no object": (Grammar.JSON_SCHEMA, "3", "prompt 's-000': the JSON schema '3' is no object"),
    "no JSON": (Grammar.JSON_SCHEMA, "{", "prompt 's-000': the json_schema '{' is no JSON"),
    "elsewhere": (Grammar.JSON_SCHEMA, '{"$ref": "http://localhost:9/a"}', "prompt 's-000': .* refers to what it does"),
    "nowhere": (Grammar.JSON_SCHEMA, '{"$ref": "#/a"}', "prompt 's-000': the JSON schema refers to what it does not"),
    "itself": (Grammar.JSON_SCHEMA, '{"$ref": "#"}', "prompt 's-000': the JSON schema refers to .* or to itself"),
    "regex": (Grammar.REGEX, "(", "prompt 's-000': the regular expression '\\(' is wrong: missing"),
    "choice": (Grammar.CHOICE, "[]", r"prompt 's-000': the choice '\[\]' is no list of at least one string"),
    "choices": (Grammar.CHOICE, '"ab"', "prompt 's-000': the choice '\"ab\"' is no list of at least one string"),
}


@pytest.mark.parametrize(("grammar", "definition", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_definition_names_its_prompt(grammar: Grammar, definition: str, words: str) -> None:
    wrong = Structured(grammar=grammar, definition=definition)
    with pytest.raises(ConfigError, match=words):
        judged(side([answer(0, '"a"')], asked([wrong])))


def test_a_schema_elsewhere_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[object] = []
    monkeypatch.setattr(urllib.request, "urlopen", asked_for.append)
    elsewhere = Structured(grammar=Grammar.JSON_SCHEMA, definition='{"$ref": "http://localhost:9/a"}')
    with pytest.raises(ConfigError, match="refers to what it does not hold"):
        judged(side([answer(0, "1")], asked([elsewhere])))
    assert not asked_for


def test_the_formats_of_a_schema_are_not_checked_and_its_dialect_is() -> None:
    format_only = {"json_schema": {"type": "string", "format": "date"}}
    old = {
        "json_schema": {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}
    }
    texts = ['"no date"', "2", "1", "0"]
    assert judged(side([answer(n, t) for n, t in enumerate(texts)], asked([format_only, old, old, old]))).passed
    assert judged(side([answer(0, "3")], asked([old]))).outcome is Outcome.FAIL


# What a prompt set says ----------------------------------------------------------------------------------------------


def test_a_definition_is_read_with_its_order_and_its_letters() -> None:
    read = structured_from_json({"json_schema": {"properties": {"z": {}, "ä": {}}}})
    assert read == Structured(grammar=Grammar.JSON_SCHEMA, definition='{"properties": {"z": {}, "ä": {}}}')
    assert structured_from_json(DATE) == Structured(grammar=Grammar.REGEX, definition=DATE["regex"])
    assert structured_from_json(LAND) == Structured(
        grammar=Grammar.CHOICE, definition='["Österreich", "Öland", "Ungarn"]'
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "an object with one of the keys json_schema, regex, choice, not {}"),
        ({"regexp": "a"}, "an object with one of the keys"),
        ({"regex": "a", "choice": ["a"]}, "an object with one of the keys"),
        (["regex"], "an object with one of the keys"),
        ({"regex": ["a"]}, "'regex' must be a string, not \\['a'\\]"),
        ({"choice": "ab"}, "'choice' must be a list of at least one string, not 'ab'"),
        ({"choice": []}, "'choice' must be a list of at least one string"),
        ({"choice": [1]}, "'choice' must be a list of at least one string"),
        ({"json_schema": "{}"}, "'json_schema' must be an object, not '{}'"),
        ({"json_schema": {"type": "strin"}}, "the JSON schema is wrong"),
        ({"regex": "("}, "the regular expression '\\(' is wrong"),
    ],
)
def test_a_wrong_key_or_value_is_named(data: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        structured_from_json(data)


@given(choices=st.lists(st.text(max_size=6), min_size=1, max_size=4), data=st.data())
def test_every_choice_and_every_beginning_of_one_passes(choices: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(choices), min_size=4, max_size=4))
    cut = data.draw(st.sampled_from(choices))
    beginning = cut[: data.draw(st.integers(0, len(cut)))]
    answers = [*(answer(n, text) for n, text in enumerate(chosen)), answer(4, beginning, cut=True)]
    assert judged(side(answers, asked([{"choice": choices}] * 5))).passed


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
)


@given(values=st.lists(JSON_VALUES, min_size=4, max_size=4), other=JSON_VALUES)
def test_a_value_is_judged_whatever_way_its_json_is_written(values: list[Any], other: Any) -> None:
    wanted = asked([{"json_schema": {"const": value}} for value in values])
    texts = [json.dumps(v, ensure_ascii=n % 2 == 0, indent=n or None) for n, v in enumerate(values)]
    assert judged(side([answer(n, t) for n, t in enumerate(texts)], wanted)).passed
    texts[3] = json.dumps([other, values[3]])
    assert judged(side([answer(n, t) for n, t in enumerate(texts)], wanted)).outcome is Outcome.FAIL


def test_the_shipped_prompts_hold_every_grammar() -> None:
    path = Path(__file__).parents[1] / "suites" / "prompts" / "structured.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    grammars = [structured_from_json(line["structured"]).grammar for line in lines]
    assert {g: grammars.count(g) for g in Grammar} == {Grammar.JSON_SCHEMA: 6, Grammar.REGEX: 5, Grammar.CHOICE: 5}
    assert [line["id"] for line in lines] == [f"structured-{n:03}" for n in range(1, 17)]
