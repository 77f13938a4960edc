"""Verbs on what was accepted: accept, status, diff."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.cli.console import add_places, say
from parity.decision import Advice
from parity.errors import ConfigError, ParityError
from parity.verdict import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parity.config import Target
    from parity.golden import Acceptance, Golden, Shelf
    from parity.golden_document import Document
    from parity.judge import Evidence
    from parity.metrics import Metric

_STALE_DAYS = 180
_MOST = 8
_UNUSABLE = ("missing", "damaged", "stale")


def add(verbs: Any) -> None:
    """Add the verbs to the parser."""
    accept = verbs.add_parser("accept", help="make what a run's candidate answered the target's golden")
    accept.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run's directory, a recording in it, or a target (default: its 'default')",
    )
    accept.add_argument("--reason", required=True, metavar="TEXT", help="why; kept with the golden")
    accept.add_argument("--by", metavar="WHO", help="who accepts (default: git's user.name, else the login name)")
    accept.add_argument("--all", action="store_true", help="every target with a golden that has a finished run")
    accept.add_argument("--new-only", action="store_true", help="only targets that have no golden yet")
    accept.add_argument("--yes", action="store_true", help="do not ask; needed where nobody can answer")
    add_places(accept)
    accept.set_defaults(run=_accept)

    status = verbs.add_parser("status", help="which goldens are sound, missing, stale, obsolete, and how old")
    status.add_argument(
        "--stale-days", type=int, default=_STALE_DAYS, metavar="N", help=f"old from N days on (default: {_STALE_DAYS})"
    )
    add_places(status)
    status.set_defaults(run=_status)

    diff = verbs.add_parser("diff", help="which prompts two recordings answer differently, side by side")
    diff.add_argument("reference", type=Path, help="a recording, a run (its candidate), or a golden's folder")
    diff.add_argument("candidate", type=Path)
    diff.add_argument("--prompt", metavar="ID", help="only this prompt, in full")
    diff.add_argument(
        "--all", action="store_true", help=f"every prompt that differs (default: the {_MOST} that do most)"
    )
    add_places(diff)
    diff.set_defaults(run=_diff)


def _accept(options: argparse.Namespace) -> int:
    from parity import config, judge  # noqa: PLC0415

    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise ConfigError(
            "CI never accepts a golden; take the run's directory from its artifacts, accept it on your own machine and "
            "commit the folder"
        )
    path = options.suites / "targets.toml"
    shelf = shelf_of(options)
    for directory, name in _chosen(options, path, shelf):
        target = config.read_target(path, name)
        acceptance = _acceptance(options, judge.gather(directory), directory, name)
        _require_whole(acceptance, target)
        _show_numbers(shelf, acceptance)
        if not options.yes and not _agreed(name):
            say(f"{name}: not accepted")
            continue
        accepted = shelf.accept(acceptance)
        superseded = f", in the place of {accepted.supersedes[:12]}" if accepted.supersedes else ""
        say(f"{name}: accepted {accepted.digest[:12]}{superseded}; commit {shelf.folder(name)}")
    return 0


def _chosen(options: argparse.Namespace, path: Path, shelf: Shelf) -> list[tuple[Path, str]]:
    """Each run to accept, with its target's name."""
    from parity import config, judge  # noqa: PLC0415

    recordings = options.home / "recordings"
    if options.all and options.runs:
        raise ConfigError(f"give runs or --all, not both: {' '.join(options.runs)}")
    if options.all:
        runs = [recordings / name for name in config.target_names(path) if config.read_target(path, name).golden]
        runs = [run for run in runs if (run / judge.RUN).is_file()]
        if not runs:
            raise ConfigError(f"no target with 'golden = true' has a finished run in {str(recordings)!r}; record one")
    else:
        names = options.runs or [config.read_target(path, None).name]
        runs = [_run_at(Path(name)) or recordings / name for name in names]
    chosen = [(run, judge.target_of(run)) for run in runs]
    if options.new_only:
        chosen = [(run, name) for run, name in chosen if name not in shelf.targets()]
        if not chosen:
            say("every one of these targets has a golden already; nothing to accept")
    return chosen


def _run_at(path: Path) -> Path | None:
    """The run that is at this path, or that the recording at this path belongs to."""
    from parity import judge  # noqa: PLC0415

    if path.is_file():
        raise ConfigError(f"{str(path)!r} is a file; a run is accepted from its directory, unpack it first")
    return next((place for place in (path, path.parent) if (place / judge.RUN).is_file()), None)


