"""The verb on costs: decide."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomllib

from parity.cli.console import say
from parity.errors import ConfigError, RecordingError

if TYPE_CHECKING:
    from parity.payoff import Standing
    from parity.serving_costs import Costs, Machines
    from parity.serving_rates import Speeds
    from parity.timings import LoadRun

_TRAFFIC = ("output_tokens_per_day", "requests_per_day")
_NUMBERS = {
    "gpu_hour_price": "what a GPU costs an hour, in any currency",
    "gpus_per_server": "GPUs of the server that was measured (default: 1)",
    "utilisation": "share of its measured speed that a server gives on average, such as 0.4",
    "changes_per_month": "how often the model changes",
    "build_hours_per_change": "hours of a server to build the candidate for a changed model",
    "engineer_hours_per_change": "hours of a person for the candidate's build, checks and roll-out",
    "engineer_hour_price": "what an engineer costs an hour",
    "one_time_engineer_hours": "hours of a person until the candidate serves",
    "horizon_months": "how long the candidate is expected to stay",
    "reference_build_hours_per_change": "the same for the reference (default: 0)",
    "reference_engineer_hours_per_change": "the same for the reference (default: 0)",
}
_START = re.compile(r"(?:pair|fresh|start)-\d+")


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    decide = verbs.add_parser("decide", help="does the candidate's speed outlast the cost of getting and keeping it?")
    decide.add_argument(
        "reference", type=Path, help="what `parity bench` measured: a session's directory, or one start"
    )
    decide.add_argument("candidate", type=Path, nargs="?", help="the same (default: the candidate of that directory)")
    decide.add_argument("--run", dest="judged", type=Path, metavar="DIR", help="a recorded run whose verdicts count")
    decide.add_argument("--costs", type=Path, metavar="FILE", help="a TOML file of these numbers; options come first")
    decide.add_argument("--markdown", type=Path, metavar="FILE", help="write the answer as Markdown too")
    costs = decide.add_argument_group("costs", "docs/decide.md explains each")
    for name in _TRAFFIC:
        costs.add_argument(
            _option(name), type=float, nargs="+", metavar="N", help="expected: one number, or least most"
        )
    for name, text in _NUMBERS.items():
        costs.add_argument(_option(name), type=float, metavar="X", help=text)
    costs.add_argument(
        "--machines", metavar="KIND", help="how servers are paid: whole, or fractional hours (default: fractional)"
    )
    decide.set_defaults(run=_decide)


def _decide(options: argparse.Namespace) -> int:
    from parity import payoff  # noqa: PLC0415
    from parity.reports import payoff as report  # noqa: PLC0415

    measured = _speeds(options.reference, options.candidate)
    found = payoff.decide(measured, _costs(options, measured), _standing(options.judged))
    say(report.terminal(found))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown(found), "utf-8")
    exits = {payoff.Answer.CANDIDATE: 0, payoff.Answer.REFERENCE: 1, payoff.Answer.BARRED: 1}
    return exits.get(found.answer, 3)


def _standing(run: Path | None) -> Standing:
    from parity import judge, payoff  # noqa: PLC0415

    if run is None:
        return payoff.UNJUDGED
    conclusion = judge.conclude(judge.gather(run))
    return payoff.standing(conclusion.verdicts, conclusion.could_not)


# What was measured ----------------------------------------------------------------------------------------------------


def _speeds(reference: Path, candidate: Path | None) -> Speeds:
    from parity import serving_rates  # noqa: PLC0415

    if candidate is None and not reference.is_dir():
        raise ConfigError(f"{str(reference)!r} is no session's directory; name the candidate's start as well")
    other = reference if candidate is None else candidate
    paired = reference.is_dir() and reference.resolve() == other.resolve()
    ours, theirs = _starts(reference, "reference", either=not paired), _starts(other, "candidate", either=not paired)
    if paired:
        both = [name for name in ours if name in theirs]  # of an interrupted session the last may be half
        if not both:
            raise RecordingError(f"{str(reference)!r} has no complete pair of starts; go on with `parity bench`")
        ours, theirs = {name: ours[name] for name in both}, {name: theirs[name] for name in both}
    return serving_rates.speeds(list(ours.values()), list(theirs.values()), paired=paired)


def _starts(path: Path, side: str, *, either: bool) -> dict[str, LoadRun]:
    """The starts of one side, by name; with `either`, of a directory that has the other side only, of that."""
    from parity.bench import read_start  # noqa: PLC0415

    if not path.is_dir():
        return {path.stem: read_start(path)}
    sides: dict[str, dict[str, Path]] = {"reference": {}, "candidate": {}}
    for file in sorted(path.glob("*.jsonl")):
        name, _, whose = file.stem.rpartition("-")
        if whose in sides and _START.fullmatch(name):
            sides[whose][name] = file
    found = sides[side] or (sides["candidate" if side == "reference" else "reference"] if either else {})
    if not found:
        raise RecordingError(
            f"{str(path)!r} holds no start of an engine, such as pair-01-{side}.jsonl of `parity bench`"
        )
    return {name: read_start(file) for name, file in found.items()}


# What it costs --------------------------------------------------------------------------------------------------------


def _costs(options: argparse.Namespace, measured: Speeds) -> Costs:
    from parity.serving_costs import Costs  # noqa: PLC0415

    where = "the costs" if options.costs is None else str(options.costs)
    data: dict[str, Any] = {} if options.costs is None else _table(options.costs)
    given = {name: value for name in (*_NUMBERS, "machines") if (value := getattr(options, name)) is not None}
    traffic = {name: value for name in _TRAFFIC if (value := getattr(options, name)) is not None}
    if traffic:  # of an option and a file's other way to say it, the option counts
        data = {key: value for key, value in data.items() if key not in _TRAFFIC}
    data |= given | traffic
    if len([name for name in _TRAFFIC if name in data]) != 1:
        raise ConfigError(f"{where}: give the traffic, as either {' or '.join(map(_option, _TRAFFIC))}")
    for field in fields(Costs):
        if field.name in _NUMBERS and field.default is MISSING and field.name not in data:
            raise ConfigError(f"{where}: {field.name!r} is missing; give {_option(field.name)}, or a file with --costs")
    values: dict[str, Any] = {name: _number(data[name], name, where) for name in _NUMBERS if name in data}
    if "machines" in data:
        values["machines"] = _machines(data["machines"], where)
    if (gpus := values.get("gpus_per_server")) is not None:
        if not gpus.is_integer():
            raise ConfigError(f"{where}: 'gpus_per_server' must be a whole number, not {gpus:g}")
        values["gpus_per_server"] = int(gpus)
    tokens = _range(data, where)
    if "requests_per_day" in data:
        tokens = tokens[0] * measured.output_tokens_per_request, tokens[1] * measured.output_tokens_per_request
    try:
        return Costs(output_tokens_per_day=tokens, **values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _table(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the costs {str(path)!r} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {str(path)!r} is not valid TOML: {error}") from error
    valid = (*_TRAFFIC, *_NUMBERS, "machines")
    for key in data:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"
            raise ConfigError(f"{path}: unknown key {key!r}; {hint}")
    return data


def _number(value: Any, name: str, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{where}: {name!r} must be a number, not {value!r}")
    return float(value)


def _range(data: Mapping[str, Any], where: str) -> tuple[float, float]:
    name = next(name for name in _TRAFFIC if name in data)
    found = data[name] if isinstance(data[name], list) else [data[name]]
    if len(found) not in (1, 2):
        raise ConfigError(f"{where}: {name!r} must be one number, or the least and the most, not {data[name]!r}")
    least, most = _number(found[0], name, where), _number(found[-1], name, where)
    if not 0.0 <= least <= most:
        raise ConfigError(f"{where}: {name!r} must be least and most and at least 0, not {least:g} and {most:g}")
    return least, most


def _machines(value: Any, where: str) -> Machines:
    from parity.serving_costs import Machines  # noqa: PLC0415

    try:
        return Machines(value)
    except ValueError:
        valid = " or ".join(repr(each.value) for each in Machines)
        raise ConfigError(f"{where}: 'machines' must be {valid}, not {value!r}") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
