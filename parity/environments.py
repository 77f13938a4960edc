"""Builds and finds the virtual environment of each engine from its lock file.

Engines pin conflicting packages, so each engine and version gets an environment of its own, named after the content
of its lock file and reused until that changes. Knows nothing about engines: a lock file is a list of pins. Where the
packages come from is the user's pip configuration, which is never overridden, except for one documented retry.
"""

import contextlib
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

from parity.errors import ConfigError, ProvisionError

__all__ = ["Environment", "build", "find", "listing", "orphans", "remove"]

Packages = tuple[tuple[str, str], ...]
Report = Callable[[str, int, int], None]

_BUILDER = 1  # part of every digest: raise it when environments must be rebuilt although no lock file changed
_MARKER = "parity_environment.json"
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_FORBIDDEN = frozenset({"torchvision", "torchaudio", "torchcodec"})
_GRACE_S = 5.0  # pip removes its temporary folders on SIGINT; measured well below one second
_PIN = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_PYTHON = re.compile(r"#\s*python:\s*(\d+\.\d+)")
# `Processing` is what pip says of a wheel in a folder; a wheel's name has no hyphen before its version.
_STEP = re.compile(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)|Processing (?:\S*/)?([\w.]+)-")
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
    report: Report
    held: int
    """Descriptor of the directory's lock."""
    total: int
    """Steps: one per package, one for the empty environment, one for unpacking."""

    @property
    def log(self) -> Path:
        return Path(f"{self.environment.directory}.log")


def find(name: str, *, locks: Path, root: Path) -> Environment:
    """The environment of the lock file `locks/NAME.txt`.

    Raises:
        ConfigError: there is no such lock file, or it is not a list of pins.
    """
    names = [path.stem for path in _lock_files(locks)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        known = ", ".join(map(repr, near)) or "none, the folder has no lock file"
        raise ConfigError(f"environment {name!r}: no lock file {name}.txt in {locks}; nearest names: {known}")
    return _environment(locks / f"{name}.txt", root=root)


def listing(*, locks: Path, root: Path) -> tuple[Environment, ...]:
    """The environments of all lock files in a folder, by name.

    Raises:
        ConfigError: a lock file is not a list of pins.
    """
    return tuple(_environment(path, root=root) for path in _lock_files(locks))


def orphans(*, locks: Path, root: Path) -> tuple[Path, ...]:
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
        with _locked(directory, waiting=lambda: None):
            _clear(directory)
            Path(f"{directory}.log").unlink(missing_ok=True)
    except OSError as error:
        raise ProvisionError(f"environment {environment.name!r}: cannot remove {directory}: {error}") from error
    return True


def build(environment: Environment, *, report: Report) -> Environment:
    """Build an environment unless it is complete already; `report(what, done, total)` hears of every step.

    Raises:
        ProvisionError: no interpreter, no package, no space; the sentence names pip's log.
        KeyboardInterrupt: passed on once pip and its children have ended; nothing half-built is ever used.
    """
    directory, total = environment.directory, len(environment.packages) + 2
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory, waiting=lambda: report("waiting for another build", 0, total)) as held:
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
    python, packages = _read(environment.lock)
    if _digest(python, packages) != environment.digest:
        raise ProvisionError(f"environment {environment.name!r}: {environment.lock} changed meanwhile; run it again")
    building.report("creating the virtual environment", 0, building.total)
    _clear(environment.directory)
    building.log.unlink(missing_ok=True)
    interpreter, version = _interpreter(environment, python)
    # -I: modules on PYTHONPATH must neither shadow pip nor count as installed.
    command = [str(interpreter), "-I", "-m", "venv", str(environment.directory)]
    code, lines = _run(command, building, lambda _: None)
    if code:
        raise _failure(building, "creating the virtual environment", lines)
    _install(building)
    _verify(building, python)
    _write_marker(environment, version)
    building.report("complete", building.total, building.total)


def _install(building: _Building) -> None:
    seen: set[str] = set()

    def step(line: str) -> None:
        if found := _STEP.match(line):
            name = found[1] or found[2]
            seen.add(_canonical(name))
            building.report(name, min(1 + len(seen), building.total - 1), building.total)
        elif line.startswith("Installing collected packages"):
            building.report("installing", 1 + len(seen), building.total)

    torch = next((f"{n}=={v}" for n, v in building.environment.packages if n == "torch" and v.endswith("+cpu")), None)
    if torch is not None:
        _install_torch(building, torch, step)
    code, lines = _run(_pip(building.environment, "-r", str(building.environment.lock)), building, step)
    if code:
        raise _failure(building, "pip install", lines)


def _install_torch(building: _Building, torch: str, step: Callable[[str], None]) -> None:
    """Install PyTorch's CPU build, which the Python Package Index does not carry."""
    code, lines = _run(_pip(building.environment, torch), building, step)
    if code and any("No matching distribution found" in line for line in lines):
        code, lines = _run(_pip(building.environment, "--index-url", _TORCH_CPU_INDEX, torch), building, step)
        if code and not _is_out_of_space(lines):
            raise ProvisionError(
                f"environment {building.environment.name!r}: {torch} is neither where pip is configured to look nor at "
                f"{_TORCH_CPU_INDEX}; add that index as extra-index-url, or a folder with the wheel as find-links, "
                f"to pip's configuration (log: {building.log})"
            )
    if code:
        raise _failure(building, f"pip install {torch}", lines)


