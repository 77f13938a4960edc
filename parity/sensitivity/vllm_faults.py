"""vLLM with one fault that no model directory can hold: an adapter given by path, its fault named in `options`.

Runs inside the engine's interpreter. The model is changed after loading, in vLLM's own process, so the engine must not
start others and must not have compiled the model.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from parity.engines import EngineSpec
from parity.engines.vllm import VllmEngine
from parity.errors import EngineError

BIASED_TOKEN = 30
BIAS = 0.05
SILU, WANTED_MODE = "SiluAndMul", "VLLM_ENABLE_V1_MULTIPROCESSING"


def _gelu_for_silu(model: Any) -> None:
    """Another activation in every MLP."""
    from torch.nn.functional import gelu  # noqa: PLC0415

    def forward(x: Any) -> Any:
        half = x.shape[-1] // 2
        return gelu(x[..., :half]) * x[..., half:]

    found = [module for module in model.modules() if type(module).__name__ == SILU]
    if not found:
        raise EngineError(f"the model has no {SILU} to replace")
    for module in found:
        module.forward = forward


def _logit_bias(model: Any) -> None:
    """One frequent token is a little too probable, in scores and in sampling."""
    own = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        # In float32: the step of bfloat16 between 16 and 32 is 0.125, and would swallow the bias or double it.
        logits = own(*args, **kwargs).float()
        logits[:, BIASED_TOKEN] += BIAS
        return logits

    model.compute_logits = compute_logits


FAULTS = {"gelu for silu": _gelu_for_silu, "logit bias 0.05": _logit_bias}


def open_engine(spec: EngineSpec, model: Path) -> VllmEngine:
    """Load the model, then plant `spec.options["fault"]`."""
    options = dict(spec.options)
    fault = options.pop("fault", None)
    if fault not in FAULTS:
        raise EngineError(f"there is no fault {fault!r}; there are {', '.join(FAULTS)}")
    if os.environ.get(WANTED_MODE) != "0" or not options.get("enforce_eager"):
        raise EngineError(f"a fault in the running model needs {WANTED_MODE}=0 and enforce_eager")
    engine = VllmEngine(replace(spec, options=options), model)
    engine._llm.apply_model(FAULTS[fault])
    return engine
