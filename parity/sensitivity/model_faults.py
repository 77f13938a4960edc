"""Seeded faults in a copy of a Hugging Face model directory: weights, configuration, tokenizer, chat template.

Files that stay are hard links (symbolic where that is impossible), files that change are real copies: the source is
never touched. `parity_model.json` is left out, because it would vouch for contents that are no longer there. A fault
that would change nothing is refused, so that a drill never passes for want of a fault.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.tensors import headers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Weights = NDArray[np.float32]

_MARKER = "parity_model.json"
_ITEM_TYPES = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}  # zero has the same bits in all of them
_END_OF_TURN_NEWLINE = re.compile(r"""(<\|im_end\|>(?:['"]\s*\+\s*['"])?)(?:\n|\\n)""")
_SYSTEM_PROMPT = re.compile(r"""(<\|im_start\|>system(?:\n|\\n))[^<'"{]+""")
_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.\w+_proj\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One seeded fault.

    computes_otherwise: in float32 the model computes another function; false for what only rounds differently or is
        outside the forward pass.
    """

    name: str
    plant: Callable[[Path, Path], Path]
    computes_otherwise: bool = True


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
    for path, header, begin in headers(directory):
        if name in header:
            return path, header[name], begin + header[name]["data_offsets"][0]
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


def config_value(source: Path, target: Path, *, key: str, value: float) -> Path:
    """Another number under one key of config.json."""
    config = _read_json(source / "config.json")
    if key not in config or config[key] == value:
        raise ValueError(f"config.json in {source} has no {key} other than {value}")
    _copy(source, target, changed=("config.json",))
    _write_json(target / "config.json", {**config, key: value})
    return target


def rope_theta_times(source: Path, target: Path, *, factor: float) -> Path:
    """Rotary frequencies a little off."""
    config = _read_json(source / "config.json")
    holder = config if "rope_theta" in config else config["rope_parameters"]
    return rope_theta(source, target, holder["rope_theta"] * factor)


def edited(source: Path, target: Path, *, pattern: str, edit: Callable[[Weights], Weights]) -> Path:
    """The weights whose names match `pattern`, edited in float32 and rounded back to their own type."""
    names = [n for n in _tensor_names(source) if re.fullmatch(pattern, n)]
    if not names:
        raise ValueError(f"no tensor in {source} matches {pattern}")
    files = {_find_tensor(source, n)[0].name for n in names}
    _copy(source, target, changed=tuple(files))
    changed = False
    for name in names:
        with _opened(target, name) as raw:
            before = raw.copy()
            after = edit(_to_float32(before, _dtype(target, name)))
            raw[:] = _from_float32(after, _dtype(target, name))
            changed = changed or bool((raw != before).any())
    if not changed:
        shutil.rmtree(target)
        raise ValueError(f"the fault changes none of the {len(names)} tensors that match {pattern}")
    return target


def layers_swapped(source: Path, target: Path, *, layer: int) -> Path:
    """A layer and its successor in the other order."""
    names = [n for n in _tensor_names(source) if n.startswith(f"model.layers.{layer}.")]
    _copy(source, target, changed=tuple({_find_tensor(source, n)[0].name for n in _tensor_names(source)}))
    for name in names:
        other = name.replace(f".{layer}.", f".{layer + 1}.", 1)
        with _opened(target, name) as ours, _opened(target, other) as theirs:
            kept = ours.copy()
            ours[:] = theirs
            theirs[:] = kept
    return target


def heads_crossed(source: Path, target: Path, *, layer: int) -> Path:
    """Two query heads attend to each other's key-value group: their queries and outputs trade places."""
    config = _read_json(source / "config.json")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if groups < 2:
        raise ValueError(f"{source} has one key-value head; there is no wrong group")
    size = config.get("head_dim") or config["hidden_size"] // heads
    one, two = slice(0, size), slice((heads // groups) * size, (heads // groups + 1) * size)
    prefix = f"model.layers.{layer}.self_attn"
    _copy(source, target, changed=tuple({_find_tensor(source, f"{prefix}.{n}_proj.weight")[0].name for n in "qo"}))
    with _opened(target, f"{prefix}.q_proj.weight") as q, _opened(target, f"{prefix}.o_proj.weight") as o:
        q[one], q[two] = q[two].copy(), q[one].copy()
        o[:, one], o[:, two] = o[:, two].copy(), o[:, one].copy()
    return target


def merge_removed(source: Path, target: Path, *, index: int = 8) -> Path:
    """One merge of the tokenizer is missing, so a common word splits otherwise."""
    tokenizer = _read_json(source / "tokenizer.json")
    if tokenizer["model"].get("ignore_merges") or len(tokenizer["model"].get("merges", ())) <= index:
        raise ValueError(f"the tokenizer in {source} has no merge {index} that decides anything")
    del tokenizer["model"]["merges"][index]
    _copy(source, target, changed=("tokenizer.json",))
    _write_json(target / "tokenizer.json", tokenizer)
    return target


def zero(weights: Weights) -> Weights:
    """Nothing is left."""
    return np.zeros_like(weights)


def row_zeroed(weights: Weights, row: int = 7) -> Weights:
    """One output never fires."""
    weights[row] = 0
    return weights


def row_flipped(weights: Weights, row: int = 7) -> Weights:
    """One output has the wrong sign."""
    weights[row] *= -1
    return weights


def times(weights: Weights, *, factor: float) -> Weights:
    """A wrong scale."""
    return np.asarray(weights * np.float32(factor), np.float32)


def integers(weights: Weights, *, bits: int, group: int | None, per_channel: bool) -> Weights:
    """Quantized to signed integers and back; symmetric, one scale a tensor, an output channel or a group."""
    top = 2 ** (bits - 1) - 1
    shape = weights.shape
    blocks = weights.reshape(shape[0], -1, group) if group else weights.reshape(shape[0], 1, -1)
    largest = np.abs(blocks).max(axis=2, keepdims=True) if group or per_channel else np.abs(weights).max()
    scale = np.maximum(largest / top, 1e-12)
    return np.asarray(np.clip(np.round(blocks / scale), -top, top) * scale, np.float32).reshape(shape)


def float8(weights: Weights) -> Weights:
    """Rounded to e4m3 with one scale a tensor: 3 bits of mantissa, smallest normal 2^-6, largest 448."""
    scale = np.abs(weights).max() / 448.0
    scaled = weights / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-9))), -6)
    step = 2.0 ** (exponent - 3)
    return np.asarray(np.round(scaled / step) * step * scale, np.float32)


