"""Two runs of the same tasks, document by document: may they be compared, and what did each side score?

A pair is the same document, asked by the same prompt, with the same right answer, under the same filter. What else
differs between two runs of a task is either no reason not to compare them, or an error that names the task, the field
and both values. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np

from parity.errors import IncomparableError
from parity.evals import EvalSample, TaskRun
from parity.paired import Codes, Outcomes

Pair: TypeAlias = tuple[EvalSample, EvalSample]
"""The reference's and the candidate's."""
_RUN = ("version", "metric", "higher_is_better", "output_type")
_DOCUMENT = ("doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One task under one filter.

    is_first: whether it is the task's first filter. in_points: whether scores lie between 0 and 1; if not, they are
        shares of the reference's mean. outcomes: of the pairs, in their order; higher is better.
    """

    task: str
    name: str
    metric: str
    output_type: str
    is_first: bool
    in_points: bool
    pairs: tuple[Pair, ...]
    outcomes: Outcomes


def pair_up(reference: Sequence[TaskRun], candidate: Sequence[TaskRun]) -> list[Part]:
    """Two runs as pairs, in the reference's order.

    Raises:
        IncomparableError: If tasks, documents, prompts, right answers or ways of scoring differ, or a score is missing.
    """
    ours, theirs = _by_task(reference, "reference"), _by_task(candidate, "candidate")
    if ours.keys() != theirs.keys() or not ours:
        raise IncomparableError(
            f"the reference answered the tasks {', '.join(ours) or 'none'}, the candidate "
            f"{', '.join(theirs) or 'none'}; evaluate the same tasks on both"
        )
    return list(chain.from_iterable(_of_task(run, theirs[name]) for name, run in ours.items()))


def pooled(parts: Sequence[Part]) -> Outcomes:
    """All documents of several parts, each a stratum."""
    return Outcomes(
        reference=np.concatenate([part.outcomes.reference for part in parts]),
        candidate=np.concatenate([part.outcomes.candidate for part in parts]),
        clusters=_codes([_cluster(ours) for part in parts for ours, _ in part.pairs]),
        strata=np.repeat(np.arange(len(parts)), [len(part.pairs) for part in parts]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The documents of a run as `parity.sequential.monitor` takes them; of a task with several filters, the first.

    clusters: None where every document stands alone. margins_nats: of the run's own choices.
    """

    keys: tuple[str, ...]
    clusters: tuple[str, ...] | None
    margins_nats: tuple[float | None, ...]

    @classmethod
    def of(cls, runs: Sequence[TaskRun]) -> Documents:
        """Of the reference's run."""
        samples = [sample for run in runs for sample in run.samples if sample.filter == run.samples[0].filter]
        clusters = tuple(map(_cluster, samples))
        return cls(
            keys=tuple(map(_key, samples)),
            clusters=clusters if len(set(clusters)) < len(samples) else None,
            margins_nats=tuple(sample.margin_nats for sample in samples),
        )


def differences(reference: Sequence[TaskRun], candidate: Sequence[TaskRun]) -> Mapping[str, float]:
    """The reference's less the candidate's score of each document, by its key in `Documents`.

    Raises:
        IncomparableError: As `pair_up`, and if a metric is no score between 0 and 1.
    """
    found: dict[str, float] = {}
    for part in pair_up(reference, candidate):
        if not part.in_points:
            raise IncomparableError(
                f"task {part.task!r} is scored by {part.metric!r}, which is not between 0 and 1; judge it on all its "
                "documents, not batch by batch"
            )
        if part.is_first:
            keys = [_key(ours) for ours, _ in part.pairs]
            found.update(zip(keys, part.outcomes.differences.tolist(), strict=True))
    return found


def _by_task(runs: Sequence[TaskRun], side: str) -> dict[str, TaskRun]:
    found = {run.task: run for run in runs}
    if len(found) < len(runs):
        names = ", ".join(run.task for run in runs)
        raise IncomparableError(f"the {side} answered one task twice, of {names}; give each once")
    return found


def _of_task(ours: TaskRun, theirs: TaskRun) -> Iterator[Part]:
    task = f"task {ours.task!r}"
    _require_equal(task, _RUN, ours, theirs)
    mine, other = ({(s.filter, s.doc_id): s for s in run.samples} for run in (ours, theirs))
    if odd := sorted(mine.keys() ^ other.keys()):
        name, doc_id = odd[0]
        raise IncomparableError(
            f"document {doc_id} of {task} (filter {name!r}) is answered only by the "
            f"{'reference' if odd[0] in mine else 'candidate'} (reference {len(mine)} samples, candidate "
            f"{len(other)}); evaluate the same documents on both"
        )
    if not mine:
        raise IncomparableError(f"{task} has no documents; evaluate some")
    filters = list(dict.fromkeys(sample.filter for sample in ours.samples))
    for name in filters:
        pairs = tuple((s, other[name, s.doc_id]) for s in ours.samples if s.filter == name)
        for pair in pairs:
            _require_equal(f"document {pair[0].doc_id} of {task}", _DOCUMENT, *pair)
        outcomes, in_points = _scored(ours, pairs)
        yield Part(
            task=ours.task,
            name=ours.task if len(filters) == 1 else f"{ours.task}, {name}",
            metric=ours.metric,
            output_type=ours.output_type,
            is_first=name == filters[0],
            in_points=in_points,
            pairs=pairs,
            outcomes=outcomes,
        )


def _require_equal(where: str, fields: Sequence[str], ours: object, theirs: object) -> None:
    for field in fields:
        left, right = getattr(ours, field), getattr(theirs, field)
        if left != right:
            raise IncomparableError(
                f"{where} has the {field} {left!r} in the reference and {right!r} in the candidate; "
                "evaluate both on the same task and data"
            )


def _scored(run: TaskRun, pairs: Sequence[Pair]) -> tuple[Outcomes, bool]:
    for pair in pairs:
        left, right = (sample.metrics.get(run.metric, math.nan) for sample in pair)
        if not math.isfinite(left + right):
            raise IncomparableError(
                f"the {run.metric!r} of document {pair[0].doc_id} of task {run.task!r} is {left} in the reference and "
                f"{right} in the candidate, and both must be numbers; judge another metric, or score it again"
            )
    scores = np.array([[sample.metrics[run.metric] for sample in pair] for pair in pairs])
    in_points = bool((scores >= 0.0).all() and (scores <= 1.0).all())
    scale = 1.0 if in_points else abs(float(scores[:, 0].mean()))
    if scale == 0.0:
        raise IncomparableError(
            f"the {run.metric!r} of task {run.task!r} has the mean 0 in the reference, so that a loss has no size; "
            "judge another metric"
        )
    if not run.higher_is_better:
        scores = 1.0 - scores if in_points else -scores
    clusters = _codes([_cluster(ours) for ours, _ in pairs])
    return Outcomes(reference=scores[:, 0] / scale, candidate=scores[:, 1] / scale, clusters=clusters), in_points


def _cluster(sample: EvalSample) -> str:
    """Equal documents are one document that is asked twice."""
    return f"{sample.task}/{sample.doc_hash if sample.cluster is None else sample.cluster}"


def _key(sample: EvalSample) -> str:
    return f"{sample.task}/{sample.doc_id}"


def _codes(labels: Sequence[str]) -> Codes:
    known: dict[str, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], np.int64)
