"""`golden/known.toml`: divergences from a golden that somebody has looked at and accepted, each with a reason.

    [[known]]
    target = "cpu"
    id = "chat-007"                  # the prompt
    engine = "vllm"
    versions = ">=0.32,<0.34"        # of that engine; outside them the line says nothing
    reason = "0.32 sums the logits in another order; both answers are right"
    link = "https://github.com/vllm-project/vllm/pull/12345"
    date = 2026-11-24

Such a prompt is left out of the comparison with the golden, and said to be. A line that matches no prompt, or whose
prompt answers alike again, is reported: the list must not outlive its reasons.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomllib
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from parity.errors import ConfigError
from parity.recording import Recording

FILE = "known.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One accepted divergence."""

    target: str
    id: str
    engine: str
    versions: str
    reason: str
    link: str
    date: str

    def concerns(self, target: str, candidate: Recording) -> bool:
        """Whether the line speaks of this target's engine in this version."""
        if (self.target, self.engine) != (target, candidate.spec.engine_label):
            return False
        try:
            version = Version(str(candidate.fingerprint.context.get("engine.version")))
        except InvalidVersion:
            return False
        return SpecifierSet(self.versions).contains(version, prereleases=True)


def read(path: Path) -> tuple[Known, ...]:
    """Every line of the file, in its order; none where there is no file.

    Raises:
        ConfigError: If a line lacks a key, has an unknown one, or a range of versions that is none.
    """
    if not path.is_file():
        return ()
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as TOML: {error}") from error
    if unknown := set(data) - {"known"}:
        raise ConfigError(f"{str(path)!r} has the unknown key {min(unknown)!r}; it holds tables [[known]]")
    lines = data.get("known", [])
    if not isinstance(lines, list):
        raise ConfigError(f"{str(path)!r}: 'known' must be a list of tables, written [[known]]")
    return tuple(_known(line, f"{path} [[known]] {number}") for number, line in enumerate(lines, start=1))


def from_json(data: Sequence[Mapping[str, str]]) -> tuple[Known, ...]:
    """Read what `to_json` wrote."""
    return tuple(Known(**line) for line in data)


def to_json(known: Sequence[Known]) -> list[dict[str, str]]:
    """Plain values, for the file that says what a run was judged by."""
    return [asdict(line) for line in known]


def remarks(known: Sequence[Known], golden: Recording, candidate: Recording) -> tuple[str, ...]:
    """What a reader must know of these lines: what they leave out, and which of them have outlived their reason."""
    found = []
    for line in known:
        ours, theirs = golden.by_id.get(line.id), candidate.by_id.get(line.id)
        if ours is None or theirs is None:
            found.append(f"known.toml: {line.id!r} is no prompt of this golden; remove the line")
        elif (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason):
            found.append(f"known.toml: {line.id!r} is answered like the golden again; remove the line")
        else:
            found.append(f"{line.id!r} is left out as a known divergence: {line.reason} ({line.link}, {line.date})")
    return tuple(found)


def _known(line: Any, where: str) -> Known:
    names = [f.name for f in fields(Known)]
    if not isinstance(line, Mapping):
        raise ConfigError(f"{where} must be a table, not {line!r}")
    if unknown := sorted(set(line) - set(names)):
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; valid are {', '.join(names)}")
    if missing := [name for name in names if name not in line]:
        raise ConfigError(f"{where} lacks the key {missing[0]!r}; a divergence is accepted with all of {names}")
    values = {k: v.isoformat() if isinstance(v, datetime.date) else v for k, v in line.items()}
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: {name!r} must be a text, not {value!r}")
    try:
        SpecifierSet(values["versions"])
    except InvalidSpecifier as error:
        raise ConfigError(f"{where}: {values['versions']!r} is no range of versions such as '>=0.32,<0.34'") from error
    try:
        datetime.date.fromisoformat(values["date"])
    except ValueError as error:
        raise ConfigError(f"{where}: {values['date']!r} is no day such as 2026-11-24") from error
    return Known(**values)
