"""Sampling: does each engine sample as it was asked, by its own raw log-probabilities?

One engine at a time and no second model: sampled texts are never compared across engines. At each step the raw
distribution p is known on the top K tokens; the policy q is what the asked temperature and filters make of it:

    p -> p^(1/T) -> min_p -> top_k -> top_p -> renormalised        (vLLM's order)

q is exact where the filters end within the top K, or at T = 1 without filters, where all other tokens share one bucket
of known mass. Other steps, and steps with a tie across the edge of a filter, are left out of the tests that need q.
Whether a step is left out depends on its context alone, never on the drawn token, so nothing is biased by it.

    support   tokens that the policy excludes; three are enough to fail
    score     z = sum(l(x) - E_q l) / sqrt(sum Var_q l): a martingale, N(0, 1) also with dependent tokens
    PIT       u = F(x-) + V q(x), V uniform: independent and uniform if the tokens are drawn from q (Kolmogorov-Smirnov)
    draws     is there any chance at all: not all tokens the most probable ones, not every repeat the same answer

Source of the rules and their measured error rates: docs/checks/sampling.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from parity import diagnose, twosample
from parity.comparable import require_same_inputs
from parity.errors import IncomparableError
from parity.noise import Noise
from parity.prompts import SamplingParams
from parity.recording import Completion, Recording
from parity.verdict import Finding, Outcome, Verdict, worst

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

ROLES = ("sampled-reference", "sampled-candidate")
REQUIRES: tuple[str, ...] = ()
_WITNESSES = 3
_PERMUTATIONS = 9999
_MOVES_CHOICE: Mapping[str, float] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,  # the stop tokens are masked until then, which raw log-probabilities do not show
}
_FLOOR_NATS = -100.0  # stands for a masked token's -inf, so that sums stay finite
_NO_MASS = 1e-6  # what float32 leaves of the tail's mass when the row holds everything
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """All drawn tokens of a recording, stop tokens included, with the distributions they were drawn from.

    Shapes: owner, position, token_id, rank, logprob [N]; top [N, K], descending, nats. `rank` is K outside the top K.
    """

    answers: tuple[Completion, ...]
    owner: Ints
    position: Ints
    token_id: Ints
    rank: Ints
    logprob: Floats
    top: Floats

    def __len__(self) -> int:
        return len(self.rank)


def _steps(recording: Recording) -> _Steps:
    """Sorted by prompt id: a verdict must not depend on the order of asking or of finishing."""
    mode = recording.fingerprint.context.get("engine.logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        raise IncomparableError(
            f"{recording.label} returned {mode}: the audit needs log-probabilities before temperature and filters"
        )
    answers = tuple(sorted(recording.completions, key=lambda c: c.id))
    owners, positions, tokens, chosen, ids, top = [], [], [], [], [], []
    for owner, answer in enumerate(answers):
        parts = [(0, answer.token_ids, answer.logprobs)]
        if answer.terminator is not None:
            # Leaving out the steps that chose to stop would select by what was drawn.
            parts.append((len(answer.token_ids), (answer.terminator.token_id,), answer.terminator.logprobs))
        for start, token_ids, logprobs in parts:
            if not token_ids:
                continue
            if logprobs is None or not logprobs.k:
                what = "the answer" if token_ids is answer.token_ids else "the stop token"
                raise IncomparableError(
                    f"{recording.label} returned no log-probabilities for {what} of {answer.id!r}, and the audit rests "
                    "on them; ask for the top 20 of every token"
                )
            shape = (len(logprobs), logprobs.k)
            owners.append(np.full(len(token_ids), owner))
            positions.append(start + np.arange(len(token_ids)))
            tokens.append(np.asarray(token_ids, np.int64))
            chosen.append(np.frombuffer(logprobs.chosen, np.float32).astype(np.float64))
            ids.append(np.frombuffer(logprobs.top_token_ids, np.int32).reshape(shape))
            top.append(np.frombuffer(logprobs.top, np.float32).reshape(shape))
    k = min((row.shape[1] for row in top), default=1)
    token_id = np.concatenate([np.empty(0, np.int64), *tokens])
    table = np.concatenate([np.empty((0, k), np.float64), *(row[:, :k] for row in top)])
    hit = np.concatenate([np.empty((0, k), np.int32), *(row[:, :k] for row in ids)]) == token_id[:, None]
    rank = np.where(hit.any(axis=1), hit.argmax(axis=1), k)
    own = np.concatenate([np.empty(0), *chosen])
    return _Steps(
        answers=answers,
        owner=np.concatenate([np.empty(0, np.int64), *owners]),
        position=np.concatenate([np.empty(0, np.int64), *positions]),
        token_id=token_id,
        rank=rank,
        logprob=np.where(rank < k, _at(table, np.minimum(rank, k - 1)), own),
        top=table,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filter:
    """One filter of the policy against the drawn tokens.

    seen, violated: [N] where its edge is known, and where the drawn token lies beyond it.
    edge: [N] the lowest raw logprob it allows, nats. leak: [N] the mass beyond it, NaN where that is not known.
    """

    name: str
    seen: Bools
    violated: Bools
    edge: Floats
    leak: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Policy:
    """What was asked, at each step.

    q: [N, K + 1] probabilities of the top K and, last, of all other tokens; NaN rows where not exact.
    ceiling: [N] an upper bound of the largest probability, known at every step.
    """

    q: Floats
    ceiling: Floats
    filters: tuple[_Filter, ...]


def _policy(steps: _Steps, asked: SamplingParams, limits: Limits) -> _Policy:
    """Apply temperature, min_p, top_k and top_p, in vLLM's order, to what is known of each distribution."""
    top, logprob, k = steps.top, steps.logprob, steps.top.shape[1]
    scaled = (top - top[:, :1]) / asked.temperature
    weight = np.exp(scaled)  # relative to the most probable token's, as is `tail`
    mass = np.maximum(1.0 - np.exp(top).sum(axis=1), 0.0)
    mass[mass < _NO_MASS] = 0.0
    unknown = mass / np.exp(top[:, 0]) if asked.temperature == 1.0 else np.full(len(steps), np.nan)
    tail = np.where(mass == 0.0, 0.0, unknown)
    kept = np.ones(top.shape, np.bool_)
    filters = []

    def cut_tail(closed: Bools) -> None:
        """Nothing of the tail is left where the filter ends within the top K; how much is left elsewhere is unknown."""
        tail[~closed & (tail != 0.0)] = np.nan
        tail[closed] = 0.0

    def add(name: str, edge: Floats, seen: Bools) -> None:
        inside = np.where(kept & (top >= edge[:, None] - limits.edge_nats), weight, 0.0).sum(axis=1)
        whole = np.where(kept, weight, 0.0).sum(axis=1) + tail
        violated = seen & (logprob < edge - limits.edge_nats)
        filters.append(_Filter(name=name, seen=seen, violated=violated, edge=edge, leak=1.0 - inside / whole))

    if asked.min_p > 0.0:
        lowest = math.log(asked.min_p)
        add(f"min_p {asked.min_p:g}", top[:, 0] + asked.temperature * lowest, np.ones(len(steps), np.bool_))
        kept &= scaled >= lowest
        cut_tail(~kept[:, -1])
    # Which of two equally probable tokens an edge keeps, or whether both, is the engine's choice. Logits in 16 bits tie
    # often, and what a tie at the edge of top_k adds also moves the nucleus of top_p, which comes after it.
    tied_k = np.zeros(len(steps), np.bool_)
    if 0 < asked.top_k < k:
        tied_k = top[:, asked.top_k - 1] - top[:, asked.top_k] < limits.edge_nats
    if asked.top_k > 0:
        edge = top[:, asked.top_k - 1] if asked.top_k <= k else np.full(len(steps), -np.inf)
        add(f"top_k {asked.top_k}", edge, np.full(len(steps), asked.top_k <= k))
        kept[:, asked.top_k :] = False
        cut_tail(np.full(len(steps), asked.top_k <= k))
    inside = np.where(kept, weight, 0.0)
    whole = inside.sum(axis=1) + tail
    ceiling = 1.0 / (inside.sum(axis=1) * asked.top_p)
    if asked.top_p < 1.0:
        before = (np.cumsum(inside, axis=1) - inside) / whole[:, None]
        wide = asked.top_p + limits.top_p_margin
        last = np.maximum((kept & (before < wide)).sum(axis=1) - 1, 0)
        seen = (inside.sum(axis=1) / whole >= wide) & ~tied_k
        add(f"top_p {asked.top_p:g}", _at(top, last), seen)
        kept &= before < asked.top_p
        cut_tail(inside.sum(axis=1) / whole >= asked.top_p)
    q = np.concatenate([np.where(kept, weight, 0.0), tail[:, None]], axis=1)
    q /= q.sum(axis=1, keepdims=True)
    last = np.maximum(kept.sum(axis=1) - 1, 0)
    tied = tied_k | ((last < k - 1) & (_at(top, last) - _at(top, np.minimum(last + 1, k - 1)) < limits.edge_nats))
    q[tied] = np.nan
    return _Policy(q=q, ceiling=np.where(np.isnan(q[:, 0]), np.minimum(ceiling, 1.0), q[:, 0]), filters=tuple(filters))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Audit:
    """What was found about one engine; causes most probable first."""

    findings: tuple[Finding, ...]
    causes: tuple[str, ...]
    steps: int


