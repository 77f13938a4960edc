"""Damaged, edited and hostile goldens: one sentence each, nothing lost, nothing executed."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from golden_cases import (
    TARGET,
    acceptance,
    contents,
    document_of,
    edit,
    forge,
    refused,
    shelf_copied,
    shelf_in,
    two_runs,
)
from parity import golden, store
from parity.errors import GoldenMissingError, ParityError, RecordingError
from parity.golden import Shelf

RESTORE = "restore it from git, or move its folder away and accept anew"
SHA = r"[0-9a-f]{12}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shelf with a sound golden, and two runs."""
    return two_runs(tmp_path_factory.mktemp("sound"), acceptance)


@pytest.fixture
def shelf(sound: Path, tmp_path: Path) -> Shelf:
    """One of its own, to be damaged."""
    return shelf_copied(sound, tmp_path / "shelf")


@pytest.fixture
def folder(shelf: Shelf) -> Path:
    return shelf.folder(TARGET)


def directory_of(folder: Path, role: str = "reference") -> Path:
    return folder / str(document_of(folder)["recordings"][role]["directory"])


# golden.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", rf"golden.json' is truncated or no golden \(Expecting value: .*\); {RESTORE}"),
        (b'{"accepted_at": "2026', rf"golden.json' is truncated or no golden \(Unterminated string .*\); {RESTORE}"),
        (b"[" * 200_000, rf"golden.json' is truncated or no golden \(maximum recursion depth .*\); {RESTORE}"),
        (b"[]", r"is truncated or no golden \(list indices must be"),
        (b"{}", r"is truncated or no golden \('schema'\)"),
        (b"\xff{}", r"golden.json' cannot be read \(.*can't decode byte 0xff"),
        (b'{"schema": 2}', r"has schema 2, this parity reads up to 1; upgrade engine-parity"),
        (b'{"schema": "x"}', r"has schema 'x', this parity reads up to 1"),
        (b'{"schema": 0}', r"has schema 0, this parity reads up to 1"),
        (b'{"schema": 1}', rf"golden.json' is damaged: it says None where its 'history' must be a list; {RESTORE}"),
    ],
)
def test_what_is_no_golden_is_called_so(text: bytes, sentence: str, shelf: Shelf, folder: Path) -> None:
    (folder / golden.FILE).write_bytes(text)
    refused(shelf, sentence)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_golden_that_is_cut_anywhere_is_refused_and_never_written_over(
    share: float, shelf: Shelf, folder: Path
) -> None:
    path = folder / golden.FILE
    os.truncate(path, int(share * path.stat().st_size))
    refused(shelf, "is truncated or no golden")
    before = contents(shelf.root)
    with pytest.raises(RecordingError, match="is truncated or no golden"):
        shelf.accept(acceptance(shelf.root.parent / "run-2"))
    assert contents(shelf.root) == before


def test_a_merge_conflict_is_called_one(shelf: Shelf, folder: Path) -> None:
    path = folder / golden.FILE
    line = ' "reason": "run 1",\n'
    path.write_text(path.read_text().replace(line, f"<<<<<<< ours\n{line}=======\n{line}>>>>>>> theirs\n"))
    refused(shelf, "golden.json' holds a merge conflict; take its whole folder from one branch, and accept the")


