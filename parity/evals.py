"""What an evaluation measured: one sample per document and filter, one run per task.

Pure values, and their form as JSON Lines: a line for each task, followed by a line for each of its samples. Numbers
stay numbers. Standard library only.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

from parity.errors import RecordingError
from parity.fingerprint import Scalar

_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "doc_hash", "prompt_hash", "target_hash", "filter", "target"), (str,)),
    "doc_id": (int,),
    "metrics": (dict,),
    "cluster": (str, NoneType),
    "margin_nats": (int, float, NoneType),
    "output_tokens": (int, NoneType),
}
"""What each field of a sample holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One document of a task, answered and scored.

    doc_id: the document's place in the task's data. doc_hash, prompt_hash, target_hash: SHA-256 of the document, of the
        first request's prompt and of the right answer; two samples are a pair when all of them are equal.
    filter: the name of the pipeline that made `response` of the raw answer; a task with two filters has two samples a
        document.
    target: the right answer, as text. response: what was compared with it; with choices, the text of the chosen one.
    metrics: the document's own value of each metric, e.g. 0.0 or 1.0 for accuracy.
    cluster: documents of one cluster share a passage or a template and are not independent; None where it stands alone.
    margin_nats: how much more probable the best choice is than the second best; None where the task has no choices.
    output_tokens: of all answers that were generated for the document; None where none was.
    """

    task: str
    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    filter: str
    target: str
    response: tuple[str, ...]
    metrics: Mapping[str, float]
    cluster: str | None
    margin_nats: float | None
    output_tokens: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalSample:
        """Read what `to_json` wrote.

        Raises:
            TypeError: If a field holds something else.
        """
        found = cls(**{**data, "response": tuple(data["response"])})
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(found, name), kinds):
                raise TypeError(f"its {name!r} is {reprlib.repr(getattr(found, name))}")
        if not all(isinstance(value, (int, float)) for value in found.metrics.values()):
            raise TypeError(f"its 'metrics' are {reprlib.repr(found.metrics)}")
        if not all(isinstance(text, str) for text in found.response):
            raise TypeError(f"its 'response' is {reprlib.repr(found.response)}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """One task, answered by one engine.

    version: the task's own. metric: the name of the one that is judged, a key of every sample's `metrics`.
    output_type: how the task asks, in lm-eval's words: multiple_choice, loglikelihood, loglikelihood_rolling or
        generate_until.
    invocation: everything that was decided beside the task: harness and its version, recording, template, few-shot.
    """

    task: str
    version: str
    metric: str
    higher_is_better: bool
    output_type: str
    invocation: Mapping[str, Scalar]
    samples: tuple[EvalSample, ...]


def to_json_lines(runs: Sequence[TaskRun]) -> str:
    """One line a task, with the number of its samples, and then its samples; every line ends with a newline."""
    lines = []
    for run in runs:
        head = {
            "task": run.task,
            "version": run.version,
            "metric": run.metric,
            "higher_is_better": run.higher_is_better,
            "output_type": run.output_type,
            "invocation": dict(run.invocation),
            "samples": len(run.samples),
        }
        lines += [head, *(sample.to_json() for sample in run.samples)]
    # ASCII: a text of a model may hold lone surrogates, which UTF-8 cannot.
    return "".join(json.dumps(line) + "\n" for line in lines)


def from_json_lines(text: str) -> tuple[TaskRun, ...]:
    """Read what `to_json_lines` wrote.

    Raises:
        RecordingError: If the text was cut short or is something else.
    """
    lines = text.split("\n")
    runs, position = [], 0
    try:
        while lines[position]:
            head = json.loads(lines[position])
            count = _count(head.pop("samples"))
            following = lines[position + 1 : position + 1 + count]
            samples = tuple(EvalSample.from_json(json.loads(line)) for line in following)
            runs.append(TaskRun(**head, samples=samples))
            position += 1 + count  # beyond the end where the last samples are missing
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RecordingError(
            f"line {position + 1} of the samples does not begin a complete task ({error}); score the recording again"
        ) from error
    return tuple(runs)


def _count(said: Any) -> int:
    if not isinstance(said, int) or said < 0:
        raise ValueError(f"it says that it has {reprlib.repr(said)} samples")
    return said
