"""The bench's rows as Markdown: what ours and the peers' rules notice, and what the diagnosis says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from parity.sensitivity import peers

_LONGEST = 110


def detection(rows: Sequence[Mapping[str, Any]]) -> str:
    """Detection rates, ours beside the peers'; harmless variations in italics."""
    sizes = next((list(row["lockstep"]) for row in rows if row["lockstep"]), [])
    at = "/".join(sizes)
    names = [rule.name for rule in peers.RULES]
    head = [
        "case",
        "x floor",
        "decode x floor",
        f"caught @{at}",
        f"PASS @{at}",
        "lockstep @48",
        "decode @48",
        "greedy @48",
        "float32",
        "other checks that fail",
        *names,
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        others = [c for c, o in row["outcomes"].items() if o == "FAIL" and c not in _SHOWN]
        lines.append(
            _line(
                [
                    f"*{row['name']}*" if row["kind"] == "harmless" else row["name"],
                    _number(row["kl_ratio"]),
                    _number(row["decode_ratio"]),
                    _rates(row["caught"], sizes),
                    _rates(row["passes"], sizes),
                    *(_rates(row[name], ["48"]) for name in ("lockstep", "decode", "greedy")),
                    _logic(row),
                    ", ".join(others) or "-",
                    *(_rates(row["peers"], [name]) for name in names),
                ]
            )
        )
    return "\n".join(lines)


def diagnoses(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is said to be wrong with each fault, and whether that is what was planted."""
    lines = [_line(["fault", "kind", "diagnosis", "confidence", "right"]), _line(["---"] * 5)]
    for row in rows:
        if row["kind"] == "harmless":
            continue
        right = {True: "yes", False: "NO", None: "-"}[row["right"]]
        said = row["diagnosis"] or "nothing failed"
        said = said if len(said) <= _LONGEST else f"{said[:_LONGEST].rsplit(' ', 1)[0]} ..."
        lines.append(_line([row["name"], row["kind"], said.replace("|", "\\|"), row["confidence"] or "-", right]))
    return "\n".join(lines)


_SHOWN = ("lockstep", "decode", "greedy", "logic", "stepwise")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _rates(rates: Mapping[str, float], sizes: Sequence[str]) -> str:
    return "/".join(f"{rates[s]:.2f}" for s in sizes if s in rates) or "-"


def _logic(row: Mapping[str, Any]) -> str:
    value = row["logic_nats2"]
    said = [row["outcomes"].get(check) for check in ("logic", "stepwise")]
    worst = "FAIL" if "FAIL" in said else "PASS" if "PASS" in said else "-"
    return "-" if math.isnan(value) else f"{worst} {value:.1g}"
