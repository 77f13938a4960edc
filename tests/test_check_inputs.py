"""The inputs check: every cause is planted into realistic prompts and must be found and named."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import comparable
from parity.checks import inputs, load
from parity.checks.inputs import Cause, Limits, explain
from parity.errors import ConfigError, IncomparableError
from parity.prompts import SamplingParams
from parity.recording import Completion, Recording
from parity.verdict import Outcome
from recordings import BOS, completion, recording

# SmolLM2's chat template and special tokens, written out; a word-wise tokenizer stands in for its BPE.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": BOS, "<|im_end|>": 2}
QUESTIONS = ("What is the capital of France?", "Add 17 and 25.", "Write\na haiku  about snow.", "Is 2024 a leap year?")
Tokens = Callable[[str], tuple[int, ...]]


def render(question: str, *, system: str | None = SYSTEM, end: str = "<|im_end|>\n") -> str:
    head = "" if system is None else f"<|im_start|>system\n{system}{end}"
    return f"{head}<|im_start|>user\n{question}{end}<|im_start|>assistant\n"


def render_llama3(question: str, *, system: str = SYSTEM) -> str:
    def turn(role: str, content: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}"

    return turn("system", system + "<|eot_id|>") + turn("user", question + "<|eot_id|>") + turn("assistant", "")


def tokens(text: str, *, pattern: str = r"<\|\w+\|>|\w+|\s|[^\w\s]") -> tuple[int, ...]:
    return tuple(SPECIAL.get(word, 1000 + zlib.crc32(word.encode()) % 40000) for word in re.findall(pattern, text))


def split_digits(text: str) -> tuple[int, ...]:
    return tokens(text, pattern=r"<\|\w+\|>|\d|[^\W\d]+|\s|[^\w\s]")


def spell_special_tokens(text: str) -> tuple[int, ...]:
    return tokens(text, pattern=r"\w+|\s|[^\w\s]+")


def side(texts: Sequence[str], *, tokenize: Tokens = tokens, **options: object) -> Recording:
    """One engine: received ids are the reference's for everyone, own ids are its tokenizer's."""
    completions = [
        completion(
            f"chat-{number:03}",
            prompt_token_ids=tokens(render(question)),
            own_prompt_token_ids=tokenize(text),
            prompt_text=text,
        )
        for number, (question, text) in enumerate(zip(QUESTIONS, texts, strict=True), start=1)
    ]
    return recording(completions, **options)  # type: ignore[arg-type]


REFERENCE = side([render(q) for q in QUESTIONS])
CANDIDATES: dict[Cause, Recording] = {
    Cause.BOS_DOUBLED: side(["<|im_start|>" + render(q) for q in QUESTIONS]),
    Cause.BOS_MISSING: side([render(q) for q in QUESTIONS], tokenize=lambda text: tokens(text)[1:]),
    Cause.SYSTEM_PROMPT_MISSING: side([render(q, system=None) for q in QUESTIONS]),
    Cause.SYSTEM_PROMPT_DIFFERS: side([render(q, system="You are a pirate.") for q in QUESTIONS]),
    Cause.CHAT_TEMPLATE: side([render_llama3(q) for q in QUESTIONS]),
    Cause.WHITESPACE: side([render(q, end="<|im_end|>") for q in QUESTIONS]),
    Cause.SPECIAL_TOKENS_AS_TEXT: side([render(q) for q in QUESTIONS], tokenize=spell_special_tokens),
    Cause.UNEXPLAINED: recording(
        [
            replace(c, prompt_text=None, own_prompt_token_ids=(*(c.own_prompt_token_ids or ()), 7))
            for c in REFERENCE.completions
        ]
    ),
}


def causes_of(reference: Recording, candidate: Recording) -> set[Cause]:
    pairs = zip(reference.completions, candidate.completions, strict=True)
    return {explain(r, c, bos_token_id=BOS) for r, c in pairs if r.own_prompt_token_ids != c.own_prompt_token_ids}


@pytest.mark.parametrize("cause", CANDIDATES, ids=lambda cause: cause.name)
def test_a_planted_cause_is_found_and_named(cause: Cause) -> None:
    candidate = CANDIDATES[cause]
    assert causes_of(REFERENCE, candidate) == {cause}
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    assert verdict.outcome is Outcome.FAIL
    assert not verdict.passed
    assert [f.outcome for f in verdict.findings] == [Outcome.PASS, Outcome.FAIL]
    assert len(verdict.causes) == 1
    assert verdict.causes[0].startswith(f"{cause.value} on 4 of 4 prompts, first on chat-001 at ")
    assert verdict.headline == verdict.causes[0]
    assert len(verdict.findings[1].evidence) == 4


@pytest.mark.parametrize(
    ("planted", "seen_from_the_other_side"),
    [
        (Cause.BOS_DOUBLED, Cause.BOS_DOUBLED_BY_REFERENCE),
        (Cause.BOS_MISSING, Cause.BOS_ADDED),
        (Cause.SYSTEM_PROMPT_MISSING, Cause.SYSTEM_PROMPT_INJECTED),
        (Cause.SPECIAL_TOKENS_AS_TEXT, Cause.SPECIAL_TOKENS_AS_TEXT_BY_REFERENCE),
        (Cause.CHAT_TEMPLATE, Cause.CHAT_TEMPLATE),
        (Cause.WHITESPACE, Cause.WHITESPACE),
    ],
)
def test_exchanging_the_sides_mirrors_the_cause(planted: Cause, seen_from_the_other_side: Cause) -> None:
    assert causes_of(CANDIDATES[planted], REFERENCE) == {seen_from_the_other_side}


def test_another_splitting_of_the_same_text_is_the_tokenizer() -> None:
    candidate = side([render(q) for q in QUESTIONS], tokenize=split_digits)
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    year = "".join(f", {i}" for i in split_digits("2024")[:4])
    (cause,) = verdict.causes
    assert cause.startswith(
        "tokenizer splits the same text differently on 2 of 4 prompts, first on chat-002 at token 3"
    )
    assert year in verdict.findings[1].evidence[1]


def test_unrelated_vocabularies_are_not_taken_for_spelled_special_tokens() -> None:
    candidate = side([render(q) for q in QUESTIONS], tokenize=lambda text: tuple(b + 90000 for b in text.encode()))
    assert causes_of(REFERENCE, candidate) == {Cause.TOKENIZER}


def test_the_sentence_shows_where_and_both_sides() -> None:
    verdict = inputs.check(REFERENCE, CANDIDATES[Cause.SYSTEM_PROMPT_MISSING], noise=None, limits=Limits())
    assert verdict.causes == (
        "system prompt missing in the candidate on 4 of 4 prompts, first on chat-001 at character 12: "
        r"reference '<|im_start|>system\nYou are a helpful AI as…' "
        r"candidate '<|im_start|>user\nWhat is the capital of Fr…'",
    )
    verdict = inputs.check(REFERENCE, CANDIDATES[Cause.BOS_MISSING], noise=None, limits=Limits())
    assert "at token 0: reference [1, " in verdict.causes[0]


@pytest.mark.parametrize("configured", [BOS, None])
def test_bos_is_found_with_and_without_a_configuration(configured: int | None) -> None:
    ids = tokens(render(QUESTIONS[0]))
    identity = {"model.config.bos_token_id": configured}
    reference = recording([completion(prompt_token_ids=ids)], identity=identity)
    doubled = recording([completion(prompt_token_ids=ids, own_prompt_token_ids=(BOS, *ids))], identity=identity)
    verdict = inputs.check(reference, doubled, noise=None, limits=Limits())
    assert verdict.causes[0].startswith("BOS doubled by the candidate on 1 of 1 prompt, first on p-001 at token 1: ")


def test_one_extra_id_in_front_is_bos_only_where_bos_is_not_known() -> None:
    left, right = completion(prompt_token_ids=(50, 51)), completion(prompt_token_ids=(9, 50, 51))
    assert explain(left, right, bos_token_id=None) is Cause.BOS_ADDED
    assert explain(right, left, bos_token_id=None) is Cause.BOS_MISSING
    assert explain(left, right, bos_token_id=BOS) is Cause.TOKENIZER


def test_causes_come_most_frequent_first_and_each_has_a_witness() -> None:
    texts = [render(q, end="<|im_end|>") for q in QUESTIONS[:3]] + [render(QUESTIONS[3], system=None)]
    verdict = inputs.check(REFERENCE, side(texts), noise=None, limits=Limits())
    assert [c.partition(" on ")[0] for c in verdict.causes] == [
        Cause.WHITESPACE.value,
        Cause.SYSTEM_PROMPT_MISSING.value,
    ]
    assert [w.partition(":")[0] for w in verdict.findings[1].evidence] == [
        "chat-001",
        "chat-004",
        "chat-002",
        "chat-003",
    ]


def test_differing_hashes_corroborate_and_are_listed() -> None:
    candidate = side(
        [render_llama3(q) for q in QUESTIONS],
        identity={"chat_template.sha256": "abcdef0123", "model.config.eos_token_id": 5, "model.weights_sha256": "x"},
    )
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    assert verdict.causes[0].endswith("; chat_template.sha256 differs too (33333333 vs abcdef01)")
    assert [d.name for d in verdict.changed] == ["chat_template.sha256", "model.config.eos_token_id"]


def test_nothing_to_compare_is_inconclusive() -> None:
    blind = recording([completion(own_prompt_token_ids=None, prompt_text=None)])
    verdict = inputs.check(blind, blind, noise=None, limits=Limits())
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.headline.startswith("no prompt of 1 has own token ids on both sides to compare: ")
    empty = recording([])
    verdict = inputs.check(empty, empty, noise=None, limits=Limits(min_prompts=0))
    assert [f.outcome for f in verdict.findings] == [Outcome.INCONCLUSIVE] * 2


def test_too_few_prompts_are_inconclusive_unless_one_differs() -> None:
    limits = Limits(min_prompts=5)
    verdict = inputs.check(REFERENCE, REFERENCE, noise=None, limits=limits)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.headline.endswith("on 4 of 4 prompts, fewer than the 5 asked for")
    assert inputs.check(REFERENCE, CANDIDATES[Cause.WHITESPACE], noise=None, limits=limits).outcome is Outcome.FAIL


def test_own_ids_on_one_side_only_are_told() -> None:
    blind = replace(REFERENCE.completions[1], own_prompt_token_ids=None)
    candidate = replace(REFERENCE, completions=(REFERENCE.completions[0], blind, *REFERENCE.completions[2:]))
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    assert verdict.passed
    assert verdict.findings[1].n == 3
    assert verdict.warnings == (
        "own token ids of 1 of 4 prompts are known on one side only and were not compared, first chat-002",
    )


def test_other_received_ids_fail_and_refuse_every_other_check() -> None:
    first, *rest = REFERENCE.completions
    candidate = replace(REFERENCE, completions=(replace(first, prompt_token_ids=first.prompt_token_ids[1:]), *rest))
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    assert [f.outcome for f in verdict.findings] == [Outcome.FAIL, Outcome.PASS]
    assert verdict.headline.startswith(
        "the engines did not work on the same token ids on 1 of 4 prompts, first chat-001: at token 0: reference [1, "
    )
    with pytest.raises(IncomparableError, match=r"^prompt 'chat-001' reached the engines as different token ids, at "):
        comparable.require_same_inputs(REFERENCE, candidate)


def test_a_prompt_answered_on_one_side_only_fails_and_refuses() -> None:
    candidate = replace(REFERENCE, completions=REFERENCE.completions[:-1])
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].evidence == ("chat-004: answered only by the reference",)
    for pair, name in ((REFERENCE, candidate), "reference"), ((candidate, REFERENCE), "candidate"):
        with pytest.raises(IncomparableError, match=f"'chat-004' is answered only by the {name} "):
            comparable.require_same_inputs(*pair)


def test_another_workload_is_a_warning_here_and_refused_elsewhere() -> None:
    sampling = SamplingParams.greedy(max_tokens=16, logprobs=3)
    candidate = recording(REFERENCE.completions, sampling=sampling)
    verdict = inputs.check(REFERENCE, candidate, noise=None, limits=Limits())
    assert verdict.passed
    assert "sampling.max_tokens 64 vs 16" in verdict.warnings[0]
    with pytest.raises(IncomparableError, match=r"^the workloads differ from prompt 'chat-001' on, .* 64 vs 16; "):
        comparable.require_same_inputs(REFERENCE, candidate)


def test_explain_refuses_what_does_not_differ() -> None:
    with pytest.raises(ValueError, match="no differing own token ids"):
        explain(completion(), completion(), bos_token_id=BOS)


def test_a_check_is_loaded_by_name() -> None:
    assert load("inputs") is inputs
    with pytest.raises(ConfigError, match=r"there is no check 'input'; did you mean 'inputs'"):
        load("input")


# Laws ---------------------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 5), max_size=6).map(tuple)
TEXTS = st.none() | st.text("<|im_start> system\n", max_size=12) | st.sampled_from([render(q) for q in QUESTIONS])


@st.composite
def sides(draw: st.DrawFn) -> tuple[Completion, ...]:
    """Answers of one engine; the first prompt always has own ids."""
    names = draw(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=5, unique=True))
    return tuple(
        completion(
            name,
            prompt_token_ids=draw(IDS),
            own_prompt_token_ids=draw(IDS if number == 0 else st.none() | IDS),
            prompt_text=draw(TEXTS),
            token_ids=(),
        )
        for number, name in enumerate(names)
    )


@given(completions=sides(), bos=st.none() | st.integers(0, 5))
def test_a_recording_has_the_same_inputs_as_itself(completions: tuple[Completion, ...], bos: int | None) -> None:
    same = recording(completions, identity={"model.config.bos_token_id": bos})
    verdict = inputs.check(same, same, noise=None, limits=Limits())
    assert verdict.passed
    assert not any((verdict.causes, verdict.changed, verdict.warnings))
    comparable.require_same_inputs(same, same)


@given(data=st.data(), completions=sides(), bos=st.none() | st.integers(0, 5))
def test_the_order_of_answers_changes_nothing(
    data: st.DataObject, completions: tuple[Completion, ...], bos: int | None
) -> None:
    identity = {"model.config.bos_token_id": bos}
    reference = recording(completions, identity=identity)
    others = tuple(
        replace(c, own_prompt_token_ids=data.draw(st.none() | IDS), prompt_text=data.draw(TEXTS)) for c in completions
    )
    candidate = recording(others, identity=identity)
    shuffled = replace(candidate, completions=tuple(data.draw(st.permutations(others))))
    verdict = inputs.check(reference, candidate, noise=None, limits=Limits())
    assert inputs.check(reference, shuffled, noise=None, limits=Limits()) == verdict
    mirrored = inputs.check(candidate, reference, noise=None, limits=Limits())
    assert mirrored.outcome is verdict.outcome
    assert len(mirrored.findings[1].evidence) == len(verdict.findings[1].evidence)


@given(data=st.data(), completions=sides(), bos=st.none() | st.integers(0, 5))
def test_a_single_changed_id_fails(data: st.DataObject, completions: tuple[Completion, ...], bos: int | None) -> None:
    reference = recording(completions, identity={"model.config.bos_token_id": bos})
    changeable = [i for i, c in enumerate(completions) if c.own_prompt_token_ids]
    if not changeable:
        return
    which = data.draw(st.sampled_from(changeable))
    own = list(completions[which].own_prompt_token_ids or ())
    own[data.draw(st.integers(0, len(own) - 1))] += data.draw(st.integers(1, 3))
    changed = replace(completions[which], own_prompt_token_ids=tuple(own))
    candidate = replace(reference, completions=(*completions[:which], changed, *completions[which + 1 :]))
    verdict = inputs.check(reference, candidate, noise=None, limits=Limits(min_prompts=9))
    assert verdict.outcome is Outcome.FAIL
    assert len(verdict.causes) == 1
    assert changed.id in verdict.headline
