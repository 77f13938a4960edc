"""What rounding does to a target's model on this machine, measured on all its prompts, and what that lets a gate see.

The noise engine scores the reference's tokens on the whole workload instead of a share, once more in another batch
composition, and the null of the lock-step ratio is taken from the measured noise itself. Where the target has a second
correct engine (`control`), every rule is asked about it on drawn sets of prompts: its alarms are all false. The
recordings stay beside the target's own; `collect.collect` uses them as long as the reference is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parity import collect, lockstep, stages, store
from parity import noise as noise_
from parity.equivalence import Limits, Pair, findings
from parity.errors import ConfigError
from parity.noise import Noise
from parity.prompts import Workload
from parity.recording import Recording
from parity.stats import log_ratio, student_t_quantile
from parity.verdict import Outcome

if TYPE_CHECKING:
    from parity.config import Target
    from parity.lockstep import Steps
    from parity.record import Recorder

SIZES = (16, 32, 48, 64, 96, 128)
_DRAWS = 200
_SHARED_KERNELS_NATS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """The lock-step ratio of a correct engine on `prompts` prompts, from sets drawn out of the measured noise.

    false_alarms, passes: share of the sets that FAIL, that PASS. smallest_caught: ratio caught with 90 % probability.
    """

    prompts: int
    false_alarms: float
    passes: float
    smallest_caught: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A second correct engine, judged as if it were the candidate.

    ratio, low, high: its KL divergence in units of the floor on all prompts, with a 99 % interval by prompt.
    false_alarms: for each size of a drawn set, the share of sets that each rule FAILs, screened in one stage; `passes`,
        the share that all rules PASS.
    """

    source: str
    ratio: float
    low: float
    high: float
    false_alarms: Mapping[int, Mapping[str, float]]
    passes: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measured noise of one target.

    floor_nats, floor_error_nats: KL divergence a token between the reference and the noise engine, and its standard
        error by prompt. beyond_4_sigma, beyond_6_sigma: share of positions whose margin shifts by more.
    other_batches_nats: KL divergence a token between the noise engine and itself on other batches; 0 means that it
        shares every kernel with itself whatever the batch, so that this calibrator measures nothing.
    facts: what it was measured on.
    """

    target: str
    measured_at: str
    source: str
    positions: int
    prompts: int
    sigma_nats: float
    floor_nats: float
    floor_error_nats: float
    beyond_4_sigma: float
    beyond_6_sigma: float
    other_batches_nats: float
    null: tuple[Null, ...]
    control: Control | None
    facts: Mapping[str, object]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know to use it."""
        found = []
        if self.floor_nats < _SHARED_KERNELS_NATS:
            found.append(
                "the noise engine reads zero: it shares its kernels with the reference; let it run in another precision"
            )
        if self.other_batches_nats < _SHARED_KERNELS_NATS:
            found.append("other batches read zero: the engine's kernels do not depend on the batch; not a calibrator")
        return tuple(found)


def calibrate(target: Target, recorder: Recorder, *, seed: int = 7) -> Calibration:
    """Measure a target's noise on its whole workload; `recorder` works in `collect.calibration_of(...)`.

    Raises:
        ConfigError: If the target has no noise engine.
        ParityError: If an engine cannot run.
    """
    if target.noise is None:
        raise ConfigError(f"target {target.name!r} has no noise engine to calibrate with; add [targets.NAME.noise]")
    reference = recorder.record(target.reference, {"reference": target.workload})["reference"]
    workload = target.workload.with_prompt_token_ids({c.id: c.prompt_token_ids for c in reference.completions})
    forced = collect.forced(workload, reference, len(workload.requests))
    backwards = Workload(name=forced.name, requests=tuple(reversed(forced.requests)), forced_from=forced.forced_from)
    found = recorder.record(target.noise, {"noise": forced, "noise-other-batches": backwards})
    candidate = target.candidate.dtype
    measured = noise_.measure(reference, found["noise"], candidate_dtype=candidate)
    steps = measured.steps
    assert steps is not None, "measure fills it"
    shifts = np.abs(steps.shift_nats[np.isfinite(steps.shift_nats)])
    own = max(measured.measured_nats, 1e-12)
    sums, count = steps.per_prompt(steps.kl_nats), steps.lengths
    floor = float(sums.sum() / count.sum())
    m = len(count)
    error = math.sqrt(m / max(m - 1, 1) * float(((sums - floor * count) ** 2).sum())) / float(count.sum())
    other = lockstep.measure(found["noise"], found["noise-other-batches"])
    sides = noise_.sixteen_bit_sides(reference, found["noise"]) * measured.sides
    margin = Limits().kl_ratio_one_side if sides == 1 else Limits().kl_ratio
    result = Calibration(
        target=target.name,
        measured_at=found["noise"].created_at,
        source=measured.source,
        positions=measured.positions,
        prompts=measured.prompts,
        sigma_nats=measured.sigma_nats,
        floor_nats=floor,
        floor_error_nats=error,
        beyond_4_sigma=float((shifts > 4 * own).mean()),
        beyond_6_sigma=float((shifts > 6 * own).mean()),
        other_batches_nats=float(other.kl_nats.mean()),
        null=tuple(null_of(steps, size, margin=max(margin, 1.2), seed=seed) for size in SIZES if size <= m),
        control=None if target.control is None else _controlled(target, recorder, forced, reference, measured, seed),
        facts={**found["noise"].fingerprint.identity, **found["noise"].fingerprint.context},
    )
    with store.disk_errors_named(recorder.directory):
        (recorder.directory / "calibration.json").write_text(json.dumps(asdict(result), indent=1) + "\n", "utf-8")
    return result