@pytest.mark.parametrize("reseal", [False, True], ids=["digest left", "digest made right"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d["metrics"]["answer tokens"].update(value=13.0),
            r"the metric 'answer tokens' says 13 tokens \(n 3\), its recordings give 12 tokens \(n 3\)",
        ),
        (
            lambda d: d["metrics"]["answers"].update(n=300),
            r"'answers' says 3 prompts \(n 300\), .* give 3 prompts \(n 3\)",
        ),
        (
            lambda d: d["metrics"]["answers"].update(unit="cats"),
            r"'answers' says 3 cats \(n 3\), .* give 3 prompts \(n 3\)",
        ),
        (
            lambda d: d["metrics"]["answers"].update(value=float("nan")),
            r"'answers' says nan prompts \(n 3\), .* give 3 prompts \(n 3\)",
        ),
        (lambda d: d["metrics"].pop("answers"), r"'answers' says nothing, its recordings give 3 prompts \(n 3\)"),
        (
            lambda d: d["metrics"].update(good={"value": 1, "unit": "x", "n": 1}),
            r"'good' says 1 x \(n 1\), its recordings give nothing",
        ),
        (lambda d: d["noise"].update(sigma_nats=0.5), r"noise sigma_nats says 0.5, its recordings give 0.\d+"),
        (lambda d: d.update(noise=None), r"noise arbiter says None, its recordings give 'replay 1 float32'"),
        (
            lambda d: d["provenance"].update(engine="vllm 2 bfloat16"),
            r"provenance engine says 'vllm 2 bfloat16', its recordings give 'vllm 1 bfloat16'",
        ),
    ],
)
def test_a_number_edited_by_hand_is_named_with_both_values(
    change: Callable[[dict[str, Any]], object], reseal: bool, sentence: str, shelf: Shelf, folder: Path
) -> None:
    edit(folder, change, reseal=reseal)
    refused(shelf, rf"golden '.*golden.json': .*{sentence}; {RESTORE}")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(reason="a better one"),
        lambda d: d["outcomes"].update(greedy="PASS, honestly"),
        lambda d: d["history"][0].update(answers=7.0),
        lambda d: d.update(also="this"),
    ],
)
def test_what_no_recording_gives_is_held_by_the_digest(
    change: Callable[[dict[str, Any]], object], shelf: Shelf, folder: Path
) -> None:
    edit(folder, change, reseal=False)
    refused(shelf, rf"was edited by hand: its content gives digest {SHA}, it says {SHA}; {RESTORE}")
    with pytest.raises(RecordingError, match="was edited by hand"):
        shelf.accept(acceptance(shelf.root.parent / "run-2"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(target="gpu"), "was accepted for target 'gpu', not 'cpu'; move it to the folder of its"),
        (lambda d: d.update(reason=3), "it says 3 where its 'reason' must be a text"),
        (lambda d: d["recordings"]["noise"].update(digest="x" * 70_000), "where its 'digest' must be 64 hexadecimal"),
        (lambda d: d.update(metrics=[]), r"it says \[\] where its 'metrics' must be a table"),
        (lambda d: d.update(recordings={}), r"it holds the recordings \[\], and must hold 'reference'"),
        (
            lambda d: d["recordings"].update(evil=d["recordings"]["noise"]),
            "its evil recording is said to lie in 'noise-[0-9a-f]{12}', and must lie in 'evil-",
        ),
        (lambda d: d["recordings"].update(reference="x"), "it says None where its 'digest' must be a text"),
        (lambda d: d["metrics"].update(answers=3), "it says None where its 'unit' must be a text"),
        (lambda d: d["metrics"]["answers"].update(value="3"), "the metric 'answers' says '3'"),
        (lambda d: d["metrics"]["answers"].update(value=10**400), "is damaged: int too large to convert to float"),
        (lambda d: d["history"].append(3), "it says 3 where its 'history' must be a table"),
    ],
)
def test_a_golden_with_something_else_in_a_place_is_damaged(
    change: Callable[[dict[str, Any]], object], sentence: str, shelf: Shelf, folder: Path
) -> None:
    edit(folder, change, reseal="digest" not in sentence or "64" not in sentence)
    refused(shelf, sentence)


@pytest.mark.parametrize(
    "name", ["/etc", "..", "../cpu", "reference-0123456789ab/../..", "noise-0123456789ab", ".", ""]
)
def test_a_recording_outside_of_its_folder_is_refused(name: str, shelf: Shelf, folder: Path) -> None:
    edit(folder, lambda d: d["recordings"]["reference"].update(directory=name))
    refused(
        shelf, rf"its reference recording is said to lie in {re.escape(repr(name))}, and must lie in 'reference-{SHA}'"
    )


def test_a_digest_that_is_a_path_is_refused(shelf: Shelf, folder: Path) -> None:
    edit(folder, lambda d: d["recordings"]["reference"].update(digest="../../etc", directory="reference-../../etc"))
    refused(shelf, "it says '../../etc' where its 'digest' must be 64 hexadecimal digits")


