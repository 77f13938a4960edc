"""Performance rules: published values, SciPy, laws, and error rates in seeded simulations of the model in the docs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from parity import losses as losses_module
from parity.losses import (
    Floats,
    Rule,
    Spread,
    losses,
    needed,
    not_gated,
    pooled,
    seen,
    spread_of_pairs,
    spread_of_starts,
)
from parity.regression import (
    Decision,
    Step,
    against_history,
    control,
    decide,
    disturbances,
    next_step,
    withheld,
)
from parity.service_metrics import DEFINITIONS, Direction
from parity.timings import HostSample, LoadRun
from parity.traffic import GATED_MOST
from parity.verdict import Outcome, worst

LATENCY = Rule(direction=Direction.LOWER)
THROUGHPUT = Rule(direction=Direction.HIGHER)
NOTHING: Floats = np.zeros(0)
ALARMS = 0.001  # how improbable it is that a correct rule fails one of these simulations


def history(cv: float, degrees: int = 30) -> Spread:
    return Spread(sigma=math.sqrt(2.0) * cv, degrees=degrees, source="a history")


def around(mean: float, n: int = 20, spread: float = 0.01) -> Floats:
    """Losses with exactly this mean and standard deviation."""
    values = np.resize([1.0, -1.0], n) * spread * math.sqrt((n - 1) / n)
    return np.asarray(values + mean)


def needed_for(loss: float, sigma: float, rule: Rule) -> int:
    """Pairs with which a t test flags a loss with the rule's power, or passes it."""
    return next(
        n
        for n in range(3, 1000)
        if loss * math.sqrt(n) >= seen(n, rule.alpha_fail, rule.power) * sigma
        or (rule.bounds[1] - loss) * math.sqrt(n) >= seen(n, rule.alpha_pass, rule.power) * sigma
    )


# A loss ---------------------------------------------------------------------------------------------------------------


def test_a_loss_is_positive_where_the_candidate_is_worse() -> None:
    """100 and 95 tokens/s are a loss of 5 %, 100 and 105 ms as well; each is exactly the margin of 5 %."""
    for rule, candidate in ((THROUGHPUT, 95.0), (LATENCY, 105.0)):
        (loss,) = losses([100.0], [candidate], rule.direction)
        assert loss == pytest.approx(rule.bounds[1])
        assert decide(np.array([loss, loss]), NOTHING, spread=history(0.001), rule=rule).loss == pytest.approx(0.05)
        (gain,) = losses([candidate], [100.0], rule.direction)
        assert gain == -loss


@given(st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6)), min_size=1, max_size=8), st.floats(1e-6, 1e6))
def test_units_and_the_other_way_round_change_nothing(pairs: list[tuple[float, float]], unit: float) -> None:
    """Milliseconds or seconds, tokens/s or seconds a token; sides swapped, a loss is a gain."""
    old, new = [a for a, _ in pairs], [b for _, b in pairs]
    found = losses(old, new, Direction.LOWER)
    assert losses([a * unit for a in old], [b * unit for b in new], Direction.LOWER) == pytest.approx(found, abs=1e-9)
    assert losses([1 / a for a in old], [1 / b for b in new], Direction.HIGHER) == pytest.approx(found, abs=1e-9)
    assert losses(new, old, Direction.LOWER) == pytest.approx(-found)


@pytest.mark.parametrize(
    ("reference", "candidate", "direction", "message"),
    [
        ([1.0], [1.0, 2.0], Direction.LOWER, "1 starts of the reference, 2"),
        ([1.0], [0.0], Direction.LOWER, "positive values"),
        ([1.0], [math.nan], Direction.LOWER, "positive values"),
        ([1.0], [math.inf], Direction.HIGHER, "positive values"),
        ([1.0], [1.0], Direction.NEITHER, "one way is better"),
    ],
)
def test_what_has_no_loss_is_refused(
    reference: Sequence[float], candidate: Sequence[float], direction: Direction, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        losses(reference, candidate, direction)


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": 0.02, "tolerated": 0.02},
        {"margin": 1.0},
        {"tolerated": -0.01},
        {"alpha_fail": 0.0},
        {"confirming": 0.6},
        {"power": 0.4},
        {"least": 1},
        {"least": 5, "most": 4},
        {"unknown": 2},
        {"direction": Direction.NEITHER},
    ],
)
def test_numbers_that_make_no_rule_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needed|between|neither"):
        replace(LATENCY, **wrong)  # type: ignore[arg-type]


