"""Which engine pays: costs by hand, laws that any correct costs keep, intervals that hold, and every wrong input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parity import cli, judge
from parity.decision import Advice, Decision
from parity.errors import ConfigError, IncomparableError
from parity.losses import Floats
from parity.payoff import UNJUDGED, Answer, Standing, decide, standing
from parity.reports import payoff as report
from parity.serving_costs import Costs, Machines, advantage, break_even, break_even_of, flips, interval_of, repaid
from parity.serving_rates import Speed, Speeds, rates, speeds
from parity.timings import Failure
from parity.verdict import Outcome, Verdict
from payoff_cases import in_an_open_loop, run_of, write, write_session

DATA = Path(__file__).parent / "data" / "decide"
SOUND = Standing(passed=("greedy: identical", "accuracy: kept"))
# One GPU of 1 an hour, busy at most half the day: a server costs 730 a month. Keeping the candidate costs
# 2 changes * (3 h * 1 + 1 h * 20) = 46 a month, getting it 120 * 20 / 12 = 200 a month: 246 in all.
COSTS = Costs(
    gpu_hour_price=1.0,
    output_tokens_per_day=(4e6, 8e6),
    utilisation=0.5,
    changes_per_month=2.0,
    build_hours_per_change=3.0,
    engineer_hours_per_change=1.0,
    engineer_hour_price=20.0,
    one_time_engineer_hours=120.0,
    horizon_months=12.0,
)
SLOW_S, FAST_S = 1 / 100, 1 / 125  # a token saves 0.002 s
EVEN = 246 / 730 * 43200 / 0.002  # tokens a day: what 246 buys of servers, times their seconds, by seconds a token


def measured(
    reference: Sequence[float] | Floats, candidate: Sequence[float] | Floats, *, paired: bool = True
) -> Speeds:
    return Speeds(
        reference=Speed(label="old", output_tokens_per_s=tuple(reference)),
        candidate=Speed(label="new", output_tokens_per_s=tuple(candidate)),
        profile="offline",
        paired=paired,
        output_tokens_per_request=300.0,
    )


STEADY = measured([100.0, 101.0, 99.0, 100.0], [125.0, 126.0, 124.0, 125.0])


def verdict(check: str, outcome: Outcome) -> Verdict:
    return Verdict(
        check=check, reference="old", candidate="new", outcome=outcome, headline=f"{check} says {outcome.value}",
        findings=(), causes=(), changed=(), warnings=(),
    )  # fmt: skip


prices = st.floats(0.01, 1000.0)
hours = st.floats(0.0, 500.0)
seconds = st.floats(1e-4, 1e-1)


@st.composite
def any_costs(draw: st.DrawFn, machines: Sequence[Machines] = tuple(Machines)) -> Costs:
    least = draw(st.floats(0.0, 1e9))
    return Costs(
        gpu_hour_price=draw(prices),
        output_tokens_per_day=(least, least + draw(st.floats(0.0, 1e9))),
        utilisation=draw(st.floats(0.05, 1.0)),
        changes_per_month=draw(st.floats(0.0, 10.0)),
        build_hours_per_change=draw(hours),
        engineer_hours_per_change=draw(hours),
        engineer_hour_price=draw(prices),
        one_time_engineer_hours=draw(hours),
        horizon_months=draw(st.floats(0.5, 60.0)),
        machines=draw(st.sampled_from(machines)),
        reference_build_hours_per_change=draw(hours),
        reference_engineer_hours_per_change=draw(hours),
    )


# By hand --------------------------------------------------------------------------------------------------------------


def test_costs_are_what_one_computes_by_hand() -> None:
    assert COSTS.extra == pytest.approx(246.0)
    assert COSTS.serving(4.32e6, SLOW_S) == pytest.approx(730.0)  # 43,200 s a day at 0.01 s a token: one server
    assert break_even(COSTS, SLOW_S, FAST_S) == pytest.approx(EVEN)
    assert advantage(COSTS, EVEN, SLOW_S, FAST_S) == pytest.approx(0.0, abs=1e-6)
    # Twice the break-even saves 2 * 246 a month, of which keeping takes 46: 2400 are back after 2400 / 446 months.
    assert repaid(COSTS, rates(STEADY), 2 * EVEN).months == pytest.approx(2400 / 446, rel=1e-3)


def test_whole_servers_are_counted_up() -> None:
    whole = replace(COSTS, machines=Machines.WHOLE)
    assert whole.serving(0.0, SLOW_S) == 0.0
    assert whole.serving(1.0, SLOW_S) == pytest.approx(730.0)
    assert whole.serving(4.4e6, SLOW_S) == pytest.approx(1460.0)
    # One server less is enough (730 > 246). The slow engine's are full every 4.32 M tokens, the fast one's every 5.4 M:
    # a server is saved in (4.32, 5.4], (8.64, 10.8], (12.96, 16.2], and from 17.28 M on always.
    assert break_even(whole, SLOW_S, FAST_S) == pytest.approx(17.28e6)
    # A free engine pays where it saves a server, too, and not before.
    free = replace(whole, changes_per_month=0.0, one_time_engineer_hours=0.0)
    assert break_even(free, SLOW_S, FAST_S) == pytest.approx(17.28e6)


@settings(max_examples=60, deadline=None)
@given(any_costs((Machines.WHOLE,)), st.floats(0.002, 0.02), st.floats(0.3, 0.95))
def test_the_break_even_of_whole_servers_is_the_last_turn_or_the_first(costs: Costs, slow: float, ratio: float) -> None:
    reference, candidate = (slow, slow * ratio) if costs.extra >= 0.0 else (slow * ratio, slow)
    at = break_even(costs, reference, candidate)
    full = 86400.0 * costs.utilisation
    assume(at * slow / full < 2000.0 and abs(costs.extra / costs.server_month % 1.0 - 0.5) < 0.4999)
    turns = [n * full / s for s in (reference, candidate) for n in range(int(1.5 * at * s / full) + 4)]
    beyond = 1.0 + 1e-9
    pays = {t: advantage(costs, t * beyond, reference, candidate) > 0.0 for t in turns}
    after = [won for t, won in pays.items() if t >= at / beyond]
    before = [won for t, won in pays.items() if t < at / beyond]
    if costs.extra >= 0.0:
        assert all(after)
        assert advantage(costs, at / beyond, reference, candidate) <= 0.0
    else:
        assert all(before)
        assert advantage(costs, at * beyond, reference, candidate) <= 0.0


# Laws -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(any_costs(), seconds, seconds, st.integers(-8, 8))
def test_scaling_all_prices_changes_no_break_even(costs: Costs, ours: float, theirs: float, power: int) -> None:
    scaled = replace(
        costs,
        gpu_hour_price=costs.gpu_hour_price * 2.0**power,
        engineer_hour_price=costs.engineer_hour_price * 2.0**power,
    )
    assert break_even(scaled, ours, theirs) == break_even(costs, ours, theirs)


@settings(max_examples=40, deadline=None)
@given(any_costs(), seconds, st.floats(0.01, 0.99), st.floats(1.0, 1e9))
def test_a_faster_and_free_engine_always_pays(costs: Costs, ours: float, ratio: float, tokens: float) -> None:
    free = replace(
        costs, changes_per_month=0.0, one_time_engineer_hours=0.0, output_tokens_per_day=(tokens, 2 * tokens)
    )
    assert advantage(free, tokens, ours, ours * ratio) >= 0.0
    assert math.isfinite(break_even(free, ours, ours * ratio))
    if free.machines is Machines.FRACTIONAL:
        assert break_even(free, ours, ours * ratio) == 0.0
        assert advantage(free, tokens, ours, ours * ratio) > 0.0


@settings(max_examples=30, deadline=None)
@given(any_costs(), seconds, seconds, st.floats(1.0, 500.0))
def test_no_traffic_never_pays_a_one_time_cost(costs: Costs, ours: float, theirs: float, once: float) -> None:
    costly = replace(
        costs, one_time_engineer_hours=once, changes_per_month=0.0, output_tokens_per_day=(0.0, 0.0)
    )  # fmt: skip
    assert advantage(costly, 0.0, ours, theirs) < 0.0
    speeds_ = measured([1 / ours] * 3, [1 / theirs] * 3)
    assert decide(speeds_, costly, SOUND).answer is Answer.REFERENCE
    assert repaid(costly, rates(speeds_), 0.0).months == math.inf


@settings(max_examples=40, deadline=None)
@given(any_costs(), seconds, seconds, st.floats(0.0, 1000.0))
def test_more_build_hours_never_lower_the_break_even(costs: Costs, ours: float, theirs: float, more: float) -> None:
    dearer = replace(costs, build_hours_per_change=costs.build_hours_per_change + more)
    assume(costs.extra >= 0.0)
    assert break_even(dearer, ours, theirs) >= break_even(costs, ours, theirs)


@settings(max_examples=40, deadline=None)
@given(any_costs(), seconds, seconds)
def test_an_engine_that_is_cheaper_to_keep_and_slower_pays_below_its_break_even(
    costs: Costs, ours: float, theirs: float
) -> None:
    assume(costs.extra < 0.0 and (theirs <= ours or theirs > 1.0001 * ours))  # nearer than that is rounding
    at = break_even(costs, ours, theirs)
    assert math.isinf(at) == (theirs <= ours)
    if costs.machines is Machines.FRACTIONAL and 0.0 < at < math.inf:
        assert advantage(costs, at / 1.01, ours, theirs) > 0.0 > advantage(costs, at * 1.01, ours, theirs)


# Uncertainty ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("paired", "machines"), [(True, "fractional"), (False, "fractional"), (True, "whole")])
def test_the_interval_of_the_break_even_holds_as_often_as_it_says(paired: bool, machines: str) -> None:
    """Starts spread by 2 %, half of its variance shared by a pair; 90 % is promised, by whole servers about that."""
    rng = np.random.default_rng(20261124)
    costs = replace(COSTS, machines=Machines(machines))
    fast_s = 1 / 128  # at 1 / 125 whole servers stand on the edge of a step
    truth, held, trials = break_even(costs, SLOW_S, fast_s), 0, 400 if machines == "fractional" else 100
    for _ in range(trials):
        shared = rng.normal(0.0, 0.014, 5) if paired else np.zeros(5)
        own = 0.014 if paired else 0.02
        ours, theirs = (s * (1.0 + shared + rng.normal(0.0, own, 5)) for s in (SLOW_S, fast_s))
        found = break_even_of(costs, rates(measured(1.0 / ours, 1.0 / theirs, paired=paired)))
        assert found.interval is not None
        held += found.interval[0] <= truth <= found.interval[1]
    assert held / trials >= 0.9 - 3.0 * math.sqrt(0.09 / trials)
    if machines == "fractional":
        assert held / trials <= 0.9 + 3.0 * math.sqrt(0.09 / trials)


def test_engines_of_one_speed_are_told_apart_no_more_often_than_promised() -> None:
    rng = np.random.default_rng(7)
    free = replace(COSTS, changes_per_month=0.0, one_time_engineer_hours=0.0)
    answers = []
    for _ in range(80):
        ours, theirs = (100.0 * np.exp(rng.normal(0.0, 0.02, 4)) for _ in range(2))
        answers.append(decide(measured(ours, theirs), free, SOUND).answer)
    assert answers.count(Answer.CANDIDATE) <= 80 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 80))
    assert answers.count(Answer.REFERENCE) <= 80 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / 80))
    assert answers.count(Answer.UNDECIDED) > 50


def test_where_nothing_may_be_saved_the_interval_reaches_to_infinity() -> None:
    found = break_even_of(COSTS, rates(measured([100.0, 104.0, 96.0], [101.0, 97.0, 105.0])))
    assert found.interval is not None
    assert found.interval[1] == math.inf


def test_what_pairs_share_makes_no_doubt() -> None:
    ours, theirs = [90.0, 100.0, 110.0], [108.0, 120.0, 132.0]
    pairs, sides = (rates(measured(ours, theirs, paired=paired)) for paired in (True, False))
    assert pairs.doubt is not None
    assert sides.doubt is not None
    assert pairs.doubt.saved_s < 0.3 * sides.doubt.saved_s
    assert (
        np.asarray(np.corrcoef(pairs.plausible().T))[0, 1] > 0.999
    )  # the candidate is 1.2 times as fast, whatever the day
    assert abs(np.asarray(np.corrcoef(sides.plausible().T))[0, 1]) < 0.1
    assert (pairs.doubt.degrees, sides.doubt.degrees) == (2, 3)  # Welch's 3.8, rounded down


def test_plausible_means_spread_as_the_intervals_say() -> None:
    found = rates(STEADY)
    assert found.interval_s is not None
    ours, theirs = found.plausible().T
    np.testing.assert_allclose(np.quantile(ours - theirs, (0.05, 0.95)), found.interval_s, rtol=0.1)
    whole = replace(COSTS, machines=Machines.WHOLE)
    assert interval_of(whole, found, lambda ours, theirs: ours) == interval_of(whole, found, lambda ours, theirs: ours)


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machines", Machines)
def test_the_answer_follows_the_traffic(machines: Machines) -> None:
    costs = replace(COSTS, machines=machines)

    def answer(least: float, most: float) -> Answer:
        return decide(STEADY, replace(costs, output_tokens_per_day=(least, most)), SOUND).answer

    assert answer(1e8, 2e8) is Answer.CANDIDATE
    assert answer(1e5, 2e6) is Answer.REFERENCE
    assert answer(1e5, 1e8) is Answer.TRAFFIC


def test_whole_servers_that_pay_at_both_ends_may_not_pay_between() -> None:
    """A server is saved in (4.32, 5.4] and in (8.64, 10.8] million tokens a day, and not between."""
    costs = replace(COSTS, machines=Machines.WHOLE)
    for least, most, answer in (
        (4.6e6, 9.2e6, Answer.TRAFFIC),
        (4.6e6, 5.1e6, Answer.CANDIDATE),
        (4.0e6, 8.0e6, Answer.TRAFFIC),
        (5.8e6, 8.0e6, Answer.REFERENCE),
    ):
        assert decide(STEADY, replace(costs, output_tokens_per_day=(least, most)), SOUND).answer is answer


def test_too_few_or_too_different_starts_decide_nothing() -> None:
    one = decide(measured([100.0], [125.0]), replace(COSTS, output_tokens_per_day=(1e8, 1e8)), SOUND)
    assert (one.answer, one.break_even.interval) == (Answer.UNDECIDED, None)
    assert "one start of an engine does not say how much starts vary" in one.sentence
    wild = decide(
        measured([100.0, 140.0, 70.0], [120.0, 90.0, 130.0]), replace(COSTS, output_tokens_per_day=(1e8, 1e8)), SOUND
    )
    assert wild.answer is Answer.UNDECIDED
    assert "pairs would decide" in wild.sentence


def test_the_number_of_pairs_that_is_said_to_decide_mostly_does() -> None:
    rng = np.random.default_rng(5)
    costs = replace(COSTS, output_tokens_per_day=(1.3 * EVEN, 1.3 * EVEN))

    def pairs(count: int) -> Speeds:
        return measured(*(1.0 / (s * (1.0 + rng.normal(0.0, 0.12, count))) for s in (SLOW_S, FAST_S)))

    needed = [
        int(found.sentence.split("about ")[1].split()[0])
        for found in (decide(pairs(10), costs, SOUND) for _ in range(20))
        if "about " in found.sentence
    ]
    assert needed
    decided = [decide(pairs(int(np.median(needed))), costs, SOUND).answer is Answer.CANDIDATE for _ in range(40)]
    assert np.mean(decided) > 0.75


def test_a_failed_verdict_bars_any_recommendation_and_comes_first() -> None:
    judged = standing([verdict("greedy", Outcome.FAIL), verdict("accuracy", Outcome.PASS)], {})
    found = decide(STEADY, replace(COSTS, output_tokens_per_day=(1e8, 1e8)), judged)
    assert (found.answer, found.costs_alone) == (Answer.BARRED, Answer.CANDIDATE)
    shown = report.terminal(found)
    assert shown.startswith("NO RECOMMENDATION")
    assert "1 of 2 verdicts on parity and accuracy failed" in shown.splitlines()[1]
    assert shown.index("greedy says FAIL") < shown.index("break-even")


@pytest.mark.parametrize(
    "judged",
    [
        UNJUDGED,
        standing([], {}),
        standing([verdict("greedy", Outcome.INCONCLUSIVE)], {}),
        standing([verdict("greedy", Outcome.PASS)], {"lockstep": "no scores"}),
    ],
)
def test_what_is_not_shown_to_be_as_good_is_not_recommended(judged: Standing) -> None:
    found = decide(STEADY, replace(COSTS, output_tokens_per_day=(1e8, 1e8)), judged)
    assert found.answer is Answer.UNDECIDED
    assert all(said in report.markdown(found).replace("\\", "") for said in judged.unsure)
    dear = decide(STEADY, replace(COSTS, output_tokens_per_day=(1e3, 1e3)), judged)
    assert dear.answer is Answer.REFERENCE  # keeping what one has needs no proof


def test_what_was_judged_and_what_not_is_among_the_assumptions() -> None:
    assumed = decide(STEADY, COSTS, Standing(passed=("greedy: identical", "logic: the same"))).assumed
    assert "the run is of these two engines; it passed greedy, logic" in assumed
    assert "accuracy was not judged in this run" in assumed
    assert "accuracy was not judged in this run" not in decide(STEADY, COSTS, SOUND).assumed


def test_a_verdict_on_performance_bars_nothing() -> None:
    assert standing([verdict("performance", Outcome.FAIL), verdict("greedy", Outcome.PASS)], {}) == Standing(
        passed=("greedy: greedy says PASS",)
    )


# What would flip it ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(any_costs(), seconds, st.floats(0.3, 1.5))
def test_each_flip_is_where_the_advantage_turns(costs: Costs, ours: float, ratio: float) -> None:
    assume(abs(ratio - 1.0) > 1e-3)
    found = rates(measured([1 / ours] * 2, [1 / (ours * ratio)] * 2))
    middle = costs.middle

    def value(name: str, x: float) -> float:
        if name == "output_tokens_per_day":
            return advantage(costs, x, ours, ours * ratio)
        if name == "candidate_output_tokens_per_s":
            return advantage(costs, middle, ours, 1 / x)
        changed: dict[str, Any] = {name: min(x, 1.0) if name == "utilisation" else x}
        return advantage(replace(costs, **changed), middle, ours, ours * ratio)

    scale = costs.server_month + abs(costs.extra) + costs.serving(middle, ours)
    for flip in flips(costs, found):
        if flip.at is not None:
            around = [value(flip.name, flip.at * edge) for edge in (1.0 - 1e-9, 1.0 + 1e-9)]
            assert min(around) <= 1e-6 * scale
            assert max(around) >= -1e-6 * scale


def test_the_flip_of_the_traffic_is_the_break_even_and_the_nearest_comes_first() -> None:
    found = flips(replace(COSTS, output_tokens_per_day=(2 * EVEN, 2 * EVEN)), rates(STEADY))
    by_name = {flip.name: flip for flip in found}
    assert by_name["output_tokens_per_day"].at == pytest.approx(EVEN, rel=1e-3)
    # 492 are saved by serving and 46 + 200 are spent: the one-time hours may rise to 446 / 200 of what they are.
    assert by_name["one_time_engineer_hours"].at == pytest.approx(120 * 446 / 200, rel=1e-3)
    assert by_name["horizon_months"].at == pytest.approx(12 * 200 / 446, rel=1e-3)
    nearer = {f.name: f for f in flips(replace(COSTS, output_tokens_per_day=(1.5 * EVEN, 1.5 * EVEN)), rates(STEADY))}
    assert nearer["utilisation"].at == pytest.approx(0.75, rel=1e-3)
    assert by_name["utilisation"].at is None  # it would have to be 1.0003 of the measured speed
    distances = [flip.distance for flip in found]
    assert distances == sorted(distances)


# From recordings ------------------------------------------------------------------------------------------------------


def test_speeds_are_the_output_tokens_of_each_start() -> None:
    found = speeds([run_of(100.0), run_of(110.0)], [run_of(125.0), run_of(120.0)], paired=True)
    assert found.reference.output_tokens_per_s == pytest.approx((100.0, 110.0))
    assert found.candidate.output_tokens_per_s == pytest.approx((125.0, 120.0))
    assert found.output_tokens_per_request == pytest.approx(300.0)


def test_what_makes_a_start_doubtful_is_told() -> None:
    run = run_of(100.0)
    half = replace(run, requests=(run.requests[0], replace(run.requests[1], failure=Failure.STALLED)))
    found = speeds([replace(run, warnings=("the client was the limit",))], [half], paired=False)
    assert found.notes == (
        "1 of 1 starts of the reference were doubted, first: the client was the limit",
        "1 of 2 requests failed in the candidate; they cost time and count as no tokens",
    )


def test_starts_that_do_not_compare_are_refused() -> None:
    run = run_of(100.0)
    for other, said in (
        (replace(run, profile="chat"), "profile is 'offline' in one and 'chat' in another"),
        (replace(run, seed=8), "seed is 7 in one and 8 in another"),
        (replace(run, facts={**run.facts, "gpu.0.name": "Another"}), "gpu.0.name is 'Example GPU'"),
        (run_of(100.0, tokens=200), "an answer has 300 output tokens in the reference and 200 in the candidate"),
    ):
        with pytest.raises(IncomparableError, match=said):
            speeds([run], [other], paired=False)
    uncounted = replace(
        run, requests=tuple(replace(r, output_tokens=None, chunk_tokens=None) for r in run.requests)
    )  # fmt: skip
    with pytest.raises(IncomparableError, match="whose tokens nobody counted"):
        speeds([run], [uncounted], paired=False)


def test_the_rate_of_arrivals_is_not_taken_for_a_speed() -> None:
    run = in_an_open_loop(run_of(100.0))
    with pytest.raises(ConfigError, match="rate of arrivals and not what an engine can do"):
        speeds([run], [run], paired=False)
    free = replace(run, requests=(run.requests[0], replace(run.requests[1], scheduled_s=1.0)))  # a slot came free
    assert speeds([run], [free], paired=False).reference.output_tokens_per_s


@pytest.mark.parametrize(
    ("ours", "theirs", "paired", "said"),
    [
        ([], [1.0], False, "at least one start"),
        ([0.0], [1.0], False, "speed above 0"),
        ([math.inf], [1.0], False, "speed above 0"),
        ([1.0, 1.0], [1.0], True, "pairs need both sides: 2 starts of the reference, 1 of the candidate"),
    ],
)
def test_speeds_that_are_none_are_refused(ours: list[float], theirs: list[float], paired: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rates(measured(ours, theirs, paired=paired))


# The command ----------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["decide", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_worked_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(capsys, DATA, "--costs", DATA / "costs.toml")
    documented = (Path(__file__).parents[1] / "docs" / "decide.md").read_text("utf-8")
    assert out.strip() in documented


def test_the_exit_code_says_who_pays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = write_session(tmp_path / "0001", [100.0, 101.0, 99.0], [125.0, 126.0, 124.0])
    shared = (session, session, "--costs", DATA / "costs.toml")
    monkeypatch.setattr(judge, "gather", lambda directory: directory)

    def conclude(outcome: Outcome) -> Any:
        return lambda _: judge.Conclusion(
            verdicts=(verdict("greedy", outcome),),
            could_not={},
            diagnosis=None,
            decision=Decision(advice=Advice.HOLD, sentence="", evidence=()),
        )

    for outcome, traffic, code in (
        (Outcome.PASS, ["1e8"], 0),
        (Outcome.PASS, ["1"], 1),
        (Outcome.PASS, ["1", "1e8"], 3),
        (Outcome.FAIL, ["1e8"], 1),
        (Outcome.INCONCLUSIVE, ["1e8"], 3),
    ):
        monkeypatch.setattr(judge, "conclude", conclude(outcome))
        assert command(capsys, *shared, "--run", tmp_path, "--output-tokens-per-day", *traffic)[0] == code
    page = tmp_path / "page.md"
    command(capsys, *shared, "--run", tmp_path, "--markdown", page)
    assert page.read_text("utf-8").startswith("## UNDECIDED: new-engine")


def test_half_a_pair_is_left_out_and_single_starts_are_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    session = write_session(tmp_path / "0001", [100.0, 101.0, 99.0], [125.0, 126.0])
    _, out, _ = command(capsys, session, "--costs", DATA / "costs.toml")
    assert "2 pairs of starts" in out
    alone = write(tmp_path / "one.jsonl", run_of(125.0))
    code, out, _ = command(capsys, session, alone, "--costs", DATA / "costs.toml")
    assert code == 3
    assert "one start of an engine does not say how much starts vary" in " ".join(out.split())


def test_options_come_before_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(capsys, DATA, "--costs", DATA / "costs.toml", "--output-tokens-per-day", "3e8", "9e8")
    _, same, _ = command(capsys, DATA, "--costs", DATA / "costs.toml", "--requests-per-day", "1e6", "3e6")
    assert out == same
    _, other, _ = command(capsys, DATA, "--costs", DATA / "costs.toml", "--horizon-months", "2", "--machines", "whole")
    assert "of 2 at" in other
    assert "whole servers are paid day and night" in other


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpu_hour_prise = 3", "unknown key 'gpu_hour_prise'; did you mean 'gpu_hour_price'?"),
        ("xyz = 3", "unknown key 'xyz'; valid are output_tokens_per_day, "),
        ("gpu_hour_price = 'much'", "'gpu_hour_price' must be a number, not 'much'"),
        ("gpu_hour_price = nan", "'gpu_hour_price' must be a number, not nan"),
        ("gpu_hour_price = 0", "gpu_hour_price must be above 0, not 0"),
        ("changes_per_month = true", "'changes_per_month' must be a number, not True"),
        ("changes_per_month = -1", "changes_per_month must be a number of at least 0, not -1"),
        ("utilisation = 40", "utilisation must be a share above 0 and at most 1, not 40"),
        ("horizon_months = 0", "horizon_months must be above 0, not 0"),
        ("gpus_per_server = 1.5", "'gpus_per_server' must be a whole number, not 1.5"),
        ("machines = 'halves'", "'machines' must be 'whole' or 'fractional', not 'halves'"),
        ("requests_per_day = [3, 1]", "must be least and most and at least 0, not 3 and 1"),
        ("requests_per_day = -1", "must be least and most and at least 0, not -1 and -1"),
        ("requests_per_day = [1, 2, 3]", "must be one number, or the least and the most, not [1, 2, 3]"),
        ("requests_per_day = 'many'", "'requests_per_day' must be a number, not 'many'"),
        ("output_tokens_per_day = 1", "give the traffic, as either --output-tokens-per-day or --requests-per-day"),
        ("horizon_months", "'horizon_months' is missing; give --horizon-months, or a file with --costs"),
        ("requests_per_day", "give the traffic, as either --output-tokens-per-day or --requests-per-day"),
        ("horizon_months == 3", "is not valid TOML"),
    ],
)
def test_a_wrong_number_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, said: str
) -> None:
    key = line.split("=", maxsplit=1)[0].strip()
    kept = [each for each in (DATA / "costs.toml").read_text("utf-8").splitlines() if not each.startswith(f"{key} ")]
    file = tmp_path / "costs.toml"
    file.write_text("\n".join([*kept, *([line] if "=" in line else [])]), "utf-8")
    code, out, err = command(capsys, DATA, "--costs", file)
    assert (code, out) == (2, "")
    assert said in err
    assert str(file) in err
    assert err.count("\n") == 1


def test_a_wrong_path_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    costs = ("--costs", DATA / "costs.toml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{}\n", "utf-8")
    one_sided = write_session(tmp_path / "one-sided", [100.0], [])
    half = write_session(tmp_path / "half", [100.0], [125.0])
    (half / "pair-01-candidate.jsonl").rename(half / "pair-02-candidate.jsonl")
    start = write(tmp_path / "one.jsonl", run_of(100.0))
    for arguments, said in (
        ((tmp_path / "none", tmp_path / "none", *costs), "cannot be read (No such file or directory)"),
        ((tmp_path / "empty", *costs), "holds no start of an engine, such as pair-01-reference.jsonl"),
        ((tmp_path / "bad.jsonl", start, *costs), "bad.jsonl': these timings are damaged"),
        ((start, *costs), "is no session's directory; name the candidate's start as well"),
        ((one_sided, *costs), "holds no start of an engine, such as pair-01-candidate.jsonl"),
        ((half, *costs), "has no complete pair of starts"),
        ((DATA, "--costs", tmp_path / "none.toml"), "the costs"),
        ((DATA, *costs, "--run", tmp_path), "holds no finished run"),
    ):
        code, out, err = command(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert said in err
        assert err.count("\n") == 1


def test_what_engines_are_called_stays_text() -> None:
    odd = replace(STEADY, candidate=replace(STEADY.candidate, label="<b>|*\x1b[31m"))
    found = decide(odd, COSTS, SOUND)
    assert "\x1b" not in report.terminal(found) + report.markdown(found)
    assert r"\<b\>\|\*" in report.markdown(found)
    assert all(len(line) <= 118 for line in report.terminal(found).splitlines())
