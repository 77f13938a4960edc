"""One comparison as Markdown, for a CI step summary: the decision first, what was measured, then details to unfold.

Whatever a model wrote stays text: in sentences every character with a meaning in Markdown or HTML is written as an
entity, in blocks the fence is longer than any run of backticks. Block after block is laid down until the size is used
up, each complete in itself, so that what is cut is still valid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from parity.differences import Answer, Choice, PromptDifference, meaning, most_telling_first, tally, visible
from parity.fingerprint import Difference
from parity.recording import FinishReason
from parity.recovery import Row
from parity.summary import Summary
from parity.verdict import Finding, Outcome, Verdict

_ENTITIES = {ord(c): f"&#{ord(c)};" for c in "&<>`*_[]|\\~@#!${}"}
# What would open a list, a heading or a quotation at the beginning of a line.
_OPENING = re.compile(r"([-+=])|(\d+)([.)])(?=\s|$)")
_SHOWN_FACTS = 12
_LONGEST_SENTENCE = 2000
_LONGEST_VALUE = 80
_LONGEST_PROMPT = 2000
_BEFORE, _AFTER = 1000, 3000
_TOP = 5
_MARK = "►"
_ENDS = {
    FinishReason.STOP: "ended by itself",
    FinishReason.LENGTH: "ended by a length limit",
    FinishReason.ABORT: "aborted by the engine",
}
_KEPT = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
"""What texts in blocks are shown with as it is: they make lines, and emoji and letters of several scripts."""


def render(summary: Summary, *, most_bytes: int = 900_000) -> str:
    """The whole report in at most `most_bytes` bytes of UTF-8; a line says what was left out.

    GitHub shows up to 1 MiB a step.
    """
    blocks = [*_heads(summary), *_details(summary)]
    if sum(map(_size, blocks)) <= most_bytes:
        return "".join(blocks)
    # No other note is longer than the one that leaves out everything; the decision stays, cut where it must be.
    kept = max(1, _fitting(blocks, most_bytes - _size(_note(len(blocks), len(blocks)))))
    text = "".join(blocks[:kept]) + _note(len(blocks) - kept, len(blocks))
    return text.encode()[:most_bytes].decode(errors="ignore")


def _note(left: int, total: int) -> str:
    return (
        f"_Left out, because such a page has a limit of size: the last {left} of {total} parts. The HTML report of the "
        "same run has them all._\n"
    )


def _fitting(blocks: Sequence[str], most_bytes: int) -> int:
    """How many blocks from the first on fit."""
    used = 0
    for number, block in enumerate(blocks):
        used += _size(block)
        if used > most_bytes:
            return number
    return len(blocks)


def _size(text: str) -> int:
    return len(text.encode())


def _heads(summary: Summary) -> Iterator[str]:
    decision = summary.decision
    yield f"## {decision.advice.value}: {_inline(decision.sentence)}\n\n"
    yield f"{_inline(summary.title)}, {_inline(summary.created_at)}\n\n"
    if decision.evidence:
        yield _list(decision.evidence)
    if summary.diagnosis is not None:
        found = summary.diagnosis
        yield f"**Cause ({_inline(found.confidence.value)}):** {_inline(found.sentence)}\n\n"
        if found.evidence:
            yield _list(found.evidence)
    sides = (("reference", summary.reference), ("candidate", summary.candidate))
    yield _table(("side", "engine", "recorded"), [(name, side.label, side.created_at) for name, side in sides])
    if summary.verdicts:
        yield _table(("outcome", "check", "result"), [(v.outcome.value, v.check, v.headline) for v in summary.verdicts])
    if (recovery := summary.recovery) is not None:
        yield "**Accuracy kept:**\n\n"
        yield _table(
            ("task", "documents", "reference", "candidate", "recovery", f"{recovery.confidence:.0%} interval", "lost",
             "won"),
            [_kept(row) for row in recovery.rows],
        )  # fmt: skip
        if (moved := recovery.moved) is not None:
            yield f"{_inline(moved.sentence)}\n\n"
    yield f"**Answers:** {_inline(tally(summary.prompts))}\n\n"
    yield from _changes("package", summary.packages)
    yield from _changes("recorded fact", summary.facts)
    if summary.reproduce:
        yield "To reproduce:\n\n" + _fenced("\n".join(summary.reproduce), "sh")


def _kept(row: Row) -> tuple[str, ...]:
    between = "" if row.interval is None else f"{row.interval[0]:.1%} to {row.interval[1]:.1%}"
    recovery = "" if row.recovery is None else f"{row.recovery:.2%}"
    shares = f"{row.reference:.4f}", f"{row.candidate:.4f}"
    return (row.name, str(row.n), *shares, recovery, between, str(row.lost), str(row.won))


def _changes(what: str, found: Sequence[Difference]) -> Iterator[str]:
    """What both sides have and is not the same; unfolded, what only one side has: another engine brings a hundred."""
    both = [d for d in found if d.reference is not None and d.candidate is not None]
    one = [d for d in found if d.reference is None or d.candidate is None]
    if both:
        yield f"**What changed:** {_count(len(both), what)}\n\n"
        yield _table(("name", "reference", "candidate"), _rows(both[:_SHOWN_FACTS]))
    for title, rest in (("more that changed", both[_SHOWN_FACTS:]), ("on one side only", one)):
        if rest:
            table = _table(("name", "reference", "candidate"), _rows(rest))
            yield _unfolded(f"{_count(len(rest), what)} {title}", table)


def _rows(found: Sequence[Difference]) -> list[tuple[str, str, str]]:
    return [(d.name, _value(d.reference), _value(d.candidate)) for d in found]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _value(value: object) -> str:
    return "none" if value is None else _short(str(value), _LONGEST_VALUE)


def _details(summary: Summary) -> Iterator[str]:
    """What did not pass first, since the end is what is cut."""
    for wanted in (Outcome.FAIL, Outcome.INCONCLUSIVE):
        for verdict in summary.verdicts:
            if verdict.outcome is wanted:
                yield _unfolded(f"{verdict.outcome.value} {verdict.check}: {verdict.headline}", _verdict(verdict))
    for difference in most_telling_first(summary.prompts):
        yield _unfolded(f"{difference.id}: {meaning(difference)}", _prompt(difference))


def _verdict(verdict: Verdict) -> str:
    lines = [f"- probable cause: {_inline(cause)}\n" for cause in verdict.causes]
    for finding in verdict.findings:
        lines += _finding(finding)
    lines += [f"- judged by: {_inline(ground)}\n" for ground in verdict.basis]
    lines += [f"- warning: {_inline(warning)}\n" for warning in verdict.warnings]
    return "".join(lines) + "\n"


def _finding(finding: Finding) -> list[str]:
    lines = [f"- {finding.outcome.value} **{_inline(finding.metric)}**: {_inline(finding.sentence)}\n"]
    if finding.outcome is not Outcome.PASS:
        lines.append(f"  - limit: {_inline(finding.limit)}\n")
    return [*lines, *(f"  - {_inline(witness)}\n" for witness in finding.evidence)]


def _prompt(difference: PromptDifference) -> str:
    parts = [f"Prompt:\n\n{_fenced(_tail(difference.prompt))}"]
    part = difference.reference.text != difference.candidate.text
    where = f"; {_MARK} is the place where the two texts part" if part else ""
    for name, answer in (("Reference", difference.reference), ("Candidate", difference.candidate)):
        parts.append(
            f"{name}, {_count(answer.tokens, 'token')}, {_ENDS[answer.finish_reason]}{where}:\n\n"
            f"{_fenced(_around(answer, _MARK if part else ''))}"
        )
    if difference.position is not None:
        shared = difference.position
        after = f" after the {_count(shared, 'token')} that both share" if shared else ""
        parts.append(f"Most probable as the next token{after}; {_MARK} is the one taken:\n\n{_choices(difference)}")
    return "".join(parts)


def _tail(prompt: str) -> str:
    left = len(prompt) - _LONGEST_PROMPT
    return prompt if left <= 0 else f"[{_count(left, 'character')} before]\n{prompt[left:]}"


def _around(answer: Answer, mark: str) -> str:
    """The text with the mark; of a very long one what lies around it."""
    start, stop = max(0, answer.common - _BEFORE), answer.common + _AFTER
    after = len(answer.text) - stop
    return (
        (f"[{_count(start, 'character')} before]\n" if start else "")
        + f"{answer.text[start : answer.common]}{mark}{answer.text[answer.common : stop]}"
        + (f"\n[{_count(after, 'character')} after]" if after > 0 else "")
    )


def _choices(difference: PromptDifference) -> str:
    sides = (difference.reference, difference.candidate)
    columns = [_column(answer) for answer in sides]
    count = max(map(len, columns))
    rows = [(*left, *right) for left, right in zip(*(_padded(c, count) for c in columns), strict=True)]
    return _table(("reference", "id", "probability", "candidate", "id", "probability"), rows)


def _column(answer: Answer) -> list[tuple[str, str, str]]:
    if answer.chosen is None:
        return [("(had ended)", "", "")]
    own, top = answer.chosen.token_id, list(answer.top[:_TOP])
    if own not in {choice.token_id for choice in top}:
        top.append(answer.chosen)
    return [_cells(choice, took=choice.token_id == own) for choice in top]


def _cells(choice: Choice, *, took: bool) -> tuple[str, str, str]:
    name = "?" if choice.text is None else f'"{choice.text}"'
    logprob = choice.logprob_nats
    chance = "?" if math.isnan(logprob) else f"{100 * math.exp(min(logprob, 0.0)):.2f} % ({logprob:.3f} nats)"
    return f"{f'{_MARK} ' * took}{name}", str(choice.token_id), chance


def _padded(column: list[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    return column + [("", "", "")] * (count - len(column))


def _unfolded(title: str, body: str) -> str:
    """A block that opens on a click. The blank line ends the HTML and begins Markdown."""
    return f"<details><summary>{_inline(title)}</summary>\n\n{body}</details>\n\n"


def _list(sentences: Sequence[str]) -> str:
    return "".join(f"- {_inline(sentence)}\n" for sentence in sentences) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_inline(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _fenced(text: str, language: str = "text") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text, keep=_KEPT)}\n{fence}\n\n"


def _inline(text: str) -> str:
    """One line of plain text wherever Markdown or HTML stands around it."""
    shown = visible(_short(text, _LONGEST_SENTENCE)).strip().translate(_ENTITIES)
    if opening := _OPENING.match(shown):
        mark, number, point = opening.groups()
        shown = f"{number or ''}&#{ord(mark or point)};{shown[opening.end() :]}"
    return shown


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
