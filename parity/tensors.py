"""Safetensors files of a model directory: what they hold and where, and a copy of a model with fewer layers.

Reads headers and bytes only, so that no framework is needed and a model of any size is never loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parity.errors import ProvisionError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NOT_COPIED = ("config.json", "parity_model.json", "model.safetensors.index.json")
_COPY_BYTES = 1 << 24


def headers(directory: Path) -> Iterator[tuple[Path, dict[str, Any], int]]:
    """Each safetensors file, its table of tensors, and where their bytes begin."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        yield path, header, 8 + header_bytes


def first_layers(model: Path, layers: int, *, cache: Path) -> Path:
    """A copy of a model that ends after its first `layers` layers; made once below `cache`.

    Its answers mean nothing, but both engines must compute the same, in float32 and in a fraction of the memory.

    Raises:
        ProvisionError: If the model has no more layers than that, or no safetensors files.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    have = config.get("num_hidden_layers")
    if not isinstance(have, int) or have <= layers:
        raise ProvisionError(f"{str(model)!r} has {have} layers; a copy that ends after {layers} needs more than that")
    if not any(model.glob("*.safetensors")):
        raise ProvisionError(f"{str(model)!r} holds no safetensors files, which a copy with fewer layers is made from")
    target = cache / f"{model.name}-first-{layers}-layers"
    files = sorted([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in model.iterdir())
    stamp = {"of": str(model.resolve()), "files": files}
    stamp_file = target / "parity_first_layers.json"
    if stamp_file.is_file() and stamp_file.read_text("utf-8") == json.dumps(stamp):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".layers.", dir=cache) as scratch:
        copy = Path(scratch, target.name)
        copy.mkdir()
        for path in model.iterdir():
            if path.is_file() and path.name not in _NOT_COPIED and path.suffix != ".safetensors":
                shutil.copyfile(path, copy / path.name)
        _write(copy / "config.json", {**config, **_shortened(config, layers)})
        _copy_tensors(model, copy / "model.safetensors", layers)
        (copy / stamp_file.name).write_text(json.dumps(stamp), "utf-8")
        if target.exists():
            shutil.rmtree(target)  # made from files that have changed since
        copy.rename(target)
    return target


def _shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """What of a configuration counts or lists layers."""
    found: dict[str, Any] = {"num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        found["layer_types"] = config["layer_types"][:layers]
    if isinstance(config.get("max_window_layers"), int):
        found["max_window_layers"] = min(config["max_window_layers"], layers)
    return found


def _copy_tensors(model: Path, target: Path, layers: int) -> None:
    """All tensors but those of later layers, in one file."""
    kept: dict[str, Any] = {}
    pieces: list[tuple[Path, int, int]] = []
    offset = 0
    for path, header, begin in headers(model):
        for name, entry in header.items():
            number = _LAYER.search(name)
            if number is not None and int(number[1]) >= layers:
                continue
            start, stop = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [offset, offset + stop - start]}
            pieces.append((path, begin + start, stop - start))
            offset += stop - start
    text = json.dumps({"__metadata__": {"format": "pt"}, **kept}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for path, start, length in pieces:
            with path.open("rb") as source:
                source.seek(start)
                for done in range(0, length, _COPY_BYTES):
                    out.write(source.read(min(length - done, _COPY_BYTES)))
        out.flush()
        os.fsync(out.fileno())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
