"""The laws check: each law fails on its own planted breach, keeps what rounding explains, and needs enough examples."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import laws, properties
from parity.checks import laws as check
from parity.checks.laws import Limits
from parity.laws import Role
from parity.noise import Noise
from parity.recording import Completion, FinishReason, Recording, Terminator, TokenLogprobs
from parity.verdict import Finding, Outcome, Verdict
from recordings import EOS, recording, token_logprobs
from toy_laws import Fault, ToyEngine

DRAWN = properties.draw(20, seed=5)
EXAMPLES = (*DRAWN[:19], replace(DRAWN[19], prompt="over and " * 100 + "out"))
WORKLOAD = properties.workload(EXAMPLES, can_stream=True)
RIGHT = ToyEngine().ask(WORKLOAD)
SIGMA = Limits().sigma_without_noise_nats
Change = Callable[[Completion], Completion]


def judged(
    side: Recording, *, reference: Recording | None = None, noise: Noise | None = None, limits: Limits | None = None
) -> Verdict:
    return check.check(reference, side, noise=noise, limits=limits or Limits())


def changed(changes: dict[str, Change], side: Recording = RIGHT) -> Recording:
    """The recording with some answers changed, by id."""
    assert changes.keys() <= set(side.by_id)
    answers = [changes[c.id](c) if c.id in changes else c for c in side.completions]
    return recording(answers, asked=side.workload)


def found(verdict: Verdict, law: str) -> Finding:
    (finding,) = [f for f in verdict.findings if f.metric == law]
    return finding


def failed(verdict: Verdict) -> list[str]:
    return [f.metric for f in verdict.findings if f.outcome is Outcome.FAIL]


def first_id(role: Role, keep: Callable[[Completion], bool]) -> str:
    """The first answer of a role that is as wanted."""
    return next(c.id for c in RIGHT.completions if c.id.endswith(f":{role.value}") and keep(c))


def long_enough(answer: Completion) -> bool:
    return len(answer.token_ids) > 3


# A correct engine ---------------------------------------------------------------------------------------------------


def test_a_correct_engine_passes_alone() -> None:
    verdict = judged(RIGHT)
    assert verdict.outcome is Outcome.PASS
    assert verdict.reference == "any correct engine"
    assert [f.metric for f in verdict.findings] == [law.name for law in laws.LAWS]
    assert all(f.n == 20 and not f.evidence for f in verdict.findings)


def test_the_drawn_examples_ask_every_law_something() -> None:
    """A law that no example could break would pass by saying nothing."""
    cases = laws.cases_of(RIGHT)
    assert sum(isinstance(c.answers[Role.STOP].stop_reason, str) for c in cases) > 5
    assert sum(c.answers[Role.LONG].terminator is not None for c in cases) > 3
    assert sum(len(c.answers[Role.LONG].token_ids) < c.asked[Role.AT_LEAST].min_tokens for c in cases) > 3
    assert sum(c.answers[Role.SEEDED].token_ids != c.answers[Role.LONG].token_ids for c in cases) > 10
    assert sum((a.text or "").endswith("\ufffd") for c in cases for a in c.answers.values()) > 0


def test_too_few_examples_are_inconclusive_and_can_still_fail() -> None:
    few = properties.workload(EXAMPLES[:15], can_stream=True)
    verdict = judged(ToyEngine().ask(few))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.headline.startswith("too little to judge by on 15 examples, 135 answers: input tokens, ")
    assert verdict.findings[0].sentence == "kept by all 15 examples; at least 16 are needed"
    cut = changed({"000:long": lambda c: replace(c, finish_reason=FinishReason.ABORT)}, ToyEngine().ask(few))
    assert judged(cut).outcome is Outcome.FAIL
    assert judged(ToyEngine().ask(properties.workload(EXAMPLES[:16], can_stream=True))).passed


def test_no_example_is_inconclusive() -> None:
    verdict = judged(recording([]))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.headline.endswith("there is no example")


def test_requests_of_other_kinds_are_left_aside() -> None:
    other = replace(RIGHT.completions[0], id="p-001", finish_reason=FinishReason.ABORT)
    nearly = replace(other, id="000:no-such-role")
    assert judged(recording([*RIGHT.completions, other, nearly], asked=RIGHT.workload)).passed


def test_the_order_of_completions_does_not_matter() -> None:
    broken = changed({"003:long": lambda c: replace(c, finish_reason=FinishReason.ABORT)})
    turned = recording(broken.completions[::-1], asked=broken.workload)
    assert judged(broken) == judged(turned)


# Exact laws ---------------------------------------------------------------------------------------------------------

INPUT: dict[str, Change] = {
    "cut at the end": lambda c: replace(c, prompt_token_ids=c.prompt_token_ids[:-1]),
    "a token before it": lambda c: replace(c, prompt_token_ids=(1, *c.prompt_token_ids)),
}


@pytest.mark.parametrize("change", INPUT.values(), ids=INPUT.keys())
@pytest.mark.parametrize("role", ["long", "stream"])
def test_working_on_other_tokens_than_were_sent_fails(role: str, change: Change) -> None:
    verdict = judged(changed({f"004:{role}": change}))
    assert failed(verdict) == ["input tokens"]
    assert "were sent; they part at token" in found(verdict, "input tokens").evidence[0]


def test_sent_ids_are_those_of_the_reference_where_there_is_one() -> None:
    """Another tokenizer's ids were sent, and the engine's own are no law."""
    sent = [replace(c, prompt_token_ids=(7, 8, 9)) for c in RIGHT.completions]
    candidate = recording(sent, asked=RIGHT.workload)
    assert failed(judged(candidate)) == ["input tokens"]
    assert judged(candidate, reference=recording(sent, asked=RIGHT.workload)).passed
    assert failed(judged(candidate, reference=RIGHT)) == ["input tokens"]
    unknown = recording([replace(c, own_prompt_token_ids=None) for c in sent], asked=RIGHT.workload)
    assert judged(unknown).passed
    assert failed(judged(changed({"004:stop": INPUT["cut at the end"]}, unknown))) == ["input tokens"]


BY_LENGTH = first_id(Role.SHORT, lambda c: c.finish_reason is FinishReason.LENGTH)
BY_TOKEN = first_id(Role.LONG, lambda c: c.terminator is not None and long_enough(c))
BY_STRING = first_id(Role.STOP, lambda c: isinstance(c.stop_reason, str))
ENDS: dict[str, tuple[str, Change, str]] = {
    "aborted": (BY_LENGTH, lambda c: replace(c, finish_reason=FinishReason.ABORT), "was given up by the engine"),
    "stop at the limit": (
        BY_LENGTH,
        lambda c: replace(c, finish_reason=FinishReason.STOP),
        "without a stop token or string",
    ),
    "length with an end": (
        BY_LENGTH,
        lambda c: replace(c, terminator=Terminator(token_id=EOS, logprobs=None)),
        "ends by length with",
    ),
    "length before the limit": (
        BY_TOKEN,
        lambda c: replace(c, terminator=None, finish_reason=FinishReason.LENGTH),
        "ends by length with",
    ),
    "a string nobody asked for": (BY_STRING, lambda c: replace(c, stop_reason="###"), "was ended by '###', asked were"),
}


@pytest.mark.parametrize(("id_", "change", "words"), ENDS.values(), ids=ENDS.keys())
def test_a_wrong_end_fails(id_: str, change: Change, words: str) -> None:
    finding = found(judged(changed({id_: change})), "ends")
    assert finding.outcome is Outcome.FAIL
    assert words in finding.sentence


def test_more_than_max_tokens_fails() -> None:
    def longer(answer: Completion) -> Completion:
        ids = (*answer.token_ids, 70)
        return replace(answer, token_ids=ids, logprobs=token_logprobs(ids, k=20))

    finding = found(judged(changed({BY_LENGTH: longer})), "ends")
    assert finding.outcome is Outcome.FAIL
    assert "tokens for max_tokens" in finding.sentence


TEXTS: dict[str, Change] = {
    "a space lost": lambda c: replace(c, text=(c.text or "").replace(" ", "", 1), decoded_text=c.text),
    "more than the tokens say": lambda c: replace(c, text=f"{c.text}!", decoded_text=c.text),
    "another text": lambda c: replace(c, text="x", decoded_text=c.text),
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS.keys())
def test_a_text_that_its_tokens_do_not_make_fails(change: Change) -> None:
    id_ = first_id(Role.ALONE, lambda c: " " in (c.text or "").strip() and c.decoded_text is None)
    verdict = judged(changed({id_: change}))
    assert failed(verdict) == ["text and tokens"]
    assert "where its tokens decode to" in found(verdict, "text and tokens").sentence


def test_a_text_without_a_token_fails() -> None:
    """Whether its tokens decode to nothing is not asked: the engine may not know."""

    def emptied(answer: Completion) -> Completion:
        return replace(answer, token_ids=(), logprobs=token_logprobs((), k=20), text="out of nothing")

    finding = found(judged(changed({BY_TOKEN: emptied})), "text and tokens")
    assert finding.sentence.endswith("the plain answer has no token and the text 'out of nothing'")


def test_a_character_cut_in_two_and_a_leading_space_are_no_breach() -> None:
    id_ = first_id(Role.ALONE, lambda c: c.decoded_text is None and not (c.text or "").endswith("\ufffd"))
    shown = changed({id_: lambda c: replace(c, decoded_text=f"{c.text}\ufffd\ufffd")})
    held = changed({id_: lambda c: replace(c, text=f"{c.text}\ufffd", decoded_text=c.text)})
    behind = changed({id_: lambda c: replace(c, text=f" {c.text}", decoded_text=c.text)})
    assert all(judged(side).passed for side in (shown, held, behind))


def test_log_probabilities_that_no_distribution_has_fail() -> None:
    def broken(answer: Completion) -> Completion:
        return replace(
            answer, logprobs=token_logprobs(answer.token_ids, chosen=[math.nan] * len(answer.token_ids), k=20)
        )

    id_ = first_id(Role.AGAIN, long_enough)
    finding = found(judged(changed({id_: broken})), "numbers")
    assert finding.outcome is Outcome.FAIL
    assert "with a log-probability that is not finite" in finding.sentence


# Laws up to noise ---------------------------------------------------------------------------------------------------


def diverted(position: int, slack_nats: float | None, *, token_id: int = 99) -> Change:
    """Another token at `position`, which is `slack_nats` in all away from the one that was chosen; None: outside."""

    def change(answer: Completion) -> Completion:
        assert answer.logprobs is not None
        ids = (*answer.token_ids[:position], token_id)
        rows = [list(answer.logprobs.row(p)) for p in range(position)]
        old = answer.token_ids[position]
        rows.append([(token_id, -0.5), *([] if slack_nats is None else [(old, -0.5 - slack_nats)])])
        chosen = [*answer.logprobs.chosen[:position], -0.5]
        return replace(
            answer,
            token_ids=ids,
            logprobs=TokenLogprobs.from_rows(chosen, rows, k=20),
            text=f"{answer.text}?",
            decoded_text=None,
            terminator=Terminator(token_id=EOS, logprobs=token_logprobs([EOS], k=20)),
            finish_reason=FinishReason.STOP,
            stop_reason=None,
        )

    return change


def flat(answer: Completion) -> Completion:
    """Every step is a tie between its token and token 99: the slack is then what the other answer says."""
    rows = [[(t, -1.0), (99, -1.0)] for t in answer.token_ids]
    return replace(answer, logprobs=token_logprobs(answer.token_ids, rows, k=20))


LONGEST = [
    c.id.partition(":")[0]
    for c in RIGHT.completions
    if c.id.endswith(":long") and long_enough(c) and len(RIGHT.by_id[c.id.replace("long", "short")].token_ids) > 2
]
NOISY = {Role.SHORT: "max_tokens", Role.ALONE: "neighbours", Role.TOP_1: "top_k 1"}


@pytest.mark.parametrize(("role", "law"), NOISY.items(), ids=NOISY.values())
def test_where_answers_part_the_slack_decides(role: Role, law: str) -> None:
    def parted(slack_nats: float | None, examples: int = 1) -> Finding:
        plain = {f"{n}:long": flat for n in LONGEST[:examples]}
        other = {role.id_of(n): diverted(1, slack_nats) for n in LONGEST[:examples]}
        return found(judged(changed({**plain, **other})), law)

    assert parted(0.0).outcome is Outcome.PASS
    assert parted(5.9 * SIGMA).outcome is Outcome.PASS
    one = parted(6.1 * SIGMA)
    assert one.outcome is Outcome.PASS
    assert one.sentence == "kept by all 20 examples; 1 suspicious, 2 allowed"
    three = parted(6.1 * SIGMA, examples=3)
    assert three.outcome is Outcome.FAIL
    assert "(6.1 sigma)" in three.sentence
    assert parted(25.1 * SIGMA).outcome is Outcome.FAIL
    assert parted(None).outcome is Outcome.FAIL, "outside the other's top k"


def test_measured_noise_takes_the_place_of_the_guess() -> None:
    noise = Noise(sigma_nats=0.02, measured_nats=0.02, positions=9, prompts=1, source="")
    side = changed({f"{LONGEST[0]}:long": flat, f"{LONGEST[0]}:alone": diverted(1, 0.7)})
    assert judged(side).warnings[0].startswith("no noise was measured")
    assert failed(judged(side, noise=noise)) == ["neighbours"]
    assert not judged(RIGHT, noise=noise).warnings


def test_an_answer_that_ends_where_the_other_goes_on_fails() -> None:
    id_ = first_id(Role.ALONE, long_enough)

    def shorter(answer: Completion) -> Completion:
        assert answer.logprobs is not None
        ids = answer.token_ids[:2]
        return replace(answer, token_ids=ids, logprobs=answer.logprobs.rows(0, 2), terminator=None)

    finding = found(judged(changed({id_: shorter})), "neighbours")
    assert finding.sentence.endswith("at token 2, where one ends and the other goes on")


def test_without_log_probabilities_a_parting_cannot_be_judged_and_equal_answers_can() -> None:
    bare = ToyEngine(scored=False).ask(WORKLOAD)
    verdict = judged(bare)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert {f.metric for f in verdict.findings if f.outcome is not Outcome.PASS} == {"numbers"}
    id_ = first_id(Role.ALONE, long_enough)
    other = changed({id_: lambda c: replace(c, token_ids=(c.token_ids[0], 99, *c.token_ids[2:]))}, bare)
    finding = found(judged(other), "neighbours")
    assert finding.outcome is Outcome.INCONCLUSIVE
    assert "log-probabilities are missing" in finding.sentence


def test_min_tokens_that_change_more_than_the_end_fail() -> None:
    id_ = first_id(Role.AT_LEAST, long_enough)
    assert failed(judged(changed({id_: diverted(0, 9.0)})))[0] == "min_tokens"


def test_a_stop_string_in_the_text_fails() -> None:
    kept = changed({BY_STRING: lambda c: replace(c, text=f"{c.text}{c.stop_reason}")})
    verdict = judged(kept)
    assert "stop strings" in failed(verdict)
    assert "has the stop string" in found(verdict, "stop strings").sentence


def test_a_text_cut_before_the_stop_string_fails() -> None:
    id_ = first_id(Role.STOP, lambda c: isinstance(c.stop_reason, str) and len(c.text or "") > 1)
    finding = found(judged(changed({id_: lambda c: replace(c, text=(c.text or "")[:-1])})), "stop strings")
    assert finding.outcome is Outcome.FAIL
    assert "has the same tokens" in finding.sentence


def test_a_streamed_text_that_is_not_the_whole_one_fails() -> None:
    id_ = first_id(Role.STREAM, lambda c: len(c.text or "") > 2)
    verdict = judged(changed({id_: lambda c: replace(c, text=(c.text or "")[1:])}))
    assert "stream" in failed(verdict)
    assert "the streamed answer is" in found(verdict, "stream").sentence


# One seed -----------------------------------------------------------------------------------------------------------


def test_another_answer_from_the_same_distributions_fails() -> None:
    id_ = first_id(Role.AGAIN, long_enough)
    twin = RIGHT.by_id[id_.replace("seeded-again", "seeded")]

    def redrawn(answer: Completion) -> Completion:
        assert answer.logprobs is not None
        other = next(i for i, _ in answer.logprobs.row(0) if i != answer.token_ids[0])
        rows = answer.logprobs.rows(0, 1)
        value = dict(rows.row(0))[other]
        scores = TokenLogprobs.from_rows([value], [rows.row(0)], k=20)
        return replace(answer, token_ids=(other,), logprobs=scores, terminator=None)

    finding = found(judged(changed({id_: redrawn})), "seed")
    assert twin.token_ids[0] == RIGHT.by_id[id_].token_ids[0]
    assert finding.outcome is Outcome.FAIL
    assert finding.sentence.endswith("at token 0, which rounding explains with probability 0 at most")


def test_one_seed_under_rounding_passes_and_without_a_seed_fails() -> None:
    """Rounding parts some pairs, an ignored seed nearly all."""
    asked = properties.workload(properties.draw(48, seed=6), can_stream=False)
    rounds = ToyEngine(rounding=0.005).ask(asked)
    pairs = [(c.answers[Role.SEEDED], c.answers[Role.AGAIN]) for c in laws.cases_of(rounds)]
    assert 0 < sum(first.token_ids != again.token_ids for first, again in pairs) < 12
    assert judged(rounds).passed
    assert "suspicious" in found(judged(rounds), "seed").sentence
    assert failed(judged(ToyEngine(rounding=0.005, fault=Fault.SEED_IGNORED).ask(asked))) == ["seed"]


def test_rounding_that_could_explain_every_parting_leaves_seeds_inconclusive() -> None:
    verdict = judged(ToyEngine(rounding=0.1).ask(WORKLOAD))
    assert found(verdict, "seed").outcome is verdict.outcome is Outcome.INCONCLUSIVE
    assert "it could explain a breach by every one" in found(verdict, "seed").sentence


def gumbel(p: list[float], luck: list[float]) -> int:
    return max(range(len(p)), key=lambda i: math.log(p[i]) - math.log(-math.log(luck[i])))


def inverted(p: list[float], luck: list[float]) -> int:
    return next((i for i, total in enumerate(itertools.accumulate(p)) if luck[0] < total), len(p) - 1)


@given(st.lists(st.floats(-3.0, 0.0), min_size=2, max_size=8), st.floats(0.0, 0.3), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_the_bound_on_partings_holds_for_the_usual_ways_to_draw(logits: list[float], noise: float, seed: int) -> None:
    """2,000 draws each of the Gumbel trick and of inverting the cumulated distribution, most probable first."""
    chance = random.Random(seed)
    sides = []
    for values in (logits, [v + chance.uniform(-noise, noise) for v in logits]):
        total = math.log(sum(map(math.exp, values)))
        sides.append(sorted(((i, v - total) for i, v in enumerate(values)), key=lambda entry: -entry[1]))
    rows = [TokenLogprobs.from_rows([0.0], [side], k=8) for side in sides]
    asked = replace(RIGHT.workload.sampling, temperature=1.0, top_k=0)
    bound = laws._parting(rows[0], rows[1], asked)
    apart = {gumbel: 0, inverted: 0}
    for _ in range(2000):
        luck = [chance.random() for _ in logits]
        by_token = dict(enumerate(luck))
        for draw in apart:
            drawn = [
                side[draw([math.exp(v) for _, v in side], [by_token[i] for i, _ in side] if draw is gumbel else luck)][
                    0
                ]
                for side in sides
            ]
            apart[draw] += drawn[0] != drawn[1]
    for count in apart.values():
        assert count / 2000 <= bound + 4 * math.sqrt(bound / 2000) + 1e-9


# Words --------------------------------------------------------------------------------------------------------------


def test_a_witness_shows_prompt_parameters_and_breach_of_the_smallest_example() -> None:
    ids = [f"{n:03}:long" for n in range(20)]
    verdict = judged(changed({i: (lambda c: replace(c, finish_reason=FinishReason.ABORT)) for i in ids}))
    finding = found(verdict, "ends")
    sizes = sorted(len(RIGHT.by_id[i].prompt_text or "") for i in ids)
    assert finding.sentence.startswith("broken by 20 of 20 examples, for one the plain answer was given up")
    assert len(finding.evidence) == 3
    smallest = next(i for i in ids if len(RIGHT.by_id[i].prompt_text or "") == sizes[0])
    assert f"prompt {RIGHT.by_id[smallest].prompt_text!r}; max_tokens " in finding.evidence[0]
    for word in ("min_tokens", "stop [", "temperature", "top_k", "seed"):
        assert word in finding.evidence[0]
    assert verdict.causes[0] == "max_tokens, stop tokens or finish reasons do not mean what they say"


def test_a_long_prompt_is_shortened_in_a_witness() -> None:
    finding = found(judged(changed({"019:long": lambda c: replace(c, finish_reason=FinishReason.ABORT)})), "ends")
    assert len(finding.evidence[0]) < 700
    assert "prompt of 903 characters, ...'" in finding.evidence[0]
    assert "and over and out'; max_tokens " in finding.evidence[0]
