"""The store of large files: what was put is what is fetched, and anything else is an error that names it."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from golden_cases import TARGET, acceptance, contents, document_of, shelf_in
from parity import blobs, golden, store
from parity.errors import ConfigError, GoldenMissingError, RecordingError
from parity.golden import Shelf

fsspec = pytest.importorskip("fsspec")

CONTENT = bytes(range(256)) * 8
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)


@pytest.fixture(params=["directory", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store of each kind."""
    if request.param == "memory":
        yield "memory://blobs/of parity"
        fsspec.filesystem("memory").store.clear()
    else:
        yield str(tmp_path / "blobs" / "of parity") if request.param == "directory" else f"file://{tmp_path}/blobs"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def plant(place: str, content: bytes, sha256: str = SHA256) -> None:
    """What somebody else has put there."""
    with fsspec.open(f"{place}/{sha256}" if "://" in place else f"file://{place}/{sha256}", "wb") as file:
        file.write(content)


def remove(place: str, sha256: str = SHA256) -> None:
    filesystem, root = fsspec.core.url_to_fs(place if "://" in place else f"file://{place}")
    filesystem.rm(f"{root}/{sha256}")


def fetched(place: str, target: Path, sha256: str = SHA256) -> bytes:
    blobs.get(place, sha256, target, size=SIZE)
    return target.read_bytes()


# Put and got -------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got_and_listed(place: str, source: Path, tmp_path: Path) -> None:
    assert blobs.names(place) == ()
    blobs.put(place, SHA256, source)
    blobs.put(place, SHA256, source)
    assert blobs.names(place) == (SHA256,)
    assert fetched(place, tmp_path / "got") == CONTENT


def test_a_store_lists_nothing_but_files_named_by_their_hash(place: str, source: Path) -> None:
    blobs.put(place, SHA256, source)
    for name in ("README", f".{SHA256}", SHA256[:12], SHA256.upper()):
        plant(place, b"x", name)
    assert blobs.names(place) == (SHA256,)


WRONG = [
    (CONTENT[:100], "it has 100 bytes, and must have 2048 bytes"),
    (b"", "it has 0 bytes, and must have 2048 bytes"),
    (CONTENT[::-1], "it has 2048 bytes of sha256 [0-9a-f]{12}, and must have 2048 bytes"),
    (CONTENT + b"x", "it has more than 2048 bytes, and must have 2048 bytes"),
]


@pytest.mark.parametrize(("content", "sentence"), WRONG)
def test_a_wrong_file_is_an_error_and_leaves_nothing(content: bytes, sentence: str, place: str, tmp_path: Path) -> None:
    if "://" not in place:
        Path(place).mkdir(parents=True)
    plant(place, content)
    with pytest.raises(RecordingError, match=sentence) as caught:
        fetched(place, tmp_path / "got")
    assert repr(f"{place}/{SHA256}") in str(caught.value)
    assert str(caught.value).endswith("put the right file back, or accept anew where the recording is")
    assert not (tmp_path / "got").exists()


