"""Goldens: what was accepted, and the only yardstick left once the engine that answered is gone.

    golden/<target>/golden.json        metrics, noise, provenance, who accepted it and why, history; made to be reviewed
    golden/<target>/<role>-<digest>/   sealed recordings: `reference` the accepted answers, `noise` an arbiter's scores
    golden/<target>/samples-<digest>.jsonl   scored documents of lm-eval tasks, where the target asks for accuracy

`golden.json` is written last and at once, so whatever interrupts an acceptance leaves the golden that was there. The
bulk of a recording (its log-probabilities) may live in a store of its own, named by content hash; see `blobs`.
Everything that is read is verified first: nothing outside the folder, nothing larger than it says, nothing edited.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from parity import blobs, config, evals, golden_document, lmeval, metrics, store
from parity.errors import ConfigError, GoldenMissingError, IncomparableError, ParityError, RecordingError
from parity.evals import TaskRun
from parity.golden_document import RESTORE, Document, Entry, Facts
from parity.metrics import Metric, Spread
from parity.recording import FinishReason, Recording
from parity.verdict import Outcome

FILE = "golden.json"
_MOST_JSON_BYTES = 4 << 20
"""Of `golden.json` and of a recording's header, which take some kilobytes."""
_FILES = (store.HEADER, store.TOKENS, store.LOGPROBS)
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden(Document):
    """One accepted golden, verified.

    directories: its sealed recordings by role, readable by every command that takes a recording.
    samples: the file of its scored documents, see `parity.evals`; None where it has none.
    """

    directories: Mapping[str, Path]
    samples: Path | None

    @property
    def bulk(self) -> tuple[str, ...]:
        """Content hashes of its log-probabilities, by which a store names them."""
        return tuple(entry.files[store.LOGPROBS].sha256 for entry in self.recordings.values())

    def spreads(self) -> Mapping[str, Spread]:
        """How much each metric varied over the accepted runs."""
        return metrics.spread(self.history)

    def learned_limits(self) -> dict[str, dict[str, Any]]:
        """Limits of checks that the history of accepted runs knows better than a default, each with its source."""
        values = self.history.get(metrics.DISTANCE, ())
        ratio = metrics.learned_ratio(values)
        if ratio is None:
            return {}
        return {"lockstep": {"kl_ratio_one_side": ratio, "source": f"the spread of {len(values)} accepted runs"}}

    def recording(self, role: str) -> Recording:
        """One of its recordings.

        Raises:
            RecordingError: If it is damaged.
        """
        with _forgeries_named(self.directories[role]):
            return store.read(self.directories[role])


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What is to be accepted, and by whom.

    answers: a sealed recording's directory. arbiter: scores of these answers by a float32 engine, where the run has
        them. samples: the directory that holds the engine's scored documents, where the run has some.
    outcomes: what the checks said of it, by check.
    """

    target: str
    answers: Path
    arbiter: Path | None
    samples: Path | None
    outcomes: Mapping[str, Outcome]
    by: str
    reason: str
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """Where goldens are: a folder under version control, and what may lie outside it.

    root: one folder a target. elsewhere: a directory or fsspec URL for log-probabilities; None keeps them in `root`.
    cache: where what was fetched from `elsewhere` is kept.
    aside: where superseded goldens are moved; nothing recorded is deleted.
    """

    root: Path
    elsewhere: str | None
    cache: Path
    aside: Path

    def folder(self, target: str) -> Path:
        """A target's golden.

        Raises:
            ConfigError: If the name would lead out of the folder.
        """
        folder = self.root / target
        if not _TARGET.fullmatch(target) or folder.resolve().parent != self.root.resolve():
            raise ConfigError(
                f"{target!r} is no name of a golden: it would lead out of {str(self.root)!r}; name the target with "
                "letters, digits, '.', '_' and '-', and let its folder be no link"
            )
        return folder

    def read(self, target: str) -> Golden:
        """Read and verify a target's golden, its recordings included.

        Raises:
            GoldenMissingError: If there is none, or a part of it is nowhere; the sentence says how to get it.
            RecordingError: If it is truncated, edited, too large, or of a newer schema.
        """
        folder = self.folder(target)
        document = _parsed(folder / FILE, target)
        try:
            # First: a digest only says that something was edited, the recordings say what.
            golden = self._verified(folder, document)
        except ParityError:
            if _parsed(folder / FILE, target).content_digest == document.content_digest:
                raise
            return self.read(target)  # superseded while it was read
        document.require_unedited(_named(folder / FILE))
        return golden

    def document(self, target: str) -> Document:
        """What was accepted, without its recordings, which may be missing.

        Raises:
            GoldenMissingError: If there is none.
            RecordingError: If it is truncated, edited, too large, or of a newer schema.
        """
        path = self.folder(target) / FILE
        document = _parsed(path, target)
        document.require_unedited(_named(path))
        return document

    def accept(self, acceptance: Acceptance) -> Golden:
        """Make these answers the target's golden. One acceptance at a time; the last one is what the next is held to.

        Raises:
            ConfigError: If no reason is given, or what is to be accepted failed or is incomplete.
            IncomparableError: If the arbiter did not score these answers.
            RecordingError: If something cannot be read or written, or the golden that is there is damaged: what might
                be restored is not written over.
        """
        answers, arbiter, facts = _fit(acceptance)
        folder = self.folder(acceptance.target)
        path, where = folder / FILE, _named(folder / FILE)
        sources = {"reference": (acceptance.answers, answers)}
        if acceptance.arbiter is not None and arbiter is not None:
            sources["noise"] = (acceptance.arbiter, arbiter)
        with store.disk_errors_named(folder), _locked(self.root):
            before = None
            with contextlib.suppress(GoldenMissingError):
                before = self.document(acceptance.target)
            entries = {role: self._shelve(folder, role, *source) for role, source in sources.items()}
            scored = self._shelve_samples(folder, acceptance)
            text = golden_document.render(_body(acceptance, facts, entries, scored, before))
            golden = self._verified(folder, golden_document.parse(text, where=where, target=acceptance.target))
            self.aside.mkdir(parents=True, exist_ok=True)
            name = f"{acceptance.target}-{'unfinished' if before is None else before.digest[:12]}-"
            aside = Path(tempfile.mkdtemp(prefix=name, dir=self.aside))
            if before is not None:
                shutil.copyfile(path, aside / FILE)
            store.write_whole(path, text)
            for left in sorted(folder.iterdir()):
                if left.name not in {FILE, *(entry["directory"] for entry in entries.values()), *_named_file(scored)}:
                    shutil.move(left, aside / left.name)
            with contextlib.suppress(OSError):
                aside.rmdir()  # nothing was superseded
        return golden

    def numbers_of(self, acceptance: Acceptance) -> dict[str, Metric]:
        """The metrics that accepting would write, to be shown first; what would be refused is refused here."""
        return dict(_fit(acceptance)[2].metrics)

    def orphans(self, target: str) -> tuple[Path, ...]:
        """What lies in a target's folder and belongs to no golden: left by an interrupted acceptance."""
        with contextlib.suppress(ParityError):
            document = self.document(target)
            named = {entry.directory for entry in document.recordings.values()}
            if document.scored is not None:
                named.add(_samples_name(document.scored.sha256))
            return tuple(p for p in sorted(self.folder(target).iterdir()) if p.name not in {FILE, *named})
        return ()

    def targets(self) -> tuple[str, ...]:
        """Every target that has a golden, sound or not."""
        if not self.root.is_dir():
            return ()
        return tuple(p.name for p in sorted(self.root.iterdir()) if p.is_dir() and not p.name.startswith("."))

    def _shelve(self, folder: Path, role: str, source: Path, recording: Recording) -> dict[str, Any]:
        """Put a sealed recording onto the shelf; its log-probabilities go where they belong.

        Whole and verified files only, each at once: a golden that names this very recording stays readable, and what
        is damaged, or lies elsewhere now, becomes right.
        """
        name = f"{role}-{recording.digest[:12]}"
        target, scratch = folder / name, folder / f".{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for file in _FILES:
            shutil.copyfile(source / file, scratch / file)
        if not _holds(scratch, recording.digest):
            raise RecordingError(f"{str(source)!r} was recorded anew while it was being accepted; accept again")
        files = store.read_header(scratch)["files"]
        if target.is_symlink() or target.is_file():
            target.unlink()
        target.mkdir(exist_ok=True)
        if self.elsewhere is not None:
            blobs.put(self.elsewhere, files[store.LOGPROBS]["sha256"], scratch / store.LOGPROBS)
            for directory in (scratch, target):
                (directory / store.LOGPROBS).unlink(missing_ok=True)
        for path in sorted(scratch.iterdir()):
            path.replace(target / path.name)
        scratch.rmdir()
        return {"digest": recording.digest, "directory": name, "files": files}

    def _shelve_samples(self, folder: Path, acceptance: Acceptance) -> dict[str, Any] | None:
        """Put the scored documents onto the shelf, under a name that is their content's."""
        if acceptance.samples is None:
            return None
        content = evals.to_json_lines(lmeval.load_samples(acceptance.samples))
        sha256 = hashlib.sha256(content.encode("ascii")).hexdigest()
        store.write_whole(folder / _samples_name(sha256), content)
        return {"bytes": len(content), "sha256": sha256}

    def _scored(self, folder: Path, document: Document) -> tuple[Path | None, tuple[TaskRun, ...]]:
        """The file of the scored documents, which are those that were accepted."""
        if (said := document.scored) is None:
            return None, ()
        where, path = _named(folder / FILE), folder / _samples_name(said.sha256)
        _require_own(path, where)
        if not path.is_file():
            raise GoldenMissingError(f"{where}: its scored documents {path.name} are missing; restore them from git")
        if (size := path.stat().st_size) != said.size_bytes:
            raise RecordingError(
                f"{where}: {path.name} has {size} bytes, and {said.size_bytes} were accepted; {RESTORE}"
            )
        content = path.read_bytes()
        if (sha256 := hashlib.sha256(content).hexdigest()) != said.sha256:
            raise RecordingError(
                f"{where}: {path.name} has the content {sha256[:12]}, and {said.sha256[:12]} was accepted; {RESTORE}"
            )
        try:
            scored = evals.from_json_lines(content.decode("ascii"))
            metrics.of_tasks(scored)
        except (RecordingError, LookupError, ValueError, ArithmeticError) as error:  # made by hand, its hash made right
            raise RecordingError(f"{where}: {path.name} holds no scored documents ({error}); {RESTORE}") from error
        return path, scored

    def _verified(self, folder: Path, document: Document) -> Golden:
        """The golden with its recordings, which must give the numbers that it names."""
        samples, scored = self._scored(folder, document)
        golden = Golden(
            **{field.name: getattr(document, field.name) for field in fields(document)},
            directories={role: self._complete(folder, role, entry) for role, entry in document.recordings.items()},
            samples=samples,
        )
        where, answers = _named(folder / FILE), golden.recording("reference")
        arbiter = golden.recording("noise") if "noise" in golden.directories else None
        try:
            facts = Facts.of(answers, arbiter, scored)
        except IncomparableError as error:
            raise RecordingError(f"{where}: its noise recording is of other answers ({error}); {RESTORE}") from error
        document.require_given(facts, where)
        return golden

    def _complete(self, folder: Path, role: str, entry: Entry) -> Path:
        """The directory of one recording with all its files, which are those that were accepted."""
        where, directory = _named(folder / FILE), folder / entry.directory
        paths = [directory / file for file in _FILES]
        for path in (directory, *paths):
            _require_own(path, where)
        absent = [path.name for path in paths if not path.is_file()]
        if absent and (absent != [store.LOGPROBS] or self.elsewhere is None):
            hint = "" if absent != [store.LOGPROBS] else ", or name the store that it lies in ([golden] store)"
            raise GoldenMissingError(
                f"{where}: {absent[0]} of its {role} recording is missing from {str(directory)!r}; restore it from git"
                f"{hint}"
            )
        with _forgeries_named(directory):
            header = store.read_header(directory)
            if header["digest"] != entry.digest:
                raise RecordingError(
                    f"{where} was accepted with the {role} recording {entry.digest[:12]}, and {str(directory)!r} holds "
                    f"{header['digest'][:12]}; {RESTORE}"
                )
            accepted = {name: {"bytes": f.size_bytes, "sha256": f.sha256} for name, f in entry.files.items()}
            if accepted != header["files"] or set(accepted) != set(_FILES[1:]):
                raise RecordingError(
                    f"{where} says that its {role} recording has the files {accepted}, and it has {header['files']}; "
                    f"{RESTORE}"
                )
        return self._fetched(directory, entry) if absent else directory

    def _fetched(self, directory: Path, entry: Entry) -> Path:
        """A copy of the recording in the cache, with its log-probabilities from the store."""
        assert self.elsewhere is not None, "the caller has seen to it"
        bulk = entry.files[store.LOGPROBS]
        target = self.cache / f"{directory.name}-{bulk.sha256[:12]}"
        with store.disk_errors_named(target), _locked(self.cache):
            if not _holds(target, entry.digest):
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                for file in (store.HEADER, store.TOKENS):
                    shutil.copyfile(directory / file, target / file)
                blobs.get(self.elsewhere, bulk.sha256, target / store.LOGPROBS, size=bulk.size_bytes)
        return target


