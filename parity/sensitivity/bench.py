"""Runs every seeded fault and every harmless variation through the real engine, and tells how often each rule notices.

One reference recording and one measurement of the noise serve all cases; each case starts the candidate once in its
own precision and once in float32, and the reference scores what all of them decoded in one start. Prompt sets are drawn
anew from what was recorded. Everything recorded is kept and reused, so an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import collect, equivalence, hypotheses, judge, lockstep, models, stages
from parity import noise as noise_
from parity.checks import greedy
from parity.config import Target, limited_to
from parity.diagnose import Confidence
from parity.errors import ConfigError, ParityError
from parity.judge import Evidence
from parity.noise import Noise
from parity.prompts import Workload
from parity.record import Observer, Places, Recorder, Sequel
from parity.recording import Recording
from parity.sensitivity import peers
from parity.sensitivity.cases import Case, Kind, cases, chosen
from parity.verdict import Outcome, Verdict, worst

if TYPE_CHECKING:
    pass

SIZES = (16, 32, 48, 64)
_LOGIC_PROMPTS = 10
_HYPOTHESIS_PROMPTS = 24
_PEERS_AT = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the rules say of one case. Rates are shares of drawn prompt sets, by size, each rule in one stage.

    kl_nats, kl_ratio: KL divergence a token of the reference's tokens, and in units of the measured floor; decode_ratio
        the same of the tokens that the candidate decoded. NaN where the case was not run in 16 bits.
    lockstep, decode, greedy: sets that FAIL. caught: sets that fail any of the three. passes: sets that PASS all three.
    logic_nats2: largest half variance of a prompt in float32, scored or decoded.
    outcomes: of every check on all prompts. diagnosis, confidence: what is said to be wrong. right: whether that names
        what was planted; None where nothing was said with certainty or nothing could be asked.
    peers: sets that fail each peer's rule, at 48 prompts.
    """

    name: str
    kind: str
    kl_nats: float
    kl_ratio: float
    decode_ratio: float
    lockstep: Mapping[str, float]
    decode: Mapping[str, float]
    greedy: Mapping[str, float]
    caught: Mapping[str, float]
    passes: Mapping[str, float]
    logic_nats2: float
    outcomes: Mapping[str, str]
    diagnosis: str
    confidence: str
    right: bool | None
    peers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One target's bench: where it records, and what it draws."""

    target: Target
    directory: Path
    places: Places
    observer: Observer
    prompts: int = 64
    draws: int = 100
    seed: int = 7

    def run(self, names: Sequence[str] | None = None) -> tuple[Row, ...]:
        """Run the named cases (default: all); each row is on disk as soon as it is known.

        Raises:
            ConfigError: If a case does not exist, or the target has no noise engine.
            ParityError: If the reference or the noise engine cannot run; a case that cannot is left out and named.
        """
        if self.target.noise is None:
            raise ConfigError(f"target {self.target.name!r} has no noise engine; sensitivity needs a measured floor")
        model = models.provide(self.target.candidate.model, cache=self.places.models, report=self.observer.note)
        config = json.loads((model / "config.json").read_text("utf-8"))
        # Committed releases only: one that was locked here is under suspicion, not known to be harmless.
        known = cases(int(config["num_hidden_layers"]) // 2, self.target.candidate, self.places.locks[0])
        wanted = chosen(known, names)
        base = self._base()
        answered: dict[str, dict[str, Recording]] = {}
        for number, case in enumerate(wanted, start=1):
            self.observer.note(f"case {number} of {len(wanted)}: {case.name}")
            try:
                answered[case.name] = self._answers(case, base, model)
            except (ValueError, ParityError) as error:  # no place for this fault in this model or engine
                self.observer.note(f"{case.name}: left out ({error})")
        scored = self._decoded(base, wanted, answered)
        rows = []
        for case in wanted:
            if case.name in answered:
                rows.append(self._row(case, base, answered[case.name] | scored.get(case.name, {})))
                self._keep(rows)
        return tuple(rows)

    def _recorder(self, name: str) -> Recorder:
        return Recorder(directory=self.directory / name, places=self.places, observer=self.observer)

    def _base(self) -> Base:
        assert self.target.noise is not None, "run() has refused it"
        target = limited_to(self.target, self.prompts)
        short = limited_to(target, _LOGIC_PROMPTS).logic
        recorder = self._recorder("base")
        jobs: dict[str, Workload | Sequel] = {"reference": target.workload}
        if short is not None:
            jobs["logic-reference"] = short
        if target.sampling is not None:
            jobs["sampled-reference"] = target.sampling
        found = recorder.record(target.reference, jobs)
        reference = found["reference"]
        workload = collect.sent_as(target.workload, reference)
        forced = collect.forced(workload, reference, len(workload.requests))
        found |= recorder.record(self.target.noise, {"noise": forced})
        asked = hypotheses.workloads(collect.forced(workload, reference, _HYPOTHESIS_PROMPTS))
        found |= recorder.record(self.target.reference, asked)
        logic = stepwise = sampled = None
        if short is not None:
            stepwise = sent = collect.sent_as(short, found["logic-reference"])
            logic = collect.forced(sent, found["logic-reference"], len(sent.requests))
        if target.sampling is not None:
            sampled = collect.sent_as(target.sampling, found["sampled-reference"])
        return Base(found=found, workload=workload, forced=forced, logic=logic, stepwise=stepwise, sampled=sampled)

    def _answers(self, case: Case, base: Base, model: Path) -> dict[str, Recording]:
        """All that one case's engine is asked; a failure leaves nothing half done, since recordings are reused."""
        scratch = self.directory / "models"
        scratch.mkdir(parents=True, exist_ok=True)
        spec = case.change(replace(self.target.candidate, model=str(model)), scratch)
        recorder = self._recorder(case.slug)
        found: dict[str, Recording] = {}
        if case.in_16_bits:
            jobs: dict[str, Workload | Sequel] = {"candidate": base.workload, "candidate-scores": base.forced}
            if case.asks_requests and base.sampled is not None:
                jobs["sampled-candidate"] = base.sampled
            if case.asks_requests and self.target.contract:
                jobs |= collect.contract_jobs("candidate")
            found |= recorder.record(spec, jobs)
        if case.in_float32 and base.logic is not None and base.stepwise is not None:
            exact: dict[str, Workload | Sequel] = {"logic-candidate": base.logic}
            if case.kind in (Kind.HARMLESS, Kind.ENGINE):  # a changed model shows in scores already
                exact["stepwise-candidate"] = base.stepwise
            found |= recorder.record(replace(spec, dtype="float32"), exact)
        return found

    def _decoded(
        self, base: Base, wanted: Sequence[Case], answered: Mapping[str, Mapping[str, Recording]]
    ) -> dict[str, dict[str, Recording]]:
        """The reference scores the tokens that each case decoded: one start for all of them."""
        asked: dict[str, Workload | Sequel] = {}
        for case in wanted:
            for role, (theirs, workload) in {
                "reference-scores": ("candidate", base.workload),
                "stepwise-reference": ("stepwise-candidate", base.stepwise),
            }.items():
                own = answered.get(case.name, {}).get(theirs)
                if own is not None and workload is not None:
                    scored = collect.forced(workload, own, len(workload.requests))
                    if scored.requests:
                        asked[_decoded_name(case, role)] = scored
        found = self._recorder("decoded").record(self.target.reference, asked) if asked else {}
        return {
            case.name: {
                role: found[name]
                for role in ("reference-scores", "stepwise-reference")
                if (name := _decoded_name(case, role)) in found
            }
            for case in wanted
        }

    def _row(self, case: Case, base: Base, found: Mapping[str, Recording]) -> Row:
        evidence = self._evidence(base, found)
        verdicts = [v for check in evidence.checks if (v := _verdict(evidence, check)) is not None]
        by_name = {v.check: v for v in verdicts}
        said = judge.diagnosis(evidence, verdicts)
        certain = said is not None and said.confidence is not Confidence.NONE
        right = None
        if said is not None and certain and case.cause is not None:
            right = re.search(case.cause, said.sentence) is not None
        exact = [v.findings[0].candidate or 0.0 for name in ("logic", "stepwise") if (v := by_name.get(name))]
        return Row(
            name=case.name,
            kind=case.kind.value,
            logic_nats2=max(exact, default=float("nan")),
            outcomes={v.check: v.outcome.value for v in verdicts},
            diagnosis="" if said is None else said.sentence,
            confidence="" if said is None else said.confidence.value,
            right=right,
            **self._rates(evidence) if "candidate" in found else _NO_RATES,
        )

    def _evidence(self, base: Base, found: Mapping[str, Recording]) -> Evidence:
        recordings = {**base.found, **found}
        if "candidate" not in found:  # a case of float32 alone
            recordings = {
                role: r
                for role, r in recordings.items()
                if role.startswith(("logic-", "stepwise-")) or role == "reference"
            }
            recordings["candidate"] = found["logic-candidate"]
        return Evidence(recordings=recordings, policy=self.target.policy, limits=self.target.limits, directories={})

    def _rates(self, evidence: Evidence) -> dict[str, Any]:
        """How often each rule decides what, over drawn sets of prompts."""
        reference, scores = evidence.reference, evidence.recordings["candidate-scores"]
        noise = evidence.noise
        assert noise is not None, "run() has refused a target without a noise engine"
        assert noise.steps is not None, "measure fills it"
        floor = float(noise.steps.kl_nats.mean()) * noise.sides or equivalence.Limits().float32_nats
        steps = lockstep.measure(reference, scores)
        pair = _pair(reference, scores, noise, self.target)
        other = decoded = None
        if (theirs := evidence.recordings.get("reference-scores")) is not None:
            decoded = _pair(theirs, evidence.candidate, noise, self.target)
            other = float(decoded.steps.kl_nats.mean()) / floor
        draw = np.random.default_rng(self.seed)
        ids = steps.prompt_ids
        sets = {
            n: [draw.choice(len(ids), size=n, replace=False) for _ in range(self.draws)] for n in SIZES if n <= len(ids)
        }
        rates: dict[str, dict[str, float]] = {name: {} for name in ("lockstep", "decode", "greedy", "caught", "passes")}
        for size, drawn in sets.items():
            outcomes = [
                (
                    _outcome(pair, some),
                    Outcome.PASS if decoded is None else _outcome(decoded, some),
                    _greedy(reference, evidence.candidate, noise, some),
                )
                for some in ([ids[n] for n in one] for one in drawn)
            ]
            for column, name in enumerate(("lockstep", "decode", "greedy")):
                rates[name][str(size)] = float(np.mean([o[column] is Outcome.FAIL for o in outcomes]))
            rates["caught"][str(size)] = float(np.mean([worst(o) is Outcome.FAIL for o in outcomes]))
            rates["passes"][str(size)] = float(np.mean([worst(o) is Outcome.PASS for o in outcomes]))
        at = sets.get(_PEERS_AT) or next(iter(sets.values()))
        return {
            "kl_nats": float(steps.kl_nats.mean()),
            "kl_ratio": float(steps.kl_nats.mean()) / floor,
            "decode_ratio": float("nan") if other is None else other,
            **rates,
            "peers": peers.decisions(peers.Answers(reference=reference, candidate=evidence.candidate, steps=steps), at),
        }

    def _keep(self, rows: Sequence[Row]) -> None:
        """Rows of earlier runs stay; one measured again takes its old place."""
        path = self.directory / "rows.json"
        known = json.loads(path.read_text("utf-8")) if path.is_file() else []
        merged = {row["name"]: row for row in known} | {row.name: asdict(row) for row in rows}
        path.write_text(json.dumps(list(merged.values()), indent=1) + "\n", "utf-8")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all cases share: recordings by role, and what each case is asked."""

    found: Mapping[str, Recording]
    workload: Workload
    forced: Workload
    logic: Workload | None
    stepwise: Workload | None
    sampled: Workload | None

    @cached_property
    def reference(self) -> Recording:
        """The reference's own answers."""
        return self.found["reference"]


_NO_RATES: Mapping[str, Any] = {
    "kl_nats": float("nan"),
    "kl_ratio": float("nan"),
    "decode_ratio": float("nan"),
    **{name: {} for name in ("lockstep", "decode", "greedy", "caught", "passes", "peers")},
}


def _decoded_name(case: Case, role: str) -> str:
    return case.slug if role == "reference-scores" else f"{case.slug}-{role}"


def _verdict(evidence: Evidence, check: str) -> Verdict | None:
    try:
        return judge.judge(evidence, check)
    except ParityError:
        return None


def _pair(reference: Recording, candidate: Recording, noise: Noise, target: Target) -> equivalence.Pair:
    return equivalence.Pair(
        reference=reference,
        candidate=candidate,
        steps=lockstep.measure(reference, candidate),
        noise=noise,
        judged_sides=noise_.sixteen_bit_sides(reference, candidate),
        limits=equivalence.Limits.of(target.policy).at(stages.ONE_STAGE),
    )


def _outcome(pair: equivalence.Pair, ids: Sequence[str]) -> Outcome:
    noise = pair.noise
    assert noise is not None
    assert noise.steps is not None
    held = [i for i in ids if i in set(pair.steps.prompt_ids)]  # a prompt may have no answer to score
    some = replace(pair, steps=pair.steps.only(held), noise=replace(noise, steps=noise.steps.only(ids)))
    return worst([f.outcome for f in equivalence.findings(some)])


def _greedy(reference: Recording, candidate: Recording, noise: Noise, ids: Sequence[str]) -> Outcome:
    try:
        verdict = greedy.check(_part(reference, ids), _part(candidate, ids), noise=noise, limits=greedy.Limits())
    except ParityError:
        return Outcome.INCONCLUSIVE
    return verdict.outcome


def _part(recording: Recording, ids: Sequence[str]) -> Recording:
    workload = replace(recording.workload, request_ids=tuple(ids))
    return replace(recording, workload=workload, completions=tuple(recording.by_id[i] for i in ids))
