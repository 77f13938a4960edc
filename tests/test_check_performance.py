"""The performance check: an engine passes beside itself, fails when slowed, and is undecided on too little data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from load_runs import load_run
from parity.checks import performance
from parity.checks.performance import Limits, Measured, Pair
from parity.errors import ConfigError
from parity.losses import Spread
from parity.regression import Step
from parity.service_metrics import measure
from parity.verdict import Outcome, Verdict

GATED = ("output_tokens_per_s", "tpot_p50_s")
SPREADS = {name: Spread(sigma=0.01, degrees=30, source="a test") for name in GATED}


def pairs(
    count: int, loss: float = 0.0, *, sigma: float = 0.01, seed: int = 1, failed: tuple[int, int] = (0, 0)
) -> list[Pair]:
    """Starts that vary by `sigma`, the candidate's slower by `loss`."""
    random = np.random.default_rng(seed)
    plain = measure(load_run())

    def start(factor: float) -> dict[str, float]:
        return {name: value / factor if name.endswith("_per_s") else value * factor for name, value in plain.items()}

    made = []
    for _ in range(count):
        ours, theirs = np.exp(random.normal(0.0, sigma / np.sqrt(2.0), 2))
        made.append(Pair(reference=start(ours), candidate=start(theirs * (1 + loss)), failed=failed, requests=600))
    return made


def measured(first: list[Pair], fresh: list[Pair] | None = None, **changes: object) -> Measured:
    made = Measured(profile="toy", pairs=first, fresh=fresh or [], gated=GATED, spreads=SPREADS, disturbances=())
    return replace(made, **changes)  # type: ignore[arg-type]


def judged(found: Measured, limits: Limits | None = None) -> Verdict:
    return performance.judge(found, limits=limits or Limits(), label_reference="old", label_candidate="new")


def test_an_engine_passes_beside_itself() -> None:
    verdict = judged(measured(pairs(20)))
    assert verdict.outcome is Outcome.PASS
    assert [f.metric for f in verdict.findings] == list(GATED)
    assert "not one of its 600 requests" in verdict.basis[0]


def test_a_slowed_engine_is_flagged_and_fails_on_fresh_pairs() -> None:
    slow = pairs(6, loss=0.15)
    assert performance.next_step(measured(slow), Limits())[0] is Step.CONFIRMATION
    assert judged(measured(slow)).outcome is Outcome.INCONCLUSIVE
    verdict = judged(measured(slow, pairs(6, loss=0.15, seed=2)))
    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].delta == pytest.approx(13, abs=3)  # 1.15 times the time is 13 % fewer tokens a second
    assert verdict.findings[1].delta == pytest.approx(15, abs=3)
    assert "decided by" in verdict.headline


def test_what_fresh_pairs_do_not_confirm_is_no_failure() -> None:
    assert judged(measured(pairs(6, loss=0.15), pairs(6, seed=2))).outcome is not Outcome.FAIL


def test_one_pair_decides_nothing() -> None:
    verdict = judged(measured(pairs(1)))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert performance.next_step(measured(pairs(1)), Limits())[0] is Step.PAIRS


def test_without_history_the_verdict_says_so_and_takes_more_pairs() -> None:
    few = judged(measured(pairs(4), spreads={}))
    assert few.outcome is Outcome.INCONCLUSIVE
    assert any("parity aa" in line for line in few.basis)
    assert judged(measured(pairs(12), spreads={})).outcome is Outcome.PASS


def test_a_disturbed_machine_judges_nothing_and_says_why() -> None:
    verdict = judged(measured(pairs(20), disturbances=("the GPU was throttled",)))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.warnings == ("the GPU was throttled",)


@pytest.mark.parametrize(("failed", "wanted"), [((0, 5), Outcome.FAIL), ((5, 5), Outcome.PASS), ((5, 0), Outcome.PASS)])
def test_more_failed_requests_than_the_reference_fail(failed: tuple[int, int], wanted: Outcome) -> None:
    verdict = judged(measured(pairs(20, failed=failed)))
    found = next(f for f in verdict.findings if f.metric == "failed requests")
    assert found.outcome is wanted
    assert verdict.outcome is wanted


@pytest.mark.parametrize(
    ("gated", "sentence"),
    [
        (("ttft_p5_s",), "gates 'ttft_p5_s', which is no metric"),
        (("gpu_power_mean_watts",), "shown and decides nothing"),
        (("e2e_p99_s",), "needs 5000 requests a start"),
        (("gpu_joules_per_output_token",), "was not measured in every start"),
        (("queue_p50_s",), "shown and decides nothing"),
    ],
)
def test_a_metric_that_cannot_decide_is_one_sentence(gated: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        judged(measured(pairs(3), gated=gated, spreads={}))


def test_limits_that_make_no_rule_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"limits\.performance: 0 <= tolerated < margin"):
        judged(measured(pairs(3)), Limits(tolerated=0.2))


def test_rows_show_every_metric_with_the_loss_of_its_own_spread() -> None:
    rows = {row.metric.id: row for row in performance.rows(pairs(8, loss=0.1))}
    assert rows["tpot_p50_s"].loss == pytest.approx(0.1, abs=0.02)
    low, high = rows["tpot_p50_s"].interval or (0, 0)
    assert low < 0.1 < high
    assert rows["failed_share"].loss is None
    assert performance.rows(pairs(1))[1].interval is None
    assert performance.rows([]) == []
