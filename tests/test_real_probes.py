"""Real vLLM, probed: as asked throughout; and with one fault in its requests, named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parity import cli, collect, config, judge
from parity.checks import contract
from parity.display import Display
from parity.record import Places, Recorder
from parity.sensitivity.cases import VLLM_FAULTS
from parity.verdict import Outcome

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".parity"


def test_vllm_does_what_it_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo has probed it already, so that nothing is started where that has run."""
    places = ("--suites", str(ROOT / "suites"), "--home", str(HOME))
    assert cli.main(["probe", "cpu", "--side", "candidate", *places]) == 0
    out = capsys.readouterr().out
    assert out.count("  as asked  ") == 21
    assert "otherwise" not in out


def test_a_top_k_that_is_off_by_one_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    target = config.read_target(ROOT / "suites" / "targets.toml", "cpu")
    options = {**target.candidate.options, "fault": "top_k off by one"}
    spec = replace(target.candidate, engine=str(VLLM_FAULTS), options=options)
    with capfd.disabled(), Display(sys.stderr) as display:
        places = Places.of(ROOT / "suites", HOME)
        recorder = Recorder(directory=HOME / "recordings" / "fault-top-k", places=places, observer=display)
        found = recorder.record(spec, collect.contract_jobs("candidate"))["contract-candidate"]
    limits = judge.limits_of("contract", {}, target.policy)
    verdict = contract.check(None, found, noise=None, limits=limits)
    assert verdict.outcome is Outcome.FAIL
    assert verdict.causes == ("top_k is off by one: it keeps one token more than asked",)
