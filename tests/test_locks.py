"""A release without a lock file gets one from the user's pip, complete and once, or none and a sentence."""

import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import environments, locks, pip
from parity.errors import ConfigError, ProvisionError
from parity.record import Places
from pip_runs import FOREVER, is_running, write_wheel

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
ENGINE = "engine==1.5"


class Place(TypedDict):
    """What `locked` is told, besides the release and who listens."""

    locks: list[Path]
    root: Path
    python: str


def silent(what: str, done: int, total: int) -> None:
    assert what
    assert 0 <= done <= total


def report_of(*pins: str) -> str:
    """pip's report on what it would install."""
    packages = [dict(zip(("name", "version"), pin.split("=="), strict=True)) for pin in pins]
    where = {"platform_machine": "x86_64", "sys_platform": "linux"}
    return json.dumps({"install": [{"metadata": package} for package in packages], "environment": where})


@dataclass
class FakePip:
    """Stands in for the function that says how pip is run; answers with shell scripts, by default with a report."""

    report: str
    calls: list[tuple[str, ...]] = field(default_factory=list)
    answer: Callable[[tuple[str, ...]], str | None] = lambda _: None

    def __call__(self, python: Path, *arguments: str) -> list[str]:
        at = arguments.index("--report") + 1
        asked = arguments[at + 1 :]
        self.calls.append(asked)
        script = self.answer(asked)
        success = f"echo Collecting engine==1.5; cat > {arguments[at]} <<'END'\n{self.report}\nEND"
        return ["sh", "-c", success if script is None else script]


@pytest.fixture(scope="module", autouse=True)
def _no_venv(tmp_path_factory: pytest.TempPathFactory) -> object:
    """An interpreter whose virtual environments take milliseconds to create and have this one's pip."""
    python = tmp_path_factory.mktemp("interpreter") / "python"
    script = f'mkdir "$4/bin" && printf \'#!/bin/sh\\nexec {sys.executable} "$@"\\n\' > $4/bin/python'
    python.write_text(f"#!/bin/sh\n{script} && chmod +x $4/bin/python\n")
    python.chmod(0o755)
    find = pip.interpreter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pip, "interpreter", lambda v, what: (python, HERE) if v == HERE else find(v, what=what))
        yield


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    made = FakePip(report_of("engine==1.5"))
    monkeypatch.setattr(pip, "install", made)
    return made


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return {"locks": [tmp_path / "committed", tmp_path / "made"], "root": tmp_path / "root", "python": HERE}


