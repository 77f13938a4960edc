"""vLLM with one fault that no model directory can hold: an adapter given by path, its fault named in `options`.

Runs inside the engine's interpreter. `FAULTS` is the registry: faults in the running model and its cache, faults in the
prompt on its way, faults in the sampling parameters on their way. Written for and measured on vLLM 0.32.0 on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from parity.engines import EngineSpec, Progress
from parity.engines.vllm import VllmEngine
from parity.errors import EngineError
from parity.prompts import Request, SamplingParams
from parity.recording import Completion

if TYPE_CHECKING:
    import vllm

T = TypeVar("T")

BIASED_TOKEN = 30
BIAS = 0.05
SILU, WANTED_MODE = "SiluAndMul", "VLLM_ENABLE_V1_MULTIPROCESSING"
DROPPED = range(16, 32)
"""The positions that "KV block dropped" empties: one block of 16, the smallest that vLLM has on any hardware."""
PROMPT_TOKENS_KEPT = 32
END_OF_TEXT = 0
"""Where "EOS wrong" ends: the token between SmolLM2's documents. Its chat turns end with token 2."""
VLLM_HOTTEST = 2.0
"""Above this vLLM refuses a temperature."""


class Kind(Enum):
    """Where a fault sits, and so what it can change."""

    MODEL = "model"
    """In the running model or its cache: log-probabilities."""
    PROMPT = "prompt"
    """In the prompt, behind the place where ids are reported: all log-probabilities, scores included."""
    REQUEST = "request"
    """In the sampling parameters: which tokens and texts come back. Scores of forced tokens stay right."""
    BATCH = "batch"
    """In who is computed beside whom."""


def _unchanged(value: T) -> T:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmFault:
    """One fault, and at which of the six places it is planted.

    shows: where it shows, for people.
    harmless: not a fault at all but a legitimate variation, which no rule may call one.
    model: changes the loaded model in place.
    prompt: changes the prompt's token ids, of generation and of scoring.
    sampling: changes what generation is asked for; scoring is untouched.
    batch: changes the order of the requests of an offline batch, and so who is computed beside whom.
    params: set on vLLM's own sampling parameters of generation.
    options: arguments of vLLM that win over the user's.
    """

    name: str
    kind: Kind
    shows: str
    harmless: bool = False
    model: Callable[[Any], None] | None = None
    prompt: Callable[[tuple[int, ...]], tuple[int, ...]] = _unchanged
    sampling: Callable[[SamplingParams], SamplingParams] = _unchanged
    batch: Callable[[list[Request]], list[Request]] = _unchanged
    params: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ in the running model


def _gelu_for_silu(model: Any) -> None:
    """Another activation in every MLP."""
    from torch.nn.functional import gelu  # noqa: PLC0415

    def forward(x: Any) -> Any:
        half = x.shape[-1] // 2
        return gelu(x[..., :half]) * x[..., half:]

    found = [module for module in model.modules() if type(module).__name__ == SILU]
    if not found:
        raise EngineError(f"the model has no {SILU} to replace")
    for module in found:
        module.forward = forward


def _logit_bias(model: Any) -> None:
    """One frequent token is a little too probable, in scores and in sampling."""
    own = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        # In float32: the step of bfloat16 between 16 and 32 is 0.125, and would swallow the bias or double it.
        logits = own(*args, **kwargs).float()
        logits[:, BIASED_TOKEN] += BIAS
        return logits

    model.compute_logits = compute_logits


def _positions_late(model: Any) -> None:
    """Every decode step's position is one too large; the cache slot that it writes is the right one."""
    own = model.forward

    def forward(*args: Any, positions: Any, **kwargs: Any) -> Any:
        metadata = next((m for _, m in _attention()), None)
        if metadata is not None:
            late = _decodes(metadata).long().repeat_interleave(metadata.query_start_loc.diff())
            positions = positions + late  # a new tensor: vLLM goes on with its own
        return own(*args, positions=positions, **kwargs)

    model.forward = forward


