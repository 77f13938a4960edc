"""A copy of a model that ends after its first layers: the rest of the bytes, and nothing of the later layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity import tensors
from parity.errors import ProvisionError


def save(directory: Path, *, layers: int = 3) -> Path:
    directory.mkdir(parents=True)
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(layers))]
    header, blobs, offset = {}, [], 0
    for number, name in enumerate(names):
        raw = np.full((2, 3), number, np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [offset, offset + len(raw)]}
        blobs.append(raw)
        offset += len(raw)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (directory / "model-00001-of-00001.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(blobs)
    )
    config = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers, "rope_theta": 1e4}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"a": 1}')
    return directory


def held(directory: Path) -> dict[str, float]:
    found = {}
    for path, header, begin in tensors.headers(directory):
        data = path.read_bytes()[begin:]
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            values = np.frombuffer(data[start:stop], np.float32)
            assert len(set(values.tolist())) == 1
            found[name] = float(values[0])
    return found


def test_the_copy_holds_the_first_layers_and_everything_outside_of_layers(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    copy = tensors.first_layers(model, 2, cache=tmp_path / "cache")
    assert held(copy) == {
        "model.embed_tokens.weight": 0.0,
        "model.layers.0.mlp.up_proj.weight": 1.0,
        "model.layers.1.mlp.up_proj.weight": 2.0,
    }
    config = json.loads((copy / "config.json").read_text())
    assert config == {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "rope_theta": 1e4}
    assert (copy / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (copy / "model.safetensors.index.json").exists()
    assert len(held(model)) == 4


def test_it_is_made_once_and_anew_when_the_model_changes(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    copy = tensors.first_layers(model, 1, cache=tmp_path / "cache")
    made = (copy / "model.safetensors").stat().st_mtime_ns
    assert tensors.first_layers(model, 1, cache=tmp_path / "cache") == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == made
    (model / "tokenizer.json").write_text('{"a": 22}')
    tensors.first_layers(model, 1, cache=tmp_path / "cache")
    assert (copy / "tokenizer.json").read_text() == '{"a": 22}'
    assert not list((tmp_path / "cache").glob(".layers.*"))


def test_what_cannot_be_shortened_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    with pytest.raises(ProvisionError, match=r"has 3 layers; a copy that ends after 3 needs more"):
        tensors.first_layers(model, 3, cache=tmp_path / "cache")
    (model / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ProvisionError, match="holds no safetensors files"):
        tensors.first_layers(model, 1, cache=tmp_path / "cache")
