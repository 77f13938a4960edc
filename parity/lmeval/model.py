"""lm-eval's model interface, without an engine behind it: questions are written down, or answered from a recording.

Imports lm-eval, which takes seconds; only `parity.lmeval` imports this, when it must.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from parity.errors import ConfigError, EngineError, RecordingError
from parity.lmeval.tokenizer import HostTokenizer
from parity.prompts import Prompt, Request, SamplingParams
from parity.recording import Completion, FinishReason, Recording

_TOP = 1
"""Log-probabilities kept with each token: whether it was the greedy one. More cost an engine time."""
_MAX_TOKENS = 256
"""Of an answer whose task does not say; lm-eval's own default."""
_SCORED = SamplingParams.greedy(max_tokens=1, logprobs=_TOP)
_PASSED_ON: Mapping[str, Callable[[Any], float]] = {
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}

_Question: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...] | SamplingParams]"
Score: TypeAlias = "tuple[float, bool]"
"""The log-probability of a continuation in nats, and whether greedy decoding would have chosen it."""
Answer: TypeAlias = "tuple[str, int]"
"""A generated text and its number of tokens."""


class Asking(TemplateLM):  # type: ignore[misc]  # Any to the type checker
    """What both sides of the interface share: how lm-eval's words become requests.

    tokenizer: makes all token ids. max_positions: what a request may need, its answer included.
    """

    def __init__(self, tokenizer: HostTokenizer, *, max_positions: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.output_tokens: Counter[tuple[str, int]] = Counter()
        """Generated tokens of each document, by task and number."""
        self._asked: Counter[tuple[str, int]] = Counter()

    @abstractmethod
    def scored(self, request: Request) -> Score:
        """The score of the request's forced tokens."""

    @abstractmethod
    def generated(self, request: Request) -> Answer:
        """What answers a request."""

    @property
    def eot_token_id(self) -> int | None:
        """The model's end-of-sequence token."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self.tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its chat template in lm-eval's own caches, which are not used here."""
        return self.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; None leaves special tokens to the tokenizer."""
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, or None where none is wanted."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as text; without a generation prompt the last message is continued."""
        return self.tokenizer.render(chat_history, continue_last=not add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:  # noqa: ARG002
        """Score continuations: where context and continuation part is decided by lm-eval's own rule."""
        pairs = super().loglikelihood(requests, disable_tqdm=True)
        return [self._score(instance, *pair) for instance, pair in zip(requests, pairs, strict=True)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: object) -> list[Any]:
        """Called by `TemplateLM.loglikelihood` with the token ids, which go back to our own."""
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Score whole texts, window after window; every token is scored once.

        A window leaves room for its prefix, and for the token that some engines must choose after it.
        """
        totals = []
        for instance in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_positions - 2,
                context_len=1,
            )
            totals.append(math.fsum(self._score(instance, *make_disjoint_window(w))[0] for w in windows))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Answers in words. A request that lm-eval repeats is drawn anew each time where its task asks for sampling."""
        repeats: Counter[int] = Counter()
        answers = []
        for instance in requests:
            text, settings = instance.args
            sampling = sampling_of(settings, draw=repeats[id(instance)], where=_where(instance))
            repeats[id(instance)] += 1
            context = self.tok_encode(text) or [self.prefix_token_id]
            answer, tokens = self.generated(self._request(instance, context, sampling))
            self.output_tokens[instance.task_name, instance.doc_id] += tokens
            answers.append(answer)
        return answers

    def _score(self, instance: Any, context: Sequence[int], continuation: Sequence[int]) -> Score:
        if not continuation:
            raise ConfigError(f"{_where(instance)} has a choice without a token of its own: {instance.args[-1]!r}")
        return self.scored(self._request(instance, context, _SCORED, tuple(continuation)))

    def _request(
        self, instance: Any, context: Sequence[int], sampling: SamplingParams, forced: tuple[int, ...] | None = None
    ) -> Request:
        needed = len(context) + len(forced or ()) + sampling.max_tokens
        if needed > self.max_positions:
            raise ConfigError(
                f"{_where(instance)} needs {needed} positions and there are {self.max_positions}; leave the document "
                "out, ask with fewer examples, or raise the positions of model and engines"
            )
        place = (instance.task_name, instance.doc_id)
        name = f"{instance.task_name}/{instance.doc_id}/{self._asked[place]}"
        self._asked[place] += 1
        return Request(
            prompt=Prompt(id=name, token_ids=tuple(context)),
            sampling=sampling,
            forced_token_ids=forced,
            prompt_token_ids=tuple(context),
        )


class Listening(Asking):
    """Writes down what it is asked, once where it is asked twice, and answers with placeholders."""

    def __init__(self, tokenizer: HostTokenizer, *, max_positions: int) -> None:
        super().__init__(tokenizer, max_positions=max_positions)
        self._heard: dict[_Question, Request] = {}

    @property
    def requests(self) -> tuple[Request, ...]:
        """Those with a common beginning one after the other."""
        return tuple(sorted(self._heard.values(), key=lambda r: (r.prompt_token_ids or (), r.forced_token_ids or ())))

    def scored(self, request: Request) -> Score:
        """Nothing is known yet."""
        self._heard.setdefault(_question(request), request)
        return -1.0, False

    def generated(self, request: Request) -> Answer:
        """Nothing is known yet."""
        self._heard.setdefault(_question(request), request)
        return "", 0


class Answered(Asking):
    """Answers from a recording, by token ids: an answer to another prompt is never taken for this one's.

    Raises, when it is asked:
        RecordingError: If the recording holds no answer to a request.
        EngineError: If its engine gave the request up, or returned no usable log-probabilities.
    """

    def __init__(self, tokenizer: HostTokenizer, recording: Recording, *, max_positions: int) -> None:
        super().__init__(tokenizer, max_positions=max_positions)
        self._label = recording.label
        self._answers = {_answered(c, recording.workload.sampling_of(c.id)): c for c in recording.completions}

    def scored(self, request: Request) -> Score:
        """The sum in double precision; greedy where every token leads its row."""
        forced = request.forced_token_ids or ()
        logprobs = self._find(request).logprobs
        chosen = [] if logprobs is None else logprobs.chosen.tolist()
        if logprobs is None or len(chosen) != len(forced) or not all(map(math.isfinite, chosen)):
            raise EngineError(
                f"{self._label} returned {len(chosen)} log-probabilities for the {len(forced)} tokens of request "
                f"{request.id!r}, or not all of them are finite; a score cannot be made of them"
            )
        leaders = [logprobs.row(position)[:1] for position in range(len(forced))]
        if not all(leaders):
            raise EngineError(f"{self._label} returned no most probable token for request {request.id!r}")
        return math.fsum(chosen), all(row[0][0] == token for row, token in zip(leaders, forced, strict=True))

    def generated(self, request: Request) -> Answer:
        """The engine's own text."""
        found = self._find(request)
        assert found.text is not None, "only forced requests have answers without a text"
        return found.text, len(found.token_ids)

    def _find(self, request: Request) -> Completion:
        found = self._answers.get(_question(request))
        if found is None:
            raise RecordingError(
                f"the recording of {self._label} holds no answer to request {request.id!r}: the task, the tokenizer "
                "or the way it is asked has changed since; record it again"
            )
        if found.finish_reason is FinishReason.ABORT:
            raise EngineError(f"{self._label} gave up request {found.id!r}; record it again")
        return found


def sampling_of(settings: Mapping[str, Any], *, draw: int, where: str) -> SamplingParams:
    """A task's generation settings as sampling parameters: greedy unless it says both that and how it samples.

    draw: which of the repeated answers this is; the seed of a sampled one.

    Raises:
        ConfigError: If a setting is not known, since no engine would honour it, or sampling lacks a temperature.
    """
    asked = {
        name: value for name, value in normalize_gen_kwargs(dict(settings), _MAX_TOKENS).items() if value is not None
    }
    stop, max_tokens, samples = asked.pop("until"), asked.pop("max_gen_toks"), asked.pop("do_sample")
    temperature = asked.pop("temperature", None)
    if samples and temperature is None:
        raise ConfigError(f"{where} asks for sampled answers without a temperature; name one, or say do_sample: false")
    if asked.pop("num_beams", 1) != 1:
        raise ConfigError(f"{where} asks for beam search, which is not one answer of one engine; leave num_beams out")
    if unknown := sorted(asked.keys() - _PASSED_ON.keys()):
        raise ConfigError(
            f"{where} has the generation setting {unknown[0]!r}, which no engine here honours; known are until, "
            f"max_gen_toks, do_sample, temperature, {', '.join(_PASSED_ON)}"
        )
    passed: dict[str, Any] = {name: _PASSED_ON[name](value) for name, value in asked.items()}
    return replace(
        SamplingParams.greedy(max_tokens=max_tokens, logprobs=_TOP),
        # Said even where the task does not: lm-eval means greedy, and an engine's own default may be 1.
        temperature=float(temperature or 0.0),
        seed=draw if samples else 0,
        stop=tuple(text for text in stop if text),
        **passed,
    )


def _question(request: Request) -> _Question:
    """All that an answer depends on; the id is only a name."""
    forced = request.forced_token_ids
    return (request.prompt_token_ids or (), request.sampling if forced is None else forced)


def _answered(completion: Completion, sampling: SamplingParams) -> _Question:
    """The question that a completion answers; under teacher forcing it has no text."""
    return (completion.prompt_token_ids, sampling if completion.text is not None else completion.token_ids)


def _where(instance: Any) -> str:
    return f"document {instance.doc_id} of task {instance.task_name!r}"
