"""From recordings to verdicts: which recordings belong together, which checks judge them, by which limits.

Starts no engine itself: `collect` asks the recorder. Fresh recordings, stored ones and a golden's take the same way
through here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from parity import checks, store
from parity import noise as noise_
from parity.config import Target, spread
from parity.errors import ConfigError, RecordingError
from parity.noise import Noise
from parity.record import Recorder
from parity.recording import Recording
from parity.verdict import Verdict

CHECKS = ("inputs", "greedy")
RUN = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The recordings of one run, and the limits they are judged by.

    directories: where each recording lies, by role, for the commands that reproduce a verdict.
    """

    reference: Recording
    candidate: Recording
    noise: Recording | None
    limits: Mapping[str, Mapping[str, Any]]
    directories: Mapping[str, Path]


def collect(target: Target, recorder: Recorder) -> Evidence:
    """Record a target's engines, one after the other, each started at most once.

    The reference's tokenizer decides the prompt token ids; everybody else is sent those. The noise engine scores the
    reference's tokens on an even share of the prompts.
    """
    # A wrong limit must not wait until hours of recording are over.
    for check, table in target.limits.items():
        _limits(checks.load(check).Limits, check, table)
    reference = recorder.record(target.reference, {"reference": target.workload})["reference"]
    workload = target.workload.with_prompt_token_ids({c.id: c.prompt_token_ids for c in reference.completions})
    noise = None
    if target.noise is not None:
        share = {r.id for r in spread(workload.requests, target.noise.prompts)}
        tokens = {c.id: c.token_ids for c in reference.completions if c.id in share}
        forced = workload.forced(tokens_of=tokens, forced_from=reference.digest)
        noise = recorder.record(target.noise.engine, {"noise": forced})["noise"]
    candidate = recorder.record(target.candidate, {"candidate": workload})["candidate"]
    roles = ("reference", "candidate") + (("noise",) if noise is not None else ())
    run = {"target": target.name, "policy": target.policy.value, "limits": target.limits, "recordings": roles}
    with store.disk_errors_named(recorder.directory):
        (recorder.directory / RUN).write_text(json.dumps(run, indent=1, default=dict) + "\n", "utf-8")
    return Evidence(
        reference=reference,
        candidate=candidate,
        noise=noise,
        limits=target.limits,
        directories={role: recorder.directory / role for role in roles},
    )


def gather(directory: Path) -> Evidence:
    """Read the recordings of an earlier run.

    Raises:
        RecordingError: If the directory is not a run, or a recording is damaged.
    """
    path = directory / RUN
    try:
        run = json.loads(path.read_text("utf-8"))
        directories = {role: directory / role for role in run["recordings"]}
        limits = run["limits"]
    except (OSError, ValueError, KeyError, TypeError):
        directories, limits = {}, {}
    if not {"reference", "candidate"} <= set(directories):
        raise RecordingError(
            f"{str(directory)!r} holds no finished run ({RUN} {'is missing' if not path.exists() else 'is damaged'}); "
            "`parity record` and `pytest suites` make one"
        )
    return _read(directories, limits)


def pair(reference: Path, candidate: Path, *, noise: Path | None) -> Evidence:
    """Read two recordings; the noise and limits of their run are used where both lie in one run's directory."""
    directories = {"reference": reference, "candidate": candidate}
    limits: Mapping[str, Mapping[str, Any]] = {}
    beside = reference.resolve().parent
    if (beside / RUN).is_file():
        limits = _limits_of(beside / RUN)
    if noise is None and _scores(beside / "noise", reference):
        noise = beside / "noise"
    if noise is not None:
        directories["noise"] = noise
    return _read(directories, limits)


def judge(evidence: Evidence, check: str) -> Verdict:
    """One check's verdict.

    Raises:
        ConfigError: If there is no such check, or its limits have an unknown key.
        IncomparableError: If the recordings must not be compared.
    """
    module = checks.load(check)
    verdict: Verdict = module.check(
        evidence.reference,
        evidence.candidate,
        noise=_noise(evidence),
        limits=_limits(module.Limits, check, evidence.limits.get(check, {})),
    )
    return verdict


def _read(directories: Mapping[str, Path], limits: Mapping[str, Mapping[str, Any]]) -> Evidence:
    recordings = {role: store.read(path) for role, path in directories.items()}
    return Evidence(
        reference=recordings["reference"],
        candidate=recordings["candidate"],
        noise=recordings.get("noise"),
        limits=limits,
        directories=directories,
    )


def _limits_of(run: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        limits: Mapping[str, Mapping[str, Any]] = json.loads(run.read_text("utf-8"))["limits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"{str(run)!r}, which holds the limits to judge by, is damaged; record again") from error
    return limits


def _scores(noise: Path, reference: Path) -> bool:
    """Whether `noise` is a recording of the reference's tokens, and not left over from another run."""
    try:
        forced_from = store.read_header(noise)["workload"]["forced_from"]
        return bool(forced_from == store.read_header(reference)["digest"])
    except RecordingError:
        return False


def _noise(evidence: Evidence) -> Noise | None:
    if evidence.noise is None:
        return None
    return noise_.measure(evidence.reference, evidence.noise, candidate_dtype=noise_.dtype_of(evidence.candidate))


def _limits(kind: type[Any], check: str, table: Mapping[str, Any]) -> Any:
    """A check's limits with the user's changes; a changed limit must say where it comes from."""
    changes = {key: value for key, value in table.items() if key != "source"}
    valid = [f.name for f in fields(kind)]
    for key in changes:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"
            raise ConfigError(f"limits.{check}: unknown key {key!r}; {hint}")
    if changes and not table.get("source"):
        raise ConfigError(
            f"limits.{check} changes {', '.join(changes)} and names no 'source'; say where they come from"
        )
    for key, value in changes.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"limits.{check}: {key!r} must be a number, not {value!r}")
    return kind(**changes)
