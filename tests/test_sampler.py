"""The audit of sampling works on blocks of steps: where a block ends must never be seen in a verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from parity import sampler
from parity.checks.sampling import Limits, check
from parity.prompts import SamplingParams
from parity.verdict import Finding, Verdict
from recordings import completion, recording
from test_check_sampling import FAULTS, POLICIES, correct_as, simulated


def numbers(verdict: Verdict) -> list[tuple[str, object]]:
    """Everything that is said, and the numbers up to the order of adding them up."""

    def told(found: Finding) -> tuple[str, object]:
        return found.metric, (found.outcome, found.sentence, found.n, found.evidence, pytest.approx(found.candidate))

    return [("causes", verdict.causes), ("headline", verdict.headline), *map(told, verdict.findings)]


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize(
    ("asked", "applied"),
    [
        *((asked, asked) for asked in POLICIES.values()),
        *((asked, applied) for asked, applied, _ in FAULTS.values()),
        (POLICIES["T 1"], replace(POLICIES["T 1"], temperature=1.4)),
        (POLICIES["T 0.7, top_k 5"], replace(POLICIES["T 0.7, top_k 5"], temperature=2.0)),
    ],
)
def test_the_size_of_a_block_changes_nothing(
    asked: SamplingParams, applied: SamplingParams, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = simulated(applied, asked=asked, seed=4, prompts=4)
    whole = check(correct_as(run), run, noise=None, limits=Limits())
    monkeypatch.setattr(sampler, "_BLOCK", block)
    assert numbers(check(correct_as(run), run, noise=None, limits=Limits())) == numbers(whole)


def test_blocks_hold_every_step_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_BLOCK", 7)
    steps = sampler.steps_of(simulated(POLICIES["T 1"], prompts=3, tokens=5))
    blocks = list(steps.blocks())
    assert list(map(len, blocks)) == [7, 7, 1]
    for name in ("owner", "position", "token_id", "rank", "logprob", "top"):
        np.testing.assert_array_equal(np.concatenate([getattr(b, name) for b in blocks]), getattr(steps, name))


def test_nothing_is_one_empty_block() -> None:
    nothing = sampler.steps_of(recording([completion(token_ids=(), terminator=None)]))
    assert list(map(len, nothing.blocks())) == [0]


def test_what_is_kept_of_a_filter_does_not_hold_the_rows_it_came_from() -> None:
    """A view of one column would keep the whole block in memory."""
    rows = np.log(np.tile(np.array([0.5, 0.3, 0.2], np.float32), (4, 1)))
    asked = replace(POLICIES["T 1"], min_p=0.1, top_k=2, top_p=0.9)
    found = sampler.policy_of(rows, asked, sampler.Edges(top_p_margin=0.01, edge_nats=1e-3)).filters
    assert [f.name for f in found] == ["min_p 0.1", "top_k 2", "top_p 0.9"]
    assert all(kept.base is None for f in found for kept in (f.seen, f.edge, f.leak))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_temperature_of_draws_is_found_again(temperature: float) -> None:
    random = np.random.default_rng(0)
    rows = -np.sort(random.exponential(2.0, (8000, 6)).astype(np.float32), axis=1)
    q = np.cumsum(sampler.tempered(rows, temperature), axis=1)
    rank = (q < random.random((8000, 1)) * q[:, -1:]).sum(axis=1)
    parts = [(rows[i : i + 1000], rank[i : i + 1000]) for i in range(0, 8000, 1000)]
    assert math.log(sampler.fitted_temperature(parts) / temperature) == pytest.approx(0.0, abs=0.05)