def test_which_metrics_may_decide() -> None:
    """A 99th percentile from 5,000 requests on and for a fifth; never a fact of the host, nor what may be 0."""
    p99 = DEFINITIONS["tpot_p99_s"]
    assert not_gated(p99, margin=0.2, requests=5000) is None
    for margin, requests in ((0.2, 4999), (0.19, 5000)):
        assert "99th percentile" in str(not_gated(p99, margin=margin, requests=requests))
    for name in ("tpot_p95_s", "ttft_p50_s", "output_tokens_per_s", "peak_memory_bytes", "start_up_s"):
        assert not_gated(DEFINITIONS[name], margin=0.05, requests=100) is None
    for name in ("failed_share", "queue_p95_s", "gpu_sm_clock_mean_mhz"):
        assert "decides nothing" in str(not_gated(DEFINITIONS[name], margin=0.5, requests=10**6))


# How much losses spread -----------------------------------------------------------------------------------------------


def test_a_spread_by_hand() -> None:
    """Losses 1, 2, 3 %: standard deviation 1 %. Days (e^0, e^.02) and (e^.01, e^.01): squares .0002 over 2 degrees."""
    of_pairs = spread_of_pairs(np.array([0.01, 0.02, 0.03]), "A/A")
    of_starts = spread_of_starts([[1.0, math.exp(0.02)], [math.exp(0.01)] * 2, [5.0]], "golden")
    assert of_pairs.sigma == pytest.approx(0.01)
    assert of_starts.sigma == pytest.approx(math.sqrt(2 * 0.0002 / 2))
    both = pooled([of_pairs, of_starts])
    assert both is not None
    assert both.sigma == pytest.approx(math.sqrt((0.01**2 + of_starts.sigma**2) / 2))
    assert [spread.degrees for spread in (of_pairs, of_starts, both)] == [2, 2, 4]
    assert both.source == "A/A, golden"
    assert pooled([]) is None
    with pytest.raises(ValueError, match="a spread needs two pairs, not 1"):
        spread_of_pairs(np.array([0.1]), "")
    with pytest.raises(ValueError, match="a spread needs a day with two starts"):
        spread_of_starts([[1.0], [2.0]], "")


def test_a_spread_from_little_is_taken_for_larger() -> None:
    """The stated factors, against SciPy's chi-squared quantiles; never under a tenth of a per cent."""
    factors = {degrees: Spread(sigma=1.0, degrees=degrees, source="").cautious for degrees in (6, 9, 19, 30, 100)}
    assert factors == pytest.approx({6: 1.45, 9: 1.33, 19: 1.20, 30: 1.15, 100: 1.15}, abs=0.005)
    for degrees in (5, 9, 30):
        for confidence in (0.05, 0.83, 0.95):
            exact = math.sqrt(degrees / stats.chi2.ppf(1 - confidence, degrees))
            assert Spread(sigma=1.0, degrees=degrees, source="").limit(confidence) == pytest.approx(exact, rel=0.01)
    assert Spread(sigma=0.0, degrees=30, source="").cautious == 0.001


def test_the_power_of_a_t_test_is_scipys() -> None:
    for n in (4, 5, 6, 8, 10, 20):
        for alpha in (0.01 / 3, 0.01, 0.05):
            for power in (0.9, 0.98):
                reached = stats.nct.sf(stats.t.isf(alpha, n - 1), n - 1, seen(n, alpha, power))
                assert reached == pytest.approx(power, abs=0.025)


# Stage AB -------------------------------------------------------------------------------------------------------------


def test_the_sequential_test_is_walds() -> None:
    """Wald's thresholds for 0.01 and 0.05 are 4.554 and -2.986; the evidence is the log-likelihood ratio."""
    up, down = losses_module.thresholds(LATENCY)
    assert [up, down] == pytest.approx([4.5539, -2.9857], abs=1e-4)
    spread = Spread(sigma=0.04, degrees=30, source="")
    values = np.array([0.03, -0.01, 0.05, 0.06])
    found = decide(values, NOTHING, spread=spread, rule=LATENCY)
    ratio = stats.norm.logpdf(values, LATENCY.bounds[1], spread.cautious) - stats.norm.logpdf(
        values, 0.0, spread.cautious
    )
    assert found.evidence == pytest.approx(ratio.cumsum())


