"""The bare script that parity is measured against: vLLM's own `LLM.generate`, nothing else.

Runs in the engine's environment. First line of standard input: what to load and send, as JSON; then each line runs it
once and answers the seconds it took.
"""

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    os.environ.update(job["env"])
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    llm = LLM(**job["arguments"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], logprobs=job["logprobs"])
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, sum(len(o.outputs[0].token_ids) for o in outputs)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