def shelf(suites: Path, home: Path, *, root: Path | None = None) -> Shelf:
    """Where the goldens of a project are: as its targets file says, or in `root`.

    Raises:
        ConfigError: If the targets file is wrong.
    """
    path = suites / "targets.toml"
    places = config.golden_places(path) if path.is_file() else None
    return Shelf(
        root=root or (suites.parent / "golden" if places is None else places.directory),
        elsewhere=None if places is None else places.store,
        cache=home / "goldens",
        aside=home / "goldens" / "previous",
    )


def changes(
    before: Mapping[str, Metric], after: Mapping[str, Metric]
) -> list[tuple[str, Metric | None, Metric | None]]:
    """Old and new value of every metric, by name."""
    return [(name, before.get(name), after.get(name)) for name in sorted({*before, *after})]


def _fit(acceptance: Acceptance) -> tuple[Recording, Recording | None, Facts]:
    """The recordings and what they give; what failed or is incomplete is never accepted."""
    where = str(acceptance.answers)
    if not acceptance.reason.strip():
        raise ConfigError("a golden is accepted for a reason; say which with --reason TEXT")
    failed = [check for check, outcome in acceptance.outcomes.items() if outcome is Outcome.FAIL]
    if failed:
        raise ConfigError(f"{where!r} failed {', '.join(failed)}; nothing is accepted from a run that failed")
    if not acceptance.outcomes:
        raise ConfigError(f"{where!r} was judged by no check; nothing is accepted that nobody has judged")
    answers = store.read(acceptance.answers)
    aborted = [c.id for c in answers.completions if c.finish_reason is FinishReason.ABORT]
    if aborted or not answers.completions:
        what = f"the engine gave up {len(aborted)} prompts, {aborted[0]!r} first" if aborted else "it holds no answer"
        raise ConfigError(f"{where!r} is incomplete: {what}; record again")
    if answers.workload.forced_from is not None:
        raise ConfigError(f"{where!r} holds scores of given tokens and no answers; accept the candidate's own answers")
    arbiter = None if acceptance.arbiter is None else store.read(acceptance.arbiter)
    scored = () if acceptance.samples is None else lmeval.load_samples(acceptance.samples)
    facts = Facts.of(answers, arbiter, scored)
    for name, metric in facts.metrics.items():
        if not math.isfinite(metric.value):
            raise ConfigError(f"{where!r} cannot be a yardstick: its {name} is {metric.value}; record again")
    return answers, arbiter, facts


