"""The user's files: what is right is read, what is wrong is named, with its file, its key and the nearest right one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drills import inline
from parity import checks
from parity.config import limited_to, read_prompts, read_target, spread, target_names
from parity.errors import ConfigError
from parity.prompts import Prompt, Request, SamplingParams
from parity.verdict import Policy

SHIPPED = Path(__file__).parents[1] / "suites" / "targets.toml"
ENGINE = {"engine": "vllm", "dtype": "float32"}
GREEDY = SamplingParams.greedy(max_tokens=1, logprobs=1)


def good() -> dict[str, Any]:
    """A file with nothing wrong in it."""
    return {
        "default": "cpu",
        "workloads": {"greedy": {"prompts": ["p.jsonl"]}},
        "targets": {
            "cpu": {"model": "m", "workload": "greedy", "reference": dict(ENGINE), "candidate": dict(ENGINE)},
        },
    }


def save(directory: Path, data: dict[str, Any]) -> Path:
    (directory / "p.jsonl").write_text('{"id": "a", "text": "x"}\n\n{"id": "b", "token_ids": [1]}\n')
    path = directory / "targets.toml"
    path.write_text("".join(f"{key} = {inline(value)}\n" for key, value in data.items()))
    return path


# The shipped files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", target_names(SHIPPED))
def test_every_shipped_target_is_read(name: str) -> None:
    target = read_target(SHIPPED, name)
    assert target.description
    assert target.noise is not None
    assert target.lockstep.prompts <= target.lockstep.most
    assert len(target.workload.requests) >= 128
    assert target.workload.requests[0].sampling.is_greedy


def test_the_shipped_default_is_one_of_the_targets() -> None:
    assert read_target(SHIPPED, None).name in target_names(SHIPPED)


def test_the_shipped_prompt_sets_share_no_id_and_hold_at_least_128_prompts() -> None:
    ids = [p.id for path in sorted(SHIPPED.parent.glob("prompts/*.jsonl")) for p in read_prompts(path)]
    assert len(set(ids)) == len(ids) >= 128


def test_a_plain_file_is_read_with_documented_defaults(tmp_path: Path) -> None:
    target = read_target(save(tmp_path, good()), None)
    assert (target.name, target.policy, target.noise, target.limits) == ("cpu", Policy.EQUIVALENCE, None, {})
    sampling = target.workload.requests[0].sampling
    assert (sampling.max_tokens, sampling.logprobs, [r.id for r in target.workload.requests]) == (64, 20, ["a", "b"])
    assert (target.candidate.threads, target.candidate.launcher, target.candidate.options) == (1, (), {})


def test_relative_paths_are_meant_from_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = good()
    data["targets"]["cpu"]["candidate"] |= {"engine": "engines/mine.py", "model": "../other"}
    (tmp_path / "deep").mkdir()
    path = save(tmp_path / "deep", data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    target = read_target(Path("..") / "deep" / path.name, "cpu")
    assert target.candidate.engine == str(tmp_path / "deep" / "engines" / "mine.py")
    assert target.candidate.model == str(tmp_path / "other")
    assert (target.reference.engine, target.reference.model) == ("vllm", str(tmp_path / "deep" / "m"))


@pytest.mark.parametrize("reference", ["package:llm==1", "hub:a/b@main", "/models/x"])
def test_other_references_to_a_model_stay_as_they_are(reference: str, tmp_path: Path) -> None:
    data = good()
    data["targets"]["cpu"]["model"] = reference
    assert read_target(save(tmp_path, data), None).candidate.model == reference


def test_environment_variables_become_strings(tmp_path: Path) -> None:
    data = good()
    data["targets"]["cpu"]["candidate"]["env"] = {"A": 1, "B": "x"}
    assert read_target(save(tmp_path, data), None).candidate.env == {"A": "1", "B": "x"}


# What is wrong is named --------------------------------------------------------------------------------------------

CPU = r"targets\.toml \[targets\.cpu\]"
WRONG: list[tuple[str, object, str]] = [
    ("defualt", "cpu", r"targets\.toml: unknown key 'defualt'; did you mean 'default'\?"),
    ("default", "cpy", r"targets\.toml: unknown target 'cpy'; did you mean 'cpu'\?"),
    ("default", 3, r"targets\.toml: 'default' must be a string, not 3"),
    ("targets", 3, r"targets\.toml: 'targets' must be a table, not 3"),
    ("workloads", 3, r"targets\.toml: 'workloads' must be a table, not 3"),
    ("targets.cpu", 3, rf"{CPU} must be a table, not 3"),
    ("targets.cpu.polcy", "identity", rf"{CPU}: unknown key 'polcy'; did you mean 'policy'\?"),
    ("targets.cpu.policy", "identical", rf"{CPU}: unknown policy 'identical'; did you mean 'identity'\?"),
    ("targets.cpu.policy", 3, rf"{CPU}: unknown policy '3'; valid are 'identity', 'equivalence', 'quantized'"),
    ("targets.cpu.workload", "gredy", rf"{CPU}: unknown workload 'gredy'; did you mean 'greedy'\?"),
    ("targets.cpu.workload", ["greedy"], rf"{CPU}: 'workload' must be a string"),
    ("targets.cpu.model", None, rf"{CPU} lacks the key 'model'"),
    ("targets.cpu.candidate", None, rf"{CPU} lacks the key 'candidate'"),
    ("targets.cpu.model", 3, rf"{CPU}: 'model' must be a string, not 3"),
    ("targets.cpu.description", 3, rf"{CPU}: 'description' must be a string, not 3"),
    ("targets.cpu.candidate", 3, rf"{CPU} candidate must be a table, not 3"),
    ("targets.cpu.candidate.modle", "x", rf"{CPU} candidate: unknown key 'modle'; did you mean 'model'\?"),
    ("targets.cpu.candidate.model", 3, rf"{CPU} candidate: 'model' must be a string, not 3"),
    ("targets.cpu.candidate.engine", None, rf"{CPU} candidate needs the keys 'engine' and 'dtype'"),
    ("targets.cpu.candidate.engine", 3, rf"{CPU} candidate: 'engine' must be a string, not 3"),
    ("targets.cpu.candidate.dtype", "bf16", rf"{CPU} candidate: unknown dtype 'bf16'; did you mean 'bfloat16'\?"),
    ("targets.cpu.candidate.dtype", 16, rf"{CPU} candidate: 'dtype' must be a string, not 16"),
    ("targets.cpu.candidate.launcher", "docker exec", rf"{CPU} candidate: 'launcher' must be a list of strings"),
    ("targets.cpu.candidate.threads", 0, rf"{CPU} candidate: 'threads' must be a whole number of at least 1, not 0"),
    ("targets.cpu.candidate.threads", True, rf"{CPU} candidate: 'threads' must be a whole number"),
    ("targets.cpu.candidate.options", "x", rf"{CPU} candidate: 'options' must be a table, not 'x'"),
    ("targets.cpu.candidate.env", ["A=1"], rf"{CPU} candidate: 'env' must be a table"),
    ("targets.cpu.candidate.environment", 3, rf"{CPU} candidate: 'environment' must be a string, not 3"),
    ("targets.cpu.noise", 3, rf"{CPU} noise must be a table, not 3"),
    ("targets.cpu.lockstep_prompts", 0, rf"{CPU}: 'lockstep_prompts' must be a whole number of at least 1"),
    ("targets.cpu.noise", {**ENGINE, "dtyp": "x"}, rf"{CPU} noise: unknown key 'dtyp'; did you mean 'dtype'\?"),
    ("targets.cpu.logic", {"workload": "greedi"}, rf"{CPU} logic: unknown workload 'greedi'; did you mean 'greedy'\?"),
    ("targets.cpu.logic", {"prompts": 3}, rf"{CPU} logic: unknown key 'prompts'"),
    ("targets.cpu.limits", 3, rf"{CPU}: 'limits' must be a table, not 3"),
    ("targets.cpu.limits", {"gredy": {}}, rf"{CPU} limits: unknown key 'gredy'; did you mean 'greedy'\?"),
    ("targets.cpu.limits", {"greedy": 3}, rf"{CPU} limits: 'greedy' must be a table, not 3"),
    ("workloads.greedy", 3, r"\[workloads\.greedy\] must be a table, not 3"),
    ("workloads.greedy.max_token", 3, r"\[workloads\.greedy\]: unknown key 'max_token'; did you mean 'max_tokens'\?"),
    ("workloads.greedy.max_tokens", 1.5, r"\[workloads\.greedy\]: 'max_tokens' must be a whole number .*, not 1\.5"),
    ("workloads.greedy.logprobs", 0, r"\[workloads\.greedy\]: 'logprobs' must be a whole number of at least 1, not 0"),
    ("workloads.greedy.prompts", "p.jsonl", r"\[workloads\.greedy\]: 'prompts' must be a list of strings"),
    ("workloads.greedy.prompts", [3], r"\[workloads\.greedy\]: 'prompts' must be a list of strings"),
    ("workloads.greedy.prompts", [], r"\[workloads\.greedy\] has no prompts; list at least one prompt file"),
    ("workloads.greedy.prompts", ["q.jsonl"], r"the prompt set '.*q\.jsonl' cannot be read \(No such file"),
    (
        "workloads.greedy.prompts",
        ["p.jsonl", "p.jsonl"],
        r"\[workloads\.greedy\]: workload 'greedy' has two prompts with the id 'a'",
    ),
]


@pytest.mark.parametrize(("key", "value", "sentence"), WRONG)
def test_a_wrong_value_is_named_with_its_place(key: str, value: object, sentence: str, tmp_path: Path) -> None:
    data = good()
    *path, last = key.split(".")
    table = data
    for part in path:
        table = table[part]
    if value is None:
        del table[last]
    else:
        table[last] = value
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_target(save(tmp_path, data), None)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_places_for_one_engine_are_refused(tmp_path: Path) -> None:
    data = good()
    data["targets"]["cpu"]["candidate"] |= {"python": "python3", "environment": "vllm"}
    with pytest.raises(ConfigError, match="has both 'environment' and 'python'; an engine lives in one place"):
        read_target(save(tmp_path, data), None)


def test_without_a_default_the_targets_are_listed(tmp_path: Path) -> None:
    data = good()
    del data["default"]
    path = save(tmp_path, data)
    assert read_target(path, "cpu").name == "cpu"
    with pytest.raises(ConfigError, match=r"names no 'default' target; add one, or say which: 'cpu'"):
        read_target(path, None)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"the file '.*targets\.toml' cannot be read \(No such file or directory\)"),
        (b"= 3", r"the file '.*targets\.toml' is not valid TOML: .*line 1"),
        (b"a = '\xff'", r"the file '.*targets\.toml' is not valid TOML: .*utf-8"),
    ],
)
def test_a_targets_file_that_cannot_be_read_is_named(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "targets.toml"
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: read_target(path, None), lambda: target_names(path)):
        with pytest.raises(ConfigError, match=sentence):
            read()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"id": "a", "text": "x"}\n{"id": "b"', r"p\.jsonl:2: Expecting"),
        (b'\n\n{"id": "a", "txt": "x"}\n', r"p\.jsonl:3: prompt 'a' has the unknown key 'txt'"),
        (b'["a"]\n', r"p\.jsonl:1: a prompt must be a JSON object, not \['a'\]"),
        (b'"text"\n', r"p\.jsonl:1: a prompt must be a JSON object, not 'text'"),
        (b'{"id": "a", "messages": [{"role": "user"}]}\n', r"p\.jsonl:1: prompt 'a': 'messages' must be a list"),
        (b'{"id": "a"}\n', r"p\.jsonl:1: prompt 'a' must have exactly one of .*; it has none of them"),
        (b"\xff\n", r"the prompt set '.*p\.jsonl' is not UTF-8"),
    ],
)
def test_a_wrong_line_of_a_prompt_set_is_named_by_file_and_line(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read_prompts(tmp_path / "p.jsonl")


def test_a_line_separator_inside_a_prompt_does_not_end_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "text": "x\u2028y\x85z"}\r\n', "utf-8")
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == ["x\u2028y\x85z"]


def test_check_names_are_found_without_importing_a_check() -> None:
    assert set(checks.names()) >= {"greedy", "inputs"}


# Shares ------------------------------------------------------------------------------------------------------------


def requests(count: int) -> list[Request]:
    return [Request(prompt=Prompt(id=str(i), text=""), sampling=GREEDY) for i in range(count)]


@given(st.integers(0, 200), st.integers(0, 250))
def test_a_share_is_in_order_of_the_right_size_and_evenly_spread(total: int, count: int) -> None:
    chosen = [int(r.id) for r in spread(requests(total), count)]
    assert len(chosen) == min(total, count)
    assert chosen == sorted(set(chosen))
    gaps = {b - a for a, b in zip(chosen, [*chosen[1:], total], strict=True)} if chosen else {0}
    assert max(gaps) - min(gaps) <= 1
    assert not chosen or chosen[0] == 0


def test_a_limited_target_asks_a_share_and_is_otherwise_the_same(tmp_path: Path) -> None:
    target = read_target(SHIPPED, None)
    few = limited_to(target, 10)
    assert len(few.workload.requests) == 10
    assert few.logic is not None
    assert len(few.logic.requests) == 10
    assert replace(few, workload=target.workload, logic=target.logic, sampling=target.sampling) == target
    assert few.workload.digest != target.workload.digest


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"must be a whole number of at least 1, not {count}")):
        limited_to(read_target(SHIPPED, None), count)


def test_a_relative_interpreter_is_meant_from_the_targets_file(tmp_path: Path) -> None:
    """And is not resolved: following an environment's link would leave the environment."""
    data = good()
    data["targets"]["cpu"]["candidate"] |= {"python": "../venv/bin/python"}
    data["targets"]["cpu"]["reference"] |= {"python": "python3"}
    target = read_target(save(tmp_path, data), "cpu")
    assert target.candidate.python is not None
    assert target.candidate.python.endswith("/../venv/bin/python")
    assert target.candidate.python.startswith(str(tmp_path))
    assert target.reference.python == "python3"
