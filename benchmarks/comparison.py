"""Reading and judging two synthetic recordings of 10,000 prompts x 256 tokens with top-20 log-probabilities.

Synthetic, because the question is our own speed and memory. Each step runs in a process of its own, so that its peak
memory is its own. `comparison.py PROMPTS` takes another size.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from parity import judge, store
from parity.engines import EngineSpec
from parity.fingerprint import Fingerprint
from parity.prompts import SamplingParams
from parity.recording import Completion, FinishReason, Timing, TokenLogprobs, WorkloadRecord

TOKENS, K = 256, 20
SPEC = EngineSpec(engine="replay", model="synthetic", dtype="float32", options={}, env={})


def _view(values: Any, dtype: type[np.generic]) -> memoryview:
    flat: Any = np.ascontiguousarray(values.astype(dtype).reshape(-1))
    return memoryview(flat).toreadonly()


def synthetic(prompts: int, *, swapped: bool) -> list[Completion]:
    """Answers that are the argmax of their rows; the two sides differ at one near-tie in 70 % of the prompts."""
    random = np.random.default_rng(0)
    completions = []
    for index in range(prompts):
        ids = random.integers(1000, 49000, size=(TOKENS, 1)) + np.arange(K)
        top = -np.sort(random.gamma(2.0, 1.5, size=(TOKENS, K)).astype(np.float32), axis=1)
        diverges, position = random.random() < 0.7, int(random.integers(TOKENS))
        top[position, 1] = top[position, 0] - 0.03
        if swapped and diverges:
            ids[position, [0, 1]] = ids[position, [1, 0]]
        completions.append(
            Completion(
                id=f"p-{index:05d}",
                prompt_token_ids=tuple(range(50)),
                own_prompt_token_ids=tuple(range(50)),
                prompt_text="synthetic",
                token_ids=tuple(ids[:, 0].tolist()),
                text="",
                terminator=None,
                finish_reason=FinishReason.LENGTH,
                stop_reason=None,
                logprobs=TokenLogprobs(
                    k=K,
                    chosen=_view(top[:, 0], np.float32),
                    top_token_ids=_view(ids, np.int32),
                    top=_view(top, np.float32),
                ),
                timing=Timing(submitted_ns=0, first_token_ns=None, finished_ns=1),
            )
        )
    return completions


def write(directory: Path, prompts: int, *, swapped: bool) -> None:
    completions = synthetic(prompts, swapped=swapped)
    workload = WorkloadRecord(
        name="synthetic",
        digest="0" * 64,
        forced_from=None,
        sampling=SamplingParams.greedy(max_tokens=TOKENS, logprobs=K),
        request_ids=tuple(c.id for c in completions),
    )
    header = store.make_header(
        spec=SPEC,
        workload=workload,
        fingerprint=Fingerprint(identity={}, context={}, health={}, packages={}),
        created_at="2026-01-01T00:00:00Z",
        resumed=0,
        key="",
    )
    began = time.perf_counter()
    store.write(directory, header=header, completions=completions)
    report("write one", prompts, time.perf_counter() - began)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"  at rest {size / 2**20:.0f} MiB, {size / prompts / TOKENS:.0f} bytes per token")


def read(directory: Path, prompts: int) -> None:
    began = time.perf_counter()
    store.read(directory / "candidate")
    report("read one", prompts, time.perf_counter() - began)


def compare(directory: Path, prompts: int) -> None:
    began = time.perf_counter()
    evidence = judge.pair(directory / "reference", directory / "candidate", noise=None)
    middle = time.perf_counter()
    verdicts = [judge.judge(evidence, check) for check in judge.CHECKS]
    judged = time.perf_counter() - middle
    report("judge both checks", prompts, judged)
    report("read both and judge", prompts, time.perf_counter() - began)
    print(f"  {[v.outcome.value for v in verdicts]}: {verdicts[1].headline}")


def report(what: str, prompts: int, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    rate = prompts * TOKENS / seconds
    print(f"{what:<20} {seconds:6.2f} s  {rate / 1e6:6.2f} million tokens/s  peak memory {peak:.0f} MiB", flush=True)


def main() -> None:
    if len(sys.argv) > 2:
        _, step, place, prompts = sys.argv
        steps = {
            "write-reference": lambda: write(Path(place) / "reference", int(prompts), swapped=False),
            "write-candidate": lambda: write(Path(place) / "candidate", int(prompts), swapped=True),
            "read": lambda: read(Path(place), int(prompts)),
            "compare": lambda: compare(Path(place), int(prompts)),
        }
        steps[step]()
        return
    prompts_wanted = sys.argv[1] if len(sys.argv) > 1 else "10000"
    scratch = Path(tempfile.mkdtemp(prefix="parity-bench-"))
    try:
        for step in ("write-reference", "write-candidate", "read", "compare", "compare", "compare"):
            subprocess.run([sys.executable, __file__, step, str(scratch), prompts_wanted], check=True)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
