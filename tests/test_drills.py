"""Everything that interrupts a run: real worker processes and the real command, with an engine that fails on demand.

Three promises run through all of it: one sentence and never a traceback; no process left behind; no finished
completion lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from drills import (
    DRILL,
    Result,
    Suite,
    alive,
    bare_interpreter,
    counting_engine,
    finish,
    interruptible,
    lock_here,
    make_model,
    starts,
    wait_until,
    wait_until_gone,
    workers_of,
)
from parity import store
from parity.engines import EngineSpec
from parity.errors import ParityError, ProvisionError, RecordingError
from parity.prompts import Prompt, Request, SamplingParams, Workload
from parity.record import Places, Recorder
from parity.recording import Recording
from parity.session import Session, TimeLimits

GREEDY = SamplingParams.greedy(max_tokens=10, logprobs=4)
WORKLOAD = Workload(
    name="small",
    requests=tuple(Request(prompt=Prompt(id=f"p-{i:02}", text=f"prompt {i}"), sampling=GREEDY) for i in range(12)),
)


@dataclass
class Notes:
    """An observer that remembers what a person would have read."""

    said: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        assert 0 <= done <= total


@dataclass
class Bench:
    """A recorder with everything it needs in one directory."""

    root: Path
    notes: Notes = field(default_factory=Notes)
    limits: TimeLimits = field(default_factory=TimeLimits)

    @property
    def directory(self) -> Path:
        return self.root / "runs" / "run"

    def spec(self, options: Mapping[str, Any] | None = None, **changes: Any) -> EngineSpec:
        model = str(make_model(self.root / "model"))
        changes = {"python": bare_interpreter(), "options": dict(options or {}), **changes}
        return replace(EngineSpec(engine=str(DRILL), model=model, dtype="float32", options={}, env={}), **changes)

    def recorder(self, **changes: Any) -> Recorder:
        places = Places.of(self.root / "suites", self.root / "home")
        made = Recorder(directory=self.directory, places=places, observer=self.notes, limits=self.limits)
        return replace(made, **changes)

    def record(self, spec: EngineSpec, workload: Workload = WORKLOAD, **changes: Any) -> Recording:
        return self.recorder(**changes).record(spec, {"answers": workload})["answers"]

    def partial(self) -> Path:
        (found,) = self.directory.glob("partial/answers-*/completions.jsonl")
        return found

    def fails(self, spec: EngineSpec) -> str:
        """The sentence that recording ends in; nothing it started is left."""
        with pytest.raises(ParityError) as caught:
            self.record(spec)
        assert workers_of(os.getpid()) == []
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def answers(recording: Recording) -> list[dict[str, object]]:
    """Everything but the timing."""
    return [{k: v for k, v in c.to_json().items() if k != "timing"} for c in recording.completions]


# An engine that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"behaviour": "crash_on_open"},
            r"drill float32 exited with code 70 while starting; full log: '.*answers\.log'",
        ),
        (
            {"behaviour": "crash_after", "after": 5},
            r"drill float32 exited with code 70 while answering 12 requests; full log",
        ),
        (
            {"behaviour": "raise_after", "after": 5},
            r"drill float32 failed while answering 12 requests: RuntimeError: planted failure after 5 completions",
        ),
        (
            {"behaviour": "short"},
            r"drill float32 said it had finished and left 1 of 12 requests unanswered, first 'p-11'",
        ),
        ({"behaviour": "unheard of"}, r"failed while starting: the drill engine does not know the behaviour"),
    ],
)
def test_an_engine_that_fails_is_told_of_in_one_sentence(options: dict[str, Any], sentence: str, bench: Bench) -> None:
    assert re.search(sentence, bench.fails(bench.spec(options)))


def test_what_was_finished_before_each_failure_is_never_asked_again(bench: Bench) -> None:
    """The engine dies after every fifth completion: three runs answer twelve prompts, and nothing twice."""
    spec = bench.spec({"behaviour": "crash_after", "after": 5})
    assert "while answering 12 requests" in bench.fails(spec)
    assert "while answering 7 requests" in bench.fails(spec)
    resumed = bench.record(spec)
    assert resumed.resumed == 10
    assert bench.notes.said.count("answers: resuming, 10 of 12 prompts were finished by an earlier run") == 1
    whole = Bench(bench.root / "whole").record(bench.spec())
    assert whole.resumed == 0
    assert answers(resumed) == answers(whole)
    assert not (bench.directory / "partial").exists()
    assert answers(store.read(bench.directory / "answers")) == answers(whole)


@pytest.mark.parametrize(
    ("options", "doing"),
    [
        ({"behaviour": "hang_on_open"}, "while starting"),
        ({"behaviour": "hang_after", "after": 3}, "while answering 12 requests"),
    ],
)
def test_a_hanging_engine_is_ended_and_called_so(options: dict[str, Any], doing: str, bench: Bench) -> None:
    bench.limits = TimeLimits(start_s=3.0 if "after" in options else 0.5, silence_s=1.0)
    assert re.match(
        rf"drill float32 hangs: no sign of life for [\d.]+ s {doing}; it was ended", bench.fails(bench.spec(options))
    )
    if "after" in options:
        assert len(bench.partial().read_text().splitlines()) == 1 + 3


def test_an_engine_that_will_not_close_is_ended_and_its_answers_count(bench: Bench) -> None:
    (bench.root / "stubborn.py").write_text(
        f"exec(compile(open({str(DRILL)!r}).read(), {str(DRILL)!r}, 'exec'))\n"
        "DrillEngine.close = lambda self: _hang()\n"
    )
    bench.limits = TimeLimits(close_s=0.2)
    recording = bench.record(bench.spec(engine=str(bench.root / "stubborn.py")))
    assert len(recording.completions) == 12
    assert workers_of(os.getpid()) == []


def test_ctrl_c_while_an_engine_closes_leaves_no_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_ask_to_close", interrupt)
    pid_file = bench.root / "pid"
    with pytest.raises(KeyboardInterrupt):
        bench.record(bench.spec({"behaviour": "spawn_child", "pid_file": str(pid_file)}))
    assert workers_of(os.getpid()) == []
    wait_until_gone([int(pid_file.read_text())])


def test_a_child_that_the_engine_leaves_behind_is_ended_too(bench: Bench) -> None:
    pid_file = bench.root / "pid"
    bench.record(bench.spec({"behaviour": "spawn_child", "pid_file": str(pid_file)}))
    wait_until_gone([int(pid_file.read_text())])


# An engine that is not there ---------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_interpreter_that_lacks_it(bench: Bench) -> None:
    (bench.root / "needy.py").write_text("import no_such_package\n")
    said = bench.fails(bench.spec(engine=str(bench.root / "needy.py")))
    assert f"engine 'needy' cannot start: the package 'no_such_package' is missing from {bare_interpreter()}" in said


def test_a_package_that_an_adapter_imports_late_is_named_the_same_way(bench: Bench) -> None:
    (bench.root / "late.py").write_text("def open_engine(spec, model):\n    import no_such_package\n")
    said = bench.fails(bench.spec(engine=str(bench.root / "late.py")))
    assert "engine 'late' cannot start: the package 'no_such_package' is missing from" in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": "vlm"}, r"vlm float32 failed while starting: there is no engine adapter 'vlm' in parity\.engines"),
        ({"engine": "/nowhere/x.py"}, r"the engine file '/nowhere/x\.py' does not exist where the engine runs"),
        (
            {"python": "/nowhere/python"},
            r"drill float32 cannot be started: '/nowhere/python': no such file or directory; check the target's python",
        ),
        ({"python": "/"}, r"drill float32 cannot be started: '/': permission denied; check"),
        ({"python": "/bin/true"}, r"drill float32 exited with code 0 while starting"),
        ({"launcher": ("sh", "-c", "kill -9 $$")}, r"drill float32 was killed by SIGKILL while starting"),
        ({"launcher": ("sh", "-c", "kill -35 $$")}, r"drill float32 was killed by signal 35 while starting"),
        (
            {"launcher": ("env",), "model": "/nowhere/model"},
            r"the model directory '/nowhere/model' does not exist where the engine runs",
        ),
        (
            {"launcher": ("sh", "-c", 'echo hello; exec "$@"', "sh")},
            r"a line on its protocol stream is not protocol \('hello'\); if a launcher prints a banner, silence it",
        ),
    ],
)
def test_an_engine_that_cannot_be_started_is_told_of_in_one_sentence(
    changes: dict[str, Any], sentence: str, bench: Bench
) -> None:
    assert re.search(sentence, bench.fails(bench.spec(**changes)))


def test_a_launcher_that_keeps_quiet_changes_nothing(bench: Bench) -> None:
    launched = bench.record(bench.spec(launcher=("env", "A=1")))
    plain = Bench(bench.root / "plain").record(bench.spec())
    assert answers(launched) == answers(plain)


@pytest.mark.parametrize("model", ["", "empty"])
def test_a_model_that_is_not_there_is_told_of_before_anything_starts(model: str, bench: Bench) -> None:
    (bench.root / "empty").mkdir()
    path = bench.root / (model or "nowhere")
    with pytest.raises(ProvisionError, match=r"model directory '.*' (does not exist|holds no config\.json)"):
        bench.record(bench.spec(model=str(path)))
    assert not bench.directory.exists()


def test_an_adapter_may_be_written_with_dataclasses(bench: Bench) -> None:
    """Dataclasses with deferred annotations look their module up by name."""
    path = bench.root / "modern.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import KW_ONLY, dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass\n"
        "class Settings:\n"
        "    kind: ClassVar[str] = 'x'\n"
        "    _: KW_ONLY\n"
        "    size: int = 1\n"
        f"exec(compile(open({str(DRILL)!r}).read(), {str(DRILL)!r}, 'exec'))\n"
    )
    assert len(bench.record(bench.spec(engine=str(path))).completions) == 12


# Garbage -----------------------------------------------------------------------------------------------------------


def test_what_an_engine_prints_changes_nothing(bench: Bench) -> None:
    noisy = bench.record(bench.spec({"behaviour": "garbage"}))
    quiet = Bench(bench.root / "quiet").record(bench.spec())
    assert answers(noisy) == answers(quiet)
    (log,) = (bench.directory / "logs").glob("*.log")
    assert b"garbage while closing" in log.read_bytes()


# Interruptions of the command --------------------------------------------------------------------------------------


SLOW = {"delay_s": 0.1}


@contextlib.contextmanager
def recording_underway(suite: Suite, *, finished: int = 2) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command in the middle of its reference, and its worker."""
    process = suite.start("record", **interruptible())
    try:
        wait_until(lambda: suite.finished() >= finished or process.poll() is not None, "the middle of the recording")
        (worker,) = workers_of(process.pid)
        yield process, worker
    finally:
        process.kill()
        process.communicate()


