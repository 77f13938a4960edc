"""Reading and judging a synthetic run of 10,000 prompts x 256 tokens with top-20 log-probabilities: all output checks.

Nine recordings of that size: both sides' answers, the noise engine's and the candidate's scores, the reference's scores
of what the candidate decoded, both sides in float32 and sampled. Synthetic, because the question is our own speed and
memory. Each step runs in a process of its own, so that its peak memory is its own; `comparison.py PROMPTS` takes
another size.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from parity import judge, lockstep, store
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
        top = -np.sort(random.gamma(4.0, 2.5, size=(TOKENS, K)).astype(np.float32), axis=1)
        diverges, position = random.random() < 0.7, int(random.integers(TOKENS))
        top[position, 1:] = np.minimum(top[position, 1:], top[position, 0] - 0.03)
        top[position, 1] = top[position, 0] - 0.03
        top -= np.log(np.exp(top).sum(axis=1, keepdims=True) / 0.95)  # 5 % lies outside the top 20
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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One recording made from another: whose tokens it scores, with how much rounding noise (nats), in which dtype."""

    of: str
    rounding_nats: float
    dtype: str


SCORES = {
    "noise": Scores(of="reference", rounding_nats=0.05, dtype="bfloat16"),
    "candidate-scores": Scores(of="reference", rounding_nats=0.05, dtype="bfloat16"),
    "reference-scores": Scores(of="candidate", rounding_nats=0.05, dtype="float32"),
    "logic-reference": Scores(of="reference", rounding_nats=0.0, dtype="float32"),
    "logic-candidate": Scores(of="reference", rounding_nats=1e-6, dtype="float32"),
}
SAMPLED = ("sampled-reference", "sampled-candidate")


def _rows(completion: Completion) -> tuple[Any, Any]:
    assert completion.logprobs is not None
    ids = np.frombuffer(completion.logprobs.top_token_ids, np.int32).reshape(TOKENS, K)
    return ids, np.frombuffer(completion.logprobs.top, np.float32).reshape(TOKENS, K)


def rescored(directory: Path, role: str) -> list[Completion]:
    """The tokens of another recording, scored with a little rounding noise."""
    scores = SCORES[role]
    random = np.random.default_rng(len(role))
    found = []
    for completion in store.read(directory / scores.of).completions:
        ids, top = _rows(completion)
        noisy = top + random.normal(0.0, scores.rounding_nats, top.shape)
        noisy -= np.log(np.exp(noisy).sum(axis=1, keepdims=True) / 0.95)
        order = np.argsort(-noisy, axis=1)
        logprobs = TokenLogprobs(
            k=K,
            chosen=_view(noisy[:, 0], np.float32),
            top_token_ids=_view(np.take_along_axis(ids, order, axis=1), np.int32),
            top=_view(np.take_along_axis(noisy, order, axis=1), np.float32),
        )
        found.append(replace(completion, logprobs=logprobs))
    return found


def sampled(directory: Path, role: str) -> list[Completion]:
    """Tokens drawn from the reference's rows at temperature 1, top_k 10."""
    random = np.random.default_rng(len(role))
    found = []
    for completion in store.read(directory / "reference").completions:
        ids, top = _rows(completion)
        weights = np.cumsum(np.exp(top[:, :10]), axis=1)
        ranks = (weights < random.random((TOKENS, 1)) * weights[:, -1:]).sum(axis=1)
        rows = np.arange(TOKENS)
        assert completion.logprobs is not None
        logprobs = replace(completion.logprobs, chosen=_view(top[rows, ranks], np.float32))
        found.append(replace(completion, token_ids=tuple(ids[rows, ranks].tolist()), logprobs=logprobs))
    return found


def write_role(directory: Path, role: str) -> None:
    """What a run of a target holds beside the two sides' own answers."""
    if role in SAMPLED:
        dtype = "float32" if role == "sampled-reference" else "bfloat16"
        drawn = replace(SamplingParams.greedy(max_tokens=TOKENS, logprobs=K), temperature=1.0, top_k=10)
        _save(directory / role, sampled(directory, role), forced_from=None, dtype=dtype, sampling=drawn)
    else:
        source = store.read_header(directory / SCORES[role].of)["digest"]
        _save(directory / role, rescored(directory, role), forced_from=source, dtype=SCORES[role].dtype)
    run = {"recordings": ["reference", "candidate", *SCORES, *SAMPLED], "policy": "equivalence", "limits": {}}
    (directory / "run.json").write_text(json.dumps(run))


