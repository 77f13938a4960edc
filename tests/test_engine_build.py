"""TensorRT-LLM engine directories: every planted difference is said, and what cannot be told never passes.

`data/engine-1.2.1/config.json` was put together by hand, field by field in the order the builder writes them, from the
sources of TensorRT-LLM 1.2.1 as its documentation shows them (NVIDIA/TensorRT-LLM, branch gh-pages, commit 58fb435,
1.2.1/_modules: builder, plugin/plugin, models/modeling_utils, models/llama/config): `trtllm-build` with --max_seq_len
2048 --max_batch_size 64, all else default, on SmolLM2-135M-Instruct. Not among those pages are `mapping`, `moe` and
`lora_config`: these follow the repository's sources next to that release, and a config.json of 0.17.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import engine_manifest
from parity.engine_accepted import against_accepted, facts_of
from parity.engine_build import (
    UNQUANTIZED,
    Accepted,
    Complaint,
    Severity,
    Wanted,
    accepted_of,
    exit_outcome,
    lint,
    render,
)
from parity.engine_manifest import CONFIG, SIDECAR, build_manifest, read_manifest, this_machine
from parity.errors import ConfigError
from parity.fingerprint import Scalar
from parity.verdict import Outcome

FAITHFUL: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "engine-1.2.1" / CONFIG).read_text("utf-8"))
MACHINE: Mapping[str, Scalar] = {
    "sm": "9.0",
    "gpu_name": "NVIDIA H100 80GB HBM3",
    "driver": "580.82.07",
    "cuda": "13.0.88",
    "tensorrt": "10.14.1.48",
    "tensorrt_llm": "1.2.1",
    "torch": "2.9.1",
}
FITTING = Wanted(
    sm="9.0",
    tensorrt="10.14.1.48",
    tensorrt_llm="1.2.1",
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    dtype="bfloat16",
    quantization=UNQUANTIZED,
    max_prompt_tokens=1984,
    max_answer_tokens=64,
    batch=64,
    prefix_caching=True,
)
ABSENT = object()
"""Takes a field out, where a change gives it as the value."""


@pytest.fixture(scope="module", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Waiting for the disk a thousand times is most of the time, and no test here can cut the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The faithful config.json with fields, by dotted name, set to other values."""
    config: dict[str, Any] = json.loads(json.dumps(FAITHFUL))
    for name, value in changes.items():
        *path, last = name.split(".")
        place = config
        for key in path:
            place = place[key]
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
    return config


