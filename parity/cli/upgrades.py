"""Verbs that end in a decision: upgrade, report, lint-engine, build-manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.cli.console import EXIT_OF, add_places, say
from parity.cli.goldens import shelf_of
from parity.decision import Advice
from parity.errors import ConfigError, ParityError
from parity.verdict import Outcome, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parity.judge import Conclusion, Evidence

_SHOWN_PACKAGES = 12
_OUTCOME_OF = {Advice.UPGRADE: Outcome.PASS, Advice.HOLD: Outcome.FAIL, Advice.UNDECIDED: Outcome.INCONCLUSIVE}


def add(verbs: Any) -> None:
    """Add the verbs to the parser."""
    upgrade = verbs.add_parser(
        "upgrade", help="may the new engine take the old one's place? UPGRADE, HOLD or UNDECIDED, with the evidence"
    )
    upgrade.add_argument(
        "engines", nargs="*", metavar="ENGINE",
        help="old and new: PACKAGE==VERSION, a locked environment, or a TOML file with an engine's keys; with "
        "--from-golden only the new one (default: the target's candidate)",
    )  # fmt: skip
    upgrade.add_argument("--model", metavar="MODEL", help="what both run (default: the target's model)")
    base = upgrade.add_mutually_exclusive_group()
    base.add_argument(
        "--target", metavar="NAME", help="whose workloads, checks and arbiter to use (default: the file's 'default')"
    )
    base.add_argument("--from-golden", metavar="TARGET", help="the old side is this target's golden")
    upgrade.add_argument(
        "--policy", choices=[p.value for p in Policy],
        help="how much the new side may differ (default: identity; with --from-golden the target's)",
    )  # fmt: skip
    for side in ("old", "new"):
        upgrade.add_argument(
            f"--{side}", action="append", default=[], metavar="KEY=VALUE", dest=f"set_{side}",
            help=f"a setting of the {side} engine: dtype, quantization, model, threads, options.NAME, env.NAME",
        )  # fmt: skip
    upgrade.add_argument("--fresh", action="store_true", help="record again even where an equal recording exists")
    upgrade.add_argument("-o", "--output", type=Path, help="the reports' directory (default: under HOME/reports)")
    add_places(upgrade)
    upgrade.set_defaults(run=_upgrade)

    report = verbs.add_parser("report", help="a run's report: HTML, Markdown, JSON, CSV; starts no engine")
    report.add_argument("run_directory", type=Path, metavar="RUN", help="a run's directory (HOME/recordings/TARGET)")
    report.add_argument("-o", "--output", type=Path, help="the reports' directory (default: under HOME/reports)")
    add_places(report)
    report.set_defaults(run=_report)

    _add_engine_directories(verbs)


def _add_engine_directories(verbs: Any) -> None:
    lint = verbs.add_parser("lint-engine", help="what is wrong with a TensorRT-LLM engine directory; needs no GPU")
    lint.add_argument("directory", type=Path, metavar="DIR")
    lint.add_argument("--accepted", type=Path, metavar="DIR", help="an accepted build: its config.json and sidecar")
    lint.add_argument("--sm", metavar="X.Y", help="compute capability of the GPU that will load it, such as 9.0")
    lint.add_argument("--tp", type=int, metavar="N", help="tensor parallel size")
    lint.add_argument("--pp", type=int, metavar="N", help="pipeline parallel size")
    lint.add_argument("--dtype", metavar="NAME", help="number format as config.json names it, such as bfloat16")
    lint.add_argument("--quantization", metavar="NAME", help="quant_algo as config.json names it, or 'none'")
    lint.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of the longest prompt")
    lint.add_argument("--max-answer-tokens", type=int, metavar="N", help="of the longest answer")
    lint.add_argument("--batch", type=int, metavar="N", help="requests at once")
    lint.add_argument("--logprobs", action="store_true", help="log-probabilities of answers are needed")
    lint.add_argument("--prompt-logprobs", action="store_true", help="log-probabilities of prompts are needed")
    lint.add_argument("--prefix-caching", action="store_true", help="a prefix cache is needed")
    lint.set_defaults(run=_lint_engine)

    manifest = verbs.add_parser(
        "build-manifest", help="write down what an engine directory was built with; run it where it was built"
    )
    manifest.add_argument("directory", type=Path, metavar="DIR")
    manifest.add_argument("--checkpoint", type=Path, metavar="DIR", help="the checkpoint it was built from")
    manifest.add_argument("--command", metavar="TEXT", help="the command it was built by")
    manifest.set_defaults(run=_build_manifest)


def _upgrade(options: argparse.Namespace) -> int:
    from parity import collect, config, upgrade  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415

    golden = options.from_golden is not None
    engines = _engines(options, golden=golden)
    base = config.read_target(options.suites / "targets.toml", options.from_golden or options.target)
    policy = None if options.policy is None else Policy(options.policy)
    specs = [upgrade.spec_of(text, base, model=options.model, settings=settings) for text, settings in engines]
    if golden:
        target = upgrade.onto_golden(specs[0], base, policy=policy)
        name = upgrade.golden_run(target)
    else:
        target = upgrade.target_of(specs[0], specs[1], base, policy=policy or Policy.IDENTITY)
        name = target.name
    places = Places.of(options.suites, options.home)
    with Display() as display:
        for (text, _), spec in zip(engines, specs, strict=True):
            upgrade.require_environment(text, spec, places, display.steps(f"lock file of {text}"))
        recorder = Recorder(
            directory=options.home / "recordings" / name, places=places, observer=display, fresh=options.fresh
        )
        if golden:
            evidence = collect.against_golden(target, recorder, shelf_of(options))
        else:
            evidence = collect.collect(target, recorder)
    return _concluded(options, evidence, title=target.description, name=name)


def _engines(options: argparse.Namespace, *, golden: bool) -> list[tuple[str | None, Sequence[str]]]:
    """What names each engine, and its settings; the new one last."""
    given = options.engines
    found = f"not {len(given)}: {' '.join(given)}" if given else "not none"
    if not golden:
        if len(given) != 2:
            raise ConfigError(f"give two engines, the old one and the new one, {found}")
        return list(zip(given, (options.set_old, options.set_new), strict=True))
    if len(given) > 1:
        raise ConfigError(f"with --from-golden give at most one engine, the new one, {found}")
    if options.set_old:
        raise ConfigError(
            "with --from-golden the old side is what was accepted; leave out --old, it has nothing to set"
        )
    return [(next(iter(given), None), options.set_new)]


def _report(options: argparse.Namespace) -> int:
    from parity import judge  # noqa: PLC0415

    evidence = judge.gather(options.run_directory)
    run = options.run_directory.resolve()
    of = "the golden of " * evidence.accepted
    return _concluded(
        options,
        evidence,
        title=f"{evidence.candidate.label} in the place of {of}{evidence.reference.label}",
        name=f"{run.parent.name}-golden" if evidence.accepted else run.name,
    )


def _concluded(options: argparse.Namespace, evidence: Evidence, *, title: str, name: str) -> int:
    """Judge, say the decision, and write the reports."""
    from parity import fingerprint, judge  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    conclusion = judge.conclude(evidence)
    say(terminal.table(conclusion.verdicts))
    for check, reason in conclusion.could_not.items():
        say(f"could not judge {check}: {reason}")
    if (kept := judge.recovery(evidence)) is not None:
        say("")
        say(terminal.recovery(kept))
    say("")
    for line in terminal.sides(evidence.reference, evidence.candidate):
        say(line)
    ours, theirs = evidence.reference.fingerprint, evidence.candidate.fingerprint
    if packages := fingerprint.differences(ours.packages, theirs.packages):
        say(f"packages that changed: {len(packages)}")
        for change in packages[:_SHOWN_PACKAGES]:
            say(f"  {change.name}: {change.reference or 'absent'} -> {change.candidate or 'absent'}")
        if len(packages) > _SHOWN_PACKAGES:
            say(f"  and {len(packages) - _SHOWN_PACKAGES} more, in the report")
    say("")
    say(terminal.decision(conclusion.decision, title))
    if remarks := terminal.warnings(conclusion.verdicts):
        say(remarks)
    try:
        say(f"report: {_write_report(options, evidence, conclusion, title=title, name=name)}")
    except ParityError as error:  # it shows answers side by side, which must not keep a decision from being said
        say(f"no report: {error}")
    return EXIT_OF[_OUTCOME_OF[conclusion.decision.advice]]


def _write_report(
    options: argparse.Namespace, evidence: Evidence, conclusion: Conclusion, *, title: str, name: str
) -> Path:
    from parity import report  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    summary = report.summary_of(
        evidence,
        conclusion,
        title=title,
        reproduce=(f"parity report {evidence.directories['reference'].parent}",),
        token_text=report.token_texts(evidence.candidate, cache=Places.of(options.suites, options.home).models),
    )
    return report.write(summary, options.output or options.home / "reports" / name)


def _lint_engine(options: argparse.Namespace) -> int:
    from parity import engine_build  # noqa: PLC0415

    wanted = engine_build.Wanted(
        sm=options.sm,
        tensor_parallel_size=options.tp,
        pipeline_parallel_size=options.pp,
        dtype=options.dtype,
        quantization=options.quantization,
        max_prompt_tokens=options.max_prompt_tokens,
        max_answer_tokens=options.max_answer_tokens,
        batch=options.batch,
        needs_generation_logprobs=options.logprobs,
        needs_prompt_logprobs=options.prompt_logprobs,
        prefix_caching=options.prefix_caching,
    )
    accepted = None if options.accepted is None else engine_build.accepted_of(options.accepted)
    found = engine_build.lint(options.directory, accepted=accepted, wanted=wanted)
    say(engine_build.render(found, options.directory).rstrip())
    return EXIT_OF[engine_build.exit_outcome(found)]


def _build_manifest(options: argparse.Namespace) -> int:
    from parity import engine_manifest  # noqa: PLC0415

    path = engine_manifest.build_manifest(
        options.directory,
        checkpoint=options.checkpoint,
        command=options.command,
        machine=engine_manifest.this_machine(),
    )
    say(f"written: {path}")
    manifest = engine_manifest.read_manifest(options.directory)
    if manifest is not None and manifest.unknown:
        say(f"could not be found out: {', '.join(manifest.unknown)}")
    return 0
