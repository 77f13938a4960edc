"""What a TensorRT-LLM engine directory says about itself, held against itself, an accepted build and what is wanted.

Reads config.json and the sidecar (`parity.engine_manifest`), hashes files, and needs neither GPU nor TensorRT-LLM:
nothing is executed, no plan is loaded. Written for the directories of TensorRT-LLM 1.2.1. Which difference weighs how
much, why, and from which source: docs/engine-builds.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from parity.engine_accepted import (
    MAPPING,
    PLUGINS,
    SIZES,
    Accepted,
    Complaint,
    Severity,
    accepted_of,
    against_accepted,
    facts_of,
    json_text,
    shown,
)
from parity.engine_manifest import (
    CONFIG,
    SIDECAR,
    Manifest,
    files_below,
    measured,
    read_json,
    read_manifest,
    require_plain,
)
from parity.errors import ConfigError
from parity.verdict import Outcome

__all__ = ["Accepted", "Complaint", "Severity", "Wanted", "accepted_of", "exit_outcome", "lint", "render"]

CONTRACT_VERSION = "1.2.1"
"""The TensorRT-LLM whose engine directories this file was written for."""
UNQUANTIZED = "none"

_TOP_LEVEL = {"version": (str, "text"), "pretrained_config": (dict, "object"), "build_config": (dict, "object")}
_RANK = re.compile(r"rank(0|[1-9][0-9]{0,5})\.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an engine will be asked for; None where it does not matter.

    sm, tensorrt, tensorrt_llm: of the machine that will load it, as `engine_manifest.this_machine` names them.
    quantization: `quant_algo` as config.json names it, or UNQUANTIZED.
    max_prompt_tokens, max_answer_tokens: of the longest request; prompts are not cut into chunks.
    batch: requests at once.
    """

    sm: str | None = None
    tensorrt: str | None = None
    tensorrt_llm: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    batch: int | None = None
    needs_generation_logprobs: bool = False
    needs_prompt_logprobs: bool = False
    prefix_caching: bool = False


def lint(directory: Path, *, accepted: Accepted | None, wanted: Wanted | None) -> tuple[Complaint, ...]:
    """What is wrong with an engine directory, worst first.

    Every file the sidecar names is hashed, so this takes as long as reading the engine.

    Raises:
        ConfigError: If there is no such directory, or it has no config.json that can be read.
    """
    root = directory.resolve()
    config = read_json(root, CONFIG)
    found: list[Complaint] = []
    manifest = None
    try:
        manifest = read_manifest(directory)
    except ConfigError as error:
        found.append(_error(SIDECAR, str(error)))
    found += _files(root, manifest)
    if fault := _unfit(config):
        found.append(fault)
    else:
        found += _judged(config, manifest, root, accepted, wanted)
    found += _architecture(manifest, accepted, wanted)
    order = list(Severity)
    return tuple(sorted(found, key=lambda complaint: order.index(complaint.kind)))


def exit_outcome(complaints: Iterable[Complaint]) -> Outcome:
    """FAIL with an ERROR; INCONCLUSIVE where something was asked for and nobody can tell; else PASS."""
    kinds = {complaint.kind for complaint in complaints}
    if Severity.ERROR in kinds:
        return Outcome.FAIL
    return Outcome.INCONCLUSIVE if Severity.UNKNOWN in kinds else Outcome.PASS


def render(complaints: Sequence[Complaint], directory: Path) -> str:
    """For people: a line with the counts, then one line a complaint in the order given; ends with a line break."""
    kinds = [complaint.kind for complaint in complaints]
    counts = [f"{kinds.count(kind)} {kind.value}" for kind in Severity if kind in kinds]
    head = f"engine {str(directory)!r}: {', '.join(counts) if counts else 'nothing to complain of'}"
    return "\n".join([head, *(f"  {c.kind.value:<7}  {c.sentence}" for c in complaints)]) + "\n"


def _files(root: Path, manifest: Manifest | None) -> Iterator[Complaint]:
    """The directory's files, each for itself and against the sidecar."""
    present, expected = files_below(root), manifest.files if manifest else {}
    for name in sorted({*present, *expected}):
        if name not in present:
            sentence = f"{name!r} is missing: the sidecar says {expected[name].bytes} bytes; copy it here or rebuild"
            yield _error(name, sentence)
            continue
        try:
            require_plain(root, present[name])
            found = measured(root, present[name]) if name in expected else None
        except ConfigError as error:
            yield _error(name, str(error))
            continue
        if found is None:
            if manifest:
                sentence = (
                    f"{name!r} is here and not in the sidecar: it came later; remove it, or write the sidecar again"
                )
                yield _warning(name, sentence)
        elif found != (said := expected[name]):
            sentence = (
                f"{name!r} was changed after the sidecar was written: it has {found.bytes} bytes, sha256 "
                f"{found.sha256[:12]}, the sidecar says {said.bytes} bytes, sha256 {str(said.sha256)[:12]}; restore it "
                "or rebuild"
            )
            yield _error(name, sentence)


