"""The user's targets: reads `targets.toml` and its prompt sets into frozen values.

Knows what keys mean and what their values may be; starts nothing. An unknown key is an error that names the key, the
file and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tomllib

from parity import checks
from parity.engines import EngineSpec
from parity.errors import ConfigError
from parity.prompts import Prompt, Request, SamplingParams, Structured, Workload, prompt_from_json
from parity.verdict import Policy

_Item = TypeVar("_Item")

DTYPES = ("float32", "bfloat16", "float16", "auto")

_FILE_KEYS = ("default", "targets", "workloads", "golden")
_ENGINE_KEYS = ("engine", "model", "dtype", "quantization", "environment", "python", "launcher", "url", "threads",
                "options", "env")  # fmt: skip
_TARGET_KEYS = ("description", "policy", "model", "workload", "confirm", "lockstep_prompts", "lockstep_prompts_max",
                "reference", "candidate", "noise", "control", "logic", "sampling", "determinism", "structured",
                "contract", "laws", "accuracy", "performance", "golden", "limits")  # fmt: skip
_WORKLOAD_KEYS = ("prompts", "take", "draws", "max_tokens", "logprobs", "temperature", "top_p", "top_k", "min_p")
_WANTED = {
    int: "a whole number of at least 1",
    str: "a string",
    bool: "true or false",
    dict: "a table",
    list: "a list of strings",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockstep:
    """How many of the workload's prompts, evenly spread, are scored by the noise engine and by both sides.

    prompts: at first. most: doubled up to this while the verdict is inconclusive.
    """

    prompts: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """How many generated examples a candidate is asked, and the seed they are drawn by."""

    examples: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Which lm-eval tasks both engines answer.

    tasks: names, groups or tags of the YAML files below `folder`. limit: the first documents of each; None: all.
    """

    tasks: tuple[str, ...]
    folder: Path
    limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a side is served: a command with `{port}`, `{model}` and `{python}` in it, or the url of a running server.

    Both empty: by the engine's own server.
    """

    command: tuple[str, ...] = ()
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """Under which traffic both engines are measured.

    profiles: names of files in `folder`, without `.toml`. seed: of arrivals, lengths and prompts.
    """

    profiles: tuple[str, ...]
    folder: Path
    seed: int
    reference: Serving
    candidate: Serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is judged: a candidate engine, against a reference engine, on a workload, by limits.

    noise: the engine that measures rounding noise: it scores the reference's tokens in another precision.
    control: a second correct engine in the candidate's precision (another attention backend, say), which calibration
        judges as if it were the candidate; or None.
    logic: prompts that both engines answer once more in float32; None where the target does not ask for it.
    logic_layers: only so many of the model's first layers there, for models that float32 makes too large; None: all.
    sampling: prompts that both engines answer by sampling, each audited by its own log-probabilities; or None.
    determinism: prompts that each engine answers again, alone and from its prefix cache; or None.
    structured: prompts whose answers must follow a schema, an expression or a choice; or None.
    contract: whether each engine is probed for what it does with a request.
    laws: generated examples that the candidate must treat as any correct engine does; or None.
    accuracy: tasks whose documents both engines answer, scored and judged in pairs; or None.
    performance: traffic under which both engines' servers are measured, see `parity.bench`; or None.
    confirm: fresh prompts on which a check that was flagged is judged once more; None where there are none.
    golden: whether the candidate is also held against what was accepted, see `parity.golden`.
    """

    name: str
    description: str
    policy: Policy
    reference: EngineSpec
    candidate: EngineSpec
    noise: EngineSpec | None
    control: EngineSpec | None
    workload: Workload
    lockstep: Lockstep
    logic: Workload | None
    logic_layers: int | None
    sampling: Workload | None
    determinism: Workload | None
    structured: Workload | None
    contract: bool
    laws: Laws | None
    accuracy: Accuracy | None
    performance: Performance | None
    confirm: Workload | None
    golden: bool
    limits: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenPlaces:
    """Where goldens are kept: a folder under version control, and a directory or URL for their bulk, or None."""

    directory: Path
    store: str | None


