"""Differences and summaries for tests of reports: small, with every field overridable."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import strategies as st

from greedy_cases import BENIGN, MISMATCH, SIGMA, judged, many, recordings_of, short_by_one
from parity.decision import Advice, Decision
from parity.diagnose import Confidence, Diagnosis
from parity.differences import Answer, Choice, PromptDifference, compare
from parity.divergence import Kind
from parity.fingerprint import Difference
from parity.recording import FinishReason
from parity.recovery import Moved, Recovery, Row
from parity.summary import Side, Summary

ANY_TEXT = st.text(st.characters(categories=None), max_size=60)
"""Lone surrogates, control characters and all."""
HOSTILE = st.one_of(
    ANY_TEXT,
    st.text("`~<>&|*_[]#-\\$ \n\r\t1.", max_size=60),
    st.text("漢ﾜ字e\u0301👩\u200d🔬 \n", max_size=60),
    st.sampled_from(
        ["</details>", "<script>alert(1)</script>", "````\n# no heading\n```", "| a |\n|---|", "\u202eabc"]
    ),
)


def choice(token_id: int, text: str | None, logprob_nats: float) -> Choice:
    return Choice(token_id=token_id, text=text, logprob_nats=logprob_nats)


def answer(text: str = "one two", **changes: Any) -> Answer:
    """An answer of two tokens that parts at the second."""
    top = (choice(7, " two", -0.5), choice(8, " three", -1.0), choice(9, None, -3.0))
    plain = Answer(text=text, common=0, tokens=2, finish_reason=FinishReason.LENGTH, chosen=top[0], top=top)
    return replace(plain, **changes)


def recovery(name: str = "parity_facts") -> Recovery:
    """Two tasks, one of them lost a little, and distributions that moved."""
    row = Row(name=name, n=60, reference=0.75, candidate=0.7, recovery=0.7 / 0.75, interval=(0.85, 1.01), lost=4, won=1)
    nothing = replace(row, name=f"{name} 2", reference=0.0, recovery=None, interval=None, lost=0)
    moved = Moved(
        kl_nats=0.01,
        covered=0.99,
        floor_nats=0.001,
        same_choice=0.98,
        perplexity_ratio=1.02,
        perplexity_error=0.003,
        tokens=500,
    )
    return Recovery(tasks=(row, nothing), total=replace(row, name="all tasks", n=120), confidence=0.9, moved=moved)


def difference(reference: Answer | None = None, candidate: Answer | None = None, **changes: Any) -> PromptDifference:
    """A benign divergence; `common` is where the two texts part."""
    ours = reference or answer("one two")
    theirs = candidate or answer("one three", chosen=choice(8, " three", -0.6))
    pairs = zip(ours.text, theirs.text, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours.text), len(theirs.text)))
    plain = PromptDifference(
        id="p-001",
        prompt="Count",
        kind=Kind.BENIGN,
        position=1,
        slack_nats=0.5,
        sigmas=2.0,
        kl_nats=None,
        reference=replace(ours, common=common),
        candidate=replace(theirs, common=common),
    )
    return replace(plain, **changes)


def identical(text: str = "one two") -> PromptDifference:
    same = answer(text, chosen=None, top=())
    return difference(same, same, kind=Kind.IDENTICAL, position=None, slack_nats=None, sigmas=None)


def summary(**changes: Any) -> Summary:
    """A failed upgrade of four prompts, judged by the greedy check."""
    return replace(_failed(), **changes)


@cache
def _failed() -> Summary:
    pairs = [*many([BENIGN, MISMATCH], identical=1), short_by_one("short")]
    reference, candidate = recordings_of(pairs)
    return Summary(
        title="cpu",
        created_at="2026-11-24T12:00:00+00:00",
        decision=Decision(advice=Advice.HOLD, sentence="do not upgrade", evidence=("one prompt is wrong",)),
        reference=Side(label=reference.label, created_at=reference.created_at, facts={"dtype": "float32"}),
        candidate=Side(label=candidate.label, created_at=candidate.created_at, facts={"dtype": "float32"}),
        verdicts=(judged(pairs),),
        diagnosis=Diagnosis(confidence=Confidence.LIKELY, sentence="a wrong mask", evidence=("a token",)),
        effects=(),
        first_divergences=(1, 1, 2),
        kl_by_position=(),
        prompts=compare(reference, candidate, scores=None, scale_sigma_nats=SIGMA, token_text=lambda i: f" t{i}"),
        packages=(Difference(name="vllm", reference="0.31.0", candidate="0.32.0"),),
        facts=(Difference(name="engine.attention", reference=None, candidate="sdpa"),),
        recovery=recovery(),
        reproduce=("parity compare a b",),
    )