def test_a_clean_candidate_passes_and_a_slow_one_fails_when_fresh_pairs_confirm_it() -> None:
    spread = history(0.01)
    clean = decide(around(0.0), NOTHING, spread=spread, rule=THROUGHPUT)
    assert (clean.outcome, clean.flagged, clean.step) == (Outcome.PASS, False, Step.NOTHING)
    assert clean.interval is not None
    assert clean.interval[1] <= 0.05
    slow = decide(around(0.06), NOTHING, spread=spread, rule=THROUGHPUT)
    assert (slow.outcome, slow.flagged, slow.step) == (Outcome.INCONCLUSIVE, True, Step.CONFIRMATION)
    assert "fresh pairs have to confirm" in slow.sentence
    confirmed = decide(around(0.06), around(0.055, slow.wanted), spread=spread, rule=THROUGHPUT)
    assert (confirmed.outcome, confirmed.step, confirmed.n) == (Outcome.FAIL, Step.NOTHING, slow.wanted)
    assert confirmed.interval is not None
    assert confirmed.interval[0] > 0.0
    chance = decide(around(0.06), around(0.015, slow.wanted, 0.04), spread=spread, rule=THROUGHPUT)
    assert (chance.outcome, chance.flagged, chance.step) == (Outcome.INCONCLUSIVE, True, Step.NOTHING)
    assert "do not confirm" in chance.sentence
    assert chance.more is not None
    small = decide(around(0.06), around(0.02, slow.wanted, 0.002), spread=spread, rule=THROUGHPUT)
    assert small.outcome is Outcome.PASS, "the fresh pairs rule out the margin"
    faster = decide(around(-0.3), NOTHING, spread=spread, rule=THROUGHPUT)
    assert faster.outcome is Outcome.PASS
    assert "a gain of" in faster.sentence


def test_a_flag_of_one_direction_is_no_flag_of_the_other() -> None:
    old, new = [100.0, 101.0, 99.0], [90.0, 91.0, 89.0]
    spread = history(0.01)
    throughput = decide(losses(old, new, Direction.HIGHER), NOTHING, spread=spread, rule=THROUGHPUT)
    latency = decide(losses(old, new, Direction.LOWER), NOTHING, spread=spread, rule=LATENCY)
    assert (throughput.flagged, latency.outcome) == (True, Outcome.PASS)


def test_one_pair_never_decides_and_the_last_look_is_kept() -> None:
    spread = history(0.01)
    one = decide(np.array([0.5]), NOTHING, spread=spread, rule=LATENCY)
    assert (one.outcome, one.flagged, one.step, one.wanted) == (Outcome.INCONCLUSIVE, False, Step.PAIRS, 1)
    middle = sum(LATENCY.bounds) / 2
    open_ = decide(around(middle, 40), NOTHING, spread=spread, rule=LATENCY)
    assert (open_.outcome, open_.n, open_.step, open_.wanted) == (Outcome.INCONCLUSIVE, 20, Step.NOTHING, 0)
    assert open_.interval is not None
    assert open_.interval[0] < 0.0
    assert open_.interval[1] > 0.05
    nearly = decide(around(middle + 0.003, 20), NOTHING, spread=history(0.02), rule=LATENCY)
    assert nearly.more is not None
    enough = decide(
        around(middle + 0.003, 20 + nearly.more), NOTHING, spread=history(0.02), rule=replace(LATENCY, most=1000)
    )
    assert enough.flagged
    assert abs(enough.n - 20 - nearly.more) <= 2, "as many as it said"
    clean = decide(around(0.015, 4, 0.0), NOTHING, spread=history(0.02), rule=LATENCY)
    assert clean.more is not None
    passed = decide(around(0.015, 4 + clean.more, 0.0), NOTHING, spread=history(0.02), rule=LATENCY)
    assert (passed.outcome, passed.n) == (Outcome.PASS, 4 + clean.more)
    with pytest.raises(ValueError, match="no pair"):
        decide(NOTHING, NOTHING, spread=spread, rule=LATENCY)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.05]), st.sampled_from([0.005, 0.02]))