def resume(suite: Suite, kept: int) -> None:
    """A second run answers only the rest, says so, and seals what an uninterrupted run would have sealed."""
    done = suite.command("record")
    assert (done.code, done.err.count("Traceback")) == (0, 0)
    found = re.search(r"reference: resuming, (\d+) of 12 prompts were finished by an earlier run", done.err)
    assert found is not None
    assert int(found[1]) >= kept
    reference = store.read(suite.run / "reference")
    assert reference.resumed == int(found[1])
    # The candidate is the same engine without delays, and was never interrupted.
    candidate = store.read(suite.run / "candidate")
    assert candidate.resumed == 0
    assert [(c.id, c.token_ids) for c in reference.completions] == [(c.id, c.token_ids) for c in candidate.completions]


def test_a_worker_killed_in_the_middle_is_named_and_the_next_run_resumes(suite: Suite) -> None:
    suite.write(reference=SLOW)
    with recording_underway(suite) as (process, worker):
        os.kill(worker, signal.SIGKILL)
        ended = finish(process)
    assert ended.code == 2
    assert ended.sentence.startswith("drill float32 was killed by SIGKILL while answering 12 requests; full log: ")
    kept = suite.finished()
    assert 2 <= kept < 12
    resume(suite, kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process_keeps_what_is_finished_and_resumes(number: signal.Signals, suite: Suite) -> None:
    pid_file = suite.root / "pid"
    suite.write(reference={**SLOW, "behaviour": "spawn_child", "pid_file": str(pid_file)})
    with recording_underway(suite) as (process, worker):
        child = int(pid_file.read_text())
        assert alive(child)
        os.killpg(process.pid, number)
        ended = finish(process)
    wait_until_gone([worker, child])
    assert ended.code == 130
    assert ended.sentence.startswith("interrupted; engines are ended, finished completions are kept")
    kept = suite.finished()
    assert 2 <= kept < 12
    if number == signal.SIGINT:
        resume(suite, kept)
        wait_until_gone([int(pid_file.read_text())])


def test_when_the_command_itself_is_killed_its_engine_ends_by_itself(suite: Suite) -> None:
    pid_file = suite.root / "pid"
    suite.write(reference={**SLOW, "behaviour": "spawn_child", "pid_file": str(pid_file)})
    with recording_underway(suite) as (process, worker):
        child = int(pid_file.read_text())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_gone([worker, child])
    assert 2 <= suite.finished() < 12


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "nowhere"}, "model directory '.*nowhere' does not exist; give a directory"),
        ({"engine": "nowhere.py"}, "the engine file '.*nowhere.py' does not exist"),
    ],
)
def test_what_is_missing_is_told_of_in_one_sentence_and_exit_code_2(
    changes: dict[str, str], sentence: str, suite: Suite
) -> None:
    suite.write(prompts=1)
    targets = suite.root / "suites" / "targets.toml"
    text = targets.read_text()
    for key, value in changes.items():
        if f'"{key}" = ' in text:
            text = re.sub(rf'"{key}" = "[^"]*"', f'"{key}" = "{value}"', text)
        else:
            text = text.replace('"dtype"', f'"{key}" = "{value}", "dtype"')
    targets.write_text(text)
    ended = suite.command("record")
    assert ended.code == 2
    assert re.search(sentence, ended.sentence)


