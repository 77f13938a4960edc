"""Traffic at rest: profiles in TOML files, and the user's own log of requests.

An unknown key is an error that names the key, the file and the nearest valid key.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tomllib

from parity import config
from parity.errors import ConfigError
from parity.service_metrics import DEFINITIONS
from parity.traffic import (
    Arrivals,
    ClosedLoop,
    Empirical,
    Fixed,
    Lengths,
    Lognormal,
    Offline,
    OpenLoop,
    Profile,
    Slo,
    Trace,
)


def profiles(folder: Path) -> dict[str, Path]:
    """The profiles in a folder, by name, which is the file's without `.toml`; sorted."""
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_profile(path: Path) -> Profile:
    """Read one profile; docs/performance.md explains every key.

    Raises:
        ConfigError: If the file, a key or a value is wrong.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the profile {str(path)!r} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {str(path)!r} is not valid TOML: {error}") from error
    table = _Table(data=data, where=str(path))
    table.only("description", "requests", "warmup", "gated", "arrivals", "prompt_tokens", "output_tokens", "slo")
    arrivals = _arrivals(table.table("arrivals"), path.parent)
    slo = table.table("slo", {})
    slo.only("ttft_s", "tpot_s", "e2e_s")
    gated = table.strings("gated")
    for name in gated:
        if name not in DEFINITIONS:
            raise ConfigError(config.unknown("metric", name, list(DEFINITIONS), f"{path} 'gated'"))
    with _placed(str(path)):
        return Profile(
            name=path.stem,
            description=table.string("description", ""),
            arrivals=arrivals,
            prompt_tokens=_lengths(table, "prompt_tokens", arrivals),
            output_tokens=_lengths(table, "output_tokens", arrivals),
            requests=table.whole("requests", len(arrivals.at_s) if isinstance(arrivals, Trace) else None),
            warmup=table.whole("warmup", 0, least=0),
            slo=Slo(
                ttft_s=slo.optional_number("ttft_s"),
                tpot_s=slo.optional_number("tpot_s"),
                e2e_s=slo.optional_number("e2e_s"),
            ),
            gated=gated,
        )


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile that `read_profile` reads; not one with a trace, whose log stays where it is.

    Raises:
        ConfigError: If the file cannot be written.
    """
    try:
        path.write_text("\n".join(_lines(profile)) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"the profile {str(path)!r} cannot be written ({error.strerror})") from error


def read_log(path: Path) -> Trace:
    """A log of requests: JSON Lines with `timestamp`, `prompt_tokens` and `output_tokens`; other keys are left aside.

    timestamp: seconds since any moment, or ISO 8601 (without a zone: UTC). Sorted by time; the first request is at 0.

    Raises:
        ConfigError: Naming file and line.
    """
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, f"{path}:{number}"))
    except OSError as error:
        raise ConfigError(f"the log {str(path)!r} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the log {str(path)!r} is not UTF-8: {error}") from error
    if not rows:
        raise ConfigError(f"the log {str(path)!r} holds no request")
    rows.sort(key=lambda row: row[0])  # by time alone: of one moment, the log's own order
    begin = rows[0][0]
    moments, prompts, outputs = zip(*rows, strict=True)
    return Trace(at_s=tuple(moment - begin for moment in moments), prompt_tokens=prompts, output_tokens=outputs)


def _row(line: str, where: str) -> tuple[float, int, int]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a request must be a JSON object, not {data!r}")
    for key in ("timestamp", "prompt_tokens", "output_tokens"):
        if key not in data:
            raise ConfigError(_lacking(key, list(data), where))
    counts = [_Table(data=data, where=where).whole(key) for key in ("prompt_tokens", "output_tokens")]
    return _seconds(data["timestamp"], where), counts[0], counts[1]


def _seconds(value: Any, where: str) -> float:
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12:
            return float(value)
    except ValueError:
        pass
    raise ConfigError(
        f"{where}: 'timestamp' must be seconds or ISO 8601, such as '2026-01-31T12:00:00Z', not {value!r}"
    )


def _arrivals(table: _Table, folder: Path) -> Arrivals:
    kinds = ("open", "closed", "offline", "trace")
    kind = table.string("kind")
    with _placed(table.where):
        match kind:
            case "open":
                table.only("kind", "rate_per_s", "burstiness")
                return OpenLoop(rate_per_s=table.number("rate_per_s"), burstiness=table.number("burstiness", 1.0))
            case "closed":
                table.only("kind", "concurrency")
                return ClosedLoop(concurrency=table.whole("concurrency"))
            case "offline":
                table.only("kind")
                return Offline()
            case "trace":
                table.only("kind", "log")
                return read_log(folder / table.string("log"))
            case _:
                raise ConfigError(config.unknown("kind", kind, kinds, table.where))


