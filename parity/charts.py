"""Charts of a summary as inline SVG, drawn by matplotlib and made to follow the page: its colours, its fonts.

Text stays text, colours are variables of the page's style sheet, ids begin with the chart's name, nothing is loaded.
matplotlib is imported only when a chart is drawn; `available` says whether it can be.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from parity.summary import Effect, PositionBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that nobody would choose, and what each becomes on the page.
_INK, _FAINT, _PLAIN, _GOOD, _BAD, _FLOOR = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_ON_THE_PAGE = {
    _INK: "currentColor",
    _FAINT: "var(--line)",
    _PLAIN: "var(--link)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
    _FLOOR: "var(--unsure)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
}
_WIDTH_INCHES = 4.6
"""Narrow, so that a phone shows all of it in letters that can be read."""
_LEAST, _MOST = 0.1, 10.0
"""Where the axis of effects ends, in units of the limit. What lies beyond is drawn at its end, with its number."""
_MOST_BARS = 16
_LONGEST_LABEL = 44
_FEW_TIMES = 4
"""From this ratio of the largest value to the smallest on, a logarithmic axis shows more than a linear one."""
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_OWN_ID = re.compile(r"(url\(#|^#)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How many prompts first differ after `start` to `stop` - 1 equal tokens."""

    start: int
    stop: int
    prompts: int


def available() -> bool:
    """Whether charts can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def bars(first_divergences: Sequence[int]) -> tuple[Bar, ...]:
    """A histogram in at most sixteen bars of one width, a power of two."""
    if not first_divergences:
        return ()
    end, width = max(first_divergences) + 1, 1
    while end > width * _MOST_BARS:
        width *= 2
    return tuple(
        Bar(start=start, stop=start + width, prompts=sum(start <= at < start + width for at in first_divergences))
        for start in range(0, end, width)
    )


def effects(found: Sequence[Effect]) -> str:
    """A forest plot: each finding in units of its own limit, on a logarithmic axis, with its interval."""

    def draw(axes: Axes) -> None:
        for row, effect in enumerate(reversed(found)):
            colour = _GOOD if effect.passed else _BAD
            if effect.low is not None and effect.high is not None:
                axes.plot([_on_axis(effect.low), _on_axis(effect.high)], [row, row], "|-", color=colour, clip_on=False)
            marker = "o" if effect.passed else "D"
            axes.plot([_on_axis(effect.value)], [row], marker, color=colour, markersize=5, clip_on=False)
            axes.annotate(f"{effect.value:.2g}", (1.05, row), xycoords=("axes fraction", "data"), va="center")
        axes.axvline(1.0, color=_INK, linewidth=1.5)
        axes.set(xscale="log", xlim=(_LEAST, _MOST), ylim=(-0.7, len(found) - 0.3), xlabel="times the limit")
        axes.set_xticks([_LEAST, 0.3, 1.0, 3.0, _MOST], ["≤ 0.1", "0.3", "limit", "3", "≥ 10"])
        axes.minorticks_off()
        axes.set_yticks(range(len(found)), [_label(f"{e.check}: {e.metric}") for e in reversed(found)])
        axes.tick_params(axis="y", length=0, pad=8)
        axes.grid(axis="x")

    label = "What was measured, in units of its limit, with intervals; the table before the chart has the numbers"
    return _drawn("effects", label, draw, height_inches=0.7 + 0.23 * len(found))


def first_divergences(found: Sequence[Bar]) -> str:
    """How many prompts first differ where."""

    def draw(axes: Axes) -> None:
        width = found[0].stop - found[0].start
        axes.bar([b.start for b in found], [b.prompts for b in found], width=0.9 * width, align="edge", color=_PLAIN)
        axes.set(xlabel="equal tokens before the first difference", ylabel="prompts")
        axes.locator_params(axis="y", integer=True)
        axes.grid(axis="y")

    label = "Where answers first differ: prompts by number of equal tokens; the table before the chart has the numbers"
    return _drawn("first-divergences", label, draw, height_inches=2.0)


def kl_by_position(found: Sequence[PositionBin]) -> str:
    """KL divergence a token along the answer with one standard error, and the measured noise beside it."""

    def draw(axes: Axes) -> None:
        places = range(len(found))
        means = [b.mean_nats for b in found]
        floors = [math.nan if b.floor_nats is None else b.floor_nats for b in found]
        errors = [b.error_nats or 0.0 for b in found]
        axes.errorbar(places, means, errors, fmt="o-", color=_PLAIN, capsize=4, label="between the two engines")
        axes.plot(places, floors, "s--", color=_FLOOR, label="rounding noise (the floor)")
        drawn = [value for value in (*means, *floors) if math.isfinite(value)]
        if drawn and 0 < _FEW_TIMES * min(drawn) < max(drawn):
            axes.set_yscale("log")
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(places, [f"{b.start} to {b.stop - 1}" for b in found])
        axes.set(xlabel="token of the answer", ylabel="nats a token")
        axes.grid(axis="y")
        axes.legend(frameon=False)

    label = "KL divergence a token along the answer, beside rounding noise; the table before the chart has the numbers"
    return _drawn("kl-by-position", label, draw, height_inches=2.3)


def _on_axis(value: float) -> float:
    return min(max(value, _LEAST), _MOST)


def _label(text: str) -> str:
    """Short, and without what XML cannot hold; the table beside a chart has the whole."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return plain if len(plain) <= _LONGEST_LABEL else plain[: _LONGEST_LABEL - 1] + "…"


def _drawn(name: str, label: str, draw: Callable[[Axes], None], *, height_inches: float) -> str:
    import matplotlib as mpl  # noqa: PLC0415  slow, and may be absent
    from matplotlib.figure import Figure  # noqa: PLC0415

    buffer = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matplotlib's own font lacks, the page's fonts have
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True)
    return _for_a_page(buffer.getvalue(), name, label)


def _for_a_page(svg: str, name: str, label: str) -> str:
    """The drawing as part of an HTML page: no name spaces, no styles for the whole page, no ids of others."""
    root = ElementTree.fromstring(svg)  # noqa: S314  matplotlib's own output
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _attribute(key, value, name) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    value = _OWN_ID.sub(rf"\g<1>{name}-", _FONT.sub("", value))
    for colour, variable in _ON_THE_PAGE.items():
        value = value.replace(colour, variable)
    return value
