"""A finished comparison of performance, read again: its starts, and the verdict on them.

    .parity/performance/TARGET/PROFILE/NNNN/    as `parity.bench` writes it

The verdict is made anew from the starts, by the limits that the comparison was asked with and by what is known today of
how much pairs spread on its host; the profile's gated metrics and limits of service are those of its file today.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity import performance_history, regression, traffic_files
from parity.bench import (
    CANDIDATE,
    COMPARISON,
    HISTORY,
    REFERENCE,
    SESSION,
    VERDICT,
    golden_file,
    read_history,
    read_start,
)
from parity.checks import performance as check
from parity.checks.performance import Limits, Measured, Pair
from parity.errors import RecordingError
from parity.performance_history import History
from parity.timings import LoadRun
from parity.traffic import Profile
from parity.verdict import Verdict

_KEYS = ("what", "target", "profile", "plan", "hardware", "limits", "sides")


@dataclass(frozen=True, kw_only=True)
class PerformanceSession:
    """runs: every start of complete pairs by side, in the order of pairs. labels: the engines, by side."""

    directory: Path
    target: str
    profile: Profile
    labels: Mapping[str, str]
    runs: Mapping[str, tuple[LoadRun, ...]]
    measured: Measured
    verdict: Verdict


def is_session(directory: Path) -> bool:
    """Whether a comparison of performance lies there, rather than recordings of output."""
    return (directory / SESSION).is_file()


def about(directory: Path) -> tuple[str, str]:
    """Target and profile of a comparison.

    Raises:
        RecordingError: If it is none, or is damaged.
    """
    asked = _asked(directory)
    return str(asked["target"]), str(asked["profile"])


def latest(home: Path, target: str, profile: str) -> Path | None:
    """The newest finished comparison of both engines; None where there is none."""
    for directory in sorted((home / "performance" / target / profile).glob("[0-9][0-9][0-9][0-9]"), reverse=True):
        if (directory / VERDICT).is_file() and _asked(directory)["what"] == COMPARISON:
            return directory
    return None


def read(directory: Path, *, traffic: Path, goldens: Path) -> PerformanceSession:
    """Read a comparison and judge it.

    traffic: the folder of profiles. goldens: the root of goldens, whose accepted days say how much starts vary.

    Raises:
        RecordingError: If it is none, is damaged, or has no complete pair.
        ConfigError: If the profile's file is gone or wrong.
        EngineError: If no request of a start was answered.
    """
    asked = _asked(directory)
    profile = traffic_files.read_profile(traffic / f"{asked['profile']}.toml")
    starts = {kind: _pairs(directory, kind) for kind in ("pair", "fresh")}
    both = [*starts["pair"], *starts["fresh"]]
    if not starts["pair"]:
        raise RecordingError(f"{str(directory)!r} has no complete pair of starts; go on with `parity bench`")
    pairs = {
        kind: [Pair.of(found[REFERENCE], found[CANDIDATE], profile.slo) for found in of_kind]
        for kind, of_kind in starts.items()
    }
    measured = Measured(
        profile=profile.name,
        pairs=pairs["pair"],
        fresh=pairs["fresh"],
        gated=profile.gated,
        spreads=performance_history.spreads(_histories(directory, asked, goldens), profile.gated),
        disturbances=regression.disturbances([run for found in both for run in found.values()]),
    )
    labels = {side: _label(asked["sides"][side]) for side in (REFERENCE, CANDIDATE)}
    verdict = check.judge(
        measured,
        limits=Limits(**asked["limits"]),
        label_reference=labels[REFERENCE],
        label_candidate=labels[CANDIDATE],
    )
    return PerformanceSession(
        directory=directory,
        target=asked["target"],
        profile=profile,
        labels=labels,
        runs={side: tuple(found[side] for found in both) for side in (REFERENCE, CANDIDATE)},
        measured=measured,
        verdict=verdict,
    )


def _asked(directory: Path) -> dict[str, Any]:
    path = directory / SESSION
    try:
        asked: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {name: asked[name] for name in _KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(
            f"{str(path)!r} says no comparison of performance ({error}); name a folder that `parity bench` wrote"
        ) from error


def _pairs(directory: Path, kind: str) -> list[dict[str, LoadRun]]:
    """Complete pairs; half a pair was interrupted, and its other half would be of another hour."""
    found = []
    for path in sorted(directory.glob(f"{kind}-*-{REFERENCE}.jsonl")):
        other = path.with_name(path.name.replace(f"-{REFERENCE}.", f"-{CANDIDATE}."))
        if other.is_file():
            found.append({REFERENCE: read_start(path), CANDIDATE: read_start(other)})
    return found


def _histories(directory: Path, asked: Mapping[str, Any], goldens: Path) -> list[History]:
    """What was measured on the same hardware, under the same requests."""
    this = History(
        target=asked["target"], profile=asked["profile"], plan_sha256=asked["plan"], hardware=asked["hardware"]
    )
    paths = (directory.parent / HISTORY, golden_file(goldens, asked["target"], asked["profile"]))
    found = [read_history(path) for path in paths]
    return [history for history in found if history is not None and history.is_alike(this)]


def _label(side: Mapping[str, Any]) -> str:
    spec = side["spec"]
    label = side["facts"].get("engine") or f"{spec.get('environment') or spec['engine']} {spec['dtype']}"
    return f"{label} at {side['url']}" if side.get("url") else str(label)