# A full disk -------------------------------------------------------------------------------------------------------


def record_on_small_disk(suite: Suite, mount: Path) -> tuple[Result, Result]:
    """`parity record` onto a disk of 12 KiB, then again on the same disk of 4 MiB."""
    record = f"{sys.executable} -m parity record --output disk/run/drill"
    script = (
        "mount -t tmpfs -o size=12k tmpfs disk || exit 99; "
        f"{record}; echo $? > first; cp -r disk/run kept; echo ---- >&2; "
        f"mount -o remount,size=4m disk; {record}; code=$?; cp -r disk/run done; exit $code"
    )
    ended = finish(
        subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script],
            cwd=suite.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    first, _, second = ended.err.partition("----\n")
    return Result(int((suite.root / "first").read_text()), "", first), Result(ended.code, ended.out, second)


def record_under_a_file_size_limit(suite: Suite) -> tuple[Result, Result]:
    """Where no disk may be mounted: no file may grow over 12,000 bytes, then any may."""
    arguments = ("record", "--output", "done/drill")
    limited = [sys.executable, "-c", _LIMITED, "12000", sys.executable, "-m", "parity", *arguments]
    process = subprocess.Popen(limited, cwd=suite.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = finish(process)
    return first, suite.command(*arguments)


_LIMITED = (
    "import os, resource, sys\n"
    "size = int(sys.argv[1])\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


def can_mount(directory: Path) -> bool:
    try:
        probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(directory)]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def test_a_full_disk_is_named_with_its_room_and_with_more_room_the_run_resumes(suite: Suite) -> None:
    suite.write(prompts=20)
    disk = suite.root / "disk"
    disk.mkdir()
    if can_mount(disk):
        first, second = record_on_small_disk(suite, disk)
        reason = "no space left on device"
    else:
        first, second = record_under_a_file_size_limit(suite)
        reason = "file too large"
    assert first.code == 2
    assert re.match(
        rf"cannot write '.*/partial/reference-\w+': {reason} \(\d+ MiB free there\); free some space", first.sentence
    )
    assert second.code == 0
    resumed = re.search(r"reference: resuming, (\d+) of 20 prompts", second.err)
    assert resumed is not None
    assert 0 < int(resumed[1]) < 20
    reference, candidate = (store.read(suite.root / "done" / "drill" / n) for n in ("reference", "candidate"))
    assert reference.resumed == int(resumed[1])
    assert answers(reference) == answers(candidate)


def test_a_directory_that_cannot_be_made_is_named(bench: Bench) -> None:
    bench.root.joinpath("runs").write_text("a file where a directory should be")
    with pytest.raises((RecordingError, OSError), match="runs"):
        bench.record(bench.spec())


# Partial files -----------------------------------------------------------------------------------------------------


def interrupted(bench: Bench) -> EngineSpec:
    """Five of twelve prompts are finished; the engine fails after every fifth."""
    spec = bench.spec({"behaviour": "raise_after", "after": 5})
    bench.fails(spec)
    return spec


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, EngineSpec]:
    """An interrupted run, to be copied."""
    bench = Bench(tmp_path_factory.mktemp("stopped"))
    return bench, interrupted(bench)


