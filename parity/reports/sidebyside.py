"""Two recordings for a terminal, prompt by prompt: both answers in two columns from where they part, and why.

Plain text without colours, every line at most `width` cells wide: wide characters of East Asian scripts count as two.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich.cells import cell_len, set_cell_size

from parity.differences import Answer, Choice, PromptDifference, meaning, most_telling_first, tally, visible
from parity.recording import FinishReason

NARROWEST = 80
"""Cells below which two columns with a table each cannot be read; narrower terminals get lines of this width."""
_MARK = "►"
_BETWEEN = " │ "
_INDENT = "  "
_BEFORE = 60
_LINES = 8
_TOP = 5
_NUMBERS = 23
_ENDS = {
    FinishReason.STOP: "ended by itself",
    FinishReason.LENGTH: "length limit",
    FinishReason.ABORT: "aborted",
}


def render(
    differences: Sequence[PromptDifference],
    *,
    reference: str,
    candidate: str,
    width: int,
    most: int,
    whole: bool = False,
) -> str:
    """What differs, most telling prompt first.

    reference, candidate: how to name the two sides.
    width: cells a line, at least NARROWEST.
    most: prompts to show in full.
    whole: show texts from their beginning to their end, and prompts without a difference too.
    """
    width = max(width, NARROWEST)
    differing = most_telling_first(differences)
    asked = [*differing, *(d for d in differences if whole and not d.differs)]
    shown = asked[: max(most, 0)]
    lines = _folded(tally(differences), width)
    lines += _folded(f"reference: {visible(reference)}", width) + _folded(f"candidate: {visible(candidate)}", width)
    if any(d.differs for d in shown):
        lines += ["", *_legend(width)]
    for difference in shown:
        lines += ["", *_prompt(difference, width, whole=whole)]
    left = len(asked) - len(shown)
    if left:
        some = f"{left} more prompts are" if left > 1 else "1 more prompt is"
        lines += ["", *_folded(f"{some} not shown; --all shows every one, --prompt ID one in full", width)]
    return "\n".join(lines)


def _legend(width: int) -> list[str]:
    lines = [
        "how to read this",
        f'{_MARK} in a text: here the two answers part, before it they are the same. "\\n" is a line break; other '
        "characters that show nothing are written in this way too.",
        "The tables: what each engine found most probable as the next token, where the tokens part. Text, id, "
        f"probability, and its logarithm in nats; {_MARK} is the token it took.",
        "Rounding noise (sigma): how far rounding alone moves the odds between two tokens. Where two tokens are about "
        "equally probable it decides which one is taken, and no engine is wrong.",
    ]
    return [lines[0], *(part for line in lines[1:] for part in _folded(line, width, f"{_INDENT}- "))]


def _prompt(difference: PromptDifference, width: int, *, whole: bool) -> list[str]:
    lines = [_rule(difference, width)]
    lines += _question(difference.prompt, width, whole=whole)
    lines += _folded(f"why: {meaning(difference)}", width, _INDENT, hang=5)
    if difference.kl_nats is not None:
        apart = f"scores: on the reference's tokens the engines are {difference.kl_nats:.2g} nats a token apart"
        lines += _folded(f"{apart} (KL divergence)", width, _INDENT, hang=8)
    lines.append("")
    sides = (difference.reference, difference.candidate)
    column = (width - len(_INDENT) - len(_BETWEEN)) // 2
    names = ("reference", "candidate")
    heads = [
        f"{name}: {answer.tokens} token{'s' * (answer.tokens != 1)}, {_ENDS[answer.finish_reason]}"
        for name, answer in zip(names, sides, strict=True)
    ]
    part = difference.reference.text != difference.candidate.text
    bodies = [_text(answer, column, part=part, whole=whole) for answer in sides]
    lines += _columns([list(_wrapped(head, column)) for head in heads], column)
    lines += _columns([["─" * column]] * 2, column, "─┼─")
    lines += _columns(bodies, column)
    if difference.position is not None:
        lines += [*_columns([[], []], column), *_columns([_table(answer, column) for answer in sides], column)]
    return lines


def _rule(difference: PromptDifference, width: int) -> str:
    shared = difference.position
    if shared is None:
        where = "all tokens are the same"
    elif shared == 0:
        where = "the first token differs"
    else:
        where = f"the first {'token is' if shared == 1 else f'{shared} tokens are'} the same"
    head = f"── {visible(difference.id)}: {where} "
    return set_cell_size(head + "─" * max(0, width - cell_len(head)), width)


def _text(answer: Answer, column: int, *, part: bool, whole: bool) -> list[str]:
    """The answer from a little before the place where the texts part, if they do, with the mark."""
    start = 0 if whole else _start(answer)
    before, after = answer.text[start : answer.common], answer.text[answer.common :]
    shown = f"{'…' * (start > 0)}{_broken(before)}"
    shown += f"{_MARK}{_broken(after) or ' (ends here)'}" if part else ""
    lines = [line for part in shown.split("\n") for line in _wrapped(part, column)]
    if whole or len(lines) <= _LINES:
        return lines
    return [*lines[: _LINES - 1], "… (--prompt ID shows the rest)"]


def _start(answer: Answer) -> int:
    """Where to begin: at a word, if one begins within reach."""
    start = max(0, answer.common - _BEFORE)
    space = answer.text.find(" ", start, answer.common)
    return space + 1 if start and space >= 0 else start


def _broken(text: str) -> str:
    """Control characters visible; a line break is shown and made."""
    return "\\n\n".join(visible(line) for line in text.split("\n"))


def _table(answer: Answer, column: int) -> list[str]:
    if answer.chosen is None:
        return ["(the answer had ended before this token)"]
    rows = [_row(choice, choice.token_id == answer.chosen.token_id, column) for choice in answer.top[:_TOP]]
    if answer.chosen.token_id not in {choice.token_id for choice in answer.top[:_TOP]}:
        rows.append(_row(answer.chosen, True, column))
    head = set_cell_size("  next token", column - _NUMBERS) + f"{'id':>7}{'prob.':>8}{'log':>8}"
    return [head, *rows]


def _row(choice: Choice, took: bool, column: int) -> str:
    name = "?" if choice.text is None else f'"{visible(choice.text)}"'
    room = column - _NUMBERS - 2
    if cell_len(name) > room:
        name = set_cell_size(name, room - 1) + "…"
    head = set_cell_size(f"{_MARK if took else ' '} {name}", column - _NUMBERS)
    if math.isnan(choice.logprob_nats):
        return f"{head}{choice.token_id:>7}{'?':>8}{'?':>8}"
    percent = 100 * math.exp(min(choice.logprob_nats, 0.0))
    shown = f"{percent:.1f} %" if percent >= 0.05 else "<0.1 %"
    return f"{head}{choice.token_id:>7}{shown:>8}{choice.logprob_nats:>8.3f}"


def _columns(sides: Sequence[Sequence[str]], column: int, between: str = _BETWEEN) -> list[str]:
    left, right = sides
    return [
        f"{_INDENT}{set_cell_size(ours, column)}{between}{theirs}".rstrip()
        for ours, theirs in (zip_longest(left, right, fillvalue="") if left or right else [("", "")])
    ]


def _question(prompt: str, width: int, *, whole: bool) -> list[str]:
    """The prompt; of a long one the end, which says most about the answer."""
    head = f"{_INDENT}prompt: "
    room = width - len(head)
    if whole:
        lines = [line for part in _broken(prompt).split("\n") for line in _wrapped(part, room)]
        return [f"{head if number == 0 else ' ' * len(head)}{line}".rstrip() for number, line in enumerate(lines)]
    shown = visible(prompt[-room:])
    if len(prompt) > room or cell_len(shown) > room:
        while cell_len(shown) > room - 1:
            shown = shown[1:]
        shown = f"…{shown}"
    return [f"{head}{shown}"]


def _folded(text: str, width: int, indent: str = "", *, hang: int = 0) -> list[str]:
    """Our own sentences, wrapped at words."""
    after = " " * (len(indent) + hang)
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=after, break_on_hyphens=False, break_long_words=False
    )
    return [part for line in lines for part in _wrapped(line, width)]


def _wrapped(text: str, width: int) -> Iterator[str]:
    """A model's text in lines of at most `width` cells and a space, broken after spaces where there are any."""
    while cell_len(text) > width:
        end = _fitting(text, width)
        space = text.rfind(" ", 0, end) + 1
        if text[end] == " ":
            end += 1
        elif space:
            end = space
        yield text[:end]
        text = text[end:]
    yield text


def _fitting(text: str, width: int) -> int:
    """How many characters fit into `width` cells; at least one."""
    end = min(len(text), width)
    while end > 1 and cell_len(text[:end]) > width:
        end -= 1
    # What takes no cells belongs to the character before it.
    while end < len(text) and cell_len(text[: end + 1]) <= width:
        end += 1
    return end
