"""Writes the recording of the present schema that is kept and read forever: `python tests/data/make.py`.

Run once per schema, when it is new. The directories of older schemas are never written again: they are the proof that
old files stay readable.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

from parity import store
from parity.engines import EngineSpec
from parity.fingerprint import Fingerprint
from parity.prompts import Grammar, Message, Prompt, Request, SamplingParams, Structured, Workload
from parity.recording import SCHEMA, Completion, FinishReason, Terminator, Timing, TokenLogprobs, WorkloadRecord

SEED = 20261123
K = 3
PROMPTS = (
    Prompt(id="chat", messages=(Message(role="user", content="Name a colour."),)),
    Prompt(id="line separator", text="a\u2028b 🙂"),
    Prompt(id="cut short", text="Once upon"),
    Prompt(id="ids", token_ids=(1, 49000, 2)),
)


def scored(rng: random.Random, token_ids: tuple[int, ...]) -> TokenLogprobs:
    """Plausible rows: the token itself first, exact in float32."""
    rows = [[(t + rank, -rng.randrange(1, 64) / 64 - rank) for rank in range(K)] for t in token_ids]
    return TokenLogprobs.from_rows([row[0][1] for row in rows], rows, k=K)


def completion(rng: random.Random, prompt: Prompt, index: int) -> Completion:
    """Ended by a scored token, by one without scores, by length, and an answer without log-probabilities."""
    token_ids = tuple(rng.randrange(3, 49152) for _ in range(index + 2))
    sent = prompt.token_ids or tuple(rng.randrange(3, 49152) for _ in range(4))
    ends = index != 2
    return Completion(
        id=prompt.id,
        prompt_token_ids=sent,
        own_prompt_token_ids=None if prompt.token_ids else sent,
        prompt_text=prompt.text,
        token_ids=token_ids,
        text=f"answer {index} \u2028 🙂",
        terminator=Terminator(token_id=2, logprobs=scored(rng, (2,)) if index == 0 else None) if ends else None,
        finish_reason=FinishReason.STOP if ends else FinishReason.LENGTH,
        stop_reason=None,
        logprobs=scored(rng, token_ids) if index != 3 else None,
        timing=Timing(submitted_ns=0, first_token_ns=1_000_000 * (index + 1), finished_ns=10_000_000 * (index + 1)),
        decoded_text="another" if index == 1 else None,
    )


def main() -> int:
    """Write the directory of the present schema; refuses where it exists."""
    rng = random.Random(SEED)
    sampling = SamplingParams.greedy(max_tokens=4, logprobs=K)
    asked = [Request(prompt=p, sampling=sampling) for p in PROMPTS]
    asked[2] = replace(
        asked[2], sampling=replace(sampling, structured=Structured(grammar=Grammar.REGEX, definition="."))
    )
    workload = Workload(name="old", requests=tuple(asked))
    header = store.make_header(
        spec=EngineSpec(engine="drill", model="tiny", dtype="float32", options={"a": [1, None]}, env={"VLLM_A": "1"}),
        workload=WorkloadRecord.of(workload),
        fingerprint=Fingerprint(
            identity={"dtype": "float32", "quantization": None, "model.weights_sha256": "1" * 64},
            context={"engine.version": "1", "host.cores": 2},
            health={"load_average_1min": 0.5},
            packages={"engine": "1"},
        ),
        created_at="2026-11-23T12:00:00Z",
        resumed=1,
        key="0" * 64,
    )
    completions = [completion(rng, prompt, index) for index, prompt in enumerate(PROMPTS)]
    store.write(Path(__file__).parent / f"recording-schema-{SCHEMA}", header=header, completions=completions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
