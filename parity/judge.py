"""From recordings to verdicts: which recordings belong together, which checks judge them, by which limits.

Starts no engine itself: `collect` asks the recorder. Fresh recordings, stored ones and a golden's take the same way
through here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parity import checks, store
from parity import noise as noise_
from parity.config import Target, spread
from parity.errors import ConfigError, IncomparableError, RecordingError
from parity.noise import Noise
from parity.prompts import Workload
from parity.record import Recorder
from parity.recording import Recording
from parity.verdict import Outcome, Policy, Verdict

CHECKS = ("inputs", "shape", "greedy", "lockstep", "decode", "logic", "sampling")
RUN = "run.json"
_EXACT = ("greedy", "logic")
"""Checks for engines that compute the same function."""
_SIDES = ("reference", "candidate")
_SCORES_OF = {"noise": "reference", "candidate-scores": "reference", "reference-scores": "candidate"}
"""Recordings of scores, and whose tokens they score."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The recordings of one run by role, and what they are judged by.

    Roles: `reference` and `candidate` decode freely; `noise`, `candidate-scores` and `reference-scores` are scores of
    the other's tokens; `logic-reference` and `logic-candidate` are the two engines in float32, `sampled-reference` and
    `sampled-candidate` their sampled answers.
    directories: where each recording lies, by role, for the commands that reproduce a verdict.
    """

    recordings: Mapping[str, Recording]
    policy: Policy
    limits: Mapping[str, Mapping[str, Any]]
    directories: Mapping[str, Path]

    @property
    def reference(self) -> Recording:
        """The reference's own answers."""
        return self.recordings["reference"]

    @property
    def candidate(self) -> Recording:
        """The candidate's own answers."""
        return self.recordings["candidate"]

    @cached_property
    def noise(self) -> Noise | None:
        """What rounding does, from the noise engine's scores; None where there are none."""
        scores = self.recordings.get("noise")
        if scores is None:
            return None
        return noise_.measure(self.reference, scores, candidate_dtype=noise_.dtype_of(self.candidate))

    @property
    def checks(self) -> tuple[str, ...]:
        """The checks that this evidence suffices for."""
        return tuple(name for name in CHECKS if why_not(self, name) is None)


def roles_of(check: str) -> tuple[str, str]:
    """The two recordings a check looks at."""
    roles: tuple[str, str] = getattr(checks.load(check), "ROLES", _SIDES)
    return roles


def why_not(evidence: Evidence, check: str) -> str | None:
    """Why a check cannot be asked of this evidence, in one sentence; None if it can.

    Raises:
        ConfigError: If there is no such check.
    """
    if evidence.policy is Policy.QUANTIZED and check in _EXACT:
        return f"the {check} check refuses what the policy 'quantized' allows; lockstep and decode hold the budget"
    for role in roles_of(check):
        if role not in evidence.recordings:
            return (
                f"the {check} check needs the recording {role!r}, which this run does not have; `parity record` "
                "makes it where the target asks for it"
            )
    return None


def collect(target: Target, recorder: Recorder) -> Evidence:
    """Record a target's engines, one after the other.

    The reference's tokenizer decides the prompt token ids; everybody else is sent those. Then the noise engine and the
    candidate score the reference's tokens, and the reference scores the candidate's, on an even share of the prompts,
    which is doubled while the lock-step verdict is inconclusive.
    """
    # A wrong limit must not wait until hours of recording are over.
    for check, table in target.limits.items():
        _limits(checks.load(check).Limits, check, table, target.policy)
    jobs = {"reference": target.workload}
    if target.logic is not None and target.reference.dtype == "float32":
        jobs["logic-reference"] = target.logic
    if target.sampling is not None:
        jobs["sampled-reference"] = target.sampling
    found = recorder.record(target.reference, jobs)
    reference = found["reference"]
    workload = target.workload.with_prompt_token_ids({c.id: c.prompt_token_ids for c in reference.completions})
    sampled = {}
    if target.sampling is not None:
        ids = {c.id: c.prompt_token_ids for c in found["sampled-reference"].completions}
        sampled["sampled-candidate"] = target.sampling.with_prompt_token_ids(ids)
    prompts = target.lockstep.prompts
    while True:
        scored = forced(workload, reference, prompts)
        if target.noise is not None:
            # A calibration has scored every prompt of this very reference; a share of it would be less.
            whole = _scores(calibration_of(recorder.directory) / "noise", recorder.directory / "reference")
            asked = forced(workload, reference, len(workload.requests)) if whole else scored
            found |= recorder.record(target.noise, {"noise": asked})
        found |= recorder.record(target.candidate, {"candidate": workload, "candidate-scores": scored, **sampled})
        evidence = _sealed(target, recorder, found)
        more = min(2 * prompts, target.lockstep.most, len(workload.requests))
        if more <= prompts or judge(evidence, "lockstep").outcome is not Outcome.INCONCLUSIVE:
            break
        recorder.observer.note(f"lock step is inconclusive on {prompts} prompts; scoring {more}")
        prompts = more
    answers = forced(workload, found["candidate"], prompts)
    if answers.requests:
        found |= recorder.record(target.reference, {"reference-scores": answers})
    if target.logic is not None:
        found |= _logic(target, target.logic, recorder, found)
    return _sealed(target, recorder, found)


