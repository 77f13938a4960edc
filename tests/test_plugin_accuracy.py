"""`pytest suites` on scored documents: a verdict, and once for each comparison the table of what is kept."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from accuracy_cases import right, run, scores
from parity import display, judge, lmeval  # imported once, out here: numpy loads once in a process
from stored import Project, text_of

__all__ = ["display", "judge"]

SHIPPED = Path(__file__).parents[1] / "suites" / "test_accuracy.py"
TWICE = """
def test_again(parity_judge):
    parity_judge("accuracy")

def test_golden(parity_judge_golden):
    parity_judge_golden("accuracy")
"""
HEAD = "task  documents  reference  candidate   recovery        90% interval  lost   won"


@pytest.fixture(autouse=True)
def _quick(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:anyio -p no:cacheprovider")
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """A suites folder with the shipped test."""
    made = Project(pytester.path).write("cpu")
    (pytester.path / "suites" / "test_accuracy.py").write_text(SHIPPED.read_text())
    return made


def scored(run_directory: Path, lost: Sequence[int] = (), *, n: int = 600) -> list[str]:
    """Samples of both sides in a run's directory; the roles that hold them."""
    roles = {"accuracy-reference": run("arc", scores(n)), "accuracy-candidate": run("arc", scores(n, lost))}
    for role, made in roles.items():
        (run_directory / role).mkdir(parents=True, exist_ok=True)
        lmeval.save_samples(run_directory / role, [made])
    return list(roles)


def judged_run(project: Project, lost: Sequence[int] = (), *, n: int = 600) -> Path:
    return project.run(scored=False, more={"scored": scored(project.runs / "cpu", lost, n=n)})


def test_a_run_that_keeps_its_accuracy_passes_with_the_table(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", judged_run(project))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "PASS          accuracy     a loss of 0.00 points on 600 documents, and 2 are ruled out",
            "accuracy that replay 0.32.0 float32 keeps of replay 5.19.0 float32:",
            HEAD,
            "arc         600     0.6667     0.6667    100.00%  *% to *%     0     0",
            "PASS  accuracy: replay 0.32.0 float32 against replay 5.19.0 float32",
            "  reproduce: parity compare *cpu/reference *cpu/candidate --check accuracy",
        ],
        consecutive=False,
    )


def test_a_loss_fails_and_the_table_counts_it(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", judged_run(project, right(600, 40)))
    result.assert_outcomes(failed=1)
    assert re.search(
        r"^arc +600 +0\.6667 +0\.6000 +90\.00% +\d+\.\d% to \d+\.\d% +40 +0$", text_of(result), re.MULTILINE
    )


def test_too_few_documents_are_inconclusive(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "--parity-recordings", judged_run(project, n=50))
    assert result.ret == 1
    result.stdout.fnmatch_lines(["suites/test_accuracy.py I*", "INCONCLUSIVE  accuracy *"])


def test_the_table_appears_once_for_each_comparison(project: Project, pytester: pytest.Pytester) -> None:
    """However many tests judge it; the golden is a comparison of its own, and named."""
    (pytester.path / "suites" / "test_twice.py").write_text(TWICE)
    held = project.runs / "cpu" / "golden"
    more = {"golden": "golden", "scored": scored(project.runs / "cpu")}
    directory = project.run(scored=False, more=more)
    project.run(
        "cpu/golden",
        reference=project.recording(version="0.31.0"),
        scored=False,
        target="cpu",
        more={"accepted": True, "scored": scored(held, right(600, 2))},
    )
    result = pytester.runpytest("suites", "--parity-recordings", directory)
    result.assert_outcomes(passed=3)
    lines = text_of(result).splitlines()
    assert lines.count(HEAD) == 2
    places = [number for number, line in enumerate(lines) if line == HEAD]
    assert [lines[place - 1] for place in places] == [
        "accuracy that replay 0.32.0 float32 keeps of replay 5.19.0 float32:",
        "accuracy that replay 0.32.0 float32 keeps of the golden of replay 0.31.0 float32:",
    ]
    assert [lines[place + 1].split()[-2:] for place in places] == [["0", "0"], ["2", "0"]]


def test_a_session_that_does_not_ask_for_accuracy_shows_no_table(project: Project, pytester: pytest.Pytester) -> None:
    (pytester.path / "suites" / "test_accuracy.py").write_text("def test(parity_judge): parity_judge('inputs')\n")
    result = pytester.runpytest("suites", "--parity-recordings", judged_run(project))
    result.assert_outcomes(passed=1)
    assert HEAD not in text_of(result)


def test_a_run_without_documents_is_skipped_and_told_what_to_add(project: Project, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("suites", "-rs", "--parity-recordings", project.run(scored=False))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        [
            "SKIPPED*parity: the accuracy check needs scored documents, which this run does not have; add 'accuracy' "
            "to the target, or ask `parity eval`"
        ]
    )


@pytest.mark.parametrize("damage", ["", '{"task": "arc"', None])
def test_samples_that_cannot_be_read_are_one_sentence(
    damage: str | None, project: Project, pytester: pytest.Pytester
) -> None:
    directory = judged_run(project)
    path = directory / "accuracy-candidate" / lmeval.SAMPLES
    path.unlink()
    if damage is not None:
        path.write_text(damage)
    result = pytester.runpytest("suites", "--parity-recordings", directory)
    result.assert_outcomes(failed=1)
    assert "parity could not judge: " in text_of(result)


def test_the_report_of_a_session_shows_what_is_kept(project: Project, pytester: pytest.Pytester) -> None:
    arguments = ("--parity-recordings", judged_run(project, right(600, 3)), "--parity-report", "reports")
    result = pytester.runpytest("suites", *arguments)
    assert "report: " in text_of(result)
    assert "| arc | 600 | 0.6667 | 0.6617 | 99.25% |" in (pytester.path / "reports/cpu/report.md").read_text()