@settings(max_examples=60)
def test_looking_after_each_pair_is_looking_at_all(seed: int, loss: float, cv: float) -> None:
    """What is measured after a decision changes nothing, and the interval says what the test says."""
    random = np.random.default_rng(seed)
    values, fresh = random.normal(loss, 1.4 * cv, 20), random.normal(loss, 1.4 * cv, 20)
    for spread in (history(cv), None):
        whole = decide(values, fresh, spread=spread, rule=LATENCY)
        for n in range(1, 21):
            part = decide(values[:n], NOTHING, spread=spread, rule=LATENCY)
            if part.step is not Step.PAIRS:
                break
            assert part.outcome is Outcome.INCONCLUSIVE
        assert n == (LATENCY.unknown if spread is None else len(whole.evidence))
        if part.step is Step.CONFIRMATION:
            part = decide(values[:n], fresh[: part.wanted], spread=spread, rule=LATENCY)
        assert part == whole
        assert whole.interval is not None
        low, high = whole.interval
        assert low < whole.loss < high
        assert (whole.outcome is Outcome.PASS) == (high < 0.05) or high == pytest.approx(0.05, abs=1e-6)
        if whole.outcome is Outcome.FAIL:
            assert low > 0.0


def test_without_a_history_pairs_are_looked_at_once() -> None:
    """Against SciPy's paired t test, at the rate of one of three metrics."""
    rule = THROUGHPUT.among(GATED_MOST)
    assert rule.alpha_fail == pytest.approx(0.01 / 3)
    few = decide(around(0.2, 11), NOTHING, spread=None, rule=rule)
    assert (few.outcome, few.flagged, few.step, few.wanted) == (Outcome.INCONCLUSIVE, False, Step.PAIRS, 1)
    assert few.interval is None
    assert decide(around(0.2, 11), NOTHING, spread=history(0.01, degrees=5), rule=rule).step is Step.PAIRS
    random = np.random.default_rng(1)
    flags = []
    for loss in np.linspace(0.0, 0.06, 40):
        values = random.normal(loss, 0.03, 12)
        found = decide(values, NOTHING, spread=None, rule=rule)
        flags.append(found.flagged)
        lost = stats.ttest_1samp(values, 0.0, alternative="greater").pvalue < rule.alpha_fail
        within = stats.ttest_1samp(values, rule.bounds[1], alternative="less").pvalue < rule.alpha_pass / 2
        assert (found.outcome is Outcome.PASS, found.flagged) == (within, lost and not within)
    assert 5 < sum(flags) < 35
    open_ = decide(around(0.035, 12, 0.05), NOTHING, spread=None, rule=rule)
    assert open_.more is not None
    assert 12 + open_.more == needed_for(0.035, open_.sigma, rule)


def test_the_detectable_loss_is_detected_with_the_stated_power() -> None:
    random = np.random.default_rng(2)
    own = decide(around(0.02, 12, 0.03), NOTHING, spread=None, rule=LATENCY)
    assert own.detectable is not None
    seen_by_t = [
        stats.ttest_1samp(random.normal(math.log1p(own.detectable), own.sigma, 12), 0.0, alternative="greater").pvalue
        < LATENCY.alpha_fail
        for _ in range(2000)
    ]
    assert np.mean(seen_by_t) == pytest.approx(LATENCY.power, abs=0.03)
    six = decide(around(sum(LATENCY.bounds) / 2, 6), NOTHING, spread=history(0.02), rule=LATENCY)
    assert six.detectable is not None
    up, _ = losses_module.thresholds(LATENCY)
    width, middle = LATENCY.bounds[1], LATENCY.bounds[1] / 2
    drawn = random.normal(math.log1p(six.detectable), six.sigma, (4000, 6))
    assert np.mean(((drawn - middle).sum(1) * width / six.sigma**2) >= up) == pytest.approx(LATENCY.power, abs=0.02)