def _audit(recording: Recording, limits: Limits) -> _Audit:
    steps, asked = _steps(recording), recording.workload.sampling
    with np.errstate(over="ignore", invalid="ignore"):
        broken = ~np.isfinite(steps.top[:, 0]) | np.isnan(steps.logprob) | ~(np.exp(steps.top).sum(axis=1) < 1.01)
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
    policy = _policy(steps, asked, limits)
    used = ~np.isnan(policy.q[:, 0]) & (policy.q.max(axis=1, initial=0.0) < limits.settled)
    support = _support(steps, policy, limits)
    score = _score(steps, policy, used, asked, limits)
    pit = _pit(steps, policy, used, recording.digest, limits)
    draws, no_chance = _draws(steps, policy, limits)
    causes = list(no_chance)
    if support.outcome is Outcome.FAIL:
        causes += [_leak_cause(steps, f) for f in policy.filters if f.violated.sum() >= limits.support]
    if not no_chance and Outcome.FAIL in (score.outcome, pit.outcome):
        causes += _shape_causes(steps, policy, used, asked, limits)
    return _Audit(findings=(support, score, pit, draws), causes=tuple(causes), steps=len(steps))


def _support(steps: _Steps, policy: _Policy, limits: Limits) -> Finding:
    """Tokens beyond an edge: none is drawn by an engine that applies its filters."""
    violated = np.zeros(len(steps), np.bool_)
    edge, name = np.full(len(steps), -np.inf), np.full(len(steps), "", object)
    for one in policy.filters:
        violated |= one.violated
        tighter = one.violated & (one.edge > edge)
        edge[tighter], name[tighter] = one.edge[tighter], one.name
    blind = [f.name for f in policy.filters if not f.seen.any()]
    outcome = Outcome.PASS if not blind else Outcome.INCONCLUSIVE
    if violated.sum() >= limits.support:
        outcome = Outcome.FAIL
    seen = ", ".join(f"{f.name} seen at {f.seen.sum()}" for f in policy.filters)
    sentence = f"{violated.sum()} of {len(steps)} tokens are excluded by the asked filters ({seen or 'none asked'})"
    if blind:
        sentence += f"; the edge of {' and '.join(blind)} lies outside the known top {steps.top.shape[1]}"
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


