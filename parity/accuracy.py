"""A target's two engines on the documents of lm-eval tasks: recorded, scored, and judged in pairs.

Both sides are asked everything, or the candidate is asked batch by batch, in a seeded order, until the verdict is
certain at the stated error rates. Scores lie beside the recordings as `samples.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parity import documents, judge, lmeval, sequential
from parity.checks import accuracy
from parity.documents import Documents
from parity.lmeval import Tasks
from parity.record import Recorder, Sequel
from parity.recording import Recording
from parity.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from parity.config import Accuracy, Target
    from parity.evals import TaskRun
    from parity.prompts import Workload
    from parity.sequential import Monitor

REFERENCE, CANDIDATE = "accuracy-reference", "accuracy-candidate"
_SEED = 7
_BATCHES = 20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What both sides scored, and the verdict."""

    reference: tuple[TaskRun, ...]
    candidate: tuple[TaskRun, ...]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a target asks of both its engines: the documents of its tasks, by the reference's tokenizer."""

    tasks: Tasks
    workload: Workload
    limit: int | None

    @classmethod
    def of(cls, asked: Accuracy, model: Path) -> Questions:
        """Load the tasks.

        Raises:
            ConfigError, ProvisionError: As `lmeval.load_tasks` and `lmeval.workload_of`.
        """
        tasks = lmeval.load_tasks(asked.tasks, folder=asked.folder, model=model)
        return cls(tasks=tasks, workload=lmeval.workload_of(tasks, limit=asked.limit), limit=asked.limit)

    def score(self, recording: Recording, directory: Path) -> tuple[TaskRun, ...]:
        """Score a side's answers and write the samples beside its recording.

        Raises:
            ParityError: If an answer cannot be scored, or the samples cannot be written.
        """
        runs = lmeval.runs_of(self.tasks, recording, limit=self.limit)
        lmeval.save_samples(directory, runs)
        return runs


def evaluate(target: Target, recorder: Recorder, tasks: Tasks, *, limit: int | None) -> Evaluation:
    """Ask both engines every document, the first `limit` of each task.

    Raises:
        ConfigError: If a limit of the target is wrong.
        ParityError: If an engine cannot run, or an answer cannot be scored.
    """
    limits = judge.limits_of("accuracy", target.limits.get("accuracy", {}), target.policy)
    questions = Questions(tasks=tasks, workload=lmeval.workload_of(tasks, limit=limit), limit=limit)
    ours = recorder.record(target.reference, {REFERENCE: questions.workload})[REFERENCE]
    theirs = recorder.record(target.candidate, {CANDIDATE: questions.workload})[CANDIDATE]
    reference = questions.score(ours, recorder.directory / REFERENCE)
    candidate = questions.score(theirs, recorder.directory / CANDIDATE)
    verdict = accuracy.judge_tasks(
        reference,
        candidate,
        limits=limits,
        label_reference=ours.label,
        label_candidate=theirs.label,
    )
    return Evaluation(reference=reference, candidate=candidate, verdict=verdict)


