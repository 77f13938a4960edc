"""From a question to sealed recordings: provision, lock, start once, stream, resume, seal.

An engine is started at most once per call of `Recorder.record`, however many workloads it answers. Every finished
completion is on disk at once, so that whatever interrupts a run, the next one goes on from there. A workload that the
same engine has answered before is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

from parity import environments, models, store
from parity.engines import EngineSpec, Progress
from parity.errors import RecordingError
from parity.fingerprint import Fingerprint
from parity.prompts import Request, Workload, sha256_of_json
from parity.recording import Completion, Recording, WorkloadRecord, missing_ids
from parity.session import Session, TimeLimits

_CODE_OF_A_RECORDING = ("worker.py", "recording.py", "prompts.py", "fingerprint.py")


Sequel: TypeAlias = "Callable[[Mapping[str, Recording]], Workload | None]"
"""A workload that is made from the answers to the ones before it, or None where they leave nothing to ask."""


class Observer(Protocol):
    """Whoever watches a long run."""

    def note(self, text: str) -> None:
        """One sentence worth keeping on the screen."""

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        """`done` of `total` for the task named `what`; a task ends when done equals total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things are: lock files, and the caches for environments and models.

    locks: folders with lock files; the first that has one of a name wins, and new ones are made in the last.
    """

    locks: tuple[Path, ...]
    environments: Path
    models: Path

    @classmethod
    def of(cls, suites: Path, home: Path) -> Places:
        """The usual places: `suites/environments/*.txt`, and caches under `home` (normally `.parity`)."""
        locks = (suites / "environments", home / "locks")
        return cls(locks=locks, environments=home / "environments", models=home / "models")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Records workloads into `directory/<name>/`.

    fresh: record again even where an equal recording exists.
    limits: how long an engine may be silent.
    """

    directory: Path
    places: Places
    observer: Observer
    fresh: bool = False
    limits: TimeLimits = field(default_factory=TimeLimits)

    def record(self, spec: EngineSpec, jobs: Mapping[str, Workload | Sequel]) -> dict[str, Recording]:
        """Answer each named workload on the engine, starting it once, or not at all if all answers are there.

        A job may be made from the answers to the jobs before it; one that asks nothing is left out of the result.

        Raises:
            ProvisionError: If the environment or the model cannot be provided.
            EngineError: If the engine cannot run; finished completions stay on disk for the next run.
            RecordingError: If the disk is full.
        """
        python, environment = self.interpreter(spec)
        model = self.model_of(spec)
        label = _label(spec)
        done: dict[str, Recording] = {}
        with contextlib.ExitStack() as running:
            session: Session | None = None
            for name, job in jobs.items():
                workload = job if isinstance(job, Workload) else job(done)
                if workload is None:
                    continue
                key = _key(spec, workload, model, environment)
                found = None if self.fresh or environment is None else self._reusable(name, key)
                if found is not None:
                    self.observer.note(f"{name}: {found.label}, already recorded {found.created_at}; nothing to run")
                    done[name] = found
                    continue
                if session is None:
                    command = [*spec.launcher, python, "-m", "parity.worker"]
                    log = self.directory / "logs" / f"{name}.log"
                    with store.disk_errors_named(self.directory):
                        log.parent.mkdir(parents=True, exist_ok=True)
                        log.unlink(missing_ok=True)
                    running.enter_context(devices_locked(spec, self.observer))
                    session = running.enter_context(Session(label=label, command=command, log=log, limits=self.limits))
                    fingerprint = self._open(session, spec, model, label)
                partial = _Partial(self._partial_directory(name, key), fingerprint)
                done[name] = self._answer(session, spec, name, workload, partial, key)
        return done

    def interpreter(self, spec: EngineSpec) -> tuple[str, str | None]:
        """The engine's interpreter, and its locked environment's digest if it lives in one."""
        if spec.environment is None:
            return spec.python or ("python3" if spec.launcher else sys.executable), None
        found = environments.find(spec.environment, locks=self.places.locks, root=self.places.environments)
        if not found.built:
            what = f"environment {found.name}"
            found = environments.build(
                found, report=lambda step, done, total: self.observer.progress(what, done, total, step)
            )
            self.observer.note(f"{what} is ready ({len(found.packages)} packages)")
        return str(found.python), found.digest

    def model_of(self, spec: EngineSpec) -> str:
        """The directory of the engine's model, provided where it is not there yet."""
        if spec.launcher and not spec.model.startswith(("package:", "hub:")):
            return spec.model  # a path on the other side of the launcher; the worker says if it is not there
        return str(models.provide(spec.model, cache=self.places.models, report=self.observer.note))

    def _open(self, session: Session, spec: EngineSpec, model: str, label: str) -> Fingerprint:
        self.observer.progress(f"{label}: starting", 0, 1, "")
        began = time.monotonic()
        fingerprint = session.open(spec, model)
        self.observer.progress(f"{label}: starting", 1, 1, "")
        version = fingerprint.context.get("engine.version")
        self.observer.note(f"{label}: version {version}, ready after {time.monotonic() - began:.0f} s")
        return fingerprint

    def _answer(
        self, session: Session, spec: EngineSpec, name: str, workload: Workload, partial: _Partial, key: str
    ) -> Recording:
        """Run what is missing, keep each completion at once, then seal."""
        ids = [r.id for r in workload.requests]
        asked = set(ids)
        finished = {c.id: c for c in partial.completions if c.id in asked}
        resumed = len(finished)
        if resumed:
            self.observer.note(f"{name}: resuming, {resumed} of {len(ids)} prompts were finished by an earlier run")
        to_run = [r for r in workload.requests if r.id not in finished]
        began, tokens, shown = time.monotonic(), 0, 0
        what = f"{name}: {_label(spec)}"
        self.observer.progress(what, resumed, len(ids), "")
        with store.disk_errors_named(partial.directory), partial.appending() as keep:
            for answer in _by_turns(session, to_run):
                if isinstance(answer, Completion):
                    keep(answer)
                    finished[answer.id] = answer
                    tokens += len(answer.token_ids)
                shown = max(shown, tokens, answer.tokens if isinstance(answer, Progress) else 0)
                rate = shown / max(time.monotonic() - began, 1e-9)
                self.observer.progress(what, len(finished), len(ids), f"{shown} tokens, {rate:.0f} tokens/s")
        assert not missing_ids(ids, finished.values()), "Session.run answers every request or raises"
        header = _header(spec, workload, partial.fingerprint, resumed, key)
        target = self.directory / name
        if target.exists():
            _set_aside(target)
        recording = store.write(target, header=header, completions=[finished[i] for i in ids])
        partial.discard()
        rate = tokens / max(time.monotonic() - began, 1e-9)
        self.observer.note(
            f"{name}: {recording.label}, {len(ids)} prompts, {tokens} tokens in {time.monotonic() - began:.0f} s "
            f"({rate:.0f} tokens/s)"
        )
        return recording

    def _reusable(self, name: str, key: str) -> Recording | None:
        """An equal recording: of this name, or of another target beside this one."""
        beside = sorted(self.directory.parent.glob(f"*/*/{store.HEADER}"))
        for header in [self.directory / name / store.HEADER, *beside]:
            try:
                if not header.is_file() or store.read_header(header.parent).get("key") != key:
                    continue
                recording = store.read(header.parent)
            except RecordingError:
                continue  # a damaged one is simply not reused
            if header.parent != self.directory / name:
                with store.disk_errors_named(self.directory / name):
                    _copy(header.parent, self.directory / name)
            return recording
        return None

    def _partial_directory(self, name: str, key: str) -> Path:
        return self.directory / "partial" / f"{name}-{key[:12]}"