def read_target(path: Path, name: str | None) -> Target:
    """Read one target; `name` None takes the file's `default`.

    Raises:
        ConfigError: If the file, the target, a key or a value is wrong.
    """
    data = _read_toml(path)
    _known(data, _FILE_KEYS, f"{path}")
    tables = _typed(data, "targets", dict, f"{path}", default={})
    if name is None and "default" not in data:
        raise ConfigError(f"{path} names no 'default' target; add one, or say which: {_listed(tables)}")
    chosen = _typed(data, "default", str, f"{path}", default="") if name is None else name
    if chosen not in tables:
        raise ConfigError(unknown("target", chosen, list(tables), str(path)))
    return _target(chosen, tables[chosen], _typed(data, "workloads", dict, f"{path}", default={}), path)


def read_engine(path: Path, model: str) -> EngineSpec:
    """One engine from a TOML file of its own, with the keys of `[targets.NAME.candidate]`.

    model: what it runs where the file names no model.

    Raises:
        ConfigError: If the file, a key or a value is wrong.
    """
    return _engine(_read_toml(path), model, str(path), path)


def target_names(path: Path) -> tuple[str, ...]:
    """Every target of the file, in its order."""
    return tuple(_typed(_read_toml(path), "targets", dict, f"{path}", default={}))


def golden_places(path: Path) -> GoldenPlaces:
    """Where the goldens of this file's targets are: by default in a folder `golden` beside the one that holds the file.

    Raises:
        ConfigError: If the file, a key or a value is wrong.
    """
    where = f"{path} [golden]"
    table = _typed(_read_toml(path), "golden", dict, f"{path}", default={})
    _known(table, ("directory", "store"), where)
    store = _typed(table, "store", str, where, default=None)
    if store is not None and "://" not in store:
        store = str((path.parent / store).resolve())
    directory = path.parent / _typed(table, "directory", str, where, default="../golden")
    return GoldenPlaces(directory=Path(os.path.normpath(directory)), store=store)


def limited_to(target: Target, prompts: int) -> Target:
    """The same target on some of its prompts, evenly spread, for a quick look; verdicts know that data is short.

    Raises:
        ConfigError: If that leaves no prompt.
    """
    if prompts < 1:
        raise ConfigError(f"the limit must be a whole number of at least 1, not {prompts}")

    def some(workload: Workload) -> Workload:
        return Workload(name=workload.name, requests=spread(workload.requests, prompts))

    return replace(target, workload=some(target.workload), logic=None if target.logic is None else some(target.logic))


