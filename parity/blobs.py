"""A store of files named by their SHA-256: a directory, or any fsspec URL (`s3://bucket/parity`, `gs://...`).

For what is too large for version control. A file is verified when it is put and when it is fetched; what is missing or
wrong is an error that names it, never a pass.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from parity.errors import ConfigError, GoldenMissingError, ParityError, RecordingError

_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"[0-9a-f]{64}")


def put(place: str, sha256: str, source: Path) -> None:
    """Keep a file under its hash and read it back. One that is there already and right is left alone.

    Raises:
        ConfigError: If the place is a URL and fsspec, or its driver, is not installed.
        RecordingError: If it cannot be written, or is not read back as it was written.
    """
    size = source.stat().st_size
    with _errors_named(place, sha256):
        try:
            if not _fault(place, sha256, size, _drop):
                return
        except FileNotFoundError:
            pass
        if _is_url(place):
            filesystem, root = _filesystem(place)
            filesystem.makedirs(root, exist_ok=True)
            filesystem.put_file(str(source), f"{root}/{sha256}")
        else:
            target = Path(place) / sha256
            target.parent.mkdir(parents=True, exist_ok=True)
            # Other clones, on other machines, may be putting the same file.
            scratch = target.with_name(f".{sha256}.{uuid.uuid4().hex}")
            shutil.copyfile(source, scratch)
            scratch.replace(target)
        if fault := _fault(place, sha256, size, _drop):
            raise RecordingError(f"{_named(place, sha256)} was written and is read back wrong, {fault}; try again")


def get(place: str, sha256: str, target: Path, *, size: int) -> None:
    """Fetch a file by its hash; nothing but these `size` bytes is ever left at `target`.

    Raises:
        ConfigError: If the place is a URL and fsspec, or its driver, is not installed.
        GoldenMissingError: If it is not there.
        RecordingError: If it has another content.
    """
    try:
        with _errors_named(place, sha256), target.open("wb") as file:
            fault = _fault(place, sha256, size, file.write)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    if fault:
        target.unlink(missing_ok=True)
        raise RecordingError(
            f"{_named(place, sha256)} is not the file that was accepted: it has {fault}, and must have {size} bytes of "
            "the sha256 that it is named by; put the right file back, or accept anew where the recording is"
        )


def names(place: str) -> tuple[str, ...]:
    """Every file of a store, by hash, sorted; none where there is no store yet.

    Raises:
        ConfigError: If the place is a URL and fsspec, or its driver, is not installed.
        RecordingError: If it cannot be listed.
    """
    try:
        with _errors_named(place, ""):
            if _is_url(place):
                filesystem, root = _filesystem(place)
                found = [str(path).rsplit("/", 1)[-1] for path in filesystem.ls(root, detail=False)]
            else:
                found = [path.name for path in Path(place).iterdir()]
    except GoldenMissingError:
        return ()
    return tuple(sorted(name for name in found if _NAME.fullmatch(name)))


def _fault(place: str, sha256: str, size: int, write: Callable[[bytes], object]) -> str:
    """What is wrong with the file, in words; nothing if it is the one. Reads and hands on at most `size` bytes.

    Raises:
        FileNotFoundError: If it is not there.
    """
    digest, count = hashlib.sha256(), 0
    with _opened(place, sha256) as source:
        while chunk := source.read(_CHUNK_BYTES):
            count += len(chunk)
            if count > size:
                return f"more than {size} bytes"
            digest.update(chunk)
            write(chunk)
    if count < size:
        return f"{count} bytes"
    return "" if digest.hexdigest() == sha256 else f"{count} bytes of sha256 {digest.hexdigest()[:12]}"


def _drop(_: bytes) -> None:
    """For whoever only wants to know."""


@contextmanager
def _opened(place: str, sha256: str) -> Iterator[IO[bytes]]:
    if not _is_url(place):
        with (Path(place) / sha256).open("rb") as file:
            yield file
        return
    filesystem, root = _filesystem(place)
    with filesystem.open(f"{root}/{sha256}", "rb") as remote:
        yield remote


@contextmanager
def _errors_named(place: str, sha256: str) -> Iterator[None]:
    """Each driver raises what it likes, so anything that is not ours becomes one sentence."""
    try:
        yield
    except ParityError:
        raise
    except FileNotFoundError as error:
        raise GoldenMissingError(
            f"{_named(place, sha256)} is missing; put it back, or accept anew where the recording is"
        ) from error
    except Exception as error:
        raise RecordingError(
            f"{_named(place, sha256)} cannot be used ({type(error).__name__}: {error}); see that the store can be "
            "reached and written"
        ) from error


def _named(place: str, sha256: str) -> str:
    path = f"{place.rstrip('/')}/{sha256}"
    return f"the store's file {path!r}" if sha256 else f"the store {place!r}"


def _is_url(place: str) -> bool:
    return "://" in place


def _filesystem(place: str) -> tuple[Any, str]:
    try:
        import fsspec  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            f"the store {place!r} is a URL, which takes fsspec; pip install 'engine-parity[store]'"
        ) from error
    try:
        filesystem, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:  # an unknown scheme, or one whose driver is not installed
        raise ConfigError(f"the store {place!r} cannot be opened: {error}") from error
    return filesystem, str(root).rstrip("/")