def low_rank(weights: Weights, *, norm: float = 0.01, seed: int = 7) -> Weights:
    """A rank-1 adapter merged in, of this norm relative to the weights'."""
    draw = np.random.default_rng(seed)
    change = np.outer(draw.normal(size=weights.shape[0]), draw.normal(size=weights.shape[1])).astype(np.float32)
    size = norm * np.linalg.norm(weights) / np.linalg.norm(change)
    return np.asarray(weights + change * np.float32(size), np.float32)


_QUANTIZED: tuple[tuple[str, Callable[[Weights], Weights]], ...] = (
    ("int8 per tensor", partial(integers, bits=8, group=None, per_channel=False)),
    ("int8 per channel", partial(integers, bits=8, group=None, per_channel=True)),
    ("int4 group 64", partial(integers, bits=4, group=64, per_channel=True)),
    ("fp8 weights", float8),
)


def registry(layer: int) -> tuple[Fault, ...]:
    """Every fault, those of one layer in `layer`; mildest of a kind first."""
    at = rf"model\.layers\.{layer}\."
    out = r"(?:self_attn\.o_proj|mlp\.down_proj)\.weight"
    mine = at + r"(?:self_attn|mlp)\.\w+_proj\.weight"

    def weights(name: str, pattern: str, edit: Callable[[Weights], Weights]) -> Fault:
        return Fault(name=name, plant=partial(edited, pattern=pattern, edit=edit))

    return (
        *(Fault(name=f"rope_theta x{f:g}", plant=partial(rope_theta_times, factor=f)) for f in (1.01, 1.05, 1.2)),
        Fault(name="rope_theta 1e4", plant=partial(rope_theta, value=1e4)),
        Fault(name="rms_norm_eps 1e-6", plant=partial(config_value, key="rms_norm_eps", value=1e-6)),
        Fault(name="rms_norm_eps 1e-3", plant=partial(config_value, key="rms_norm_eps", value=1e-3)),
        weights("norm weight +2 %", at + r"input_layernorm\.weight", partial(times, factor=1.02)),
        weights("attention scale +2 %", r"model\.layers\.\d+\.self_attn\.q_proj\.weight", partial(times, factor=1.02)),
        weights("attention scale +10 %", r"model\.layers\.\d+\.self_attn\.q_proj\.weight", partial(times, factor=1.1)),
        weights("one row zeroed", at + r"mlp\.up_proj\.weight", row_zeroed),
        weights("one row sign-flipped", at + r"mlp\.up_proj\.weight", row_flipped),
        weights("rank-1 LoRA merged", at + r"self_attn\.q_proj\.weight", low_rank),
        Fault(name="one head zeroed", plant=partial(head_zeroed, layer=layer)),
        Fault(name="heads on the wrong KV group", plant=partial(heads_crossed, layer=layer)),
        weights("one layer skipped", at + out, zero),
        Fault(name="two layers swapped", plant=partial(layers_swapped, layer=layer)),
        *(weights(f"{name}, one layer", mine, edit) for name, edit in _QUANTIZED),
        *(weights(f"{name}, all layers", _LINEAR.pattern, edit) for name, edit in _QUANTIZED),
        Fault(name="template newline dropped", plant=chat_template_newline_missing, computes_otherwise=False),
        Fault(name="system prompt changed", plant=system_prompt_changed, computes_otherwise=False),
        Fault(name="BOS doubled by the template", plant=bos_doubled, computes_otherwise=False),
        Fault(name="tokenizer merge removed", plant=merge_removed, computes_otherwise=False),
    )


def _tensor_names(directory: Path) -> list[str]:
    return [name for _, header, _ in headers(directory) for name in header]


def _dtype(directory: Path, name: str) -> str:
    return str(_find_tensor(directory, name)[1]["dtype"])


@contextmanager
def _opened(directory: Path, name: str) -> Iterator[NDArray[Any]]:
    """One tensor's bits in place, as unsigned integers of its width."""
    path, entry, offset = _find_tensor(directory, name)
    kind = np.dtype(_ITEM_TYPES[entry["dtype"]])
    bits = np.memmap(path, dtype=kind, mode="r+", offset=offset, shape=tuple(entry["shape"]))
    yield bits
    bits.flush()


def _to_float32(bits: NDArray[Any], dtype: str) -> Weights:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _from_float32(values: Weights, dtype: str) -> NDArray[Any]:
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        wide = values.view(np.uint32)
        # Round half to even, as every framework does.
        return np.asarray((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16, np.uint16)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32)
