"""The planted faults themselves: each changes what it says and nothing else, and the drill engine behaves as told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from parity.engines import EngineSpec
from parity.fingerprint import differences, model_identity
from parity.prompts import Message, Prompt, Request, SamplingParams, request_to_json
from parity.recording import Completion, FinishReason
from parity.sensitivity import model_faults as models

# SmolLM2's own template.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS, HEAD, HIDDEN = 4, 2, 6
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
DRILL = str(Path(__file__).parent / "faults" / "engines" / "drill.py")


# Models -------------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, np.dtype[np.uint16]]]) -> None:
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(v.tobytes() for v in tensors.values()))


def read_tensor(path: Path, name: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + size])[name]
    first, last = entry["data_offsets"]
    return np.frombuffer(content[8 + size + first : 8 + size + last], dtype="<u2").reshape(entry["shape"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    config = {"rope_theta": 100000.0, "num_attention_heads": HEADS, "head_dim": HEAD, "hidden_size": HIDDEN}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    tokenizer = {"bos_token": "<|im_start|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "parity_model.json").write_text("{}")
    values = np.arange(1, 1 + HIDDEN * HEADS * HEAD, dtype=np.uint16).reshape(HIDDEN, HEADS * HEAD)
    tensors = {"model.norm.weight": values[0] + 500, O_PROJ: values, "last": values[:1] + 900}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def template_of(directory: Path) -> str:
    template: str = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    return template


FAULTS: dict[str, tuple[Callable[[Path, Path], Path], str, str]] = {
    "rope_theta": (models.rope_theta, "config.json", "model.config.rope_theta"),
    "newline": (models.chat_template_newline_missing, "tokenizer_config.json", "chat_template.sha256"),
    "system_prompt": (models.system_prompt_changed, "tokenizer_config.json", "chat_template.sha256"),
    "bos": (models.bos_doubled, "tokenizer_config.json", "chat_template.sha256"),
    "head": (lambda s, t: models.head_zeroed(s, t, layer=1), "model.safetensors", "model.weights_sha256"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_one_file_and_never_the_source(name: str, source: Path, tmp_path: Path) -> None:
    plant, file, fact = FAULTS[name]
    before = contents(source)
    target = plant(source, tmp_path / "target")
    after = contents(target)
    assert contents(source) == before
    assert set(after) == set(before) - {"parity_model.json"}
    assert {n for n in after if after[n] != before[n]} == {file}
    assert [d.name for d in differences(model_identity(source), model_identity(target))] == [fact]
    for path in target.iterdir():
        assert path.samefile(source / path.name) == (path.name != file)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_not_planted_over_another(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(FileExistsError):
        FAULTS[name][0](source, tmp_path / "target")


def test_the_rotary_base_is_changed_in_both_spellings(source: Path, tmp_path: Path) -> None:
    models.rope_theta(source, tmp_path / "four")
    assert json.loads((tmp_path / "four" / "config.json").read_text())["rope_theta"] == 10000.0
    config = {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    (source / "config.json").write_text(json.dumps(config))
    models.rope_theta(source, tmp_path / "five", 5.0)
    found = json.loads((tmp_path / "five" / "config.json").read_text())
    assert found == {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}


def test_the_templates_lose_or_gain_what_they_should(source: Path, tmp_path: Path) -> None:
    newline = template_of(models.chat_template_newline_missing(source, tmp_path / "newline"))
    assert newline == TEMPLATE.replace("Face<|im_end|>\n'", "Face<|im_end|>'").replace("' + '\n'}}", "' + ''}}")
    prompt = template_of(models.system_prompt_changed(source, tmp_path / "system", prompt=r"A \1 pirate."))
    smollm = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == TEMPLATE.replace(smollm, r"A \1 pirate.")
    assert template_of(models.bos_doubled(source, tmp_path / "bos")) == "{{ bos_token }}" + TEMPLATE


def test_a_separate_template_file_is_the_one_that_counts(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text(TEMPLATE.replace("\n", "\\n"))
    target = models.chat_template_newline_missing(source, tmp_path / "target")
    assert r"<|im_end|>\n" not in (target / "chat_template.jinja").read_text()
    assert template_of(target) == TEMPLATE


def test_only_the_columns_of_one_head_are_zero(source: Path, tmp_path: Path) -> None:
    target = models.head_zeroed(source, tmp_path / "target", layer=1, head=2)
    before = read_tensor(source / "model.safetensors", O_PROJ)
    after = read_tensor(target / "model.safetensors", O_PROJ)
    assert not after[:, 4:6].any()
    assert np.array_equal(np.delete(after, [4, 5], axis=1), np.delete(before, [4, 5], axis=1))
    for name in ("model.norm.weight", "last"):
        assert np.array_equal(
            read_tensor(target / "model.safetensors", name), read_tensor(source / "model.safetensors", name)
        )


def test_a_fault_that_cannot_be_planted_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(ValueError, match=r"no rope_theta other than 100000\.0"):
        models.rope_theta(source, target, 100000.0)
    with pytest.raises(ValueError, match="head 4 is not one of 4"):
        models.head_zeroed(source, target, layer=1, head=4)
    with pytest.raises(ValueError, match=r"holds model\.layers\.15"):
        models.head_zeroed(source, target)
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    for plant in (models.chat_template_newline_missing, models.system_prompt_changed):
        with pytest.raises(ValueError, match="no place for this fault"):
            plant(source, target)
    with pytest.raises(ValueError, match="no bos_token"):
        models.bos_doubled(source, target)
    assert not target.exists()


# Drill engine -------------------------------------------------------------------------------------------------------

GREEDY = SamplingParams.greedy(max_tokens=12, logprobs=4)
REQUESTS = [
    Request(prompt=Prompt(id="chat", messages=(Message(role="user", content="Hé?"),)), sampling=GREEDY),
    Request(prompt=Prompt(id="text", text="Once upon"), sampling=GREEDY),
    Request(prompt=Prompt(id="ids", token_ids=(1, 49000, 2)), sampling=GREEDY),
]
CLOSE: dict[str, object] = {"op": "close"}
Event = dict[str, Any]


def open_command(model: Path, options: dict[str, object]) -> dict[str, object]:
    spec = EngineSpec(engine=DRILL, model="drill", dtype="float32", options=options, env={})
    return {"op": "open", "spec": spec.to_json(), "model": str(model)}


def run_command(requests: list[Request]) -> dict[str, object]:
    return {"op": "run", "requests": [request_to_json(r) for r in requests]}


@contextlib.contextmanager
def worker() -> Iterator[subprocess.Popen[str]]:
    """A worker in a process group of its own, which is ended whatever happens, after half a minute at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-m", "parity.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(parity.__file__).parent.parent)},
        start_new_session=True,
    )

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(30, end)
    watchdog.start()
    try:
        with process:
            yield process
            end()
    finally:
        watchdog.cancel()
        end()


