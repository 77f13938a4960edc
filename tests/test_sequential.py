"""Sequential judgement: the order is seeded, batches do not matter, and error rates hold although one looks often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from parity import paired, sequential
from parity.paired import Counts, Floats, Rule
from parity.sequential import LOOKS, Draws, EProcess, GroupSequential, Monitor, draw, levels, monitor
from parity.verdict import Outcome

TWO_POINTS = Rule(margin=0.02, tolerated=0.0)
KINDS = [GroupSequential, EProcess]
ALARMS = 0.001  # how improbable it is that a correct rule fails one of these simulations


def names(n: int) -> list[str]:
    return [f"task/{i}" for i in range(n)]


def plain(n: int) -> Draws:
    return Draws(documents=np.arange(n), weights=np.ones(n), units=np.arange(n))


def documents(random: np.random.Generator, n: int, *, drop: float, noise: float) -> Floats:
    return random.choice([1.0, -1.0, 0.0], size=n, p=[noise / 2 + drop, noise / 2, 1 - noise - drop])


def simulated(make: Callable[[], Monitor], sample: Callable[[], Floats], runs: int) -> tuple[Counter[Outcome], float]:
    """How often each answer is given, and after how many documents on average."""
    answers: Counter[Outcome] = Counter()
    used = 0
    for _ in range(runs):
        one = make()
        answers[one.update(sample())] += 1
        used += one.n
    return answers, used / runs


# The order ------------------------------------------------------------------------------------------------------------


def test_the_order_depends_on_the_seed_and_the_names_alone() -> None:
    keys = names(200)
    order = [keys[i] for i in draw(keys, seed=1).documents]
    assert sorted(order) == sorted(keys)
    assert order != keys
    backwards = keys[::-1]
    assert [backwards[i] for i in draw(backwards, seed=1).documents] == order
    assert [keys[i] for i in draw(keys, seed=2).documents] != order
    more = names(300)
    assert [key for key in (more[i] for i in draw(more, seed=1).documents) if key in keys] == order
    assert order[:3] == ["task/17", "task/1", "task/147"], "the same on every machine"


def test_the_documents_of_a_cluster_follow_each_other_and_count_as_one() -> None:
    labels = [i // 3 for i in range(31)]
    drawn = draw(names(31), seed=1, clusters=labels)
    assert sorted(drawn.documents.tolist()) == list(range(31))
    assert [len({labels[i] for i in drawn.documents[drawn.units == unit]}) for unit in range(11)] == [1] * 11
    assert drawn.weights == pytest.approx(11 / 31)
    assert drawn.largest == pytest.approx(33 / 31)
    assert not drawn.weighted


def test_small_margins_are_drawn_more_often_and_count_less() -> None:
    """The mean of what is drawn is the mean of all, whatever the differences have to do with the margins."""
    n = 2000
    margins = [float(i) for i in range(n)]
    x = np.where(np.arange(n) < 200, 0.5, 0.1)
    means, low = [], []
    for seed in range(30):
        drawn = draw(names(n), seed=seed, margins_nats=margins)
        assert drawn.weighted
        assert len(set(drawn.documents.tolist())) == len(drawn)
        means.append(float((drawn.weights * x[drawn.documents]).mean()))
        low.append(float((drawn.documents < 200).mean()))
    assert np.mean(low) == pytest.approx(0.25, abs=0.01)
    assert np.mean(means) == pytest.approx(x.mean(), abs=0.004)
    unknown = draw(names(n), seed=1, margins_nats=[None] * 1000 + [1.0] * 1000)
    assert (unknown.documents[unknown.weights < 1.0] >= 1000).all()


@pytest.mark.parametrize(
    ("keys", "more"),
    [(["a", "a"], {}), ([], {}), (["a", "b"], {"clusters": [1, 1], "margins_nats": [0.1, 0.2]})],
)
def test_documents_without_a_place_of_their_own_are_refused(keys: list[str], more: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"name of its own|not drawn by their margins"):
        draw(keys, seed=1, **more)


# Monitors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 400), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_how_the_batches_are_cut_changes_nothing(kind: type[Monitor], seed: int, cuts: list[int]) -> None:
    random = np.random.default_rng(seed)
    x = documents(random, 600, drop=float(random.choice([0.0, 0.02, 0.1])), noise=0.03)
    drawn = draw(names(600), seed=1, clusters=[i // 2 for i in range(600)]) if seed % 2 else plain(600)
    at_once, in_batches = kind(drawn, TWO_POINTS), kind(drawn, TWO_POINTS)
    at_once.update(x)
    edges = [0, *[e for e in np.cumsum(cuts).tolist() if e < 600], 600]
    for start, end in pairwise(edges):
        in_batches.update(x[start:end])
    assert in_batches.state == at_once.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_monitor_stops_as_soon_as_it_is_certain(kind: type[Monitor]) -> None:
    clean, broken = kind(plain(2000), TWO_POINTS), kind(plain(2000), TWO_POINTS)
    assert clean.outcome is Outcome.INCONCLUSIVE
    with pytest.raises(ValueError, match="nothing was measured"):
        _ = clean.state
    assert clean.update(np.zeros(20)) is Outcome.INCONCLUSIVE
    assert clean.n == 20
    assert clean.update(np.zeros(1000)) is Outcome.PASS
    assert clean.n < 500
    before = clean.state
    assert before.interval[1] <= 0.02
    assert clean.update(np.ones(500)) is Outcome.PASS
    assert clean.state == before
    losing = np.tile([1.0, 0.0, 0.0, 0.0], 100)
    assert broken.update(losing) is Outcome.FAIL
    assert broken.state.drop == pytest.approx(0.25, abs=0.02)
    assert broken.state.interval[0] > 0.0
    assert "margin" in broken.state.sentence


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_documents_are_inconclusive(kind: type[Monitor]) -> None:
    few = kind(plain(60), TWO_POINTS)
    assert few.update(np.zeros(60)) is Outcome.INCONCLUSIVE
    low, high = few.state.interval
    assert low < 0.0 < 0.02 < high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [np.zeros(11), np.array([1.5]), np.array([np.nan])])
def test_what_is_no_difference_of_the_order_is_refused(kind: type[Monitor], wrong: Floats) -> None:
    with pytest.raises(ValueError, match="at most 10 differences"):
        kind(plain(10), TWO_POINTS).update(wrong)


def test_an_unfinished_cluster_is_not_counted() -> None:
    one = EProcess(draw(names(10), seed=1, clusters=[i // 5 for i in range(10)]), TWO_POINTS)
    one.update(np.array([1.0, 1.0, 1.0]))
    assert one.n == 0
    one.update(np.array([0.0, 0.0, 1.0]))
    assert one.n == 5
    assert one.state.drop == pytest.approx(0.6)


def test_a_capital_is_a_fair_bet() -> None:
    """All sequences of five documents, each 1, 0 or -1, at the drop that is bet against: the mean capital is 1."""
    for null, weight in ((0.02, 1.0), (0.3, 1.0), (0.02, 1.2)):
        probabilities = {1.0: 0.1 + null / weight, -1.0: 0.1, 0.0: 0.8 - null / weight}
        expected = 0.0
        for path in product(probabilities, repeat=5):
            chance = float(np.prod([probabilities[x] for x in path]))
            expected += chance * float(np.exp(sequential._log_capital(weight * np.array(path), null, weight)[-1]))
        assert expected == pytest.approx(1.0)


def test_levels_spend_the_error_rate_and_no_more() -> None:
    for alpha in (0.05, 0.005):
        found = levels(alpha, LOOKS)
        assert found[0] == pytest.approx(alpha * LOOKS[0], rel=0.01)
        bounds, shares = stats.norm.isf(found), np.array(LOOKS)
        covariance = np.minimum.outer(shares, shares) / np.sqrt(np.outer(shares, shares))
        inside = stats.multivariate_normal(np.zeros(len(shares)), covariance, seed=1).cdf(bounds)
        assert 1.0 - inside == pytest.approx(alpha, rel=0.02, abs=1e-4)
    assert levels(0.025, (1.0,)) == pytest.approx((0.025,), rel=0.01)


def test_the_rule_is_chosen_by_how_many_documents_there_are() -> None:
    def chosen(n: int, **more: object) -> Monitor:
        return monitor(names(n), rule=TWO_POINTS, noise=0.04, seed=1, **more)  # type: ignore[arg-type]

    assert isinstance(chosen(1319), GroupSequential)
    assert isinstance(chosen(5000), EProcess)
    assert not chosen(5000, margins_nats=[None] * 5000).draws.weighted
    assert chosen(5000, margins_nats=[0.5] * 5000).draws.weighted
    assert not chosen(1319, margins_nats=[0.5] * 1319).draws.weighted
    assert len(chosen(5000, clusters=[i // 5 for i in range(5000)], margins_nats=[0.5] * 5000).draws) == 5000
    assert chosen(100, clusters=[i // 5 for i in range(100)]).draws.units[-1] == 19
    with pytest.raises(ValueError, match="weighted documents"):
        GroupSequential(draw(names(100), seed=1, margins_nats=[0.5] * 100), TWO_POINTS)


# Error rates, seeded simulations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.02, 0.08])
def test_correct_builds_fail_and_broken_ones_pass_at_most_at_the_stated_rates(
    kind: type[Monitor], noise: float
) -> None:
    random, runs, n = np.random.default_rng(11), 600, 1319
    make = lambda: kind(plain(n), TWO_POINTS)  # noqa: E731
    clean, _ = simulated(make, lambda: documents(random, n, drop=0.0, noise=noise), runs)
    assert clean[Outcome.FAIL] <= stats.binom.isf(ALARMS, runs, TWO_POINTS.alpha_fail)
    broken, _ = simulated(make, lambda: documents(random, n, drop=0.02, noise=noise), runs)
    assert broken[Outcome.PASS] <= stats.binom.isf(ALARMS, runs, TWO_POINTS.alpha_pass)
    assert broken[Outcome.PASS] > 0, "a rule that never errs would be too cautious to be one"


def test_the_simulation_would_see_a_rule_that_only_repeats_a_fixed_test() -> None:
    """A drop of the margin, tested at 0.05 after every 20 documents, passes several times as often."""
    random, runs, n, passed = np.random.default_rng(11), 200, 1300, 0
    for _ in range(runs):
        x = documents(random, n, drop=0.02, noise=0.08).reshape(-1, 20)
        lost, won = (x > 0).sum(axis=1).cumsum().tolist(), (x < 0).sum(axis=1).cumsum().tolist()
        looks = (Counts(lost=a, won=b, n=20 * k) for k, (a, b) in enumerate(zip(lost, won, strict=True), 1))
        passed += any(found.p_pass(0.02) <= 0.05 for found in looks)
    assert passed > 2 * stats.binom.isf(ALARMS, runs, TWO_POINTS.alpha_pass)


@pytest.mark.parametrize("share", [0.95, 0.1])
def test_weighted_documents_keep_the_rates_whether_or_not_margins_tell_anything(share: float) -> None:
    random, runs, n, noise = np.random.default_rng(3), 500, 4000, 0.04
    drawn = draw(names(n), seed=1, margins_nats=[float(i) for i in range(n)])
    rate = np.where(np.arange(n) < n // 10, share * noise / 0.1, (1 - share) * noise / 0.9)

    def sample(drop: float) -> Floats:
        u = random.random(n)
        lost = u < rate / 2 + drop
        return np.asarray(np.where(lost, 1.0, np.where(u < rate + drop, -1.0, 0.0))[drawn.documents])

    make = lambda: EProcess(drawn, TWO_POINTS)  # noqa: E731
    clean, _ = simulated(make, lambda: sample(0.0), runs)
    broken, _ = simulated(make, lambda: sample(0.02), runs)
    assert clean[Outcome.FAIL] <= stats.binom.isf(ALARMS, runs, TWO_POINTS.alpha_fail)
    assert broken[Outcome.PASS] <= stats.binom.isf(ALARMS, runs, TWO_POINTS.alpha_pass)


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_that_lean_the_same_way_keep_the_rates(kind: type[Monitor]) -> None:
    """Four documents each, all with the same answers: 1,000 documents that are worth 250."""
    random, runs, clusters, rule = np.random.default_rng(4), 400, 250, Rule(margin=0.05, tolerated=0.0)
    labels = np.repeat(np.arange(clusters), 4)
    drawn = draw(names(len(labels)), seed=1, clusters=labels.tolist())

    def answers(drop: float) -> Counter[Outcome]:
        return simulated(
            lambda: kind(drawn, rule),
            lambda: documents(random, clusters, drop=drop, noise=0.1)[labels][drawn.documents],
            runs,
        )[0]

    assert answers(0.0)[Outcome.FAIL] <= stats.binom.isf(ALARMS, runs, rule.alpha_fail)
    assert answers(0.05)[Outcome.PASS] <= stats.binom.isf(ALARMS, runs, rule.alpha_pass)


@pytest.mark.parametrize("noise", [0.02, 0.04])
def test_a_clean_build_needs_a_sixth_of_the_unpaired_rules_documents(noise: float) -> None:
    """At two points; as many differing documents as recompiled and 8-bit builds have."""
    random, runs, asked = np.random.default_rng(2), 150, paired.unpaired_documents(0.02)
    margins = [float(i) for i in range(5000)]
    stratified = draw(names(5000), seed=1, margins_nats=margins)
    rate = np.where(np.arange(5000) < 500, 0.95 * noise / 0.1, 0.05 * noise / 0.9)

    def by_margin() -> Floats:
        u = random.random(5000)
        return np.asarray(np.where(u < rate / 2, 1.0, np.where(u < rate, -1.0, 0.0))[stratified.documents])

    assert 6 * paired.needed(drop=0.0, noise=noise, rule=TWO_POINTS) < asked
    for make, sample in (
        (lambda: GroupSequential(plain(1319), TWO_POINTS), lambda: documents(random, 1319, drop=0.0, noise=noise)),
        (lambda: EProcess(plain(5000), TWO_POINTS), lambda: documents(random, 5000, drop=0.0, noise=noise)),
        (lambda: EProcess(stratified, TWO_POINTS), by_margin),
    ):
        answers, used = simulated(make, sample, runs)
        assert answers[Outcome.PASS] >= 0.85 * runs
        assert 6 * used < asked
    assert 12 * used < asked, "drawn by their margins"