def _acceptance(options: argparse.Namespace, evidence: Evidence, directory: Path, name: str) -> Acceptance:
    from parity import judge, noise, record  # noqa: PLC0415
    from parity.golden import Acceptance  # noqa: PLC0415

    found = judge.conclude(evidence)
    if found.could_not:
        check, reason = next(iter(found.could_not.items()))
        raise ConfigError(f"{str(directory)!r} is incomplete: {check} could not judge ({reason}); nothing is accepted")
    if found.decision.advice is Advice.HOLD:  # before anybody is asked
        raise ConfigError(f"{str(directory)!r} is not accepted: {found.decision.sentence}")
    scored = evidence.recordings.get("reference-scores")
    exact = scored is not None and noise.dtype_of(scored) == "float32"
    return Acceptance(
        target=name,
        answers=directory / "candidate",
        arbiter=directory / "reference-scores" if exact else None,
        samples=evidence.scored.get("accuracy-candidate"),
        outcomes={v.check: v.outcome for v in found.verdicts},
        by=options.by or who(),
        reason=options.reason,
        at=record.now(),
    )


def _require_whole(acceptance: Acceptance, target: Target) -> None:
    from parity import store  # noqa: PLC0415

    held, asked = store.read_header(acceptance.answers), target.workload
    if held["workload"]["digest"] != asked.digest:
        raise ConfigError(
            f"{str(acceptance.answers)!r} answers another question than target {target.name!r} asks now "
            f"({held['completions']} prompts, {held['workload']['digest'][:12]}; the target {len(asked.requests)}, "
            f"{asked.digest[:12]}); record the whole target again"
        )


def _show_numbers(shelf: Shelf, acceptance: Acceptance) -> None:
    from parity.golden import changes  # noqa: PLC0415

    before = _accepted(shelf, acceptance.target)
    rows = changes({} if before is None else before.metrics, shelf.numbers_of(acceptance))
    width = max(len(name) for name, _, _ in rows)
    held = (
        "none yet" if before is None else f"accepted {before.accepted_at[:10]} by {before.accepted_by}: {before.reason}"
    )
    say(f"{acceptance.target}: golden {held}")
    say(f"  {'':<{width}}  {'accepted':>14}  {'to accept':>14}")
    for name, old, new in rows:
        units = " / ".join(dict.fromkeys(m.unit for m in (old, new) if m is not None))
        say(f"  {name:<{width}}  {_number(old):>14}  {_number(new):>14}  {units}{_changed(old, new)}")
    undecided = [check for check, outcome in acceptance.outcomes.items() if outcome is Outcome.INCONCLUSIVE]
    if undecided:
        say(f"  note: {', '.join(undecided)} inconclusive in this run")


def _accepted(shelf: Shelf, target: str) -> Document | None:
    """What is superseded, also where its recordings are missing."""
    from parity.errors import GoldenMissingError  # noqa: PLC0415

    try:
        return shelf.document(target)
    except GoldenMissingError:
        return None


def _number(metric: Metric | None) -> str:
    return "-" if metric is None else f"{metric.value:.6g}"


def _changed(old: Metric | None, new: Metric | None) -> str:
    if old is None or new is None or old.value == new.value or not old.value:
        return ""
    return f"  ({100 * (new.value / old.value - 1):+.3g} %)"


