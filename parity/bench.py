"""Both engines under the same traffic, start by start: measured in turn (ABBA) until the verdict is certain.

    .parity/performance/TARGET/PROFILE/history.json       what this host measured of an engine with itself
    .parity/performance/TARGET/PROFILE/NNNN/session.json  one comparison: what is compared, and by what it is judged
    .parity/performance/TARGET/PROFILE/NNNN/*.jsonl       every start: `pair-01-reference`, `fresh-01-candidate`, ...
    golden/TARGET/performance-PROFILE.json                days of the accepted engine

A start is written as soon as it is measured. An interrupted comparison goes on with the next pair; half a pair is
measured again, since its other half would be of another hour. Nothing measured is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity import (
    fingerprint,
    performance_history,
    regression,
    servers,
    service_load,
    service_metrics,
    serving,
    store,
    timings,
    traffic,
    traffic_files,
)
from parity.checks import performance as check
from parity.checks.performance import Limits, Measured, Metrics, Pair
from parity.config import Performance, Serving, Target
from parity.engines import EngineSpec
from parity.errors import ConfigError, EngineError, RecordingError
from parity.fingerprint import Scalar
from parity.lmeval.tokenizer import HostTokenizer
from parity.performance_history import History
from parity.prompts import sha256_of_json
from parity.record import Recorder, devices_locked, now
from parity.regression import Control, Decision, Step
from parity.service_metrics import DEFINITIONS
from parity.timings import LoadRun
from parity.traffic import Plan, Profile
from parity.verdict import Verdict

REFERENCE, CANDIDATE = "reference", "candidate"
SESSION, VERDICT, HISTORY = "session.json", "verdict.json", "history.json"
COMPARISON = "comparison"
"""What a session of both engines says that it is, beside those of one engine alone."""
_HARDWARE = ("host.cpu", "host.cores", "gpu.0.name", "gpu.0.driver_version", "gpu.count")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One engine as it is served. label: for people. command: what starts its server; None where `url` names one."""

    label: str
    spec: EngineSpec
    command: servers.ServerCommand | None
    url: str | None
    facts: Mapping[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One target under one profile on this machine.

    directory: `.parity/performance/TARGET/PROFILE`.
    """

    target: str
    profile: Profile
    plan: Plan
    reference: Side
    candidate: Side
    limits: Limits
    directory: Path
    recorder: Recorder

    @classmethod
    def of(
        cls, target: Target, asked: Performance, profile: str, limits: Limits, recorder: Recorder, home: Path
    ) -> Bench:
        """Provide environments and models, and draw the plan of requests.

        Raises:
            ConfigError: If there is no such profile, or a side cannot be served.
            ProvisionError: If an environment or a model cannot be provided.
        """
        known = traffic_files.profiles(asked.folder)
        if profile not in known:
            raise ConfigError(
                f"there is no traffic profile {profile!r}; {str(asked.folder)!r} has {', '.join(known) or 'none'}"
            )
        found = traffic_files.read_profile(known[profile])
        model = Path(recorder.model_of(target.reference))
        tokenizer = HostTokenizer(model)
        positions = [
            tokenizer.max_positions,
            *(s.options.get("max_model_len") for s in (target.reference, target.candidate)),
        ]
        plan = traffic.plan(
            found,
            seed=asked.seed,
            vocabulary=_plain_tokens(model),
            max_positions=min(int(p) for p in positions if isinstance(p, int)),
        )
        return cls(
            target=target.name,
            profile=found,
            plan=plan,
            reference=_side(REFERENCE, target.reference, target.candidate, asked.reference, recorder),
            candidate=_side(CANDIDATE, target.candidate, target.reference, asked.candidate, recorder),
            limits=limits,
            directory=home / "performance" / target.name / profile,
            recorder=recorder,
        )

    @property
    def history(self) -> History:
        """What this host has measured of an engine with itself; empty where it has not, or was another machine."""
        blank = History(
            target=self.target, profile=self.profile.name, plan_sha256=self.plan.sha256(), hardware=_hardware()
        )
        found = read_history(self.directory / HISTORY)
        return found if found is not None and found.is_alike(blank) else blank

    def compare(self, golden: History | None) -> tuple[Measured, Verdict]:
        """Measure pairs until every gated metric is decided, or no more may be asked.

        golden: accepted days; those of this host, under this plan, say how much starts vary.

        Raises:
            ConfigError: If the profile gates a metric that cannot be judged.
            EngineError: If a server cannot run, or no request of a start was answered.
        """
        own = self.history
        histories = [own, *([golden] if golden is not None and golden.is_alike(own) else [])]
        spreads = performance_history.spreads(histories, self.profile.gated)
        session = _Session.open(self, {REFERENCE: self.reference, CANDIDATE: self.candidate}, COMPARISON)

        def wanted(measured: Measured) -> Step:
            return check.next_step(measured, self.limits)[0]

        measured = self._measure(session, spreads, wanted)
        verdict = check.judge(
            measured,
            limits=self.limits,
            label_reference=self.reference.label,
            label_candidate=self.candidate.label,
        )
        session.close(verdict)
        return measured, verdict

    def with_itself(self, side: Side, pairs: int) -> tuple[Measured, dict[str, Control]]:
        """A/A: so many pairs of one engine with itself. What they say of this host is kept for later comparisons.

        Raises:
            EngineError: If the server cannot run, or no request of a start was answered.
        """
        session = _Session.open(self, {REFERENCE: side, CANDIDATE: side}, f"{pairs} pairs of itself")

        def wanted(measured: Measured) -> Step:
            return Step.PAIRS if len(measured.pairs) < pairs else Step.NOTHING

        measured = self._measure(session, {}, wanted)
        controls = {}
        for name in measured.gated:
            metric = DEFINITIONS[name]
            values = check.losses_of(measured.pairs, metric)
            rule = self.limits.rule(metric, len(measured.gated))
            controls[name] = regression.control(values, rule, f"{side.label} with itself, {now()[:10]}")
        if not measured.disturbances:
            history = self.history.with_self_run(performance_history.self_run(now(), side.label, measured.pairs))
            self.directory.mkdir(parents=True, exist_ok=True)
            store.write_whole(self.directory / HISTORY, performance_history.render(history))
        session.close(None)
        return measured, controls

    def starts(self, count: int) -> list[Metrics]:
        """The candidate alone, so many times."""
        session = _Session.open(self, {CANDIDATE: self.candidate}, f"{count} starts")
        found: list[Metrics] = []
        for number in range(1, count + 1):
            path = session.path("start", number, CANDIDATE)
            run = session.read(path) or session.keep(path, self._start(self.candidate, path))
            found.append(service_metrics.measure(run, self.profile.slo))
            self._told(f"{number} of {count} starts", run, found[-1])
        session.close(None)
        return found

    def against(self, golden: History, starts: Sequence[Metrics]) -> dict[str, Decision]:
        """Today's starts against the golden's days, by gated metric.

        Raises:
            ConfigError: If today has fewer starts than the golden's days.
            IncomparableError: If the golden is of another machine or of other requests.
        """
        golden.require_alike(self.history, f"the golden of {self.target!r} under {self.profile.name!r}")
        wanted = max((len(day.starts) for day in golden.days), default=0)
        if len(starts) < max(1, wanted):
            raise ConfigError(
                f"a day of the golden of {self.target!r} has up to {wanted} starts and today has {len(starts)}, whose "
                f"mean varies more; measure {max(1, wanted)} with --starts"
                if wanted
                else f"the golden of {self.target!r} under {self.profile.name!r} holds no day; accept one"
            )
        return {
            name: regression.against_history(
                golden.days_of(name),
                [start[name] for start in starts],
                self.limits.rule(DEFINITIONS[name], len(self.profile.gated)),
            )
            for name in self.profile.gated
        }

    def _measure(
        self,
        session: _Session,
        spreads: Mapping[str, Any],
        wanted: Callable[[Measured], Step],
    ) -> Measured:
        pairs: dict[str, list[Pair]] = {"pair": [], "fresh": []}
        runs: list[LoadRun] = []
        step = Step.PAIRS
        while step is not Step.NOTHING:
            kind = "pair" if step is Step.PAIRS else "fresh"
            number = len(pairs[kind]) + 1
            both = self._pair(session, kind, number)
            runs += both.values()
            pair = Pair.of(both[REFERENCE], both[CANDIDATE], self.profile.slo)
            pairs[kind].append(pair)
            for side, metrics in ((REFERENCE, pair.reference), (CANDIDATE, pair.candidate)):
                self._told(f"{'pair' if kind == 'pair' else 'fresh pair'} {number}, {side}", both[side], metrics)
            measured = Measured(
                profile=self.profile.name,
                pairs=pairs["pair"],
                fresh=pairs["fresh"],
                gated=self.profile.gated,
                spreads=spreads,
                disturbances=regression.disturbances(runs),
                warnings=tuple(dict.fromkeys(warning for run in runs for warning in run.warnings)),
            )
            # A look after each: what is decided needs no more.
            if len(pairs["pair"]) >= self.limits.least:
                step = wanted(measured)
        return measured

    def _pair(self, session: _Session, kind: str, number: int) -> dict[str, LoadRun]:
        """Two neighbouring starts, in turn the one and the other first."""
        paths = {side: session.path(kind, number, side) for side in (REFERENCE, CANDIDATE)}
        found = {side: session.read(path) for side, path in paths.items()}
        complete = {side: run for side, run in found.items() if run is not None}
        if len(complete) < len(paths):
            order = list(paths) if number % 2 else list(paths)[::-1]
            complete = {}
            for side in order:
                complete[side] = session.keep(paths[side], self._start(session.sides[side], paths[side]))
        return complete

    def _start(self, side: Side, path: Path) -> LoadRun:
        """One start of a side's server under the plan."""
        observer = self.recorder.observer
        log = path.parent / "logs" / f"{path.stem}.log"
        with devices_locked(side.spec, observer):
            if side.url is not None:
                server = servers.running(side.url)
                run = service_load.drive(
                    self.plan, url=server.url, model=server.model, observer=observer, sample=server.sample
                )
            else:
                assert side.command is not None
                observer.progress(f"{side.label}: starting", 0, 1, "")
                with servers.started(side.command, log=log) as server:
                    observer.progress(f"{side.label}: starting", 1, 1, "")
                    run = service_load.drive(
                        self.plan, url=server.url, model=server.model, observer=observer, sample=server.sample
                    )
        facts = {**fingerprint.machine(), **side.facts, **server.facts, **run.facts}
        run = replace(run, start_up_s=server.start_up_s, facts=facts)
        service_metrics.measure(run, self.profile.slo)  # where nothing was answered, nothing is measured
        return run

    def _told(self, which: str, run: LoadRun, metrics: Metrics) -> None:
        said = ", ".join(f"{name} {metrics[name]:.4g}" for name in self.profile.gated if name in metrics)
        self.recorder.observer.note(f"{self.profile.name}: {which}: {said}")
        for warning in run.warnings:
            self.recorder.observer.note(f"{self.profile.name}: {which}: {warning}")


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One comparison on disk."""

    directory: Path
    sides: Mapping[str, Side]

    @classmethod
    def open(cls, bench: Bench, sides: Mapping[str, Side], what: str) -> _Session:
        """The unfinished one that asks the same of the same, or a new one."""
        asked = {
            "what": what,
            "target": bench.target,
            "profile": bench.profile.name,
            "plan": bench.plan.sha256(),
            "hardware": _hardware(),
            "limits": {name: getattr(bench.limits, name) for name in Limits.__slots__},
            "sides": {
                name: {"spec": side.spec.to_json(), "facts": dict(side.facts), "url": side.url}
                for name, side in sides.items()
            },
        }
        key = sha256_of_json(asked)
        earlier = sorted(path for path in bench.directory.glob("[0-9][0-9][0-9][0-9]") if path.is_dir())
        if earlier and _key_of(earlier[-1]) == key and not (earlier[-1] / VERDICT).is_file():
            bench.recorder.observer.note(f"going on with the unfinished comparison in {earlier[-1]}")
            return cls(directory=earlier[-1], sides=sides)
        number = int(earlier[-1].name) + 1 if earlier else 1
        directory = bench.directory / f"{number:04}"
        with store.disk_errors_named(directory):
            directory.mkdir(parents=True)
            store.write_whole(
                directory / SESSION, json.dumps({"key": key, "began_at": now(), **asked}, indent=1) + "\n"
            )
        return cls(directory=directory, sides=sides)

    def path(self, kind: str, number: int, side: str) -> Path:
        """Where a start is kept."""
        return self.directory / f"{kind}-{number:02}-{side}.jsonl"

    def read(self, path: Path) -> LoadRun | None:
        """An earlier start; None where there is none, or it is damaged and must be measured again."""
        try:
            return read_start(path)
        except RecordingError:
            return None

    def keep(self, path: Path, run: LoadRun) -> LoadRun:
        """Write a start, complete or not at all."""
        with store.disk_errors_named(path.parent):
            store.write_whole(path, "".join(timings.to_json_lines(run)))
        return run

    def close(self, verdict: Verdict | None) -> None:
        """What was asked is measured; the next comparison is a new one."""
        said = {} if verdict is None else {"outcome": verdict.outcome.value, "headline": verdict.headline}
        with store.disk_errors_named(self.directory):
            store.write_whole(self.directory / VERDICT, json.dumps({"ended_at": now(), **said}, indent=1) + "\n")


def golden_file(root: Path, target: str, profile: str) -> Path:
    """Where the days of an accepted engine are."""
    return root / target / f"performance-{profile}.json"


def read_start(path: Path) -> LoadRun:
    """One start of an engine.

    Raises:
        RecordingError: If it is missing, was cut short, or is of a newer schema.
    """
    try:
        return timings.from_json_lines(path.read_text("utf-8"))
    except OSError as error:
        raise RecordingError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, RecordingError) as error:
        raise RecordingError(f"{str(path)!r}: {error}") from error


def read_history(path: Path) -> History | None:
    """What was measured or accepted; None where nothing was.

    Raises:
        RecordingError: If the file is damaged or of a newer schema.
    """
    if not path.is_file():
        return None
    return performance_history.parse(path.read_text("utf-8"), where=repr(str(path)))


def accept(path: Path, history: History) -> None:
    """Write the days of the accepted engine.

    Raises:
        RecordingError: If it cannot be written.
    """
    with store.disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_whole(path, performance_history.render(history))


def _key_of(directory: Path) -> str:
    try:
        return str(json.loads((directory / SESSION).read_text("utf-8"))["key"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _side(name: str, spec: EngineSpec, other: EngineSpec, asked: Serving, recorder: Recorder) -> Side:
    own = [f"{key}={value}" for key, value in spec.options.items() if other.options.get(key) != value]
    own += [f"threads={spec.threads}"] if spec.threads != other.threads else []
    label = " ".join([spec.environment or spec.engine_label, spec.dtype, *own])
    if asked.url is not None:
        return Side(label=f"{label} at {asked.url}", spec=spec, command=None, url=asked.url, facts={})
    python, environment = recorder.interpreter(spec)
    model = recorder.model_of(spec)
    command = serving.command_of(spec, asked, name=f"the {name}'s server", python=python, model=model)
    facts: dict[str, Scalar] = {"engine": label, "environment.digest": environment, "model": spec.model}
    return Side(label=label, spec=spec, command=command, url=None, facts=facts)


def _plain_tokens(model: Path) -> list[int]:
    """Token ids of the model's vocabulary that are no special tokens, in their order."""
    try:
        data = json.loads((model / "tokenizer.json").read_text("utf-8"))
        special = {int(token["id"]) for token in data.get("added_tokens", [])}
        vocabulary = data["model"]["vocab"]
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else map(int, vocabulary.values())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(f"no vocabulary can be read from {str(model / 'tokenizer.json')!r} ({error})") from error
    return sorted(set(ids) - special)


def _hardware() -> dict[str, Scalar]:
    machine = fingerprint.machine()
    return {name: machine[name] for name in _HARDWARE if name in machine}
