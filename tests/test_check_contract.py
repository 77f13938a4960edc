"""The contract check: probes become findings; one wrong answer fails, one that cannot be seen does not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from parity.checks import contract
from parity.checks.contract import Limits
from parity.errors import IncomparableError
from parity.noise import Noise
from parity.probes import Cause
from parity.prompts import Request
from parity.recording import Completion, Recording
from parity.verdict import Finding, Outcome, Verdict
from recordings import completion, recording
from toy_engine import Rules, Toy

NOISE = Noise(sigma_nats=0.13, measured_nats=0.13, positions=3000, prompts=64, source="reference against noise")


@cache
def healthy() -> Recording:
    return Toy().probed()


@cache
def wrong() -> Recording:
    """The end of sequence is passed, stop strings are ignored."""

    def without_stop(request: Request) -> Request:
        return replace(request, sampling=replace(request.sampling, stop=()))

    return Toy(rules=Rules(end_ids=frozenset()), rewrite=without_stop).probed()


@cache
def mute() -> Recording:
    """No log-probabilities: 12 of 21 probes cannot be seen."""

    def bare(answer: Completion, request: Request) -> Completion:
        end = None if answer.terminator is None else replace(answer.terminator, logprobs=None)
        return replace(answer, logprobs=None, terminator=end)

    return Toy(edit=bare).probed()


def judged(
    candidate: Recording,
    reference: Recording | None = None,
    *,
    noise: Noise | None = NOISE,
    limits: Limits | None = None,
) -> Verdict:
    return contract.check(reference, candidate, noise=noise, limits=limits or Limits())


def failed(verdict: Verdict) -> list[str]:
    return [f.metric for f in verdict.findings if f.outcome is Outcome.FAIL]


def finding(verdict: Verdict, metric: str) -> Finding:
    (found,) = [f for f in verdict.findings if f.metric == metric]
    return found


def test_an_engine_that_does_as_asked_passes_with_and_without_a_reference() -> None:
    for reference in (None, healthy()):
        verdict = judged(healthy(), reference)
        assert verdict.passed
        assert verdict.headline == "21 of 21 probes as asked"
        assert len(verdict.findings) == 22
        assert not any((verdict.causes, verdict.warnings, verdict.changed))
    assert judged(healthy()).reference == "itself"
    assert judged(healthy(), healthy()).reference == "toy 1 float32"


def test_each_wrong_answer_fails_and_names_its_cause() -> None:
    verdict = judged(wrong())
    assert verdict.outcome is Outcome.FAIL
    assert failed(verdict) == ["stop string", "end of sequence"]
    assert verdict.causes == (Cause.STOP_STRING_IGNORED.value, Cause.END_PASSED.value)
    found = finding(verdict, "end of sequence")
    assert found.evidence[0].startswith("base:")
    assert found.limit == "as asked: do the model's own end-of-sequence tokens end answers?"
    assert "2 otherwise (stop string, end of sequence)" in verdict.headline


def test_what_cannot_be_seen_passes_and_says_so() -> None:
    verdict = judged(replace(Toy(), can_stream=False).probed())
    assert verdict.passed
    assert finding(verdict, "stream").sentence == "could not be seen: the engine does not say that it can stream"
    assert verdict.headline == "20 of 21 probes as asked, 1 could not be seen (stream)"


def test_more_than_half_unseen_is_inconclusive_and_a_fault_among_them_still_fails() -> None:
    verdict = judged(mute())
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert finding(verdict, "data").sentence == "too little data: 9 of 21 probes could be seen"
    assert not verdict.causes
    given_up = [replace(c, text="other", decoded_text=c.text) for c in mute().completions if c.text is not None]
    assert judged(replace(mute(), completions=tuple(given_up))).outcome is Outcome.FAIL
    assert judged(mute(), limits=Limits(unknown_share=0.6)).passed


def test_the_references_own_faults_are_warnings() -> None:
    verdict = judged(healthy(), wrong())
    assert verdict.passed
    assert [w.partition(":")[0] for w in verdict.warnings] == [
        "the reference toy 1 float32 itself does not do as asked, stop string",
        "the reference toy 1 float32 itself does not do as asked, end of sequence",
    ]
    assert all(w.endswith("a doubtful yardstick") for w in verdict.warnings)


def test_without_noise_a_documented_sigma_is_used_and_said() -> None:
    (warning,) = judged(healthy(), noise=None).warnings
    assert warning.startswith("no noise was measured: sigma 0.13 nats")


def test_the_measured_noise_decides_what_is_rounding() -> None:
    def slightly_warm(request: Request) -> Request:
        return replace(request, sampling=replace(request.sampling, temperature=request.sampling.temperature or 0.1))

    warm = Toy(rewrite=slightly_warm).probed()
    assert failed(judged(warm, noise=replace(NOISE, sigma_nats=0.02))) == ["greedy"]
    assert "greedy" not in failed(judged(warm, noise=replace(NOISE, sigma_nats=0.5)))


def test_a_recording_of_other_questions_is_refused() -> None:
    with pytest.raises(IncomparableError, match="contract probes judge a recording"):
        judged(recording([completion("p-001")]))
