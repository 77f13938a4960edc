"""Small goldens for tests: a simulated engine's answers, its float32 arbiter, and a shelf to put them on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import accuracy_cases
from lockstep_cases import ROUNDING, World
from parity import golden, lmeval, store
from parity.errors import ParityError, RecordingError
from parity.evals import TaskRun
from parity.golden import Acceptance, Shelf
from parity.prompts import sha256_of_json
from parity.recording import Recording
from parity.verdict import Outcome

TARGET = "cpu"


def save(directory: Path, made: Recording) -> Path:
    """Seal a recording."""
    header = store.make_header(
        spec=made.spec,
        workload=made.workload,
        fingerprint=made.fingerprint,
        created_at=made.created_at,
        resumed=made.resumed,
        key="k",
    )
    store.write(directory, header=header, completions=made.completions)
    return directory


def acceptance(directory: Path, *, seed: int = 7, arbiter: bool = True, **changes: Any) -> Acceptance:
    """A run in `directory`, recorded where it is not there yet, and ready to be accepted."""
    answers, scores = directory / "candidate", directory / "reference-scores"
    if not directory.exists():
        world = World(prompts=3, tokens=4, seed=seed)
        own = world.rounded(1, size=ROUNDING)
        made = world.recording(own, world.tokens_of(own), dtype="bfloat16", engine="vllm")
        save(answers, made)
        exact = world.recording(world.model(), world.tokens_of(own), dtype="float32", forced_from=made.digest)
        save(scores, exact)
    found = Acceptance(
        target=TARGET,
        answers=answers,
        arbiter=scores if arbiter else None,
        samples=None,
        outcomes={"greedy": Outcome.PASS, "shape": Outcome.PASS},
        by="somebody",
        reason=f"run {seed}",
        at="2026-11-24T12:00:00Z",
    )
    return replace(found, **changes)


def scored(directory: Path, *, seed: int = 7, runs: Sequence[TaskRun] | None = None, **changes: Any) -> Acceptance:
    """The same run with scored documents: by default thirty of one task, of which `seed` are wrong."""
    found = acceptance(directory, seed=seed, **changes)
    beside = directory / "accuracy-candidate"
    beside.mkdir(exist_ok=True)
    lmeval.save_samples(beside, runs or [accuracy_cases.run("arc", [0.0] * seed + [1.0] * (30 - seed))])
    return replace(found, samples=beside)


def shelf_in(directory: Path, *, elsewhere: str | None = None) -> Shelf:
    """A shelf whose folder, cache and superseded goldens lie in `directory`."""
    return Shelf(
        root=directory / "golden",
        elsewhere=elsewhere,
        cache=directory / "home" / "goldens",
        aside=directory / "home" / "goldens" / "previous",
    )


def two_runs(directory: Path, make: Callable[..., Acceptance]) -> Path:
    """A directory with a shelf that holds a sound golden, and with two runs."""
    shelf_in(directory).accept(make(directory / "run-1", seed=1))
    make(directory / "run-2", seed=2)
    return directory


def shelf_copied(sound: Path, directory: Path) -> Shelf:
    """A shelf of one's own, to be damaged."""
    shutil.copytree(sound, directory)
    return shelf_in(directory)


def refused(
    shelf: Shelf, sentence: str, kind: type[ParityError] = RecordingError, *, names: Path | None = None
) -> None:
    """Reading says this, in one line that names the golden or the recording, and changes nothing."""
    before = contents(shelf.root.parent)
    with pytest.raises(kind, match=sentence) as caught:
        shelf.read(TARGET)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert str(names or shelf.folder(TARGET)) in str(caught.value)
    assert contents(shelf.root.parent) == before


def contents(directory: Path) -> dict[str, bytes]:
    """Every file, the lock aside."""
    found = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in found}


def document_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / golden.FILE).read_text("utf-8")))


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, reseal: bool = True) -> None:
    """Edit `golden.json` by hand; `reseal` makes its digest right again, as somebody would who knows how."""
    document = document_of(folder)
    change(document)
    if reseal:
        document["digest"] = sha256_of_json({name: value for name, value in document.items() if name != "digest"})
    (folder / golden.FILE).write_text(json.dumps(document), "utf-8")


def forge(folder: Path, role: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Take a recording's files as they are now, edit its header, and make every digest right again."""
    entry = document_of(folder)["recordings"][role]
    directory = folder / entry["directory"]
    header = json.loads((directory / store.HEADER).read_text("utf-8"))
    header["files"] = {name: facts(directory / name) for name in (store.TOKENS, store.LOGPROBS)}
    change(header)
    header["digest"] = sha256_of_json({name: value for name, value in header.items() if name != "digest"})
    (directory / store.HEADER).write_text(json.dumps(header), "utf-8")
    name = f"{role}-{header['digest'][:12]}"
    directory.rename(folder / name)
    forged = {"digest": header["digest"], "directory": name, "files": header.get("files", {})}
    edit(folder, lambda d: d["recordings"].update({role: forged}))


def facts(path: Path) -> Mapping[str, Any]:
    return store._file_facts(path)
