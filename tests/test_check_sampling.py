"""The sampler audit: a simulated correct sampler passes, planted faults fail for the right reason, at promised rates.

`python tests/test_check_sampling.py` prints the error rates of docs/checks/sampling.md (some minutes).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from parity.checks.sampling import Limits, check, ks_uniform
from parity.errors import IncomparableError
from parity.fingerprint import Scalar
from parity.prompts import SamplingParams
from parity.recording import Completion, Recording, Terminator, TokenLogprobs
from parity.verdict import Finding, Outcome, Verdict
from recordings import EOS, completion, recording, token_logprobs

Floats = NDArray[np.float64]

VOCABULARY, K = 200, 20
T1 = replace(SamplingParams.greedy(max_tokens=64, logprobs=K), temperature=1.0, seed=None)


def policy(p: Floats, asked: SamplingParams, *, keep_ties: bool = False) -> Floats:
    """What is sampled from, over the whole vocabulary, step by step as vLLM does it. Shapes: [N, V].

    `keep_ties`: tokens as probable as the last of the top k stay too, as in vLLM.
    """
    w = p ** (1 / asked.temperature)
    w /= w.sum(axis=1, keepdims=True)
    order = np.argsort(-w, axis=1)
    w = np.take_along_axis(w, order, axis=1)
    if asked.min_p:
        w[w < asked.min_p * w[:, :1]] = 0.0
    if asked.top_k and keep_ties:
        w[w < w[:, asked.top_k - 1 : asked.top_k]] = 0.0
    elif asked.top_k:
        w[:, asked.top_k :] = 0.0
    w /= w.sum(axis=1, keepdims=True)
    w[np.cumsum(w, axis=1) - w >= asked.top_p] = 0.0 if asked.top_p < 1.0 else w[np.cumsum(w, axis=1) - w >= 1.0]
    q = np.empty_like(w)
    np.put_along_axis(q, order, w / w.sum(axis=1, keepdims=True), axis=1)
    return q


def distributions(rng: np.random.Generator, n: int, *, grid: float = 0.0) -> Floats:
    """Raw distributions from peaked to flat, as log-probabilities, of logits on a grid. Shape: [n, V]."""
    logits = rng.normal(size=(n, VOCABULARY)) * rng.uniform(2.0, 6.0, size=(n, 1))
    if grid:
        logits = np.round(logits / grid) * grid
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def simulated(
    applied: SamplingParams,
    *,
    asked: SamplingParams = T1,
    seed: int = 0,
    prompts: int = 16,
    tokens: int = 64,
    greedy: bool = False,
    repeats: int = 1,
    grid: float = 0.0,
) -> Recording:
    """An engine that was asked one thing and applied another; `repeats` > 1 gives each answer that many times.

    `grid`: step of its logits, as 16 bits make it; then it keeps ties at the edge of the top k.
    """
    rng = np.random.default_rng(seed)
    n = prompts * tokens
    logprobs = distributions(rng, n, grid=grid)
    q = np.cumsum(policy(np.exp(logprobs), applied, keep_ties=bool(grid)), axis=1)
    drawn = (q < rng.random((n, 1)) * q[:, -1:]).sum(axis=1)
    if greedy:
        drawn = logprobs.argmax(axis=1)
    ids = np.argsort(-logprobs, axis=1)[:, :K]
    top = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    chosen = logprobs[np.arange(n), drawn].astype(np.float32)

    def answer(number: int, repeat: int) -> Completion:
        at = slice(number * tokens, (number + 1) * tokens)
        values = TokenLogprobs(
            k=K,
            chosen=chosen[at].data,
            top_token_ids=ids[at].astype(np.int32).ravel().data,
            top=top[at].ravel().data,
        )
        made = completion(
            f"p-{number:03}-{repeat}",
            prompt_token_ids=(1, 20, number),
            token_ids=drawn[at].tolist(),
            terminator=None,
            rows=None,
        )
        return replace(made, logprobs=values)

    return recording([answer(i, r) for i in range(prompts) for r in range(repeats)], sampling=asked)


@cache
def correct(asked: SamplingParams, prompts: int = 16, tokens: int = 64, repeats: int = 1) -> Recording:
    """A reference that is not under test, whose texts have nothing to do with the candidate's."""
    for seed in range(1000, 1100):
        found = simulated(asked, asked=asked, seed=seed, prompts=prompts, tokens=tokens)
        if check(found, found, noise=None, limits=Limits()).outcome is not Outcome.FAIL:
            return found
    raise AssertionError("no sound reference in a hundred seeds")


