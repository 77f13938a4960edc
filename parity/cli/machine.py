"""Verbs about this machine: what is installed, built and cached; engine environments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from parity.cli.console import add_places, say


def add(verbs: Any) -> None:
    """Add the verbs to the parser."""
    doctor = verbs.add_parser("doctor", help="what is installed, built, cached and missing")
    add_places(doctor)
    doctor.set_defaults(run=_doctor)

    env = verbs.add_parser("env", help="engine environments: list, build, remove, lock")
    actions = env.add_subparsers(metavar="ACTION", required=True)
    for action, function, text in (
        ("list", _env_list, "the locked environments and whether they are built"),
        ("build", _env_build, "build environments (default: every one that a target names)"),
        ("remove", _env_remove, "remove built environments, and those no lock file describes any more"),
    ):
        sub = actions.add_parser(action, help=text)
        add_places(sub)
        if action != "list":
            sub.add_argument("names", nargs="*", help="names of lock files without .txt")
        sub.set_defaults(run=function)
    lock = actions.add_parser("lock", help="make a release's lock file: every package that pip would install for it")
    lock.add_argument("requirement", metavar="NAME==VERSION")
    lock.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to write it (default: HOME/locks)")
    add_places(lock)
    lock.set_defaults(run=_env_lock)


def _doctor(options: argparse.Namespace) -> int:
    from parity import config, environments, fingerprint  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    places = Places.of(options.suites, options.home)
    for name, value in fingerprint.machine().items():
        say(f"{name}: {value}")
    say("environments:")
    for environment in environments.listing(locks=places.locks, root=places.environments):
        say(f"  {environment.name}: {'built' if environment.built else 'not built'}")
    models = sorted(p.name for p in places.models.glob("*") if p.is_dir()) if places.models.is_dir() else []
    say(f"models: {', '.join(models) or 'none cached'}")
    path = options.suites / "targets.toml"
    for name in config.target_names(path):
        target = config.read_target(path, name)
        say(f"target {name}: {target.description or target.policy.value}; {len(target.workload.requests)} prompts")
    return 0


def _env_list(options: argparse.Namespace) -> int:
    from parity import environments  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    places = Places.of(options.suites, options.home)
    for environment in environments.listing(locks=places.locks, root=places.environments):
        state = f"built in {environment.directory}" if environment.built else "not built"
        say(f"{environment.name}: {len(environment.packages)} packages, {state}")
    for orphan in environments.orphans(locks=places.locks, root=places.environments):
        say(f"{orphan.name}: built from a lock file that has changed or gone; `parity env remove` removes it")
    return 0


def _env_build(options: argparse.Namespace) -> int:
    from parity import environments  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    places = Places.of(options.suites, options.home)
    with Display() as display:
        for name in options.names or _named_by_targets(options.suites):
            environment = environments.find(name, locks=places.locks, root=places.environments)
            what = f"environment {name}"
            if not environment.built:
                environment = environments.build(environment, report=display.steps(what))
            display.note(f"{what}: {environment.python}")
    return 0


def _env_remove(options: argparse.Namespace) -> int:
    import shutil  # noqa: PLC0415

    from parity import environments  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    places = Places.of(options.suites, options.home)
    for name in options.names:
        environment = environments.find(name, locks=places.locks, root=places.environments)
        say(f"{name}: {'removed' if environments.remove(environment) else 'was not built'}")
    for orphan in environments.orphans(locks=places.locks, root=places.environments):
        shutil.rmtree(orphan)
        say(f"{orphan.name}: removed")
    return 0


def _env_lock(options: argparse.Namespace) -> int:
    from parity import locks, upgrade  # noqa: PLC0415
    from parity.display import Display  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415

    places = Places.of(options.suites, options.home)
    with Display() as display:
        path = locks.locked(
            options.requirement,
            locks=places.locks if options.output is None else (options.output,),
            root=places.environments,
            python=upgrade.python_of(options.requirement, places.locks),
            report=display.steps(f"lock file of {options.requirement}"),
        )
    say(f"{path}: {len(locks.read(path)[1])} packages")
    return 0


def _named_by_targets(suites: Path) -> list[str]:
    from parity import config  # noqa: PLC0415

    path = suites / "targets.toml"
    names: dict[str, None] = {}
    for target in (config.read_target(path, name) for name in config.target_names(path)):
        for spec in (target.reference, target.candidate, *([target.noise] if target.noise else [])):
            if spec.environment is not None:
                names[spec.environment] = None
    return list(names)
