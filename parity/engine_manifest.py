"""The sidecar of a TensorRT-LLM engine directory: what its own files do not say of where and from what it was built.

    parity_engine.json   schema, created_at, machine, command, checkpoint, and the size and hash of every other file

Written where the engine is built. Nothing is guessed: what cannot be found out is null. Reading is hardened, because
an engine directory is copied about and comes from elsewhere. Standard library only, so that an interpreter which has
TensorRT-LLM installed, and so knows its versions, can import this file with nothing else. See docs/engine-builds.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from parity.errors import ConfigError
from parity.fingerprint import Scalar

SCHEMA = 1
SIDECAR = "parity_engine.json"
CONFIG = "config.json"
MACHINE_FACTS = ("sm", "gpu_name", "driver", "cuda", "tensorrt", "tensorrt_llm", "torch")
"""`sm` is the compute capability as nvidia-smi writes it, "9.0"; the others are names and versions as they are."""

_MOST_BYTES = 4 << 20
"""Of one JSON file. A config.json of 1.2.1 has about 5 kB."""
_DEEPEST = 64
_CHUNK_BYTES = 1 << 22
_REVISION_CHARACTERS = 40
_DISTRIBUTIONS = {
    "cuda": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"),
    "tensorrt": ("tensorrt",),
    "tensorrt_llm": ("tensorrt-llm",),
    "torch": ("torch",),
}
_CUDA_FILE = Path("/usr/local/cuda/version.json")
"""Where CUDA's own installer says its version; containers have no distribution of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file is known by."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the sidecar says. None, and a machine fact of None, is "could not be found out".

    machine: every one of MACHINE_FACTS.
    files: by their path below the directory, in POSIX form.
    """

    created_at: str
    machine: Mapping[str, Scalar]
    command: str | None
    checkpoint_config_sha256: str | None
    checkpoint_revision: str | None
    files: Mapping[str, FileFacts]

    @property
    def unknown(self) -> tuple[str, ...]:
        """The facts that could not be found out."""
        facts = {
            **{f"machine.{name}": self.machine[name] for name in MACHINE_FACTS},
            "command": self.command,
            "checkpoint.config_sha256": self.checkpoint_config_sha256,
            "checkpoint.revision": self.checkpoint_revision,
        }
        return tuple(name for name, value in facts.items() if value is None)

    def to_json(self) -> dict[str, Any]:
        """What is written to disk."""
        return {
            "schema": SCHEMA,
            "created_at": self.created_at,
            "machine": dict(self.machine),
            "command": self.command,
            "checkpoint": {"config_sha256": self.checkpoint_config_sha256, "revision": self.checkpoint_revision},
            "files": {name: asdict(facts) for name, facts in sorted(self.files.items())},
        }


def build_manifest(
    directory: Path, *, checkpoint: Path | None, command: str | None, machine: Mapping[str, Scalar]
) -> Path:
    """Write the sidecar into an engine directory, on the machine that built it, and return its path.

    checkpoint: the directory the engine was built from. machine: see `this_machine`. A second call replaces the first
    sidecar; of two at once one is left, whole.

    Raises:
        ConfigError: If this is no engine directory, a file of it is a link that leaves it or is still being written,
            `machine` has a fact that is none of MACHINE_FACTS, or the checkpoint has no config.json.
        OSError: If the disk is full or forbidden.
    """
    root = directory.resolve()
    if unfit := sorted(set(machine) - set(MACHINE_FACTS)):
        raise ConfigError(f"machine fact {unfit[0]!r} is unknown; the facts are {', '.join(MACHINE_FACTS)}")
    files = files_below(root)
    for needed in (CONFIG, "rank0.engine"):
        if needed not in files:
            raise ConfigError(f"{str(directory)!r} is no engine directory: it has no {needed}; name the one that does")
    read_json(root, CONFIG)
    made = Manifest(
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine={name: machine.get(name) for name in MACHINE_FACTS},
        command=command,
        checkpoint_config_sha256=None if checkpoint is None else _checkpoint_config_sha256(checkpoint),
        checkpoint_revision=None if checkpoint is None else _checkpoint_revision(checkpoint),
        files={name: measured(root, path) for name, path in files.items()},
    )
    _replace(root / SIDECAR, json.dumps(made.to_json(), indent=1) + "\n")
    return directory / SIDECAR


def read_manifest(directory: Path) -> Manifest | None:
    """The sidecar of a directory, None where it has none.

    Raises:
        ConfigError: If it cannot be read, is of a newer schema, or is not what `build_manifest` writes.
    """
    if not os.path.lexists(directory / SIDECAR):
        return None
    where = str(directory / SIDECAR)
    data = read_json(directory.resolve(), SIDECAR)
    schema = data.get("schema")
    if type(schema) is not int:
        raise ConfigError(f"{where!r} is no sidecar of an engine: it names no schema; write it again where it is built")
    if schema > SCHEMA:
        raise ConfigError(f"{where!r} has schema {schema}, this parity reads up to {SCHEMA}; upgrade engine-parity")
    try:
        checkpoint = data["checkpoint"]
        made = Manifest(
            created_at=data["created_at"],
            machine={name: data["machine"][name] for name in MACHINE_FACTS},
            command=data["command"],
            checkpoint_config_sha256=checkpoint["config_sha256"],
            checkpoint_revision=checkpoint["revision"],
            files={str(name): FileFacts(**facts) for name, facts in data["files"].items()},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{where!r} is not what this schema holds ({error}); write it again") from error
    if data != made.to_json():
        raise ConfigError(f"{where!r} holds more than this schema does; write it again")
    return made


def this_machine() -> dict[str, Scalar]:
    """The facts of this machine and this interpreter; None for what cannot be found out.

    Where its GPUs differ in a fact, nobody knows which of them an engine was built on: that fact is None.
    """
    name, sm, driver = _gpus()
    found: dict[str, Scalar] = {"sm": sm, "gpu_name": name, "driver": driver}
    found |= {fact: _installed(names) for fact, names in _DISTRIBUTIONS.items()}
    if found["cuda"] is None:
        found["cuda"] = _system_cuda()
    return {fact: found[fact] for fact in MACHINE_FACTS}


def files_below(root: Path) -> dict[str, Path]:
    """Every file of an engine directory by its path below it, sorted; the sidecar is left out, half-written ones too.

    Links are listed and not followed, so that a linked folder shows as one name.

    Raises:
        ConfigError: If there is no such directory, or a part of it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename!r} cannot be listed ({error.strerror}); name a readable engine directory")

    found: dict[str, Path] = {}
    for place, folders, names in os.walk(root, onerror=refuse):
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        for path in (Path(place) / name for name in (*names, *linked)):
            name = path.relative_to(root).as_posix()
            if name != SIDECAR and not name.startswith(f".{SIDECAR}."):
                found[name] = path
    return dict(sorted(found.items()))


