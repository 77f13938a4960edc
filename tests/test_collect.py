"""From a target to its recordings: who is asked what, once, and what is recorded again on fresh prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from drills import DRILL, Suite, bare_interpreter, counting_engine, starts
from parity import collect, config, judge, store
from parity.config import Target
from parity.errors import IncomparableError
from parity.record import Places, Recorder
from parity.recording import Recording
from parity.verdict import Outcome, Verdict

FRESH = [{"id": f"fresh-{i:02}", "text": f"a fresh prompt, number {i}"} for i in range(6)]


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int, detail: str) -> None: ...


def collected(suite: Suite, target: Target) -> tuple[judge.Evidence, list[str]]:
    observer = Silent()
    places = Places.of(suite.root / "suites", suite.root / ".parity")
    evidence = collect.collect(target, Recorder(directory=suite.run, places=places, observer=observer))
    return evidence, observer.notes


def written(tmp_path: Path, *, engine: Path = DRILL, **target: object) -> tuple[Suite, Target]:
    noise = {"engine": str(engine), "dtype": "float32", "python": bare_interpreter()}
    suite = Suite(tmp_path).write(prompts=33, engine=engine, target={"noise": noise, **target})
    fresh = suite.root / "suites" / "fresh.jsonl"
    fresh.write_text("".join(f"{json.dumps(line)}\n" for line in FRESH))
    path = suite.root / "suites" / "targets.toml"
    more = "workloads.fresh = {prompts = ['fresh.jsonl'], max_tokens = 10, logprobs = 4}\n"
    path.write_text(path.read_text() + more)
    return suite, config.read_target(path, None)


def test_each_engine_is_asked_about_itself_in_the_start_that_it_has_anyway(tmp_path: Path) -> None:
    suite, target = written(tmp_path, engine=counting_engine(tmp_path), determinism={"workload": "small"})
    evidence, _ = collected(suite, target)
    assert starts(tmp_path) == 4  # reference, noise, candidate, and the reference once more to score
    twins = evidence.recordings["determinism-candidate"]
    assert len(twins.completions) == 3 * 33
    assert twins.by_id["p-00#alone"].prompt_token_ids == evidence.reference.by_id["p-00"].prompt_token_ids
    assert judge.judge(evidence, "determinism").outcome is Outcome.PASS


def test_an_engine_is_not_asked_what_it_says_that_it_cannot_do(tmp_path: Path) -> None:
    suite, target = written(tmp_path, structured={"workload": "small"})
    evidence, _ = collected(suite, target)
    assert "structured-candidate" not in evidence.recordings
    reason = judge.why_not(evidence, "structured")
    assert reason is not None
    assert "needs the recording 'structured-candidate'" in reason


def test_what_screening_flags_is_recorded_once_more_on_fresh_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, target = written(tmp_path, confirm={"workload": "fresh"}, determinism={"workload": "small"})
    monkeypatch.setattr(judge, "flagged", lambda _: ("greedy",))
    evidence, notes = collected(suite, target)
    assert any("greedy flagged at the screening rate" in n for n in notes)
    fresh = evidence.confirmation
    assert fresh is not None
    assert sorted(fresh.reference.by_id) == [line["id"] for line in FRESH]
    assert "determinism-candidate" not in fresh.recordings  # only what rests on chance is asked again
    stored = judge.gather(suite.run)
    assert stored.confirmation is not None
    assert stored.confirmation.reference.digest == fresh.reference.digest
    beside = judge.pair(suite.run / "reference", suite.run / "candidate", noise=None)
    assert beside.confirmation is not None


def test_a_run_that_is_not_flagged_names_no_confirmation_even_if_an_older_one_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, target = written(tmp_path, confirm={"workload": "fresh"})
    with monkeypatch.context() as patched:
        patched.setattr(judge, "flagged", lambda _: ("greedy",))
        collected(suite, target)
    evidence, _ = collected(suite, target)
    assert evidence.confirmation is None
    assert (suite.run / "confirm" / "reference").is_dir()
    assert judge.gather(suite.run).confirmation is None


def test_a_candidate_that_fails_lock_step_is_tried_on_other_prompts(tmp_path: Path) -> None:
    suite, target = written(tmp_path)
    other = written(tmp_path / "other")[1].candidate
    spoilt = replace(target, candidate=replace(other, options={"salt": "another model"}))
    evidence, notes = collected(suite, spoilt)
    assert judge.judge(evidence, "lockstep").outcome is Outcome.FAIL
    assert "hypothesis-first-dropped" in evidence.recordings
    assert any("whether other prompts would explain it" in n for n in notes)
    verdicts = [judge.judge(evidence, check) for check in ("lockstep", "greedy")]
    said = judge.diagnosis(evidence, verdicts)
    assert said is not None
    assert "token" not in said.sentence  # another model is none of the prompt faults


def test_of_large_recordings_only_the_latest_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, target = written(tmp_path)
    collected(suite, target)
    read: list[str] = []
    own = store.read

    def counted(path: Path) -> Recording:
        read.append(path.name)
        return own(path)

    monkeypatch.setattr(store, "read", counted)
    kept = judge.gather(suite.run).recordings
    for role in ("reference", "candidate", "reference"):
        assert kept[role].completions
    assert read == ["reference", "candidate"]
    monkeypatch.setattr(judge, "_HELD_BYTES", 1)
    assert kept["noise"].completions
    assert kept["reference"].completions
    assert read == ["reference", "candidate", "noise", "reference"]


@pytest.mark.parametrize("verb", ["probe", "laws"])
def test_an_engine_that_cannot_be_asked_is_one_sentence(tmp_path: Path, verb: str) -> None:
    """The drill knows no temperature and no stop strings, which both commands ask for."""
    ended = Suite(tmp_path).write(prompts=4).command(verb)
    assert ended.code == 2
    assert ended.sentence.startswith("drill float32 failed while answering")
    assert "cannot honour" in ended.sentence


@pytest.mark.parametrize("wrong", [("--examples", "0"), ("--seed", "-1")])
def test_no_examples_or_a_negative_seed_are_refused_in_one_sentence(tmp_path: Path, wrong: tuple[str, str]) -> None:
    ended = Suite(tmp_path).write(prompts=4).command("laws", *wrong)
    assert ended.code == 2
    assert ended.sentence.startswith("--examples must be at least 1 and --seed at least 0")


def test_a_lock_step_that_cannot_judge_does_not_keep_the_other_checks_from_judging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, target = written(tmp_path)
    own = judge.judge

    def refusing(evidence: judge.Evidence, check: str) -> Verdict:
        if check == "lockstep":
            raise IncomparableError("the noise engine does not run the same model")
        return own(evidence, check)

    monkeypatch.setattr(judge, "judge", refusing)
    evidence, _ = collected(suite, target)
    assert judge.judge(evidence, "greedy").outcome is Outcome.PASS