def write(directory: Path, prompts: int, *, swapped: bool) -> None:
    completions = synthetic(prompts, swapped=swapped)
    began = time.perf_counter()
    _save(directory, completions, forced_from=None, dtype="bfloat16" if swapped else "float32")
    report("write one", prompts, time.perf_counter() - began)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"  at rest {size / 2**20:.0f} MiB, {size / prompts / TOKENS:.0f} bytes per token")


def _save(
    directory: Path,
    completions: list[Completion],
    *,
    forced_from: str | None,
    dtype: str,
    sampling: SamplingParams | None = None,
) -> None:
    workload = WorkloadRecord(
        name="synthetic",
        digest="0" * 64,
        forced_from=forced_from,
        sampling=sampling or SamplingParams.greedy(max_tokens=TOKENS, logprobs=K),
        request_ids=tuple(c.id for c in completions),
    )
    header = store.make_header(
        spec=replace(SPEC, dtype=dtype),
        workload=workload,
        fingerprint=Fingerprint(identity={}, context={}, health={}, packages={}),
        created_at="2026-01-01T00:00:00Z",
        resumed=0,
        key="",
    )
    store.write(directory, header=header, completions=completions)


def read(directory: Path, prompts: int) -> None:
    began = time.perf_counter()
    store.read(directory / "candidate")
    report("read one", prompts, time.perf_counter() - began)


def compare(directory: Path, prompts: int) -> None:
    began = time.perf_counter()
    evidence = judge.pair(directory / "reference", directory / "candidate", noise=None)
    middle = time.perf_counter()
    verdicts = [judge.judge(evidence, check) for check in evidence.checks]
    judged = time.perf_counter() - middle
    report(f"judge {len(verdicts)} checks", prompts, judged)
    report("read and judge", prompts, time.perf_counter() - began)
    for verdict in verdicts:
        print(f"  {verdict.outcome.value} {verdict.check}: {verdict.headline}")
    ours, seconds = _steps_per_second(evidence)
    plain = _plain_steps_per_second(evidence, seconds)
    print(f"comparing scores of the same tokens: {ours / plain:.0f} times a plain-Python walk of the same positions")


def _steps_per_second(evidence: judge.Evidence) -> tuple[float, float]:
    began = time.perf_counter()
    steps = lockstep.measure(evidence.reference, evidence.recordings["candidate-scores"])
    seconds = time.perf_counter() - began
    return len(steps) / seconds, seconds


def _plain_steps_per_second(evidence: judge.Evidence, seconds: float) -> float:
    """The peers' kind of loop: dictionaries of the top tokens, position by position, for about as long."""
    began, positions = time.perf_counter(), 0
    for ours in evidence.reference.completions:
        theirs = evidence.recordings["candidate-scores"].by_id[ours.id]
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        for position in range(len(ours.token_ids)):
            p, q = dict(ours.logprobs.row(position)), dict(theirs.logprobs.row(position))
            shared = [i for i in p if i in q]
            sum(math.exp(p[i]) * (p[i] - q[i]) for i in shared)
            positions += 1
        if time.perf_counter() - began > seconds:
            break
    return positions / (time.perf_counter() - began)


def report(what: str, prompts: int, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    rate = prompts * TOKENS / seconds
    print(f"{what:<20} {seconds:6.2f} s  {rate / 1e6:6.2f} million tokens/s  peak memory {peak:.0f} MiB", flush=True)


def main() -> None:
    if len(sys.argv) > 2:
        _, step, place, prompts = sys.argv
        steps: dict[str, Callable[[], None]] = {
            "write-reference": lambda: write(Path(place) / "reference", int(prompts), swapped=False),
            "write-candidate": lambda: write(Path(place) / "candidate", int(prompts), swapped=True),
            **{f"write-{role}": partial(write_role, Path(place), role) for role in (*SCORES, *SAMPLED)},
            "read": lambda: read(Path(place), int(prompts)),
            "compare": lambda: compare(Path(place), int(prompts)),
        }
        steps[step]()
        return
    prompts_wanted = sys.argv[1] if len(sys.argv) > 1 else "10000"
    scratch = Path(tempfile.mkdtemp(prefix="parity-bench-"))
    try:
        steps_of_all = ("write-reference", "write-candidate", *(f"write-{r}" for r in (*SCORES, *SAMPLED)), "read")
        for step in (*steps_of_all, "compare", "compare", "compare"):
            subprocess.run([sys.executable, __file__, step, str(scratch), prompts_wanted], check=True)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