def measured(root: Path, path: Path) -> FileFacts:
    """Size and hash of one file of the directory `root`, which must be resolved.

    Raises:
        ConfigError: If it is a link that leaves the directory, no plain file, unreadable, or changes meanwhile.
    """
    require_plain(root, path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        after = path.stat()  # by its name: another file may have been put in its place
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror}); mend that and ask again") from error
    if _state(before) != _state(after):
        raise ConfigError(
            f"{str(path)!r} changed while it was read, from {before.st_size} bytes to {after.st_size}; wait until the "
            "build or the copy is done and ask again"
        )
    return FileFacts(bytes=after.st_size, sha256=digest.hexdigest())


def require_plain(root: Path, path: Path) -> None:
    """Refuse what is not a file of the directory `root`, which must be resolved.

    Raises:
        ConfigError: If the path is a link that leaves the directory, or names no plain file.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise ConfigError(f"{str(path)!r} leads nowhere ({error}); put the file there") from error
    if not real.is_relative_to(root):
        raise ConfigError(
            f"{str(path)!r} is a link to {str(real)!r}, outside the engine directory; copy the file into it"
        )
    if not real.is_file():
        raise ConfigError(f"{str(path)!r} is no plain file; an engine directory holds plain files only, remove it")


def read_json(root: Path, name: str) -> dict[str, Any]:
    """One JSON object out of the directory `root`, which must be resolved.

    Raises:
        ConfigError: If the file is missing, leaves the directory, is larger than 4 MiB, nested deeper than 64, no
            UTF-8, no JSON, no object, or has a key twice, a NaN or an infinity.
    """
    path = root / name
    if not os.path.lexists(path):
        raise ConfigError(f"{str(root)!r} has no {name}; name an engine directory")
    require_plain(root, path)
    try:
        text = _at_most(path, _MOST_BYTES).decode("utf-8")
        data = json.loads(text, object_pairs_hook=_without_twins, parse_float=_finite, parse_constant=_finite)
        _require_shallow(data)
    except RecursionError as error:
        raise ConfigError(f"{str(path)!r} is nested deeper than {_DEEPEST} levels; it is no engine's {name}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); restore it or build again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} is no JSON object; restore it or build again")
    return data


def _at_most(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes >> 20} MiB")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text}, which is no finite number")
    return number


def _require_shallow(data: Any) -> None:
    """RecursionError where objects and lists are nested too deep: what the parser itself says far beyond that."""
    level, depth = [data], 0
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        if depth > _DEEPEST:
            raise RecursionError
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _checkpoint_config_sha256(checkpoint: Path) -> str:
    path = checkpoint / CONFIG
    if not path.is_file():
        raise ConfigError(f"checkpoint {str(checkpoint)!r} has no {CONFIG}; name the directory the engine was built of")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checkpoint_revision(checkpoint: Path) -> str | None:
    """The hub's revision, where the checkpoint lies in a hub cache: .../snapshots/REVISION."""
    real = checkpoint.resolve()
    if real.parent.name == "snapshots" and len(real.name) == _REVISION_CHARACTERS:
        return real.name
    return None


def _gpus() -> tuple[str | None, str | None, str | None]:
    """Name, compute capability and driver of this machine's GPUs."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None, None
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    if any(len(row) != 3 for row in rows):
        return None, None, None
    name, sm, driver = ({row[column].strip() for row in rows} for column in range(3))
    return _only(name), _only(sm), _only(driver)


def _only(values: set[str]) -> str | None:
    if len(values) != 1:
        return None
    value = values.pop()
    return None if value.startswith("[") else value  # "[N/A]", "[Not Supported]"


def _installed(names: tuple[str, ...]) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _system_cuda() -> str | None:
    try:
        return str(json.loads(_CUDA_FILE.read_text("utf-8"))["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(path: Path, text: str) -> None:
    """The old content or the new one is there, whatever interrupts, whoever else writes."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with scratch.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
