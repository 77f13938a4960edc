"""Traffic: a seed decides everything, prompts share no beginning, distributions are right, files say what is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from parity.errors import ConfigError
from parity.traffic import (
    Arrivals,
    ClosedLoop,
    Empirical,
    Fixed,
    Lengths,
    Lognormal,
    Offline,
    OpenLoop,
    Plan,
    Profile,
    Slo,
    Trace,
    fit,
    plan,
    scaled,
)
from parity.traffic_files import profiles, read_log, read_profile, write_profile

SUITES = Path(__file__).parent.parent / "suites" / "traffic"
VOCABULARY = range(100, 49_000)


def fixed(tokens: int) -> Lengths:
    return Lengths(shape=Fixed(tokens=tokens), least=1, most=tokens)


def profile(arrivals: Arrivals | None = None, **changes: Any) -> Profile:
    usual: dict[str, Any] = {
        "name": "mine",
        "description": "",
        "arrivals": arrivals or OpenLoop(rate_per_s=50.0),
        "prompt_tokens": Lengths(shape=Lognormal(median=40.0, sigma=0.5), least=4, most=200),
        "output_tokens": Lengths(shape=Lognormal(median=20.0, sigma=0.5), least=2, most=60),
        "requests": 300,
        "warmup": 20,
        "slo": Slo(),
        "gated": (),
    }
    return Profile(**{**usual, **changes})


def planned(made: Profile, seed: int = 7) -> Plan:
    return plan(made, seed=seed, vocabulary=VOCABULARY, max_positions=8192)


def moments(made: Plan) -> list[float]:
    return [request.at_s for request in made.requests if request.at_s is not None]


# The plan -------------------------------------------------------------------------------------------------------------


def test_one_seed_gives_one_plan_and_another_seed_another() -> None:
    assert planned(profile()) == planned(profile())
    assert planned(profile()).sha256() == planned(profile()).sha256()
    assert planned(profile()).sha256() != planned(profile(), seed=8).sha256()
    assert planned(profile()).requests[0].prompt_token_ids != planned(profile(), seed=8).requests[0].prompt_token_ids


def test_a_plan_never_changes_with_the_version_of_a_library() -> None:
    small = planned(profile(requests=3, warmup=1))
    assert [(r.id, len(r.prompt_token_ids), r.prompt_token_ids[0], r.max_tokens) for r in small.requests] == [
        ("r000000", 43, 4945, 21),
        ("r000001", 46, 16138, 14),
        ("r000002", 70, 40009, 6),
    ]
    assert moments(small) == pytest.approx([0.0410085, 0.0469484, 0.06], abs=1e-7)


def test_no_two_prompts_share_even_their_first_token() -> None:
    made = planned(profile(requests=2_000, warmup=50))
    first = [request.prompt_token_ids[0] for request in (*made.warmup, *made.requests)]
    assert len(set(first)) == 2_050
    assert all(token in VOCABULARY for request in made.requests for token in request.prompt_token_ids)


def test_another_rate_and_another_warm_up_leave_the_prompts_as_they_are() -> None:
    slow, fast = planned(profile(OpenLoop(rate_per_s=1.0), warmup=3)), planned(profile(OpenLoop(rate_per_s=90.0)))
    assert [r.prompt_token_ids[0] for r in slow.requests] == [r.prompt_token_ids[0] for r in fast.requests]
    assert [r.prompt_token_ids for r in slow.requests] == [r.prompt_token_ids for r in fast.requests]
    assert [r.max_tokens for r in slow.requests] == [r.max_tokens for r in fast.requests]
    assert moments(slow) != moments(fast)


@given(rate=st.floats(0.1, 1e4), burstiness=st.floats(0.05, 50.0), seed=st.integers(0, 2**40))
def test_moments_rise_and_the_last_is_where_the_rate_says(rate: float, burstiness: float, seed: int) -> None:
    made = profile(OpenLoop(rate_per_s=rate, burstiness=burstiness), requests=20, warmup=0)
    at_s = moments(plan(made, seed=seed, vocabulary=range(50), max_positions=8192))
    assert at_s == sorted(at_s)
    assert at_s[0] >= 0.0
    assert at_s[-1] == pytest.approx(20 / rate)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_the_gaps_are_gamma_distributed(burstiness: float) -> None:
    made = profile(OpenLoop(rate_per_s=10.0, burstiness=burstiness), requests=4_000, prompt_tokens=fixed(1))
    gaps = np.diff(moments(planned(made)))
    expected = stats.gamma(burstiness, scale=0.1 / burstiness)
    assert stats.kstest(gaps, expected.cdf).pvalue > 0.001
    assert stats.kstest(gaps, stats.gamma(2 * burstiness, scale=0.05 / burstiness).cdf).pvalue < 1e-6


@pytest.mark.parametrize(
    ("shape", "median", "p90"),
    [
        (Fixed(tokens=40), 40, 40),
        (Lognormal(median=100.0, sigma=0.5), 100, 190),  # 100 exp(0.5 * 1.2816)
        (Empirical(quantiles=(10.0, 50.0, 200.0)), 50, 170),
    ],
)
def test_lengths_have_the_quantiles_they_say(shape: Fixed | Lognormal | Empirical, median: int, p90: int) -> None:
    drawn = Lengths(shape=shape, least=1, most=10_000).draw(np.random.RandomState(1), 20_000)
    assert np.percentile(drawn, [50, 90]) == pytest.approx([median, p90], rel=0.06)


@given(least=st.integers(1, 50), more=st.integers(0, 50), seed=st.integers(0, 1000))
def test_lengths_stay_between_least_and_most(least: int, more: int, seed: int) -> None:
    lengths = Lengths(shape=Lognormal(median=30.0, sigma=2.0), least=least, most=least + more)
    drawn = lengths.draw(np.random.RandomState(seed), 50)
    assert drawn.min() >= least
    assert drawn.max() <= least + more


def test_each_kind_of_arrivals_is_planned_as_what_it_is() -> None:
    closed, offline = planned(profile(ClosedLoop(concurrency=4))), planned(profile(Offline()))
    assert (closed.concurrency, offline.concurrency) == (4, None)
    assert moments(closed) == []
    assert set(moments(offline)) == {0.0}
    trace = Trace(at_s=(0.0, 0.5, 0.5, 9.0), prompt_tokens=(3, 5, 7, 9), output_tokens=(2, 4, 6, 8))
    replayed = planned(profile(trace, prompt_tokens=None, output_tokens=None, requests=3, warmup=5))
    assert moments(replayed) == [0.0, 0.5, 0.5]
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in replayed.requests] == [(3, 2), (5, 4), (7, 6)]
    assert [len(r.prompt_token_ids) for r in replayed.warmup] == [3, 5, 7, 3, 5]


def test_a_model_that_is_too_short_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"asks for up to 260 tokens in one request, and the model has 200 positions"):
        plan(
            profile(prompt_tokens=fixed(200), output_tokens=fixed(60)), seed=1, vocabulary=VOCABULARY, max_positions=200
        )
    with pytest.raises(ConfigError, match="needs 320 prompts that begin with different tokens, and there are 100"):
        plan(profile(), seed=1, vocabulary=range(100), max_positions=8192)


def test_a_scaled_profile_has_the_same_shape_and_another_name() -> None:
    made = profile(requests=2_000)
    half = scaled(made, 0.5)
    assert half.name == "mine*0.5"
    whole, halved = (np.array([len(r.prompt_token_ids) for r in planned(one).requests]) for one in (made, half))
    assert np.abs(halved - whole / 2).max() <= 1.0
    trace = Trace(at_s=(0.0, 1.0), prompt_tokens=(100, 1), output_tokens=(10, 1))
    small = scaled(profile(trace, prompt_tokens=None, output_tokens=None, requests=2), 0.1).arrivals
    assert isinstance(small, Trace)
    assert (small.prompt_tokens, small.output_tokens) == ((10, 1), (1, 1))
    with pytest.raises(ConfigError, match="above 0"):
        scaled(made, 0.0)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: OpenLoop(rate_per_s=0.0), "rate_per_s > 0"),
        (lambda: OpenLoop(rate_per_s=1.0, burstiness=-1.0), "burstiness > 0"),
        (lambda: ClosedLoop(concurrency=0), "at least 1"),
        (lambda: Lengths(shape=Fixed(tokens=3), least=5, most=4), "least <= most"),
        (lambda: Lengths(shape=Lognormal(median=0.0, sigma=1.0), least=1, most=4), "median > 0"),
        (lambda: Lengths(shape=Empirical(quantiles=(3.0, 2.0)), least=1, most=4), "rising"),
        (lambda: Trace(at_s=(1.0, 0.5), prompt_tokens=(1, 1), output_tokens=(1, 1)), "rise"),
        (lambda: Trace(at_s=(1.0,), prompt_tokens=(1, 1), output_tokens=(1,)), "as many lengths"),
        (lambda: Trace(at_s=(1.0,), prompt_tokens=(0,), output_tokens=(1,)), "at least one"),
        (lambda: profile(requests=0), "at least 1 request"),
        (lambda: profile(gated=("a", "b", "c", "d")), "at most 3 may decide"),
        (lambda: profile(prompt_tokens=None), "says no lengths"),
        (lambda: profile(Trace(at_s=(), prompt_tokens=(), output_tokens=())), "its trace has 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_numbers(make: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()  # type: ignore[operator]


# A profile from a log -------------------------------------------------------------------------------------------------


def test_a_profile_fitted_to_its_own_plan_is_the_profile_again() -> None:
    made = profile(OpenLoop(rate_per_s=20.0, burstiness=0.5), requests=5_000, warmup=0)
    sent = planned(made)
    trace = Trace(
        at_s=tuple(moments(sent)),
        prompt_tokens=tuple(len(r.prompt_token_ids) for r in sent.requests),
        output_tokens=tuple(r.max_tokens for r in sent.requests),
    )
    fitted = fit("again", trace)
    assert isinstance(fitted.arrivals, OpenLoop)
    assert fitted.arrivals.rate_per_s == pytest.approx(20.0, rel=0.01)
    assert fitted.arrivals.burstiness == pytest.approx(0.5, rel=0.1)
    again = planned(replace(fitted, requests=5_000, warmup=0), seed=9)
    theirs = np.array([len(r.prompt_token_ids) for r in again.requests])
    assert stats.ks_2samp(theirs, trace.prompt_tokens).statistic < 0.03
    assert np.percentile(theirs, [0, 100]) == pytest.approx([4, 200], abs=10)


def test_evenly_spaced_requests_are_steady_and_too_few_are_refused() -> None:
    even = Trace(at_s=tuple(map(float, range(50))), prompt_tokens=(5,) * 50, output_tokens=(5,) * 50)
    arrivals = fit("even", even).arrivals
    assert isinstance(arrivals, OpenLoop)
    assert arrivals.burstiness == 100.0
    with pytest.raises(ConfigError, match="19 requests are too few"):
        fit("few", Trace(at_s=(0.0,) * 19, prompt_tokens=(1,) * 19, output_tokens=(1,) * 19))
    with pytest.raises(ConfigError, match="all 20 requests have the same moment"):
        fit("once", Trace(at_s=(0.0,) * 20, prompt_tokens=(1,) * 20, output_tokens=(1,) * 20))


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_profiles_that_come_along_are_read_planned_and_written_again(tmp_path: Path) -> None:
    found = profiles(SUITES)
    assert {"chat", "code_completion", "offline", "summarisation"} <= set(found)
    for name, path in found.items():
        read = read_profile(path)
        assert read.name == name
        assert read.description
        assert 1 <= len(read.gated) <= 3
        assert len(planned(read).requests) == read.requests
        write_profile(tmp_path / path.name, read)
        assert read_profile(tmp_path / path.name) == read


TOML = """
requests = 10
[arrivals]
kind = "open"
rate_per_s = 2.0
[prompt_tokens]
kind = "fixed"
tokens = 100
[output_tokens]
kind = "lognormal"
median = 20
sigma = 0.3
most = 60
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("requests = 10", "request = 10", r"p.toml: unknown key 'request'; did you mean 'requests'\?"),
        ("requests = 10", "", "p.toml lacks the key 'requests'"),
        ("requests = 10", "requests = 0", "p.toml: 'requests' must be a whole number of at least 1, not 0"),
        ("requests = 10", "requests = true", "not True"),
        ("requests = 10", "requests = 10\nwarmup = -1", "'warmup' must be a whole number of at least 0"),
        (
            "requests = 10",
            'requests = 10\ngated = ["ttft_p96_s"]',
            "unknown metric 'ttft_p96_s'; did you mean",
        ),
        ("requests = 10", "requests = 10\ngated = [3]", "must be a list of strings"),
        (
            "requests = 10",
            "requests = 10\n[slo]\nttft = 3",
            r"p.toml \[slo\]: unknown key 'ttft'; did you mean 'ttft_s'",
        ),
        ('"open"', '"opne"', r"p.toml \[arrivals\]: unknown kind 'opne'; did you mean 'open'\?"),
        ("rate_per_s = 2.0", "rate_s = 2.0", r"\[arrivals\]: unknown key 'rate_s'; did you mean 'rate_per_s'"),
        ("rate_per_s = 2.0", "rate_per_s = -2.0", r"p.toml \[arrivals\]: an open loop needs rate_per_s > 0"),
        ("rate_per_s = 2.0", 'rate_per_s = "2"', "must be a number, not '2'"),
        ('kind = "open"\nrate_per_s = 2.0', 'kind = "trace"\nlog = "gone.jsonl"', "gone.jsonl' cannot be read"),
        ("tokens = 100", "tokens = 100\nmost = 3", r"\[prompt_tokens\]: unknown key 'most'"),
        ("median = 20", "", r"\[output_tokens\] lacks the key 'median'"),
        ("[arrivals]", "[arrivals", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named_with_its_place(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(TOML)
    assert read_profile(path).requests == 10
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ConfigError, match=complaint):
        read_profile(path)


def test_a_profile_may_replay_a_log_beside_it(tmp_path: Path) -> None:
    rows = [(5.0, 30, 3), (2.0, 10, 1), (2.5, 20, 2)]
    lines = [json.dumps({"timestamp": t, "prompt_tokens": p, "output_tokens": o, "user": "x"}) for t, p, o in rows]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, "", ""]))
    path = tmp_path / "mine.toml"
    path.write_text('[arrivals]\nkind = "trace"\nlog = "log.jsonl"\n')
    read = read_profile(path)
    assert read.requests == 3
    assert read.arrivals == Trace(at_s=(0.0, 0.5, 3.0), prompt_tokens=(10, 20, 30), output_tokens=(1, 2, 3))
    with pytest.raises(ValueError, match="has a trace"):
        write_profile(tmp_path / "again.toml", read)
    path.write_text(path.read_text() + '[prompt_tokens]\nkind = "fixed"\ntokens = 3\n')
    with pytest.raises(ConfigError, match="both a trace and 'prompt_tokens'"):
        read_profile(path)


