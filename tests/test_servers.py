"""Servers: any command on a free port, awaited until it answers, and never a process left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mock_server import command, serving
from parity import guardian, servers
from parity.errors import ConfigError, EngineError
from parity.guardian import CappedLog
from parity.host import Gpus, look
from parity.servers import ServerCommand, ServerLimits, running, started
from parity.service_load import Limits, drive
from parity.timings import Failure
from parity.traffic import Fixed, Lengths, OpenLoop, Plan, Profile, Slo, plan

MARK = "PARITY_TEST"
LIMITS = ServerLimits(start_s=20.0, end_s=3.0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "server.log"


@pytest.fixture(autouse=True)
def no_orphans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, nothing that it started may live on."""
    monkeypatch.setenv(MARK, f"{os.getpid()}-{time.monotonic_ns()}")
    yield
    deadline = time.monotonic() + 5.0
    while (left := living()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == {}


def living() -> dict[int, str]:
    """Processes that this test started, whoever their parent is by now, and their command lines."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_text()
    return found


def mocked(**knobs: Any) -> ServerCommand:
    return ServerCommand(name="the mock", argv=tuple(command(**knobs)), model="unused")


def planned(rate_per_s: float, requests: int) -> Plan:
    four = Lengths(shape=Fixed(tokens=4), least=1, most=4)
    profile = Profile(
        name="test",
        description="",
        arrivals=OpenLoop(rate_per_s=rate_per_s),
        prompt_tokens=four,
        output_tokens=four,
        requests=requests,
        warmup=0,
        slo=Slo(),
        gated=(),
    )
    return plan(profile, seed=1, vocabulary=range(100, 999), max_positions=64)


# A good server --------------------------------------------------------------------------------------------------------


def test_a_server_is_ready_once_it_answers_and_gone_afterwards_with_all_its_children(log: Path) -> None:
    with started(mocked(model="the-model", children=2), log=log, limits=ServerLimits(end_s=0.5)) as server:
        assert server.model == "the-model"
        assert server.start_up_s is not None
        assert 0.05 < server.start_up_s < 20.0
        # Two children, the server itself, its guardian; the children are in sessions of their own.
        assert len(living()) >= 4
        sample = server.sample(1.5)
        assert sample.at_s == 1.5
        assert sample.engine_bytes is not None
        assert 20 << 20 < sample.engine_bytes < 2 << 30
        run = drive(planned(100.0, 10), url=server.url, model=server.model, sample=server.sample)
        assert [request.failure for request in run.requests] == [None] * 10
        assert run.host[0].engine_bytes
        began = time.monotonic()
    assert time.monotonic() - began < 8.0
    assert server.facts["server.name"] == "the mock"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))


def test_a_deaf_server_is_killed_and_one_without_a_health_page_is_awaited_all_the_same(log: Path) -> None:
    with started(mocked(deaf=True, health=False), log=log, limits=ServerLimits(start_s=20.0, end_s=0.2)):
        began = time.monotonic()
    assert 0.15 < time.monotonic() - began < 8.0


def test_a_key_is_sent_to_the_server_and_hidden_from_its_facts(log: Path) -> None:
    asked = mocked(key="s3cret")
    asked = ServerCommand(name="keyed", argv=("env", "A=1", *asked.argv), model="m", env={"TOLD": "{model} {port}"})
    with started(asked, log=log, limits=LIMITS, api_key="s3cret") as server:
        assert running(server.url, api_key="s3cret").model == "mock"
        with pytest.raises(EngineError, match="answers a completion of model 'mock' with status 401"):
            running(server.url)
    argv = ["serve", "--api-key", "abc", "--hf-token=def", "--max-num-batched-tokens", "512", "{port}"]
    assert servers._without_secrets(argv) == "serve --api-key *** --hf-token=*** --max-num-batched-tokens 512 {port}"


def test_two_at_once_get_two_ports_and_a_port_that_is_taken_is_tried_elsewhere(log: Path, tmp_path: Path) -> None:
    flag, words = tmp_path / "tried", shlex.join(command()).replace("'{port}'", "{port}")
    script = f"[ -e {flag} ] && exec {words}; touch {flag}; echo 'OSError: [Errno 98] Address already in use'; exit 1"
    with (
        started(ServerCommand(name="late", argv=("sh", "-c", script), model="m"), log=log, limits=LIMITS) as one,
        started(mocked(), log=log.with_name("two.log"), limits=LIMITS) as two,
    ):
        assert flag.exists()
        assert one.url != two.url


def test_a_reserved_port_is_given_to_nobody_else_and_can_be_served() -> None:
    with contextlib.ExitStack() as held:
        ports = [servers._free_port(held) for _ in range(50)]
        assert len(set(ports)) == 50
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("0.0.0.0", ports[0]))
            server.listen()


# A bad one ------------------------------------------------------------------------------------------------------------


def test_one_that_ends_while_starting_is_an_error_with_the_end_of_its_log(log: Path) -> None:
    with (
        pytest.raises(EngineError, match="the mock exited with code 2 while starting; the end of its log:") as error,
        started(mocked(fault="exits"), log=log, limits=LIMITS),
    ):
        pass
    assert "loading weights\n    ValueError: no such model (planted)" in str(error.value)
    assert f"full log: {str(log)!r}" in str(error.value)


def test_one_that_is_never_ready_is_given_up_and_ended(log: Path) -> None:
    for fault, last in (("never ready", "/health with status 503"), ("500", "a completion .* with status 500")):
        began = time.monotonic()
        with (
            pytest.raises(EngineError, match=f"the mock was not ready after 1 s \\(last: {last}"),
            started(mocked(fault=fault), log=log, limits=ServerLimits(start_s=1.0, end_s=1.0)),
        ):
            pass
        assert time.monotonic() - began < 8.0


def test_one_that_refuses_its_first_question_is_an_error_at_once(log: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"answers a completion of model 'mock' with status 400: .*unknown parameter"),
        started(mocked(refuses=["prompt"]), log=log, limits=LIMITS),
    ):
        pass


def test_one_that_dies_under_load_ends_the_run_with_its_last_words(log: Path) -> None:
    with (
        started(mocked(fault="dies", after=20), log=log, limits=LIMITS) as server,
        pytest.raises(EngineError, match=r"exited with code 3 while serving(.|\n)*out of memory \(planted\)"),
    ):
        drive(planned(50.0, 500), url=server.url, model=server.model, sample=server.sample)


def test_one_that_dies_is_counted_where_nobody_watches(log: Path) -> None:
    with started(mocked(fault="dies", after=6), log=log, limits=LIMITS) as server:
        run = drive(planned(200.0, 30), url=server.url, model=server.model, limits=Limits(silence_s=1.0))
        found = [request.failure for request in run.requests]
        assert found[0] is None
        assert found[-1] is Failure.REFUSED
        with pytest.raises(EngineError, match="exited with code 3"):
            server.sample(0.0)


def test_one_that_floods_its_log_fills_no_disk_and_still_answers(log: Path) -> None:
    with started(mocked(fault="floods"), log=log, limits=ServerLimits(log_bytes=1 << 20)) as server:
        run = drive(planned(20.0, 10), url=server.url, model=server.model)
        assert [request.failure for request in run.requests] == [None] * 10
        deadline = time.monotonic() + 5.0
        while b"bytes are left out here" not in log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert b"bytes are left out here" in log.read_bytes()
        assert log.stat().st_size < 3 << 20
    assert log.stat().st_size < 3 << 20


@pytest.mark.parametrize(
    ("argv", "error", "complaint"),
    [
        (("serve",), ConfigError, "the x: its command says nowhere which port to serve; write {port} there"),
        (
            ("/gone/serve", "{port}"),
            EngineError,
            "the x cannot be started: no such file or directory; check its command",
        ),
        (("/", "{port}"), EngineError, "the x cannot be started: permission denied"),
        (("sh", "-c", "kill -9 $$ {port}"), EngineError, "the x was killed by SIGKILL while starting; it said nothing"),
    ],
)
def test_a_command_that_cannot_work_says_why(
    log: Path, argv: tuple[str, ...], error: type[Exception], complaint: str
) -> None:
    with (
        pytest.raises(error, match=complaint),
        started(ServerCommand(name="the x", argv=argv, model="m"), log=log, limits=LIMITS),
    ):
        pass


# Nobody is left -------------------------------------------------------------------------------------------------------


def test_a_server_whose_host_is_killed_is_ended(log: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_servers as t; from pathlib import Path\n"
        "with t.started(t.mocked(children=1, deaf=True), log=Path(sys.argv[2]), limits=t.ServerLimits(end_s=0.2)):\n"
        "    print('running', flush=True); t.time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(log)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        assert len(living()) >= 3
        process.send_signal(signal.SIGKILL)
    # `no_orphans` waits for the rest.


def test_a_server_whose_guardian_is_killed_is_an_error_and_does_not_live_on(log: Path) -> None:
    with started(mocked(), log=log, limits=LIMITS) as server:
        children = Path(f"/proc/{os.getpid()}/task/{threading.main_thread().native_id}/children").read_text().split()
        (mine,) = [int(pid) for pid in children if b"guardian.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(mine, signal.SIGKILL)
        with pytest.raises(EngineError, match="the guardian of its processes is gone"):
            drive(planned(10.0, 100), url=server.url, model=server.model, sample=server.sample)


def test_an_interrupt_while_starting_leaves_nothing(log: Path) -> None:
    timer = threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), started(mocked(fault="never ready"), log=log, limits=LIMITS):
        pass
    timer.join()


# One that runs already ------------------------------------------------------------------------------------------------


def test_a_server_that_runs_already_is_found_by_its_url_and_left_running() -> None:
    with serving(model="theirs") as url:
        server = running(f"{url}/v1/")
        assert (server.url, server.model, server.start_up_s) == (url, "theirs", None)
        assert server.sample(2.0).engine_bytes is None
        assert running(url, model="other").model == "other"
        assert running(url).model == "theirs"


def test_nobody_at_a_url_is_an_error_in_time() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"the server at {url} was not ready after 0.3 s .*refused"):
            running(url, patience_s=0.3)
    with pytest.raises(ConfigError, match="is no url of a server"):
        running("nonsense://")


# Parts ----------------------------------------------------------------------------------------------------------------


def test_a_log_keeps_its_beginning_and_its_end_within_its_bounds(tmp_path: Path) -> None:
    log = CappedLog(tmp_path / "log", 4_000)
    lines = [f"line {number:05d}\n".encode() for number in range(5_000)]
    for line in lines:
        log.write(line)
    kept = (tmp_path / "log").read_bytes()
    assert len(kept) <= 4_100
    assert kept.startswith(b"".join(lines[:80]))
    assert kept.endswith(b"".join(lines[-50:]))
    assert kept.count(b"bytes are left out here") == 1
    small = CappedLog(tmp_path / "small", 4_000)
    small.write(b"all of it\n")
    log.close()
    small.close()
    assert (tmp_path / "small").read_bytes() == b"all of it\n"


def test_descendants_are_found_whatever_their_names_are(tmp_path: Path) -> None:
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "30"]) as process:
        try:
            assert process.pid in guardian.descendants(os.getpid())
        finally:
            process.kill()


class FakeNvml:
    """Two GPUs as NVML describes them; calls fill what they are given a reference to."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 100 + index.value
        return 0 if index.value < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 101
        return 0 if name == b"GPU-two" else 2

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.used = device.value << 20
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:  # noqa: N802
        rates._obj.gpu = 50 if device.value == 100 else 100
        return 0

    def nvmlDeviceGetPowerUsage(self, device: Any, milliwatts: Any) -> int:  # noqa: N802
        milliwatts._obj.value = 300_000
        return 0

    def nvmlDeviceGetClockInfo(self, device: Any, kind: int, megahertz: Any) -> int:  # noqa: N802
        megahertz._obj.value = 1980 if device.value == 100 else 1200
        return 0 if kind == 1 else 2

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, reasons: Any) -> int:  # noqa: N802
        reasons._obj.value = 0x4 if device.value == 100 else 0x20
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, rows: None) -> int:  # noqa: N802
        count._obj.value = 1 if device.value == 101 else 0
        return 7 if count._obj.value else 0