def converse(*commands: dict[str, object]) -> tuple[list[Event], int]:
    """Send everything at once; returns the events and the exit status."""
    with worker() as process:
        out, _ = process.communicate("".join(json.dumps(c) + "\n" for c in commands))
        return [json.loads(line) for line in out.splitlines()], process.returncode


def completions(events: list[Event]) -> list[Completion]:
    return [Completion.from_json(e["completion"]) for e in events if e["event"] == "completion"]


def answers(completion: Completion) -> dict[str, object]:
    """All but the timing."""
    return {key: value for key, value in completion.to_json().items() if key != "timing"}


def test_the_drill_engine_answers_the_same_twice(tmp_path: Path) -> None:
    dialogue = (open_command(tmp_path, {}), run_command(REQUESTS), CLOSE)
    events, status = converse(*dialogue)
    again, _ = converse(*dialogue)
    assert status == 0
    assert [e["event"] for e in events] == ["hello", "opened", *["completion"] * 3, "finished", "closed"]
    assert events[1]["fingerprint"]["context"]["engine.version"] == "1"
    first, second = completions(events), completions(again)
    assert [answers(c) for c in first] == [answers(c) for c in second]
    assert len({c.token_ids for c in first}) == 3
    chat, text, ids = first
    assert chat.prompt_text == "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.own_prompt_token_ids == tuple(chat.prompt_text.encode())
    assert text.own_prompt_token_ids == text.prompt_token_ids == tuple(b"Once upon")
    assert (ids.own_prompt_token_ids, ids.prompt_token_ids) == (None, (1, 49000, 2))


def test_the_drill_engine_generates_the_argmax_of_what_it_scores(tmp_path: Path) -> None:
    salted = open_command(tmp_path, {"salt": "another model"})
    events, _ = converse(open_command(tmp_path, {}), run_command(REQUESTS), salted, run_command(REQUESTS), CLOSE)
    generated, others = completions(events)[:3], completions(events)[3:]
    assert all(c.token_ids != o.token_ids for c, o in zip(generated, others, strict=True))
    forced = [
        Request(prompt=r.prompt, sampling=GREEDY, forced_token_ids=c.token_ids, prompt_token_ids=c.prompt_token_ids)
        for r, c in zip(REQUESTS, generated, strict=True)
    ]
    events, _ = converse(open_command(tmp_path, {}), run_command(forced), CLOSE)
    for ours, scored in zip(generated, completions(events), strict=True):
        assert ours.logprobs is not None
        assert scored.logprobs is not None
        assert scored.token_ids == ours.token_ids
        assert scored.prompt_token_ids == ours.prompt_token_ids
        assert scored.logprobs.to_json() == ours.logprobs.to_json()
        assert [ours.logprobs.row(i)[0][0] for i in range(8)] == list(ours.token_ids)
        assert all(len(ours.logprobs.row(i)) == 4 for i in range(8))
        assert -3.0 < sum(ours.logprobs.chosen) / 8 < 0.0
        assert ours.terminator is not None
        assert ours.terminator.token_id == 256
        assert ours.finish_reason is FinishReason.STOP
        assert (scored.terminator, scored.finish_reason, scored.text) == (None, FinishReason.LENGTH, None)