def judged(candidate: Recording, reference: Recording | None = None, *, limits: Limits | None = None) -> Verdict:
    """Audit one engine against a sound reference that was asked the same."""
    asked = candidate.workload.sampling
    if reference is None:
        longest = max(len(c.token_ids) for c in candidate.completions)
        reference = correct(asked, len(candidate.completions), longest)
        texts = dict(zip((c.id for c in candidate.completions), reference.completions, strict=True))
        reference = replace(
            reference,
            workload=candidate.workload,
            completions=tuple(
                replace(texts[c.id], id=c.id, prompt_token_ids=c.prompt_token_ids) for c in candidate.completions
            ),
        )
    return check(reference, candidate, noise=None, limits=limits or Limits())


def failed(verdict: Verdict) -> set[str]:
    return {f.metric for f in verdict.findings if f.outcome is Outcome.FAIL}


def finding(verdict: Verdict, metric: str) -> Finding:
    (found,) = [f for f in verdict.findings if f.metric == metric]
    return found


POLICIES = {
    "T 1": T1,
    "T 1, top_p 0.95": replace(T1, top_p=0.95),
    "T 1, min_p 0.05": replace(T1, min_p=0.05),
    "T 0.7, top_k 5": replace(T1, temperature=0.7, top_k=5),
    "T 1.3, top_k 20, top_p 0.8": replace(T1, temperature=1.3, top_k=20, top_p=0.8),
    "T 0.8, min_p 0.1, top_k 10, top_p 0.9": replace(T1, temperature=0.8, min_p=0.1, top_k=10, top_p=0.9),
    "T 1.2, min_p 0.1": replace(T1, temperature=1.2, min_p=0.1),
}


# A correct sampler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", POLICIES.values(), ids=POLICIES)
def test_a_correct_sampler_passes(asked: SamplingParams) -> None:
    verdict = judged(simulated(asked, asked=asked, seed=1))
    assert verdict.passed, verdict
    assert [f.metric for f in verdict.findings] == ["support", "score", "PIT", "draws"]
    assert finding(verdict, "support").candidate == 0
    assert not any((verdict.causes, verdict.warnings, verdict.changed))


def test_the_policy_of_the_check_is_that_of_a_sampler_over_the_whole_vocabulary() -> None:
    """Held against the simulation's own step-by-step filters, on steps where the check calls its q exact."""
    from parity.checks import sampling  # noqa: PLC0415

    for asked in POLICIES.values():
        rng = np.random.default_rng(3)
        p = np.exp(distributions(rng, 64))
        steps = sampling._steps(simulated(asked, asked=asked, seed=3, prompts=1))
        q = sampling._policy(steps, asked, Limits()).q
        whole = -np.sort(-policy(p, asked), axis=1)
        right = np.concatenate([whole[:, :K], whole[:, K:].sum(axis=1, keepdims=True)], axis=1)
        exact = ~np.isnan(q[:, 0])
        assert exact.mean() > 0.25
        np.testing.assert_allclose(q[exact], right[exact], atol=2e-6)


def test_false_alarms_are_within_the_nominal_rate() -> None:
    """400 runs of 512 tokens. Nominal: 0.001 each by score and PIT, never by support; more than 4: P < 0.002."""
    alarms: list[str] = []
    for seed in range(400):
        asked = list(POLICIES.values())[seed % len(POLICIES)]
        run = simulated(asked, asked=asked, seed=seed + 5000, prompts=8)
        verdict = judged(run, correct_as(run))
        assert finding(verdict, "support").candidate == 0
        alarms += sorted(failed(verdict))
    assert len(alarms) <= 4, alarms
    assert stats.binom.sf(4, 400, 0.002) < 0.002


def correct_as(run: Recording) -> Recording:
    """Without a second sampler: a recording of the same question that says nothing, and so cannot be refused."""
    nothing = [
        completion(c.id, prompt_token_ids=c.prompt_token_ids, token_ids=(), terminator=None) for c in run.completions
    ]
    return replace(recording(nothing, sampling=run.workload.sampling), workload=run.workload)


