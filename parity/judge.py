"""From recordings to verdicts: which recordings belong together, which checks judge them, by which limits.

Starts no engine. Fresh recordings, stored ones and a golden's take the same way through here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from parity import checks, comparable, diagnose, hypotheses, known, lmeval, lockstep, stages, store
from parity import noise as noise_
from parity import recovery as recovery_
from parity.decision import Decision, decide
from parity.diagnose import Diagnosis
from parity.errors import ConfigError, GoldenMissingError, IncomparableError, ParityError, RecordingError
from parity.known import Known
from parity.noise import Noise
from parity.recording import Recording
from parity.recovery import Moved, Recovery
from parity.verdict import Outcome, Policy, Verdict

CHECKS = (
    "inputs",
    "contract",
    "shape",
    "greedy",
    "lockstep",
    "decode",
    "logic",
    "stepwise",
    "sampling",
    "determinism",
    "structured",
    "laws",
    "accuracy",
)
RUN = "run.json"
_HELD_BYTES = 1 << 29  # beside the recording that is asked for
_BY_NOISE = ("greedy", "lockstep", "decode", "determinism", "laws", "contract")
_EXACT = ("greedy", "logic", "stepwise")
"""Checks for engines that compute the same function."""
_SIDES = ("reference", "candidate")
_SCORES_OF = {"noise": "reference", "candidate-scores": "reference", "reference-scores": "candidate"}
"""Recordings of scores, and whose tokens they score."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The recordings of one run by role, and what they are judged by.

    Roles: `reference` and `candidate` decode freely; `noise`, `candidate-scores` and `reference-scores` are scores of
    the other's tokens; `logic-` and `stepwise-` are the two engines in float32, `sampled-` their sampled answers.
    `determinism-`, `structured-`, `contract-` and `laws-` are what one engine answered to questions about itself;
    `hypothesis-` are the reference's scores behind changed prompts; `accuracy-` the answers to the tasks' documents.
    directories: where each recording lies, by role, for the commands that reproduce a verdict.
    confirmation: the same on fresh prompts, where a check was flagged.
    golden: the candidate held against what was accepted, where the target asks for it; `no_golden` says why not.
    accepted: the reference is a golden's: its facts must match, and prompts of `known` divergences are left out.
    scored: where the samples of a side's documents lie, by role; a golden keeps them without their recording.
    no_accuracy: why answers to the documents could not be scored, where that is so: nothing else is kept from judging.
    """

    recordings: Mapping[str, Recording]
    policy: Policy
    limits: Mapping[str, Mapping[str, Any]]
    directories: Mapping[str, Path]
    confirmation: Evidence | None = None
    golden: Evidence | None = None
    no_golden: str = ""
    accepted: bool = False
    known: tuple[Known, ...] = ()
    scored: Mapping[str, Path] = field(default_factory=dict)
    no_accuracy: str = ""

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
    reference, candidate = roles_of(check)
    if _judges_samples(check):
        if evidence.no_accuracy or {reference, candidate} <= set(evidence.scored):
            return None
        if evidence.accepted and reference not in evidence.scored:
            return (
                f"the {check} check needs scored documents, and this golden holds none; accept a run of the target "
                f"that has them, with {check!r} in the target"
            )
        return (
            f"the {check} check needs scored documents, which this run does not have; add 'accuracy' to the target, or "
            "ask `parity eval`"
        )
    if evidence.policy is Policy.QUANTIZED and check in _EXACT:
        return f"the {check} check refuses what the policy 'quantized' allows; lockstep and decode hold the budget"
    alone = getattr(checks.load(check), "ALONE", False)
    for role in (candidate,) if alone else (reference, candidate):
        if role not in evidence.recordings:
            return (
                f"the {check} check needs the recording {role!r}, which this run does not have; `parity record` "
                "makes it where the target asks for it"
            )
    return None


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
    run = _run(path)
    if not set(_SIDES) <= set(run.roles):
        raise RecordingError(f"{str(path)!r} names no reference and candidate; record again")
    return _read({role: directory / role for role in run.roles}, run)


def target_of(directory: Path) -> str:
    """The name of the target that a run was recorded for.

    Raises:
        RecordingError: If the directory is not a run.
    """
    try:
        return str(json.loads((directory / RUN).read_text("utf-8"))["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(
            f"{str(directory)!r} holds no finished run ({RUN} is missing or damaged); `parity record` makes one"
        ) from error


def pair(reference: Path, candidate: Path, *, noise: Path | None) -> Evidence:
    """Read two recordings; scores and limits of their run are used where both lie in one run's directory."""
    directories = {"reference": reference, "candidate": candidate}
    run = _Run(roles=(), policy=Policy.EQUIVALENCE, limits={})
    beside = reference.resolve().parent
    if (beside / RUN).is_file():
        run = _run(beside / RUN)
        for role, side in _SCORES_OF.items():
            if role in run.roles and scores(beside / role, directories[side]):
                directories[role] = beside / role
        if candidate.resolve().parent == beside:
            directories |= {r: beside / r for r in run.roles if r not in _SCORES_OF and r not in _SIDES}
        else:  # what the candidate of that run said elsewhere says nothing about another candidate
            directories.pop("candidate-scores", None)
            run = replace(run, confirmation=None, scored={}, no_accuracy="")
    if noise is not None:
        directories["noise"] = noise
    return _read(directories, run)