def calibration_of(directory: Path) -> Path:
    """Where the calibration of the target that records into `directory` is kept."""
    return directory.with_name(f"{directory.name}-calibration")


def forced(workload: Workload, answers: Recording, prompts: int) -> Workload:
    """The teacher-forced twin of an even share of the workload, with the tokens of these answers."""
    share = {r.id for r in spread(workload.requests, prompts)}
    tokens = {c.id: c.token_ids for c in answers.completions if c.id in share}
    return workload.forced(tokens_of=tokens, forced_from=answers.digest)


def _logic(
    target: Target, workload: Workload, recorder: Recorder, found: Mapping[str, Recording]
) -> dict[str, Recording]:
    """Both engines in float32: the reference answers, the candidate scores its tokens."""
    spec = replace(target.reference, dtype="float32")
    ours = found.get("logic-reference") or recorder.record(spec, {"logic-reference": workload})["logic-reference"]
    sent = workload.with_prompt_token_ids({c.id: c.prompt_token_ids for c in ours.completions})
    scored = forced(sent, ours, len(sent.requests))
    theirs = recorder.record(replace(target.candidate, dtype="float32"), {"logic-candidate": scored})
    return {"logic-reference": ours, **theirs}


def _sealed(target: Target, recorder: Recorder, found: Mapping[str, Recording]) -> Evidence:
    """Write down which recordings belong together, and by what they are judged."""
    run = {
        "target": target.name,
        "policy": target.policy.value,
        "limits": target.limits,
        "recordings": list(found),
    }
    with store.disk_errors_named(recorder.directory):
        (recorder.directory / RUN).write_text(json.dumps(run, indent=1, default=dict) + "\n", "utf-8")
    return Evidence(
        recordings=dict(found),
        policy=target.policy,
        limits=target.limits,
        directories={role: recorder.directory / role for role in found},
    )


def gather(directory: Path) -> Evidence:
    """Read the recordings of an earlier run.

    Raises:
        RecordingError: If the directory is not a run, or a recording is damaged.
    """
    path = directory / RUN
    if not path.is_file():
        raise RecordingError(
            f"{str(directory)!r} holds no finished run ({RUN} is missing); `parity record` and `pytest suites` make one"
        )
    roles, policy, limits = _run(path)
    if not set(_SIDES) <= set(roles):
        raise RecordingError(f"{str(path)!r} names no reference and candidate; record again")
    return _read({role: directory / role for role in roles}, policy, limits)


def pair(reference: Path, candidate: Path, *, noise: Path | None) -> Evidence:
    """Read two recordings; scores and limits of their run are used where both lie in one run's directory."""
    directories = {"reference": reference, "candidate": candidate}
    policy = Policy.EQUIVALENCE
    limits: Mapping[str, Mapping[str, Any]] = {}
    beside = reference.resolve().parent
    if (beside / RUN).is_file():
        roles, policy, limits = _run(beside / RUN)
        for role, side in _SCORES_OF.items():
            if role in roles and _scores(beside / role, directories[side]):
                directories[role] = beside / role
        if candidate.resolve().parent == beside:
            directories |= {role: beside / role for role in roles if role.startswith(("logic-", "sampled-"))}
        else:  # scores by the candidate of that run say nothing about another candidate
            directories.pop("candidate-scores", None)
    if noise is not None:
        directories["noise"] = noise
    return _read(directories, policy, limits)


def judge(evidence: Evidence, check: str) -> Verdict:
    """One check's verdict.

    Raises:
        ConfigError: If there is no such check, or its limits have an unknown key.
        IncomparableError: If the recordings must not be compared.
    """
    module = checks.load(check)
    roles = roles_of(check)
    if (reason := why_not(evidence, check)) is not None:
        raise IncomparableError(reason)
    verdict: Verdict = module.check(
        evidence.recordings[roles[0]],
        evidence.recordings[roles[1]],
        noise=evidence.noise,
        limits=_limits(module.Limits, check, evidence.limits.get(check, {}), evidence.policy),
    )
    return verdict


def _read(directories: Mapping[str, Path], policy: Policy, limits: Mapping[str, Mapping[str, Any]]) -> Evidence:
    return Evidence(
        recordings={role: store.read(path) for role, path in directories.items()},
        policy=policy,
        limits=limits,
        directories=directories,
    )


def _run(path: Path) -> tuple[list[str], Policy, Mapping[str, Mapping[str, Any]]]:
    """Roles, policy and limits of an earlier run."""
    try:
        run = json.loads(path.read_text("utf-8"))
        return list(run["recordings"]), Policy(run["policy"]), dict(run["limits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"{str(path)!r}, which holds the limits to judge by, is damaged; record again") from error


def _scores(scores: Path, answers: Path) -> bool:
    """Whether `scores` is of these answers' tokens, and not left over from another run.

    By the tokens themselves: an engine that is recorded again and answers the same has been scored already.
    """
    try:
        scored, own = store.read(scores), store.read(answers).by_id
    except RecordingError:
        return False
    return all(c.id in own and own[c.id].token_ids == c.token_ids for c in scored.completions)


def _limits(kind: type[Any], check: str, table: Mapping[str, Any], policy: Policy) -> Any:
    """A check's limits under a policy with the user's changes; a changed limit must say where it comes from."""
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
    defaults = kind.of(policy) if hasattr(kind, "of") else kind()
    return replace(defaults, **changes)
