"""What is asked of a server, and when: profiles of traffic, and the plan of requests that a seed makes of one. Pure.

A plan is made once and sent to every engine: the same token ids, in the same order, at the same moments.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from parity.errors import ConfigError

GATED_MOST = 3
"""Metrics of one profile that may decide; every further one would cost the others their share of false alarms."""

_QUANTILES = 21  # of a fitted distribution: every 5 %
_FITTED_REQUESTS = 600
_LEAST_SPREAD = 0.1  # of the gaps, as a share of their mean: below it arrivals are as good as evenly spaced


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The same count every time."""

    tokens: int

    def draw(self, _: np.random.RandomState, count: int) -> NDArray[np.float64]:
        """`count` counts."""
        return np.full(count, float(self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """sigma: standard deviation of the counts' natural logarithm."""

    median: float
    sigma: float

    def draw(self, random: np.random.RandomState, count: int) -> NDArray[np.float64]:
        """`count` counts, not yet whole ones."""
        return self.median * np.exp(self.sigma * random.standard_normal(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Empirical:
    """quantiles: rising counts at evenly spaced shares from 0 to 1, with straight lines between them."""

    quantiles: tuple[float, ...]

    def draw(self, random: np.random.RandomState, count: int) -> NDArray[np.float64]:
        """`count` counts, not yet whole ones."""
        return np.interp(random.random_sample(count), np.linspace(0.0, 1.0, len(self.quantiles)), self.quantiles)


Shape: TypeAlias = Fixed | Lognormal | Empirical


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How many tokens: a distribution, rounded, then clipped to [least, most]."""

    shape: Shape
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"token counts must lie in 1 <= least <= most, not least {self.least}, most {self.most}")
        match self.shape:
            case Lognormal(median=median, sigma=sigma) if not (median > 0.0 and sigma >= 0.0):
                raise ConfigError(f"a lognormal needs median > 0 and sigma >= 0, not {median} and {sigma}")
            case Empirical(quantiles=values) if len(values) < 2 or any(a > b for a, b in pairwise(values)):
                raise ConfigError(f"quantiles must be at least two rising counts, not {list(values)}")
            case _:
                pass

    def draw(self, random: np.random.RandomState, count: int) -> NDArray[np.int64]:
        """`count` token counts, int64 [count]."""
        return np.clip(np.rint(self.shape.draw(random, count)), self.least, self.most).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests come whether or not earlier ones were answered, as users do.

    burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, more is steadier.
    """

    rate_per_s: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not (self.rate_per_s > 0.0 and self.burstiness > 0.0):
            raise ConfigError(
                f"an open loop needs rate_per_s > 0 and burstiness > 0, not {self.rate_per_s} and {self.burstiness}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """An open loop at recorded moments with recorded lengths; which prompt went with which answer is kept.

    at_s: seconds from the first request, rising. prompt_tokens, output_tokens: of the same requests.
    """

    at_s: tuple[float, ...] = field(repr=False)
    prompt_tokens: tuple[int, ...] = field(repr=False)
    output_tokens: tuple[int, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not len(self.at_s) == len(self.prompt_tokens) == len(self.output_tokens):
            raise ConfigError(
                f"a trace needs as many lengths as moments, not {len(self.at_s)} moments, {len(self.prompt_tokens)} "
                f"prompt and {len(self.output_tokens)} output lengths"
            )
        if any(a > b for a, b in pairwise(self.at_s)) or (self.at_s and self.at_s[0] < 0.0):
            raise ConfigError("a trace's moments must rise from 0; sort it by time")
        if min((*self.prompt_tokens, *self.output_tokens), default=1) < 1:
            raise ConfigError("a trace's requests must have at least one prompt and one output token each")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """So many users, each of whom asks again as soon as the last answer is complete."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"a closed loop needs a concurrency of at least 1, not {self.concurrency}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """Everything at once: how fast is the whole batch done?"""


Arrivals: TypeAlias = OpenLoop | Trace | ClosedLoop | Offline


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Limits within which an answer is a good one, in seconds; None: no such limit.

    ttft_s: to the first token. tpot_s: for each token after it. e2e_s: for the whole answer.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A kind of traffic.

    prompt_tokens, output_tokens: None with a trace, which has its own.
    requests: how many are measured. warmup: how many others are sent before them.
    gated: ids of the metrics that decide, at most three; the others are reported.
    """

    name: str
    description: str
    arrivals: Arrivals
    prompt_tokens: Lengths | None
    output_tokens: Lengths | None
    requests: int
    warmup: int
    slo: Slo
    gated: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.requests < 1 or self.warmup < 0:
            raise ConfigError(
                f"profile {self.name!r} needs at least 1 request and no negative warm-up, not {self.requests} requests "
                f"and {self.warmup}"
            )
        if len(self.gated) > GATED_MOST:
            raise ConfigError(
                f"profile {self.name!r} gates {len(self.gated)} metrics, and at most {GATED_MOST} may decide; report "
                "the others"
            )
        if isinstance(self.arrivals, Trace):
            if len(self.arrivals.at_s) < self.requests:
                raise ConfigError(
                    f"profile {self.name!r} wants {self.requests} requests, and its trace has {len(self.arrivals.at_s)}"
                )
        elif self.prompt_tokens is None or self.output_tokens is None:
            raise ConfigError(f"profile {self.name!r} says no lengths; only a trace has its own")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request. at_s: when it is due, from the run's beginning; None in a closed loop."""

    id: str
    at_s: float | None
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Exactly what is sent. concurrency: of a closed loop, else None."""

    profile: str
    seed: int
    concurrency: int | None
    requests: tuple[PlannedRequest, ...] = field(repr=False)
    warmup: tuple[PlannedRequest, ...] = field(repr=False)

    def sha256(self) -> str:
        """What makes two plans the same: all of it but the profile's name."""
        digest = hashlib.sha256(f"{self.seed} {self.concurrency}".encode())
        for request in (*self.warmup, *self.requests):
            digest.update(f"{request.id} {request.at_s} {request.max_tokens} ".encode())
            digest.update(np.asarray(request.prompt_token_ids, dtype="<i8").tobytes())
        return digest.hexdigest()


def plan(profile: Profile, *, seed: int, vocabulary: Sequence[int], max_positions: int) -> Plan:
    """Draw the requests of a profile.

    Every prompt, those of the warm-up included, begins with a token of its own, so that no prefix cache of any block
    size finds one prompt in another. Moments, lengths and token ids are drawn from streams of their own: another rate
    leaves the prompts as they are.

    vocabulary: the token ids that prompts may hold. max_positions: prompt and answer together, of the model.

    Raises:
        ConfigError: If the model is too short for the profile, or the vocabulary too small.
    """
    count, warmup = profile.requests, profile.warmup
    prompts, outputs = _lengths(profile, seed)
    longest = int((prompts + outputs).max())
    if longest > max_positions:
        raise ConfigError(
            f"profile {profile.name!r} asks for up to {longest} tokens in one request, and the model has "
            f"{max_positions} positions; lower 'most' in its lengths, or scale the profile"
        )
    if len(vocabulary) < count + warmup:
        raise ConfigError(
            f"profile {profile.name!r} needs {count + warmup} prompts that begin with different tokens, and there are "
            f"{len(vocabulary)} token ids; ask fewer requests"
        )
    random = _stream(seed, "tokens")
    table = [int(token) for token in vocabulary]  # one int object per id, shared by all prompts: memory
    first = random.permutation(len(table))[: count + warmup]
    moments = _moments(profile, seed)
    made = []
    for number, (begin, length) in enumerate(zip(first, prompts, strict=True)):
        rest = random.randint(0, len(table), size=length - 1).tolist()
        measured = number < count
        made.append(
            PlannedRequest(
                id=f"r{number:06d}" if measured else f"w{number - count:06d}",
                at_s=moments[number] if measured and moments is not None else None,
                prompt_token_ids=(table[begin], *(table[index] for index in rest)),
                max_tokens=int(outputs[number]),
            )
        )
    return Plan(
        profile=profile.name,
        seed=seed,
        concurrency=profile.arrivals.concurrency if isinstance(profile.arrivals, ClosedLoop) else None,
        requests=tuple(made[:count]),
        warmup=tuple(made[count:]),
    )


def scaled(profile: Profile, share: float) -> Profile:
    """The same traffic with every token count multiplied, for small machines; its name says so.

    Raises:
        ConfigError: If `share` is not above 0.
    """
    if share <= 0.0:
        raise ConfigError(f"a profile is scaled by a share above 0, not {share}")

    def count(tokens: float) -> int:
        return max(1, round(tokens * share))

    def lengths(found: Lengths | None) -> Lengths | None:
        if found is None:
            return None
        shape: Shape
        match found.shape:
            case Fixed(tokens=tokens):
                shape = Fixed(tokens=count(tokens))
            case Lognormal(median=median, sigma=sigma):
                shape = Lognormal(median=median * share, sigma=sigma)
            case Empirical(quantiles=quantiles):
                shape = Empirical(quantiles=tuple(value * share for value in quantiles))
        return Lengths(shape=shape, least=count(found.least), most=count(found.most))

    arrivals = profile.arrivals
    if isinstance(arrivals, Trace):
        arrivals = replace(
            arrivals,
            prompt_tokens=tuple(map(count, arrivals.prompt_tokens)),
            output_tokens=tuple(map(count, arrivals.output_tokens)),
        )
    return replace(
        profile,
        name=f"{profile.name}*{share:g}",
        arrivals=arrivals,
        prompt_tokens=lengths(profile.prompt_tokens),
        output_tokens=lengths(profile.output_tokens),
    )


def fit(name: str, trace: Trace) -> Profile:
    """The profile that recorded requests look like: an open loop with their rate, burstiness and lengths.

    Burstiness is that of the gaps' variance (1 / CV^2, as a gamma distribution has it): a record over quiet and busy
    hours therefore looks burstier than each hour is. Which prompt went with which answer is lost; a trace keeps it.

    Raises:
        ConfigError: If there are fewer than 20 requests, or no time passes between them.
    """
    count = len(trace.at_s)
    if count < 20:
        raise ConfigError(f"{count} requests are too few to fit a profile to; give at least 20")
    gaps = np.diff(trace.at_s)
    seconds = float(gaps.sum())
    if seconds <= 0.0:
        raise ConfigError(f"all {count} requests have the same moment; a profile needs the time between them")
    spread = float(gaps.std() / gaps.mean())
    return Profile(
        name=name,
        description=f"fitted to {count} requests over {seconds:.0f} s",
        arrivals=OpenLoop(
            rate_per_s=_short(len(gaps) / seconds), burstiness=_short(1.0 / max(spread, _LEAST_SPREAD) ** 2)
        ),
        prompt_tokens=_fitted(trace.prompt_tokens),
        output_tokens=_fitted(trace.output_tokens),
        requests=min(_FITTED_REQUESTS, count),
        warmup=16,
        slo=Slo(),
        gated=("ttft_scheduled_p50_s", "ttft_scheduled_p95_s", "tpot_p50_s"),
    )


def _fitted(counts: Sequence[int]) -> Lengths:
    quantiles = np.percentile(counts, np.linspace(0.0, 100.0, _QUANTILES))
    return Lengths(shape=Empirical(quantiles=tuple(map(_short, quantiles))), least=min(counts), most=max(counts))


def _short(value: float) -> float:
    """Four significant digits: more are not in the data."""
    return float(f"{value:.4g}")


def _lengths(profile: Profile, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and output tokens of the measured requests, then of the warm-up; int64 [requests + warmup] each."""
    count, warmup = profile.requests, profile.warmup
    if isinstance(profile.arrivals, Trace):
        # The warm-up looks like the trace's beginning.
        rows = np.concatenate([np.arange(count), np.arange(warmup) % count])
        trace = profile.arrivals
        return np.asarray(trace.prompt_tokens)[rows], np.asarray(trace.output_tokens)[rows]
    assert profile.prompt_tokens is not None
    assert profile.output_tokens is not None
    return (
        profile.prompt_tokens.draw(_stream(seed, "prompt lengths"), count + warmup),
        profile.output_tokens.draw(_stream(seed, "output lengths"), count + warmup),
    )


def _moments(profile: Profile, seed: int) -> list[float] | None:
    match profile.arrivals:
        case ClosedLoop():
            return None
        case Offline():
            return [0.0] * profile.requests
        case Trace(at_s=at_s):
            return list(at_s[: profile.requests])
        case OpenLoop(rate_per_s=rate, burstiness=shape):
            gaps = _stream(seed, "arrivals").gamma(shape, size=profile.requests)
            # The last request comes exactly at requests / rate: without this, runs of two seeds would differ in rate.
            moments = np.cumsum(gaps) * (profile.requests / rate / math.fsum(gaps))
            return [float(moment) for moment in moments]


def _stream(seed: int, purpose: str) -> np.random.RandomState:
    """Random numbers for one purpose; of the generator whose stream NumPy promises never to change."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))
