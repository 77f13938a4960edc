"""A suites folder whose engines are drills, and the `parity` command run on it as a person would run it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parity import environments
from parity.environments import Environment

DRILL = Path(__file__).parent / "faults" / "engines" / "drill.py"
PATIENCE_S = 30.0
"""How long a test waits for what must happen; only a failure waits so long."""


@functools.cache
def bare_interpreter() -> str:
    """An interpreter with no package at all, as an engine's may lack all of ours; it also starts fast."""
    directory = tempfile.mkdtemp(prefix="parity-bare-")
    atexit.register(shutil.rmtree, directory)
    venv.create(directory, symlinks=True)
    return f"{directory}/bin/python"


def make_model(directory: Path) -> Path:
    """All that a drill needs of a model."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text('{"model_type": "drill"}')
    return directory


def counting_engine(directory: Path) -> Path:
    """A drill that writes a line to `directory/starts` each time it is started."""
    path = directory / "counting.py"
    path.write_text(
        "from pathlib import Path\n"
        f"exec(compile(Path({str(DRILL)!r}).read_text(), {str(DRILL)!r}, 'exec'))\n"
        "_open = open_engine\n"
        "def open_engine(spec, model):\n"
        f"    with open({str(directory / 'starts')!r}, 'a') as file:\n"
        "        file.write('started\\n')\n"
        "    return _open(spec, model)\n"
    )
    return path


def lock_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment "here" that is built and leads to a bare interpreter, so that an equal recording is used again."""

    def find(name: str, *, locks: Sequence[Path], root: Path) -> Environment:
        assert name == "here"
        return Environment(
            name=name,
            lock=locks[0] / "here.txt",
            digest="0123456789abcdef",
            directory=root / "here",
            python=Path(bare_interpreter()),
            built=True,
            packages=(),
        )

    monkeypatch.setattr(environments, "find", find)


def starts(directory: Path) -> int:
    """How often the counting engine of `directory` was started."""
    path = directory / "starts"
    return path.read_text().count("started") if path.exists() else 0


@dataclass(frozen=True)
class Suite:
    """A working directory with suites/targets.toml, a model and a prompt set."""

    root: Path

    @property
    def run(self) -> Path:
        """Where the command records the target."""
        return self.root / ".parity" / "recordings" / "drill"

    def write(
        self,
        *,
        prompts: int = 12,
        reference: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
        limits: Mapping[str, Mapping[str, object]] | None = None,
        engine: Path = DRILL,
        target: Mapping[str, object] | None = None,
        **keys: object,
    ) -> Suite:
        """`reference` and `candidate` are options of the drill engine; `target` and `keys` go into
        the target's and the candidate's table.
        """
        suites = self.root / "suites"
        suites.mkdir(parents=True, exist_ok=True)
        make_model(suites / "model")
        lines = [json.dumps({"id": f"p-{i:02}", "text": f"prompt number {i} says"}) for i in range(prompts)]
        (suites / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
        side = {"engine": str(engine), "dtype": "float32", "python": bare_interpreter()}
        table = {
            "description": "drill against drill",
            "model": "model",
            "workload": "small",
            "reference": {**side, "options": dict(reference or {})},
            "candidate": {**side, "options": dict(candidate or {}), **keys},
            "limits": dict(limits or {}),
            **(target or {}),
        }
        workload = {"prompts": ["prompts.jsonl"], "max_tokens": 10, "logprobs": 4}
        text = f"default = 'drill'\nworkloads.small = {inline(workload)}\ntargets.drill = {inline(table)}\n"
        (suites / "targets.toml").write_text(text)
        return self

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """The command, not waited for."""
        return subprocess.Popen(
            [sys.executable, "-m", "parity", *arguments],
            cwd=self.root,
            env={**os.environ, "TMPDIR": str(self.root)},  # what a killed command cannot tidy up
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def command(self, *arguments: str, **options: Any) -> Result:
        """The command, run to its end."""
        return finish(self.start(*arguments, **options))

    def finished(self) -> int:
        """Completions that are safe on disk in unfinished recordings."""
        return sum(path.read_bytes().count(b"\n") - 1 for path in self.run.glob("partial/*/completions.jsonl"))


def interruptible() -> dict[str, Any]:
    """A terminal's process group, with Ctrl-C not ignored as in a shell's background job."""
    return {
        "start_new_session": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    }


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last line on standard error: what a person is told. No traceback ever comes with it."""
        assert "Traceback" not in self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("parity: ")
        return last.removeprefix("parity: ")


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a command."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(process.returncode, out, err)


def inline(value: object) -> str:
    """A value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def wait_until(happened: Callable[[], object], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


def workers_of(host: int) -> list[int]:
    """The worker processes that a host has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == host and b"parity.worker" in command:
            found.append(int(path.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: Iterable[int]) -> None:
    """Wait for processes to end; ends them itself where they do not, so that a failed test leaves nothing behind."""
    remaining = list(pids)
    try:
        wait_until(lambda: not any(map(alive, remaining)), f"the end of {remaining}")
    finally:
        for pid in filter(alive, remaining):
            os.kill(pid, signal.SIGKILL)
