"""Quantizes a model with llm-compressor and writes a complete Hugging Face directory.

    quantize.py SCHEME SOURCE_MODEL_DIR OUT_DIR

Runs in the environment of suites/environments/llm-compressor-0.14.0.1.txt and needs no network; `build.py` beside it
provides environment and model, and runs this for every scheme. Only `main` touches torch, so that the table of schemes
can be read anywhere.

The linear layers are quantized, the head and the embeddings are not. Tokenizer, chat template and generation settings
are the source's own files, byte for byte, so that nothing but the weights differs from it. The same call writes the
same bytes again on the same kind of processor: one seed, one thread, committed calibration text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

MARKER = "parity_quantized.json"
CALIBRATION = Path(__file__).with_name("calibration.jsonl")

_RECIPE = 1  # raise it when a scheme gives other weights although its entry in the table did not change
_TOOLS = ("llmcompressor", "compressed-tensors", "torch", "transformers")
# Sums over threads round by how many there are; and two on two cores take ten times as long when another job runs.
_THREADS = 1
_SEED = 0
_LONGEST = 512  # tokens of a calibration text
# AWQ runs every layer once more for each step of its grid: all texts and its usual 20 steps take eight times as long.
_AWQ_EVERY = 4  # calibration texts, the first and then every fourth
_AWQ_STEPS = 10
_OF_THE_SOURCE_ONLY = ("config.json", "model.safetensors.index.json", "parity_model.json", MARKER)


class UsageError(Exception):
    """What was asked for cannot be done; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the linear layers are stored, and by which method their numbers are found.

    method: "nearest" rounds each weight by itself; "gptq" and "awq" read the calibration text.
    kind, bits: of a weight.
    columns: so many weights of a row share a scale; None: all of a row.
    zero_point: whether a scale's range is shifted to its weights, or symmetric about 0.
    one_scale: every row gets the whole matrix's largest scale.
    activations: whether a layer's inputs are quantized too: same kind, 8 bits, one scale a token, at run time.
    simulated: the quantized weights are multiplied out and stored in bfloat16, so that no quantized kernel runs.
    """

    method: Literal["nearest", "gptq", "awq"] = "nearest"
    kind: Literal["int", "float"] = "int"
    bits: int
    columns: int | None = None
    zero_point: bool = False
    one_scale: bool = False
    activations: bool = False
    simulated: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether the calibration text is read."""
        return self.method != "nearest"

    def weights(self) -> dict[str, Any]:
        """The arguments of compressed-tensors' `QuantizationArgs` for the weights."""
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": not self.zero_point,
            "strategy": "channel" if self.columns is None else "group",
            "group_size": self.columns,
        }

    def inputs(self) -> dict[str, Any] | None:
        """The same for a layer's inputs, or None where they stay as they are."""
        if not self.activations:
            return None
        return {"num_bits": 8, "type": self.kind, "symmetric": True, "strategy": "token", "dynamic": True}


_STORED = {
    "w8a16": Scheme(bits=8),
    "w8a8": Scheme(bits=8, activations=True),
    "int4-gptq": Scheme(method="gptq", bits=4, columns=64),
    "int4-awq": Scheme(method="awq", bits=4, columns=64, zero_point=True),
    "int4-rtn": Scheme(bits=4, columns=64),
    "int4-broken": Scheme(bits=4, one_scale=True),
    "fp8": Scheme(kind="float", bits=8, activations=True),
}
SCHEMES: Mapping[str, Scheme] = {
    **_STORED,
    **{f"{name}-simulated": replace(s, simulated=True) for name, s in _STORED.items() if not s.activations},
}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UsageError: There is none.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if name.removesuffix("-simulated") in SCHEMES:
        raise UsageError(
            f"scheme {name!r} cannot be simulated: it rounds activations at run time, and stored weights do not; "
            f"take {name.removesuffix('-simulated')!r}"
        )
    near = difflib.get_close_matches(name, SCHEMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(SCHEMES)}"
    raise UsageError(f"there is no scheme {name!r}; {hint}")


def calibration_texts(path: Path = CALIBRATION) -> tuple[dict[str, Any], ...]:
    """The calibration texts, in order: each has `messages`, for the model's chat template, or `text`."""
    return tuple(json.loads(line) for line in path.read_text("utf-8").splitlines())


def provenance(name: str, source: Path, versions: Mapping[str, str]) -> dict[str, Any]:
    """What a quantized directory depends on: written into it, and compared before it is built again.

    versions: of the packages, by lower-case name.
    """
    scheme = scheme_of(name)
    return {
        "scheme": name,
        **asdict(scheme),
        "recipe": _RECIPE,
        "made_by": {tool: versions[tool] for tool in _TOOLS},
        "source_sha256": _sha256(source, sorted(p for p in source.iterdir() if p.is_file() and p.name != MARKER)),
        "calibration_sha256": _sha256(CALIBRATION.parent, [CALIBRATION]) if scheme.calibrated else None,
    }


def check_source(source: Path, scheme: Scheme) -> dict[str, Any]:
    """The source's configuration.

    Raises:
        UsageError: It is no unquantized model in safetensors files whose rows the scheme can divide.
    """
    path = source / "config.json"
    if not path.is_file():
        raise UsageError(f"{str(source)!r} holds no config.json; give the directory of a Hugging Face model")
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if "quantization_config" in config:
        raise UsageError(f"{str(source)!r} is quantized already; give the unquantized model that it was made from")
    if not any(source.glob("*.safetensors")):
        raise UsageError(f"{str(source)!r} holds no .safetensors file; give a model with its weights in that format")
    for key in ("hidden_size", "intermediate_size"):
        if scheme.columns is not None and isinstance(config.get(key), int) and config[key] % scheme.columns:
            raise UsageError(
                f"{str(source)!r} has {key} {config[key]}, which groups of {scheme.columns} weights do not divide; "
                "change `columns` in the table of schemes to a number that does"
            )
    return config


