"""Did both engines work on the same prompt token ids, and would each have made them itself?

Comes first in every suite: what looks like a numerical divergence is most often another chat template or another BOS.
Has no tokenizer, only what the engines reported: rendered prompts and token ids. So it names a cause only where these
prove it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from parity.comparable import MODEL, first_difference, in_order, token_detail, workload_detail
from parity.fingerprint import Difference, Scalar, differences
from parity.noise import Noise
from parity.recording import Completion, Recording
from parity.verdict import Finding, Outcome, Verdict, worst

REQUIRES = MODEL
"""Nothing: naming the difference is what this check is for."""

_WITNESSES = 5
_CONTEXT_BEFORE, _CONTEXT_AFTER = 15, 30  # characters: enough to recognise a template, short enough for one line
_CORROBORATING = ("chat_template.sha256", "tokenizer.sha256")
_CHANGED_PREFIXES = ("tokenizer", "chat_template", *(f"model.config.{name}_token_id" for name in ("bos", "eos", "pad")))

# ChatML, Llama 3, Phi, Gemma, Llama 2, Mistral.
_ROLE = r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)\s*{0}\b|<\|{0}\|>|{1}"
_ANY_ROLE = _ROLE.format(r"\w+", r"\[INST\]|<<SYS>>|\[SYSTEM_PROMPT\]")
_SYSTEM = re.compile(_ROLE.format("system", r"<<SYS>>|\[SYSTEM_PROMPT\]"))
_SYSTEM_SECTION = re.compile(rf"(?:{_SYSTEM.pattern}).*?(?={_ANY_ROLE}|\Z)", re.DOTALL)
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the check asks of its data.

    min_prompts: fewer prompts that can be compared are inconclusive, unless one of them differs: a difference in
        token ids is a fact and needs no sample. Chosen: 1, because equality has no noise.
    """

    min_prompts: int = 1


class Cause(Enum):
    """Why two engines make different token ids of one prompt; the value reads on with "on 3 of 9 prompts"."""

    BOS_DOUBLED = "BOS doubled by the candidate"
    BOS_DOUBLED_BY_REFERENCE = "BOS doubled by the reference"
    BOS_MISSING = "BOS missing in the candidate"
    BOS_ADDED = "BOS added by the candidate"
    SYSTEM_PROMPT_INJECTED = "system prompt injected by the candidate"
    SYSTEM_PROMPT_MISSING = "system prompt missing in the candidate"
    SYSTEM_PROMPT_DIFFERS = "system prompt differs"
    CHAT_TEMPLATE = "chat template differs"
    WHITESPACE = "whitespace of the rendered prompt differs"
    SPECIAL_TOKENS_AS_TEXT = "special tokens taken for plain text by the candidate"
    SPECIAL_TOKENS_AS_TEXT_BY_REFERENCE = "special tokens taken for plain text by the reference"
    TOKENIZER = "tokenizer splits the same text differently"
    UNEXPLAINED = "token ids differ without a rendered prompt to tell why"


def check(reference: Recording, candidate: Recording, *, noise: Noise | None, limits: Limits) -> Verdict:  # noqa: ARG001
    """Compare what the engines received, then what each would have made of the prompts itself; noise plays no part."""
    asked = in_order(reference, candidate)
    pairs = [(reference.by_id[i], candidate.by_id[i]) for i in asked if i in reference.by_id and i in candidate.by_id]
    known = [(r, c) for r, c in pairs if r.own_prompt_token_ids is not None and c.own_prompt_token_ids is not None]
    identities = reference.fingerprint.identity, candidate.fingerprint.identity
    bos_token_id = _bos_token_id(identities, known)
    mismatches = [
        _mismatch(r, c, bos_token_id=bos_token_id) for r, c in known if r.own_prompt_token_ids != c.own_prompt_token_ids
    ]
    changed = tuple(d for d in differences(*identities) if d.name.startswith(_CHANGED_PREFIXES))
    causes = _causes(mismatches, compared=len(known), changed=changed, identities=identities)
    findings = (
        _received_finding(asked, reference, candidate, limits),
        _own_finding(mismatches, len(known), len(pairs), limits),
    )
    outcome = worst([f.outcome for f in findings])
    return Verdict(
        check="inputs",
        reference=reference.label,
        candidate=candidate.label,
        outcome=outcome,
        headline=_headline(outcome, findings, causes),
        findings=findings,
        causes=causes,
        changed=changed,
        warnings=_warnings(reference, candidate, pairs),
    )


