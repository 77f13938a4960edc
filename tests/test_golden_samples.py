"""Scored documents in a golden: accepted with the answers, paired with later ones, verified, and never lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import golden_cases
from accuracy_cases import edited, run, with_text
from drills import Suite, counting_engine, starts
from golden_cases import TARGET, acceptance, contents, document_of, edit, scored, shelf_copied, shelf_in, two_runs
from lmeval_cases import CHOICE, write_model, write_task
from parity import accuracy, cli, collect, config, evals, golden, judge, lmeval, store
from parity.errors import ConfigError, GoldenMissingError, IncomparableError, ParityError, RecordingError
from parity.evals import TaskRun
from parity.golden import Golden, Shelf
from parity.judge import Evidence
from parity.record import Places, Recorder
from parity.verdict import Outcome

RESTORE = "restore it from git, or move its folder away and accept anew"
SHA = r"[0-9a-f]{12}"
BOTH = [run("arc", [1.0] * 20 + [0.0] * 10), run("boolq", [1.0, 0.0, 0.0, 0.0])]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return shelf_in(tmp_path)


def accepted(shelf: Shelf, seed: int = 1, runs: Sequence[TaskRun] | None = None, **changes: Any) -> Golden:
    return shelf.accept(scored(shelf.root.parent / f"run-{seed}", seed=seed, runs=runs, **changes))


def file_of(shelf: Shelf) -> Path:
    (found,) = shelf.folder(TARGET).glob("samples-*")
    return found


# What is accepted is what is read ----------------------------------------------------------------------------------


def test_the_scored_documents_are_stored_and_read_back(shelf: Shelf) -> None:
    written = accepted(shelf, runs=BOTH)
    found = shelf.read(TARGET)
    assert found == written
    assert found.samples == file_of(shelf)
    content = file_of(shelf).read_bytes()
    assert evals.from_json_lines(content.decode("ascii")) == tuple(BOTH)
    sha256 = hashlib.sha256(content).hexdigest()
    assert document_of(shelf.folder(TARGET))["samples"] == {"bytes": len(content), "sha256": sha256}
    assert file_of(shelf).name == f"samples-{sha256[:12]}.jsonl"
    assert shelf.orphans(TARGET) == ()


def test_the_mean_of_each_task_is_a_metric_and_goes_into_the_history(shelf: Shelf) -> None:
    wanted = scored(shelf.root.parent / "run-1", seed=1, runs=BOTH)
    assert {n: m.value for n, m in shelf.numbers_of(wanted).items() if n.startswith("acc on")} == {
        "acc on arc": 0.666667,
        "acc on boolq": 0.25,
    }
    found = shelf.accept(wanted)
    assert found.metrics == shelf.numbers_of(wanted)
    metric = found.metrics["acc on boolq"]
    assert (metric.value, metric.unit, metric.n) == (0.25, "mean of documents", 4)
    assert document_of(shelf.folder(TARGET))["metrics"]["acc on boolq"]["value"] == 0.25
    again = accepted(shelf, 2, runs=[BOTH[0], run("boolq", [1.0] * 4)])
    assert again.history["acc on boolq"] == (0.25, 1.0)
    assert again.spreads()["acc on boolq"].n == 2


def test_a_metric_is_that_of_the_first_filter(shelf: Shelf) -> None:
    both = run("gsm", [1.0, 1.0, 0.0, 0.0], filters=("strict", "flexible"))
    flexible = replace(
        both, samples=tuple(replace(s, metrics={"acc": 1.0}) if s.filter == "flexible" else s for s in both.samples)
    )
    metric = accepted(shelf, runs=[flexible]).metrics["acc on gsm"]
    assert (metric.value, metric.n) == (0.5, 4)


def test_a_golden_without_samples_is_written_as_before(shelf: Shelf) -> None:
    found = shelf.accept(acceptance(shelf.root.parent / "run-1", seed=1))
    assert found.samples is None
    assert "samples" not in document_of(shelf.folder(TARGET))
    assert not [name for name in found.metrics if name.startswith("acc")]


def test_what_cannot_be_read_or_is_no_number_is_not_accepted(shelf: Shelf) -> None:
    accepted(shelf)
    before = contents(shelf.root)
    missing = replace(scored(shelf.root.parent / "run-2", seed=2), samples=shelf.root.parent / "nowhere")
    nan = scored(shelf.root.parent / "run-2", seed=2, runs=[run("arc", [1.0, float("nan")])])
    for ask in (shelf.numbers_of, shelf.accept):
        with pytest.raises(RecordingError, match=r"the samples '.*nowhere/samples\.jsonl' cannot be read"):
            ask(missing)
        with pytest.raises(ConfigError, match="cannot be a yardstick: its acc on arc is nan; record again"):
            ask(nan)
    assert contents(shelf.root) == before


def test_samples_that_are_scored_anew_while_they_are_accepted_change_nothing(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = accepted(shelf)
    wanted = scored(shelf.root.parent / "run-2", seed=2)
    own = lmeval.load_samples
    calls: list[Path] = []

    def replaced(directory: Path) -> tuple[TaskRun, ...]:
        found = own(directory)
        calls.append(directory)
        scored(shelf.root.parent / "run-2", seed=9)
        return found

    monkeypatch.setattr(lmeval, "load_samples", replaced)
    with pytest.raises(RecordingError, match=r"the metric 'acc on arc' says 0.933333 .*, its recordings give 0.7 "):
        shelf.accept(wanted)
    assert calls
    assert shelf.read(TARGET) == first


# One after the other -----------------------------------------------------------------------------------------------


def test_superseded_samples_move_aside_with_their_golden(shelf: Shelf) -> None:
    first = accepted(shelf, 1)
    before = contents(shelf.folder(TARGET))
    accepted(shelf, 2)
    (place,) = shelf.aside.iterdir()
    assert contents(place) == before
    assert shelf.orphans(TARGET) == ()
    shutil.rmtree(shelf.folder(TARGET))
    shutil.move(place, shelf.folder(TARGET))
    assert shelf.read(TARGET).digest == first.digest


def test_the_same_documents_with_other_answers_stay_where_they_are(shelf: Shelf) -> None:
    first = accepted(shelf, 1, runs=BOTH)
    second = accepted(shelf, 2, runs=BOTH)
    assert first.samples == second.samples == file_of(shelf)
    assert shelf.read(TARGET) == second


def test_accepted_again_without_samples_there_are_none(shelf: Shelf) -> None:
    accepted(shelf)
    content = file_of(shelf).read_bytes()
    found = shelf.accept(acceptance(shelf.root.parent / "run-1", seed=1))
    assert shelf.read(TARGET) == found
    assert found.samples is None
    assert len(found.runs) == 1
    assert not list(shelf.folder(TARGET).glob("samples-*"))
    (aside,) = shelf.aside.glob("*/samples-*")
    assert aside.read_bytes() == content


def test_samples_that_no_golden_names_are_listed_and_moved_aside(shelf: Shelf) -> None:
    accepted(shelf)
    left = shelf.folder(TARGET) / "samples-0123456789ab.jsonl"
    left.write_text("")
    assert shelf.orphans(TARGET) == (left,)
    accepted(shelf, 2)
    assert shelf.orphans(TARGET) == ()


# Damaged, edited and hostile ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shelf with a sound golden, and two runs."""
    return two_runs(tmp_path_factory.mktemp("sound"), scored)


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Shelf:
    """One of its own, to be damaged."""
    return shelf_copied(sound, tmp_path / "shelf")