def _pip(environment: Environment, *arguments: str) -> list[str]:
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    return [str(environment.python), "-I", "-m", "pip", "install", *options, *arguments]


def _run(command: list[str], building: _Building, step: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run a command with its output in the log; return its exit status and its lines."""
    lines: list[str] = []
    with building.log.open("a", encoding="utf-8") as log, _start(command, building.held) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                log.write(line)
                log.flush()
                lines.append(line.rstrip())
                step(lines[-1])
            return child.wait(), lines
        except BaseException:
            _end(child)
            raise


def _start(command: list[str], held: int) -> Popen[str]:
    # A session of its own makes a group that can be ended as a whole. The child inherits the lock, so that a pip which
    # outlives us, because we were killed outright, still keeps other builders out.
    pipe = functools.partial(Popen[str], stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, errors="replace")
    return pipe(command, start_new_session=True, pass_fds=(held,))


def _end(child: Popen[str]) -> None:
    try:
        os.killpg(child.pid, signal.SIGINT)
        child.wait(timeout=_GRACE_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:  # also after a second Ctrl-C; and pip's own children may ignore SIGINT
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _failure(building: _Building, what: str, lines: list[str]) -> ProvisionError:
    environment = building.environment
    if _is_out_of_space(lines):
        return ProvisionError(_no_space(environment))
    reasons = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
    reason = reasons[-1].removeprefix("ERROR:").strip() if reasons else "no output"
    return ProvisionError(f"environment {environment.name!r}: {what} failed: {reason} (log: {building.log})")


def _is_out_of_space(lines: list[str]) -> bool:
    return any("No space left on device" in line or "Errno 28" in line for line in lines)


def _no_space(environment: Environment) -> str:
    directory, temporary = environment.directory, tempfile.gettempdir()
    free = [shutil.disk_usage(path).free / 1e9 for path in (directory.parent, temporary)]
    # The part already written is of no use, and the user needs the room to act.
    shutil.rmtree(directory, ignore_errors=True)
    return (
        f"environment {environment.name!r}: no space left: {free[0]:.2f} GB free for {directory.parent} and "
        f"{free[1]:.2f} GB for pip's temporary files in {temporary}; make room, or set TMPDIR to a larger disk"
    )


def _verify(building: _Building, python: str) -> None:
    """Check that pip installed here: options such as `target` in its configuration send packages elsewhere."""
    environment = building.environment
    site = environment.directory / "lib" / f"python{python}" / "site-packages"
    present = {_canonical(found.name) for found in importlib.metadata.distributions(path=[str(site)])}
    missing = [name for name, _ in environment.packages if _canonical(name) not in present]
    if missing:
        raise ProvisionError(
            f"environment {environment.name!r}: pip reported success, but {len(missing)} packages are not in {site}, "
            f"{missing[0]!r} first; check pip's configuration for target, prefix or root (log: {building.log})"
        )


def _interpreter(environment: Environment, wanted: str) -> tuple[Path, str]:
    """An interpreter of the wanted major.minor and its full version, preferring the one that runs us."""
    base = getattr(sys, "_base_executable", sys.executable)
    named = (shutil.which(f"python{wanted}", path=folder) for folder in os.get_exec_path())
    for candidate in (base, *named):
        if not candidate:
            continue
        probe = [candidate, "-I", "-c", "import platform; print(platform.python_version())"]
        try:  # a name on PATH may be a version manager's shim without that version behind it
            answer = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        version = answer.stdout.strip()
        if answer.returncode == 0 and version.startswith(f"{wanted}."):
            return Path(candidate), version
    raise ProvisionError(
        f"environment {environment.name!r}: its lock file asks for Python {wanted}, but this is Python "
        f"{sys.version_info.major}.{sys.version_info.minor} and no working python{wanted} is on PATH; install one"
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


@contextlib.contextmanager
def _locked(directory: Path, *, waiting: Callable[[], None]) -> Iterator[int]:
    # The file stays: were it removed, a third process could lock a new one while a second still waits for the old.
    with Path(f"{directory}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _environment(path: Path, *, root: Path) -> Environment:
    wanted, packages = _read(path)
    digest = _digest(wanted, packages)
    directory = root.absolute() / f"{path.stem}-{digest}"
    paths = {"lock": path, "directory": directory, "python": directory / "bin" / "python"}
    environment = Environment(name=path.stem, digest=digest, built=False, packages=packages, **paths)
    return replace(environment, built=_is_built(environment))


def _lock_files(locks: Path) -> list[Path]:
    return sorted(path for path in locks.glob("*.txt") if path.is_file())


def _digest(python: str, packages: Packages) -> str:
    pins = sorted(f"{_canonical(name)}=={version}" for name, version in packages)
    content = "\n".join([f"builder {_BUILDER}", f"python {python}", *pins])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[str, Packages]:
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
        name = _canonical(pin[1]) if pin else ""
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


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