def asked_next(bench: Bench, spec: EngineSpec) -> int:
    """How many requests the next run sends; it ends in the same failure."""
    found = re.search(r"while answering (\d+) requests", bench.fails(spec))
    assert found is not None
    return int(found[1])


def test_a_last_line_cut_short_is_asked_again_and_the_rest_is_kept(bench: Bench) -> None:
    spec = interrupted(bench)
    path = bench.partial()
    path.write_bytes(path.read_bytes()[:-30])
    assert asked_next(bench, spec) == 12 - 4
    resumed = bench.record(spec)
    assert resumed.resumed == 4 + 5
    assert answers(resumed) == answers(Bench(bench.root / "whole").record(bench.spec()))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda t: t.replace('"identity": {', '"identity": {"tokenizer.other": 1, ', 1), id="model"),
        pytest.param(lambda t: t.replace('"packages": {', '"packages": {"engine": "2", ', 1), id="packages"),
        pytest.param(lambda t: "{" + t, id="damaged header"),
        pytest.param(lambda t: t.replace('"token_ids"', '"token_idz"', 2), id="damaged line"),
        pytest.param(lambda t: t[:40], id="cut header"),
        pytest.param(lambda t: "", id="empty"),
        pytest.param(lambda t: "\x00" * 100, id="zeros after a power cut"),
    ],
)
def test_answers_that_cannot_be_joined_with_new_ones_are_set_aside_and_kept(
    edit: Any, stopped: tuple[Bench, EngineSpec], tmp_path: Path
) -> None:
    bench, spec = Bench(tmp_path), stopped[1]
    shutil.copytree(stopped[0].directory, bench.directory)
    path = bench.partial()
    edited = edit(path.read_text())
    assert edited != path.read_text()
    path.write_text(edited)
    assert asked_next(bench, spec) == 12
    (kept,) = bench.directory.glob("partial/previous/*/completions.jsonl")
    assert kept.read_text() == edited