def refused(shelf: Shelf, sentence: str, kind: type[ParityError] = RecordingError) -> None:
    """And the line names the golden's own file."""
    golden_cases.refused(shelf, sentence, kind, names=shelf.folder(TARGET) / golden.FILE)


@pytest.mark.parametrize(
    ("damage", "sentence", "kind"),
    [
        (
            Path.unlink,
            rf"its scored documents samples-{SHA}.jsonl are missing; restore them from git",
            GoldenMissingError,
        ),
        (
            lambda path: os.truncate(path, path.stat().st_size // 2),
            rf"samples-{SHA}.jsonl has \d+ bytes, and \d+ were accepted; {RESTORE}",
            RecordingError,
        ),
        (
            lambda path: path.write_text(path.read_text() + "\n"),
            r"has \d+ bytes, and \d+ were accepted",
            RecordingError,
        ),
        (
            lambda path: path.write_text(path.read_text().replace('"acc": 1.0', '"acc": 0.0', 1)),
            rf"samples-{SHA}.jsonl has the content {SHA}, and {SHA} was accepted; {RESTORE}",
            RecordingError,
        ),
    ],
)
def test_damaged_samples_are_named_and_accepting_them_again_mends_it(
    damage: Callable[[Path], object], sentence: str, kind: type[ParityError], damaged: Shelf
) -> None:
    damage(file_of(damaged))
    refused(damaged, sentence, kind)
    mended = damaged.accept(scored(damaged.root.parent / "run-1", seed=1))
    assert damaged.read(TARGET) == mended
    assert len(mended.runs) == 1


def test_samples_behind_a_link_are_never_followed_nor_written_through(damaged: Shelf, tmp_path: Path) -> None:
    path = file_of(damaged)
    shutil.move(path, tmp_path / "outside")
    content = (tmp_path / "outside").read_bytes()
    path.symlink_to(tmp_path / "outside")
    refused(damaged, rf"{re.escape(str(path))}' is a link, and a golden holds its own files; {RESTORE}")
    (tmp_path / "outside").write_text("mine")
    damaged.accept(scored(damaged.root.parent / "run-1", seed=1))
    assert (tmp_path / "outside").read_text() == "mine"
    assert file_of(damaged).read_bytes() == content
    assert not path.is_symlink()


@pytest.mark.parametrize("reseal", [False, True], ids=["digest left", "digest made right"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d["metrics"]["acc on arc"].update(value=1.0),
            r"the metric 'acc on arc' says 1 mean of documents \(n 30\), its recordings give 0.966667 mean",
        ),
        (lambda d: d["metrics"].pop("acc on arc"), "'acc on arc' says nothing, its recordings give 0.966667"),
        (lambda d: d.pop("samples"), "'acc on arc' says 0.966667 .*, its recordings give nothing"),
    ],
)
def test_an_edited_number_is_named_with_both_values(
    change: Callable[[dict[str, Any]], object], reseal: bool, sentence: str, damaged: Shelf
) -> None:
    edit(damaged.folder(TARGET), change, reseal=reseal)
    refused(damaged, rf"golden '.*golden.json': .*{sentence}.*; {RESTORE}")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("x", r"it says 'x' where its 'samples' must be a table"),
        ({}, "it says None where its 'sha256' must be a text"),
        ({"bytes": 1, "sha256": "../../../etc/passwd"}, "where its 'sha256' must be 64 hexadecimal digits"),
        ({"bytes": 1 << 40, "sha256": "0" * 64}, r"'samples' is said to have \d+ bytes, and a golden's files have"),
        ({"bytes": 1, "sha256": "0" * 64}, "its scored documents samples-000000000000.jsonl are missing"),
    ],
)
def test_something_else_in_the_place_of_the_samples_is_refused(value: object, sentence: str, damaged: Shelf) -> None:
    edit(damaged.folder(TARGET), lambda d: d.update(samples=value))
    refused(damaged, sentence, ParityError)