def explain(reference: Completion, candidate: Completion, *, bos_token_id: int | None) -> Cause:
    """Say why the own token ids of one prompt differ; with an unknown BOS, one extra id in front is taken for it.

    Raises:
        ValueError: If there is nothing to explain: own ids are unknown or equal.
    """
    left, right = reference.own_prompt_token_ids, candidate.own_prompt_token_ids
    if left is None or right is None or left == right:
        raise ValueError(f"prompt {reference.id!r} has no differing own token ids")
    if (cause := _bos_cause(left, right, bos_token_id)) is not None:
        return cause
    if reference.prompt_text is None or candidate.prompt_text is None:
        return Cause.UNEXPLAINED
    if reference.prompt_text != candidate.prompt_text:
        return _text_cause(reference.prompt_text, candidate.prompt_text)
    if _spells_out(parsed=left, spelled=right, text=reference.prompt_text):
        return Cause.SPECIAL_TOKENS_AS_TEXT
    if _spells_out(parsed=right, spelled=left, text=reference.prompt_text):
        return Cause.SPECIAL_TOKENS_AS_TEXT_BY_REFERENCE
    return Cause.TOKENIZER


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mismatch:
    """One prompt whose own token ids differ; `detail` says where and shows both sides."""

    id: str
    cause: Cause
    detail: str


def _mismatch(reference: Completion, candidate: Completion, *, bos_token_id: int | None) -> _Mismatch:
    cause = explain(reference, candidate, bos_token_id=bos_token_id)
    left, right = reference.prompt_text, candidate.prompt_text
    if left is not None and right is not None and left != right:
        detail = _text_detail(left, right)
    else:
        detail = token_detail(reference.own_prompt_token_ids or (), candidate.own_prompt_token_ids or ())
    return _Mismatch(id=reference.id, cause=cause, detail=detail)


def _bos_token_id(
    identities: tuple[Mapping[str, Scalar], ...], known: Sequence[tuple[Completion, Completion]]
) -> int | None:
    """BOS as the model's configuration names it, or else the id that begins every prompt of one side."""
    for identity in identities:
        configured = identity.get("model.config.bos_token_id")
        if isinstance(configured, int):
            return configured
    for side in zip(*known, strict=True):
        first_ids = {(c.own_prompt_token_ids or (None,))[0] for c in side}
        if len(first_ids) == 1:
            return first_ids.pop()
    return None


def _bos_cause(left: tuple[int, ...], right: tuple[int, ...], bos_token_id: int | None) -> Cause | None:
    if bos_token_id is None:
        longer, shorter = (left, right) if len(left) > len(right) else (right, left)
        if longer[1:] != shorter:
            return None
        bos_token_id = longer[0]
    before, after = _leading(left, bos_token_id), _leading(right, bos_token_id)
    if left[before:] != right[after:]:
        return None
    if after > before:
        return Cause.BOS_DOUBLED if after > 1 else Cause.BOS_ADDED
    return Cause.BOS_DOUBLED_BY_REFERENCE if after else Cause.BOS_MISSING


def _leading(ids: tuple[int, ...], token_id: int) -> int:
    return next((i for i, found in enumerate(ids) if found != token_id), len(ids))


def _text_cause(left: str, right: str) -> Cause:
    """Tell apart what a template wrote; the order matters, an injected system prompt also changes whitespace."""
    more = len(_SYSTEM.findall(right)) - len(_SYSTEM.findall(left))
    if more:
        return Cause.SYSTEM_PROMPT_INJECTED if more > 0 else Cause.SYSTEM_PROMPT_MISSING
    if "".join(left.split()) == "".join(right.split()):
        return Cause.WHITESPACE
    if _SYSTEM_SECTION.sub("", left) == _SYSTEM_SECTION.sub("", right):
        return Cause.SYSTEM_PROMPT_DIFFERS
    return Cause.CHAT_TEMPLATE


def _spells_out(*, parsed: tuple[int, ...], spelled: tuple[int, ...], text: str) -> bool:
    """Whether `spelled` writes in several tokens what `parsed` has as one special token.

    Provable without a vocabulary only where the text begins with a special token: then its id is the first that
    differs, occurs as often as its name does, never on the other side, and costs at least two more tokens there. That
    the other tokens are mostly shared excludes two unrelated vocabularies.
    """
    name = _SPECIAL.match(text)
    at = first_difference(parsed, spelled)
    if name is None or at > 1 or at >= len(parsed):  # position 1: behind a BOS that the tokenizer put in front
        return False
    special, count = parsed[at], text.count(name[0])
    others = [i for i in parsed if i != special]
    shared = (Counter(others) & Counter(spelled)).total()
    return (
        parsed.count(special) == count
        and special not in spelled
        and len(spelled) >= len(parsed) + 2 * count
        and 2 * shared >= len(others)
    )


def _causes(
    mismatches: Sequence[_Mismatch],
    *,
    compared: int,
    changed: Sequence[Difference],
    identities: tuple[Mapping[str, Scalar], ...],
) -> tuple[str, ...]:
    """One sentence for each cause, the most frequent first."""
    # An absent hash means "not known" (a server), a hash of None "the model has none"; only the latter is a difference.
    hashes = [d for d in changed if d.name in _CORROBORATING and all(d.name in identity for identity in identities)]
    corroboration = "".join(f"; {d.name} differs too ({d.reference!s:.8} vs {d.candidate!s:.8})" for d in hashes)
    firsts = {m.cause: m for m in reversed(mismatches)}
    return tuple(
        f"{cause.value} on {_prompts(count, of=compared)}, "
        f"first on {firsts[cause].id} {firsts[cause].detail}{corroboration}"
        for cause, count in Counter(m.cause for m in mismatches).most_common()
    )


