"""A recording at rest: what was written is what is read, and what was damaged is refused by name."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parity
import recordings
from parity import store
from parity.errors import RecordingError
from parity.prompts import sha256_of_json
from parity.recording import SCHEMA, Completion, Recording, Terminator
from test_recording import completions

OLD = Path(__file__).parent / "data" / "recording-schema-1"


def write(directory: Path, made: Recording) -> Recording:
    header = store.make_header(
        spec=made.spec,
        workload=made.workload,
        fingerprint=made.fingerprint,
        created_at=made.created_at,
        resumed=3,
        key="k",
    )
    return store.write(directory, header=header, completions=made.completions)


def content(made: Recording) -> list[dict[str, Any]]:
    """Everything, bits of log-probabilities included; an empty body has none, whether or not it was scored."""
    lines = [c.to_json() for c in made.completions]
    return [{**line, "logprobs": line["logprobs"] if line["token_ids"] else None} for line in lines]


def reseal(directory: Path, **changes: object) -> None:
    """Edit the header as somebody would who knows how it is sealed."""
    header = {**json.loads((directory / store.HEADER).read_text("utf-8")), **changes}
    header["digest"] = sha256_of_json({name: value for name, value in header.items() if name != "digest"})
    (directory / store.HEADER).write_text(json.dumps(header), "utf-8")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "sealed"
    write(directory, recordings.recording([recordings.completion("a"), recordings.completion("b", token_ids=(5, 6))]))
    return directory


@pytest.fixture
def small() -> Recording:
    return recordings.recording([recordings.completion("a")])


# What is written is what is read -----------------------------------------------------------------------------------


@st.composite
def many(draw: st.DrawFn) -> list[Completion]:
    k = draw(st.integers(1, 3))
    return [draw(completions(id=f"p-{i}", k=k)) for i in range(draw(st.integers(0, 4)))]


@settings(deadline=None, max_examples=30)
@given(many())
def test_a_recording_is_read_as_it_was_written(answered: list[Completion]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        written = write(Path(scratch, "r"), recordings.recording(answered))
        found = store.read(Path(scratch, "r"))
    assert content(found) == content(written)
    assert (found.spec, found.workload, found.fingerprint) == (written.spec, written.workload, written.fingerprint)
    assert (found.digest, found.resumed, found.created_at) == (written.digest, 3, written.created_at)
    assert found.workload.request_ids == tuple(c.id for c in answered)


def test_one_line_of_text_stays_one_line_whatever_it_says(tmp_path: Path) -> None:
    """U+2028 and the like end a line for some readers, and a lone surrogate cannot be written in UTF-8."""
    strange = "a\u2028b\x85c\r\nd\x0ce 🙂 \ud800"
    write(tmp_path / "r", recordings.recording([recordings.completion(text=strange, prompt_text=strange)]))
    (found,) = store.read(tmp_path / "r").completions
    assert (found.text, found.prompt_text) == (strange, strange)
    assert "🙂" in (tmp_path / "r" / store.TOKENS).read_text("utf-8")


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (
            recordings.completion(token_ids=(5,), rows=None),
            "has log-probabilities of its terminator and none of its body",
        ),
        (recordings.completion(token_ids=(5, 6), rows=[[(5, -1.0)]], chosen=[-1.0]), "has 2 tokens and 1 rows"),
        (
            recordings.completion(
                terminator=Terminator(token_id=2, logprobs=recordings.token_logprobs([2, 2])),
            ),
            "has 2 rows of log-probabilities for its terminator",
        ),
        (recordings.completion(token_ids=(5,), rows=[[(5, -1.0)]], terminator=2), "has top-k rows 3 wide"),
        (recordings.completion(rows=[[]] * 3, chosen=[-1.0] * 3, k=0, terminator=None), "has top-k rows 0 wide"),
        (recordings.completion(token_ids=(5, 6, 7), rows=[[(5, -1.0)]] * 2, chosen=[-1.0] * 3), "are not k wide"),
    ],
)
def test_an_answer_that_could_not_be_read_again_is_never_sealed(broken: Completion, fault: str, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=f"completion 'p-001' cannot be kept: it .*{fault}"):
        write(tmp_path / "r", recordings.recording([broken]))
    assert list(tmp_path.iterdir()) == []


def test_completions_of_different_widths_are_never_sealed_together(tmp_path: Path) -> None:
    answers = [recordings.completion("a", k=2), recordings.completion("b", k=3)]
    with pytest.raises(RecordingError, match="completion 'b' cannot be kept: it has top-k rows 3 wide"):
        write(tmp_path / "r", recordings.recording(answers))


# Damage ------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    """The same number of bytes, another answer."""
    text = path.read_text("utf-8")
    assert "t30 t31" in text
    path.write_text(text.replace("t30 t31", "t30 t39"), "utf-8")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: truncate(d / store.TOKENS), r"tokens\.jsonl has \d+ bytes, sha256 .* the header says \d+ bytes"),
        (lambda d: flip(d / store.TOKENS), r"changed after it was sealed: tokens\.jsonl has \d+ bytes, sha256"),
        (lambda d: (d / store.TOKENS).unlink(), r"tokens\.jsonl is missing"),
        (lambda d: (d / store.LOGPROBS).unlink(), r"logprobs\.parquet is missing, the header says \d+ bytes"),
        (lambda d: truncate(d / store.LOGPROBS), r"logprobs\.parquet has \d+ bytes"),
        (
            lambda d: (d / store.HEADER).write_text((d / store.HEADER).read_text().replace("float32", "float16")),
            r"recording\.json' was edited: its content gives digest [0-9a-f]{12}, it says [0-9a-f]{12}",
        ),
        (lambda d: truncate(d / store.HEADER), r"the header '.*recording\.json' cannot be read"),
        (lambda d: (d / store.HEADER).write_bytes(b"\xff{}"), r"the header '.*recording\.json' cannot be read"),
        (lambda d: (d / store.HEADER).write_text("[]"), r"is not the header of a recording: it names no schema"),
        (lambda d: (d / store.HEADER).write_text("{}"), r"is not the header of a recording: it names no schema"),
        (lambda d: (d / store.HEADER).unlink(), r"is not a recording: it has no recording\.json"),
        (
            lambda d: reseal(d, schema=SCHEMA + 1),
            f"has schema {SCHEMA + 1}, this parity reads up to {SCHEMA}; upgrade engine-parity",
        ),
        (lambda d: reseal(d, completions=3), "holds 2 completions, its header says 3"),
    ],
)
def test_a_damaged_recording_is_refused_in_one_sentence_that_names_the_damage(
    damage: Callable[[Path], object], sentence: str, sealed: Path
) -> None:
    store.read(sealed)
    damage(sealed)
    with pytest.raises(RecordingError, match=sentence) as caught:
        store.read(sealed)
    assert str(sealed) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_forged_file_that_matches_its_header_is_still_checked_against_its_partner(sealed: Path) -> None:
    """Somebody re-hashed an edited tokens.jsonl: the rows of log-probabilities give it away."""
    path = sealed / store.TOKENS
    path.write_text(path.read_text("utf-8").replace('"token_ids": [5, 6]', '"token_ids": [5]'), "utf-8")
    files = {name: store._file_facts(sealed / name) for name in (store.TOKENS, store.LOGPROBS)}
    reseal(sealed, files=files)
    with pytest.raises(RecordingError, match="'b' has 1 tokens and 3 rows of log-probabilities"):
        store.read(sealed)


@pytest.mark.parametrize("kind", ["nothing", "empty directory", "file"])
def test_what_is_not_a_recording_is_called_so(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "empty directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("{}")
    with pytest.raises(RecordingError, match=f"'{re.escape(str(path))}"):
        store.read(path)


# Writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["recording", "empty directory", "file"])
def test_what_exists_is_never_overwritten(what: str, small: Recording, tmp_path: Path) -> None:
    target = tmp_path / "r"
    if what == "recording":
        write(target, small)
    elif what == "empty directory":
        target.mkdir()
    else:
        target.write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RecordingError, match="exists; a sealed recording is never overwritten"):
        write(target, small)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("step", ["_write_tokens", "_write_logprobs", "_header_digest", "_sync_directory"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("planted")])
def test_a_crash_while_writing_leaves_nothing(
    step: str, error: BaseException, small: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(store, step, crash)
    with pytest.raises(type(error)):
        write(tmp_path / "r", small)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("step", ["_write_tokens", "_write_logprobs", "_sync_directory"])
def test_a_full_or_forbidden_disk_is_named_with_the_room_there_is(
    number: int, step: str, small: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, step, full)
    with pytest.raises(RecordingError, match=r"\d+ MiB free there") as caught:
        write(tmp_path / "deep" / "r", small)
    assert str(tmp_path / "deep" / "r") in str(caught.value)
    assert os.strerror(number).lower() in str(caught.value)
    assert list((tmp_path / "deep").iterdir()) == []


def test_another_disk_error_is_not_taken_for_a_full_disk(
    small: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "planted")

    monkeypatch.setattr(store, "_write_tokens", broken)
    with pytest.raises(OSError, match="planted"):
        write(tmp_path / "r", small)


def test_the_wire_file_of_a_recording_holds_its_completions(sealed: Path, tmp_path: Path) -> None:
    made = store.read(sealed)
    store.export_wire(made, tmp_path / "wire.jsonl")
    lines = (tmp_path / "wire.jsonl").read_text("utf-8").splitlines()
    assert [Completion.from_json(json.loads(line)).to_json() for line in lines] == [
        c.to_json() for c in made.completions
    ]


# pandas ------------------------------------------------------------------------------------------------------------


def rows(frame: Any, columns: Sequence[str]) -> list[tuple[object, ...]]:
    return [tuple(row[name] for name in columns) for _, row in frame.iterrows()]


def test_load_gives_one_row_per_token(tmp_path: Path) -> None:
    """Worked by hand: two tokens, a scored terminator, a filler that is left out."""
    answered = recordings.completion(
        "a", token_ids=(5, 6), rows=[[(5, -0.5), (7, -1.0)], [(6, -0.25)]], terminator=2, k=2
    )
    write(tmp_path / "r", recordings.recording([answered]))
    frame = parity.load(str(tmp_path / "r"))
    assert list(frame.columns) == [
        "id", "position", "token_id", "logprob_nats", "top_token_ids", "top_logprobs_nats",
        "finish_reason", "is_terminator",
    ]  # fmt: skip
    assert rows(frame, list(frame.columns)) == [
        ("a", 0, 5, -0.5, [5, 7], [-0.5, -1.0], "stop", False),
        ("a", 1, 6, -0.25, [6], [-0.25], "stop", False),
        ("a", 2, 2, -0.25, [2, 3], [-0.25, -2.25], "stop", True),
    ]


def test_load_leaves_what_the_engine_did_not_return_missing(tmp_path: Path) -> None:
    bare = Terminator(token_id=2, logprobs=None)
    answered = [
        recordings.completion("a", token_ids=(5,), terminator=bare),
        recordings.completion("b", token_ids=(6,), rows=None, terminator=None),
        recordings.completion("c", token_ids=(), rows=None, terminator=None),
    ]
    write(tmp_path / "r", recordings.recording(answered))
    frame = parity.load(tmp_path / "r")
    assert rows(frame, ("id", "token_id", "finish_reason", "is_terminator")) == [
        ("a", 5, "stop", False),
        ("a", 2, "stop", True),
        ("b", 6, "length", False),
    ]
    assert list(frame["logprob_nats"].isna()) == [False, True, True]
    assert [value is None for value in frame["top_token_ids"]] == [False, True, True]


# Old files ---------------------------------------------------------------------------------------------------------


def test_a_recording_of_schema_1_is_read_for_ever() -> None:
    """Written by tests/data/make.py when the schema was new, and never again."""
    found = store.read(OLD)
    assert found.schema == 1
    assert found.digest == "8b6fccf0d80ffb4394a245311e896f68fdfe3330afb9803f4c3ae1627d5e94e6"
    assert found.workload.digest == "1d620434d1f85d8d1f9083ac2c117c43d7787dbde7ceef6a3ec03009a795f084"
    assert (found.label, found.resumed, found.workload.sampling.max_tokens) == ("drill 1 float32", 1, 4)
    assert found.spec.options == {"a": [1, None]}
    assert found.fingerprint.packages == {"engine": "1"}
    chat, separator, cut, ids = found.completions
    assert (chat.token_ids, chat.text, chat.stop_reason) == ((37733, 42927), "answer 0 \u2028 🙂", None)
    assert chat.logprobs is not None
    assert chat.logprobs.chosen.tolist() == [-0.390625, -0.1875]
    assert chat.logprobs.row(1) == ((42927, -0.1875), (42928, -1.03125), (42929, -2.65625))
    assert chat.terminator is not None
    assert chat.terminator.logprobs is not None
    assert chat.terminator.logprobs.row(0) == ((2, -0.09375), (3, -1.546875), (4, -2.859375))
    assert separator.prompt_text == "a\u2028b 🙂"
    assert separator.terminator == Terminator(token_id=2, logprobs=None)
    assert separator.own_prompt_token_ids == separator.prompt_token_ids == (42773, 17806, 47664, 7260)
    assert (cut.terminator, cut.finish_reason.value, len(cut.token_ids)) == (None, "length", 4)
    assert (ids.logprobs, ids.own_prompt_token_ids, ids.prompt_token_ids) == (None, None, (1, 49000, 2))
    assert ids.timing.finished_ns == 40_000_000


def test_every_schema_up_to_the_present_has_a_file_that_is_read() -> None:
    kept = sorted(int(path.name.rpartition("-")[2]) for path in OLD.parent.glob("recording-schema-*"))
    assert kept == list(range(1, SCHEMA + 1))
    for number in kept:
        directory = OLD.with_name(f"recording-schema-{number}")
        assert store.read(directory).schema == number
        assert sum(path.stat().st_size for path in directory.iterdir()) < 20_000


def test_read_log_probabilities_are_what_numpy_expects(sealed: Path) -> None:
    body = store.read(sealed).completions[1].logprobs
    assert body is not None
    assert np.frombuffer(body.top, np.float32).reshape(-1, body.k).shape == (2, 3)