def forge(shelf: Shelf, content: bytes) -> None:
    """Another content, with every hash and digest made right."""
    file_of(shelf).unlink()
    sha256 = hashlib.sha256(content).hexdigest()
    (shelf.folder(TARGET) / f"samples-{sha256[:12]}.jsonl").write_bytes(content)
    edit(shelf.folder(TARGET), lambda d: d.update(samples={"bytes": len(content), "sha256": sha256}))


def first_sample(text: str, **changes: object) -> str:
    lines = text.split("\n")
    lines[1] = json.dumps({**json.loads(lines[1]), **changes})
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("forged", "sentence"),
    [
        (lambda _: "\N{SNOWMAN}", "'ascii' codec can't decode byte"),
        (lambda _: "[" * 100_000, "line 1 of the samples does not begin a complete task"),
        (lambda _: "{}\n", "line 1 of the samples does not begin a complete task"),
        (lambda text: text[: len(text) // 2], "does not begin a complete task"),
        (lambda text: text.replace('"samples": 30', '"samples": -1'), "it says that it has -1 samples"),
        (lambda text: text.split("\n")[0].replace('"samples": 30', '"samples": 0') + "\n", "division by zero"),
        (lambda text: text.replace('"metric": "acc"', '"metric": "bleu"'), "'bleu'"),
        (lambda text: first_sample(text, metrics=[]), r"its 'metrics' is \[\]"),
        (lambda text: first_sample(text, metrics={"acc": 10**400}), "too large|int"),
        (lambda text: first_sample(text, doc_id=None), "its 'doc_id' is None"),
    ],
)
def test_forged_samples_with_every_hash_right_are_one_sentence(
    forged: Callable[[str], str], sentence: str, damaged: Shelf
) -> None:
    forge(damaged, forged(file_of(damaged).read_text("ascii")).encode())
    refused(damaged, rf"samples-{SHA}.jsonl holds no scored documents \(.*({sentence}).*\); {RESTORE}")


def test_forged_samples_that_are_samples_give_another_number(damaged: Shelf) -> None:
    forge(damaged, evals.to_json_lines([run("arc", [1.0] * 30)]).encode())
    refused(damaged, "the metric 'acc on arc' says 0.966667 .*, its recordings give 1 mean of documents")


# A later run is paired with them ------------------------------------------------------------------------------------

DOCUMENTS = 200
ROWS: list[dict[str, Any]] = [{"q": f"Number {n}:", "choices": ["a", "b"], "gold": 0} for n in range(DOCUMENTS)]


class Silent:
    def note(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int, detail: str) -> None: ...


@dataclass(frozen=True)
class Project:
    """Drills, a target that asks for accuracy and for a golden, and a shelf."""

    suite: Suite
    scored: tuple[TaskRun, ...] = ()

    @property
    def shelf(self) -> Shelf:
        return golden.shelf(self.suite.root / "suites", self.suite.root / ".parity")

    def target(self, **changes: Any) -> config.Target:
        return replace(config.read_target(self.suite.root / "suites" / "targets.toml", None), **changes)

    def recorder(self, name: str = "drill") -> Recorder:
        places = Places.of(self.suite.root / "suites", self.suite.root / ".parity")
        return Recorder(directory=self.suite.run.with_name(name), places=places, observer=Silent())

    def main(self, *arguments: str) -> int:
        root = self.suite.root
        return cli.main([*arguments, "--suites", str(root / "suites"), "--home", str(root / ".parity")])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Recorded once and accepted."""
    root = tmp_path_factory.mktemp("project")
    write_model(root / "suites" / "model")
    (root / "suites" / "tasks").mkdir()
    write_task(root / "suites" / "tasks", "choose", ROWS, CHOICE, target_delimiter="")
    asked = {"accuracy": {"tasks": ["choose"]}, "golden": True}
    made = Project(Suite(root).write(prompts=33, engine=counting_engine(root), target=asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        assert made.main("record") == 0
        assert made.main("accept", "--reason", "the first one", "--yes") == 0
    return replace(made, scored=lmeval.load_samples(made.suite.run / accuracy.CANDIDATE))


@pytest.fixture(scope="module")
def held(project: Project) -> Evidence:
    """A second run of the same target, its candidate held against the golden."""
    found = collect.collect(project.target(), project.recorder(), project.shelf).golden
    assert found is not None
    return found


@pytest.fixture
def copied(held: Evidence, tmp_path: Path) -> Path:
    return Path(shutil.copytree(held.directories["reference"].parent, tmp_path / "golden"))


def test_the_command_accepts_the_samples_of_the_candidate(project: Project) -> None:
    found = project.shelf.read("drill")
    assert found.samples is not None
    assert found.outcomes["accuracy"] == "PASS"
    assert 0.3 < found.metrics["acc on choose"].value < 0.7
    assert evals.from_json_lines(found.samples.read_text("ascii")) == project.scored


def test_a_later_run_passes_against_itself_now_and_from_disk(held: Evidence) -> None:
    verdict = judge.judge(held, "accuracy")
    assert verdict.outcome is Outcome.PASS
    assert verdict.findings[0].n == DOCUMENTS
    assert re.fullmatch(r"the golden of \d{4}-\d\d-\d\d \(counting 1 float32\)", verdict.reference)
    run_ = judge.gather(held.directories["reference"].parent.parent)
    assert judge.judge(judge.against_golden(run_), "accuracy") == verdict
    kept = judge.recovery(held)
    assert kept is not None
    assert (kept.total.recovery, kept.total.n) == (1.0, DOCUMENTS)


def rescored(copied: Path, change: Callable[[TaskRun], TaskRun]) -> Evidence:
    """The candidate's samples, changed."""
    runs = lmeval.load_samples(copied / accuracy.CANDIDATE)
    lmeval.save_samples(copied / accuracy.CANDIDATE, [change(each) for each in runs])
    return judge.gather(copied)


@pytest.mark.parametrize(("many", "wanted"), [(3, Outcome.INCONCLUSIVE), (30, Outcome.FAIL)])
def test_a_planted_loss_does_not_pass(many: int, wanted: Outcome, copied: Path) -> None:
    def lose(whole: TaskRun) -> TaskRun:
        right = [s.doc_id for s in whole.samples if s.metrics["acc"] == 1.0][:many]
        return replace(
            whole,
            samples=tuple(replace(s, metrics={**s.metrics, "acc": 0.0}) if s.doc_id in right else s
                          for s in whole.samples),
        )  # fmt: skip

    verdict = judge.judge(rescored(copied, lose), "accuracy")
    assert verdict.outcome is wanted
    assert f"{many} lost and 0 won" in verdict.findings[0].sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: replace(r, version="3"),
            "task 'choose' has the version '2' in the reference and '3' in the candidate",
        ),
        (
            lambda r: edited(r, 7, lambda s: with_text(s, prompt_hash="0" * 64)),
            "document 7 of task 'choose' has the prompt_hash '.*' in the reference and '0{64}' in the candidate",
        ),
        (
            lambda r: edited(r, 7, lambda s: with_text(s, target_hash="0" * 64)),
            "document 7 of task 'choose' has the target_hash",
        ),
        (lambda r: replace(r, metric="acc_norm"), "has the metric 'acc' in the reference and 'acc_norm'"),
        (
            lambda r: replace(r, samples=r.samples[:-1]),
            r"document 199 of task 'choose' \(filter 'none'\) is answered only by the reference \(reference 200 "
            "samples, candidate 199",
        ),
        (
            lambda r: replace(r, samples=(*r.samples, replace(r.samples[-1], doc_id=200))),
            "document 200 of task 'choose' .* is answered only by the candidate",
        ),
        (
            lambda r: replace(r, task="chosen", samples=tuple(replace(s, task="chosen") for s in r.samples)),
            "the reference answered the tasks choose, the candidate chosen",
        ),
    ],
)
def test_other_documents_than_the_accepted_ones_are_named(
    change: Callable[[TaskRun], TaskRun], sentence: str, copied: Path
) -> None:
    evidence = rescored(copied, change)
    with pytest.raises(IncomparableError, match=sentence):
        judge.judge(evidence, "accuracy")
    assert judge.recovery(evidence) is None
    assert "accuracy" in judge.conclude(evidence).could_not


