"""A comparison as one HTML page: self-contained, nothing loaded, readable without a script, on a phone and on paper.

Whatever a model or an engine wrote may stand in any field. It is escaped, and what shows nothing (control characters,
marks that turn the direction of text, lone surrogates) is shown by a sign, so that nothing is lost or hidden.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from parity import charts
from parity.decision import Advice
from parity.diagnose import Confidence
from parity.differences import Choice, PromptDifference, meaning, tally
from parity.divergence import Kind
from parity.fingerprint import Scalar
from parity.recording import FinishReason
from parity.summary import Summary
from parity.verdict import Outcome

_HERE = Path(__file__).parent
_LONG = 3000
"""Characters of one text from which on only the part around its divergence is unfolded."""
_BEFORE = 300
_PEEK_BEFORE, _PEEK_AFTER, _PEEK = 36, 24, 90
_ROWS = 6
"""Rows of a top-k table that are not folded."""

# Everything that shows nothing or turns the text around it: C0 and C1 (but tab and line feed), soft hyphen, zero-width
# and direction marks, line and paragraph separators, surrogates, non-characters, tags. Joiners stay: scripts need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)
_EDGE_SPACES = re.compile(r"\A +| +\Z|[\n\t]")
_SIGNS = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}

_OUTCOMES = {Outcome.PASS: "good", Outcome.FAIL: "bad", Outcome.INCONCLUSIVE: "unsure"}
_ADVICE = {
    Advice.UPGRADE: ("good", "The candidate may take the reference's place"),
    Advice.HOLD: ("bad", "The candidate must not take the reference's place yet"),
    Advice.UNDECIDED: ("unsure", "It is not known yet whether the candidate may take the reference's place"),
}
_SURE = {
    Confidence.CERTAIN: "certain: recorded facts or the engine's own answers prove it",
    Confidence.LIKELY: "likely: it fits the pattern of what failed and what did not",
    Confidence.NONE: "unknown: nothing that is known fits",
}
_KINDS = {
    Kind.IDENTICAL: ("same", "good"),
    Kind.TIE: ("tie", "good"),
    Kind.BENIGN: ("rounding", "good"),
    Kind.SUSPICIOUS: ("suspicious", "unsure"),
    Kind.MISMATCH: ("too far apart", "bad"),
    Kind.LENGTH: ("ends elsewhere", "bad"),
    Kind.UNKNOWN: ("not weighed", "unsure"),
}
_ENDS = {
    FinishReason.STOP: "ended by itself",
    FinishReason.LENGTH: "cut off by the length limit",
    FinishReason.ABORT: "given up by the engine",
}
_QUESTIONS = {
    "inputs": "Did both engines work on the same prompt tokens?",
    "contract": "Does the engine do with a request what it says?",
    "shape": "Do answers end where they should, and do numbers, tokens and texts fit together?",
    "greedy": "Where two answers part, are the engines no further apart than rounding makes them?",
    "lockstep": "Reading the same tokens, do both engines find the same ones probable?",
    "decode": "Does writing an answer token by token give what reading it at once gives?",
    "logic": "Without 16-bit rounding, do both compute the same function?",
    "stepwise": "Without 16-bit rounding, does writing token by token give what reading at once gives?",
    "sampling": "Does each engine draw its tokens as it was asked to?",
    "determinism": "Asked the same again, alone, in other company or from its cache, does it answer the same?",
    "structured": "Do answers follow the schema, expression or choice they must follow?",
    "accuracy": "On the same documents of the same tasks, does the candidate get as many right?",
    "laws": "On generated prompts and settings, is kept what any correct engine keeps?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A stretch of a text: what both answers share, then what only this one has."""

    shared: str
    own: str
    folded: bool

    def __len__(self) -> int:
        return len(self.shared) + len(self.own)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    """A row of the table of the two sides."""

    name: str
    reference: str
    candidate: str

    @property
    def differs(self) -> bool:
        """Whether the two sides say something else."""
        return self.reference != self.candidate


def render(summary: Summary) -> str:
    """The whole page, as text that UTF-8 can hold."""
    script = Markup((_HERE / "report.js").read_text("utf-8"))  # noqa: S704  ours
    bars = charts.bars(summary.first_divergences)
    drawn = charts.available()
    return _ENVIRONMENT.get_template("report.html.j2").render(
        summary=summary,
        title=_UNSEEN.sub(lambda found: _sign(found[0]), summary.title),
        style=Markup((_HERE / "report.css").read_text("utf-8")),  # noqa: S704  ours
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=tuple(_facts(summary)),
        changed_packages=[d for d in summary.packages if None not in (d.reference, d.candidate)],
        other_packages=[d for d in summary.packages if None in (d.reference, d.candidate)],
        bars=bars,
        tally=tally(summary.prompts),
        drawn=drawn,
        effects_chart=Markup(charts.effects(summary.effects) if drawn and summary.effects else ""),  # noqa: S704
        bars_chart=Markup(charts.first_divergences(bars) if drawn and bars else ""),  # noqa: S704
        positions_chart=Markup(  # noqa: S704  drawn by us
            charts.kl_by_position(summary.kl_by_position) if drawn and summary.kl_by_position else ""
        ),
    )


