"""Builds and finds the virtual environment of each engine from its lock file.

Engines pin conflicting packages, so each engine and version gets an environment of its own, named after the content
of its lock file and reused until that changes. Knows nothing about engines: a lock file is a list of pins.
"""

import difflib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from parity import pip
from parity.errors import ConfigError, ProvisionError
from parity.locks import Packages, canonical, files, read

__all__ = ["Environment", "build", "find", "listing", "orphans", "remove"]

_BUILDER = 1  # part of every digest: raise it when environments must be rebuilt although no lock file changed
_MARKER = "parity_environment.json"
_DIRECTORY = re.compile(r".+-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One lock file and the virtual environment that belongs to its present content."""

    name: str
    """The lock file's name without `.txt`."""
    lock: Path
    """The lock file."""
    digest: str
    """16 hex digits over the pins, the Python version and the builder version."""
    directory: Path
    """Where the environment is, or will be once built."""
    python: Path
    """The environment's interpreter."""
    built: bool
    """Whether the environment was complete when this value was made."""
    packages: Packages
    """Name and version of every pinned package, sorted by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Building:
    environment: Environment
    report: pip.Report
    held: int
    """Descriptor of the directory's lock."""
    total: int
    """Steps: one per package, one for the empty environment, one for unpacking."""

    @property
    def log(self) -> Path:
        return Path(f"{self.environment.directory}.log")

    def run(self, command: list[str], heard: Callable[[str], None]) -> tuple[int, list[str]]:
        return pip.run(command, log=self.log, held=self.held, heard=heard)


def find(name: str, *, locks: Sequence[Path], root: Path) -> Environment:
    """The environment of the lock file `NAME.txt` in the first of the folders `locks` that has one.

    Raises:
        ConfigError: there is no such lock file, or it is not a list of pins.
    """
    found = files(locks)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3, cutoff=0.4) or found
        known = ", ".join(map(repr, near)) or "none, there is no lock file"
        where = " or ".join(map(str, locks))
        raise ConfigError(f"environment {name!r}: no lock file {name}.txt in {where}; nearest names: {known}")
    return _environment(found[name], root=root)


def listing(*, locks: Sequence[Path], root: Path) -> tuple[Environment, ...]:
    """The environments of all lock files in the folders `locks`, by name.

    Raises:
        ConfigError: a lock file is not a list of pins.
    """
    return tuple(_environment(path, root=root) for path in files(locks).values())


def orphans(*, locks: Sequence[Path], root: Path) -> tuple[Path, ...]:
    """The directories in `root` that were built for lock files which have since changed or gone.

    Raises:
        ConfigError: a lock file is not a list of pins, so that its directory cannot be told from an orphan.
    """
    current = {environment.directory for environment in listing(locks=locks, root=root)}
    present = sorted(root.absolute().iterdir()) if root.is_dir() else []
    return tuple(p for p in present if p.is_dir() and _DIRECTORY.fullmatch(p.name) and p not in current)


def remove(environment: Environment) -> bool:
    """Remove an environment and its log; true if there was one, complete or not.

    Raises:
        ProvisionError: the directory could not be removed.
    """
    directory = environment.directory
    if not directory.is_dir():
        return False
    try:
        with pip.alone(directory, waiting=lambda: None):
            _clear(directory)
            Path(f"{directory}.log").unlink(missing_ok=True)
    except OSError as error:
        raise ProvisionError(f"environment {environment.name!r}: cannot remove {directory}: {error}") from error
    return True


def build(environment: Environment, *, report: pip.Report) -> Environment:
    """Build an environment unless it is complete already; `report(what, done, total)` hears of every step.

    Raises:
        ProvisionError: no interpreter, no package, no space; the sentence names pip's log.
        KeyboardInterrupt: passed on once pip and its children have ended; nothing half-built is ever used.
    """
    directory, total = environment.directory, len(environment.packages) + 2
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with pip.alone(directory, waiting=lambda: report("waiting for another build", 0, total)) as held:
            if not _is_built(environment):
                _build(_Building(environment=environment, report=report, held=held, total=total))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ProvisionError(_no_space(environment)) from error
        raise ProvisionError(f"environment {environment.name!r}: cannot build {directory}: {error}") from error
    return replace(environment, built=True)


