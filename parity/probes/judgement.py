"""All probes of one recording, in the order in which a fault is best looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from parity.probes import choices, draws, ends, scores, texts
from parity.probes.probe import Answer, Found, Probe, unknown
from parity.probes.seen import Seen
from parity.recording import Recording

SIGMA_NATS = 0.13
"""Used where rounding noise was not measured: the documented value for one 16-bit 135M model on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experiment:
    """A probe before it was tried.

    rests_on: probes that must not have failed: whatever this one then showed would be their fault's doing.
    """

    name: str
    root_causes: tuple[str, ...]
    question: str
    judge: Callable[[Seen], Found]
    unit: str
    rests_on: tuple[str, ...] = ()


_CHOICE = ("distribution", "raw", "greedy")
_CHANCE = (*_CHOICE, "seed", "temperature")
_PROBES = (
    _Experiment(
        name="distribution",
        root_causes=("RC13", "RC21"),
        question="are log-probabilities finite, sorted, and those of a distribution?",
        judge=scores.distribution,
        unit="rows",
    ),
    _Experiment(
        name="raw",
        root_causes=("RC12",),
        question="are log-probabilities taken before temperature and filters?",
        judge=scores.raw,
        unit="rows",
        rests_on=("distribution",),
    ),
    _Experiment(
        name="scoring",
        root_causes=("RC13",),
        question="do given tokens get the log-probabilities that decoding gave them?",
        judge=scores.scoring,
        unit="tokens",
        rests_on=("distribution",),
    ),
    _Experiment(
        name="greedy",
        root_causes=("RC01", "RC06"),
        question="does temperature 0 take the most probable token?",
        judge=choices.greedy,
        unit="tokens",
        rests_on=("distribution", "raw"),
    ),
    _Experiment(
        name="seed",
        root_causes=("RC07",),
        question="does one seed give one answer, and another seed another?",
        judge=draws.seed,
        unit="answers",
        rests_on=("distribution",),
    ),
    _Experiment(
        name="temperature",
        root_causes=("RC01", "RC06"),
        question="are tokens drawn at the temperature asked, and without filters?",
        judge=draws.temperature,
        unit="tokens",
        rests_on=(*_CHOICE, "seed"),
    ),
    _Experiment(
        name="top_k",
        root_causes=("RC01", "RC06"),
        question="does top_k keep as many tokens as asked?",
        judge=draws.top_k,
        unit="tokens",
        rests_on=_CHANCE,
    ),
    _Experiment(
        name="top_p",
        root_causes=("RC01", "RC06"),
        question="does top_p keep the nucleus asked?",
        judge=draws.top_p,
        unit="tokens",
        rests_on=_CHANCE,
    ),
    _Experiment(
        name="min_p",
        root_causes=("RC01",),
        question="does min_p keep only what is probable enough?",
        judge=draws.min_p,
        unit="tokens",
        rests_on=_CHANCE,
    ),
    *(
        _Experiment(
            name=one.experiment.value,
            root_causes=("RC08",),
            question=f"does {one.experiment.value} lower the tokens it should, and no others?",
            judge=partial(choices.penalty, one=one),
            unit="tokens",
            rests_on=_CHOICE,
        )
        for one in (choices.REPETITION, choices.PRESENCE, choices.FREQUENCY)
    ),
    _Experiment(
        name="max_tokens",
        root_causes=("RC22",),
        question="are answers as long as asked, and does the finish reason say how each ended?",
        judge=ends.max_tokens,
        unit="answers",
    ),
    _Experiment(
        name="min_tokens",
        root_causes=("RC09",),
        question="does min_tokens keep an answer from ending too early?",
        judge=ends.min_tokens,
        unit="answers",
    ),
    _Experiment(
        name="ignore_eos",
        root_causes=("RC09",),
        question="does ignore_eos let an answer go on past its end?",
        judge=ends.ignore_eos,
        unit="answers",
    ),
    _Experiment(
        name="text",
        root_causes=("RC11",),
        question="is the text what the tokens decode to?",
        judge=texts.text,
        unit="answers",
    ),
    _Experiment(
        name="stop string",
        root_causes=("RC10",),
        question="does a stop string end the answer before it?",
        judge=ends.stop_string,
        unit="answers",
        rests_on=("text",),
    ),
    _Experiment(
        name="stop token",
        root_causes=("RC09",),
        question="does a stop token end the answer?",
        judge=ends.stop_token,
        unit="answers",
    ),
    _Experiment(
        name="end of sequence",
        root_causes=("RC09",),
        question="do the model's own end-of-sequence tokens end answers?",
        judge=ends.end_of_sequence,
        unit="answers",
    ),
    _Experiment(
        name="first token",
        root_causes=("RC02",),
        question="is the beginning-of-sequence token there once only?",
        judge=ends.first_token,
        unit="prompts",
    ),
    _Experiment(
        name="stream",
        root_causes=("RC11",),
        question="is a streamed answer the answer that is given whole?",
        judge=texts.stream,
        unit="answers",
        rests_on=("distribution", "greedy", "text"),
    ),
)


def observe(second: Recording, *, sigma_nats: float = SIGMA_NATS) -> tuple[Probe, ...]:
    """What one engine does with its requests, probe by probe, from its answers to the workload of `second`.

    sigma_nats: what rounding does to the margin between two tokens (`parity.noise.Noise.sigma_nats`).

    Raises:
        IncomparableError: If the recording does not answer that workload.
    """
    seen = Seen(second, sigma_nats)
    found: dict[str, Found] = {}
    for one in _PROBES:
        wrong = [name for name in one.rests_on if found[name].answer is Answer.OTHERWISE]
        found[one.name] = (
            unknown(f"not looked at: it rests on {wrong[0]}, which is not as asked") if wrong else one.judge(seen)
        )
    return tuple(_probe(one, found) for one in _PROBES)


def _probe(one: _Experiment, found: Mapping[str, Found]) -> Probe:
    result = found[one.name]
    return Probe(
        name=one.name,
        root_causes=one.root_causes,
        question=one.question,
        answer=result.answer,
        sentence=result.sentence,
        n=result.n,
        unit=one.unit,
        evidence=result.evidence,
        cause=result.cause,
    )
