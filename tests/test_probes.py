"""Contract probes: a correct engine does as asked, and each planted fault is named, it and no other.

`python tests/test_probes.py` prints how often, over many toy models, for the tables of docs/probes.md (some minutes).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toy_engine
from parity import probes
from parity.errors import IncomparableError
from parity.probes import Answer, Cause, Probe
from parity.prompts import Request
from parity.recording import Completion, FinishReason, Recording, TokenLogprobs
from recordings import completion, recording
from toy_engine import BOS, END, Rules, Toy, decode

NAN = float("nan")


def correct() -> Toy:
    return Toy(noise_nats=0.03)


@cache
def healthy() -> Recording:
    return correct().probed()


def of(recorded: Recording, *, sigma_nats: float = probes.SIGMA_NATS) -> dict[str, Probe]:
    return {p.name: p for p in probes.observe(recorded, sigma_nats=sigma_nats)}


def faults_of(found: Mapping[str, Probe]) -> dict[str, Cause | None]:
    return {p.name: p.cause for p in found.values() if p.answer is Answer.OTHERWISE}


def unseen(found: Mapping[str, Probe]) -> dict[str, str]:
    return {p.name: p.sentence for p in found.values() if p.answer is Answer.UNKNOWN}


# Faults -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An engine with one wrong rule, the probe that should fail for it, and the cause it should name."""

    toy: Toy
    probe: str
    cause: Cause


def _sampling(changes: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Request]:
    """Sampling parameters on their way to the engine, changed by what was asked."""
    return lambda request: replace(request, sampling=replace(request.sampling, **changes(request.sampling)))


def misread(probe: str, cause: Cause, changes: Callable[[Any], dict[str, Any]]) -> Fault:
    return Fault(toy=replace(correct(), rewrite=_sampling(changes)), probe=probe, cause=cause)


def other_rule(probe: str, cause: Cause, **changes: Any) -> Fault:
    return Fault(toy=replace(correct(), rules=replace(Rules(), **changes)), probe=probe, cause=cause)


def edited(probe: str, cause: Cause, edit: Callable[[Completion], Completion], *experiments: str) -> Fault:
    """Answers edited on their way out, all of them or those of some experiments."""

    def applied(answer: Completion, request: Request) -> Completion:
        touched = not experiments or request.id.partition(":")[0] in experiments
        return edit(answer) if touched else answer

    return Fault(toy=replace(correct(), edit=applied), probe=probe, cause=cause)


def drawn(s: Any, **changes: Any) -> dict[str, Any]:
    return {} if s.is_greedy else changes


def rescored(answer: Completion, change: Callable[[Sequence[float]], Sequence[float]]) -> Completion:
    assert answer.logprobs is not None
    k, own = answer.logprobs.k, answer.logprobs
    rows = [own.row(at) for at in range(len(own))]
    return replace(answer, logprobs=TokenLogprobs.from_rows(change(own.chosen.tolist()), rows, k=k))


def one_by_one(answer: Completion) -> Completion:
    """Detokenised a token at a time, as `decoded_text` then shows."""
    return retold(answer, "".join(decode([i]) for i in answer.token_ids))


def retold(answer: Completion, text: str) -> Completion:
    """Another text for the same tokens. What a stop string cut off is not put back."""
    if answer.text is None or answer.decoded_text is not None:
        return answer
    return replace(answer, text=text, decoded_text=None if text == answer.text else answer.text)


def stop_kept(answer: Completion) -> Completion:
    by = answer.stop_reason
    return replace(answer, text=(answer.text or "") + by) if isinstance(by, str) else answer


def stop_token_kept(answer: Completion) -> Completion:
    return retold(answer, f"{answer.text} end") if answer.terminator is not None else answer


def unnamed(answer: Completion) -> Completion:
    return replace(answer, stop_reason=None) if isinstance(answer.stop_reason, str) else answer


def double_bos(answer: Completion) -> Completion:
    own = answer.own_prompt_token_ids or ()
    return replace(answer, own_prompt_token_ids=(BOS, *own)) if own[:1] == (BOS,) else answer


def always_stops(answer: Completion) -> Completion:
    return replace(answer, finish_reason=FinishReason.STOP)


