"""Wrong engines, for real: vLLM itself with one planted fault each must FAIL, for the right reason.

The reference and the noise engine are the shipped `cpu` target's; only the candidate is spoilt. Each fault is one
engine start on a few prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parity import collect, config, judge, models
from parity.checks import logic
from parity.config import Target
from parity.diagnose import Confidence, Diagnosis
from parity.display import Display
from parity.hypotheses import Hypothesis
from parity.record import Places, Recorder
from parity.sensitivity import model_faults as plant
from parity.sensitivity.cases import VLLM_FAULTS
from parity.verdict import Outcome, Verdict

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".parity"
PLACES = Places.of(ROOT / "suites", HOME)
ENGINES = Path(__file__).parent / "faults" / "engines"
SHIPPED = config.read_target(ROOT / "suites" / "targets.toml", "cpu")
assert SHIPPED.logic is not None
LOGIC = replace(SHIPPED.logic, requests=config.spread(SHIPPED.logic.requests, 8))
TARGET = replace(
    SHIPPED, sampling=None, logic=LOGIC, determinism=None, structured=None, contract=False, laws=None, confirm=None
)
"""Eight prompts are enough in float32, where one decides; what one engine is asked by itself has its own tests."""

Judged = Callable[[str, Target, int], dict[str, Verdict]]
Diagnosed = Callable[[str], Diagnosis]


@pytest.fixture
def judged(capfd: pytest.CaptureFixture[str]) -> Judged:
    """Record and judge a spoilt target on a number of its prompts."""

    def run(name: str, target: Target, prompts: int) -> dict[str, Verdict]:
        directory = HOME / "recordings" / f"fault-{name}"
        with capfd.disabled(), Display(sys.stderr) as display:
            recorder = Recorder(directory=directory, places=PLACES, observer=display)
            evidence = collect.collect(config.limited_to(target, prompts), recorder)
        return {check: judge.judge(evidence, check) for check in evidence.checks}

    return run


@pytest.fixture
def diagnosed() -> Diagnosed:
    """The cause that is named for a fault which `judged` has recorded; starts nothing."""

    def run(name: str) -> Diagnosis:
        evidence = judge.gather(HOME / "recordings" / f"fault-{name}")
        found = judge.diagnosis(evidence, [judge.judge(evidence, check) for check in evidence.checks])
        assert found is not None
        return found

    return run


@pytest.fixture(scope="session")
def model() -> Path:
    return models.provide(TARGET.candidate.model, cache=PLACES.models)


def with_model(directory: Path) -> Target:
    return replace(TARGET, candidate=replace(TARGET.candidate, model=str(directory)))


def with_engine(file: str) -> Target:
    """Requests are changed on their way, not the model: float32 has nothing to show."""
    return replace(TARGET, candidate=replace(TARGET.candidate, engine=str(ENGINES / file)), logic=None)


def test_rope_theta_1e4_for_1e5_fails_and_the_configuration_is_named(
    judged: Judged, model: Path, tmp_path: Path
) -> None:
    spoilt = plant.rope_theta(model, tmp_path / "model", value=10000.0)
    verdicts = judged("rope-theta", replace(with_model(spoilt), logic=None), 32)
    assert verdicts["inputs"].outcome is Outcome.PASS
    assert verdicts["greedy"].outcome is Outcome.FAIL
    assert any("rope_theta is 100000.0 in the reference and 10000.0" in c for c in verdicts["greedy"].causes)
    assert verdicts["lockstep"].outcome is Outcome.FAIL


def test_an_altered_chat_template_fails_inputs_and_nothing_else(judged: Judged, model: Path, tmp_path: Path) -> None:
    """The reference's token ids are sent, so the numbers agree: the verdict separates template from numerics."""
    spoilt = plant.chat_template_newline_missing(model, tmp_path / "model")
    verdicts = judged("template", replace(with_model(spoilt), logic=None), 16)
    assert verdicts["inputs"].outcome is Outcome.FAIL
    assert verdicts["greedy"].outcome is not Outcome.FAIL
    assert any("whitespace" in c or "chat template" in c for c in verdicts["inputs"].causes)


def test_a_doubled_bos_fails_inputs_and_is_named(judged: Judged, model: Path, tmp_path: Path) -> None:
    spoilt = plant.bos_doubled(model, tmp_path / "model")
    verdicts = judged("bos", replace(with_model(spoilt), logic=None), 8)
    assert verdicts["inputs"].outcome is Outcome.FAIL
    assert "BOS doubled by the candidate" in verdicts["inputs"].causes[0]