def spread(items: Sequence[_Item], count: int) -> tuple[_Item, ...]:
    """`count` items evenly spread over the whole, in order: every prompt set keeps its share."""
    if count >= len(items):
        return tuple(items)
    return tuple(items[(index * len(items)) // count] for index in range(count))


def _target(name: str, table: Mapping[str, Any], workloads: Mapping[str, Any], path: Path) -> Target:
    where = f"{path} [targets.{name}]"
    _known(table, _TARGET_KEYS, where)
    for key in ("model", "workload", "reference", "candidate"):
        if key not in table:
            raise ConfigError(f"{where} lacks the key {key!r}")
    asked = _named_workload(table, where, workloads, path)
    try:
        policy = Policy(table.get("policy", "equivalence"))
    except ValueError:
        valid = [p.value for p in Policy]
        raise ConfigError(unknown("policy", str(table["policy"]), valid, where)) from None
    model = _typed(table, "model", str, where, default="")
    prompts = _typed(table, "lockstep_prompts", int, where, default=48)
    limits = _typed(table, "limits", dict, where, default={})
    _known(limits, checks.names(), f"{where} limits")
    for check in limits:
        _typed(limits, check, dict, f"{where} limits", default={})
    return Target(
        name=name,
        description=_typed(table, "description", str, where, default=""),
        policy=policy,
        reference=_engine(table["reference"], model, f"{where} reference", path),
        candidate=_engine(table["candidate"], model, f"{where} candidate", path),
        noise=None if "noise" not in table else _engine(table["noise"], model, f"{where} noise", path),
        control=None if "control" not in table else _engine(table["control"], model, f"{where} control", path),
        workload=asked,
        lockstep=Lockstep(prompts=prompts, most=_typed(table, "lockstep_prompts_max", int, where, default=4 * prompts)),
        logic=_extra(table, "logic", where, workloads, path, also=("layers",)),
        logic_layers=_typed(table.get("logic", {}), "layers", int, f"{where} logic", default=None),
        sampling=_extra(table, "sampling", where, workloads, path),
        determinism=_extra(table, "determinism", where, workloads, path),
        structured=_extra(table, "structured", where, workloads, path),
        contract=_typed(table, "contract", bool, where, default=False),
        laws=_laws(table, where),
        accuracy=_accuracy(table, where, path),
        performance=_performance(table, where, path),
        confirm=_extra(table, "confirm", where, workloads, path),
        golden=_typed(table, "golden", bool, where, default=False),
        limits=limits,
    )


def _extra(
    table: Mapping[str, Any],
    key: str,
    where: str,
    workloads: Mapping[str, Any],
    path: Path,
    *,
    also: tuple[str, ...] = (),
) -> Workload | None:
    """A further workload of a target, as `{ workload = NAME }`; None where the key is absent."""
    if key not in table:
        return None
    _known(table[key], ("workload", *also), f"{where} {key}")
    return _named_workload(table[key], f"{where} {key}", workloads, path)


def _laws(table: Mapping[str, Any], where: str) -> Laws | None:
    if "laws" not in table:
        return None
    where = f"{where} laws"
    _known(table["laws"], ("examples", "seed"), where)
    return Laws(
        examples=_typed(table["laws"], "examples", int, where, default=48),
        seed=_typed(table["laws"], "seed", int, where, default=7),
    )


def _accuracy(table: Mapping[str, Any], where: str, path: Path) -> Accuracy | None:
    if "accuracy" not in table:
        return None
    where = f"{where} accuracy"
    _known(table["accuracy"], ("tasks", "limit"), where)
    tasks = tuple(_typed(table["accuracy"], "tasks", list, where, default=[]))
    if not tasks:
        raise ConfigError(f"{where} names no tasks; list at least one under 'tasks', such as 'parity_local'")
    limit = _typed(table["accuracy"], "limit", int, where, default=None)
    return Accuracy(tasks=tasks, folder=path.parent / "tasks", limit=limit)


def _performance(table: Mapping[str, Any], where: str, path: Path) -> Performance | None:
    if "performance" not in table:
        return None
    where, found = f"{where} performance", table["performance"]
    _known(found, ("profiles", "seed", "reference", "candidate"), where)
    profiles = tuple(_typed(found, "profiles", list, where, default=[]))
    if not profiles:
        raise ConfigError(f"{where} names no profiles; list at least one file of suites/traffic, without its '.toml'")
    return Performance(
        profiles=profiles,
        folder=path.parent / "traffic",
        seed=_typed(found, "seed", int, where, default=7),
        reference=_serving(found, "reference", where),
        candidate=_serving(found, "candidate", where),
    )


def _serving(table: Mapping[str, Any], side: str, where: str) -> Serving:
    found, where = _typed(table, side, dict, where, default={}), f"{where} {side}"
    _known(found, ("command", "url"), where)
    if len(found) > 1:
        raise ConfigError(f"{where} has both 'command' and 'url'; a server is either started or running")
    return Serving(
        command=tuple(_typed(found, "command", list, where, default=[])),
        url=_typed(found, "url", str, where, default=None),
    )


def _named_workload(table: Mapping[str, Any], where: str, workloads: Mapping[str, Any], path: Path) -> Workload:
    name = _typed(table, "workload", str, where, default="")
    if name not in workloads:
        raise ConfigError(unknown("workload", name, list(workloads), where))
    return _workload(name, workloads[name], path)


def _engine(table: Mapping[str, Any], model: str, where: str, path: Path) -> EngineSpec:
    _known(table, _ENGINE_KEYS, where)
    if "engine" not in table or "dtype" not in table:
        raise ConfigError(f"{where} needs the keys 'engine' and 'dtype'")
    dtype = _typed(table, "dtype", str, where, default="")
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES, where))
    places = [key for key in ("environment", "python", "url") if key in table]
    if len(places) > 1:
        raise ConfigError(f"{where} has both {places[0]!r} and {places[1]!r}; an engine lives in one place")
    engine = _typed(table, "engine", str, where, default="")
    if engine.endswith(".py"):
        engine = str((path.parent / engine).resolve())
    return EngineSpec(
        engine=engine,
        model=_model(_typed(table, "model", str, where, default=model), path),
        dtype=dtype,
        quantization=_typed(table, "quantization", str, where, default=None),
        environment=_typed(table, "environment", str, where, default=None),
        python=_python(_typed(table, "python", str, where, default=None), path),
        launcher=tuple(_typed(table, "launcher", list, where, default=[])),
        url=_typed(table, "url", str, where, default=None),
        threads=_typed(table, "threads", int, where, default=1),
        options=dict(_typed(table, "options", dict, where, default={})),
        env={str(k): str(v) for k, v in _typed(table, "env", dict, where, default={}).items()},
    )