def test_what_is_measured_next() -> None:
    spread = history(0.01)
    clean = decide(around(0.0), NOTHING, spread=spread, rule=LATENCY)
    one = decide(around(0.02, 1), NOTHING, spread=spread, rule=LATENCY)
    flagged = decide(around(0.06), NOTHING, spread=spread, rule=LATENCY)
    confirmed = decide(around(0.06), around(0.06, 8), spread=spread, rule=LATENCY)
    assert next_step([]) == next_step([clean]) == (Step.NOTHING, 0)
    assert next_step([clean, one]) == (Step.PAIRS, 1)
    assert next_step([one, flagged, clean]) == (Step.CONFIRMATION, flagged.wanted)
    assert next_step([one, flagged, confirmed]) == (Step.NOTHING, 0)
    unknown = decide(around(0.02, 1), NOTHING, spread=None, rule=LATENCY)
    assert next_step([one, unknown]) == (Step.PAIRS, 11)


def test_fresh_pairs_are_as_many_as_the_shown_loss_needs() -> None:
    """Four for a loss that is plain to see, more for one near the margin on a noisy host."""
    plain = decide(np.array([0.4, 0.4]), NOTHING, spread=history(0.02), rule=LATENCY)
    near = decide(around(0.055), NOTHING, spread=history(0.02), rule=LATENCY)
    assert plain.wanted == 4
    assert 6 <= near.wanted <= 12
    wilder = decide(around(0.06, 20, 0.05), NOTHING, spread=history(0.005), rule=LATENCY)
    steady = decide(around(0.06, 20, 0.005), NOTHING, spread=history(0.005), rule=LATENCY)
    assert wilder.flagged
    assert steady.wanted == 4 < wilder.wanted, "the first pairs spread more than the history says"


# Stage G --------------------------------------------------------------------------------------------------------------


def days_of(means: Sequence[float]) -> list[list[float]]:
    """Three starts a day whose mean logarithm is the one given."""
    return [[math.exp(mean + 0.001), math.exp(mean), math.exp(mean - 0.001)] for mean in means]


def test_a_prediction_limit_by_hand() -> None:
    """Days -2, -1, 0, 1, 2 %: s = 1.5811 %, t(0.99, 4) = 3.7469 (table), times sqrt(6/5): 6.4897 % above the mean."""
    days = days_of([-0.02, -0.01, 0.0, 0.01, 0.02])
    above = against_history(days, days_of([0.0650])[0], LATENCY)
    below = against_history(days, days_of([0.0648])[0], LATENCY)
    assert (above.outcome, above.flagged) == (Outcome.FAIL, True)
    assert (below.outcome, below.flagged) == (Outcome.INCONCLUSIVE, True)
    assert above.sigma == pytest.approx(0.015811, abs=1e-6)
    assert above.interval is not None
    assert above.interval[0] == pytest.approx(math.expm1(0.065 - 0.064897), abs=1e-5)
    other = against_history(days_of([0.02, 0.01, 0.0, -0.01, -0.02]), days_of([-0.0650])[0], THROUGHPUT)
    assert other.outcome is Outcome.FAIL, "fewer tokens/s"
    quiet = days_of([-0.002, -0.001, 0.0, 0.001, 0.002])
    assert against_history(quiet, days_of([0.001])[0], LATENCY).outcome is Outcome.PASS
    assert against_history(quiet, days_of([-0.3])[0], LATENCY).outcome is Outcome.PASS


@pytest.mark.parametrize("days", [1, 2, 3, 4])
def test_fewer_than_five_days_only_raise_suspicion(days: int) -> None:
    past = days_of(np.resize([-0.001, 0.001], days).tolist())
    slow, clean = (against_history(past, days_of([loss])[0], LATENCY) for loss in (0.5, 0.0))
    assert (slow.outcome, slow.flagged) == (Outcome.INCONCLUSIVE, True)
    assert (clean.outcome, clean.flagged) == (Outcome.INCONCLUSIVE, False)
    for found in (slow, clean):
        assert "fewer than 5 days never do" in found.sentence
        assert (found.step, found.wanted) == (Step.PAIRS, 2)
        assert (found.interval is None) == (days == 1)
    assert "raises suspicion" in slow.sentence
    assert "suspicion" not in clean.sentence


