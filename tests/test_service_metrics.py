"""Service metrics: every formula by hand, laws that any correct formula keeps, and what failed requests do to none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.errors import EngineError
from parity.service_metrics import DEFINITIONS, SAMPLES, Direction, measure, samples, while_measured
from parity.timings import Failure, HostSample, LoadRun, RequestTiming
from parity.traffic import Slo


def answer(
    scheduled_s: float = 0.0,
    *,
    sent_s: float | None = None,
    chunk_s: Sequence[float] = (1.0, 2.0),
    chunk_tokens: Sequence[int] | None = None,
    output_tokens: int | None = None,
) -> RequestTiming:
    return RequestTiming(
        id=f"at {scheduled_s}",
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        first_byte_s=None,
        chunk_s=tuple(chunk_s),
        chunk_tokens=None if chunk_tokens is None else tuple(chunk_tokens),
        prompt_tokens=10,
        output_tokens=output_tokens,
        ended_s=chunk_s[-1] + 0.01,
        status=200,
        failure=None,
        detail="",
    )


def failed(failure: Failure, scheduled_s: float = 0.0) -> RequestTiming:
    """Its chunks, had they counted, would be very fast."""
    one = answer(scheduled_s, chunk_s=(scheduled_s + 1e-6, scheduled_s + 2e-6), chunk_tokens=(1, 1), output_tokens=2)
    return replace(one, failure=failure)


def host(at_s: float, *, watts: float | None = None, memory: int | None = None) -> HostSample:
    return HostSample(
        at_s=at_s,
        engine_bytes=memory,
        gpu_utilisation=None if watts is None else watts / 1000,
        gpu_power_watts=watts,
        gpu_sm_clock_mhz=None if watts is None else 10 * watts,
        gpu_throttled=None,
        load_average=None,
    )


def run_of(
    requests: Sequence[RequestTiming],
    *,
    measured_s: float = 10.0,
    samples_of_host: Sequence[HostSample] = (),
    start_up_s: float | None = None,
) -> LoadRun:
    return LoadRun(
        profile="chat",
        seed=1,
        began_at="2026-11-24T12:00:00+00:00",
        measured_s=measured_s,
        requests=tuple(requests),
        host=tuple(samples_of_host),
        facts={},
        start_up_s=start_up_s,
        warnings=(),
    )


# Two answers and a failure. A: scheduled at 0, sent at 0.5, chunks at 1, 2, 4 s of 1, 1, 2 tokens. B: scheduled and
# sent at 2, chunks at 2.25, 3.25 of 2, 3 tokens.
A = answer(0.0, sent_s=0.5, chunk_s=(1.0, 2.0, 4.0), chunk_tokens=(1, 1, 2), output_tokens=4)
B = answer(2.0, chunk_s=(2.25, 3.25), chunk_tokens=(2, 3), output_tokens=5)
BY_HAND = run_of(
    [A, failed(Failure.STALLED, 1.0), B],
    measured_s=8.0,
    samples_of_host=[
        host(-5.0, watts=700.0, memory=300),
        host(0.0, watts=100.0, memory=500),
        host(4.0, watts=300.0, memory=400),
        host(8.0, watts=300.0),
        host(20.0, watts=900.0),
    ],
    start_up_s=12.0,
)


@pytest.mark.parametrize(
    ("of", "by_hand"),
    [
        ("ttft_s", [0.5, 0.25]),
        ("ttft_scheduled_s", [1.0, 0.25]),
        ("tpot_s", [3.0 / 3, 1.0 / 4]),
        ("itl_s", [1.0, 1.0, 1.0, 1 / 3, 1 / 3, 1 / 3]),
        ("icl_s", [1.0, 2.0, 1.0]),
        ("e2e_s", [3.5, 1.25]),
        ("e2e_scheduled_s", [4.0, 1.25]),
        ("queue_s", [0.5, 0.0]),
    ],
)
def test_samples_by_hand(of: str, by_hand: Sequence[float]) -> None:
    assert samples(BY_HAND, of) == pytest.approx(by_hand)


def test_the_numbers_of_a_run_by_hand() -> None:
    """Power rises from 100 to 300 W in the first half, then stays: (200 + 300) / 2 W over 8 s, for 9 tokens."""
    found = measure(BY_HAND, Slo(ttft_s=0.9, tpot_s=1.1, e2e_s=None))
    by_hand = {
        "failed_share": 1 / 3,
        "output_tokens_per_s": 9 / 8,
        "total_tokens_per_s": 29 / 8,
        "requests_per_s": 2 / 8,
        "goodput_requests_per_s": 1 / 8,
        "start_up_s": 12.0,
        "peak_memory_bytes": 500.0,
        "gpu_power_mean_watts": 250.0,
        "gpu_joules_per_output_token": 250.0 * 8 / 9,
        "gpu_utilisation_mean_share": 0.25,
        "gpu_sm_clock_mean_mhz": 2500.0,
    }
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)


def test_percentiles_by_hand() -> None:
    """Of 0, 1, ..., 100 the 95th percentile is 95; of 1 and 3 it lies 95 % of the way between them."""
    hundred = run_of([answer(0.0, chunk_s=(float(i), 200.0), output_tokens=2) for i in range(101)])
    found = measure(hundred)
    assert [found[f"ttft_{short}_s"] for short in ("mean", "p50", "p95", "p99")] == pytest.approx([50, 50, 95, 99])
    two = measure(run_of([answer(chunk_s=(1.0, 9.0)), answer(chunk_s=(3.0, 9.0))]))
    assert two["ttft_p95_s"] == pytest.approx(2.9)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_s=None, tpot_s=None, e2e_s=None), 2),
        (Slo(ttft_s=1.0, tpot_s=None, e2e_s=None), 2),
        (Slo(ttft_s=0.99, tpot_s=None, e2e_s=None), 1),  # from the schedule: from sending it took 0.5 s
        (Slo(ttft_s=None, tpot_s=0.5, e2e_s=None), 1),
        (Slo(ttft_s=None, tpot_s=None, e2e_s=3.9), 1),
        (Slo(ttft_s=0.5, tpot_s=None, e2e_s=0.5), 0),
    ],
)
def test_goodput_counts_answers_within_every_limit(slo: Slo, good: int) -> None:
    assert measure(BY_HAND, slo)["goodput_requests_per_s"] == pytest.approx(good / 8)


def test_an_answer_of_one_token_has_no_tpot_and_meets_any() -> None:
    one = run_of([answer(chunk_s=(1.0,), output_tokens=1)])
    assert len(samples(one, "tpot_s")) == len(samples(one, "itl_s")) == 0
    assert "tpot_p50_s" not in measure(one)
    assert measure(one, Slo(ttft_s=None, tpot_s=0.001, e2e_s=None))["goodput_requests_per_s"] == pytest.approx(0.1)


def test_every_definition_says_what_it_means() -> None:
    assert set(measure(BY_HAND, Slo(ttft_s=1.0, tpot_s=1.0, e2e_s=1.0))) == set(DEFINITIONS)
    for name, definition in [*DEFINITIONS.items(), *SAMPLES.items()]:
        assert definition.id == name
        assert definition.unit
        assert definition.source
        assert len(definition.text) > 20 or definition.unit == "W"
        assert definition.samples is None or definition.samples in SAMPLES
    assert len({definition.text for definition in DEFINITIONS.values()}) == len(DEFINITIONS)


def slowed(run: LoadRun) -> LoadRun:
    """Everything takes a third longer and more memory, and one answer of ten more fails."""

    def late(at_s: float | None) -> float:
        assert at_s is not None
        return at_s * 4 / 3

    requests = [
        replace(
            request,
            sent_s=late(request.sent_s),
            chunk_s=tuple(map(late, request.chunk_s)),
            ended_s=late(request.ended_s),
            failure=Failure.CLOSED if place % 10 == 9 else request.failure,
        )
        for place, request in enumerate(run.requests)
    ]
    return replace(
        run,
        requests=tuple(requests),
        measured_s=late(run.measured_s),
        start_up_s=late(run.start_up_s),
        host=tuple(replace(sample, engine_bytes=(sample.engine_bytes or 0) + 1) for sample in run.host),
    )


def test_a_slower_engine_moves_every_metric_the_way_its_definition_says() -> None:
    requests = [
        answer(0.0, sent_s=0.1, chunk_s=(1.0 + i / 50, 2.0 + i / 50, 3.0), chunk_tokens=(1, 2, 2), output_tokens=5)
        for i in range(20)
    ]
    run = run_of(requests, samples_of_host=[host(5.0, watts=200.0, memory=7)], start_up_s=3.0)
    slo = Slo(ttft_s=1.6, tpot_s=None, e2e_s=None)
    before, after = measure(run, slo), measure(slowed(run), slo)
    assert set(before) == set(after) == set(DEFINITIONS)
    ways = {
        Direction.LOWER: lambda old, new: new > old,
        Direction.HIGHER: lambda old, new: new < old,
        Direction.NEITHER: lambda old, new: new == old,
    }
    moved = {name: ways[DEFINITIONS[name].direction](before[name], after[name]) for name in before}
    assert [name for name, as_said in moved.items() if not as_said] == []
    neither = [name for name, definition in DEFINITIONS.items() if definition.direction is Direction.NEITHER]
    assert neither == ["gpu_utilisation_mean_share", "gpu_power_mean_watts", "gpu_sm_clock_mean_mhz"]


# What failed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", list(Failure))
def test_failed_requests_have_no_latency_and_are_always_counted(failure: Failure) -> None:
    with_failures = run_of([A, failed(failure), B, failed(failure)], measured_s=8.0)
    without = run_of([A, B], measured_s=8.0)
    for name in SAMPLES:
        assert samples(with_failures, name).tolist() == samples(without, name).tolist()
    ours, theirs = measure(with_failures), measure(without)
    assert (ours.pop("failed_share"), theirs.pop("failed_share")) == (0.5, 0.0)
    assert ours == theirs


def test_where_all_failed_there_is_no_number() -> None:
    """0 ms would be the best run of all."""
    dead = run_of([failed(Failure.REFUSED), failed(Failure.REFUSED), failed(Failure.STATUS)])
    with pytest.raises(EngineError, match=r"none of the 3 requests .*2 connection refused, 1 http status"):
        measure(dead)
    with pytest.raises(EngineError, match="none of the 3"):
        samples(dead, "ttft_s")
    with pytest.raises(EngineError, match="none was made"):
        measure(run_of([]))
    with pytest.raises(EngineError, match=r"lasted 0\.0 s"):
        measure(run_of([A], measured_s=0.0))


def test_what_nothing_measured_is_left_out() -> None:
    bare = measure(run_of([replace(A, chunk_tokens=None, output_tokens=None), B]))
    tokens = {name for name in DEFINITIONS if name.startswith(("tpot_", "itl_")) or "tokens_per_s" in name}
    elsewhere = {"goodput_requests_per_s", "start_up_s", "peak_memory_bytes"}
    assert set(DEFINITIONS) - set(bare) == tokens | elsewhere | {n for n in DEFINITIONS if n.startswith("gpu_")}
    assert not len(samples(run_of([replace(A, chunk_tokens=None), B]), "itl_s")), "two chunks carried four tokens"
    with pytest.raises(ValueError, match="no samples 'ttft'; there are ttft_s"):
        samples(BY_HAND, "ttft")
    no_gpu = measure(run_of([A, B], samples_of_host=[host(50.0, watts=300.0)]))
    assert "gpu_power_mean_watts" not in no_gpu, "it was sampled only after the run"


def test_a_server_that_says_less_still_says_enough() -> None:
    """One token a chunk needs no word of it; chunks that say their tokens add up to a count."""
    each = answer(chunk_s=(1.0, 1.5, 2.5), output_tokens=3)
    assert samples(run_of([each]), "itl_s").tolist() == [0.5, 1.0]
    assert measure(run_of([replace(B, output_tokens=None)]))["output_tokens_per_s"] == pytest.approx(0.5)
    without_usage = measure(run_of([replace(B, prompt_tokens=None)]))
    assert "output_tokens_per_s" in without_usage
    assert "total_tokens_per_s" not in without_usage


def test_the_host_is_looked_at_while_it_measured() -> None:
    assert [sample.at_s for sample in while_measured(BY_HAND)] == [0.0, 4.0, 8.0]


# Laws -----------------------------------------------------------------------------------------------------------------


@st.composite
def load_runs(draw: st.DrawFn) -> LoadRun:
    """Complete answers, each chunk with its tokens."""
    requests = []
    for _ in range(draw(st.integers(1, 6))):
        scheduled, wait, *gaps = draw(st.lists(st.floats(0.001, 5.0), min_size=4, max_size=9))
        sent = scheduled + wait
        tokens = draw(st.lists(st.integers(1, 5), min_size=len(gaps), max_size=len(gaps)))
        chunks = (sent + np.cumsum(gaps)).tolist()
        requests.append(answer(scheduled, sent_s=sent, chunk_s=chunks, chunk_tokens=tokens, output_tokens=sum(tokens)))
    return run_of(requests, measured_s=60.0, samples_of_host=[host(6.0, watts=200.0), host(9.0, watts=90.0, memory=5)])


def moved(run: LoadRun, to: Callable[[float], float]) -> LoadRun:
    """The same run on another clock."""
    requests = [
        replace(
            request,
            scheduled_s=to(request.scheduled_s),
            sent_s=None if request.sent_s is None else to(request.sent_s),
            chunk_s=tuple(map(to, request.chunk_s)),
            ended_s=to(request.ended_s),
        )
        for request in run.requests
    ]
    seconds = to(run.measured_s) - to(0.0)
    return replace(
        run,
        requests=tuple(requests),
        measured_s=seconds,
        host=tuple(replace(sample, at_s=to(sample.at_s)) for sample in run.host),
    )


LIMITS = Slo(ttft_s=3.0, tpot_s=1.0, e2e_s=None)


@given(load_runs(), st.sampled_from([-64.0, 0.5, 1024.0]))
def test_a_clock_that_begins_elsewhere_changes_nothing(run: LoadRun, shift: float) -> None:
    assert measure(moved(run, lambda at: at + shift)) == pytest.approx(measure(run), abs=1e-9)


@given(load_runs(), st.sampled_from([0.25, 2.0]))
def test_a_clock_of_another_speed_scales_times_and_rates(run: LoadRun, factor: float) -> None:
    before, after = measure(run), measure(moved(run, lambda at: at * factor))
    for name, value in before.items():
        scale = factor if name.endswith("_s") and "_per_s" not in name else 1 / factor if "_per_s" in name else 1.0
        scale = factor if name == "gpu_joules_per_output_token" else scale
        assert after[name] == pytest.approx(value * scale), name


@given(load_runs())
def test_bundling_chunks_moves_only_what_looks_at_chunks(run: LoadRun) -> None:
    """The second chunk is held back and sent with the third, as an engine's stream interval does."""
    bundled = [
        replace(r, chunk_s=(r.chunk_s[0], *r.chunk_s[2:]), chunk_tokens=(t[0], t[1] + t[2], *t[3:]))
        if len(t) > 2
        else r
        for r in run.requests
        if (t := r.chunk_tokens) is not None
    ]
    before, after = measure(run, LIMITS), measure(replace(run, requests=tuple(bundled)), LIMITS)
    of_chunks = {name for name in before if name.startswith(("itl_", "icl_"))}
    for name in set(before) - of_chunks:
        assert after[name] == before[name], name


