"""A recording at rest: a directory that a person can read and a machine can trust.

    recording.json     the header: engine, workload, fingerprint, and the hash of every other file
    tokens.jsonl       one completion a line: prompt, tokens, text, finish reason; made to be read and diffed
    logprobs.parquet   one row per token: its log-probability and the top k (zstd)

Written under a temporary name, synced, then renamed: it is there completely or not at all. A truncated, edited or
newer recording is refused. The only file that imports pyarrow.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parity.engines import EngineSpec
from parity.errors import RecordingError
from parity.fingerprint import Fingerprint
from parity.prompts import SamplingParams, sha256_of_json
from parity.recording import (
    SCHEMA,
    Completion,
    Recording,
    TokenLogprobs,
    WorkloadRecord,
    completion_from_json,
    completion_text_to_json,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

HEADER = "recording.json"
TOKENS = "tokens.jsonl"
LOGPROBS = "logprobs.parquet"
_WIDEST = 4096
"""Log-probabilities kept with a token; more would be a vocabulary."""
_INFLATED, _SMALL_BYTES = 200, 64 << 20
"""How many times its size at rest a table may unpack to, from this size on; log-probabilities take twice to thrice."""
# Bytes of like meaning side by side: a quarter smaller than plain zstd, and as fast.
_ENCODING = {
    "request": "DELTA_BINARY_PACKED",
    "logprob_nats": "BYTE_STREAM_SPLIT",
    "top_token_ids.list.element": "BYTE_STREAM_SPLIT",
    "top_logprobs_nats.list.element": "BYTE_STREAM_SPLIT",
}


def write(
    directory: Path,
    *,
    header: Mapping[str, Any],
    completions: Sequence[Completion],
) -> Recording:
    """Seal completions into `directory`, which must not exist yet, and return the recording.

    `header` holds spec, workload, fingerprint, created_at, resumed and key; see `make_header`.

    Raises:
        RecordingError: If the directory exists, or the disk is full.
    """
    if directory.exists():
        raise RecordingError(f"{str(directory)!r} exists; a sealed recording is never overwritten, move it away first")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    with disk_errors_named(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write_tokens(temporary / TOKENS, completions)
            _write_logprobs(temporary / LOGPROBS, completions)
            sealed = {
                **header,
                "completions": len(completions),
                "files": {name: _file_facts(temporary / name) for name in (TOKENS, LOGPROBS)},
            }
            sealed["digest"] = _header_digest(sealed)
            _write_synced(temporary / HEADER, json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")
            _sync_directory(temporary)
            temporary.rename(directory)
            _sync_directory(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return _recording(sealed, tuple(completions))


def make_header(
    *, spec: EngineSpec, workload: WorkloadRecord, fingerprint: Fingerprint, created_at: str, resumed: int, key: str
) -> dict[str, Any]:
    """The header without what only sealing knows. `key` names what would have to be recorded again to be the same."""
    return {
        "schema": SCHEMA,
        "created_at": created_at,
        "key": key,
        "resumed": resumed,
        "engine": spec.to_json(),
        "workload": {
            "name": workload.name,
            "digest": workload.digest,
            "forced_from": workload.forced_from,
            "sampling": asdict(workload.sampling),
            "sampling_changes": {
                id_: {k: v for k, v in asdict(own).items() if v != getattr(workload.sampling, k)}
                for id_, own in workload.others.items()
            },
        },
        "fingerprint": fingerprint.to_json(),
    }


def read(directory: Path) -> Recording:
    """Read and verify a recording.

    Raises:
        RecordingError: If it is missing, truncated, edited, or of a newer schema.
    """
    header = read_header(directory)
    _verify(directory, header, tuple(header["files"]))
    try:
        texts = _texts(directory)
        logprobs = _read_logprobs(directory / LOGPROBS, texts)
        completions = tuple(
            completion_from_json(text, logprobs=body, terminator_logprobs=step)
            for text, (body, step) in zip(texts, logprobs, strict=True)
        )
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise RecordingError(f"recording {str(directory)!r} cannot be decoded ({error}); record again") from error
    if len(completions) != header["completions"]:
        raise RecordingError(
            f"recording {str(directory)!r} holds {len(completions)} completions, its header says "
            f"{header['completions']}; record again"
        )
    return _recording(header, completions)


def read_token_ids(directory: Path) -> dict[str, tuple[int, ...]]:
    """The tokens of each answer by prompt id, without their log-probabilities, which are most of a recording.

    Raises:
        RecordingError: As `read`.
    """
    _verify(directory, read_header(directory), (TOKENS,))
    try:
        return {text["id"]: tuple(text["token_ids"]) for text in _texts(directory)}
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise RecordingError(f"recording {str(directory)!r} cannot be decoded ({error}); record again") from error


def _texts(directory: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it would also split at U+2028 inside a string.
    return [json.loads(line) for line in (directory / TOKENS).read_text("utf-8").split("\n")[:-1]]


def _verify(directory: Path, header: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse files that are not what was sealed."""
    for name in names:
        path, facts = directory / name, header["files"][name]
        found = _file_facts(path, most_bytes=facts["bytes"]) if path.is_file() else None
        if found != facts:
            have = "is missing" if found is None else f"has {found['bytes']} bytes, sha256 {found['sha256'][:12]}"
            raise RecordingError(
                f"recording {str(directory)!r} was changed after it was sealed: {name} {have}, the header says "
                f"{facts['bytes']} bytes, sha256 {facts['sha256'][:12]}; restore it or record again"
            )