def warm_stream(request: Request) -> Request:
    return replace(request, sampling=replace(request.sampling, temperature=0.9)) if request.stream else request


ELSEWHERE = ("model.config.bos_token_id", BOS), ("model.config.eos_token_id", "[900, 901]")
TEXTS = [e.value for e in probes.questions.Experiment if e.value not in ("stream", "score")]
FAULTS = {
    # Numbers
    "NaN": edited(
        "distribution",
        Cause.NOT_A_DISTRIBUTION,
        lambda c: rescored(c, lambda v: [NAN, *v[1:]] if c.id == "base:count" else v),
    ),
    "logits for log-probabilities": edited(
        "distribution", Cause.NOT_A_DISTRIBUTION, lambda c: rescored(c, lambda v: [x + 17.0 for x in v]), "base", "draw"
    ),
    "log-probabilities after temperature": other_rule("raw", Cause.AFTER_TEMPERATURE, logprobs_after_temperature=True),
    "log-probabilities after filters": other_rule("raw", Cause.AFTER_FILTERS, logprobs_after_filters=True),
    "scores one too early": edited(
        "scoring", Cause.SCORES_EARLY, lambda c: rescored(c, lambda v: [0.0, *v[:-1]]), "score"
    ),
    "scores one too late": edited(
        "scoring", Cause.SCORES_LATE, lambda c: rescored(c, lambda v: [*v[1:], 0.0]), "score"
    ),
    "scores of another model": edited(
        "scoring", Cause.SCORES_DIFFER, lambda c: rescored(c, lambda v: [2.0 * x - 0.5 for x in v]), "score"
    ),
    # Greedy
    "repetition penalty 1.05 by default": misread(
        "greedy",
        Cause.REPETITION_APPLIED,
        lambda s: {"repetition_penalty": 1.05 if s.repetition_penalty == 1.0 else s.repetition_penalty},
    ),
    "presence penalty 1 by default": misread(
        "greedy", Cause.PRESENCE_APPLIED, lambda s: {"presence_penalty": s.presence_penalty or 1.0}
    ),
    "frequency penalty 0.5 by default": misread(
        "greedy", Cause.FREQUENCY_APPLIED, lambda s: {"frequency_penalty": s.frequency_penalty or 0.5}
    ),
    "the end is masked": other_rule("greedy", Cause.END_MASKED, end_masked=True),
    "temperature 0.7 for 0": misread("greedy", Cause.GREEDY_SAMPLES, lambda s: {"temperature": s.temperature or 0.7}),
    # Chance
    "temperature ignored": misread("temperature", Cause.TEMPERATURE_IGNORED, lambda s: {"temperature": 0.0}),
    "temperature 1.2 for 1": misread(
        "temperature", Cause.TEMPERATURE_OFF, lambda s: {"temperature": 1.2 * s.temperature}
    ),
    "any temperature read as 1": misread("temperature", Cause.TEMPERATURE_OFF, lambda s: drawn(s, temperature=1.0)),
    "top_p 0.9 by default": misread(
        "temperature", Cause.FILTER_APPLIED, lambda s: {"top_p": 0.9 if s.top_p == 1.0 else s.top_p}
    ),
    "top_k 5 by default": misread("temperature", Cause.FILTER_APPLIED, lambda s: drawn(s, top_k=s.top_k or 5)),
    "seed ignored": Fault(
        toy=replace(
            correct(),
            rewrite=lambda r: replace(r, sampling=replace(r.sampling, seed=sum(r.id.encode()) + 1000 * len(r.id))),
        ),
        probe="seed",
        cause=Cause.SEED_IGNORED,
    ),
    "one seed for all": misread("seed", Cause.SEED_FIXED, lambda s: {"seed": 0}),
    "top_k ignored": misread("top_k", Cause.TOP_K_IGNORED, lambda s: {"top_k": 0}),
    "top_k one more": misread("top_k", Cause.TOP_K_ONE_MORE, lambda s: {"top_k": s.top_k + (s.top_k > 0)}),
    "top_k one fewer": misread("top_k", Cause.TOP_K_FEWER, lambda s: {"top_k": max(s.top_k - 1, s.top_k > 0)}),
    "top_p ignored": misread("top_p", Cause.TOP_P_IGNORED, lambda s: {"top_p": 1.0}),
    "top_p below 1 read as greedy": misread(
        "top_p", Cause.TOP_P_FEWER, lambda s: {"top_p": 1e-6 if s.top_p < 1.0 else 1.0}
    ),
    "min_p ignored": misread("min_p", Cause.MIN_P_IGNORED, lambda s: {"min_p": 0.0}),
    # Penalties
    "repetition penalty ignored": misread(
        "repetition_penalty", Cause.REPETITION_IGNORED, lambda s: {"repetition_penalty": 1.0}
    ),
    "repetition penalty spares the prompt": other_rule(
        "repetition_penalty", Cause.REPETITION_SPARES_PROMPT, repetition_spares_prompt=True
    ),
    "repetition penalty upside down": misread(
        "repetition_penalty", Cause.REPETITION_OTHER, lambda s: {"repetition_penalty": 1.0 / s.repetition_penalty}
    ),
    "presence penalty ignored": misread(
        "presence_penalty", Cause.PRESENCE_IGNORED, lambda s: {"presence_penalty": 0.0}
    ),
    "presence penalty counts the prompt": other_rule(
        "presence_penalty", Cause.PRESENCE_COUNTS_PROMPT, presence_counts_prompt=True
    ),
    "presence penalty taken for the other": misread(
        "presence_penalty",
        Cause.PRESENCE_OTHER,
        lambda s: {"presence_penalty": 0.0, "frequency_penalty": s.presence_penalty + s.frequency_penalty},
    ),
    "frequency penalty ignored": misread(
        "frequency_penalty", Cause.FREQUENCY_IGNORED, lambda s: {"frequency_penalty": 0.0}
    ),
    "frequency penalty counts the prompt": other_rule(
        "frequency_penalty", Cause.FREQUENCY_COUNTS_PROMPT, frequency_counts_prompt=True
    ),
    "frequency penalty counts once": other_rule("frequency_penalty", Cause.FREQUENCY_OTHER, frequency_counts_once=True),
    # Ends
    "one token short": misread(
        "max_tokens", Cause.MAX_TOKENS_OTHER, lambda s: {"max_tokens": max(1, s.max_tokens - 1)}
    ),
    "one token long": misread("max_tokens", Cause.MAX_TOKENS_OTHER, lambda s: {"max_tokens": s.max_tokens + 1}),
    "16 tokens by default": misread("max_tokens", Cause.MAX_TOKENS_OTHER, lambda s: {"max_tokens": 16}),
    "every end is called stop": edited("max_tokens", Cause.FINISH_REASON_WRONG, always_stops, "draw", "max_tokens"),
    "requests given up": edited(
        "max_tokens", Cause.GIVES_UP, lambda c: replace(c, finish_reason=FinishReason.ABORT), "draw"
    ),
    "min_tokens ignored": misread("min_tokens", Cause.MIN_TOKENS_IGNORED, lambda s: {"min_tokens": 0}),
    "ignore_eos ignored": misread("ignore_eos", Cause.IGNORE_EOS_IGNORED, lambda s: {"ignore_eos": False}),
    "stop strings ignored": misread("stop string", Cause.STOP_STRING_IGNORED, lambda s: {"stop": ()}),
    "stop strings compared as tokens": other_rule(
        "stop string", Cause.STOP_STRING_BY_TOKENS, stops_compared_as_tokens=True
    ),
    "stop strings kept": edited("stop string", Cause.STOP_STRING_KEPT, stop_kept),
    "stop tokens kept": edited("text", Cause.STOP_TOKEN_KEPT, stop_token_kept, "stop token"),
    "stop strings not named": edited("stop string", Cause.STOP_STRING_UNNAMED, unnamed),
    "stop tokens ignored": misread("stop token", Cause.STOP_TOKEN_IGNORED, lambda s: {"stop_token_ids": ()}),
    "the end is passed": other_rule("end of sequence", Cause.END_PASSED, end_ids=frozenset()),
    "the chat's end of turn is passed": Fault(
        toy=replace(correct(), rules=Rules(end_ids=frozenset({900, 901})), identity=ELSEWHERE),
        probe="end of sequence",
        cause=Cause.END_OF_TURN_PASSED,
    ),
    "BOS twice": edited("first token", Cause.BOS_DOUBLED, double_bos),
    # Texts
    "spaces lost": edited(
        "text", Cause.TEXT_SPACES, lambda c: retold(c, (c.text or "").replace(" the", "the")), *TEXTS
    ),
    "characters broken": edited("text", Cause.TEXT_CHARACTERS, one_by_one, *TEXTS),
    "another answer's text": edited("text", Cause.TEXT_OTHER, lambda c: retold(c, "something else"), *TEXTS),
    "stream loses spaces": edited(
        "stream", Cause.TEXT_SPACES, lambda c: retold(c, (c.text or "").replace(" ", "", 1)), "stream"
    ),
    "stream breaks characters": edited("stream", Cause.TEXT_CHARACTERS, one_by_one, "stream"),
    "stream samples": Fault(toy=replace(correct(), rewrite=warm_stream), probe="stream", cause=Cause.STREAM_TOKENS),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_no_other(name: str) -> None:
    fault = FAULTS[name]
    found = of(fault.toy.probed())
    assert faults_of(found) == {fault.probe: fault.cause}
    assert found[fault.probe].sentence


def test_every_cause_has_a_planted_fault() -> None:
    assert {fault.cause for fault in FAULTS.values()} == set(Cause)


# A correct engine ---------------------------------------------------------------------------------------------------


@settings(max_examples=3, deadline=None)
@given(st.integers(), st.sampled_from([0.0, 0.03, 0.05]))
def test_a_correct_engine_does_as_asked(model: int, noise_nats: float) -> None:
    assert not faults_of(of(Toy(salt=str(model), noise_nats=noise_nats).probed()))


def test_everything_can_be_seen_of_an_engine_that_can_everything() -> None:
    found = of(healthy())
    assert {p.answer for p in found.values()} == {Answer.AS_ASKED}
    assert all(p.n and p.sentence and p.question and p.root_causes and p.cause is None for p in found.values())


def test_an_engine_that_cannot_stream_is_not_asked_to() -> None:
    recorded = replace(correct(), can_stream=False).probed()
    assert not [c.id for c in recorded.completions if c.id.startswith("stream:")]
    assert unseen(of(recorded)) == {"stream": "the engine does not say that it can stream"}


def test_without_log_probabilities_only_ends_and_texts_can_be_seen() -> None:
    def bare(answer: Completion, request: Request) -> Completion:
        end = None if answer.terminator is None else replace(answer.terminator, logprobs=None)
        return replace(answer, logprobs=None, terminator=end)

    found = of(Toy(edit=bare).probed())
    assert not faults_of(found)
    assert set(unseen(found)) == {
        "distribution",
        "raw",
        "scoring",
        "greedy",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    }
    assert set(unseen(found).values()) == {"the engine returned no log-probabilities"}


def test_what_rests_on_a_fault_is_not_looked_at() -> None:
    found = of(FAULTS["temperature 0.7 for 0"].toy.probed())
    assert unseen(found)["min_p"] == "not looked at: it rests on greedy, which is not as asked"
    assert found["seed"].answer is Answer.AS_ASKED


# Questions ----------------------------------------------------------------------------------------------------------


def test_the_questions_stay_few_and_short() -> None:
    first, asked = probes.first(), probes.second(correct().record(probes.first()))
    assert len(first.requests) == 12
    assert len(asked.requests) <= 90
    assert max(r.sampling.max_tokens for r in (*first.requests, *asked.requests)) <= 32
    assert {r.sampling.logprobs for r in (*first.requests, *asked.requests)} == {20}
    assert {r.turn for r in asked.requests} == {0}


def test_no_two_draws_but_the_twins_have_one_seed() -> None:
    asked = probes.second(correct().record(probes.first()))
    seeds = Counter(r.sampling.seed for r in asked.requests if not r.sampling.is_greedy)
    assert sorted(seeds.values())[-5:] == [1, 2, 2, 2, 2]


def test_experiments_send_the_token_ids_of_the_base_answers() -> None:
    base = correct().record(probes.first())
    for request in probes.second(base).requests:
        name = request.id.partition(":")[2].partition("#")[0]
        assert request.prompt_token_ids == base.by_id[f"base:{name}"].prompt_token_ids


def test_answers_to_other_questions_are_refused() -> None:
    other = recording([completion("p-001")])
    with pytest.raises(IncomparableError, match="has no answer to 'base:capital'"):
        probes.second(other)
    with pytest.raises(IncomparableError, match="asks no base question"):
        probes.observe(other)


# What looks like a fault and is none --------------------------------------------------------------------------------


def with_base(change: Callable[[Completion], Completion]) -> Recording:
    """The healthy recording with its base answers changed."""
    completions = [change(c) if c.id.startswith("base:") else c for c in healthy().completions]
    return replace(healthy(), completions=tuple(completions))


def second_best(answer: Completion, at: int, gap_nats: float) -> Completion:
    """The token at one place was chosen that far below another that neither prompt nor answer holds."""
    assert answer.logprobs is not None
    own = answer.logprobs
    rows = [own.row(i) for i in range(len(own))]
    chosen = list(map(float, own.chosen))
    rows[at] = ((900, -0.5), (answer.token_ids[at], -0.5 - gap_nats))
    chosen[at] = -0.5 - gap_nats
    return replace(answer, logprobs=TokenLogprobs.from_rows(chosen, rows, k=own.k))


def test_two_near_ties_taken_the_other_way_are_rounding_and_one_large_gap_is_not() -> None:
    def near(answer: Completion) -> Completion:
        return second_best(answer, 3, 0.7) if answer.id in ("base:count", "base:drum") else answer

    def far(answer: Completion) -> Completion:
        return second_best(answer, 3, 0.9) if answer.id == "base:count" else answer

    assert not faults_of(of(with_base(near)))
    assert faults_of(of(with_base(far))) == {"greedy": Cause.GREEDY_SAMPLES}
    assert faults_of(of(with_base(near), sigma_nats=0.1)) == {"greedy": Cause.GREEDY_SAMPLES}


def test_a_lone_token_of_the_prompt_passed_over_has_no_known_cause() -> None:
    def passed_over(answer: Completion) -> Completion:
        if answer.id != "base:count":
            return answer
        changed = second_best(answer, 3, 2.0)
        assert changed.logprobs is not None
        rows = [changed.logprobs.row(i) for i in range(len(changed.logprobs))]
        rows[3] = ((answer.prompt_token_ids[0], -0.5), rows[3][1])
        return replace(
            changed, logprobs=TokenLogprobs.from_rows(changed.logprobs.chosen.tolist(), rows, k=changed.logprobs.k)
        )

    assert faults_of(of(with_base(passed_over))) == {"greedy": None}


def test_a_cut_character_at_the_very_end_is_no_fault() -> None:
    held_back = with_base(lambda c: replace(c, decoded_text=f"{c.text}\ufffd"))
    shown = with_base(lambda c: replace(c, text=f"{c.text}\ufffd", decoded_text=c.text))
    assert not faults_of(of(held_back))
    assert not faults_of(of(shown))


def test_a_template_that_writes_bos_once_is_right_and_an_unnamed_bos_is_unknown() -> None:
    assert of(healthy())["first token"].answer is Answer.AS_ASKED
    nameless = replace(correct(), identity=(("model.config.eos_token_id", END),)).probed()
    assert unseen(of(nameless)) == {
        "first token": "the model's configuration names no beginning-of-sequence token",
    }


def test_several_end_tokens_are_all_known_also_below_a_text_configuration() -> None:
    several = (("model.config.bos_token_id", BOS), ("model.config.text_config.eos_token_id", f"[900, {END}]"))
    toy = replace(FAULTS["the end is passed"].toy, identity=several)
    assert faults_of(of(toy.probed())) == {"end of sequence": Cause.END_PASSED}


def test_a_model_that_never_ends_is_unknown_and_not_wrong() -> None:
    endless = replace(correct(), rules=Rules(end_ids=frozenset()), identity=ELSEWHERE, salt="endless").probed()
    chats = [replace(c, token_ids=c.token_ids[:3], text=decode(c.token_ids[:3])) for c in endless.completions]
    short = replace(endless, completions=tuple(replace(c, logprobs=None) for c in chats))
    found = of(short)["end of sequence"]
    assert (found.answer, found.sentence) == (
        Answer.UNKNOWN,
        "none of 12 base answers ends by itself, so nothing shows what ends one",
    )


def test_too_few_draws_with_a_choice_are_unknown() -> None:
    kept = [c for c in healthy().completions if not c.id.startswith("draw:") or c.id.endswith(("#1", "#2"))]
    found = of(replace(healthy(), completions=tuple(kept)))
    assert found["temperature"].answer is Answer.UNKNOWN
    assert found["temperature"].sentence.endswith("had a choice, 200 are needed")


def test_rows_shorter_than_asked_are_enough() -> None:
    def shortened(answer: Completion, request: Request) -> Completion:
        def cut(scores: TokenLogprobs) -> TokenLogprobs:
            rows = [scores.row(at)[:12] for at in range(len(scores))]
            return TokenLogprobs.from_rows(list(map(float, scores.chosen)), rows, k=scores.k)

        end = answer.terminator
        if end is not None and end.logprobs is not None:
            answer = replace(answer, terminator=replace(end, logprobs=cut(end.logprobs)))
        return answer if answer.logprobs is None else replace(answer, logprobs=cut(answer.logprobs))

    assert {p.answer for p in of(replace(correct(), edit=shortened).probed()).values()} == {Answer.AS_ASKED}
    warm = replace(FAULTS["temperature 1.2 for 1"].toy, edit=shortened)
    assert faults_of(of(warm.probed())) == {"temperature": Cause.TEMPERATURE_OFF}


def test_a_fault_of_chance_is_told_with_its_strength() -> None:
    sentence = of(FAULTS["temperature 1.2 for 1"].toy.probed())["temperature"].sentence
    assert float(sentence.rpartition(" ")[2]) == pytest.approx(1.2, rel=0.05)
    assert of(FAULTS["top_k 5 by default"].toy.probed())["temperature"].sentence.endswith("looks like top_k 5")


def test_two_early_partings_of_one_seed_may_be_rounding_and_four_are_not() -> None:
    def parted(*numbers: str) -> dict[str, Cause | None] | dict[str, str]:
        def apart(c: Completion) -> Completion:
            if not c.id.startswith("same seed:"):
                return c
            length = 2 if c.id.endswith(numbers) else 3
            return replace(c, token_ids=(*c.token_ids[: length - 2], 900 + length, *c.token_ids[length - 1 :]))

        kept = [apart(c) for c in healthy().completions if not c.id.startswith("same seed:") or c.id.endswith(numbers)]
        found = of(replace(healthy(), completions=tuple(kept)))
        return faults_of(found) or unseen(found)

    assert parted("#1", "#2") == {"seed": Cause.SEED_IGNORED}
    assert list(parted("#1")) == ["seed"]
    assert "agree no longer than by chance" in str(parted("#1")["seed"])


def _rates(models: int) -> None:
    """How often each fault is named, and how often a correct engine is blamed."""
    named: Counter[str] = Counter()
    for model in range(models):
        for name, fault in FAULTS.items():
            found = faults_of(of(replace(fault.toy, salt=f"model {model}").probed()))
            named[name] += found == {fault.probe: fault.cause}
        toy_engine.forget()
    blamed, noises = 0, (0.0, 0.03, 0.1)
    for model in range(10 * models):
        for noise_nats in noises:
            blamed += bool(faults_of(of(Toy(salt=f"model {model}", noise_nats=noise_nats).probed())))
        toy_engine.forget()
    lines = [f"{named[name] / models:.2f}  {name}" for name in FAULTS]
    correct_runs = 10 * models * len(noises)
    sys.stdout.write("\n".join([*lines, f"{blamed} of {correct_runs} correct engines blamed for something", ""]))


if __name__ == "__main__":
    _rates(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