def test_one_attention_head_zeroed_fails_and_the_weights_are_named(judged: Judged, model: Path, tmp_path: Path) -> None:
    verdicts = judged("head", with_model(plant.head_zeroed(model, tmp_path / "model", layer=15, head=3)), 32)
    assert verdicts["inputs"].outcome is Outcome.PASS
    assert verdicts["greedy"].outcome is Outcome.FAIL
    assert any("the weights are not the same" in c for c in verdicts["greedy"].causes)
    assert verdicts["lockstep"].outcome is Outcome.FAIL
    assert verdicts["decode"].outcome is Outcome.FAIL
    assert verdicts["logic"].outcome is Outcome.FAIL


def test_what_rounding_hides_in_16_bits_fails_in_float32(judged: Judged, model: Path, tmp_path: Path) -> None:
    """A rope base one per cent off: no rule can see it in bfloat16, and none claims to."""
    spoilt = plant.rope_theta_times(model, tmp_path / "model", factor=1.01)
    verdicts = judged("rope-one-per-cent", with_model(spoilt), 16)
    assert verdicts["logic"].outcome is Outcome.FAIL
    assert any("rope_theta is 100000.0 in the reference and 101000.0" in c for c in verdicts["logic"].causes)
    assert verdicts["lockstep"].outcome is not Outcome.FAIL


def test_a_quantized_copy_fails_in_lock_step_where_texts_would_not_tell(
    judged: Judged, model: Path, tmp_path: Path
) -> None:
    """int8 with one scale a tensor: an accident that people ship, because the answers still read well."""
    (fault,) = (f for f in plant.registry(15) if f.name == "int8 per tensor, all layers")
    verdicts = judged("int8", with_model(fault.plant(model, tmp_path / "model")), 20)
    assert verdicts["lockstep"].outcome is Outcome.FAIL
    assert verdicts["decode"].outcome is Outcome.FAIL
    assert verdicts["logic"].outcome is Outcome.FAIL


def test_a_prompt_that_loses_its_first_token_inside_the_engine_is_found_out(
    judged: Judged, diagnosed: Diagnosed
) -> None:
    """The engine reports the ids that it was sent, so only the numbers can tell: the reference reads them without."""
    faulty = replace(
        TARGET.candidate, engine=str(VLLM_FAULTS), options={**TARGET.candidate.options, "fault": "BOS missing"}
    )
    verdicts = judged("bos-missing", replace(TARGET, candidate=faulty, logic=None), 24)
    assert verdicts["inputs"].outcome is Outcome.PASS
    assert verdicts["lockstep"].outcome is Outcome.FAIL
    found = diagnosed("bos-missing")
    assert (found.confidence, found.sentence) == (Confidence.CERTAIN, Hypothesis.FIRST_DROPPED.value)


def test_logic_needs_no_more_than_the_first_layers(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four layers of thirty: a rope base one per cent off still stands far above the limit, the rest agrees."""
    wrong = with_model(plant.rope_theta_times(model, tmp_path / "model", factor=1.01))
    for name, target, outcome in (("right", TARGET, Outcome.PASS), ("wrong", wrong, Outcome.FAIL)):
        short = replace(target, logic_layers=4)
        assert short.logic is not None
        with capfd.disabled(), Display(sys.stderr) as display:
            recorder = Recorder(directory=HOME / "recordings" / f"first-layers-{name}", places=PLACES, observer=display)
            found = collect._logic(short, short.logic, recorder, {})
        verdict = logic.check(found["logic-reference"], found["logic-candidate"], noise=None, limits=logic.Limits())
        assert verdict.outcome is outcome


def test_max_tokens_one_short_fails_and_says_exactly_that(judged: Judged) -> None:
    verdicts = judged("max-tokens", with_engine("vllm_max_tokens_short.py"), 16)
    assert verdicts["greedy"].outcome is Outcome.FAIL
    assert "1 token too short (63 for max_tokens 64)" in verdicts["greedy"].causes[0]
    assert verdicts["shape"].causes == ("max_tokens does not reach the engine as asked: 63 tokens for max_tokens 64",)


def test_temperature_where_greedy_was_asked_fails_and_says_it_samples(judged: Judged) -> None:
    verdicts = judged("temperature", with_engine("vllm_temperature.py"), 16)
    assert verdicts["greedy"].outcome is Outcome.FAIL
    assert "samples where greedy decoding was asked" in verdicts["greedy"].causes[0]