def _body(
    acceptance: Acceptance,
    facts: Facts,
    entries: Mapping[str, Any],
    scored: Mapping[str, Any] | None,
    before: Document | None,
) -> dict[str, Any]:
    answers = entries["reference"]["digest"]
    return {
        "target": acceptance.target,
        "accepted_at": acceptance.at,
        "accepted_by": acceptance.by,
        "reason": acceptance.reason.strip(),
        "supersedes": None if before is None else before.digest,
        **facts.to_json(),
        "outcomes": {check: outcome.value for check, outcome in acceptance.outcomes.items()},
        "recordings": entries,
        **({} if scored is None else {golden_document.SAMPLES: scored}),
        "history": golden_document.remembered(before, facts, answers=answers, at=acceptance.at),
    }


def _parsed(path: Path, target: str) -> Document:
    """`golden.json`, whose shape is right; whether it was edited is not said."""
    if not path.is_file():
        raise GoldenMissingError(
            f"target {target!r} has no golden: {str(path)!r} does not exist; record the target and accept it: "
            f"parity record {target} && parity accept {target} --reason TEXT"
        )
    _require_own(path, _named(path))
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"{_named(path)} cannot be read ({error}); {RESTORE}") from error
    return golden_document.parse(text, where=_named(path), target=target)