def quantize(name: str, source: Path, out: Path) -> None:
    """Write the model `source`, quantized by the scheme `name`, to `out`, which appears only when it is complete.

    Raises:
        UsageError: The scheme, the source or the place is wrong, or this interpreter has no llm-compressor.
    """
    scheme = scheme_of(name)
    config = check_source(source, scheme)
    if out.exists():
        raise UsageError(f"{str(out)!r} exists already; remove it or name another directory")
    # Read when torch is imported.
    os.environ.update(OMP_NUM_THREADS=str(_THREADS), MKL_NUM_THREADS=str(_THREADS), HF_HUB_OFFLINE="1",
                      TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")  # fmt: skip
    try:
        import llmcompressor  # type: ignore[import-not-found]  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(
            f"{sys.executable} cannot import llmcompressor ({error}); run it with the environment of "
            "suites/environments/llm-compressor-0.14.0.1.txt, as build.py does"
        ) from error
    from importlib import metadata  # noqa: PLC0415

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        whole = Path(scratch, "whole")
        whole.mkdir()
        stored = _compressed(scheme, source, Path(scratch, "compressed"), whole / "model.safetensors")
        for path in source.iterdir():
            if path.is_file() and path.name not in _OF_THE_SOURCE_ONLY and path.suffix != ".safetensors":
                shutil.copyfile(path, whole / path.name)
        _write(whole / "config.json", config if stored is None else {**config, "quantization_config": stored})
        _write(whole / MARKER, provenance(name, source, {tool: metadata.version(tool) for tool in _TOOLS}))
        for path in whole.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which an engine under another user could not read
        whole.rename(out)


def _compressed(scheme: Scheme, source: Path, scratch: Path, weights: Path) -> dict[str, Any] | None:
    """Quantize; write the tensors to `weights`; the quantization_config that says how they are stored, or None."""
    import torch  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from llmcompressor.pipelines.cache import IntermediatesCache  # type: ignore[import-not-found]  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    torch.set_num_threads(_THREADS)
    torch.manual_seed(_SEED)
    torch.use_deterministic_algorithms(mode=True)
    # AWQ of llm-compressor 0.14.0.1 pins memory for a GPU also where there is none, which fails; no number needs it.
    IntermediatesCache.pin_memory = lambda *_, **__: None
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if scheme.calibrated:
        texts = calibration_texts()[:: _AWQ_EVERY if scheme.method == "awq" else 1]
        batches = [_token_ids(tokenizer, text) for text in texts]
        # Lists, one text a batch: nothing is padded, shuffled, or cached in the user's home.
        data = torch.utils.data.DataLoader(batches, batch_size=None)
        oneshot(model=model, tokenizer=tokenizer, recipe=_recipe(scheme), dataset=data, pipeline="sequential",
                num_calibration_samples=len(batches))  # fmt: skip
    else:
        oneshot(model=model, tokenizer=tokenizer, recipe=_recipe(scheme))
    layers = [m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    if scheme.one_scale:
        for layer in layers:
            layer.weight_scale.data.fill_(layer.weight_scale.max())
    if scheme.simulated:
        _multiplied_out(model, layers, weights)
        return None
    model.save_pretrained(scratch, save_compressed=True)
    (scratch / "model.safetensors").rename(weights)
    stored: dict[str, Any] = json.loads((scratch / "config.json").read_text("utf-8"))["quantization_config"]
    return stored


def _recipe(scheme: Scheme) -> list[Any]:
    from compressed_tensors.quantization import (  # type: ignore[import-not-found]  # noqa: PLC0415
        QuantizationArgs,
        QuantizationScheme,
    )
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import (  # type: ignore[import-not-found]  # noqa: PLC0415
        QuantizationModifier,
    )
    from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]  # noqa: PLC0415

    inputs = scheme.inputs()
    group = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**scheme.weights()),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    settings = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    if scheme.method == "gptq":
        return [GPTQModifier(**settings)]
    return [*([AWQModifier(n_grid=_AWQ_STEPS)] if scheme.method == "awq" else []), QuantizationModifier(**settings)]


def _token_ids(tokenizer: Any, text: Mapping[str, Any]) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    # The template writes its own special tokens; a plain text begins as the tokenizer begins one.
    chat = "messages" in text
    written = tokenizer.apply_chat_template(text["messages"], tokenize=False) if chat else text["text"]
    ids = tokenizer(written, add_special_tokens=not chat)["input_ids"][:_LONGEST]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}


def _multiplied_out(model: Any, layers: Sequence[Any], weights: Path) -> None:
    """Write the tensors under the source's names, each quantized weight as scale times whole number."""
    from compressed_tensors.quantization import fake_quantize  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    for layer in layers:
        zero_point = getattr(layer, "weight_zero_point", None)
        layer.weight.data = fake_quantize(
            layer.weight.data, layer.weight_scale, zero_point, layer.quantization_scheme.weights
        )
    # named_parameters gives a head that is tied to the embeddings once, as the source's file holds it.
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.named_parameters()
        if not name.endswith(("weight_scale", "weight_zero_point"))
    }
    save_file(tensors, weights, metadata={"format": "pt"})


def _sha256(folder: Path, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main(arguments: Sequence[str]) -> int:
    """The command; 2 and one sentence for a wrong use."""
    if len(arguments) != 3:
        sys.stderr.write("usage: quantize.py SCHEME SOURCE_MODEL_DIR OUT_DIR\n")
        return 2
    try:
        quantize(arguments[0], Path(arguments[1]), Path(arguments[2]))
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
