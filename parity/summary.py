"""What a report shows of one comparison: plain values, computed once and rendered by every `reports/` file. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parity import lockstep
from parity.decision import Decision
from parity.diagnose import Diagnosis
from parity.differences import PromptDifference, TokenText, compare, most_telling_first
from parity.equivalence import Limits
from parity.errors import IncomparableError
from parity.fingerprint import Difference, Scalar, differences
from parity.lockstep import Steps
from parity.noise import Noise, dtype_of
from parity.recording import Recording
from parity.recovery import Recovery
from parity.verdict import Finding, Outcome, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIRST_BIN = 8
_DIGEST_SHOWN = 12
_NEW_AT_EVERY_START = re.compile(r"env\..*(_DIST_IDENT|_SHM_BUFFER_NAME)")
# How the rules of lock step write a witness's most probable tokens.
_IN_IDS = " (token id:log-probability)"
_TOKEN_ID = re.compile(r" (\d+):(?=-?(?:\d|inf|nan))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One engine, for a header.

    facts: what is known of it by name, in the order to be shown: version, number format, hardware, ...
    """

    label: str
    created_at: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One finding on the forest plot, in units of its own limit: 1 is the limit.

    value, low, high: low and high are None where the finding has no interval.
    """

    check: str
    metric: str
    value: float
    low: float | None
    high: float | None
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBin:
    """KL divergence a token of the scored tokens from `start` to `stop` - 1 of the answer.

    mean_nats, error_nats: over `prompts` prompts, standard error by prompt; None where there is only one.
    floor_nats: the measured noise there.
    """

    start: int
    stop: int
    prompts: int
    mean_nats: float
    error_nats: float | None
    floor_nats: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One comparison.

    first_divergences: token index of the first divergence of each prompt that diverges.
    packages: what changed between the two environments. facts: every other recorded fact that differs.
    recovery: what is kept of the reference's accuracy; None where no documents were scored.
    reproduce: commands that give the verdicts again.
    """

    title: str
    created_at: str
    decision: Decision
    reference: Side
    candidate: Side
    verdicts: tuple[Verdict, ...]
    diagnosis: Diagnosis | None
    effects: tuple[Effect, ...]
    first_divergences: tuple[int, ...]
    kl_by_position: tuple[PositionBin, ...]
    prompts: tuple[PromptDifference, ...]
    packages: tuple[Difference, ...]
    facts: tuple[Difference, ...]
    recovery: Recovery | None
    reproduce: tuple[str, ...]


def summarise(  # noqa: PLR0913  a comparison has this many parts
    *,
    title: str,
    created_at: str,
    decision: Decision,
    verdicts: Sequence[Verdict],
    diagnosis: Diagnosis | None,
    reference: Recording,
    candidate: Recording,
    scores: Recording | None,
    noise: Noise | None,
    recovery: Recovery | None,
    reproduce: Sequence[str],
    token_text: TokenText,
) -> Summary:
    """Put together what a report shows.

    scores: the candidate's scores of the reference's tokens.
    token_text: the text of a token id, None where it is not known.

    Raises:
        IncomparableError: If the two recordings do not answer the same prompts.
    """
    steps = None if scores is None else _steps(reference, scores)
    prompts = compare(
        reference,
        candidate,
        scores=None if steps is None else scores,
        scale_sigma_nats=Limits().sigma_without_noise_nats if noise is None else noise.sigma_nats,
        token_text=token_text,
    )
    ours, theirs = reference.fingerprint, candidate.fingerprint
    facts = differences({**ours.identity, **ours.context}, {**theirs.identity, **theirs.context})
    return Summary(
        title=title,
        created_at=created_at,
        decision=decision,
        reference=_side(reference),
        candidate=_side(candidate),
        verdicts=tuple(_in_words(v, token_text) for v in verdicts),
        diagnosis=diagnosis,
        effects=tuple(_effects(verdicts)),
        first_divergences=tuple(p.position for p in prompts if p.position is not None),
        kl_by_position=() if steps is None else tuple(_by_position(steps, noise)),
        prompts=(*most_telling_first(prompts), *(p for p in prompts if not p.differs)),
        packages=differences(ours.packages, theirs.packages),
        facts=tuple(d for d in facts if not _NEW_AT_EVERY_START.fullmatch(d.name)),
        recovery=recovery,
        reproduce=tuple(reproduce),
    )