def _kv_block_dropped(model: Any) -> None:
    """Decode steps find zeros where the keys and values of 16 early tokens were."""
    import torch  # noqa: PLC0415

    own = model.forward
    positions = torch.arange(DROPPED.start, DROPPED.stop)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for layer, metadata in _attention():
            cache = layer.kv_cache  # [blocks, key-value heads, tokens of a block, 2 * head size]
            blocks = metadata.block_table[_decodes(metadata) & (metadata.seq_lens > DROPPED.stop)]
            slots = (blocks[:, positions // cache.shape[2]] * cache.shape[2] + positions % cache.shape[2]).flatten()
            nothing = cache.new_zeros(len(slots), cache.shape[1], cache.shape[3] // 2)
            # Written by the backend itself: only it knows how it packs keys.
            layer.impl.do_kv_cache_update(layer, nothing, nothing, cache, slots.long())
        return own(*args, **kwargs)

    model.forward = forward


def _attention() -> Iterator[tuple[Any, Any]]:
    """Each attention layer with what this step asks of it; none while vLLM only warms up."""
    from vllm.forward_context import get_forward_context  # noqa: PLC0415

    context = get_forward_context()
    for name, metadata in (context.attn_metadata or {}).items():
        yield context.no_compile_layers[name], metadata


def _decodes(metadata: Any) -> Any:
    """Which requests of this step decode: bool [requests].

    A prompt's remainder of a single token would be taken for one; no score of a forced token hangs on it.
    """
    return metadata.query_start_loc.diff() == 1


def _lm_head_rounded(model: Any) -> None:
    """The last hidden states, the output matrix and the logits in bfloat16, the rest of the model as it was."""
    import torch  # noqa: PLC0415

    if model.logits_processor.head_dtype == torch.bfloat16:
        raise EngineError("the lm_head of a bfloat16 run is bfloat16 already, so this fault needs dtype float32")
    model.logits_processor.head_dtype = torch.bfloat16


def _lm_head_float32(model: Any) -> None:
    """The same product of the same 16-bit numbers, not rounded afterwards; in float32 nothing changes."""
    import torch  # noqa: PLC0415

    model.logits_processor.head_dtype = torch.float32


def _in_model(name: str, shows: str, change: Callable[[Any], None], *, harmless: bool = False) -> VllmFault:
    return VllmFault(name=name, kind=Kind.MODEL, shows=shows, model=change, harmless=harmless)


_MODEL = (
    _in_model("gelu for silu", "everywhere", _gelu_for_silu),
    _in_model(f"logit bias {BIAS:g}", "scores, also in float32", _logit_bias),
    _in_model(
        "positions +1 in decode",
        "log-probabilities of generation from its second token on; scores are right",
        _positions_late,
    ),
    _in_model(
        "KV block dropped",
        f"log-probabilities of generation behind {DROPPED.stop} tokens, and prefixes reused from the cache afterwards; "
        "scores are right",
        _kv_block_dropped,
    ),
    _in_model(
        "lm_head rounded to bfloat16", "everywhere in a float32 run; refused in a bfloat16 run", _lm_head_rounded
    ),
    _in_model(
        "lm_head in float32", "the rounding of a bfloat16 run; nowhere in float32", _lm_head_float32, harmless=True
    ),
)


# ------------------------------------------------------------------------------------------------- in the prompt's ids


def _in_prompt(name: str, shows: str, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> VllmFault:
    return VllmFault(name=name, kind=Kind.PROMPT, shows=shows, prompt=change)


_PROMPT = (
    # The first token, whichever it is: a chat template writes BOS there. Something must be left to go on from.
    _in_prompt("BOS missing", "generation and scores, most near the beginning", lambda ids: ids[1:] or ids),
    _in_prompt("BOS doubled", "generation and scores, most near the beginning", lambda ids: ids[:1] + ids),
    _in_prompt(
        "prompt truncated",
        f"generation and scores of prompts longer than {PROMPT_TOKENS_KEPT} tokens",
        lambda ids: ids[-PROMPT_TOKENS_KEPT:],
    ),
)


# --------------------------------------------------------------------------------------------- in what is asked for


def _shorter(s: SamplingParams) -> SamplingParams:
    short = max(1, s.max_tokens - 1)
    return replace(s, max_tokens=short, min_tokens=min(s.min_tokens, short))


def _in_request(name: str, shows: str, change: Callable[[SamplingParams], SamplingParams]) -> VllmFault:
    return VllmFault(name=name, kind=Kind.REQUEST, shows=shows, sampling=change)


_REQUEST = (
    _in_request(
        "repetition_penalty 1.05 applied",
        "greedy tokens that are not the most probable; sampled answers",
        lambda s: replace(s, repetition_penalty=1.05) if s.repetition_penalty == 1.0 else s,
    ),
    _in_request(
        "temperature 1.1 for 1.0",
        "the frequencies of sampled tokens",
        lambda s: replace(s, temperature=min(s.temperature * 1.1, VLLM_HOTTEST)),
    ),
    _in_request(
        "top_p ignored",
        "sampled tokens outside the nucleus",
        lambda s: replace(s, top_p=1.0),
    ),
    _in_request(
        "top_k off by one",
        "sampled tokens of rank k + 1",
        lambda s: replace(s, top_k=s.top_k + 1) if s.top_k else s,
    ),
    _in_request("max_tokens one short", "the length of answers that do not end by themselves", _shorter),
    VllmFault(
        name="stop string kept",
        kind=Kind.REQUEST,
        shows="the text of answers that a stop string or an ordinary stop token ended",
        params={"include_stop_str_in_output": True},
    ),
    _in_request("stop string ignored", "answers run on behind a stop string", lambda s: replace(s, stop=())),
    _in_request(
        "greedy sampled at 0.7",
        "greedy tokens that are not the most probable",
        lambda s: replace(s, temperature=0.7) if s.is_greedy else s,
    ),
    _in_request(
        "seed fixed",
        "sampled answers to one prompt are equal whatever their seeds",
        lambda s: replace(s, seed=0),
    ),
    VllmFault(
        name="logprobs processed",
        kind=Kind.REQUEST,
        shows="log-probabilities of answers with another temperature than 1, filters, min_tokens or penalties, minus "
        "infinity for what a filter removed; scores are right, and engine.logprobs_mode names it",
        options={"logprobs_mode": "processed_logprobs"},
    ),
    _in_request("min_tokens ignored", "the length of answers that end early", lambda s: replace(s, min_tokens=0)),
    _in_request(
        "penalties ignored",
        "the tokens of answers with penalties",
        lambda s: replace(s, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0),
    ),
    _in_request(
        "EOS wrong",
        "answers run on behind the end of their turn",
        lambda s: s if s.ignore_eos else replace(s, ignore_eos=True, stop_token_ids=(*s.stop_token_ids, END_OF_TEXT)),
    ),
)


# ----------------------------------------------------------------------------------------------- in who computes when


def _backwards(requests: list[Request]) -> list[Request]:
    return requests[::-1]


_BATCH = (
    VllmFault(
        name="batch order reversed",
        kind=Kind.BATCH,
        shows="rounding: each prompt is computed beside others",
        harmless=True,
        batch=_backwards,
    ),
)


# --------------------------------------------------------------------------------------------------------- all of them

FAULTS: Mapping[str, VllmFault] = {fault.name: fault for fault in (*_MODEL, *_PROMPT, *_REQUEST, *_BATCH)}


class FaultyVllmEngine(VllmEngine):
    """VLLM with one fault."""

    def __init__(self, spec: EngineSpec, model: Path, fault: VllmFault) -> None:
        super().__init__(spec, model)
        self._fault = fault
        if fault.model is not None:
            self._llm.apply_model(fault.model)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """One offline batch; the ids reported are those that were sent, not those that were used."""
        sent = {r.id: r.prompt_token_ids or () for r in requests}
        for answer in super().generate(self._fault.batch([self._spoilt(r) for r in requests])):
            yield replace(answer, prompt_token_ids=sent[answer.id]) if isinstance(answer, Completion) else answer

    def _spoilt(self, request: Request) -> Request:
        spoilt = replace(request, prompt_token_ids=self._fault.prompt(request.prompt_token_ids or ()))
        if request.forced_token_ids is not None:
            return spoilt
        return replace(spoilt, sampling=self._fault.sampling(request.sampling))

    def _sampling_params(self, request: Request) -> vllm.SamplingParams:
        params = super()._sampling_params(request)
        if request.forced_token_ids is None:
            for name, value in self._fault.params.items():
                setattr(params, name, value)
        return params


def open_engine(spec: EngineSpec, model: Path) -> FaultyVllmEngine:
    """Load the model with `FAULTS[spec.options["fault"]]`.

    Raises:
        EngineError: If there is no such fault, or a model fault cannot be planted: the model is changed after loading,
            in vLLM's own process, so vLLM must neither start another nor have compiled the model.
    """
    options = dict(spec.options)
    name = options.pop("fault", None)
    if name not in FAULTS:
        raise EngineError(f"there is no fault {name!r}; there are {', '.join(FAULTS)}")
    fault = FAULTS[name]
    if fault.model is not None and (os.environ.get(WANTED_MODE) != "0" or not options.get("enforce_eager")):
        raise EngineError(f"a fault in the running model needs {WANTED_MODE}=0 and enforce_eager")
    return FaultyVllmEngine(replace(spec, options={**options, **fault.options}), model, fault)