def test_z_and_p_are_spread_as_under_the_null() -> None:
    """z is standard normal and p uniform over 300 runs, by scipy."""
    asked = POLICIES["T 1, top_p 0.95"]
    runs = [simulated(asked, asked=asked, seed=seed, prompts=8) for seed in range(300)]
    verdicts = [judged(run, correct_as(run)) for run in runs]
    z = [finding(v, "score").candidate for v in verdicts]
    p = [finding(v, "PIT").candidate for v in verdicts]
    assert stats.kstest(z, "norm").pvalue > 0.001
    assert stats.kstest(p, "uniform").pvalue > 0.001


# Planted faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("applied", "sign"), [(1.1, -1), (0.9, 1)])
def test_a_wrong_temperature_fails_and_is_named(applied: float, sign: int) -> None:
    for asked in (T1, replace(T1, top_k=10)):
        verdict = judged(simulated(replace(asked, temperature=applied), asked=asked, prompts=64))
        assert "score" in failed(verdict) <= {"score", "PIT"}
        assert sign * (finding(verdict, "score").candidate or 0.0) > 3.29
        (cause,) = verdict.causes
        estimate = float(cause.removeprefix("the answers look like temperature ").removesuffix(" (asked 1.00)"))
        assert estimate == pytest.approx(applied, abs=0.05)
        told = "too high, or filters ignored" if sign < 0 else "too low, or filters too tight"
        assert told in finding(verdict, "score").sentence


FAULTS: dict[str, tuple[SamplingParams, SamplingParams, str]] = {
    "top_p ignored": (POLICIES["T 1, top_p 0.95"], T1, "top_p 0.95 is not applied: "),
    "min_p ignored": (POLICIES["T 1, min_p 0.05"], T1, "min_p 0.05 is not applied: "),
    "top_k ignored": (replace(T1, top_k=5), T1, "top_k 5 is not applied: "),
    "top_k 6 for 5": (replace(T1, top_k=5), replace(T1, top_k=6), "none beyond rank 6: it looks like top_k 6"),
    "top_k 4 for 5": (replace(T1, top_k=5), replace(T1, top_k=4), "(it looks like top_k 4)"),
    "top_p too wide": (replace(T1, top_p=0.8), replace(T1, top_p=0.87), "top_p 0.8 is applied too loosely: "),
}


@pytest.mark.parametrize(("asked", "applied", "cause"), FAULTS.values(), ids=FAULTS)
def test_a_filter_applied_wrongly_fails_and_is_named(
    asked: SamplingParams, applied: SamplingParams, cause: str
) -> None:
    verdict = judged(simulated(applied, asked=asked))
    assert verdict.outcome is Outcome.FAIL
    assert cause in verdict.causes[0]
    tight = applied.top_k == 4
    assert ("support" in failed(verdict)) is not tight
    assert len(finding(verdict, "support").evidence) == (0 if tight else 3)


def test_a_leaking_filter_says_how_much_and_shows_the_worst() -> None:
    verdict = judged(simulated(T1, asked=POLICIES["T 1, top_p 0.95"]))
    found = finding(verdict, "support")
    assert found.evidence[0].startswith("p-0")
    assert ", top_p 0.95 ends at -" in found.evidence[0]
    assert verdict.headline.endswith("; decided by support, score")


def test_two_excluded_tokens_are_not_yet_a_failure() -> None:
    """The third decides; planted on a correct run by giving tokens of another rank."""
    asked = replace(T1, top_k=5)
    run = simulated(asked, asked=asked)

    def planted(count: int) -> Recording:
        first = run.completions[0]
        assert first.logprobs is not None
        ids = [first.logprobs.row(i)[9][0] for i in range(count)]
        worse = replace(first, token_ids=(*ids, *first.token_ids[count:]))
        return replace(run, completions=(worse, *run.completions[1:]))

    assert "support" not in failed(judged(planted(2), run))
    assert "support" in failed(judged(planted(3), run))


@pytest.mark.parametrize("asked", [T1, replace(T1, temperature=0.7), POLICIES["T 0.7, top_k 5"]])
def test_greedy_decoding_fails_and_is_told_so(asked: SamplingParams) -> None:
    verdict = judged(simulated(asked, asked=asked, greedy=True))
    assert "draws" in failed(verdict)
    assert verdict.causes[0].startswith("greedy decoding where sampling was asked: each of 1024 tokens is the most ")


