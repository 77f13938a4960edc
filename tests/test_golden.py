"""Goldens: accepted for a reason, one after the other, and never lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import recordings
from golden_cases import TARGET, acceptance, contents, document_of, edit, save, shelf_in
from parity import golden, store
from parity.errors import ConfigError, GoldenMissingError, IncomparableError, RecordingError
from parity.golden import Acceptance, Golden, Shelf
from parity.recording import Completion, FinishReason
from parity.verdict import Outcome

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return shelf_in(tmp_path)


def accepted(shelf: Shelf, *seeds: int) -> Golden:
    """Runs accepted one after the other; the last one's golden."""
    return [shelf.accept(acceptance(shelf.root.parent / f"run-{seed}", seed=seed)) for seed in seeds][-1]


def superseded(shelf: Shelf) -> list[dict[str, Any]]:
    """Every `golden.json` that was moved aside."""
    return [document_of(path.parent) for path in sorted(shelf.aside.glob(f"*/{golden.FILE}"))]


# What is accepted is what is read ----------------------------------------------------------------------------------


def test_what_was_accepted_is_read_back(shelf: Shelf) -> None:
    wanted = acceptance(shelf.root.parent / "run-1", seed=1)
    written = shelf.accept(wanted)
    found = shelf.read(TARGET)
    assert found == written
    assert (found.accepted_by, found.reason, found.supersedes) == ("somebody", "run 1", None)
    assert found.outcomes == {"greedy": "PASS", "shape": "PASS"}
    assert found.metrics == shelf.numbers_of(wanted)
    assert found.metrics["answer tokens"].value == 12.0
    assert found.provenance["engine"] == "vllm 1 bfloat16"
    assert found.noise is not None
    assert found.noise["arbiter"] == "replay 1 float32"
    assert found.recording("reference").digest == store.read(wanted.answers).digest
    assert found.recording("noise").completions
    assert shelf.targets() == (TARGET,)


def test_a_run_without_an_arbiter_has_a_golden_without_noise(shelf: Shelf) -> None:
    found = shelf.accept(acceptance(shelf.root.parent / "run-1", seed=1, arbiter=False))
    assert list(found.directories) == ["reference"]
    assert found.noise is None
    assert "KL divergence from the arbiter" not in found.metrics


def test_a_golden_is_small_and_sorted_with_one_value_a_line(shelf: Shelf) -> None:
    """So that a pull request shows what changed."""
    accepted(shelf, 1, 2)
    text = (shelf.folder(TARGET) / golden.FILE).read_text("utf-8")
    assert len(text) < 8000
    lines = text.splitlines()
    runs = [line for line in lines if line.startswith('  {"accepted_at": ')]
    assert len(runs) == 2
    rest = json.dumps({**json.loads(text), "history": []}, indent=1, sort_keys=True)
    assert [line for line in lines if line not in runs] == rest.replace(
        '"history": []', '"history": [\n ]'
    ).splitlines()


def test_a_missing_golden_says_which_command_creates_it(shelf: Shelf) -> None:
    with pytest.raises(GoldenMissingError) as caught:
        shelf.read(TARGET)
    path = str(shelf.root / TARGET / golden.FILE)
    assert str(caught.value) == (
        f"target 'cpu' has no golden: {path!r} does not exist; record the target and accept it: "
        "parity record cpu && parity accept cpu --reason TEXT"
    )


@pytest.mark.parametrize("name", ["..", "../cpu", "a/b", "/etc", "", ".hidden", "cpu\n", "linked"])
def test_a_target_whose_name_leads_out_of_the_folder_is_refused(name: str, shelf: Shelf, tmp_path: Path) -> None:
    shelf.root.mkdir()
    (tmp_path / "outside").mkdir()
    (shelf.root / "linked").symlink_to(tmp_path / "outside")
    wanted = acceptance(tmp_path / "run-1", seed=1, target=name)
    before = contents(tmp_path)
    asks: list[Callable[[], object]] = [lambda: shelf.read(name), lambda: shelf.accept(wanted)]
    for ask in asks:
        with pytest.raises(ConfigError, match=re.escape(f"{name!r} is no name of a golden: it would lead out of")):
            ask()
    assert shelf.orphans(name) == ()
    assert contents(tmp_path) == before


