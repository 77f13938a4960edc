"""Converts a GGUF file into a Hugging Face directory: its weights, configuration and tokenizer.

Refuses what it would have to guess. Knows nothing about references or the cache (`parity.models`). Needs neither torch
nor transformers: the caller's environment need not hold an engine, and transformers' own GGUF import loses the digit
split of this tokenizer.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from parity.errors import ProvisionError

if TYPE_CHECKING:
    import gguf
    import numpy.typing as npt

__all__ = ["CONVERTER_VERSION", "convert", "import_extra", "write_json"]

CONVERTER_VERSION = 1  # raise it when the written files change: cached models are then built again

_ATTENTION_Q = "self_attn.q_proj"
_ATTENTION_K = "self_attn.k_proj"
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": _ATTENTION_Q,
    "attn_k": _ATTENTION_K,
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Hugging Face's name of a token and GGUF's.
_MARKED_TOKENS = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3  # gguf.TokenType


def convert(source: Path, model: Path, report: Callable[[str], None]) -> str:
    """Write a Hugging Face directory with the values of a GGUF file; returns the note for the marker.

    Raises: ProvisionError if the file holds anything that this conversion would have to guess.
    """
    gguf = import_extra("gguf", extra="models")
    try:
        reader = gguf.GGUFReader(source)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ProvisionError(f"GGUF file {source.name!r} cannot be read: {error}") from error
    metadata = _Metadata(gguf=source.name, values=values)
    _check_supported(metadata)
    report(f"converting {source.name} ({len(reader.tensors)} tensors)")
    weights = _read_weights(metadata, reader.tensors)
    _write_weights(weights, model / "model.safetensors")
    _write_configs(metadata, model, weights)
    _write_tokenizer(metadata, model, rows=weights["model.embed_tokens.weight"].shape[0])
    types = ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    return (
        f"the values of {source.name} ({types}) rounded to bfloat16: where that file is quantized this is not the "
        "original model, and no score of it may be quoted as the original's"
    )


def import_extra(module: str, *, extra: str) -> ModuleType:
    """Import a package of one of parity's optional extras.

    Raises: ProvisionError if it is missing; the sentence says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ProvisionError(
            f"this model needs the Python package {module!r}, which cannot be imported ({error}); "
            f"run: pip install 'engine-parity[{extra}]'"
        ) from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write indented JSON that every user of the machine may read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.chmod(0o644)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metadata:
    """The key-value part of a GGUF file, with sentences for what is missing or of another type."""

    gguf: str
    values: Mapping[str, object]

    def refuse(self, what: str) -> ProvisionError:
        return ProvisionError(f"GGUF file {self.gguf!r} cannot be converted: {what}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int):
            raise self.refuse(f"metadata {key!r} is {value!r} instead of one integer")
        return value

    def index(self, key: str) -> int | None:
        return self.integer(key) if key in self.values else None

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, float):
            raise self.refuse(f"metadata {key!r} is {value!r} instead of one float")
        return float(str(np.float32(value)))  # GGUF stores float32: 1e-05, not 9.999999747378752e-06

    def sequence(self, key: str) -> list[object]:
        value = self.values.get(key)
        if not isinstance(value, list) or not value:
            raise self.refuse(f"metadata {key!r} is missing or empty")
        return value


def _check_supported(metadata: _Metadata) -> None:
    values = metadata.values
    for key, name, supported in (
        ("general.architecture", "architecture", "llama"),
        ("tokenizer.ggml.model", "tokenizer", "gpt2"),
        ("tokenizer.ggml.pre", "pre-tokenizer", "smollm"),
    ):
        if values.get(key) != supported:
            raise metadata.refuse(f"{name} {values.get(key)!r} is not supported, only {supported!r} is")
    if values.get("llama.rope.scaling.type", "none") != "none":
        raise metadata.refuse(f"rope scaling {values['llama.rope.scaling.type']!r} is not supported")
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if values.get(f"tokenizer.ggml.{key}", False):
            raise metadata.refuse(f"tokenizer option {key!r} is set, only an unset one is supported")
    head = _head_size(metadata)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := metadata.integer(f"llama.{key}", head)) != head:
            raise metadata.refuse(f"{key!r} is {size} with heads of {head}, only equal sizes are supported")


def _head_size(metadata: _Metadata) -> int:
    whole = metadata.integer("llama.embedding_length") // metadata.integer("llama.attention.head_count")
    return metadata.integer("llama.attention.key_length", whole)


