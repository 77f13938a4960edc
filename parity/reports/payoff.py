"""Which engine pays, for a terminal and as Markdown: the answer, then what it rests on, then what would flip it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from parity.differences import visible
from parity.payoff import Payoff
from parity.serving_costs import BreakEven, Flip, Machines
from parity.serving_rates import CONFIDENCE

_WIDTH = 118
_INTERVAL = f"{CONFIDENCE:.0%} interval"
_MARKUP = re.compile(r"([\\`*_\[\]<>&|~$#!])")
_UNITS = {
    "output_tokens_per_day": "output tokens a day",
    "candidate_output_tokens_per_s": "the candidate's output tokens/s",
    "utilisation": "utilisation",
    "gpu_hour_price": "price of a GPU-hour",
    "changes_per_month": "changes of the model a month",
    "build_hours_per_change": "build hours a change",
    "engineer_hours_per_change": "engineer-hours a change",
    "engineer_hour_price": "price of an engineer-hour",
    "one_time_engineer_hours": "engineer-hours once",
    "horizon_months": "months of use",
    "reference_build_hours_per_change": "the reference's build hours a change",
    "reference_engineer_hours_per_change": "the reference's engineer-hours a change",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _List:
    title: str
    items: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def terminal(found: Payoff) -> str:
    """For a terminal of 118 columns."""
    lines = [*_wrapped(_title(found), "", hang=2), *_wrapped(f"{found.sentence}.", "  ")]
    for block in _blocks(found):
        if isinstance(block, _List):
            lines += ["", f"{block.title}:"]
            for item in block.items:
                lines += _wrapped(item, "  - ", hang=0)
            continue
        rows = [list(block.head), *map(list, block.rows)]
        widths = [max(len(r[column]) for r in rows) for column in range(len(block.head))]
        lines += ["", f"{block.title}:"]
        for cells in rows:
            first, *others = zip(cells, widths, strict=True)
            line = [f"  {first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)]
            lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def markdown(found: Payoff) -> str:
    """For a page; what engines are called stays text."""
    lines = [f"## {_escaped(_title(found))}", "", f"{_escaped(found.sentence)}."]
    for block in _blocks(found):
        lines += ["", f"**{_escaped(block.title)}**", ""]
        if isinstance(block, _List):
            lines += [f"- {_escaped(item)}" for item in block.items]
            continue
        lines += ["| " + " | ".join(block.head) + " |", "|---" + "|---:" * (len(block.head) - 1) + "|"]
        lines += ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in block.rows]
    return "\n".join(lines) + "\n"


def _title(found: Payoff) -> str:
    sides = found.speeds
    return f"{found.answer.value}: {visible(sides.candidate.label)} in the place of {visible(sides.reference.label)}"


def _blocks(found: Payoff) -> Iterator[_List | _Table]:
    judged = found.standing
    if judged.failed:
        yield _List(title="failed", items=[visible(said) for said in judged.failed])
    if judged.unsure:
        yield _List(title="inconclusive", items=[visible(said) for said in judged.unsure])
    yield _List(title="what was found", items=list(_facts(found)))
    per_request = found.speeds.output_tokens_per_request
    yield _Table(
        title="cost a month, the one-time cost spread over the months of use",
        head=("output tokens a day", "requests a day", "reference", "candidate", "saved", _INTERVAL),
        rows=[
            (
                _count(row.tokens_per_day),
                _count(row.tokens_per_day / per_request),
                _money(row.reference),
                _money(row.candidate),
                _money(row.reference - row.candidate),
                "" if row.advantage_interval is None else " to ".join(map(_money, row.advantage_interval)),
            )
            for row in found.rows
        ],
    )
    yield _Table(
        title=f"what flips the answer at {_count(found.costs.middle)} output tokens a day, each alone, nearest first",
        head=("input", "now", "flips at", "change"),
        rows=[_flip(flip) for flip in found.flips],
    )
    yield _List(title="assumed", items=[visible(said) for said in found.assumed])


def _facts(found: Payoff) -> Iterator[str]:
    rates, even = found.rates, found.break_even
    share = ""
    if rates.interval_s is not None:
        share = " ({:.1%} to {:.1%})".format(*(end / rates.reference_s for end in rates.interval_s))
    yield (
        f"speed: {1 / rates.reference_s:.4g} output tokens/s of a server in the reference, {1 / rates.candidate_s:.4g} "
        f"in the candidate, which saves {rates.saved_s / rates.reference_s:.1%}{share} of a server's time for a token"
    )
    yield f"break-even: {_pays_where(even)}"
    if found.costs.machines is Machines.WHOLE and math.isfinite(even.tokens_per_day):
        yield "whole servers: on the way to it the saving goes up and down; beyond it no longer"
    for repaid in found.repaid:
        months = "never" if math.isinf(repaid.months) else f"after {repaid.months:.3g} months"
        between = "" if repaid.interval is None else f" ({_between(repaid.interval, _months)})"
        yield (
            f"the one-time cost of {_money(found.costs.once)} is earned back {months}{between} of "
            f"{found.costs.horizon_months:g} at {_count(repaid.tokens_per_day)} output tokens a day"
        )


def _pays_where(even: BreakEven) -> str:
    between = "" if even.interval is None else f"; {_INTERVAL} {_between(even.interval, _traffic)}"
    if math.isinf(even.tokens_per_day):
        where = "the candidate pays at no traffic" if even.above else "the candidate pays at any traffic"
    else:
        way = "above" if even.above else "below"
        where = f"the candidate pays {way} {_traffic(even.tokens_per_day)} output tokens a day"
    return where + between


def _between(interval: tuple[float, float], shown: Callable[[float], str]) -> str:
    return " to ".join(map(shown, interval))


def _traffic(tokens_per_day: float) -> str:
    return "infinity" if math.isinf(tokens_per_day) else _count(tokens_per_day)


def _months(months: float) -> str:
    return "never" if math.isinf(months) else f"{months:.3g}"


def _flip(flip: Flip) -> tuple[str, str, str, str]:
    shown = _count if flip.name == "output_tokens_per_day" else "{:.4g}".format
    if flip.at is None:
        return _UNITS[flip.name], shown(flip.now), "nothing near", ""
    change = f"{flip.at / flip.now - 1:+.0%}" if flip.now else ""
    return _UNITS[flip.name], shown(flip.now), shown(flip.at), change


def _count(number: float) -> str:
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _money(amount: float) -> str:
    amount = round(amount, 2) + 0.0  # no -0.00
    return f"{amount:,.0f}" if abs(amount) >= 100 else f"{amount:,.2f}"


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)


def _wrapped(text: str, indent: str, *, hang: int = 0) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * (len(indent) + hang),
        break_on_hyphens=False,
    )
