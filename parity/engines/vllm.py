"""vLLM, in process, offline.

Settings that would let an engine default decide are fixed: `generation_config="vllm"` (a model's own sampling
defaults are never applied), raw log-probabilities. A cached prefix changes numerics, so only requests that ask for it
read the prefix cache. The user's options win.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.engines import EngineSpec, Progress, TokenizedPrompt, tokenize
from parity.errors import EngineError
from parity.prompts import Grammar, Prompt, Request, Structured
from parity.recording import Completion, FinishReason, Terminator, Timing, TokenLogprobs

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from parity.fingerprint import Scalar

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "repetition": FinishReason.ABORT,
    "error": FinishReason.ABORT,
}
_PROGRESS_EVERY_S = 0.5


def open_engine(spec: EngineSpec, model: Path) -> VllmEngine:
    """Load the model."""
    return VllmEngine(spec, model)


class VllmEngine:
    """`vllm.LLM`, driven step by step so that completions leave as they finish."""

    def __init__(self, spec: EngineSpec, model: Path) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import vllm  # noqa: PLC0415  after the environment is set: vLLM reads it at import
        import vllm.sampling_params  # noqa: PLC0415

        self._vllm = vllm
        self._llm = vllm.LLM(**self._arguments(spec, model))
        self._tokenizer = self._llm.get_tokenizer()

    @staticmethod
    def _arguments(spec: EngineSpec, model: Path) -> dict[str, Any]:
        return {
            "model": str(model),
            "dtype": spec.dtype,
            "quantization": spec.quantization,
            "generation_config": "vllm",
            "seed": 0,
            "max_logprobs": 20,
            **spec.options,
        }

    def facts(self) -> Mapping[str, Scalar]:
        """VLLM's version and what it decided about the model."""
        config = self._llm.llm_engine.vllm_config
        return {
            "engine.version": self._vllm.__version__,
            "engine.dtype": str(config.model_config.dtype).removeprefix("torch."),
            "engine.max_model_len": config.model_config.max_model_len,
            "engine.logprobs_mode": str(config.model_config.logprobs_mode),
            "engine.kv_cache_dtype": str(config.cache_config.cache_dtype),
            "engine.prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "engine.tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "engine.can_reuse_prefix": bool(config.cache_config.enable_prefix_caching),
            "engine.can_stream": True,
            "engine.can_structure": True,
        }

    def tokenize(self, prompts: Sequence[Prompt]) -> Sequence[TokenizedPrompt]:
        """Through the tokenizer that vLLM loaded, as its own chat and completions entry points do."""
        return [tokenize(self._tokenizer, p) for p in prompts]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """By the tokenizer that vLLM loaded, all at once, as its own detokeniser never does."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """One offline batch."""
        started_ns = time.perf_counter_ns()
        limit = self._llm.llm_engine.vllm_config.model_config.max_model_len
        for request in requests:
            _refuse_overlong(request, limit)
        answers = {name: _Answer(request=request) for name, request in self._enqueue(requests)}
        submitted_ns = time.perf_counter_ns() - started_ns
        engine = self._llm.llm_engine
        finished_tokens, last_sign_s = 0, time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer = answers[_name(output.request_id)]
                now_ns = time.perf_counter_ns() - started_ns
                answer.take(output, now_ns)
                if not output.finished:
                    continue
                timing = Timing(submitted_ns=submitted_ns, first_token_ns=answer.first_token_ns, finished_ns=now_ns)
                completion = answer.completion(output, timing)
                finished_tokens += len(completion.token_ids)
                yield completion
            if time.perf_counter() - last_sign_s > _PROGRESS_EVERY_S:
                last_sign_s = time.perf_counter()
                yield Progress(tokens=finished_tokens + self._unfinished_tokens())

    def close(self) -> None:
        """VLLM ends its own processes when the object goes; the host ends whatever is left of the process group."""
        shutdown = getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()

    def _enqueue(self, requests: Sequence[Request]) -> Iterator[tuple[str, Request]]:
        """Hand all requests over; yields the name by which vLLM's outputs call each."""
        whole = [r for r in requests if not r.stream]
        ids = self._llm.enqueue(
            [{"prompt_token_ids": list(_input_ids(r))} for r in whole],
            [self._sampling_params(r) for r in whole],
            use_tqdm=False,
        )
        yield from zip(map(_name, ids), whole, strict=True)
        # `LLM` returns whole answers only; its engine hands out pieces, as vLLM's servers do.
        for number, request in enumerate(r for r in requests if r.stream):
            params = self._sampling_params(request)
            params.output_kind = type(params.output_kind).DELTA
            name = f"stream{number}"
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(_input_ids(request))}, params)
            yield name, request

    def _unfinished_tokens(self) -> int:
        """Tokens of answers still under way, for the progress bar only: all of a batch may finish at its very end."""
        try:
            states = self._llm.llm_engine.output_processor.request_states.values()
            return sum(s.detokenizer.num_output_tokens() for s in states if s.detokenizer is not None)
        except AttributeError:  # not vLLM's public interface; a version without it shows finished answers only
            return 0

    def _sampling_params(self, request: Request) -> SamplingParams:
        s, forced = request.sampling, request.forced_token_ids is not None
        return self._vllm.SamplingParams(
            n=1,
            temperature=0.0 if forced else s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            max_tokens=1 if forced else s.max_tokens,
            min_tokens=0 if forced else s.min_tokens,
            stop=None if forced else list(s.stop),
            stop_token_ids=None if forced else list(s.stop_token_ids),
            ignore_eos=forced or s.ignore_eos,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            logprobs=None if forced else s.logprobs,
            prompt_logprobs=s.logprobs if forced else None,
            detokenize=not forced,
            skip_special_tokens=True,
            flat_logprobs=True,
            skip_reading_prefix_cache=not request.reuse_prefix,
            structured_outputs=None if forced or s.structured is None else self._structured(s.structured),
        )

    def _structured(self, wanted: Structured) -> StructuredOutputsParams:
        params = self._vllm.sampling_params.StructuredOutputsParams
        if wanted.grammar is Grammar.REGEX:
            return params(regex=wanted.definition)
        if wanted.grammar is Grammar.CHOICE:
            return params(choice=json.loads(wanted.definition))
        return params(json=wanted.definition)


