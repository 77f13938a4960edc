"""What a golden remembers as numbers: worked by hand, and equal wherever they are computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from lockstep_cases import World
from parity import metrics, noise
from parity.metrics import Metric, Spread
from parity.recording import Terminator
from recordings import completion, recording


def test_a_limit_is_learned_from_the_spread_of_accepted_runs() -> None:
    """Against scipy: ten runs, t quantile at 0.999 with nine degrees, times sqrt 2 times their standard deviation."""
    logs = np.random.default_rng(7).normal(-7.0, 0.02, 10)
    wanted = math.exp(stats.t.ppf(0.999, 9) * math.sqrt(2) * logs.std(ddof=1))
    assert 1.05 < wanted < 1.5
    assert metrics.learned_ratio(np.exp(logs).tolist()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([0.001] * 8, 1.05), ([0.001, 0.01] * 4, 1.5), ([0.001] * 7, None), ([0.0] * 8, None), ([], None)],
)
def test_a_learned_limit_has_bounds_and_needs_eight_runs(values: list[float], wanted: float | None) -> None:
    assert metrics.learned_ratio(values) == wanted


def test_the_metrics_of_answers_worked_by_hand() -> None:
    """Three answers of 3, 1 and 2 tokens; two end by themselves; -log p is 0.5, 1, 3, 0.25, 0.75 over five tokens."""
    answered = recording(
        [
            completion("a", token_ids=(5, 6, 7), chosen=[-0.5, -1.0, -3.0]),
            completion("b", token_ids=(5,), rows=None, terminator=Terminator(token_id=2, logprobs=None)),
            completion("c", token_ids=(5, 6), chosen=[-0.25, -0.75], terminator=None),
        ]
    )
    assert metrics.of_answers(answered) == {
        "answer tokens": Metric(value=6.0, unit="tokens", n=3),
        "answers": Metric(value=3.0, unit="prompts", n=3),
        "mean answer length": Metric(value=2.0, unit="tokens", n=3),
        "negative log-likelihood": Metric(value=1.1, unit="nats a token", n=2),
        "share that ends by itself": Metric(value=0.666667, unit="of prompts", n=3),
    }


def test_an_engine_without_log_probabilities_has_no_likelihood() -> None:
    answered = recording([completion("a", rows=None, terminator=None)])
    assert "negative log-likelihood" not in metrics.of_answers(answered)


def test_no_answers_are_no_division_by_zero() -> None:
    assert metrics.of_answers(recording([]))["mean answer length"] == Metric(value=0.0, unit="tokens", n=0)


def test_the_metrics_of_noise_are_those_of_the_measured_pair() -> None:
    """Against lock step itself; and by hand where the arbiter agrees on all."""
    world = World(prompts=5, tokens=8)
    own = world.rounded(1)
    answers = world.recording(own, world.tokens_of(own), dtype="bfloat16")
    exact = world.recording(world.model(), world.tokens_of(own), dtype="float32", forced_from=answers.digest)
    measured = noise.measure(answers, exact, candidate_dtype="bfloat16")
    assert measured.steps is not None
    found = metrics.of_noise(measured)
    assert {m.n for m in found.values()} == {5}
    assert found["KL divergence from the arbiter"].value == metrics.kept(float(np.mean(measured.steps.kl_nats)))
    assert found["changed choices against the arbiter"].value == metrics.kept(sum(measured.steps.flipped) / 40)
    assert found["margin shift against the arbiter"].value == metrics.kept(measured.measured_nats)
    same = noise.measure(answers, answers, candidate_dtype="bfloat16")
    assert [m.value for m in metrics.of_noise(same).values()] == [0.0, 0.0, 0.0]


def test_where_no_noise_was_measured_there_are_no_metrics_of_it() -> None:
    assert metrics.of_noise(None) == {}


def test_the_spread_of_accepted_runs_worked_by_hand() -> None:
    assert metrics.spread({"a": (1.0, 2.0, 6.0), "b": (4.0,), "c": ()}) == {
        "a": Spread(n=3, mean=3.0, deviation=math.sqrt(7.0))
    }


finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


@given(finite)
def test_what_is_kept_is_near_and_is_kept_again(value: float) -> None:
    assert metrics.kept(value) == pytest.approx(value, rel=6e-6, abs=0.0)
    assert metrics.kept(metrics.kept(value)) == metrics.kept(value)


@given(finite, st.floats(-1e-7, 1e-7))
def test_what_two_machines_sum_differently_is_the_same_number(value: float, error: float) -> None:
    here, there = (Metric(value=metrics.kept(v), unit="nats", n=3) for v in (value, value * (1 + error)))
    assert here.equals(there)
    assert there.equals(here)


@given(finite, st.floats(1e-4, 1e3), st.booleans())
def test_a_difference_in_a_digit_that_is_kept_is_one(value: float, change: float, upwards: bool) -> None:
    assume(abs(value) > 1e-6)
    other = value * (1 + change) if upwards else value / (1 + change)
    here, there = (Metric(value=metrics.kept(v), unit="nats", n=3) for v in (value, other))
    assert not here.equals(there)


@given(finite)
def test_another_unit_or_another_number_of_prompts_is_another_metric(value: float) -> None:
    here = Metric(value=value, unit="nats", n=3)
    assert here.equals(here)
    assert not here.equals(Metric(value=value, unit="bits", n=3))
    assert not here.equals(Metric(value=value, unit="nats", n=4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_equals_no_finite_one(value: float) -> None:
    broken = Metric(value=value, unit="nats", n=3)
    assert not broken.equals(Metric(value=1.0, unit="nats", n=3))
    assert broken.equals(broken) is not math.isnan(value)
