"""Paired statistics: held against published intervals, SciPy and full enumeration; error rates as promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats  # type: ignore[import-untyped]

from parity import paired
from parity.paired import Counts, Means, Outcomes, Rule, decide
from parity.verdict import Outcome

TWO_POINTS = Rule(margin=0.02, tolerated=0.0)
QUANTIZED = Rule(margin=0.02, tolerated=0.005)


def outcomes(lost: int, won: int, n: int) -> Outcomes:
    reference, candidate = np.zeros(n), np.zeros(n)
    reference[:lost] = 1.0
    candidate[lost : lost + won] = 1.0
    reference[n // 2 :] = candidate[n // 2 :] = 1.0
    assert lost + won <= n // 2
    return Outcomes(reference=reference, candidate=candidate)


def clustered(values: Sequence[Sequence[float]], strata: Sequence[int] | None = None) -> Outcomes:
    """One list of differences a cluster."""
    differences = np.array([x for cluster in values for x in cluster], float)
    sizes = [len(cluster) for cluster in values]
    return Outcomes(
        reference=0.5 + differences / 2,
        candidate=0.5 - differences / 2,
        clusters=np.repeat(np.arange(len(values)), sizes),
        strata=None if strata is None else np.repeat(np.array(strata), sizes),
    )


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "won", "n", "confidence", "interval"),
    [
        # Cavo et al. 2012, as printed by the R package contingencytables 3.0.
        (6, 16, 161, 0.95, (-0.1240, -0.0054)),
        # The R package PropCIs, scoreci.mp, at 90 %: pooled counts of two published comparisons.
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),
        (48, 41, 549, 0.90, (-0.0157, 0.0414)),
        # Two independent computations of the non-inferiority example 48 against 38 of 200.
        (48, 38, 200, 0.95, (-0.04122, 0.14054)),
    ],
)
def test_tangos_interval_is_the_published_one(
    lost: int, won: int, n: int, confidence: float, interval: tuple[float, float]
) -> None:
    found = Counts(lost=lost, won=won, n=n).interval((1 - confidence) / 2, correction=0.0)
    assert found == pytest.approx(interval, abs=6e-5)


@given(
    lost=st.integers(0, 30), won=st.integers(0, 30), n=st.integers(61, 400), drop=st.floats(-0.3, 0.3, allow_nan=False)
)
@settings(max_examples=30, deadline=None)
def test_the_restricted_probabilities_are_the_most_likely_ones(lost: int, won: int, n: int, drop: float) -> None:
    def unlikelihood(q: float) -> float:
        cells = (q + drop, q, 1.0 - 2 * q - drop)
        return -sum(log_power(k, p) for k, p in zip((lost, won, n - lost - won), cells, strict=True))

    p_lost, p_won = paired.restricted(lost, won, n, drop)
    assert p_lost - p_won == pytest.approx(drop)
    best = optimize.minimize_scalar(
        unlikelihood, bounds=(max(0.0, -drop), (1.0 - drop) / 2), method="bounded", options={"xatol": 1e-10}
    )
    assert unlikelihood(p_won) <= best.fun + 1e-6


def log_power(k: int, p: float) -> float:
    return 0.0 if k == 0 else k * math.log(max(p, 1e-300))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 1), (10, 10), (14, 2), (200, 150), (1, 30)])
def test_a_loss_is_shown_by_the_exact_mcnemar_test(lost: int, won: int) -> None:
    ours = Counts(lost=lost, won=won, n=2000).p_fail(0.0)
    exact = stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue if lost + won else 1.0
    assert ours == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("n", [150, 400])
def test_no_true_drop_passes_or_fails_more_often_than_stated(n: int) -> None:
    """All outcomes of n documents, at the drop that must not pass and those that must not fail."""
    size = np.arange(n // 4)
    tables = [[Counts(lost=int(a), won=int(b), n=n) for b in size] for a in size]
    passes = np.array([[c.p_pass(0.02) <= 0.05 for c in row] for row in tables])
    for noise in (0.0, 0.01, 0.04, 0.08):
        assert probability(passes, n, drop=0.02, noise=noise) <= 0.05
    for tolerated in (0.0, 0.005):
        fails = np.array([[c.p_fail(tolerated) <= 0.005 for c in row] for row in tables])
        for noise in (0.0, 0.01, 0.04, 0.08):
            assert probability(fails, n, drop=tolerated, noise=noise) <= 0.005


def probability(region: np.ndarray, n: int, *, drop: float, noise: float) -> float:
    lost, won = np.meshgrid(np.arange(len(region)), np.arange(len(region)), indexing="ij")
    p_lost, p_won = noise / 2 + drop, noise / 2
    mass = stats.binom.pmf(lost, n, p_lost) * stats.binom.pmf(won, np.maximum(n - lost, 0), p_won / (1 - p_lost))
    assert mass.sum() > 0.9999
    return float(mass[region].sum())


def test_without_continuity_correction_a_drop_would_pass_too_often() -> None:
    """133 documents without a difference: a drop of two points leaves none with probability 0.068."""
    none = Counts(lost=0, won=0, n=135)
    assert none.p_pass(0.02, correction=0.0) < 0.05 < 0.98**135
    assert none.p_pass(0.02) > 0.05


counts = st.builds(
    lambda lost, won, more: Counts(lost=lost, won=won, n=lost + won + more),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(1, 2000),
)


@given(counts)
@settings(max_examples=60, deadline=None)
def test_exchanging_the_sides_mirrors_the_interval_and_it_holds_the_estimate(one: Counts) -> None:
    low, high = one.interval(0.05)
    assert low <= one.drop <= high
    turned = Counts(lost=one.won, won=one.lost, n=one.n).interval(0.05)
    assert turned == pytest.approx((-high, -low), abs=1e-9)


@given(counts)
@settings(max_examples=60, deadline=None)
def test_losing_one_more_document_never_makes_it_pass_nor_keeps_it_from_failing(one: Counts) -> None:
    worse = replace(one, lost=one.lost + 1)
    assert worse.p_pass(0.02) > 0.05 or one.p_pass(0.02) <= 0.05
    assert worse.p_fail(0.0) <= one.p_fail(0.0) + 1e-12


# Means ----------------------------------------------------------------------------------------------------------------


def test_repeated_documents_count_once() -> None:
    """Twenty questions, asked five times each, with the same answers: as much evidence as twenty questions."""
    values = [0.3, -0.1, 0.0, 0.2] * 5
    once, five = clustered([[v] for v in values]).estimate, clustered([[v] * 5 for v in values]).estimate
    assert isinstance(once, Means)
    assert isinstance(five, Means)
    assert once.drop == pytest.approx(five.drop)
    assert once.interval(0.05) == pytest.approx(five.interval(0.05))
    assert five.p_pass(0.3) == pytest.approx(once.p_pass(0.3))
    apart = Outcomes(reference=0.5 + np.repeat(values, 5) / 2, candidate=0.5 - np.repeat(values, 5) / 2)
    assert apart.estimate.p_pass(0.3) < five.p_pass(0.3) / 10


@pytest.mark.parametrize(("scale", "most"), [(1.0, 1.0), (20.0, 8.0)])
def test_means_by_hand(scale: float, most: float) -> None:
    """Clusters of 0.4, 0.0 and (0.1, 0.3), mean 0.2, and half of one more of 4/3 documents lost.

    Scaled by 20 the scores are bounded by nothing, and the most that a document did lose is 8.
    """
    one = clustered([[0.4], [0.0], [0.1, 0.3]])
    found = replace(one, reference=scale * one.reference, candidate=scale * one.candidate).estimate
    assert isinstance(found, Means)
    assert found.drop == pytest.approx(scale * 0.2)
    assert (found.clusters, found.degrees) == (3, 2)
    assert found.most == pytest.approx(most)
    assert found.squares == pytest.approx(scale**2 * (0.2**2 + 0.2**2 + 0.0))
    mean = (0.8 * scale + 4 / 3 * most / 2) / (4 + 4 / 3)
    error = math.sqrt(4 / 3 * (0.08 * scale**2 + (4 / 3 * (most / 2 - 0.2 * scale)) ** 2)) / (4 + 4 / 3)
    far = 0.95 * most
    least = math.sqrt(far * (most - far) / 3)
    t = (far - mean) / max(error, least)
    assert found.p_pass(far) == pytest.approx(stats.t.sf(t, 2), rel=0.25)  # Wallace, at 2 degrees of freedom


@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=3), min_size=2, max_size=60), st.floats(0.001, 0.999))
@settings(max_examples=100, deadline=None)
def test_means_pass_when_the_whole_interval_is_under_the_margin(values: list[list[float]], margin: float) -> None:
    found = clustered([[*cluster, 0.5] for cluster in values]).estimate
    low, high = found.interval(0.05)
    assert low <= found.drop <= high
    assert (found.p_pass(margin) <= 0.05) == (high <= margin) or high == pytest.approx(margin, rel=1e-6)


def test_deviations_are_from_the_mean_of_the_own_task() -> None:
    values = [[0.5]] * 30 + [[-0.5]] * 30
    pooled = clustered(values).estimate
    by_task = clustered(values, strata=[0] * 30 + [1] * 30).estimate
    assert isinstance(pooled, Means)
    assert isinstance(by_task, Means)
    assert by_task.squares == 0.0 < pooled.squares
    assert by_task.degrees == pooled.degrees - 1


@pytest.mark.parametrize("degrees", [8, 20, 300])
@pytest.mark.parametrize("tail", [0.2, 0.05, 0.005])
def test_the_t_tail_is_exact_enough_and_never_too_small(degrees: int, tail: float) -> None:
    t = float(stats.t.isf(tail, degrees))
    ours = float(stats.norm.sf(paired._as_normal(t, degrees)))
    assert tail * 0.999 <= ours <= tail * 1.012
    assert paired._as_student(paired._as_normal(t, degrees), degrees) == pytest.approx(t)


def test_where_nothing_differs_a_pass_needs_as_many_clusters_as_it_would_need_documents() -> None:
    few, many = (Outcomes(reference=np.full(n, 0.5), candidate=np.full(n, 0.5)) for n in (140, 200))
    assert isinstance(few.estimate, Means)
    assert decide(few, TWO_POINTS).outcome is Outcome.INCONCLUSIVE
    assert decide(many, TWO_POINTS).outcome is Outcome.PASS


def test_one_cluster_says_nothing() -> None:
    assert decide(clustered([[0.0] * 500]), TWO_POINTS).outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize("clusters", [40, 120])
def test_correlated_documents_pass_and_fail_at_the_stated_rates(clusters: int) -> None:
    """Five documents a cluster, which lean the same way; 800 draws at the drop of the margin and at none."""
    random = np.random.default_rng(5)
    runs, margin = 800, 0.1
    rule = Rule(margin=margin, tolerated=0.0)
    labels = np.repeat(np.arange(clusters), 5)
    wrong = {margin: 0, 0.0: 0}
    for drop in wrong:
        for _ in range(runs):
            lean = random.normal(0.0, 0.15, clusters)[labels]
            x = np.clip(drop + lean + random.normal(0.0, 0.15, len(labels)), -1, 1)
            found = Outcomes(reference=0.5 + x / 2, candidate=0.5 - x / 2, clusters=labels).estimate
            wrong[drop] += found.p_pass(margin) <= rule.alpha_pass if drop else found.p_fail(0.0) <= rule.alpha_fail
    assert wrong[margin] <= stats.binom.isf(0.001, runs, rule.alpha_pass)
    assert wrong[0.0] <= stats.binom.isf(0.001, runs, rule.alpha_fail)
    assert wrong[margin] > 0, "a rule that never errs would be too cautious to be one"


# Decisions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "won", "n", "wanted"),
    [
        (12, 10, 1319, Outcome.PASS),
        (0, 0, 1319, Outcome.PASS),
        (60, 14, 1319, Outcome.FAIL),
        (2, 1, 60, Outcome.INCONCLUSIVE),
        (30, 25, 700, Outcome.INCONCLUSIVE),
        (90, 30, 14042, Outcome.PASS),  # a loss is certain, and certainly under the margin
    ],
)
def test_three_answers(lost: int, won: int, n: int, wanted: Outcome) -> None:
    found = decide(outcomes(lost, won, n), TWO_POINTS)
    assert found.outcome is wanted
    assert (found.lost, found.won, found.n) == (lost, won, n)
    assert (found.more is None) == (wanted is not Outcome.INCONCLUSIVE)
    assert found.detectable > 0.0


def test_what_is_tolerated_does_not_fail() -> None:
    lossy = outcomes(45, 18, 1319)
    assert decide(lossy, TWO_POINTS).outcome is Outcome.FAIL
    assert decide(lossy, QUANTIZED).outcome is Outcome.INCONCLUSIVE


@given(counts)
@settings(max_examples=60, deadline=None)
def test_a_candidate_passes_when_the_whole_interval_is_under_the_margin(one: Counts) -> None:
    low, high = one.interval(TWO_POINTS.alpha_pass)
    assert (one.p_pass(0.02) <= 0.05) == (high <= 0.02 + 1e-12)
    assert low <= high


def test_the_documents_that_are_missing_do_decide() -> None:
    few = decide(outcomes(6, 6, 300), TWO_POINTS)
    assert few.outcome is Outcome.INCONCLUSIVE
    assert few.more is not None
    times = (300 + few.more) / 300
    assert decide(outcomes(round(6 * times), round(6 * times), 300 + few.more), TWO_POINTS).outcome is Outcome.PASS


def test_binary_scores_are_counted_and_others_averaged() -> None:
    assert isinstance(outcomes(3, 2, 50).estimate, Counts)
    assert isinstance(replace(outcomes(3, 2, 50), clusters=np.arange(50)).estimate, Counts)
    assert isinstance(replace(outcomes(3, 2, 50), clusters=np.arange(50) // 2).estimate, Means)
    assert isinstance(Outcomes(reference=np.array([0.5, 1.0]), candidate=np.array([0.5, 0.0])).estimate, Means)


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [(np.zeros(0), np.zeros(0)), (np.zeros(3), np.zeros(2)), (np.array([math.nan]), np.zeros(1))],
)
def test_scores_that_make_no_pairs_are_refused(reference: paired.Floats, candidate: paired.Floats) -> None:
    with pytest.raises(ValueError, match=r"scores must be finite|broadcast"):
        Outcomes(reference=reference, candidate=candidate)


@pytest.mark.parametrize("wrong", [{"margin": 0.0}, {"tolerated": 0.02}, {"alpha_fail": 0.0}, {"power": 1.0}])
def test_numbers_that_make_no_rule_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needed|lie between"):
        replace(TWO_POINTS, **wrong)


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005], 0.05) == (True, False, False, True)
    assert paired.holm([0.02, 0.02, 0.02], 0.05) == (False, False, False)
    assert paired.holm([0.01, 0.02, 0.04], 0.05) == (True, True, True)
    assert paired.holm([], 0.05) == ()


# Planning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.02, 0.08])
@pytest.mark.parametrize("drop", [0.0, 0.02, 0.04])
def test_planned_probabilities_are_the_exact_ones(noise: float, drop: float) -> None:
    n = 500
    for planned, region in zip((paired.passes, paired.fails), regions(n), strict=True):
        exact = probability(region, n, drop=drop, noise=noise)
        assert planned(n=n, drop=drop, noise=noise, rule=TWO_POINTS) == pytest.approx(exact, abs=0.04)


@cache
def regions(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Which counts of lost and won documents pass, and which fail."""
    tables = [[Counts(lost=lost, won=won, n=n) for won in range(n // 6)] for lost in range(n // 6)]
    return (
        np.array([[c.p_pass(0.02) <= 0.05 for c in row] for row in tables]),
        np.array([[c.p_fail(0.0) <= 0.005 for c in row] for row in tables]),
    )


def test_a_plan_says_what_documents_can_certify() -> None:
    gsm8k = paired.plan(n=1319, noise=0.04, rule=TWO_POINTS)
    assert gsm8k.passes == pytest.approx(0.96, abs=0.02)
    assert 700 < gsm8k.needed < 800
    assert 0.014 < gsm8k.certifiable < 0.015
    assert 0.022 < gsm8k.detectable < 0.026
    assert "1319 documents can certify a loss under 2 points" in gsm8k.sentence
    humaneval = paired.plan(n=164, noise=0.04, rule=TWO_POINTS)
    assert "164 documents cannot certify" in humaneval.sentence
    assert humaneval.passes < 0.3


@given(n=st.integers(50, 20_000), noise=st.floats(0.001, 0.3), more=st.integers(1, 5000))
@settings(max_examples=30, deadline=None)
def test_more_documents_certify_smaller_margins_and_catch_smaller_drops(n: int, noise: float, more: int) -> None:
    few, many = (paired.plan(n=count, noise=noise, rule=TWO_POINTS) for count in (n, n + more))
    assert many.certifiable <= few.certifiable + 1e-9
    assert many.detectable <= few.detectable + 1e-9
    assert many.needed == few.needed


def test_a_plan_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one document"):
        paired.plan(n=0, noise=0.04, rule=TWO_POINTS)


def test_the_unpaired_rule_is_the_one_of_tensorrt_llm() -> None:
    """The thresholds and the theta of its own reference files: GSM8K 3.20 points, MMLU 1.82; 30,913 see one point."""
    assert paired.unpaired_threshold(1319) == pytest.approx(0.0320, abs=5e-5)
    assert paired.unpaired_threshold(4096) == pytest.approx(0.0182, abs=5e-5)
    assert paired.unpaired_documents(0.01) == 30_913
    assert paired.unpaired_documents(0.02) == 7_729
