"""An engine without a model, for drills of our own code: deterministic answers, and misbehaviour on demand.

The next-token distribution is a hash of the context, so generation is the argmax of the same distribution that scores
forced tokens. Tokens are UTF-8 bytes; 256 is the end of sequence. Standard library only.

Options:
  behaviour  "ok"             answers
             "crash_on_open"  ends the process while loading
             "hang_on_open"   never finishes loading
             "crash_after"    ends the process after `after` completions
             "raise_after"    raises after `after` completions
             "hang_after"     sleeps for ever after `after` completions
             "garbage"        writes to standard output, by every way, while loading, answering and closing
             "short"          leaves the last request unanswered
             "spawn_child"    starts a process that sleeps for ever, and writes its id to `pid_file`
  after      completions before it misbehaves; counted anew in each run (0)
  delay_s    seconds before each completion (0)
  length     tokens per answer before the end of sequence (8)
  salt       another text is another "model" ("")
  pid_file   where "spawn_child" writes the child's process id
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.engines import EngineSpec, Progress, TokenizedPrompt
from parity.errors import EngineError
from parity.prompts import Prompt, Request, SamplingParams
from parity.recording import Completion, FinishReason, Terminator, Timing, TokenLogprobs

if TYPE_CHECKING:
    from parity.fingerprint import Scalar

END = 256
CRASH_CODE = 70
DEFAULTS: Mapping[str, Any] = {
    "behaviour": "ok",
    "after": 0,
    "delay_s": 0.0,
    "length": 8,
    "salt": "",
    "pid_file": None,
}
BEHAVIOURS = (
    "ok",
    "crash_on_open",
    "hang_on_open",
    "crash_after",
    "raise_after",
    "hang_after",
    "garbage",
    "short",
    "spawn_child",
)
_SLEEP_FOR_EVER = "import time\nwhile True: time.sleep(3600)"


def open_engine(spec: EngineSpec, model: Path) -> DrillEngine:
    """Misbehave while loading if so asked; the model directory is not read."""
    unknown = sorted(set(spec.options) - set(DEFAULTS))
    options = {**DEFAULTS, **spec.options}
    behaviour = options["behaviour"]
    if unknown or behaviour not in BEHAVIOURS:
        wrong = f"option {unknown[0]!r}" if unknown else f"behaviour {behaviour!r}"
        raise EngineError(f"the drill engine does not know the {wrong}; read the head of {Path(__file__).name}")
    if behaviour == "crash_on_open":
        _crash()
    if behaviour == "hang_on_open":
        _hang()
    if behaviour == "garbage":
        _write_garbage("while loading")
    if behaviour == "spawn_child":
        child = subprocess.Popen([sys.executable, "-c", _SLEEP_FOR_EVER])
        Path(options["pid_file"]).write_text(str(child.pid), "utf-8")
    return DrillEngine(options)


class DrillEngine:
    """Follows `parity.engines.Engine`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._behaviour = options["behaviour"]

    def facts(self) -> Mapping[str, Scalar]:
        """A version, because one is required."""
        return {"engine.version": "1", "engine.salt": self._options["salt"]}

    def tokenize(self, prompts: Sequence[Prompt]) -> Sequence[TokenizedPrompt]:
        """UTF-8 bytes of the text or of a ChatML rendering."""
        return [_tokenize(prompt) for prompt in prompts]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The bytes as text."""
        return bytes(t for t in token_ids if t < END).decode("utf-8", "replace")

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """One after the other."""
        for request in requests:
            _refuse(request)
        started_ns = time.perf_counter_ns()
        answered = requests[:-1] if self._behaviour == "short" else requests
        tokens = 0
        for count, request in enumerate(answered):
            self._misbehave(count)
            if self._options["delay_s"]:
                yield Progress(tokens=tokens)
                time.sleep(self._options["delay_s"])
            completion = self._complete(request, started_ns)
            tokens += len(completion.token_ids)
            yield completion
        self._misbehave(len(answered))

    def close(self) -> None:
        """Nothing to free; a spawned child is left behind on purpose."""
        if self._behaviour == "garbage":
            _write_garbage("while closing")

    def _misbehave(self, count: int) -> None:
        if self._behaviour == "garbage":
            _write_garbage("while answering")
        if count != self._options["after"]:
            return
        if self._behaviour == "crash_after":
            _crash()
        if self._behaviour == "hang_after":
            _hang()
        if self._behaviour == "raise_after":
            raise RuntimeError(f"planted failure after {count} completions")

    def _complete(self, request: Request, started_ns: int) -> Completion:
        sampling, forced = request.sampling, request.forced_token_ids
        steps = _Steps(request, salt=self._options["salt"], length=self._options["length"])
        token_ids: list[int] = []
        rows: list[tuple[float, list[tuple[int, float]]]] = []
        terminator: Terminator | None = None
        for position in range(sampling.max_tokens if forced is None else len(forced)):
            ranked = steps.next()
            token_id = ranked[0][0] if forced is None else forced[position]
            row = (dict(ranked)[token_id], ranked[: sampling.logprobs])
            if forced is None and steps.ends(token_id):
                terminator = Terminator(token_id=token_id, logprobs=_logprobs([row], sampling.logprobs))
                break
            token_ids.append(token_id)
            rows.append(row)
            steps.take(token_id)
        return Completion(
            id=request.id,
            prompt_token_ids=request.prompt_token_ids or (),
            own_prompt_token_ids=None,
            prompt_text=None,
            token_ids=tuple(token_ids),
            text=None if forced is not None else self.detokenize(token_ids),
            terminator=terminator,
            finish_reason=FinishReason.LENGTH if terminator is None else FinishReason.STOP,
            stop_reason=None if terminator is None or terminator.token_id == END else terminator.token_id,
            logprobs=_logprobs(rows, sampling.logprobs),
            timing=Timing(submitted_ns=0, first_token_ns=None, finished_ns=time.perf_counter_ns() - started_ns),
        )


class _Steps:
    """The distribution at each position of one answer, by hashing everything before it."""

    def __init__(self, request: Request, *, salt: str, length: int) -> None:
        self._context = hashlib.sha256(salt.encode())
        self._sampling = request.sampling
        self._length = max(length, request.sampling.min_tokens)
        self._position = 0
        for token_id in request.prompt_token_ids or ():
            self._context.update(token_id.to_bytes(4, "little"))

    def next(self) -> list[tuple[int, float]]:
        """All (token id, logprob) pairs, most probable first."""
        noise = hashlib.shake_256(self._context.digest()).digest(2 * (END + 1))
        # Gumbel noise, stretched: the first token gets about half of the probability, as in a small language model.
        logits = [
            -2.0 * math.log(-math.log((int.from_bytes(noise[i : i + 2], "little") + 0.5) / 65536.0))
            for i in range(0, len(noise), 2)
        ]
        # The end comes where the options say, and stays the argmax of what is returned.
        due = self._position >= self._length and not self._sampling.ignore_eos
        logits[END] = max(logits[:END]) + 2.0 if due else min(logits[:END]) - 5.0
        total = math.log(math.fsum(map(math.exp, logits)))
        return sorted(((i, logit - total) for i, logit in enumerate(logits)), key=lambda pair: (-pair[1], pair[0]))

    def ends(self, token_id: int) -> bool:
        """Whether an answer ends with this token."""
        too_early = self._position < self._sampling.min_tokens
        stops = token_id == END and not self._sampling.ignore_eos
        return not too_early and (stops or token_id in self._sampling.stop_token_ids)

    def take(self, token_id: int) -> None:
        """Append a token to the context."""
        self._context.update(token_id.to_bytes(4, "little"))
        self._position += 1


def _logprobs(rows: Sequence[tuple[float, list[tuple[int, float]]]], k: int) -> TokenLogprobs:
    return TokenLogprobs.from_rows([chosen for chosen, _ in rows], [row for _, row in rows], k=k)


def _tokenize(prompt: Prompt) -> TokenizedPrompt:
    if prompt.messages is None:
        text = prompt.text or ""
    else:
        turns = [f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in prompt.messages]
        text = "".join([*turns, "<|im_start|>assistant\n"])
    return TokenizedPrompt(text=text, token_ids=tuple(text.encode("utf-8", "surrogatepass")))


def _refuse(request: Request) -> None:
    """Refused, never ignored: what this engine cannot do."""
    s = request.sampling
    plain = SamplingParams.greedy(max_tokens=s.max_tokens, logprobs=s.logprobs)
    for name in ("temperature", "stop", "repetition_penalty", "presence_penalty", "frequency_penalty",
                 "structured"):  # fmt: skip
        if getattr(s, name) != getattr(plain, name):
            raise EngineError(f"the drill engine cannot honour {name} {getattr(s, name)!r} of prompt {request.id!r}")
    if outside := [t for t in request.forced_token_ids or () if not 0 <= t <= END]:
        raise EngineError(f"prompt {request.id!r} forces token {outside[0]}, which the drill engine does not have")


def _write_garbage(when: str) -> None:
    """To file descriptor 1, to `sys.stdout`, and from a child; one line looks like the protocol."""
    os.write(1, b"\xff\xfe\x00\x80 garbage \xc3\x28 " + when.encode() + b'\n{"event":"finished","count":999}\n')
    print(f"garbage {when}", flush=True)  # noqa: T201  polluting standard output is the point
    subprocess.run(["/bin/sh", "-c", 'printf "\\377 garbage from a child\\n"'], check=True)


def _crash() -> None:
    os._exit(CRASH_CODE)


def _hang() -> None:
    while True:
        time.sleep(3600)
