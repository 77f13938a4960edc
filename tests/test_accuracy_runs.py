"""Accuracy in a target: asked in the starts that engines have anyway, scored beside the recordings, judged in pairs,
and resumed where it was interrupted.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from drills import DRILL, Suite, bare_interpreter, counting_engine, lock_here, starts, workers_of
from golden_cases import save
from lmeval_cases import CHOICE, write_model, write_task
from parity import accuracy, cli, collect, config, display, judge, lmeval, store
from parity.accuracy import Questions
from parity.config import Target
from parity.errors import ConfigError, EngineError, IncomparableError, ParityError
from parity.evals import TaskRun
from parity.judge import Evidence
from parity.lmeval import SAMPLES
from parity.record import Places, Recorder
from parity.recording import Recording, TokenLogprobs
from parity.verdict import Outcome, Verdict

__all__ = ["display"]  # imported once, out here: numpy loads once in a process

ENOUGH = 200
"""Documents that pass where none is lost; 180 are the fewest."""
SIDES = (accuracy.REFERENCE, accuracy.CANDIDATE)
ROWS: list[dict[str, Any]] = [{"q": f"Number {n}:", "choices": ["a", "b"], "gold": 0} for n in range(ENOUGH)]
"""One token a choice; a drill gets about half of them right."""
KEPT = r"^choose +200 +0\.\d{4} +0\.\d{4} +100\.00% +\S+% to \S+% +0 +0$"
"""The line of the table that says so."""


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int, detail: str) -> None: ...


def made(root: Path, *, asked: object = None, rows: Sequence[Any] = ROWS, prompts: int = 4, **keys: Any) -> Suite:
    """A project of drills with a task `choose`, which the target asks where `asked` says so."""
    suite = Suite(root)
    write_model(root / "suites" / "model")
    (root / "suites" / "tasks").mkdir()
    write_task(root / "suites" / "tasks", "choose", rows, CHOICE, target_delimiter="")
    target = {**({} if asked is None else {"accuracy": asked}), **keys.pop("target", {})}
    return suite.write(prompts=prompts, target=target, **keys)


def target_of(suite: Suite) -> Target:
    return config.read_target(suite.root / "suites" / "targets.toml", None)


def recorder_of(suite: Suite, observer: Silent | None = None) -> Recorder:
    places = Places.of(suite.root / "suites", suite.root / ".parity")
    return Recorder(directory=suite.run, places=places, observer=observer or Silent())


def collected(suite: Suite) -> Evidence:
    return collect.collect(target_of(suite), recorder_of(suite))


def cli_main(suite: Suite, *arguments: str) -> int:
    """In this process: lm-eval takes seconds to import."""
    return cli.main([*arguments, "--suites", str(suite.root / "suites"), "--home", str(suite.root / ".parity")])


# What a target says -------------------------------------------------------------------------------------------------


def test_a_target_names_its_tasks_and_how_many_documents(tmp_path: Path) -> None:
    found = target_of(made(tmp_path / "a", asked={"tasks": ["choose", "others"], "limit": 40})).accuracy
    assert found == config.Accuracy(tasks=("choose", "others"), folder=tmp_path / "a" / "suites" / "tasks", limit=40)
    all_of_them = target_of(made(tmp_path / "b", asked={"tasks": ["choose"]})).accuracy
    assert all_of_them is not None
    assert all_of_them.limit is None
    assert target_of(made(tmp_path / "c")).accuracy is None


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, r"\[targets.drill\] accuracy names no tasks; list at least one under 'tasks'"),
        ({"tasks": []}, "accuracy names no tasks"),
        ({"tasks": "choose"}, "accuracy: 'tasks' must be a list of strings, not 'choose'"),
        ({"tasks": [1]}, "'tasks' must be a list of strings"),
        ({"tasks": ["choose"], "limit": 0}, "accuracy: 'limit' must be a whole number of at least 1, not 0"),
        ({"tasks": ["choose"], "limit": True}, "must be a whole number of at least 1"),
        ({"tasks": ["choose"], "limits": 3}, "accuracy: unknown key 'limits'; did you mean 'limit'"),
        (True, "accuracy must be a table, not True"),
    ],
)
def test_a_wrong_table_is_one_sentence(asked: Any, sentence: str, tmp_path: Path) -> None:
    suite = made(tmp_path, asked=asked)
    with pytest.raises(ConfigError, match=sentence):
        target_of(suite)


# A whole run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A finished run of a target that asks for accuracy."""

    suite: Suite
    evidence: Evidence
    starts: int

    @property
    def questions(self) -> Questions:
        asked = target_of(self.suite).accuracy
        assert asked is not None
        return Questions.of(asked, self.suite.root / "suites" / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    suite = made(root, asked={"tasks": ["choose"]}, prompts=33, engine=counting_engine(root))
    return Whole(suite, collected(suite), starts(root))


@pytest.fixture
def copied(whole: Whole, tmp_path: Path) -> Path:
    """The run's directory, to be damaged."""
    return Path(shutil.copytree(whole.suite.run, tmp_path / "drill"))


def test_engines_are_started_no_more_often_than_without(whole: Whole, tmp_path: Path) -> None:
    collected(made(tmp_path, engine=counting_engine(tmp_path)))
    assert whole.starts == starts(tmp_path) == 3  # the reference once more, to score what the candidate answered


def test_both_sides_answer_the_same_documents_and_their_samples_lie_beside_the_recordings(whole: Whole) -> None:
    ours, theirs = (store.read(whole.suite.run / side) for side in SIDES)
    assert ours.workload == theirs.workload
    assert len(ours.completions) == len(theirs.completions) == 2 * ENOUGH
    assert {c.id: c.prompt_token_ids for c in ours.completions} == {
        c.id: c.prompt_token_ids for c in theirs.completions
    }
    for side, made_ in zip(SIDES, (ours, theirs), strict=True):
        (samples,) = lmeval.load_samples(whole.suite.run / side)
        assert samples.invocation["recording.digest"] == made_.digest
        assert [s.doc_id for s in samples.samples] == list(range(ENOUGH))
    assert whole.evidence.scored == {side: whole.suite.run / side for side in SIDES}


def test_a_candidate_that_answers_alike_passes_now_and_from_disk(whole: Whole) -> None:
    verdict = judge.judge(whole.evidence, "accuracy")
    assert verdict.outcome is Outcome.PASS
    assert verdict.findings[0].n == ENOUGH
    assert (verdict.reference, verdict.candidate) == ("counting 1 float32",) * 2
    assert judge.judge(judge.gather(whole.suite.run), "accuracy") == verdict
    beside = judge.pair(whole.suite.run / "reference", whole.suite.run / "candidate", noise=None)
    assert judge.judge(beside, "accuracy") == verdict
    assert judge.conclude(judge.gather(whole.suite.run)).could_not == {}


def test_all_of_the_accuracy_is_kept(whole: Whole) -> None:
    found = judge.recovery(judge.gather(whole.suite.run))
    assert found is not None
    assert 0.3 < found.total.reference < 0.7  # some are right and some are wrong, or nothing were shown
    assert (found.total.recovery, found.total.lost, found.total.won) == (1.0, 0, 0)
    assert found.moved is not None
    assert (found.moved.kl_nats, found.moved.same_choice, found.moved.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_a_candidate_from_elsewhere_has_no_share_in_the_documents(whole: Whole, copied: Path) -> None:
    mixed = judge.pair(whole.suite.run / "reference", copied / "candidate", noise=None)
    assert mixed.scored == {}
    assert "accuracy" not in mixed.checks


def test_compare_shows_the_verdict(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(whole.suite.run / side) for side in ("reference", "candidate")]
    assert cli.main(["compare", *places, "--check", "accuracy"]) == 0
    shown = capsys.readouterr().out
    assert "PASS  accuracy: counting 1 float32 against counting 1 float32" in shown
    assert "PASS  accuracy  a loss of 0.00 points on 200 documents, and 2 are ruled out" in shown


def test_a_report_shows_the_verdict_and_what_is_kept(
    whole: Whole, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_main(whole.suite, "report", str(copied), "-o", str(copied / "report")) == 0
    shown = capsys.readouterr().out
    assert "PASS  accuracy  a loss of 0.00 points" in shown
    assert len(re.findall(KEPT, shown, re.MULTILINE)) == 1
    # A drill keeps its four most probable tokens, which are far from all of the probability.
    assert "on 264 tokens of the reference: KL divergence at least 0 nats a token" in shown
    assert "**Accuracy kept:**" in (copied / "report" / "report.md").read_text()


def test_fresh_prompts_confirm_without_asking_the_documents_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = made(tmp_path, asked={"tasks": ["choose"], "limit": 4}, target={"confirm": {"workload": "small"}})
    monkeypatch.setattr(judge, "flagged", lambda _: ("greedy",))
    fresh = collected(suite).confirmation
    assert fresh is not None
    assert fresh.scored == {}
    assert not set(SIDES) & set(fresh.recordings)


def test_the_first_documents_are_asked_where_the_target_sets_a_limit(tmp_path: Path) -> None:
    """And twenty are too few to say anything."""
    evidence = collected(made(tmp_path, asked={"tasks": ["choose"], "limit": 20}))
    verdict = judge.judge(evidence, "accuracy")
    assert (verdict.outcome, verdict.findings[0].n) == (Outcome.INCONCLUSIVE, 20)
    assert "more documents would decide" in verdict.findings[0].sentence


def test_a_run_that_asked_for_no_documents_is_told_what_to_add(tmp_path: Path) -> None:
    evidence = collected(made(tmp_path))
    assert "accuracy" not in evidence.checks
    assert judge.why_not(evidence, "accuracy") == judge.why_not(judge.gather(tmp_path / ".parity/recordings/drill"),
                                                                "accuracy") == (
        "the accuracy check needs scored documents, which this run does not have; add 'accuracy' to the target, or ask "
        "`parity eval`"
    )  # fmt: skip


# Planted faults ------------------------------------------------------------------------------------------------------


def wrong_on(recording: Recording, documents: Sequence[int]) -> Recording:
    """The right choice of these documents, made far less probable."""
    ids = {f"choose/{document}/0" for document in documents}
    assert ids <= recording.by_id.keys()
    completions = []
    for completion in recording.completions:
        if completion.id in ids:
            logprobs = completion.logprobs
            assert logprobs is not None
            less = [value - 50 for value in logprobs.chosen.tolist()]
            rows = [logprobs.row(place) for place in range(len(logprobs))]
            completions.append(replace(completion, logprobs=TokenLogprobs.from_rows(less, rows, k=logprobs.k)))
        else:
            completions.append(completion)
    return replace(recording, completions=tuple(completions))


@pytest.mark.parametrize(("many", "wanted"), [(3, Outcome.INCONCLUSIVE), (30, Outcome.FAIL)])
def test_a_recording_with_wrong_answers_does_not_pass(many: int, wanted: Outcome, whole: Whole, copied: Path) -> None:
    (ours,) = lmeval.load_samples(copied / accuracy.REFERENCE)
    lost = [s.doc_id for s in ours.samples if s.metrics["acc"] == 1.0][:many]
    directory = copied / accuracy.CANDIDATE
    edited = wrong_on(store.read(directory), lost)
    shutil.rmtree(directory)
    whole.questions.score(store.read(save(directory, edited)), directory)
    verdict = judge.judge(judge.gather(copied), "accuracy")
    assert verdict.outcome is wanted
    finding = verdict.findings[0]
    assert f"{many} lost and 0 won" in finding.sentence
    assert finding.delta == pytest.approx(100 * many / ENOUGH)
    kept = judge.recovery(judge.gather(copied))
    assert kept is not None
    assert kept.total.lost == many
    if wanted is Outcome.FAIL:
        conclusion = judge.conclude(judge.gather(copied))
        assert conclusion.decision.advice.value == "HOLD"
        assert "1 of " in conclusion.decision.sentence
        assert "accuracy" in conclusion.decision.sentence


@pytest.fixture(scope="module")
def known(whole: Whole) -> Sequence[Any]:
    """The same documents, with the choice that the reference prefers as the right one."""
    (ours,) = lmeval.load_samples(whole.suite.run / accuracy.REFERENCE)
    return [{**row, "gold": "ab".index(s.response[0])} for row, s in zip(ROWS, ours.samples, strict=True)]


def test_another_model_that_knows_less_fails(known: Sequence[Any], tmp_path: Path) -> None:
    suite = made(tmp_path, asked={"tasks": ["choose"]}, rows=known, candidate={"salt": "another model"})
    evidence = collected(suite)
    verdict = judge.judge(evidence, "accuracy")
    assert verdict.outcome is Outcome.FAIL
    assert (verdict.findings[0].reference, verdict.findings[0].n) == (100.0, ENOUGH)
    assert "where rounding makes about 4.0% differ" in verdict.warnings[0]
    kept = judge.recovery(evidence)
    assert kept is not None
    assert kept.total.recovery == pytest.approx((verdict.findings[0].candidate or 0.0) / 100)
    assert kept.moved is not None
    assert kept.moved.same_choice < 0.5
    assert kept.moved.perplexity_ratio > 10


@pytest.mark.parametrize("damage", ["missing", "cut", "edited"])
def test_samples_that_cannot_be_read_leave_every_other_verdict_and_the_decision(
    damage: str, whole: Whole, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / accuracy.CANDIDATE / SAMPLES
    text = path.read_text()
    path.unlink()
    if damage != "missing":
        path.write_text(text[: len(text) // 2] if damage == "cut" else text.replace('"metrics": {', '"metrics": ["', 1))
    evidence = judge.gather(copied)
    with pytest.raises(ParityError, match="samples") as told:
        judge.judge(evidence, "accuracy")
    assert "\n" not in str(told.value)
    assert judge.recovery(evidence) is None
    assert list(judge.conclude(evidence).could_not) == ["accuracy"]
    assert cli_main(whole.suite, "report", str(copied), "-o", str(copied / "report")) == 3
    shown = capsys.readouterr().out
    assert "could not judge accuracy: " in shown
    assert "UNDECIDED" in shown
    assert f"report: {copied / 'report'}" in shown


def test_answers_that_cannot_be_scored_keep_no_other_check_from_judging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gave_up(*_: object) -> Path:
        raise EngineError("drill gave up request 'choose/3/0'")

    monkeypatch.setattr(Questions, "score", gave_up)
    suite = made(tmp_path, asked={"tasks": ["choose"]})
    for evidence in (collected(suite), judge.gather(suite.run)):
        with pytest.raises(IncomparableError, match="gave up request"):
            judge.judge(evidence, "accuracy")
        assert judge.judge(evidence, "greedy") is not None
        assert "accuracy" in judge.conclude(evidence).could_not


def test_samples_of_another_recording_are_refused(whole: Whole, copied: Path) -> None:
    path = copied / "accuracy-candidate" / lmeval.SAMPLES
    digest = whole.evidence.recordings["accuracy-candidate"].digest
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(IncomparableError, match="are not of the recording beside them"):
        judge.judge(judge.gather(copied), "accuracy")


def test_scores_that_cannot_be_compared_leave_the_table_of_what_is_kept(whole: Whole, copied: Path) -> None:
    """As where an engine that is recorded anew says something else than what was scored."""
    evidence = judge.gather(copied)
    held = dict(evidence.recordings.items())
    forged = tuple(replace(c, token_ids=c.token_ids[::-1]) for c in held["candidate-scores"].completions)
    held["candidate-scores"] = replace(held["candidate-scores"], completions=forged)
    found = judge.recovery(replace(evidence, recordings=held))
    assert found is not None
    assert (found.total.n, found.moved) == (ENOUGH, None)


# What is wrong with a task, before any engine starts ----------------------------------------------------------------

WRONG: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "a wrong name": ({}, "there is no task 'chose' among the 1 of .*; did you mean 'choose'?"),
    "a file with an error": ({"doc_to_txt": "{{q}}"}, "unexpected keyword argument 'doc_to_txt'"),
    "a missing split": ({"test_split": "tset"}, "its data have no split 'tset', which '.*choose.yaml' names"),
    "an empty task": ({"rows": []}, "task 'choose' has no documents; .*choose.yaml' reads"),
    "a missing file": ({"dataset_kwargs": {"file": "gone.jsonl"}}, "task 'choose' needs the file '.*gone.jsonl'"),
    "a document that is too long": ({"rows": [{**ROWS[0], "q": "long " * 60}]}, "document 0 of task 'choose' needs"),
    "a wrong answer": (
        {"rows": [ROWS[0], {**ROWS[1], "gold": 2}]},
        "document 1 .* says that the right answer is 2 and has 2 choices",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_task_is_one_sentence_before_any_engine_starts(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, sentence = WRONG[case]
    asked = "chose" if case == "a wrong name" else "choose"
    suite = made(tmp_path, asked={"tasks": [asked]}, engine=counting_engine(tmp_path))
    write_task(tmp_path / "suites" / "tasks", "choose", **{"rows": ROWS, "base": CHOICE, **changes})
    with pytest.raises(ParityError, match=sentence) as told:
        collected(suite)
    assert "\n" not in str(told.value)
    for verb in (("record",), ("eval", "--tasks", asked), ("eval", "--tasks", asked, "--sequential")):
        assert cli_main(suite, *verb) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"parity: {told.value}"
    assert starts(tmp_path) == 0
    assert not suite.run.exists()


def test_a_wrong_limit_of_the_check_is_told_before_any_engine_starts(tmp_path: Path) -> None:
    suite = made(
        tmp_path, asked={"tasks": ["choose"]}, engine=counting_engine(tmp_path), limits={"accuracy": {"margin": 0.1}}
    )
    with pytest.raises(ConfigError, match=r"limits\.accuracy changes margin and names no 'source'"):
        collected(suite)
    assert starts(tmp_path) == 0


# Interruptions -------------------------------------------------------------------------------------------------------

DOCUMENTS, REQUESTS = 60, 120
"""Of each side; twenty batches of three documents."""


@dataclass(frozen=True)
class Dying:
    """A project whose engine writes down which documents it has answered, and dies once, after so many in all."""

    root: Path
    dies_after: int | None

    def write(self) -> Suite:
        """In a locked environment, so that what a side has answered is not asked again; the sides differ in threads."""
        self.root.mkdir()
        path, log, doom = (self.root / name for name in ("dying.py", "answered", "doom"))
        log.touch()
        if self.dies_after is not None:
            doom.write_text(str(self.dies_after))
        path.write_text(
            "import os\nfrom pathlib import Path\n"
            f"exec(compile(Path({str(DRILL)!r}).read_text(), {str(DRILL)!r}, 'exec'))\n"
            f"log, doom = Path({str(log)!r}), Path({str(doom)!r})\n"
            "answer = DrillEngine._complete\n"
            "def complete(self, request, started_ns):\n"
            "    if '/' in request.id:\n"
            "        if doom.exists() and len(log.read_text().split()) == int(doom.read_text()):\n"
            "            doom.unlink()\n"
            "            os._exit(70)\n"
            "        with log.open('a') as file:\n"
            "            file.write(request.id + '\\n')\n"
            "    return answer(self, request, started_ns)\n"
            "DrillEngine._complete = complete\n"
        )
        suite = made(self.root, asked={"tasks": ["choose"]}, rows=ROWS[:DOCUMENTS], engine=path, threads=2)
        targets = self.root / "suites" / "targets.toml"
        python = f'"python" = "{bare_interpreter()}"'
        text = targets.read_text()
        assert text.count(python) == 2
        targets.write_text(text.replace(python, '"environment" = "here"'))
        return suite

    @property
    def answered(self) -> Counter[str]:
        """How often each request was answered, by both sides."""
        return Counter((self.root / "answered").read_text().split())


@dataclass(frozen=True)
class Found:
    """What both sides scored, whatever else differs between two runs, and what was judged."""

    reference: list[dict[str, Any]]
    candidate: list[dict[str, Any]]
    verdict: Verdict


Ask: TypeAlias = Callable[[Suite], Found]


def collect_(suite: Suite) -> Found:
    evidence = collected(suite)
    ours, theirs = (samples_of(lmeval.load_samples(evidence.scored[side])) for side in SIDES)
    return Found(ours, theirs, judge.judge(evidence, "accuracy"))


def evaluate_(suite: Suite, *, sequential: bool = False) -> Found:
    tasks = lmeval.load_tasks(["choose"], folder=suite.root / "suites" / "tasks", model=suite.root / "suites" / "model")
    ask = accuracy.evaluate_until_certain if sequential else accuracy.evaluate
    found = ask(target_of(suite), recorder_of(suite), tasks, limit=None)
    return Found(samples_of(found.reference), samples_of(found.candidate), found.verdict)


def samples_of(runs: Sequence[TaskRun]) -> list[dict[str, Any]]:
    return [sample.to_json() for task in runs for sample in task.samples]


ASK: Mapping[str, Ask] = {
    "a target": collect_,
    "eval": evaluate_,
    "eval until certain": partial(evaluate_, sequential=True),
}


@dataclass(frozen=True)
class Uninterrupted:
    """One way of asking, a project that was asked so, and what was found."""

    how: str
    suite: Suite
    found: Found


@pytest.fixture(scope="module", params=ASK)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    suite = Dying(tmp_path_factory.mktemp("uninterrupted") / "project", None).write()
    with pytest.MonkeyPatch.context() as patch:
        lock_here(patch)
        return Uninterrupted(request.param, suite, ASK[request.param](suite))


@pytest.mark.parametrize("side", SIDES)
def test_an_engine_that_dies_among_the_documents_is_never_asked_a_finished_one_again(
    side: str, uninterrupted: Uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_here(monkeypatch)
    ask = ASK[uninterrupted.how]
    dies_after = 40 if side == accuracy.REFERENCE else REQUESTS + 40
    dying = Dying(tmp_path / "interrupted", dies_after)
    suite = dying.write()
    with pytest.raises(EngineError, match=r"exited with code 70 while answering \d+ requests"):
        ask(suite)
    assert workers_of(os.getpid()) == []
    assert sum(dying.answered.values()) == dies_after
    assert ask(suite) == uninterrupted.found
    assert dying.answered == Dying(uninterrupted.suite.root, None).answered
    assert set(dying.answered.values()) == {2}  # once by each side
    batch = 6 if uninterrupted.how == "eval until certain" and side == accuracy.CANDIDATE else REQUESTS
    resumed = [store.read(path.parent).resumed for path in suite.run.glob(f"{side}*/{store.HEADER}")]
    assert sum(resumed) == 40 % batch


@pytest.mark.parametrize("uninterrupted", ["eval until certain"], indirect=True)
def test_what_each_batch_scored_lies_beside_its_recording(uninterrupted: Uninterrupted) -> None:
    """Sixty documents are too few to be certain, so all of them are asked, and counted."""
    run, found = uninterrupted.suite.run, uninterrupted.found
    batches = sorted(run.glob(f"{accuracy.CANDIDATE}-*"))
    assert len(batches) == 20
    beside = [sample for batch in batches for sample in samples_of(lmeval.load_samples(batch))]
    assert sorted(beside, key=lambda s: s["doc_id"]) == found.candidate
    assert samples_of(lmeval.load_samples(run / accuracy.REFERENCE)) == found.reference
    assert found.verdict.outcome is Outcome.INCONCLUSIVE
    assert found.verdict.findings[0].n == DOCUMENTS


def test_asking_ends_with_the_batch_that_makes_the_verdict_certain(known: Sequence[Any], tmp_path: Path) -> None:
    suite = made(tmp_path, rows=known, candidate={"salt": "another model"})
    found = evaluate_(suite, sequential=True)
    assert found.verdict.outcome is Outcome.FAIL
    asked = len(list(suite.run.glob(f"{accuracy.CANDIDATE}-*")))
    assert 1 <= asked < 20
    assert len(found.candidate) == len(found.reference) == found.verdict.findings[0].n == asked * ENOUGH // 20
    assert len(store.read(suite.run / accuracy.REFERENCE).completions) == 2 * ENOUGH


def test_the_command_says_that_it_could_not_judge_and_the_next_one_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock_here(monkeypatch)
    suite = Dying(tmp_path / "interrupted", 40).write()
    assert cli_main(suite, "eval", "--tasks", "choose") == 2
    assert "dying float32 exited with code 70 while answering 120 requests" in capsys.readouterr().err
    assert cli_main(suite, "eval", "--tasks", "choose") == 3  # sixty documents are too few
    said = capsys.readouterr()
    assert "accuracy-reference: resuming, 40 of 120 prompts were finished by an earlier run" in said.err
    assert "INCONCLUSIVE  accuracy: dying 1 float32 against dying 1 float32" in said.out
    assert len(re.findall(KEPT.replace("200", "60"), said.out, re.MULTILINE)) == 1