def test_a_lock_holds_what_the_users_pip_would_install(tmp_path: Path, place: Place) -> None:
    """Real pip, without a network: what is only in the user's folder is found there, torch alone at its own index, and
    what breaks `import transformers` is left out; the environment of the new lock file can be found."""
    wheels, index = tmp_path / "wheels", tmp_path / "index"
    write_wheel(wheels, "engine", "1.5", ["torch==2.0+cpu", "torchvision", "Tiny_One>=1", "pluggy"])
    write_wheel(wheels, "Tiny_One", "1.5")
    write_wheel(wheels, "Tiny_One", "2.0", ["torch>=3"])  # pip must take the version that fits
    write_wheel(wheels, "pluggy", "0.1")  # that pytest's own is installed must not matter
    write_wheel(wheels, "torchvision", "0.1")
    write_wheel(wheels, "torch", "2.0")
    write_wheel(index / "tiny-one", "Tiny_One", "1.9")  # pip must not look for it here
    wheel = write_wheel(index / "torch", "torch", "2.0+cpu")
    (index / "torch" / "index.html").write_text(f"<a href='{wheel.name}'>{wheel.name}</a>")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "FIND_LINKS": str(wheels),
            "NO_INDEX": "",
            "INDEX_URL": (tmp_path / "none").as_uri(),
        }.items():
            patch.setenv(f"PIP_{name}", value)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setattr(pip, "TORCH_CPU_INDEX", index.as_uri())
        path = locks.locked(ENGINE, report=silent, **place)
    assert path == place["locks"][1] / "engine-1.5.txt"
    lines = path.read_text().splitlines()
    assert lines[1] == f"# python: {HERE}"
    assert lines[5:] == ["engine==1.5", "pluggy==0.1", "Tiny_One==1.5", "torch==2.0+cpu"]
    assert re.fullmatch(r"# Made on \d{4}-\d\d-\d\d from `pip install --dry-run --report - engine==1\.5`,", lines[2])
    assert lines[3:5] == [
        f"# with torch==2.0+cpu from {index.as_uri()},",
        "# without torchvision: their default builds are for CUDA and break `import transformers`.",
    ]
    found = environments.find("engine-1.5", locks=place["locks"], root=place["root"])
    assert found.packages == (("engine", "1.5"), ("pluggy", "0.1"), ("Tiny_One", "1.5"), ("torch", "2.0+cpu"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert "Looking in links" in (place["root"] / "engine-1.5.log").read_text()


def test_an_existing_lock_is_returned_and_the_first_folder_wins(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the name of the package is spelt, nothing is run and nothing is changed."""
    monkeypatch.setattr(pip, "run", lambda *_, **__: pytest.fail("a process was started"))
    for folder in reversed(place["locks"]):
        folder.mkdir()
        path = folder / "my-engine-1.5.txt"
        path.write_text("kept")
        for name in ("my-engine", "My_Engine", "my.engine"):
            assert locks.locked(f"{name}==1.5", report=silent, **place) == path
    assert path.parent == place["locks"][0]
    assert path.read_text() == "kept"
    assert not place["root"].exists()


def test_a_new_lock_goes_where_recordings_look_for_it(fake: FakePip, tmp_path: Path) -> None:
    """A lock file made into the usual places is found there, beside the committed ones."""
    places = Places.of(tmp_path / "suites", tmp_path / "home")
    path = locks.locked(ENGINE, locks=places.locks, root=places.environments, python=HERE, report=silent)
    assert path == tmp_path / "home" / "locks" / "engine-1.5.txt"
    assert environments.find("engine-1.5", locks=places.locks, root=places.environments).lock == path
    assert locks.locked(ENGINE, locks=places.locks, root=places.environments, python=HERE, report=silent) == path
    assert fake.calls == [(ENGINE,)]


@pytest.mark.parametrize(
    "requirement",
    ["engine", "engine==", "==1.5", "engine>=1.5", "engine===1.5", "engine==1.*", "engine[gpu]==1.5", "engine==1/2",
     " engine==1.5", "engine==1.5\n", "../engine==1.5", "--help==1", "engine==1.5; python_version > '3'", ""],
)  # fmt: skip
def test_anything_but_one_release_is_refused_with_the_form(fake: FakePip, place: Place, requirement: str) -> None:
    """What reaches pip is a name and a version, never an option, a range or a path."""
    with pytest.raises(ConfigError, match=re.escape(f"{requirement!r} does not name one release; write NAME==VERSION")):
        locks.locked(requirement, report=silent, **place)
    assert fake.calls == []


VERSIONS = "(from versions: 0.8.5, 0.9.0.post1, 0.9.0, 0.30.0, 0.31.0, 1.0rc1)"
NO_VERSION = "ERROR: Could not find a version that satisfies the requirement engine==1.5"
BROKEN = "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError(1)': /engine/"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([f"{NO_VERSION} {VERSIONS}"], f"no such version where pip is configured to look, for Python {HERE} on this "
         "machine; nearest versions: 0.31.0, 1.0rc1"),
        ([f"{NO_VERSION} (from versions: none)"], f"no 'engine' where pip is configured to look, for Python {HERE} on "
         "this machine; check the name"),
        ([BROKEN, f"{NO_VERSION} (from versions: none)"], "pip cannot reach a package index; check the network"),
        (["ERROR: Max retries exceeded with url: /x.whl"], "pip cannot reach a package index"),
        (["ERROR: OSError: [Errno 28] No space left on device"], "no space left: "),
        (["ERROR: No matching distribution found for torch==2.0+cpu; a == 'b'"], "pip can take torch==2.0+cpu neither"),
        (["ERROR: Cannot install engine and other", "ERROR: ResolutionImpossible: for help visit"],
         "pip failed: Cannot install engine and other"),
        ([f"{NO_VERSION.replace('engine==1.5', 'tiny>=9')} (from engine) (from versions: 1)", "ERROR: none"],
         "pip failed: Could not find a version that satisfies the requirement tiny>=9 (from engine)"),
        (["", "no such option: --dry-run", ""], "pip failed: no such option: --dry-run"),
        ([], "pip failed: no output"),
    ],
)  # fmt: skip
def test_a_failure_of_pip_is_one_sentence(fake: FakePip, place: Place, lines: list[str], complaint: str) -> None:
    """It says what is wrong and where pip's log is, and no lock file is made."""
    output = "\n".join(lines)
    fake.answer = lambda _: f'printf "%s\\n" "$(cat <<\'END\'\n{output}\nEND\n)"; exit 1'
    with pytest.raises(ProvisionError) as caught:
        locks.locked(ENGINE, report=silent, **place)
    log = place["root"] / "engine-1.5.log"
    assert str(caught.value).startswith("lock file of 'engine==1.5': ")
    assert complaint in str(caught.value)
    assert str(caught.value).endswith(f"(log: {log})")
    assert "\n" not in str(caught.value)
    assert output.strip() in log.read_text()
    assert list(place["locks"][1].iterdir()) == []


@pytest.mark.parametrize(
    ("version", "nearest"),
    [("9.0", "0.31.0, 1.0rc1"), ("0.30.5", "0.9.0.post1, 0.30.0, 0.31.0"), ("0.10", "0.9.0, 0.9.0.post1, 0.30.0"),
     ("0.1", "0.8.5")],
)  # fmt: skip
def test_the_nearest_versions_are_near_as_numbers(fake: FakePip, place: Place, version: str, nearest: str) -> None:
    """0.30.0 is not near 0.3.0, though the texts are alike."""
    fake.answer = lambda _: f"echo '{NO_VERSION.replace('1.5', version)} {VERSIONS}'; exit 1"
    with pytest.raises(ProvisionError, match=re.escape(f"nearest versions: {nearest} (log")):
        locks.locked(f"engine=={version}", report=silent, **place)


# What pip says of a torch that is nowhere, without and with a constraint on torch in its configuration.
NO_TORCH = "echo 'ERROR: No matching distribution found for torch==2.0+cpu; x'; exit 1"
CONSTRAINED = "echo 'ERROR: Cannot install engine==1.5.'; echo '  engine 1.5 depends on torch==2.0+cpu; x'; exit 1"


@pytest.mark.parametrize("missing", [NO_TORCH, CONSTRAINED])
def test_torch_alone_is_asked_of_its_own_index(fake: FakePip, place: Place, missing: str) -> None:
    """Only after the configured places, and its wheel is then one more requirement."""
    wheel = {"metadata": {"name": "torch", "version": "2.0+cpu"}, "download_info": {"url": "https://x/torch.whl"}}
    fake.report = json.dumps(json.loads(report_of()) | {"install": [wheel]})
    fake.answer = lambda asked: missing if asked == (ENGINE,) else None
    assert locks.read(locks.locked(ENGINE, report=silent, **place)) == (HERE, (("torch", "2.0+cpu"),))
    assert fake.calls == [
        (ENGINE,),
        ("--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu", "torch==2.0+cpu"),
        ("torch @ https://x/torch.whl", ENGINE),
    ]


def test_another_failure_is_not_retried_because_torch_was_found_before(fake: FakePip, place: Place) -> None:
    """A torch that pip only mentions on its way is not what is missing."""
    fake.answer = lambda _: "echo 'Collecting torch==2.0+cpu'; echo 'ERROR: Could not connect'; exit 1"
    with pytest.raises(ProvisionError, match="pip failed: Could not connect"):
        locks.locked(ENGINE, report=silent, **place)
    assert fake.calls == [(ENGINE,)]


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_named(
    fake: FakePip, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operating system error is a sentence, not a traceback."""
    place["locks"][1].write_text("a file")
    with pytest.raises(ProvisionError, match=r"lock file of 'engine==1\.5': cannot make .*engine-1\.5\.txt: .*exists"):
        locks.locked(ENGINE, report=silent, **place)
    place["locks"][1].unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProvisionError, match=r"no space left: \d+\.\d\d GB free for .*made and .* set TMPDIR"):
        locks.locked(ENGINE, report=silent, **place)
    assert locks.files(place["locks"]) == {}


def test_a_python_that_is_not_there_is_named(fake: FakePip, place: Place) -> None:
    """A lock file is for one Python, which must be on the machine that makes it."""
    place["python"] = "3.99"
    sentence = r"lock file of 'engine==1\.5' asks for Python 3\.99, .* no working python3\.99 is on PATH; install one"
    with pytest.raises(ProvisionError, match=sentence):
        locks.locked(ENGINE, report=silent, **place)
    assert fake.calls == []


def test_of_two_at_once_one_resolves(fake: FakePip, place: Place) -> None:
    """The second waits, says so, and returns what the first made."""
    second: list[threading.Thread] = []
    heard, paths = threading.Event(), []

    def waits(what: str, done: int, total: int) -> None:
        assert what in ("waiting for another run", "complete")
        heard.set()

    def first(what: str, done: int, total: int) -> None:
        if what == "engine" and not second:
            work = lambda: paths.append(locks.locked(ENGINE, report=waits, **place))  # noqa: E731
            second.append(threading.Thread(target=work))
            second[0].start()
            assert heard.wait(20)

    path = locks.locked(ENGINE, report=first, **place)
    second[0].join(20)
    assert paths == [path]
    assert len(fake.calls) == 1


def test_ctrl_c_ends_pip_and_its_children_and_leaves_no_lock(fake: FakePip, place: Place, tmp_path: Path) -> None:
    """An interrupt is passed on, leaves no process and no file, and the next run makes the lock file."""
    pids = tmp_path / "pids"
    fake.answer = lambda _: FOREVER.format(pids=pids)

    def report(what: str, done: int, total: int) -> None:
        if what == "tiny":  # the signal arrives while we wait for pip's next line
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            locks.locked(ENGINE, report=report, **place)
    finally:
        signal.signal(signal.SIGINT, before)
    started = [int(pid) for pid in pids.read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == 2
    assert not any(map(is_running, started))
    assert locks.files(place["locks"]) == {}
    fake.answer = lambda _: None
    assert locks.locked(ENGINE, report=silent, **place).is_file()


NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,3}([-_.][a-z]{1,3})?", fullmatch=True)
PINS = st.lists(
    st.tuples(
        NAMES | st.sampled_from(["torchvision", "TorchAudio", "torchcodec"]),
        st.from_regex(r"[0-9]\.[0-9]+", fullmatch=True),
    ),
    unique_by=lambda pin: locks.canonical(pin[0]),
)


@settings(max_examples=25, deadline=None)
@given(pins=PINS, data=st.data())
def test_a_lock_reads_back_as_what_pip_reported(pins: list[tuple[str, str]], data: st.DataObject) -> None:
    """In whatever order pip reports, the pins are sorted, and all are there but those that must not be."""
    reported = [*pins, ("engine-x", "1.5")]
    fake = FakePip(report_of(*("==".join(pin) for pin in data.draw(st.permutations(reported)))))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pip, "install", fake)
        path = locks.locked("engine-x==1.5", locks=[Path(folder)], root=Path(folder, "r"), python=HERE, report=silent)
        left = [pin for pin in reported if pin[0].lower() not in ("torchvision", "torchaudio", "torchcodec")]
        assert locks.read(path) == (HERE, tuple(sorted(left, key=lambda pin: locks.canonical(pin[0]))))
        said = path.read_text().partition("\n# without ")[2].partition(":")[0]
        assert set(said.split(", ")) - {""} == {locks.canonical(name) for name, _ in reported} - {
            locks.canonical(name) for name, _ in left
        }
