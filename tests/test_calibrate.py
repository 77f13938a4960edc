"""Calibration: planted noise is found, its null is quiet, and a target's runs use what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drills import DRILL, Suite, bare_interpreter
from lockstep_cases import ROUNDING, World, sides
from parity import calibrate, lockstep, noise, stages, store
from parity.equivalence import Limits, Pair


def test_the_null_of_correct_noise_is_quiet_and_sharpens_with_prompts() -> None:
    reference, _, scores = sides(World(prompts=96, tokens=40))
    steps = lockstep.measure(reference, scores)
    few, many = (calibrate.null_of(steps, size, margin=1.2, seed=1) for size in (16, 96))
    assert few.false_alarms <= 0.02
    assert many.false_alarms <= 0.01
    assert few.smallest_caught > many.smallest_caught > 1.2
    assert many.passes > few.passes


def test_heavy_tails_make_the_null_say_that_less_is_caught() -> None:
    """One prompt in twelve rounds four times as badly."""
    world = World(prompts=48, tokens=16)
    reference, _, scores = sides(world)
    calm = calibrate.null_of(lockstep.measure(reference, scores), 48, margin=1.2, seed=1)
    logits, rough = world.rounded(10), world.rounded(10, size=0.2)
    logits[::12] = rough[::12]
    heavy = world.recording(logits, world.tokens_of(world.model()), dtype="bfloat16", forced_from=reference.digest)
    found = calibrate.null_of(lockstep.measure(reference, heavy), 48, margin=1.2, seed=1)
    assert found.smallest_caught > 1.3 * calm.smallest_caught


def control(size: float) -> calibrate.Control:
    reference, candidate, scores = sides(World(prompts=48, tokens=16), size=size)
    pair = Pair(
        reference=reference,
        candidate=candidate,
        steps=lockstep.measure(reference, candidate),
        noise=noise.measure(reference, scores, candidate_dtype="bfloat16"),
        judged_sides=1,
        limits=Limits().at(stages.SCREEN),
    )
    return calibrate.control_of(pair, seed=1)


def test_a_second_correct_engine_raises_few_alarms_and_a_wrong_one_all() -> None:
    good, bad = control(ROUNDING), control(2 * ROUNDING)
    assert 0.8 < good.low < good.ratio < good.high < 1.3
    assert list(good.false_alarms) == [16, 32, 48]
    assert max(good.false_alarms[48].values()) <= 0.05
    assert good.passes[48] > good.passes[16]
    assert bad.false_alarms[48]["KL divergence"] == 1.0
    assert bad.passes[48] == 0.0


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    engine = {"engine": str(DRILL), "dtype": "float32", "python": bare_interpreter()}
    return Suite(tmp_path).write(prompts=20, target={"lockstep_prompts": 16, "noise": engine})


def test_a_calibrated_target_judges_by_all_prompts(suite: Suite) -> None:
    """The drill's noise engine repeats the reference, so the command also says that it measures nothing."""
    assert suite.command("record").code == 0
    assert len(store.read(suite.run / "noise").completions) == 16
    ended = suite.command("calibrate")
    assert ended.code == 0
    assert "of 20 prompts" in ended.out
    assert "warning: the noise engine reads zero" in ended.out
    kept = json.loads((suite.run.with_name("drill-calibration") / "calibration.json").read_text())
    assert kept["prompts"] == 20
    assert kept["positions"] > 0
    assert np.isfinite(kept["sigma_nats"])
    assert suite.command("record").code == 0
    assert len(store.read(suite.run / "noise").completions) == 20


def test_a_target_without_noise_engine_cannot_be_calibrated(tmp_path: Path) -> None:
    ended = Suite(tmp_path).write(prompts=3).command("calibrate")
    assert ended.code == 2
    assert ended.sentence.startswith("target 'drill' has no noise engine to calibrate with")
