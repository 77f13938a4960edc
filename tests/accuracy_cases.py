"""Scored documents for tests: everything has a default, so that a test states only what it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from parity.evals import EvalSample, TaskRun

Change = Callable[[EvalSample], EvalSample]


def sample(task: str, number: int, value: float, *, name: str = "none", choices: bool = True) -> EvalSample:
    return EvalSample(
        task=task,
        doc_id=number,
        doc_hash=f"document {number}",
        prompt_hash=f"prompt {number}",
        target_hash=f"target {number}",
        filter=name,
        target="B",
        response=("B" if value == 1.0 else "C",),
        metrics={"acc": value, "other": 0.5},
        cluster=None,
        margin_nats=number / 10 if choices else None,
        output_tokens=None,
    )


def run(task: str, values: Sequence[float], **changes: object) -> TaskRun:
    """A task of multiple choice; `filters` repeats every sample under several names."""
    filters = changes.pop("filters", ("none",))
    made = TaskRun(
        task=task,
        version="1",
        metric="acc",
        higher_is_better=True,
        output_type="multiple_choice",
        invocation={"harness.version": "0.4.13", "recording.engine": "x"},
        samples=tuple(
            sample(task, number, value, name=name)
            for number, value in enumerate(values)
            for name in filters  # type: ignore[attr-defined]
        ),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def generated(lengths: Sequence[int]) -> TaskRun:
    """A task of generated answers with these lengths, all of them right."""
    made = run("copying", [1.0] * len(lengths), output_type="generate_until")
    pairs = zip(made.samples, lengths, strict=True)
    return replace(made, samples=tuple(replace(sample, output_tokens=tokens) for sample, tokens in pairs))


def scores(n: int, wrong: Sequence[int] = ()) -> list[float]:
    """Every third document is wrong, and `wrong` ones."""
    return [0.0 if number % 3 == 0 or number in set(wrong) else 1.0 for number in range(n)]


def right(n: int, many: int, start: int = 0) -> list[int]:
    """The first documents from `start` on that `scores` has right."""
    return [number for number in range(start, n) if number % 3][:many]


def edited(of: TaskRun, number: int, change: Change) -> TaskRun:
    return replace(of, samples=tuple(change(s) if s.doc_id == number else s for s in of.samples))


def with_text(one: EvalSample, **changes: str) -> EvalSample:
    return replace(one, **changes)  # type: ignore[arg-type]
