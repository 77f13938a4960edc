"""`golden.json`: what was accepted, as a document that people review and that is verified when it is read.

Sorted, one value a line, one line an accepted run, so that a pull request shows what changed. Its shape is checked
before anything that it names is opened, and what its recordings give is computed again and compared. Pure.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parity import metrics
from parity import noise as noise_
from parity.errors import RecordingError
from parity.evals import TaskRun
from parity.fingerprint import Scalar
from parity.metrics import Metric
from parity.prompts import sha256_of_json
from parity.recording import Recording

SCHEMA = 1
ROLES = ("reference", "noise")
SAMPLES = "samples"
"""The key of scored documents."""
MOST_BYTES = 256 << 20
"""A golden's largest file. One of 134 prompts x 64 tokens takes 0.5 MB; what is larger than this is no golden."""
_HISTORY = 64
"""Accepted runs whose metrics are remembered."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
RESTORE = "restore it from git, or move its folder away and accept anew"
_FACTS = (
    "dtype",
    "quantization",
    "model.weights_sha256",
    "tokenizer.sha256",
    "chat_template.sha256",
)
_CIRCUMSTANCES = ("engine.version", "host.cpu", "host.cores", "host.os", "gpu.0.name", "gpu.0.driver_version", "python")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of an accepted recording."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One accepted recording: its digest, its folder's name, its files by name."""

    digest: str
    directory: str
    files: Mapping[str, File]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the recordings of a golden give, and nobody has to be believed for.

    metrics: by name. noise: of the engine against its arbiter; None where there is none. provenance: who answered
        what, on what.
    """

    metrics: Mapping[str, Metric]
    noise: Mapping[str, Scalar] | None
    provenance: Mapping[str, Scalar]

    @classmethod
    def of(cls, answers: Recording, arbiter: Recording | None, scored: Sequence[TaskRun] = ()) -> Facts:
        """Compute them.

        Raises:
            IncomparableError: If the arbiter did not score these answers.
        """
        measured = None
        if arbiter is not None:
            measured = noise_.measure(answers, arbiter, candidate_dtype=noise_.dtype_of(answers))
        known = {**answers.fingerprint.identity, **answers.fingerprint.context}
        return cls(
            metrics=dict(
                sorted(
                    {
                        **metrics.of_answers(answers),
                        **metrics.of_noise(measured),
                        **metrics.of_tasks(scored),
                    }.items()
                )
            ),
            noise=None
            if measured is None
            else {
                "arbiter": measured.source.split(" against ")[-1],
                "positions": measured.positions,
                "prompts": measured.prompts,
                "sigma_nats": metrics.kept(measured.sigma_nats),
            },
            provenance={
                "engine": answers.label,
                "model": answers.spec.model,
                "recorded_at": answers.created_at,
                "workload": answers.workload.name,
                "workload.digest": answers.workload.digest,
                "max_tokens": answers.workload.sampling.max_tokens,
                **{name: known.get(name) for name in (*_FACTS, *_CIRCUMSTANCES) if name in known},
                **{name: value for name, value in known.items() if name.startswith("option.")},
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in a document."""
        return {
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "noise": self.noise,
            "provenance": self.provenance,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A golden without its recordings.

    digest: what it says that its content is named by. content_digest: what its content gives; another where it was
        edited.
    outcomes: what the checks said of the run that was accepted, by check.
    scored: the file of its scored documents; None where it has none.
    runs: accepted runs, oldest first: when, by which engine, and the value of each metric.
    """

    target: str
    digest: str
    content_digest: str
    accepted_at: str
    accepted_by: str
    reason: str
    supersedes: str | None
    provenance: Mapping[str, Scalar]
    metrics: Mapping[str, Metric]
    noise: Mapping[str, Scalar] | None
    outcomes: Mapping[str, str]
    recordings: Mapping[str, Entry]
    scored: File | None
    runs: tuple[Mapping[str, Scalar], ...]

    @property
    def history(self) -> dict[str, tuple[float, ...]]:
        """Metric values of accepted runs by metric name, oldest first."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for name, value in run.items():
                if isinstance(value, float):
                    found.setdefault(name, []).append(value)
        return {name: tuple(values) for name, values in found.items()}

    def require_unedited(self, where: str) -> None:
        """Refuse what is not as it was written.

        Raises:
            RecordingError: If the content is not the one that the digest names.
        """
        if self.digest != self.content_digest:
            raise RecordingError(
                f"{where} was edited by hand: its content gives digest {self.content_digest[:12]}, it says "
                f"{self.digest[:12]}; {RESTORE}"
            )

    def require_given(self, facts: Facts, where: str) -> None:
        """Refuse a number that its own recordings do not give: it was edited, digest or not.

        Raises:
            RecordingError: Naming what differs, and both values.
        """
        for name in sorted({*self.metrics, *facts.metrics}):
            old, new = self.metrics.get(name), facts.metrics.get(name)
            if old is None or new is None or not old.equals(new):
                raise RecordingError(
                    f"{where}: the metric {name!r} says {_said(old)}, its recordings give {_said(new)}; {RESTORE}"
                )
        ours, theirs = self.noise or {}, facts.noise or {}
        pairs = {f"noise {name}": (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})}
        # Which facts are written down may change; one that is there must be right.
        shared = sorted(set(self.provenance) & set(facts.provenance))
        pairs |= {f"provenance {name}": (self.provenance[name], facts.provenance[name]) for name in shared}
        for name, (said, found) in pairs.items():
            if not _alike(said, found):
                raise RecordingError(f"{where}: {name} says {said!r}, its recordings give {found!r}; {RESTORE}")