@pytest.mark.parametrize("limit", [150, None])
def test_a_target_that_now_asks_fewer_documents_is_told_which(limit: int | None, project: Project) -> None:
    """Through the engine; `limit` None asks what was accepted."""
    asked = project.target().accuracy
    assert asked is not None
    target = project.target(accuracy=replace(asked, limit=limit))
    evidence = collect.against_golden(target, project.recorder(f"limit-{limit}"), project.shelf)
    if limit is None:
        assert judge.judge(evidence, "accuracy").outcome is Outcome.PASS
    else:
        with pytest.raises(IncomparableError, match=r"is answered only by the reference \(reference 200 samples, cand"):
            judge.judge(evidence, "accuracy")


def test_against_the_golden_alone_only_the_candidate_is_started_once(project: Project) -> None:
    before = starts(project.suite.root)
    evidence = collect.against_golden(project.target(), project.recorder("alone"), project.shelf)
    assert starts(project.suite.root) == before + 1
    verdict = judge.judge(evidence, "accuracy")
    assert verdict.outcome is Outcome.PASS
    assert judge.judge(judge.gather(project.recorder("alone").directory / "golden"), "accuracy") == verdict


def test_a_golden_of_another_model_judges_nothing(held: Evidence) -> None:
    """As for every other check: its documents may be the same, what answered them is not."""
    reference = held.reference
    identity = {**reference.fingerprint.identity, "model.weights_sha256": "9" * 64}
    candidate = replace(
        held.candidate,
        fingerprint=replace(
            held.candidate.fingerprint,
            identity={**held.candidate.fingerprint.identity, "model.weights_sha256": "8" * 64},
        ),
    )
    other = replace(reference, fingerprint=replace(reference.fingerprint, identity=identity))
    evidence = replace(held, recordings={**held.recordings, "reference": other, "candidate": candidate})
    with pytest.raises(IncomparableError, match=r"differ in model\.weights_sha256: 999999999999 and 888888888888"):
        judge.judge(evidence, "accuracy")