def test_another_models_content_starts_a_recording_of_its_own(bench: Bench) -> None:
    spec = interrupted(bench)
    Path(spec.model, "model.safetensors").write_bytes(b"other weights")
    assert asked_next(bench, spec) == 12
    assert len(list(bench.directory.glob("partial/answers-*"))) == 2


# One engine, once --------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench with an environment "here" that is built and leads to this interpreter."""
    lock_here(monkeypatch)
    return bench


def here(bench: Bench, options: Mapping[str, Any] | None = None) -> EngineSpec:
    return bench.spec(options, engine=str(bench.root / "counting.py"), environment="here")


def test_two_workloads_start_the_engine_once(bench: Bench) -> None:
    spec = bench.spec(engine=str(counting_engine(bench.root)))
    half = Workload(name="half", requests=WORKLOAD.requests[:6])
    made = bench.recorder().record(spec, {"whole": WORKLOAD, "half": half})
    assert [(name, len(r.completions)) for name, r in made.items()] == [("whole", 12), ("half", 6)]
    assert starts(bench.root) == 1


def test_the_same_question_to_the_same_locked_engine_is_asked_once(locked: Bench) -> None:
    counting_engine(locked.root)
    first = locked.record(here(locked))
    again = locked.record(here(locked))
    assert (starts(locked.root), again.digest) == (1, first.digest)
    assert f"answers: counting 1 float32, already recorded {first.created_at}; nothing to run" in locked.notes.said