def test_a_constant_seed_fails_although_each_answer_is_sampled() -> None:
    verdict = judged(simulated(T1, prompts=8, repeats=3))
    assert failed(verdict) == {"draws"}
    assert verdict.causes[0].startswith("every repeat gives the same answer: the seed is not used, or decoding is ")
    assert finding(verdict, "draws").evidence[0] == "p-000-0: 3 equal answers"


def test_repeats_that_differ_pass_and_a_settled_answer_may_repeat() -> None:
    run = simulated(T1, prompts=16)
    ids = (1, 20, 30)
    assert judged(replace(run, completions=tuple(replace(c, prompt_token_ids=ids) for c in run.completions))).passed
    sure = [completion(f"s-{i}", rows=[[(t, -1e-4), (9, -9.3)] for t in (30, 31, 32)]) for i in range(3)]
    assert "draws" not in failed(judged(recording(sure, sampling=T1), recording(sure, sampling=T1)))


def test_numbers_that_are_not_a_distribution_fail() -> None:
    rows = [[(30, math.nan), (31, -1.0)], [(31, -0.1), (30, -0.2)], [(32, -0.5), (33, -1.0)]]
    run = recording([completion(rows=rows, terminator=None)], sampling=T1)
    verdict = judged(run, correct_as(run))
    assert failed(verdict) == {"data"}
    assert verdict.causes == (
        "the engine's numbers are broken: 2 of 3 rows of log-probabilities are not a distribution",
    )


# Numbers ------------------------------------------------------------------------------------------------------------


def test_z_by_hand() -> None:
    """Two tokens of 0.75 and 0.25, 300 times the first and 100 times the second after 400 fair expectations; then 10
    more of the first. Var l = 0.75 * 0.25 * (ln 3)^2, so z = 10 / sqrt(400 * 0.1875).
    """
    row = [(5, math.log(0.75)), (6, math.log(0.25))]
    tokens = [5] * 310 + [6] * 90
    run = recording([completion(token_ids=tokens, rows=[row] * 400, terminator=None)], sampling=T1)
    assert finding(judged(run, run), "score").candidate == pytest.approx(10 / math.sqrt(75.0), abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=20, max_size=100))
def test_the_ks_distance_is_scipys(values: list[float]) -> None:
    distance, p = ks_uniform(np.array(values))
    assert distance == pytest.approx(stats.kstest(values, "uniform").statistic, abs=1e-12)
    assert p == pytest.approx(stats.kstest(values, "uniform").pvalue, abs=0.03)


@pytest.mark.parametrize("n", [200, 5000])
def test_the_ks_p_value_is_scipys_near_the_limit(n: int) -> None:
    for distance in np.array([1.7, 1.949, 2.1]) / math.sqrt(n):
        u = np.linspace(0.0, 1.0, n) * (1 - distance)
        found, p = ks_uniform(u)
        assert p == pytest.approx(stats.kstwo.sf(found, n), rel=0.03)


def test_the_named_temperature_error_is_caught_at_the_named_rate() -> None:
    """The delta method against simulation: at the error that the verdict names, 90 % of 100 runs fail."""
    asked = replace(T1, top_k=10)
    run = simulated(asked, asked=asked, prompts=8)
    percent = float(finding(judged(run), "score").sentence.split("wrong by ")[1].split(" %")[0])
    wrong = replace(asked, temperature=1 + percent / 100)
    runs = [simulated(wrong, asked=asked, seed=seed, prompts=8) for seed in range(100)]
    caught = sum("score" in failed(judged(r, correct_as(r))) for r in runs)
    assert 80 <= caught <= 99


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(8)), st.sampled_from([T1, POLICIES["T 0.7, top_k 5"]]))
def test_the_order_of_prompts_does_not_change_the_verdict(order: list[int], applied: SamplingParams) -> None:
    run = simulated(applied, prompts=8)
    turned = replace(
        run,
        completions=tuple(run.completions[i] for i in order),
        workload=replace(run.workload, request_ids=tuple(run.workload.request_ids[i] for i in order)),
    )
    assert judged(turned, correct_as(turned)) == judged(run, correct_as(run))


# Not enough to say --------------------------------------------------------------------------------------------------


