"""One comparison for other programs: everything as JSON, and one finding a line as CSV for dashboards."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from parity.differences import Answer, PromptDifference
from parity.summary import Summary
from parity.verdict import Finding

SCHEMA = 1
"""Grows when a key goes away or changes its meaning; new keys may come without."""
COLUMNS = (
    "title",
    "created_at",
    "reference",
    "candidate",
    "check",
    "metric",
    "outcome",
    "value",
    "low",
    "high",
    "margin",
    "unit",
    "n",
)
_BULK = {PromptDifference: ("prompt",), Answer: ("text",)}


def to_json(summary: Summary) -> str:
    """The summary under the names of its fields, without the texts of prompts and answers.

    Numbers that are not finite are null.
    """
    return json.dumps({"schema": SCHEMA, **_plain(summary)}, indent=1, allow_nan=False) + "\n"


def to_csv(summary: Summary) -> str:
    """A header and one line a finding; see COLUMNS.

    value: the finding's delta or, where it has none, the candidate's number. low, high: its interval. margin: what the
    value is held against, where that is one number. What is missing or not finite is empty. reference, candidate: the
    two recordings that the check looked at.
    """
    out = io.StringIO()
    lines = csv.writer(out)
    lines.writerow(COLUMNS)
    for verdict in summary.verdicts:
        about = (summary.title, summary.created_at, verdict.reference, verdict.candidate, verdict.check)
        for finding in verdict.findings:
            lines.writerow([*about, finding.metric, finding.outcome.value, *_numbers(finding), finding.unit, finding.n])
    return out.getvalue().encode("utf-8", "backslashreplace").decode()  # half a character has no UTF-8


def _numbers(finding: Finding) -> list[float | None]:
    """value, low, high, margin."""
    value = finding.candidate if finding.delta is None else finding.delta
    low, high = finding.interval or (None, None)
    return [_finite(number) for number in (value, low, high, finding.margin)]


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        left_out = _BULK.get(type(value), ())
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name not in left_out}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
