"""From answered requests to samples: lm-eval's filters and metrics, and what a paired judgement needs beside them.

Imports lm-eval; only `parity.lmeval` imports this, when it must.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.utils import handle_non_serializable, hash_string

from parity.errors import ConfigError
from parity.evals import EvalSample
from parity.lmeval.loading import harness

_CORPUS_ONLY = frozenset({"f1", "mcc"})
"""Have no value for a single document."""


def score(
    task: Any, asked: Sequence[Sequence[Any]], output_tokens: Mapping[tuple[str, int], int]
) -> tuple[tuple[EvalSample, ...], str, bool]:
    """The samples of a task, the metric that is judged (its first), and whether more of it is better.

    asked: each document's requests, answered. output_tokens: of the documents with generated answers, by task and
        number.

    Raises:
        ConfigError: If a metric fails, or the judged one has no value for a single document.
    """
    with harness(f"task {task.config.task!r} cannot be scored"):
        task.apply_filters()
        samples = [sample for requests in asked for sample in _samples(task, requests, output_tokens)]
    judged = next((m for m in [*task.aggregation(), *samples[0].metrics] if m in samples[0].metrics), None)
    if judged is None or any(judged not in sample.metrics for sample in samples):
        raise ConfigError(
            f"task {task.config.task!r} has no metric with a value for every single document, so no documents can be "
            "compared; put one such as acc or exact_match first in its metric_list"
        )
    return tuple(samples), judged, bool(task.higher_is_better().get(judged, True))


def require_right_answer(task: Any, document: Any, number: int) -> None:
    """Refuse a document whose right answer is none of its choices: lm-eval warns, and scores it as wrong.

    Raises:
        ConfigError: If there is none.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    with harness(f"the choices of document {number} of task {task.config.task!r} cannot be read"):
        choices = task.doc_to_choice(document)
        right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    for answer in right if isinstance(right, list) else [right]:
        known = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
        if not known:
            raise ConfigError(
                f"document {number} of task {task.config.task!r} says that the right answer is {answer!r} and has "
                f"{len(choices)} choices; mend its data"
            )


def _samples(task: Any, requests: Sequence[Any], output_tokens: Mapping[tuple[str, int], int]) -> Iterator[EvalSample]:
    """One for each filter. Hashes are those of lm-eval's own sample files."""
    first = requests[0]
    target = task.doc_to_target(first.doc)
    document = json.dumps(first.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    cluster = first.doc.get("cluster") if isinstance(first.doc, dict) else None
    for name in first.filtered_resps:
        answers = [request.filtered_resps[name] for request in requests]
        values = task.process_results(first.doc, answers)
        metrics = {
            metric: own for metric, value in values.items() if (own := _own_value(task, metric, value)) is not None
        }
        choices = _choices(task, first.doc)
        judged = next((m for m in task.aggregation() if m in metrics), "acc")
        chosen, margin = _best(choices, answers, judged) if choices else (None, None)
        yield EvalSample(
            task=task.config.task,
            doc_id=first.doc_id,
            doc_hash=hash_string(document),
            prompt_hash=hash_string(first.arguments[0]),
            target_hash=hash_string(str(target)),
            filter=name,
            target=choices[target] if choices and isinstance(target, int) else str(target),
            response=_texts(task, answers) if chosen is None else (chosen,),
            metrics=metrics,
            cluster=None if cluster is None else str(cluster),
            margin_nats=margin,
            output_tokens=output_tokens.get((first.task_name, first.doc_id)),
        )


def _choices(task: Any, document: Any) -> list[str] | None:
    return list(task.doc_to_choice(document)) if task.OUTPUT_TYPE == "multiple_choice" else None


def _own_value(task: Any, metric: str, value: Any) -> float | None:
    """A metric of one document: what lm-eval would report of a task that has only this one."""
    if metric in _CORPUS_ONLY:
        return None
    aggregate = task.aggregation().get(metric)
    try:
        found = float(value if aggregate is None else aggregate([value]))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return found if math.isfinite(found) else None


def _best(choices: Sequence[str], scores: Sequence[tuple[float, bool]], metric: str) -> tuple[str, float | None]:
    """The chosen choice, and by how many nats one choice's score would have to move for another to be chosen.

    As in lm-eval the first of equal ones is chosen; `acc_norm` divides by characters, `acc_bytes` by bytes, and
    `acc_mutual_info` subtracts the score without the question, which stands behind the others.
    """
    nats = np.array([score for score, _ in scores[: len(choices)]])
    lengths = np.ones(len(choices))
    if metric == "acc_norm":
        lengths = np.array([float(len(choice)) for choice in choices])
    elif metric == "acc_bytes":
        lengths = np.array([float(len(choice.encode("utf-8"))) for choice in choices])
    elif metric == "acc_mutual_info":
        nats = nats - np.array([score for score, _ in scores[len(choices) :]])
    ranked = np.argsort(-nats / lengths, kind="stable")
    if len(ranked) < 2:
        return choices[0], None
    best, second = ranked[:2]
    gap = nats[best] / lengths[best] - nats[second] / lengths[second]
    return choices[best], float(gap * min(lengths[best], lengths[second]))


def _texts(task: Any, answers: Sequence[Any]) -> tuple[str, ...]:
    """What a person would read of the answers; a score is no text."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return tuple("greedy" if is_greedy else "not greedy" for _, is_greedy in answers)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return ()
    return tuple(str(text) for answer in answers for text in (answer if isinstance(answer, list) else [answer]))
