"""Measured metrics on pytest-benchmark's rails: in its table, in its JSON, in its comparisons. Plumbing only.

pytest-benchmark times functions; here nothing is timed. A clock that only says what was measured before is given to it
by its own mark, a round is a start of the engine, and its samples are exactly the metric's values. Throughput goes in
as seconds for each token, so that its OPS column is tokens/s. Our verdict stays our own: nothing here passes or fails.

`parity.plugin` puts what was asked into `config.stash[ASKED]` and loads this module by `pytest_plugins`. Where
pytest-benchmark is absent, switched off, or cannot measure (pytest-xdist, CodSpeed), the metrics' items are skipped
with one reason, and nothing else changes.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity.errors import ConfigError, ParityError

if TYPE_CHECKING:
    from parity.config import Target
    from parity.exports import Series
    from parity.performance_sessions import PerformanceSession
    from parity.traffic import Profile
    from parity.verdict import Verdict

_SIDES = ("reference", "candidate")
_SHOWN = (
    *("ttft_p50_s", "ttft_p95_s", "ttft_scheduled_p50_s", "ttft_scheduled_p95_s", "tpot_p50_s", "tpot_p95_s"),
    *("itl_p50_s", "e2e_p50_s", "e2e_p95_s", "output_tokens_per_s", "requests_per_s", "goodput_requests_per_s"),
    "start_up_s",
)
"""Metrics that have a row beside those that the profile gates; other statistics are in `extra_info`."""
_PER_SECOND = {"tokens/s": "token", "requests/s": "request"}
_NOTHING = "no target that is asked says anything of performance"
_NOT_EXPORTED = "metrics are not in pytest-benchmark's table: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `parity.plugin` was told. recordings: a finished comparison, which is read and nothing is started."""

    suites: Path
    home: Path
    targets: tuple[str, ...]
    recordings: Path | None
    inconclusive_fails: bool


ASKED = pytest.StashKey[Asked]()
_FOUND = pytest.StashKey[dict[str, "PerformanceSession | str"]]()
"""Comparisons of this run by target and profile, or why one cannot be judged: each is measured once, whatever asks."""
_TABLES = pytest.StashKey[dict[str, "tuple[Series, ...]"]]()
_GENERATED = pytest.StashKey[bool]()


@dataclass(slots=True)
class Clock:
    """Reads what it was set to. pytest-benchmark wants a timer's name, which its JSON shows."""

    now_s: float = 0.0
    __name__ = "parity_clock"

    def __call__(self) -> float:
        """The time that it was set to, seconds."""
        return self.now_s