def read_header(directory: Path) -> dict[str, Any]:
    """The header alone, verified against its own digest.

    Raises:
        RecordingError: If there is no header, or it was edited, or its schema is newer than this parity.
    """
    path = directory / HEADER
    try:
        header = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecordingError(f"{str(directory)!r} is not a recording: it has no {HEADER}") from error
    except (OSError, ValueError) as error:
        raise RecordingError(f"the header {str(path)!r} cannot be read ({error}); record again") from error
    schema = header.get("schema") if isinstance(header, dict) else None
    if not isinstance(schema, int):
        raise RecordingError(f"{str(path)!r} is not the header of a recording: it names no schema")
    if schema > SCHEMA:
        raise RecordingError(
            f"recording {str(directory)!r} has schema {schema}, this parity reads up to {SCHEMA}; upgrade engine-parity"
        )
    if header.get("digest") != _header_digest(header):
        raise RecordingError(
            f"the header {str(path)!r} was edited: its content gives digest {_header_digest(header)[:12]}, it says "
            f"{str(header.get('digest'))[:12]}; restore it or record again"
        )
    return dict(header)


def load(directory: str | Path) -> pd.DataFrame:
    """A recording as a pandas DataFrame: one row per token.

    Columns: id, position, token_id, logprob_nats, top_token_ids [K], top_logprobs_nats [K], finish_reason (of the
    completion), is_terminator. Log-probability columns are missing values where the engine returned none.

    Raises:
        RecordingError: As `read`.
        ImportError: If pandas is absent; `pip install 'engine-parity[pandas]'`.
    """
    import pandas as pd  # noqa: PLC0415  an optional extra, and slow to import

    recording = read(Path(directory))
    rows: list[dict[str, Any]] = []
    for completion in recording.completions:
        rows.extend(_token_rows(completion))
    return pd.DataFrame(
        rows,
        columns=[
            "id", "position", "token_id", "logprob_nats", "top_token_ids", "top_logprobs_nats",
            "finish_reason", "is_terminator",
        ],
    )  # fmt: skip


def export_wire(recording: Recording, path: Path) -> None:
    """Write a recording's completions in wire form, one a line: what the `replay` engine reads."""
    with disk_errors_named(path):
        _write_synced(path, "".join(json.dumps(c.to_json()) + "\n" for c in recording.completions))


def copy(source: Path, target: Path) -> None:
    """A copy of a sealed recording in the place of an older copy: there completely or not at all."""
    if target.is_dir() and (target / HEADER).read_bytes() == (source / HEADER).read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def write_whole(path: Path, text: str) -> None:
    """Replace a small file: the old content or the new one is there, whatever interrupts."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    _write_synced(scratch, text)
    scratch.replace(path)
    _sync_directory(path.parent)


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into one sentence that names the place.

    Raises:
        RecordingError: For ENOSPC, EDQUOT, EACCES, EROFS and EFBIG.
    """
    try:
        yield
    except OSError as error:
        named = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)
        if error.errno not in named:
            raise
        raise RecordingError(
            f"cannot write {str(path)!r}: {os.strerror(error.errno or 0).lower()} ({_free_bytes(path) >> 20} MiB free "
            "there); free some space or choose another directory, then run again: finished completions are kept"
        ) from error