def test_the_goldens_of_this_repository_are_sound() -> None:
    found = golden.shelf(ROOT / "suites", ROOT / ".parity")
    assert found.targets()
    for target in found.targets():
        assert found.read(target).outcomes
        assert found.orphans(target) == ()


def test_git_ignores_the_lock() -> None:
    assert "/golden/.lock" in (ROOT / ".gitignore").read_text().splitlines()


# One after the other -----------------------------------------------------------------------------------------------


def test_a_superseded_golden_is_named_and_moved_aside_whole(shelf: Shelf) -> None:
    first = accepted(shelf, 1)
    before = contents(shelf.folder(TARGET))
    second = accepted(shelf, 2)
    assert second.supersedes == first.digest
    (place,) = shelf.aside.iterdir()
    assert place.name.startswith(f"cpu-{first.digest[:12]}-")
    assert contents(place) == before
    assert set(contents(shelf.folder(TARGET))) == {
        golden.FILE, *(f"{d.name}/{f.name}" for d in second.directories.values() for f in d.iterdir())
    }  # fmt: skip


def test_a_superseded_golden_that_is_put_back_is_a_golden(shelf: Shelf) -> None:
    first = accepted(shelf, 1)
    accepted(shelf, 2)
    (place,) = shelf.aside.iterdir()
    shutil.rmtree(shelf.folder(TARGET))
    shutil.move(place, shelf.folder(TARGET))
    assert shelf.read(TARGET).digest == first.digest


def test_each_accepted_run_adds_its_metrics_to_the_history(shelf: Shelf) -> None:
    found = [accepted(shelf, seed) for seed in (1, 2, 3)]
    name = "negative log-likelihood"
    assert found[-1].history[name] == tuple(g.metrics[name].value for g in found)
    spread = found[-1].spreads()[name]
    assert spread.n == 3
    assert spread.mean == pytest.approx(sum(found[-1].history[name]) / 3)


def test_a_run_that_is_accepted_again_counts_once(shelf: Shelf) -> None:
    history = accepted(shelf, 1, 2).history
    again = shelf.accept(acceptance(shelf.root.parent / "run-2", seed=2, reason="a better reason"))
    assert len(again.runs) == 2
    assert again.history == history
    assert sorted(d["reason"] for d in superseded(shelf)) == ["run 1", "run 2"]
    assert shelf.read(TARGET).reason == "a better reason"


def test_the_history_is_bounded_and_keeps_the_latest(shelf: Shelf) -> None:
    accepted(shelf, 1)

    def lengthen(document: dict[str, Any]) -> None:
        (run,) = document["history"]
        document["history"] = [{**run, "answers": float(n)} for n in range(200)]

    edit(shelf.folder(TARGET), lengthen)
    found = accepted(shelf, 2)
    assert found.history["answers"] == (*(float(n) for n in range(137, 200)), 3.0)


# What is never accepted --------------------------------------------------------------------------------------------


