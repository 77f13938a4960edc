"""From a target to the recordings that its checks need: who answers what, and who scores whose tokens.

Each engine is started as rarely as possible: a side answers everything that can be asked of it in one start. What is
recorded and by what it will be judged is written down beside the recordings, so that `judge` can do it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from parity import accuracy, hypotheses, judge, known, lmeval, models, probes, properties, store, tensors
from parity.accuracy import Questions
from parity.checks import determinism
from parity.config import Target, spread
from parity.engines import EngineSpec
from parity.errors import IncomparableError, ParityError
from parity.golden import Golden, Shelf
from parity.judge import Evidence
from parity.known import Known
from parity.prompts import Workload
from parity.record import Recorder, Sequel
from parity.recording import Recording
from parity.verdict import Outcome, Policy

_CONFIRM = "confirm"
_GOLDEN = "golden"
_GOLDEN_SCORES = "golden-scores"
_HARDWARE = ("host.cpu", "gpu.0.name")
_FRESH_SEEDS = 100_000
_HYPOTHESIS_PROMPTS = 24


def collect(target: Target, recorder: Recorder, shelf: Shelf | None = None) -> Evidence:
    """Record a target's engines, one after the other, and once more on fresh prompts what chance may have flagged.

    shelf: where the golden is that the candidate is also held against, where the target asks for that. A golden that
        is missing or damaged keeps nothing from being recorded; whoever asks for its verdict is told.

    Raises:
        ConfigError: If a limit of the target is wrong; before anything is recorded.
        ParityError: If an engine cannot run, or the disk is full.
    """
    # A wrong limit must not wait until hours of recording are over.
    for check, table in target.limits.items():
        judge.limits_of(check, table, target.policy)
    accepted, why_not = _accepted(target, shelf)
    questions = _questions(target, recorder)  # a wrong task, too
    evidence = _recorded(target, recorder, accepted, questions)
    flagged = judge.flagged(evidence)
    confirmation = None
    if flagged and target.confirm is not None:
        recorder.observer.note(
            f"{', '.join(flagged)} flagged at the screening rate; recording fresh prompts to confirm"
        )
        fresh = replace(recorder, directory=recorder.directory / _CONFIRM)
        confirmation = _recorded(_fresh(target, flagged), fresh, None, None)
    golden = None
    if accepted is not None and shelf is not None:
        held = {role: evidence.recordings[role] for role in ("candidate", _GOLDEN_SCORES)}
        golden = _held_against(target, recorder, accepted, shelf, held, evidence.scored.get(accuracy.CANDIDATE))
    elif why_not:
        recorder.observer.note(why_not)
    return _sealed(
        target,
        recorder,
        evidence.recordings,
        scored=evidence.scored,
        no_accuracy=evidence.no_accuracy,
        confirmation=confirmation,
        golden=golden,
        no_golden=why_not,
    )


def against_golden(target: Target, recorder: Recorder, shelf: Shelf) -> Evidence:
    """Record a target's candidate alone and hold it against the golden: the engine that answered is not needed.

    Raises:
        GoldenMissingError, RecordingError: If there is no such golden, or it is damaged.
        IncomparableError: If it was accepted on another workload.
        ParityError: If the engine cannot run.
    """
    accepted = shelf.read(target.name)
    answers = accepted.recording("reference")
    _require_same_question(target, answers)
    known.read(shelf.root / known.FILE)  # a wrong line must not wait until everything is recorded
    workload = sent_as(target.workload, answers)
    asked: dict[str, Workload | Sequel] = {"candidate": workload, **_of_one_engine(target, "candidate", {})}
    asked[_GOLDEN_SCORES] = _golden_tokens(target, accepted)
    questions = None if accepted.samples is None else _questions(target, recorder)
    if questions is not None:
        asked[accuracy.CANDIDATE] = questions.workload
    found = recorder.record(target.candidate, asked)
    answered = found.pop(accuracy.CANDIDATE, None)
    scored = None
    if questions is not None and answered is not None:
        scored = recorder.directory / accuracy.CANDIDATE
        questions.score(answered, scored)
    return _held_against(target, recorder, accepted, shelf, found, scored)


def _questions(target: Target, recorder: Recorder) -> Questions | None:
    """The documents of the target's tasks, where it names some."""
    if target.accuracy is None:
        return None
    model = models.provide(target.reference.model, cache=recorder.places.models, report=recorder.observer.note)
    return Questions.of(target.accuracy, model)