def visible(text: object) -> Markup:
    """Escaped, and every character that shows nothing as a sign in an <i> of its own; tab and line feed stay."""
    return Markup(_UNSEEN.sub(lambda found: f"<i>{_sign(found[0])}</i>", str(escape(str(text)))))  # noqa: S704


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of control characters, in the same order
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"U+{code:04X}"


def _finalized(value: object) -> Markup:
    return value if isinstance(value, Markup) else visible(value)


def _token(choice: Choice) -> Markup:
    """A token's text with the spaces at its ends and its line breaks shown; its id only where the text is not known."""
    if choice.text is None:
        return visible(f"token {choice.token_id}")
    if not choice.text:
        return Markup("<small>(no text)</small>")
    parts, last = [], 0
    for found in _EDGE_SPACES.finditer(choice.text):
        signs = "".join(_SIGNS[c] for c in found[0])
        parts += [visible(choice.text[last : found.start()]), Markup("<i>{}</i>").format(signs)]
        last = found.end()
    return Markup("<code>{}</code>").format(Markup("").join([*parts, visible(choice.text[last:])]))


def _parts(text: str, common: int) -> Iterator[_Part]:
    """The text in one part, or a long one in up to three of which the middle one is not folded."""
    start, stop = 0, len(text)
    if len(text) > _LONG:
        start = max(0, min(common - _BEFORE, len(text) - _LONG))
        stop = start + _LONG
    for low, high in ((0, start), (start, stop), (stop, len(text))):
        if low < high:
            split = min(max(common, low), high)
            yield _Part(shared=text[low:split], own=text[split:high], folded=(low, high) != (start, stop))


def _facts(summary: Summary) -> Iterator[_Fact]:
    ours, theirs = summary.reference, summary.candidate
    for name in dict.fromkeys([*ours.facts, *theirs.facts]):
        yield _Fact(
            name=name, reference=ours.facts.get(name, "not known"), candidate=theirs.facts.get(name, "not known")
        )


def _peek(prompt: PromptDifference) -> Markup:
    """The two answers where they part, in one line; the beginning of the answer where they do not."""
    ours, theirs = prompt.reference, prompt.candidate
    if not prompt.differs:
        return visible(ours.text[:_PEEK])
    before = ours.text[max(0, ours.common - _PEEK_BEFORE) : ours.common]
    after = [a.text[a.common : a.common + _PEEK_AFTER] or "(ends)" for a in (ours, theirs)]
    return Markup("{} <small>reference</small> <mark>{}</mark> <small>candidate</small> <mark>{}</mark>").format(
        *map(visible, (before, *after))
    )


def _nats(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return f"{value:.3f}" if math.isfinite(value) else f"{'-' * (value < 0)}infinite"


def _probability(logprob_nats: float) -> str:
    """In per cent; empty where the number is none."""
    if not logprob_nats <= 0.0:
        return ""
    percent = 100.0 * math.exp(logprob_nats)
    return f"{percent:.1f} %" if percent >= 0.05 else "< 0.1 %"


def _value(value: Scalar) -> str:
    return "none" if value is None else str(value)


def _sentence(text: str) -> str:
    """With a full stop, and a capital where it begins with a plain word; a name like max_tokens stays as it is."""
    first = text.partition(" ")[0].rstrip(",;:")
    is_word = first == "a" or (len(first) > 1 and first.isascii() and first.isalpha() and first.islower())
    begun = text[:1].upper() + text[1:] if is_word else text
    return begun if begun.endswith((".", "!", "?")) else f"{begun}."


def _count(items: Sequence[object], one: str, many: str = "") -> str:
    return f"{len(items)} {one if len(items) == 1 else many or one + 's'}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_finalized,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        Outcome=Outcome,
        outcomes=_OUTCOMES,
        advice=_ADVICE,
        sure=_SURE,
        kinds=_KINDS,
        ends=_ENDS,
        questions=_QUESTIONS,
        rows=_ROWS,
        count=_count,
        meaning=meaning,
        parts=_parts,
        peek=_peek,
    )
    environment.filters.update(token=_token, nats=_nats, probability=_probability, value=_value, sentence=_sentence)
    return environment


_ENVIRONMENT = _environment()
