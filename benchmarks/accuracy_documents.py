"""How many documents each rule needs to judge a build's accuracy, and how often it is wrong, on resampled outcomes.

python benchmarks/accuracy_documents.py [OUTCOMES.json ...] [--samples REFERENCE.jsonl CANDIDATE.jsonl]
                                        [--margin 0.02] [--tolerated 0] [--runs 1000] [--of 5000]

`--samples` are the two `samples.jsonl` that an evaluation leaves; their tasks are pooled and their clusters not heeded.
Any other file holds the scores of two engines on the same documents and, where known, the reference's margins:
{"name": "...", "reference": [0, 1, ...], "candidate": [...], "margins_nats": [0.3, null, ...]}. `--of` documents are
drawn from it with replacement, run after run. A clean build is made of it by deciding by coin which side lost each
discordant document, a broken one by losing as many more as the drop says, whatever their margin. Without a file the
outcomes are synthetic, and the output says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from parity import documents, evals, paired
from parity.paired import Floats, Outcomes, Rule
from parity.sequential import LOW_MARGIN_SHARE, EProcess, GroupSequential, Monitor, draw
from parity.verdict import Outcome

Bools: TypeAlias = NDArray[np.bool_]

_BATCH = 500
_SYNTHETIC_LOW = 0.95  # of the documents that differ, how many have one of the smallest margins


@dataclass(frozen=True)
class Population:
    """Documents to draw from: reference, candidate: float64 [N], scores; low: bool [N], the tenth of least margin."""

    name: str
    reference: Floats
    candidate: Floats
    low: Bools | None

    @property
    def discordance(self) -> float:
        return float((self.reference != self.candidate).mean())


Judge = Callable[[Floats], tuple[Outcome, int]]
"""Differences of documents in the order of their places -> the answer and how many documents it took."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", nargs="*", type=Path)
    parser.add_argument("--samples", nargs=2, type=Path, action="append", default=[])
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--tolerated", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--of", type=int, default=5000)
    asked = parser.parse_args()
    rule = Rule(margin=asked.margin, tolerated=asked.tolerated)
    populations = [read(path) for path in asked.outcomes] + [of_samples(*paths) for paths in asked.samples]
    if not populations:
        populations = list(synthetic())
        print(f"SYNTHETIC outcomes, no file was given; {_SYNTHETIC_LOW:.0%} of differences have the least margins")
    for population in populations:
        compare(population, rule, runs=asked.runs, of=asked.of)


def read(path: Path) -> Population:
    found = json.loads(path.read_text("utf-8"))
    reference, candidate = (np.array(found[side], float) for side in ("reference", "candidate"))
    low = least(found.get("margins_nats") or [])
    return Population(name=found.get("name", path.stem), reference=reference, candidate=candidate, low=low)


def of_samples(ours: Path, theirs: Path) -> Population:
    runs = [evals.from_json_lines(path.read_text("ascii")) for path in (ours, theirs)]
    parts = [part for part in documents.pair_up(*runs) if part.is_first and part.in_points]
    outcomes = documents.pooled(parts)
    low = least([sample.margin_nats for part in parts for sample, _ in part.pairs])
    return Population(name=str(theirs.parent), reference=outcomes.reference, candidate=outcomes.candidate, low=low)


def least(margins: Sequence[float | None]) -> Bools | None:
    """The tenth of least margin; None where a margin is not known."""
    known = [margin for margin in margins if margin is not None]
    if not known or len(known) < len(margins):
        return None
    low = np.zeros(len(known), bool)
    low[np.argsort(known, kind="stable")[: round(LOW_MARGIN_SHARE * len(known))]] = True
    return low


def synthetic() -> Iterator[Population]:
    """Half of all documents right, of which as many differ as quantized and re-compiled builds were seen to."""
    for discordance in (0.02, 0.04, 0.08):
        random = np.random.default_rng(1)
        low = np.arange(20_000) < 2_000
        rate = np.where(low, _SYNTHETIC_LOW / LOW_MARGIN_SHARE, (1 - _SYNTHETIC_LOW) / (1 - LOW_MARGIN_SHARE))
        reference = (random.random(20_000) < 0.5).astype(float)
        differs = random.random(20_000) < rate * discordance
        yield Population(
            name=f"synthetic, {discordance:.0%} differ",
            reference=reference,
            candidate=np.where(differs, 1.0 - reference, reference),
            low=low,
        )


