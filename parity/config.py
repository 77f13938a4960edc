"""The user's targets: reads `targets.toml` and its prompt sets into frozen values.

Knows what keys mean and what their values may be; starts nothing. An unknown key is an error that names the key, the
file and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomllib

from parity import checks
from parity.engines import EngineSpec
from parity.errors import ConfigError
from parity.prompts import Prompt, Request, SamplingParams, Workload, prompt_from_json
from parity.verdict import Policy

DTYPES = ("float32", "bfloat16", "float16", "auto")

_ENGINE_KEYS = ("engine", "model", "dtype", "quantization", "environment", "python", "launcher", "url", "threads",
                "options", "env")  # fmt: skip
_TARGET_KEYS = ("description", "policy", "model", "workload", "lockstep_prompts", "lockstep_prompts_max", "reference",
                "candidate", "noise", "logic", "sampling", "limits")  # fmt: skip
_WORKLOAD_KEYS = ("prompts", "max_tokens", "logprobs", "temperature", "top_p", "top_k", "min_p")
_WANTED = {
    int: "a whole number of at least 1",
    str: "a string",
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
class Target:
    """What is judged: a candidate engine, against a reference engine, on a workload, by limits.

    noise: the engine that measures rounding noise: it scores the reference's tokens in another precision.
    logic: prompts that both engines answer once more in float32; None where the target does not ask for it.
    sampling: prompts that both engines answer by sampling, each audited by its own log-probabilities; or None.
    """

    name: str
    description: str
    policy: Policy
    reference: EngineSpec
    candidate: EngineSpec
    noise: EngineSpec | None
    workload: Workload
    lockstep: Lockstep
    logic: Workload | None
    sampling: Workload | None
    limits: Mapping[str, Mapping[str, Any]]


def read_target(path: Path, name: str | None) -> Target:
    """Read one target; `name` None takes the file's `default`.

    Raises:
        ConfigError: If the file, the target, a key or a value is wrong.
    """
    data = _read_toml(path)
    _known(data, ("default", "targets", "workloads"), f"{path}")
    tables = _typed(data, "targets", dict, f"{path}", default={})
    if name is None and "default" not in data:
        raise ConfigError(f"{path} names no 'default' target; add one, or say which: {_listed(tables)}")
    chosen = _typed(data, "default", str, f"{path}", default="") if name is None else name
    if chosen not in tables:
        raise ConfigError(_unknown("target", chosen, list(tables), str(path)))
    return _target(chosen, tables[chosen], _typed(data, "workloads", dict, f"{path}", default={}), path)


def target_names(path: Path) -> tuple[str, ...]:
    """Every target of the file, in its order."""
    return tuple(_typed(_read_toml(path), "targets", dict, f"{path}", default={}))


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


def spread(items: Sequence[Request], count: int) -> tuple[Request, ...]:
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
        raise ConfigError(_unknown("policy", str(table["policy"]), valid, where)) from None
    model = _typed(table, "model", str, where, default="")
    noise = table.get("noise")
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
        noise=None if noise is None else _engine(noise, model, f"{where} noise", path),
        workload=asked,
        lockstep=Lockstep(prompts=prompts, most=_typed(table, "lockstep_prompts_max", int, where, default=4 * prompts)),
        logic=_extra(table, "logic", where, workloads, path),
        sampling=_extra(table, "sampling", where, workloads, path),
        limits=limits,
    )


def _extra(table: Mapping[str, Any], key: str, where: str, workloads: Mapping[str, Any], path: Path) -> Workload | None:
    """A further workload of a target, as `{ workload = NAME }`; None where the key is absent."""
    if key not in table:
        return None
    _known(table[key], ("workload",), f"{where} {key}")
    return _named_workload(table[key], f"{where} {key}", workloads, path)


def _named_workload(table: Mapping[str, Any], where: str, workloads: Mapping[str, Any], path: Path) -> Workload:
    name = _typed(table, "workload", str, where, default="")
    if name not in workloads:
        raise ConfigError(_unknown("workload", name, list(workloads), where))
    return _workload(name, workloads[name], path)


def _engine(table: Mapping[str, Any], model: str, where: str, path: Path) -> EngineSpec:
    _known(table, _ENGINE_KEYS, where)
    if "engine" not in table or "dtype" not in table:
        raise ConfigError(f"{where} needs the keys 'engine' and 'dtype'")
    dtype = _typed(table, "dtype", str, where, default="")
    if dtype not in DTYPES:
        raise ConfigError(_unknown("dtype", dtype, DTYPES, where))
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
    prompts = [p for f in _typed(table, "prompts", list, where, default=[]) for p in read_prompts(path.parent / f)]
    if not prompts:
        raise ConfigError(f"{where} has no prompts; list at least one prompt file under 'prompts'")
    try:
        return Workload(
            name=name,
            # One seed for all would make the draws of all prompts depend on each other.
            requests=tuple(
                Request(prompt=p, sampling=sampling if sampling.is_greedy else replace(sampling, seed=number))
                for number, p in enumerate(prompts)
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a prompt set: JSON Lines, one prompt a line.

    Raises:
        ConfigError: Naming file and line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"the prompt set {str(path)!r} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt set {str(path)!r} is not UTF-8: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(prompt_from_json(json.loads(line)))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
    return tuple(prompts)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the targets file {str(path)!r} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the targets file {str(path)!r} is not valid TOML: {error}") from error


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
            raise ConfigError(_unknown("key", key, valid, where))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _unknown(what: str, found: str, valid: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(found, valid, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid are {_listed(valid)}"
    return f"{where}: unknown {what} {found!r}; {hint}"