# Which items there are ------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each comparison; with `parity_series`, one for each metric of each side of it."""
    if "parity_performance" not in metafunc.fixturenames or ASKED not in metafunc.config.stash:
        return
    each_metric = "parity_series" in metafunc.fixturenames
    arguments = ["parity_performance", *(["parity_metric"] if each_metric else [])]
    try:
        cases = list(_cases(metafunc.config.stash[ASKED]))
    except ParityError as error:  # said by the fixture, where a failure belongs
        cases = []
        rows = [pytest.param(*(f"! {error}", "")[: len(arguments)], id="unknown")]
    else:
        skip = pytest.mark.skip(reason=f"parity: {_NOTHING}")
        rows = [] if cases else [pytest.param(*("", "")[: len(arguments)], id="none", marks=skip)]
    reason = why_not(metafunc.config)
    if each_metric:
        metafunc.config.stash[_GENERATED] = bool(cases)
    for target, profile in cases:
        case = f"{target}/{profile.name}"
        if not each_metric:
            rows.append(pytest.param(case, id=f"{target}-{profile.name}"))
            continue
        for metric in _shown(profile):
            for side in _SIDES:
                # In one group, so that the two sides stand below each other in the table.
                mark = (
                    pytest.mark.benchmark(timer=Clock(), group=f"{case} {metric}")
                    if reason is None
                    else pytest.mark.skip(reason=f"parity: {_NOT_EXPORTED}{reason}")
                )
                identity = f"{target}-{profile.name}-{side}-{metric}"
                rows.append(pytest.param(case, f"{side} {metric}", id=identity, marks=mark))
    metafunc.parametrize(arguments, rows, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """--benchmark-only and --benchmark-skip know their items by the names of their fixtures."""
    for item in items:
        names = item.fixturenames if isinstance(item, pytest.Function) else []
        if "parity_series" in names and "benchmark" not in names and item.get_closest_marker("benchmark") is not None:
            names.append("benchmark")


def why_not(config: pytest.Config) -> str | None:
    """Why pytest-benchmark cannot take samples in this run; None where it can."""
    if config.getoption("codspeed", False) or os.environ.get("CODSPEED_ENV") is not None:
        return "CodSpeed measures in its place"
    if not config.pluginmanager.hasplugin("benchmark"):
        return "it is not installed, or switched off"
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        return "it takes nothing under pytest-xdist"
    if config.getoption("benchmark_disable", False) and not config.getoption("benchmark_enable", False):
        return "--benchmark-disable"
    return None


def _cases(asked: Asked) -> Iterator[tuple[str, Profile]]:
    """Target and profile of each comparison that is asked."""
    from parity import config, traffic_files  # noqa: PLC0415  numpy must not load with every pytest session

    if asked.recordings is not None:
        from parity import performance_sessions as sessions  # noqa: PLC0415

        if sessions.is_session(asked.recordings):
            target, name = sessions.about(asked.recordings)
            yield target, traffic_files.read_profile(asked.suites / "traffic" / f"{name}.toml")
        return
    for wanted in asked.targets or (None,):
        found = config.read_target(asked.suites / "targets.toml", wanted)
        if found.performance is not None:
            for name in found.performance.profiles:
                yield found.name, traffic_files.read_profile(found.performance.folder / f"{name}.toml")


def _shown(profile: Profile) -> list[str]:
    from parity.service_metrics import DEFINITIONS  # noqa: PLC0415

    known = {name: metric for name, metric in DEFINITIONS.items() if metric.unit == "s" or metric.unit in _PER_SECOND}
    return [name for name in known if name in _SHOWN or name in profile.gated]


# Fixtures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parity_performance(request: pytest.FixtureRequest) -> PerformanceSession:
    """One comparison under one profile: read from `--parity-recordings`, or measured now, until it is decided.

    It is measured once in a run. Under pytest-xdist nothing is measured; the newest finished comparison is read there.
    """
    case, known = str(request.param), request.config.stash.setdefault(_FOUND, {})
    if case not in known:
        try:
            known[case] = _read(request.config, request.config.stash[ASKED], case)
        except ParityError as error:
            known[case] = str(error)
    found = known[case]
    if isinstance(found, str):
        pytest.fail(f"parity could not judge: {found}", pytrace=False)
    return found


@pytest.fixture
def parity_metric(request: pytest.FixtureRequest) -> str:
    """A side and the id of a metric, with a space between."""
    return str(request.param)


@pytest.fixture
def parity_series(request: pytest.FixtureRequest, parity_performance: PerformanceSession, parity_metric: str) -> Series:
    """One metric of one side, start by start; skipped where not every start has it."""
    from parity import exports  # noqa: PLC0415

    side, _, metric = parity_metric.partition(" ")
    of, tables = parity_performance, request.config.stash.setdefault(_TABLES, {})
    key = f"{of.target}/{of.profile.name}"
    if key not in tables:
        tables[key] = exports.table(of.runs, of.profile, target=of.target, labels=of.labels)
    for series in tables[key]:
        if (series.side, series.metric.id) == (side, metric):
            return series
    pytest.skip(f"parity: {metric} was not measured in every start of the {side}")


@pytest.fixture
def parity_benchmark(request: pytest.FixtureRequest) -> Callable[[Series], None]:
    """`parity_benchmark(series)` hands a series' values to pytest-benchmark: a round for each start, exactly."""
    return lambda series: record(request, series)


@pytest.fixture
def parity_judge_performance(
    request: pytest.FixtureRequest, parity_performance: PerformanceSession
) -> Callable[[], Verdict]:
    """`parity_judge_performance()` fails the test unless the verdict on the gated metrics passes."""

    def run() -> Verdict:
        from parity.reports import terminal  # noqa: PLC0415

        found, verdict = parity_performance, parity_performance.verdict
        reproduce = f"parity bench {found.target} --profile {found.profile.name}"
        text = f"{terminal.render(verdict)}\n  measured: {found.directory}\n  reproduce: {reproduce}"
        request.node.user_properties += [
            ("parity_outcome", verdict.outcome.value),
            ("parity_check", f"{verdict.check} {found.profile.name}"),
            ("parity_headline", verdict.headline),
            ("parity_reproduce", reproduce),
            ("parity_verdict", text),
        ]
        fails = ("FAIL", "INCONCLUSIVE") if request.config.stash[ASKED].inconclusive_fails else ("FAIL",)
        if verdict.outcome.value in fails:
            pytest.fail(text, pytrace=False)
        return verdict

    return run


def record(request: pytest.FixtureRequest, series: Series) -> None:
    """Hand a series to the item's `benchmark` fixture; the item carries the mark with the clock."""
    mark = request.node.get_closest_marker("benchmark")
    fixture: Any = request.getfixturevalue("benchmark") if mark is not None else None
    if fixture is None or not hasattr(fixture, "pedantic"):
        pytest.skip(f"parity: {_NOT_EXPORTED}{why_not(request.config) or 'another plugin took its place'}")
    values = samples_s(series)
    if values is None:
        pytest.skip(f"parity: {series.metric.id} was 0 in a start, and has no time for each of none")
    clock: Clock = mark.kwargs["timer"]
    remaining = iter(values)

    def reset() -> tuple[tuple[float], dict[str, Any]]:
        clock.now_s = 0.0  # from 0, no difference of two readings is rounded
        return (next(remaining),), {}

    def pass_time(seconds: float) -> None:
        clock.now_s = seconds

    fixture.pedantic(pass_time, setup=reset, rounds=len(values), iterations=1)
    fixture.extra_info.update(extra_info(series))


def samples_s(series: Series) -> list[float] | None:
    """The values as seconds, of a throughput for each token or request; None where a throughput was 0."""
    if series.metric.unit not in _PER_SECOND:
        return list(series.values)
    return [1.0 / value for value in series.values] if min(series.values) > 0.0 else None


def extra_info(series: Series) -> dict[str, Any]:
    """What pytest-benchmark's statistics do not say: what the metric means, of which engine, on which hardware."""
    metric = series.metric
    per = _PER_SECOND.get(metric.unit)
    return {
        "metric": metric.id,
        "definition": metric.text,
        "source": metric.source,
        "unit": metric.unit,
        "direction": metric.direction.value,
        "sample": "seconds" if per is None else f"seconds for each {per}; OPS is {metric.unit}",
        "target": series.target,
        "profile": series.profile,
        "side": series.side,
        "engine": series.label,
        "values": list(series.values),
        "began_at": list(series.at),
        "percentiles": {**series.related, metric.id: series.median} if metric.samples else {},
        "fingerprint": dict(series.facts),
    }


# pytest-benchmark's own hooks -----------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any] | None:
    """What pytest-benchmark says itself, where `cpuinfo` is missing and it cannot.

    py-cpuinfo and py-cpuinfo2 own one module; removing either of them removes it for both.
    """
    if importlib.util.find_spec("cpuinfo") is not None:
        return None
    from parity import fingerprint  # noqa: PLC0415

    return {
        "node": platform.node(),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "python_build": platform.python_build(),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"brand_raw": fingerprint.machine()["host.cpu"]},
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The GPUs that were measured on, so that a saved run of another GPU is seen to be one."""
    for found in config.stash.setdefault(_FOUND, {}).values():
        if not isinstance(found, str) and (gpu := gpu_of(found.runs["candidate"][0].facts)):
            machine_info["gpu"] = gpu


def gpu_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts on GPUs, without how busy they were; empty where there is none."""
    if not facts.get("gpu.count"):
        return {}
    return {n.removeprefix("gpu."): v for n, v in facts.items() if n.startswith("gpu.") and n != "gpu.processes"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One remark where metrics were asked and pytest-benchmark could not take them."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _NOT_EXPORTED in str(r.longrepr)]
    generated: bool = config.stash.get(_GENERATED, False)  # CodSpeed then leaves the items out before they are skipped
    if (skipped or generated) and (reason := why_not(config)) is not None:
        terminalreporter.write_line(f"parity: {_NOT_EXPORTED}{reason}", yellow=True)


# Measuring ------------------------------------------------------------------------------------------------------------


def _read(config: pytest.Config, asked: Asked, case: str) -> PerformanceSession:
    from parity import config as targets  # noqa: PLC0415
    from parity import golden, performance_sessions  # noqa: PLC0415

    if case.startswith("! "):
        raise ConfigError(case[2:])
    target, _, profile = case.partition("/")
    traffic, goldens = asked.suites / "traffic", golden.shelf(asked.suites, asked.home).root
    if asked.recordings is not None:
        return performance_sessions.read(asked.recordings, traffic=traffic, goldens=goldens)
    if not hasattr(config, "workerinput"):
        _measure(config, asked, targets.read_target(asked.suites / "targets.toml", target), profile)
    directory = performance_sessions.latest(asked.home, target, profile)
    if directory is None:
        raise ConfigError(
            f"nothing is measured under pytest-xdist, and {target!r} has no finished comparison under {profile!r}; run "
            f"`parity bench {target} --profile {profile}` first"
        )
    return performance_sessions.read(directory, traffic=traffic, goldens=goldens)


def _measure(config: pytest.Config, asked: Asked, target: Target, profile: str) -> None:
    """Both servers in turn, until every gated metric is decided; `parity.bench` keeps each start."""
    from parity import bench, golden, judge  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    assert target.performance is not None
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext(), Display(sys.stderr) as display:
        recorder = Recorder(
            directory=asked.home / "recordings" / target.name,
            places=Places.of(asked.suites, asked.home),
            observer=display,
        )
        limits = judge.limits_of("performance", target.limits.get("performance", {}), target.policy)
        made = bench.Bench.of(target, target.performance, profile, limits, recorder, asked.home)
        days = bench.golden_file(golden.shelf(asked.suites, asked.home).root, target.name, profile)
        made.compare(bench.read_history(days))