def test_a_day_of_fewer_starts_is_not_held_against_days_of_more() -> None:
    past = days_of([0.0] * 6)
    with pytest.raises(ValueError, match="as many starts as a day of its history has, 3, and has 2"):
        against_history(past, [1.0, 1.0], LATENCY)
    with pytest.raises(ValueError, match="as many starts"):
        against_history([], [1.0, 1.0], LATENCY)
    assert against_history(past, [1.0] * 5, LATENCY).outcome is Outcome.PASS


def test_the_detectable_loss_of_a_history_is_the_researched_one() -> None:
    """Run CV 1 %, day CV 0.5 %, three starts a day: 4.8 % with 5 days, 3.5 % with 10, 3.1 % with 20 (power 0.9)."""
    for count, percent in ((5, 4.8), (10, 3.5), (20, 3.1)):
        sigma = math.hypot(0.005, 0.01 / math.sqrt(3))
        means = np.resize([1.0, -1.0], count) - np.resize([1.0, -1.0], count).mean()
        days = days_of((means / means.std(ddof=1) * sigma).tolist())
        found = against_history(days, days_of([0.02])[0], LATENCY)
        assert found.detectable is not None
        assert 100 * math.log1p(found.detectable) == pytest.approx(percent, abs=0.15)


# The host -------------------------------------------------------------------------------------------------------------


def test_a_host_may_judge_if_its_sides_are_alike_and_steady() -> None:
    fit = control(around(0.001, 10, 0.014), THROUGHPUT, "A/A of today")
    assert fit.outcome is Outcome.PASS
    assert fit.spread.sigma == pytest.approx(0.014)
    assert (fit.spread.degrees, fit.spread.source) == (9, "A/A of today")
    assert fit.more is None
    leaning = control(around(0.04, 10, 0.014), THROUGHPUT, "")
    assert (leaning.outcome, leaning.more) == (Outcome.FAIL, None)
    assert "not alike" in leaning.sentence
    assert control(around(-0.04, 10, 0.014), THROUGHPUT, "").outcome is Outcome.FAIL
    wild = control(around(0.0, 12, 0.15), THROUGHPUT, "")
    assert wild.outcome is Outcome.FAIL
    assert "vary too much" in wild.sentence
    assert control(around(0.003, 10, 0.0005), THROUGHPUT, "").outcome is Outcome.PASS, "a bias nobody would notice"
    assert control(around(0.007, 10, 0.0005), THROUGHPUT, "").outcome is Outcome.FAIL


def test_too_few_pairs_do_not_say_whether_a_host_may_judge() -> None:
    few = control(around(0.0, 4, 0.014), THROUGHPUT, "")
    assert few.outcome is Outcome.INCONCLUSIVE
    assert few.more is not None
    assert control(around(0.0, 4 + few.more, 0.014), THROUGHPUT, "").outcome is Outcome.PASS
    unsure = control(around(0.015, 10, 0.03), THROUGHPUT, "")
    assert unsure.outcome is Outcome.INCONCLUSIVE, "its bias may be half of the margin"
    wide = control(around(0.0, 30, 0.05), THROUGHPUT, "")
    assert (wide.outcome, wide.more) == (Outcome.INCONCLUSIVE, losses_module.MOST), "comparisons may not end"
    assert "1000 or more pairs" in wide.sentence
    same = control(np.zeros(7), THROUGHPUT, "")
    assert same.outcome is Outcome.PASS
    with pytest.raises(ValueError, match="two pairs"):
        control(np.zeros(1), THROUGHPUT, "")


def gpu_run(*, throttled: Sequence[bool] = (False,) * 20, mhz: float = 1980.0, others: int | None = 0) -> LoadRun:
    samples = [
        HostSample(
            at_s=float(at),
            engine_bytes=None,
            gpu_utilisation=0.9,
            gpu_power_watts=500.0,
            gpu_sm_clock_mhz=mhz,
            gpu_throttled=is_throttled,
            load_average=None,
        )
        for at, is_throttled in enumerate(throttled)
    ]
    return LoadRun(
        profile="chat",
        seed=1,
        began_at="2026-11-24T12:00:00+00:00",
        measured_s=60.0,
        requests=(),
        host=tuple(samples),
        facts={} if others is None else {"gpu.processes": others},
        start_up_s=None,
        warnings=(),
    )