def _python(interpreter: str | None, path: Path) -> str | None:
    """A bare name is looked up on the PATH; a relative path is meant from the file that names it.

    Not resolved: an interpreter in a virtual environment is a link, and following it would leave the environment.
    """
    return interpreter if interpreter is None or "/" not in interpreter else str((path.parent / interpreter).absolute())


def _model(reference: str, path: Path) -> str:
    """Relative directories are meant from the file that names them."""
    if reference.startswith(("package:", "hub:")):
        return reference
    return str((path.parent / reference).resolve())


def _workload(name: str, table: Mapping[str, Any], path: Path) -> Workload:
    where = f"{path} [workloads.{name}]"
    _known(table, _WORKLOAD_KEYS, where)
    greedy = SamplingParams.greedy(
        max_tokens=_typed(table, "max_tokens", int, where, default=64),
        logprobs=_typed(table, "logprobs", int, where, default=20),
    )
    sampling = replace(
        greedy,
        temperature=_number(table, "temperature", where, default=0.0, most=10.0),
        top_p=_number(table, "top_p", where, default=1.0, most=1.0),
        top_k=_typed(table, "top_k", int, where, default=0),
        min_p=_number(table, "min_p", where, default=0.0, most=1.0),
    )
    files = _typed(table, "prompts", list, where, default=[])
    prompts = [question for file in files for question in _read_questions(path.parent / file)]
    if not prompts:
        raise ConfigError(f"{where} has no prompts; list at least one prompt file under 'prompts'")
    prompts = list(spread(prompts, _typed(table, "take", int, where, default=len(prompts))))
    draws = _typed(table, "draws", int, where, default=1)
    if draws > 1:  # a request each, by another seed
        prompts = [(replace(p, id=f"{p.id}~{n}"), wanted) for p, wanted in prompts for n in range(1, draws + 1)]
    try:
        return Workload(
            name=name,
            # One seed for all would make the draws of all prompts depend on each other.
            requests=tuple(
                Request(
                    prompt=prompt,
                    sampling=replace(
                        sampling, seed=sampling.seed if sampling.is_greedy else number, structured=structured
                    ),
                )
                for number, (prompt, structured) in enumerate(prompts)
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a prompt set: JSON Lines, one prompt a line; what an answer must match is left aside.

    Raises:
        ConfigError: Naming file and line.
    """
    return tuple(prompt for prompt, _ in _read_questions(path))


def _read_questions(path: Path) -> tuple[tuple[Prompt, Structured | None], ...]:
    """The prompts of a set, each with what its answer must match."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"the prompt set {str(path)!r} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt set {str(path)!r} is not UTF-8: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            wanted = data.pop("structured", None) if isinstance(data, dict) else None
            questions.append((prompt_from_json(data), None if wanted is None else _structured(wanted)))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
    return tuple(questions)


def _structured(wanted: Any) -> Structured:
    from parity.checks.structured import structured_from_json  # noqa: PLC0415  validates, which takes a library

    return structured_from_json(wanted)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the file {str(path)!r} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {str(path)!r} is not valid TOML: {error}") from error


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str, *, default: Any) -> Any:
    if key not in table:
        return default
    value = table[key]
    right = isinstance(value, kind)
    if kind is int:
        right = right and not isinstance(value, bool) and value >= 1
    elif kind is list:
        right = right and all(isinstance(item, str) for item in value)
    if not right:
        raise ConfigError(f"{where}: {key!r} must be {_WANTED[kind]}, not {value!r}")
    return value


def _number(table: Mapping[str, Any], key: str, where: str, *, default: float, most: float) -> float:
    value = table.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value <= most:
        raise ConfigError(f"{where}: {key!r} must be a number from 0 to {most:g}, not {value!r}")
    return float(value)


def _known(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table, not {table!r}")
    for key in table:
        if key not in valid:
            raise ConfigError(unknown("key", key, valid, where))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def unknown(what: str, found: str, valid: Sequence[str], where: str) -> str:
    """The sentence about a word that is none of the valid ones: it names the nearest, else all."""
    near = difflib.get_close_matches(found, valid, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid are {_listed(valid)}"
    return f"{where}: unknown {what} {found!r}; {hint}"
