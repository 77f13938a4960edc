"""lm-evaluation-harness drives any of our engines: its tasks, prompts, filters and metrics; our workers' answers.

Three steps, and no engine but in the second:

    tasks = load_tasks(["arithmetic"], folder=Path("suites/tasks"), model=model_directory)
    recording = recorder.record(spec, {"accuracy-candidate": workload_of(tasks)})["accuracy-candidate"]
    runs = runs_of(tasks, recording)

So an interrupted run goes on where it stopped, both engines get the same token ids, and a recording can be scored again
without an engine. lm-eval is imported when tasks are loaded; judging what was scored needs nothing of this.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity import evals
from parity.errors import ConfigError, RecordingError
from parity.evals import TaskRun
from parity.lmeval.tokenizer import HostTokenizer
from parity.prompts import Workload, sha256_of_json
from parity.recording import Recording

if TYPE_CHECKING:
    from parity.fingerprint import Scalar
    from parity.lmeval.model import Asking

__all__ = [
    "SAMPLES",
    "Prompting",
    "Tasks",
    "copy_samples",
    "load_samples",
    "load_tasks",
    "runs_of",
    "save_samples",
    "workload_of",
]

SAMPLES = "samples.jsonl"
"""What `save_samples` writes beside a recording."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How documents become prompts, beside what their task's file says.

    num_fewshot: examples before each document; None leaves it to the task.
    system_prompt: put before everything, together with the task's own description.
    chat_template: whether the model's own chat template is applied.
    fewshot_as_multiturn: in a chat, examples are turns of their own.
    fewshot_seed: of the draw of examples; lm-eval's own by default.
    """

    num_fewshot: int | None = None
    system_prompt: str | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool = True
    fewshot_seed: int = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Loaded tasks, and all that decides what is asked.

    sizes: how many documents each task has; their numbers are 0, 1, 2, ...
    loaded: lm-eval's own task objects by name.
    """

    tokenizer: HostTokenizer
    prompting: Prompting
    max_positions: int
    sizes: Mapping[str, int]
    loaded: Mapping[str, Any] = field(repr=False)


def load_tasks(
    names: Sequence[str],
    *,
    folder: Path,
    model: Path,
    prompting: Prompting | None = None,
    max_positions: int | None = None,
    official: bool = False,
) -> Tasks:
    """Load tasks, groups and tags by name from the YAML files below `folder`.

    model: a Hugging Face directory; only its tokenizer, chat template and config are read.
    max_positions: what a prompt with its answer may need; None takes it from the model's config.json. An engine that
        was started with fewer refuses what does not fit.
    official: also look among lm-eval's own tasks, which takes about ten seconds, and let `datasets` reach for the hub
        or its mirror. Otherwise nothing is asked of the network.

    Raises:
        ConfigError: If lm-eval or a tokenizer is missing, a name is not known, or a task's file or data are wrong.
        ProvisionError: If a task's data are not there.
    """
    tokenizer = HostTokenizer(model)
    positions = max_positions or tokenizer.max_positions
    if positions is None:
        raise ConfigError(f"{str(model / 'config.json')!r} does not say how many positions there are; give them")
    if not official:
        # Before `datasets` is imported, which reads them once.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            "lm-eval tasks need the package lm-eval; install it with pip install 'engine-parity[accuracy]'"
        ) from error
    from parity.lmeval import loading  # noqa: PLC0415  imports lm-eval

    prompting = prompting or Prompting()
    loaded = loading.load(names, folder=folder, model=model, official=official, num_fewshot=prompting.num_fewshot)
    sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
    return Tasks(tokenizer=tokenizer, prompting=prompting, max_positions=positions, sizes=sizes, loaded=loaded)


def workload_of(
    tasks: Tasks, *, limit: int | None = None, documents: Mapping[str, Iterable[int]] | None = None
) -> Workload:
    """Everything that the documents ask, each question once, those with a common beginning one after the other.

    Request ids are TASK/DOCUMENT/NUMBER, of the first document that asks. No request may read a prefix cache, although
    many share a prefix: what comes from a cache has other rounding errors.

    limit: the first documents of each task. documents: the numbers of the documents, by task; a task that is not named
        is not asked. Neither: all.

    Raises:
        ConfigError: If a document is not there, does not fit into `max_positions`, has no right answer among its
            choices, or asks for what no engine honours.
    """
    from parity.lmeval import scoring  # noqa: PLC0415  imports lm-eval
    from parity.lmeval.model import Listening  # noqa: PLC0415

    listening = Listening(tasks.tokenizer, max_positions=tasks.max_positions)
    for name, wanted in _chosen(tasks, limit, documents).items():
        for asked in _ask(tasks, name, wanted, listening):
            scoring.require_right_answer(tasks.loaded[name], asked[0].doc, asked[0].doc_id)
    return Workload(name="accuracy", requests=listening.requests)


def runs_of(
    tasks: Tasks,
    recording: Recording,
    *,
    limit: int | None = None,
    documents: Mapping[str, Iterable[int]] | None = None,
) -> tuple[TaskRun, ...]:
    """Score the answers to what `workload_of` asked with the same arguments.

    Raises:
        RecordingError: If the recording does not answer it.
        EngineError: If its engine gave a request up, or returned log-probabilities that do not fit.
        ConfigError: If a task has no value of the metric that is judged for a single document.
    """
    from parity.lmeval import scoring  # noqa: PLC0415  imports lm-eval
    from parity.lmeval.model import Answered  # noqa: PLC0415

    answered = Answered(tasks.tokenizer, recording, max_positions=tasks.max_positions)
    runs = []
    for name, wanted in _chosen(tasks, limit, documents).items():
        task = tasks.loaded[name]
        asked = _ask(tasks, name, wanted, answered)
        samples, metric, higher_is_better = scoring.score(task, asked, answered.output_tokens)
        run = TaskRun(
            task=name,
            version=str(task.VERSION),
            metric=metric,
            higher_is_better=higher_is_better,
            output_type=str(task.OUTPUT_TYPE),
            invocation=_invocation(tasks, task, recording, len(wanted)),
            samples=samples,
        )
        runs.append(run)
    return tuple(runs)


