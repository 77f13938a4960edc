"""Are two engines, scoring the same tokens, as close as rounding makes two correct ones? The rules, as findings.

Used by every check that has scores of the same tokens on both sides, whichever side chose them. Source of the rules
(R1, R2, R3, R3g), their constants and measured error rates: docs/checks/lockstep.md. Pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from parity import diagnose, lockstep
from parity.errors import IncomparableError
from parity.lockstep import Steps
from parity.noise import Noise
from parity.recording import Recording
from parity.stats import LogRatio, critical_count, log_ratio, student_t_quantile
from parity.verdict import Finding, Outcome, Policy, Verdict, worst

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WITNESSES = 3
_ONE_STAGE = 0.005  # error rates above it are those of a screening that fresh prompts confirm
_SHOWN = partial(Finding, reference=None, delta=None, interval=None, evidence=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers the rules judge by. Source: docs/checks/lockstep.md.

    kl_ratio: KL divergence of a pair with two 16-bit sides, in units of the measured floor times its 16-bit sides.
    kl_ratio_one_side: the same where one side is float32 (no second engine's noise in it), and for R3g.
    budget_nats: KL divergence a token that a quantized candidate may cost; 0 judges by the floor instead.
    same_build: judge the candidate also against the reference build's own distance from float32 (R3g).
    floor_without_noise_nats: KL floor a 16-bit side and token, used with a warning where no noise was measured; a
        documented value for one 135M model on a CPU, a guess about any other.
    float32_nats: what a float32 pair is held against: KL sums of float32 numbers carry no information below it.
    """

    kl_ratio: float = 1.0
    kl_ratio_one_side: float = 1.2
    budget_nats: float = 0.0
    same_build: float = 0.0
    alpha_fail: float = 0.002
    alpha_pass: float = 0.01
    largest_share: float = 0.25
    min_prompts: int = 16
    benign_sigmas: float = 6.0
    mismatch_sigmas: float = 25.0
    suspicious_rate: float = 4.8e-5
    excess_flips_z: float = 3.09
    additivity_low: float = 0.6
    wrong_arbiter_nats: float = 0.02
    sigma_without_noise_nats: float = 0.13
    floor_without_noise_nats: float = 8e-4
    float32_nats: float = 1e-6

    RATES: ClassVar[tuple[str, ...]] = ("alpha_fail", "excess_flips_z")

    def at(self, alpha: float) -> Limits:
        """The same, with every rule of chance at this error rate."""
        return replace(self, alpha_fail=alpha, excess_flips_z=NormalDist().inv_cdf(1.0 - alpha))

    @classmethod
    def of(cls, policy: Policy) -> Limits:
        """The defaults of a policy."""
        if policy is Policy.QUANTIZED:
            return cls(budget_nats=0.02)
        return cls(same_build=float(policy is Policy.IDENTITY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both sides' scores of the same tokens, with what they are held against.

    judged_sides: how many of the two engines round to 16 bits.
    """

    reference: Recording
    candidate: Recording
    steps: Steps
    noise: Noise | None
    judged_sides: int
    limits: Limits

    @property
    def sigma_nats(self) -> float:
        """Spread of the margin shift between correct engines."""
        return self.limits.sigma_without_noise_nats if self.noise is None else self.noise.sigma_nats


def findings(pair: Pair) -> tuple[Finding, ...]:
    """Every rule's finding, the sharpest first."""
    found = [
        _numbers(pair),
        _divergence(pair),
        *_per_context(pair),
        _far_flips(pair),
        *_excess_flips(pair),
        *_same_build(pair),
        *_blame(pair),
        _description(pair),
    ]
    return tuple(found)


def _numbers(pair: Pair) -> Finding:
    broken = np.flatnonzero(pair.steps.broken)
    return _SHOWN(
        metric="numbers",
        outcome=Outcome.FAIL if broken.size else Outcome.PASS,
        sentence=f"{broken.size or 'none'} of {len(pair.steps)} positions holds NaN or an infinite log-probability",
        unit="tokens",
        candidate=float(broken.size),
        limit="none; a position is never dropped, because dropping improves every mean",
        n=len(pair.steps),
        evidence=tuple(_where(pair, int(t)) for t in broken[:_WITNESSES]),
    )


def _divergence(pair: Pair) -> Finding:
    """R3: the KL divergence a token against the floor, or against the policy's budget."""
    steps, limits = pair.steps, pair.limits
    kl = steps.per_prompt(steps.kl_nats)
    mean = float(steps.kl_nats.mean())
    scale, margin, against = _yardstick(pair)
    ids = [n for n, id_ in enumerate(steps.prompt_ids) if id_ in scale]
    allowed = np.array([scale[steps.prompt_ids[n]] * float(steps.lengths[n]) for n in ids])
    ratio = log_ratio(kl[ids].tolist(), allowed.tolist())
    coverage = f"covers {100 * float(steps.covered.mean()):.0f} % of the probability token by token"
    head = f"KL divergence {mean:.3g} nats a token (a lower bound: {coverage})"
    make = partial(
        _SHOWN,
        metric="KL divergence",
        unit="nats a token",
        candidate=mean,
        limit=f"{against}; FAIL at one-sided {limits.alpha_fail:g}, PASS at {limits.alpha_pass:g}, by prompt",
        margin=margin,
        n=len(ids),
        evidence=_kl_witnesses(pair, kl),
    )
    if mean < 1e-12:
        enough = len(steps.prompt_ids) >= limits.min_prompts
        return make(
            outcome=Outcome.PASS if enough else Outcome.INCONCLUSIVE,
            sentence=f"the two sides agree to the bit on {len(steps)} tokens of {len(steps.prompt_ids)} prompts"
            + ("" if enough else f"; at least {limits.min_prompts} prompts are needed"),
        )
    if ratio is None:
        return make(outcome=Outcome.INCONCLUSIVE, sentence=f"{head}; too few prompts with a measured floor to judge it")
    # A prompt that holds most of very little is no concern; one that is itself beyond the margin is.
    beyond = kl[ids][kl[ids] > margin * allowed]
    share = float(beyond.max() / kl[ids].sum()) if beyond.size else 0.0
    outcome = _ratio_outcome(ratio, margin, share, limits)
    low, high = ratio.lower(limits.alpha_fail), ratio.upper(limits.alpha_pass)
    # 0.95 in each of two stages is 0.90 in both; a stricter rate than screening's means that there is one stage.
    reach = NormalDist().inv_cdf(0.95 if limits.alpha_fail > _ONE_STAGE else 0.9)
    catch = margin * math.exp(
        (student_t_quantile(1 - limits.alpha_fail, ratio.prompts - 1) + reach) * ratio.standard_error
    )
    sentence = (
        f"{head} is {ratio.value:.3g} times {against.split(',')[0]}, between {low:.3g} and {high:.3g}; limit "
        f"{margin:.3g}; a divergence of {catch:.3g} times is caught with 90 % probability"
    )
    if outcome is Outcome.INCONCLUSIVE:
        sentence += f"; {_why_inconclusive(ratio, share, limits)}"
    return make(outcome=outcome, sentence=sentence, interval=(low, high), delta=ratio.value)


def _yardstick(pair: Pair) -> tuple[dict[str, float], float, str]:
    """Nats a token allowed for, by prompt id; the margin in units of it; and how to call it."""
    limits, noise, ids = pair.limits, pair.noise, pair.steps.prompt_ids
    if limits.budget_nats > 0.0:
        return dict.fromkeys(ids, limits.budget_nats), 1.0, f"the budget of {limits.budget_nats:g} nats a token"
    margin = limits.kl_ratio_one_side if pair.judged_sides == 1 else limits.kl_ratio
    if pair.judged_sides == 0:
        floor = limits.float32_nats
        return dict.fromkeys(ids, floor), margin, f"{floor:g} nats a token, where float32 sums end (logic is sharper)"
    if noise is None or noise.steps is None:
        floor = limits.floor_without_noise_nats * max(pair.judged_sides, 1)
        return dict.fromkeys(ids, floor), margin, f"a documented floor of {floor:.2g} nats a token, not measured"
    steps = noise.steps
    floors = steps.per_prompt(steps.kl_nats) / steps.lengths * noise.sides
    mean = float(steps.kl_nats.mean()) * noise.sides
    name = f"the floor of {mean:.3g} nats a token, measured on {len(steps)} tokens of {len(steps.prompt_ids)} prompts"
    return dict(zip(steps.prompt_ids, floors.tolist(), strict=True)), margin, f"{name} ({noise.source})"


def _ratio_outcome(ratio: LogRatio, margin: float, share: float, limits: Limits) -> Outcome:
    if ratio.lower(limits.alpha_fail) > margin:
        return Outcome.FAIL
    enough = ratio.prompts >= limits.min_prompts and share <= limits.largest_share
    return Outcome.PASS if enough and ratio.upper(limits.alpha_pass) < margin else Outcome.INCONCLUSIVE


def _why_inconclusive(ratio: LogRatio, share: float, limits: Limits) -> str:
    if ratio.prompts < limits.min_prompts:
        return f"{ratio.prompts} prompts, at least {limits.min_prompts} are needed"
    if share > limits.largest_share:
        return f"one prompt holds {100 * share:.0f} % of the divergence; look at it, or add prompts"
    return "the interval holds the limit: more prompts would decide"


_CONTEXT_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 1 << 40)


def _per_context(pair: Pair) -> list[Finding]:
    """Drift: the same ratio at each context length, so that a fault of long contexts is not averaged away."""
    steps, limits, noise = pair.steps, pair.limits, pair.noise
    if noise is None or noise.steps is None or limits.budget_nats > 0.0 or float(steps.kl_nats.mean()) < 1e-12:
        return []
    known = set(noise.steps.prompt_ids)
    shared = [i for i in steps.prompt_ids if i in known]
    ours, floor = steps.only(shared), noise.steps.only(shared)
    if not len(ours) or not len(floor):
        return []
    margin = limits.kl_ratio_one_side if pair.judged_sides == 1 else limits.kl_ratio
    bins = []
    for low, high in itertools.pairwise(_CONTEXT_EDGES):
        inside, floor_inside = _in(ours, low, high), _in(floor, low, high)
        kl, count = ours.per_prompt(ours.kl_nats * inside), ours.per_prompt(inside)
        base, base_count = floor.per_prompt(floor.kl_nats * floor_inside), floor.per_prompt(floor_inside)
        some = (count > 0) & (base_count > 0)
        if some.sum() < 8:  # a jackknife over fewer prompts has no coverage to speak of
            continue
        denominators = noise.sides * base[some] / base_count[some] * count[some]
        ratio = log_ratio(kl[some].tolist(), denominators.tolist())
        if ratio is not None:
            bins.append((low, high, ratio))
    if len(bins) < 2:
        return []
    alpha = limits.alpha_fail / len(bins)
    bad = [(low, high, r) for low, high, r in bins if r.lower(alpha) > margin]
    told = ", ".join(f"{r.value:.2f} at {low} to {high - 1} ({r.prompts} prompts)" for low, high, r in bins)
    sentence = f"KL divergence in units of the floor by tokens of context: {told}"
    if bad:
        sentence += f"; beyond the limit {margin:g} from {bad[0][0]} tokens on"
    worst = max(bins, key=lambda b: b[2].ln)[2]
    return [
        _SHOWN(
            metric="drift with context",
            outcome=Outcome.FAIL if bad else Outcome.PASS,
            sentence=sentence,
            unit="times the floor",
            candidate=worst.value,
            limit=f"{margin:g} in every range of context, at one-sided {limits.alpha_fail:g} over all {len(bins)}",
            margin=margin,
            n=sum(r.prompts for _, _, r in bins),
        )
    ]


def _in(steps: Steps, low: int, high: int) -> NDArray[np.bool_]:
    return np.asarray((steps.context >= low) & (steps.context < high))


def _far_flips(pair: Pair) -> Finding:
    """R1 on all positions: where the two prefer different tokens, is the slack one that rounding can make?"""
    steps, limits, sigma = pair.steps, pair.limits, pair.sigma_nats
    benign, mismatch = limits.benign_sigmas * sigma, limits.mismatch_sigmas * sigma
    far = steps.flipped & (steps.slack_nats > benign)
    gross = far & ((steps.slack_nats > mismatch) | steps.outside)
    count, worst = int(far.sum()), int(gross.sum())
    allowed = critical_count(rate=limits.suspicious_rate, n=len(steps), alpha=limits.alpha_fail) - 1
    judged = limits.budget_nats == 0.0
    order = np.argsort(-steps.slack_nats)[:_WITNESSES]
    sentence = (
        f"the most probable token differs at {int(steps.flipped.sum())} of {len(steps)} positions, largest slack "
        f"{float(steps.slack_nats.max()):.3g} nats ({float(steps.slack_nats.max()) / sigma:.1f} sigma); {count} over "
        f"{limits.benign_sigmas:g} sigma = {benign:.3g} nats, {allowed} allowed; {worst or 'none'} beyond what "
        f"rounding can do (over {limits.mismatch_sigmas:g} sigma, or outside the top k)"
    )
    return _SHOWN(
        metric="changed choices",
        outcome=Outcome.FAIL if judged and (count > allowed or worst) else Outcome.PASS,
        sentence=sentence if judged else f"{sentence}; shown, not judged, under a budget",
        unit="tokens",
        candidate=float(count),
        limit=f"at most {allowed}: correct pairs show more with probability <= {limits.alpha_fail:g}",
        margin=float(allowed),
        n=len(steps),
        evidence=tuple(_where(pair, int(t)) for t in order if steps.flipped[t]),
    )


def _excess_flips(pair: Pair) -> list[Finding]:
    """R2: as many changed choices as the reference's own gaps and the measured shifts predict?

    The prediction knows two tokens and no ties. How many more a correct engine changes, the noise engine shows: its own
    changed choices over those predicted for it (1.27 for Transformers in bfloat16) scale the candidate's.
    """
    steps, limits, noise = pair.steps, pair.limits, pair.noise
    if noise is None or noise.steps is None or limits.budget_nats > 0.0:
        return []
    shifts = noise.steps.shift_nats[np.isfinite(noise.steps.shift_nats)]
    if shifts.size < 500:  # too few to say how often a shift exceeds a gap
        return []
    own, own_predicted = int(noise.steps.flipped.sum()), _predicted(noise.steps, shifts)
    more = max(1.0, own / max(own_predicted, 1.0))
    expected = more * _predicted(steps, shifts * math.sqrt(noise.sides))
    observed = int(steps.flipped.sum())
    # Counts vary 1.5 times as much as Poisson's; the noise engine's own count is such a count too.
    spread = math.sqrt(1.5 * max(expected, 0.5) * (1.0 + expected / max(own, 1)))
    z = (observed - 1.1 * expected) / spread
    return [
        _SHOWN(
            metric="number of changed choices",
            outcome=Outcome.FAIL if z > limits.excess_flips_z else Outcome.PASS,
            sentence=f"{observed} changed choices, {expected:.1f} expected from the gaps, the measured shifts and the "
            f"{own} of the noise engine (z {z:+.1f})",
            unit="tokens",
            candidate=float(observed),
            limit=f"z = (observed - 1.1 expected) / its standard error at most {limits.excess_flips_z:.3g}",
            delta=z,
            margin=limits.excess_flips_z,
            n=len(steps),
        )
    ]


def _predicted(steps: Steps, shifts: NDArray[np.float64]) -> float:
    """Positions at which a shift drawn from these exceeds the reference's gap."""
    # Either token may be favoured: the shift's sign carries no information, so both signs of each are used.
    both = np.sort(np.concatenate([shifts, -shifts]))
    return float(np.sum(1.0 - np.searchsorted(both, steps.gap_nats, side="left") / both.size))


def _against_arbiter(pair: Pair) -> tuple[Steps, Steps] | None:
    """Reference's and candidate's distance from a float32 arbiter on the same tokens, where the noise engine is one."""
    noise = pair.noise
    if noise is None or noise.scores is None or noise.steps is None or pair.judged_sides != 2 or noise.sides != 2:
        return None
    try:
        theirs = lockstep.measure(noise.scores, pair.candidate)
    except IncomparableError:
        return None  # the candidate's scores are of other tokens than the arbiter's
    known = set(noise.steps.prompt_ids)
    shared = [i for i in theirs.prompt_ids if i in known]
    return noise.steps.only(shared), theirs.only(shared)


def _same_build(pair: Pair) -> list[Finding]:
    """R3g: is the candidate farther from float32 than the build that was accepted?"""
    sides = _against_arbiter(pair)
    if not pair.limits.same_build or sides is None:
        return []
    limits, margin = pair.limits, pair.limits.kl_ratio_one_side
    ours, theirs = (s.per_prompt(s.kl_nats) for s in sides)
    ratio = log_ratio(theirs.tolist(), ours.tolist())
    if ratio is None:
        return []
    outcome = _ratio_outcome(ratio, margin, 0.0, limits)
    return [
        _SHOWN(
            metric="distance from float32",
            outcome=outcome,
            sentence=f"the candidate is {ratio.value:.3g} times as far from float32 as the reference, between "
            f"{ratio.lower(limits.alpha_fail):.3g} and {ratio.upper(limits.alpha_pass):.3g}; limit {margin:g}",
            unit="times the reference's",
            candidate=ratio.value,
            limit=f"{margin:g}, FAIL at one-sided {limits.alpha_fail:g}, PASS at {limits.alpha_pass:g}, by prompt",
            interval=(ratio.lower(limits.alpha_fail), ratio.upper(limits.alpha_pass)),
            delta=ratio.value,
            margin=margin,
            n=ratio.prompts,
        )
    ]


def _blame(pair: Pair) -> list[Finding]:
    """Triangulation: which of the two engines is farther from float32. Says who moved; never fails by itself.

    Raises:
        IncomparableError: If the arbiter is far from both: it runs another model, template or precision than it says.
    """
    sides = _against_arbiter(pair)
    if sides is None:
        return []
    limits = pair.limits
    ours, theirs = (s.per_prompt(s.kl_nats) for s in sides)
    between = float(pair.steps.only(sides[0].prompt_ids).kl_nats.mean())
    means = [float(s.kl_nats.mean()) for s in sides]
    additivity = between / max(sum(means), 1e-300)
    if min(means) > limits.wrong_arbiter_nats and additivity < limits.additivity_low:
        raise IncomparableError(
            f"the noise engine {pair.noise.scores.label if pair.noise and pair.noise.scores else ''} is "
            f"{means[0]:.3g} and {means[1]:.3g} nats a token from the two engines, which are {between:.3g} from each "
            "other: it does not run the same model; correct the target's noise engine"
        )
    ratio = log_ratio(theirs.tolist(), ours.tolist())
    if ratio is None:
        return []
    low, high = ratio.lower(0.005), ratio.upper(0.005)
    if low > 1.25:
        who = "the candidate is the one that is off"
    elif high < 1 / 1.25:
        who = "the reference is the one that is off"
    elif low > 0.5 and high < 2.0:
        who = "neither is farther off than the other"
    else:
        who = "which one is off cannot be said from this much data"
    return [
        _SHOWN(
            metric="who moved",
            outcome=Outcome.PASS,
            sentence=f"by the arbiter {pair.noise.source.split(' against ')[1] if pair.noise else ''}: {who} (distance "
            f"{means[0]:.3g} nats a token of the reference, {means[1]:.3g} of the candidate, ratio {low:.2f} to "
            f"{high:.2f}; distance between them {100 * additivity:.0f} % of the sum)",
            unit="times the reference's",
            candidate=ratio.value,
            limit="shown, not judged",
            n=ratio.prompts,
        )
    ]


def _description(pair: Pair) -> Finding:
    """Percentiles in the manner of llama.cpp's KL tool, and the perplexity ratio with its error."""
    steps = pair.steps
    kl, delta = steps.kl_nats, np.abs(steps.delta_nats[~steps.broken])
    ratio, error = steps.perplexity_ratio
    same = 100 * (1 - float(steps.flipped.mean()))
    return _SHOWN(
        metric="description",
        outcome=Outcome.PASS,
        sentence=f"same most probable token {same:.2f} %; KL divergence {_quantiles(kl)}; change of log-probability "
        f"{_quantiles(delta)}; perplexity of the candidate on the scored tokens {ratio:.4f} times "
        f"the reference's (+- {error:.4f}, one standard error by prompt)",
        unit="nats",
        candidate=float(kl.mean()),
        limit="shown, not judged",
        n=len(steps.lengths),
    )


def _quantiles(values: NDArray[np.float64]) -> str:
    points = np.quantile(values, [0.5, 0.9, 0.99, 0.999, 1.0]) if values.size else np.zeros(5)
    names = ("median", "90 %", "99 %", "99.9 %", "largest")
    return ", ".join(f"{name} {value:.2g}" for name, value in zip(names, points, strict=True)) + " nats"


def _kl_witnesses(pair: Pair, kl: Sequence[float] | NDArray[np.float64]) -> tuple[str, ...]:
    order = np.argsort(-np.asarray(kl))[:_WITNESSES]
    return tuple(_kl_witness(pair, int(n), float(kl[n])) for n in order)


def _kl_witness(pair: Pair, prompt: int, total: float) -> str:
    steps = pair.steps
    start, stop = int(steps.starts[prompt]), int(steps.starts[prompt + 1])
    worst = start + int(np.argmax(steps.kl_nats[start:stop]))
    return f"{steps.prompt_ids[prompt]}: {total / (stop - start):.3g} nats a token; most at {_where(pair, worst)}"


def _where(pair: Pair, position: int) -> str:
    """One position for a person to look at: what both sides would have said there."""
    id_, token = pair.steps.place(position)
    ours, theirs = pair.reference.by_id[id_], pair.candidate.by_id[id_]
    tops = []
    for name, completion in (("reference", ours), ("candidate", theirs)):
        row = completion.logprobs.row(token)[:2] if completion.logprobs else ()
        tops.append(f"{name} {' '.join(f'{i}:{v:.3f}' for i, v in row)}")
    return (
        f"{id_}, token {token}: KL {float(pair.steps.kl_nats[position]):.3g} nats, {', '.join(tops)} "
        "(token id:log-probability)"
    )


def verdict(check: str, pair: Pair, *, headline: str) -> Verdict:
    """All findings as one verdict; `headline` says what was compared."""
    found = findings(pair)
    outcome = worst([f.outcome for f in found])
    decided_by = [f.metric for f in found if f.outcome is outcome is not Outcome.PASS]
    differing = diagnose.changed(pair.reference, pair.candidate)
    steps = pair.steps
    text = (
        f"{headline}: KL divergence {float(steps.kl_nats.mean()):.3g} nats a token over {len(steps)} tokens of "
        f"{len(steps.prompt_ids)} prompts"
    )
    if (ratio := found[1].delta) is not None:
        text += f", {ratio:.2f} times {'the budget' if pair.limits.budget_nats else 'the floor'}"
    if decided_by:
        text += f"; decided by {', '.join(decided_by)}"
    return Verdict(
        check=check,
        reference=pair.reference.label,
        candidate=pair.candidate.label,
        outcome=outcome,
        headline=text,
        findings=found,
        causes=diagnose.causes(differing) if outcome is Outcome.FAIL else (),
        changed=differing,
        warnings=_warnings(pair),
    )


def _warnings(pair: Pair) -> tuple[str, ...]:
    if pair.limits.budget_nats:
        return ()
    if pair.noise is None or pair.noise.steps is None:
        return (
            "no noise was measured: the floor is a documented value for one 135M model on a CPU, a guess for yours; "
            "add a noise engine to the target",
        )
    if float(pair.noise.steps.kl_nats.mean()) < 1e-9 and pair.judged_sides:
        return (
            "the noise engine reads zero: it shares its kernels with the reference and measures nothing; let it run "
            "in another precision",
        )
    return ()