def _accepted(target: Target, shelf: Shelf | None) -> tuple[Golden | None, str]:
    """The golden to hold the candidate against, or why there is none."""
    if not target.golden or shelf is None:
        return None, ""
    try:
        found = shelf.read(target.name)
        _require_same_question(target, found.recording("reference"))
        known.read(shelf.root / known.FILE)
    except ParityError as error:
        return None, str(error)
    return found, ""


def _require_same_question(target: Target, answers: Recording) -> None:
    if answers.workload.digest != target.workload.digest:
        raise IncomparableError(
            f"the golden of {target.name!r} was accepted on other prompts or sampling (workload "
            f"{answers.workload.name!r}, {len(answers.completions)} prompts, {answers.workload.digest[:12]}; now "
            f"{target.workload.name!r}, {len(target.workload.requests)} prompts, {target.workload.digest[:12]}); "
            "record the whole target and accept it anew"
        )


def _golden_tokens(target: Target, accepted: Golden) -> Workload:
    """The golden's tokens, to be scored: where its arbiter has scored them, else on an even share of the prompts."""
    answers = accepted.recording("reference")
    workload = sent_as(target.workload, answers)
    if "noise" not in accepted.directories:
        return forced(workload, answers, target.lockstep.prompts)
    scored = {c.id for c in accepted.recording("noise").completions}
    tokens = {c.id: c.token_ids for c in answers.completions if c.id in scored}
    return workload.forced(tokens_of=tokens, forced_from=answers.digest)


def _held_against(
    target: Target,
    recorder: Recorder,
    accepted: Golden,
    shelf: Shelf,
    found: Mapping[str, Recording],
    samples: Path | None,
) -> Evidence:
    """A run of its own beside the target's: the golden's recordings and copies of what is held against them."""
    directory = recorder.directory / _GOLDEN
    recordings = {**{role: accepted.recording(role) for role in accepted.directories}, **found}
    recordings["candidate-scores"] = recordings.pop(_GOLDEN_SCORES)
    lines = tuple(
        line for line in known.read(shelf.root / known.FILE) if line.concerns(target.name, found["candidate"])
    )
    with store.disk_errors_named(directory):
        for role in recordings:
            own = recorder.directory / (_GOLDEN_SCORES if role == "candidate-scores" else role)
            store.copy(accepted.directories.get(role, own), directory / role)
        scored = {}
        for role, source in ((accuracy.REFERENCE, accepted.samples), (accuracy.CANDIDATE, samples)):
            if source is not None:
                scored[role] = lmeval.copy_samples(source, directory / role)
    limits = {**accepted.learned_limits(), **target.limits}  # what the user has set wins
    return _sealed(
        replace(target, policy=_policy_of(target, recordings["reference"], found["candidate"]), limits=limits),
        replace(recorder, directory=directory),
        recordings,
        scored=scored,
        accepted=True,
        known_lines=lines,
    )


def _policy_of(target: Target, golden: Recording, candidate: Recording) -> Policy:
    """On the hardware it was accepted on, the candidate must also be as close to float32 as the golden is (R3g).

    Elsewhere other kernels run, whose distance is their own.
    """
    if target.policy is Policy.QUANTIZED:
        return target.policy
    same = all(golden.fingerprint.context.get(name) == candidate.fingerprint.context.get(name) for name in _HARDWARE)
    return Policy.IDENTITY if same else Policy.EQUIVALENCE


def calibration_of(directory: Path) -> Path:
    """Where the calibration of the target that records into `directory` is kept."""
    return directory.with_name(f"{directory.name}-calibration")


def forced(workload: Workload, answers: Recording, prompts: int) -> Workload:
    """The teacher-forced twin of an even share of the workload, with the tokens of these answers."""
    share = {r.id for r in spread(workload.requests, prompts)}
    tokens = {c.id: c.token_ids for c in answers.completions if c.id in share}
    return workload.forced(tokens_of=tokens, forced_from=answers.digest)


def _fresh(target: Target, flagged: tuple[str, ...]) -> Target:
    """The same target on prompts that no rule has seen, and sampling by other seeds; nothing that only laws judge."""
    assert target.confirm is not None, "the caller has seen to it"
    sampling = target.sampling if "sampling" in flagged else None
    if sampling is not None:
        again = tuple(
            replace(r, sampling=replace(r.sampling, seed=(r.sampling.seed or 0) + _FRESH_SEEDS))
            for r in sampling.requests
        )
        sampling = replace(sampling, requests=again)
    return replace(
        target,
        workload=target.confirm,
        lockstep=replace(target.lockstep, prompts=len(target.confirm.requests)),
        sampling=sampling,
        logic=None,
        determinism=None,
        structured=None,
        contract=False,
        laws=None,
        accuracy=None,
        performance=None,
        confirm=None,
    )


