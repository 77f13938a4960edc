"""vLLM that samples at temperature 0.7 where greedy was asked, as an engine with its own defaults would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from parity.engines.vllm import VllmEngine

if TYPE_CHECKING:
    from vllm import SamplingParams

    from parity.engines import EngineSpec
    from parity.prompts import Request


class WarmVllmEngine(VllmEngine):
    """Scoring is untouched; only the choice of tokens is."""

    def _sampling_params(self, request: Request) -> SamplingParams:
        if not request.sampling.is_greedy:
            return super()._sampling_params(request)
        return super()._sampling_params(replace(request, sampling=replace(request.sampling, temperature=0.7)))


def open_engine(spec: EngineSpec, model: Path) -> WarmVllmEngine:
    """Load the model."""
    return WarmVllmEngine(spec, model)
