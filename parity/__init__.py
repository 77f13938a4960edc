"""parity decides whether an LLM inference engine may be upgraded, rebuilt, quantized or replaced.

Engines run in processes of their own and only leave recordings behind; everything that judges is a pure function of
recordings. Importing this package imports nothing heavy: the worker does it inside every engine's interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parity.engines import EngineSpec
from parity.errors import (
    ConfigError,
    EngineError,
    GoldenMissingError,
    IncomparableError,
    ParityError,
    ProvisionError,
    RecordingError,
)
from parity.fingerprint import Fingerprint
from parity.prompts import Message, Prompt, Request, SamplingParams, Workload
from parity.recording import Completion, FinishReason, Recording, Terminator, Timing, TokenLogprobs
from parity.verdict import Finding, Outcome, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "ConfigError",
    "EngineError",
    "EngineSpec",
    "Finding",
    "Fingerprint",
    "FinishReason",
    "GoldenMissingError",
    "IncomparableError",
    "Message",
    "Outcome",
    "ParityError",
    "Prompt",
    "ProvisionError",
    "Recording",
    "RecordingError",
    "Request",
    "SamplingParams",
    "Terminator",
    "Timing",
    "TokenLogprobs",
    "Verdict",
    "Workload",
    "load",
]


def load(directory: str | Path) -> pd.DataFrame:
    """A recording as a pandas DataFrame, one row per token; see `parity.store.load`."""
    from parity import store  # noqa: PLC0415  pyarrow must not load with the package

    return store.load(directory)