def test_a_golden_without_samples_says_what_to_do_and_asks_no_documents(project: Project, tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    before = project.shelf.read("drill")
    shelf.accept(
        golden.Acceptance(
            target="drill",
            answers=before.directories["reference"],
            arbiter=None,
            samples=None,
            outcomes={"greedy": Outcome.PASS},
            by="somebody",
            reason="no documents",
            at=before.accepted_at,
        )
    )
    sentence = (
        "the accuracy check needs scored documents, and this golden holds none; accept a run of the target that has "
        "them, with 'accuracy' in the target"
    )
    alone = collect.against_golden(project.target(), project.recorder("none"), shelf)
    assert not (project.recorder("none").directory / accuracy.CANDIDATE).exists()
    beside = collect.collect(project.target(), project.recorder("none-beside"), shelf).golden
    assert beside is not None
    for evidence in (alone, beside):
        assert judge.why_not(evidence, "accuracy") == sentence
        assert "accuracy" not in evidence.checks
        assert judge.recovery(evidence) is None


def test_a_target_that_asks_no_documents_any_more_is_told_to(project: Project) -> None:
    evidence = collect.against_golden(project.target(accuracy=None), project.recorder("dropped"), project.shelf)
    reason = judge.why_not(evidence, "accuracy")
    assert reason is not None
    assert "which this run does not have; add 'accuracy' to the target" in reason
    assert store.read(evidence.directories["candidate"]).completions


def test_a_wrong_task_is_told_before_the_candidate_starts(project: Project) -> None:
    before = starts(project.suite.root)
    asked = project.target().accuracy
    assert asked is not None
    target = project.target(accuracy=replace(asked, tasks=("chose",)))
    with pytest.raises(ConfigError, match="there is no task 'chose'"):
        collect.against_golden(target, project.recorder("wrong"), project.shelf)
    assert starts(project.suite.root) == before
