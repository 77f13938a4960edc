"""vLLM that stops one token early, as an engine with an off-by-one in its length limit would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from parity.engines.vllm import VllmEngine

if TYPE_CHECKING:
    from vllm import SamplingParams

    from parity.engines import EngineSpec
    from parity.prompts import Request


class ShortVllmEngine(VllmEngine):
    """Scoring is untouched; only generation is cut."""

    def _sampling_params(self, request: Request) -> SamplingParams:
        shorter = replace(request.sampling, max_tokens=request.sampling.max_tokens - 1)
        return super()._sampling_params(replace(request, sampling=shorter))


def open_engine(spec: EngineSpec, model: Path) -> ShortVllmEngine:
    """Load the model."""
    return ShortVllmEngine(spec, model)
