"""How often each rule calls a correct engine slower, and a slower one slower: seeded simulations, as Markdown tables.

python benchmarks/performance_rules.py [--runs 4000] [--of-requests 1000]

The logarithm of a request's time is day + start + request: a start of an engine has its luck, a day another, and the
requests of a start are an AR(1) series (correlation 0.5, CV 20 %, 1,000 a start). The first table shows all rules the
same engines. The second shows stage AB by the CV of a start's value, whatever it consists of, for one metric and for a
run of three that are correlated (0.7). `--runs` a cell, `--of-requests` for the tests on requests.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from parity.losses import Floats, Rule, Spread, needed, seen
from parity.regression import Decision, against_history, control, decide
from parity.service_metrics import Direction
from parity.traffic import GATED_MOST
from parity.verdict import Outcome, worst

SEED = 20261124
LOSSES = (0.0, 0.03, 0.05, 0.10)
RULE = Rule(direction=Direction.LOWER)
ALPHA = RULE.alpha_fail
STARTS, REQUESTS, REQUEST_CV, RHO = 5, 1000, 0.2, 0.5
OF_REQUESTS = REQUEST_CV * math.sqrt((1 + RHO) / (1 - RHO) / REQUESTS)
"""How much the mean of a start's requests varies by them alone."""