class _Partial:
    """Finished completions of an unfinished recording: one JSON line each, written as they come."""

    def __init__(self, directory: Path, fingerprint: Fingerprint) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self._file = directory / "completions.jsonl"
        self._header = {"identity": dict(fingerprint.identity), "packages": dict(fingerprint.packages)}
        self.completions = self._read()

    def _read(self) -> tuple[Completion, ...]:
        try:
            header, *lines = self._file.read_text("utf-8").split("\n")
            if json.loads(header) == self._header:
                # The last element is empty, or a line that the interruption cut short.
                return tuple(Completion.from_json(json.loads(line)) for line in lines[:-1])
        except OSError:
            return ()
        except (KeyError, TypeError, ValueError):
            pass  # damaged; a power cut can leave anything
        # Another model content or package set answered these; they are kept, and not mixed with new ones.
        _set_aside(self.directory)
        return ()

    @contextlib.contextmanager
    def appending(self) -> Iterator[_Keep]:
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(self._header), *(json.dumps(c.to_json()) for c in self.completions)]
        fresh = self._file.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        fresh.replace(self._file)
        with self._file.open("a", encoding="utf-8") as file:
            yield _Keep(file)

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.parent.rmdir()


@dataclass(frozen=True, slots=True)
class _Keep:
    """Writes one completion so that a crash a moment later cannot lose it."""

    file: IO[str]

    def __call__(self, completion: Completion) -> None:
        self.file.write(json.dumps(completion.to_json()) + "\n")
        self.file.flush()


