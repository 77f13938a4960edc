"""`pytest suites` against goldens and with reports: what was accepted is the yardstick, in every file CI keeps."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from drills import Suite
from parity import cli, display, judge  # imported once, out here: numpy loads once in a process
from stored import Project, answers, text_of

__all__ = ["display", "judge"]

SHIPPED = Path(__file__).parents[1] / "suites" / "test_against_golden.py"
TWO_CHECKS = """
def test_greedy(parity_judge_golden):
    parity_judge_golden("greedy")

def test_both(parity_judge, parity_judge_golden):
    parity_judge("inputs")
    parity_judge_golden("inputs")
"""
REPORTS = ["findings.csv", "report.html", "report.json", "report.md"]


@pytest.fixture(autouse=True)
def _quick(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:anyio -p no:cacheprovider")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """A suites folder with two tests; `held` adds the run they judge."""
    made = Project(pytester.path).write("cpu")
    (pytester.path / "suites" / "test_against_golden.py").write_text(TWO_CHECKS)
    return made


def held(project: Project, *, other: range = range(0)) -> Path:
    """A finished run whose candidate is also held against a golden; `other` prompts are answered otherwise there."""
    found = project.run(scored=False, more={"golden": "golden"})
    project.run(
        "cpu/golden",
        candidate=project.recording(answers(other=other)),
        reference=project.recording(version="0.31.0"),
        scored=False,
        target="cpu",
        more={"accepted": True},
    )
    return found


def test_a_candidate_like_its_golden_passes(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", held(project))
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "PASS          golden greedy  40 of 40 prompts identical*",
            "PASS          inputs         *",
            "PASS          golden inputs  *",
            "PASS  greedy: replay 0.32.0 float32 against the golden of 2026-11-23 (replay 0.31.0 float32)",
            "  reproduce: parity compare *cpu/golden/reference *cpu/golden/candidate --check greedy",
        ]
    )


def test_a_candidate_unlike_its_golden_fails(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", held(project, other=range(40)))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["FAIL  greedy: replay * against the golden of 2026-11-23 (replay 0.31.0 float32)"])


def test_the_command_that_a_verdict_names_gives_it_again(
    project: Project, pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", held(project, other=range(40)))
    (command,) = {line.strip() for line in result.outlines if line.startswith("  reproduce: ") and "greedy" in line}
    capsys.readouterr()
    assert cli.main(command.split()[2:]) == 1
    assert "against the golden of 2026-11-23" in capsys.readouterr().out


def test_a_target_that_asks_for_no_golden_is_skipped(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "-rs", "--parity-recordings", project.run(scored=False))
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*parity: the target asks for no golden; add 'golden = true' to it"])


def test_a_missing_golden_fails_with_the_command_that_makes_one(project: Project, pytester: pytest.Pytester) -> None:
    """As `parity record` found it when it held the candidate against nothing."""
    sentence = "target 'cpu' has no golden: parity record cpu && parity accept cpu --reason TEXT"
    result = pytester.runpytest(
        "suites", "--parity-recordings", project.run(scored=False, more={"no_golden": sentence})
    )
    result.assert_outcomes(failed=2)
    assert f"parity could not judge: {sentence}" in text_of(result)


def test_a_golden_run_that_is_damaged_is_one_sentence(project: Project, pytester: pytest.Pytester) -> None:
    found = held(project)
    (found / "golden" / "reference" / "recording.json").write_text("{")
    result = pytester.runpytest("suites", "--parity-recordings", found)
    result.assert_outcomes(errors=2)
    assert "parity could not judge: " in text_of(result)


def test_ci_reads_every_verdict_from_the_junit_file(project: Project, pytester: pytest.Pytester) -> None:
    pytester.runpytest("suites", "--parity-recordings", held(project), "--junitxml=junit.xml")
    cases = ET.parse(pytester.path / "junit.xml").findall(".//testcase")
    found = [[(p.get("name"), p.get("value") or "") for p in case.findall(".//property")] for case in cases]
    assert [name for name, _ in found[0]] == [
        "parity_outcome", "parity_check", "parity_headline", "parity_reproduce", "parity_verdict",
    ]  # fmt: skip
    assert dict(found[0])["parity_outcome"] == "PASS"
    assert dict(found[0])["parity_check"] == "golden greedy"
    assert dict(found[0])["parity_reproduce"].endswith("cpu/golden/candidate --check greedy")
    # Both verdicts of the second test, one after the other.
    assert [value for name, value in found[1] if name == "parity_check"] == ["inputs", "golden inputs"]


def test_each_comparison_has_its_report(project: Project, pytester: pytest.Pytester) -> None:
    arguments = ("--parity-recordings", held(project, other=range(40)), "--parity-report", "reports")
    result = pytester.runpytest("suites", *arguments)
    result.stdout.fnmatch_lines(["report: *reports/cpu-golden/report.html", "report: *reports/cpu/report.html"])
    for name, advice in (("cpu-golden", "HOLD"), ("cpu", "UPGRADE")):
        directory = pytester.path / "reports" / name
        assert sorted(path.name for path in directory.iterdir()) == REPORTS
        assert json.loads((directory / "report.json").read_text())["decision"]["advice"] == advice
    # Only what was asked: the first comparison is judged by two checks here, the other by one.
    report = json.loads((pytester.path / "reports" / "cpu" / "report.json").read_text())
    assert [v["check"] for v in report["verdicts"]] == ["inputs"]


def test_a_report_that_cannot_be_written_is_one_line(project: Project, pytester: pytest.Pytester) -> None:
    other = [c for c in answers() if c.id != "p-39"]
    directory = project.run(candidate=project.recording(other), reference=project.recording(), scored=False)
    (pytester.path / "suites" / "test_against_golden.py").write_text("def test(parity_judge): parity_judge('inputs')\n")
    result = pytester.runpytest("suites", "--parity-recordings", directory, "--parity-report", "reports")
    assert "no report: prompt 'p-39' is answered only by the reference" in text_of(result)


def test_from_no_golden_to_an_accepted_one_to_a_damaged_one(pytester: pytest.Pytester) -> None:
    """With engines, as a project lives through it."""
    suite = Suite(pytester.path).write(prompts=33, target={"golden": True})
    shutil.copy(SHIPPED, suite.root / "suites" / "test_against_golden.py")
    result = pytester.runpytest("suites")
    result.assert_outcomes(failed=5)
    text = text_of(result)
    assert "target 'drill' has no golden: " in text
    assert "parity record drill && parity accept drill --reason TEXT" in text
    places = ("--suites", "suites", "--home", ".parity")
    assert cli.main(["accept", "drill", "--reason", "the first one", "--yes", *places]) == 0
    result = pytester.runpytest("suites", "-rs")
    result.assert_outcomes(passed=4, skipped=1)
    result.stdout.fnmatch_lines(["PASS          golden lockstep  *"])
    assert "the accuracy check needs scored documents, and this golden holds none; accept a run of" in text_of(result)
    golden = suite.root / "golden" / "drill" / "golden.json"
    golden.write_text(golden.read_text()[:100])
    result = pytester.runpytest("suites")
    result.assert_outcomes(failed=5)
    assert "golden.json' is truncated or no golden" in text_of(result)
