"""`parity accept`, `status` and `diff`: what is accepted and by whom, what goldens are worth, what answers differ."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import recordings
from parity import cli
from parity.noise import SIGMA_FLOOR_NATS
from parity.prompts import SamplingParams
from parity.recording import Recording
from stored import Project, answers, save, scores, shorter_answers


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the project's root, by a person with a name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waiting for the disk is most of the time


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path).write("cpu", "gpu")


@dataclass
class Person:
    """Somebody at the terminal."""

    reply: str = "y"
    asked: list[str] = field(default_factory=list)

    def answer(self, question: str) -> str:
        self.asked.append(question)
        return self.reply


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Person:
    somebody = Person()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", somebody.answer)
    return somebody


def run(*arguments: str) -> int:
    return cli.main(arguments)


def accept(*arguments: str, reason: str = "a test") -> int:
    return run("accept", *arguments, "--reason", reason)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("parity: ")


def accepted_targets(project: Project) -> tuple[str, ...]:
    return project.shelf.targets()


# Accept ------------------------------------------------------------------------------------------------------------


def test_the_numbers_are_shown_before_anybody_is_asked(
    project: Project, person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run()
    assert accept(reason="the first one") == 0
    assert person.asked == ["accept this for cpu? [y/N] "]
    out = capsys.readouterr().out
    assert out.startswith("cpu: golden none yet\n")
    assert "  answers                                           -              40  prompts\n" in out
    assert "  KL divergence from the arbiter                    -               0  nats a token\n" in out
    golden = project.shelf.read("cpu")
    assert f"cpu: accepted {golden.digest[:12]}; commit golden/cpu\n" in out
    assert (golden.accepted_by, golden.reason, golden.supersedes) == ("ada", "the first one", None)
    assert set(golden.directories) == {"reference", "noise"}
    assert golden.outcomes["greedy"] == "PASS"


@pytest.mark.parametrize("reply", ["", "n", "no", "later"])
def test_whoever_does_not_agree_accepts_nothing(
    reply: str, project: Project, person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run()
    person.reply = reply
    assert accept() == 0
    assert "cpu: not accepted\n" in capsys.readouterr().out
    assert accepted_targets(project) == ()


def test_where_nobody_can_be_asked_the_answer_must_come_along(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert accept() == 2
    assert refusal(capsys) == "nobody can be asked here; add --yes to accept without a question"
    assert accepted_targets(project) == ()
    assert accept("--yes") == 0
    assert accepted_targets(project) == ("cpu",)


def test_what_is_superseded_is_compared_number_by_number(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    before = project.accept()
    project.run(candidate=project.recording(shorter_answers(), version="0.33.0"), scored=False)
    assert accept("--yes", "--by", "Grace") == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu: golden accepted 2026-11-24 by Ada: the first one\n")
    rows = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ")}
    assert rows["answer tokens"].split() == ["answer", "tokens", "320", "240", "tokens", "(-25", "%)"]
    assert rows["answers"].split() == ["answers", "40", "40", "prompts"]  # the same: no change to show
    assert rows["negative log-likelihood"].split()[2:] == ["0.25", "-", "nats", "a", "token"]
    golden = project.shelf.read("cpu")
    assert (golden.accepted_by, golden.supersedes) == ("Grace", before.digest)
    assert f"in the place of {before.digest[:12]}; commit golden/cpu" in out


@pytest.mark.parametrize("ci", ["true", "1", "yes"])
def test_ci_never_accepts(
    ci: str, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run()
    monkeypatch.setenv("CI", ci)
    assert accept("--yes") == 2
    assert refusal(capsys).startswith("CI never accepts a golden; take the run's directory from its artifacts")
    assert accepted_targets(project) == ()


@pytest.mark.parametrize("ci", ["", "0", "false"])
def test_a_variable_that_says_it_is_no_ci_is_believed(
    ci: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run()
    monkeypatch.setenv("CI", ci)
    assert accept("--yes") == 0


def test_what_failed_is_refused_before_anybody_is_asked(
    project: Project, person: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = project.recording(answers(other=range(40)))
    project.run(candidate=wrong, reference=project.recording())
    assert accept() == 2
    assert refusal(capsys) == "'.parity/recordings/cpu' is not accepted: 1 of 4 checks failed: greedy"
    assert (person.asked, accepted_targets(project)) == ([], ())


def test_what_could_not_be_judged_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run_directory = project.run()
    shutil.rmtree(run_directory / "reference-scores")
    save(run_directory / "reference-scores", scores(project.recording(answers(other=[7]))))
    assert accept("--yes") == 2
    assert refusal(capsys).startswith("'.parity/recordings/cpu' is incomplete: decode could not judge (")
    assert accepted_targets(project) == ()


def test_what_is_inconclusive_may_be_accepted_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = Project(tmp_path).write("cpu", prompts=5)
    project.run(candidate=project.recording(answers(5)), scored=False)
    assert accept("--yes") == 0
    assert "  note: shape, greedy inconclusive in this run\n" in capsys.readouterr().out


def test_a_limited_run_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.run("cpu-limit-32", candidate=project.recording(answers(32)), target="cpu")
    assert accept(".parity/recordings/cpu-limit-32", "--yes") == 2
    said = refusal(capsys)
    assert said.startswith(
        "'.parity/recordings/cpu-limit-32/candidate' answers another question than target 'cpu' asks"
    )
    assert "(32 prompts, " in said
    assert "; the target 40, " in said
    assert said.endswith("record the whole target again")


def test_a_run_is_named_by_its_directory_a_recording_in_it_or_its_target(project: Project) -> None:
    directory = project.run("elsewhere", target="cpu")
    project.run("gpu")
    assert accept(str(directory), "--yes", reason="by directory") == 0
    assert accept(str(directory / "candidate"), "--yes", reason="by recording") == 0
    assert project.shelf.read("cpu").reason == "by recording"
    assert accept("gpu", "--yes") == 0
    assert accepted_targets(project) == ("cpu", "gpu")


def test_a_run_of_the_candidate_against_the_golden_can_be_accepted(project: Project) -> None:
    project.accept()
    newer = project.recording(version="0.33.0")
    project.run("cpu-golden-to-new/golden", candidate=newer, target="cpu", scored=False, more={"accepted": True})
    assert accept(".parity/recordings/cpu-golden-to-new/golden", "--yes") == 0
    assert project.shelf.read("cpu").provenance["engine"] == "replay 0.33.0 float32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run.tar.gz",), "'run.tar.gz' is a file; a run is accepted from its directory, unpack it first"),
        (("gpu",), "'.parity/recordings/gpu' holds no finished run (run.json is missing or damaged); `parity record`"),
        (("cpu", "--all"), "give runs or --all, not both: cpu"),
        (
            ("--all", "--suites", "goldless"),
            "no target with 'golden = true' has a finished run in '.parity/recordings'",
        ),
        (("old",), "suites/targets.toml: unknown target 'retired'; valid are 'cpu', 'gpu'"),
        (("cpu", "--reason", "  "), "a golden is accepted for a reason; say which with --reason TEXT"),
    ],
)
def test_what_is_no_run_is_explained(
    arguments: Sequence[str], sentence: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.tar.gz").write_text("")
    project.run()
    project.run("old", target="retired")
    shutil.copytree(tmp_path / "suites", tmp_path / "goldless")
    (tmp_path / "goldless" / "targets.toml").write_text(
        project.targets_file.read_text().replace('"golden" = true', '"golden" = false')
    )
    given = arguments if "--reason" in arguments else (*arguments, "--reason", "a test")
    assert run("accept", "--yes", *given) == 2
    assert refusal(capsys).startswith(sentence)
    assert accepted_targets(project) == ()


def test_a_reason_is_asked_for_at_once(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("accept", "--yes")
    assert caught.value.code == 2
    assert "the following arguments are required: --reason" in capsys.readouterr().err


def test_all_takes_every_target_that_has_a_run_and_new_only_those_without_a_golden(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.accept("cpu")
    project.run("cpu")
    assert accept("--all", "--yes", "--new-only") == 0
    assert capsys.readouterr().out == "every one of these targets has a golden already; nothing to accept\n"
    project.run("gpu")
    assert accept("--all", "--yes", "--new-only", reason="new") == 0
    assert [project.shelf.read(name).reason for name in ("cpu", "gpu")] == ["the first one", "new"]
    assert accept("--all", "--yes", reason="all") == 0
    assert [project.shelf.read(name).reason for name in ("cpu", "gpu")] == ["all", "all"]


def test_a_user_without_a_name_must_say_who_accepts(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody() -> str:
        raise KeyError("uid 1000")

    monkeypatch.setenv("PATH", "")  # no git either
    monkeypatch.setattr("getpass.getuser", nobody)
    project.run()
    assert accept("--yes") == 2
    assert refusal(capsys).startswith("nobody knows who accepts")
    assert accept("--yes", "--by", "Ada") == 0


# Status ------------------------------------------------------------------------------------------------------------


def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = run("status", *arguments)
    return code, capsys.readouterr().out.splitlines()


def days_ago(days: int) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds").replace("+00:00", "Z")


def test_sound_goldens_are_fine(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.accept("cpu", at=days_ago(3))
    project.accept("gpu", at=days_ago(200))
    code, lines = status(capsys)
    assert code == 0  # an old golden is worth a look, and still a yardstick
    assert lines == [
        "sound     cpu  replay 0.32.0 float32, 3 days old, accepted by Ada: the first one",
        "old       gpu  replay 0.32.0 float32, 200 days old, accepted by Ada: the first one",
    ]
    assert status(capsys, "--stale-days", "3")[1][0].startswith("old       cpu")


def test_a_golden_that_is_missing_is_told_with_the_command(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.accept("cpu")
    code, (_, line) = status(capsys)
    assert code == 1
    assert line.startswith("missing   gpu  target 'gpu' has no golden: ")
    assert "parity record gpu && parity accept gpu --reason TEXT" in line


def test_a_golden_that_was_edited_is_damaged(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.accept("gpu")
    path = project.accept("cpu").directories["reference"].parent / "golden.json"
    path.write_text(path.read_text().replace("the first one", "another one"))
    code, (line, _) = status(capsys)
    assert code == 1
    assert line.startswith("damaged   cpu  golden ")
    assert "restore it from git" in line


def test_a_golden_of_other_prompts_is_stale(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cpu", "gpu"):
        project.accept(name)
    project.write("cpu", "gpu", prompts=41)
    code, lines = status(capsys)
    assert code == 1
    assert all(line.startswith(f"stale     {name}") for name, line in zip(("cpu", "gpu"), lines, strict=True))
    assert "the target's prompts or sampling have changed since; record and accept anew" in lines[0]


def test_a_golden_of_another_model_is_stale(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write("cpu")
    project.accept()
    text = project.targets_file.read_text()
    project.targets_file.write_text(text.replace('"model" = "model"', '"model" = "hub:a/b@main"'))
    code, (line,) = status(capsys)
    assert code == 1
    assert line.startswith("stale     cpu  accepted on model tiny, now hub:a/b@main; record and accept anew")


def test_a_golden_that_no_target_asks_for_is_obsolete(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.accept("cpu")
    project.write("gpu", goldens=False)
    (project.root / "golden" / "empty").mkdir()
    code, lines = status(capsys)
    assert code == 0  # it keeps nobody from judging
    assert lines[0].startswith("obsolete  cpu    no target of this name asks for a golden; replay 0.32.0 float32, ")
    said = "no target of this name asks for a golden, and golden/empty holds no whole one; remove it"
    assert lines[1:] == [f"obsolete  empty  {said}"]


def test_a_project_without_goldens_says_so(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write("cpu", goldens=False)
    assert status(capsys) == (0, ["none        no target asks for a golden, and golden holds none"])


def test_what_an_interrupted_acceptance_left_is_an_orphan(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write("cpu")
    left = project.accept().directories["reference"].with_name("reference-000000000000")
    left.mkdir()
    code, lines = status(capsys)
    assert code == 0
    assert lines[1] == "orphan    cpu  golden/cpu/reference-000000000000: no golden names it; remove it"


def test_how_much_the_numbers_varied_over_accepted_runs(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write("cpu")
    project.accept()
    project.accept(made=project.recording(shorter_answers()))
    _, lines = status(capsys)
    assert "          cpu  answer tokens: 280 +- 57 over 2 accepted runs" in lines


def test_known_divergences_that_match_nothing_are_reported(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.accept("cpu")

    def known(target: str, id_: str) -> str:
        more = "engine = 'replay'\nversions = '>=0'\nreason = 'x'\nlink = 'y'\ndate = 2026-11-24\n"
        return f"[[known]]\ntarget = '{target}'\nid = '{id_}'\n{more}"

    lines = known("cpu", "p-07") + known("cpu", "p-99") + known("gpu", "p-07") + known("cpy", "p-07")
    (project.root / "golden" / "known.toml").write_text(lines)
    _, said = status(capsys)
    assert [line for line in said if line.startswith("known")] == [
        "known     cpu  'p-99' is no prompt of this golden; remove the line",
        "known     gpu  there is no golden of this name for 'p-07'; remove the line",
        "known     cpy  there is no golden of this name for 'p-07'; remove the line",
    ]
    shutil.rmtree(project.root / "golden" / "cpu" / project.shelf.read("cpu").directories["reference"].name)
    _, said = status(capsys)  # what cannot be read may have any prompt
    assert not [line for line in said if line.startswith("known")]


def test_stored_log_probabilities_that_no_golden_names_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path).write("cpu", golden={"store": "blobs"})
    project.accept()
    (stored,) = [path for path in (tmp_path / "suites" / "blobs").rglob("*") if path.is_file()]
    assert status(capsys)[0] == 0
    shutil.copy(stored, stored.with_name("0" * 64))
    code, lines = status(capsys)
    assert code == 0
    assert [line for line in lines if line.startswith("orphan")] == [
        f"orphan    {tmp_path}/suites/blobs/{'0' * 64}: no golden names it"
    ]


# Diff --------------------------------------------------------------------------------------------------------------


def diff(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    """Judging nothing, it ends with 0 whatever differs."""
    assert run("diff", *map(str, arguments)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def two(project: Project) -> tuple[Path, Path]:
    """Two recordings that lie anywhere; 20 of 40 prompts differ."""
    ours = save(project.root / "a", project.recording())
    return ours, save(project.root / "b", project.recording(answers(other=range(20)), version="0.33.0"))


def test_what_differs_is_shown_and_is_no_failure(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = diff(capsys, *two)
    assert lines[:3] == [
        "40 prompts: 20 the same, 20 differ (20 by more than rounding can)",
        "reference: replay 0.32.0 float32",
        "candidate: replay 0.33.0 float32",
    ]
    assert sum(line.startswith("── p-") for line in lines) == 8
    assert "12 more prompts are not shown; --all shows every one, --prompt ID one in full" in lines
    assert lines[-1] == "no rounding noise was measured beside these: 0.13 nats, a documented guess, stands in for it"
    assert sum(line.startswith("── p-") for line in diff(capsys, *two, "--all")) == 20


@pytest.mark.parametrize(("id_", "differs"), [("p-07", True), ("p-33", False)])
def test_one_prompt_is_shown_in_full_whether_or_not_it_differs(
    id_: str, differs: bool, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = diff(capsys, *two, "--prompt", id_)
    assert [line.split(":")[0] for line in lines if line.startswith("── ")] == [f"── {id_}"]
    assert lines[0].startswith("1 prompt: 0 the same, 1 differs" if differs else "1 prompt: 1 the same, none differs")


def test_a_prompt_that_nobody_asked_is_named(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", *map(str, two), "--prompt", "p-99") == 2
    assert refusal(capsys) == f"there is no prompt 'p-99' in {str(two[0])!r}; its tokens.jsonl has every id"


def test_runs_stand_for_their_candidates_and_goldens_for_their_answers(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.accept("cpu")
    project.run("cpu", candidate=project.recording(version="0.33.0"))
    project.run("gpu", candidate=project.recording(answers(other=[3]), version="0.34.0"))
    lines = diff(capsys, "golden/cpu", ".parity/recordings/cpu")
    assert lines[1:3] == ["reference: replay 0.32.0 float32", "candidate: replay 0.33.0 float32"]
    lines = diff(capsys, project.runs / "cpu", project.runs / "gpu")
    assert lines[0] == "40 prompts: 39 the same, 1 differs (1 by more than rounding can)"
    assert lines[1:3] == ["reference: replay 0.33.0 float32", "candidate: replay 0.34.0 float32"]


def close_call() -> tuple[Recording, Recording]:
    """One of 40 prompts parts at a slack of 0.25 nats: nothing by the documented noise, much by the measured one."""
    ours, theirs = answers(), answers()
    best, second = (140, -0.5), (141, -0.625)
    rows = [recordings.plausible_row(t) for t in ours[0].token_ids]
    rows[4] = (best, second, (142, -3.0))
    ours[0] = recordings.completion("p-00", token_ids=ours[0].token_ids, rows=rows)
    tokens = [*ours[0].token_ids[:4], 141, *ours[0].token_ids[5:]]
    rows[4] = ((141, -0.5), (140, -0.625), (142, -3.0))
    theirs[0] = recordings.completion("p-00", token_ids=tokens, rows=rows)
    sampling = SamplingParams.greedy(max_tokens=64, logprobs=3)
    return recordings.recording(ours, sampling=sampling), recordings.recording(theirs, sampling=sampling, version="2")


def test_the_noise_and_scores_of_the_run_are_used_where_both_lie_in_it(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = close_call()
    directory = project.runs / "cpu"
    roles = {"reference": ours, "candidate": theirs, "noise": scores(ours), "candidate-scores": scores(ours)}
    for role, made in roles.items():
        save(directory / role, made)
    run_json = {"target": "cpu", "policy": "equivalence", "limits": {}, "recordings": list(roles)}
    (directory / "run.json").write_text(json.dumps(run_json))
    lines = diff(capsys, directory / "reference", directory / "candidate")
    assert lines[0] == "40 prompts: 39 the same, 1 differs (1 by more than rounding usually does)"
    assert f"{0.25 / SIGMA_FLOOR_NATS:.2g} times the rounding noise" in " ".join(" ".join(lines).split())
    assert any(line.startswith("  scores: on the reference's tokens the engines are 0 nats") for line in lines)
    assert not any("no rounding noise was measured" in line for line in lines)
    # The candidate of another place: the run's noise still holds, its candidate's scores say nothing.
    elsewhere = save(project.root / "elsewhere", theirs)
    lines = diff(capsys, directory / "reference", elsewhere)
    assert lines[0].endswith("(1 by more than rounding usually does)")
    assert not any(line.startswith("  scores:") for line in lines)


def test_a_goldens_own_noise_is_the_scale(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.run()
    assert accept("--yes") == 0
    capsys.readouterr()
    lines = diff(capsys, "golden/cpu", ".parity/recordings/cpu")
    assert not any("no rounding noise was measured" in line for line in lines)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("nowhere", "'nowhere' is not a recording: it has no recording.json"),
        ("short", "prompt 'p-39' is answered only by the candidate"),
        ("scores", "the reference ('tests' of replay 1 float32) scores tokens that it was given"),
    ],
)
def test_what_cannot_be_laid_side_by_side_is_explained(
    reference: str, sentence: str, two: tuple[Path, Path], project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    save(project.root / "short", project.recording(answers(39)))
    save(project.root / "scores", scores(project.recording()))
    assert run("diff", reference, str(two[1])) == 2
    assert refusal(capsys).startswith(sentence)
