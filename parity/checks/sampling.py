"""Sampling: does each engine sample as it was asked, by its own raw log-probabilities?

One engine at a time and no second model: sampled texts are never compared across engines. The policy q is what the
asked temperature and filters make of the raw distribution, see `parity.sampler`. Steps at which it is not exact, and
steps with a tie across the edge of a filter, are left out of the tests that need q. Whether a step is left out depends
on its context alone, never on the drawn token, so nothing is biased by it.

    support   tokens that the policy excludes; three are enough to fail
    score     z = sum(l(x) - E_q l) / sqrt(sum Var_q l): a martingale, N(0, 1) also with dependent tokens
    PIT       u = F(x-) + V q(x), V uniform: independent and uniform if the tokens are drawn from q (Kolmogorov-Smirnov)
    draws     is there any chance at all: not all tokens the most probable ones, not every repeat the same answer

Source of the rules and their measured error rates: docs/checks/sampling.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from parity import diagnose, twosample
from parity.comparable import require_same_inputs
from parity.errors import IncomparableError
from parity.noise import Noise
from parity.prompts import SamplingParams
from parity.recording import Completion, Recording
from parity.sampler import (
    FLOOR_NATS,
    Edges,
    Filter,
    SamplingPolicy,
    Steps,
    at,
    fitted_temperature,
    policy_of,
    steps_of,
    tempered,
    transformed,
)
from parity.verdict import Finding, Outcome, Verdict, worst

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

ROLES = ("sampled-reference", "sampled-candidate")
_WITNESSES = 3
_PERMUTATIONS = 9999
_MOVES_CHOICE: Mapping[str, float] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,  # the stop tokens are masked until then, which raw log-probabilities do not show
}
_NO_VARIANCE = 1e-9  # nats squared: equally probable tokens, up to float32
_token_finding = partial(Finding, unit="tokens", reference=None, delta=None, interval=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers this check judges by. Source: docs/checks/sampling.md.

    z: two-sided normal quantile at 0.001.
    support: so many excluded tokens fail. top_p_margin widens the nucleus, edge_nats every edge: rounding moves both.
    ks_p: smallest p-value of the PIT's Kolmogorov-Smirnov test.
    impossible: largest probability of an event that proves the absence of chance.
    min_steps: below it the normal approximation is not trusted and score and PIT say nothing.
    settled: steps whose most probable token has at least this share of q are left out of score and PIT: they say
        little about the temperature, and their rare surprises make the sum skewed.
    power: of the smallest temperature error that the verdict names.
    """

    z: float = 3.29
    support: int = 3
    top_p_margin: float = 0.01
    edge_nats: float = 1e-3
    ks_p: float = 0.001
    impossible: float = 1e-6
    min_steps: int = 200
    settled: float = 0.95
    power: float = 0.9

    RATES: ClassVar[tuple[str, ...]] = ("z", "ks_p")

    def at(self, alpha: float) -> Limits:
        """The same, with every rule of chance at this error rate."""
        return replace(self, z=NormalDist().inv_cdf(1.0 - alpha / 2), ks_p=alpha)


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:  # noqa: ARG001
    """Audit the candidate's sampling, after the reference's; noise plays no part.

    Raises:
        IncomparableError: If the two were not asked the same, plain sampling was not asked, raw log-probabilities are
            missing here and there, or the reference itself does not sample as asked.
    """
    require_same_inputs(reference, candidate)
    _require_plain_sampling(candidate)
    if _tells_nothing(reference) or _tells_nothing(candidate):
        return _black_box(reference, candidate, limits)
    ours, theirs = _audit(reference, limits), _audit(candidate, limits)
    if wrong := [f.sentence for f in ours.findings if f.outcome is Outcome.FAIL]:
        raise IncomparableError(
            f"the reference {reference.label} did not sample as asked: {(*ours.causes, *wrong)[0]}; "
            "record it again with the sampling of the workload"
        )
    unsure = [f.sentence for f in ours.findings if f.outcome is Outcome.INCONCLUSIVE]
    outcome = worst([f.outcome for f in theirs.findings])
    of_reference = {f.metric: f.candidate for f in ours.findings}
    return Verdict(
        check="sampling",
        reference=reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(theirs, outcome, candidate.workload.sampling),
        findings=tuple(replace(f, reference=of_reference.get(f.metric)) for f in theirs.findings),
        causes=theirs.causes if outcome is Outcome.FAIL else (),
        changed=diagnose.changed(reference, candidate),
        warnings=(f"the reference's own sampling could not be audited in full: {unsure[0]}",) if unsure else (),
    )


