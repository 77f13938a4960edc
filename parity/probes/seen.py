"""The answers to the experiments, as the probes look at them: by experiment, and step by step.

Two log-probabilities of one context are held against sigma, the rounding noise. A token and the row it was chosen from
come out of one forward pass, so a correct engine's gaps are 0; the tolerance is for engines that compute the two apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from parity.divergence import in_asked_order
from parity.errors import IncomparableError
from parity.fingerprint import Scalar
from parity.probes.questions import Experiment, base_id
from parity.prompts import SamplingParams
from parity.recording import Completion, FinishReason, Recording

LOG_IMPOSSIBLE = math.log(1e-6)
"""An event of this log-probability, or less, is not chance."""
_SURE_SIGMAS, _LIKELY_SIGMAS, _LIKELY_COUNT = 6.0, 2.0, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A chosen token, the stop token included, and what it was chosen from.

    row: the most probable tokens and their finite log-probabilities in nats, most probable first.
    before: the tokens of the answer so far.
    """

    id: str
    position: int
    token_id: int
    logprob: float
    row: Mapping[int, float]
    prompt: tuple[int, ...]
    before: tuple[int, ...]
    asked: SamplingParams

    @property
    def values(self) -> list[float]:
        """The row without its tokens, in nats, descending."""
        return list(self.row.values())

    @property
    def rank(self) -> int:
        """How many tokens of the row are more probable, 0 for the most probable; the row's length outside it."""
        return list(self.row).index(self.token_id) if self.token_id in self.row else len(self.row)

    def gap(self, taken_nats: Callable[[int], float] = lambda _: 0.0) -> float:
        """How far the chosen token lies below the best one, after `taken_nats` has been taken from each. In nats."""
        best = max((value - taken_nats(token_id) for token_id, value in self.row.items()), default=-math.inf)
        return best - (self.logprob - taken_nats(self.token_id))

    def __str__(self) -> str:
        return f"{self.id}, token {self.position}"


@dataclass(frozen=True)
class Seen:
    """One engine's answers to the workload of `questions.second`.

    sigma_nats: what rounding does to the margin between two tokens.
    """

    recording: Recording
    sigma_nats: float

    def __post_init__(self) -> None:
        if not any(c.id == base_id(c.id) for c in self.recording.completions):
            raise IncomparableError(
                f"workload {self.recording.workload.name!r} of {self.recording.label} asks no base question; contract "
                "probes judge a recording of the workload that parity.probes.second makes"
            )

    @cached_property
    def answers(self) -> tuple[Completion, ...]:
        """All that the engine did not give up, in the order of asking."""
        return tuple(c for c in in_asked_order(self.recording) if c.finish_reason is not FinishReason.ABORT)

    @staticmethod
    def experiment(answer: Completion) -> Experiment:
        """What was changed about the answer's base question."""
        return Experiment(answer.id.partition(":")[0])

    def of(self, *experiments: Experiment) -> list[Completion]:
        """The answers to these experiments."""
        return [c for e in experiments for c in self._by_experiment.get(e, ())]

    @cached_property
    def _by_experiment(self) -> Mapping[Experiment, list[Completion]]:
        found: dict[Experiment, list[Completion]] = {}
        for answer in self.answers:
            found.setdefault(self.experiment(answer), []).append(answer)
        return found

    def base(self, answer: Completion) -> Completion | None:
        """The answer to the question that an experiment changes one thing about; None if it was given up."""
        return next((c for c in self.answers if c.id == base_id(answer.id)), None)

    def asked(self, answer: Completion) -> SamplingParams:
        """What the engine was asked."""
        return self.recording.workload.sampling_of(answer.id)

    def steps(self, *experiments: Experiment) -> list[Step]:
        """All steps of these experiments that have log-probabilities."""
        return [step for experiment in experiments for step in self._steps(experiment)]

    def first_rows(self, experiment: Experiment) -> list[tuple[Step, Step]]:
        """The first step of each of these answers, beside that of its base question: one context, asked twice."""
        first = {s.id: s for s in self.steps(Experiment.BASE) if s.position == 0}
        steps = [s for s in self.steps(experiment) if s.position == 0]
        return [(first[base_id(s.id)], s) for s in steps if base_id(s.id) in first]

    def _steps(self, experiment: Experiment) -> list[Step]:
        if experiment not in self._cache:
            self._cache[experiment] = [step for answer in self.of(experiment) for step in self._steps_of(answer)]
        return self._cache[experiment]

    @cached_property
    def _cache(self) -> dict[Experiment, list[Step]]:
        return {}

    def _steps_of(self, answer: Completion) -> Iterable[Step]:
        end, length = answer.terminator, len(answer.token_ids)
        parts = [(0, answer.token_ids, answer.logprobs)]
        if end is not None:
            parts.append((length, (end.token_id,), end.logprobs))
        for start, token_ids, logprobs in parts:
            if logprobs is None or not logprobs.k:
                continue
            k, ids, values = logprobs.k, logprobs.top_token_ids.tolist(), logprobs.top.tolist()
            for at, (token_id, logprob) in enumerate(zip(token_ids, logprobs.chosen, strict=True)):
                row = zip(ids[at * k : (at + 1) * k], values[at * k : (at + 1) * k], strict=True)
                yield Step(
                    id=answer.id,
                    position=start + at,
                    token_id=token_id,
                    logprob=logprob,
                    row={i: value for i, value in row if -math.inf < value < math.inf},
                    prompt=answer.prompt_token_ids,
                    before=answer.token_ids[: start + at],
                    asked=self.asked(answer),
                )

    def model_token_ids(self, name: str) -> frozenset[int]:
        """What the model's configuration says of a special token, at any depth; there may be none or several."""
        found: set[int] = set()
        for key, value in self.recording.fingerprint.identity.items():
            if key.startswith("model.config.") and key.rpartition(".")[2] == name:
                found.update(_ids(value))
        return frozenset(found)

    def off(self, steps: Sequence[Step], gaps_nats: Sequence[float]) -> list[tuple[Step, float]]:
        """The steps with too large a gap, largest first: one over 6 sigma, or three over 2 sigma; else none.

        With sigma 0.13 nats, two kernels that disagree by it and a margin below 0.1 nats at 2 % of all steps, three
        over 2 sigma are expected once in 20,000 runs of 288 steps.
        """
        pairs = sorted(zip(steps, gaps_nats, strict=True), key=lambda pair: -pair[1])
        large = [pair for pair in pairs if not pair[1] <= _LIKELY_SIGMAS * self.sigma_nats]
        sure = any(not gap <= _SURE_SIGMAS * self.sigma_nats for _, gap in large)
        return large if sure or len(large) >= _LIKELY_COUNT else []

    @property
    def tolerance_nats(self) -> float:
        """What is likely to be rounding at a single step."""
        return _LIKELY_SIGMAS * self.sigma_nats


def _ids(value: Scalar) -> list[int]:
    """A fingerprint holds a list as its JSON text."""
    if isinstance(value, str):
        value = json.loads(value) if value.startswith("[") else None
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]