def test_a_throttled_or_shared_gpu_is_no_judge() -> None:
    quiet = gpu_run()
    assert disturbances([quiet, gpu_run(mhz=1960.0), gpu_run(others=None)]) == ()
    assert disturbances([gpu_run(throttled=[True] + [False] * 19)]) == (), "for a moment"
    assert disturbances([replace(quiet, host=())]) == ()
    (hot,) = disturbances([quiet, gpu_run(throttled=[True, True] + [False] * 18)])
    assert "throttled in 10% of the samples of start 2 of 2" in hot
    (shared,) = disturbances([gpu_run(others=3), quiet])
    assert "3 other processes were on the GPU in start 1 of 2" in shared
    (slower,) = disturbances([quiet, gpu_run(mhz=1500.0)])
    assert "1500 MHz in start 2 of 2 and at 1980 MHz in start 1 of 2" in slower
    decision = decide(around(0.06), around(0.06, 8), spread=history(0.01), rule=LATENCY)
    assert withheld(decision, []) is decision
    held = withheld(decision, [hot, shared])
    assert (held.outcome, held.step) == (Outcome.INCONCLUSIVE, Step.NOTHING)
    assert held.sentence.startswith(f"not judged: {hot}; {shared}; measured was a loss of")


# Planning -------------------------------------------------------------------------------------------------------------


def test_planned_pairs_are_the_researched_ones() -> None:
    """Paired t, own spread, alpha 1 %, power 90 %: 5 % at run CV 0.5/1/1.5/2 % needs 3/4/6/8 pairs, 3 % 4/6/10/15."""
    for loss, pairs in ((0.05, (3, 4, 6, 8)), (0.03, (4, 6, 10, 15))):
        rule = Rule(direction=Direction.LOWER, margin=math.expm1(loss))
        for cv, expected in zip((0.005, 0.01, 0.015, 0.02), pairs, strict=True):
            assert abs(needed(sigma=math.sqrt(2) * cv, rule=rule, known=False) - expected) <= 1
    assert needed(sigma=10.0, rule=LATENCY) > 1000
    assert needed(sigma=10.0, rule=LATENCY, known=False) == losses_module.MOST


@given(st.floats(0.002, 0.05), st.floats(0.02, 0.3), st.booleans())
def test_more_noise_or_a_smaller_margin_never_needs_fewer_pairs(sigma: float, margin: float, known: bool) -> None:
    rule = replace(LATENCY, margin=margin)
    pairs = needed(sigma=sigma, rule=rule, known=known)
    assert needed(sigma=1.3 * sigma, rule=rule, known=known) >= pairs
    assert needed(sigma=sigma, rule=replace(rule, margin=margin / 1.3), known=known) >= pairs
    assert needed(sigma=sigma, rule=rule.among(GATED_MOST), known=known) >= pairs


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_planned_pairs_decide(loss: float) -> None:
    """With the spread that was planned with; the rule of one of three metrics."""
    rule = THROUGHPUT.among(GATED_MOST)
    random, spread, runs = np.random.default_rng(5), history(0.02, degrees=1000), 500
    pairs = needed(sigma=spread.cautious, rule=rule)
    assert pairs <= rule.most
    drawn = random.normal(-math.log1p(-loss), spread.cautious, (runs, pairs))
    open_ = sum(decide(x, NOTHING, spread=spread, rule=rule).step is Step.PAIRS for x in drawn)
    assert open_ <= stats.binom.isf(ALARMS, runs, 1.0 - rule.power)


# Error rates, seeded simulations --------------------------------------------------------------------------------------
# ln metric = day + start + requests. A day is common to both sides of a pair and falls out; what is left of start and
# requests is the run CV. Three gated metrics share a part of it. More of it: benchmarks/performance_rules.py


def runs_of(
    random: np.random.Generator, *, loss: float, cv: float, runs: int, degrees: int | None, wrong: float = 1.0
) -> list[list[Decision]]:
    """Three correlated metrics a run, all with the same loss; `wrong`: the true CV over the history's."""
    rule = THROUGHPUT.among(GATED_MOST)
    ln_loss = -math.log1p(-loss)

    def pairs() -> Floats:
        common = random.standard_normal((runs, 1, 40))
        own = random.standard_normal((runs, GATED_MOST, 40))
        return np.asarray(ln_loss + math.sqrt(2.0) * cv * (math.sqrt(0.7) * common + math.sqrt(0.3) * own))

    first, fresh = pairs(), pairs()
    spreads: list[list[Spread | None]] = [[None] * GATED_MOST] * runs
    if degrees is not None:
        estimated = cv / wrong * np.sqrt(random.chisquare(degrees, (runs, GATED_MOST)) / degrees)
        spreads = [[history(float(each), degrees) for each in row] for row in estimated]
    return [
        [decide(x, y, spread=each, rule=rule) for x, y, each in zip(*of_run, strict=True)]
        for of_run in zip(first, fresh, spreads, strict=True)
    ]