@dataclass(frozen=True)
class Host:
    """CVs: of a start's luck, and of a day's."""

    start: float
    day: float

    @property
    def value(self) -> float:
        """Of a start's value."""
        return math.hypot(self.start, OF_REQUESTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--of-requests", type=int, default=1000)
    asked = parser.parse_args()
    hosts = (Host(0.01, 0.0), Host(0.01, 0.01), Host(0.02, 0.01))
    print(f"all rules: called slower at a loss of 0 (false alarm), 3, 5, 10 %; {asked.runs} runs a cell")
    print(f"(tests on requests: {asked.of_requests}); nominal alpha {ALPHA:g}\n")
    print(row("", (f"start {h.start:.0%}, day {h.day:.0%}" for h in hosts)))
    print(row("---", ("---" for _ in hosts)))
    for name, rule in rules().items():
        runs = asked.of_requests if "requests" in name else asked.runs
        print(row(name, (shares(rule(host, loss, runs) for loss in LOSSES) for host in hosts)), flush=True)
    stage_ab(asked.runs)
    hosts_judged(asked.runs)
    planned()
    days_of_history()


def row(head: str, cells: Iterator[str]) -> str:
    return f"| {' | '.join((head, *cells))} |"


def shares(found: Iterator[float]) -> str:
    first, *others = (f"{share:.3f}".lstrip("0") or "0" for share in found)
    return f"**{first}**, {', '.join(others)}"


# All rules: the share of runs that are called slower ------------------------------------------------------------------

Slower = Callable[[Host, float, int], float]


def rules() -> dict[str, Slower]:
    return {
        f"Mann-Whitney on the requests of {STARTS} starts": on_requests(
            lambda old, new: stats.mannwhitneyu(new, old, alternative="greater").pvalue
        ),
        f"t test on the requests of {STARTS} starts": on_requests(
            lambda old, new: stats.ttest_ind(new, old, equal_var=False, alternative="greater").pvalue
        ),
        f"Welch's t test on {STARTS} starts, golden of another day": welch,
        f"fixed limit of 5 % on the means of {STARTS} starts, golden of another day": fixed_limit,
        "stage G, 5 days of 3 starts": stage_g(5),
        "stage G, 10 days of 3 starts": stage_g(10),
        f"paired t test, {STARTS} pairs": five_pairs,
        "stage AB, history of 30 degrees": lambda host, loss, runs: failed(pairs_judged(host.value, loss, runs, 30)),
        "stage AB, history of 9 degrees": lambda host, loss, runs: failed(pairs_judged(host.value, loss, runs, 9)),
        "stage AB, no history": lambda host, loss, runs: failed(pairs_judged(host.value, loss, runs, None)),
    }


def on_requests(p_value: Callable[[Floats, Floats], float]) -> Slower:
    def slower(host: Host, loss: float, runs: int) -> float:
        random = np.random.default_rng(SEED)
        called = 0
        for _ in range(runs):
            day = host.day * random.standard_normal((2, 1, 1))
            start = host.start * random.standard_normal((2, STARTS, 1))
            old, new = (day + start + REQUEST_CV * series(random)).reshape(2, -1)
            called += p_value(old, new + math.log1p(loss)) < ALPHA
        return called / runs

    return slower


def series(random: np.random.Generator) -> Floats:
    """AR(1) of variance 1, float64 [2, STARTS, REQUESTS]."""
    noise = random.standard_normal((REQUESTS, 2, STARTS))
    for at in range(1, REQUESTS):
        noise[at] = RHO * noise[at - 1] + math.sqrt(1 - RHO * RHO) * noise[at]
    return np.moveaxis(noise, 0, -1)


def starts(random: np.random.Generator, host: Host, runs: int) -> Floats:
    """Values of the starts of one day, float64 [runs, STARTS]."""
    day = host.day * random.standard_normal((runs, 1))
    return np.asarray(day + host.value * random.standard_normal((runs, STARTS)))


def welch(host: Host, loss: float, runs: int) -> float:
    random = np.random.default_rng(SEED)
    old, new = starts(random, host, runs), starts(random, host, runs) + math.log1p(loss)
    found = stats.ttest_ind(new, old, axis=1, equal_var=False, alternative="greater")
    return float((found.pvalue < ALPHA).mean())


def fixed_limit(host: Host, loss: float, runs: int) -> float:
    random = np.random.default_rng(SEED)
    old, new = starts(random, host, runs), starts(random, host, runs) + math.log1p(loss)
    return float((new.mean(axis=1) - old.mean(axis=1) > math.log1p(0.05)).mean())


def five_pairs(host: Host, loss: float, runs: int) -> float:
    random = np.random.default_rng(SEED)
    values = math.log1p(loss) + math.sqrt(2) * host.value * random.standard_normal((runs, STARTS))
    return float((stats.ttest_1samp(values, 0.0, axis=1, alternative="greater").pvalue < ALPHA).mean())


def stage_g(days: int) -> Slower:
    def slower(host: Host, loss: float, runs: int) -> float:
        random = np.random.default_rng(SEED)
        called = 0
        for _ in range(runs):
            values = host.day * random.standard_normal((days + 1, 1)) + host.value * random.standard_normal(
                (days + 1, 3)
            )
            values[-1] += math.log1p(loss)
            *past, today = np.exp(values).tolist()
            called += against_history(past, today, RULE).outcome is Outcome.FAIL
        return called / runs

    return slower


# Stage AB -------------------------------------------------------------------------------------------------------------


def pairs_judged(
    cv: float, loss: float, runs: int, degrees: int | None, *, wrong: float = 1.0, metrics: int = 1
) -> list[list[Decision]]:
    """Decisions on correlated metrics of the same loss. wrong: their true CV over the one that the history saw."""
    random, rule = np.random.default_rng(SEED), RULE.among(metrics)

    def pairs() -> Floats:
        common, own = random.standard_normal((runs, 1, 40)), random.standard_normal((runs, metrics, 40))
        return np.asarray(math.log1p(loss) + math.sqrt(2) * cv * (math.sqrt(0.7) * common + math.sqrt(0.3) * own))

    first, fresh = pairs(), pairs()
    judged = []
    for run, again in zip(first, fresh, strict=True):
        spreads: list[Spread | None] = [None] * metrics
        if degrees is not None:
            seen = math.sqrt(2) * cv / wrong * np.sqrt(random.chisquare(degrees, metrics) / degrees)
            spreads = [Spread(sigma=float(sigma), degrees=degrees, source="simulated") for sigma in seen]
        judged.append([decide(x, y, spread=s, rule=rule) for x, y, s in zip(run, again, spreads, strict=True)])
    return judged


def failed(runs: Sequence[Sequence[Decision]]) -> float:
    return float(np.mean([worst([decision.outcome for decision in run]) is Outcome.FAIL for run in runs]))


def stage_ab(runs: int) -> None:
    print(
        f"\nstage AB: one metric FAIL / PASS, mean pairs + fresh pairs; any of {GATED_MOST} metrics FAIL; {runs} runs\n"
    )
    print(row("start's value, history", (f"loss {loss:.0%}" for loss in LOSSES)))
    print(row("---", ("---" for _ in LOSSES)))
    for cv in (0.01, 0.02):
        for degrees, wrong in ((30, 1.0), (9, 1.0), (6, 1.0), (None, 1.0), (30, 1.5), (30, 2.0), (30, 3.0), (9, 2.0)):
            known = "none" if degrees is None else f"{degrees} degrees"
            head = f"CV {cv:.0%}, {known}" + (f", {wrong:g} times too quiet" if wrong > 1 else "")
            cells = (cell(pairs_judged(cv, loss, runs, degrees, wrong=wrong, metrics=GATED_MOST)) for loss in LOSSES)
            print(row(head, cells), flush=True)


def cell(runs: Sequence[Sequence[Decision]]) -> str:
    """Of the first metric, and of all."""
    first = [run[0] for run in runs]
    fail, passed = (np.mean([d.outcome is outcome for d in first]) for outcome in (Outcome.FAIL, Outcome.PASS))
    confirmed = [d.n for d in first if "fresh" in d.sentence]
    pairs = np.mean([len(d.evidence) or RULE.unknown for d in first])
    return f"{fail:.4f} / {passed:.3f}, {pairs:.1f} + {sum(confirmed) / len(first):.1f}; {failed(runs):.4f}"


# The host, by pairs of one engine with itself -------------------------------------------------------------------------


def hosts_judged(runs: int) -> None:
    counts = (8, 12, 16, 24)
    print(f"\nA/A control: may judge / may not, the rest is open; {runs} runs a cell\n")
    print(row("CV of a start's value, bias", (f"{count} pairs" for count in counts)))
    print(row("---", ("---" for _ in counts)))
    for cv, bias in ((0.01, 0.0), (0.02, 0.0), (0.03, 0.0), (0.05, 0.0), (0.01, 0.01), (0.01, 0.02), (0.01, 0.03)):
        print(row(f"CV {cv:.0%}, bias {bias:.0%}", (controlled(cv, bias, count, runs) for count in counts)), flush=True)


def controlled(cv: float, bias: float, pairs: int, runs: int) -> str:
    random = np.random.default_rng(SEED)
    drawn = math.log1p(bias) + math.sqrt(2) * cv * random.standard_normal((runs, pairs))
    found = [control(values, RULE, "simulated").outcome for values in drawn]
    return f"{found.count(Outcome.PASS) / runs:.3f} / {found.count(Outcome.FAIL) / runs:.3f}"


# What the planner says ------------------------------------------------------------------------------------------------


def planned() -> None:
    margins = (0.03, 0.05, 0.10, 0.20)
    print(f"\npairs that decide one of {GATED_MOST} metrics with power 0.9, history of 30 degrees / none\n")
    print(row("CV of a start's value", (f"margin {margin:.0%}" for margin in margins)))
    print(row("---", ("---" for _ in margins)))
    for cv in (0.005, 0.01, 0.02, 0.03, 0.05):
        spread = Spread(sigma=math.sqrt(2) * cv, degrees=30, source="")
        print(row(f"{cv:.1%}", (both(spread, margin) for margin in margins)))


def both(spread: Spread, margin: float) -> str:
    rule = Rule(direction=Direction.LOWER, margin=margin).among(GATED_MOST)
    known = needed(sigma=spread.cautious, rule=rule)
    return f"{known} / {needed(sigma=spread.sigma, rule=rule, known=False)}"


def days_of_history() -> None:
    counts = (5, 10, 20)
    print("\nstage G: the loss that fails with probability 0.9, by days of 3 starts\n")
    print(row("CVs", (f"{count} days" for count in counts)))
    print(row("---", ("---" for _ in counts)))
    for cv, day in ((0.005, 0.005), (0.01, 0.005), (0.01, 0.01), (0.02, 0.01)):
        cells = (f"{detectable(math.hypot(day, cv / math.sqrt(3)), count):.1%}" for count in counts)
        print(row(f"start's value {cv:.1%}, day {day:.1%}", cells))


def detectable(sigma: float, days: int) -> float:
    return math.expm1(seen(days, ALPHA, RULE.power) * sigma * math.sqrt(1 + 1 / days))


if __name__ == "__main__":
    main()