@given(load_runs())
def test_an_answer_is_its_first_token_and_the_others(run: LoadRun) -> None:
    """E2E = TTFT + TPOT (n - 1); the gaps between chunks add up to it, and from the schedule the queue comes on top."""
    one = replace(run, requests=run.requests[:1])
    tokens = one.requests[0].output_tokens
    assert tokens is not None
    ttft, tpot, e2e, queue, scheduled = (
        float(samples(one, f"{name}_s")[0]) for name in ("ttft", "tpot", "e2e", "queue", "e2e_scheduled")
    )
    assert e2e == pytest.approx(ttft + tpot * (tokens - 1))
    assert e2e == pytest.approx(ttft + float(samples(one, "icl_s").sum()))
    assert e2e == pytest.approx(ttft + float(samples(one, "itl_s").sum()))
    assert scheduled == pytest.approx(e2e + queue)


@given(load_runs(), st.randoms(use_true_random=False))
def test_the_order_of_requests_does_not_matter(run: LoadRun, random: object) -> None:
    requests = list(run.requests)
    random.shuffle(requests)  # type: ignore[attr-defined]
    assert measure(replace(run, requests=tuple(requests))) == pytest.approx(measure(run))


@given(load_runs())
def test_percentiles_do_not_cross_and_rates_agree(run: LoadRun) -> None:
    found = measure(run, LIMITS)
    for name in SAMPLES:
        stem = name.removesuffix("_s")
        assert found[f"{stem}_p50_s"] <= found[f"{stem}_p95_s"] <= found[f"{stem}_p99_s"]
    assert found["goodput_requests_per_s"] <= found["requests_per_s"]
    assert found["output_tokens_per_s"] < found["total_tokens_per_s"]
    assert found["gpu_power_mean_watts"] * run.measured_s == pytest.approx(
        found["gpu_joules_per_output_token"] * found["output_tokens_per_s"] * run.measured_s
    )
    assert all(math.isfinite(value) for value in found.values())