def test_counters_of_the_gpus_that_a_server_may_see_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml())
    both = Gpus({})
    assert both.facts() == {"gpu.count": 2, "gpu.processes": 1}
    sample = look(1.0, root=None, gpus=both, idle_bytes=100 << 20)
    assert sample.engine_bytes == 101 << 20
    assert (sample.gpu_utilisation, sample.gpu_power_watts, sample.gpu_sm_clock_mhz) == (0.75, 600.0, 1200.0)
    assert sample.gpu_throttled is True
    first = Gpus({"CUDA_VISIBLE_DEVICES": "0"})
    assert (len(first), first.counters()["gpu_throttled"]) == (1, False)  # its power cap alone
    assert Gpus({"CUDA_VISIBLE_DEVICES": "GPU-two"}).facts() == {"gpu.count": 1, "gpu.processes": 1}
    assert len(Gpus({"CUDA_VISIBLE_DEVICES": "1,7,0"})) == 1


def test_without_a_gpu_everything_of_a_gpu_is_unknown() -> None:
    none = Gpus({"CUDA_VISIBLE_DEVICES": ""})
    assert (len(none), none.used_bytes(), none.facts()) == (0, None, {"gpu.count": 0, "gpu.processes": 0})
    sample = look(3.0, root=os.getpid(), gpus=none, idle_bytes=None)
    assert (sample.gpu_power_watts, sample.gpu_throttled, sample.at_s) == (None, None, 3.0)
    assert sample.load_average is not None