def _recording(header: Mapping[str, Any], completions: tuple[Completion, ...]) -> Recording:
    workload = header["workload"]
    common = workload["sampling"]
    return Recording(
        spec=EngineSpec.from_json(header["engine"]),
        workload=WorkloadRecord(
            name=workload["name"],
            digest=workload["digest"],
            forced_from=workload["forced_from"],
            sampling=SamplingParams.from_json(common),
            request_ids=tuple(c.id for c in completions),
            others={
                id_: SamplingParams.from_json({**common, **changes})
                for id_, changes in workload.get("sampling_changes", {}).items()
            },
        ),
        fingerprint=Fingerprint.from_json(header["fingerprint"]),
        completions=completions,
        created_at=header["created_at"],
        resumed=header["resumed"],
        digest=header["digest"],
        schema=header["schema"],
    )


def _header_digest(header: Mapping[str, Any]) -> str:
    return sha256_of_json({name: value for name, value in header.items() if name != "digest"})


def _file_facts(path: Path, *, most_bytes: int | None = None) -> dict[str, Any]:
    """Size and hash; what is larger than it may be is not read at all."""
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        return {"bytes": size, "sha256": "not read"}
    with path.open("rb") as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_tokens(path: Path, completions: Sequence[Completion]) -> None:
    lines = (json.dumps(completion_text_to_json(c), ensure_ascii=False) + "\n" for c in completions)
    _write_synced(path, "".join(lines))


def _write_logprobs(path: Path, completions: Sequence[Completion]) -> None:
    """One row per scored token, a completion's terminator after its body; `request` is the line in tokens.jsonl."""
    parts: list[TokenLogprobs] = []
    owners: list[int] = []
    for index, completion in enumerate(completions):
        _refuse_misshapen(completion, k=parts[0].k if parts else None)
        step = completion.terminator.logprobs if completion.terminator else None
        for part in (completion.logprobs, step):
            if part is not None and len(part):
                parts.append(part)
                owners.append(index)
    k = parts[0].k if parts else 1
    lengths = [len(part) for part in parts]
    ids = _joined([part.top_token_ids for part in parts], np.int32)
    top = _joined([part.top for part in parts], np.float32)
    table = pa.table(
        {
            "request": pa.array(np.repeat(np.array(owners, np.int32), lengths)),
            "logprob_nats": pa.array(_joined([part.chosen for part in parts], np.float32)),
            "top_token_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids), k),
            "top_logprobs_nats": pa.FixedSizeListArray.from_arrays(pa.array(top), k),
        }
    )
    pq.write_table(
        table, path, compression="zstd", use_dictionary=False, write_statistics=False, column_encoding=_ENCODING
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _refuse_misshapen(completion: Completion, *, k: int | None) -> None:
    """What is written here must be readable: one row a token, all rows of one width."""
    body = completion.logprobs
    step = completion.terminator.logprobs if completion.terminator else None
    found = [part for part in (body, step) if part is not None and len(part)]
    if body is None and step is not None and completion.token_ids:
        fault = "log-probabilities of its terminator and none of its body"
    elif body is not None and len(body) != len(completion.token_ids):
        fault = f"{len(completion.token_ids)} tokens and {len(body)} rows of log-probabilities"
    elif step is not None and len(step) != 1:
        fault = f"{len(step)} rows of log-probabilities for its terminator"
    elif any(len(values) != len(part) * part.k for part in found for values in (part.top, part.top_token_ids)):
        fault = "top-k rows that are not k wide"
    elif odd := [part.k for part in found if part.k < 1 or part.k != (found[0].k if k is None else k)]:
        fault = f"top-k rows {odd[0]} wide, and one recording needs one width of at least 1"
    else:
        return
    raise RecordingError(f"completion {completion.id!r} cannot be kept: it has {fault}; correct the engine's adapter")


def _joined(buffers: Sequence[memoryview], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.frombuffer(b, dtype) for b in buffers]) if buffers else np.empty(0, dtype)


