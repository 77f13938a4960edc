"""Verbs on performance: bench, aa, traffic."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.cli.console import EXIT_OF, add_places, say
from parity.cli.goldens import shelf_of, who
from parity.errors import ConfigError
from parity.verdict import Outcome, worst

if TYPE_CHECKING:
    from parity.bench import Bench
    from parity.display import Display

_PAIRS = 8


def add(verbs: Any) -> None:
    """Add the verbs to the parser."""
    bench = verbs.add_parser("bench", help="is the candidate slower? both servers under the same traffic, in turn")
    _add_target(bench)
    bench.add_argument(
        "--pairs", type=int, metavar="N", help="at most N pairs of starts (default: until it is certain)"
    )
    bench.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="of the candidate, e.g. options.max_num_seqs=4; repeatable",
    )  # fmt: skip
    bench.add_argument(
        "--golden", action="store_true", help="hold starts of the candidate alone against the accepted days"
    )
    bench.add_argument("--accept", action="store_true", help="with --golden: add these starts to the accepted days")
    bench.add_argument("--reason", metavar="TEXT", help="with --accept: why; kept with the golden")
    bench.add_argument("--starts", type=int, default=3, metavar="N", help="with --golden: starts a day (default: 3)")
    add_places(bench)
    bench.set_defaults(run=_bench)

    aa = verbs.add_parser("aa", help="may this host judge? one engine under the same traffic as itself")
    _add_target(aa)
    aa.add_argument("--pairs", type=int, default=_PAIRS, metavar="N", help=f"pairs of starts (default: {_PAIRS})")
    aa.add_argument("--side", choices=("reference", "candidate"), default="candidate", help="(default: candidate)")
    add_places(aa)
    aa.set_defaults(run=_aa)

    traffic = verbs.add_parser("traffic", help="a traffic profile from your own request log")
    traffic.add_argument("log", type=Path, metavar="LOG", help="JSON Lines: timestamp, prompt_tokens, output_tokens")
    traffic.add_argument("name", metavar="NAME", help="of the profile; written as suites/traffic/NAME.toml")
    traffic.add_argument("--force", action="store_true", help="write over a profile of that name")
    add_places(traffic)
    traffic.set_defaults(run=_traffic)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    parser.add_argument("--profile", metavar="NAME", help="a file of suites/traffic (default: the target's own)")


def _bench(options: argparse.Namespace) -> int:
    from parity import bench as benches  # noqa: PLC0415
    from parity.checks import performance as check  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    if options.accept and not (options.golden and options.reason):
        raise ConfigError("--accept goes with --golden and --reason TEXT: what is accepted, and why")
    if options.golden:
        return _against_golden(options)
    outcomes = []
    with Display() as display:
        for bench in _benches(options, display):
            limits = bench.limits
            if options.pairs is not None:
                most = _enough("--pairs", options.pairs, least=3)
                limits = replace(limits, most=most, unknown=min(limits.unknown, most))
            path = benches.golden_file(shelf_of(options).root, bench.target, bench.profile.name)
            measured, verdict = replace(bench, limits=limits).compare(benches.read_history(path))
            outcomes.append(verdict.outcome)
            say(terminal.render(verdict))
            say("")
            say(terminal.performance(check.rows([*measured.pairs, *measured.fresh])))
            say("")
    return EXIT_OF[worst(outcomes)]


def _against_golden(options: argparse.Namespace) -> int:
    from parity import bench as benches  # noqa: PLC0415
    from parity import performance_history, record  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415

    count, outcomes = _enough("--starts", options.starts, least=1), []
    with Display() as display:
        for bench in _benches(options, display):
            path = benches.golden_file(shelf_of(options).root, bench.target, bench.profile.name)
            golden = benches.read_history(path)
            if golden is None and not options.accept:
                raise ConfigError(
                    f"target {bench.target!r} has no accepted days under {bench.profile.name!r}: {str(path)!r} does "
                    f"not exist; measure and accept some: parity bench {bench.target} --profile {bench.profile.name} "
                    "--golden --accept --reason TEXT"
                )
            starts = bench.starts(count)
            failed = False
            if golden is not None:
                decisions = bench.against(golden, starts)
                for name, decision in decisions.items():
                    mark = "SUSPICION" if decision.flagged and decision.outcome is not Outcome.FAIL else ""
                    say(f"{mark or decision.outcome.value}  golden {name}: {decision.sentence}")
                outcomes += [decision.outcome for decision in decisions.values()]
                failed = any(decision.flagged for decision in decisions.values())
            if options.accept:
                if failed:
                    raise ConfigError(
                        "nothing is accepted from a day that raises suspicion; ask `parity bench` for pairs"
                    )
                day = performance_history.day(
                    record.now(), bench.candidate.label, by=who(), reason=options.reason, starts=starts
                )
                benches.accept(path, (golden or replace(bench.history, self_runs=())).with_day(day))
                say(f"accepted: day {len(golden.days) + 1 if golden else 1} of {bench.profile.name}; commit {path}")
                outcomes = outcomes if golden is not None else [Outcome.PASS]
    return EXIT_OF[worst(outcomes)]


def _aa(options: argparse.Namespace) -> int:
    from parity.checks import performance as check  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    pairs, outcomes = _enough("--pairs", options.pairs, least=2), []
    with Display() as display:
        for bench in _benches(options, display):
            side = bench.candidate if options.side == "candidate" else bench.reference
            measured, controls = bench.with_itself(side, pairs)
            for name, control in controls.items():
                say(f"{control.outcome.value}  {bench.profile.name}, {name}: {control.sentence}")
            for reason in measured.disturbances:
                say(f"  disturbed: {reason}")
            say("")
            say(terminal.performance(check.rows(measured.pairs)))
            say("")
            outcomes += [control.outcome for control in controls.values()]
    return EXIT_OF[worst(outcomes)]


def _traffic(options: argparse.Namespace) -> int:
    from parity import traffic, traffic_files  # noqa: PLC0415

    path = options.suites / "traffic" / f"{options.name}.toml"
    if path.exists() and not options.force:
        raise ConfigError(f"{str(path)!r} exists; choose another name, or write over it with --force")
    profile = traffic.fit(options.name, traffic_files.read_log(options.log))
    traffic_files.write_profile(path, profile)
    say(f"written: {path} ({profile.description}); measure with parity bench TARGET --profile {options.name}")
    return 0


def _benches(options: argparse.Namespace, display: Display) -> list[Bench]:
    """One for each profile that is asked."""
    from parity import config, judge, upgrade  # noqa: PLC0415
    from parity.bench import Bench  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    path = options.suites / "targets.toml"
    target = config.read_target(path, options.target)
    if settings := getattr(options, "settings", []):
        target = replace(target, candidate=upgrade.spec_of(None, target, model=None, settings=settings))
    if target.performance is None and options.profile is None:
        raise ConfigError(
            f"{path} [targets.{target.name}] says nothing of performance; add performance = {{ profiles = [...] }}, or "
            "name one with --profile"
        )
    asked = target.performance or config.Performance(
        profiles=(options.profile,),
        folder=options.suites / "traffic",
        seed=7,
        reference=config.Serving(),
        candidate=config.Serving(),
    )
    limits = judge.limits_of("performance", target.limits.get("performance", {}), target.policy)
    recorder = Recorder(
        directory=options.home / "recordings" / target.name,
        places=Places.of(options.suites, options.home),
        observer=display,
    )
    names = asked.profiles if options.profile is None else (options.profile,)
    return [Bench.of(target, asked, name, limits, recorder, options.home) for name in names]


def _enough(option: str, count: int, *, least: int) -> int:
    if count < least:
        raise ConfigError(f"{option}: at least {least} are needed, not {count}")
    return count
