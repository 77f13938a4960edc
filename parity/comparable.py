"""May these two recordings be compared at all, and if not, where do they part?

Pure. A comparison of answers to different questions would be worse than none, so every check but `inputs`, whose job
is to explain the difference, is asked only after this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from parity.errors import IncomparableError
from parity.recording import Recording

MODEL = ("model.weights_sha256", "tokenizer.sha256", "chat_template.sha256")
"""Facts that a golden and whatever is held against it must share, for checks of what a model answers."""
_IDS_SHOWN = 8


def require_same_facts(golden: Recording, candidate: Recording, names: Sequence[str]) -> None:
    """Refuse to hold a candidate against a golden of something else; a fact that a side does not know is no difference.

    Raises:
        IncomparableError: If the question or a named fact differs; it says both values.
    """
    if golden.workload.digest != candidate.workload.digest and candidate.workload.forced_from is None:
        raise IncomparableError(
            f"the golden was accepted on another workload, {workload_detail(golden, candidate)}; accept a new one"
        )
    ours = {**golden.fingerprint.identity, **golden.fingerprint.context}
    theirs = {**candidate.fingerprint.identity, **candidate.fingerprint.context}
    for name in names:
        left, right = ours.get(name), theirs.get(name)
        if left is not None and right is not None and left != right:
            raise IncomparableError(
                f"the golden and {candidate.label} differ in {name}: {_short(left)} and {_short(right)}; a golden of "
                "something else judges nothing: accept a new one, or bring back what it was accepted with"
            )


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else repr(value)


def require_same_inputs(reference: Recording, candidate: Recording) -> None:
    """Refuse a comparison whose two sides did not answer the same question; every other check calls this first.

    Raises:
        IncomparableError: If the sets of prompts, the received token ids or the workload digests differ.
    """
    for prompt_id in in_order(reference, candidate):
        left, right = reference.by_id.get(prompt_id), candidate.by_id.get(prompt_id)
        if left is None or right is None:
            raise IncomparableError(
                f"prompt {prompt_id!r} is answered only by the {'reference' if left else 'candidate'} "
                f"(reference {len(reference.by_id)} answers, candidate {len(candidate.by_id)}); "
                "record both sides from the same workload"
            )
        if left.prompt_token_ids != right.prompt_token_ids:
            raise IncomparableError(
                f"prompt {prompt_id!r} reached the engines as different token ids, "
                f"{token_detail(left.prompt_token_ids, right.prompt_token_ids)}; "
                "record the candidate with the reference's prompt token ids, and run the inputs check for the cause"
            )
    if reference.workload.digest != candidate.workload.digest:
        first = next(iter(reference.workload.request_ids), None)
        raise IncomparableError(
            f"the workloads differ from prompt {first!r} on, {workload_detail(reference, candidate)}; "
            "record both sides from the same workload"
        )


def in_order(reference: Recording, candidate: Recording) -> list[str]:
    """All prompt ids in the order of asking: answers arrive in any order, and a verdict must not depend on it."""
    asked = [*reference.workload.request_ids, *candidate.workload.request_ids]
    answered = set(reference.by_id) | set(candidate.by_id)
    return list(dict.fromkeys([*(i for i in asked if i in answered), *sorted(answered.difference(asked))]))


def workload_detail(reference: Recording, candidate: Recording) -> str:
    """Which parts of the two questions differ, in words."""
    left, right = reference.workload, candidate.workload
    ours, theirs = asdict(left.sampling), asdict(right.sampling)
    changed = [f"sampling.{k} {ours[k]!r} vs {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
    if left.forced_from != right.forced_from:
        changed.append(f"forced_from {left.forced_from!r} vs {right.forced_from!r}")
    names = f"reference {left.name!r} ({left.digest[:8]}), candidate {right.name!r} ({right.digest[:8]})"
    return f"{names}: {', '.join(changed)}" if changed else names


def token_detail(left: Sequence[int], right: Sequence[int]) -> str:
    """Where two lists of token ids part, with a few ids around the place."""
    at = first_difference(left, right)
    return f"at token {at}: reference {_ids_around(left, at)} candidate {_ids_around(right, at)}"


def first_difference(left: Sequence[object], right: Sequence[object]) -> int:
    """The index of the first difference; the end of the shorter where one begins the other."""
    # Where one side is the beginning of the other, its end is the first difference: nothing is cut off unseen.
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _ids_around(ids: Sequence[int], at: int) -> str:
    start = max(0, at - 2)
    shown = [str(i) for i in ids[start : start + _IDS_SHOWN]]
    before, after = ["…"] * (start > 0), ["…"] * (start + _IDS_SHOWN < len(ids))
    return f"[{', '.join([*before, *shown, *after])}]"