def against_golden(evidence: Evidence) -> Evidence:
    """The candidate held against what was accepted.

    Raises:
        GoldenMissingError: If there is no such golden, or it cannot be used; says what to do.
    """
    if evidence.golden is None:
        raise GoldenMissingError(evidence.no_golden or "this run was not held against a golden; add 'golden = true'")
    return evidence.golden


def judge(evidence: Evidence, check: str) -> Verdict:
    """One check's verdict, in two stages where it rests on chance; see `parity.stages`.

    Raises:
        ConfigError: If there is no such check, or its limits have an unknown key.
        IncomparableError: If the recordings must not be compared.
    """
    if not _staged(evidence, check):
        return _ask(evidence, check, None)
    if evidence.accepted:
        return stages.against_golden(_ask(evidence, check, stages.GOLDEN))
    screened = _ask(evidence, check, stages.SCREEN)
    if screened.outcome is not Outcome.FAIL:
        return stages.settled(screened)
    decisive = _ask(evidence, check, stages.DECISIVE)
    if decisive.outcome is Outcome.FAIL:
        return stages.settled(decisive)
    if evidence.confirmation is None or why_not(evidence.confirmation, check) is not None:
        return stages.unconfirmed(_ask(evidence, check, stages.ONE_STAGE))
    return stages.combined(screened, _ask(evidence.confirmation, check, stages.CONFIRM))


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Everything that is to be said of one comparison.

    could_not: checks that could not judge, with the reason.
    """

    verdicts: tuple[Verdict, ...]
    could_not: Mapping[str, str]
    diagnosis: Diagnosis | None
    decision: Decision


def conclude(evidence: Evidence) -> Conclusion:
    """Every verdict that the evidence suffices for, the cause of what failed, and the decision."""
    verdicts: list[Verdict] = []
    could_not: dict[str, str] = {}
    for check in evidence.checks:
        try:
            verdicts.append(judge(evidence, check))
        except ParityError as error:  # noqa: PERF203  one that cannot judge must not keep the others from judging
            could_not[check] = str(error)
    return concluded(evidence, verdicts, could_not)


def concluded(evidence: Evidence, verdicts: Sequence[Verdict], could_not: Mapping[str, str]) -> Conclusion:
    """The cause and the decision, from verdicts that were given already."""
    found = diagnosis(evidence, verdicts)
    return Conclusion(
        verdicts=tuple(verdicts),
        could_not=could_not,
        diagnosis=found,
        decision=decide(verdicts, could_not=could_not, diagnosis=found),
    )


def recovery(evidence: Evidence) -> Recovery | None:
    """What the candidate keeps of the reference's accuracy, beside how far its distributions moved.

    None where no documents were scored, or they cannot be compared; whoever asks for that verdict is told why.
    """
    roles = roles_of("accuracy")
    if not set(roles) <= set(evidence.scored):
        return None
    try:
        limits = limits_of("accuracy", evidence.limits.get("accuracy", {}), evidence.policy)
        ours, theirs = (lmeval.load_samples(evidence.scored[role]) for role in roles)
        return recovery_.of(ours, theirs, tail=limits.alpha_pass, moved=_moved(evidence))
    except ParityError:
        return None


def _moved(evidence: Evidence) -> Moved | None:
    """None where lock step cannot be measured, which must not keep the table from being shown."""
    try:
        floor = None if evidence.noise is None else evidence.noise.floor_nats
        scores = evidence.recordings.get("candidate-scores")
        return None if scores is None else recovery_.moved(lockstep.measure(evidence.reference, scores), floor)
    except ParityError:
        return None


def flagged(evidence: Evidence) -> tuple[str, ...]:
    """The checks that screening flags and that only fresh prompts can decide."""
    found = []
    for check in evidence.checks:
        if not _staged(evidence, check):
            continue
        try:
            if _ask(evidence, check, stages.SCREEN).outcome is not Outcome.FAIL:
                continue
            if _ask(evidence, check, stages.DECISIVE).outcome is not Outcome.FAIL:
                found.append(check)
        except ParityError:
            continue  # could not judge; whoever asks for the verdict is told
    return tuple(found)


def diagnosis(evidence: Evidence, verdicts: Sequence[Verdict]) -> Diagnosis | None:
    """The most likely cause of what failed in these verdicts on this evidence; None where nothing did."""
    if not any(v.outcome is Outcome.FAIL for v in verdicts):
        return None  # without reading what only a failure needs
    return diagnose.most_likely(
        verdicts,
        reference=evidence.reference.fingerprint,
        candidate=evidence.candidate.fingerprint,
        supports=hypotheses.supports(evidence.recordings),
    )


def _staged(evidence: Evidence, check: str) -> bool:
    """Whether a check has rules of chance, whose error rates the user has left to us."""
    kind = checks.load(check).Limits
    return hasattr(kind, "at") and not set(kind.RATES) & set(evidence.limits.get(check, {}))


def _ask(evidence: Evidence, check: str, alpha: float | None) -> Verdict:
    """The verdict with every rule of chance at this error rate; None takes the rates as they are."""
    module = checks.load(check)
    if (reason := why_not(evidence, check)) is not None:
        raise IncomparableError(reason)
    limits = limits_of(check, evidence.limits.get(check, {}), evidence.policy)
    if _judges_samples(check):
        if not evidence.accepted:
            return _of_samples(evidence, check, limits)
        _require_facts_of_golden(evidence, check, evidence.reference, evidence.candidate)
        return _of_golden(evidence, _of_samples(evidence, check, limits))
    ours, theirs = (evidence.recordings.get(role) for role in roles_of(check))
    if evidence.accepted and ours is not None and theirs is not None:
        _require_facts_of_golden(evidence, check, ours, theirs)
        ours, theirs = (_without(recording, evidence.known) for recording in (ours, theirs))
    verdict: Verdict = module.check(
        ours, theirs, noise=evidence.noise, limits=limits if alpha is None else limits.at(alpha)
    )
    if check in _BY_NOISE:
        verdict = replace(verdict, basis=(_measured_by(evidence.noise),))
    return _of_golden(evidence, verdict) if evidence.accepted and ours is not None else verdict


def _require_facts_of_golden(evidence: Evidence, check: str, ours: Recording, theirs: Recording) -> None:
    required = getattr(checks.load(check), "REQUIRES", ())
    if evidence.policy is Policy.QUANTIZED:  # another quantization is other weights
        required = tuple(name for name in required if name != "model.weights_sha256")
    comparable.require_same_facts(ours, theirs, required)


def _judges_samples(check: str) -> bool:
    """Whether a check judges scored documents rather than recordings."""
    return hasattr(checks.load(check), "judge_tasks")


def _of_samples(evidence: Evidence, check: str, limits: Any) -> Verdict:
    if evidence.no_accuracy:
        raise IncomparableError(evidence.no_accuracy)
    found = {role: lmeval.load_samples(evidence.scored[role]) for role in roles_of(check)}
    for role in set(found) & set(evidence.directories):
        recording = store.read_header(evidence.directories[role])["digest"]
        if any(run.invocation["recording.digest"] != recording for run in found[role]):
            raise IncomparableError(
                f"the samples in {str(evidence.scored[role])!r} are not of the recording beside them; record again"
            )
    ours, theirs = found.values()
    verdict: Verdict = checks.load(check).judge_tasks(
        ours,
        theirs,
        limits=limits,
        label_reference=evidence.reference.label,
        label_candidate=evidence.candidate.label,
    )
    return verdict


def _without(recording: Recording, known: Sequence[Known]) -> Recording:
    """The recording without the prompts whose divergence is known and accepted."""
    ids = {line.id for line in known}
    if not ids & set(recording.by_id):
        return recording
    kept = tuple(c for c in recording.completions if c.id not in ids)
    workload = replace(recording.workload, request_ids=tuple(i for i in recording.workload.request_ids if i not in ids))
    return replace(recording, completions=kept, workload=workload)


def _of_golden(evidence: Evidence, verdict: Verdict) -> Verdict:
    """The verdict with its reference named as what it is, and what is known of it."""
    remarks = known.remarks(evidence.known, evidence.reference, evidence.candidate)
    name = f"the golden of {evidence.reference.created_at[:10]} ({verdict.reference})"
    return replace(verdict, reference=name, warnings=(*verdict.warnings, *remarks))


def _measured_by(noise: Noise | None) -> str:
    """The yardstick, and where it comes from."""
    floor = None if noise is None else noise.floor_nats
    if noise is None or noise.scores is None or floor is None:
        return "documented noise of one 135M model on a CPU; this target measures none"
    context = noise.scores.fingerprint.context
    where = context.get("gpu.0.name") or context.get("host.cpu", "unknown hardware")
    return (
        f"sigma {noise.sigma_nats:.3g} nats and a KL floor of {floor:.3g} nats a token, measured on {noise.positions} "
        f"positions of {noise.prompts} prompts ({noise.source}, {where}, {noise.scores.created_at})"
    )


class _Stored(Mapping[str, Recording]):
    """Recordings by role, read when they are asked for; of large ones only the latest stay in memory.

    What somebody still holds is not read a second time.
    """

    def __init__(self, directories: Mapping[str, Path]) -> None:
        for path in directories.values():
            store.read_header(path)  # what is missing or newer is told at once
        self._directories = dict(directories)
        self._held: dict[str, Recording] = {}
        self._alive: WeakValueDictionary[str, Recording] = WeakValueDictionary()

    def __getitem__(self, role: str) -> Recording:
        found = self._held.pop(role, None) or self._alive.get(role)
        # Before reading: afterwards one more than is needed would have been in memory.
        while sum(map(_bytes_of, self._held.values())) > _HELD_BYTES:
            self._held.pop(next(iter(self._held)))
        if found is None:
            found = store.read(self._directories[role])
        self._held[role] = self._alive[role] = found  # the latest last
        return found

    def __contains__(self, role: object) -> bool:
        return role in self._directories

    def __iter__(self) -> Iterator[str]:
        return iter(self._directories)

    def __len__(self) -> int:
        return len(self._directories)


def _bytes_of(recording: Recording) -> int:
    """What its log-probabilities take, which is nearly everything."""
    return sum(c.logprobs.top.nbytes * 2 for c in recording.completions if c.logprobs is not None)


def _read(directories: Mapping[str, Path], run: _Run) -> Evidence:
    return Evidence(
        recordings=_Stored(directories),
        policy=run.policy,
        limits=run.limits,
        directories=directories,
        confirmation=None if run.confirmation is None else gather(run.confirmation),
        golden=None if run.golden is None else gather(run.golden),
        no_golden=run.no_golden,
        accepted=run.accepted,
        known=run.known,
        scored=run.scored,
        no_accuracy=run.no_accuracy,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What an earlier run wrote down beside its recordings."""

    roles: tuple[str, ...]
    policy: Policy
    limits: Mapping[str, Mapping[str, Any]]
    confirmation: Path | None = None
    golden: Path | None = None
    no_golden: str = ""
    accepted: bool = False
    known: tuple[Known, ...] = ()
    scored: Mapping[str, Path] = field(default_factory=dict)
    no_accuracy: str = ""