def _received_finding(asked: Sequence[str], reference: Recording, candidate: Recording, limits: Limits) -> Finding:
    witnesses, compared = [], 0
    for prompt_id in asked:
        left, right = reference.by_id.get(prompt_id), candidate.by_id.get(prompt_id)
        if left is None or right is None:
            witnesses.append(f"{prompt_id}: answered only by the {'reference' if left else 'candidate'}")
            continue
        compared += 1
        if left.prompt_token_ids != right.prompt_token_ids:
            witnesses.append(f"{prompt_id}: {token_detail(left.prompt_token_ids, right.prompt_token_ids)}")
    if witnesses:
        sentence = (
            f"the engines did not work on the same token ids on {_prompts(len(witnesses), of=len(asked))}, "
            f"first {witnesses[0]}"
        )
    elif not compared:
        sentence = "neither engine answered a prompt, so no inputs can be compared"
    else:
        sentence = f"the engines worked on the same token ids on {_prompts(compared, of=len(asked))}"
    return _finding("received_token_ids", sentence, witnesses, differing=len(witnesses), n=compared, limits=limits)


def _own_finding(mismatches: Sequence[_Mismatch], compared: int, answered: int, limits: Limits) -> Finding:
    if mismatches:
        sentence = (
            "the engines' own tokenizers and chat templates make different token ids of "
            f"{_prompts(len(mismatches), of=compared)}"
        )
    elif not compared:
        sentence = (
            f"no prompt of {answered} has own token ids on both sides to compare: "
            "they were given as token ids, teacher forced, or the engine does not tell"
        )
    else:
        sentence = (
            "the engines' own tokenizers and chat templates make the same token ids of "
            f"{_prompts(compared, of=answered)}"
        )
    ordered = _each_cause_once_first(mismatches)
    witnesses = [f"{m.id}: {m.cause.value} {m.detail}" for m in ordered]
    return _finding("own_token_ids", sentence, witnesses, differing=len(mismatches), n=compared, limits=limits)


def _finding(
    metric: str, sentence: str, witnesses: Sequence[str], *, differing: int, n: int, limits: Limits
) -> Finding:
    if differing:
        outcome = Outcome.FAIL
    elif n == 0 or n < limits.min_prompts:
        outcome = Outcome.INCONCLUSIVE
        if n:
            sentence += f", fewer than the {limits.min_prompts} asked for"
    else:
        outcome = Outcome.PASS
    return Finding(
        metric=metric,
        outcome=outcome,
        sentence=sentence,
        unit="prompts",
        reference=None,
        candidate=None,
        delta=float(differing),
        interval=None,
        limit=f"equal on every prompt, at least {limits.min_prompts}; chosen: equality has no noise",
        n=n,
        evidence=tuple(witnesses[:_WITNESSES]),
    )


def _headline(outcome: Outcome, findings: Sequence[Finding], causes: Sequence[str]) -> str:
    if outcome is Outcome.PASS:
        return "; ".join(f.sentence for f in findings)
    if outcome is Outcome.FAIL and causes:
        return causes[0]
    return next(f.sentence for f in findings if f.outcome is outcome)


def _warnings(
    reference: Recording, candidate: Recording, pairs: Sequence[tuple[Completion, Completion]]
) -> tuple[str, ...]:
    found = []
    if reference.workload.digest != candidate.workload.digest:
        detail = workload_detail(reference, candidate)
        found.append(f"the recordings answer different workloads, {detail}: prompts themselves may differ")
    one_sided = [r.id for r, c in pairs if (r.own_prompt_token_ids is None) != (c.own_prompt_token_ids is None)]
    if one_sided:
        found.append(
            f"own token ids of {_prompts(len(one_sided), of=len(pairs))} are known on one side only and were "
            f"not compared, first {one_sided[0]}"
        )
    return tuple(found)


def _each_cause_once_first(mismatches: Sequence[_Mismatch]) -> list[_Mismatch]:
    frequency = Counter(m.cause for m in mismatches)
    firsts = {m.cause: m for m in reversed(mismatches)}
    return sorted(mismatches, key=lambda m: (m is not firsts[m.cause], -frequency[m.cause]))


def _text_detail(left: str, right: str) -> str:
    at = first_difference(left, right)
    return f"at character {at}: reference {_text_around(left, at)} candidate {_text_around(right, at)}"


def _text_around(text: str, at: int) -> str:
    start, end = max(0, at - _CONTEXT_BEFORE), at + _CONTEXT_AFTER
    return repr(f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}")


def _prompts(count: int, *, of: int) -> str:
    return f"{count} of {of} prompt{'' if of == 1 else 's'}"