def _read_weights(metadata: _Metadata, tensors: Iterable["gguf.ReaderTensor"]) -> dict[str, "npt.NDArray[np.uint16]"]:
    dequantize = import_extra("gguf.quants", extra="models").dequantize
    heads = metadata.integer("llama.attention.head_count")
    rope_heads = {_ATTENTION_Q: heads, _ATTENTION_K: metadata.integer("llama.attention.head_count_kv", heads)}
    names = dict(_TOP_NAMES)
    for i in range(metadata.integer("llama.block_count")):
        names |= {f"blk.{i}.{old}.weight": f"model.layers.{i}.{new}.weight" for old, new in _LAYER_NAMES.items()}
    weights = {}
    for tensor in tensors:
        if tensor.name not in names:
            raise metadata.refuse(f"tensor {tensor.name!r} has no place in the supported llama layout")
        name = names.pop(tensor.name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            for projection, count in rope_heads.items():
                if projection in name:
                    values = _unpermute(values, count)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise metadata.refuse(f"tensor {tensor.name!r} of type {kind} cannot be read: {error}") from error
        weights[name] = _bfloat16(values)
    if missing := sorted(names.keys() - {"output.weight"}):  # absent output.weight: tied to the embedding
        raise metadata.refuse(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    return weights


def _unpermute(rows: "npt.NDArray[np.float32]", heads: int) -> "npt.NDArray[np.float32]":
    """Undo llama.cpp's order of the rotary pairs: (0, n/2), (1, n/2+1) ... side by side within each head.

    Shapes: rows [heads * head, in].
    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py, inverted.
    """
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _bfloat16(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.uint16]":
    """Return the bit patterns of the nearest bfloat16 values, ties to even, as torch rounds."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN into infinity or zero; setting the quiet bit keeps it a NaN.
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x0040, rounded).astype("<u2")


def _write_weights(weights: Mapping[str, "npt.NDArray[np.uint16]"], path: Path) -> None:
    safetensors = import_extra("safetensors", extra="models")
    pointers = hasattr(safetensors, "TensorSpec")  # older versions take a dict that holds the bytes
    specs = {
        name: safetensors.TensorSpec(dtype="bfloat16", shape=w.shape, data_ptr=w.ctypes.data, data_len=w.nbytes)
        if pointers
        else {"dtype": "bfloat16", "shape": w.shape, "data": w.tobytes()}
        for name, w in weights.items()
    }
    try:
        safetensors.serialize_file(specs, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # a full disk too
        raise ProvisionError(f"model weights could not be written to {str(path)!r}: {error}") from error


def _write_configs(metadata: _Metadata, model: Path, weights: Mapping[str, "npt.NDArray[np.uint16]"]) -> None:
    """Write config.json in the spelling of Transformers 4.

    Transformers 5 reads it too, while 4 would silently take rope_theta 10000 from the spelling of 5.
    """
    heads = metadata.integer("llama.attention.head_count")
    ids = {f"{short}_token_id": metadata.index(f"tokenizer.ggml.{long}_token_id") for short, long in _MARKED_TOKENS}
    ids.pop("unk_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata.integer("llama.embedding_length"),
        "head_dim": _head_size(metadata),
        "intermediate_size": metadata.integer("llama.feed_forward_length"),
        "num_hidden_layers": metadata.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("llama.attention.head_count_kv", heads),
        "max_position_embeddings": metadata.integer("llama.context_length"),
        "rms_norm_eps": metadata.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": "bfloat16",
        **ids,
        # Fixed by the architecture: GGUF's llama has no biases and one activation.
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    write_json(model / "config.json", config)
    # No sampling defaults: engines would apply them to requests that name none.
    write_json(model / "generation_config.json", {k: v for k, v in ids.items() if v is not None})


def _write_tokenizer(metadata: _Metadata, model: Path, *, rows: int) -> None:
    tokenizers = import_extra("tokenizers", extra="models")
    tokens = [str(token) for token in metadata.sequence("tokenizer.ggml.tokens")]
    kinds = metadata.sequence("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(tokens) != rows:
        raise metadata.refuse(f"it names {len(tokens)} tokens and embeds {rows}")
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens) or set(kinds) - {_NORMAL_TOKEN, _CONTROL_TOKEN}:
        raise metadata.refuse("its tokens are not distinct, or some are neither normal nor control tokens")
    merges = [tuple(str(merge).split(" ")) for merge in metadata.sequence("tokenizer.ggml.merges")]
    try:
        bpe = tokenizers.models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
    except Exception as error:  # tokenizers raises the bare class
        raise metadata.refuse(f"its tokens and merges do not fit together: {error}") from error
    tokenizer = tokenizers.Tokenizer(bpe)
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(
        [
            split.Digits(individual_digits=True),  # what "smollm" means: digits before ByteLevel's own split
            split.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = {i: token for i, token in enumerate(tokens) if kinds[i] == _CONTROL_TOKEN}
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in control.values()])
    tokenizer.save(str(model / "tokenizer.json"))
    write_json(model / "tokenizer_config.json", _tokenizer_config(metadata, tokens, control))


def _tokenizer_config(metadata: _Metadata, tokens: list[str], control: Mapping[int, str]) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    marked = {short: metadata.index(f"tokenizer.ggml.{long}_token_id") for short, long in _MARKED_TOKENS}
    if outside := [i for i in marked.values() if i is not None and not 0 <= i < len(tokens)]:
        raise metadata.refuse(f"special token id {outside[0]} is outside its vocabulary of {len(tokens)}")
    template = metadata.values.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.integer("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{short}_token": tokens[i] for short, i in marked.items() if i is not None},
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in control.items()},
        **({} if template is None else {"chat_template": template}),
    }