def _header(spec: EngineSpec, workload: Workload, fingerprint: Fingerprint, resumed: int, key: str) -> dict[str, Any]:
    return store.make_header(
        spec=spec,
        workload=WorkloadRecord.of(workload),
        fingerprint=fingerprint,
        created_at=now(),
        resumed=resumed,
        key=key,
    )


def _by_turns(session: Session, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
    """One offline batch a turn."""
    for _, turn in itertools.groupby(sorted(requests, key=lambda r: r.turn), key=lambda r: r.turn):
        yield from session.run(list(turn))


def _label(spec: EngineSpec) -> str:
    return f"{spec.engine_label} {spec.dtype}"


def now() -> str:
    """The time of day in UTC, as recordings are dated."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _set_aside(directory: Path) -> None:
    """Nothing recorded is lost: what makes room for new things moves to `previous/`."""
    previous = directory.parent / "previous"
    previous.mkdir(exist_ok=True)
    number = 1
    while (previous / f"{directory.name}-{number}").exists():
        number += 1
    directory.rename(previous / f"{directory.name}-{number}")


def _copy(source: Path, target: Path) -> None:
    """Copy a recording under a temporary name, then rename: it is there completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        whole = Path(scratch, target.name)
        whole.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, whole / path.name)
        if target.exists():
            _set_aside(target)
        whole.rename(target)


def _key(spec: EngineSpec, workload: Workload, model: str, environment: str | None) -> str:
    """Names everything that a repeat would have to share: engine, its packages, model files, question, our code."""
    return sha256_of_json(
        {
            "spec": spec.to_json(),
            "environment": environment,
            "model": _stamps(Path(model)),
            "workload": workload.digest,
            "sent": [r.prompt_token_ids for r in workload.requests],
            "code": _code_digest(spec),
        }
    )


def _stamps(model: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times instead of contents: hashing gigabytes to learn that nothing changed is too slow."""
    if not model.is_dir():
        return []
    found = [(p.name, p.stat()) for p in sorted(model.iterdir()) if p.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _code_digest(spec: EngineSpec) -> str:
    """All adapters, not only this one: they share code, and an adapter given by path may build on any of them."""
    package = Path(__file__).parent
    own = [Path(spec.engine)] if spec.engine.endswith(".py") else []
    files = [*(package / name for name in _CODE_OF_A_RECORDING), *sorted((package / "engines").glob("*.py")), *own]
    return sha256_of_json([path.read_text("utf-8") for path in files if path.is_file()])


@contextlib.contextmanager
def devices_locked(spec: EngineSpec, observer: Observer) -> Iterator[None]:
    """One engine per GPU at a time, over all parity runs of this machine. CPU engines need no lock."""
    visible = spec.env.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if visible is not None:
        wanted = {part.strip() for part in visible.split(",")}
        devices = [d for d in devices if d.name.removeprefix("nvidia") in wanted]
    with contextlib.ExitStack() as held:
        for device in devices:
            lock = held.enter_context((Path(tempfile.gettempdir()) / f"parity-{device.name}.lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                observer.note(f"waiting for {device}: another parity run holds it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
