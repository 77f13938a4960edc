"""An accepted build of a TensorRT-LLM engine, and what it means to differ from it.

Every fact of config.json and of the sidecar is compared; `_RULES` say how much a difference weighs. Why, and from
which source: docs/engine-builds.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from parity.engine_manifest import CONFIG, MACHINE_FACTS, Manifest, read_json, read_manifest
from parity.errors import ConfigError
from parity.fingerprint import differences

SCHEMA = 1
MAPPING = "pretrained_config.mapping"
PLUGINS = "build_config.plugin_config"
SIZES = ("world_size", "tp_size", "pp_size", "cp_size")

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN_CHARACTERS = 80
_NOT_KNOWN = (None, "null")


class Severity(Enum):
    """How much a complaint weighs.

    ERROR: will not load, or will not do what is wanted. UNKNOWN: it was asked for, and nobody can tell. WARNING: may
    change numbers or speed. NOTE: worth knowing.
    """

    ERROR = "ERROR"
    UNKNOWN = "UNKNOWN"
    WARNING = "WARNING"
    NOTE = "NOTE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """One thing that is not as it should be. The sentence is complete without the other fields.

    field: a file, or a fact by its dotted name ("machine.sm", "build_config.max_seq_len").
    """

    kind: Severity
    field: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An accepted build: every fact of its config.json and sidecar by dotted name, each value as JSON text.

    Hashes of files are no part of it: building once more gives other bytes.
    """

    facts: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it may lie beside a golden."""
        return {"schema": SCHEMA, "facts": dict(sorted(self.facts.items()))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Accepted:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: If it is of a newer schema, or something else.
        """
        schema, facts = data.get("schema"), data.get("facts")
        if type(schema) is int and schema > SCHEMA:
            raise ConfigError(f"the accepted build has schema {schema}, this parity reads up to {SCHEMA}; upgrade it")
        if type(schema) is not int or not isinstance(facts, dict) or not all(type(v) is str for v in facts.values()):
            raise ConfigError("the accepted build is not what `Accepted.to_json` writes; accept it again")
        return cls(facts=dict(facts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What it means that a build differs from the accepted one in a fact, and what to do."""

    kind: Severity
    meaning: str


_OTHER_VERSION = _Rule(kind=Severity.ERROR, meaning="a plan loads only where it was built for; rebuild or accept anew")
_OTHER_GPUS = _Rule(kind=Severity.ERROR, meaning="it takes other GPUs to run; rebuild for as many or accept anew")
_OTHER_MODEL = _Rule(kind=Severity.ERROR, meaning="it is another model; build from the accepted checkpoint")
_OTHER_NUMBERS = _Rule(kind=Severity.WARNING, meaning="numbers may differ; judge the answers, then accept anew")
_OTHER_SPEED = _Rule(
    kind=Severity.WARNING, meaning="speed and rounding may differ; judge the answers, then accept anew"
)
_OTHER_LIMIT = _Rule(kind=Severity.WARNING, meaning="other requests fit; ask for the lengths and batches you need")
_UNTOLD = _Rule(
    kind=Severity.UNKNOWN,
    meaning="nobody can tell whether they are the same; run `parity build-manifest` where it is built",
)
_OTHER_CIRCUMSTANCE = _Rule(kind=Severity.NOTE, meaning="it changes no answer by itself; nothing to do")
_MODEL_FACTS = (
    "architecture", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_size", "intermediate_size", "hidden_act", "norm_epsilon", "position_embedding_type",
    "max_position_embeddings", "rotary_base", "rotary_scaling", "rotary_embedding_dim", "qk_layernorm", "attn_bias",
    "mlp_bias", "moe",
)  # fmt: skip
_LIMITS = ("max_input_len", "max_seq_len", "max_batch_size", "max_num_tokens", "max_beam_width")
_RULES: Mapping[str, _Rule] = {
    # By dotted name, with all that is below it; _OTHER_NUMBERS for the rest.
    "version": _OTHER_VERSION,
    "machine.sm": _OTHER_VERSION,
    "machine.tensorrt": _OTHER_VERSION,
    "machine.gpu_name": _OTHER_SPEED,
    "machine.driver": _OTHER_CIRCUMSTANCE,
    "machine.torch": _OTHER_CIRCUMSTANCE,
    **{f"{MAPPING}.{name}": _OTHER_GPUS for name in SIZES},
    f"{MAPPING}.gpus_per_node": _OTHER_CIRCUMSTANCE,
    **{f"pretrained_config.{name}": _OTHER_MODEL for name in _MODEL_FACTS},
    **{f"build_config.{name}": _OTHER_LIMIT for name in _LIMITS},
    PLUGINS: _OTHER_SPEED,
    "build_config.opt_batch_size": _OTHER_SPEED,
    "build_config.opt_num_tokens": _OTHER_SPEED,
    "build_config.profiling_verbosity": _OTHER_CIRCUMSTANCE,
    "build_config.input_timing_cache": _OTHER_CIRCUMSTANCE,
    "build_config.output_timing_cache": _OTHER_CIRCUMSTANCE,
    "build_config.monitor_memory": _OTHER_CIRCUMSTANCE,
}


def accepted_of(directory: Path) -> Accepted:
    """The facts of an engine directory, or of a folder with copies of its config.json and sidecar.

    Raises:
        ConfigError: If config.json or the sidecar cannot be read.
    """
    return facts_of(read_json(directory.resolve(), CONFIG), read_manifest(directory))


def facts_of(config: Mapping[str, Any], manifest: Manifest | None) -> Accepted:
    """The facts of a config.json and of a sidecar, those of a sidecar that is not there being null."""
    # TensorRT-LLM's version stands in config.json, whether or not the sidecar knows it.
    beside: dict[str, Any] = {
        f"machine.{name}": manifest and manifest.machine[name] for name in MACHINE_FACTS if name != "tensorrt_llm"
    }
    beside["checkpoint.config_sha256"] = manifest and manifest.checkpoint_config_sha256
    beside["checkpoint.revision"] = manifest and manifest.checkpoint_revision
    return Accepted(facts={**dict(_leaves(config, "")), **{name: json_text(value) for name, value in beside.items()}})


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + (key if _PLAIN_KEY.fullmatch(key) else ascii(key))  # a dot in a key is no level
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, json_text(value)


def json_text(value: Any) -> str:
    """A value as facts hold it: 1, true and "1" are three."""
    return json.dumps(value, sort_keys=True)


def against_accepted(facts: Accepted, accepted: Accepted) -> Iterator[Complaint]:
    """What differs, all but an architecture that nobody knows."""
    for changed in differences(accepted.facts, facts.facts):
        name, rule = changed.name, _rule(changed.name)
        ours, theirs = facts.facts.get(name), accepted.facts.get(name)
        if name.startswith(("machine.", "checkpoint.")) and not {ours, theirs}.isdisjoint(_NOT_KNOWN):
            if name == "machine.sm" and ours in _NOT_KNOWN:
                continue
            needed = rule.kind is Severity.ERROR and ours in _NOT_KNOWN
            rule = _UNTOLD if needed else _Rule(kind=Severity.NOTE, meaning=_UNTOLD.meaning)
        sentence = f"{name} is {shown(ours)} here and {shown(theirs)} in the accepted build: {rule.meaning}"
        yield Complaint(kind=rule.kind, field=name, sentence=sentence)


def shown(text: str | None) -> str:
    """A fact for people: its JSON text, shortened; `absent` where there is none."""
    if text is None:
        return "absent"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _rule(name: str) -> _Rule:
    fitting = (rule for start, rule in _RULES.items() if name == start or name.startswith(f"{start}."))
    return next(fitting, _OTHER_NUMBERS)