@pytest.mark.parametrize("sha256", ["../../../../tmp/evil", "", "A" * 64, "0" * 65])
def test_a_hash_that_is_a_path_leads_nowhere(sha256: str, shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    """A store and a cache are entered by this name."""
    shelf = shelf_in(shelf.root.parent, elsewhere=str(tmp_path / "store"))
    for path in folder.glob(f"*/{store.LOGPROBS}"):
        path.unlink()
    edit(folder, lambda d: d["recordings"]["reference"]["files"][store.LOGPROBS].update(sha256=sha256))
    refused(shelf, "where its 'sha256' must be 64 hexadecimal digits")
    assert [path.name for path in shelf.cache.iterdir()] == ["previous"]


@pytest.mark.parametrize("size", [300 << 20, 10**400, -1, "12", None, 1e999, 12.5])
def test_a_size_that_no_golden_has_is_refused_before_anything_is_read(size: object, shelf: Shelf, folder: Path) -> None:
    edit(folder, lambda d: d["recordings"]["reference"]["files"][store.LOGPROBS].update(bytes=size))
    refused(shelf, r"'logprobs.parquet' is said to have .* bytes, and a golden's files have at most 268435456")


@pytest.mark.parametrize("file", [golden.FILE, store.HEADER])
def test_a_text_that_is_far_too_large_is_not_read(
    file: str, shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / file if file == golden.FILE else directory_of(folder) / file
    with path.open("r+") as grown:
        grown.truncate(5 << 20)
    own = Path.read_text

    def read_text(self: Path, *arguments: Any) -> str:
        assert self != path
        return own(self, *arguments)

    monkeypatch.setattr(Path, "read_text", read_text)
    refused(shelf, rf"{file}' has 5242880 bytes, and may have 4194304; {RESTORE}")


# Its recordings ----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("role", ["reference", "noise"])
@pytest.mark.parametrize(
    ("damage", "sentence", "kind"),
    [
        (
            lambda d: cut(d / store.TOKENS),
            r"tokens.jsonl has \d+ bytes, sha256 .* the header says \d+ bytes",
            RecordingError,
        ),
        (lambda d: cut(d / store.LOGPROBS), r"logprobs.parquet has \d+ bytes", RecordingError),
        (lambda d: cut(d / store.HEADER), r"recording.json' cannot be read", RecordingError),
        (
            lambda d: (d / store.TOKENS).unlink(),
            r"tokens.jsonl of its \w+ recording is missing from",
            GoldenMissingError,
        ),
        (lambda d: (d / store.HEADER).unlink(), r"recording.json of its \w+ recording is missing", GoldenMissingError),
        (
            lambda d: (d / store.LOGPROBS).unlink(),
            r"logprobs.parquet of its \w+ recording is missing from '.*'; restore it from git, or name the store",
            GoldenMissingError,
        ),
        (shutil.rmtree, r"recording.json of its \w+ recording is missing", GoldenMissingError),
    ],
)
def test_a_damaged_recording_is_named_and_accepting_it_again_mends_it(
    role: str, damage: Callable[[Path], object], sentence: str, kind: type[ParityError], shelf: Shelf, folder: Path
) -> None:
    damage(directory_of(folder, role))
    refused(shelf, sentence, kind)
    mended = shelf.accept(acceptance(shelf.root.parent / "run-1", seed=1))
    assert shelf.read(TARGET) == mended
    assert len(mended.runs) == 1


def test_the_files_of_another_recording_are_refused(shelf: Shelf, folder: Path) -> None:
    ours, theirs = directory_of(folder), directory_of(folder, "noise")
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    digest = document_of(folder)["recordings"]["noise"]["digest"][:12]
    refused(shelf, rf"was accepted with the reference recording {SHA}, and '.*' holds {digest}; {RESTORE}")


def test_an_arbiter_of_other_answers_is_refused(shelf: Shelf, folder: Path) -> None:
    """Sealed and named rightly, and still not of these answers."""
    other = shelf_in(shelf.root.parent / "other")
    theirs = other.accept(acceptance(shelf.root.parent / "run-2", seed=2))
    entry = document_of(other.folder(TARGET))["recordings"]["noise"]
    shutil.copytree(theirs.directories["noise"], folder / entry["directory"])
    edit(folder, lambda d: d["recordings"].update(noise=entry))
    refused(shelf, "its noise recording is of other answers .*the two sides scored different tokens")


@pytest.mark.parametrize("what", [golden.FILE, "directory", *(store.HEADER, store.TOKENS, store.LOGPROBS)])
def test_a_link_is_never_followed(what: str, shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    """Though it leads to the very same content."""
    path = {"directory": directory_of(folder), golden.FILE: folder / golden.FILE}.get(what, directory_of(folder) / what)
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    refused(shelf, rf"{re.escape(str(path))}' is a link, and a golden holds its own files; {RESTORE}")


def test_accepting_never_writes_through_a_link(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    path = directory_of(folder)
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / store.TOKENS).write_text("mine")
    shelf.accept(acceptance(shelf.root.parent / "run-1", seed=1))
    assert (tmp_path / "outside" / store.TOKENS).read_text() == "mine"
    assert not path.is_symlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: h.pop("engine"), r"is damaged \(KeyError: 'engine'\)"),
        (lambda h: h.pop("files"), r"is damaged \(KeyError: 'files'\)"),
        (lambda h: h.update(workload=3), r"is damaged \(TypeError: "),
        (lambda h: h["files"].update({"../../evil": h["files"][store.TOKENS]}), r"has the files .*evil"),
        (lambda h: h["files"].pop(store.LOGPROBS), r"has the files .*and it has"),
        (lambda h: h.update(completions=4), r"holds 3 completions, its header says 4"),
        (lambda h: h.update(schema=99), r"has schema 99, this parity reads up to"),
    ],
)
def test_a_forged_header_with_every_digest_right_is_one_sentence(
    change: Callable[[dict[str, Any]], object], sentence: str, shelf: Shelf, folder: Path
) -> None:
    forge(folder, "reference", change)
    refused(shelf, sentence)


