"""Who answered: what must match, what is shown, and how healthy the machine was.

Filled in by the worker inside the engine's interpreter, because only there are the true versions visible. Standard
library only. Names are flat and dotted ("model.weights_sha256"), values are scalars, so that two fingerprints differ
in nameable facts and never in structure.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Scalar: TypeAlias = "str | int | float | bool | None"

_ENV_PREFIXES = ("VLLM_", "TRTLLM_", "TLLM_", "CUDA_", "NCCL_", "OMP_", "MKL_", "KMP_", "TORCH_", "HF_HUB_OFFLINE")
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "AUTH", "CREDENTIAL")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".engine", ".npz")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Facts about one engine on one machine.

    identity: what an answer depends on by design (model and tokenizer contents, dtype, quantization).
    context: what may differ and is shown (versions, hardware, options, environment variables).
    health: the state of the machine while it answered (load, free memory).
    packages: every installed distribution and its version.
    """

    identity: Mapping[str, Scalar]
    context: Mapping[str, Scalar]
    health: Mapping[str, Scalar]
    packages: Mapping[str, str]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_json` wrote."""
        return cls(**{name: dict(data[name]) for name in ("identity", "context", "health", "packages")})

    def to_json(self) -> dict[str, dict[str, Scalar]]:
        """Plain sorted dictionaries."""
        return {
            name: dict(sorted(getattr(self, name).items())) for name in ("identity", "context", "health", "packages")
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One named fact on which two fingerprints differ; None where a side lacks it."""

    name: str
    reference: Scalar
    candidate: Scalar


def differences(reference: Mapping[str, Scalar], candidate: Mapping[str, Scalar]) -> tuple[Difference, ...]:
    """The facts that differ, by name."""
    names = sorted(set(reference) | set(candidate))
    return tuple(
        Difference(name=n, reference=reference.get(n), candidate=candidate.get(n))
        for n in names
        if reference.get(n) != candidate.get(n)
    )


def model_identity(directory: Path) -> dict[str, Scalar]:
    """Content hashes of a model directory, and its configuration as flat facts.

    Weights, tokenizer and chat template are hashed apart, so that a difference says which of them changed.
    """
    facts: dict[str, Scalar] = {
        "model.weights_sha256": _sha256_of_files(
            sorted(p for p in directory.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
        ),
        "tokenizer.sha256": _sha256_of_files([directory / name for name in _TOKENIZER_FILES]),
        "chat_template.sha256": _chat_template_sha256(directory),
    }
    config = _read_json(directory / "config.json")
    facts.update({f"model.config.{name}": value for name, value in _flatten(config)})
    return facts


def machine() -> dict[str, Scalar]:
    """Processor, memory, GPUs and driver of this machine."""
    facts: dict[str, Scalar] = {
        "host.os": platform.platform(),
        "host.cpu": _cpu_model(),
        "host.cores": len(os.sched_getaffinity(0)),
        "host.memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }
    facts.update(_gpus())
    return facts


def environment_variables() -> dict[str, Scalar]:
    """The variables that change what an engine computes. Names that sound like secrets are left out."""
    return {
        f"env.{name}": value
        for name, value in os.environ.items()
        if name.startswith(_ENV_PREFIXES) and not any(word in name for word in _SECRET_WORDS)
    }


def health() -> dict[str, Scalar]:
    """How busy the machine is now."""
    one_minute, _, _ = os.getloadavg()
    return {
        "load_average_1min": round(one_minute, 2),
        "free_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
    }


def packages() -> dict[str, str]:
    """Every distribution installed in this interpreter."""
    import importlib.metadata  # noqa: PLC0415  a third of the package's import time, and only the worker asks

    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found[name.lower().replace("_", "-")] = distribution.version
    return found


def _sha256_of_files(paths: Iterable[Path]) -> str | None:
    digest, any_file = hashlib.sha256(), False
    for path in paths:
        if not path.is_file():
            continue
        any_file = True
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest() if any_file else None


def _chat_template_sha256(directory: Path) -> str | None:
    separate = directory / "chat_template.jinja"
    template = (
        separate.read_text("utf-8")
        if separate.is_file()
        else _read_json(directory / "tokenizer_config.json").get("chat_template")
    )
    if template is None:
        return None
    return hashlib.sha256(json.dumps(template).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text("utf-8"))
    return data if isinstance(data, dict) else {}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Scalar]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{name}.")
        elif isinstance(item, list):
            yield f"{prefix}{name}", json.dumps(item)
        else:
            yield f"{prefix}{name}", item


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> dict[str, Scalar]:
    import subprocess  # noqa: PLC0415  as above

    query = "name,uuid,driver_version,memory.total,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],  # noqa: S607  found on PATH
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    facts: dict[str, Scalar] = {}
    for index, line in enumerate(done.stdout.strip().splitlines()):
        for name, value in zip(query.split(","), line.split(", "), strict=False):
            facts[f"gpu.{index}.{name}"] = value
    return facts
