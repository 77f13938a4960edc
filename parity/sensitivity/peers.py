"""What other projects would have decided from the same answers. Thresholds are theirs, with where they come from.

Each rule is a number or a yes/no a prompt, computed once, and a decision over any set of prompts, so that it can be
resampled. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.comparable import first_difference
from parity.lockstep import Steps
from parity.recording import Completion, Recording

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Both sides' own answers, and the candidate's scores of the reference's, over the same prompts."""

    reference: Recording
    candidate: Recording
    steps: Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One peer's rule: numbers a prompt [m], and whether the numbers of some prompts fail."""

    name: str
    source: str
    numbers: Callable[[Answers], Floats]
    fails: Callable[[Floats], bool]


def _per_answer(answers: Answers, number: Callable[[Completion, Completion], float]) -> Floats:
    ids = answers.steps.prompt_ids
    return np.array([number(answers.reference.by_id[i], answers.candidate.by_id[i]) for i in ids])


def _outside_top_5(ours: Completion, theirs: Completion) -> float:
    at = first_difference(ours.token_ids, theirs.token_ids)
    if at >= min(len(ours.token_ids), len(theirs.token_ids)) or ours.logprobs is None or theirs.logprobs is None:
        return 0.0
    one, two = ours.token_ids[at], theirs.token_ids[at]
    mine = {one, *(i for i, _ in ours.logprobs.row(at)[:5])}
    other = {two, *(i for i, _ in theirs.logprobs.row(at)[:5])}
    return float(two not in mine or one not in other)


def _differs(ours: Completion, theirs: Completion) -> float:
    return float(ours.token_ids != theirs.token_ids)


def _prefix_share(ours: Completion, theirs: Completion) -> float:
    longest = max(len(ours.token_ids), len(theirs.token_ids))
    return first_difference(ours.token_ids, theirs.token_ids) / longest if longest else 1.0


def _largest_change(answers: Answers) -> Floats:
    steps = answers.steps
    return np.asarray(np.maximum.reduceat(np.abs(steps.delta_nats), steps.starts[:-1]))


def _mean_kl(answers: Answers) -> Floats:
    return answers.steps.per_prompt(answers.steps.kl_nats) / answers.steps.lengths


def _lost_nats(answers: Answers) -> Floats:
    return answers.steps.per_prompt(-answers.steps.delta_nats) / answers.steps.lengths


def _above(limit: float) -> Callable[[Floats], bool]:
    return lambda numbers: bool(numbers.mean() > limit)


RULES: tuple[Rule, ...] = (
    Rule(
        name="vLLM top-5 containment",
        source="vLLM tests/models/utils.py, check_logprobs_close: at the first divergence each token is among the "
        "other's five most probable",
        numbers=lambda a: _per_answer(a, _outside_top_5),
        fails=lambda n: bool(n.any()),
    ),
    Rule(
        name="exact match",
        source="vLLM tests/models/utils.py, check_outputs_equal",
        numbers=lambda a: _per_answer(a, _differs),
        fails=lambda n: bool(n.any()),
    ),
    Rule(
        name="prefix agreement 0.98",
        source="TensorRT-Model-Connect's former rule: mean share of the common prefix at least 0.98",
        numbers=lambda a: _per_answer(a, _prefix_share),
        fails=lambda n: bool(n.mean() < 0.98),
    ),
    Rule(
        name="change of logprob 0.05",
        source="SGLang test/runners.py, check_close_model_outputs with its prefill tolerance, on the scored token",
        numbers=_largest_change,
        fails=lambda n: bool(n.max() > 0.05),
    ),
    Rule(name="mean KL 0.01", source="mlx-quant-fidelity's limit", numbers=_mean_kl, fails=_above(0.01)),
    Rule(name="mean KL 0.031", source="llama.cpp's q4_K_M figure", numbers=_mean_kl, fails=_above(0.031)),
    Rule(
        name="perplexity 1 %",
        source="vLLM's PPL_TOL: perplexity at most one per cent above the reference's",
        numbers=_lost_nats,
        fails=lambda n: bool(np.exp(n.mean()) - 1 >= 0.01),
    ),
)


def decisions(answers: Answers, draws: list[NDArray[np.intp]]) -> Mapping[str, float]:
    """How often each rule fails over the drawn sets of prompts."""
    found = {}
    for rule in RULES:
        numbers = rule.numbers(answers)
        found[rule.name] = float(np.mean([rule.fails(numbers[draw]) for draw in draws]))
    return found
