"""Recording through parity against a bare `LLM.generate`: same prompts, same environment, in turn, start-up excluded.

Both engines stay loaded; only one works at a time. Parity's time is what a user waits for: tokenising, sending,
completions streamed back, kept on disk as they come, and sealed. `overhead.py ROUNDS PROMPTS`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from parity import config, environments, models, store
from parity.config import Target
from parity.record import Places, Recorder

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent


class Bare:
    """The bare script, loaded and waiting."""

    def __init__(self, target: Target, *, python: Path, model: Path, ids: list[list[int]], log: Path) -> None:
        spec, sampling = target.candidate, target.workload.requests[0].sampling
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(spec.threads))
        job = {
            "arguments": {
                "model": str(model),
                "dtype": spec.dtype,
                "generation_config": "vllm",
                "enable_prefix_caching": False,
                "seed": 0,
                "max_logprobs": 20,
                **spec.options,
            },
            "env": {**threads, "OMP_WAIT_POLICY": "PASSIVE", **spec.env},
            "prompts": ids,
            "max_tokens": sampling.max_tokens,
            "logprobs": sampling.logprobs,
        }
        with log.open("w") as log_file:
            self._process = subprocess.Popen(
                [python, HERE / "bare_vllm.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
            )
        assert self._ask(json.dumps(job)) == "ready", f"the bare script did not start; see {log}"

    def seconds(self) -> float:
        """One run of all prompts."""
        return float(json.loads(self._ask("go"))[0])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


class Rounds:
    """Watches a recording run; after each of parity's workloads it lets the bare script do the same work."""

    def __init__(self, start_bare: Callable[[], Bare]) -> None:
        self._start_bare = start_bare
        self._bare: Bare | None = None
        self._began = 0.0
        self.pairs: list[tuple[float, float]] = []

    def progress(self, what: str, done: int, total: int, detail: str) -> None:
        """Nothing to draw."""

    def note(self, text: str) -> None:
        ours = time.perf_counter() - self._began
        if text.startswith("warm-up:"):
            self._bare = self._start_bare()
            self._bare.seconds()
        elif text.startswith("round-"):
            assert self._bare is not None
            theirs = self._bare.seconds()
            self.pairs.append((ours, theirs))
            print(f"parity {ours:6.2f} s  bare {theirs:6.2f} s  ratio {ours / theirs:.3f}", flush=True)
        self._began = time.perf_counter()

    def end(self) -> None:
        if self._bare is not None:
            self._bare.end()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    prompts = int(sys.argv[2]) if len(sys.argv) > 2 else 16
    target = config.limited_to(config.read_target(ROOT / "suites" / "targets.toml", "cpu"), prompts)
    places = Places.of(ROOT / "suites", ROOT / ".parity")
    name = target.candidate.environment
    assert name is not None
    environment = environments.find(name, locks=places.locks, root=places.environments)
    if not environment.built:
        environment = environments.build(environment, report=lambda *_: None)
    model = models.provide(target.candidate.model, cache=places.models)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"

        def start_bare() -> Bare:
            warm = store.read(run / "warm-up")
            ids = [list(c.prompt_token_ids) for c in warm.completions]
            return Bare(target, python=environment.python, model=model, ids=ids, log=Path(scratch) / "bare.log")

        watch = Rounds(start_bare)
        try:
            jobs = dict.fromkeys(["warm-up", *(f"round-{n}" for n in range(1, rounds + 1))], target.workload)
            Recorder(directory=run, places=places, observer=watch, fresh=True).record(target.candidate, jobs)
        finally:
            watch.end()
    ratios = [ours / theirs for ours, theirs in watch.pairs]
    print(
        f"ratio parity/bare: median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}), "
        f"{len(ratios)} rounds in turn, {prompts} prompts, {name}"
    )


if __name__ == "__main__":
    main()