def remembered(before: Document | None, facts: Facts, *, answers: str, at: str) -> list[Mapping[str, Scalar]]:
    """The history with one more run, whose recording has the digest `answers`; accepted again, it counts once."""
    values = {name: metric.value for name, metric in facts.metrics.items()}
    runs = () if before is None else before.runs
    if before is not None and before.recordings["reference"].digest == answers:
        runs = runs[:-1]
    return [*runs, {"accepted_at": at, "engine": facts.provenance["engine"], **values}][-_HISTORY:]


def render(body: Mapping[str, Any]) -> str:
    """The text of a document whose values are plain; schema and digest are added."""
    whole = {"schema": SCHEMA, **body}
    head = {**whole, "history": [], "digest": _digest(whole)}
    lines = json.dumps(head, indent=1, sort_keys=True, ensure_ascii=False)
    runs = ",\n".join(f"  {json.dumps(run, ensure_ascii=False)}" for run in whole["history"])
    return lines.replace('"history": []', f'"history": [\n{runs}\n ]', 1) + "\n"


def parse(text: str, *, where: str, target: str) -> Document:
    """Read what `render` wrote. Whether it was edited since is another question: see `Document.require_unedited`.

    Raises:
        RecordingError: If it is truncated, of a newer schema, of another target, or lacks or misnames something.
    """
    if "\n<<<<<<< " in f"\n{text}":
        raise RecordingError(
            f"{where} holds a merge conflict; take its whole folder from one branch, and accept the other's run again"
        )
    try:
        data = json.loads(text)
        schema = data["schema"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RecordingError(f"{where} is truncated or no golden ({error}); {RESTORE}") from error
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise RecordingError(
            f"{where} has schema {reprlib.repr(schema)}, this parity reads up to {SCHEMA}; upgrade engine-parity"
        )
    try:
        found = _document(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise RecordingError(f"{where} is damaged: {error}; {RESTORE}") from error
    if found.target != target:
        raise RecordingError(
            f"{where} was accepted for target {found.target!r}, not {target!r}; move it to the folder of its target, "
            "or accept anew"
        )
    return found


def _digest(body: Mapping[str, Any]) -> str:
    return sha256_of_json({name: value for name, value in body.items() if name != "digest"})


def _document(data: Mapping[str, Any]) -> Document:
    runs = data.get("history")
    if not isinstance(runs, list):
        raise TypeError(f"it says {reprlib.repr(runs)} where its 'history' must be a list")
    recordings = {role: _entry(role, entry) for role, entry in _table(data, "recordings").items()}
    if "reference" not in recordings or not set(recordings) <= set(ROLES):
        raise ValueError(f"it holds the recordings {sorted(recordings)}, and must hold 'reference', beside it 'noise'")
    return Document(
        target=_text(data, "target"),
        digest=_sha256(data, "digest"),
        content_digest=_digest(data),
        accepted_at=_text(data, "accepted_at"),
        accepted_by=_text(data, "accepted_by"),
        reason=_text(data, "reason"),
        supersedes=None if data.get("supersedes") is None else _text(data, "supersedes"),
        provenance=_table(data, "provenance"),
        metrics={name: _metric(name, metric) for name, metric in _table(data, "metrics").items()},
        noise=None if data.get("noise") is None else _table(data, "noise"),
        outcomes=_table(data, "outcomes"),
        recordings=recordings,
        scored=None if data.get(SAMPLES) is None else _file(SAMPLES, _table(data, SAMPLES)),
        runs=tuple(_table({"history": run}, "history") for run in runs),
    )


def _entry(role: str, data: Any) -> Entry:
    digest, name = _sha256(data, "digest"), _text(data, "directory")
    wanted = f"{role}-{digest[:12]}"
    if name != wanted:  # one name is right, so none can lead out of the folder
        raise ValueError(f"its {role} recording is said to lie in {reprlib.repr(name)}, and must lie in {wanted!r}")
    files = {name: _file(name, facts) for name, facts in _table(data, "files").items()}
    return Entry(digest=digest, directory=name, files=files)


def _file(name: str, data: Any) -> File:
    sha256 = _sha256(data, "sha256")
    size = data.get("bytes")
    if not isinstance(size, int) or not 0 <= size <= MOST_BYTES:
        raise ValueError(
            f"{reprlib.repr(name)} is said to have {reprlib.repr(size)} bytes, and a golden's files have at most "
            f"{MOST_BYTES}"
        )
    return File(size_bytes=size, sha256=sha256)


def _metric(name: str, data: Any) -> Metric:
    unit = _text(data, "unit")
    value, n = data.get("value"), data.get("n")
    if not isinstance(value, (int, float)) or not isinstance(n, int):
        raise TypeError(f"the metric {reprlib.repr(name)} says {reprlib.repr(value)} (n {reprlib.repr(n)}), no numbers")
    return Metric(value=float(value), unit=unit, n=n)


def _sha256(data: Any, name: str) -> str:
    value = _text(data, name)
    if not _SHA256.fullmatch(value):
        raise ValueError(f"it says {reprlib.repr(value)} where its {name!r} must be 64 hexadecimal digits")
    return value


def _text(data: Any, name: str) -> str:
    value = data[name] if isinstance(data, Mapping) and name in data else None
    if not isinstance(value, str):
        raise TypeError(f"it says {reprlib.repr(value)} where its {name!r} must be a text")
    return value


def _table(data: Any, name: str) -> dict[str, Any]:
    value = data[name] if isinstance(data, Mapping) and name in data else None
    if not isinstance(value, dict):
        raise TypeError(f"it says {reprlib.repr(value)} where its {name!r} must be a table")
    return value


def _alike(left: Scalar, right: Scalar) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return metrics.same(left, right)
    return left == right


def _said(metric: Metric | None) -> str:
    return "nothing" if metric is None else f"{metric.value:.6g} {metric.unit} (n {metric.n})"
