"""The most likely cause: proved facts first, patterns next, and nothing where nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parity.diagnose import Confidence, Diagnosis, changed, most_likely
from parity.fingerprint import Fingerprint, Scalar
from parity.verdict import Finding, Outcome, Verdict
from recordings import completion, recording

FAIL, PASS, INCONCLUSIVE = Outcome.FAIL, Outcome.PASS, Outcome.INCONCLUSIVE
FACTS: dict[str, Scalar] = {"model.config.rope_theta": 1e5, "model.weights_sha256": "1" * 64, "quantization": None}


def finding(metric: str, outcome: Outcome, sentence: str = "found so") -> Finding:
    return Finding(
        metric=metric, outcome=outcome, sentence=sentence, unit="tokens", reference=None, candidate=None, delta=None,
        interval=None, limit="none", n=1, evidence=("a witness",),
    )  # fmt: skip


def verdict(check: str, outcome: Outcome, *, metric: str = "it", causes: tuple[str, ...] = ()) -> Verdict:
    return Verdict(
        check=check, reference="r", candidate="c", outcome=outcome, headline=f"{check} says so",
        findings=(finding(metric, outcome),), causes=causes, changed=(), warnings=(),
    )  # fmt: skip


def facts(identity: dict[str, Scalar] | None = None) -> Fingerprint:
    return Fingerprint(identity={**FACTS, **(identity or {})}, context={}, health={}, packages={})


def diagnosed(*verdicts: Verdict, candidate: Fingerprint | None = None) -> Diagnosis:
    found = most_likely(verdicts, reference=facts(), candidate=candidate or facts())
    assert found is not None
    return found


def numeric(*, lockstep: Outcome, decode: Outcome, logic: Outcome) -> tuple[Verdict, ...]:
    return verdict("lockstep", lockstep, metric="KL divergence"), verdict("decode", decode), verdict("logic", logic)


def test_where_nothing_failed_there_is_nothing_to_explain() -> None:
    quiet = (verdict("greedy", PASS), verdict("lockstep", INCONCLUSIVE))
    assert most_likely(quiet, reference=facts(), candidate=facts({"quantization": "fp8"})) is None


@pytest.mark.parametrize("check", ["contract", "sampling", "inputs"])
def test_what_a_check_proves_by_itself_is_certain(check: str) -> None:
    found = diagnosed(verdict(check, FAIL, causes=("top_k is ignored", "another")))
    assert (found.confidence, found.sentence) == (Confidence.CERTAIN, "top_k is ignored")
    assert found.evidence == ("another", "a witness")


def test_a_probe_of_the_engine_comes_before_what_follows_from_it() -> None:
    greedy = verdict("greedy", FAIL, metric="greedy decoding")
    found = diagnosed(greedy, verdict("contract", FAIL, causes=("repetition_penalty is applied",)))
    assert found.sentence == "repetition_penalty is applied"


def test_a_broken_law_of_shape_is_certain_and_a_count_is_not() -> None:
    law = verdict("shape", FAIL, metric="ends", causes=("max_tokens does not reach the engine",))
    assert diagnosed(law).confidence is Confidence.CERTAIN
    count = verdict("shape", FAIL, metric="output length", causes=("the candidate's answers are shorter",))
    assert diagnosed(count).confidence is Confidence.NONE


def test_a_changed_configuration_explains_other_numbers() -> None:
    other = facts({"model.config.rope_theta": 1e4})
    found = diagnosed(*numeric(lockstep=FAIL, decode=FAIL, logic=FAIL), candidate=other)
    assert found.confidence is Confidence.CERTAIN
    assert "rope_theta is 100000.0 in the reference and 10000.0 in the candidate" in found.sentence


def test_a_changed_fact_explains_nothing_where_the_numbers_agree() -> None:
    other = facts({"model.config.rope_theta": 1e4})
    found = diagnosed(verdict("structured", FAIL), *numeric(lockstep=PASS, decode=PASS, logic=PASS), candidate=other)
    assert found.confidence is Confidence.NONE


def test_what_the_candidate_says_of_itself_can_explain_it() -> None:
    cache = replace(facts(), context={"engine.kv_cache_dtype": "fp8"})
    assert "KV cache in fp8" in diagnosed(*numeric(lockstep=FAIL, decode=FAIL, logic=FAIL), candidate=cache).sentence
    over = replace(facts(), context={"option.hf_overrides": '{"sliding_window": 64}'})
    assert "sliding_window" in diagnosed(*numeric(lockstep=FAIL, decode=FAIL, logic=FAIL), candidate=over).sentence


@pytest.mark.parametrize(
    ("lockstep", "decode", "logic", "cause"),
    [
        (PASS, FAIL, PASS, "the decode path"),
        (PASS, PASS, FAIL, "a slightly other function"),
        (INCONCLUSIVE, PASS, FAIL, "a slightly other function"),
        (FAIL, FAIL, PASS, "precision"),
        (FAIL, FAIL, FAIL, "another function"),
        (FAIL, PASS, FAIL, "another function"),
    ],
)
def test_patterns_of_failures_are_likely_causes(lockstep: Outcome, decode: Outcome, logic: Outcome, cause: str) -> None:
    found = diagnosed(*numeric(lockstep=lockstep, decode=decode, logic=logic))
    assert found.confidence is Confidence.LIKELY
    assert cause in found.sentence
    assert any(f"logic {logic.value}" in e for e in found.evidence)


def test_decoding_that_fails_in_float32_alone_is_the_decode_path() -> None:
    found = diagnosed(*numeric(lockstep=PASS, decode=PASS, logic=PASS), verdict("stepwise", FAIL))
    assert (found.confidence, found.sentence[:15]) == (Confidence.LIKELY, "the decode path")


def test_drift_without_a_mean_points_to_long_contexts() -> None:
    drifting = replace(
        verdict("lockstep", FAIL), findings=(finding("KL divergence", PASS), finding("drift with context", FAIL))
    )
    assert "only long contexts show" in diagnosed(drifting).sentence


def test_where_nothing_fits_that_is_said_with_what_failed() -> None:
    found = diagnosed(verdict("laws", FAIL), verdict("determinism", FAIL))
    assert found.confidence is Confidence.NONE
    assert found.sentence.startswith("no known cause fits: laws, determinism failed")
    assert found.evidence == ("laws says so", "determinism says so")


def test_options_are_shown_as_changed_between_two_sides_of_one_engine_only() -> None:
    plain = recording([completion()], engine="vllm", context={"option.max_num_seqs": "4"})
    other = recording([completion()], engine="vllm", context={"option.max_num_seqs": "8"})
    assert [d.name for d in changed(plain, other)] == ["option.max_num_seqs"]
    assert changed(plain, recording([completion()], engine="transformers")) == ()
