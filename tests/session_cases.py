"""A finished comparison of performance on disk, as `parity.bench` leaves it, and the profile that it was driven by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from load_runs import load_run
from parity import timings
from parity.checks.performance import Limits
from parity.fingerprint import Scalar
from parity.timings import LoadRun
from parity.traffic import Fixed, Lengths, Offline, Profile, Slo

LENGTHS = Lengths(shape=Fixed(tokens=5), least=5, most=5)
PROFILE = Profile(
    name="toy",
    description="a toy",
    arrivals=Offline(),
    prompt_tokens=LENGTHS,
    output_tokens=LENGTHS,
    requests=6,
    warmup=1,
    slo=Slo(ttft_s=1.0),
    gated=("tpot_p50_s",),
)
PROFILE_FILE = """
description = "a toy"
requests = 6
warmup = 1
gated = ["tpot_p50_s"]
arrivals = { kind = "offline" }
prompt_tokens = { kind = "fixed", tokens = 5 }
output_tokens = { kind = "fixed", tokens = 5 }
slo = { ttft_s = 1.0 }
"""
FACTS: Mapping[str, Scalar] = {
    "engine": "vllm 1.0 bfloat16",
    "environment.digest": "abc",
    "host.cpu": "EPYC",
    "plan.sha256": "0123456789abcdef",
    "client.lag_p50_s": 0.001,
}
GPU: Mapping[str, Scalar] = {"gpu.count": 1, "gpu.0.name": "H100", "gpu.0.driver_version": "580", "gpu.processes": 0}
LABELS = {"reference": "vllm 0.9 bfloat16", "candidate": "vllm 1.0 bfloat16"}


def starts(
    count: int = 3, *, slower: float = 1.0, facts: Mapping[str, Scalar] = FACTS, stem_s: float = 0.01
) -> list[LoadRun]:
    """Starts whose tokens take a hair longer each time, `slower` times that."""
    return [
        replace(
            load_run(tpot_s=stem_s * slower * (1.0 + 0.001 * number)),
            began_at=f"2026-11-24T12:{number:02}:00+00:00",
            facts=facts,
        )
        for number in range(count)
    ]


def write_session(
    home: Path,
    *,
    reference: Sequence[LoadRun],
    candidate: Sequence[LoadRun],
    number: int = 1,
    of: tuple[str, str] = ("cpu", "toy"),
) -> Path:
    """`home/performance/TARGET/PROFILE/NNNN`, finished; of: target and profile."""
    directory = home / "performance" / of[0] / of[1] / f"{number:04}"
    directory.mkdir(parents=True)
    sides = {
        side: {
            "spec": {"engine": "vllm", "environment": None, "dtype": "bfloat16"},
            "facts": {"engine": label},
            "url": None,
        }
        for side, label in LABELS.items()
    }
    asked = {
        "what": "comparison",
        "target": of[0],
        "profile": of[1],
        "plan": "0123456789abcdef",
        "hardware": {"host.cpu": "EPYC"},
        "limits": {name: getattr(Limits(), name) for name in Limits.__slots__},
        "sides": sides,
    }
    (directory / "session.json").write_text(json.dumps({"key": "k", "began_at": "2026-11-24T12:00:00Z", **asked}))
    for name, runs in (("reference", reference), ("candidate", candidate)):
        for pair, run in enumerate(runs, 1):
            (directory / f"pair-{pair:02}-{name}.jsonl").write_text("".join(timings.to_json_lines(run)))
    (directory / "verdict.json").write_text('{"ended_at": "2026-11-24T13:00:00Z"}\n')
    return directory


def write_suites(root: Path) -> Path:
    """A folder of suites with the one profile."""
    (root / "traffic").mkdir(parents=True)
    (root / "traffic" / "toy.toml").write_text(PROFILE_FILE)
    return root