def test_max_tokens_ends_an_answer_before_its_length(tmp_path: Path) -> None:
    events, _ = converse(open_command(tmp_path, {"length": 12}), run_command(REQUESTS[:1]), CLOSE)
    (completion,) = completions(events)
    assert len(completion.token_ids) == 12
    assert (completion.terminator, completion.finish_reason) == (None, FinishReason.LENGTH)


def test_garbage_on_standard_output_never_reaches_the_protocol(tmp_path: Path) -> None:
    events, status = converse(open_command(tmp_path, {"behaviour": "garbage"}), run_command(REQUESTS), CLOSE)
    plain, _ = converse(open_command(tmp_path, {}), run_command(REQUESTS), CLOSE)
    assert status == 0
    assert [e["event"] for e in events] == [e["event"] for e in plain]
    assert [answers(c) for c in completions(events)] == [answers(c) for c in completions(plain)]


@pytest.mark.parametrize(
    ("options", "expected", "status"),
    [
        ({"behaviour": "crash_on_open"}, ["hello"], 70),
        ({"behaviour": "crash_after", "after": 2}, ["hello", "opened", "completion", "completion"], 70),
        ({"behaviour": "crash_after", "after": 3}, ["hello", "opened", *["completion"] * 3], 70),
        ({"behaviour": "raise_after", "after": 1}, ["hello", "opened", "completion", "failed", "closed"], 0),
        ({"behaviour": "short"}, ["hello", "opened", "completion", "completion", "finished", "closed"], 0),
        ({"behaviour": "unheard of"}, ["hello", "failed", "failed", "closed"], 0),
        ({"afterwards": 1}, ["hello", "failed", "failed", "closed"], 0),
    ],
    ids=lambda value: value.get("behaviour") if isinstance(value, dict) else "",
)
def test_the_drill_engine_misbehaves_as_told(
    options: dict[str, object], expected: list[str], status: int, tmp_path: Path
) -> None:
    events, found = converse(open_command(tmp_path, options), run_command(REQUESTS), CLOSE)
    assert [e["event"] for e in events] == expected
    assert found == status


def test_what_the_drill_engine_cannot_do_is_refused(tmp_path: Path) -> None:
    warm = SamplingParams.from_json({**request_to_json(REQUESTS[0])["sampling"], "temperature": 0.7})
    events, _ = converse(
        open_command(tmp_path, {}),
        run_command([Request(prompt=REQUESTS[0].prompt, sampling=warm)]),
        run_command([Request(prompt=Prompt(id="x", token_ids=(1,)), sampling=GREEDY, forced_token_ids=(300,))]),
        CLOSE,
    )
    messages = [e["message"] for e in events if e["event"] == "failed"]
    assert messages == [
        "the drill engine cannot honour temperature 0.7 of prompt 'chat'",
        "prompt 'x' forces token 300, which the drill engine does not have",
    ]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"behaviour": "hang_on_open"}, ["hello"]),
        ({"behaviour": "hang_after", "after": 1, "delay_s": 0.01}, ["hello", "opened", "progress", "completion"]),
    ],
)
def test_a_hanging_engine_ends_when_its_host_goes(options: dict[str, object], seen: list[str], tmp_path: Path) -> None:
    with worker() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for command in (open_command(tmp_path, options), run_command(REQUESTS)):
            process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        assert [json.loads(process.stdout.readline())["event"] for _ in seen] == seen
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.stdin.close()
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_a_spawned_child_is_in_the_workers_process_group(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    options: dict[str, object] = {"behaviour": "spawn_child", "pid_file": str(pid_file)}
    with worker() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(open_command(tmp_path, options)) + "\n")
        process.stdin.flush()
        assert [json.loads(process.stdout.readline())["event"] for _ in range(2)] == ["hello", "opened"]
        child = int(pid_file.read_text())
        assert os.getpgid(child) == process.pid
        process.stdin.close()
        process.wait(timeout=10)
        deadline = time.monotonic() + 10
        while _alive(child):
            assert time.monotonic() < deadline, "the child outlived its process group"
            time.sleep(0.01)


def _alive(pid: int) -> bool:
    """A killed child of a killed worker may stay a zombie where process 1 does not reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