def _run(path: Path) -> _Run:
    try:
        run = json.loads(path.read_text("utf-8"))
        roles = tuple(run["recordings"])
        confirmation, golden = (  # older runs have neither
            None if run.get(key) is None else path.parent / str(run[key]) for key in ("confirmation", "golden")
        )
        return _Run(
            roles=roles,
            policy=Policy(run["policy"]),
            limits=dict(run["limits"]),
            confirmation=confirmation,
            golden=golden,
            no_golden=str(run.get("no_golden", "")),
            accepted=bool(run.get("accepted", False)),
            known=known.from_json(run.get("known", [])),
            scored={str(role): path.parent / str(role) for role in run.get("scored", [])},
            no_accuracy=str(run.get("no_accuracy", "")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"{str(path)!r}, which holds the limits to judge by, is damaged; record again") from error


def scores(directory: Path, answers: Path) -> bool:
    """Whether `directory` holds scores of these answers' tokens, and not some left over from another run.

    By the tokens themselves: an engine that is recorded again and answers the same has been scored already.
    """
    try:
        scored, own = store.read_token_ids(directory), store.read_token_ids(answers)
    except RecordingError:
        return False
    return all(own.get(id_) == token_ids for id_, token_ids in scored.items())


def limits_of(check: str, table: Mapping[str, Any], policy: Policy) -> Any:
    """A check's limits under a policy with the user's changes; a changed limit must say where it comes from.

    Raises:
        ConfigError: If a key is unknown, a value is no number, or no source is named.
    """
    kind = checks.load(check).Limits
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