def test_a_file_that_is_far_too_large_is_not_read_to_its_end(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.put(place, SHA256, source)
    plant(place, bytes(1 << 22))
    read: list[int] = []
    own = blobs._opened

    @contextmanager
    def counted(place: str, sha256: str) -> Iterator[Any]:
        def some(count: int) -> bytes:
            read.append(count)
            return file.read(count)

        with own(place, sha256) as file:
            yield SimpleNamespace(read=some)

    monkeypatch.setattr(blobs, "_CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(blobs, "_opened", counted)
    with pytest.raises(RecordingError, match="more than 2048 bytes"):
        fetched(place, tmp_path / "got")
    assert sum(read) == SIZE + (1 << 10)


def test_a_missing_file_is_an_error_and_never_a_pass(place: str, tmp_path: Path) -> None:
    with pytest.raises(GoldenMissingError) as caught:
        fetched(place, tmp_path / "got")
    assert str(caught.value) == (
        f"the store's file {f'{place}/{SHA256}'!r} is missing; put it back, or accept anew where the recording is"
    )
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize(("content", "sentence"), WRONG)
def test_putting_mends_what_is_wrong(content: bytes, sentence: str, place: str, source: Path, tmp_path: Path) -> None:
    blobs.put(place, SHA256, source)
    plant(place, content)
    blobs.put(place, SHA256, source)
    assert fetched(place, tmp_path / "got") == CONTENT


def test_what_is_read_back_wrong_was_not_put(place: str, source: Path) -> None:
    """Whoever puts may remove its own copy afterwards."""
    with pytest.raises(RecordingError, match=r"was written and is read back wrong, 2048 bytes of sha256 [0-9a-f]{12}"):
        blobs.put(place, "0" * 64, source)


def test_a_copy_that_is_interrupted_leaves_no_file_under_the_name(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path, target: Path) -> None:
        target.write_bytes(CONTENT[:7])
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        blobs.put(str(tmp_path / "blobs"), SHA256, source)
    assert blobs.names(str(tmp_path / "blobs")) == ()


# Places that cannot be used ----------------------------------------------------------------------------------------


def every(place: str, source: Path) -> list[Callable[[], object]]:
    return [
        lambda: blobs.put(place, SHA256, source),
        lambda: blobs.get(place, SHA256, source.with_name("got"), size=SIZE),
        lambda: blobs.names(place),
    ]


def test_an_unknown_scheme_is_named(source: Path) -> None:
    for ask in every("warp://bucket/parity", source):
        with pytest.raises(
            ConfigError, match="the store 'warp://bucket/parity' cannot be opened: Protocol not known: warp"
        ):
            ask()


def test_a_scheme_whose_driver_is_not_installed_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for ask in every("s3://bucket/parity", source):
        with pytest.raises(ConfigError, match=r"the store 's3://bucket/parity' cannot be opened: .*s3fs"):
            ask()


def test_a_url_without_fsspec_says_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for ask in every("memory://blobs", source):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert str(caught.value) == (
            "the store 'memory://blobs' is a URL, which takes fsspec; pip install 'engine-parity[store]'"
        )


def test_a_directory_needs_no_fsspec(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    blobs.put(str(tmp_path / "blobs"), SHA256, source)
    assert fetched(str(tmp_path / "blobs"), tmp_path / "got") == CONTENT


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), RuntimeError("no credentials"), NotImplementedError()]
)
def test_whatever_a_driver_raises_is_one_sentence(
    error: Exception, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers raise errors of their own, which nobody can list."""

    def fail(*_: object, **__: object) -> None:
        raise error

    for name in ("open", "ls"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), name, fail)
    for ask in every("memory://blobs", source):
        with pytest.raises(
            RecordingError, match=rf"memory://blobs.*' cannot be used \({type(error).__name__}: "
        ) as caught:
            ask()
        assert str(caught.value).endswith("see that the store can be reached and written")


def test_a_file_in_the_place_of_a_store_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("mine")
    for ask in every(str(tmp_path / "blobs"), source):
        with pytest.raises(RecordingError, match=r"blobs.*' cannot be used"):
            ask()
    assert (tmp_path / "blobs").read_text() == "mine"


# Goldens whose log-probabilities lie in a store ----------------------------------------------------------------------


def clone(shelf: Shelf, directory: Path) -> Shelf:
    """The same golden somewhere else, as git would bring it there; its cache is empty."""
    shutil.copytree(shelf.root, directory / "golden")
    return shelf_in(directory, elsewhere=shelf.elsewhere)


@pytest.fixture
def stored(place: str, tmp_path: Path) -> Shelf:
    """A golden whose log-probabilities lie in a store."""
    shelf = shelf_in(tmp_path / "mine", elsewhere=place)
    shelf.accept(acceptance(tmp_path / "run-1", seed=1))
    return shelf


def bulk(shelf: Shelf) -> list[str]:
    entries = document_of(shelf.folder(TARGET))["recordings"]
    return [entries[role]["files"][store.LOGPROBS]["sha256"] for role in ("reference", "noise")]


def test_a_golden_in_a_store_is_read_in_another_clone(stored: Shelf, tmp_path: Path) -> None:
    assert not list(stored.root.glob(f"**/{store.LOGPROBS}"))
    assert blobs.names(str(stored.elsewhere)) == tuple(sorted(bulk(stored)))
    theirs = clone(stored, tmp_path / "theirs")
    before = contents(theirs.root)
    found = theirs.read(TARGET)
    assert found.recording("reference").completions[0].logprobs is not None
    assert set(found.bulk) == set(bulk(stored))
    assert (found.directories["reference"] / store.LOGPROBS).is_relative_to(theirs.cache)
    assert contents(theirs.root) == before


def test_what_was_fetched_once_is_not_fetched_again(stored: Shelf, tmp_path: Path) -> None:
    theirs = clone(stored, tmp_path / "theirs")
    theirs.read(TARGET)
    for sha256 in bulk(stored):
        remove(str(stored.elsewhere), sha256)
    assert theirs.read(TARGET).reason == "run 1"


@pytest.mark.parametrize("file", [store.LOGPROBS, store.TOKENS, store.HEADER])
def test_a_damaged_cache_is_fetched_again(file: str, stored: Shelf, tmp_path: Path) -> None:
    theirs = clone(stored, tmp_path / "theirs")
    directory = theirs.read(TARGET).directories["reference"]
    (directory / file).write_bytes(b"x")
    assert theirs.read(TARGET).directories["reference"] == directory
    assert store.read(directory).completions


def test_a_golden_whose_log_probabilities_are_nowhere_is_an_error(stored: Shelf, tmp_path: Path) -> None:
    theirs = clone(stored, tmp_path / "theirs")
    remove(str(stored.elsewhere), bulk(stored)[0])
    with pytest.raises(GoldenMissingError, match=f"{re.escape(str(stored.elsewhere))}/{bulk(stored)[0]}' is missing"):
        theirs.read(TARGET)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda b: b[:-9], r"it has \d+ bytes, and must have \d+ bytes"),
        (lambda b: bytes(len(b)), r"it has \d+ bytes of sha256"),
        (lambda b: b + bytes(1 << 20), r"it has more than \d+ bytes"),
    ],
)
def test_a_golden_whose_log_probabilities_are_wrong_is_an_error(
    damage: Callable[[bytes], bytes], sentence: str, stored: Shelf, tmp_path: Path
) -> None:
    theirs = clone(stored, tmp_path / "theirs")
    right = (tmp_path / "run-1" / "candidate" / store.LOGPROBS).read_bytes()
    plant(str(stored.elsewhere), damage(right), bulk(stored)[0])
    for _ in range(2):  # a failed fetch leaves nothing that a second one would take for the file
        with pytest.raises(RecordingError, match=sentence):
            theirs.read(TARGET)
    plant(str(stored.elsewhere), right, bulk(stored)[0])
    assert theirs.read(TARGET).reason == "run 1"


def test_without_the_store_in_the_configuration_the_sentence_says_so(stored: Shelf, tmp_path: Path) -> None:
    clone(stored, tmp_path / "theirs")
    with pytest.raises(GoldenMissingError, match=r"or name the store that it lies in \(\[golden\] store\)"):
        shelf_in(tmp_path / "theirs").read(TARGET)


def test_a_golden_moves_into_a_store_and_back_when_it_is_accepted_again(place: str, tmp_path: Path) -> None:
    wanted = acceptance(tmp_path / "run-1", seed=1)
    inside, outside = (shelf_in(tmp_path, elsewhere=where) for where in (None, place))
    inside.accept(wanted)
    whole = contents(inside.folder(TARGET)).keys()
    outside.accept(wanted)
    assert not list(outside.root.glob(f"**/{store.LOGPROBS}"))
    assert outside.read(TARGET).metrics == inside.accept(wanted).metrics
    assert contents(inside.folder(TARGET)).keys() == whole
    assert len(blobs.names(place)) == 2  # other clones may still want them


def test_a_golden_moves_back_by_hand(stored: Shelf, tmp_path: Path) -> None:
    for role, name in (("reference", "candidate"), ("noise", "reference-scores")):
        directory = document_of(stored.folder(TARGET))["recordings"][role]["directory"]
        shutil.copy(tmp_path / "run-1" / name / store.LOGPROBS, stored.folder(TARGET) / directory)
    assert shelf_in(stored.root.parent).read(TARGET).reason == "run 1"


def test_a_store_that_does_not_keep_what_it_is_given_loses_no_golden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = shelf_in(tmp_path)
    first = inside.accept(acceptance(tmp_path / "run-1", seed=1))
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "put_file", lambda *_, **__: None)
    for seed in (1, 2):
        with pytest.raises(GoldenMissingError, match="is missing"):
            shelf_in(tmp_path, elsewhere="memory://void").accept(acceptance(tmp_path / f"run-{seed}", seed=seed))
        assert inside.read(TARGET) == first


def test_the_store_of_a_project_is_the_one_that_its_targets_file_names(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    targets = tmp_path / "suites" / "targets.toml"
    targets.write_text("[golden]\nstore = '../blobs'\ndirectory = 'accepted'\n")
    found = golden.shelf(tmp_path / "suites", tmp_path / "home")
    assert (found.elsewhere, found.root) == (str(tmp_path / "blobs"), tmp_path / "suites" / "accepted")
    targets.write_text("[golden]\nstore = 's3://bucket/parity'\n")
    assert golden.shelf(tmp_path / "suites", tmp_path / "home").elsewhere == "s3://bucket/parity"