def _tells_nothing(recording: Recording) -> bool:
    """Whether an engine returned no log-probabilities at all."""
    return all(c.logprobs is None for c in recording.completions)


def _black_box(reference: Recording, candidate: Recording, limits: Limits) -> Verdict:
    """Without log-probabilities a difference can be shown and equality cannot."""
    draws: dict[tuple[int, ...], tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = defaultdict(lambda: ([], []))
    for side, recording in enumerate((reference, candidate)):
        for answer in sorted(recording.completions, key=lambda c: c.id):
            draws[answer.prompt_token_ids][side].append(answer.token_ids)
    pairs = list(draws.values())
    found = twosample.compare(
        [ours for ours, _ in pairs], [theirs for _, theirs in pairs], permutations=_PERMUTATIONS, seed=0
    )
    failed = found.p <= limits.ks_p
    said = f"the sampled answers of {found.prompts} prompts differ between the engines (p {found.p:.2g})"
    if not failed:
        said = (
            f"no difference seen in the sampled answers of {found.prompts} prompts (p {found.p:.2g}), and none would "
            "be seen unless it were large: an engine that returns log-probabilities can be audited"
        )
    ids = [min(c.id for c in candidate.completions if c.prompt_token_ids == sent) for sent in draws]
    finding = Finding(
        metric="two-sample test",
        outcome=Outcome.FAIL if failed else Outcome.INCONCLUSIVE,
        sentence=said,
        unit="prompts",
        reference=None,
        candidate=found.discrepancy,
        delta=None,
        interval=None,
        limit=f"permutation test within prompts, p at most {limits.ks_p:g} fails; nothing passes without "
        "log-probabilities",
        n=found.prompts,
        evidence=tuple(f"farthest apart: {ids[n]}" for n in found.widest),
    )
    return Verdict(
        check="sampling",
        reference=reference.label,
        candidate=candidate.label,
        outcome=finding.outcome,
        headline=said,
        findings=(finding,),
        causes=(),
        changed=diagnose.changed(reference, candidate),
        warnings=(),
    )


def _require_plain_sampling(recording: Recording) -> None:
    """Sampling, and nothing that moves the choice in a way that raw log-probabilities do not show."""
    asked, name = recording.workload.sampling, recording.workload.name
    if asked.is_greedy:
        raise IncomparableError(f"workload {name!r} is greedy: there is no sampling to audit; ask with a temperature")
    if recording.workload.forced_from is not None:
        raise IncomparableError(f"workload {name!r} scores given tokens: nothing was sampled that could be audited")
    moved = [f"{key} {getattr(asked, key)!r}" for key, plain in _MOVES_CHOICE.items() if getattr(asked, key) != plain]
    if moved:
        raise IncomparableError(
            f"workload {name!r} sets {', '.join(moved)}: the policy then does not follow from the raw "
            "log-probabilities; record both sides without it"
        )


def _steps(recording: Recording) -> Steps:
    mode = recording.fingerprint.context.get("engine.logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        raise IncomparableError(
            f"{recording.label} returned {mode}: the audit needs log-probabilities before temperature and filters"
        )
    return steps_of(recording)


def _policy(steps: Steps, asked: SamplingParams, limits: Limits) -> SamplingPolicy:
    edges = Edges(top_p_margin=limits.top_p_margin, edge_nats=limits.edge_nats)
    return policy_of(steps.top, asked, edges)


class _Seen(NamedTuple):
    """What is kept of N steps, M of which score and PIT look at; the policy is K times as large and is not kept.

    ceiling: [N] an upper bound of the largest probability.
    surplus_nats: [M] how far the drawn token's raw log-probability lies above the expected one.
    variance_nats2: [M] its variance. u: [M] the probability integral transform.
    """

    ceiling: Floats
    surplus_nats: Floats
    variance_nats2: Floats
    u: Floats


def _seen(steps: Steps, policy: SamplingPolicy, limits: Limits, random: np.random.Generator) -> _Seen:
    used = _used(policy, limits)
    q, rank, top = policy.q[used], steps.rank[used], np.maximum(steps.top[used].astype(np.float64), FLOOR_NATS)
    # Any function of the context serves for the tail's logprob: one nat below the last known token.
    values = np.concatenate([top, top[:, -1:] - 1.0], axis=1)
    mean = (q * values).sum(axis=1)
    return _Seen(
        ceiling=policy.ceiling,
        surplus_nats=at(values, rank) - mean,
        variance_nats2=(q * (values - mean[:, None]) ** 2).sum(axis=1),
        u=transformed(q, rank, random),
    )


def _used(policy: SamplingPolicy, limits: Limits) -> Bools:
    """The steps [N] that score and PIT look at: q is exact and leaves a choice."""
    return np.asarray(~np.isnan(policy.q[:, 0]) & (policy.q.max(axis=1) < limits.settled))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Audit:
    """What was found about one engine; causes most probable first."""

    findings: tuple[Finding, ...]
    causes: tuple[str, ...]
    steps: int


def _audit(recording: Recording, limits: Limits) -> _Audit:
    steps, asked = _steps(recording), recording.workload.sampling
    broken = np.concatenate([_broken(block) for block in steps.blocks()])
    if broken.any():
        sentence = f"{broken.sum()} of {len(steps)} rows of log-probabilities are not a distribution"
        finding = _token_finding(
            metric="data",
            outcome=Outcome.FAIL,
            sentence=sentence,
            candidate=float(broken.sum()),
            limit="none: every row is finite and sums to at most 1",
            n=len(steps),
            evidence=tuple(_place(steps, i) for i in np.flatnonzero(broken)[:_WITNESSES].tolist()),
        )
        return _Audit(findings=(finding,), causes=(f"the engine's numbers are broken: {sentence}",), steps=len(steps))
    random = np.random.default_rng(int.from_bytes(recording.digest.encode(), "big"))
    blocks, filtered = [], []
    for block in steps.blocks():
        policy = _policy(block, asked, limits)
        blocks.append(_seen(block, policy, limits, random))
        filtered.append(policy.filters)
    seen = _Seen._make(map(np.concatenate, zip(*blocks, strict=True)))
    filters = tuple(map(Filter.joined, zip(*filtered, strict=True)))
    support = _support(steps, filters, limits)
    score = _score(steps, seen, asked, limits)
    pit = _pit(steps, seen, limits)
    draws, no_chance = _draws(steps, seen, limits)
    causes = list(no_chance)
    if support.outcome is Outcome.FAIL:
        beyond = [(f, _violated(steps, f, limits)) for f in filters]
        causes += [_leak_cause(steps, f, violated) for f, violated in beyond if violated.sum() >= limits.support]
    if not no_chance and Outcome.FAIL in (score.outcome, pit.outcome):
        causes += _shape_causes(steps, asked, limits)
    return _Audit(findings=(support, score, pit, draws), causes=tuple(causes), steps=len(steps))


def _broken(steps: Steps) -> Bools:
    """The rows [N] that are not distributions."""
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.exp(steps.top).sum(axis=1)
    return np.asarray(~np.isfinite(steps.top[:, 0]) | np.isnan(steps.logprob) | ~(sums < 1.01))


def _violated(steps: Steps, one: Filter, limits: Limits) -> Bools:
    """The tokens [N] that lie beyond a filter's edge."""
    return np.asarray(one.seen & (steps.logprob < one.edge - limits.edge_nats))


def _support(steps: Steps, filters: Sequence[Filter], limits: Limits) -> Finding:
    """Tokens beyond an edge: none is drawn by an engine that applies its filters."""
    violated = np.zeros(len(steps), np.bool_)
    edge, name = np.full(len(steps), -np.inf), np.full(len(steps), "", object)
    for one in filters:
        beyond = _violated(steps, one, limits)
        violated |= beyond
        tighter = beyond & (one.edge > edge)
        edge[tighter], name[tighter] = one.edge[tighter], one.name
    blind = [f.name for f in filters if not f.seen.any()]
    outcome = Outcome.PASS if not blind else Outcome.INCONCLUSIVE
    if violated.sum() >= limits.support:
        outcome = Outcome.FAIL
    seen = ", ".join(f"{f.name} seen at {f.seen.sum()}" for f in filters)
    sentence = f"{violated.sum()} of {len(steps)} tokens are excluded by the asked filters ({seen or 'none asked'})"
    if blind:
        sentence += f"; the edge of {' and '.join(blind)} lies outside the known top {steps.k}"
        sentence += "; set top_k within it or temperature 1 in the audit's workload"
    order = sorted(np.flatnonzero(violated).tolist(), key=lambda i: steps.logprob[i] - edge[i])
    return _token_finding(
        metric="support",
        outcome=outcome,
        sentence=sentence,
        candidate=float(violated.sum()),
        limit=f"fewer than {limits.support}: a sampler that applies its filters draws none; edges are widened by "
        f"{limits.top_p_margin:g} (top_p) and {limits.edge_nats:g} nats for rounding",
        n=len(steps),
        evidence=tuple(
            f"{_place(steps, i)}: raw logprob {steps.logprob[i]:.3f}, {name[i]} ends at {edge[i]:.3f} nats"
            for i in order[:_WITNESSES]
        ),
    )


def _score(steps: Steps, seen: _Seen, asked: SamplingParams, limits: Limits) -> Finding:
    """Are the drawn tokens as probable as they should be, on average?"""
    varies = seen.variance_nats2 > _NO_VARIANCE
    information = float(seen.variance_nats2[varies].sum())
    surplus = float(seen.surplus_nats[varies].sum())
    n = int(varies.sum())
    z = surplus / math.sqrt(information) if information > 0.0 else 0.0
    outcome = _outcome(abs(z) > limits.z, n, limits)
    sentence = _too_few(n, steps, limits)
    if outcome is not Outcome.INCONCLUSIVE:
        # Of the mean raw logprob, by ln T: -Var/T a step; so z moves by sqrt(sum Var)/T for each unit of ln T.
        reach = (limits.z + NormalDist().inv_cdf(limits.power)) * asked.temperature / math.sqrt(information)
        direction = "too improbable: temperature too high, or filters ignored"
        if z > 0.0:
            direction = "too probable: temperature too low, or filters too tight"
        told = f"tokens are {direction}" if outcome is Outcome.FAIL else "tokens are as probable as they should be"
        sentence = (
            f"{told} (z {z:+.2f}, {surplus / n:+.3f} nats a token on {n} tokens); a temperature wrong by "
            f"{100 * math.expm1(reach):.1f} % is caught with {100 * limits.power:.0f} % probability"
        )
    return _token_finding(
        metric="score",
        outcome=outcome,
        sentence=sentence,
        candidate=z,
        limit=f"|z| <= {limits.z:g}: a correct sampler exceeds it in 1 of 1000 runs",
        margin=limits.z,
        n=n,
        evidence=(),
    )


def _pit(steps: Steps, seen: _Seen, limits: Limits) -> Finding:
    """Does the whole shape fit, most probable token first?"""
    n = len(seen.u)
    distance, p = ks_uniform(seen.u)
    outcome = _outcome(p < limits.ks_p, n, limits)
    sentence = _too_few(n, steps, limits)
    if outcome is not Outcome.INCONCLUSIVE:
        verb = "do not follow" if outcome is Outcome.FAIL else "follow"
        sentence = f"the drawn tokens {verb} the policy (Kolmogorov-Smirnov D {distance:.4f}, p {p:.2g}, {n} tokens)"
    return _token_finding(
        metric="PIT",
        outcome=outcome,
        sentence=sentence,
        candidate=p,
        limit=f"p >= {limits.ks_p:g}: a correct sampler falls below it in 1 of {1 / limits.ks_p:.0f} runs",
        margin=limits.ks_p,
        n=n,
        evidence=(),
    )


def _draws(steps: Steps, seen: _Seen, limits: Limits) -> tuple[Finding, tuple[str, ...]]:
    """Is anything left to chance? Needs only a bound of q, so it also works where q is not exact."""
    best = steps.top[:, 0].astype(np.float64) - limits.edge_nats
    ties = (steps.top >= best[:, None]).sum(axis=1)
    others = int((steps.logprob < best).sum())
    chance_greedy = math.exp(np.log(np.minimum(1.0, seen.ceiling * ties)).sum())
    log_ceiling = np.bincount(steps.owner, np.log(seen.ceiling), len(steps.answers))
    repeats = defaultdict(list)
    for owner, answer in enumerate(steps.answers):
        repeats[answer.prompt_token_ids].append(owner)
    groups = [owners for owners in repeats.values() if len(owners) > 1]
    same = [owners for owners in groups if len({_answer(steps.answers[i]) for i in owners}) == 1]
    chance_same = math.exp(sum((len(owners) - 1) * log_ceiling[owners[0]] for owners in same))
    causes = []
    if not others and chance_greedy <= limits.impossible:
        causes.append(
            f"greedy decoding where sampling was asked: each of {len(steps)} tokens is the most probable one, which "
            f"sampling does with probability <= {chance_greedy:.1g}"
        )
    elif groups and len(same) == len(groups) and chance_same <= limits.impossible:
        causes.append(
            "every repeat gives the same answer: the seed is not used, or decoding is greedy, or each repeat was sent "
            f"the same seed ({len(groups)} repeated prompts; probability by chance <= {chance_same:.1g})"
        )
    outcome = Outcome.FAIL if causes else (Outcome.PASS if others else Outcome.INCONCLUSIVE)
    sentence = f"{others} of {len(steps)} tokens are not the most probable one; "
    sentence += f"{len(same)} of {len(groups)} repeated prompts always get the same answer"
    finding = _token_finding(
        metric="draws",
        outcome=outcome,
        sentence="; ".join(causes) or sentence,
        candidate=float(others),
        limit=f"no event of probability <= {limits.impossible:g} under the policy",
        n=len(steps),
        evidence=tuple(
            f"{steps.answers[o[0]].id}: {len(o)} equal answers" for o in same[: _WITNESSES if causes else 0]
        ),
    )
    return finding, tuple(causes)


def _leak_cause(steps: Steps, one: Filter, violated: Bools) -> str:
    """Not applied, if as much leaks as the filter should hold back; else applied wrongly."""
    share, count = violated.sum() / one.seen.sum(), int(violated.sum())
    expected = float(np.nanmean(one.leak[one.seen])) if np.isfinite(one.leak[one.seen]).any() else math.nan
    what = f"{100 * share:.1f} % of tokens ({count}) lie outside it"
    deepest = int(steps.rank[violated].max()) + 1
    if one.name.startswith("top_k") and deepest < steps.k // 2:
        return f"{one.name} is not applied as asked: {what}, none beyond rank {deepest}: it looks like top_k {deepest}"
    if math.isnan(expected):
        return f"{one.name} is not applied as asked: {what}"
    verb = "is not applied" if share > expected / 2 else "is applied too loosely"
    return f"{one.name} {verb}: {what}, {100 * expected:.1f} % expected without the filter"


def _shape_causes(steps: Steps, asked: SamplingParams, limits: Limits) -> tuple[str, ...]:
    """What kind of wrong distribution fits: a filter that is too tight, or another temperature."""
    k = steps.k
    expected, drawn, allowed = np.zeros(k + 1), np.zeros(k + 1), []
    for block in steps.blocks():
        policy = _policy(block, asked, limits)
        used = _used(policy, limits)
        q, rank = policy.q[used], block.rank[used]
        expected += q.sum(axis=0)
        drawn += np.bincount(rank, minlength=k + 1)
        rows = (rank < k) & (at(q, rank) > 0.0)
        allowed.append((np.where(q[rows, :-1] > 0.0, block.top[used][rows], -np.inf), rank[rows]))
    deepest = int(np.flatnonzero(drawn).max())
    missing = float(expected[deepest + 1 :].sum())
    if missing > -math.log(limits.impossible):
        return (
            f"no token beyond rank {deepest + 1} was drawn where {missing:.0f} were expected: a filter is tighter than "
            f"asked (it looks like top_k {deepest + 1})",
        )
    temperature, random = fitted_temperature(allowed), np.random.default_rng(0)
    _, p = ks_uniform(np.concatenate([transformed(tempered(top, temperature), rank, random) for top, rank in allowed]))
    if p < limits.ks_p or abs(math.log(temperature / asked.temperature)) > math.log(9.0):
        return ("no other temperature explains the answers",)
    return (f"the answers look like temperature {temperature:.2f} (asked {asked.temperature:.2f})",)


def ks_uniform(u: Floats) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of `u` from uniform on [0, 1], and its p-value.

    Kolmogorov's asymptotic series at Stephens' (1970) argument: three digits from n = 20 on. (0, 1) for no data.
    """
    n = len(u)
    if not n:
        return 0.0, 1.0
    ordered, grid = np.sort(u), np.arange(n + 1) / n
    distance = float(max((grid[1:] - ordered).max(), (ordered - grid[:-1]).max()))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.3:  # p > 0.99999, and the series converges slowly
        return distance, 1.0
    return distance, min(
        1.0, max(0.0, 2 * math.fsum((-1) ** (j - 1) * math.exp(-2 * (j * x) ** 2) for j in range(1, 50)))
    )


def _outcome(failed: bool, n: int, limits: Limits) -> Outcome:
    if n < limits.min_steps:
        return Outcome.INCONCLUSIVE
    return Outcome.FAIL if failed else Outcome.PASS


def _too_few(n: int, steps: Steps, limits: Limits) -> str:
    k = steps.k
    return (
        f"cannot be judged: the policy is known and leaves a choice at {n} of {len(steps)} tokens, {limits.min_steps} "
        f"are needed; ask for more tokens, with top_k <= {k} or temperature 1"
    )


def _headline(audit: _Audit, outcome: Outcome, asked: SamplingParams) -> str:
    filters = "".join(
        f", {name} {getattr(asked, name):g}"
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
        if getattr(asked, name) != off
    )
    decided = [f.metric for f in audit.findings if f.outcome is outcome is not Outcome.PASS]
    numbers = {f.metric: f for f in audit.findings}
    parts = [f"{audit.steps} tokens at temperature {asked.temperature:g}{filters}"]
    if "score" in numbers:
        parts.append(f"{numbers['support'].candidate:.0f} outside the policy")
        parts.append(f"z {numbers['score'].candidate:+.2f}, PIT p {numbers['PIT'].candidate:.2g}")
    return ", ".join(parts) + (f"; decided by {', '.join(decided)}" if decided else "")


def _answer(completion: Completion) -> tuple[object, ...]:
    end = completion.terminator
    return completion.token_ids, None if end is None else end.token_id


def _place(steps: Steps, step: int) -> str:
    answer = steps.answers[int(steps.owner[step])]
    return f"{answer.id}, token {steps.position[step]} (id {steps.token_id[step]})"
