"""Does the candidate's speed outlast the cost of getting and keeping it? Which engine pays, and how sure that is.

Speeds: `parity.serving_rates`. What they cost: `parity.serving_costs`. An engine whose parity or accuracy failed is
never recommended, whatever it saves. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from parity.losses import MOST, seen, smallest
from parity.serving_costs import (
    SECONDS_A_DAY,
    BreakEven,
    Costs,
    Flip,
    Machines,
    Repaid,
    Row,
    advantage,
    break_even_of,
    flips,
    repaid,
    row,
)
from parity.serving_rates import CONFIDENCE, Rates, Speeds, rates
from parity.verdict import Outcome, Verdict

_MOST_TURNS = 10_000
"""Servers beyond which one more or less turns nothing."""
_POWER = 0.9


class Answer(str, Enum):
    """Which engine pays."""

    CANDIDATE = "THE CANDIDATE PAYS"
    REFERENCE = "THE REFERENCE PAYS"
    TRAFFIC = "IT DEPENDS ON THE TRAFFIC"
    """It pays in a part of the expected range."""
    UNDECIDED = "UNDECIDED"
    """Starts are too few or vary too much, or something else was inconclusive."""
    BARRED = "NO RECOMMENDATION"
    """A verdict on parity or accuracy failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What was judged of the candidate apart from its speed: sentences on what failed, what is open, what passed."""

    failed: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()


UNJUDGED = Standing(unsure=("nothing was judged of parity and accuracy; name a recorded run with --run DIR",))


def standing(verdicts: Sequence[Verdict], could_not: Mapping[str, str]) -> Standing:
    """From the verdicts of a run; performance is left out, since it is what is weighed here."""
    said: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    for verdict in verdicts:
        if verdict.check != "performance":
            said[verdict.outcome].append(f"{verdict.check}: {verdict.headline}")
    said[Outcome.INCONCLUSIVE] += [f"{check} could not judge: {reason}" for check, reason in could_not.items()]
    if not any(said.values()):
        return UNJUDGED
    return Standing(
        failed=tuple(said[Outcome.FAIL]),
        unsure=tuple(said[Outcome.INCONCLUSIVE]),
        passed=tuple(said[Outcome.PASS]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Payoff:
    """The answer, and everything that it rests on.

    sentence: the answer in words. costs_alone: what the numbers say without the verdicts.
    repaid, rows: by traffic, ascending. flips: nearest first. assumed: one sentence each.
    """

    answer: Answer
    sentence: str
    costs_alone: Answer
    costs: Costs
    speeds: Speeds
    rates: Rates
    standing: Standing
    break_even: BreakEven
    repaid: tuple[Repaid, ...]
    rows: tuple[Row, ...]
    flips: tuple[Flip, ...]
    assumed: tuple[str, ...]


def decide(measured: Speeds, costs: Costs, judged: Standing) -> Payoff:
    """Which engine pays.

    Raises:
        ConfigError: If a speed is not above 0, or paired sides have different numbers of starts.
    """
    found = rates(measured)
    even = break_even_of(costs, found)
    alone, sentence = _costs_alone(costs, found, measured)
    answer = alone
    if judged.failed:
        answer = Answer.BARRED
        sentence = (
            f"{len(judged.failed)} of {len([*judged.failed, *judged.unsure, *judged.passed])} verdicts on parity and "
            "accuracy failed, so no saving counts; what follows is what it would cost if they passed"
        )
    elif judged.unsure and alone in (Answer.CANDIDATE, Answer.TRAFFIC):
        answer = Answer.UNDECIDED
        sentence = f"by cost alone, {sentence}; but it is not shown that the candidate is as good as the reference"
    expected = sorted(set(costs.output_tokens_per_day))
    traffic = {*expected, costs.middle, expected[0] / 2, expected[-1] * 2, even.tokens_per_day}
    return Payoff(
        answer=answer,
        sentence=sentence,
        costs_alone=alone,
        costs=costs,
        speeds=measured,
        rates=found,
        standing=judged,
        break_even=even,
        repaid=tuple(repaid(costs, found, tokens) for tokens in expected),
        rows=tuple(row(costs, found, tokens) for tokens in sorted(traffic) if math.isfinite(tokens)),
        flips=flips(costs, found),
        assumed=_assumed(costs, measured, found, judged),
    )


def _costs_alone(costs: Costs, found: Rates, measured: Speeds) -> tuple[Answer, str]:
    least, most = costs.output_tokens_per_day
    span = "at the expected traffic" if least == most else "over all of the expected traffic"
    pays = _pays(costs, found.reference_s, found.candidate_s)
    if found.interval_s is None:
        side = {True: "the candidate pays", False: "the reference pays", None: "it depends on the traffic"}[pays]
        return Answer.UNDECIDED, (
            f"as measured {side}, but one start of an engine does not say how much starts vary; measure pairs of both "
            "with `parity bench`"
        )
    worlds = _worlds(costs, found)
    if _surely(True, worlds):
        return Answer.CANDIDATE, f"the candidate pays {span}, also if it is only as fast as its starts surely show"
    if _surely(False, worlds):
        return Answer.REFERENCE, f"the reference pays {span}, also if the candidate is as fast as its starts allow"
    if pays is None:
        way = "above the break-even" if costs.extra >= 0.0 else "below the break-even"
        if costs.machines is Machines.WHOLE:
            way = "where it needs enough servers less"
        return Answer.TRAFFIC, f"the candidate pays in a part of the expected traffic, {way}"
    side = "candidate" if pays else "reference"
    return Answer.UNDECIDED, f"as measured the {side} pays {span}, but starts vary too much to be sure; " + _more(
        costs, found, measured
    )


def _worlds(costs: Costs, found: Rates) -> list[bool | None]:
    """Whether the candidate pays, for everything that the starts allow: both ends, or draws for whole servers."""
    if costs.machines is Machines.FRACTIONAL:
        assert found.interval_s is not None
        pairs = [(found.reference_s, found.reference_s - saved) for saved in found.interval_s]
    else:
        pairs = [(ours, theirs) for ours, theirs in found.plausible().tolist()]
    return [_pays(costs, ours, theirs) for ours, theirs in pairs]


def _surely(pays: bool, worlds: Sequence[bool | None]) -> bool:
    return sum(world is not pays for world in worlds) <= len(worlds) * (1.0 - CONFIDENCE) / 2


def _pays(costs: Costs, reference_s: float, candidate_s: float) -> bool | None:
    """Whether the candidate saves money throughout the expected traffic (True), nowhere in it (False) or in part."""
    least, most = costs.output_tokens_per_day
    if costs.machines is Machines.FRACTIONAL:
        saved = np.array([advantage(costs, tokens, reference_s, candidate_s) for tokens in (least, most)])
    else:
        # Whole servers: the saving turns just above where one side's are full.
        busy = np.array((reference_s, candidate_s)) / (SECONDS_A_DAY * costs.utilisation)
        points = np.array([least, most])
        for s in busy:
            turns = np.arange(math.floor(least * s) + 1, min(math.ceil(most * s), math.floor(least * s) + _MOST_TURNS))
            points = np.concatenate((points, turns / s * (1.0 + 1e-12)))
        ours, theirs = np.ceil(busy[:, None] * points)
        saved = costs.server_month * (ours - theirs) - costs.extra
    return bool((saved > 0.0).all()) if (saved > 0.0).all() or (saved <= 0.0).all() else None


def _more(costs: Costs, found: Rates, measured: Speeds) -> str:
    """How many pairs would decide, if the next ones vary as these."""
    if not measured.paired or found.doubt is None or not costs.output_tokens_per_day[0]:
        return "measure more starts"
    day = SECONDS_A_DAY * costs.utilisation / costs.server_month
    gap = min(abs(found.saved_s - costs.extra * day / tokens) for tokens in costs.output_tokens_per_day)
    deviation = found.doubt.saved_s * math.sqrt(len(measured.reference.output_tokens_per_s))
    pairs = smallest(lambda n: gap * math.sqrt(n) >= seen(n, (1.0 - CONFIDENCE) / 2, _POWER) * deviation)
    if pairs >= MOST:
        return f"both cost so nearly the same that {MOST:,} pairs would not decide"
    return f"about {pairs} pairs would decide, and there are {len(measured.reference.output_tokens_per_s)}"


def _assumed(costs: Costs, measured: Speeds, found: Rates, judged: Standing) -> tuple[str, ...]:
    servers = (
        "whole servers are paid day and night, as many as the traffic needs"
        if costs.machines is Machines.WHOLE
        else "hours of a server are paid as they are used"
    )
    judged_accuracy = any(said.startswith("accuracy") for said in (*judged.failed, *judged.unsure, *judged.passed))
    passed = ", ".join(said.partition(":")[0] for said in judged.passed)
    return (
        f"the traffic has the lengths of profile {measured.profile!r}, {measured.output_tokens_per_request:.4g} output "
        "tokens a request, and production's servers are as the one that was measured",
        f"a server gives {costs.utilisation:.0%} of the speed it has when it is always busy, on either engine; whether "
        "answers are then quick enough is not weighed",
        f"{servers}; {costs.gpus_per_server} GPU{'s' * (costs.gpus_per_server != 1)} each",
        f"keeping the reference takes {costs.reference_build_hours_per_change:g} hours of a server and "
        f"{costs.reference_engineer_hours_per_change:g} of an engineer for each change of the model",
        f"prices and traffic stay as they are for {costs.horizon_months:g} months, and nothing is discounted",
        f"intervals hold with {CONFIDENCE:.0%} ({found.method}) and are of the measured speeds alone; the costs are "
        "taken as they are",
        *([f"the run is of these two engines; it passed {passed}"] if passed else []),
        *([] if judged_accuracy or judged is UNJUDGED else ["accuracy was not judged in this run"]),
        *measured.notes,
    )
