"""Which token is taken where nothing is left to chance: temperature 0, and penalties on top of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from parity.probes.probe import Cause, Found, as_asked, many, otherwise, unknown
from parity.probes.questions import PENALTY, Experiment
from parity.probes.seen import Seen, Step

NO_LOGPROBS = "the engine returned no log-probabilities"
_LEAST_REPETITION_NATS = 2.0
"""What a repetition penalty of 2 takes from a token at least: half of its logit, or once more a negative one. That
likely tokens' logits are 4 and more away from 0 is an assumption; log-probabilities do not show them."""
_FEWEST_SKIPPED = 3  # tokens; a sampler may skip one or two that the prompt happens to hold


def greedy(seen: Seen) -> Found:
    """Temperature 0: the most probable token at every step, and if not, what explains the choices."""
    steps = seen.steps(Experiment.BASE)
    if not steps:
        return unknown(NO_LOGPROBS)
    off = seen.off(steps, [s.gap() for s in steps])
    if not off:
        return as_asked(f"each of {many(len(steps), 'token')} is the engine's own most probable", len(steps))
    cause, how = _explanation(seen, steps, [s for s, _ in off])
    sentence = f"{len(off)} of {many(len(steps), 'token')} are not the engine's own most probable, "
    sentence += f"by up to {off[0][1]:.2f} nats: {how}"
    return otherwise(cause, sentence, len(steps), [_skipped(s, gap) for s, gap in off])


def _skipped(step: Step, gap_nats: float) -> str:
    best = next(iter(step.row))
    where = (
        "the answer" if best in step.before else "the prompt" if best in step.prompt else "neither prompt nor answer"
    )
    return f"{step}: token {step.token_id} taken, {gap_nats:.2f} nats below token {best}, which {where} holds"


def _explanation(seen: Seen, steps: Sequence[Step], off: Sequence[Step]) -> tuple[Cause | None, str]:
    """A penalty is fitted to all steps, also to those where it must not have been strong enough."""
    ends = seen.model_token_ids("eos_token_id")
    if not seen.off(steps, [s.gap(lambda i: math.inf if i in ends else 0.0) for s in steps]):
        return Cause.END_MASKED, "all would be, if the end-of-sequence token could not be taken"
    skipped = [next(iter(s.row)) for s in off]
    held = sum(i in s.prompt or i in s.before for s, i in zip(off, skipped, strict=True))
    only_prompt = sum(i in s.prompt and i not in s.before for s, i in zip(off, skipped, strict=True))
    if len(off) >= _FEWEST_SKIPPED:
        for cause, counted in ((Cause.PRESENCE_APPLIED, set), (Cause.FREQUENCY_APPLIED, list)):
            if (strength := _strength(seen, steps, counted)) is not None:
                low, high = strength
                return cause, f"all are, once {low:.2f} to {high:.2f} nats are taken from each token of the answer"
        if not seen.off(steps, [_repetition_gap(s, {*s.prompt, *s.before}, at_least_nats=0.0) for s in steps]):
            how = f"every token passed over is in prompt or answer, {only_prompt} of {len(off)} in the prompt only"
            return Cause.REPETITION_APPLIED, how
        how = f"{len(off) - held} of the tokens passed over are in neither prompt nor answer, so it is no penalty"
        return Cause.GREEDY_SAMPLES, how
    if held < len(off):
        return Cause.GREEDY_SAMPLES, "a token that neither prompt nor answer holds was passed over"
    return None, "too few to tell a penalty from chance"


def _strength(
    seen: Seen, steps: Sequence[Step], counted: Callable[[Sequence[int]], Collection[int]]
) -> tuple[float, float] | None:
    """The strengths in nats that make every choice the best, if each token loses its count times the strength.

    Every other token of a row bounds the strength from one side; None if no positive strength is left.
    """
    low, high = 0.0, math.inf
    for step in steps:
        counts = Counter(counted(step.before))
        own = counts[step.token_id]
        for token_id, value in step.row.items():
            more, lead = counts[token_id] - own, value - step.logprob - seen.tolerance_nats
            if more > 0:
                low = max(low, lead / more)
            elif more < 0:
                high = min(high, lead / more)
            elif lead > 0.0:
                return None
    return (low, high) if 0.0 < low <= high else None