# What small files may unpack to ------------------------------------------------------------------------------------


def table(rows: int, width: int, **more: pa.Array) -> pa.Table:
    zeros = pa.array(np.zeros(rows * width, np.int32)), pa.array(np.zeros(rows * width, np.float32))
    return pa.table(
        {
            "request": pa.array(np.zeros(rows, np.int32)),
            "logprob_nats": pa.array(np.zeros(rows, np.float32)),
            "top_token_ids": pa.FixedSizeListArray.from_arrays(zeros[0], width),
            "top_logprobs_nats": pa.FixedSizeListArray.from_arrays(zeros[1], width),
            **more,
        }
    )


def unpacked(*_: object, **__: object) -> None:
    raise AssertionError("the content was unpacked")


@pytest.mark.parametrize(("rows", "width"), [(3_000_000, 1), (12, 200_000), (0, 5000)])
def test_log_probabilities_that_explode_are_refused_before_they_do(
    rows: int, width: int, shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory_of(folder) / store.LOGPROBS
    pq.write_table(table(rows, width), path, compression="zstd")
    forge(folder, "reference")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", unpacked)
    refused(shelf, rf"cannot be decoded \({rows} rows of {width} log-probabilities for 15 tokens\); record again")


@pytest.mark.parametrize("name", ["more", "request"])
def test_a_column_that_nobody_writes_is_never_unpacked(
    name: str, shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte of zeros a row is some bytes a row at rest."""
    zeros = {name: pa.array([bytes(1 << 20)] * 12)}
    pq.write_table(table(12, 20, **zeros), directory_of(folder) / store.LOGPROBS, compression="zstd")
    forge(folder, "reference")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", unpacked)
    refused(shelf, rf"cannot be decoded \(columns .*{name} binary")


def test_rows_and_widths_that_explode_together_are_refused(
    shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each within its own limit, and together far more than a file of this size can hold."""
    monkeypatch.setattr(store, "_INFLATED", 0)
    monkeypatch.setattr(store, "_SMALL_BYTES", 1000)
    pq.write_table(table(12, 20), directory_of(folder) / store.LOGPROBS)
    forge(folder, "reference")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", unpacked)
    refused(shelf, r"cannot be decoded \(12 rows of 20 log-probabilities out of \d+ bytes\)")


# Nothing is executed -----------------------------------------------------------------------------------------------


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (golden.FILE, "golden.json' cannot be read"),
        (store.HEADER, "recording.json' cannot be read"),
        (store.TOKENS, "cannot be decoded"),
        (store.LOGPROBS, "cannot be decoded"),
    ],
)
def test_a_pickle_in_the_place_of_a_file_is_no_file_of_ours(
    file: str, sentence: str, shelf: Shelf, folder: Path, tmp_path: Path
) -> None:
    payload = pickle.dumps(_Payload(tmp_path / "canary"))
    path = folder / file if file == golden.FILE else directory_of(folder) / file
    path.write_bytes(payload)
    if file in (store.TOKENS, store.LOGPROBS):
        forge(folder, "reference")
    refused(shelf, sentence)
    assert not (tmp_path / "canary").exists()
    pickle.loads(payload)
    assert (tmp_path / "canary").exists()  # the payload was live


def test_code_beside_a_golden_is_not_run_and_not_kept(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    for name in ("conftest.py", "__init__.py", "sitecustomize.py"):
        for place in (folder, directory_of(folder), shelf.root.parent / "run-2" / "candidate"):
            (place / name).write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert shelf.read(TARGET).reason == "run 1"
    found = shelf.accept(acceptance(shelf.root.parent / "run-2", seed=2))
    assert not [path for path in contents(folder) if path.endswith(".py")]
    assert shelf.read(TARGET) == found
    assert not (tmp_path / "canary").exists()


def test_a_type_in_a_parquet_file_that_wants_to_be_unpickled_is_not(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    """Older releases of pyarrow did; ours must not."""
    path = directory_of(folder) / store.LOGPROBS
    whole = pq.read_table(path)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(_Payload(tmp_path / "canary")),
    }
    schema = whole.schema.set(0, whole.schema.field(0).with_metadata(metadata))
    pq.write_table(whole.cast(schema), path)
    forge(folder, "reference")
    shelf.read(TARGET)
    assert not (tmp_path / "canary").exists()