def _side(recording: Recording) -> Side:
    spec, identity, context = recording.spec, recording.fingerprint.identity, recording.fingerprint.context
    weights, cpu, cores = identity.get("model.weights_sha256"), context.get("host.cpu"), context.get("host.cores")
    count, sampling = len(recording.completions), recording.workload.sampling
    temperature = "greedy" if sampling.is_greedy else f"temperature {sampling.temperature:g}"
    facts: Mapping[str, Scalar] = {
        "engine": spec.engine_label,
        "version": context.get("engine.version"),
        "environment": spec.environment or spec.python or spec.url,
        "model": spec.model,
        "weights (sha256)": weights and str(weights)[:_DIGEST_SHOWN],
        "number format": dtype_of(recording),
        "quantization": spec.quantization or identity.get("quantization"),
        "KV cache": context.get("engine.kv_cache_dtype"),
        "attention": context.get("engine.attention"),
        "options": ", ".join(f"{name}={value}" for name, value in spec.options.items()) or None,
        "hardware": context.get("gpu.0.name") or (cpu and f"{cpu}, {cores} cores"),
        "driver": context.get("gpu.0.driver_version"),
        "asked": f"{count} prompt{'s' * (count != 1)}, at most {sampling.max_tokens} tokens each, {temperature}",
    }
    return Side(
        label=recording.label,
        created_at=recording.created_at,
        facts={name: str(value) for name, value in facts.items() if value is not None},
    )


def _effects(verdicts: Sequence[Verdict]) -> Iterator[Effect]:
    """Findings whose rule is one positive number, in units of it."""
    for verdict in verdicts:
        for finding in verdict.findings:
            value, limit = finding.candidate if finding.delta is None else finding.delta, finding.margin
            if value is None or limit is None or not (0 < limit < math.inf and math.isfinite(value)):
                continue
            # An interval belongs to `delta`; without one it is of something else.
            low, high = (None, None) if finding.interval is None or finding.delta is None else finding.interval
            yield Effect(
                check=verdict.check,
                metric=finding.metric,
                value=value / limit,
                low=None if low is None else low / limit,
                high=None if high is None else high / limit,
                passed=finding.outcome is Outcome.PASS,
            )


def _steps(reference: Recording, scores: Recording) -> Steps | None:
    try:
        return lockstep.measure(reference, scores)
    except IncomparableError:
        return None  # the lock step check says why in its own words


def _by_position(steps: Steps, noise: Noise | None) -> Iterator[PositionBin]:
    floor = None if noise is None or noise.steps is None else _shared(noise.steps, steps)
    sides = 1.0 if noise is None else noise.sides
    start, longest = 0, int(steps.lengths.max())
    while start < longest:
        stop = 2 * start or _FIRST_BIN
        counts, sums = _within(steps, start, stop)
        mean, m = float(sums.sum() / counts.sum()), int((counts > 0).sum())
        # The tokens of one prompt are never independent: the error is that of a ratio of sums over prompts.
        spread = math.sqrt(m / max(m - 1, 1) * float(((sums - mean * counts) ** 2).sum()))
        yield PositionBin(
            start=start,
            stop=stop,
            prompts=m,
            mean_nats=mean,
            error_nats=spread / float(counts.sum()) if m > 1 else None,
            floor_nats=None if floor is None else _mean_within(floor, start, stop, sides),
        )
        start = stop


def _shared(floor: Steps, steps: Steps) -> Steps | None:
    """The noise on the same prompts, so that it can be held against them."""
    known = set(floor.prompt_ids)
    shared = [id_ for id_ in steps.prompt_ids if id_ in known]
    return floor.only(shared) if shared else None


def _mean_within(floor: Steps, start: int, stop: int, sides: float) -> float | None:
    counts, sums = _within(floor, start, stop)
    return sides * float(sums.sum() / counts.sum()) if counts.any() else None


def _within(steps: Steps, start: int, stop: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many tokens of each answer lie in [start, stop), and their KL divergence in all, in nats; float64 [m]."""
    place = np.arange(len(steps)) - np.repeat(steps.starts[:-1], steps.lengths)
    inside = (place >= start) & (place < stop)
    return steps.per_prompt(inside), steps.per_prompt(np.where(inside, steps.kl_nats, 0.0))


def _in_words(verdict: Verdict, token_text: TokenText) -> Verdict:
    """The same verdict with token ids in its witnesses named by their text."""
    return replace(verdict, findings=tuple(_finding_in_words(f, token_text) for f in verdict.findings))


def _finding_in_words(finding: Finding, token_text: TokenText) -> Finding:
    def name(match: re.Match[str]) -> str:
        text = token_text(int(match[1]))
        return match[0] if text is None else f" {text!r} "

    def in_words(witness: str) -> str:
        if not witness.endswith(_IN_IDS):
            return witness
        named = _TOKEN_ID.sub(name, witness)
        return named if named == witness else named.removesuffix(_IN_IDS) + " (token and its log-probability)"

    return replace(finding, evidence=tuple(map(in_words, finding.evidence)))
