"""Hugging Face transformers, in process: the reference.

A decode loop of its own rather than `model.generate`, so that completions leave as they finish and every choice is
visible: raw log-probabilities come from the model's logits, before penalties, temperature and filters; the greedy token
is their argmax, the lowest id where two are equal. The arithmetic is the model's own forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Here and not in the constructor: the worker makes one sentence of an import that fails.
import torch
import transformers
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from parity.engines import EngineSpec, Progress, TokenizedPrompt, tokenize
from parity.errors import EngineError
from parity.fingerprint import Scalar
from parity.prompts import Prompt, Request
from parity.recording import Completion, FinishReason, Terminator, Timing, TokenLogprobs

_BATCH_SIZE = 256
_BATCH_POSITIONS = 32768  # of all rows together; bounds the cache: 1.5 GB in float32 for a model of 135M parameters
_FORWARD_BYTES = 200e6  # of float32 logits, or of what a prefill would need for them: 1017 positions of 49152 tokens
_SPARE_POSITIONS = 64
_DROP_RATIO = 0.1  # finished rows are dropped when they are this share of the batch: each drop copies the cache
_PROGRESS_EVERY_S = 0.5


def open_engine(spec: EngineSpec, model: Path) -> TransformersEngine:
    """Load the model."""
    return TransformersEngine(spec, model)


class TransformersEngine:
    """`AutoModelForCausalLM`, driven token by token.

    The options `device`, `batch_size` and `batch_positions` are ours; all others go to `from_pretrained`.
    """

    def __init__(self, spec: EngineSpec, model: Path) -> None:
        if spec.quantization is not None:
            raise EngineError(
                f"transformers cannot quantize to {spec.quantization!r}; name a quantized model directory"
            )
        options = dict(spec.options)
        self._device = options.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size = int(options.pop("batch_size", _BATCH_SIZE))
        self._batch_positions = int(options.pop("batch_positions", _BATCH_POSITIONS))
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        transformers.AttentionInterface.register("sdpa", _attention)
        local = {"pretrained_model_name_or_path": str(model), "local_files_only": True}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**local, dtype=spec.dtype, **options)
        self._model = loaded.to(self._device).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**local)
        config = self._model.config.get_text_config()
        # Recurrent layers keep a state that rows prefilled apart cannot be joined by.
        if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
            raise EngineError(f"this engine runs attention layers only; the model also has {', '.join(sorted(other))}")
        self._vocab_size = int(config.vocab_size)
        self._limit: int | None = getattr(config, "max_position_embeddings", None)
        eos: Any = self._model.generation_config.eos_token_id  # one, several or none
        eos_ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        self.eos_ids = frozenset(int(i) for i in eos_ids if i is not None)

    def facts(self) -> Mapping[str, Scalar]:
        """Versions, and what transformers decided about the model."""
        return {
            "engine.version": transformers.__version__,
            "engine.dtype": str(self._model.dtype).removeprefix("torch."),
            "engine.attention": self._model.config._attn_implementation,
            "engine.device": str(self._model.device),
            "engine.max_model_len": self._limit,
            "torch.version": torch.__version__,
        }

    def tokenize(self, prompts: Sequence[Prompt]) -> Sequence[TokenizedPrompt]:
        """Through the model directory's own tokenizer and chat template."""
        return [tokenize(self.tokenizer, p) for p in prompts]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """By the model directory's own tokenizer."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """Generate, then score; each in groups of similar length, so that little is wasted on padding."""
        clock = _Clock()
        for request in requests:
            self._refuse_impossible(request)
        for group in _grouped([r for r in requests if r.forced_token_ids is None], self._fits_cache):
            yield from self._decode(group, clock)
        for group in _grouped([r for r in requests if r.forced_token_ids is not None], self._fits_forward):
            yield from self._score(group, clock)

    def close(self) -> None:
        """Free the weights."""
        del self._model
        torch.cuda.empty_cache()

    def _refuse_impossible(self, request: Request) -> None:
        """What this engine cannot do, and what the model would do beyond its positions: no place to compare from."""
        if request.stream or request.reuse_prefix or request.sampling.structured is not None:
            raise EngineError(f"prompt {request.id!r}: this engine cannot stream, reuse prefixes or structure")
        given, forced = len(request.prompt_token_ids or ()), request.forced_token_ids
        answer = request.sampling.max_tokens if forced is None else len(forced)
        if min(given, answer) < 1:
            raise EngineError(f"prompt {request.id!r} has {given} tokens and asks for {answer}; neither may be 0")
        if self._limit is not None and given + answer > self._limit:
            raise EngineError(
                f"prompt {request.id!r} needs {given + answer} positions and the model has max_position_embeddings "
                f"{self._limit}; shorten the prompt or ask for fewer tokens"
            )

    def _fits_cache(self, group: Sequence[Request]) -> bool:
        longest = max(len(_input_ids(r)) for r in group) + max(r.sampling.max_tokens for r in group)
        return len(group) <= self._batch_size and len(group) * longest <= self._batch_positions

    def _fits_forward(self, group: Sequence[Request]) -> bool:
        """More at once is no faster on a CPU, wastes more on padding, and is silent for longer."""
        return len(group) * max(len(_input_ids(r)) for r in group) * self._vocab_size * 4 <= _FORWARD_BYTES

    def _logits(self, batch: _Batch, *, keep: int) -> torch.Tensor:
        """Those of the last `keep` positions. Shapes: [P, keep, V]."""
        inputs = {"input_ids": batch.token_ids, "attention_mask": batch.mask, "position_ids": batch.positions}
        return self._model(**inputs, past_key_values=batch.cache, use_cache=True, logits_to_keep=keep).logits

    def _batch(self, requests: Sequence[Request]) -> _Batch:
        rows = [_Row(request=r, engine=self) for r in requests]
        ids = [_input_ids(r) for r in requests]
        width = max(map(len, ids))
        token_ids = torch.tensor([[0] * (width - len(i)) + list(i) for i in ids], device=self._device)
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=self._device)
        positions, cache = (mask.cumsum(dim=-1) - 1).clamp(min=0), transformers.Cache(layer_class_to_replicate=_Layer)
        return _Batch(token_ids=token_ids, positions=positions, mask=mask, rows=rows, cache=cache)

    def _decode(self, group: Sequence[Request], clock: _Clock) -> Iterator[Completion | Progress]:
        """Prefill in parts of few positions; then a token a step for all rows together."""
        parts = []
        for requests in _grouped(group, self._fits_forward):
            parts.append(self._batch(requests))
            yield from self._step(parts[-1], clock)
        batch = _joined(parts)
        del parts  # and the caches that were copied
        while batch.rows:
            yield from self._step(batch, clock)

    def _step(self, batch: _Batch, clock: _Clock) -> Iterator[Completion | Progress]:
        """Append a token to every row. A finished row that was not dropped yet is carried along and never read."""
        logits = self._logits(batch, keep=1)[:, -1].float()
        chosen = logits.argmax(dim=-1)  # of equal ones torch takes the first
        for i, row in enumerate(batch.rows):
            if row.finish is None and not row.takes_argmax:
                chosen[i] = row.choose(logits[i])
        steps = _steps(logits, chosen.tolist(), k=max(row.request.sampling.logprobs for row in batch.rows))
        for row, step in zip(batch.rows, steps, strict=True):
            if row.finish is None and row.accept(step, clock):
                yield row.completion(clock)
        batch.advance(chosen)
        yield from clock.progress()

    def _score(self, group: Sequence[Request], clock: _Clock) -> Iterator[Completion | Progress]:
        """One forward for all tokens of all rows."""
        longest = max(len(r.forced_token_ids or ()) for r in group)
        batch = self._batch(group)
        logits = self._logits(batch, keep=longest)
        for i, row in enumerate(batch.rows):
            forced, k = row.request.forced_token_ids or (), row.request.sampling.logprobs
            row.steps = _steps(logits[i, longest - len(forced) :].float(), forced, k=k)
            clock.tokens += len(forced)
            yield row.completion(clock)
        yield from clock.progress()


class _Clock:
    """Time and tokens since the call began."""

    def __init__(self) -> None:
        self.tokens = 0
        self._started_ns = self._signed_ns = time.perf_counter_ns()

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._started_ns

    def progress(self) -> Iterator[Progress]:
        if time.perf_counter_ns() - self._signed_ns > _PROGRESS_EVERY_S * 1e9:
            self._signed_ns = time.perf_counter_ns()
            yield Progress(tokens=self.tokens)


class _Step(NamedTuple):
    """A token, its raw logprob, and the most probable tokens at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, kw_only=True)