def engine(
    directory: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    ranks: int = 1,
    machine: Mapping[str, Scalar] | None = MACHINE,
) -> Path:
    """An engine directory whose plans are a few bytes; `machine=None` leaves the sidecar out."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(changed(changes or {}), indent=4), "utf-8")
    for rank in range(ranks):
        (directory / f"rank{rank}.engine").write_bytes(b"ftrt plan %d" % rank)
    if machine is not None:
        build_manifest(directory, checkpoint=None, command="trtllm-build", machine=machine)
    return directory


def complaints(directory: Path, wanted: Wanted | None = None, accepted: Accepted | None = None) -> dict[str, Severity]:
    """The worst by field. Each is a sentence that says what to do."""
    found = lint(directory, accepted=accepted, wanted=wanted)
    assert all("; " in c.sentence and not c.sentence.endswith(".") for c in found)
    return {c.field: c.kind for c in reversed(found)}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


LEAVES = dict(leaves(FAITHFUL))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def test_a_sound_engine_gives_no_cause_for_complaint(tmp_path: Path) -> None:
    made = engine(tmp_path)
    found = lint(made, accepted=accepted_of(made), wanted=FITTING)
    assert found == ()
    assert exit_outcome(found) is Outcome.PASS
    assert render(found, made) == f"engine {str(made)!r}: nothing to complain of\n"


def test_every_fact_of_config_json_is_compared() -> None:
    accepted = facts_of(FAITHFUL, None)
    for name in LEAVES:
        for value in ("another", ABSENT):
            found = {c.field for c in against_accepted(facts_of(changed({name: value}), None), accepted)}
            assert name in found


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(LEAVES)), value=VALUES)
def test_any_single_changed_fact_of_config_json_is_reported(name: str, value: object) -> None:
    if json.dumps(value) == json.dumps(LEAVES[name]):
        return
    with tempfile.TemporaryDirectory() as place:
        accepted = accepted_of(engine(Path(place) / "accepted"))
        found = lint(engine(Path(place) / "other", {name: value}), accepted=accepted, wanted=None)
        assert any(c.field == name or c.field.startswith(f"{name}.") for c in found)


def test_every_fact_that_could_differ_is_weighed_as_documented(tmp_path: Path) -> None:
    """One change each; what no rule names is a warning."""
    accepted = accepted_of(engine(tmp_path / "accepted"))
    expected = {
        Severity.ERROR: {
            "version": "1.2.0",
            "pretrained_config.architecture": "QWenForCausalLM",
            "pretrained_config.hidden_size": 577,
            "pretrained_config.rotary_base": 10000.0,
            "pretrained_config.moe.top_k": 2,
        },
        Severity.WARNING: {
            "pretrained_config.dtype": "float16",
            "pretrained_config.quantization.quant_algo": "FP8",
            "pretrained_config.quantization.kv_cache_quant_algo": "FP8",
            "pretrained_config.quantization.group_size": 64,
            "pretrained_config.mapping.moe_ep_size": 2,
            "build_config.max_input_len": 1023,
            "build_config.max_seq_len": 2047,
            "build_config.max_batch_size": 63,
            "build_config.max_num_tokens": 8191,
            "build_config.max_beam_width": 2,
            "build_config.gather_context_logits": True,
            "build_config.gather_generation_logits": True,
            "build_config.plugin_config.gemm_plugin": "bfloat16",
            "build_config.plugin_config.use_fused_mlp": False,
        },
        Severity.NOTE: {
            "build_config.profiling_verbosity": "detailed",
            "build_config.input_timing_cache": "model.cache",
            "pretrained_config.mapping.gpus_per_node": 4,
        },
    }
    for kind, changes in expected.items():
        for name, value in changes.items():
            made = engine(tmp_path / name, {name: value}, machine={**MACHINE, "tensorrt_llm": None})
            found = [c for c in lint(made, accepted=accepted, wanted=None) if "accepted build" in c.sentence]
            assert [(c.field, c.kind) for c in found] == [(name, kind)]
            assert json.dumps(value) in found[0].sentence
            assert json.dumps(LEAVES[name]) in found[0].sentence


def test_two_differences_are_two_complaints_the_worst_first(tmp_path: Path) -> None:
    accepted = accepted_of(engine(tmp_path / "accepted"))
    changes = {
        "build_config.profiling_verbosity": "none",
        "pretrained_config.vocab_size": 1,
        "build_config.use_refit": True,
    }
    found = lint(engine(tmp_path / "other", changes), accepted=accepted, wanted=None)
    assert [c.kind for c in found] == [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    first, *rest = render(found, tmp_path).splitlines()
    assert first.endswith("1 ERROR, 1 WARNING, 1 NOTE")
    assert [line.split()[0] for line in rest] == ["ERROR", "WARNING", "NOTE"]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("sm", "8.9", Severity.ERROR),
        ("tensorrt", "10.13.0.35", Severity.ERROR),
        ("gpu_name", "NVIDIA H200", Severity.WARNING),
        ("cuda", "12.9", Severity.WARNING),
        ("driver", "550.54.15", Severity.NOTE),
        ("torch", "2.9.0", Severity.NOTE),
        ("sm", None, Severity.UNKNOWN),
        ("tensorrt", None, Severity.UNKNOWN),
        ("gpu_name", None, Severity.NOTE),
    ],
)
def test_a_build_of_another_machine_than_the_accepted_one(
    tmp_path: Path, name: str, value: Scalar, kind: Severity
) -> None:
    accepted = accepted_of(engine(tmp_path / "accepted"))
    other = engine(tmp_path / "other", machine={**MACHINE, name: value})
    assert complaints(other, accepted=accepted) == {f"machine.{name}": kind}


def test_what_the_accepted_build_does_not_say_is_a_note(tmp_path: Path) -> None:
    accepted = accepted_of(engine(tmp_path / "accepted", machine=None))
    found = complaints(engine(tmp_path / "other"), accepted=accepted)
    assert set(found.values()) == {Severity.NOTE}
    assert "machine.sm" in found


@pytest.mark.parametrize(
    ("asked", "changes", "field", "kind"),
    [
        ({"sm": "8.9"}, {}, "machine.sm", Severity.ERROR),
        ({"tensorrt": "10.13.0.35"}, {}, "machine.tensorrt", Severity.ERROR),
        ({"tensorrt_llm": "1.2.0"}, {}, "version", Severity.ERROR),
        ({"tensor_parallel_size": 2}, {}, "pretrained_config.mapping.tp_size", Severity.ERROR),
        ({"pipeline_parallel_size": 2}, {}, "pretrained_config.mapping.pp_size", Severity.ERROR),
        ({"dtype": "float16"}, {}, "pretrained_config.dtype", Severity.ERROR),
        ({"quantization": "FP8"}, {}, "pretrained_config.quantization.quant_algo", Severity.ERROR),
        (
            {},
            {"pretrained_config.quantization.quant_algo": "FP8"},
            "pretrained_config.quantization.quant_algo",
            Severity.ERROR,
        ),
        ({"max_prompt_tokens": 1985}, {}, "build_config.max_seq_len", Severity.ERROR),
        ({"max_answer_tokens": 65}, {}, "build_config.max_seq_len", Severity.ERROR),
        ({"max_prompt_tokens": 2048, "max_answer_tokens": None}, {}, "build_config.max_seq_len", Severity.ERROR),
        ({}, {"build_config.max_num_tokens": 1983}, "build_config.max_num_tokens", Severity.ERROR),
        ({}, {"build_config.plugin_config.context_fmha": False}, "build_config.max_input_len", Severity.ERROR),
        ({}, {"build_config.plugin_config.remove_input_padding": False}, "build_config.max_input_len", Severity.ERROR),
        ({"batch": 65}, {}, "build_config.max_batch_size", Severity.WARNING),
        ({"needs_prompt_logprobs": True}, {}, "build_config.gather_context_logits", Severity.ERROR),
        ({"needs_generation_logprobs": True}, {}, "build_config.gather_generation_logits", Severity.WARNING),
        (
            {},
            {"build_config.plugin_config.use_paged_context_fmha": False},
            "build_config.plugin_config.use_paged_context_fmha",
            Severity.ERROR,
        ),
        ({}, {"build_config.gather_context_logits": True}, "build_config.gather_context_logits", Severity.ERROR),
        ({}, {"build_config.max_seq_len": ABSENT}, "build_config.max_seq_len", Severity.UNKNOWN),
        ({}, {"build_config.max_seq_len": None}, "build_config.max_seq_len", Severity.UNKNOWN),
        ({}, {"build_config.max_batch_size": True}, "build_config.max_batch_size", Severity.UNKNOWN),
        ({}, {"pretrained_config.dtype": ABSENT}, "pretrained_config.dtype", Severity.UNKNOWN),
    ],
)
def test_an_engine_that_does_not_do_what_is_wanted(
    tmp_path: Path, asked: dict[str, Any], changes: dict[str, Any], field: str, kind: Severity
) -> None:
    made = engine(tmp_path, changes)
    assert complaints(made, replace(FITTING, **asked)) == {field: kind}
    assert complaints(made) == {}


@pytest.mark.parametrize(
    ("wanted", "gathered"),
    [
        (Wanted(needs_prompt_logprobs=True, needs_generation_logprobs=True), True),
        (Wanted(prefix_caching=True), False),
    ],
)
def test_what_is_wanted_and_was_built_in_is_no_complaint(tmp_path: Path, wanted: Wanted, gathered: bool) -> None:
    changes = {"build_config.gather_context_logits": gathered, "build_config.gather_generation_logits": gathered}
    assert complaints(engine(tmp_path, changes), wanted) == {}


def test_a_request_that_just_fits_is_no_complaint(tmp_path: Path) -> None:
    assert complaints(engine(tmp_path, {"build_config.max_num_tokens": 1984}), FITTING) == {}


def test_max_input_len_is_not_looked_at_where_the_runtime_does_not(tmp_path: Path) -> None:
    made = engine(tmp_path, {"build_config.max_input_len": 1})
    assert complaints(made, FITTING) == {}


def test_several_ranks_need_several_plans(tmp_path: Path) -> None:
    sizes = {"pretrained_config.mapping.world_size": 4, "pretrained_config.mapping.tp_size": 2}
    both = {**sizes, "pretrained_config.mapping.pp_size": 2}
    assert complaints(engine(tmp_path / "whole", both, ranks=4)) == {}
    assert complaints(engine(tmp_path / "short", both, ranks=2)) == {"rank2.engine": Severity.ERROR}
    assert complaints(engine(tmp_path / "uneven", sizes, ranks=4)) == {
        "pretrained_config.mapping.world_size": Severity.ERROR
    }
    assert complaints(engine(tmp_path / "rest", ranks=2)) == {"rank1.engine": Severity.WARNING}


def test_a_plan_of_no_rank_does_not_stand_in_for_one_that_is_missing(tmp_path: Path) -> None:
    sizes = {"pretrained_config.mapping.world_size": 2, "pretrained_config.mapping.tp_size": 2}
    made = engine(tmp_path, sizes, ranks=3, machine=None)
    (made / "rank1.engine").unlink()
    found = complaints(made)
    assert found["rank1.engine"] is Severity.ERROR
    assert found["rank2.engine"] is Severity.WARNING


def test_an_empty_plan_is_an_error_even_if_the_sidecar_was_written_of_it(tmp_path: Path) -> None:
    made = engine(tmp_path, machine=None)
    (made / "rank0.engine").write_bytes(b"")
    build_manifest(made, checkpoint=None, command=None, machine=MACHINE)
    assert complaints(made) == {"rank0.engine": Severity.ERROR}


@pytest.mark.parametrize(
    ("size", "field", "kind"),
    [
        (10**30, "rank1.engine", Severity.ERROR),
        (0, "pretrained_config.mapping.world_size", Severity.ERROR),
        (-1, "pretrained_config.mapping.world_size", Severity.ERROR),
        ("1", "pretrained_config.mapping.world_size", Severity.UNKNOWN),
        (1.0, "pretrained_config.mapping.world_size", Severity.UNKNOWN),
    ],
)
def test_a_world_size_that_is_none(tmp_path: Path, size: object, field: str, kind: Severity) -> None:
    sizes = {f"pretrained_config.mapping.{name}": size for name in ("world_size", "tp_size")}
    assert complaints(engine(tmp_path, sizes))[field] is kind


def test_a_config_json_of_the_old_builder_or_of_a_checkpoint_is_no_engines(tmp_path: Path) -> None:
    made = engine(tmp_path, machine=None)
    for config, field in (
        ({"builder_config": {"name": "llama", "tensor_parallel": 1}, "plugin_config": {}}, CONFIG),
        ({"architecture": "LlamaForCausalLM", "dtype": "float16"}, "version"),
        ({**FAITHFUL, "build_config": []}, "build_config"),
        ({**FAITHFUL, "version": 1}, "version"),
    ):
        (made / CONFIG).write_text(json.dumps(config))
        assert complaints(made, FITTING, accepted_of(made))[field] is Severity.ERROR


def test_another_version_and_strange_keys_are_warnings(tmp_path: Path) -> None:
    made = engine(
        tmp_path, {"version": "0.17.0.post1", "auto": {}}, machine={**MACHINE, "tensorrt_llm": "0.17.0.post1"}
    )
    assert complaints(made) == {"version": Severity.WARNING, "'auto'": Severity.WARNING}


def test_a_sidecar_that_another_version_wrote_is_not_of_this_build(tmp_path: Path) -> None:
    made = engine(tmp_path, machine={**MACHINE, "tensorrt_llm": "1.1.0"})
    assert complaints(made) == {"machine.tensorrt_llm": Severity.ERROR}


def test_without_a_sidecar_the_architecture_is_unknown_and_never_passes(tmp_path: Path) -> None:
    accepted = accepted_of(engine(tmp_path / "accepted"))
    made = engine(tmp_path / "bare", machine=None)
    alone = lint(made, accepted=None, wanted=None)
    assert [(c.kind, c.field) for c in alone] == [(Severity.NOTE, "machine.sm")]
    assert exit_outcome(alone) is Outcome.PASS
    for wanted, golden in ((Wanted(sm="9.0"), None), (None, accepted), (Wanted(sm="9.0"), accepted)):
        found = lint(made, accepted=golden, wanted=wanted)
        assert [c.field for c in found].count("machine.sm") == 1
        assert exit_outcome(found) is Outcome.INCONCLUSIVE
    failing = lint(made, accepted=None, wanted=Wanted(sm="9.0", dtype="float16"))
    assert exit_outcome(failing) is Outcome.FAIL


def test_an_unknown_tensorrt_is_inconclusive_where_one_is_wanted(tmp_path: Path) -> None:
    made = engine(tmp_path, machine={**MACHINE, "tensorrt": None})
    assert complaints(made) == {}
    assert complaints(made, FITTING) == {"machine.tensorrt": Severity.UNKNOWN}


def flip(directory: Path) -> None:
    path = directory / "rank0.engine"
    path.write_bytes(path.read_bytes().swapcase())


def link_outside(directory: Path) -> None:
    (directory / "rank0.engine").rename(directory.parent / "elsewhere")
    (directory / "rank0.engine").symlink_to("../elsewhere")


def loop(directory: Path) -> None:
    (directory / "rank0.engine").unlink()
    (directory / "rank0.engine").symlink_to("rank0.engine")


def pipe(directory: Path) -> None:
    (directory / "rank0.engine").unlink()
    os.mkfifo(directory / "rank0.engine")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "sha256"),
        (lambda d: (d / "rank0.engine").write_bytes(b""), "0 bytes"),
        (lambda d: (d / "rank0.engine").unlink(), "missing"),
        (link_outside, "outside the engine directory"),
        (loop, "leads nowhere"),
        (pipe, "no plain file"),
    ],
)
def test_a_damaged_plan_is_an_error(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    made = engine(tmp_path / "engine")
    damage(made)
    found = lint(made, accepted=None, wanted=None)
    assert {c.field for c in found} == {"rank0.engine"}
    assert any(says in c.sentence for c in found)
    assert exit_outcome(found) is Outcome.FAIL


def test_a_folder_that_is_linked_in_from_elsewhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    made = engine(tmp_path / "engine")
    (made / "lora").symlink_to("../adapters")
    assert complaints(made) == {"lora": Severity.ERROR}


def test_an_edited_config_json_does_not_match_its_sidecar(tmp_path: Path) -> None:
    made = engine(tmp_path)
    (made / CONFIG).write_text(json.dumps(changed({"build_config.max_seq_len": 4096})))
    assert complaints(made) == {CONFIG: Severity.ERROR}


def test_a_file_that_came_later_is_a_warning(tmp_path: Path) -> None:
    made = engine(tmp_path)
    (made / "lora").mkdir()
    (made / "lora" / "model.safetensors").write_bytes(b"0")
    assert complaints(made) == {"lora/model.safetensors": Severity.WARNING}


def test_an_engine_that_was_copied_keeps_its_sidecar(tmp_path: Path) -> None:
    made = engine(tmp_path / "here" / "engine")
    (tmp_path / "there").symlink_to(made)
    assert complaints(tmp_path / "there", FITTING) == {}


BROKEN: Mapping[str, tuple[bytes, str]] = {
    "a key twice": (b'{"version": "1.2.1", "version": "1.2.0"}', "the key 'version' twice"),
    "a key twice, deep": (b'{"a": [{"b": 1, "b": 2}]}', "the key 'b' twice"),
    "NaN": (b'{"version": NaN}', "NaN"),
    "minus infinity": (b'{"version": -Infinity}', "-Infinity"),
    "a number beyond float64": (b'{"version": 1e999}', "1e999"),
    "an integer of 5000 digits": (b'{"version": ' + b"9" * 5000 + b"}", "cannot be read"),
    "too large": (b'{"version": "' + b"1" * (4 << 20) + b'"}', "more than 4 MiB"),
    "too deep": (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
    "a bomb": (b"[" * (4 << 20), "deeper than 64"),
    "a bomb of objects": (b'{"a":' * 800_000, "deeper than 64"),
    "a list": (b"[1]", "no JSON object"),
    "cut off": (b'{"version": "1.2', "cannot be read"),
    "no UTF-8": (b'{"version": "\xff"}', "cannot be read"),
    "empty": (b"", "cannot be read"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_json_that_is_not_to_be_trusted_is_refused_in_a_sentence(tmp_path: Path, fault: str) -> None:
    content, says = BROKEN[fault]
    made = engine(tmp_path)
    accepted = accepted_of(made)
    (made / SIDECAR).write_bytes(content)
    found = lint(made, accepted=accepted, wanted=FITTING)
    assert [c.kind for c in found if c.field == SIDECAR] == [Severity.ERROR]
    assert any(says in c.sentence for c in found)
    assert all(len(c.sentence) < 600 for c in found)
    (made / CONFIG).write_bytes(content)
    for read in (accepted_of, lambda d: lint(d, accepted=None, wanted=None)):
        with pytest.raises(ConfigError, match=says):
            read(made)
    with pytest.raises(ConfigError, match=says):
        build_manifest(made, checkpoint=None, command=None, machine={})


def test_nesting_as_deep_as_allowed_is_read(tmp_path: Path) -> None:
    made = engine(tmp_path, {"deep": json.loads("[" * 63 + "]" * 63)})
    assert complaints(made) == {"'deep'": Severity.WARNING}


def test_a_config_json_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    made = engine(tmp_path / "engine", machine=None)
    (made / CONFIG).rename(tmp_path / CONFIG)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        lint(made, accepted=None, wanted=None)
    (made / CONFIG).symlink_to(tmp_path / CONFIG)
    with pytest.raises(ConfigError, match="outside the engine directory"):
        lint(made, accepted=None, wanted=None)


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        lint(tmp_path / "nowhere", accepted=None, wanted=None)
    with pytest.raises(ConfigError, match="cannot be listed"):
        build_manifest(tmp_path / "nowhere", checkpoint=None, command=None, machine={})


JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


@settings(max_examples=50)
@given(
    name=st.sampled_from([CONFIG, SIDECAR]), content=st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode())
)
def test_whatever_the_files_hold_lint_answers_or_refuses(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        made = engine(Path(place))
        accepted = accepted_of(made)
        (made / name).write_bytes(content)
        with contextlib.suppress(ConfigError):
            found = lint(made, accepted=accepted, wanted=FITTING)
            assert exit_outcome(found) is not Outcome.PASS
            render(found, made).encode("utf-8")


@settings(max_examples=30)
@given(
    part=st.sampled_from(["pretrained_config", "build_config"]),
    content=st.dictionaries(st.text(max_size=6), JSON, max_size=4),
)
def test_whatever_a_part_of_config_json_holds_lint_answers(part: str, content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        accepted = accepted_of(engine(Path(place) / "accepted"))
        found = lint(engine(Path(place) / "other", {part: content}), accepted=accepted, wanted=FITTING)
        assert exit_outcome(found) is not Outcome.PASS


def changes_while_read(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    real = engine_manifest.os.fstat  # type: ignore[attr-defined]  # the module's own reference

    def grow(descriptor: int) -> os.stat_result:
        status: os.stat_result = real(descriptor)
        if status.st_ino == path.stat().st_ino:
            path.write_bytes(path.read_bytes() + b"more")
        return status

    monkeypatch.setattr(engine_manifest.os, "fstat", grow)  # type: ignore[attr-defined]


def test_a_file_that_changes_while_it_is_hashed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(tmp_path)
    changes_while_read(monkeypatch, made / "rank0.engine")
    found = lint(made, accepted=None, wanted=None)
    assert [(c.kind, c.field) for c in found] == [(Severity.ERROR, "rank0.engine")]
    assert "changed while it was read" in found[0].sentence
    with pytest.raises(ConfigError, match="changed while it was read"):
        build_manifest(made, checkpoint=None, command=None, machine={})


def test_an_accepted_build_survives_json_and_needs_no_plans(tmp_path: Path) -> None:
    made = engine(tmp_path / "engine")
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in (CONFIG, SIDECAR):
        (kept / name).write_bytes((made / name).read_bytes())
    accepted = accepted_of(kept)
    assert accepted == accepted_of(made)
    assert Accepted.from_json(json.loads(json.dumps(accepted.to_json()))) == accepted
    assert complaints(made, accepted=accepted) == {}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"schema": 2, "facts": {}}, "schema 2"),
        ({"facts": {}}, "accept it again"),
        ({"schema": 1, "facts": {"a": 1}}, "accept it"),
    ],
)
def test_an_accepted_build_that_is_none_is_refused(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Accepted.from_json(data)


def test_keys_that_look_alike_are_not_mixed_up(tmp_path: Path) -> None:
    """A dot inside a key is no level, and 1, true and "1" are three values."""
    field = "build_config.lora_config.trtllm_modules_to_hf_modules"
    accepted = accepted_of(engine(tmp_path / "accepted", {field: {"a": {"b": "1"}}}))
    for number, value in enumerate(({"a.b": "1"}, {"a": {"b": 1}}, {"a": {"b": True}}, {"a": {"b": "1", "c\n": 1}})):
        found = lint(engine(tmp_path / str(number), {field: value}), accepted=accepted, wanted=None)
        assert exit_outcome(found) is Outcome.PASS
        assert found
        assert len(render(found, tmp_path).splitlines()) == 1 + len(found)


# The sidecar


def test_the_sidecar_says_what_was_found_out_and_what_was_not(tmp_path: Path) -> None:
    checkpoint = tmp_path / "hub" / "snapshots" / ("0123456789" * 4)
    checkpoint.mkdir(parents=True)
    (checkpoint / CONFIG).write_text("{}")
    made = engine(tmp_path / "engine", machine=None)
    path = build_manifest(made, checkpoint=checkpoint, command="trtllm-build --x", machine={**MACHINE, "cuda": None})
    assert path == made / SIDECAR
    manifest = read_manifest(made)
    assert manifest is not None
    assert manifest.unknown == ("machine.cuda",)
    assert manifest.checkpoint_revision == checkpoint.name
    assert manifest.command == "trtllm-build --x"
    assert sorted(manifest.files) == [CONFIG, "rank0.engine"]
    assert manifest.files["rank0.engine"].bytes == (made / "rank0.engine").stat().st_size
    bare = read_manifest(engine(tmp_path / "other", machine={}))
    assert bare is not None
    assert bare.unknown == (*(f"machine.{name}" for name in MACHINE), "checkpoint.config_sha256", "checkpoint.revision")
    assert read_manifest(tmp_path) is None


def test_a_sidecar_is_only_written_into_an_engine_directory(tmp_path: Path) -> None:
    for missing in (CONFIG, "rank0.engine"):
        made = engine(tmp_path / missing, machine=None)
        (made / missing).unlink()
        with pytest.raises(ConfigError, match=f"has no {missing}"):
            build_manifest(made, checkpoint=None, command=None, machine=MACHINE)
        assert not (made / SIDECAR).exists()
    made = engine(tmp_path / "whole", machine=None)
    with pytest.raises(ConfigError, match="machine fact 'gpu' is unknown"):
        build_manifest(made, checkpoint=None, command=None, machine={"gpu": "H100"})
    with pytest.raises(ConfigError, match=r"checkpoint .* has no config\.json"):
        build_manifest(made, checkpoint=tmp_path, command=None, machine=MACHINE)
    link_outside(made)
    with pytest.raises(ConfigError, match="outside the engine directory"):
        build_manifest(made, checkpoint=None, command=None, machine=MACHINE)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"schema": 2}, "upgrade engine-parity"),
        ({"schema": None}, "names no schema"),
        ({"files": []}, "write it again"),
        ({"files": {"rank0.engine": {"bytes": 1}}}, "write it again"),
        ({"machine": {"sm": "9.0"}}, "write it again"),
        ({"more": 1}, "holds more"),
    ],
)
def test_a_sidecar_that_is_none_is_an_error_and_its_facts_are_unknown(
    tmp_path: Path, edit: dict[str, Any], says: str
) -> None:
    made = engine(tmp_path)
    data = json.loads((made / SIDECAR).read_text())
    (made / SIDECAR).write_text(json.dumps({**data, **edit}))
    found = lint(made, accepted=None, wanted=Wanted(sm="9.0"))
    assert [(c.kind, c.field) for c in found] == [(Severity.ERROR, SIDECAR), (Severity.UNKNOWN, "machine.sm")]
    assert says in found[0].sentence
    with pytest.raises(ConfigError, match=says):
        accepted_of(made)


def test_sidecars_written_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    made = engine(tmp_path)
    commands = [f"build {number} " + "x" * 20_000 for number in range(40)]

    def write(command: str) -> str | None:
        build_manifest(made, checkpoint=None, command=command, machine=MACHINE)
        seen = read_manifest(made)
        assert seen is not None
        return seen.command

    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(write, commands))
    assert seen <= set(commands)
    assert sorted(path.name for path in made.iterdir()) == [CONFIG, SIDECAR, "rank0.engine"]
    assert complaints(made) == {}


def test_a_sidecar_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(tmp_path)
    before = (made / SIDECAR).read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        build_manifest(made, checkpoint=None, command="other", machine=MACHINE)
    assert (made / SIDECAR).read_bytes() == before
    assert sorted(path.name for path in made.iterdir()) == [CONFIG, SIDECAR, "rank0.engine"]


def test_what_a_broken_off_write_left_behind_is_no_part_of_the_engine(tmp_path: Path) -> None:
    made = engine(tmp_path)
    (made / f".{SIDECAR}.123.abc").write_text("{")
    assert complaints(made) == {}


def gpus(monkeypatch: pytest.MonkeyPatch, place: Path, script: str) -> dict[str, Scalar]:
    """What this machine says with a nvidia-smi of ours, and no other, on its path."""
    place.mkdir()
    if script:
        (place / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (place / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(place))
    return {name: value for name, value in this_machine().items() if name in ("sm", "gpu_name", "driver")}


def test_gpu_facts_are_those_that_all_gpus_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h100, l4 = "NVIDIA H100 80GB HBM3, 9.0, 580.82.07", "NVIDIA L4, 8.9, 580.82.07"
    nothing = dict.fromkeys(("sm", "gpu_name", "driver"))
    known = {"sm": "9.0", "gpu_name": "NVIDIA H100 80GB HBM3", "driver": "580.82.07"}
    assert gpus(monkeypatch, tmp_path / "one", f"echo '{h100}'") == known
    assert gpus(monkeypatch, tmp_path / "two", f"echo '{h100}'; echo '{h100}'") == known
    assert gpus(monkeypatch, tmp_path / "mixed", f"echo '{h100}'; echo '{l4}'") == {**nothing, "driver": "580.82.07"}
    assert gpus(monkeypatch, tmp_path / "old", "echo 'Tesla, [N/A], 440.1'") == {
        "sm": None, "gpu_name": "Tesla", "driver": "440.1"
    }  # fmt: skip
    assert gpus(monkeypatch, tmp_path / "broken", f"echo '{h100}'; exit 9") == nothing
    assert gpus(monkeypatch, tmp_path / "odd", "echo 'Field compute_cap is not valid'") == nothing
    assert gpus(monkeypatch, tmp_path / "none", "true") == nothing
    assert gpus(monkeypatch, tmp_path / "absent", "") == nothing


def test_versions_are_those_of_the_interpreter_and_cuda_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"tensorrt": "10.14.1.48", "tensorrt-llm": "1.2.1", "torch": "2.9.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine_manifest, "_CUDA_FILE", tmp_path / "version.json")
    nothing = dict.fromkeys(("sm", "gpu_name", "driver", "cuda"))
    assert this_machine() == {**nothing, "tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1", "torch": "2.9.1"}
    (tmp_path / "version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "13.0.2"}}')
    assert this_machine()["cuda"] == "13.0.2"
    installed["nvidia-cuda-runtime"] = "13.0.88"
    assert this_machine()["cuda"] == "13.0.88"


def test_the_sidecar_can_be_written_by_an_interpreter_with_nothing_installed(tmp_path: Path) -> None:
    made = engine(tmp_path, machine=None)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from parity import engine_manifest;"
        "engine_manifest.build_manifest(Path(sys.argv[2]), checkpoint=None, command=None, machine={'sm': '9.0'})"
    )
    root = str(Path(engine_manifest.__file__).parents[1])
    subprocess.run([sys.executable, "-I", "-S", "-c", code, root, str(made)], check=True, timeout=60)
    assert complaints(made, Wanted(sm="9.0")) == {}


def test_an_outcome_follows_the_worst_complaint() -> None:
    made = {kind: Complaint(kind=kind, field="x", sentence="x is 1; mend it") for kind in Severity}
    assert exit_outcome(made.values()) is Outcome.FAIL
    assert exit_outcome([made[Severity.NOTE], made[Severity.UNKNOWN]]) is Outcome.INCONCLUSIVE
    assert exit_outcome([made[Severity.NOTE], made[Severity.WARNING]]) is Outcome.PASS