def answers(shelf: Shelf, *completions: Completion, **about: Any) -> Acceptance:
    """An acceptance of these answers."""
    path = save(shelf.root.parent / "made" / "candidate", recordings.recording(completions, **about))
    return acceptance(path.parent, arbiter=False)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            lambda s: acceptance(s.root.parent / "r", outcomes={"greedy": Outcome.FAIL, "shape": Outcome.PASS}),
            "candidate' failed greedy; nothing is accepted from a run that failed",
        ),
        (
            lambda s: acceptance(s.root.parent / "r", outcomes={}),
            "candidate' was judged by no check; nothing is accepted that nobody has judged",
        ),
        (
            lambda s: answers(
                s,
                recordings.completion("p-1"),
                recordings.completion("p-2", terminator=None, finish_reason=FinishReason.ABORT),
            ),
            "candidate' is incomplete: the engine gave up 1 prompts, 'p-2' first; record again",
        ),
        (answers, "candidate' is incomplete: it holds no answer; record again"),
        (
            lambda s: answers(s, recordings.completion("p-1"), forced_from="1" * 64),
            "candidate' holds scores of given tokens and no answers; accept the candidate's own answers",
        ),
        (
            lambda s: acceptance(s.root.parent / "r", reason=" "),
            "a golden is accepted for a reason; say which with --reason TEXT",
        ),
        (
            lambda s: answers(s, recordings.completion("p-1", chosen=[float("nan"), -0.25, -0.25])),
            "candidate' cannot be a yardstick: its negative log-likelihood is nan; record again",
        ),
    ],
)  # fmt: skip
def test_what_failed_or_is_incomplete_is_not_accepted(
    wanted: Callable[[Shelf], Acceptance], sentence: str, shelf: Shelf
) -> None:
    accepted(shelf, 1)
    unfit = wanted(shelf)
    before = contents(shelf.root.parent)
    for ask in (shelf.numbers_of, shelf.accept):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            ask(unfit)
    assert contents(shelf.root.parent) == before


def test_an_arbiter_of_other_answers_is_refused_before_anything_is_written(shelf: Shelf) -> None:
    ours, theirs = (acceptance(shelf.root.parent / f"run-{seed}", seed=seed) for seed in (1, 2))
    with pytest.raises(IncomparableError, match="the two sides scored different tokens"):
        shelf.accept(replace(ours, arbiter=theirs.answers))
    assert not shelf.root.exists()


def test_a_damaged_recording_is_not_accepted(shelf: Shelf) -> None:
    wanted = acceptance(shelf.root.parent / "run-1", seed=1)
    (wanted.answers / store.TOKENS).write_text("")
    with pytest.raises(RecordingError, match="was changed after it was sealed"):
        shelf.accept(wanted)
    assert not shelf.root.exists()