def save_samples(directory: Path, runs: Sequence[TaskRun]) -> Path:
    """Write `samples.jsonl` into a recording's directory, complete or not at all, and return its path.

    Raises:
        RecordingError: If it cannot be written.
    """
    path = directory / SAMPLES
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(evals.to_json_lines(runs), "ascii")
        temporary.replace(path)
    except OSError as error:
        raise RecordingError(f"the samples {str(path)!r} cannot be written ({error.strerror})") from error
    return path


def copy_samples(source: Path, directory: Path) -> Path:
    """Put samples, from their file or the directory that holds it, into another directory, and return that.

    Raises:
        RecordingError: If they cannot be read or written.
    """
    samples = evals.from_json_lines(_text(source if source.is_file() else source / SAMPLES))
    directory.mkdir(parents=True, exist_ok=True)
    save_samples(directory, samples)
    return directory


def load_samples(directory: Path) -> tuple[TaskRun, ...]:
    """Read what `save_samples` wrote; needs no lm-eval.

    Raises:
        RecordingError: If it is missing or was cut short.
    """
    return evals.from_json_lines(_text(directory / SAMPLES))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"the samples {str(path)!r} cannot be read ({error})") from error


def _chosen(
    tasks: Tasks, limit: int | None, documents: Mapping[str, Iterable[int]] | None
) -> dict[str, tuple[int, ...]]:
    """The documents of each task in rising order: lm-eval mislabels those that are drawn in another."""
    if limit is not None and documents is not None:
        raise ConfigError("both a limit and documents are given; give one")
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit}; at least one document of each task must be asked")
    if documents is None:
        return {name: tuple(range(min(size, limit or size))) for name, size in tasks.sizes.items()}
    chosen = {}
    for name, numbers in documents.items():
        if name not in tasks.sizes:
            raise ConfigError(f"documents of task {name!r} are asked for, and only {', '.join(tasks.sizes)} are loaded")
        wanted = tuple(sorted(set(numbers)))
        if wanted and (wanted[0] < 0 or wanted[-1] >= tasks.sizes[name]):
            raise ConfigError(
                f"documents {wanted[0]} to {wanted[-1]} of task {name!r} are asked for, and it has 0 to "
                f"{tasks.sizes[name] - 1}"
            )
        if wanted:
            chosen[name] = wanted
    if not chosen:
        raise ConfigError("no document is asked for; name at least one")
    return chosen


def _ask(tasks: Tasks, name: str, wanted: Sequence[int], asking: Asking) -> list[list[Any]]:
    """lm-eval's requests of each wanted document, with the answers in them.

    Not `lm_eval.evaluate`: it draws the examples of all documents from one stream, so that a document's prompt would
    depend on which others are asked. Here all up to the last wanted one are drawn, as in a run of the whole task.
    """
    from parity.lmeval import loading  # noqa: PLC0415  imports lm-eval

    task, prompting = tasks.loaded[name], tasks.prompting
    with loading.harness(f"task {name!r} cannot be asked"):
        task.set_fewshot_seed(seed=prompting.fewshot_seed)
        task.build_all_requests(
            limit=wanted[-1] + 1,
            rank=0,
            world_size=1,
            cache_requests=False,  # lm-eval's own cache does not see that a task's data have changed
            system_instruction=prompting.system_prompt,
            apply_chat_template=prompting.chat_template,
            fewshot_as_multiturn=prompting.fewshot_as_multiturn,
            chat_template=asking.apply_chat_template if prompting.chat_template else None,
        )
        kept = set(wanted)
        task._instances = [instance for instance in task.instances if instance.doc_id in kept]
        for instance in task.instances:
            instance.resps = getattr(asking, instance.request_type)([instance] * (instance.repeats or 1))
    by_document = groupby(task.instances, key=lambda instance: instance.doc_id)
    return [sorted(group, key=lambda instance: instance.idx) for _, group in by_document]


def _invocation(tasks: Tasks, task: Any, recording: Recording, documents: int) -> dict[str, Scalar]:
    """Everything that a repetition would have to share, as flat facts."""
    import lm_eval  # noqa: PLC0415

    prompting, template = tasks.prompting, tasks.tokenizer.chat_template
    config = {key: value for key, value in task.dump_config().items() if key != "metadata"}  # metadata names paths
    return {
        "harness": "lm-eval",
        "harness.version": lm_eval.__version__,
        "recording.digest": recording.digest,
        "recording.engine": recording.label,
        "workload.digest": recording.workload.digest,
        "task.config_sha256": sha256_of_json(_plain(config)),
        "task.num_fewshot": task.config.num_fewshot,
        "task.repeats": task.config.repeats,
        "documents": documents,
        "system_prompt": prompting.system_prompt,
        "chat_template.sha256": sha256_of_json(template) if prompting.chat_template else None,
        "fewshot_as_multiturn": prompting.fewshot_as_multiturn if prompting.chat_template else None,
        "fewshot_seed": prompting.fewshot_seed,
        "tokenizer.sha256": tasks.tokenizer.sha256,
        "max_positions": tasks.max_positions,
    }


def _plain(value: Any) -> Any:
    """Without functions, whose text holds an address."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__name__