def test_too_few_tokens_are_inconclusive_unless_the_support_fails() -> None:
    asked = replace(T1, top_k=5)
    few = judged(simulated(asked, asked=asked, prompts=3))
    assert few.outcome is Outcome.INCONCLUSIVE
    assert few.headline.endswith("decided by score, PIT")
    leaking = judged(simulated(T1, asked=asked, prompts=3))
    assert failed(leaking) == {"support"}
    assert leaking.causes[0].startswith("top_k 5 is not applied: ")


def test_what_the_top_k_cannot_show_is_inconclusive_and_says_what_to_ask() -> None:
    for asked in (replace(T1, temperature=0.7), replace(T1, temperature=1.3, top_p=0.9), replace(T1, top_k=50)):
        verdict = judged(simulated(asked, asked=asked))
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert "ask for more tokens, with top_k <= 20 or temperature 1" in finding(verdict, "score").sentence
        assert verdict.warnings[0].startswith("the reference's own sampling could not be audited in full: ")


def test_ties_at_an_edge_are_left_out_and_are_no_violations() -> None:
    """Engines keep one of the tied tokens or all: top_k 2 here allows any of the three."""
    row = [(5, math.log(0.4)), *((t, math.log(0.2)) for t in (6, 7, 8))]
    tokens = [5, 6, 5, 7, 8] * 60
    run = recording([completion(token_ids=tokens, rows=[row] * 300, terminator=None)], sampling=replace(T1, top_k=2))
    verdict = judged(run, run)
    assert not failed(verdict)
    assert "leaves a choice at 0 of 300 tokens, 200 are needed" in finding(verdict, "score").sentence


def test_settled_steps_are_left_out() -> None:
    row = [(5, math.log(0.96)), (6, math.log(0.04))]
    run = recording([completion(token_ids=[5, 6] * 200, rows=[row] * 400, terminator=None)], sampling=T1)
    assert "leaves a choice at 0 of 400 tokens" in finding(judged(run, run), "PIT").sentence


def test_equally_probable_tokens_are_neither_greedy_nor_evidence() -> None:
    """Each token is one of the most probable two, and none tells anything about the temperature."""
    row = [(5, math.log(0.5)), (6, math.log(0.5))]
    run = recording([completion(token_ids=[5, 6] * 150, rows=[row] * 300, terminator=None)], sampling=T1)
    verdict = judged(run, run)
    assert finding(verdict, "draws").outcome is finding(verdict, "score").outcome is Outcome.INCONCLUSIVE
    assert "draws" not in failed(verdict)


def test_nothing_is_inconclusive() -> None:
    run = recording([completion(token_ids=(), terminator=None)], sampling=T1)
    assert judged(run, run).outcome is Outcome.INCONCLUSIVE


# Must not be judged -------------------------------------------------------------------------------------------------


def without_logprobs(c: Completion) -> Completion:
    return replace(c, logprobs=None)


def without_stop_logprobs(c: Completion) -> Completion:
    stop = completion(terminator=EOS).terminator
    assert stop is not None
    return replace(c, terminator=replace(stop, logprobs=None))


@pytest.mark.parametrize(
    ("edit", "part"), [(without_logprobs, "the answer"), (without_stop_logprobs, "the stop token")]
)
def test_missing_log_probabilities_are_refused(edit: Callable[[Completion], Completion], part: str) -> None:
    run = simulated(T1, prompts=4)
    hidden = replace(run, completions=(edit(run.completions[0]), *run.completions[1:]))
    with pytest.raises(IncomparableError, match=rf"returned no log-probabilities for {part} of 'p-000-0', "):
        judged(hidden, run)


def silent(probabilities: list[float], *, seed: int) -> Recording:
    """An engine without log-probabilities: eight prompts, four draws each, by its own probabilities."""
    draw = np.random.default_rng(seed)
    answers = []
    for number, repeat in itertools.product(range(8), range(4)):
        token_ids = draw.choice(len(probabilities), size=24, p=probabilities).tolist()
        made = completion(
            f"p-{number}~{repeat}", prompt_token_ids=(1, number), token_ids=token_ids, terminator=None, rows=None
        )
        answers.append(made)
    return recording(answers, sampling=T1)


def test_two_engines_without_log_probabilities_are_never_passed() -> None:
    flat = [0.25] * 4
    verdict = judged(silent(flat, seed=1), silent(flat, seed=2))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "no difference seen in the sampled answers of 8 prompts" in verdict.headline
    assert "can be audited" in verdict.headline