def _repetition_gap(step: Step, held: Collection[int], *, at_least_nats: float) -> float:
    """How far a choice lies below the best one under any repetition penalty of some strength. In nats.

    It keeps the order among the tokens held and among the others, and takes `at_least_nats` or more from the former;
    how much hangs on logits, which log-probabilities show only up to a constant.
    """
    best_held = max((v for i, v in step.row.items() if i in held), default=-math.inf)
    best_new = max((v for i, v in step.row.items() if i not in held), default=-math.inf)
    if step.token_id not in held:
        return best_new - step.logprob
    return max(best_held - step.logprob, best_new - (step.logprob - at_least_nats))


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """One penalty: where it is asked, how far each step is from obeying it, and what else might explain the choices."""

    experiment: Experiment
    gap: Callable[[Step], float]
    ignored: Cause
    others: tuple[tuple[Callable[[Step], float], Cause], ...]
    unexplained: Cause


def _presence(step: Step, tokens: Sequence[int]) -> float:
    return step.gap(lambda i: PENALTY * (i in tokens))


def _frequency(step: Step, tokens: Sequence[int]) -> float:
    counts = Counter(tokens)
    return step.gap(lambda i: PENALTY * counts[i])


def _repetition(step: Step, tokens: Sequence[int]) -> float:
    return _repetition_gap(step, set(tokens), at_least_nats=_LEAST_REPETITION_NATS)


REPETITION = Penalty(
    experiment=Experiment.REPETITION,
    gap=lambda s: _repetition(s, (*s.prompt, *s.before)),
    ignored=Cause.REPETITION_IGNORED,
    others=((lambda s: _repetition(s, s.before), Cause.REPETITION_SPARES_PROMPT),),
    unexplained=Cause.REPETITION_OTHER,
)
PRESENCE = Penalty(
    experiment=Experiment.PRESENCE,
    gap=lambda s: _presence(s, s.before),
    ignored=Cause.PRESENCE_IGNORED,
    others=((lambda s: _presence(s, (*s.prompt, *s.before)), Cause.PRESENCE_COUNTS_PROMPT),),
    unexplained=Cause.PRESENCE_OTHER,
)
FREQUENCY = Penalty(
    experiment=Experiment.FREQUENCY,
    gap=lambda s: _frequency(s, s.before),
    ignored=Cause.FREQUENCY_IGNORED,
    others=((lambda s: _frequency(s, (*s.prompt, *s.before)), Cause.FREQUENCY_COUNTS_PROMPT),),
    unexplained=Cause.FREQUENCY_OTHER,
)


def penalty(seen: Seen, one: Penalty) -> Found:
    """A penalty of 2: the best token after it was applied to the raw row, at every step of the penalised answers."""
    steps = seen.steps(one.experiment)
    if not steps:
        return unknown(NO_LOGPROBS)
    name, raw = one.experiment.value, [s.gap() for s in steps]
    moved = sum(gap > seen.tolerance_nats for gap in raw)
    off = seen.off(steps, [one.gap(s) for s in steps])
    if not off and not moved:
        return unknown(f"no choice of {many(len(steps), 'token')} hangs on {name} {PENALTY:g}", len(steps))
    if not off:
        sentence = f"each of {many(len(steps), 'token')} is the best one after {name} {PENALTY:g}, "
        return as_asked(sentence + f"{moved} of them not the best one before", len(steps))
    hypotheses = ((Step.gap, one.ignored), *one.others)
    fits = [cause for gap, cause in hypotheses if not seen.off(steps, [gap(s) for s in steps])]
    sentence = f"{len(off)} of {many(len(steps), 'token')} are not the best ones after {name} {PENALTY:g}, by up to "
    sentence += f"{off[0][1]:.2f} nats"
    witnesses = [f"{s}: token {s.token_id} taken, {gap:.2f} nats too low" for s, gap in off]
    return otherwise(fits[0] if fits else one.unexplained, sentence, len(steps), witnesses)