def outcomes(runs: Sequence[Sequence[Decision]]) -> Counter[Outcome]:
    return Counter(worst([decision.outcome for decision in run]) for run in runs)


@pytest.mark.parametrize("degrees", [6, 9, 30, None])
@pytest.mark.parametrize("cv", [0.01, 0.02])
def test_a_correct_engine_fails_a_run_one_time_in_a_hundred_at_most(cv: float, degrees: int | None) -> None:
    runs = 500
    found = outcomes(runs_of(np.random.default_rng(7), loss=0.0, cv=cv, runs=runs, degrees=degrees))
    assert found[Outcome.FAIL] <= 0.01 * runs
    assert found[Outcome.PASS] >= 0.95 * runs


@pytest.mark.parametrize("wrong", [1.5, 2.0])
@pytest.mark.parametrize("degrees", [9, 30])
def test_a_history_that_was_too_quiet_makes_no_more_false_alarms(wrong: float, degrees: int) -> None:
    """Fresh pairs are what keeps the rate: of the first ones, more are flagged than the rate allows."""
    random, runs = np.random.default_rng(8), 500
    simulated = runs_of(random, loss=0.0, cv=0.02, runs=runs, degrees=degrees, wrong=wrong)
    assert outcomes(simulated)[Outcome.FAIL] <= 0.01 * runs
    flagged = sum(any(decision.flagged for decision in run) for run in simulated)
    assert flagged > 0.01 * runs or wrong < 2.0


@pytest.mark.parametrize("degrees", [9, 30, None])
@pytest.mark.parametrize("cv", [0.01, 0.02])
def test_a_loss_of_a_twentieth_fails_nine_times_in_ten(cv: float, degrees: int | None) -> None:
    """Of throughput, one of three gated metrics, with the default numbers of pairs."""
    runs = 500
    simulated = runs_of(np.random.default_rng(9), loss=0.05, cv=cv, runs=runs, degrees=degrees)
    of_throughput = Counter(run[0].outcome for run in simulated)
    assert of_throughput[Outcome.FAIL] >= 0.9 * runs
    assert of_throughput[Outcome.PASS] <= stats.binom.isf(ALARMS, runs, 0.05)


def test_the_simulation_would_see_a_test_on_requests() -> None:
    """Five starts a side of 300 requests (AR(1) 0.5, CV 20 %), one log-normal run CV: Mann-Whitney at 1 %."""
    random, runs, starts, n = np.random.default_rng(10), 150, 5, 300
    alarms = 0
    for _ in range(runs):
        noise = random.standard_normal((2, starts, n))
        requests = np.empty_like(noise)
        requests[..., 0] = noise[..., 0]
        for at in range(1, n):
            requests[..., at] = 0.5 * requests[..., at - 1] + math.sqrt(0.75) * noise[..., at]
        y = 0.2 * requests + 0.01 * random.standard_normal((2, starts, 1))
        old, new = y.reshape(2, -1)
        alarms += stats.mannwhitneyu(new, old, alternative="greater").pvalue < 0.01
    assert alarms > 3 * stats.binom.isf(ALARMS, runs, 0.01) / 2


def test_a_day_against_a_history_keeps_its_rate() -> None:
    random, runs, false = np.random.default_rng(11), 1500, 0
    for _ in range(runs):
        days = np.exp(random.normal(0.0, 0.01, (7, 1)) + random.normal(0.0, 0.01, (7, 3)))
        false += against_history(days[:6].tolist(), days[6].tolist(), LATENCY).outcome is Outcome.FAIL
    assert 0 < false <= stats.binom.isf(ALARMS, runs, LATENCY.alpha_fail)