def test_a_run_that_is_recorded_anew_while_it_is_accepted_changes_nothing(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the golden that is there is of this very run."""
    wanted = acceptance(shelf.root.parent / "run-1", seed=1)
    other = acceptance(shelf.root.parent / "run-2", seed=2)
    first = shelf.accept(wanted)
    own = shutil.copyfile

    def replaced(source: Path, target: Path) -> object:
        monkeypatch.setattr(shutil, "copyfile", own)
        shutil.rmtree(wanted.answers)
        shutil.copytree(other.answers, wanted.answers)
        return own(source, target)

    monkeypatch.setattr(shutil, "copyfile", replaced)
    with pytest.raises(RecordingError, match="candidate' was recorded anew while it was being accepted; accept again"):
        shelf.accept(wanted)
    assert shelf.read(TARGET) == first


# Two at once, and what interrupts ------------------------------------------------------------------------------------

_ACCEPT_THREE = """
import sys, time
from pathlib import Path
from golden_cases import acceptance, shelf_in
directory, first = Path(sys.argv[1]), int(sys.argv[2])
wanted = [acceptance(directory / f"run-{seed}", seed=seed) for seed in range(first, first + 3)]
(directory / f"ready-{first}").touch()
while not (directory / "go").exists():
    time.sleep(0.001)
for each in wanted:
    assert shelf_in(directory).accept(each).reason == each.reason
"""


def test_two_processes_that_accept_at_once_do_not_lose_each_others(shelf: Shelf) -> None:
    directory = shelf.root.parent
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    arguments = [sys.executable, "-c", _ACCEPT_THREE, str(directory)]
    both = [subprocess.Popen([*arguments, first], env=environment) for first in ("1", "4")]
    while not all((directory / f"ready-{first}").exists() for first in ("1", "4")):
        assert all(process.poll() is None for process in both)
    (directory / "go").touch()
    assert [process.wait(timeout=30) for process in both] == [0, 0]
    found = shelf.read(TARGET)
    name = "negative log-likelihood"
    assert sorted(found.history[name]) == sorted(
        shelf.numbers_of(acceptance(directory / f"run-{seed}", seed=seed))[name].value for seed in range(1, 7)
    )
    assert {found.reason, *(d["reason"] for d in superseded(shelf))} == {f"run {seed}" for seed in range(1, 7)}
    assert shelf.orphans(TARGET) == ()


def test_whoever_waits_for_another_acceptance_touches_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nobody ever moves aside what another is still writing."""
    ours, theirs = (acceptance(shelf.root.parent / f"run-{seed}", seed=seed) for seed in (1, 2))
    seen: list[dict[str, bytes]] = []
    own = store.write_whole
    other = threading.Thread(target=shelf.accept, args=(theirs,))

    def slow(path: Path, text: str) -> None:
        monkeypatch.setattr(store, "write_whole", own)
        other.start()
        with (shelf.root / ".lock").open("a") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(contents(shelf.root))
        other.join(0.1)
        seen.append(contents(shelf.root))
        own(path, text)

    monkeypatch.setattr(store, "write_whole", slow)
    shelf.accept(ours)
    other.join()
    assert seen[0] == seen[1]
    name = "negative log-likelihood"
    assert shelf.read(TARGET).history[name] == tuple(shelf.numbers_of(each)[name].value for each in (ours, theirs))


def test_a_golden_that_is_superseded_while_it_is_read_is_read_anew(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted(shelf, 1)
    own = Golden.recording

    def late(self: Golden, role: str) -> object:
        monkeypatch.setattr(Golden, "recording", own)
        accepted(shelf, 2)
        return own(self, role)

    monkeypatch.setattr(Golden, "recording", late)
    assert shelf.read(TARGET).reason == "run 2"


def test_a_kill_during_the_first_acceptance_leaves_no_golden_and_nothing_in_the_way(shelf: Shelf) -> None:
    half = shelf.root / TARGET / ".reference-0123456789ab"
    half.mkdir(parents=True)
    (half / store.TOKENS).write_text("half a li")
    with pytest.raises(GoldenMissingError, match="parity accept cpu --reason TEXT"):
        shelf.read(TARGET)
    accepted(shelf, 1)
    assert shelf.orphans(TARGET) == ()
    (place,) = shelf.aside.iterdir()
    assert contents(place) == {".reference-0123456789ab/tokens.jsonl": b"half a li"}


def test_what_an_acceptance_left_behind_is_listed(shelf: Shelf) -> None:
    accepted(shelf, 1)
    left = shelf.folder(TARGET) / "reference-0123456789ab"
    left.mkdir()
    assert shelf.orphans(TARGET) == (left,)


@pytest.mark.parametrize("room", [True, False])
def test_superseded_goldens_cross_file_systems(room: bool, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    first = accepted(shelf, 1)
    own, tree = os.rename, shutil.copytree

    def rename(source: str, target: str) -> None:
        if Path(target).is_relative_to(shelf.aside):
            raise OSError(errno.EXDEV, "planted")
        own(source, target)

    def copytree(source: str, target: str, **options: Any) -> object:
        if room:
            return tree(source, target, **options)
        (Path(target) / store.TOKENS).parent.mkdir()
        raise OSError(errno.ENOSPC, "planted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        patched.setattr(shutil, "copytree", copytree)
        if room:
            accepted(shelf, 2)
        else:
            with pytest.raises(RecordingError, match="no space left on device"):
                accepted(shelf, 2)
    assert shelf.read(TARGET).reason == "run 2"
    accepted(shelf, 3)
    assert shelf.orphans(TARGET) == ()
    kept = {p.name: p for p in shelf.aside.glob("*/*") if (p / store.HEADER).is_file()}
    for directory in first.directories.values():
        assert store.read(kept[directory.name]).completions
