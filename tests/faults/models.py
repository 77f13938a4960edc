"""Copies a Hugging Face model directory and plants one fault into the copy.

Files that stay are hard links (symbolic where that is impossible), files that change are real copies: the source is
never touched. `parity_model.json` is left out, because it would vouch for contents that are no longer there. A fault
that would change nothing is refused, so that a drill never passes for want of a fault.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_MARKER = "parity_model.json"
_ITEM_TYPES = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}  # zero has the same bits in all of them
_END_OF_TURN_NEWLINE = re.compile(r"""(<\|im_end\|>(?:['"]\s*\+\s*['"])?)(?:\n|\\n)""")
_SYSTEM_PROMPT = re.compile(r"""(<\|im_start\|>system(?:\n|\\n))[^<'"{]+""")


def rope_theta(source: Path, target: Path, value: float = 10000.0) -> Path:
    """Other rotary frequencies: harmless for short prompts, gibberish for long ones."""
    config = _read_json(source / "config.json")
    holders = [h for h in (config, config.get("rope_parameters")) if isinstance(h, dict) and "rope_theta" in h]
    if not holders or all(h["rope_theta"] == value for h in holders):
        raise ValueError(f"config.json in {source} has no rope_theta other than {value}")
    for holder in holders:  # Transformers 4 and 5 spell it in different places
        holder["rope_theta"] = value
    _copy(source, target, changed=("config.json",))
    _write_json(target / "config.json", config)
    return target


def chat_template_newline_missing(source: Path, target: Path) -> Path:
    """No newline after the end of a turn."""
    return _with_template(source, target, lambda template: _END_OF_TURN_NEWLINE.sub(r"\1", template))


def system_prompt_changed(source: Path, target: Path, prompt: str = "You are a terse assistant.") -> Path:
    """Another default system prompt inside the chat template."""
    return _with_template(source, target, lambda template: _SYSTEM_PROMPT.sub(lambda m: m[1] + prompt, template))


def bos_doubled(source: Path, target: Path) -> Path:
    """The chat template writes BOS once more in front."""
    if not _read_json(source / "tokenizer_config.json").get("bos_token"):
        raise ValueError(f"tokenizer_config.json in {source} has no bos_token to double")
    return _with_template(source, target, lambda template: "{{ bos_token }}" + template)


def head_zeroed(source: Path, target: Path, layer: int = 15, head: int = 3) -> Path:
    """One attention head contributes nothing: its columns of the output projection are zero."""
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    config = _read_json(source / "config.json")
    heads = config["num_attention_heads"]
    if not 0 <= head < heads:
        raise ValueError(f"head {head} is not one of {heads}")
    file, entry, offset = _find_tensor(source, name)
    rows, columns = entry["shape"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    if columns != heads * size:
        raise ValueError(f"{name} has {columns} columns instead of {heads} heads of {size}")
    item_type = np.dtype(_ITEM_TYPES[entry["dtype"]])
    _copy(source, target, changed=(file.name,))
    weights = np.memmap(target / file.name, dtype=item_type, mode="r+", offset=offset, shape=(rows, columns))
    weights[:, head * size : (head + 1) * size] = 0
    weights.flush()
    return target


def _find_tensor(directory: Path, name: str) -> tuple[Path, dict[str, Any], int]:
    """The safetensors file that holds a tensor, its header entry, and where its bytes begin in the file."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        if name in header:
            return path, header[name], 8 + header_bytes + header[name]["data_offsets"][0]
    raise ValueError(f"no safetensors file in {directory} holds {name}")


def _with_template(source: Path, target: Path, edit: Callable[[str], str]) -> Path:
    """A separate file wins over tokenizer_config.json, as in Transformers."""
    separate = source / "chat_template.jinja"
    config = _read_json(source / "tokenizer_config.json")
    template: str = separate.read_text("utf-8") if separate.is_file() else config.get("chat_template", "")
    edited = edit(template)
    if edited == template:
        raise ValueError(f"the chat template in {source} has no place for this fault: {template[:80]!r}")
    if separate.is_file():
        _copy(source, target, changed=(separate.name,))
        (target / separate.name).write_text(edited, "utf-8")
    else:
        _copy(source, target, changed=("tokenizer_config.json",))
        _write_json(target / "tokenizer_config.json", {**config, "chat_template": edited})
    return target


def _copy(source: Path, target: Path, *, changed: tuple[str, ...]) -> None:
    target.mkdir(parents=True)  # an existing target may hold another fault
    for path in sorted(source.rglob("*")):
        if path.is_dir() or path.name == _MARKER:
            continue
        name = path.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if str(name) in changed:
            shutil.copyfile(path, target / name)
        else:
            _link(path.resolve(), target / name)


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except OSError:  # another file system
        link.symlink_to(path)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