def _build(building: _Building) -> None:
    environment = building.environment
    # The lock file may have been edited since `find`; its content would then not be what the directory's name says.
    python, packages = read(environment.lock)
    if _digest(python, packages) != environment.digest:
        raise ProvisionError(f"environment {environment.name!r}: {environment.lock} changed meanwhile; run it again")
    building.report("creating the virtual environment", 0, building.total)
    _clear(environment.directory)
    building.log.unlink(missing_ok=True)
    interpreter, version = pip.interpreter(python, what=f"environment {environment.name!r}: its lock file")
    code, lines = building.run(pip.venv(interpreter, environment.directory), lambda _: None)
    if code:
        raise _failure(building, "creating the virtual environment", lines)
    _install(building)
    _verify(building, python)
    _write_marker(environment, version)
    building.report("complete", building.total, building.total)


def _install(building: _Building) -> None:
    seen: set[str] = set()

    def heard(line: str) -> None:
        if name := pip.step(line):
            seen.add(canonical(name))
            building.report(name, min(1 + len(seen), building.total - 1), building.total)
        elif line.startswith("Installing collected packages"):
            building.report("installing", 1 + len(seen), building.total)

    torch = next((f"{n}=={v}" for n, v in building.environment.packages if n == "torch" and v.endswith("+cpu")), None)
    if torch is not None:
        _install_torch(building, torch, heard)
    code, lines = building.run(_pip(building.environment, "-r", str(building.environment.lock)), heard)
    if code:
        raise _failure(building, "pip install", lines)


def _install_torch(building: _Building, torch: str, heard: Callable[[str], None]) -> None:
    """Install PyTorch's CPU build, which the Python Package Index does not carry."""
    code, lines = building.run(_pip(building.environment, torch), heard)
    if code and pip.missing_torch(lines):
        code, lines = building.run(_pip(building.environment, "--index-url", pip.TORCH_CPU_INDEX, torch), heard)
        if code and not pip.is_out_of_space(lines):
            name = building.environment.name
            raise ProvisionError(f"environment {name!r}: {pip.no_torch(torch)} (log: {building.log})")
    if code:
        raise _failure(building, f"pip install {torch}", lines)


def _pip(environment: Environment, *arguments: str) -> list[str]:
    return pip.install(environment.python, "--no-deps", *arguments)


def _failure(building: _Building, what: str, lines: list[str]) -> ProvisionError:
    environment = building.environment
    if pip.is_out_of_space(lines):
        return ProvisionError(_no_space(environment))
    reasons = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
    reason = reasons[-1].removeprefix("ERROR:").strip() if reasons else "no output"
    return ProvisionError(f"environment {environment.name!r}: {what} failed: {reason} (log: {building.log})")


def _no_space(environment: Environment) -> str:
    sentence = pip.no_space(environment.directory.parent)
    # The part already written is of no use, and the user needs the room to act.
    shutil.rmtree(environment.directory, ignore_errors=True)
    return f"environment {environment.name!r}: {sentence}"


def _verify(building: _Building, python: str) -> None:
    """Check that pip installed here: options such as `target` in its configuration send packages elsewhere."""
    environment = building.environment
    site = environment.directory / "lib" / f"python{python}" / "site-packages"
    present = {canonical(found.name) for found in importlib.metadata.distributions(path=[str(site)])}
    missing = [name for name, _ in environment.packages if canonical(name) not in present]
    if missing:
        raise ProvisionError(
            f"environment {environment.name!r}: pip reported success, but {len(missing)} packages are not in {site}, "
            f"{missing[0]!r} first; check pip's configuration for target, prefix or root (log: {building.log})"
        )


def _write_marker(environment: Environment, version: str) -> None:
    facts = {"name": environment.name, "digest": environment.digest, "python": version}
    details = {"packages": dict(environment.packages), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    temporary = environment.directory / f"{_MARKER}.new"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(facts | details, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(environment.directory / _MARKER)


def _is_built(environment: Environment) -> bool:
    try:
        facts = json.loads((environment.directory / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The interpreter is a link into the system's Python, which may have been removed since.
    return isinstance(facts, dict) and facts.get("digest") == environment.digest and environment.python.exists()


def _clear(directory: Path) -> None:
    (directory / _MARKER).unlink(missing_ok=True)  # first: a removal cut short must not leave what looks complete
    if directory.exists():
        shutil.rmtree(directory)


def _environment(path: Path, *, root: Path) -> Environment:
    wanted, packages = read(path)
    digest = _digest(wanted, packages)
    directory = root.absolute() / f"{path.stem}-{digest}"
    paths = {"lock": path, "directory": directory, "python": directory / "bin" / "python"}
    environment = Environment(name=path.stem, digest=digest, built=False, packages=packages, **paths)
    return replace(environment, built=_is_built(environment))


def _digest(python: str, packages: Packages) -> str:
    pins = sorted(f"{canonical(name)}=={version}" for name, version in packages)
    content = "\n".join([f"builder {_BUILDER}", f"python {python}", *pins])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