@dataclass(slots=True, kw_only=True)
class _Answer:
    """One request on its way: all at once, or in pieces."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    chosen: list[float] = field(default_factory=list)
    rows: list[list[tuple[int, float]]] = field(default_factory=list)
    first_token_ns: int | None = None

    def take(self, output: RequestOutput, now_ns: int) -> None:
        """Put the newest piece behind the others; vLLM hands out one piece where no stream was asked."""
        if self.request.forced_token_ids is not None:
            return
        piece = output.outputs[0]
        if self.request.stream and piece.token_ids and self.first_token_ns is None:
            self.first_token_ns = now_ns
        self.text += piece.text
        self.token_ids += piece.token_ids
        chosen, rows = _rows(piece.logprobs, piece.token_ids, start=0, k=self.request.sampling.logprobs)
        self.chosen += chosen
        self.rows += rows

    def completion(self, output: RequestOutput, timing: Timing) -> Completion:
        """The whole answer, once vLLM says that it has finished."""
        request, last = self.request, output.outputs[0]
        if request.forced_token_ids is not None:
            return _scored(request, output, timing)
        finish = _FINISH_REASONS[last.finish_reason]
        token_ids = tuple(self.token_ids)
        logprobs = TokenLogprobs.from_rows(self.chosen, self.rows, k=request.sampling.logprobs)
        terminator = None
        if finish is FinishReason.STOP and not isinstance(last.stop_reason, str):
            # vLLM keeps the end-of-sequence or stop token in token_ids; a stop string leaves ordinary tokens there.
            body = len(token_ids) - 1
            terminator = Terminator(token_id=token_ids[body], logprobs=logprobs.rows(body, body + 1))
            token_ids, logprobs = token_ids[:body], logprobs.rows(0, body)
        return Completion(
            id=request.id,
            prompt_token_ids=tuple(output.prompt_token_ids),
            own_prompt_token_ids=None,
            prompt_text=None,
            token_ids=token_ids,
            text=self.text,
            terminator=terminator,
            finish_reason=finish,
            stop_reason=last.stop_reason,
            logprobs=logprobs,
            timing=timing,
        )


def _name(request_id: object) -> str:
    """VLLM may append a random suffix to the id it was given; its outputs carry the part before it."""
    return str(request_id).split("-", 1)[0]


def _scored(request: Request, output: RequestOutput, timing: Timing) -> Completion:
    """Entry i of vLLM's prompt_logprobs scores prompt token i; the first entry is None."""
    forced, k = request.forced_token_ids or (), request.sampling.logprobs
    start = len(output.prompt_token_ids) - len(forced)
    chosen, rows = _rows(output.prompt_logprobs, forced, start=start, k=k)
    return Completion(
        id=request.id,
        prompt_token_ids=tuple(output.prompt_token_ids[:start]),
        own_prompt_token_ids=None,
        prompt_text=None,
        token_ids=forced,
        text=None,
        terminator=None,
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
        logprobs=TokenLogprobs.from_rows(chosen, rows, k=k),
        timing=timing,
    )


def _rows(
    flat: Any, token_ids: Sequence[int], *, start: int, k: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Read vLLM's FlatLogprobs: at each position the token itself first, then the top k by rank."""
    chosen: list[float] = []
    rows: list[list[tuple[int, float]]] = []
    for offset, token_id in enumerate(token_ids):
        first, last = flat.start_indices[start + offset], flat.end_indices[start + offset]
        ids, values = flat.token_ids[first:last], flat.logprobs[first:last]
        if not ids or ids[0] != token_id:
            raise EngineError(
                f"vLLM returned no logprob for token {token_id} at position {start + offset} (first entry: {ids[:1]})"
            )
        chosen.append(values[0])
        rows.append(list(zip(ids[1 : k + 1], values[1 : k + 1], strict=True)))
    return chosen, rows


def _input_ids(request: Request) -> tuple[int, ...]:
    return (request.prompt_token_ids or ()) + (request.forced_token_ids or ())


def _refuse_overlong(request: Request, limit: int) -> None:
    """VLLM would cut the answer short and say "length"; a comparison must not start from that."""
    wanted = len(_input_ids(request)) + (1 if request.forced_token_ids else request.sampling.max_tokens)
    if wanted > limit:
        raise EngineError(
            f"prompt {request.id!r} needs {wanted} positions and vLLM was started with max_model_len {limit}; "
            "raise options.max_model_len or shorten the prompt"
        )
