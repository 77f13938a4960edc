"""The pytest plugin: options, fixtures, report hooks. Plumbing only; statistics and file formats live elsewhere.

A suite's test asks `parity_judge("greedy")`. The engines of the target run once per session, when the first test needs
them; with `--parity-recordings DIR` nothing is started and stored recordings are judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity import benchmark_rails
from parity.errors import ParityError

if TYPE_CHECKING:
    from parity.judge import Evidence
    from parity.verdict import Verdict

_INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    targets: tuple[str, ...]
    recordings: Path | None
    inconclusive_fails: bool
    suites: Path
    home: Path
    fresh: bool
    limit: int | None
    report: Path | None


pytest_plugins = ("parity.benchmark_rails",)

_OPTIONS = pytest.StashKey[_Options]()
_JUDGED = pytest.StashKey[list["tuple[Evidence, Verdict]"]]()
"""What was judged in this process, for the diagnosis at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a project decides once has an ini twin of the same name with underscores."""
    group = parser.getgroup("parity", "inference engine parity")
    group.addoption("--parity-target", action="append", metavar="NAME", help="a target of targets.toml; repeatable")
    group.addoption(
        "--parity-recordings", metavar="DIR", help="judge the recordings of an earlier run; start no engine"
    )
    group.addoption(
        "--parity-inconclusive", choices=("fail", "warn"), help="whether an inconclusive verdict fails (default: fail)"
    )
    group.addoption("--parity-suites", metavar="DIR", help="the folder that holds targets.toml (default: suites)")
    group.addoption("--parity-home", metavar="DIR", help="cache folder (default: .parity)")
    group.addoption("--parity-fresh", action="store_true", help="record again even where an equal recording exists")
    group.addoption("--parity-limit", type=int, metavar="N", help="only N prompts, evenly spread")
    group.addoption("--parity-report", metavar="DIR", help="write a report of each target (HTML, Markdown, JSON, CSV)")
    for name, text in (
        ("parity_target", "target names, separated by spaces"),
        ("parity_inconclusive", "fail or warn"),
        ("parity_suites", "the folder that holds targets.toml"),
        ("parity_home", "cache folder"),
    ):
        parser.addini(name, text, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Options become one frozen value; markers are registered for strict users."""
    config.addinivalue_line(
        "markers", "parity: judges inference engines; starts them unless --parity-recordings is given"
    )

    def chosen(name: str, default: str) -> str:
        return config.getoption(f"--parity-{name}") or str(config.getini(f"parity_{name}")) or default

    recordings, report = config.getoption("--parity-recordings"), config.getoption("--parity-report")
    inconclusive = chosen("inconclusive", "fail")
    if inconclusive not in ("fail", "warn"):
        raise pytest.UsageError(f"parity_inconclusive must be 'fail' or 'warn', not {inconclusive!r}")
    config.stash[_JUDGED] = []
    config.stash[_OPTIONS] = _Options(
        targets=tuple(config.getoption("--parity-target") or str(config.getini("parity_target")).split()),
        recordings=None if recordings is None else config.invocation_params.dir / recordings,
        inconclusive_fails=inconclusive == "fail",
        suites=config.rootpath / chosen("suites", "suites"),
        home=config.rootpath / chosen("home", ".parity"),
        fresh=config.getoption("--parity-fresh"),
        limit=config.getoption("--parity-limit"),
        report=None if report is None else config.invocation_params.dir / report,
    )
    options = config.stash[_OPTIONS]
    config.stash[benchmark_rails.ASKED] = benchmark_rails.Asked(
        suites=options.suites,
        home=options.home,
        targets=options.targets,
        recordings=options.recordings,
        inconclusive_fails=options.inconclusive_fails,
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Who will be judged on what, before anything runs."""
    options = config.stash[_OPTIONS]
    if options.recordings is None and not (options.suites / "targets.toml").is_file():
        return []
    try:
        return _header(options)
    except ParityError as error:
        return [f"parity: {error}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One instance of each suite test per target."""
    if "parity_evidence" not in metafunc.fixturenames:
        return
    options = metafunc.config.stash[_OPTIONS]
    if options.recordings is not None:
        names: tuple[str | None, ...] = (options.recordings.name,)
    else:
        names = options.targets or (_default_target(options),)
    metafunc.parametrize("parity_evidence", names, indirect=True, scope="session", ids=[str(n) for n in names])


@pytest.fixture(scope="session")
def parity_evidence(request: pytest.FixtureRequest) -> Evidence:
    """The recordings of one target: read from `--parity-recordings`, or recorded now, each engine started once."""
    options = request.config.stash[_OPTIONS]
    try:
        if options.recordings is not None:
            from parity import judge  # noqa: PLC0415  numpy and pyarrow must not load with every pytest session

            return judge.gather(options.recordings)
        if hasattr(request.config, "workerinput"):
            pytest.fail(
                "parity: engines cannot be measured under pytest-xdist; add --parity-recordings DIR", pytrace=False
            )
        return _collect(request, options)
    except ParityError as error:
        pytest.fail(f"parity could not judge: {error}", pytrace=False)


@pytest.fixture
def parity_judge(request: pytest.FixtureRequest, parity_evidence: Evidence) -> Callable[[str], Verdict]:
    """`parity_judge(check)` judges the target by one check and fails the test unless the verdict passes."""
    return lambda check: _judged(request, parity_evidence, check)


@pytest.fixture
def parity_judge_golden(request: pytest.FixtureRequest, parity_evidence: Evidence) -> Callable[[str], Verdict]:
    """`parity_judge_golden(check)` does the same with the target's golden in the reference's place.

    A target without `golden = true` is skipped; one whose golden is missing fails with the command that makes one.
    """

    def run(check: str) -> Verdict:
        from parity import judge  # noqa: PLC0415

        if parity_evidence.golden is None and not parity_evidence.no_golden:
            pytest.skip("parity: the target asks for no golden; add 'golden = true' to it")
        try:
            evidence = judge.against_golden(parity_evidence)
        except ParityError as error:
            pytest.fail(f"parity could not judge: {error}", pytrace=False)
        return _judged(request, evidence, check)

    return run


def _judged(request: pytest.FixtureRequest, evidence: Evidence, check: str) -> Verdict:
    from parity import judge  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    try:
        if reason := judge.why_not(evidence, check):
            pytest.skip(f"parity: {reason}")
        verdict = judge.judge(evidence, check)
    except ParityError as error:
        pytest.fail(f"parity could not judge: {error}", pytrace=False)
    request.config.stash[_JUDGED].append((evidence, verdict))
    places = evidence.directories
    reproduce = f"parity compare {places['reference']} {places['candidate']} --check {check}"
    text = f"{terminal.render(verdict)}\n  reproduce: {reproduce}"
    request.node.user_properties += [
        ("parity_outcome", verdict.outcome.value),
        ("parity_check", f"golden {check}" if evidence.accepted else check),
        ("parity_headline", verdict.headline),
        ("parity_reproduce", reproduce),
        ("parity_verdict", text),
    ]
    strict = request.config.stash[_OPTIONS].inconclusive_fails
    if verdict.outcome.value == "FAIL" or (verdict.outcome.value == _INCONCLUSIVE and strict):
        pytest.fail(text, pytrace=False)
    return verdict


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> tuple[str, str, str | tuple[str, dict[str, bool]]] | None:
    """INCONCLUSIVE has its own letter and word."""
    if isinstance(report, pytest.TestReport) and report.when == "call":
        outcomes = [row["parity_outcome"] for row in _rows(report)]
        # Where inconclusive only warns, a failure has another reason, and keeps its own place in the report.
        its_own = config.stash[_OPTIONS].inconclusive_fails or not report.failed
        if _INCONCLUSIVE in outcomes and "FAIL" not in outcomes and its_own:
            return "inconclusive", "I", (_INCONCLUSIVE, {"yellow": True})
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One row per check, the most likely cause of what failed, then each verdict in full."""
    found = [
        row
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for row in _rows(report)
    ]
    if not found:
        return
    terminalreporter.section("parity")
    width = max(11, *(len(row["parity_check"]) for row in found))
    for row in found:
        line = f"{row['parity_outcome']:<12}  {row['parity_check']:<{width}}  {row['parity_headline']}"
        terminalreporter.write_line(line, green=row["parity_outcome"] == "PASS", red=row["parity_outcome"] == "FAIL")
    judged = config.stash[_JUDGED]
    for line in (*_diagnoses(judged), *_recoveries(judged), *_reports(judged, config.stash[_OPTIONS])):
        terminalreporter.write_line(line)
    for row in found:
        if row["parity_outcome"] != "FAIL":  # what failed was printed in full above, as the failure's own text
            terminalreporter.write_line("")
            terminalreporter.write_line(row["parity_verdict"])


def _diagnoses(judged: Sequence[tuple[Evidence, Verdict]]) -> list[str]:
    """The most likely cause for each target in which a check failed."""
    if not judged:
        return []
    from parity import judge  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    lines: list[str] = []
    for evidence in {id(e): e for e, _ in judged}.values():
        said = judge.diagnosis(evidence, [v for e, v in judged if e is evidence])
        if said is not None:
            lines += ["", terminal.diagnosis(said)]
    return lines


def _recoveries(judged: Sequence[tuple[Evidence, Verdict]]) -> list[str]:
    """What is kept of the accuracy, for each comparison whose accuracy was judged."""
    if not any(verdict.check == "accuracy" for _, verdict in judged):
        return []
    from parity import judge  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    lines: list[str] = []
    for evidence in {id(e): e for e, v in judged if v.check == "accuracy"}.values():
        if (found := judge.recovery(evidence)) is not None:
            of = "the golden of " * evidence.accepted
            about = f"accuracy that {evidence.candidate.label} keeps of {of}{evidence.reference.label}:"
            lines += ["", about, terminal.recovery(found)]
    return lines


def _reports(judged: Sequence[tuple[Evidence, Verdict]], options: _Options) -> list[str]:
    """One report for each comparison, of the checks that were asked."""
    if options.report is None:
        return []
    from parity import judge, report  # noqa: PLC0415

    lines = [""]
    for evidence in {id(e): e for e, _ in judged}.values():
        run = evidence.directories["reference"].parent
        try:
            summary = report.summary_of(
                evidence,
                judge.concluded(evidence, [v for e, v in judged if e is evidence], {}),
                title=f"{evidence.candidate.label} in the place of {'the golden of ' * evidence.accepted}"
                f"{evidence.reference.label}",
                reproduce=(f"parity report {run}",),
                token_text=report.token_texts(evidence.candidate, evidence.reference, cache=options.home / "models"),
            )
            name = f"{run.parent.name}-golden" if evidence.accepted else run.name
            lines.append(f"report: {report.write(summary, options.report / name)}")
        except ParityError as error:
            lines.append(f"no report: {error}")
    return lines


def _rows(report: pytest.TestReport) -> list[dict[str, str]]:
    """The verdicts of one test, one dictionary of properties each: a test may ask for several."""
    rows: list[dict[str, str]] = []
    for name, value in report.user_properties:
        if name == "parity_outcome":
            rows.append({})
        if rows and name.startswith("parity_"):
            rows[-1][name] = str(value)
    return rows


def _collect(request: pytest.FixtureRequest, options: _Options) -> Evidence:
    from parity import collect, config, golden  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    target = config.read_target(options.suites / "targets.toml", request.param)
    directory = options.home / "recordings" / target.name
    if options.limit is not None:
        target = config.limited_to(target, options.limit)
        directory = directory.with_name(f"{target.name}-limit-{options.limit}")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext(), Display(sys.stderr) as display:
        recorder = Recorder(
            directory=directory,
            places=Places.of(options.suites, options.home),
            observer=display,
            fresh=options.fresh,
        )
        return collect.collect(target, recorder, golden.shelf(options.suites, options.home))


def _default_target(options: _Options) -> str | None:
    """The default target's name for the test ids; a broken file is reported when the fixture reads it."""
    from parity import config  # noqa: PLC0415

    try:
        return config.read_target(options.suites / "targets.toml", None).name
    except ParityError:
        return None


def _header(options: _Options) -> list[str]:
    from parity import config, fingerprint  # noqa: PLC0415

    if options.recordings is not None:
        from parity import judge, performance_sessions  # noqa: PLC0415
        from parity.reports import terminal  # noqa: PLC0415

        if performance_sessions.is_session(options.recordings):
            return [f"parity: the comparison of performance in {options.recordings}"]
        evidence = judge.gather(options.recordings)
        return [f"parity: {line}" for line in terminal.sides(evidence.reference, evidence.candidate)]
    lines = []
    for name in options.targets or (None,):
        target = config.read_target(options.suites / "targets.toml", name)
        lines.append(f"parity: target {target.name}: {target.description}")
        for role, spec in (("reference", target.reference), ("candidate", target.candidate)):
            place = spec.environment or spec.python or spec.url or "this interpreter"
            lines.append(f"parity: {role} {spec.engine_label} {spec.dtype} in {place}, model {spec.model}")
    machine = fingerprint.machine()
    hardware = machine.get("gpu.0.name") or f"{machine['host.cpu']}, {machine['host.cores']} cores, no GPU"
    return [*lines, f"parity: hardware {hardware}"]