def _score(steps: _Steps, policy: _Policy, used: Bools, asked: SamplingParams, limits: Limits) -> Finding:
    """Are the drawn tokens as probable as they should be, on average?"""
    q, top = policy.q[used], np.maximum(steps.top[used], _FLOOR_NATS)
    # Any function of the context serves for the tail's logprob: one nat below the last known token.
    values = np.concatenate([top, top[:, -1:] - 1.0], axis=1)
    mean = (q * values).sum(axis=1)
    variance = (q * (values - mean[:, None]) ** 2).sum(axis=1)
    varies = variance > _NO_VARIANCE
    information = float(variance[varies].sum())
    surplus = float((_at(values, steps.rank[used]) - mean)[varies].sum())
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
        n=n,
        evidence=(),
    )


def _pit(steps: _Steps, policy: _Policy, used: Bools, digest: str, limits: Limits) -> Finding:
    """Does the whole shape fit, most probable token first?"""
    u = _transformed(policy.q[used], steps.rank[used], digest)
    n = len(u)
    distance, p = ks_uniform(u)
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
        n=n,
        evidence=(),
    )


def _draws(steps: _Steps, policy: _Policy, limits: Limits) -> tuple[Finding, tuple[str, ...]]:
    """Is anything left to chance? Needs only a bound of q, so it also works where q is not exact."""
    best = steps.top[:, 0] - limits.edge_nats
    ties = (steps.top >= best[:, None]).sum(axis=1)
    others = int((steps.logprob < best).sum())
    chance_greedy = math.exp(np.log(np.minimum(1.0, policy.ceiling * ties)).sum())
    log_ceiling = np.bincount(steps.owner, np.log(policy.ceiling), len(steps.answers))
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


