"""Runs pip as the user configured it: one run at a time, in a process group of its own, with its output in a log.

Where packages come from is the user's pip configuration, which is never overridden; PyTorch's CPU build is the one
exception, and the index that has it is asked only after the configured ones.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

from parity.errors import ProvisionError

__all__ = [
    "TORCH_CPU_INDEX",
    "Report",
    "alone",
    "install",
    "interpreter",
    "is_out_of_space",
    "missing_torch",
    "no_space",
    "no_torch",
    "run",
    "step",
    "venv",
]

Report = Callable[[str, int, int], None]
"""What is being done, how many of how many steps are done."""

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_TORCH_CPU = re.compile(r"\btorch==[\w.]+\+cpu[\w.]*")
_GRACE_S = 5.0  # pip removes its temporary folders on SIGINT; measured well below one second
# `Processing` is what pip says of a wheel in a folder; a wheel's name has no hyphen before its version.
_STEP = re.compile(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)|Processing (?:\S*/)?([\w.]+)-")


def venv(python: Path, directory: Path) -> list[str]:
    """The command that makes an empty virtual environment with pip."""
    return [str(python), "-I", "-m", "venv", str(directory)]


def install(python: Path, *arguments: str) -> list[str]:
    """The command `pip install` of the environment that `python` belongs to."""
    # -I: modules on PYTHONPATH must neither shadow pip nor count as installed.
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    return [str(python), "-I", "-m", "pip", "install", *options, *arguments]


def run(command: list[str], *, log: Path, held: int, heard: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run a command with its output added to the log; return its exit status and its lines, each `heard` as it comes.

    held: the descriptor of the lock under which this runs.

    Raises:
        KeyboardInterrupt: passed on once the command and its children have ended.
    """
    lines: list[str] = []
    with log.open("a", encoding="utf-8") as file, _start(command, held) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                file.write(line)
                file.flush()
                lines.append(line.rstrip())
                heard(lines[-1])
            return child.wait(), lines
        except BaseException:
            _end(child)
            raise


def _start(command: list[str], held: int) -> Popen[str]:
    # A session of its own makes a group that can be ended as a whole. The child inherits the lock, so that a pip which
    # outlives us, because we were killed outright, still keeps others out.
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


@contextlib.contextmanager
def alone(path: Path, *, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold the lock `path`.lock, over all processes; yields its descriptor. `waiting` is called if another holds it."""
    # The file stays: were it removed, a third process could lock a new one while a second still waits for the old.
    with Path(f"{path}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def step(line: str) -> str | None:
    """The package that a line of pip's output says it turns to, if it does."""
    found = _STEP.match(line)
    return (found[1] or found[2]) if found else None


def interpreter(wanted: str, *, what: str) -> tuple[Path, str]:
    """A working interpreter of the wanted major.minor and its full version, preferring the one that runs us.

    Raises:
        ProvisionError: there is none; `what` asks for it.
    """
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
        f"{what} asks for Python {wanted}, but this is Python {sys.version_info.major}.{sys.version_info.minor} and no "
        f"working python{wanted} is on PATH; install one"
    )


def is_out_of_space(lines: list[str]) -> bool:
    """Whether pip's output says that a disk is full."""
    return any("No space left on device" in line or "Errno 28" in line for line in lines)


def no_space(folder: Path) -> str:
    """The sentence on a full disk: how much is free where we write and where pip does."""
    temporary = tempfile.gettempdir()
    free = [shutil.disk_usage(path).free / 1e9 for path in (folder, temporary)]
    return (
        f"no space left: {free[0]:.2f} GB free for {folder} and {free[1]:.2f} GB for pip's temporary files in "
        f"{temporary}; make room, or set TMPDIR to a larger disk"
    )


def missing_torch(lines: list[str]) -> str | None:
    """The CPU build of PyTorch, such as `torch==2.13.0+cpu`, if pip's errors are about it."""
    # Not only "No matching distribution": where the configuration constrains torch, a missing one is called a conflict.
    first = next((number for number, line in enumerate(lines) if line.startswith("ERROR:")), len(lines))
    found = _TORCH_CPU.search("\n".join(lines[first:]))
    return found[0] if found else None


def no_torch(torch: str) -> str:
    """The sentence on a CPU build of PyTorch that is nowhere."""
    return (
        f"pip can take {torch} neither from where it is configured to look nor from {TORCH_CPU_INDEX}; add that index "
        "as extra-index-url, or a folder with the wheel as find-links, to its configuration, and check its constraints"
    )