def _controlled(
    target: Target, recorder: Recorder, forced: Workload, reference: Recording, noise: Noise, seed: int
) -> Control:
    """Let the second correct engine score the same tokens, and judge it."""
    assert target.control is not None, "the caller has seen to it"
    scores = recorder.record(target.control, {"control": forced})["control"]
    pair = Pair(
        reference=reference,
        candidate=scores,
        steps=lockstep.measure(reference, scores),
        noise=noise,
        judged_sides=noise_.sixteen_bit_sides(reference, scores),
        limits=Limits.of(target.policy).at(stages.SCREEN),
    )
    return control_of(pair, seed=seed)


def control_of(pair: Pair, *, seed: int) -> Control:
    """Every rule asked about a correct engine, on sets of prompts drawn with replacement."""
    noise = pair.noise
    assert noise is not None
    assert noise.steps is not None, "measure fills it"
    ids = np.array(pair.steps.prompt_ids)
    kl = pair.steps.per_prompt(pair.steps.kl_nats)
    floor = noise.steps.only(pair.steps.prompt_ids)
    whole = log_ratio(kl.tolist(), (floor.per_prompt(floor.kl_nats) * noise.sides).tolist())
    draw = np.random.default_rng(seed)
    alarms: dict[int, dict[str, float]] = {}
    passes: dict[int, float] = {}
    for size in (s for s in SIZES if s <= len(ids)):
        found = []
        for _ in range(_DRAWS):
            chosen = ids[draw.choice(len(ids), size=size, replace=True)].tolist()
            some = replace(pair, steps=pair.steps.only(chosen), noise=replace(noise, steps=noise.steps.only(chosen)))
            found.append({f.metric: f.outcome for f in findings(some)})
        rules = sorted({rule for each in found for rule in each})
        alarms[size] = {rule: sum(each.get(rule) is Outcome.FAIL for each in found) / _DRAWS for rule in rules}
        passes[size] = sum(all(o is Outcome.PASS for o in each.values()) for each in found) / _DRAWS
    nan = float("nan")
    return Control(
        source=pair.candidate.label,
        ratio=nan if whole is None else whole.value,
        low=nan if whole is None else whole.lower(0.005),
        high=nan if whole is None else whole.upper(0.005),
        false_alarms=alarms,
        passes=passes,
    )


def null_of(steps: Steps, prompts: int, *, margin: float, seed: int) -> Null:
    """The ratio of the noise to itself: every other position of a prompt against the rest, on drawn sets of prompts.

    Half of the positions on each side, so the spread is about 1.4 times that of a real comparison: a cautious null.
    """
    limits = Limits()
    odd = np.arange(len(steps)) % 2 == 1
    one, two = steps.per_prompt(steps.kl_nats * odd), steps.per_prompt(steps.kl_nats * ~odd)
    balance = float(two.sum() / max(one.sum(), 1e-300))  # as if both halves had drawn equally hard positions
    draw = np.random.default_rng(seed)
    fails, passes, errors = 0, 0, []
    for _ in range(_DRAWS):
        chosen = draw.choice(len(one), size=prompts, replace=True)
        ratio = log_ratio((one[chosen] * balance).tolist(), two[chosen].tolist())
        if ratio is None:
            continue
        fails += ratio.lower(limits.alpha_fail) > margin
        passes += ratio.upper(limits.alpha_pass) < margin
        errors.append(ratio.standard_error)
    spread = float(np.median(errors)) if errors else math.inf
    reach = student_t_quantile(1 - limits.alpha_fail, prompts - 1) + 1.2816
    return Null(
        prompts=prompts,
        false_alarms=fails / _DRAWS,
        passes=passes / _DRAWS,
        smallest_caught=margin * math.exp(min(reach * spread, 50.0)),
    )
