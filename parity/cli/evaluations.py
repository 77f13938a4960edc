"""The verb on accuracy: eval."""

from __future__ import annotations

import argparse
from typing import Any

from parity.cli.console import EXIT_OF, add_places, say
from parity.errors import ConfigError


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    eval_ = verbs.add_parser("eval", help="both engines on lm-eval tasks, judged in pairs: is the candidate as good?")
    eval_.add_argument("target", nargs="?", help="a target of suites/targets.toml (default: its 'default')")
    eval_.add_argument(
        "--tasks", nargs="+", metavar="NAME", default=["parity_local"],
        help="tasks, groups or tags of suites/tasks (default: parity_local, all of them)",
    )  # fmt: skip
    eval_.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    eval_.add_argument("--sequential", action="store_true", help="ask the candidate until the verdict is certain")
    eval_.add_argument("--official", action="store_true", help="also look among lm-eval's own tasks, which need data")
    add_places(eval_)
    eval_.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> int:
    from parity import accuracy, config, judge, lmeval, models, paired, recovery  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places, Recorder  # noqa: PLC0415
    from parity.reports import terminal  # noqa: PLC0415

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be a whole number of at least 1, not {options.limit}")
    target = config.read_target(options.suites / "targets.toml", options.target)
    limits = judge.limits_of("accuracy", target.limits.get("accuracy", {}), target.policy)
    places = Places.of(options.suites, options.home)
    with Display() as display:
        model = models.provide(target.reference.model, cache=places.models, report=display.note)
        tasks = lmeval.load_tasks(
            options.tasks, folder=options.suites / "tasks", model=model, official=options.official
        )
        count = sum(min(size, options.limit or size) for size in tasks.sizes.values())
        display.note(paired.plan(n=count, noise=limits.noise, rule=limits.rule).sentence)
        recorder = Recorder(
            directory=options.home / "recordings" / f"{target.name}-accuracy", places=places, observer=display
        )
        run = accuracy.evaluate_until_certain if options.sequential else accuracy.evaluate
        found = run(target, recorder, tasks, limit=options.limit)
    say(terminal.render(found.verdict))
    kept = recovery.of(found.reference, found.candidate, tail=limits.alpha_pass, moved=None)
    if kept is not None and not options.sequential:  # drawn by their margins, documents are no fair share of a task
        say("")
        say(terminal.recovery(kept))
    return EXIT_OF[found.verdict.outcome]