def _require_own(path: Path, where: str) -> None:
    """Refuse links, which may lead anywhere, and JSON files that nobody has written."""
    if path.is_symlink():
        raise RecordingError(f"{where}: {str(path)!r} is a link, and a golden holds its own files; {RESTORE}")
    if path.suffix == ".json" and path.is_file() and (size := path.stat().st_size) > _MOST_JSON_BYTES:
        raise RecordingError(f"{where}: {str(path)!r} has {size} bytes, and may have {_MOST_JSON_BYTES}; {RESTORE}")


def _samples_name(sha256: str) -> str:
    return f"samples-{sha256[:12]}.jsonl"


def _named_file(scored: Mapping[str, Any] | None) -> tuple[str, ...]:
    return () if scored is None else (_samples_name(str(scored["sha256"])),)


def _named(path: Path) -> str:
    return f"golden {str(path)!r}"


def _holds(directory: Path, digest: str) -> bool:
    """Whether this very recording is there, undamaged."""
    try:
        with _forgeries_named(directory):
            return store.read(directory).digest == digest
    except RecordingError:
        return False


@contextlib.contextmanager
def _forgeries_named(directory: Path) -> Iterator[None]:
    """A header with a right digest that lacks what every header has was made by hand; that is one sentence too.

    Raises:
        RecordingError: Then.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RecordingError(
            f"recording {str(directory)!r} is damaged ({type(error).__name__}: {error}); {RESTORE}"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; whoever is killed lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