def test_an_engine_that_is_not_locked_is_asked_again_and_the_old_answers_are_kept(bench: Bench) -> None:
    spec = bench.spec(engine=str(counting_engine(bench.root)))
    first = bench.record(spec)
    bench.record(spec)
    assert starts(bench.root) == 2
    assert store.read(bench.directory / "previous" / "answers-1").digest == first.digest


def test_fresh_and_other_options_ask_again_and_keep_the_old_answers(locked: Bench) -> None:
    counting_engine(locked.root)
    first = locked.record(here(locked))
    locked.record(here(locked), fresh=True)
    locked.record(here(locked, {"salt": "other"}))
    assert starts(locked.root) == 3
    assert store.read(locked.directory / "previous" / "answers-1").digest == first.digest
    assert (locked.directory / "previous" / "answers-2" / store.HEADER).is_file()


def change_model(bench: Bench) -> EngineSpec:
    (bench.root / "model" / "weights.bin").write_bytes(b"1")
    return here(bench)


def change_adapter(bench: Bench) -> EngineSpec:
    path = bench.root / "counting.py"
    path.write_text(path.read_text() + "# edited\n")
    return here(bench)


@pytest.mark.parametrize("change", [change_model, change_adapter])
def test_what_changes_the_engine_makes_a_new_recording(change: Any, locked: Bench) -> None:
    counting_engine(locked.root)
    locked.record(here(locked))
    locked.record(change(locked))
    assert starts(locked.root) == 2


def test_another_question_is_asked(locked: Bench) -> None:
    counting_engine(locked.root)
    first = Workload(name="first", requests=WORKLOAD.requests[:3])
    locked.record(here(locked), first)
    locked.record(here(locked), Workload(name="fewer", requests=first.requests[:2]))
    locked.record(here(locked), first.with_prompt_token_ids({r.id: (1, 2) for r in first.requests}))
    assert starts(locked.root) == 3


def test_an_equal_recording_of_another_target_is_copied(locked: Bench) -> None:
    counting_engine(locked.root)
    first = locked.record(here(locked))
    other = locked.directory.with_name("other")
    again = locked.record(here(locked), directory=other)
    assert (starts(locked.root), again.digest) == (1, first.digest)
    assert store.read(other / "answers").digest == first.digest
    assert sorted(p.name for p in other.iterdir()) == ["answers"]


def test_a_damaged_recording_is_not_reused(locked: Bench) -> None:
    counting_engine(locked.root)
    locked.record(here(locked))
    (locked.directory / "answers" / store.TOKENS).write_text("")
    again = locked.record(here(locked))
    assert starts(locked.root) == 2
    assert json.loads((locked.directory / "answers" / store.HEADER).read_text())["digest"] == again.digest
