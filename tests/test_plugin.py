"""The pytest plugin: `pytest suites` on engines that are drills, and on recordings of an earlier run."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

import recordings
from drills import Suite, counting_engine, starts
from parity import display, judge, store  # imported once, out here: numpy loads once in a process
from parity.recording import Completion
from stored import text_of

__all__ = ["display", "judge"]

SHIPPED = Path(__file__).parents[1] / "suites" / "test_output.py"
PARTIAL_RUN = '{"recordings": ["reference"], "policy": "equivalence", "limits": {}}'
TWO_CHECKS = """
import pytest

pytestmark = pytest.mark.parity

def test_inputs(parity_judge):
    parity_judge("inputs")

def test_greedy(parity_judge):
    parity_judge("greedy")
"""


@pytest.fixture(autouse=True)
def _quick(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other plugins have no part in these sessions; Hypothesis imports itself anew at the end of each, for a second."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:anyio -p no:cacheprovider -p no:benchmark")


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """A suites folder with two tests in it; `write` adds the target."""
    made = Suite(pytester.path)
    (pytester.path / "suites").mkdir()
    (pytester.path / "suites" / "test_output.py").write_text(TWO_CHECKS)
    return made


def answers(count: int, *, other: bool = False) -> list[Completion]:
    base = 30_000 if other else 100
    token_ids = [base + 10 * position for position in range(8)]
    return [recordings.completion(f"p-{i:02}", token_ids=token_ids, text=f"answer {i}") for i in range(count)]


def save_run(directory: Path, reference: Sequence[Completion], candidate: Sequence[Completion]) -> str:
    """A finished run, as `parity record` leaves it."""
    for role, completions in (("reference", reference), ("candidate", candidate)):
        made = recordings.recording(completions)
        header = store.make_header(
            spec=made.spec,
            workload=made.workload,
            fingerprint=made.fingerprint,
            created_at=made.created_at,
            resumed=0,
            key="k",
        )
        store.write(directory / role, header=header, completions=completions)
    (directory / "run.json").write_text(
        json.dumps({"recordings": ["reference", "candidate"], "policy": "equivalence", "limits": {}})
    )
    return str(directory)


@pytest.fixture
def passing(suite: Suite) -> str:
    return save_run(suite.root / "stored", answers(40), answers(40))


@pytest.fixture
def failing(suite: Suite) -> str:
    return save_run(suite.root / "stored", answers(40), answers(40, other=True))


@pytest.fixture
def inconclusive(suite: Suite) -> str:
    """Five prompts are too few for the greedy check, and enough for the check of inputs."""
    return save_run(suite.root / "stored", answers(5), answers(5))


# Engines -----------------------------------------------------------------------------------------------------------


def test_engines_run_once_however_many_tests_judge_them(suite: Suite, pytester: pytest.Pytester) -> None:
    suite.write(prompts=33, engine=counting_engine(suite.root))
    (suite.root / "suites" / "test_again.py").write_text(TWO_CHECKS)
    result = pytester.runpytest("suites", "--junitxml=junit.xml", "--strict-markers", "-W", "error")
    assert result.ret == 0
    result.assert_outcomes(passed=4)
    assert starts(suite.root) == 3  # the reference once more, to score what the candidate answered
    result.stdout.fnmatch_lines(
        [
            "parity: target drill: drill against drill",
            "parity: reference counting float32 in */bin/python, model */suites/model",
            "parity: candidate counting float32 in */bin/python, model */suites/model",
            "parity: hardware *",
            "*= parity =*",
            "PASS          inputs    *",
            "PASS          greedy       33 of 33 prompts identical*",
            "PASS  inputs: counting 1 float32 against counting 1 float32",
            "*4 passed*",
        ]
    )
    assert "resuming" not in text_of(result)
    cases = ET.parse(pytester.path / "junit.xml").findall(".//testcase")
    properties = [{p.get("name"): p.get("value") for p in case.findall(".//property")} for case in cases]
    assert [p["parity_outcome"] for p in properties] == ["PASS"] * 4
    assert properties[0]["parity_check"] == "inputs"
    assert "parity compare " in (properties[0]["parity_reproduce"] or "")


def test_an_engine_that_fails_is_one_sentence_in_every_test(suite: Suite, pytester: pytest.Pytester) -> None:
    suite.write(candidate={"behaviour": "crash_on_open"}, engine=counting_engine(suite.root))
    result = pytester.runpytest("suites")
    assert result.ret == 1
    result.assert_outcomes(errors=2)
    assert "parity could not judge: counting float32 exited with code 70 while starting; full log" in text_of(result)
    assert starts(suite.root) == 2


def test_a_limited_run_lies_apart(suite: Suite, pytester: pytest.Pytester) -> None:
    suite.write(prompts=4)
    result = pytester.runpytest("suites", "--parity-limit=2", "--parity-inconclusive=warn", "--parity-home=cache")
    assert result.ret == 0
    assert len(store.read(suite.root / "cache" / "recordings" / "drill-limit-2" / "reference").completions) == 2
    assert not (suite.root / ".parity").exists()


def test_the_shipped_tests_judge_whatever_the_target_records(suite: Suite, pytester: pytest.Pytester) -> None:
    """Logic is skipped with its reason, because this target does not ask for it."""
    suite.write(prompts=33)
    shutil.copy(SHIPPED, suite.root / "suites" / "test_output.py")
    result = pytester.runpytest("suites", "-rs")
    assert result.ret == 0
    result.assert_outcomes(passed=5, skipped=7)
    result.stdout.fnmatch_lines(["SKIPPED*the logic check needs the recording 'logic-reference', which*"])


def test_prompts_double_while_lock_step_is_inconclusive(suite: Suite, pytester: pytest.Pytester) -> None:
    """Sixteen prompts are the fewest that may pass: 5, 10 and then 20 are scored."""
    suite.write(prompts=40, target={"lockstep_prompts": 5, "lockstep_prompts_max": 40})
    shutil.copy(SHIPPED, suite.root / "suites" / "test_output.py")
    result = pytester.runpytest("suites")
    assert result.ret == 0
    assert "lock step is inconclusive on 10 prompts; scoring 20" in text_of(result)
    for role in ("candidate-scores", "reference-scores"):
        assert len(store.read(suite.run / role).completions) == 20


def test_doubling_ends_at_the_targets_most(suite: Suite, pytester: pytest.Pytester) -> None:
    suite.write(prompts=40, target={"lockstep_prompts": 5, "lockstep_prompts_max": 8})
    shutil.copy(SHIPPED, suite.root / "suites" / "test_output.py")
    result = pytester.runpytest("suites")
    assert result.ret == 1
    assert len(store.read(suite.run / "candidate-scores").completions) == 8
    result.stdout.fnmatch_lines(["INCONCLUSIVE  lockstep*"])


def test_a_quantized_target_is_not_asked_to_be_exact(suite: Suite, pytester: pytest.Pytester) -> None:
    suite.write(prompts=40, target={"policy": "quantized"})
    shutil.copy(SHIPPED, suite.root / "suites" / "test_output.py")
    result = pytester.runpytest("suites", "-rs")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["SKIPPED*the greedy check refuses what the policy 'quantized' allows*"])


# Stored recordings -------------------------------------------------------------------------------------------------


def test_stored_recordings_are_judged_and_nothing_starts(suite: Suite, passing: str, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", passing)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["parity: reference: replay 1 float32, tiny, *", "parity: workload: tests, 40 prompts*"]
    )
    assert sorted(p.name for p in suite.root.iterdir()) == ["stored", "suites"]


def test_a_failure_shows_its_verdict_and_the_command_to_see_it_again(failing: str, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", failing, "--junitxml=junit.xml")
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*= FAILURES =*",
            "FAIL  greedy: replay 1 float32 against replay 1 float32",
            f"  reproduce: parity compare {failing}/reference {failing}/candidate --check greedy",
            "*= parity =*",
            "FAIL          greedy    *",
            "cause (unknown): no known cause fits: greedy failed*",
        ]
    )
    # Not in the short summary: under CI pytest repeats whole messages there.
    assert sum(line.startswith("FAIL  greedy: replay") for line in text_of(result).splitlines()) == 1
    root = ET.parse(pytester.path / "junit.xml").getroot()
    (failure,) = root.iter("failure")
    assert "FAIL  greedy: replay 1 float32" in (failure.text or "")


def test_inconclusive_has_its_own_letter_and_word_and_fails(inconclusive: str, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", inconclusive)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "suites/test_output.py .I*",
            "*= parity =*",
            "INCONCLUSIVE  greedy    *",
            "INCONCLUSIVE  greedy: replay 1 float32 against replay 1 float32",
            "*5 prompts, at least 32 are needed*",
            "  reproduce: parity compare *--check greedy",
            "*1 passed, 1 inconclusive*",
        ]
    )
    verbose = pytester.runpytest("suites", "--parity-recordings", inconclusive, "-v")
    verbose.stdout.fnmatch_lines(["*::test_greedy* INCONCLUSIVE *"])


def test_inconclusive_may_be_told_to_warn_only(inconclusive: str, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", inconclusive, "--parity-inconclusive=warn")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["suites/test_output.py .I*", "INCONCLUSIVE  greedy: *", "*1 passed, 1 inconclusive*"])


def test_where_inconclusive_only_warns_another_failure_is_still_shown(
    inconclusive: str, pytester: pytest.Pytester
) -> None:
    path = pytester.makepyfile(
        "def test_mine(parity_judge):\n    parity_judge('greedy')\n    assert 1 == 2, 'my own reason'\n"
    )
    result = pytester.runpytest(path, "--parity-recordings", inconclusive, "--parity-inconclusive=warn")
    assert result.ret == 1
    result.assert_outcomes(failed=1)
    assert "my own reason" in text_of(result)


def test_every_verdict_of_a_test_has_its_row(inconclusive: str, pytester: pytest.Pytester) -> None:
    """An inconclusive verdict is not hidden by a passing one after it."""
    path = pytester.makepyfile("def test_both(parity_judge):\n    parity_judge('greedy')\n    parity_judge('inputs')\n")
    result = pytester.runpytest(path, "--parity-recordings", inconclusive, "--parity-inconclusive=warn")
    result.stdout.fnmatch_lines(["test_*.py I*", "INCONCLUSIVE  greedy    *", "PASS          inputs    *"])


def test_an_unknown_check_is_one_sentence(passing: str, pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile("def test_mine(parity_judge):\n    parity_judge('gredy')\n")
    result = pytester.runpytest(path, "--parity-recordings", passing)
    assert result.ret == 1
    assert "parity could not judge: there is no check 'gredy'; did you mean 'greedy'?" in text_of(result)


@pytest.mark.parametrize("damage", [None, "[]", "{}", PARTIAL_RUN, "{"])
def test_a_directory_that_holds_no_run_is_one_sentence(
    damage: str | None, suite: Suite, pytester: pytest.Pytester
) -> None:
    (suite.root / "nowhere").mkdir()
    if damage is not None:
        (suite.root / "nowhere" / "run.json").write_text(damage)
    result = pytester.runpytest("suites", "--parity-recordings", "nowhere")
    assert result.ret == 1
    result.assert_outcomes(errors=2)
    wanted = {
        None: "nowhere' holds no finished run (run.json is missing)",
        PARTIAL_RUN: "run.json' names no reference and candidate",
    }
    assert wanted.get(damage, "which holds the limits to judge by, is damaged") in text_of(result)


# Options -----------------------------------------------------------------------------------------------------------


def test_options_may_stand_in_the_ini_file(inconclusive: str, suite: Suite, pytester: pytest.Pytester) -> None:
    (suite.root / "suites").rename(suite.root / "elsewhere")
    pytester.makeini(
        "[pytest]\nparity_target = none_such\nparity_inconclusive = warn\nparity_suites = elsewhere\nparity_home = h\n"
    )
    assert pytester.runpytest("elsewhere", "--parity-recordings", inconclusive).ret == 0
    suite.write(prompts=1)
    (suite.root / "suites" / "targets.toml").rename(suite.root / "elsewhere" / "targets.toml")
    result = pytester.runpytest("elsewhere")
    assert "elsewhere/targets.toml: unknown target 'none_such'; valid are 'drill'" in text_of(result)


def test_a_wrong_value_in_the_ini_file_is_a_usage_error(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nparity_inconclusive = maybe\n")
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "parity_inconclusive must be 'fail' or 'warn', not 'maybe'" in text_of(result)


def test_an_unknown_target_is_answered_with_the_nearest(suite: Suite, pytester: pytest.Pytester) -> None:
    suite.write(prompts=1)
    result = pytester.runpytest("suites", "--parity-target=dril")
    assert result.ret == 1
    result.assert_outcomes(errors=2)
    assert "targets.toml: unknown target 'dril'; did you mean 'drill'?" in text_of(result)


@pytest.mark.parametrize("content", [None, "= 3"])
def test_a_targets_file_that_cannot_be_read_is_one_sentence(
    content: str | None, suite: Suite, pytester: pytest.Pytester
) -> None:
    if content is not None:
        (suite.root / "suites" / "targets.toml").write_text(content)
    result = pytester.runpytest("suites")
    assert result.ret == 1
    assert "parity could not judge: the file " in text_of(result)


# Other people's sessions -------------------------------------------------------------------------------------------


def test_a_session_without_suites_pays_nothing_and_sees_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\n"
        "def test_light():\n"
        "    assert 'parity.plugin' in sys.modules\n"
        "    assert not {'numpy', 'pyarrow', 'pandas', 'rich.progress', 'parity.judge'} & set(sys.modules)\n"
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    assert "parity:" not in text_of(result)
    assert "= parity =" not in text_of(result)


def test_the_plugin_can_be_left_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\ndef test_alone():\n    assert 'parity.plugin' not in sys.modules\n")
    result = pytester.runpytest_subprocess("-p", "no:parity")
    result.assert_outcomes(passed=1)


def test_options_are_explained(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--help")
    result.stdout.fnmatch_lines(["inference engine parity:", "*--parity-target=NAME*", "*--parity-recordings=DIR*"])
    result.stdout.fnmatch_lines(["*--parity-limit=N*"])