def _unfit(config: Mapping[str, Any]) -> Complaint | None:
    """What keeps config.json from being one of 1.2.1 at all."""
    if "builder_config" in config and "version" not in config:
        fault = f"was written by a builder from before 0.8, it has builder_config and no version; {CONTRACT_VERSION} "
        return _error(CONFIG, f"{CONFIG} {fault}does not take it for an engine, rebuild")
    for name, (kind, word) in _TOP_LEVEL.items():
        if not isinstance(config.get(name), kind):
            found = shown(json_text(config[name])) if name in config else "absent"
            return _error(name, f"{name} of {CONFIG} is {found}, not the {word} an engine has there; rebuild")
    return None


class _Config:
    """config.json by dotted names. What was needed and is not there is kept in `untold`."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self.untold: dict[str, Complaint] = {}

    def value(self, field: str, *kinds: type) -> Any:
        """What is there, if it is exactly of one of these types; else None."""
        value: Any = self._data
        for key in field.split("."):
            if not isinstance(value, dict) or key not in value:
                return self._miss(field, None)
            value = value[key]
        return value if type(value) in kinds else self._miss(field, json_text(value))

    def _miss(self, field: str, found: str | None) -> None:
        sentence = f"{field} of {CONFIG} is {shown(found)}, so nobody can tell whether this engine fits; rebuild"
        self.untold[field] = Complaint(kind=Severity.UNKNOWN, field=field, sentence=sentence)


def _judged(
    data: Mapping[str, Any], manifest: Manifest | None, root: Path, accepted: Accepted | None, wanted: Wanted | None
) -> Iterator[Complaint]:
    config, facts = _Config(data), facts_of(data, manifest)
    yield from _written_by(data, manifest)
    yield from _mapping(config, root)
    if accepted is not None:
        yield from against_accepted(facts, accepted)
    if wanted is not None:
        for check in (_same, _lengths, _batch, _logprobs, _prefix_caching):
            yield from check(config, wanted)
        yield from _machine(facts, wanted)
    yield from config.untold.values()


def _written_by(data: Mapping[str, Any], manifest: Manifest | None) -> Iterator[Complaint]:
    version = json_text(data["version"])
    if version != json_text(CONTRACT_VERSION):
        sentence = f"version is {shown(version)}, and these checks were written for directories of {CONTRACT_VERSION}"
        yield _warning("version", f"{sentence}; build with that, or take what is said here with care")
    for name in sorted(data.keys() - _TOP_LEVEL.keys()):
        sentence = f"{CONFIG} has {name!a} at its top, which {CONTRACT_VERSION} does not write; find out who did"
        yield _warning(ascii(name), sentence)
    built_by = None if manifest is None else json_text(manifest.machine["tensorrt_llm"])
    if built_by not in (None, "null", version):
        yield _error(
            "machine.tensorrt_llm",
            f"version is {shown(version)} in {CONFIG}, and machine.tensorrt_llm is {built_by} in the sidecar: that was "
            "not written where the engine was built; write it there",
        )


def _mapping(config: _Config, root: Path) -> Iterator[Complaint]:
    """The ranks: as many as the mapping says, each with a plan, and no more."""
    sizes = [config.value(f"{MAPPING}.{name}", int) for name in SIZES]
    if None in sizes:
        return
    world, tensor, pipeline, context = sizes
    if world != tensor * pipeline * context or min(sizes) < 1:
        yield _error(
            f"{MAPPING}.world_size",
            f"{MAPPING}.world_size is {world}, and tp_size {tensor} x pp_size {pipeline} x cp_size {context} do not "
            "make so many GPUs; rebuild",
        )
    plans = {int(match[1]): path for path in root.iterdir() if (match := _RANK.fullmatch(path.name)) and path.is_file()}
    if (held := sum(rank < world for rank in plans)) < world:
        name = f"rank{next(rank for rank in count() if rank not in plans)}.engine"
        yield _error(name, f"{name} is missing: {held} of world_size {world} plans are here; copy it here or rebuild")
    for rank, path in sorted(plans.items()):
        if rank >= world:
            sentence = f"{path.name} belongs to no rank of world_size {world}: another build left it; remove it"
            yield _warning(path.name, sentence)
        elif not path.stat().st_size:
            yield _error(path.name, f"{path.name} has 0 bytes: the build or the copy broke off; copy it or rebuild")


def _architecture(manifest: Manifest | None, accepted: Accepted | None, wanted: Wanted | None) -> Iterator[Complaint]:
    """An unknown architecture is said, whether or not somebody asks."""
    if manifest is not None and manifest.machine["sm"] is not None:
        return
    asked = wanted.sm if wanted and wanted.sm else None
    if asked is None and accepted and accepted.facts.get("machine.sm", "null") != "null":
        asked = json.loads(accepted.facts["machine.sm"])
    why = f"there is no readable {SIDECAR}" if manifest is None else f"{SIDECAR} does not say"
    needed = "" if asked is None else f", and {asked} is needed"
    yield Complaint(
        kind=Severity.NOTE if asked is None else Severity.UNKNOWN,
        field="machine.sm",
        sentence=f"nobody knows for which GPU architecture this was built: {why}{needed}; run `parity build-manifest` "
        "where it is built",
    )


def _machine(facts: Accepted, wanted: Wanted) -> Iterator[Complaint]:
    for field, name, asked in (
        ("machine.sm", "machine.sm", wanted.sm),
        ("machine.tensorrt", "machine.tensorrt", wanted.tensorrt),
        ("version", "TensorRT-LLM", wanted.tensorrt_llm),
    ):
        found = facts.facts[field]
        if asked is None or found == json_text(asked) or (field == "machine.sm" and found == "null"):
            continue
        if found == "null":
            sentence = f"{name} of this build is not known, and {asked} is wanted"
            yield Complaint(
                kind=Severity.UNKNOWN,
                field=field,
                sentence=f"{sentence}; run `parity build-manifest` where it is built",
            )
        else:
            sentence = f"{name} is {shown(found)} and {json_text(asked)} is wanted"
            yield _error(field, f"{sentence}: a plan loads only where it was built for; rebuild there")


def _same(config: _Config, wanted: Wanted) -> Iterator[Complaint]:
    for field, asked in (
        (f"{MAPPING}.tp_size", wanted.tensor_parallel_size),
        (f"{MAPPING}.pp_size", wanted.pipeline_parallel_size),
        ("pretrained_config.dtype", wanted.dtype),
        ("pretrained_config.quantization.quant_algo", wanted.quantization),
    ):
        if asked is None:
            continue
        found = config.value(field, int) if isinstance(asked, int) else config.value(field, str, type(None))
        if field not in config.untold and (UNQUANTIZED if found is None else found) != asked:
            yield _error(
                field, f"{field} is {shown(json_text(found))} and {json_text(asked)} is wanted; rebuild with it"
            )


def _lengths(config: _Config, wanted: Wanted) -> Iterator[Complaint]:
    if wanted.max_prompt_tokens is None and wanted.max_answer_tokens is None:
        return
    prompt, answer = wanted.max_prompt_tokens or 1, wanted.max_answer_tokens or 1
    field = "build_config.max_seq_len"
    fits = config.value(field, int)
    if fits is not None and prompt + answer > fits:
        yield _error(
            field,
            f"{field} is {fits}, and {prompt} tokens of prompt and {answer} of answer are wanted: such requests are "
            "refused; rebuild with a larger one or ask for less",
        )
    # With both of these the runtime does not look at max_input_len.
    packed = [config.value(f"{PLUGINS}.{name}", bool) for name in ("context_fmha", "remove_input_padding")]
    field = "build_config.max_num_tokens" if all(packed) else "build_config.max_input_len"
    fits = config.value(field, int)
    if fits is not None and prompt > fits:
        yield _error(
            field,
            f"{field} is {fits}, and prompts of {prompt} tokens are wanted: they are refused; rebuild with a larger "
            "one or ask for less",
        )


def _batch(config: _Config, wanted: Wanted) -> Iterator[Complaint]:
    field = "build_config.max_batch_size"
    fits = None if wanted.batch is None else config.value(field, int)
    if fits is not None and wanted.batch is not None and wanted.batch > fits:
        sentence = f"{field} is {fits}, and {wanted.batch} requests at once are wanted: some wait, batches are others"
        yield _warning(field, f"{sentence}; rebuild with a larger one or ask for fewer")


def _logprobs(config: _Config, wanted: Wanted) -> Iterator[Complaint]:
    field = "build_config.gather_context_logits"
    if wanted.needs_prompt_logprobs and config.value(field, bool) is False:
        sentence = f"{field} is false, and log-probabilities of prompts are wanted: such requests are refused"
        yield _error(field, f"{sentence}; rebuild with --gather_context_logits")
    field = "build_config.gather_generation_logits"
    if wanted.needs_generation_logprobs and config.value(field, bool) is False:
        sentence = f"{field} is false, and log-probabilities of answers are wanted: such requests are refused unless it"
        yield _warning(field, f"{sentence} is loaded with LLM(gather_generation_logits=True); load it so")


def _prefix_caching(config: _Config, wanted: Wanted) -> Iterator[Complaint]:
    needs = ((f"{PLUGINS}.use_paged_context_fmha", True), ("build_config.gather_context_logits", False))
    for field, needed in needs if wanted.prefix_caching else ():
        found = config.value(field, bool)
        if found is not None and found is not needed:
            sentence = (
                f"{field} is {json_text(found)}, and a prefix cache is wanted: the runtime leaves it out and only"
            )
            yield _error(field, f"{sentence} logs that; rebuild with {json_text(needed)}")


def _error(field: str, sentence: str) -> Complaint:
    return Complaint(kind=Severity.ERROR, field=field, sentence=sentence)


def _warning(field: str, sentence: str) -> Complaint:
    return Complaint(kind=Severity.WARNING, field=field, sentence=sentence)