def _recorded(target: Target, recorder: Recorder, accepted: Golden | None, questions: Questions | None) -> Evidence:
    """The reference's tokenizer decides the prompt token ids; everybody else is sent those.

    Then the noise engine and the candidate score the reference's tokens, and the reference scores the candidate's, on
    an even share of the prompts, which is doubled while the lock-step verdict is inconclusive.
    """
    jobs: dict[str, Workload | Sequel] = {"reference": target.workload}
    if target.logic is not None and target.reference.dtype == "float32" and target.logic_layers is None:
        jobs["logic-reference"] = target.logic
    if target.sampling is not None:
        jobs["sampled-reference"] = target.sampling
    if questions is not None:
        jobs[accuracy.REFERENCE] = questions.workload
    found = recorder.record(target.reference, {**jobs, **_of_one_engine(target, "reference", {})})
    reference = found["reference"]
    workload = sent_as(target.workload, reference)
    asked: dict[str, Workload | Sequel] = {"candidate": workload}
    if target.sampling is not None:
        asked["sampled-candidate"] = sent_as(target.sampling, found["sampled-reference"])
    asked |= _of_one_engine(target, "candidate", found)
    if questions is not None:
        asked[accuracy.CANDIDATE] = questions.workload
    if accepted is not None:
        asked[_GOLDEN_SCORES] = _golden_tokens(target, accepted)
    prompts = target.lockstep.prompts
    while True:
        scored = forced(workload, reference, prompts)
        if target.noise is not None:
            # A calibration has scored every prompt of this very reference; a share of it would be less.
            whole = judge.scores(calibration_of(recorder.directory) / "noise", recorder.directory / "reference")
            wanted = forced(workload, reference, len(workload.requests)) if whole else scored
            found |= recorder.record(target.noise, {"noise": wanted})
        found |= recorder.record(target.candidate, {**asked, "candidate-scores": scored})
        samples, unscored = _scored(questions, recorder, found)
        evidence = _sealed(target, recorder, found, scored=samples, no_accuracy=unscored)
        more = min(2 * prompts, target.lockstep.most, len(workload.requests))
        if more <= prompts or _lockstep(evidence) is not Outcome.INCONCLUSIVE:
            break
        recorder.observer.note(f"lock step is inconclusive on {prompts} prompts; scoring {more}")
        prompts = more
    answers = forced(workload, found["candidate"], prompts)
    if answers.requests:
        found |= recorder.record(target.reference, {"reference-scores": answers})
    if target.logic is not None:
        found |= _logic(target, target.logic, recorder, found)
    evidence = _sealed(target, recorder, found, scored=samples, no_accuracy=unscored)
    if _lockstep(evidence) is not Outcome.FAIL:
        return evidence
    recorder.observer.note("lock step fails; asking the reference whether other prompts would explain it")
    scored = forced(workload, reference, _HYPOTHESIS_PROMPTS)
    found |= recorder.record(target.reference, hypotheses.workloads(scored))
    return _sealed(target, recorder, found, scored=samples, no_accuracy=unscored)


def _scored(
    questions: Questions | None, recorder: Recorder, found: Mapping[str, Recording]
) -> tuple[dict[str, Path], str]:
    """Both sides' answers as samples, beside their recordings, or why they cannot be scored."""
    if questions is None:
        return {}, ""
    scored = {role: recorder.directory / role for role in (accuracy.REFERENCE, accuracy.CANDIDATE)}
    try:
        for role, directory in scored.items():
            questions.score(found[role], directory)
    except ParityError as error:  # what else was recorded can be judged all the same
        return {}, str(error)
    return scored, ""


def _lockstep(evidence: Evidence) -> Outcome | None:
    """What lock step says so far; None where it cannot judge, which must not keep the other checks from judging."""
    try:
        return judge.judge(evidence, "lockstep").outcome
    except ParityError:
        return None


def sent_as(workload: Workload, answered: Recording) -> Workload:
    """The workload with the prompt token ids that an engine has worked on."""
    return workload.with_prompt_token_ids({c.id: c.prompt_token_ids for c in answered.completions})