def _lengths(parent: _Table, key: str, arrivals: Arrivals) -> Lengths | None:
    if isinstance(arrivals, Trace):
        if key in parent.data:
            raise ConfigError(f"{parent.where} has both a trace and {key!r}; a trace has lengths of its own")
        return None
    table = parent.table(key)
    kinds = ("fixed", "lognormal", "quantiles")
    kind = table.string("kind")
    with _placed(table.where):
        match kind:
            case "fixed":
                table.only("kind", "tokens")
                tokens = table.whole("tokens")
                return Lengths(shape=Fixed(tokens=tokens), least=tokens, most=tokens)
            case "lognormal":
                table.only("kind", "median", "sigma", "least", "most")
                shape = Lognormal(median=table.number("median"), sigma=table.number("sigma"))
                return Lengths(shape=shape, least=table.whole("least", 1), most=table.whole("most"))
            case "quantiles":
                table.only("kind", "quantiles", "least", "most")
                quantiles = table.numbers("quantiles")
                ends = (max(1, round(quantiles[0])), max(1, round(quantiles[-1]))) if quantiles else (1, 1)
                least, most = table.whole("least", ends[0]), table.whole("most", ends[1])
                return Lengths(shape=Empirical(quantiles=quantiles), least=least, most=most)
            case _:
                raise ConfigError(config.unknown("kind", kind, kinds, table.where))


def _lines(profile: Profile) -> Iterator[str]:
    yield f"description = {json.dumps(profile.description, ensure_ascii=False)}"
    yield f"requests = {profile.requests}"
    yield f"warmup = {profile.warmup}"
    yield f"gated = {json.dumps(profile.gated)}"
    yield from ("", "[arrivals]")
    match profile.arrivals:
        case OpenLoop(rate_per_s=rate, burstiness=burstiness):
            yield from ('kind = "open"', f"rate_per_s = {rate}", f"burstiness = {burstiness}")
        case ClosedLoop(concurrency=concurrency):
            yield from ('kind = "closed"', f"concurrency = {concurrency}")
        case Offline():
            yield 'kind = "offline"'
        case Trace():
            raise ValueError(f"profile {profile.name!r} has a trace; write its log's name by hand")
    for key, lengths in (("prompt_tokens", profile.prompt_tokens), ("output_tokens", profile.output_tokens)):
        assert lengths is not None
        yield from ("", f"[{key}]")
        match lengths.shape:
            case Fixed(tokens=tokens):
                yield from ('kind = "fixed"', f"tokens = {tokens}")
                continue
            case Lognormal(median=median, sigma=sigma):
                yield from ('kind = "lognormal"', f"median = {median}", f"sigma = {sigma}")
            case Empirical(quantiles=quantiles):
                yield from ('kind = "quantiles"', f"quantiles = {json.dumps(quantiles)}")
        yield from (f"least = {lengths.least}", f"most = {lengths.most}")
    slo = profile.slo
    limits = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "e2e_s": slo.e2e_s}
    if any(value is not None for value in limits.values()):
        yield from ("", "[slo]", *(f"{key} = {value}" for key, value in limits.items() if value is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A TOML table that is read key by key; every complaint says where it stands."""

    data: Mapping[str, Any]
    where: str

    def only(self, *valid: str) -> None:
        for key in self.data:
            if key not in valid:
                raise ConfigError(config.unknown("key", key, valid, self.where))

    def table(self, key: str, default: Mapping[str, Any] | None = None) -> _Table:
        return _Table(data=self._value(key, default, dict, "a table"), where=f"{self.where} [{key}]")

    def string(self, key: str, default: str | None = None) -> str:
        return str(self._value(key, default, str, "a string"))

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        return int(self._value(key, default, int, f"a whole number of at least {least}", lambda value: value >= least))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._value(key, default, (int, float), "a number"))

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self.data else None

    def numbers(self, key: str) -> tuple[float, ...]:
        return tuple(map(float, self._value(key, None, list, "a list of numbers", _all((int, float)))))

    def strings(self, key: str) -> tuple[str, ...]:
        return tuple(self._value(key, [], list, "a list of strings", _all((str,))))

    def _value(
        self,
        key: str,
        default: Any,
        kind: type | tuple[type, ...],
        wanted: str,
        also: Callable[[Any], bool] = lambda _: True,
    ) -> Any:
        if key not in self.data and default is None:
            raise ConfigError(_lacking(key, list(self.data), self.where))
        value = self.data.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not also(value):
            raise ConfigError(f"{self.where}: {key!r} must be {wanted}, not {value!r}")
        return value


def _all(kinds: tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda values: all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)


@contextlib.contextmanager
def _placed(where: str) -> Iterator[None]:
    """Complaints from here on say where they belong, where they do not yet."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: {error}") from error


def _lacking(key: str, found: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(key, found, n=1)
    hint = f"; did you mean it by {near[0]!r}?" if near else ""
    return f"{where} lacks the key {key!r}{hint}"