def test_moments_may_be_written_as_dates(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    dates = ["2026-01-31T12:00:00Z", "2026-01-31 12:00:01.5", "2026-01-31T13:00:03+01:00"]
    path.write_text("\n".join(json.dumps({"timestamp": d, "prompt_tokens": 1, "output_tokens": 1}) for d in dates))
    assert read_log(path).at_s == (0.0, 1.5, 3.0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "log.jsonl:2: not JSON"),
        ("[1, 2]", "log.jsonl:2: a request must be a JSON object"),
        (
            '{"timestamp": 1, "prompt_token": 3, "output_tokens": 3}',
            "lacks the key 'prompt_tokens'; did you mean it",
        ),
        ('{"timestamp": 1, "prompt_tokens": 0, "output_tokens": 3}', "log.jsonl:2: 'prompt_tokens' must be a whole"),
        ('{"timestamp": 1, "prompt_tokens": 3, "output_tokens": 2.5}', "'output_tokens' must be a whole number"),
        ('{"timestamp": "noon", "prompt_tokens": 3, "output_tokens": 3}', "'timestamp' must be seconds or ISO 8601"),
        ('{"timestamp": NaN, "prompt_tokens": 3, "output_tokens": 3}', "'timestamp' must be seconds or ISO 8601"),
        ('{"timestamp": null, "prompt_tokens": 3, "output_tokens": 3}', "'timestamp' must be seconds or ISO 8601"),
    ],
)
def test_a_bad_line_of_a_log_is_named_by_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"timestamp": 1, "prompt_tokens": 3, "output_tokens": 3}\n' + line + "\n")
    with pytest.raises(ConfigError, match=complaint) as error:
        read_log(path)
    assert re.search(r"log\.jsonl:2", str(error.value))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no request"):
        read_log(path)
