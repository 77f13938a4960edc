"""A real evaluation, interrupted and killed among its documents: nothing is asked twice and nothing is left running."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from drills import interruptible, wait_until, wait_until_gone
from parity import accuracy, lmeval, store

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
DOCUMENTS, REQUESTS = 40, 160


def descendants(of: int) -> list[int]:
    """Every process that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))
    found, new = [], [of]
    while new:
        new = [child for parent in new for child in parents.get(parent, ())]
        found += new
    return found


@dataclass
class Evaluation:
    """`parity eval` of the shipped target into a cache folder of its own, with the shared environments and models."""

    home: Path

    @property
    def run(self) -> Path:
        return self.home / "recordings" / "cpu-accuracy"

    def start(self) -> subprocess.Popen[str]:
        arguments = ("eval", "cpu", "--tasks", "parity_facts", "--limit", str(DOCUMENTS))
        places = ("--suites", str(self.home / "suites"), "--home", str(self.home))
        with (self.home / "out").open("w") as out, (self.home / "err").open("w") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "parity", *arguments, *places],
                stdout=out,
                stderr=err,
                text=True,
                **interruptible(),
            )

    def said(self) -> str:
        return (self.home / "err").read_text()

    def finished(self, role: str) -> list[str]:
        """The requests whose answers are safe on disk in an unfinished recording."""
        lines = [line for path in self.run.glob(f"partial/{role}-*/completions.jsonl") for line in whole_lines(path)]
        return [str(json.loads(line)["id"]) for line in lines]

    def ended_by(self, number: signal.Signals, role: str, *, at_least: int) -> list[str]:
        """Run until that many requests are finished, send the command a signal; what is safe on disk afterwards."""
        process = self.start()
        try:
            wait_until(
                lambda: len(self.finished(role)) >= at_least or process.poll() is not None,
                f"{at_least} answers of {role}",
                patience_s=120.0,
            )
            assert process.poll() is None, self.said()
            started = descendants(process.pid)
            assert started
            process.send_signal(number)
            process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()
        wait_until_gone(started)
        assert process.returncode == (130 if number is signal.SIGINT else -number)
        return self.finished(role)


def whole_lines(path: Path) -> list[str]:
    """The header aside; a line that the kill cut short does not count."""
    try:
        return path.read_text().split("\n")[1:-1]
    except FileNotFoundError:
        return []


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """Of few requests at a time: all at once, vLLM would have answered them before anybody could come between."""
    shutil.copytree(ROOT / "suites", tmp_path / "suites", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "suites" / "targets.toml"
    text = path.read_text("utf-8")
    assert "max_model_len = 2048" in text
    path.write_text(text.replace("max_model_len = 2048", "max_model_len = 2048, max_num_seqs = 4"), "utf-8")
    for shared in ("environments", "models"):
        (tmp_path / shared).symlink_to(ROOT / ".parity" / shared)
    return Evaluation(tmp_path)


def resumed(said: str, role: str) -> int:
    found = re.search(rf"{role}: resuming, (\d+) of {REQUESTS} prompts were finished by an earlier run", said)
    assert found is not None, said
    return int(found[1])


def test_an_evaluation_that_is_killed_twice_asks_nothing_twice(evaluation: Evaluation) -> None:
    """By Ctrl-C among the reference's documents, then by SIGKILL among the candidate's, and then to its end."""
    ours = evaluation.ended_by(signal.SIGINT, accuracy.REFERENCE, at_least=REQUESTS // 2)
    assert REQUESTS // 2 <= len(ours) < REQUESTS
    theirs = evaluation.ended_by(signal.SIGKILL, accuracy.CANDIDATE, at_least=1)
    assert 1 <= len(theirs) < REQUESTS
    assert resumed(evaluation.said(), accuracy.REFERENCE) == len(set(ours)) == len(ours)
    assert store.read(evaluation.run / accuracy.REFERENCE).resumed == len(ours)
    last = evaluation.start()
    try:
        assert last.wait(timeout=120) == 3, evaluation.said()  # so few documents decide nothing
    finally:
        last.kill()
        last.wait()
    said = evaluation.said()
    assert re.search(rf"{accuracy.REFERENCE}: .* already recorded .*; nothing to run", said)
    assert resumed(said, accuracy.CANDIDATE) == len(set(theirs)) == len(theirs)
    recordings = [store.read(evaluation.run / role) for role in (accuracy.REFERENCE, accuracy.CANDIDATE)]
    assert [len(r.completions) for r in recordings] == [REQUESTS, REQUESTS]
    assert recordings[1].resumed == len(theirs)
    for role in (accuracy.REFERENCE, accuracy.CANDIDATE):
        (task,) = lmeval.load_samples(evaluation.run / role)
        assert [s.doc_id for s in task.samples] == list(range(DOCUMENTS))
    assert not (evaluation.run / "partial").exists()