def _leak_cause(steps: _Steps, one: _Filter) -> str:
    """Not applied, if as much leaks as the filter should hold back; else applied wrongly."""
    share, count = one.violated.sum() / one.seen.sum(), int(one.violated.sum())
    expected = float(np.nanmean(one.leak[one.seen])) if np.isfinite(one.leak[one.seen]).any() else math.nan
    what = f"{100 * share:.1f} % of tokens ({count}) lie outside it"
    deepest = int(steps.rank[one.violated].max()) + 1
    if one.name.startswith("top_k") and deepest < steps.top.shape[1] // 2:
        return f"{one.name} is not applied as asked: {what}, none beyond rank {deepest}: it looks like top_k {deepest}"
    if math.isnan(expected):
        return f"{one.name} is not applied as asked: {what}"
    verb = "is not applied" if share > expected / 2 else "is applied too loosely"
    return f"{one.name} {verb}: {what}, {100 * expected:.1f} % expected without the filter"


def _shape_causes(
    steps: _Steps, policy: _Policy, used: Bools, asked: SamplingParams, limits: Limits
) -> tuple[str, ...]:
    """What kind of wrong distribution fits: a filter that is too tight, or another temperature."""
    q, rank, top = policy.q[used], steps.rank[used], steps.top[used]
    expected, drawn = q.sum(axis=0), np.bincount(rank, minlength=q.shape[1])
    deepest = int(np.flatnonzero(drawn).max())
    missing = float(expected[deepest + 1 :].sum())
    if missing > -math.log(limits.impossible):
        return (
            f"no token beyond rank {deepest + 1} was drawn where {missing:.0f} were expected: a filter is tighter than "
            f"asked (it looks like top_k {deepest + 1})",
        )
    rows = (rank < top.shape[1]) & (_at(q, rank) > 0.0)
    temperature, fitted = _fitted_temperature(np.where(q[:, :-1] > 0.0, top, -np.inf)[rows], rank[rows])
    _, p = ks_uniform(_transformed(fitted, rank[rows], ""))
    if p < limits.ks_p or abs(math.log(temperature / asked.temperature)) > math.log(9.0):
        return ("no other temperature explains the answers",)
    return (f"the answers look like temperature {temperature:.2f} (asked {asked.temperature:.2f})",)


def _fitted_temperature(top: Floats, rank: Ints) -> tuple[float, Floats]:
    """The most likely temperature, and the distributions it gives, among the tokens that are not -inf in `top`.

    Conditioning on these tokens makes every temperature computable. The derivative of the log-likelihood by 1/T falls
    strictly, so its zero is found by bisection, in ln T on [0.1, 10].
    """
    known = np.maximum(top - top[:, :1], _FLOOR_NATS)
    drawn = float(_at(known, rank).sum())
    low, high = math.log(0.1), math.log(10.0)
    for _ in range(20):
        middle = (low + high) / 2
        q = np.where(np.isfinite(top), np.exp(known / math.exp(middle)), 0.0)
        q /= q.sum(axis=1, keepdims=True)
        low, high = (low, middle) if drawn > float((q * known).sum()) else (middle, high)
    return math.exp((low + high) / 2), q


def _transformed(q: Floats, rank: Ints, digest: str) -> Floats:
    """The probability integral transform, its randomisation fixed by the recording. Shape: [N]."""
    v = np.random.default_rng(int.from_bytes(digest.encode(), "big")).random(len(rank))
    at = _at(q, rank) if len(rank) else np.empty(0)
    return np.clip(_at(np.cumsum(q, axis=1), rank) - at + v * at, 0.0, 1.0)


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


def _too_few(n: int, steps: _Steps, limits: Limits) -> str:
    k = steps.top.shape[1]
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


def _place(steps: _Steps, step: int) -> str:
    answer = steps.answers[int(steps.owner[step])]
    return f"{answer.id}, token {steps.position[step]} (id {steps.token_id[step]})"


def _at(table: Floats, column: Ints) -> Floats:
    """table[i, column[i]] for every row i."""
    return table[np.arange(len(table)), column]