def _read_logprobs(
    path: Path, texts: Sequence[Mapping[str, Any]]
) -> list[tuple[TokenLogprobs | None, TokenLogprobs | None]]:
    with pq.ParquetFile(path, memory_map=True) as file:
        count, k = file.metadata.num_rows, _width(file.schema_arrow)
        # A small file may claim to unpack to anything. Which answer has a row too many is told below.
        if count > 2 * (most := sum(len(text["token_ids"]) + 1 for text in texts)) or not 1 <= k <= _WIDEST:
            raise ValueError(f"{count} rows of {k} log-probabilities for {most} tokens")
        if 8 * count * k > max(_INFLATED * path.stat().st_size, _SMALL_BYTES):
            raise ValueError(f"{count} rows of {k} log-probabilities out of {path.stat().st_size} bytes")
        request, chosen = np.empty(count, np.int32), np.empty(count, np.float32)
        ids, top = np.empty((count, k), np.int32), np.empty((count, k), np.float32)
        start = 0
        # Piece by piece into place: a whole table beside its arrays would double the memory.
        for piece in file.iter_batches():
            rows = slice(start, start := start + len(piece))
            request[rows], chosen[rows] = piece["request"], piece["logprob_nats"]
            ids[rows] = piece["top_token_ids"].flatten().to_numpy().reshape(-1, k)
            top[rows] = piece["top_logprobs_nats"].flatten().to_numpy().reshape(-1, k)
    everything = TokenLogprobs(k=k, chosen=_buffer(chosen), top_token_ids=_buffer(ids), top=_buffer(top))
    edges = np.searchsorted(request, np.arange(len(texts) + 1, dtype=np.int32))
    result: list[tuple[TokenLogprobs | None, TokenLogprobs | None]] = []
    for text, start, stop in zip(texts, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        body, rows = len(text["token_ids"]), stop - start
        stepped = text["terminator_id"] is not None and rows == body + 1
        if rows not in (0, body) and not stepped:
            raise ValueError(f"{text['id']!r} has {body} tokens and {rows} rows of log-probabilities")
        first = everything.rows(start, start + body) if rows else None
        result.append((first, everything.rows(stop - 1, stop) if stepped else None))
    return result


def _width(schema: pa.Schema) -> int:
    """The k of a table of log-probabilities; a column more, or of another type, could unpack to anything."""
    found = {field.name: field.type for field in schema}
    k = getattr(found.get("top_token_ids"), "list_size", 0)
    wanted = {
        "request": pa.int32(),
        "logprob_nats": pa.float32(),
        "top_token_ids": pa.list_(pa.int32(), k),
        "top_logprobs_nats": pa.list_(pa.float32(), k),
    }
    if found != wanted:
        raise ValueError(f"columns {', '.join(f'{name} {kind}' for name, kind in found.items())}"[:300])
    return int(k)


def _buffer(values: NDArray[Any]) -> memoryview:
    """The values end to end, read-only."""
    flat: Any = values.reshape(-1)
    return memoryview(flat).toreadonly()


def _token_rows(completion: Completion) -> Iterator[dict[str, Any]]:
    steps: list[tuple[int, TokenLogprobs | None, int, bool]] = [
        (token_id, completion.logprobs, position, False) for position, token_id in enumerate(completion.token_ids)
    ]
    if completion.terminator is not None:
        steps.append((completion.terminator.token_id, completion.terminator.logprobs, 0, True))
    for position, (token_id, logprobs, row, is_terminator) in enumerate(steps):
        pairs = logprobs.row(row) if logprobs is not None else ()
        yield {
            "id": completion.id,
            "position": position,
            "token_id": token_id,
            "logprob_nats": None if logprobs is None else logprobs.chosen[row],
            "top_token_ids": [i for i, _ in pairs] or None,
            "top_logprobs_nats": [v for _, v in pairs] or None,
            "finish_reason": completion.finish_reason.value,
            "is_terminator": is_terminator,
        }


def _write_synced(path: Path, text: str) -> None:
    # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    for place in (path, *path.parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return 0
