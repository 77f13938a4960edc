"""Does the candidate read another prompt than it was sent? Asked of the reference, once numbers disagree.

A server that drops or doubles the first token of a prompt reports the ids that it was sent, so nothing recorded
differs; only the numbers do. So the reference scores the same tokens behind prompts that are changed in each way that
is known from practice. If the candidate's scores agree with one of these and not with the plain ones, that is what
happens to its prompts: the agreement of thousands of numbers is no accident. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

import numpy as np

from parity import lockstep
from parity.errors import IncomparableError
from parity.lockstep import Steps
from parity.prompts import Workload
from parity.recording import Recording

_CLOSER = 4.0
"""The candidate must be so many times closer to the changed prompt than to the plain one. Faults of the first token
measured 10 to 30 times the floor on SmolLM2-135M, and the right hypothesis 1."""
_AGREE = 0.9
"""Of the prompts, so many must be closer to the changed one."""
_MIN_PROMPTS = 8


class Hypothesis(Enum):
    """What may happen to a prompt on its way in; the value is a sentence for people."""

    FIRST_DROPPED = "the prompt loses its first token on its way into the candidate (BOS missing)"
    FIRST_DOUBLED = "the prompt gets its first token twice on its way into the candidate (BOS doubled)"
    LAST_DROPPED = "the prompt loses its last token on its way into the candidate"
    CUT_TO_512 = "the prompt is cut to its last 512 tokens on its way into the candidate"
    CUT_TO_128 = "the prompt is cut to its last 128 tokens on its way into the candidate"
    CUT_TO_32 = "the prompt is cut to its last 32 tokens on its way into the candidate"

    @property
    def role(self) -> str:
        """The role of the recording that tests it."""
        return f"hypothesis-{self.name.lower().replace('_', '-')}"


_Ids: TypeAlias = "tuple[int, ...]"
_CHANGES: Mapping[Hypothesis, Callable[[_Ids], _Ids]] = {
    Hypothesis.FIRST_DROPPED: lambda ids: ids[1:],
    Hypothesis.FIRST_DOUBLED: lambda ids: ids[:1] + ids,
    Hypothesis.LAST_DROPPED: lambda ids: ids[:-1],
    Hypothesis.CUT_TO_512: lambda ids: ids[-512:],
    Hypothesis.CUT_TO_128: lambda ids: ids[-128:],
    Hypothesis.CUT_TO_32: lambda ids: ids[-32:],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """How far the numbers speak for a hypothesis.

    plain_nats, changed_nats: KL divergence a token between the candidate and the reference, behind the prompts as they
        were sent and behind the changed ones. prompts: how many the change touches at all; closer: on how many of them
        the candidate is closer to the changed prompt.
    """

    hypothesis: Hypothesis
    plain_nats: float
    changed_nats: float
    prompts: int
    closer: int

    @property
    def convinces(self) -> bool:
        """Whether nothing but the hypothesis explains the agreement."""
        enough = self.prompts >= _MIN_PROMPTS and self.closer >= _AGREE * self.prompts
        return enough and self.plain_nats > _CLOSER * self.changed_nats

    @property
    def sentence(self) -> str:
        """The numbers, for people."""
        return (
            f"behind the prompts changed in that way the reference's scores are {self.changed_nats:.2g} nats a token "
            f"from the candidate's, behind the prompts that were sent {self.plain_nats:.2g}; closer on {self.closer} "
            f"of {self.prompts} prompts that the change touches"
        )


def workloads(scored: Workload) -> dict[str, Workload]:
    """By role: the teacher-forced workload behind changed prompts, those left out that a change does not touch."""
    found = {}
    for hypothesis, change in _CHANGES.items():
        touched = []
        for request in scored.requests:
            sent = request.prompt_token_ids or ()
            ids = change(sent)
            if ids and ids != sent:
                touched.append(replace(request, prompt_token_ids=ids))
        if touched:
            found[hypothesis.role] = replace(scored, name=hypothesis.role, requests=tuple(touched))
    return found


def supports(recordings: Mapping[str, Recording]) -> tuple[Support, ...]:
    """What the recordings of a run say of each hypothesis, the best supported first.

    recordings: by role; needs `reference`, `candidate-scores` and at least one of the hypotheses' roles.
    """
    reference, scores = recordings.get("reference"), recordings.get("candidate-scores")
    if reference is None or scores is None:
        return ()
    asked = [h for h in Hypothesis if h.role in recordings]
    found = []
    try:
        plain = lockstep.measure(reference, scores) if asked else None
    except IncomparableError:
        return ()
    for hypothesis in asked:
        assert plain is not None, "measured where anything is asked"
        try:
            found.append(_support(hypothesis, reference, scores, recordings[hypothesis.role], plain))
        except IncomparableError:
            continue  # recorded for other tokens
    return tuple(sorted(found, key=lambda s: s.changed_nats / max(s.plain_nats, 1e-300)))


def _support(
    hypothesis: Hypothesis, reference: Recording, scores: Recording, changed: Recording, whole: Steps
) -> Support:
    sent = {c.id: c.prompt_token_ids for c in reference.completions}
    # The comparison is of what follows the prompts, which differ on purpose.
    as_sent = replace(changed, completions=tuple(replace(c, prompt_token_ids=sent[c.id]) for c in changed.completions))
    theirs = lockstep.measure(as_sent, scores)
    plain = whole.only(theirs.prompt_ids)
    ours, other = (s.per_prompt(s.kl_nats) for s in (plain, theirs))
    return Support(
        hypothesis=hypothesis,
        plain_nats=float(plain.kl_nats.mean()),
        changed_nats=float(theirs.kl_nats.mean()),
        prompts=len(theirs.prompt_ids),
        closer=int(np.sum(other < ours)),
    )