def compare(population: Population, rule: Rule, *, runs: int, of: int) -> None:
    noise, asked = population.discordance, paired.unpaired_documents(rule.margin)
    drops = (rule.tolerated, (rule.margin + rule.tolerated) / 2, rule.margin, 2 * rule.margin)
    print(
        f"\n{population.name}: {len(population.reference)} documents, {noise:.2%} differ; margin {rule.margin:g}, "
        f"tolerated {rule.tolerated:g}; {runs} runs on {of} documents; PASS / FAIL, mean documents where the drop is"
    )
    print(f"{'':<40}" + "".join(f"{drop:>24.2%}" for drop in drops) + f"{'fewer than unpaired':>22}")
    for name, judge, size in judges(population, rule, of):
        random = np.random.default_rng(20261124)
        cells = []
        for drop in drops:
            seen = [judge(draw_once(population, drop, size, random)) for _ in range(runs)]
            share = [np.mean([outcome is wanted for outcome, _ in seen]) for wanted in (Outcome.PASS, Outcome.FAIL)]
            cells.append((*share, np.mean([n for _, n in seen])))
        row = "".join(f"{passed:>8.3f} / {failed:.3f} {n:>7.0f}" for passed, failed, n in cells)
        print(f"{name:<40}{row}{asked / cells[0][2]:>21.1f}x")


def judges(population: Population, rule: Rule, of: int) -> Iterator[tuple[str, Judge, int]]:
    """Each rule, and on how many documents it is asked."""
    few = min(of, paired.needed(drop=0.0, noise=population.discordance, rule=rule))
    asked, keys = paired.unpaired_documents(rule.margin), [str(place) for place in range(of)]
    shuffled = draw(keys, seed=1)
    if few < of:
        yield f"paired, {few} documents", lambda x: (fixed(x, rule), few), few
    yield f"paired, {of} documents", lambda x: (fixed(x, rule), of), of
    yield "group-sequential", lambda x: watched(GroupSequential(shuffled, rule), x), of
    yield "e-process", lambda x: watched(EProcess(shuffled, rule), x), of
    if population.low is not None:
        # The places of least margin come first, see `draw_once`.
        drawn = draw(keys, seed=1, margins_nats=[float(place) for place in range(of)])
        yield f"e-process, small margins, {len(drawn)} at most", lambda x: watched(EProcess(drawn, rule), x), of
    yield f"unpaired (TensorRT-LLM), {asked} documents", lambda x: (unpaired(x), asked), asked


def draw_once(population: Population, drop: float, size: int, random: np.random.Generator) -> Floats:
    """The differences of `size` documents, drawn with replacement; a tenth of them, the first, of least margin."""
    everything = np.arange(len(population.reference))
    if population.low is None:
        places = random.choice(everything, size)
    else:
        low = round(LOW_MARGIN_SHARE * size)
        places = np.concatenate(
            [random.choice(everything[population.low], low), random.choice(everything[~population.low], size - low)]
        )
    reference, candidate = population.reference[places], population.candidate[places]
    coin = random.random(size) < 0.5
    reference, candidate = np.where(coin, reference, candidate), np.where(coin, candidate, reference)
    both = (reference == 1.0) & (candidate == 1.0)
    broken = both & (random.random(size) < drop * size / max(1, both.sum()))
    return np.asarray(reference - np.where(broken, 0.0, candidate))


def fixed(differences: Floats, rule: Rule) -> Outcome:
    found = Outcomes(reference=np.maximum(differences, 0.0), candidate=np.maximum(-differences, 0.0)).estimate
    return paired.outcome(found.p_pass(rule.margin), found.p_fail(rule.tolerated), rule)


def watched(monitor: Monitor, differences: Floats) -> tuple[Outcome, int]:
    in_order = differences[monitor.draws.documents]
    for start in range(0, len(in_order), _BATCH):
        if monitor.update(in_order[start : start + _BATCH]) is not Outcome.INCONCLUSIVE:
            break
    return monitor.outcome, monitor.n


def unpaired(differences: Floats) -> Outcome:
    fails = float(differences.mean()) > paired.unpaired_threshold(len(differences))
    return Outcome.FAIL if fails else Outcome.PASS


if __name__ == "__main__":
    main()