def evaluate_until_certain(target: Target, recorder: Recorder, tasks: Tasks, *, limit: int | None) -> Evaluation:
    """Ask the reference every document, and the candidate batch by batch until the verdict is certain.

    Raises:
        ConfigError: If a limit of the target is wrong.
        ParityError: If an engine cannot run, or an answer cannot be scored.
    """
    limits = judge.limits_of("accuracy", target.limits.get("accuracy", {}), target.policy)
    questions = Questions(tasks=tasks, workload=lmeval.workload_of(tasks, limit=limit), limit=limit)
    ours = recorder.record(target.reference, {REFERENCE: questions.workload})[REFERENCE]
    reference = questions.score(ours, recorder.directory / REFERENCE)
    known = Documents.of(reference)
    monitor = sequential.monitor(
        known.keys,
        rule=limits.rule,
        noise=limits.noise,
        seed=_SEED,
        clusters=known.clusters,
        margins_nats=known.margins_nats,
    )
    drawing = _Drawing(tasks, reference, known.keys, monitor, recorder.directory)
    names = [f"{CANDIDATE}-{number:02}" for number in range(1, len(drawing.batches) + 1)]
    jobs: dict[str, Workload | Sequel] = {
        name: lambda done, number=number: drawing.next(number, done)  # type: ignore[misc]
        for number, name in enumerate(names)
    }
    found = recorder.record(target.candidate, jobs)
    drawing.take(found)
    candidate = _joined(drawing.answered, {run.task: run for run in reference})
    asked = {(run.task, sample.doc_id) for run in candidate for sample in run.samples}
    shared = tuple(_only(run, asked) for run in reference if any(t == run.task for t, _ in asked))
    verdict = accuracy.judge_tasks(
        shared,
        candidate,
        limits=limits,
        label_reference=ours.label,
        label_candidate=next(iter(found.values())).label,
        sequential=monitor.state,
    )
    return Evaluation(reference=shared, candidate=candidate, verdict=verdict)


class _Drawing:
    """The candidate's batches: what to ask next, and what the answers so far say."""

    def __init__(
        self, tasks: Tasks, reference: Sequence[TaskRun], keys: Sequence[str], monitor: Monitor, directory: Path
    ) -> None:
        self.tasks = tasks
        self.reference = reference
        self.keys = keys
        self.monitor = monitor
        self.directory = directory
        self.places = [
            (run.task, sample.doc_id)
            for run in reference
            for sample in run.samples
            if sample.filter == run.samples[0].filter
        ]
        self.batches = np.array_split(monitor.draws.documents, min(_BATCHES, len(monitor.draws)))
        self.answered: list[tuple[TaskRun, ...]] = []

    def next(self, number: int, done: Mapping[str, Recording]) -> Workload | None:
        """The batch to ask, or None once the verdict is certain."""
        self.take(done)
        if self.monitor.outcome is not Outcome.INCONCLUSIVE:
            return None
        return lmeval.workload_of(self.tasks, documents=self._documents(number))

    def take(self, done: Mapping[str, Recording]) -> None:
        """Score what was answered since the last look."""
        for number, (name, recording) in list(enumerate(done.items()))[len(self.answered) :]:
            runs = lmeval.runs_of(self.tasks, recording, documents=self._documents(number))
            lmeval.save_samples(self.directory / name, runs)
            asked = {self.places[place] for place in self.batches[number].tolist()}
            ours = [_only(run, asked) for run in self.reference if any(task == run.task for task, _ in asked)]
            found = documents.differences(ours, runs)
            self.monitor.update(np.array([found[self.keys[place]] for place in self.batches[number].tolist()]))
            self.answered.append(runs)

    def _documents(self, number: int) -> dict[str, list[int]]:
        wanted: dict[str, list[int]] = {}
        for place in self.batches[number].tolist():
            task, document = self.places[place]
            wanted.setdefault(task, []).append(document)
        return wanted


def _only(run: TaskRun, asked: set[tuple[str, int]]) -> TaskRun:
    return replace(run, samples=tuple(s for s in run.samples if (run.task, s.doc_id) in asked))


def _joined(answered: Sequence[Sequence[TaskRun]], reference: Mapping[str, TaskRun]) -> tuple[TaskRun, ...]:
    """The batches of each task as one run, asked like the reference's: in how many pieces says nothing about it."""
    whole: dict[str, TaskRun] = {}
    for run in (run for batch in answered for run in batch):
        before = whole.get(run.task)
        samples = run.samples if before is None else (*before.samples, *run.samples)
        pieces = {key: reference[run.task].invocation[key] for key in ("documents", "workload.digest")}
        whole[run.task] = replace(
            run,
            invocation={**run.invocation, **pieces},
            samples=tuple(sorted(samples, key=lambda s: (s.doc_id, s.filter))),
        )
    return tuple(whole.values())