def test_an_engine_without_log_probabilities_that_samples_otherwise_fails() -> None:
    verdict = judged(silent([0.55, 0.15, 0.15, 0.15], seed=1), silent([0.25] * 4, seed=2))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].evidence[0].startswith("farthest apart: p-")


def test_stop_tokens_are_judged_too() -> None:
    """A stop token outside the filters counts."""
    asked = replace(T1, top_k=1)
    stops = [completion(f"p-{i}", token_ids=(30,), terminator=EOS) for i in range(3)]
    fine = recording(stops, sampling=asked)
    assert not failed(judged(fine, fine))
    end = Terminator(token_id=EOS, logprobs=token_logprobs([EOS], [[(7, -0.1), (EOS, -3.0)]]))
    wrong = recording([replace(c, terminator=end) for c in stops], sampling=asked)
    assert failed(judged(wrong, correct_as(wrong))) == {"support"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": 0.0}, "is greedy: there is no sampling to audit"),
        ({"repetition_penalty": 1.1}, "sets repetition_penalty 1.1: the policy then"),
        ({"presence_penalty": 0.5}, "sets presence_penalty 0.5: "),
        ({"frequency_penalty": 0.5}, "sets frequency_penalty 0.5: "),
        ({"min_tokens": 4}, "sets min_tokens 4: "),
    ],
)
def test_what_does_not_follow_from_raw_log_probabilities_is_refused(changes: dict[str, float], sentence: str) -> None:
    run = recording([completion()], sampling=replace(T1, **changes))  # type: ignore[arg-type]
    with pytest.raises(IncomparableError, match=sentence):
        judged(run, run)


def test_forced_tokens_and_processed_log_probabilities_are_refused() -> None:
    forced = recording([completion()], sampling=T1, forced_from="0" * 64)
    with pytest.raises(IncomparableError, match="scores given tokens"):
        judged(forced, forced)
    context: dict[str, Scalar] = {"engine.logprobs_mode": "processed_logprobs"}
    processed = recording([completion()], sampling=T1, context=context)
    with pytest.raises(IncomparableError, match="returned processed_logprobs: the audit needs "):
        judged(processed, processed)


def test_a_reference_that_does_not_sample_as_asked_is_refused() -> None:
    wrong = simulated(T1, greedy=True)
    with pytest.raises(IncomparableError, match=r"did not sample as asked: greedy decoding where .*; record it again"):
        judged(simulated(T1), wrong)


# Error rates --------------------------------------------------------------------------------------------------------


def rates(runs: int) -> str:
    """A Markdown table: the share of runs that fail, of correct samplers and of planted faults, by tokens a run."""
    top_k_10 = replace(T1, top_k=10)
    cases = {f"correct, {name}": (asked, asked) for name, asked in POLICIES.items()}
    cases |= {f"T {t} for 1, no filter": (T1, replace(T1, temperature=t)) for t in (0.9, 1.1)}
    cases |= {f"T {t} for 1, top_k 10": (top_k_10, replace(top_k_10, temperature=t)) for t in (0.9, 1.1)}
    cases |= {name: (asked, applied) for name, (asked, applied, _) in FAULTS.items()}
    lines = ["| | 512 tokens | 1024 | 4096 |", "|---|---|---|---|"]
    for name, (asked, applied) in cases.items():
        shares = []
        for prompts in (8, 16, 64):
            made = (simulated(applied, asked=asked, seed=20_000 + i, prompts=prompts) for i in range(runs))
            shares.append(sum(bool(failed(judged(run, correct_as(run)))) for run in made) / runs)
        lines.append(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


def test_ties_that_an_engine_keeps_at_the_edge_of_top_k_are_no_violations() -> None:
    """Logits in bfloat16 step by 0.125: ties at the edge add tokens to top_k, and with them the nucleus reaches on."""
    asked = replace(T1, temperature=0.8, top_k=10, top_p=0.95)
    verdicts = [judged(simulated(asked, asked=asked, seed=seed, grid=0.125)) for seed in range(8)]
    assert not [v for v in verdicts if v.outcome is Outcome.FAIL]
    assert not [f.candidate for v in verdicts for f in v.findings if f.metric == "support" and f.candidate]


if __name__ == "__main__":
    sys.stdout.write(rates(150))
