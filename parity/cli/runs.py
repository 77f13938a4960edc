"""Verbs that run engines or look at what they answered: record, compare, calibrate, sensitivity, probe, laws, show."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity.cli.console import EXIT_OF, add_places, say
from parity.verdict import Outcome, worst


def add(verbs: Any) -> None:
    """Add the verbs to the parser."""
    record = verbs.add_parser("record", help="run a target's engines and keep what they answered")
    record.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    add_places(record)
    record.add_argument("--fresh", action="store_true", help="record again even where an equal recording exists")
    record.add_argument("--limit", type=int, metavar="N", help="only N prompts, evenly spread")
    record.add_argument("-o", "--output", type=Path, help="the run's directory (default: under HOME/recordings)")
    record.set_defaults(run=_record)

    compare = verbs.add_parser("compare", help="judge two recordings; starts no engine")
    compare.add_argument("reference", type=Path)
    compare.add_argument("candidate", type=Path)
    compare.add_argument("--noise", type=Path, help="the noise recording (default: the one beside the reference)")
    compare.add_argument("--check", action="append", help="only this check; may be given more than once")
    compare.set_defaults(run=_compare)

    calibrate = verbs.add_parser(
        "calibrate", help="measure a target's rounding noise on all its prompts, and what its gate can see"
    )
    calibrate.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    add_places(calibrate)
    calibrate.set_defaults(run=_calibrate)

    sensitivity = verbs.add_parser(
        "sensitivity", help="seeded faults through a target's candidate: what its gate notices and what it misses"
    )
    sensitivity.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    add_places(sensitivity)
    sensitivity.add_argument("--case", action="append", help="only this case; may be given more than once")
    sensitivity.add_argument("--prompts", type=int, default=64, metavar="N", help="prompts to draw from (default: 64)")
    sensitivity.set_defaults(run=_sensitivity)

    probe = verbs.add_parser("probe", help="what a target's engines really do with a request: short experiments")
    probe.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    probe.add_argument("--side", choices=("reference", "candidate"), help="only this engine (default: both)")
    add_places(probe)
    probe.set_defaults(run=_probe)

    laws = verbs.add_parser("laws", help="generated examples that a target's candidate must treat as any engine does")
    laws.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    laws.add_argument("--examples", type=int, default=48, metavar="N", help="how many (default: 48)")
    laws.add_argument("--seed", type=int, default=7, help="what they are drawn by (default: 7)")
    add_places(laws)
    laws.set_defaults(run=_laws)

    show = verbs.add_parser("show", help="what a recording holds")
    show.add_argument("recording", type=Path)
    show.add_argument("--prompt", metavar="ID", help="this prompt and its answer in full")
    show.set_defaults(run=_show)


def _record(options: argparse.Namespace) -> int:
    from parity import collect, config, golden  # noqa: PLC0415  numpy and pyarrow load only where they are needed
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    target = config.read_target(options.suites / "targets.toml", options.target)
    if options.limit is not None:
        target = config.limited_to(target, options.limit)
    # A limited run lies apart, under the name that pytest gives it too.
    name = target.name if options.limit is None else f"{target.name}-limit-{options.limit}"
    directory = options.output or options.home / "recordings" / name
    with Display() as display:
        recorder = Recorder(
            directory=directory,
            places=Places.of(options.suites, options.home),
            observer=display,
            fresh=options.fresh,
        )
        evidence = collect.collect(target, recorder, golden.shelf(options.suites, options.home))
    where = evidence.directories
    say(f"recorded: {where['reference']} and {where['candidate']}")
    say(f"judge them: parity compare {where['reference']} {where['candidate']}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from parity import judge  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    evidence = judge.pair(options.reference, options.candidate, noise=options.noise)
    verdicts = [judge.judge(evidence, check) for check in options.check or evidence.checks]
    outcome = worst([v.outcome for v in verdicts])
    say(f"{outcome.value}: {evidence.candidate.label} against {evidence.reference.label}")
    say(terminal.table(verdicts))
    said = judge.diagnosis(evidence, verdicts)
    if said is not None:
        say("")
        say(terminal.diagnosis(said))
    say("")
    for line in terminal.sides(evidence.reference, evidence.candidate):
        say(line)
    for verdict in verdicts:
        say("")
        say(terminal.render(verdict))
        say(f"  reproduce: parity compare {options.reference} {options.candidate} --check {verdict.check}")
    return EXIT_OF[outcome]


def _calibrate(options: argparse.Namespace) -> int:
    from parity import calibrate, collect, config  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    target = config.read_target(options.suites / "targets.toml", options.target)
    with Display() as display:
        recorder = Recorder(
            directory=collect.calibration_of(options.home / "recordings" / target.name),
            places=Places.of(options.suites, options.home),
            observer=display,
        )
        found = calibrate.calibrate(target, recorder)
    say(
        f"target {found.target}: {found.source}, measured {found.measured_at} on {found.positions} positions of "
        f"{found.prompts} prompts"
    )
    say(f"  sigma {found.sigma_nats:.4g} nats for the judged pair")
    say(f"  KL floor {found.floor_nats:.3g} nats a token (+- {found.floor_error_nats:.1g}, standard error by prompt)")
    say(f"  margin shifts over 4 sigma {found.beyond_4_sigma:.2%}, over 6 sigma {found.beyond_6_sigma:.3%}")
    say(f"  the noise engine against itself on other batches: {found.other_batches_nats:.2g} nats a token")
    for null in found.null:
        say(
            f"  {null.prompts} prompts: a correct engine fails {null.false_alarms:.1%} and passes {null.passes:.0%} of "
            f"drawn sets; {null.smallest_caught:.2f} times the floor is caught with 90 % probability"
        )
    if (control := found.control) is not None:
        say(
            f"  a second correct engine, {control.source}: {control.ratio:.2f} times the floor ({control.low:.2f} to "
            f"{control.high:.2f}); its alarms in drawn sets, each rule screened in one stage:"
        )
        for size, alarms in control.false_alarms.items():
            raised = ", ".join(f"{rule} {share:.1%}" for rule, share in alarms.items() if share) or "none"
            say(f"    {size} prompts: {raised}; all rules pass in {control.passes[size]:.0%}")
    for warning in found.warnings:
        say(f"  warning: {warning}")
    say(f"kept in {recorder.directory}; runs of this target judge by it as long as the reference is the same")
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    from parity import config  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415
    from parity.sensitivity import bench, table  # noqa: PLC0415

    target = config.read_target(options.suites / "targets.toml", options.target)
    with Display() as display:
        found = bench.Bench(
            target=target,
            directory=options.home / "sensitivity" / target.name,
            places=Places.of(options.suites, options.home),
            observer=display,
            prompts=options.prompts,
        ).run(options.case)
    plain = [asdict(row) for row in found]
    say(table.detection(plain))
    say("")
    say(table.diagnoses(plain))
    return 0


def _probe(options: argparse.Namespace) -> int:
    from parity import collect, config  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.probes import Answer, observe  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    target = config.read_target(options.suites / "targets.toml", options.target)
    found = {}
    with Display() as display:
        recorder = Recorder(
            directory=options.home / "recordings" / target.name,
            places=Places.of(options.suites, options.home),
            observer=display,
        )
        for side in (options.side,) if options.side else ("reference", "candidate"):
            spec = target.reference if side == "reference" else target.candidate
            found[side] = recorder.record(spec, collect.contract_jobs(side))[f"contract-{side}"]
    outcomes = []
    for side, recording in found.items():
        probes = observe(recording)
        outcomes += [p.answer for p in probes]
        say(f"{side}: {terminal.describe(recording)}")
        say(terminal.probes(probes))
        say("")
    return EXIT_OF[Outcome.FAIL if Answer.OTHERWISE in outcomes else Outcome.PASS]


def _laws(options: argparse.Namespace) -> int:
    from parity import config, judge, properties  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.errors import ConfigError, RecordingError  # noqa: PLC0415
    from parity.prompts import Workload  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415
    from parity.recording import Recording  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    if options.examples < 1 or options.seed < 0:
        raise ConfigError(
            f"--examples must be at least 1 and --seed at least 0, not {options.examples} and {options.seed}"
        )
    target = config.read_target(options.suites / "targets.toml", options.target)
    try:
        noise = judge.gather(options.home / "recordings" / target.name).noise
    except RecordingError:  # nothing recorded yet; documented noise is used, and the verdict says so
        noise = None
    with Display() as display:
        recorder = Recorder(
            directory=options.home / "laws" / target.name,
            places=Places.of(options.suites, options.home),
            observer=display,
        )

        def ask(workload: Workload) -> Recording:
            return recorder.record(target.candidate, {"laws": workload})["laws"]

        first = properties.workload(properties.draw(1, options.seed), can_stream=False)
        facts = recorder.record(target.candidate, {"first": first})["first"].fingerprint.context
        verdict = properties.search(
            ask,
            count=options.examples,
            seed=options.seed,
            can_stream=facts.get("engine.can_stream") is True,
            noise=noise,
        )
    say(terminal.render(verdict))
    return EXIT_OF[verdict.outcome]


def _show(options: argparse.Namespace) -> int:
    from parity import store  # noqa: PLC0415
    from parity.errors import ConfigError  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    recording = store.read(options.recording)
    if options.prompt is not None:
        if options.prompt not in recording.by_id:
            raise ConfigError(f"recording {str(options.recording)!r} has no prompt {options.prompt!r}")
        completion = recording.by_id[options.prompt]
        say(completion.prompt_text or f"[{len(completion.prompt_token_ids)} prompt token ids]")
        say(f"--> {completion.text}")
        say(f"[{len(completion.token_ids)} tokens, {completion.finish_reason.value}]")
        return 0
    say(terminal.describe(recording))
    forced = f", scores the tokens of {recording.workload.forced_from[:12]}" if recording.workload.forced_from else ""
    say(f"workload {recording.workload.name}, digest {recording.workload.digest[:12]}{forced}")
    say(f"recording {recording.digest[:12]}, schema {recording.schema}, {len(recording.completions)} completions")
    for group in ("identity", "context", "health"):
        say(f"{group}:")
        for name, value in sorted(getattr(recording.fingerprint, group).items()):
            say(f"  {name}: {value}")
    return 0
