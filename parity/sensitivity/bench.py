"""Runs every seeded fault and every harmless variation through the real engine, and tells how often each rule notices.

One reference recording and one measurement of the noise serve all cases; each case starts the candidate twice (its own
precision, float32). Prompt sets are drawn anew from what was recorded. Everything recorded is kept and reused, so an
interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import equivalence, lockstep, models
from parity import noise as noise_
from parity.checks import greedy, logic
from parity.config import Target, limited_to
from parity.engines import EngineSpec
from parity.errors import ConfigError, ParityError
from parity.noise import Noise
from parity.prompts import Workload
from parity.record import Observer, Places, Recorder
from parity.recording import Recording
from parity.sensitivity import model_faults, peers
from parity.verdict import Outcome, worst

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZES = (16, 32, 48, 64)
_LOGIC_PROMPTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One changed candidate. fault: something that must be noticed, unless rounding hides it; else harmless."""

    name: str
    fault: bool
    computes_otherwise: bool
    candidate: Callable[[EngineSpec, Path], EngineSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the rules say of one case.

    kl_ratio: KL divergence in units of the measured floor. lockstep, lockstep_pass, greedy: share of drawn prompt sets
    that FAIL (PASS), by size. logic: largest half variance of a prompt in float32. peers: share that fail, at 48.
    """

    name: str
    fault: bool
    computes_otherwise: bool
    kl_nats: float
    kl_ratio: float
    lockstep: Mapping[str, float]
    lockstep_pass: Mapping[str, float]
    greedy: Mapping[str, float]
    logic_outcome: str
    logic_nats2: float
    peers: Mapping[str, float]


def cases(layer: int) -> tuple[Case, ...]:
    """Harmless variations first, then the seeded faults of `model_faults`."""

    def options(**changes: object) -> Callable[[EngineSpec, Path], EngineSpec]:
        return lambda spec, _: replace(spec, options={**spec.options, **changes})

    def planted(fault: model_faults.Fault) -> Callable[[EngineSpec, Path], EngineSpec]:
        def spoilt(spec: EngineSpec, scratch: Path) -> EngineSpec:
            target = scratch / _slug(fault.name)
            if not target.is_dir():
                fault.plant(Path(spec.model), target)
            return replace(spec, model=str(target))

        return spoilt

    def in_vllm(**changes: object) -> Callable[[EngineSpec, Path], EngineSpec]:
        def spoilt(spec: EngineSpec, _: Path) -> EngineSpec:
            if spec.engine != "vllm":
                raise ValueError(f"this fault is planted in vllm, and the candidate is {spec.engine_label}")
            engine = str(Path(__file__).with_name("vllm_faults.py")) if "fault" in changes else spec.engine
            return replace(spec, engine=engine, options={**spec.options, **changes})

        return spoilt

    running: tuple[tuple[str, Callable[[EngineSpec, Path], EngineSpec]], ...] = (
        ("gelu for silu", in_vllm(fault="gelu for silu")),
        ("logit bias 0.05", in_vllm(fault="logit bias 0.05")),
        ("KV cache fp8", in_vllm(kv_cache_dtype="fp8")),
        ("sliding window 64", in_vllm(hf_overrides={"sliding_window": 64})),
    )
    harmless: tuple[tuple[str, Callable[[EngineSpec, Path], EngineSpec]], ...] = (
        ("nothing changed", lambda spec, _: spec),
        ("batches of 4", options(max_num_seqs=4)),
        ("chunks of 256 tokens", options(max_num_batched_tokens=256, max_num_seqs=64)),
        ("one thread", lambda spec, _: replace(spec, threads=1)),
        ("float32 for bfloat16", lambda spec, _: replace(spec, dtype="float32")),
    )
    return (
        *(Case(name=n, fault=False, computes_otherwise=False, candidate=c) for n, c in harmless),
        *(
            Case(name=f.name, fault=True, computes_otherwise=f.computes_otherwise, candidate=planted(f))
            for f in model_faults.registry(layer)
            # Tokenizer and template faults change the prompt, not the engine: the inputs check sees them.
            if f.computes_otherwise
        ),
        *(Case(name=n, fault=True, computes_otherwise=True, candidate=c) for n, c in running),
    )


def chosen_cases(layer: int, names: Sequence[str] | None) -> tuple[Case, ...]:
    """The named cases, or all.

    Raises:
        ConfigError: If there is no such case.
    """
    known = cases(layer)
    if unknown := set(names or ()) - {case.name for case in known}:
        raise ConfigError(f"there is no case {min(unknown)!r}; cases are {', '.join(c.name for c in known)}")
    return tuple(case for case in known if names is None or case.name in names)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One target's bench: where it records, and what it draws."""

    target: Target
    directory: Path
    places: Places
    observer: Observer
    prompts: int = 96
    draws: int = 100
    seed: int = 7

    def run(self, names: Sequence[str] | None = None) -> tuple[Row, ...]:
        """Run the named cases (default: all); each row is on disk as soon as it is known.

        Raises:
            ConfigError: If a case does not exist, or the target has no noise engine.
            ParityError: If an engine cannot run.
        """
        if self.target.noise is None:
            raise ConfigError(f"target {self.target.name!r} has no noise engine; sensitivity needs a measured floor")
        model = models.provide(self.target.candidate.model, cache=self.places.models, report=self.observer.note)
        config = json.loads((model / "config.json").read_text("utf-8"))
        chosen = chosen_cases(int(config["num_hidden_layers"]) // 2, names)
        base = self._base()
        rows = []
        for number, case in enumerate(chosen, start=1):
            self.observer.note(f"case {number} of {len(chosen)}: {case.name}")
            try:
                rows.append(self._row(case, base, model))
            except ValueError as error:  # a fault that this model has no place for
                self.observer.note(f"{case.name}: left out ({error})")
                continue
            self._keep(rows)
        return tuple(rows)

    def _recorder(self, name: str) -> Recorder:
        return Recorder(directory=self.directory / name, places=self.places, observer=self.observer)

    def _base(self) -> Base:
        assert self.target.noise is not None, "run() has refused it"
        target = limited_to(self.target, self.prompts)
        short = None if target.logic is None else limited_to(target, _LOGIC_PROMPTS).logic
        recorder = self._recorder("base")
        jobs = {"reference": target.workload} | ({"logic-reference": short} if short else {})
        found = recorder.record(target.reference, jobs)
        reference = found["reference"]
        workload = target.workload.with_prompt_token_ids({c.id: c.prompt_token_ids for c in reference.completions})
        forced = workload.forced(
            tokens_of={c.id: c.token_ids for c in reference.completions}, forced_from=reference.digest
        )
        scores = recorder.record(self.target.noise, {"noise": forced})["noise"]
        logic_forced = None
        if short is not None:
            ours = found["logic-reference"]
            logic_forced = short.with_prompt_token_ids({c.id: c.prompt_token_ids for c in ours.completions}).forced(
                tokens_of={c.id: c.token_ids for c in ours.completions}, forced_from=ours.digest
            )
        return Base(
            reference=reference,
            scores=scores,
            workload=workload,
            forced=forced,
            logic_reference=found.get("logic-reference"),
            logic_forced=logic_forced,
        )

    def _row(self, case: Case, base: Base, model: Path) -> Row:
        scratch = self.directory / "models"
        scratch.mkdir(parents=True, exist_ok=True)
        spec = case.candidate(replace(self.target.candidate, model=str(model)), scratch)
        recorder = self._recorder(_slug(case.name))
        found = recorder.record(spec, {"candidate": base.workload, "candidate-scores": base.forced})
        outcome, largest = "", float("nan")
        if base.logic_reference is not None and base.logic_forced is not None:
            theirs = recorder.record(replace(spec, dtype="float32"), {"logic-candidate": base.logic_forced})
            verdict = logic.check(base.logic_reference, theirs["logic-candidate"], noise=None, limits=logic.Limits())
            outcome, largest = verdict.outcome.value, verdict.findings[0].candidate or 0.0
        return self._judged(case, base, found, outcome, largest)

    def _judged(self, case: Case, base: Base, found: Mapping[str, Recording], outcome: str, largest: float) -> Row:
        scores, answers = found["candidate-scores"], found["candidate"]
        steps = lockstep.measure(base.reference, scores)
        noise = noise_.measure(base.reference, base.scores, candidate_dtype=noise_.dtype_of(scores))
        assert noise.steps is not None, "measure fills it"
        floor = float(noise.steps.kl_nats.mean()) * noise.sides or equivalence.Limits().float32_nats
        draw = np.random.default_rng(self.seed)
        sets = {size: self._sets(draw, len(steps.prompt_ids), size) for size in SIZES if size <= len(steps.prompt_ids)}
        pair = equivalence.Pair(
            reference=base.reference,
            candidate=scores,
            steps=steps,
            noise=noise,
            judged_sides=noise_.sixteen_bit_sides(base.reference, scores),
            limits=equivalence.Limits.of(self.target.policy),
        )
        fails: dict[str, float] = {}
        passes: dict[str, float] = {}
        free: dict[str, float] = {}
        for size, drawn in sets.items():
            outcomes = [_outcome(pair, [steps.prompt_ids[n] for n in ids]) for ids in drawn]
            fails[str(size)] = _share(outcomes, Outcome.FAIL)
            passes[str(size)] = _share(outcomes, Outcome.PASS)
            own = [_greedy(base.reference, answers, noise, [steps.prompt_ids[n] for n in ids]) for ids in drawn]
            free[str(size)] = _share(own, Outcome.FAIL)
        peer_sets = sets.get(48) or next(iter(sets.values()))
        return Row(
            name=case.name,
            fault=case.fault,
            computes_otherwise=case.computes_otherwise,
            kl_nats=float(steps.kl_nats.mean()),
            kl_ratio=float(steps.kl_nats.mean()) / floor,
            lockstep=fails,
            lockstep_pass=passes,
            greedy=free,
            logic_outcome=outcome,
            logic_nats2=largest,
            peers=peers.decisions(peers.Answers(reference=base.reference, candidate=answers, steps=steps), peer_sets),
        )

    def _sets(self, draw: np.random.Generator, total: int, size: int) -> list[NDArray[np.intp]]:
        return [draw.choice(total, size=size, replace=False) for _ in range(self.draws)]

    def _keep(self, rows: Sequence[Row]) -> None:
        """Rows of earlier runs stay; one measured again takes its old place."""
        path = self.directory / "rows.json"
        known = json.loads(path.read_text("utf-8")) if path.is_file() else []
        merged = {row["name"]: row for row in known} | {row.name: asdict(row) for row in rows}
        path.write_text(json.dumps(list(merged.values()), indent=1) + "\n", "utf-8")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all cases share."""

    reference: Recording
    scores: Recording
    workload: Workload
    forced: Workload
    logic_reference: Recording | None
    logic_forced: Workload | None


def _outcome(pair: equivalence.Pair, ids: Sequence[str]) -> Outcome:
    noise = pair.noise
    assert noise is not None
    assert noise.steps is not None
    some = replace(pair, steps=pair.steps.only(ids), noise=replace(noise, steps=noise.steps.only(ids)))
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


def _share(outcomes: Sequence[Outcome], wanted: Outcome) -> float:
    return sum(o is wanted for o in outcomes) / len(outcomes)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "plus")).strip("-")


def table(rows: Sequence[Mapping[str, Any]] | Sequence[Row]) -> str:
    """The rows as a Markdown table, ours beside the peers'."""
    plain = [asdict(row) if isinstance(row, Row) else dict(row) for row in rows]
    sizes = list(plain[0]["lockstep"]) if plain else []
    names = [rule.name for rule in peers.RULES]
    at = "/".join(sizes)
    head = [
        "case",
        "KL nats",
        "x floor",
        f"lockstep FAIL @{at}",
        f"PASS @{at}",
        f"greedy FAIL @{at}",
        "float32",
        *names,
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in plain:
        cells = [
            row["name"] if row["fault"] else f"*{row['name']}*",
            f"{row['kl_nats']:.2g}",
            f"{row['kl_ratio']:.2f}",
            "/".join(f"{row['lockstep'][s]:.2f}" for s in sizes),
            "/".join(f"{row['lockstep_pass'][s]:.2f}" for s in sizes),
            "/".join(f"{row['greedy'][s]:.2f}" for s in sizes),
            f"{row['logic_outcome']} {row['logic_nats2']:.1g}",
            *(f"{row['peers'][n]:.2f}" for n in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