def _agreed(name: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here; add --yes to accept without a question")
    return input(f"accept this for {name}? [y/N] ").strip().lower() in ("y", "yes")


def who() -> str:
    """The name of the person at this machine."""
    import getpass  # noqa: PLC0415
    import subprocess  # noqa: PLC0415

    try:
        asked = ["git", "config", "user.name"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    try:
        return found or getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        raise ConfigError(
            "nobody knows who accepts: git has no user.name, and this user no name; say --by WHO"
        ) from None


def _status(options: argparse.Namespace) -> int:
    from parity import config  # noqa: PLC0415

    path = options.suites / "targets.toml"
    shelf = shelf_of(options)
    wanted = {name: target for name in config.target_names(path) if (target := config.read_target(path, name)).golden}
    rows, sound = [], []
    for name in sorted({*wanted, *shelf.targets()}):
        state, said, golden = _state(shelf, name, wanted.get(name), options.stale_days)
        rows.append((state, name, said))
        sound += [golden] if golden is not None else []
        rows += [("orphan", name, f"{p}: no golden names it; remove it") for p in shelf.orphans(name)]
    width = max((len(r[1]) for r in rows), default=0)
    for state, name, said in rows or [("none", "", f"no target asks for a golden, and {shelf.root} holds none")]:
        say(f"{state:<8}  {name:<{width}}  {said}")
    for golden in sound:
        for metric, found in sorted(golden.spreads().items()):
            varied = f"{found.mean:.6g} +- {found.deviation:.2g} over {found.n} accepted runs"
            say(f"          {golden.target}  {metric}: {varied}")
    for line in _left_over(shelf, sound):
        say(line)
    return int(any(state in _UNUSABLE for state, _, _ in rows))


def _state(shelf: Shelf, name: str, target: Target | None, stale_days: int) -> tuple[str, str, Golden | None]:
    """What there is of a golden: a word, a sentence, and the golden if it is sound."""
    from parity.errors import GoldenMissingError  # noqa: PLC0415

    try:
        golden = shelf.read(name)
    except GoldenMissingError as error:
        if target is not None:
            return "missing", str(error), None
        why = f"no target of this name asks for a golden, and {shelf.folder(name)} holds no whole one; remove it"
        return "obsolete", why, None
    except ParityError as error:
        return "damaged", str(error), None
    return (*_worth(golden, target, stale_days), golden)


def _worth(golden: Golden, target: Target | None, stale_days: int) -> tuple[str, str]:
    from datetime import UTC, datetime  # noqa: PLC0415

    age = (datetime.now(UTC) - datetime.fromisoformat(golden.accepted_at)).days
    said = f"{golden.provenance['engine']}, {age} days old, accepted by {golden.accepted_by}: {golden.reason}"
    if target is None:
        return "obsolete", f"no target of this name asks for a golden; {said}"
    if golden.recording("reference").workload.digest != target.workload.digest:
        return "stale", f"the target's prompts or sampling have changed since; record and accept anew; {said}"
    accepted, model = golden.provenance["model"], target.candidate.model
    if accepted != model and model.startswith(("package:", "hub:")):
        return "stale", f"accepted on model {accepted}, now {model}; record and accept anew; {said}"
    return ("old" if age >= stale_days else "sound"), said


def _left_over(shelf: Shelf, sound: list[Golden]) -> Iterator[str]:
    """Lines of known.toml and stored log-probabilities that belong to nothing any more."""
    from parity import blobs, known  # noqa: PLC0415

    lines = known.read(shelf.root / known.FILE)
    prompts = {g.target: set(g.recording("reference").by_id) for g in sound} if lines else {}
    all_sound = len(sound) == len(shelf.targets())
    for line in lines:
        if line.target in prompts and line.id not in prompts[line.target]:
            yield f"known     {line.target}  {line.id!r} is no prompt of this golden; remove the line"
        elif line.target not in prompts and all_sound:
            yield f"known     {line.target}  there is no golden of this name for {line.id!r}; remove the line"
    if shelf.elsewhere is not None and all_sound:
        named = {sha256 for golden in sound for sha256 in golden.bulk}
        for blob in sorted(set(blobs.names(shelf.elsewhere)) - named):
            yield f"orphan    {shelf.elsewhere}/{blob}: no golden names it"


def _diff(options: argparse.Namespace) -> int:
    from parity import differences, judge, report  # noqa: PLC0415
    from parity.checks import greedy  # noqa: PLC0415
    from parity.record import Places  # noqa: PLC0415
    from parity.reports import sidebyside  # noqa: PLC0415

    ours, noise = _recording_at(options, options.reference)
    theirs, _ = _recording_at(options, options.candidate)
    evidence = judge.pair(ours, theirs, noise=noise)
    sigma_nats = greedy.Limits().sigma_without_noise_nats if evidence.noise is None else evidence.noise.sigma_nats
    found = differences.compare(
        evidence.reference,
        evidence.candidate,
        scores=evidence.recordings.get("candidate-scores"),
        scale_sigma_nats=sigma_nats,
        token_text=report.token_texts(evidence.candidate, cache=Places.of(options.suites, options.home).models),
    )
    if options.prompt is not None:
        found = tuple(d for d in found if d.id == options.prompt)
        if not found:
            raise ConfigError(f"there is no prompt {options.prompt!r} in {str(ours)!r}; its tokens.jsonl has every id")
    say(
        sidebyside.render(
            found,
            reference=evidence.reference.label,
            candidate=evidence.candidate.label,
            width=shutil.get_terminal_size((118, 40)).columns,
            most=len(found) if options.all or options.prompt is not None else _MOST,
            whole=options.prompt is not None,
        )
    )
    if evidence.noise is None:
        say("")
        say(f"no rounding noise was measured beside these: {sigma_nats:g} nats, a documented guess, stands in for it")
    return 0


def _recording_at(options: argparse.Namespace, path: Path) -> tuple[Path, Path | None]:
    """The recording that a path means: itself, a run's candidate, a golden's answers; and a golden's own noise."""
    from parity import golden, judge, store  # noqa: PLC0415

    if (path / golden.FILE).is_file():
        accepted = shelf_of(options, root=path.resolve().parent).read(path.resolve().name)
        return accepted.directories["reference"], accepted.directories.get("noise")
    if (path / judge.RUN).is_file() and not (path / store.HEADER).is_file():
        return path / "candidate", None
    return path, None


def shelf_of(options: argparse.Namespace, *, root: Path | None = None) -> Shelf:
    """Where this command line's goldens are."""
    from parity import golden  # noqa: PLC0415

    return golden.shelf(options.suites, options.home, root=root)