def _of_one_engine(target: Target, side: str, found: Mapping[str, Recording]) -> dict[str, Workload | Sequel]:
    """What is asked of one engine by itself; what the engine says of itself decides how much of it can be asked."""

    def can(done: Mapping[str, Recording], what: str) -> bool:
        return done[side].fingerprint.context.get(f"engine.can_{what}") is True

    jobs: dict[str, Workload | Sequel] = {}
    if (repeated := target.determinism) is not None:
        # The twins of the reference begin with the very requests, so they hold the ids that the candidate is sent.
        known = found.get("determinism-reference")
        sent = (
            repeated
            if known is None
            else repeated.with_prompt_token_ids({r.id: known.by_id[r.id].prompt_token_ids for r in repeated.requests})
        )
        jobs[f"determinism-{side}"] = lambda done: determinism.twins(sent, can_reuse_prefix=can(done, "reuse_prefix"))
    if (grammars := target.structured) is not None:
        jobs[f"structured-{side}"] = lambda done: grammars if can(done, "structure") else None
    if target.contract:
        jobs |= contract_jobs(side)
    if (laws := target.laws) is not None and side == "candidate":
        examples = properties.draw(laws.examples, laws.seed)
        jobs[f"laws-{side}"] = lambda done: properties.workload(examples, can_stream=can(done, "stream"))
    return jobs


def contract_jobs(side: str) -> dict[str, Workload | Sequel]:
    """The probes of one engine: base questions, and experiments made from the answers."""
    return {
        f"contract-first-{side}": probes.first(),
        f"contract-{side}": lambda done: probes.second(done[f"contract-first-{side}"]),
    }


def _logic(
    target: Target, workload: Workload, recorder: Recorder, found: Mapping[str, Recording]
) -> dict[str, Recording]:
    """Both engines in float32: each answers, the other scores its tokens."""
    ours = found.get("logic-reference")
    if ours is None:
        spec = _in_float32(target.reference, target, recorder)
        ours = recorder.record(spec, {"logic-reference": workload})["logic-reference"]
    sent = sent_as(workload, ours)
    scored = forced(sent, ours, len(sent.requests))
    asked = {"logic-candidate": scored, "stepwise-candidate": sent}
    theirs = recorder.record(_in_float32(target.candidate, target, recorder), asked)
    decoded = forced(sent, theirs["stepwise-candidate"], len(sent.requests))
    spec = _in_float32(target.reference, target, recorder)
    return {"logic-reference": ours, **theirs, **recorder.record(spec, {"stepwise-reference": decoded})}


def _in_float32(spec: EngineSpec, target: Target, recorder: Recorder) -> EngineSpec:
    """A side in float32, on a copy of its model with fewer layers where the target asks for that."""
    if target.logic_layers is None:
        return replace(spec, dtype="float32")
    cache = recorder.places.models
    whole = models.provide(spec.model, cache=cache, report=recorder.observer.note)
    return replace(spec, dtype="float32", model=str(tensors.first_layers(whole, target.logic_layers, cache=cache)))


def _sealed(  # noqa: PLR0913  what belongs to a run
    target: Target,
    recorder: Recorder,
    found: Mapping[str, Recording],
    *,
    scored: Mapping[str, Path] | None = None,
    no_accuracy: str = "",
    confirmation: Evidence | None = None,
    golden: Evidence | None = None,
    no_golden: str = "",
    accepted: bool = False,
    known_lines: tuple[Known, ...] = (),
) -> Evidence:
    """Write down which recordings belong together, and by what they are judged."""
    run = {
        "target": target.name,
        "policy": target.policy.value,
        "limits": target.limits,
        "recordings": list(found),
        "scored": list(scored or {}),
        "no_accuracy": no_accuracy,
        "confirmation": None if confirmation is None else _CONFIRM,
        "golden": None if golden is None else _GOLDEN,
        "no_golden": no_golden,
        "accepted": accepted,
        "known": known.to_json(known_lines),
    }
    with store.disk_errors_named(recorder.directory):
        recorder.directory.mkdir(parents=True, exist_ok=True)
        store.write_whole(recorder.directory / judge.RUN, json.dumps(run, indent=1, default=dict) + "\n")
    return Evidence(
        recordings=dict(found),
        policy=target.policy,
        limits=target.limits,
        directories={role: recorder.directory / role for role in found},
        confirmation=confirmation,
        golden=golden,
        no_golden=no_golden,
        accepted=accepted,
        known=known_lines,
        scored=dict(scored or {}),
        no_accuracy=no_accuracy,
    )