class _Row:
    """One request on its way."""

    request: Request
    engine: TransformersEngine
    steps: list[_Step] = field(default_factory=list)
    text: str = ""
    first_token_ns: int | None = None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    terminated: bool = False
    """The last step is the end-of-sequence or stop token."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    """A row's own, on the CPU: neither the rest of the batch nor the device changes what is drawn."""

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        self.generator.manual_seed(torch.seed() if seed is None else seed)

    @property
    def takes_argmax(self) -> bool:
        s = self.request.sampling
        penalized = s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0
        return s.is_greedy and not penalized and len(self.steps) >= s.min_tokens

    def choose(self, logits: torch.Tensor) -> int:
        """Minimum length, penalties, temperature, min-p, top-k, top-p, draw: in vLLM's order.

        Source: vllm/v1/sample/sampler.py, whose presence and frequency penalties follow the OpenAI formula.
        """
        s, output = self.request.sampling, [step.token_id for step in self.steps]
        scores = logits[None].cpu().clone()
        if len(output) < s.min_tokens:
            # As in vLLM also under ignore_eos, which only keeps an end-of-sequence token from ending the answer.
            scores[0, [*self.engine.eos_ids, *s.stop_token_ids]] = float("-inf")
        seen = torch.tensor([[*(self.request.prompt_token_ids or ()), *output]])
        if s.repetition_penalty != 1.0:
            scores = transformers.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))(seen, scores)
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=scores.shape[-1])
        scores = scores - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
        if s.is_greedy:
            return int(scores.argmax())
        scores = transformers.TemperatureLogitsWarper(float(s.temperature))(seen, scores)
        if s.min_p > 0.0:
            scores = transformers.MinPLogitsWarper(s.min_p)(seen, scores)
        if s.top_k > 0:
            scores = transformers.TopKLogitsWarper(s.top_k)(seen, scores)
        if s.top_p < 1.0:
            scores = transformers.TopPLogitsWarper(s.top_p)(seen, scores)
        return int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=self.generator))

    def accept(self, step: _Step, clock: _Clock) -> bool:
        """Take a token and say whether it was the last."""
        s, token_id = self.request.sampling, step.token_id
        clock.tokens += 1
        self.first_token_ns = self.first_token_ns or clock.now_ns()
        self.steps.append(step)
        is_eos = token_id in self.engine.eos_ids and not s.ignore_eos
        if is_eos or token_id in s.stop_token_ids:
            self.finish, self.stop_reason, self.terminated = FinishReason.STOP, None if is_eos else token_id, True
        elif s.stop and self._cut_at_stop_string():
            self.finish = FinishReason.STOP
        elif len(self.steps) >= s.max_tokens:
            self.finish = FinishReason.LENGTH
        return self.finish is not None

    def completion(self, clock: _Clock) -> Completion:
        body, k = len(self.steps) - self.terminated, self.request.sampling.logprobs
        logprobs = TokenLogprobs.from_rows([s.logprob for s in self.steps], [s.top for s in self.steps], k=k)
        end = Terminator(token_id=self.steps[-1].token_id, logprobs=logprobs.rows(body, body + 1))
        whole = self._decoded() if self.request.forced_token_ids is None else None
        return Completion(
            id=self.request.id,
            prompt_token_ids=self.request.prompt_token_ids or (),
            own_prompt_token_ids=None,
            prompt_text=None,
            token_ids=tuple(step.token_id for step in self.steps[:body]),
            text=self.text if isinstance(self.stop_reason, str) else whole,
            terminator=end if self.terminated else None,
            finish_reason=self.finish or FinishReason.LENGTH,
            stop_reason=self.stop_reason,
            logprobs=logprobs.rows(0, body),
            timing=Timing(submitted_ns=0, first_token_ns=self.first_token_ns, finished_ns=clock.now_ns()),
        )

    def _decoded(self) -> str:
        body = self.steps[: len(self.steps) - self.terminated]
        return self.engine.detokenize([step.token_id for step in body])

    def _cut_at_stop_string(self) -> bool:
        """Look for a stop string that the newest token completed; of several, the one that ends first.

        As in vLLM, one that was complete within the first `min_tokens` tokens never counts.
        """
        # The first bytes of a character decode to U+FFFD until the rest has come: no text yet.
        old, self.text = len(self.text.rstrip("\ufffd")), self._decoded()
        if len(self.steps) <= self.request.sampling.min_tokens:
            return False
        stops = self.request.sampling.stop
        found = [(self.text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in stops]
        found = sorted((f for f in found if f[0] >= 0), key=lambda f: f[0] + len(f[1]))
        if found:
            self.text, self.stop_reason = self.text[: found[0][0]], found[0][1]
        return bool(found)


@dataclass(slots=True, kw_only=True)
class _Batch:
    """Padded on the left. Shapes: token_ids and positions of the next forward, mask of all positions up to it."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: list[_Row]
    cache: Any

    def advance(self, chosen: torch.Tensor) -> None:
        """Make the chosen tokens the next input, and drop finished rows once that is worth it."""
        self.token_ids, self.positions = chosen[:, None], self.positions[:, -1:] + 1
        self.mask = pad(self.mask, (0, 1), value=1)
        alive = [i for i, row in enumerate(self.rows) if row.finish is None]
        if len(self.rows) - len(alive) >= max(1, _DROP_RATIO * len(self.rows)):
            index = torch.tensor(alive, device=chosen.device, dtype=torch.long)
            self.rows = [self.rows[i] for i in alive]
            self.token_ids, self.positions, self.mask = self.token_ids[index], self.positions[index], self.mask[index]
            self.cache.batch_select_indices(index)


class _Layer(transformers.cache_utils.DynamicLayer):  # type: ignore[misc]  # Any where transformers is not installed
    """Keys and values that grow in place: fresh memory for all of them at every token took longer than the model.

    Keeps every position, also for layers that look back over a window only: their mask sees to that.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.keys, self.values = _appended(self.keys, key_states), _appended(self.values, value_states)
        return self.keys, self.values


def _appended(old: Any, new: Any) -> Any:
    """In place, where `old` is the front of a store with room; selecting or joining rows makes tensors without one."""
    start, stop = old.shape[-2], old.shape[-2] + new.shape[-2]
    store = getattr(old, "store", None)
    if store is None or store.shape[-2] < stop:
        store = pad(old, (0, 0, 0, new.shape[-2] + _SPARE_POSITIONS))
    store[..., start:stop, :] = new
    front = store[..., :stop, :]
    front.store = store
    return front


def _joined(parts: Sequence[_Batch]) -> _Batch:
    """One batch of several that were prefilled apart; what was shorter gets more padding on its left."""
    first, width = parts[0], max(part.mask.shape[1] for part in parts)
    for i, layer in enumerate(first.cache.layers if len(parts) > 1 else ()):
        for name in ("keys", "values"):
            tensors = [getattr(part.cache.layers[i], name) for part in parts]
            # The mask has a place for the next token already, the cache has not.
            setattr(layer, name, torch.cat([pad(t, (0, 0, width - 1 - t.shape[-2], 0)) for t in tensors]))
    return _Batch(
        token_ids=torch.cat([part.token_ids for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        mask=torch.cat([pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts]),
        rows=[row for part in parts for row in part.rows],
        cache=first.cache,
    )


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """SDPA as transformers calls it, but a decode step on a CPU does not copy keys and values for each query head.

    Equal to the bit, and five times as fast; transformers leaves it to the kernel only where nothing is padded.
    """
    ordinary = attention_mask is not None and options.get("position_bias") is None
    if query.shape[2] > 1 or query.device.type != "cpu" or not ordinary:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    output = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def _grouped(requests: Sequence[Request], fits: Callable[[Sequence[Request]], bool]) -> Iterator[list[Request]]:
    """Neighbours in length, as many as fit; the longest first, so that what is too large fails at once."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda r: len(_input_ids(r)), reverse=True):
        if group and not fits([*group, request]):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _input_ids(request: Request) -> tuple[int, ...]:
    """What the first forward sees. The last forced token predicts nothing and stays out."""
    return (request.prompt_token_ids or ()) + (request.forced_token_ids or ())[:-1]


def _steps(logits: torch.Tensor, token_ids: Sequence[int], *, k: int) -> list[_Step]:
    """The raw log-probabilities of one token per position. Shapes: logits float32 [T, V]."""
    logprobs = logits.log_softmax(dim=-1)
    index = torch.tensor(token_ids, device=logits.device, dtype=torch.long)[:, None]
    top_ids = _top_ids(logits, min(k, logits.shape[-1]))
    columns = (logprobs.gather(-1, index)[:, 0], top_ids, logprobs.gather(-1, top_ids))
    return [
        _Step(token_id=token_id, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in zip(token_ids, *(c.tolist() for c in columns), strict=True)
    ]


def _top_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest, of equal ones the lowest ids first.

    `torch.topk` breaks ties as it likes, at the edge as well as inside, and bfloat16 logits are full of them. Ranked by
    logits, since a log-softmax may round two of them to one value and the first must be the argmax.
    """
    values, ids = logits.topk(k, dim=-1)
    if k == 0 or not len(logits):
        return ids
    ids = ids.sort(dim=-1).values
    ids = ids.gather(-1, logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)
    tied_at_the_edge = (logits >= values[:, -1:]).sum(dim=-1) > k
    for row in tied_at_the_edge.nonzero()[:, 0].tolist():
        candidates = (logits[row] >= values[row, -1]).nonzero()[:, 0]
        ids[row] = candidates[logits[row, candidates].sort(descending=True, stable=True).indices[:k]]
    return ids
